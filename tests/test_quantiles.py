# SPDX-License-Identifier: Apache-2.0

"""Quantiles without scipy are scipy's."""

import math

import numpy as np
import pytest
from scipy.special import betainc
from scipy.stats import beta, t

from anomalib_resad.enrollment.calibration import how_sure, largest_rate
from anomalib_resad.enrollment.quantiles import beta_share, share_interval, student_quantile


@pytest.mark.parametrize("freedom", [1, 2, 3, 7, 50, 3000])
def test_quantiles_of_student(freedom: int) -> None:
    for above in (1e-12, 1e-6, 0.001, 0.05, 0.2, 0.25, 0.2501, 0.4, 0.499999, 0.5, 0.6, 0.9, 0.999):
        expected = t.isf(above, freedom)
        assert student_quantile(above, freedom) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("a", [0.5, 1, 3, 200, 5000])
@pytest.mark.parametrize("b", [0.5, 2, 7, 3000])
def test_incomplete_beta_function(a: float, b: float) -> None:
    for x in (1e-8, 0.01, 0.2, 0.5, 0.7, 0.99, 0.999999):
        assert beta_share(x, a, b) == pytest.approx(betainc(a, b, x), rel=1e-9, abs=1e-20)


@pytest.mark.parametrize(("count", "of"), [(0, 1), (1, 1), (0, 40), (3, 40), (40, 40), (17, 1000), (5, 100_000)])
def test_interval_of_a_share(count: int, of: int) -> None:
    low, high = share_interval(count, of)
    assert low == pytest.approx(beta.ppf(0.025, count, of - count + 1) if count else 0, rel=1e-9)
    assert high == pytest.approx(beta.ppf(0.975, count + 1, of - count) if count < of else 1, rel=1e-9)
    for wrong in ((-1, of), (of + 1, of), (0, 0)):
        with pytest.raises(ValueError, match="is no share"):
            share_interval(*wrong)


@pytest.mark.parametrize("k", [2, 4, 16])
def test_how_sure_a_threshold_is(k: int) -> None:
    """Over many products whose scatter is as the source's, the rate stays below the limit in 95 %."""
    generator = np.random.default_rng(1)
    spread, freedom = 0.5, k + 3
    scatter = spread * np.sqrt(4 / generator.chisquare(4, 20_000))
    scores = generator.normal(0, scatter, (k, 20_000))
    squares = ((scores - scores.mean(axis=0)) ** 2).sum(axis=0) + 4 * spread**2
    limits = scores.mean(axis=0) + np.sqrt(squares / freedom * (1 + 1 / k)) * t.isf(0.05, freedom)
    rates = np.array([math.erfc(each / math.sqrt(2)) / 2 for each in limits / scatter])
    assert (rates <= largest_rate(k, spread, 0.05)).mean() == pytest.approx(0.95, abs=0.01)
    assert "95 % sure" in how_sure(k, spread, 0.05)
    assert "a guess" in how_sure(k, math.nan, 0.05)
