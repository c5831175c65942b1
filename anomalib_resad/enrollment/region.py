# SPDX-License-Identifier: Apache-2.0

"""The region of interest: which part of a product's photos counts.

A region is a mask of 0 and 1, uint8, shape ``(h, w)``, in the shape of the photos but of any size. What a model sees is
its box, cut out of the photo, with one color where the box lies outside of the region. So no pixel outside can change
a feature, neither of a reference nor of a photo.
"""

import re
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from anomalib_resad.enrollment.decoding import SMALLEST_SIDE, PhotoError
from anomalib_resad.enrollment.image_size import Size
from anomalib_resad.enrollment.photos import Photo, read_pixels

RegionSource: TypeAlias = "Photo | None"  # a text may also be the corners of a polygon
Box: TypeAlias = tuple[int, int, int, int]  # top, left, bottom and right edge

FILL = (124, 116, 104)  # the mean color of ImageNet's photos: about zero where a backbone sees it
LONGEST = 1024  # pixels of a mask's longer side; models see less
INSIDE = 127  # a pixel of a mask file belongs to the region if one of its colors is brighter
TOLERANCE = 0.01  # of a side, by which the shape of photos may differ from that of the region
NUMBER = r"-?\d+(?:\.\d+)?"
POLYGON = re.compile(rf"\s*{NUMBER}\s*,\s*{NUMBER}(?:[\s;]+{NUMBER}\s*,\s*{NUMBER})*\s*")


def read_region(source: Photo, sizes: Sequence[Size]) -> np.ndarray | None:
    """The mask of a region.

    Args:
        source (Photo): A mask, as a file, its content, a picture or an array, white inside; or the corners of a
            polygon in pixels of the photos, ``"x,y x,y x,y"``.
        sizes (Sequence[Size]): Height and width of the good photos.

    Returns:
        np.ndarray | None: uint8, 0 and 1, its longer side at most :data:`LONGEST`; ``None`` where all is inside.

    Raises:
        ValueError: If it is empty, too small, or not in the shape of the photos.
        PhotoError: If the file cannot be read.
    """
    if isinstance(source, str) and POLYGON.fullmatch(source):
        mask = _drawn(source, sizes)
    elif isinstance(source, np.ndarray) and source.dtype == bool:
        mask = source
    else:
        mask = read_pixels(source).max(axis=2) > INSIDE
    if not mask.any():
        msg = f"The region is empty: no pixel of the mask is brighter than {INSIDE}. Paint what counts white."
        raise ValueError(msg)
    region = stretched(mask, _kept(mask.shape)).astype(np.uint8)
    for size in dict.fromkeys(sizes):
        check_fits(region, size)
    return None if region.all() else region


def polygon(text: str | None) -> str | None:
    """The corners of a polygon from somebody who may not name files; ``None`` where nothing was given.

    Raises:
        ValueError: If it is something else.
    """
    given = (text or "").strip()
    if given and given != "none" and not POLYGON.fullmatch(given):
        msg = f"region={given[:80]!r} is no polygon. Give its corners in pixels: 10,20 300,20 10,90."
        raise ValueError(msg)
    return given or None


def corners_of(text: str) -> list[tuple[float, float]]:
    """The corners ``x,y`` in a text, also in one that is not written to its end."""
    found = re.findall(rf"({NUMBER})\s*,\s*({NUMBER})", text)
    return [(float(x), float(y)) for x, y in found]


def is_same(now: np.ndarray | Size | float | None, then: np.ndarray | Size | float | None) -> bool:
    """Whether two regions, sizes, or scales of tiles, are one."""
    return now is then if now is None or then is None else np.array_equal(now, then)


def _kept(size: Sequence[int]) -> tuple[int, int]:
    """The size of a mask of so many pixels in a bank."""
    shrink = min(1.0, LONGEST / max(size))
    return max(1, round(size[0] * shrink)), max(1, round(size[1] * shrink))


