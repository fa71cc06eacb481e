"""Solvers: the order that each states is measured, and their error on a unit Gaussian is the tabulated one."""

from __future__ import annotations

import dataclasses
import math

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
from recon.priors.base import Prior
from recon.samplers import (
    DDIM,
    Ancestral,
    DPMSolver2M,
    DPMSolver2S,
    EulerMaruyama,
    Exponential,
    Heun,
    PiGDM,
    Renoise,
    SASolver,
)
from recon.samplers.transitions import Leg, Transition
from recon.schedules import Grid, Karras, LogLinear, Schedule
from tests.bounds import chi2_bounds

RANGE = Schedule(0.002, 80.0)


def walk(solver: Transition, denoise, z: Tensor, levels: list[float], kicks: bool = False) -> Tensor:
    """From ``z`` down the levels; kicks: row ``k + 1`` gets unit noise in step ``k`` and no other row any."""
    memory: dict[str, Tensor] = {}
    for k in range(len(levels) - 1):
        noise = None
        if solver.random and levels[k + 1] > 0:
            noise = torch.zeros_like(z)
            if kicks:
                noise[k + 1] = 1.0
        z, memory = solver.advance(z, memory, Leg(levels, k, lambda z, sigma, _: denoise(z, sigma), noise))
    return z


def variance(solver: Transition, grid: Grid, steps: int, schedule: Schedule = RANGE) -> float:
    """Of the output for the target N(0, 1): squares of the responses to the start and to every step's noise, added."""
    levels = grid.sigmas(schedule, steps).tolist()
    z = torch.zeros(steps + 1, 1, dtype=torch.float64)
    z[0] = levels[0]
    return float(walk(solver, lambda z, sigma: z / (1 + sigma**2), z, levels, kicks=True).square().sum())


TABLE = {
    (DDIM(), Karras()): (0.564, 0.739, 0.859, 0.900, 0.949, 0.980, 0.995),
    (Ancestral(), Karras()): (0.385, 0.569, 0.739, 0.807, 0.897, 0.958, 0.989),
    (EulerMaruyama(), Karras()): (3.23, 1.82, 1.34, 1.22, 1.10, 1.04, 1.010),
    (Heun(), Karras()): (1.38, 1.09, 1.021, 1.010, 1.002, 1.000, 1.000),
    (DPMSolver2M(), Karras()): (1.34, 1.10, 1.023, 1.010, 1.002, 1.000, 1.000),
    (DPMSolver2M(), LogLinear()): (1.09, 1.042, 1.012, 1.006, 1.001, 1.000, 1.000),
    (Ancestral(), LogLinear()): (0.384, 0.572, 0.744, 0.812, 0.900, 0.960, 0.990),
}


@pytest.mark.parametrize(("solver", "grid"), TABLE, ids=lambda one: type(one).__name__)
def test_the_variance_of_a_unit_gaussian_is_the_tabulated_one(solver: Transition, grid: Grid) -> None:
    for steps, expected in zip((10, 18, 35, 50, 100, 256, 1000), TABLE[solver, grid], strict=True):
        last_digit = 0.01 if expected >= 1.03 or expected == 1.02 else 0.001
        assert variance(solver, grid, steps) == pytest.approx(expected, abs=0.6 * last_digit)


def slopes(errors: list[float]) -> list[float]:
    """Of the logarithm of the error against that of the steps, which double from one to the next."""
    return [math.log2(a / b) for a, b in zip(errors[:-1], errors[1:], strict=True)]


MIXTURE = GaussianMixturePrior(
    torch.tensor([[-1.5, 0.0], [1.0, 1.0]], dtype=torch.float64),
    torch.tensor([0.5, 0.8], dtype=torch.float64),
    torch.tensor([0.3, 0.7], dtype=torch.float64),
)
GAUSSIAN = GaussianPrior(torch.tensor([1.0, -0.5]).double(), torch.tensor([0.25, 4.0]).double())


