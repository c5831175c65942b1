# SPDX-License-Identifier: Apache-2.0

"""Large photos in tiles: the photo is made smaller by a scale, and cut into overlapping pieces of the model's size.

One bank serves all tiles. The score of a photo is that of its most anomalous tile. Where tiles overlap, the map is a
mean in which each tile counts less towards its edges, so that no seam shows. One batch of tiles is held at a time.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from PIL import Image

from anomalib_resad.enrollment.coreset import thin_out
from anomalib_resad.enrollment.image_size import Size
from anomalib_resad.enrollment.neighborhoods import (
    NEIGHBORHOODS,
    PATCHES_PER_NEIGHBORHOOD,
    has_neighborhoods,
    of_patches,
)
from anomalib_resad.enrollment.photos import PhotoError
from anomalib_resad.enrollment.rotations import Rows, rotated

OVERLAP = 0.25  # least share of a tile that the next one repeats
BATCH = 8  # tiles that are computed together
SCALES = (1.0, 64.0)  # photo pixels per pixel of the model, from and to
OF_TILE = 8  # one of so many patches of a tile is kept at first
MOST_ROWS = 6272  # of a product: as many as are searched of 16 photos of 224 pixels


def check_tile_scale(scale: object) -> None:
    """Refuse what is no scale.

    Raises:
        ValueError: If it is not.
    """
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not SCALES[0] <= scale <= SCALES[1]:
        msg = f"tile_scale={scale!r} must be a number of photo pixels per pixel of the model, from 1 to 64."
        raise ValueError(msg)


def scaled_size(size: Sequence[int], scale: float, tile: Size) -> Size:
    """Height and width of a photo that is cut into tiles.

    Raises:
        ValueError: If it is smaller than a tile.
    """
    height, width = round(size[0] / scale), round(size[1] / scale)
    if height < tile[0] or width < tile[1]:
        most = min(size[0] / tile[0], size[1] / tile[1])
        msg = (
            f"Photos of {size[1]} x {size[0]} pixels are smaller than a tile at tile_scale={scale:g}, which takes "
            f"{tile[1] * scale:.0f} x {tile[0] * scale:.0f}. "
            + (f"Take at most {most:.3g}." if most >= 1 else "Leave tile_scale out.")
        )
        raise ValueError(msg)
    return height, width


def size_in_tiles(name: str, size: Sequence[int], scale: float, tile: Size) -> Size:
    """What :func:`scaled_size` gives for a photo with a name.

    Raises:
        PhotoError: If it is smaller than a tile.
    """
    try:
        return scaled_size(size, scale, tile)
    except ValueError as error:
        msg = f"{name}: {error}"
        raise PhotoError(msg) from error


def starts(length: int, tile: int) -> list[int]:
    """Where tiles begin along a side: evenly, from one edge to the other."""
    rest = length - tile
    count = -(-rest // max(1, int(tile * (1 - OVERLAP)))) + 1
    return [round(index * rest / max(1, count - 1)) for index in range(count)]


def batches(pixels: np.ndarray, tile: Size) -> Iterator[tuple[list[tuple[int, int]], np.ndarray]]:
    """Tiles of a photo at its scale: top and left of each, and their pixels, shape ``(B, H, W, 3)``."""
    corners = [(top, left) for top in starts(pixels.shape[0], tile[0]) for left in starts(pixels.shape[1], tile[1])]
    for first in range(0, len(corners), BATCH):
        some = corners[first : first + BATCH]
        yield some, np.stack([pixels[top : top + tile[0], left : left + tile[1]] for top, left in some])


def part_of(mask: np.ndarray, corner: tuple[int, int], tile: Size, size: Size) -> np.ndarray:
    """What a tile shows of a mask.

    Args:
        mask (np.ndarray): The mask, of the photo's own size, shape ``(H, W)``.
        corner (tuple[int, int]): Top and left of the tile.
        tile (Size): Its height and width.
        size (Size): The size that the photo is cut into tiles at.
    """
    ends = [first + length for first, length in zip(corner, tile, strict=True)]
    per_pixel = [stored / side for stored, side in zip(mask.shape, size, strict=True)]
    top, left, bottom, right = (round(at * each) for at, each in zip((*corner, *ends), per_pixel * 2, strict=True))
    return mask[top:bottom, left:right]


def resized_to(pixels: np.ndarray, size: Size) -> np.ndarray:
    """A photo at another size, antialiased."""
    if pixels.shape[:2] == size:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((size[1], size[0]), Image.Resampling.BILINEAR))


def rows_of(
    pixels: np.ndarray,
    size: Size,
    tile: Size,
    encode: Callable[[np.ndarray], Sequence[np.ndarray]],
    keyed: bool,
    rotations: int,
    most: int,
) -> Rows:
    """What a bank keeps of a photo: patches that cover those of all tiles, also of rotated copies.

    Args:
        pixels (np.ndarray): The photo, uint8, shape ``(H, W, 3)``.
        size (Size): The size that it is cut into tiles at.
        tile (Size): Height and width of a tile.
        encode (Callable[[np.ndarray], Sequence[np.ndarray]]): Tiles to features ``(B, C_l, H_l, W_l)`` of each level.
        keyed (bool): As of :func:`~anomalib_resad.enrollment.rotations.enrolled_rows`.
        rotations (int): Orientations.
        most (int): Most rows of a level.
    """
    kept: list[Rows] = []
    for turn in range(rotations):
        copy = pixels if turn == 0 else rotated(pixels, 360 * turn / rotations)
        for _, tiles in batches(resized_to(copy, size), tile):
            levels = [level.transpose(0, 2, 3, 1).reshape(len(tiles), -1, level.shape[1]) for level in encode(tiles)]
            some = -(-levels[-1].shape[1] // OF_TILE)
            kept += [_thinned([level[index] for level in levels], keyed, some) for index in range(len(tiles))]
    return _thinned([np.concatenate(level) for level in zip(*kept, strict=True)], keyed, most)


def _thinned(rows: Rows, keyed: bool, most: int) -> Rows:
    if not keyed:
        return [level[thin_out(level, most)] for level in rows]
    kept = of_patches(rows, thin_out(rows[-1], most))
    if has_neighborhoods(rows):
        around = rows[NEIGHBORHOODS]
        kept[NEIGHBORHOODS] = around[thin_out(around, -(-most // PATCHES_PER_NEIGHBORHOOD))]
    return kept


def inspected(
    pixels: np.ndarray, tile: Size, detect: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
) -> tuple[float, np.ndarray]:
    """Raw score and raw map of a photo at its scale.

    Args:
        pixels (np.ndarray): The photo at the size that it is cut into tiles at, uint8, shape ``(H, W, 3)``.
        tile (Size): Height and width of a tile.
        detect (Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]): Tiles to scores ``(B,)`` and maps ``(B, H, W)``.

    Returns:
        tuple[float, np.ndarray]: The highest score, and the map, shape ``(H, W)`` of the photo.
    """
    shares = [1 - np.abs(2 * (np.arange(side) + 0.5) / side - 1) for side in tile]
    weights = np.outer(*shares).astype(np.float32)
    total, weight = (np.zeros(pixels.shape[:2], dtype=np.float32) for _ in range(2))
    highest = -np.inf
    for corners, tiles in batches(pixels, tile):
        scores, maps = detect(tiles)
        highest = max(highest, float(scores.max()))
        for (top, left), found in zip(corners, maps, strict=True):
            place = slice(top, top + tile[0]), slice(left, left + tile[1])
            total[place] += weights * found
            weight[place] += weights
    return highest, total / weight
