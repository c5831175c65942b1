# SPDX-License-Identifier: Apache-2.0

"""What was found in a photo, and the scales that make it comparable."""

import math
from dataclasses import dataclass

import numpy as np

from anomalib_resad.deploy.bank import Bank
from anomalib_resad.deploy.bundle import Manifest
from anomalib_resad.enrollment.thresholds import product_map_threshold


@dataclass(frozen=True)
class Prediction:
    """What was found in a photo.

    Attributes:
        score (float): 0 to 1, 0.5 at the threshold.
        label (bool | None): Whether it is anomalous; ``None`` where no threshold is known.
        map (np.ndarray): Anomaly of each pixel, float32, 0 to 1, shape ``(H, W)`` of the model's input.
        raw_score (float): The score before normalization, which thresholds of products refer to.
    """

    score: float
    label: bool | None
    map: np.ndarray
    raw_score: float


def scales_of(manifest: Manifest, bank: Bank) -> tuple[tuple[np.float32, ...], tuple[np.float32, ...]]:
    """Threshold, low and high of a product's scores, and of its maps, in the precision of the model's outputs.

    The threshold of the maps moves with that of the scores.

    Args:
        manifest (Manifest): The bundle's.
        bank (Bank): The product's.
    """
    threshold, *score_range = manifest.score.numbers
    map_threshold, *map_range = manifest.map.numbers
    own = math.nan if bank.threshold is None else bank.threshold
    moved = product_map_threshold(map_threshold, threshold, own)
    chosen = threshold if bank.threshold is None else own
    return _float32(chosen, *score_range), _float32(moved, *map_range)


def _float32(*values: float) -> tuple[np.float32, ...]:
    return tuple(np.float32(value) for value in values)
