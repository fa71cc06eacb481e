"""DPS with steps that cannot overshoot: what the guard does, and what it leaves alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

import recon
from recon.likelihoods import GaussianLikelihood, Likelihood, PoissonLikelihood, TransmissionLikelihood
from recon.operators import MatrixOperator, PhaseRetrieval
from recon.priors import GaussianPrior
from recon.samplers import DDIM, DPS, Ancestral, LatentDPS, Renoise
from recon.samplers.transitions import DPMSolver2M, Heun, Transition
from recon.schedules import LogLinear
from recon.selftest import gaussian_problem
from tests.samplers.problems import random_problem

LEVELS = (0.8, 0.5)
TAU = 1 - (0.5 / 0.8) ** 2


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pulls(posterior: recon.Posterior, z: Tensor, **keys: float) -> tuple[Tensor, Tensor, Tensor]:
    """The denoised point, the pull as it is and the guarded one."""
    free, safe = (DPS(guard=guard, **keys).guide(posterior, z, *LEVELS) for guard in (False, True))  # type: ignore[arg-type]
    denoised = posterior.prior.denoise(z, LEVELS[0])
    return denoised, free - denoised, safe - denoised


def test_a_pull_ends_where_its_step_is_best() -> None:
    """Linear and Gaussian: ``t = <r, B p> / |B p|^2`` along the pull; the step moves by tau times what is left of it."""
    posterior = gaussian_problem(snr=300.0)
    like = posterior.likelihood.gaussian()
    z = normal(6, *posterior.prior.latent.shape)
    denoised, free, safe = pulls(posterior, z)
    x = posterior.prior.decode(denoised)
    residual = like.residual(x) / like.sigma
    moved = residual - like.residual(posterior.prior.decode(denoised + free)) / like.sigma
    best = (residual * moved).flatten(1).sum(1) / moved.square().flatten(1).sum(1)
    assert bool((best < TAU).all()), "every one of these pulls overshoots"
    shares = (best / TAU).reshape(-1, *[1] * (free.ndim - 1))
    torch.testing.assert_close(safe, shares * free, rtol=1e-9, atol=1e-12)


def test_what_does_not_overshoot_is_left_alone() -> None:
    _, free, safe = pulls(gaussian_problem(snr=0.5), normal(6, *gaussian_problem().prior.latent.shape))
    assert torch.equal(free, safe)
    assert float(free.abs().min()) > 0


def test_precise_data_do_not_make_it_diverge() -> None:
    """Where the published pull does; and the data are met."""
    posterior = gaussian_problem(snr=1e8)
    ensemble = recon.sample(posterior, DPS(steps=200), draws=5)
    like = posterior.likelihood.gaussian()
    start = like.residual(posterior.prior.decode(torch.zeros(1, *posterior.prior.latent.shape, dtype=torch.float64)))
    assert float(like.residual(ensemble.x).square().mean()) < 1e-3 * float(start.square().mean())


@pytest.mark.parametrize("transition", [Renoise(1.0), Renoise(0.5), DDIM(), Ancestral(), Heun(), DPMSolver2M()])
def test_every_transition_is_guarded(transition: Transition) -> None:
    """By how much of the guided point its step takes in: all of it where all noise is renewed."""
    posterior = gaussian_problem(snr=1e4)
    ensemble = recon.sample(posterior, DPS(steps=40, transition=transition), draws=4)
    like = posterior.likelihood.gaussian()
    start = like.residual(posterior.prior.decode(torch.zeros(1, *posterior.prior.latent.shape, dtype=torch.float64)))
    assert float(like.residual(ensemble.x).square().mean()) < 0.1 * float(start.square().mean())


def test_many_steps_are_those_without_it() -> None:
    """The guard goes away as steps grow: the law, and with it the documented bias, is that of the free pull."""
    posterior, equal = gaussian_problem(snr=4.0), []
    for steps in (20, 600):
        samplers = (DPS(steps=steps, grid=LogLinear(), guard=guard) for guard in (True, False))
        one, other = (recon.sample(posterior, sampler, draws=4, seed=3).x for sampler in samplers)
        equal.append(torch.equal(one, other))
    assert equal == [False, True]


def problems() -> dict[str, Likelihood]:
    matrix = MatrixOperator(normal(6, 4, seed=1).abs())
    counts = torch.tensor([900.0, 1100, 950, 1000, 1050, 990], dtype=torch.float64)
    return {
        "amplitudes": GaussianLikelihood(PhaseRetrieval(matrix), normal(6, seed=2).abs() * 3, 1e-3),
        "counts": PoissonLikelihood(matrix, counts, 500.0),
        "transmission": TransmissionLikelihood(matrix, counts, 1e4),
    }


@pytest.mark.parametrize("which", ["amplitudes", "counts", "transmission"])
def test_no_step_makes_the_data_less_likely(which: str) -> None:
    """To first order in the step a parabola can only be trusted where it is one: here it has to come out no worse."""
    prior = GaussianPrior(torch.full((4,), 1.0).double(), torch.full((4,), 0.25).double())
    posterior = recon.Posterior(prior, problems()[which])
    z = prior.mean + LEVELS[0] * normal(20, 4, seed=4)
    denoised, free, safe = pulls(posterior, z, weight=100.0)
    values = [posterior.likelihood.log_prob(prior.decode(denoised + TAU * p)) for p in (0 * free, free, safe)]
    before, without, after = values
    assert bool((without < before).any() | without.isnan().any()), "nothing to guard against"
    assert bool((after >= before).all())
    alone = torch.cat([DPS(weight=100.0).guide(posterior, row[None], *LEVELS) for row in z])
    torch.testing.assert_close(denoised + safe, alone, rtol=1e-12, atol=1e-12)


def test_a_pull_into_the_void_is_drawn_back() -> None:
    """Through an object of minus some thousands the expected counts are no number; the draw stays where there are some."""
    matrix = MatrixOperator(torch.ones(1, 1).double())
    likelihood = TransmissionLikelihood(matrix, torch.tensor([1e9]).double(), 1.0)
    prior = GaussianPrior(torch.ones(1).double(), torch.ones(1).double())
    posterior, z = recon.Posterior(prior, likelihood), torch.ones(2, 1).double()
    denoised, free, safe = pulls(posterior, z, weight=1e6)
    assert not bool(likelihood.log_prob(denoised + free).isfinite().any())
    assert bool((likelihood.log_prob(denoised + safe) >= likelihood.log_prob(denoised)).all())


@pytest.mark.parametrize("sampler", [DPS(steps=10), LatentDPS(steps=10)])
def test_what_it_costs_is_counted(sampler: DPS | LatentDPS) -> None:
    posterior = random_problem(d=4, m=3)
    costs = [
        recon.sample(posterior, dataclasses.replace(sampler, guard=guard), draws=3).info["cost"]["forward"]
        for guard in (True, False)
    ]
    assert costs[0] - costs[1] == 3 * 10
