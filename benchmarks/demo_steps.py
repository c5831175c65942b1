# SPDX-License-Identifier: Apache-2.0

"""The steps of the demo that a user takes with the command ``resad``, each in a process of its own."""

import csv
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from anomalib_resad.enrollment.files import TABLE
from anomalib_resad.enrollment.photos import list_photos
from anomalib_resad.enrollment.ranking import auroc

# A device has none of these: importing them fails.
ABSENT = ("torch", "torchvision", "anomalib", "lightning", "timm", "FrEIA")
TILE = 160  # side of a photo in the picture, in pixels
COLUMNS = 8


@dataclass(frozen=True)
class Step:
    """What a step found.

    Attributes:
        name (str): The step.
        image_auroc (float): Over the inspected photos, of 0 to 1.
        found (str): Defective photos with an alarm.
        false_alarms (str): Good photos with an alarm.
        seconds (float): From the first command to the last result.
    """

    name: str
    image_auroc: float
    found: str
    false_alarms: str
    seconds: float


def resad(*words: object, without_pytorch: bool = False) -> None:
    """Run the command ``resad``.

    Raises:
        subprocess.CalledProcessError: If it fails.
    """
    blocked = f"import sys; sys.modules.update(dict.fromkeys({ABSENT})); " if without_pytorch else ""
    code = f"{blocked}from anomalib_resad.cli import main; main()"
    subprocess.run([sys.executable, "-c", code, *map(str, words)], check=True)  # noqa: S603  # our own command


def few_photos(product: Path, count: int, folder: Path) -> Path:
    """Copy the first good photos of a product into a folder of their own, as a user has them."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in list_photos(product / "train" / "good")[:count]:
        shutil.copy(path, folder)
    return folder


def judged(name: str, found: Path, seconds: float) -> Step:
    """What the table of ``resad predict`` says, of photos whose folder says whether they are good."""
    with (found / TABLE).open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    defective = [not row["photo"].startswith("good/") for row in rows]
    alarms = [row["label"] == "anomalous" for row in rows]
    scores = [float(row["raw_score"]) for row in rows]

    def count(kind: bool) -> str:
        own = [alarm for alarm, is_defective in zip(alarms, defective, strict=True) if is_defective == kind]
        return f"{sum(own)} of {len(own)}" if all(row["label"] for row in rows) else "no threshold"

    return Step(name, float(auroc(scores, defective) or 0.0), count(True), count(False), seconds)


def inspect_at_once(product: Path, good: Path, output: Path, model: Sequence[object], name: str) -> Step:
    """Inspect a product that nothing was trained for, with the ready head."""
    start = time.perf_counter()
    resad("inspect", "--good", good, "--photos", product / "test", "--output", output, *model)
    return judged(name, output, time.perf_counter() - start)


def inspect_on_a_device(product: Path, good: Path, checkpoint: Path, output: Path, name: str) -> Step:
    """Export a trained model, then enroll and inspect without PyTorch."""
    bundle, found = output / "bundle", output / "found"
    shutil.rmtree(output, ignore_errors=True)
    resad("export", "--checkpoint", checkpoint, "--output", bundle)
    start = time.perf_counter()
    resad("enroll", "--bundle", bundle, "--product", product.name, "--photos", good, without_pytorch=True)
    inspected = ("--bundle", bundle, "--product", product.name, "--photos", product / "test", "--output", found)
    resad("predict", *inspected, without_pytorch=True)
    return judged(name, found, time.perf_counter() - start)


def picture(maps: Path, path: Path) -> Path:
    """Some of the maps of ``resad predict`` side by side, the same number of each kind of photo."""
    kinds = sorted({each.parent for each in maps.rglob("*.png")}, key=lambda folder: (folder.name != "good", folder))
    rows = [sorted(folder.glob("*.png"))[:COLUMNS] for folder in kinds[:4]]
    sheet = Image.new("RGB", (COLUMNS * TILE, len(rows) * TILE), "white")
    for line, files in enumerate(rows):
        for column, file in enumerate(files):
            with Image.open(file) as tile:
                sheet.paste(tile.convert("RGB").resize((TILE, TILE)), (column * TILE, line * TILE))
    sheet.save(path)
    return path
