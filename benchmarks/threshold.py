# SPDX-License-Identifier: Apache-2.0

"""How well a threshold travels: labels on products that the model has never seen, without a labeled photo of them.

``python -m benchmarks.threshold --config benchmarks/configs/threshold_resnet18.yaml``. The checkpoints are those of a
leave-one-out leaderboard; or one model, such as a ready head, inspects all products, none of which it was trained on.
Each finished cell is a line of ``cells.jsonl``: the same command goes on after a kill.
"""

import json
import logging
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from anomalib.data import AnomalibDataModule, ImageBatch
from anomalib.metrics.threshold.f1_adaptive_threshold import F1AdaptiveThreshold
from jsonargparse import auto_cli
from lightning.pytorch import seed_everything
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from anomalib_resad import CrossCategory, ResAD
from anomalib_resad.data.cross_category import split_categories
from anomalib_resad.enrollment.draws import seeded
from anomalib_resad.enrollment.files import content_hash, write_whole
from anomalib_resad.post_processor import RankKeepingPostProcessor
from anomalib_resad.reference_rows import leave_one_out
from benchmarks.cells import Cell, append_cell, key, read_cells
from benchmarks.measure import pixel_quality
from benchmarks.methods import engine
from benchmarks.quiet import quiet_lightning
from benchmarks.settings import PACKAGES
from benchmarks.target import target_data

MAY_GROW = ("shots", "draws", "versions")  # what may change when a run goes on
FIGURES = ["F1", "false_alarm_rate", "recall", "pixel_F1", "shown", "good_shown"]


def f1_score(found: Tensor, labels: Tensor) -> float:
    """F1 of boolean predictions and labels of one shape."""
    both = int((found & labels).sum())
    return 2 * both / max(int(found.sum()) + int(labels.sum()), 1)


def image_figures(found: Tensor, labels: Tensor) -> dict[str, float]:
    """F1, share of good images that alarm, share of defective ones that are found; boolean tensors, shape ``(N,)``."""
    return {
        "F1": f1_score(found, labels),
        "false_alarm_rate": float(found[~labels].float().mean()),
        "recall": float(found[labels].float().mean()),
    }


def shown(above: Tensor, found: Tensor, labels: Tensor) -> dict[str, float]:
    """Of the defective images that were found, and of the good ones, the share whose map goes above its threshold.

    All boolean, shape ``(N,)``; NaN of none.
    """
    return {
        "shown": float(above[found & labels].float().mean()),
        "good_shown": float(above[~labels].float().mean()),
    }


def best_threshold(scores: Tensor, labels: Tensor) -> float:
    """The threshold of the best F1 on labeled images: anomalib's, just below the least score that counts as abnormal.

    anomalib calls an image abnormal at the threshold when it looks for it, and above it when it labels images.
    """
    metric = F1AdaptiveThreshold(fields=["pred_score", "gt_label"])
    blank = torch.zeros(len(scores), 3, 1, 1)
    metric.update(ImageBatch(image=blank, pred_score=scores, gt_label=labels))
    threshold = metric.compute()
    return float(torch.nextafter(threshold, torch.tensor(-torch.inf)))


def best_possible(scores: Tensor, labels: Tensor) -> float:
    """The threshold of the best F1 over all thresholds, by counting: what no rule can surpass."""
    values = scores.unique()
    candidates = torch.cat([values[:1] - 1, values])
    found = [f1_score(scores > value, labels) for value in candidates]
    return float(candidates[max(range(len(found)), key=found.__getitem__)])


def labeled_half(scores: Tensor, labels: Tensor, draw: int) -> Tensor:
    """Labels by anomalib's default for a folder of photos, half of whose test images give the threshold of the others.

    Each half is judged with the other half's threshold, so that all images are judged.
    """
    order = torch.as_tensor(seeded(draw, "halves").permutation(len(scores)))
    found = torch.zeros_like(labels)
    for mine, other in ((order[::2], order[1::2]), (order[1::2], order[::2])):
        found[mine] = scores[mine] > best_threshold(scores[other], labels[other])
    return found


