"""Steps that a draw chooses for itself: their error is the tolerance's, and they are its own."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

import recon
from recon.checks import check_resume
from recon.draws import Draws
from recon.errors import InputError
from recon.likelihoods import GaussianLikelihood
from recon.operators import MatrixOperator
from recon.priors import GaussianMixturePrior, GaussianPrior
from recon.samplers import DPS, MMPS, Adaptive, PiGDM
from recon.schedules import Schedule
from recon.selftest import gaussian_problem

GUIDE = PiGDM(jacobian=False)  # exact for a white prior


def white() -> recon.Posterior:
    """Prior N(0, 1), data ``y`` of x itself with noise of 0.5: posterior N(0.8 y, 0.2)."""
    prior = GaussianPrior(torch.zeros(3).double(), torch.ones(3).double(), schedule=Schedule(1e-3, 100.0))
    y = torch.tensor([1.0, 2.0, -3.0]).double()
    return recon.Posterior(prior, GaussianLikelihood(MatrixOperator(torch.eye(3).double()), y, 0.5))


def end(posterior: recon.Posterior, draws: int) -> Tensor:
    """Where the flow of the posterior leads from the first states."""
    centre = 0.8 * posterior.likelihood.gaussian().y
    z = GUIDE.init(posterior, Draws(0, range(draws))).z
    return centre + (z - centre) * (0.2 / (0.2 + 100.0**2)) ** 0.5


def test_the_error_is_within_the_tolerance_and_costs_its_root() -> None:
    posterior, used = white(), []
    for tolerance in (0.1, 0.01, 0.001):
        found = recon.sample(posterior, Adaptive(of=GUIDE, tolerance=tolerance), draws=2)
        error = (found.x - end(posterior, 2)).square().mean(1).sqrt()
        used.append(found.info["cost"]["denoiser"] / 4)
        print(f"tolerance {tolerance}: error {error.tolist()}, {used[-1]} tries a draw")
        assert 0.02 * tolerance < float(error.max()) < tolerance
    assert all(
        1.4 < more / less < 4 for less, more in zip(used[:-1], used[1:], strict=True)
    )  # sqrt(10) once steps are many


def test_every_draw_walks_by_itself() -> None:
    """Blocks of one and of three: the same bits, though the draws are at different levels on the way."""
    mixture = GaussianMixturePrior(torch.tensor([[-4.0], [4.0]]).double(), torch.full((1,), 0.05).double())
    like = GaussianLikelihood(MatrixOperator(torch.ones(1, 1).double()), torch.zeros(1).double(), 3.0)
    posterior = recon.Posterior(mixture, like)
    sampler = Adaptive(of=MMPS(), tolerance=0.2)
    together, alone = (recon.sample(posterior, sampler, draws=3, seed=1, block=b).x for b in (3, 1))
    assert torch.equal(together, alone)
    draws = Draws(1, range(3))
    with torch.no_grad():
        state = sampler.init(posterior, draws)
        for k in range(12):
            state = sampler.step(posterior, state, k, draws)
    levels = state.aux["sigma"]
    assert float(levels.min()) > 0 and len(levels.unique()) == 3


def test_a_stop_leaves_no_trace() -> None:
    assert check_resume(Adaptive(of=GUIDE, steps=24, tolerance=0.1), white()) == 12


@pytest.mark.parametrize("steps", [2, 3, 8, 30])
def test_it_ends_within_its_steps_and_says_when_that_cost_accuracy(
    steps: int, caplog: pytest.LogCaptureFixture
) -> None:
    posterior, draws = white(), Draws(0, range(2))
    sampler = Adaptive(of=GUIDE, steps=steps, tolerance=1e-3)
    with torch.no_grad(), caplog.at_level(logging.WARNING, "recon.samplers"):
        state = sampler.init(posterior, draws)
        for k in range(steps):
            state = sampler.step(posterior, state, k, draws)
        sampler.finish(posterior, state)
    assert state.aux["sigma"].tolist() == [0.0, 0.0]
    assert "2 of 2 draws took longer steps" in caplog.text


def test_claims_and_refusals() -> None:
    posterior = gaussian_problem()
    assert Adaptive().claim == "consistent" and Adaptive(of=DPS()).claim == "heuristic"
    with pytest.raises(InputError, match="tolerance > 0"):
        Adaptive(tolerance=0.0).check(posterior)
    with pytest.raises(InputError, match="displacement per step and no flow"):
        Adaptive(of=DPS(form="norm")).check(posterior)