def _drawn(text: str, sizes: Sequence[Size]) -> np.ndarray:
    """The inside of a polygon in pixels of photos, which have one size: where the centers of pixels lie inside."""
    known = sorted(set(sizes))
    if len(known) != 1:
        told = ", ".join(f"{width} x {height}" for height, width in known)
        msg = f"A polygon is in pixels of the photos, but they differ in size ({told}). Give the region as a mask file."
        raise ValueError(msg)
    height, width = known[0]
    corners = corners_of(text)
    outside = [f"{x:g},{y:g}" for x, y in corners if not (0 <= x <= width and 0 <= y <= height)]
    if len(corners) < 3 or outside:
        problem = f"the corners {' '.join(outside)} lie outside" if outside else f"{len(corners)} corners have no area"
        msg = f"{text!r} is no polygon in photos of {width} x {height} pixels: {problem}. Give x,y of three or more."
        raise ValueError(msg)
    rows, columns = _kept((height, width))
    x = ((np.arange(columns) + 0.5) * width / columns)[None]
    y = ((np.arange(rows) + 0.5) * height / rows)[:, None]
    inside = np.zeros((rows, columns), dtype=bool)
    for (x_1, y_1), (x_2, y_2) in zip(corners, corners[1:] + corners[:1], strict=True):
        if y_1 != y_2:  # a ray to the right changes sides at each edge that it crosses
            inside ^= ((y_1 > y) != (y_2 > y)) & (x < (x_2 - x_1) * (y - y_1) / (y_2 - y_1) + x_1)
    return inside


def check_fits(region: np.ndarray, size: Size) -> None:
    """Refuse photos of another shape than the region, and those in which it is too small.

    Raises:
        ValueError: If it is so.
    """
    (rows, columns), (height, width) = region.shape, size
    away = abs(height * columns / width - rows), abs(width * rows / height - columns)
    if all(each > max(1.0, TOLERANCE * side) for each, side in zip(away, region.shape, strict=True)):
        msg = (
            f"The region was drawn for photos whose sides are as {columns} to {rows}; this one has {width} x {height} "
            "pixels. Draw it on one of the photos, and take all photos of a product alike."
        )
        raise ValueError(msg)
    top, left, bottom, right = box_of(region, size)
    if min(bottom - top, right - left) < SMALLEST_SIDE:
        msg = (
            f"The region is {right - left} x {bottom - top} pixels in photos of {width} x {height}, less than "
            f"{SMALLEST_SIDE} a side. Draw a larger one."
        )
        raise ValueError(msg)


def stretched(mask: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """A mask at another size, each pixel taken from the one that its center lies in."""
    rows, columns = (
        (2 * np.arange(pixels) + 1) * cells // (2 * pixels) for pixels, cells in zip(size, mask.shape, strict=True)
    )
    return mask[rows[:, None], columns]


def bounds(region: np.ndarray) -> Box:
    """The box of a region, in pixels of its mask."""
    rows, columns = (np.flatnonzero(region.any(axis=axis)) for axis in (1, 0))
    return int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1


def core(region: np.ndarray) -> np.ndarray:
    """The mask inside of its box."""
    top, left, bottom, right = bounds(region)
    return region[top:bottom, left:right]


def box_of(region: np.ndarray, size: Sequence[int]) -> Box:
    """The box of a region in a photo, in whole pixels."""
    top, left, bottom, right = bounds(region)

    def scaled(edge: int, axis: int) -> int:
        return (2 * size[axis] * edge + region.shape[axis]) // (2 * region.shape[axis])

    return scaled(top, 0), scaled(left, 1), scaled(bottom, 0), scaled(right, 1)


def cut_out(pixels: np.ndarray, region: np.ndarray) -> np.ndarray:
    """The box of a region, filled outside of it.

    Args:
        pixels (np.ndarray): A photo, uint8, shape ``(H, W, 3)``.
        region (np.ndarray): The region.

    Raises:
        PhotoError: If the photo has another shape.
    """
    try:
        check_fits(region, (pixels.shape[0], pixels.shape[1]))
    except ValueError as error:
        raise PhotoError(str(error)) from error
    top, left, bottom, right = box_of(region, pixels.shape[:2])
    return filled(pixels[top:bottom, left:right], region)


def filled(box: np.ndarray, region: np.ndarray) -> np.ndarray:
    """A box of any size, or a rotated copy of it, with one color outside of the region."""
    inside = stretched(core(region), box.shape[:2])
    return np.where(inside[..., None] > 0, box, np.array(FILL, np.uint8))


def cells_inside(region: np.ndarray, height: int, width: int) -> np.ndarray:
    """Which cells of a grid over the box overlap a pixel of the region, bool, shape ``(height, width)``."""
    mask = core(region)
    sums = np.pad(mask.cumsum(axis=0, dtype=np.int64).cumsum(axis=1), ((1, 0), (1, 0)))
    (above, below), (before, behind) = (
        (np.arange(cells) * side // cells, -(-np.arange(1, cells + 1) * side // cells))
        for cells, side in zip((height, width), mask.shape, strict=True)
    )
    columns = sums[:, behind] - sums[:, before]
    return columns[below] > columns[above]
