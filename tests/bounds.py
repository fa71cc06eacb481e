"""Thresholds of statistical tests, as quantiles at one stated false-alarm rate."""

from __future__ import annotations

from scipy.stats import chi2, norm

FALSE_ALARM = 1e-5
"""Probability that one statistical test of the suite fails by chance on right code."""


def normal_bound(tests: int = 1) -> float:
    """Two-sided bound on the largest of ``tests`` standard normal numbers."""
    return float(norm.isf(FALSE_ALARM / (2 * tests)))


def chi2_bounds(freedom: float) -> tuple[float, float]:
    """Bounds on a chi-squared number divided by its degrees of freedom."""
    return float(chi2.ppf(FALSE_ALARM / 2, freedom) / freedom), float(chi2.isf(FALSE_ALARM / 2, freedom) / freedom)
