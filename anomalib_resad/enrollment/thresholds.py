# SPDX-License-Identifier: Apache-2.0

"""Raw scores to scores in 0..1 with 0.5 at the threshold, and the file of thresholds beside an exported model.

The functions that take ``xp`` work on numbers and arrays with numpy, and on tensors with ``xp=torch``.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from anomalib_resad.enrollment.calibration import product_threshold
from anomalib_resad.enrollment.checks import is_number
from anomalib_resad.enrollment.files import write_whole

LARGEST = 1e30  # of thresholds and ranges: no score comes near, and float32 computes with it


def is_threshold(value: object) -> bool:
    """Whether something is a number that scores can be compared with: finite, and not absurd."""
    return is_number(value) and abs(value) < LARGEST


def center_and_width(threshold: Any, low: Any, high: Any, xp: Any = np) -> tuple[Any, Any]:  # noqa: ANN401
    """What is subtracted from a raw value, and half of what it is divided by; NaN stands for what is unknown.

    Args:
        threshold (Any): Raw threshold; where it is unknown, the middle of the range stands in, or 0.
        low (Any): Least raw value of the range that was learned in training.
        high (Any): Largest. Without a range the raw scale stays (a width of 2); an empty range counts as 1 wide.
        xp (Any): ``numpy``, or ``torch`` for tensors.
    """
    width = high - low
    has_range = ~xp.isnan(width)
    middle = xp.where(has_range, (high + low) / 2, 0.0)
    center = xp.where(xp.isnan(threshold), middle, threshold)
    return center, xp.where(has_range, xp.where(width > 0, width, 1.0), 2.0)


def normalize(raw: Any, threshold: Any, low: Any, high: Any, xp: Any = np) -> Any:  # noqa: ANN401
    """Raw values as models give them: in 0..1, 0.5 at the threshold, strictly increasing.

    ``0.5 + u / (2 (1 + |u|))`` with ``u = 2 (raw - threshold) / (high - low)``, written so that nothing overflows
    however narrow the range is; arguments as of :func:`center_and_width`.
    """
    center, width = center_and_width(threshold, low, high, xp)
    distance = 2 * (raw - center)
    return 0.5 + 0.5 * distance / (width + abs(distance))


def denormalize(value: float, threshold: float, low: float, high: float) -> float:
    """The raw value that :func:`normalize` makes ``value`` of, for ``0 < value < 1``.

    Raises:
        ValueError: If no raw value is normalized to ``value``.
    """
    if not 0 < value < 1:
        msg = f"{value} is no normalized score: these lie between 0 and 1, both excluded."
        raise ValueError(msg)
    center, width = center_and_width(threshold, low, high)
    v = 2 * value - 1
    return float(center + v / (1 - abs(v)) * width / 2)


def product_map_threshold(map_threshold: Any, threshold: Any, own: Any, offset: Any, xp: Any = np) -> Any:  # noqa: ANN401
    """Raw threshold of the maps of a product that has a threshold of its own.

    It lies below that of the scores by as much as the maps of the product's good photos lie below their scores. Where
    that is unknown, it moves with that of the scores from where it was learned, which is often too high.

    Args:
        map_threshold (Any): Raw threshold of maps that was learned on the source categories; NaN if unknown.
        threshold (Any): The same of scores.
        own (Any): The product's own threshold of scores; NaN for none.
        offset (Any): :attr:`~anomalib_resad.enrollment.calibration.OwnScores.map_offset`; NaN if unknown.
        xp (Any): ``numpy``, or ``torch`` for tensors.
    """
    moved = map_threshold + own - threshold
    moved = xp.where(xp.isnan(moved), own, moved)  # no source was learned from
    moved = xp.where(xp.isnan(offset), moved, own - offset)
    return xp.where(xp.isnan(own), map_threshold, moved)


@dataclass(frozen=True)
class Thresholds:
    """What lies beside an exported model, so that its threshold can be changed without exporting again.

    The exported model answers with normalized scores, 0.5 at the threshold that it was exported with. The methods give
    what to compare them with instead.

    Attributes:
        image_threshold (float): Raw threshold of scores that the model was exported with.
        pixel_threshold (float): The same of the maps.
        image_range (tuple[float, float]): Least and largest raw score in training.
        pixel_range (tuple[float, float]): The same of the maps.
        source_threshold (float): Raw threshold of scores that was learned on the source categories.
        spread (float): Standard deviation of good photos' scores within the source categories.
        leave_one_out (tuple[float, ...]): Raw score of each reference photo against the others.
    """

    image_threshold: float
    pixel_threshold: float
    image_range: tuple[float, float]
    pixel_range: tuple[float, float]
    source_threshold: float
    spread: float
    leave_one_out: tuple[float, ...]

    def at_raw(self, threshold: float) -> float:
        """Normalized score of a raw threshold: above it, a photo is defective."""
        return float(normalize(threshold, self.image_threshold, *self.image_range))

    def at_source(self) -> float:
        """Normalized score of the threshold that was learned on the source categories."""
        return self.at_raw(self.source_threshold)

    def at_rate(self, rate: float) -> float:
        """Normalized score of the product's threshold at a target false-alarm rate.

        Raises:
            ValueError: See :func:`product_threshold`.
        """
        return self.at_raw(product_threshold(self.leave_one_out, self.spread, rate))

    def write(self, path: Path | str) -> None:
        """Write a JSON file, whole or not at all; NaN is ``null``."""
        content = {key: _plain(value) for key, value in asdict(self).items()}
        write_whole(Path(path), (json.dumps(content, indent=2) + "\n").encode())

    @classmethod
    def read(cls, path: Path | str) -> "Thresholds":
        """Read the file.

        Raises:
            ValueError: If it is no such file.
        """
        try:
            content = json.loads(Path(path).read_text())
            return cls(**{key: _number(value) for key, value in content.items()})  # type: ignore[arg-type]
        except (TypeError, ValueError, AttributeError) as error:
            msg = f"{path} holds no thresholds of an exported ResAD: {error}. Export the model again."
            raise ValueError(msg) from error


def _plain(value: float | Sequence[float]) -> float | list[float | None] | None:
    if isinstance(value, Sequence):
        return [None if math.isnan(each) else each for each in value]
    return None if math.isnan(value) else value


def _number(value: float | list[float | None] | None) -> float | tuple[float, ...]:
    if isinstance(value, list):
        return tuple(float(_number(each)) for each in value)  # type: ignore[arg-type]
    if value is None:
        return math.nan
    if not is_threshold(value):
        msg = f"{value} is no finite number below {LARGEST:g}"
        raise ValueError(msg)
    return float(value)
