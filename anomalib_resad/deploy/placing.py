# SPDX-License-Identifier: Apache-2.0

"""Where the map of a region of interest lies in the map of a photo."""

from dataclasses import dataclass

import numpy as np

from anomalib_resad.enrollment.region import bounds, core, stretched

LONGEST = 2048  # pixels of the longer side of a photo's map, about


@dataclass(frozen=True)
class Place:
    """Where a map is put.

    Attributes:
        pooled (int): Pixels of the map, each way, of which the mean is one pixel of the photo's map.
        margins (tuple[tuple[int, int], tuple[int, int]]): Rows above and below, columns to the left and to the right.
        inside (np.ndarray): Which pixels of the pooled map lie in the region, bool.
    """

    pooled: int
    margins: tuple[tuple[int, int], tuple[int, int]]
    inside: np.ndarray


def place_of(region: np.ndarray, height: int, width: int) -> Place:
    """Where a map of the region's box, of that size, lies in a photo, at the scale of the map."""
    top, left, bottom, right = bounds(region)
    rows, columns = region.shape
    larger = max(height * rows / (bottom - top), width * columns / (right - left))
    pooled = max(1, round(larger / LONGEST))  # of a region that is a small part of the photo
    high, wide = -(-height // pooled), -(-width // pooled)
    vertical, horizontal = high / (bottom - top), wide / (right - left)
    margins = (
        (round(top * vertical), round((rows - bottom) * vertical)),
        (round(left * horizontal), round((columns - right) * horizontal)),
    )
    return Place(pooled, margins, stretched(core(region), (high, wide)) > 0)


def placed(anomaly_map: np.ndarray, region: np.ndarray) -> np.ndarray:
    """The map of a region's box in that of its photo, 0 outside of the region.

    Args:
        anomaly_map (np.ndarray): Map of the box, shape ``(H, W)``.
        region (np.ndarray): The region.
    """
    place = place_of(region, *anomaly_map.shape)
    if place.pooled > 1:
        rest = [(0, -side % place.pooled) for side in anomaly_map.shape]
        padded = np.pad(anomaly_map, rest, constant_values=np.nan)
        blocks = padded.reshape(place.inside.shape[0], place.pooled, place.inside.shape[1], place.pooled)
        anomaly_map = np.asarray(np.nanmean(blocks, axis=(1, 3), dtype=np.float32))
    return np.pad(np.where(place.inside, anomaly_map, np.float32(0)), place.margins)
