# SPDX-License-Identifier: Apache-2.0

"""A threshold for one product, from the scores of its own reference photos. No photo, no network, no torch.

Each of the k reference photos is scored against the bank of the k - 1 others. These k scores say where good photos of
the product lie. How far they scatter can hardly be learned from so few: the source categories of the training tell how
far is usual, and the product's own scores correct that as far as they go.
"""

import math
from collections.abc import Iterable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from anomalib_resad.enrollment.checks import is_number
from anomalib_resad.enrollment.quantiles import student_quantile

# Weight of the spread that was learned on the source categories, in scores: it counts as much as this many scores of
# the product. More would ignore that products scatter differently, fewer would trust two or three scores too much.
PRIOR = 4
# Target false-alarm rate where a product gets a threshold of its own, unless another one is asked for.
USUAL_RATE = 0.05
DRAWS = 20_000  # of what the location and the scatter of a product may be
TOP_SHARE = 0.01  # of a map's pixels, the most anomalous ones, whose mean says how high the map goes


class OwnScores(NamedTuple):
    """What the good photos of a product score, each against a bank of the others.

    Attributes:
        scores (tuple[float, ...]): Raw scores; none of a single photo.
        map_offset (float): How much higher these scores are than the top of the photos' maps, on the mean; NaN of a
            single photo. Maps are smoothed, and scores are not, or less.
    """

    scores: tuple[float, ...]
    map_offset: float


def own_scores(found: Iterable[tuple[float, np.ndarray]]) -> OwnScores:
    """What is kept of the raw score and the raw map, shape ``(H, W)``, of each good photo."""
    scores, offsets = [], []
    for score, anomaly_map in found:
        most = max(1, round(TOP_SHARE * anomaly_map.size))
        scores.append(float(score))
        offsets.append(float(score) - float(np.partition(anomaly_map.ravel(), -most)[-most:].mean(dtype=np.float64)))
    return OwnScores(tuple(scores), float(np.mean(offsets)) if offsets else math.nan)


def check_rate(rate: object) -> None:
    """Refuse a target false-alarm rate that is not between 0 and 1, both excluded.

    Raises:
        ValueError: If ``rate`` is such a value.
    """
    if not (is_number(rate) and 0 < rate < 1):
        msg = f"false_alarm_rate={rate!r} must be a share of good photos between 0 and 1, 0.05 for 5 %, say."
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
    freedom, squares = _freedom(len(values), spread), float(((values - values.mean()) ** 2).sum())
    if not math.isnan(spread):
        squares += PRIOR * spread**2
    deviation = math.sqrt(squares / freedom * (1 + 1 / len(values)))
    return float(values.mean() + deviation * student_quantile(rate, freedom))


def _freedom(k: int, spread: float) -> int:
    """Scores that tell how far good photos scatter: all but one, and what was learned on the source."""
    return k - 1 + (0 if math.isnan(spread) else PRIOR)


def largest_rate(k: int, spread: float, rate: float) -> float:
    """The share of good photos above a product's threshold is at most this, with 95 % confidence.

    What :func:`product_threshold` knows of the product, its location and its scatter, is a distribution. Each draw of
    it gives the threshold another rate. The scores themselves cancel out.

    Args:
        k (int): Reference photos, 2 or more.
        spread (float): As of :func:`product_threshold`.
        rate (float): Target false-alarm rate.
    """
    generator, freedom = np.random.default_rng(0), _freedom(k, spread)
    limit = student_quantile(rate, freedom) * math.sqrt(1 + 1 / k)
    scatter = np.sqrt(generator.chisquare(freedom, DRAWS) / freedom)
    distances = limit * scatter - generator.standard_normal(DRAWS) / math.sqrt(k)  # in standard deviations
    return max(rate, NormalDist().cdf(-float(np.quantile(distances, 0.05))))


def how_sure(k: int, spread: float, rate: float) -> str:
    """What to tell of a product's threshold; arguments as of :func:`largest_rate`."""
    said = f"{k} photos make it 95 % sure that at most {100 * largest_rate(k, spread, rate):.0f} % of good photos alarm"
    return f"{said} (a guess: the model knows the scatter of no product)" if math.isnan(spread) else said
