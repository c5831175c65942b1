# SPDX-License-Identifier: Apache-2.0

"""What was found, as regions: connected places of an anomaly map, in pixels of the photo."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from anomalib_resad.deploy.pictures import resized
from anomalib_resad.enrollment.checks import is_count, is_number
from anomalib_resad.enrollment.decoding import MOST_KEPT

SEED = 0.5  # of the normalized map: its threshold
GROWN = 0.45  # to which a region grows around what lies above the threshold, so that a defect is not cut into pieces
MOST = 100  # regions of a photo; a map of more says that the photo is another one


@dataclass(frozen=True)
class Region:
    """A connected place of a map; pixels are those of the photo, counted from its top left one, which is 0, 0.

    Attributes:
        x (int): Left column.
        y (int): Top row.
        width (int): Columns.
        height (int): Rows.
        area (int): Pixels of the region itself, which fills its box or less.
        peak (float): Largest value of the map in it, 0 to 1.
        mean (float): Mean of the map in it.
        center_x (float): Column of its centroid.
        center_y (float): Row of its centroid.
    """

    x: int
    y: int
    width: int
    height: int
    area: int
    peak: float
    mean: float
    center_x: float
    center_y: float


def bounded(size: Sequence[int]) -> tuple[int, int]:
    """Height and width of the largest picture of a photo that is held as numbers: of larger photos a smaller one."""
    height, width = int(size[0]), int(size[1])
    scale = min(1.0, (MOST_KEPT / (height * width)) ** 0.5)
    return max(1, int(height * scale)), max(1, int(width * scale))


def find_regions(
    anomaly_map: np.ndarray,
    size: Sequence[int],
    min_area: int = 0,
    seed: float = SEED,
    grown: float = GROWN,
    most: int = MOST,
) -> tuple[Region, ...]:
    """Connected regions with hysteresis: pixels above ``grown`` that touch, if one of them is above ``seed``.

    They are found in the map at the photo's size (:func:`bounded`); neighbors across a corner touch.

    Args:
        anomaly_map (np.ndarray): Normalized map of any size, 0 to 1, shape ``(H, W)``.
        size (Sequence[int]): Height and width of the photo in pixels. Its sides may be scaled differently.
        min_area (int): Fewest pixels of a region, of the photo.
        seed (float): What a region has to exceed somewhere.
        grown (float): What it has to exceed everywhere.
        most (int): Most regions.

    Returns:
        tuple[Region, ...]: Those of the highest peaks, the highest first; of equal peaks the larger.

    Raises:
        ValueError: If the map holds NaN or infinity or is none, or a number is impossible.
        ModuleNotFoundError: If OpenCV is not installed.
    """
    _check(anomaly_map, size, min_area, seed, grown, most)
    if float(anomaly_map.max()) <= seed:  # nor is it higher at another size
        return ()
    values = resized(anomaly_map, bounded(size))
    above = values > grown
    count, labels, stats, centers = _opencv().connectedComponentsWithStats(above.astype(np.uint8), connectivity=8)
    inside, of = values[above], labels[above]
    pixels = np.bincount(of, minlength=count)
    means = np.bincount(of, inside, minlength=count) / np.maximum(pixels, 1)
    peaks = np.zeros(count, dtype=np.float32)
    np.maximum.at(peaks, of, inside)
    high, wide = size[0] / values.shape[0], size[1] / values.shape[1]  # pixels of the photo in one of the map
    areas = np.rint(pixels * high * wide).astype(int)
    kept = np.flatnonzero((peaks > seed) & (pixels > 0) & (areas >= min_area))
    left, top, width, height = stats[:, :4].T
    left, right = np.floor(left * wide).astype(int), np.ceil((left + width) * wide - 1e-9).astype(int)
    top, bottom = np.floor(top * high).astype(int), np.ceil((top + height) * high - 1e-9).astype(int)
    order = sorted(kept, key=lambda each: (-peaks[each], -areas[each], top[each], left[each]))[:most]
    return tuple(
        Region(
            int(left[each]),
            int(top[each]),
            int(right[each] - left[each]),
            int(bottom[each] - top[each]),
            int(areas[each]),
            float(peaks[each]),
            float(means[each]),
            float((centers[each, 0] + 0.5) * wide - 0.5),
            float((centers[each, 1] + 0.5) * high - 0.5),
        )
        for each in order
    )


def _check(anomaly_map: np.ndarray, size: Sequence[int], min_area: int, seed: float, grown: float, most: int) -> None:
    if anomaly_map.ndim != 2 or not anomaly_map.size or not np.isfinite(anomaly_map).all():
        msg = f"A map of shape {anomaly_map.shape} has no regions: it has to be (H, W), without NaN and infinity."
        raise ValueError(msg)
    if len(size) != 2 or min(size) < 1:
        msg = f"size={tuple(size)} must be height and width of the photo in pixels."
        raise ValueError(msg)
    if not (is_number(seed) and is_number(grown) and 0 <= grown <= seed <= 1):
        msg = f"seed={seed!r} and grown={grown!r} must lie between 0 and 1, and a region grows to a lower value."
        raise ValueError(msg)
    check_min_area(min_area)
    if not is_count(most):
        msg = f"most={most!r} must be a whole number of at least 1."
        raise ValueError(msg)


def check_min_area(min_area: object) -> None:
    """Refuse what is no number of pixels.

    Raises:
        ValueError: If it is not.
    """
    if type(min_area) is not int or not 0 <= min_area < 1 << 40:
        msg = f"min_area={min_area!r} must be a number of pixels of the photo, 0 for regions of any size."
        raise ValueError(msg)


def _opencv() -> Any:  # noqa: ANN401
    try:
        import cv2  # noqa: PLC0415  # 70 MB, needed where something was found
    except ModuleNotFoundError as error:
        msg = "Regions need OpenCV: pip install opencv-python-headless."
        raise ModuleNotFoundError(msg, name="cv2") from error
    return cv2
