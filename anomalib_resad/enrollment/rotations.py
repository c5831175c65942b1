# SPDX-License-Identifier: Apache-2.0

"""What a bank keeps of good photos: their patches, and where the photos are rotated, patches of rotated copies too."""

from collections.abc import Callable, Collection, Sequence
from typing import Literal, TypeAlias

import numpy as np
from PIL import Image

from anomalib_resad.enrollment.checks import is_count
from anomalib_resad.enrollment.coreset import thin_out
from anomalib_resad.enrollment.neighborhoods import NEIGHBORHOODS, has_neighborhoods

Rotations: TypeAlias = int | Literal["auto"]
Rows: TypeAlias = list[np.ndarray]  # of one photo, float32, shape (N_l, C_l) per level

# Orientations of each photo where a product's photos are rotated, the photo itself among them: every 45 degrees.
ORIENTATIONS = 8
# Photos count as rotated to each other if the squared distance of their patches to two of the photos falls below this
# share of itself once these two may be rotated by right angles. It always falls, since more rows bring any patch
# nearer: with four or eight photos to 83-98 % for products that all lie the same way, to 66-88 % for rotated ones
# (benchmarks/experiments.md).
ROTATED = 0.85
# Photos that are rotated to find out, two at a time. A single pair may happen to lie alike, and many photos at a time
# hide it: the more there are as they are, the less is gained by rotated ones.
LOOKED_AT = 4
COMPARED = 196  # about as many patches of each photo are compared with them
# A photo is rotated inside a square of its diagonal. Longer ones are made smaller first, which bounds time and memory.
LONGEST_DIAGONAL = 3000


def check_rotations(rotations: object) -> None:
    """Refuse what is no number of orientations.

    Raises:
        ValueError: If it is neither ``"auto"`` nor 1 to 36.
    """
    if rotations != "auto" and not (is_count(rotations) and rotations <= 36):
        msg = (
            f"rotations={rotations!r} must be 'auto', 1 (photos as they are), or a number of orientations up to 36, "
            "such as 8."
        )
        raise ValueError(msg)


