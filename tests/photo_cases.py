# SPDX-License-Identifier: Apache-2.0

"""Awkward photos: drawn ones, those of the shared folder, and products to train on with one of them."""

import runpy
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from anomalib_resad import CrossCategory
from tests.conftest import SHARED, product

SIZES = ("line_scan.png", "large.png", "thread.png")


def photo(seed: int, width: int = 96, height: int = 96) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, 18, (height, width, 1)) + np.array((120, 130, 140))
    return (noise + 10 * np.sin(np.arange(width) / 5)[None, :, None]).clip(0, 255).astype(np.uint8)


def drawn(folder: Path) -> None:
    """The awkward photos, as those in the shared folder."""
    for name in ("bit_depth", "orientation", "pages", "hidden/.thumbnails", "sizes", "damaged"):
        (folder / name).mkdir(parents=True)
    deep, orientation = photo(1).astype(np.uint16) * 16, Image.Exif()
    orientation[274] = 6
    (folder / "bit_depth/rgb12.ppm").write_bytes(b"P6\n96 96\n65535\n" + deep.byteswap().tobytes())
    Image.fromarray(deep[..., 0]).save(folder / "bit_depth/gray12.png")
    for name in ("turned.jpg", "turned.tif", "turned.png"):
        Image.fromarray(photo(2, 96, 64)).save(folder / "orientation" / name, exif=orientation)
    pages = [Image.fromarray(photo(seed)) for seed in (3, 4)]
    pages[0].save(folder / "pages/two_pages.tif", save_all=True, append_images=pages[1:])
    Image.fromarray(photo(5)).save(folder / "hidden/a.png")
    Image.fromarray(photo(6)).save(folder / "hidden/.thumbnails/a.png")
    (folder / "hidden/._a.png").write_bytes(b"Mac OS X")
    for name, size in zip(SIZES, ((1000, 20_000), (7000, 7000), (8, 60_000)), strict=True):
        Image.new("L", size, 99).save(folder / "sizes" / name)
    Image.fromarray(photo(10)).save(folder / "damaged/whole.png")
    Image.fromarray(photo(9, 300, 300)).save(folder / "damaged/half.png")
    content = (folder / "damaged/half.png").read_bytes()
    (folder / "damaged/half.png").write_bytes(content[: len(content) // 2])


def shared(folder: Path) -> None:
    runpy.run_path(str(SHARED / "cases/make_cases.py"))["main"](folder / "all")
    for each in (folder / "all").iterdir():
        each.rename(folder / each.name)


def source(folder: Path, change: Callable[[Path], object]) -> CrossCategory:
    """Two small products to train on, one photo of which is changed."""
    for name in ("one", "two"):
        for index in range(6):
            path = folder / name / ("train/good" if index < 4 else "test/good") / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(photo(index)).save(path)
    change(folder / "two/train/good/3.png")
    return CrossCategory([product(folder, "one"), product(folder, "two")], val_ratio=0.2, num_workers=0)
