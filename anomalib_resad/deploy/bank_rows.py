# SPDX-License-Identifier: Apache-2.0

"""The rows of a bank: those of each photo, those that are searched, and how each photo scores against the others."""

from collections.abc import Callable, Sequence

import numpy as np

from anomalib_resad.deploy.bank import Bank
from anomalib_resad.deploy.bundle import Manifest
from anomalib_resad.enrollment.calibration import OwnScores, own_scores
from anomalib_resad.enrollment.coreset import searched, thin_out
from anomalib_resad.enrollment.photos import Reference
from anomalib_resad.enrollment.rotations import Rows, kept_rows


def levels_of(bank: Bank, manifest: Manifest) -> Rows:
    """All rows of a bank, level by level."""
    return [bank.arrays[f"rows_{level}"] for level in range(len(manifest.levels))]


def is_whole(bank: Bank, manifest: Manifest) -> bool:
    """Whether a bank holds all rows of each photo; those that 0.1.0 thinned out (``max_patches``) do not."""
    counts = [len(bank.references) * kept_rows(level.patches, bank.rotations) for level in manifest.levels]
    return [len(bank.arrays.get(f"rows_{level}", ())) for level in range(len(counts))] == counts


def rows_of_photos(bank: Bank, manifest: Manifest) -> dict[Reference, Rows]:
    """Rows of each photo of a whole bank."""
    levels = [np.split(rows, len(bank.references)) for rows in levels_of(bank, manifest)]
    return {reference: [level[index] for level in levels] for index, reference in enumerate(bank.references)}


def searched_rows(rows: Rows, photos: int, manifest: Manifest, max_patches: int | None) -> Rows:
    """The rows that a search looks through, of those of some whole photos.

    Args:
        rows (Rows): Rows of each level, photo after photo.
        photos (int): How many.
        manifest (Manifest): The bundle's. Its share of each photo's rows is searched.
        max_patches (int | None): Most rows, instead of that share. Keys and what they stand for are thinned out
            together, levels that are matched apart each by itself.
    """
    if max_patches is not None:
        kept = [thin_out(level, max_patches) for level in (rows[-1:] if manifest.keyed else rows)]
    elif manifest.keyed and manifest.searched < 1:
        kept = [searched(rows[-1], photos, manifest.searched)]
    else:
        return rows
    return [level[chosen] for level, chosen in zip(rows, kept * len(rows) if manifest.keyed else kept, strict=True)]


def padded(rows: np.ndarray, multiple: int) -> np.ndarray:
    """Repeat the first row until their number is a multiple, which changes no nearest row."""
    missing = -len(rows) % multiple
    return np.concatenate([rows, np.repeat(rows[:1], missing, axis=0)]) if missing else rows


def leave_one_out(
    bank: Bank, manifest: Manifest, detect: Callable[[Sequence[np.ndarray]], tuple[float, np.ndarray]]
) -> OwnScores | None:
    """What each photo scores against a bank of the others, as an inspection gives it.

    Args:
        bank (Bank): The bank.
        manifest (Manifest): The bundle's.
        detect (Callable[[Sequence[np.ndarray]], tuple[float, np.ndarray]]): Raw score and map of one photo, of its
            features ``(1, C_l, H_l, W_l)``, then the rows of the bank, a multiple of ``manifest.row_multiple``.

    Returns:
        OwnScores | None: One score per photo; none of a single photo; ``None`` if the bank is not whole.
    """
    photos, most = len(bank.references), bank.max_patches
    if not is_whole(bank, manifest):
        return None
    rows = levels_of(bank, manifest)
    own = [np.split(level, photos) for level in rows]
    # What is thinned out photo by photo is so only once; what is chosen among all photos, anew for each.
    known = [np.split(level, photos) for level in (rows if most else searched_rows(rows, photos, manifest, None))]

    def found(photo: int) -> tuple[float, np.ndarray]:
        features = [
            parts[photo][: level.patches].reshape(1, level.height, level.width, -1).transpose(0, 3, 1, 2)
            for parts, level in zip(own, manifest.levels, strict=True)
        ]
        others = [np.concatenate([*parts[:photo], *parts[photo + 1 :]]) for parts in known]
        if most:
            others = searched_rows(others, photos - 1, manifest, most)
        rest = [padded(level, manifest.row_multiple) for level in others]
        return detect([*map(np.ascontiguousarray, features), *rest])

    return own_scores(map(found, range(photos if photos > 1 else 0)))
