"""Events against truncated normals, posteriors, and brute force; their probabilities with error bars."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from scipy.stats import norm
from torch import Tensor

import recon
from recon.draws import Draws
from recon.errors import InputError
from recon.operators import CG
from recon.priors import GaussianMixturePrior, GaussianPrior
from recon.samplers import MMPS, Conditioned, Event, Events, SASolver, probability
from recon.samplers.base import State
from recon.schedules import LogLinear
from recon.selftest import check_resume
from tests.bounds import normal_bound
from tests.samplers.problems import random_problem, truth

DIRECTION = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)


def linear(x: Tensor) -> Tensor:
    return x @ DIRECTION


def squares(x: Tensor) -> Tensor:
    return x.square().sum(1)


def largest(x: Tensor) -> Tensor:
    return x.amax(1)


def law_of(mean: Tensor, covariance: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of ``linear``."""
    return float(DIRECTION @ mean), math.sqrt(float(DIRECTION @ covariance @ DIRECTION))


@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize("tail", [-1.0, 3.0, 5.0])
def test_a_tail_of_a_gaussian(tail: float, data: bool) -> None:
    """A linear event ``tail`` standard deviations out: its probability, and the truncated normal's mean and variance."""
    posterior = random_problem()
    prior = posterior.prior
    assert isinstance(prior, GaussianPrior)
    centre, width = law_of(*(truth(posterior) if data else (prior.mean, prior.covariance())))
    event = Event(linear, centre + tail * width)
    n = 400
    sampler = Events(steps=100, grid=LogLinear(), cg=CG(6, 1e-12))
    draws = recon.sample(Conditioned(posterior if data else prior, event), sampler, draws=n)
    found, exact = probability(draws), float(norm.sf(tail))
    print(f"P beyond {tail} sd: {found}, exact {exact:.4g}")
    # The solver's variance is right to half a per cent at 100 steps (17 % each): times tail^2 / 2 that of the logarithm.
    bias = 0.005 * (1 + tail**2 / 2)
    assert abs(found.log - math.log(exact)) < normal_bound() * found.error / found.value + bias
    assert found.error / found.value < 0.1 and found.ess > 0.15 * n
    hazard = norm.pdf(tail) / exact
    mean, variance = hazard, 1 + tail * hazard - hazard**2  # of the truncated standard normal
    c = (linear(draws.x) - centre) / width
    weight = draws.weights
    got = float((weight * c).sum())
    assert abs(got - mean) < normal_bound() * math.sqrt(variance / draws.ess) + 0.01
    assert 0.6 < float((weight * (c - got).square()).sum()) / variance < 1.5