def source_statistics(trained: dict[str, Any], source: CrossCategory | None) -> RankKeepingPostProcessor:
    """A trained model's threshold and spread; where it was trained without any, learned from the same held-out images.

    Leaderboards train without a post-processor. The last epoch's validation is repeated here: the same images, weights,
    references and code.
    """
    model = ResAD(**trained, visualizer=False, evaluator=False)
    post_processor = model.post_processor
    assert isinstance(post_processor, RankKeepingPostProcessor)
    if source is not None and (not post_processor.has_statistics or torch.isnan(post_processor.spread)):
        post_processor.keep_statistics = False
        with tempfile.TemporaryDirectory() as folder:
            engine(Path(folder), logger=False).validate(model=model, datamodule=source, verbose=False)
    return post_processor


def measure(
    cell: Cell, data: AnomalibDataModule, trained: dict[str, Any], source: RankKeepingPostProcessor, rates: list[float]
) -> dict[str, Any]:
    """Enroll the drawn references, score the test images, and judge them by each rule."""
    seed_everything(cell.draw)
    model = ResAD(**trained, k_shot=cell.shots, reference_seed=cell.draw, post_processor=False,
                  evaluator=False, visualizer=False)  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        run = engine(Path(folder), logger=False)
        batches: Any = run.predict(model=model, datamodule=data, return_predictions=True)
    scores = torch.cat([batch.pred_score for batch in batches])
    labels = torch.cat([batch.gt_label for batch in batches]).bool()
    has_masks = all(batch.gt_mask is not None for batch in batches)
    maps = torch.cat([batch.anomaly_map.squeeze(1) for batch in batches])
    masks = torch.cat([batch.gt_mask.bool() for batch in batches]) if has_masks else None
    references = leave_one_out(model.model.cpu(), model.pre_processor)
    rules: list[dict[str, Any]] = []

    def judge(rule: str, rate: float | None, post_processor: RankKeepingPostProcessor) -> None:
        threshold, pixel = post_processor.image_threshold.item(), post_processor.pixel_threshold.item()
        found = scores > threshold
        row = {"rule": rule, "rate": rate, "threshold": threshold} | image_figures(found, labels)
        row |= shown(maps.amax(dim=(1, 2)) > pixel, found, labels)
        rules.append(row | {"pixel_F1": None if masks is None else f1_score(maps > pixel, masks)})

    source.forget_product()
    judge("stored", None, source)
    for rate in rates:
        source.calibrate(references, rate, model.model.bank.record.judges_neighborhoods)
        judge("calibrated", rate, source)
    best = best_possible(scores, labels)
    pixel = None if masks is None else pixel_quality(maps, masks.int())[2]
    row = {"rule": "best possible", "threshold": best} | image_figures(scores > best, labels)
    rules.append(row | {"pixel_F1": pixel})
    halves = labeled_half(scores, labels, cell.draw)
    rules.append({"rule": "anomalib, labeled half"} | image_figures(halves, labels))
    return {
        "rules": rules,
        "leave_one_out": references.scores,
        "references": [name for name, _ in model.model.bank.record.files],
        "good": int((~labels).sum()),
        "defective": int(labels.sum()),
    }


def find_checkpoints(folder: Path, method: str, categories: list[str]) -> dict[str, Path]:
    """The checkpoint of each category that it was not trained on.

    Raises:
        FileNotFoundError: If there is none, or more than one.
    """
    found = {category: sorted(folder.glob(f"{method}_without_{category}_*.ckpt")) for category in categories}
    wrong = {category: [path.name for path in paths] for category, paths in found.items() if len(paths) != 1}
    if wrong:
        msg = (
            f"{folder} must hold one {method}_without_<category>_<digest>.ckpt for each category, as a leave-one-out "
            f"leaderboard writes them; found {wrong}."
        )
        raise FileNotFoundError(msg)
    return {category: paths[0] for category, paths in found.items()}


def keep(output: Path, settings: dict[str, Any]) -> None:
    """Write ``settings.json``, or refuse a folder with cells of other settings.

    Raises:
        ValueError: If the folder holds such cells.
    """
    path = output / "settings.json"
    if path.is_file():
        kept = json.loads(path.read_text())
        differing = [name for name in settings if name not in MAY_GROW and kept.get(name) != settings[name]]
        if differing:
            msg = f"{output} holds cells of other {', '.join(differing)}. Choose another output, or remove this one."
            raise ValueError(msg)
    output.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(settings, indent=2) + "\n").encode())


