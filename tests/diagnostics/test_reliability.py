"""Reliability of exceedance with the case as the unit; the isotonic curve is that of the libraries."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy import stats

from recon.diagnostics.reliability import Events, case_events, isotonic, reliability_over_cases
from recon.errors import InputError

PIXELS, DRAWS = 20, 15


def cases(count, bias=0.0, seed=0, draws=DRAWS):
    """Fields that share most of their variance over pixels; truths are higher by ``bias``."""
    rng = np.random.default_rng(seed)

    def field(n, centre):
        return centre + 0.8 * rng.normal(size=(n, 1)) + 0.6 * rng.normal(size=(n, PIXELS))

    made = []
    for _ in range(count):
        centre = rng.normal()
        made.append(case_events(field(draws, centre), field(1, centre)[0] + bias, 0.5))
    return made


def test_events_are_counted_with_weights():
    x = np.array([[0.0, 1.0], [2.0, 1.0], [2.0, 3.0]])
    one = case_events(x, np.array([5.0, 0.0]), 1.5)
    assert one.probability.tolist() == pytest.approx([2 / 3, 1 / 3])
    assert one.happened.tolist() == [True, False]
    weighted = case_events(x, np.array([5.0, 0.0]), np.array([1.5, 0.5]), np.array([0.0, -np.inf, -np.inf]))
    assert weighted.probability.tolist() == [0.0, 1.0]


def test_the_curve_is_that_of_scores():
    theirs = pytest.importorskip("scores.probability").isotonic_fit
    rng = np.random.default_rng(1)
    p = rng.integers(0, 16, size=500) / 15
    e = rng.uniform(size=500) < p**1.5
    levels, curve = isotonic(p, e)
    fit = theirs(p, e.astype(float))
    assert np.allclose(
        levels, fit["unique_fcst_sorted"] if "unique_fcst_sorted" in fit else np.unique(fit["fcst_sorted"])
    )
    expected = dict(zip(fit["fcst_sorted"], fit["regression_values"], strict=True))
    assert np.allclose(curve, [expected[v] for v in levels], rtol=1e-8, atol=1e-12)


def test_the_brier_score_is_split_exactly():
    events = cases(50)
    found = reliability_over_cases(events, DRAWS)
    p = np.concatenate([e.probability for e in events])
    happened = np.concatenate([e.happened for e in events])
    assert found.brier == pytest.approx(((p - happened) ** 2).mean(), rel=1e-12)
    assert found.miscalibration - found.discrimination + found.uncertainty == pytest.approx(found.brier, rel=1e-12)
    assert found.uncertainty == pytest.approx(happened.mean() * (1 - happened.mean()), rel=1e-12)
    assert min(found.miscalibration, found.discrimination) >= 0
    curve = np.array(found.curve)
    assert (np.diff(curve[np.isfinite(curve)]) >= -1e-12).all()


def test_words():
    assert reliability_over_cases(cases(250), DRAWS).finding == "reliable"
    assert reliability_over_cases(cases(250, 0.7), DRAWS).finding == "too rarely forecast"
    assert reliability_over_cases(cases(250, -0.7), DRAWS).finding == "too often forecast"
    few = reliability_over_cases(cases(5), DRAWS)
    assert few.finding == "cannot say"
    assert all(math.isnan(v) for v in few.low)
    assert reliability_over_cases(cases(20), DRAWS).finding == "cannot say"
    assert json.loads(json.dumps(few.summary(), allow_nan=False))["low"][0] is None


def test_false_alarms_are_rarer_than_stated_though_pixels_are_correlated():
    alarms = 0
    for seed in range(100):
        half = np.array([(1 + c.happened.mean() - c.probability.mean()) / 2 for c in cases(25, seed=seed)])
        from recon.diagnostics.reliability import _judge

        alarms += _judge(half, 0.05, 0.1)[0].startswith("too")
    assert alarms <= stats.binom.isf(1e-5, 100, 0.05)


def test_a_perfect_ensemble_of_few_draws_shows_the_stated_miscalibration():
    rng = np.random.default_rng(2)
    p = rng.uniform(size=400)
    share = rng.binomial(5, p[:, None], size=(400, 200)) / 5
    events = [Events(s, rng.uniform(size=200) < q) for s, q in zip(share, p, strict=True)]
    found = reliability_over_cases(events[:60], 5)
    whole = reliability_over_cases(events, 5)
    # E(p - curve)^2 is at most the sampling variance of p, which mean p(1-p)/(M-1) estimates without bias.
    assert whole.sampling_variance == pytest.approx((p * (1 - p)).mean() / 5, rel=0.05)
    assert 0.1 * whole.sampling_variance < whole.miscalibration < whole.sampling_variance
    assert found.cases == 60
    low, high, curve = (np.array(v) for v in (found.low, found.high, found.curve))
    known = np.isfinite(low)
    assert known.any()
    assert (low[known] <= curve[known] + 1e-9).all()
    assert (curve[known] <= high[known] + 1e-9).all()


def test_bad_input_is_refused_in_words():
    with pytest.raises(InputError, match="at least one case"):
        reliability_over_cases([], 5)
    with pytest.raises(InputError, match="a threshold is a number or"):
        case_events(np.zeros((3, 2)), np.zeros(2), np.zeros(3))
    with pytest.raises(InputError, match="compares with a truth"):
        case_events(np.zeros((3, 2)), None, 0.0)
