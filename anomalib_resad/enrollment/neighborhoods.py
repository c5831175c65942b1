# SPDX-License-Identifier: Apache-2.0

"""Neighborhoods of patches: how they lie, where they are among the levels of a model, and whose are judged."""

from collections.abc import Sequence

import numpy as np

SIDE, STEP = 4, 2  # sides and distance of neighborhoods, in patches: they overlap by half
NEIGHBORHOODS = 1  # where they lie among the levels of a keyed model that has them: values, neighborhoods, keys
PATCHES_PER_NEIGHBORHOOD = 4  # about, of a photo; where patches are thinned out to a number, neighborhoods likewise
# Photos from which neighborhoods are judged. Two pairs tell then whether all are rotated; a single pair errs too often.
FEWEST_PHOTOS = 4


def neighborhoods_along(patches: int) -> int:
    """How many neighborhoods there are along a side of so many patches."""
    return max(1, (patches - SIDE) // STEP + 1)


def of_patches(rows: Sequence[np.ndarray], chosen: np.ndarray) -> list[np.ndarray]:
    """Some patches of keyed rows, with all neighborhoods, which are no patches."""
    return [
        level if has_neighborhoods(rows) and number == NEIGHBORHOODS else level[chosen]
        for number, level in enumerate(rows)
    ]


def judges_neighborhoods(photos: int, rotations: int) -> bool:
    """Whether neighborhoods of a product are judged beside its patches.

    They recur in products that lie alike. In those that are rotated to each other each arrangement is another one, and
    few photos do not tell which they are (benchmarks/experiments.md).

    Args:
        photos (int): Good photos of the product.
        rotations (int): Their orientations.
    """
    return photos >= FEWEST_PHOTOS and rotations == 1


def has_neighborhoods(rows: Sequence[object]) -> bool:
    """Whether there are neighborhoods among the levels of a keyed model."""
    return len(rows) > NEIGHBORHOODS + 1