def rotated(pixels: np.ndarray, degrees: float) -> np.ndarray:
    """Rotate a photo counterclockwise about its center; corners are filled with its mirror image.

    Args:
        pixels (np.ndarray): uint8, shape ``(H, W, 3)``.
        degrees (float): Angle.

    Returns:
        np.ndarray: Of the same shape; of a photo whose diagonal is longer than :data:`LONGEST_DIAGONAL`, a smaller one.
    """
    height, width = pixels.shape[:2]
    scale = LONGEST_DIAGONAL / np.hypot(height, width)
    if scale < 1:
        height, width = max(1, round(scale * height)), max(1, round(scale * width))
        pixels = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))
    if degrees % 180 == 0 or (degrees % 90 == 0 and height == width):
        return np.ascontiguousarray(np.rot90(pixels, round(degrees / 90)))
    reach = int(np.ceil(np.hypot(height, width)))
    rows, columns = -(-(reach - height) // 2) + 1, -(-(reach - width) // 2) + 1
    padded = np.pad(pixels, ((rows, rows), (columns, columns), (0, 0)), mode="reflect")
    # Only the pixels that are kept are computed: of a square photo half of those that `Image.rotate` would.
    cosine, sine = (round(float(each(np.deg2rad(degrees))), 15) for each in (np.cos, np.sin))  # 0 of right angles
    left = columns + (width - cosine * width + sine * height) / 2
    top = rows + (height - sine * width - cosine * height) / 2
    matrix = (cosine, -sine, left, sine, cosine, top)
    picture = Image.fromarray(padded).transform(
        (width, height), Image.Transform.AFFINE, matrix, resample=Image.Resampling.BILINEAR
    )
    return np.asarray(picture)


def enrolled_rows(
    photos: Collection[np.ndarray], encode: Callable[[np.ndarray], Rows], keyed: bool, rotations: Rotations = "auto"
) -> tuple[list[Rows], int]:
    """Encode photos, and choose the rows that a bank keeps of each.

    With one orientation these are the rows of the photo's patches. With more, rotated copies of the photo are encoded
    too. Of all copies together half as many rows are added as the photo has, those farthest from its own: the bank
    grows by half, not eightfold. The photo's own rows come first.

    Args:
        photos (Collection[np.ndarray]): uint8, shape ``(H, W, 3)`` each. They are gone through up to twice, and one is
            held at a time. The first two, or four, decide whether all are rotated; `read_references` orders them by
            content.
        encode (Callable[[np.ndarray], Rows]): Rows of a photo's patches, shape ``(N_l, C_l)`` per level. The last level
            decides whether photos are rotated to each other.
        keyed (bool): Whether the last level holds the keys of the others, so that the same patches are kept in every
            level but that of neighborhoods; else each level chooses its own.
        rotations (Rotations): Orientations of each photo, 1 for the photo alone. ``"auto"`` takes
            :data:`ORIENTATIONS` where the photos are rotated to each other, so that orientation is no defect, else 1.

    Returns:
        tuple[list[Rows], int]: Rows per photo and level, and the number of orientations.

    Raises:
        ValueError: If ``rotations`` is impossible.
    """
    check_rotations(rotations)
    looked_at = min(len(photos), LOOKED_AT) // 2 * 2 if rotations == "auto" else 0
    views = []
    for number, pixels in enumerate(photos):
        views.append({0.0: encode(pixels)})
        if number < looked_at:
            views[-1] |= {angle: encode(rotated(pixels, angle)) for angle in (90.0, 180.0, 270.0)}
    if rotations == "auto":
        copies = [[rows[-1] for rows in seen.values()] for seen in views[:looked_at]]
        rotations = ORIENTATIONS if are_rotated([seen[0.0][-1] for seen in views], copies) else 1
    if rotations == 1:
        return [seen[0.0] for seen in views], 1
    angles = [360 * turn / rotations for turn in range(1, rotations)]
    rows = []
    for pixels, seen in zip(photos, views, strict=True):  # one photo's copies at a time
        copies = [seen.get(angle) or encode(rotated(pixels, angle)) for angle in angles]
        rows.append(_with_copies(seen[0.0], copies, keyed))
    return rows, rotations


def kept_rows(patches: int, rotations: int) -> int:
    """How many rows a bank keeps of a photo with so many patches."""
    return patches if rotations == 1 else patches + patches // 2


def are_rotated(photos: Sequence[np.ndarray], copies: Sequence[Sequence[np.ndarray]]) -> bool:
    """Whether photos are clearly nearer to pairs of the first of them once these may be rotated.

    Args:
        photos (Sequence[np.ndarray]): Rows of each photo, shape ``(N, C)``.
        copies (Sequence[Sequence[np.ndarray]]): Of an even number of the first photos, rows of the photo and of its
            rotated copies, shape ``(N, C)`` each.
    """
    compared = [_unit(rows[:: max(1, len(rows) // COMPARED)]) for rows in photos]
    plain = free = 0.0
    for first in range(0, len(copies), 2):
        pair = {index: [_unit(rows) for rows in copies[index]] for index in (first, first + 1)}
        for number, own in enumerate(compared):
            others = [each for index, each in pair.items() if index != number]
            as_they_are = np.max([(own @ each[0].T).max(axis=1) for each in others], axis=0)
            any_way = np.max([(own @ copy.T).max(axis=1) for each in others for copy in each], axis=0)
            plain, free = plain + float((1 - as_they_are).sum()), free + float((1 - any_way).sum())
    return free < ROTATED * plain


def _unit(rows: np.ndarray) -> np.ndarray:
    """Rows of unit length; those of length zero stay."""
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def _with_copies(own: Rows, copies: Sequence[Rows], keyed: bool) -> Rows:
    """A photo's rows, and those of its rotated copies that are farthest from them."""
    others = [np.concatenate(level) for level in zip(*copies, strict=True)]
    extra = [kept_rows(len(level), len(copies) + 1) - len(level) for level in own]
    if keyed:
        kept = [thin_out(others[-1], extra[-1], own[-1])] * len(own)
        if has_neighborhoods(own):
            at = NEIGHBORHOODS
            kept[at] = thin_out(others[at], extra[at], own[at])
    else:
        kept = [thin_out(*level) for level in zip(others, extra, own, strict=True)]
    return [np.concatenate([level, rest[chosen]]) for level, rest, chosen in zip(own, others, kept, strict=True)]
