# SPDX-License-Identifier: Apache-2.0

"""A threshold for one product, from the scores of its own reference photos. No photo, no network, no torch.

Each of the k reference photos is scored against the bank of the k - 1 others. These k scores say where good photos of
the product lie. How far they scatter can hardly be learned from so few: the source categories of the training tell how
far is usual, and the product's own scores correct that as far as they go.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

# Weight of the spread that was learned on the source categories, in scores: it counts as much as this many scores of
# the product. More would ignore that products scatter differently, fewer would trust two or three scores too much.
PRIOR = 4


def check_rate(rate: float) -> None:
    """Refuse a target false-alarm rate that is not between 0 and 1, both excluded.

    Raises:
        ValueError: If ``rate`` is such a value.
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
        rate (float): Target false-alarm rate, the share of good photos above the threshold.

    Raises:
        ValueError: If the rate is not between 0 and 1, there are fewer than two scores, or one is not finite.
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
