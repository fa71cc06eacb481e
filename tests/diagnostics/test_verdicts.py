"""Right words for calibrated, biased, over- and under-dispersed ensembles of correlated pixels; exact tests; false alarms."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from scipy import stats

from recon.diagnostics.betting import evidence, interval
from recon.diagnostics.verdicts import (
    Verdict,
    _cramer_von_mises,
    _moments,
    _power,
    judge_all,
    judge_coverage,
    judge_ranks,
    judge_scores,
)
from recon.errors import InputError

TRIALS = 200
RIGHT = 0.95
KINDS = {
    "calibrated": (0.0, 1.0),
    "biased": (0.7, 1.0),
    "over-dispersed": (0.0, 1 / 1.7),
    "under-dispersed": (0.0, 1.7),
}
PIXELS = 6
FACTOR = np.linalg.cholesky(np.exp(-np.abs(np.subtract.outer(np.arange(PIXELS), np.arange(PIXELS))) / 4))


def pixels(rng, kind, cases, draws):
    """Truths (case, pixel) and draws (case, draw, pixel) with correlated pixels; truths are off as ``kind`` says."""
    bias, factor = KINDS[kind]
    truth = bias + factor * rng.normal(size=(cases, PIXELS)) @ FACTOR.T
    return truth, rng.normal(size=(cases, draws, PIXELS)) @ FACTOR.T


def pit(rng, truth, draws):
    return ((draws < truth[:, None]).sum(1) + rng.uniform(size=len(truth))) / (draws.shape[1] + 1)


def share_right(verdicts, kind):
    return Counter(v.finding for v in verdicts)[kind] / len(verdicts)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("draws", [8, 32, 128])
def test_ranks_give_the_right_word(kind, draws):
    rng = np.random.default_rng(draws)
    verdicts = []
    for _ in range(TRIALS):
        # With 8 draws it takes that many to exclude that the spread is off by half.
        truth, x = pixels(rng, kind, 200 if draws == 8 else 100, draws)
        verdicts.append(judge_ranks(pit(rng, truth.mean(1), x.mean(2)), draws))
    assert share_right(verdicts, kind) >= RIGHT


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("draws", [8, 128])
def test_scores_give_the_right_word(kind, draws):
    rng = np.random.default_rng(draws)
    verdicts = []
    for _ in range(TRIALS):
        truth, x = pixels(rng, kind, 200 if draws == 8 else 100, draws)
        one = x[:, :, 0]
        verdicts.append(judge_scores((truth[:, 0] - one.mean(1)) / one.std(1, ddof=1), draws))
    assert share_right(verdicts, kind) >= RIGHT


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("draws", [19, 59])
def test_coverage_gives_the_right_word(kind, draws):
    rng = np.random.default_rng(draws)
    verdicts = []
    for _ in range(TRIALS):
        truth, x = pixels(rng, kind, 200, draws)
        # Nominal 90 %: 19 draws, the range; 59 draws, from the 3rd to the 57th.
        k = (draws + 1) // 20 - 1
        ordered = np.partition(x, (k, draws - 1 - k), axis=1)
        low, high = ordered[:, k], ordered[:, -1 - k]
        inside, below = ((truth >= low) & (truth <= high)).mean(1), (truth < low).mean(1)
        verdicts.append(judge_coverage(inside, 0.9, below))
    assert share_right(verdicts, kind) >= RIGHT


@pytest.mark.parametrize("draws", [1, 5, 50])
def test_randomised_ranks_are_judged_at_the_stated_rate(draws):
    rng = np.random.default_rng(6)
    rate, trials = 0.05, 1000
    alarms = sum(
        judge_ranks((rng.integers(draws + 1, size=30) + rng.uniform(size=30)) / (draws + 1), draws, rate).strength > 0
        for _ in range(trials)
    )
    # Bonferroni over three dependent tests: never above the rate, and not far below it.
    assert alarms <= stats.binom.isf(1e-5, trials, rate)
    assert alarms >= stats.binom.ppf(1e-5, trials, rate / 2)


def test_scores_of_few_normal_draws_are_judged_at_the_stated_rate():
    rng = np.random.default_rng(7)
    alarms = 0
    for _ in range(1000):
        x, t = rng.normal(size=(40, 4)), rng.normal(size=40)
        alarms += judge_scores((t - x.mean(1)) / x.std(1, ddof=1), 4, 0.05).strength > 0
    assert alarms <= stats.binom.isf(1e-5, 1000, 0.05)


@pytest.mark.parametrize("pixel_count", [1, 20])
def test_coverage_is_judged_within_the_stated_rate_however_skewed(pixel_count):
    rng = np.random.default_rng(8)
    alarms, missed, trials = 0, 0, 400
    for _ in range(trials):
        inside = rng.binomial(pixel_count, 0.9, size=20) / pixel_count
        alarms += judge_coverage(inside, 0.9, false_alarm=0.05).strength > 0
    assert alarms <= stats.binom.isf(1e-5, trials, 0.05)
    for _ in range(100):
        low, high = interval(rng.binomial(pixel_count, 0.9, size=20) / pixel_count, 0.05)
        missed += not low <= 0.9 <= high
    assert missed <= stats.binom.isf(1e-5, 100, 0.05)


def test_the_interval_of_a_mean_shrinks_with_the_spread_and_the_number():
    rng = np.random.default_rng(9)
    narrow, wide = 0.7 + 0.02 * rng.uniform(-1, 1, size=100), rng.binomial(1, 0.7, size=100).astype(float)
    assert np.diff(interval(narrow, 0.01)) < 0.3 * np.diff(interval(wide, 0.01))
    assert np.diff(interval(np.tile(wide, 16), 0.01)) < 0.4 * np.diff(interval(wide, 0.01))
    low, high = interval(wide, 0.01)
    assert low <= wide.mean() <= high


def test_capital_is_a_fair_game():
    # The mean of the capital over all outcomes of a small game is 1, whatever the law with that mean.
    outcomes = np.array(np.meshgrid(*[[0.0, 0.5, 1.0]] * 5)).reshape(5, -1).T
    chance = np.prod(np.select([outcomes == 0, outcomes == 0.5], [0.1, 0.2], 0.7), axis=1)
    capital = np.exp([evidence(v, 0.8, 0.05) for v in outcomes])
    assert np.allclose(chance @ capital, 1, rtol=1e-12)


def test_few_cases_say_nothing_and_more_draws_or_cases_say_more():
    rng = np.random.default_rng(10)
    few, some = rng.uniform(size=7), (np.arange(30) + 0.5) / 30
    assert judge_ranks(few, 20).finding == "cannot say"
    assert "too few" in judge_ranks(few, 20).reason
    verdict = judge_ranks(rng.permutation(some), 20)
    assert verdict.finding == "cannot say"
    assert "more cases are needed" in verdict.reason
    assert judge_ranks((np.arange(300) + 0.5) / 300, 20).finding == "calibrated"
    assert judge_coverage(np.full(5, 0.9), 0.9).finding == "cannot say"
    assert judge_coverage(np.tile([1.0] * 9 + [0.0], 2), 0.9).finding == "cannot say"


def test_ranks_of_another_shape_are_misshapen():
    # Mean 1/2 and unit spread of the normal scores, but nothing near the middle: two modes.
    z = np.concatenate([np.full(100, -1.0), np.full(100, 1.0)]) + np.linspace(-0.1, 0.1, 200)
    assert judge_ranks(stats.norm.cdf(z), 50).finding == "misshapen"


@pytest.mark.parametrize("n", [8, 30, 200])
def test_the_law_of_the_shape_statistic_is_that_of_scipy(n):
    rng = np.random.default_rng(15)
    for power in (1.0, 0.8, 0.6, 0.4):
        u = rng.uniform(size=n) ** power
        # Stephens' form is good to a few per cent of the p-value in its tail.
        assert _cramer_von_mises(u) == pytest.approx(stats.cramervonmises(u, "uniform").pvalue, rel=0.1, abs=1e-4)
    assert 0 < _cramer_von_mises(np.full(n, 0.99)) < 1e-3
    assert _cramer_von_mises((np.arange(n) + 0.5) / n) > 0.99


def test_a_bias_wins_over_the_spread_it_spoils():
    rng = np.random.default_rng(11)
    truth, x = 3 + rng.normal(size=100), rng.normal(size=(100, 20))
    verdict = judge_ranks(pit(rng, truth, x), 20)
    assert verdict.finding == "biased"
    assert "above" in verdict.reason
    assert verdict.figures["p_spread"] < 1e-3
    assert judge_ranks(1 - pit(rng, truth, x), 20).reason.startswith("truths lie below")
    assert judge_coverage(np.full(50, 0.5), 0.9, np.full(50, 0.5)).finding == "biased"
    assert judge_coverage(np.full(50, 0.5), 0.9, np.full(50, 0.25)).finding == "under-dispersed"
    assert "bias would look the same" in judge_coverage(np.full(50, 0.5), 0.9).reason


@pytest.mark.parametrize("draws", [3, 40])
@pytest.mark.parametrize(("bias", "factor"), [(0.0, 1.0), (0.5, 1.0), (0.0, 1.5)])
def test_moments_of_rank_scores_are_those_of_simulated_ones(draws, bias, factor):
    rng = np.random.default_rng(12)
    n = 200_000
    t = bias + factor * rng.normal(size=n)
    below = rng.binomial(draws, stats.norm.cdf(t))
    z = stats.norm.ppf((below + rng.uniform(size=n)) / (draws + 1))
    for power, moment in zip((1, 2, 4), _moments(draws, bias, factor), strict=True):
        values = z**power
        assert abs(values.mean() - moment) < stats.norm.isf(1e-5 / 36) * values.std() / math.sqrt(n)


def test_the_stated_power_is_the_share_found():
    rng = np.random.default_rng(13)
    draws, cases, each = 15, 60, 0.01 / 3
    expected = _power(draws, cases, each)[0]
    found = 0
    for _ in range(400):
        below = rng.binomial(draws, stats.norm.cdf(0.5 + rng.normal(size=cases)))
        found += judge_ranks((below + rng.uniform(size=cases)) / (draws + 1), draws).figures["p_bias"] < each
    assert found / 400 == pytest.approx(expected, abs=stats.norm.isf(1e-5 / 2) * math.sqrt(0.25 / 400))


def test_several_functions_share_the_rate_and_the_strongest_speaks():
    rng = np.random.default_rng(14)
    good, bad = (rng.permutation(200) + 0.5) / 200, rng.beta(2, 1, size=200)
    verdicts = judge_all({"good": good, "bad": bad}, 50)
    assert verdicts["good"].finding == "calibrated"
    assert verdicts["overall"].finding == "biased"
    assert verdicts["overall"].reason.startswith("bad: ")
    assert verdicts["good"].false_alarm == 0.005
    assert verdicts["overall"].false_alarm == 0.01
    assert judge_all({"good": good, "few": good[:9]}, 50)["overall"].finding == "cannot say"
    assert judge_all({"good": good}, 50)["overall"].finding == "calibrated"


def test_summaries_are_json():
    import json

    verdict = judge_ranks((np.arange(100) + 0.5) / 100, 20)
    assert json.loads(json.dumps(verdict.summary()))["finding"] == verdict.finding
    odd = Verdict("cannot say", "", 1, 0.1, {"a": math.nan}, math.inf)
    assert json.loads(json.dumps(odd.summary(), allow_nan=False))["figures"] == {"a": None}


def test_bad_input_is_refused_in_words():
    with pytest.raises(InputError, match="between 0 and 1"):
        judge_ranks([0.1, 1.2], 5)
    with pytest.raises(InputError, match="1 of 2 cases have no finite number"):
        judge_ranks([0.1, math.nan], 5)
    with pytest.raises(InputError, match="at least one case"):
        judge_ranks([], 5)
    with pytest.raises(InputError, match="at least 1 draw"):
        judge_ranks([0.5], 0)
    with pytest.raises(InputError, match="at least 3 are needed"):
        judge_scores([0.5], 2)
    with pytest.raises(InputError, match="collapsed ensemble"):
        judge_scores([math.inf], 5)
    with pytest.raises(InputError, match="false_alarm is a probability"):
        judge_ranks([0.5], 5, 1.0)
    with pytest.raises(InputError, match="coverage is a fraction"):
        judge_coverage([1.5], 0.9)
    with pytest.raises(InputError, match="sum to 1 at most"):
        judge_coverage(np.full(9, 0.9), 0.9, np.full(9, 0.2))
    with pytest.raises(InputError, match="no test function"):
        judge_all({}, 5)
