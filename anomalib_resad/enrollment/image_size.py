# SPDX-License-Identifier: Apache-2.0

"""The size that photos are resized to: one that is given, or one that keeps the shape of a product's photos.

``"auto:448"`` stands for as many pixels as 448 x 448 has, in the shape of the product's photos; ``"auto"`` for those of
:data:`SIDE` x :data:`SIDE`. The shape is chosen once, from the good photos that a product is enrolled from, and kept
with its bank: all photos of a product are resized to one size, whatever their own shapes.
"""

import math
import re
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

ImageSize: TypeAlias = tuple[int, int] | int | str
Size: TypeAlias = tuple[int, int]  # height and width

SIDE = 224
DEFAULT: ImageSize = (SIDE, SIDE)  # of a model that is given none; "auto" keeps the shape of photos
MOST_SIDE = 1 << 14


def read_image_size(image_size: object) -> list[int] | str:
    """What was given, as it is kept in checkpoints: height and width, or ``"auto:<side>"``.

    Raises:
        ValueError: If it is neither a side, nor a pair of sides, nor ``"auto"`` with or without a side.
    """
    sides: list[Any] = []
    if isinstance(image_size, str):
        found = re.fullmatch(r"auto(?::(\d{1,9}))?", image_size)
        sides = [int(found[1] or SIDE)] * 2 if found else []
    elif isinstance(image_size, int | Sequence):
        sides = [image_size, image_size] if isinstance(image_size, int) else list(image_size)
    if len(sides) != 2 or not all(type(side) is int and 1 <= side <= MOST_SIDE for side in sides):
        msg = (
            f"image_size={image_size!r} must be a side such as 224, a height and a width such as [224, 320], or 'auto' "
            f"or 'auto:448' for photos in their own shape, with as many pixels as {SIDE} x {SIDE} or 448 x 448 have."
        )
        raise ValueError(msg)
    return f"auto:{sides[0]}" if isinstance(image_size, str) else sides


def auto_side(image_size: object) -> int | None:
    """Side of the square that has as many pixels as photos are to have in their own shape; ``None`` for a fixed size.

    Args:
        image_size (object): As :func:`read_image_size` gives it, or as it was given.
    """
    kept = read_image_size(image_size)
    return int(kept.removeprefix("auto:")) if isinstance(kept, str) else None


def size_of_photos(sizes: Iterable[Size], side: int, stride: int) -> Size:
    """The input size of a product: about ``side * side`` pixels in the shape of its photos, in whole strides.

    The shape is the median of the photos' ratios of height to width; of an even number, the geometric mean of the two
    in the middle. Each side is rounded to whole strides, and is at least two of them: of photos that are longer than
    that allows, the shape is not kept, but the number of pixels is.

    Args:
        sizes (Iterable[Size]): Height and width of each photo, at least one.
        side (int): Side of the square with as many pixels.
        stride (int): Pixels per patch of the coarsest level.
    """
    ratio = math.exp(statistics.median(math.log(height / width) for height, width in sizes) / 2)
    short = max(side * min(ratio, 1 / ratio), 2 * stride)
    shorter, longer = (max(2, int(each / stride + 0.5)) * stride for each in (short, side * side / short))
    return (shorter, longer) if ratio < 1 else (longer, shorter)
