"""Noise levels over time, and grids of them.

Everywhere in recon the diffusion state is variance exploding: ``z = z0 + sigma * n`` with ``n ~ N(0, I)``.  A prior states
the range of ``sigma`` for which its denoiser is good (``Schedule``); a sampler chooses how to walk down it (a grid).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from recon.errors import InputError


@dataclass(frozen=True)
class Schedule:
    """The noise levels a prior was made for, in units of its latent: ``sigma_min <= sigma <= sigma_max``."""

    sigma_min: float
    sigma_max: float

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise InputError(f"a Schedule needs 0 < sigma_min < sigma_max; got {self.sigma_min} and {self.sigma_max}")


@dataclass(frozen=True)
class Grid:
    """A falling list of noise levels; the last one is zero.

    ``sigmas(schedule, steps)`` returns float64 (steps + 1,): ``steps`` positive levels, then 0.
    """

    def levels(self, schedule: Schedule, steps: int) -> Tensor:
        """The positive levels: float64 (steps,), falling."""
        raise TypeError("Grid is a contract; use Karras() or LogLinear(), VPUniform() or Levels(values)")

    def sigmas(self, schedule: Schedule, steps: int) -> Tensor:
        """The levels of ``steps`` steps over ``schedule``.  Raises InputError for fewer than 2 steps."""
        if steps < 2:
            raise InputError(f"a sampler needs at least 2 steps; got {steps}")
        levels = self.levels(schedule, steps)
        return torch.cat([levels, levels.new_zeros(1)])


@dataclass(frozen=True)
class Karras(Grid):
    r"""``sigma_i = (s_max^(1/rho) + i/(N-1) (s_min^(1/rho) - s_max^(1/rho)))^rho`` (Karras et al. 2022, eq. 5)."""

    rho: float = 7.0

    def levels(self, schedule: Schedule, steps: int) -> Tensor:
        ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
        top, bottom = schedule.sigma_max ** (1 / self.rho), schedule.sigma_min ** (1 / self.rho)
        return (top + ramp * (bottom - top)) ** self.rho


@dataclass(frozen=True)
class LogLinear(Grid):
    """Even steps in ``log sigma``: the discretisation error per step is the same at every level."""

    def levels(self, schedule: Schedule, steps: int) -> Tensor:
        top, bottom = math.log(schedule.sigma_max), math.log(schedule.sigma_min)
        return torch.linspace(top, bottom, steps, dtype=torch.float64).exp()


@dataclass(frozen=True)
class VPUniform(Grid):
    r"""Even steps in the time of a variance-preserving process with a linear ``beta`` (Song et al. 2021b).

    ``1 + sigma(t)^2 = exp(beta_min t + (beta_max - beta_min) t^2 / 2)``; what steps of the published DPS, DDRM and DiffPIR are.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        if not 0 <= self.beta_min < self.beta_max < math.inf:
            raise InputError(f"VPUniform needs 0 <= beta_min < beta_max; got {self.beta_min} and {self.beta_max}")

    def levels(self, schedule: Schedule, steps: int) -> Tensor:
        slope = self.beta_max - self.beta_min
        # The positive root of slope t^2 / 2 + beta_min t = log(1 + sigma^2), written so that nothing cancels.
        depth = [math.log1p(sigma**2) for sigma in (schedule.sigma_max, schedule.sigma_min)]
        top, bottom = (2 * d / (self.beta_min + math.sqrt(self.beta_min**2 + 2 * slope * d)) for d in depth)
        t = torch.linspace(top, bottom, steps, dtype=torch.float64)
        return torch.expm1(self.beta_min * t + 0.5 * slope * t**2).sqrt()


@dataclass(frozen=True)
class Levels(Grid):
    """The levels themselves, as ``samplers.optimised_grid`` finds them: as many as the sampler takes steps.

    values: falling and positive.  Raises InputError otherwise, and when the count or the prior's range does not fit.
    """

    values: tuple[float, ...] = (80.0, 0.002)

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(float(value) for value in self.values))
        falling = all(a > b for a, b in itertools.pairwise(self.values))
        if len(self.values) < 2 or not falling or not 0 < self.values[-1] or not self.values[0] < math.inf:
            raise InputError(f"Levels are two or more positive numbers, each below the one before; got {self.values}")

    def levels(self, schedule: Schedule, steps: int) -> Tensor:
        if steps != len(self.values):
            raise InputError(f"this grid holds {len(self.values)} levels; set steps to that (got {steps})")
        top, bottom = self.values[0], self.values[-1]
        if top > schedule.sigma_max * (1 + 1e-9) or bottom < schedule.sigma_min * (1 - 1e-9):
            raise InputError(
                f"the levels reach from {top:g} to {bottom:g}; this walk may use {schedule.sigma_max:g} to "
                f"{schedule.sigma_min:g}"
            )
        return torch.tensor(self.values, dtype=torch.float64)
