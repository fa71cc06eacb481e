"""Scores against the libraries that define them, their double sums, and fairness."""

from __future__ import annotations

import math
import time
import tracemalloc

import numpy as np
import pytest
import torch
from scipy import stats

from recon.diagnostics.scores import (
    energy_score,
    fair_crps,
    spread_and_error,
    spread_skill_over_cases,
    variogram_score,
)
from recon.errors import InputError

BOUND = stats.norm.isf(1e-5 / 2)


def example(draws=9, shape=(4, 5), seed=0):
    rng = np.random.default_rng(seed)
    return 100 + rng.normal(size=(draws, *shape)), 100 + rng.normal(size=shape), rng.normal(size=draws)


# Its import compiles for seconds.
@pytest.mark.slow
@pytest.mark.parametrize("draws", [2, 3, 16])
def test_scores_are_those_of_scoringrules(draws):
    rules = pytest.importorskip("scoringrules")
    x, t, _ = example(draws)
    flat, row = x.reshape(draws, -1), t.reshape(-1)
    assert np.allclose(
        fair_crps(x, t), rules.crps_ensemble(t, x, m_axis=0, estimator="fair", backend="numpy"), rtol=1e-8, atol=1e-12
    )
    assert energy_score(x, t) == pytest.approx(
        rules.es_ensemble(row, flat, estimator="fair", backend="numpy"), rel=1e-8
    )
    for p in (0.5, 1.0):
        assert variogram_score(x, t, p=p) == pytest.approx(
            rules.vs_ensemble(row, flat, p=p, estimator="fair", backend="numpy"), rel=1e-8
        )
    v = np.random.default_rng(1).uniform(size=(20, 20))
    expected = rules.vs_ensemble(row, flat, v, estimator="fair", backend="numpy")
    assert variogram_score(x, t, pair_weights=v) == pytest.approx(expected, rel=1e-8)


def test_crps_is_that_of_scores():
    probability = pytest.importorskip("scores.probability")
    import xarray as xr

    x, t, _ = example(12)
    dims = ("m", "y", "x")
    theirs = probability.crps_for_ensemble(
        xr.DataArray(x, dims=dims), xr.DataArray(t, dims=dims[1:]), "m", method="fair", preserve_dims="all"
    )
    assert np.allclose(fair_crps(x, t), theirs.values, rtol=1e-8, atol=1e-12)


def test_weighted_scores_are_their_double_sums():
    x, t, log_w = example()
    w = np.exp(log_w) / np.exp(log_w).sum()
    pairs, distinct = np.outer(w, w), 1 - (w**2).sum()
    crps = np.tensordot(w, np.abs(x - t), 1) - 0.5 * np.einsum("de,deij->ij", pairs, np.abs(x[:, None] - x)) / distinct
    assert np.allclose(fair_crps(x, t, log_w), crps, rtol=1e-9)
    flat, row = x.reshape(len(x), -1), t.reshape(-1)
    apart = np.linalg.norm(flat[:, None] - flat, axis=2)
    energy = w @ np.linalg.norm(flat - row, axis=1) - 0.5 * (pairs * apart).sum() / distinct
    assert energy_score(x, t, log_w) == pytest.approx(energy, rel=1e-10)
    g = np.abs(flat[:, :, None] - flat[:, None]) ** 0.5
    g_t = np.abs(row[:, None] - row) ** 0.5
    off = ((g - g_t) ** 2).sum((1, 2)) @ w - 0.5 * (pairs * ((g[:, None] - g) ** 2).sum((2, 3))).sum() / distinct
    assert variogram_score(x, t, log_w) == pytest.approx(off, rel=1e-9)


def test_equal_log_weights_are_no_weights():
    x, t, _ = example()
    same = np.full(len(x), -3.0)
    assert np.allclose(fair_crps(x, t, same), fair_crps(x, t), rtol=1e-12)
    assert energy_score(x, t, same) == pytest.approx(energy_score(x, t), rel=1e-12)
    assert variogram_score(x, t, same) == pytest.approx(variogram_score(x, t), rel=1e-12)
    assert spread_and_error(x, t, same) == pytest.approx(spread_and_error(x, t), rel=1e-12)


def test_slabs_and_pieces_do_not_matter(monkeypatch):
    x, t, log_w = example()
    whole = fair_crps(x, t), fair_crps(x, t, log_w), variogram_score(x, t)
    monkeypatch.setattr("recon.diagnostics.scores.CHUNK", 40)
    monkeypatch.setattr("recon.diagnostics.scores.PAIRS", 500)
    assert torch.equal(fair_crps(x, t), whole[0])
    assert torch.equal(fair_crps(x, t, log_w), whole[1])
    assert variogram_score(x, t) == pytest.approx(whole[2], rel=1e-12)


@pytest.mark.parametrize("draws", [2, 8])
def test_scores_do_not_depend_on_the_number_of_draws_on_average(draws):
    rng = np.random.default_rng(2)
    n = 4000
    t, x = rng.normal(size=(n, 3)), rng.normal(size=(draws, n, 3))
    exact = t[:, 0] * (2 * stats.norm.cdf(t[:, 0]) - 1) + 2 * stats.norm.pdf(t[:, 0]) - 1 / math.sqrt(math.pi)
    off = fair_crps(x[:, :, 0], t[:, 0]).numpy() - exact
    assert abs(off.mean()) < BOUND * off.std() / math.sqrt(n)
    # Energy: E|X - t| - E|X - X'|/2 with both norms sqrt(2) chi_3, so it is sqrt(2) * 2 sqrt(2/pi) / 2.
    energy = np.array([energy_score(x[:, i], t[i]) for i in range(1000)])
    expected = math.sqrt(2) * math.sqrt(2 / math.pi)
    assert abs(energy.mean() - expected) < BOUND * energy.std() / math.sqrt(1000)
    if draws == 2:  # what dividing by M^2 would add
        assert expected / draws > BOUND * energy.std() / math.sqrt(1000)


