# SPDX-License-Identifier: Apache-2.0

"""Defects that were missed and then taught: patches that lie nearer to them than to every good patch score higher.

The raise of a patch grows with the logarithm of how many times nearer it is to the taught patches. It is added outside
of the model, so every bundle with keys can be taught.
"""

from dataclasses import dataclass

import numpy as np

# Raise of the score where a patch is e times nearer to a taught patch than to the good ones (squared distances), in
# standard deviations of good photos' scores. As benchmarks/teach.py chose it, for each product on the others, with
# heads that judged no neighborhoods: the least of them. With those of now it is 2.5 to 8.
RAISE = 3.0
EQUAL = 0.01  # squared distance of two keys, which are of unit length, below which patches count as equal
MOST_PATCHES = 32  # kept of each taught photo, those that cover the others
COVERED = 0.1  # least share of a patch that a defect covers
TOP_SHARE = 0.01  # of a photo's patches, the most anomalous ones, whose mean is its score: the model's, too
SMOOTHING = 4 / 224  # standard deviation of the smoothing of maps, as a share of their side: that of the model
BLOCK = 2048  # rows that are compared at once
SLACK = 1e-5  # squared distance by which rounding may move a patch


@dataclass(frozen=True)
class Taught:
    """What an inspection needs of the defects that a product was taught.

    Attributes:
        good (np.ndarray): Keys of good patches that are searched, shape ``(N, K)``.
        taught (np.ndarray): Keys of taught patches, shape ``(M, K)``.
        unit (float): What a raise is multiplied with.
        image_size (tuple[int, int]): Height and width of the maps.
        reach (np.ndarray | None): Of the good patches, shape ``(N,)``: what lies in it is not raised, see
            :func:`in_reach`; ``None`` where the good patches are all that the good photos have.
    """

    good: np.ndarray
    taught: np.ndarray
    unit: float
    image_size: tuple[int, int]
    reach: np.ndarray | None = None

    def raises(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What is added to raw scores and raw maps.

        Args:
            keys (np.ndarray): Keys of photos, shape ``(B, K, H, W)``.

        Returns:
            tuple[np.ndarray, np.ndarray]: Shapes ``(B,)`` and ``(B, H', W')``, float32, 0 or more.
        """
        count, channels, *grid = keys.shape
        rows = keys.transpose(0, 2, 3, 1).reshape(-1, channels)
        nearer = np.log((nearest(rows, self.good) + EQUAL) / (nearest(rows, self.taught) + EQUAL))
        nearer = np.maximum(nearer, 0)
        if self.reach is not None:
            raised = np.flatnonzero(nearer)
            nearer[raised[in_reach(rows[raised], self.good, self.reach)]] = 0
        patches = np.float32(self.unit) * nearer.reshape(count, *grid)
        high, wide = (enlarging(*each) for each in zip(grid, self.image_size, strict=True))
        most = most_of(grid[0] * grid[1])
        scores = np.partition(patches.reshape(count, -1), -most, axis=1)[:, -most:].mean(axis=1)
        return scores, high.T @ patches @ wide


def most_of(patches: int) -> int:
    """How many patches of a photo make its score."""
    return max(1, round(TOP_SHARE * patches))


def nearest(keys: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Squared distance of each key ``(N, K)`` to the nearest of some rows ``(M, K)``, all of unit length."""
    parts = [(keys @ rows[start : start + BLOCK].T).max(axis=1) for start in range(0, len(rows), BLOCK)]
    return np.maximum(2 - 2 * np.max(parts, axis=0), 0).astype(np.float32)


def widen(reach: np.ndarray, keys: np.ndarray, rows: np.ndarray, others: np.ndarray) -> None:
    """Let the rows of a bank reach to a good photo's patches: each to those that no other row is nearer to.

    That is done twice: among all rows, as the photo is inspected, and among those of the other photos, as it is scored
    against them.

    Args:
        reach (np.ndarray): Squared distance that each row reaches, shape ``(N,)``, changed in place.
        keys (np.ndarray): Keys of the photo's tiles, shape ``(B, K, H, W)``.
        rows (np.ndarray): Keys of the bank's rows, shape ``(N, K)``.
        others (np.ndarray): Which of them are of other photos, bool, shape ``(N,)``.
    """
    for tile in keys:
        products = tile.reshape(len(tile), -1).T @ rows.T
        for some in (np.arange(len(rows)), np.flatnonzero(others)):
            among = products[:, some]
            np.maximum.at(reach, some[among.argmax(axis=1)], 2 - 2 * among.max(axis=1))


def in_reach(keys: np.ndarray, rows: np.ndarray, reach: np.ndarray) -> np.ndarray:
    """Which keys ``(M, K)`` lie as near to one of some rows as patches of good photos do, bool, shape ``(M,)``.

    Args:
        keys (np.ndarray): The keys.
        rows (np.ndarray): Rows of a bank that keeps only some of the patches of its photos, shape ``(N, K)``.
        reach (np.ndarray): What :func:`widen` made of them, shape ``(N,)``.
    """
    found = np.zeros(len(keys), dtype=bool)
    for start in range(0, len(keys), BLOCK):
        part = slice(start, start + BLOCK)
        found[part] = (2 - 2 * (keys[part] @ rows.T) <= reach + SLACK).any(axis=1)
    return found


def defect_cells(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """Which cells of a grid over a mask are defective, as of :func:`defective`; arguments as of :func:`covered`."""
    return defective(covered(mask, height, width))


def defective(shares: np.ndarray) -> np.ndarray:
    """Which cells are defective, bool, given the share of each that a defect covers.

    Of a defect that covers no cell well enough, the cells that it covers most.
    """
    return shares >= min(COVERED, shares.max())


def covered(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """The share of each cell of a grid over a mask that a defect covers, shape ``(height, width)``.

    Args:
        mask (np.ndarray): True where the defect is, bool, shape ``(H, W)``.
        height (int): Rows of the grid.
        width (int): Columns of the grid.
    """
    starts = [np.arange(cells) * side // cells for cells, side in zip((height, width), mask.shape, strict=True)]
    counts = np.add.reduceat(np.add.reduceat(mask, starts[0], axis=0, dtype=np.int64), starts[1], axis=1)
    sides = [np.maximum(np.diff(each, append=side), 1) for each, side in zip(starts, mask.shape, strict=True)]
    shares: np.ndarray = counts / np.outer(*sides)
    return shares


def enlarging(patches: int, pixels: int) -> np.ndarray:
    """Bilinear interpolation and smoothing along one side, as a matrix ``(patches, pixels)``, float32."""
    places = np.clip((np.arange(pixels) + 0.5) * patches / pixels - 0.5, 0, patches - 1)
    weights = np.maximum(1 - np.abs(np.arange(patches)[:, None] - places), 0)
    sigma = SMOOTHING * pixels
    reach = int(np.ceil(3 * sigma))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    padded = np.pad(weights, ((0, 0), (reach, reach)), mode="edge")
    smoothed = [np.convolve(row, kernel / kernel.sum(), mode="valid") for row in padded]
    return np.array(smoothed, dtype=np.float32)
