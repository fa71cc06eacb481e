"""Intervals that cover for any number of draws, and coverage with the case as the unit."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from scipy import stats

from recon.diagnostics.intervals import Hit, case_coverage, coverage_over_cases, draws_needed, intervals
from recon.errors import InputError

FALSE_ALARM = 1e-5
N = 20_000


@pytest.mark.parametrize(("level", "draws"), [(0.5, 3), (0.9, 19), (0.9, 20), (0.9, 64), (0.95, 39)])
def test_intervals_cover_a_further_draw(level, draws):
    rng = np.random.default_rng(draws)
    found = intervals(rng.normal(size=(draws, N)), level)
    truth = torch.from_numpy(rng.normal(size=N))
    inside = float(((truth >= found.low) & (truth <= found.high)).double().mean())
    assert abs(inside - level) < stats.norm.isf(FALSE_ALARM / 10) * math.sqrt(level * (1 - level) / N)


def test_intervals_are_the_quantiles_of_other_libraries():
    x = np.random.default_rng(0).normal(size=(25, 6))
    found = intervals(x, 0.8)
    for bound, q in ((found.low, 0.1), (found.high, 0.9)):
        assert np.allclose(bound, np.quantile(x, q, axis=0, method="weibull"), rtol=1e-12)
    stat = pytest.importorskip("arviz_stats.base").array_stats
    assert np.allclose(found.low, stat.quantile(x, 0.1, axis=0, method="weibull"), rtol=1e-8)


def test_intervals_that_do_not_exist_say_why():
    rng = np.random.default_rng(1)
    assert draws_needed(0.9) == 19
    few = intervals(rng.normal(size=(18, 3)))
    assert few.low is None
    assert "need 19 effective draws; there are 18" in few.reason
    weighted = intervals(rng.normal(size=(40, 3)), 0.9, np.linspace(0, 20, 40))
    assert weighted.low is None
    assert (
        intervals(rng.normal(size=(40, 3)), 0.9, ancestors=19).reason
        == "the draws descend from 19 ancestors, fewer than 20"
    )
    assert intervals(rng.normal(size=(40, 3)), 0.9, ancestors=20).low is not None
    collapsed = intervals(np.ones((40, 3)))
    assert collapsed.high is None
    assert "collapsed" in collapsed.reason
    assert json.loads(json.dumps(collapsed.summary()))["mean_width"] is None
    one_pixel = intervals(rng.normal(size=(40, 1)))
    assert one_pixel.summary()["mean_width"] > 0
    assert "need 19" in intervals(rng.normal(size=(1, 3))).reason
    with pytest.raises(InputError, match="1 of 40 draws hold"):
        intervals(np.where(np.arange(40)[:, None] == 3, np.nan, rng.normal(size=(40, 2))))


def cases(count, factor=1.0, bias=0.0, draws=39, seed=0):
    """Smooth fields of 12 pixels with a region of 4; truths are wider by ``factor``."""
    rng = np.random.default_rng(seed)
    common, own = 0.8, 0.6
    region = {"lesion": np.arange(12) < 4}

    def field(n):
        return common * rng.normal(size=(n, 1)) + own * rng.normal(size=(n, 12))

    return [case_coverage(field(draws), factor * field(1)[0] + bias, 0.9, region) for _ in range(count)]


def test_coverage_over_cases_and_regions():
    found = coverage_over_cases(cases(150))
    assert list(found) == ["all", "lesion", "mean of all", "mean of lesion"]
    for coverage in found.values():
        assert coverage.low <= 0.9 <= coverage.high
        assert abs(coverage.inside - 0.9) < stats.norm.isf(FALSE_ALARM / 8) * max(coverage.error, 0.3 / math.sqrt(150))
        assert coverage.finding in ("calibrated", "cannot say")
    assert found["all"].finding == "calibrated"
    narrow = coverage_over_cases(cases(150, factor=2.0))
    assert {c.finding for c in narrow.values()} == {"under-dispersed"}
    shifted = coverage_over_cases(cases(150, bias=1.2))
    assert {c.finding for c in shifted.values()} == {"biased"}
    assert shifted["all"].above > 5 * shifted["all"].below
    assert json.loads(json.dumps(found["all"].summary(), allow_nan=False))["cases"] == 150


def test_the_error_bar_is_that_of_repeated_sets_of_cases():
    sets = [coverage_over_cases(cases(25, seed=seed))["all"] for seed in range(40)]
    pixels_as_trials = math.sqrt(0.9 * 0.1 / (25 * 12))
    spread = np.std([s.inside for s in sets])
    assert np.mean([s.error for s in sets]) == pytest.approx(spread, rel=0.35)
    assert spread > 1.4 * pixels_as_trials


def test_region_means_notice_correlations_that_pixels_cannot():
    rng = np.random.default_rng(3)
    everything = {"roi": np.ones(25, dtype=bool)}
    # Truths have a common part; draws have the right spread in every pixel and no common part.
    found = coverage_over_cases(
        [
            case_coverage(rng.normal(size=(39, 25)), 0.8 * rng.normal() + 0.6 * rng.normal(size=25), 0.9, everything)
            for _ in range(100)
        ]
    )
    assert found["mean of roi"].finding == "under-dispersed"
    assert found["roi"].finding in ("calibrated", "cannot say")


def test_weights_move_the_intervals():
    x = np.random.default_rng(4).normal(size=(80, 5))
    log_w = np.where(x[:, 0] > 0, 0.0, -30.0)
    found = intervals(x, 0.8, log_w)
    assert float(found.low[0]) > 0
    assert found.ess == pytest.approx((x[:, 0] > 0).sum(), rel=1e-6)
    assert case_coverage(x, np.full(5, -1.0), 0.8, None, log_w)["mean of all"] is not None


def test_cases_without_intervals_are_left_out_and_bad_regions_refused():
    x, t = np.random.default_rng(5).normal(size=(19, 6)), np.zeros(6)
    assert case_coverage(x[:18], t) is None
    good = case_coverage(x, t)
    assert coverage_over_cases([None, good])["all"].cases == 1
    assert math.isnan(coverage_over_cases([good])["all"].error)
    assert coverage_over_cases([good])["all"].summary()["error"] is None
    assert coverage_over_cases([good])["all"].finding == "cannot say"
    with pytest.raises(InputError, match="no case has 90% intervals: each needs 19"):
        coverage_over_cases([None])
    with pytest.raises(InputError, match="region 'a' must be a mask"):
        case_coverage(x, t, 0.9, {"a": np.zeros(6, dtype=bool)})
    with pytest.raises(InputError, match="region 'a' must be a mask"):
        case_coverage(x, t, 0.9, {"a": np.ones(6)})
    with pytest.raises(InputError, match="compares with a truth"):
        case_coverage(x, None)
    with pytest.raises(InputError, match="level of an interval"):
        intervals(x, 1.0)


def test_a_truth_on_the_edge_counts_as_inside():
    hits = case_coverage(np.arange(19.0)[:, None], np.array([0.0]), 0.9)
    assert hits["all"] == Hit(0.0, 1.0, 0.0)
