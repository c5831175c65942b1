# SPDX-License-Identifier: Apache-2.0

"""How time and memory of one photo grow: with its area, with the references, with the products of a device.

Times are ratios to the backbone alone on the same photo, in the same run. Weights are untrained and photos are noise:
neither changes the time.
"""

import json
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")

import pandas as pd
from jsonargparse import auto_cli
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from anomalib_resad.deploy import ResADInferencer
from anomalib_resad.enrollment.files import write_whole
from benchmarks.edge import memory_mb

SIDES = {1: 224, 2: 320, 4: 448, 8: 640}  # pixels, by about how many times the area of the first
SHOTS, OF_PRODUCT = 4, 2  # references
KINDS = ["photo area", "references", "products"]
Row = dict[str, Any]


def model_rows(backbone: str, areas: tuple[int, ...], references: tuple[int, ...], repeats: int) -> list[Row]:
    """Photos of growing area with references alike, and growing references of the first area, in PyTorch."""
    import torch  # noqa: PLC0415  # the products' process is without

    from benchmarks.measure import PeakMemory, latency  # noqa: PLC0415
    from benchmarks.speed_models import enrolled  # noqa: PLC0415

    rows: list[Row] = []
    sizes = [("photo area", area, SIDES[area], SHOTS) for area in areas]
    sizes += [("references", shots, SIDES[1], shots) for shots in references]
    for grows, times, side, shots in sizes:
        torch.manual_seed(0)
        with torch.no_grad():
            model = enrolled(backbone, torch.randn(shots, 3, side, side)).model
            photo = torch.randn(1, 3, side, side)
            whole, alone = latency(model, model.encoder.backbone, photo, repeats)
            with PeakMemory() as peak:
                model(photo)
        used = None if peak.bytes is None else peak.bytes / 1e6
        searched = sum(level.nbytes for level in model.bank.searched.values)
        row = {"grows": grows, "times": times, "ms": whole, "backbone_ms": alone, "ratio": whole / alone}
        rows.append(row | {"memory_mb": used, "searched_mb": searched / 1e6})
    return rows


def products(bundle: Path, counts: str, passes: int = 1, threads: int = 2) -> None:
    """Predict on products in turn, another one at each photo, and print the time and the memory of this process.

    Args:
        bundle: A bundle.
        counts: Numbers of products, ascending, separated by commas.
        passes: Predictions of each product that count, and one before them.
        threads: CPU threads.
    """
    random = np.random.default_rng(0)
    photos = [random.integers(0, 256, (224, 224, 3), dtype=np.uint8) for _ in range(OF_PRODUCT)]
    inferencer, known = ResADInferencer(bundle, banks=bundle / "banks", threads=threads), 0
    for count in map(int, counts.split(",")):
        for number in range(known, count):
            inferencer.enroll(str(number), photos, rotations=1)
        known, whole, alone = count, [], []
        for number in list(range(count)) * (passes + 1):
            start = time.perf_counter()
            inferencer.predict(photos[0], str(number))
            whole.append(1000 * (time.perf_counter() - start))
            start = time.perf_counter()
            inferencer.encode(photos[0][None])
            alone.append(1000 * (time.perf_counter() - start))
        found = {"ms": median(whole[count:]), "backbone_ms": median(alone[count:]), "memory_mb": memory_mb()}
        print(json.dumps({"grows": "products", "times": count} | found), flush=True)


def product_rows(backbone: str, counts: tuple[int, ...], threads: int) -> list[Row]:
    """What :func:`products` measures, in a process of its own without PyTorch; the encoder stands for the backbone."""
    from anomalib_resad import ResAD  # noqa: PLC0415
    from anomalib_resad.export.edge_bundle import convert, write_bundle  # noqa: PLC0415

    with TemporaryDirectory() as folder:
        model = ResAD(backbone=backbone, pre_trained=False, visualizer=False).eval()
        bundle = write_bundle(model, convert(model), Path(folder) / "bundle", "fp32")
        given = ["--bundle", str(bundle), "--counts", ",".join(map(str, counts)), "--threads", str(threads)]
        command = [sys.executable, "-m", "benchmarks.growth", "products", *given]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)  # noqa: S603  # ours
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return [row | {"ratio": row["ms"] / row["backbone_ms"]} for row in rows]


