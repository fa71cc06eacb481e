"""Standard errors of maps are the standard deviations of those maps over repeated ensembles."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from recon.diagnostics.montecarlo import exceedance, monte_carlo_errors
from recon.ensemble import Ensemble
from recon.errors import InputError
from recon.space import Space

N = 20_000


def laws(rng, draws):
    return {"normal": rng.normal(size=(draws, N)), "skewed": rng.exponential(size=(draws, N))}


@pytest.mark.parametrize("law", ["normal", "skewed"])
def test_errors_are_those_of_repeated_ensembles(law):
    x = laws(np.random.default_rng(0), 40)[law]  # every pixel repeats the ensemble
    errors = monte_carlo_errors(x, quantiles=(0.25, 0.5))
    ensemble = Ensemble(torch.tensor(x), Space.vector(N))
    rms = errors.summary()
    assert rms["mean"] == pytest.approx(float(ensemble.mean().std()), rel=0.03)
    assert rms["std"] == pytest.approx(float(ensemble.std().std()), rel=0.15)
    for q in (0.25, 0.5):
        assert rms["quantiles"][f"{q:g}"] == pytest.approx(float(ensemble.quantile(q).std()), rel=0.15)


def test_error_of_the_std_is_the_jackknife_by_hand():
    x = np.random.default_rng(1).normal(size=(7, 1))
    without = np.array([np.delete(x[:, 0], d).std(ddof=1) for d in range(7)])
    by_hand = math.sqrt(6 / 7 * ((without - without.mean()) ** 2).sum())
    errors = monte_carlo_errors(x)
    assert float(errors.std[0]) == pytest.approx(by_hand, rel=1e-9)
    assert float(errors.mean[0]) == pytest.approx(x.std(ddof=1) / math.sqrt(7), rel=1e-12)
    same = monte_carlo_errors(x, np.full(7, 2.0))
    assert float(same.std[0]) == pytest.approx(by_hand, rel=1e-9)


def test_weighted_errors_are_those_of_repeated_ensembles():
    rng = np.random.default_rng(2)
    means, stds, found = [], [], []
    for _ in range(800):
        x = 1.5 * rng.normal(size=(60, 1))
        log_w = (-(x**2) / 2 + x**2 / 4.5)[:, 0]
        ensemble = Ensemble(torch.tensor(x), Space.vector(1), torch.tensor(log_w))
        errors = monte_carlo_errors(x, log_w)
        means.append(float(ensemble.mean()[0]))
        stds.append(float(ensemble.std()[0]))
        found.append((float(errors.mean[0]), float(errors.std[0])))
    rms = np.sqrt(np.mean(np.square(found), axis=0))
    assert rms[0] == pytest.approx(np.std(means), rel=0.1)
    assert rms[1] == pytest.approx(np.std(stds), rel=0.15)


def test_slabs_and_draws_without_weight_do_not_matter(monkeypatch):
    rng = np.random.default_rng(3)
    x, log_w = rng.normal(size=(9, 4, 5)), rng.normal(size=9)
    whole = monte_carlo_errors(x, log_w)
    monkeypatch.setattr("recon.diagnostics.montecarlo.CHUNK", 30)
    more = monte_carlo_errors(np.concatenate([x, 99 + x[:1]]), np.append(log_w, -np.inf))
    assert torch.allclose(whole.mean, more.mean)
    assert torch.allclose(whole.std, more.std)
    assert whole.std.shape == (4, 5)


def test_what_few_draws_cannot_know_is_none():
    one = monte_carlo_errors(np.zeros((1, 3)))
    assert (one.mean, one.std) == (None, None)
    assert one.reasons == ("one draw does not know how far it is off",)
    two = monte_carlo_errors(np.array([[0.0], [2.0]]))
    assert float(two.mean[0]) == pytest.approx(1.0)
    assert two.std is None
    assert two.quantiles[0.05] is None
    assert "at least 3 draws" in two.reasons[0]
    assert json.loads(json.dumps(two.summary()))["quantiles"]["0.05"] is None
    assert float(monte_carlo_errors(np.ones((5, 1))).std[0]) == 0
    with pytest.raises(InputError, match="quantiles lie between"):
        monte_carlo_errors(np.zeros((3, 1)), quantiles=(1.0,))


def test_probabilities_are_never_certain():
    x = np.arange(9.0)[:, None] + np.zeros((1, 2))
    p, error = exceedance(x, np.array([5.5, 100.0]))
    assert p.tolist() == pytest.approx([3.5 / 10, 0.5 / 10])
    assert float(error[0]) == pytest.approx(math.sqrt(0.35 * 0.65 / 9))
    weighted, _ = exceedance(x, 5.5, np.where(np.arange(9) > 5, 0.0, -np.inf))
    assert float(weighted[0]) == pytest.approx(3.5 / 4)
    with pytest.raises(InputError, match="a threshold is a number or"):
        exceedance(x, np.zeros(3))
