r"""Noise levels chosen for a prior: as many as there are steps, where they are worth most.

The probability flow of the prior is followed by fine steps for a few pilot draws.  Over every pair of fine steps one step of
twice the length is compared with the two; their distance, carried to the end of the flow by the factor
``s / sqrt(s^2 + sigma^2)`` of a Gaussian of the prior's spread, is the error ``e`` that a step of that length ``H`` makes
there.  A step of length ``h`` (in log sigma) of a solver of order ``p`` makes ``e (h / H)^(p + 1)``, and the sum over all
steps is smallest where the errors are equal: levels are the quantiles of ``(e / H^(p + 1))^(1 / (p + 1))`` over log sigma.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from recon.draws import Draws
from recon.errors import InputError
from recon.priors.base import Prior
from recon.samplers.transitions import DDIM, DPMSolver2M, DPMSolver2S, Leg, Transition
from recon.samplers.widths import prior_spread
from recon.schedules import Grid, Karras, Levels, LogLinear, Schedule

_MOST = 1000  # steps that a tolerance may lead to


@dataclass(frozen=True)
class Pilot:
    """How grids are measured.  draws: followed.  fine: steps of the reference.  seed: of the draws.  order: of the solver,
    1 or 2.

    floor: smallest share of the steps that is laid as a known grid lays them whatever the errors say, so that no step is
    absurdly long.
    """

    draws: int = 8
    fine: int = 128
    seed: int = 0
    order: int = 2
    floor: float = 0.2

    def __post_init__(self) -> None:
        if self.draws < 1 or self.fine < 8 or self.order not in (1, 2) or not 0 < self.floor <= 1:
            raise InputError(f"a Pilot needs draws >= 1, fine >= 8, order 1 or 2 and floor in (0, 1]; got {self}")


@dataclass(frozen=True)
class Optimised:
    """What ``optimised_grid`` found.

    grid: the levels.  errors: root mean square distance of the pilots' end points from the fine reference, in the prior's
    latent spread, by grid ("optimised", "karras", "loglinear"), all with the same number of steps.
    """

    grid: Levels
    errors: Mapping[str, float]


def optimised_grid(
    prior: Prior, steps: int | None = None, tolerance: float | None = None, schedule: Schedule | None = None,
    pilot: Pilot | None = None,
) -> Optimised:  # fmt: skip
    """The levels for ``steps`` steps over ``prior``, or as many (up to 1000) as it takes to end within ``tolerance``.

    tolerance: root mean square error of the end point in the prior's spread.  schedule: the range walked (the prior's).
    Four mixtures of the measured density with those of known grids (LogLinear, Karras), and these themselves, are walked with
    DPM-Solver++(2M) (DDIM for ``Pilot(order=1)``), and the best on the pilots is returned: never worse than the known ones
    there.  On other draws it can be worse when the pilots are few: two are too few for images.
    Cost: ``3 fine + 6 steps`` evaluations (order 2) for each pilot draw; with a tolerance the ``6 steps`` a few times.

    Raises InputError unless exactly one of steps (>= 4) and tolerance (> 0) is given, or the pilots' flow is not finite.
    """
    pilot, schedule = pilot or Pilot(), schedule or prior.schedule
    if (
        (steps is None) == (tolerance is None)
        or (steps is not None and steps < 4)
        or (tolerance is not None and not tolerance > 0)
    ):
        raise InputError(f"give steps >= 4 or a tolerance > 0, and not both; got steps={steps}, tolerance={tolerance}")
    clock, local, end = _measured(prior, schedule, pilot)
    power, width = pilot.order + 1, clock[2] - clock[0]
    density = (local / width**power) ** (1 / power)
    # Equal errors in N steps add up to N (integral of the density / N)^(p + 1).
    whole = (float(density.sum()) * width) ** power
    densities = _mixed(density, clock, pilot.floor)
    goal = tolerance or math.inf
    steps = steps or min(_MOST, max(4, math.ceil((whole / goal) ** (1 / pilot.order))))
    while True:
        found = [Levels(_quantiles(clock, density, schedule, steps)) for density in densities]
        best = _compared(prior, found, steps, (schedule, pilot, end))
        missed = best.errors["optimised"] / goal
        if missed <= 1 or steps == _MOST:
            return best
        steps = min(_MOST, max(steps + 1, math.ceil(steps * missed ** (1 / pilot.order))))


def _mixed(density: np.ndarray, clock: np.ndarray, floor: float) -> list[np.ndarray]:
    """The measured density with the shares ``floor`` and ``(1 + floor) / 2`` of that of LogLinear and of Karras."""
    measured, karras = density / density.mean(), np.exp(-clock[1::2] / Karras().rho)
    plain = (np.ones_like(measured), karras / karras.mean())
    return [(1 - share) * measured + share * known for share in (floor, (1 + floor) / 2) for known in plain]


def _compared(prior: Prior, found: list[Levels], steps: int, measured: tuple[Schedule, Pilot, Tensor]) -> Optimised:
    """The best of the found levels and the known grids, by the pilots' end points."""
    schedule, pilot, end = measured
    grids: list[Grid] = [Karras(), LogLinear(), *found]
    solver: Transition = DPMSolver2M() if pilot.order == 2 else DDIM()
    start, errors = schedule.sigma_max * _noise(prior, pilot), []
    for grid in grids:
        walked = _walk(prior, start, grid.sigmas(schedule, steps).tolist(), solver)
        errors.append(float((walked - end).square().mean().sqrt()) / _spread(prior))
    best = min(range(len(grids)), key=errors.__getitem__)
    levels = grids[best].levels(schedule, steps).tolist()
    return Optimised(Levels(tuple(levels)), {"optimised": errors[best], "karras": errors[0], "loglinear": errors[1]})


