# SPDX-License-Identifier: Apache-2.0

"""Compare methods on the same reference photos and on raw scores; a table, a CSV and the settings as JSON."""

import csv
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from anomalib.data import AnomalibDataModule, ImageBatch
from anomalib.engine import Engine
from anomalib.models import AnomalibModule, Patchcore
from lightning.pytorch.callbacks import RichProgressBar
from rich.console import Console
from rich.table import Table
from sklearn.metrics import roc_auc_score
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import Resize

from anomalib_resad import ProductFolder, ResAD

Predictions = dict[str, list[ImageBatch]]
PACKAGES = ("anomalib", "torch", "timm", "FrEIA", "anomalib-resad")


def engine(output: Path, epochs: int | None = None) -> Engine:
    """An engine with a progress bar and no loggers."""
    limits: dict[str, Any] = {"max_epochs": epochs} if epochs else {}
    return Engine(default_root_dir=output, callbacks=[RichProgressBar()], enable_model_summary=False, **limits)


def predict(model: AnomalibModule, data: AnomalibDataModule, output: Path) -> list[ImageBatch]:
    """Raw predictions of the target's test images; ResAD enrolls the references first."""
    predictions: Any = engine(output).predict(model=model, datamodule=data, return_predictions=True)
    return list(predictions)


def auroc(predictions: list[ImageBatch]) -> dict[str, float | None]:
    """Image and pixel AUROC of raw scores.

    Not by torchmetrics, batch by batch: it passes those batches through a sigmoid that have a score beyond 0..1.
    """
    scores = torch.cat([torch.as_tensor(batch.pred_score) for batch in predictions])
    labels = torch.cat([torch.as_tensor(batch.gt_label) for batch in predictions])
    pixel = None
    if all(batch.gt_mask is not None for batch in predictions):
        maps = torch.cat([torch.as_tensor(batch.anomaly_map).flatten() for batch in predictions])
        masks = torch.cat([torch.as_tensor(batch.gt_mask).flatten() for batch in predictions])
        pixel = float(roc_auc_score(masks, maps))
    return {"image_AUROC": float(roc_auc_score(labels, scores)), "pixel_AUROC": pixel}


def predict_patchcore(resad: ResAD, data: ProductFolder, output: Path) -> list[ImageBatch]:
    """Raw predictions of anomalib's Patchcore, fitted on ResAD's references, with ResAD's backbone weights."""
    pyramid = resad.model.backbone
    size = resad.hparams["image_size"]
    model = Patchcore(
        backbone=pyramid.name,
        pre_trained=False,
        coreset_sampling_ratio=0.1,
        pre_processor=Patchcore.configure_pre_processor(size),
        post_processor=False,
        evaluator=False,
        visualizer=False,
    )
    extractor: Any = model.model.feature_extractor
    state = {key.removeprefix("model."): value for key, value in pyramid.net.state_dict().items()}
    extractor.feature_extractor.load_state_dict(state)
    names = [file["name"] for file in resad.model.bank.record["files"]]
    data.setup()
    train = data.train_data.samples
    chosen = data.train_data.subsample(
        [index for index, path in enumerate(train.image_path) if Path(path).name in names]
    )
    chosen.augmentations = Resize(size, antialias=True)
    loader = DataLoader(chosen, batch_size=len(chosen), collate_fn=chosen.collate_fn)
    run = engine(output)
    run.fit(model=model, train_dataloaders=loader)
    return predict(model, data, output)


def compare(
    checkpoint: Path, k_shot: int, draw: int, data: Callable[[], ProductFolder], output: Path, *, patchcore: bool
) -> tuple[Predictions, list[str]]:
    """Predictions of all methods with one draw of references.

    Args:
        checkpoint (Path): A trained ResAD.
        k_shot (int): Reference photos.
        draw (int): Seed of the draw.
        data (Callable[[], ProductFolder]): Makes the target's datamodule.
        output (Path): Folder for what the engine writes.
        patchcore (bool): Include anomalib's Patchcore.

    Returns:
        tuple[Predictions, list[str]]: Raw predictions of each method; names of the references.
    """
    resad, neighbor = (
        ResAD(
            checkpoint=checkpoint,
            estimator=estimator,
            k_shot=k_shot,
            reference_seed=draw,
            post_processor=False,
            evaluator=False,
            visualizer=False,
        )
        for estimator in ("flow", "distance")
    )
    predictions = {
        "ResAD": predict(resad, data(), output),
        "nearest neighbor": predict(neighbor, data(), output),
    }
    if patchcore:
        predictions["Patchcore"] = predict_patchcore(resad, data(), output)
    return predictions, [file["name"] for file in resad.model.bank.record["files"]]


def mean_and_spread(rows: list[dict[str, Any]], method: str, key: str) -> str:
    """Mean over the draws in per cent, with the standard deviation if there are several."""
    values = [100 * float(row[key]) for row in rows if row["method"] == method and row[key] not in (None, "")]
    spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
    return f"{mean(values):.1f}{spread}" if values else "no masks"


def markdown_table(path: Path) -> str:
    """The table of a ``results.csv``, as it stands in the README."""
    with path.open(newline="") as file:
        rows: list[dict[str, Any]] = list(csv.DictReader(file))
    lines = ["| method | image AUROC | pixel AUROC |", "|---|---|---|"]
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = [mean_and_spread(rows, method, key) for key in ("image_AUROC", "pixel_AUROC")]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def print_table(rows: list[dict[str, Any]], title: str, console: Console) -> None:
    """Print one line per method."""
    table = Table("method", "image AUROC %", "pixel AUROC %", title=title)
    for method in dict.fromkeys(row["method"] for row in rows):
        table.add_row(method, *(mean_and_spread(rows, method, key) for key in ("image_AUROC", "pixel_AUROC")))
    console.print(table)


def write_results(output: Path, rows: list[dict[str, Any]], settings: dict[str, Any]) -> None:
    """Write ``results.csv`` (one line per method and draw) and ``settings.json``, each whole or not at all."""
    fields = ["method", "target", "k_shot", "draw", "image_AUROC", "pixel_AUROC", "references"]
    temporary = output / "results.csv.part"
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(output / "results.csv")
    settings = settings | {"versions": {name: version(name) for name in PACKAGES}, "device": "cpu"}
    temporary = output / "settings.json.part"
    temporary.write_text(json.dumps(settings, indent=2) + "\n")
    temporary.replace(output / "settings.json")