@pytest.mark.parametrize("prior", [GAUSSIAN, MIXTURE], ids=["gaussian", "mixture"])
@pytest.mark.parametrize(
    "solver", [DDIM(), Heun(), DPMSolver2M(), DPMSolver2S(), Exponential(1), Exponential(2), Exponential(3)], ids=str
)
def test_the_end_point_of_the_flow_converges_at_the_stated_order(solver: Transition, prior: Prior) -> None:
    """Against 1024 steps of fourth order.  The start is high, where the first steps of a multistep solver cost nothing."""
    order = solver.terms if isinstance(solver, Exponential) else solver.order
    levels = Schedule(0.05, 2000.0)
    start = 2000 * Draws(0, range(16)).normal(0, (2,), "probe", dtype=torch.float64)
    exact = walk(Exponential(4), prior.denoise, start, LogLinear().sigmas(levels, 1024).tolist())
    ends = [
        walk(solver, prior.denoise, start, LogLinear().sigmas(levels, n).tolist())
        for n in ((128, 256) if order < 3 else (256, 512))
    ]
    found = slopes([float((end - exact).square().mean().sqrt()) for end in ends])
    # Steps of h = 0.08 and 0.04 (half of that for the third order): the next term changes the slope by a few h.
    assert found[-1] == pytest.approx(order, abs=0.35 if order < 3 else 0.5), found


@pytest.mark.parametrize(
    ("solver", "order"),
    [
        (Ancestral(), 1),
        (DDIM(eta=0.5), 1),
        (EulerMaruyama(), 1),
        (Heun(churn=1e9), 1),
        (SASolver(1, corrector=False), 1),
        (SASolver(1), 2),
        (SASolver(2, corrector=False), 2),
        (SASolver(2, corrector=False, tau=0.5), 2),
        (SASolver(3), 2),
        (SASolver(3, tau=0.5), 2),
    ],
    ids=str,
)
def test_the_exact_variance_of_random_solvers_converges_at_the_stated_order(solver: Transition, order: int) -> None:
    wide = Schedule(1e-4, 1e3)  # ends whose own errors stay below those of the solver
    errors = [abs(variance(solver, LogLinear(), steps, wide) - 1) for steps in (256, 512, 1024)]
    assert slopes(errors)[-1] == pytest.approx(order, abs=0.2), (errors, slopes(errors))


def test_the_default_stochastic_solver_does_better_on_a_gaussian() -> None:
    """Its second-order term vanishes there: slope three."""
    errors = [abs(variance(SASolver(), LogLinear(), steps, Schedule(1e-4, 1e3)) - 1) for steps in (128, 256)]
    assert slopes(errors)[-1] == pytest.approx(3, abs=0.1)


def test_renoising_does_not_converge() -> None:
    found = [variance(Renoise(0.5), LogLinear(), steps) for steps in (128, 512)]
    assert abs(found[1] - 1) > 0.8 * abs(found[0] - 1) > 0.1  # a first-order solver would be at a quarter


def test_members_of_one_family_agree_where_they_must() -> None:
    z, levels = torch.linspace(-3, 3, 8, dtype=torch.float64).reshape(4, 2), [9.0, 4.0, 2.0, 1.2, 0.5]
    noise = Draws(0, range(4)).normal(0, (2,), dtype=torch.float64)

    def run(solver: Transition) -> Tensor:
        state, memory = z, {}
        for k in range(len(levels) - 1):
            leg = Leg(levels, k, lambda z, sigma, _: MIXTURE.denoise(z, sigma), noise if solver.random else None)
            state, memory = solver.advance(state, memory, leg)
        return state

    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(run(Exponential(1)), run(DDIM()), **close)
    torch.testing.assert_close(run(SASolver(3, tau=0.0, corrector=False)), run(Exponential(3)), **close)
    torch.testing.assert_close(run(SASolver(1, corrector=False)), run(Ancestral()), **close)
    torch.testing.assert_close(run(DDIM(eta=1.0)), run(Ancestral()), **close)
    assert float((run(Exponential(2)) - run(DPMSolver2M())).abs().max()) > 1e-3  # not the same method


