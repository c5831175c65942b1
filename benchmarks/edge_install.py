# SPDX-License-Identifier: Apache-2.0

"""A device from nothing to its first score: what is installed there, how large it is, and how long it takes.

It needs the package index, or pip's cache of it: run it by hand.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from jsonargparse import auto_cli

from anomalib_resad.deploy.bundle import read_manifest
from anomalib_resad.enrollment.files import write_whole
from anomalib_resad.enrollment.photos import list_photos

CHECKOUT = Path(__file__).resolve().parents[1]
OUTPUT = CHECKOUT / "benchmarks" / "results" / "edge_install" / "edge_install.json"
PACKAGES = """
import json
from importlib.metadata import distributions
rows = []
for found in distributions():
    files = [found.locate_file(each) for each in found.files or []]
    size = sum(each.stat().st_size for each in files if each.is_file())
    rows.append({"name": found.metadata["Name"], "version": found.version, "mb": round(size / 1e6, 1)})
print(json.dumps(sorted(rows, key=lambda each: -each["mb"])))
"""
WITHOUT = ("torch", "torchvision", "anomalib", "lightning", "timm")


def seconds_of(command: Sequence[object], environment: dict[str, str]) -> float:
    """Run a command, which has to succeed."""
    start = time.perf_counter()
    subprocess.run([str(each) for each in command], check=True, env=environment, stdout=subprocess.DEVNULL)  # noqa: S603
    return round(time.perf_counter() - start, 1)


def main(bundle: Path, good: Path, photos: Path, output: Path = OUTPUT) -> None:
    """Build the wheel, install it with pip in a new environment, enroll a product, and inspect one photo.

    Args:
        bundle: Folder made by `resad export`, or packed file.
        good: Folder of good photos of a product.
        photos: Folder of photos of it, of which the first one is inspected.
        output: JSON file to write.
    """
    outside = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    with TemporaryDirectory() as folder:
        root = Path(folder)
        pip: list[object] = ["-m", "pip", "--quiet", "--disable-pip-version-check"]
        seconds_of(
            [sys.executable, *pip, "wheel", "--no-deps", "--wheel-dir", root / "wheels", CHECKOUT / "edge"], outside
        )
        (wheel,) = (root / "wheels").iterdir()
        venv.create(root / "venv", with_pip=True)
        python, resad = (root / "venv" / "bin" / name for name in ("python", "resad"))
        (root / "new").mkdir()
        shutil.copy(list_photos(photos)[0], root / "new")
        common: list[object] = ["--bundle", bundle.resolve(), "--banks", root / "banks", "--product", "first"]
        load = os.getloadavg()[0]
        seconds = {
            "install": seconds_of([python, *pip, "install", f"{wheel}[edge]"], outside),
            "enroll": seconds_of([resad, "enroll", *common, "--photos", good.resolve()], outside),
            "inspect": seconds_of(
                [resad, "predict", *common, "--photos", root / "new", "--output", root / "found"], outside
            ),
        }
        told = subprocess.run([python, "-c", PACKAGES], check=True, env=outside, capture_output=True, text=True)  # noqa: S603
        packages = [each for each in json.loads(told.stdout) if each["name"] not in ("pip", "setuptools")]
        result: dict[str, Any] = {
            "wheel": wheel.name,
            "wheel_mb": round(wheel.stat().st_size / 1e6, 3),
            "seconds": seconds | {"to_the_first_score": round(sum(seconds.values()), 1)},
            "packages": packages,
            "packages_mb": round(sum(each["mb"] for each in packages), 1),
            "missing": [name for name in WITHOUT if name not in {each["name"] for each in packages}],
            "photos": len(list_photos(good)),
            "backbone": read_manifest(bundle).backbone,
            "python": platform.python_version(),
            "cores": os.cpu_count(),
            "load_at_start": round(load, 1),
        }
    assert result["missing"] == list(WITHOUT), "PyTorch or anomalib came along"
    output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(output, (json.dumps(result, indent=2) + "\n").encode())
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
