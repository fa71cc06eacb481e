"""Noise levels over time, and grids of them.

Everywhere in recon the diffusion state is variance exploding: ``z = z0 + sigma * n`` with ``n ~ N(0, I)``.  A prior states
the range of ``sigma`` for which its denoiser is good (``Schedule``); a sampler chooses how to walk down it (a grid).
"""

from __future__ import annotations

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
        raise TypeError("Grid is a contract; use Karras() or LogLinear()")

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
