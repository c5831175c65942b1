# SPDX-License-Identifier: Apache-2.0

"""Memory of the edge over photos of ever new sizes, with what the runtime lets OpenVINO keep, and with its default.

An untrained model of usual size stands in: the memory does not depend on what the weights are.
"""

import csv
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from jsonargparse import auto_cli
from rich.console import Console

from anomalib_resad.deploy import ResADInferencer, runtime
from anomalib_resad.enrollment.photos import read_pixels

OPENVINO_KEEPS = 5000  # shapes, by default
SIDES = (64, 1200)
COLUMNS = ("keeps", "sizes", "megabytes")


def one(bundle: Path, keeps: int, sizes: int, seed: int = 0) -> None:
    """Encode photos of different sizes in this process, and print the memory every now and then.

    Args:
        bundle: A bundle.
        keeps: Shapes that OpenVINO may keep.
        sizes: How many sizes.
        seed: Of the sizes.
    """
    runtime.CACHED_SHAPES = keeps
    inferencer = ResADInferencer(bundle, banks=bundle / "banks", threads=1)
    random = np.random.default_rng(seed)
    for number in range(1, sizes + 1):
        height, width = (int(side) for side in random.integers(*SIDES, size=2))
        inferencer.encode(read_pixels(np.zeros((height, width), np.uint8))[None])
        if number in (1, 10, 100) or number % (sizes // 10) == 0:
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
            print(f"{keeps},{number},{resident / 1e6:.0f}", flush=True)


def run(output: Path = Path("benchmarks/results/sizes/sizes.csv"), sizes: int = 5000) -> None:
    """Measure both, each in a process of its own, and write a table.

    Args:
        output: The table.
        sizes: How many sizes.
    """
    from anomalib_resad import ResAD  # noqa: PLC0415  # PyTorch, which the measured processes are without
    from anomalib_resad.export.edge_bundle import convert, write_bundle  # noqa: PLC0415

    with TemporaryDirectory() as folder:
        model = ResAD(backbone="resnet18", pre_trained=False, estimator="distance").eval()
        bundle = write_bundle(model, convert(model), Path(folder) / "bundle", "fp32")
        rows = []
        for keeps in (runtime.CACHED_SHAPES, OPENVINO_KEEPS):
            arguments = ["one", "--bundle", str(bundle), "--keeps", str(keeps), "--sizes", str(sizes)]
            command = [sys.executable, "-m", "benchmarks.sizes", *arguments]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)  # noqa: S603  # ours
            rows += [line.split(",") for line in done.stdout.splitlines()]
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])
    Console().print(f"{output}: {len(rows)} rows.")


if __name__ == "__main__":
    auto_cli({"run": run, "one": one}, as_positional=False)