def write_tables(output: Path) -> pd.DataFrame:
    """Write ``results.csv`` (all cells) and ``summary.csv``: means over categories of the means over draws."""
    rows = []
    for cell in read_cells(output / "cells.jsonl"):
        common = {name: cell[name] for name in ("category", "shots", "draw", "good", "defective")}
        common |= {"references": " ".join(cell["references"])}
        common |= {"leave_one_out": " ".join(f"{score:.6g}" for score in cell["leave_one_out"])}
        rows += [common | rule for rule in cell["rules"]]
    results = pd.DataFrame(rows)
    results["rate"] = results["rate"].fillna(0.0)
    write_whole(output / "results.csv", results.to_csv(index=False, float_format="%.6g").encode())
    by = ["shots", "rule", "rate"]
    per_category = results.groupby([*by, "category"], sort=False)[FIGURES].mean()
    summary = per_category.groupby(level=by, sort=False).mean().reset_index()
    write_whole(output / "summary.csv", summary.to_csv(index=False, float_format="%.4f").encode())
    return summary


def main(
    target: AnomalibDataModule,
    output: Path,
    checkpoints: Path | None = None,
    model: dict[str, Any] | None = None,
    method: str = "ResAD",
    shots: list[int] = [2, 4, 8],  # noqa: B006  # read only
    draws: int = 3,
    rates: list[float] = [0.05, 0.1, 0.2],  # noqa: B006  # read only
    val_ratio: float = 0.1,
    source_batch_size: int = 8,
) -> None:
    """Measure all cells that are not measured yet, then write the tables.

    Args:
        target: Datamodule of the targets; several categories are separated by commas.
        output: Folder for cells and tables.
        checkpoints: Folder of what a leave-one-out leaderboard has trained, its ``sources``.
        model: Arguments of one ResAD for all targets instead, which was trained on none of them.
        method: The leaderboard's name of the method.
        shots: Numbers of reference photos, two or more.
        draws: Draws of them for each number, seeded 0, 1, ...
        rates: Target false-alarm rates.
        val_ratio: Share of the source images that was held out of the training.
        source_batch_size: Images per batch of these.
    """
    quiet_lightning()
    logging.getLogger("anomalib_resad").setLevel(logging.ERROR)  # rates that few references cannot show are the point
    targets = {str(single.category): single for single in split_categories(target)}
    if (checkpoints is None) == (model is None):
        msg = f"checkpoints={checkpoints} and model={model}: give one of them."
        raise ValueError(msg)
    found = find_checkpoints(checkpoints, method, list(targets)) if checkpoints else {}
    trained = {category: model or {"checkpoint": found[category]} for category in targets}
    settings = {
        "dataset": target.name,
        "categories": list(targets),
        "method": method,
        "checkpoints": {
            category: {"file": path.name, "sha256": content_hash(path)} for category, path in found.items()
        },
        "model": model,
        "shots": shots,
        "draws": draws,
        "rates": rates,
        "val_ratio": val_ratio,
        "versions": {name: version(name) for name in PACKAGES},
    }
    keep(output, settings)
    path = output / "cells.jsonl"
    done = {key(row) for row in read_cells(path)}
    cells = {
        category: [Cell(method, target.name, category, count, draw) for count in shots for draw in range(draws)]
        for category in targets
    }
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(elapsed_when_finished=False)) as progress:
        wanted = [cell for some in cells.values() for cell in some]
        task = progress.add_task("cells", total=len(wanted), completed=len(done.intersection(wanted)))
        for category, some in cells.items():
            left = [cell for cell in some if cell not in done]
            if not left:
                continue
            progress.update(task, description=f"{category}: threshold of the source")
            others = [targets[other] for other in targets if other != category]
            source = CrossCategory(others, None, val_ratio, source_batch_size, source_batch_size, 0)
            statistics = source_statistics(trained[category], None if model else source)
            for cell in left:
                progress.update(task, description=str(cell))
                data = target_data(targets[category], cell)
                append_cell(path, cell, measure(cell, data, trained[category], statistics, rates))
                progress.advance(task)
    print(write_tables(output).to_string(index=False, float_format="{:.3f}".format))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