def test_variogram_score_notices_correlations_that_crps_cannot():
    rng = np.random.default_rng(3)
    common = rng.normal(size=(200, 21, 1))
    own = rng.normal(size=(200, 21, 8))
    smooth = common * math.sqrt(0.8) + own * math.sqrt(0.2)
    truth, right, wrong = smooth[:, 0], smooth[:, 1:], rng.normal(size=(200, 20, 8))
    gain = [variogram_score(b, t) - variogram_score(a, t) for a, b, t in zip(right, wrong, truth, strict=True)]
    assert np.mean(gain) > BOUND * np.std(gain) / math.sqrt(200)


@pytest.mark.parametrize("draws", [3, 20])
def test_spread_and_skill_over_cases(draws):
    rng = np.random.default_rng(4)
    pairs = [spread_and_error(rng.normal(size=(draws, 30)), rng.normal(size=30)) for _ in range(400)]
    ratio, error = spread_skill_over_cases(*zip(*pairs, strict=True))
    assert abs(ratio - 1) < BOUND * error
    assert error < 0.03
    ratio, error = spread_skill_over_cases([s / 4 for s, _ in pairs], [e for _, e in pairs])
    assert ratio == pytest.approx(0.5, abs=BOUND * error)


def test_error_of_the_spread_skill_ratio_is_that_of_repeated_sets():
    rng = np.random.default_rng(5)
    s, e = rng.gamma(5, size=(400, 50)), rng.gamma(1, size=(400, 50))
    found = [spread_skill_over_cases(a, b) for a, b in zip(s, e, strict=True)]
    assert np.mean([f[1] for f in found]) == pytest.approx(np.std([f[0] for f in found]), rel=0.2)
    assert math.isnan(spread_skill_over_cases(s[0, :2], e[0, :2])[1])


def test_crps_of_an_image_is_fast_and_small():
    x, t = torch.randn(64, 256, 256), torch.randn(256, 256)
    fair_crps(x[:, :8], t[:8])
    times = []
    for _ in range(7):
        start = time.perf_counter()
        fair_crps(x, t)
        times.append(time.perf_counter() - start)
    tracemalloc.start()
    fair_crps(x, t)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6
    # 0.1 s on an idle core; a busy machine gets some grace.
    assert min(times) < 0.3


@pytest.mark.parametrize("score", [fair_crps, energy_score, variogram_score, spread_and_error])
def test_scores_that_do_not_exist_are_refused(score):
    x, t, _ = example()
    with pytest.raises(InputError, match="at least 2 draws"):
        score(x[:1], t)
    with pytest.raises(InputError, match="the truth must be"):
        score(x, t[:1])
    with pytest.raises(InputError, match="compares with a truth"):
        score(x, None)
    with pytest.raises(InputError, match="truth holds values that are NaN"):
        score(x, np.full_like(t, np.nan))
    broken = x.copy()
    broken[2, 0, 0] = np.nan
    with pytest.raises(InputError, match="1 of 9 draws hold values that are NaN"):
        score(broken, t)
    with pytest.raises(InputError, match="one draw has all the weight"):
        score(x, t, np.where(np.arange(len(x)) == 1, 0.0, -np.inf))
    with pytest.raises(InputError, match="one log-weight per draw"):
        score(x, t, np.zeros(3))
    with pytest.raises(InputError, match="at least one must be finite"):
        score(x, t, np.full(len(x), -np.inf))


def test_impossible_options_are_refused():
    x, t, _ = example()
    with pytest.raises(InputError, match="at most 4096 values"):
        variogram_score(np.zeros((2, 5000)), np.zeros(5000))
    with pytest.raises(InputError, match="order of a variogram"):
        variogram_score(x, t, p=0)
    with pytest.raises(InputError, match="pair_weights are"):
        variogram_score(x, t, pair_weights=np.ones((2, 2)))
    with pytest.raises(InputError, match="one error per case"):
        spread_skill_over_cases([1.0], [1.0, 2.0])
    with pytest.raises(InputError, match="all zero"):
        spread_skill_over_cases([1.0], [0.0])
    with pytest.raises(InputError, match="draws are real"):
        fair_crps(torch.zeros(2, 3, dtype=torch.complex64), torch.zeros(3))
    with pytest.raises(InputError, match="at least one draw and one pixel"):
        fair_crps(torch.zeros(0, 3), torch.zeros(3))


def test_one_pixel_and_collapsed_ensembles_have_scores():
    assert float(fair_crps(np.array([[1.0], [3.0]]), np.array([2.0]))) == pytest.approx(0.0)
    assert float(fair_crps(np.zeros((5, 1)), np.array([2.0]))) == pytest.approx(2.0)
    assert energy_score(np.zeros((5, 1)), np.array([2.0])) == pytest.approx(2.0)
    assert variogram_score(np.zeros((5, 1)), np.array([2.0])) == 0
    assert spread_and_error(np.zeros((5, 1)), np.array([2.0])) == (0.0, 4.0)
