# SPDX-License-Identifier: Apache-2.0

"""A threshold for one product, from the scores of its own reference photos. No photo, no network, no torch.

Each of the k reference photos is scored against the bank of the k - 1 others. These k scores say where good photos of
the product lie. How far they scatter can hardly be learned from so few: the source categories of the training tell how
far is usual, and the product's own scores correct that as far as they go.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

# How many scores of a product the source's spread is worth: products differ in how far their good photos scatter.
PRIOR = 4


def check_rate(rate: float) -> None:
    """Refuse a false-alarm rate that is none.

    Raises:
        ValueError: If it is not between 0 and 1.
    """
    if not 0 < rate < 1:
        msg = f"false_alarm_rate={rate} must be a share of good photos between 0 and 1, 0.05 for 5 %, say."
        raise ValueError(msg)


def least_rate(k: int) -> float:
    """The least false-alarm rate that k scores alone can show, that of their maximum as the threshold: 1 / (k + 1)."""
    return 1 / (k + 1)


def pooled_spread(scores: ArrayLike, categories: Sequence[str]) -> float:
    """Standard deviation of scores within their categories, over all categories; NaN where each has a single one.

    Args:
        scores (ArrayLike): Raw scores of good images, shape ``(N,)``.
        categories (Sequence[str]): The category of each.
    """
    values, names = np.asarray(scores, dtype=np.float64), np.asarray(categories)
    groups = [values[names == name] for name in np.unique(names)]
    freedom = sum(len(group) - 1 for group in groups)
    squares = sum(float(((group - group.mean()) ** 2).sum()) for group in groups)
    return math.sqrt(squares / freedom) if freedom else math.nan


def product_threshold(scores: ArrayLike, spread: float, rate: float) -> float:
    """The raw score that a good photo of the product exceeds with the given probability.

    The upper limit of Student's distribution around the mean of the scores, widened by ``sqrt(1 + 1 / k)``, since the
    mean of k scores is uncertain itself. The variance is that of the product's scores and that of the source together,
    which counts as :data:`PRIOR` scores more: the predictive distribution of a normal with a scaled inverse chi-squared
    prior (Gelman et al., "Bayesian Data Analysis", 3rd edition, section 3.3). The bank of k - 1 photos gives slightly
    higher scores than that of all k, so the limit is on the safe side.

    Args:
        scores (ArrayLike): Raw leave-one-out scores of the reference photos, shape ``(K,)``, ``K >= 2``.
        spread (float): Standard deviation of good photos' scores within the source categories; NaN, where it is
            unknown, for that of the scores themselves.
        rate (float): Wished false-alarm rate, the share of good photos above the threshold.

    Raises:
        ValueError: If the rate is none, there are fewer than two scores, or one is not finite.
    """
    check_rate(rate)
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or len(values) < 2 or not np.isfinite(values).all():
        msg = f"A product's threshold needs the finite scores of two or more reference photos, got {values.tolist()}."
        raise ValueError(msg)
    from scipy.stats import t  # noqa: PLC0415  # slow to import, and seldom needed

    freedom, squares = len(values) - 1, float(((values - values.mean()) ** 2).sum())
    if not math.isnan(spread):
        freedom, squares = freedom + PRIOR, squares + PRIOR * spread**2
    deviation = math.sqrt(squares / freedom * (1 + 1 / len(values)))
    return float(values.mean() + deviation * t.ppf(1 - rate, freedom))


def normalize(score: float, threshold: float, low: float, high: float) -> float:
    """A raw score as models give it: in 0..1, 0.5 at the threshold, strictly increasing.

    Args:
        score (float): Raw score.
        threshold (float): Raw threshold; NaN for none.
        low (float): Least raw score of the range that was learned in training; NaN for none.
        high (float): Largest.
    """
    center = 0.0 if math.isnan(threshold) else threshold
    scale = 2 / (high - low) if high > low else 1.0
    u = scale * (score - center)
    return 0.5 + u / (2 * (1 + abs(u)))


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
        return normalize(threshold, self.image_threshold, *self.image_range)

    def at_source(self) -> float:
        """Normalized score of the threshold that was learned on the source categories."""
        return self.at_raw(self.source_threshold)

    def at_rate(self, rate: float) -> float:
        """Normalized score of the product's threshold at a wished false-alarm rate.

        Raises:
            ValueError: See :func:`product_threshold`.
        """
        return self.at_raw(product_threshold(self.leave_one_out, self.spread, rate))

    def write(self, path: Path | str) -> None:
        """Write a JSON file, whole or not at all; NaN is ``null``."""
        content = {key: _plain(value) for key, value in asdict(self).items()}
        path = Path(path)
        temporary = path.with_name(path.name + ".part")
        temporary.write_text(json.dumps(content, indent=2) + "\n")
        temporary.replace(path)

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
        return tuple(math.nan if each is None else float(each) for each in value)
    return math.nan if value is None else float(value)
