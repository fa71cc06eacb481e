"""Spread figures against closed forms, the double sum, and ensembles that are calibrated by construction."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from recon.diagnostics import coverage, crps, determined, ensemble_spread, mean_error, spread_skill, std_error
from recon.diagnostics.spread import draws_needed, outside, reliability
from recon.ensemble import Ensemble
from recon.errors import InputError
from recon.space import Space

FALSE_ALARM = 1e-5
BOUND = stats.norm.isf(FALSE_ALARM / 2)
N = 20_000


def calibrated(draws: int, seed: int = 0, factor: float = 1.0, n: int = N) -> tuple[Ensemble, torch.Tensor]:
    """Truth and draws from the same law in every (independent) pixel; draws spread ``factor`` times too much."""
    rng = np.random.default_rng(seed)
    centre, scale = rng.normal(size=n), rng.uniform(0.5, 2.0, size=n)
    x = centre + factor * scale * rng.normal(size=(draws, n))
    return Ensemble(torch.tensor(x), Space.vector(n)), torch.tensor(centre + scale * rng.normal(size=n))


def double_sum(x: np.ndarray, t: np.ndarray, w: np.ndarray) -> np.ndarray:
    pairs = np.abs(x[:, None] - x[None])
    return np.einsum("d,d...->...", w, np.abs(x - t)) - 0.5 * np.einsum("d,e,de...->...", w, w, pairs) / (
        1 - (w**2).sum()
    )


@pytest.mark.parametrize("weighted", [False, True])
def test_crps_is_the_double_sum(weighted):
    rng = np.random.default_rng(1)
    x, t = 100 + rng.normal(size=(9, 4, 5)), 100 + rng.normal(size=(4, 5))
    log_w = torch.tensor(rng.normal(size=9)) if weighted else None
    ensemble = Ensemble(torch.tensor(x), Space(("y", "x"), (4, 5)), log_w)
    expected = double_sum(x, t, ensemble.weights.numpy())
    assert np.allclose(crps(ensemble, torch.tensor(t)).numpy(), expected, rtol=1e-9)


def test_crps_does_not_depend_on_the_slabs(monkeypatch):
    ensemble, truth = calibrated(6, n=50)
    whole = crps(ensemble, truth)
    monkeypatch.setattr("recon.diagnostics.scores.CHUNK", 40)
    assert torch.allclose(whole, crps(ensemble, truth), rtol=1e-12)


@pytest.mark.parametrize("draws", [2, 10])
def test_fair_crps_is_unbiased_for_a_gaussian(draws):
    rng = np.random.default_rng(2)
    t = rng.normal(size=N)
    ensemble = Ensemble(torch.tensor(rng.normal(size=(draws, N))), Space.vector(N))
    exact = t * (2 * stats.norm.cdf(t) - 1) + 2 * stats.norm.pdf(t) - 1 / math.sqrt(math.pi)
    off = crps(ensemble, torch.tensor(t)).numpy() - exact
    error = off.std() / math.sqrt(N)
    assert abs(off.mean()) < BOUND * error
    plug_in = 1 / math.sqrt(math.pi) / draws  # what dividing the pairs by M^2 would add
    assert plug_in > 5 * BOUND * error


@pytest.mark.parametrize(("level", "draws"), [(0.5, 3), (0.5, 16), (0.9, 19), (0.9, 64)])
def test_intervals_of_calibrated_draws_cover(level, draws):
    ensemble, truth = calibrated(draws)
    inside = coverage(ensemble, truth, level)
    assert abs(inside - level) < stats.norm.isf(FALSE_ALARM / 8) * math.sqrt(level * (1 - level) / N)


def test_intervals_of_narrow_draws_do_not_cover():
    assert coverage(*calibrated(32, factor=0.5), 0.9) < 0.7


@pytest.mark.parametrize(("level", "least"), [(0.5, 3), (0.9, 19), (0.95, 39)])
def test_intervals_need_draws(level, least):
    assert draws_needed(level) == least
    assert coverage(*calibrated(least - 1, n=20), level) is None
    assert coverage(*calibrated(least, n=20), level) is not None
    with pytest.raises(InputError, match="between 0 and 1"):
        draws_needed(1.0)


def test_few_effective_draws_give_no_intervals():
    ensemble, truth = calibrated(40, n=20)
    weighted = Ensemble(ensemble.x, ensemble.space, torch.linspace(0, 20, 40))
    assert coverage(weighted, truth, 0.9) is None


@pytest.mark.parametrize("draws", [4, 20])
def test_spread_skill_is_one_for_calibrated_draws_of_any_number(draws):
    assert spread_skill(*calibrated(draws)) == pytest.approx(1, abs=0.04)
    assert spread_skill(*calibrated(draws, factor=0.5)) < 0.8
    assert spread_skill(*calibrated(draws, factor=2.0)) > 1.25


def test_truth_outside_the_draws_is_as_rare_as_expected():
    ensemble, truth = calibrated(9)
    expected = ensemble_spread(ensemble, truth).outside_expected
    assert expected == pytest.approx(0.2)
    assert abs(outside(ensemble, truth) - 0.2) < BOUND * math.sqrt(0.2 * 0.8 / N)


def test_monte_carlo_errors_are_those_of_repeated_ensembles():
    rng = np.random.default_rng(5)
    x = torch.tensor(rng.normal(size=(8, N)))
    ensemble = Ensemble(x, Space.vector(N))
    assert float(mean_error(ensemble).square().mean().sqrt()) == pytest.approx(float(ensemble.mean().std()), rel=0.03)
    assert std_error(ensemble) == pytest.approx(1 / math.sqrt(14))
    assert std_error(ensemble) == pytest.approx(float(ensemble.std().std() / ensemble.std().mean()), rel=0.05)


def test_determined_is_the_share_of_the_prior_variance_that_is_gone():
    x = torch.tensor([[0.0, 0.0], [2.0, 4.0]], dtype=torch.float64)  # variances 2 and 8
    ensemble = Ensemble(x, Space.vector(2))
    assert determined(ensemble, torch.tensor([8.0, 4.0])).tolist() == pytest.approx([0.75, -1.0])
    assert determined(ensemble, 16.0).tolist() == pytest.approx([0.875, 0.5])
    assert determined(ensemble, None) is None
    with pytest.raises(InputError, match="must be positive"):
        determined(ensemble, 0.0)
    with pytest.raises(InputError, match="a prior variance is a number or"):
        determined(ensemble, torch.ones(3))


@pytest.mark.parametrize("draws", [4, 5, 16])
def test_reliability_follows_the_diagonal_only_when_calibrated(draws):
    bins, errors = reliability(*calibrated(draws))
    assert np.allclose(np.array(errors) / np.array(bins), 1, atol=0.09)
    assert bins[-1] > 1.2 * bins[0]
    bins, errors = reliability(*calibrated(draws, factor=0.5))
    assert (np.array(errors) / np.array(bins) > 1.3).all()
    with pytest.raises(InputError, match="halves of at least 2 draws"):
        reliability(*calibrated(3, n=10))


def test_spread_gathers_the_figures():
    ensemble, truth = calibrated(20, n=500)
    figures = ensemble_spread(ensemble, truth, 9.0)
    assert figures.coverage == {0.5: coverage(ensemble, truth, 0.5), 0.9: coverage(ensemble, truth, 0.9)}
    assert figures.skill == spread_skill(ensemble, truth)
    assert figures.crps == pytest.approx(float(crps(ensemble, truth).mean()))
    assert figures.determined == pytest.approx(float(determined(ensemble, 9.0).mean()))
    assert figures.mean_error == pytest.approx(figures.std / math.sqrt(20))
    blind = ensemble_spread(ensemble)
    assert (blind.skill, blind.crps, blind.outside, blind.determined) == (None, None, None, None)
    assert blind.coverage == {0.5: None, 0.9: None}


def test_a_single_draw_has_no_spread():
    ensemble, truth = Ensemble(torch.zeros(1, 4), Space.vector(4)), torch.zeros(4)
    figures = ensemble_spread(ensemble, truth, 1.0)
    assert math.isnan(figures.std)
    assert math.isnan(figures.std_error)
    assert figures.skill is None
    assert figures.determined is None
    with pytest.raises(InputError, match="at least 2 draws"):
        crps(ensemble, truth)


def test_a_truth_of_another_shape_is_refused():
    ensemble, truth = calibrated(4, n=10)
    for figure in (crps, spread_skill, coverage, outside):
        with pytest.raises(InputError, match="the truth must be"):
            figure(ensemble, truth[:1])