def plot(rows: list[Row], path: Path) -> None:
    """Ratio and memory against what grows; a broken line shows what linear growth would be."""
    table = pd.DataFrame(rows)
    kinds = list(dict.fromkeys(table["grows"]))
    figure = Figure(figsize=(4 * len(kinds), 6), layout="constrained")
    axes = figure.subplots(2, len(kinds), squeeze=False)
    for kind, (above, below) in zip(kinds, axes.T, strict=True):
        own = table[table["grows"] == kind]
        above.plot(own["times"], own["ratio"], "o-", color="#0072B2")
        above.set_ylim(0, 1.1 * max(own["ratio"].max(), 2))
        above.set_ylabel("time over the backbone")
        below.plot(own["times"], own["memory_mb"], "s-", color="#D55E00", label="measured")
        if kind == "photo area":
            linear = own["memory_mb"].iloc[0] * own["times"] / own["times"].iloc[0]
            below.plot(own["times"], linear, "--", color="0.5", label="linear")
            below.legend(frameon=False)
        below.set_ylim(0, 1.1 * own["memory_mb"].max())
        below.set_ylabel("memory of the device's process, MB" if kind == "products" else "memory beyond the model, MB")
        for axis in (above, below):
            axis.set_xscale("log", base=2)
            axis.set_xticks(own["times"], [str(value) for value in own["times"]])
            axis.minorticks_off()
            axis.set_xlabel({"photo area": "times 224 x 224 pixels"}.get(kind, kind))
            axis.grid(visible=True, axis="y", color="0.9")
            axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def run(
    output: Path = Path("benchmarks/results/growth"),
    backbone: str = "resnet18",
    areas: tuple[int, ...] = (1, 2, 4, 8),
    references: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64),
    counts: tuple[int, ...] = (1, 10, 50, 200),
    repeats: int = 9,
    threads: int = 2,
) -> None:
    """Measure, and write ``growth.csv``, ``growth.json`` and ``growth.png``; what is not asked for stays as it was.

    Args:
        output: Folder to write to.
        backbone: timm name.
        areas: Areas of a photo, as multiples of 224 x 224 pixels: some of 1, 2, 4, 8.
        references: Numbers of reference photos.
        counts: Numbers of products on a device.
        repeats: Counted rounds.
        threads: CPU threads.
    """
    import torch  # noqa: PLC0415

    from benchmarks.settings import PACKAGES, cpu  # noqa: PLC0415

    torch.set_num_threads(threads)
    output.mkdir(parents=True, exist_ok=True)
    rows = model_rows(backbone, areas, references, repeats)
    rows += product_rows(backbone, counts, threads) if counts else []
    if (output / "growth.csv").is_file():
        known: list[dict[str, Any]] = pd.read_csv(output / "growth.csv").to_dict("records")  # type: ignore[assignment]
        new = {row["grows"] for row in rows}
        rows = sorted(
            [*[row for row in known if row["grows"] not in new], *rows], key=lambda row: KINDS.index(row["grows"])
        )
    write_whole(output / "growth.csv", pd.DataFrame(rows).to_csv(index=False, float_format="%.4g").encode())
    about = {
        "backbone": backbone,
        "sides": {area: SIDES[area] for area in areas},
        "references": {"of each area": SHOTS, "of each product": OF_PRODUCT},
        "repeats": repeats,
        "threads": threads,
        "seed": 0,
        "cpu": cpu(),
        "versions": {name: version(name) for name in (*PACKAGES, "openvino")},
    }
    write_whole(output / "growth.json", (json.dumps(about, indent=2) + "\n").encode())
    plot(rows, output / "growth.png")
    shown = Table(*rows[0])
    for row in rows:
        cells = (row.get(name) for name in rows[0])
        shown.add_row(
            *("" if cell is None else f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells)
        )
    Console(width=120).print(shown)


if __name__ == "__main__":
    auto_cli({"run": run, "products": products}, as_positional=False)
