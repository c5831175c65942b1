# SPDX-License-Identifier: Apache-2.0

"""Fewer rows that cover all: greedy k-center, as Patchcore's coreset."""

import numpy as np

BLOCK = 1024  # rows whose distances to others are computed at once


def thin_out(rows: np.ndarray, most: int, beside: np.ndarray | None = None) -> np.ndarray:
    """Choose rows that cover the others (greedy k-center).

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


def searched(keys: np.ndarray, photos: int, share: float) -> np.ndarray:
    """Which rows of a bank a search looks through: of each photo those that cover its others.

    Each photo is thinned out by itself, so that photos can be added and removed, and a photo that is there twice
    changes nothing.

    Args:
        keys (np.ndarray): Keys of the rows, photo after photo, shape ``(N, K)``.
        photos (int): How many photos they are of; rows that are not those of whole photos are all searched.
        share (float): Share of each photo's rows, above 0; 1 for all of them.

    Returns:
        np.ndarray: Indices in ascending order.
    """
    if share >= 1 or not photos or len(keys) % photos:
        return np.arange(len(keys))
    count = len(keys) // photos
    most = max(1, round(count * share))
    return np.concatenate([number * count + thin_out(part, most) for number, part in enumerate(np.split(keys, photos))])
