"""Draws in pairs with opposite noise: the law of each is untouched, the mean is better, and every figure knows of it."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import recon
from recon.comm import SerialAxis, serial
from recon.diagnostics.consistency import Again, self_consistency
from recon.diagnostics.scores import fair_crps
from recon.diagnostics.spread import mean_error, outside, spread_skill
from recon.draws import Draws, Pairs
from recon.ensemble import Ensemble
from recon.errors import InputError
from recon.likelihoods import GaussianLikelihood
from recon.operators import Slab
from recon.operators.streamed import Stream
from recon.samplers import MMPS, DiffPIR, TwistedSMC
from recon.samplers.loop import default_block
from recon.space import Space
from tests import zoo
from tests.bounds import normal_bound
from tests.samplers.test_exact import gaussian_problem

PIXELS = 20_000
BEND = 0.3  # how far the made-up sampler is from a linear one: draw = u + BEND (u^2 - 1) + v, u of the pair, v its own
OWN = 0.5


def bent(pairs: int, seed: int) -> Ensemble:
    """Draws of a law with known moments, in pairs that are neither opposite nor independent."""
    rng = np.random.default_rng(seed)
    u = rng.normal(size=(pairs, PIXELS))
    u = np.stack([u, -u], 1).reshape(2 * pairs, PIXELS)
    x = u + BEND * (u**2 - 1) + OWN * rng.normal(size=u.shape)
    return Ensemble(torch.from_numpy(x), Space.vector(PIXELS), None, {"antithetic": True})


def plain(draws: int, seed: int) -> torch.Tensor:
    """Independent draws of that law."""
    rng = np.random.default_rng(seed)
    u, v = rng.normal(size=(2, draws, PIXELS))
    return torch.from_numpy(u + BEND * (u**2 - 1) + OWN * v)


VARIANCE = 1 + 2 * BEND**2 + OWN**2


def standard_errors(values: torch.Tensor, expected: float) -> float:
    """How far the mean over independent pixels is from what is expected."""
    return abs(float(values.mean()) - expected) / (float(values.std()) / math.sqrt(values.numel()))


# --- Numbers ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_odd_draws_have_the_numbers_of_the_even_ones_with_the_other_sign(dtype: torch.dtype) -> None:
    pairs, alone = (Draws(7, range(6), 2, antithetic=a).normal(3, (5, 3), "init", dtype=dtype) for a in (True, False))
    assert torch.equal(pairs[::2], alone[::2])
    assert torch.equal(pairs[1::2], -alone[::2])
    odd = Draws(7, [5, 0, 3], 2, antithetic=True)
    assert torch.equal(odd.normal(3, (5, 3), "init", dtype=dtype), pairs[[5, 0, 3]])
    assert torch.equal(odd.normal(3, (4,), "init", dtype=dtype, first=2), pairs[[5, 0, 3]].flatten(1)[:, 2:6])
    assert torch.equal(odd.uniform(1, (4,)), Draws(7, [5, 0, 3], 2).uniform(1, (4,))), "these stay every draw's own"
    assert Draws(7, [], antithetic=True).normal(0, (3,)).shape == (0, 3)


def test_slabs_and_streams_keep_the_pairs(tmp_path) -> None:
    space, draws = Space.grid((5, 3, 2), 1e-3, "1/m"), Draws(1, range(4), antithetic=True)
    whole = draws.normal(2, space.shape)
    for rank in (0, 1):
        slab = Slab(space, "z", SerialAxis(rank, 2))
        assert torch.equal(slab.draws(draws).normal(2, slab.space.shape), whole[:, slab.first : slab.last])
    streamed = Stream(space, "z", 2, tmp_path).draws(draws).normal(2, space.shape)
    assert torch.equal(streamed.read(1, 4), whole[:, 1:4])


# --- Draws ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", [MMPS(steps=12), DiffPIR(steps=12)], ids=lambda s: type(s).__name__)
def test_of_a_gaussian_posterior_one_pair_has_the_mean_of_all(sampler: recon.samplers.Sampler) -> None:
    """There every draw is a linear map of its noise, and pairs cancel it: no Monte-Carlo error is left."""
    posterior = gaussian_problem()
    pairs = recon.sample(posterior, sampler, draws=Pairs(3), block=4, seed=3)
    alone = recon.sample(posterior, sampler, draws=6, block=4, seed=3)
    torch.testing.assert_close(pairs.x[::2], alone.x[::2])
    middle = (pairs.x[::2] + pairs.x[1::2]) / 2
    torch.testing.assert_close(middle, middle[:1].expand_as(middle), rtol=1e-6, atol=1e-6)
    assert float(mean_error(pairs).max()) < 1e-6 < float(mean_error(alone).min())
    assert pairs.info["antithetic"] and "antithetic" not in alone.info


def test_the_mean_of_a_bent_law_is_closer_than_that_of_independent_draws() -> None:
    """Of a mixture the map from noise to draw is not linear: the gain is there, and not complete."""
    from recon.priors import GaussianMixturePrior

    means, one = torch.tensor([[-1.0, 0.5], [1.0, -0.5]]).double(), torch.ones(2).double()
    prior = GaussianMixturePrior(means, 0.5 * one, one / 2)
    operator, y = recon.operators.MatrixOperator(torch.tensor([[1.0, 0.3]]).double()), torch.tensor([0.2]).double()
    posterior = recon.Posterior(prior, GaussianLikelihood(operator, y, 0.5))
    made = [recon.sample(posterior, MMPS(steps=20), draws=asked) for asked in (Pairs(1024), 2048)]
    less = made[0].mean_variance() / made[1].mean_variance()
    # The logarithm of a ratio of two variances with 1,023 and 2,047 degrees of freedom.
    bound = normal_bound() * math.sqrt(2 / 1023 + 2 / 2047)
    assert float(less.log().max()) < -bound
    assert float(less.min()) > 1e-3


def test_threads_and_blocks_change_no_bit() -> None:
    posterior, sampler = gaussian_problem(), MMPS(steps=5)
    first = recon.sample(posterior, sampler, draws=Pairs(4), block=2, comm=serial(1))
    again = recon.sample(posterior, sampler, draws=Pairs(4), block=2, comm=serial(2))
    assert torch.equal(first.x, again.x)
    torch.testing.assert_close(recon.sample(posterior, sampler, draws=Pairs(4)).x, first.x)


def test_what_cannot_be_pairs_is_refused() -> None:
    posterior = gaussian_problem()
    with pytest.raises(InputError, match="a block holds whole pairs of draws, so it must be even; got 3"):
        recon.sample(posterior, MMPS(steps=3), Pairs(3), block=3)
    with pytest.raises(InputError, match="at least 1 pair of draws; got 0"):
        Pairs(0)
    with pytest.raises(InputError, match="TwistedSMC lets draws meet"):
        recon.sample(posterior, TwistedSMC(steps=3), Pairs(2))
    large = SimpleNamespace(prior=SimpleNamespace(latent=Space.vector(65536)))
    assert default_block(large, True) == 2 and default_block(large) == 1


# --- Figures ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pairs", [2, 8])
def test_variance_and_error_of_the_mean_are_unbiased(pairs: int) -> None:
    ensemble = bent(pairs, 0)
    expected = (2 * BEND**2 + OWN**2 / 2) / pairs  # u cancels, u^2 does not
    assert standard_errors(ensemble.std().square(), VARIANCE) < normal_bound()
    assert standard_errors(ensemble.mean_variance(), expected) < normal_bound()
    assert standard_errors(ensemble.mean().square(), expected) < normal_bound(), "as it is from set to set"
    naive = ensemble.x.var(0)  # the formula of independent draws
    assert standard_errors(naive, VARIANCE) > normal_bound()
    assert torch.equal(mean_error(ensemble), ensemble.mean_variance().sqrt())


@pytest.mark.parametrize("pairs", [2, 8])
def test_crps_is_unbiased(pairs: int) -> None:
    ensemble, truth = bent(pairs, 1), plain(1, 2)[0]
    x, other = plain(2, 3)
    expected = (x - truth).abs() - 0.5 * (x - other).abs()
    off = fair_crps(ensemble.x, truth, None, antithetic=True) - expected
    assert standard_errors(off, 0.0) < normal_bound()
    naive = fair_crps(ensemble.x, truth) - expected
    if pairs == 2:
        assert standard_errors(naive, 0.0) > normal_bound(), "with partners compared it is too small"


def test_crps_of_weighted_pairs_is_its_double_sum() -> None:
    x, truth = zoo.normal(6, 7), zoo.normal(1, 7, step=1)[0]
    log_w = zoo.normal(1, 3, step=2)[0].repeat_interleave(2)
    w = torch.softmax(log_w, 0)
    first = (w[:, None] * (x - truth).abs()).sum(0)
    pairs = [(i, j) for i in range(6) for j in range(6) if i // 2 != j // 2]
    weight = sum(float(w[i] * w[j]) for i, j in pairs)
    second = sum(w[i] * w[j] * (x[i] - x[j]).abs() for i, j in pairs) / weight
    torch.testing.assert_close(fair_crps(x, truth, log_w, antithetic=True), first - second / 2)


def test_spread_skill_is_one_for_calibrated_pairs() -> None:
    ensemble, truth = bent(2, 4), plain(1, 5)[0]
    # sqrt(a / b) of two means over pixels: its relative error is half that of the ratio.
    a = ensemble.std().square() + ensemble.mean_variance()
    b = (ensemble.mean() - truth).square()
    error = 0.5 * math.sqrt(sum(float(v.var() / v.mean() ** 2) for v in (a, b)) / PIXELS)
    assert abs(spread_skill(ensemble, truth) - 1) < normal_bound() * error


def test_pairs_count_once_and_the_first_of_each_are_independent() -> None:
    ensemble = bent(8, 6)
    apart = ensemble.independent()
    assert len(apart) == 8 and ensemble.ess == pytest.approx(8) and not apart.antithetic
    assert torch.equal(apart.x, ensemble.x[::2]) and apart.independent() is apart
    inside = 2 / 9  # of independent draws
    error = math.sqrt(inside * (1 - inside) / PIXELS)
    assert abs(outside(ensemble, plain(1, 7)[0]) - inside) < normal_bound() * error
    assert not ensemble.resample(16, 0).antithetic
    with pytest.raises(InputError, match="at least 2 pairs"):
        dataclasses.replace(ensemble, x=ensemble.x[:2], log_weights=None).std()


def test_pairs_survive_a_file(tmp_path) -> None:
    ensemble = bent(2, 8)
    dataclasses.replace(ensemble, x=ensemble.x[:2], log_weights=None).save(tmp_path / "one.nc")  # one pair: no std, no error
    ensemble.save(tmp_path / "e.nc")
    again = Ensemble.load(tmp_path / "e.nc")
    assert again.antithetic
    torch.testing.assert_close(again.std(), ensemble.std())


def test_draws_are_inferred_again_from_one_of_each_pair() -> None:
    posterior = gaussian_problem()
    ensemble = recon.sample(posterior, MMPS(steps=3), draws=Pairs(4))
    with pytest.raises(InputError, match="the ensemble is worth 4"):
        self_consistency(posterior, ensemble, Again(MMPS(steps=3), draws=4, cases=8))


def test_the_error_of_the_mean_reaches_the_report_and_the_rest_is_of_independent_draws() -> None:
    from recon.diagnostics import data_fit, monte_carlo_errors
    from recon.report.numbers import _draws, _monte_carlo

    ensemble = bent(8, 9)
    told, apart = _monte_carlo(ensemble), ensemble.independent()
    assert told is not None
    assert told["mean"] == pytest.approx(float(ensemble.mean_variance().mean().sqrt()))
    assert told["std"] == monte_carlo_errors(apart.x).summary()["std"]
    assert _draws(ensemble)["antithetic"] and not _draws(apart)["antithetic"]
    posterior = gaussian_problem()
    pairs = recon.sample(posterior, MMPS(steps=12), draws=Pairs(8))
    fit, own = (data_fit(posterior.likelihood, e) for e in (pairs, pairs.independent()))
    assert fit.signal_freedom == own.signal_freedom
    assert len(fit.chi2) == 16 and len(own.chi2) == 8
