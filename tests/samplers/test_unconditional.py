"""Draws from a prior alone, against the exact solution of the probability-flow ODE of a Gaussian."""

from __future__ import annotations

import pytest
import torch

from recon.draws import Draws
from recon.errors import InputError
from recon.priors import GaussianPrior
from recon.samplers import unconditional
from recon.schedules import LogLinear, Schedule


def prior(top: float = 50.0) -> GaussianPrior:
    made = GaussianPrior(torch.tensor([1.0, -2.0, 0.5]).double(), torch.tensor([0.25, 1.0, 4.0]).double())
    made.schedule = Schedule(1e-4, top)
    return made


def exact(p: GaussianPrior, draws: int, seed: int) -> torch.Tensor:
    """``m + sqrt(c / (c + s0^2)) (s0 n - m)``: every axis of the flow of N(m, c) is a hyperbola."""
    top = p.schedule.sigma_max
    start = top * Draws(seed, range(draws)).normal(0, (3,), "init", dtype=torch.float64)
    c = torch.tensor([0.25, 1.0, 4.0]).double()
    return p.mean + (c / (c + top**2)).sqrt() * (start - p.mean)


def test_second_order():
    p = prior()
    errors = []
    for steps in (100, 200, 400):
        x = unconditional(p, 20, steps, seed=3, grid=LogLinear()).x
        errors.append(float((x - exact(p, 20, 3)).abs().max()))
    assert errors[0] < 0.05
    for coarse, fine in zip(errors[:-1], errors[1:], strict=True):
        assert coarse / fine == pytest.approx(4, rel=0.15)


def test_blocks_change_rounding_only_and_threads_nothing():
    p, before = prior(), torch.get_num_threads()
    whole = unconditional(p, 7, 20, seed=1, block=3)
    try:
        torch.set_num_threads(1)
        assert torch.equal(unconditional(p, 7, 20, seed=1, block=3).x, whole.x)
    finally:
        torch.set_num_threads(before)
    assert torch.allclose(unconditional(p, 7, 20, seed=1).x, whole.x, rtol=0, atol=1e-12)
    assert not torch.equal(unconditional(p, 7, 20, seed=2).x, whole.x)
    assert whole.info == {"sampler": {"method": "unconditional", "steps": 20}, "draws": 7, "seed": 1}


@pytest.mark.parametrize("given", [{"draws": 0}, {"steps": 1}])
def test_refusals(given):
    with pytest.raises(InputError, match="at least 1 draw and 2 steps"):
        unconditional(prior(), **given)
