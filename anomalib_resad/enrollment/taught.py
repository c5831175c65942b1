# SPDX-License-Identifier: Apache-2.0

"""Defects that were missed and then taught: patches that lie nearer to them than to every good patch score higher.

The raise of a patch grows with the logarithm of how many times nearer it is to the taught patches. It is added outside
of the model, so every bundle with keys can be taught.
"""

from dataclasses import dataclass

import numpy as np

# Raise of the score where a patch is e times nearer to a taught patch than to the good ones (squared distances), in
# standard deviations of good photos' scores: the least that benchmarks/teach.py chose, for each product on the others.
RAISE = 3.0
EQUAL = 0.01  # squared distance of two keys, which are of unit length, below which patches count as equal
MOST_PATCHES = 32  # kept of each taught photo, those that cover the others
COVERED = 0.1  # least share of a patch that a defect covers
TOP_SHARE = 0.01  # of a photo's patches, the most anomalous ones, whose mean is its score: the model's, too
SMOOTHING = 4 / 224  # standard deviation of the smoothing of maps, as a share of their side: that of the model
BLOCK = 2048  # rows that are compared at once


@dataclass(frozen=True)
class Taught:
    """What an inspection needs of the defects that a product was taught.

    Attributes:
        good (np.ndarray): Keys of good patches that are searched, shape ``(N, K)``.
        taught (np.ndarray): Keys of taught patches, shape ``(M, K)``.
        unit (float): What a raise is multiplied with.
        image_size (tuple[int, int]): Height and width of the maps.
    """

    good: np.ndarray
    taught: np.ndarray
    unit: float
    image_size: tuple[int, int]

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
        patches = np.float32(self.unit) * np.maximum(nearer, 0).reshape(count, *grid)
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


def defect_cells(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """Which cells of a grid over a mask are defective, bool, shape ``(height, width)``.

    Of a defect that covers no cell well enough, the cells that it covers most.

    Args:
        mask (np.ndarray): True where the defect is, bool, shape ``(H, W)``.
        height (int): Rows of the grid.
        width (int): Columns of the grid.
    """
    starts = [np.arange(cells) * side // cells for cells, side in zip((height, width), mask.shape, strict=True)]
    counts = np.add.reduceat(np.add.reduceat(mask, starts[0], axis=0, dtype=np.int64), starts[1], axis=1)
    sides = [np.maximum(np.diff(each, append=side), 1) for each, side in zip(starts, mask.shape, strict=True)]
    shares = counts / np.outer(*sides)
    return shares >= min(COVERED, shares.max())


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
