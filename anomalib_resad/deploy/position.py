# SPDX-License-Identifier: Apache-2.0

"""Whether what a region shows is where it was in the good photos.

Where products always lie alike, patches of two photos resemble each other most at the same place: more than if one
photo is shifted by half of the region. A photo counts as moved if it has lost most of that gain. Products that lie
differently, and textures, have no such gain: nothing can be told of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from anomalib_resad.deploy.bank import Bank
from anomalib_resad.deploy.bank_rows import cells_of
from anomalib_resad.deploy.bundle import Manifest

# Shifting must at least double the distance of good photos to each other (one minus the cosine), and what it adds must
# be that many standard deviations. Below this share of the gain a photo counts as moved (benchmarks/moved.py).
LEAST_TIMES, LEAST_DEVIATIONS = 2.0, 3.0
MOVED = 0.3


@dataclass(frozen=True)
class Position:
    """How the patches of good photos lie in the region.

    Attributes:
        cells (np.ndarray): Which patches count, bool, shape ``(H, W)``.
        photos (Sequence[np.ndarray]): The good photos' features of the last level, of unit length, ``(C, H, W)``.
        alike (float): Mean cosine of a good photo with the most similar other one, at the same places.
        shifted (float): The same if that one is shifted by half of the region.
    """

    cells: np.ndarray
    photos: Sequence[np.ndarray]
    alike: float
    shifted: float

    def share(self, features: np.ndarray) -> float:
        """How much of the gain a photo has: about 1 if it lies as the good ones do, 0 if it does not.

        Args:
            features (np.ndarray): Its features of the last level, shape ``(C, H, W)``.
        """
        found = max(_cosine(_unit(features), other, self.cells) for other in self.photos)
        return (found - self.shifted) / (self.alike - self.shifted)

    def has_moved(self, features: np.ndarray) -> bool:
        """Whether a photo counts as moved; arguments as of :meth:`share`."""
        return self.share(features) < MOVED


def position_of(bank: Bank, manifest: Manifest) -> Position | None:
    """How the good photos of a product with a region lie; ``None`` where nothing can be told.

    Args:
        bank (Bank): The bank.
        manifest (Manifest): The bundle's.
    """
    count, level = len(bank.references), manifest.levels_at(bank.image_size)[-1]
    if bank.region is None or bank.rotations > 1 or count < 2:
        return None
    cells = cells_of(bank, level)
    photos = []
    for rows in np.split(bank.arrays[f"rows_{len(manifest.levels) - 1}"], count):
        grid = np.zeros((level.height, level.width, level.channels), dtype=np.float32)
        grid[cells] = rows
        photos.append(_unit(grid.transpose(2, 0, 1)))
    half = level.height // 2, level.width // 2
    shifts = [(half[0], 0), (0, half[1]), half]
    alike, shifted = [], []
    for index, photo in enumerate(photos):
        others = [*photos[:index], *photos[index + 1 :]]
        alike.append(max(_cosine(photo, other, cells) for other in others))
        rolled = [max(_cosine(photo, np.roll(other, by, (1, 2)), cells) for other in others) for by in shifts]
        shifted.append(float(np.mean(rolled)))
    near, far, deviation = 1 - np.mean(alike), 1 - np.mean(shifted), np.std(alike, ddof=1)
    if far < LEAST_TIMES * near or far - near < LEAST_DEVIATIONS * deviation:
        return None
    return Position(cells, photos, float(np.mean(alike)), float(np.mean(shifted)))


def _unit(features: np.ndarray) -> np.ndarray:
    return features / np.maximum(np.linalg.norm(features, axis=0, keepdims=True), 1e-12)


def _cosine(first: np.ndarray, second: np.ndarray, cells: np.ndarray) -> float:
    """Mean cosine of features at the same places."""
    return float((first * second).sum(axis=0)[cells].mean())
