# SPDX-License-Identifier: Apache-2.0

"""Products from pictures of surfaces: each photo of one shows another part of the same picture."""

import os
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from anomalib_resad.enrollment.photos import check_photos, list_photos, read_pixels
from benchmarks.sources.surfaces import Drawing, Product, Rng, everywhere

SMALLEST_SIDE = 256  # pixels; parts of a smaller picture would overlap too much, or be blurred by enlarging them
PART = (0.45, 0.75)  # side of what a photo shows, in shares of the picture's shorter side, from and to
PLACES = 4  # rows and columns of places that a picture is looked at in
CONTRAST = 0.015  # deviation of the gray values at each place, 0..1; defects need something that they can change


def list_surfaces(folder: Path | os.PathLike[str]) -> list[Path]:
    """The pictures of a folder, and of those in it, that are large enough and plain nowhere.

    Args:
        folder (Path | os.PathLike[str]): Pictures of surfaces, such as cloth, stone, paper, or leaves.

    Raises:
        ValueError: If a picture is damaged, or none can be used.
    """
    paths = list_photos(str(folder))
    check_photos(paths, "source pictures")
    used = [path for path in paths if _is_surface(path)]
    if not used:
        msg = (
            f"None of the {len(paths)} pictures in {folder} can be a surface: each side must be {SMALLEST_SIDE} pixels "
            f"or longer, and gray values must deviate by {CONTRAST} of white or more at each of {PLACES} x {PLACES} "
            "places. Give larger photos of surfaces that are plain nowhere."
        )
        raise ValueError(msg)
    return used


def _is_surface(path: Path) -> bool:
    with Image.open(path) as picture:
        if min(picture.size) < SMALLEST_SIDE:
            return False
    gray = cv2.cvtColor(read_pixels(path), cv2.COLOR_RGB2GRAY)
    places = [place for row in np.array_split(gray, PLACES) for place in np.array_split(row, PLACES, axis=1)]
    return min(float(place.std()) for place in places) / 255 >= CONTRAST


def surface_of(path: Path) -> Callable[[Rng], Product]:
    """A product of which each photo shows a part of the picture, all of one size.

    Args:
        path (Path): The picture.
    """

    def design_of(design: Rng) -> Product:  # reads the picture now: not all of them at once
        pixels = read_pixels(path)[..., ::-1].astype(np.float32) / 255  # OpenCV writes blue first
        side = int(design.uniform(*PART) * min(pixels.shape[:2]))

        def draw(rng: Rng, size: int) -> Drawing:
            top, left = (int(rng.integers(0, reach - side + 1)) for reach in pixels.shape[:2])
            part = pixels[top : top + side, left : left + side]
            smoothing = cv2.INTER_AREA if side > size else cv2.INTER_LINEAR
            return cv2.resize(part, (size, size), interpolation=smoothing), everywhere(size)

        return draw

    return design_of