def test_the_guess_is_the_mean_of_the_truncated_law() -> None:
    """For a Gaussian prior, data and a linear event: E[z0 | z, y, E], by regression on C, whose truncation is one number."""
    posterior, sigma = random_problem(), 0.7
    prior = posterior.prior
    assert isinstance(prior, GaussianPrior)
    z = torch.randn(4, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = Events(cg=CG(6, 1e-13)).look(Conditioned(posterior, Event(linear, 1.0)), z, sigma)
    like = posterior.likelihood.gaussian()
    matrix = like.operator.matrix
    precision = torch.linalg.inv(prior.covariance()) + torch.eye(3) / sigma**2 + matrix.T @ matrix / 0.09
    right = torch.linalg.solve(prior.covariance(), prior.mean) + z / sigma**2 + like.y @ matrix / 0.09
    mean, cover = torch.linalg.solve(precision, right.T).T, torch.linalg.inv(precision)
    torch.testing.assert_close(found[0], mean)
    deviation = math.sqrt(float(DIRECTION @ cover @ DIRECTION))
    a = ((mean @ DIRECTION - 1.0) / deviation).numpy()
    gain = torch.from_numpy(norm.pdf(a) / norm.cdf(a))
    torch.testing.assert_close(found[1], mean + gain[:, None] * (cover @ DIRECTION) / deviation)


def mixture() -> GaussianMixturePrior:
    means = torch.tensor([[-2.0, 0.0], [1.0, 1.5], [1.5, -1.0]], dtype=torch.float64)
    return GaussianMixturePrior(means, torch.tensor([0.3, 0.6]).double(), torch.tensor([0.5, 0.3, 0.2]).double())


def brute_force(n: int = 1_000_000) -> Tensor:
    """Draws of ``mixture`` itself."""
    generator = torch.Generator().manual_seed(7)
    prior = mixture()
    pick = torch.multinomial(prior.log_weights.exp(), n, True, generator=generator)
    kick = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    return prior.means[pick] + prior.variances[0].sqrt() * kick


@pytest.mark.parametrize(("function", "threshold"), [(squares, 9.0), (largest, 3.0)])
@pytest.mark.parametrize("strengths", [(0.0, 0.5, 1.0), (0.0, 0.8)])
def test_a_nonlinear_event_of_a_mixture(function: object, threshold: float, strengths: tuple[float, ...]) -> None:
    """Against a million draws: probability, and the mean of the draws with the event."""
    event = Event(function, threshold)  # type: ignore[arg-type]
    every = brute_force()
    with_it = every[event.value(every) > 0]
    exact = len(with_it) / len(every)
    n = 2500
    draws = recon.sample(
        Conditioned(mixture(), event), Events(steps=120, grid=LogLinear(), strengths=strengths), draws=n
    )
    found = probability(draws)
    print(f"{event.function.__name__} > {threshold}: {found}, brute force {exact:.4g}")
    spread = math.hypot(found.error, math.sqrt(exact / len(every)))
    assert abs(found.value - exact) < normal_bound() * spread + 0.02 * exact  # the solver's error at 120 steps
    assert found.error < 0.2 * exact and found.inside > 2 * exact
    error = (draws.mean() - with_it.mean(0)) / (with_it.std(0) / math.sqrt(found.ess))
    assert float(error.abs().max()) < normal_bound(2) + 1


def test_an_event_that_always_happens_changes_nothing() -> None:
    posterior = random_problem()
    draws = recon.sample(Conditioned(posterior, Event(linear, -1e3)), Events(steps=10), draws=8)
    found = probability(draws)
    assert found.value == pytest.approx(1.0, abs=1e-12) and found.inside == 1.0 and found.error < 1e-12
    plain = recon.sample(posterior, MMPS(steps=10, transition=SASolver(), cg=CG(10, 1e-6)), draws=8)
    torch.testing.assert_close(draws.x, plain.x, rtol=1e-6, atol=1e-6)


def test_weights_of_a_step_are_those_of_its_noise() -> None:
    """log w is log N(eta; 0, 1) - log N(eta - d; 0, 1) of the noise eta that moved the state, here read off the state."""
    posterior = random_problem()
    conditioned = Conditioned(posterior.prior, Event(linear, 4.0))
    sampler = Events(steps=10, solver=SASolver(terms=1, corrector=False), strengths=(1.0,))
    draws = Draws(0, range(3))
    state = sampler.init(conditioned, draws)
    sigma, after = sampler.levels(conditioned)[:2]
    moved = sampler.step(conditioned, state, 0, draws)
    q = (after / sigma) ** 2
    denoised, _ = sampler.look(conditioned, state.z, sigma)
    eta = (moved.z - q * state.z - (1 - q) * denoised) / (after * math.sqrt(1 - q))
    xi = draws.normal(0, (3,), dtype=torch.float64)
    expected = 0.5 * xi.square().sum(1) - 0.5 * eta.square().sum(1)
    torch.testing.assert_close(moved.log_w, expected, rtol=1e-6, atol=1e-9)
    assert float((eta - xi).abs().max()) > 1e-6
    # In turn with strength 0: draw 1 has the push, draws 0 and 2 have none; all are weighed against the mixture of both.
    both = dataclasses.replace(sampler, strengths=(0.0, 1.0))
    start = both.init(conditioned, draws)
    mixed = both.step(conditioned, start, 0, draws)
    torch.testing.assert_close(mixed.z[1], moved.z[1])
    assert float((mixed.z[0] - moved.z[0]).abs().max()) > 0
    ratio = torch.exp(-expected[1])
    assert float(mixed.log_w[1]) == pytest.approx(-math.log(0.5 + 0.5 * float(ratio)), rel=1e-6)


def test_draws_without_the_event_weigh_nothing() -> None:
    posterior = random_problem()
    conditioned = Conditioned(posterior, Event(linear, 0.0))
    z = torch.stack([DIRECTION, -DIRECTION])
    ensemble = Events().finish(conditioned, State(z, torch.zeros(2, dtype=torch.float64)))
    assert ensemble.weights.tolist() == [1.0, 0.0]
    nothing = Events().finish(conditioned, State(-z[:1].repeat(2, 1), torch.zeros(2, dtype=torch.float64)))
    with pytest.raises(InputError, match="got 2 and 0"):
        probability(nothing)


def test_a_draw_alone_is_the_draw_in_company() -> None:
    prior = GaussianPrior(torch.zeros(4).double(), torch.ones(4).double())
    conditioned = Conditioned(prior, Event(squares, 9.0))
    together, alone = (recon.sample(conditioned, Events(steps=9), draws=5, seed=2, block=b) for b in (5, 1))
    assert torch.equal(together.x, alone.x)
    assert torch.equal(together.log_weights, alone.log_weights)
    assert float((together.x[0] - together.x[1]).abs().min()) > 0


def test_a_stop_leaves_no_trace() -> None:
    assert check_resume(Events(steps=10), Conditioned(random_problem(), Event(linear, 1.0))) == 5


def test_it_refuses_what_it_cannot_meet() -> None:
    posterior = random_problem()
    with pytest.raises(InputError, match="draws from a Conditioned"):
        Events().check(posterior)
    with pytest.raises(InputError, match="one number per draw"):
        Conditioned(posterior, Event(lambda x: x, 0.0))
    conditioned = Conditioned(posterior, Event(linear, 0.0))
    with pytest.raises(InputError, match="tau = 1"):
        Events(solver=SASolver(tau=0.5)).check(conditioned)
    with pytest.raises(InputError, match="only the sampler Events"):
        recon.sample(conditioned, MMPS(steps=4), draws=2)
