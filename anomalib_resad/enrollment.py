# SPDX-License-Identifier: Apache-2.0

"""What a bank keeps of good photos: their patches, and where a product lies turned, patches of turned copies too.

Needs neither PyTorch nor anomalib: training, evaluation and the edge enroll the same way.
"""

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import numpy as np
from PIL import Image

Rotations: TypeAlias = int | Literal["auto"]
Rows: TypeAlias = list[np.ndarray]  # of one photo, float32, shape (N_l, C_l) per level

# Turns of each photo where a product lies turned, the photo itself among them: every 45 degrees.
TURNS = 8
# Photos lie turned if the squared distance of their patches to the other photos falls below this share of itself once
# these may be turned by right angles. It always falls, since more rows bring any patch nearer: with four or eight
# photos to 87-93 % for products that all lie the same way, to 61-89 % for turned ones (benchmarks/experiments.md).
LIE_TURNED = 0.85
LOOKED_AT = 8  # photos that decide whether all of them are turned, the first ones
BLOCK = 1024  # rows whose distances to others are computed at once


def check_rotations(rotations: object) -> None:
    """Refuse what is no number of turns.

    Raises:
        ValueError: If it is neither ``"auto"`` nor 1 to 36.
    """
    if rotations != "auto" and not (isinstance(rotations, int) and 1 <= rotations <= 36):
        msg = (
            f"rotations={rotations!r} must be 'auto', 1 (photos as they are), or a number of turns up to 36, such as 8."
        )
        raise ValueError(msg)


def turned(pixels: np.ndarray, degrees: float) -> np.ndarray:
    """Turn a photo counterclockwise about its center; corners are filled with its mirror image.

    Args:
        pixels (np.ndarray): uint8, shape ``(H, W, 3)``.
        degrees (float): Angle.

    Returns:
        np.ndarray: Of the same shape.
    """
    height, width = pixels.shape[:2]
    reach = int(np.ceil(np.hypot(height, width)))
    rows, columns = -(-(reach - height) // 2) + 1, -(-(reach - width) // 2) + 1
    padded = np.pad(pixels, ((rows, rows), (columns, columns), (0, 0)), mode="reflect")
    picture = Image.fromarray(padded).rotate(degrees, resample=Image.Resampling.BILINEAR)
    return np.asarray(picture)[rows : rows + height, columns : columns + width]


def enrolled_rows(
    photos: Sequence[np.ndarray], encode: Callable[[np.ndarray], Rows], keyed: bool, rotations: Rotations = "auto"
) -> tuple[list[Rows], int]:
    """The rows that a bank keeps of each photo.

    Of turned copies, those patches are kept that its own show least, half as many as it has: a bank then grows by half,
    not eightfold. Its own come first.

    Args:
        photos (Sequence[np.ndarray]): uint8, shape ``(H, W, 3)`` each.
        encode (Callable[[np.ndarray], Rows]): Rows of a photo's patches, shape ``(N_l, C_l)`` per level. The last level
            decides whether photos lie turned.
        keyed (bool): Whether the last level holds keys to the rows of the others; else each level is thinned out alone.
        rotations (Rotations): Turns of each photo, 1 for none. ``"auto"`` turns photos that lie turned to each
            other: then the orientation is no defect.

    Returns:
        tuple[list[Rows], int]: Rows per photo and level, and the number of turns.

    Raises:
        ValueError: If ``rotations`` is impossible.
    """
    check_rotations(rotations)
    views = [{0.0: encode(pixels)} for pixels in photos]
    if rotations == "auto":
        rotations = 1
        if len(photos) > 1:
            looked_at = list(zip(photos, views, strict=True))[:LOOKED_AT]
            for pixels, seen in looked_at:
                seen |= {angle: encode(turned(pixels, angle)) for angle in (90.0, 180.0, 270.0)}
            if lie_turned([[rows[-1] for rows in seen.values()] for _, seen in looked_at]):
                rotations = TURNS
    if rotations == 1:
        return [seen[0.0] for seen in views], 1
    angles = [360 * turn / rotations for turn in range(1, rotations)]
    rows = []
    for pixels, seen in zip(photos, views, strict=True):  # one photo's copies at a time
        copies = [seen.get(angle) or encode(turned(pixels, angle)) for angle in angles]
        rows.append(_with_turned(seen[0.0], copies, keyed))
    return rows, rotations


def rows_of(patches: int, rotations: int) -> int:
    """How many rows a bank keeps of a photo with so many patches."""
    return patches if rotations == 1 else patches + patches // 2


def lie_turned(views: Sequence[Sequence[np.ndarray]]) -> bool:
    """Whether photos are clearly nearer to each other once they may be turned.

    Args:
        views (Sequence[Sequence[np.ndarray]]): Per photo, rows of the photo and of its turned copies, shape ``(N, C)``.
    """
    unit = [[rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12) for rows in each] for each in views]
    plain = free = 0.0
    for number, (own, *_) in enumerate(unit):
        others = [each for index, each in enumerate(unit) if index != number]
        as_they_are = np.max([(own @ each[0].T).max(axis=1) for each in others], axis=0)
        any_way = np.max([(own @ rows.T).max(axis=1) for each in others for rows in each], axis=0)
        plain, free = plain + float((1 - as_they_are).sum()), free + float((1 - any_way).sum())
    return free < LIE_TURNED * plain


def _with_turned(own: Rows, copies: Sequence[Rows], keyed: bool) -> Rows:
    """A photo's rows, and those of its turned copies that are farthest from them."""
    others = [np.concatenate(level) for level in zip(*copies, strict=True)]
    extra = [rows_of(len(level), len(copies) + 1) - len(level) for level in own]
    if keyed:
        kept = [thin_out(others[-1], extra[-1], own[-1])] * len(own)
    else:
        kept = [thin_out(*level) for level in zip(others, extra, own, strict=True)]
    return [np.concatenate([level, rest[chosen]]) for level, rest, chosen in zip(own, others, kept, strict=True)]


def thin_out(rows: np.ndarray, most: int, beside: np.ndarray | None = None) -> np.ndarray:
    """Choose rows that cover the others (greedy k-center, as Patchcore's coreset).

    Deterministic: it starts from the row that is farthest from the mean, or from those that are there already, and of
    equal distances takes the first.

    Args:
        rows (np.ndarray): Rows, shape ``(N, C)``.
        most (int): How many to keep.
        beside (np.ndarray | None): Rows that are kept anyway, shape ``(M, C)``.

    Returns:
        np.ndarray: Indices of the chosen rows in ascending order, shape ``(min(N, most),)``.
    """
    if len(rows) <= most:
        return np.arange(len(rows))
    squares = np.square(rows).sum(axis=1)

    def distances(center: np.ndarray) -> np.ndarray:
        return squares - 2 * (rows @ center) + center @ center

    chosen: list[int] = []
    if beside is None:
        chosen.append(int(distances(rows.mean(axis=0)).argmax()))
        nearest = distances(rows[chosen[0]])
    else:
        lengths = np.square(beside).sum(axis=1)
        parts = np.array_split(rows, -(-len(rows) // BLOCK))
        nearest = squares + np.concatenate([(lengths - 2 * (part @ beside.T)).min(axis=1) for part in parts])
    while len(chosen) < most:
        if chosen:
            nearest[chosen[-1]] = -np.inf
        chosen.append(int(nearest.argmax()))
        np.minimum(nearest, distances(rows[chosen[-1]]), out=nearest)
    return np.sort(np.array(chosen, dtype=np.intp))  # of the right type where there are none
