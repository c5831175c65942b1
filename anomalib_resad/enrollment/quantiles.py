# SPDX-License-Identifier: Apache-2.0

"""Quantiles of Student's t and an exact interval for shares, by the incomplete beta function: devices have no scipy."""

import math

MOST_STEPS = 10_000  # of the continued fraction, which needs about the square root of its parameters


def student_quantile(above: float, freedom: int) -> float:
    """The value that Student's t exceeds with a probability.

    Args:
        above (float): The probability, between 0 and 1, both excluded.
        freedom (int): Degrees of freedom, 1 or more.
    """
    if above > 0.5:
        return -student_quantile(1 - above, freedom)
    if above > 0.25:  # near the middle, so that nothing is lost by subtracting from 1
        share = beta_quantile(1 - 2 * above, 0.5, freedom / 2)
        return math.sqrt(freedom * share / (1 - share))
    share = beta_quantile(2 * above, freedom / 2, 0.5)
    return math.sqrt(freedom * (1 - share) / share) if share else math.inf


def share_interval(count: int, of: int, confidence: float = 0.95) -> tuple[float, float]:
    """Exact interval of Clopper and Pearson (Biometrika 26, 1934) for the share that a count was drawn from.

    Args:
        count (int): How many were found.
        of (int): Among how many, 1 or more.
        confidence (float): Least probability that the interval holds the share.

    Raises:
        ValueError: If there are none to count among, or more were found.
    """
    if not 0 <= count <= of or not of:
        msg = f"{count} of {of} is no share."
        raise ValueError(msg)
    tail = (1 - confidence) / 2
    low = beta_quantile(tail, count, of - count + 1) if count else 0.0
    high = beta_quantile(1 - tail, count + 1, of - count) if count < of else 1.0
    return low, high


def beta_quantile(probability: float, a: float, b: float) -> float:
    """The value below which the beta distribution lies with a probability, to the last digit, by halving.

    Args:
        probability (float): Between 0 and 1.
        a (float): First parameter, above 0.
        b (float): Second parameter, above 0.
    """
    low, high = 0.0, 1.0
    while low < (middle := (low + high) / 2) < high:
        if beta_share(middle, a, b) < probability:
            low = middle
        else:
            high = middle
    return high if high < 1 else low


def beta_share(x: float, a: float, b: float) -> float:
    """The regularized incomplete beta function: how much of the beta distribution lies below ``x``, ``0 < x < 1``.

    The continued fraction of the DLMF (dlmf.nist.gov/8.17.E22), from its beginning (Lentz's method).
    """
    if x > (a + 1) / (a + b + 2):  # where it converges fast
        return 1 - beta_share(1 - x, b, a)
    least = 1e-300
    upper, lower, product = 1.0, 0.0, 1.0
    for step in range(MOST_STEPS):
        m = step // 2
        if step == 0:
            factor = 1.0
        elif step % 2:
            factor = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            factor = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        lower = 1 / ((1 + factor * lower) or least)
        upper = (1 + factor / upper) or least
        product *= upper * lower
        if abs(upper * lower - 1) < 1e-15:
            break
    logarithm = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    return math.exp(logarithm) * (product - 1) / a
