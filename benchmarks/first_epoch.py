# SPDX-License-Identifier: Apache-2.0

"""What it takes to read and encode the photos of a training: seconds, pictures, memory, room in the folder.

The photos are those of real products, shifted until there are enough of them. Each case is a process of its own.
"""

import json
import re
import subprocess
import sys
import time
from contextlib import suppress
from importlib.metadata import version
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

import numpy as np
import pandas as pd
import torch
from jsonargparse import auto_cli
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from PIL import Image
from rich.console import Console
from rich.table import Table

from anomalib_resad import CrossCategory, ProductFolder, ResAD
from anomalib_resad.data.cross_category import split_categories
from anomalib_resad.enrollment.files import write_whole
from benchmarks.measure import MEMORY
from benchmarks.methods import engine
from benchmarks.quiet import quiet_lightning
from benchmarks.settings import PACKAGES, cpu

METHODS: dict[str, dict[str, Any]] = {"default": {}, "without synthetic defects": {"synthetic": 0.0}}
WAYS = ("memory", "folder, first training", "folder, next training")
SHIFT = 7  # pixels between two photos that are made of one


def make_photos(data: Path, products: list[str], photos: int, folder: Path) -> None:
    """Products with so many training photos in all: those of the test split as they are, other good ones shifted."""
    tested = {name: len([each for each in (data / name / "test").rglob("*") if each.is_file()]) for name in products}
    for number, name in enumerate(products):
        (folder / name / "train" / "good").mkdir(parents=True)
        for part in ("test", "ground_truth"):
            (folder / name / part).symlink_to((data / name / part).resolve())
        good = sorted((data / name / "train" / "good").iterdir())
        count = (photos - sum(tested.values()) + number) // len(products)
        for index in range(count):
            pixels = np.asarray(Image.open(good[index % len(good)]).convert("RGB"))
            pixels = np.roll(pixels, SHIFT * (index // len(good)), axis=1)
            Image.fromarray(pixels).save(folder / name / "train" / "good" / f"{index:05}.png", compress_level=1)


class Clock(Callback):
    """Seconds until the first step, and those of the first epoch from there on."""

    def __init__(self) -> None:
        self.before = self.epoch = self.start = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Callbacks come before the model, which encodes the photos."""
        del trainer, pl_module
        self.start = time.perf_counter()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """All features are there."""
        del trainer, pl_module
        self.before = time.perf_counter() - self.start

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The first epoch."""
        self.epoch = time.perf_counter() - self.start - self.before
        cache = getattr(pl_module, "source").cache  # noqa: B009  # of a ResAD
        self.pictures, self.kept_mb, self.images = len(cache), cache.bytes / 1e6, len(trainer.datamodule.train_data)  # type: ignore[attr-defined]


def one(photos: Path, products: str, settings: dict[str, Any], workers: int, batch_size: int, threads: int) -> None:
    """Train for one epoch in this process, and print what it took.

    Args:
        photos: Folder of products.
        products: Those to train on, separated by commas.
        settings: Arguments of ResAD.
        workers: Processes that prepare photos.
        batch_size: Images per training step.
        threads: Threads of PyTorch.
    """
    quiet_lightning()
    torch.set_num_threads(threads)
    seed_everything(0)
    model = ResAD("resnet18", visualizer=False, evaluator=False, **settings)
    with torch.no_grad():
        noise, seconds = torch.rand(16, 3, 224, 224), []
        for _ in range(6):
            start = time.perf_counter()
            model.model.encode(noise)
            seconds.append(time.perf_counter() - start)
    sources = split_categories(ProductFolder(photos, products))
    data = CrossCategory(sources, None, 0.0, batch_size, batch_size, workers)
    clock = Clock()
    with TemporaryDirectory() as folder:
        engine(Path(folder), 1, clock, limit_val_batches=0).fit(model=model, datamodule=data)
    figures = {"images": clock.images, "encode_ms": 1000 * min(seconds) / len(noise), "before_s": clock.before}
    line = next(line for line in (MEMORY / "status").read_text().splitlines() if line.startswith("VmHWM"))
    figures["peak_mb"] = 1.024e-3 * int(line.split()[1])
    figures |= {"epoch_s": clock.epoch, "in_memory": clock.pictures, "in_memory_mb": clock.kept_mb}
    print(json.dumps(figures), flush=True)


def loaders_mb(process: int) -> float:
    """Megabytes of the processes that another one started; what they share counts once. Linux alone tells."""
    total = 0.0
    for status in Path("/proc").glob("[0-9]*/status"):
        with suppress(OSError):  # it has just ended
            if re.search(rf"\nPPid:\s*{process}\n", status.read_text()):
                shares = re.search(r"\nPss:\s*(\d+) kB", (status.parent / "smaps_rollup").read_text())
                total += 1.024e-3 * int(shares[1]) if shares else 0
    return total


def measured(**arguments: Any) -> dict[str, Any]:  # noqa: ANN401
    """What :func:`one` printed in a process of its own, and the most memory of its loaders."""
    options = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "benchmarks.first_epoch", "one", *options]
    with TemporaryFile("w+") as said, subprocess.Popen(command, stdout=said) as process:  # noqa: S603  # ours
        peak = 0.0
        while process.poll() is None:
            peak = max(peak, loaders_mb(process.pid))
            with suppress(subprocess.TimeoutExpired):
                process.wait(3)
        said.seek(0)
        lines = [line for line in said if line.startswith("{")]
    return json.loads(lines[-1]) | {"loaders_mb": peak}


def keep(row: dict[str, Any], path: Path) -> None:
    """Add a row to the table, in the place of one of the same case."""
    known = pd.read_csv(path).to_dict("records") if path.is_file() else []
    case = ("photos", "method", "features")
    rows = [each for each in known if any(each[name] != row[name] for name in case)]
    write_whole(path, pd.DataFrame([*rows, row]).to_csv(index=False, float_format="%.4g").encode())


def main(
    data: Path,
    output: Path,
    products: tuple[str, ...] = ("asphalt_tiles", "pcb_13000", "screw", "solar_mono"),
    photos: int = 1000,
    weights: Path | None = None,
    cache_gb: float = 4.0,
    methods: tuple[str, ...] = tuple(METHODS),
    ways: tuple[str, ...] = WAYS,
    workers: int = 2,
    batch_size: int = 8,
    threads: int = 2,
) -> None:
    """Measure, and write ``first_epoch.csv`` and ``first_epoch.json``; other cases that are there stay.

    Args:
        data: Folder of products.
        output: Folder to write to.
        products: Those to train on.
        photos: About how many training photos.
        weights: Local file with the weights of ResNet-18; by default timm's.
        cache_gb: Most memory for features.
        methods: Some of ``default``, ``without synthetic defects``.
        ways: Where features are kept, some of ``memory``, ``folder, first training``, ``folder, next training``.
        workers: Processes that prepare photos.
        batch_size: Images per training step.
        threads: Threads of PyTorch.
    """
    output.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as folder:
        make_photos(data, list(products), photos, Path(folder) / "products")
        for method, way in product(methods, ways):
            settings = METHODS[method] | ({} if way == WAYS[0] else {"cache_dir": str(Path(folder) / method)})
            settings |= {"cache_gb": cache_gb, "weights": None if weights is None else str(weights)}
            given = {"photos": Path(folder) / "products", "products": ",".join(products), "workers": workers}
            given |= {"settings": json.dumps(settings), "batch_size": batch_size, "threads": threads}
            found = measured(**given)
            files = [path.stat().st_size for path in (Path(folder) / method).glob("*.pt")]
            row = {"photos": photos, "method": method, "features": way, "cache_gb": cache_gb} | found
            keep(row | {"files": len(files), "files_mb": sum(files) / 1e6}, output / "first_epoch.csv")
    about = {
        "backbone": "resnet18",
        "image_size": [224, 224],
        "workers": workers,
        "batch_size": batch_size,
        "threads": threads,
        "cpu": cpu(),
        "versions": {name: version(name) for name in PACKAGES},
    }
    write_whole(output / "first_epoch.json", (json.dumps(about, indent=2) + "\n").encode())
    table = pd.read_csv(output / "first_epoch.csv")
    shown = Table(*table.columns)
    for each in table.itertuples(index=False):
        shown.add_row(*map(str, each))
    Console(width=200).print(shown)


if __name__ == "__main__":
    auto_cli({"run": main, "one": one}, as_positional=False)