def _measured(prior: Prior, schedule: Schedule, pilot: Pilot) -> tuple[np.ndarray, np.ndarray, Tensor]:
    """Fine clock (fine,), error per pair of fine steps ((fine - 1) // 2,), and the reference end points."""
    fine = pilot.fine + 1 - pilot.fine % 2
    levels = LogLinear().sigmas(schedule, fine).tolist()
    solver: Transition = DPMSolver2S() if pilot.order == 2 else DDIM()
    spread = _spread(prior)
    z, local = schedule.sigma_max * _noise(prior, pilot), []
    for k in range(0, fine - 1, 2):
        coarse = _walk(prior, z, [levels[k], levels[k + 2]], solver)
        z = _walk(prior, z, levels[k : k + 3], solver)
        carried = spread / math.sqrt(spread**2 + levels[k + 2] ** 2)
        local.append(float((coarse - z).square().mean().sqrt()) * carried / spread)
    end = _walk(prior, z, [levels[-2], 0.0], solver)
    if not bool(torch.isfinite(end).all()):
        raise InputError(f"the flow of prior {prior.card.name!r} is not finite; no grid can be measured on it")
    # Rounding is no error of the solver; without a floor an exactly linear stretch would get no level at all.
    return -np.log(levels[:fine]), np.maximum(np.array(local), 1e-12), end


def _walk(prior: Prior, z: Tensor, levels: list[float], solver: Transition) -> Tensor:
    memory: Mapping[str, Tensor] = {}
    with torch.no_grad():
        for k in range(len(levels) - 1):
            leg = Leg(levels, k, lambda z, sigma, _: prior.denoise(z, sigma), None)
            z, memory = solver.advance(z, memory, leg)
    return z


def _quantiles(clock: np.ndarray, density: np.ndarray, schedule: Schedule, steps: int) -> tuple[float, ...]:
    """``steps`` levels, both ends of the schedule among them, at even quantiles of the density on pairs of fine steps."""
    edges = clock[::2]
    mass = np.concatenate([[0.0], np.cumsum(density)])
    places = np.interp(np.linspace(0, mass[-1], steps), mass, edges)
    inner = np.exp(-places[1:-1])
    return (schedule.sigma_max, *(float(value) for value in inner), schedule.sigma_min)


def _noise(prior: Prior, pilot: Pilot) -> Tensor:
    draws = Draws(pilot.seed, range(pilot.draws))
    return draws.normal(0, prior.latent.shape, "probe", dtype=prior.dtype).to(prior.device)


def _spread(prior: Prior) -> float:
    """The prior's latent spread; one where it states none (latents are made to have that)."""
    try:
        return prior_spread(prior, None, "optimised_grid")
    except InputError:
        return 1.0
