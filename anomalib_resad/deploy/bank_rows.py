# SPDX-License-Identifier: Apache-2.0

"""The rows of a bank: those of each photo, those that are searched, and how each photo scores against the others."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from anomalib_resad.deploy.bank import SEARCHED, SEARCHED_NEIGHBORHOODS, Bank
from anomalib_resad.deploy.bundle import Level, Manifest
from anomalib_resad.enrollment.calibration import OwnScores, own_scores
from anomalib_resad.enrollment.coreset import searched, thin_out
from anomalib_resad.enrollment.neighborhoods import (
    NEIGHBORHOODS,
    PATCHES_PER_NEIGHBORHOOD,
    judges_neighborhoods,
    of_patches,
)
from anomalib_resad.enrollment.photos import Reference
from anomalib_resad.enrollment.region import cells_inside
from anomalib_resad.enrollment.rotations import Rows, kept_rows


def levels_of(bank: Bank, manifest: Manifest) -> Rows:
    """All rows of a bank, level by level."""
    return [bank.arrays[f"rows_{level}"] for level in range(len(manifest.levels))]


def chosen_rows(rows: Rows, photos: int, manifest: Manifest, max_patches: int | None) -> dict[str, np.ndarray]:
    """What a bank keeps of which rows are searched, so that opening it need not choose; as of :func:`searched_rows`."""
    if not manifest.keyed:
        return {}
    chosen = {SEARCHED: (rows[-1], _searched_by_keys(rows[-1], photos, manifest, max_patches))}
    if manifest.judges_neighborhoods and max_patches is not None:
        most = -(-max_patches // PATCHES_PER_NEIGHBORHOOD)
        chosen[SEARCHED_NEIGHBORHOODS] = rows[NEIGHBORHOODS], _covering(rows[NEIGHBORHOODS], most)
    return {
        name: np.isin(np.arange(len(level)), some).astype(np.uint8)
        for name, (level, some) in chosen.items()
        if some is not None
    }


def _as_chosen(rows: Rows, chosen: Mapping[str, np.ndarray]) -> Rows:
    """The rows that :func:`chosen_rows` chose."""
    kept = of_patches(rows, chosen[SEARCHED] > 0) if SEARCHED in chosen else list(rows)
    if SEARCHED_NEIGHBORHOODS in chosen:
        kept[NEIGHBORHOODS] = kept[NEIGHBORHOODS][chosen[SEARCHED_NEIGHBORHOODS] > 0]
    return kept


def searched_of(bank: Bank, manifest: Manifest) -> Rows:
    """The rows of a bank that a search looks through, level by level."""
    return judged(_searched(bank, manifest), len(bank.references), bank.rotations, manifest)


def judged(rows: Rows, photos: int, rotations: int, manifest: Manifest) -> Rows:
    """Rows with a row of zeros for neighborhoods that are not to be judged, which the detector passes over.

    Args:
        rows (Rows): Rows of each level.
        photos (int): Good photos of the product.
        rotations (int): Their orientations.
        manifest (Manifest): The bundle's.
    """
    if not manifest.judges_neighborhoods or judges_neighborhoods(photos, rotations):
        return rows
    return [np.zeros_like(level[:1]) if number == NEIGHBORHOODS else level for number, level in enumerate(rows)]


def _searched(bank: Bank, manifest: Manifest) -> Rows:
    rows = levels_of(bank, manifest)
    if SEARCHED in bank.arrays:
        return _as_chosen(rows, bank.arrays)
    if not is_whole(bank, manifest):
        return rows
    return searched_rows(rows, len(bank.references), manifest, bank.max_patches)


def cells_of(bank: Bank, level: Level) -> np.ndarray:
    """Which patches of a photo count, bool, shape ``(height, width)`` of the level."""
    if bank.region is None:
        return np.ones((level.height, level.width), dtype=bool)
    return cells_inside(bank.region, level.height, level.width)


def patches_of(bank: Bank, level: Level) -> int:
    """How many patches of a photo count."""
    return level.patches if bank.region is None else int(cells_of(bank, level).sum())


def is_whole(bank: Bank, manifest: Manifest) -> bool:
    """Whether a bank holds all rows of each photo; those of tiles, and those that 0.1.0 thinned out, do not."""
    if bank.tile_scale is not None:
        return False
    levels = manifest.levels_at(bank.image_size)
    counts = [len(bank.references) * kept_rows(patches_of(bank, level), bank.rotations) for level in levels]
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
        max_patches (int | None): Most rows, instead of that share, and a quarter as many neighborhoods. Keys and what
            they stand for are thinned out together, levels that are matched apart each by itself.
    """
    if manifest.keyed:
        return _as_chosen(rows, chosen_rows(rows, photos, manifest, max_patches))
    if max_patches is None:
        return rows
    return [level[_covering(level, max_patches)] for level in rows]


def _searched_by_keys(keys: np.ndarray, photos: int, manifest: Manifest, max_patches: int | None) -> np.ndarray | None:
    """Which rows are searched, ascending; ``None`` for all of them."""
    if max_patches is not None:
        return _covering(keys, max_patches)
    return searched(keys, photos, manifest.searched) if manifest.searched < 1 else None


def on_grid(bank: Bank, level: Level, own: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The rows of a photo as features; those that do not count are like any row of a good photo, without a residual.

    Args:
        bank (Bank): The bank.
        level (Level): Shape of the features.
        own (np.ndarray): Rows of the patches that count, and maybe of rotated copies behind them, shape ``(N, C)``.
        other (np.ndarray): Row of a good photo, shape ``(C,)``.

    Returns:
        np.ndarray: Shape ``(1, C, H, W)``.
    """
    grid = np.broadcast_to(other, (level.height, level.width, len(other))).copy()
    cells = cells_of(bank, level)
    grid[cells] = own[: cells.sum()]
    return np.ascontiguousarray(grid.transpose(2, 0, 1)[None])


def _covering(rows: np.ndarray, most: int) -> np.ndarray:
    """Which rows cover all; equal ones count once, and their order does not matter, nor a photo that is there twice."""
    _, first = np.unique(rows, axis=0, return_index=True)
    return np.sort(first[thin_out(rows[first], most)])


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
    if not is_whole(bank, manifest):
        return None
    if len(bank.references) < 2:
        return own_scores([])

    def found(own: Rows, others: Rows) -> tuple[float, np.ndarray]:
        rest = [padded(level, manifest.row_multiple) for level in others]
        features = [
            on_grid(bank, level, mine, others_of[0])
            for level, mine, others_of in zip(manifest.levels_at(bank.image_size), own, rest, strict=True)
        ]
        return detect([*features, *rest])

    return own_scores(found(*each) for each in left_out(bank, manifest))


def left_out(bank: Bank, manifest: Manifest) -> Iterator[tuple[Rows, Rows]]:
    """Of each photo of a whole bank of two or more: its own rows, and those of the others that a search looks through.

    Args:
        bank (Bank): The bank.
        manifest (Manifest): The bundle's.
    """
    photos, most, rows = len(bank.references), bank.max_patches, levels_of(bank, manifest)
    own = [np.split(level, photos) for level in rows]
    # What is thinned out photo by photo is so only once; what is chosen among all photos, anew for each.
    known = [np.split(level, photos) for level in (rows if most else _searched(bank, manifest))]
    for photo in range(photos):
        others = [np.concatenate([*parts[:photo], *parts[photo + 1 :]]) for parts in known]
        if most:
            others = searched_rows(others, photos - 1, manifest, most)
        yield [parts[photo] for parts in own], judged(others, photos, bank.rotations, manifest)