def test_two_terms_differ_from_2m_in_the_third_order_of_a_step() -> None:
    z = torch.linspace(-2, 2, 8, dtype=torch.float64).reshape(4, 2)

    def gap(h: float) -> float:
        before = MIXTURE.denoise(z, math.exp(h))
        leg = Leg([math.exp(h), 1.0, math.exp(-h), 0.0], 1, lambda z, sigma, _: MIXTURE.denoise(z, sigma), None)
        one = DPMSolver2M().advance(z, {"before": before}, leg)[0]
        other = Exponential(2).advance(z, {"before1": before}, leg)[0]
        return float((one - other).abs().max())

    assert math.log2(gap(0.02) / gap(0.01)) == pytest.approx(3, abs=0.1)


def problem() -> recon.Posterior:
    generator = torch.Generator().manual_seed(0)
    operator = MatrixOperator(torch.randn(2, 3, generator=generator, dtype=torch.float64))
    y = torch.randn(2, generator=generator, dtype=torch.float64)
    means = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    return recon.Posterior(GaussianMixturePrior(means, torch.ones(3).double()), GaussianLikelihood(operator, y, 0.5))


ALL = (
    Ancestral(), DDIM(0.3), Renoise(), EulerMaruyama(), Heun(), Heun(churn=4.0, inflation=1.01), DPMSolver2M(), DPMSolver2S(),
    Exponential(4), SASolver(3), SASolver(2, corrector=False),
)  # fmt: skip


@pytest.mark.parametrize("solver", ALL, ids=str)
def test_what_a_solver_remembers_is_in_the_checkpoint(solver: Transition) -> None:
    assert check_resume(PiGDM(steps=9, jacobian=False, transition=solver), problem()) == 4


@pytest.mark.parametrize("solver", ALL, ids=str)
def test_stated_evaluations_are_those_made(solver: Transition) -> None:
    ensemble = recon.sample(problem(), PiGDM(steps=6, jacobian=False, transition=solver), draws=2)
    last = 1 if isinstance(solver, Heun | DPMSolver2S) else solver.evaluations
    assert ensemble.info["cost"]["denoiser"] == 2 * (5 * solver.evaluations + last)
    assert bool(torch.isfinite(ensemble.x).all())


def test_the_loop_follows_the_law_of_a_solver_with_memory() -> None:
    """Draws through ``sample``: mean variance ratio of independent coordinates within chi-squared bounds."""
    d, draws = 16, 400
    prior = GaussianPrior(torch.zeros(d).double(), torch.ones(d).double(), schedule=RANGE)
    blind = GaussianLikelihood(MatrixOperator(torch.eye(d).double()), torch.zeros(d).double(), 1e6)
    sampler = PiGDM(steps=12, jacobian=False, transition=SASolver(2))
    x = recon.sample(recon.Posterior(prior, blind), sampler, draws=draws, seed=2).x
    low, high = chi2_bounds(draws * d)
    assert low < float(x.square().mean()) / variance(SASolver(2), Karras(), 12) < high


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Heun(churn=-1.0),
        lambda: Heun(low=2.0, high=1.0),
        lambda: Exponential(0),
        lambda: SASolver(5),
        lambda: SASolver(tau=-0.1),
    ],
)
def test_refusals(wrong) -> None:
    with pytest.raises(InputError):
        wrong()


def test_solvers_of_several_evaluations_have_no_plain_step() -> None:
    z = torch.zeros(1, 1)
    for solver in (Heun(), DPMSolver2M(), Exponential()):
        assert dataclasses.is_dataclass(solver)
        with pytest.raises(TypeError, match="call advance"):
            solver.step(z, z, 1.0, 0.5, None)
