# SPDX-License-Identifier: Apache-2.0

"""What keeping features is worth in training: seconds and loss of each epoch, with the cache and without.

Both trainings see the same images, references, synthetic defects and order; only the features are computed anew in the
second.
"""

import json
import time
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import torch
from anomalib.data import AnomalibDataModule
from jsonargparse import auto_cli
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from rich.console import Console
from rich.table import Table

from anomalib_resad import CrossCategory, ResAD
from anomalib_resad.data.cross_category import split_categories
from anomalib_resad.enrollment.files import write_whole
from benchmarks.methods import engine
from benchmarks.quiet import quiet_lightning
from benchmarks.settings import PACKAGES, cpu


class Clock(Callback):
    """Seconds and mean loss of each epoch."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []
        self._start = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock: the first epoch pays for learning the keys, and for computing the features that are kept."""
        del trainer, pl_module
        self._start = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the epoch."""
        del pl_module
        now = time.perf_counter()
        self.epochs.append({"seconds": now - self._start, "loss": float(trainer.callback_metrics["train_head"])})
        self._start = now


def main(
    source: AnomalibDataModule,
    output: Path,
    backbone: str = "resnet18",
    weights: Path | None = None,
    epochs: int = 4,
    batch_size: int = 8,
    threads: int = 2,
    seed: int = 0,
) -> None:
    """Train twice and write ``training.csv`` and ``training.json``.

    Args:
        source: Datamodule of the categories to train on, separated by commas.
        output: Folder to write to.
        backbone: timm name.
        weights: Local file with its weights; by default timm's.
        epochs: Epochs of each training.
        batch_size: Images per batch.
        threads: Threads of PyTorch.
        seed: Seed of both trainings.
    """
    quiet_lightning()
    torch.set_num_threads(threads)
    rows: list[dict[str, Any]] = []
    for cache_gb in (4.0, 0.0):
        clock = Clock()
        seed_everything(seed)
        model = ResAD(backbone, weights=weights, cache_gb=cache_gb, visualizer=False, evaluator=False)
        data = CrossCategory(split_categories(source), None, 0.1, batch_size, batch_size, 0)
        with TemporaryDirectory() as folder:
            run = engine(Path(folder), epochs, clock, limit_val_batches=0)
            run.fit(model=model, datamodule=data)
        rows += [{"cache_gb": cache_gb, "epoch": number, **epoch} for number, epoch in enumerate(clock.epochs)]
    about = {
        "source": [single.category for single in split_categories(source)],
        "images": len(data.train_data),
        "backbone": backbone,
        "epochs": epochs,
        "batch_size": batch_size,
        "threads": threads,
        "seed": seed,
        "cpu": cpu(),
        "versions": {name: version(name) for name in PACKAGES},
    }
    output.mkdir(parents=True, exist_ok=True)
    write_whole(output / "training.csv", pd.DataFrame(rows).to_csv(index=False, float_format="%.6g").encode())
    write_whole(output / "training.json", (json.dumps(about, indent=2) + "\n").encode())
    table = Table(*rows[0], "epochs / minute")
    for row in rows:
        table.add_row(*(f"{value:.4g}" for value in row.values()), f"{60 / row['seconds']:.1f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
