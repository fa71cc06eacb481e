"""Grids of noise levels: closed forms, lists, and levels chosen for a prior."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import recon
from recon.draws import Draws
from recon.errors import InputError
from recon.likelihoods import GaussianLikelihood
from recon.operators import MatrixOperator
from recon.priors import GaussianMixturePrior, GaussianPrior
from recon.samplers import DDIM, MMPS, DPMSolver2M, Exponential, Optimised, Pilot, optimised_grid
from recon.samplers.transitions import Leg, Transition
from recon.schedules import Grid, Karras, Levels, LogLinear, Schedule, VPUniform
from recon.workflows.problems import validated
from recon.workflows.schema import workflow_model
from recon.workflows.source import parse_source

PRIOR = GaussianMixturePrior(
    torch.tensor([[-2.0, 0.0], [2.0, 1.0], [0.0, -3.0]]).double(), torch.full((2,), 0.04).double()
)


def test_vp_uniform_is_even_in_the_time_of_the_process() -> None:
    grid, schedule = VPUniform(0.2, 12.0), Schedule(0.01, 40.0)
    sigmas = grid.sigmas(schedule, 9)
    assert float(sigmas[0]) == pytest.approx(40.0, rel=1e-12)
    assert float(sigmas[-2]) == pytest.approx(0.01, rel=1e-12)
    assert float(sigmas[-1]) == 0
    times = []
    for sigma in sigmas[:-1].tolist():  # by bisection of the defining equation
        low, high = 0.0, 10.0
        for _ in range(200):
            t = (low + high) / 2
            low, high = (t, high) if 0.2 * t + 0.5 * 11.8 * t**2 < math.log1p(sigma**2) else (low, t)
        times.append(low)
    gaps = [a - b for a, b in itertools.pairwise(times)]
    assert max(gaps) - min(gaps) < 1e-9
    assert min(gaps) > 0


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: VPUniform(1.0, 0.5), "beta_min < beta_max"),
        (lambda: Levels((1.0, 2.0)), "each below the one before"),
        (lambda: Levels((1.0, 0.0)), "positive"),
        (lambda: Levels((3.0,)), "two or more"),
        (lambda: Levels((3.0, 1.0, 0.5)).sigmas(Schedule(0.1, 10.0), 4), "holds 3 levels; set steps to that"),
        (lambda: Levels((30.0, 1.0)).sigmas(Schedule(0.1, 10.0), 2), "reach from 30 to 1"),
        (lambda: Levels((3.0, 0.01)).sigmas(Schedule(0.1, 10.0), 2), "reach from 3 to 0.01"),
    ],
)
def test_grids_refuse(build, text: str) -> None:
    with pytest.raises(InputError, match=text):
        build()


def test_levels_can_be_written_in_a_workflow_and_are_walked() -> None:
    text = (
        "problem: {dataset: a, operator: b, noise: {sigma: 1}}\nprior: p\nsampler: {method: mmps, steps: 3, grid: %s}\n"
    )
    source = parse_source(text % "{kind: Levels, values: [20.0, 1.0, 0.05]}", "w.yaml")
    sampler = validated(workflow_model(), source).sampler.build()
    assert sampler == MMPS(steps=3, grid=Levels((20.0, 1.0, 0.05)))
    prior = GaussianPrior(torch.zeros(2).double(), torch.ones(2).double())
    like = GaussianLikelihood(MatrixOperator(torch.eye(2).double()), torch.ones(2).double(), 0.5)
    posterior = recon.Posterior(prior, like)
    assert sampler.sigmas(posterior).tolist() == [20.0, 1.0, 0.05, 0.0]
    assert recon.sample(posterior, sampler, draws=2).info["sampler"]["fields"]["grid"]["values"] == (20.0, 1.0, 0.05)


def end(grid: Grid, steps: int, solver: Transition, start: torch.Tensor) -> torch.Tensor:
    z, memory, levels = start, {}, grid.sigmas(PRIOR.schedule, steps).tolist()
    for k in range(steps):
        z, memory = solver.advance(z, memory, Leg(levels, k, lambda z, sigma, _: PRIOR.denoise(z, sigma), None))
    return z


@pytest.mark.parametrize(("steps", "order"), [(16, 2), (24, 2), (16, 1)])
def test_a_grid_made_for_a_prior_beats_the_general_ones_on_draws_it_has_not_seen(steps: int, order: int) -> None:
    found = optimised_grid(PRIOR, steps, pilot=Pilot(draws=64, order=order))
    assert isinstance(found, Optimised)
    values = found.grid.values
    assert len(values) == steps
    assert (values[0], values[-1]) == pytest.approx((PRIOR.schedule.sigma_max, PRIOR.schedule.sigma_min), rel=1e-12)
    solver: Transition = DPMSolver2M() if order == 2 else DDIM()
    start = values[0] * Draws(9, range(200)).normal(0, (2,), "user", dtype=torch.float64)
    exact = end(LogLinear(), 600, Exponential(3), start)
    errors = {
        name: float((end(grid, steps, solver, start) - exact).square().mean().sqrt())
        for name, grid in (("optimised", found.grid), ("karras", Karras()), ("loglinear", LogLinear()))
    }
    print(f"{steps} steps of order {order}: {errors}")
    assert errors["optimised"] < 0.9 * min(errors["karras"], errors["loglinear"])


def test_it_is_never_worse_than_known_grids_on_its_pilots() -> None:
    """For a Gaussian there is little to gain; then a known grid is what comes back."""
    prior = GaussianPrior(torch.zeros(2).double(), torch.ones(2).double())
    for steps in (4, 9):
        found = optimised_grid(prior, steps, pilot=Pilot(draws=4))
        assert found.errors["optimised"] <= min(found.errors["karras"], found.errors["loglinear"])


def test_steps_follow_from_a_tolerance() -> None:
    coarse, fine = (optimised_grid(PRIOR, tolerance=t, pilot=Pilot(draws=16)) for t in (0.05, 0.005))
    assert coarse.errors["optimised"] <= 0.05
    assert fine.errors["optimised"] <= 0.005
    assert len(coarse.grid.values) < len(fine.grid.values) < 100


def test_the_same_grid_every_time() -> None:
    assert optimised_grid(PRIOR, 8) == optimised_grid(PRIOR, 8)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: optimised_grid(PRIOR),
        lambda: optimised_grid(PRIOR, 8, 0.1),
        lambda: optimised_grid(PRIOR, 3),
        lambda: optimised_grid(PRIOR, tolerance=0.0),
        lambda: Pilot(draws=0),
        lambda: Pilot(order=3),
        lambda: Pilot(floor=0.0),
    ],
)
def test_optimiser_refuses(wrong) -> None:
    with pytest.raises(InputError):
        wrong()
