r"""Methods whose psi is a Gaussian of the state itself in the directions that the data see: proposals in closed form.

With orthonormal rows ``e_i`` (the data rotated and whitened, ``Seen``), coordinate ``c_i = e_i . z`` and datum
``t_i = c_i(z0) + n / sqrt(b_i)``, a method says at each level ``g(z) = prod_{i active} N(t_i; c_i, V_i)``.  Against the
ancestral kernel ``N(m, v I)``, ``m = z - tau (z - D)``, ``v = sigma'^2 tau``, everything is conjugate::

    psi(z)  = prod N(t_i; e_i . m, v + V_i')                                   # g one step ahead: "fully adapted"
    c_i'    ~ N(t_i K + (1 - K) e_i . m, V_i' K),   K = v / (v + V_i')         # other directions: the kernel's own
    l      += log psi(z) - log g'(z')

Dividing by g' makes weights of a heavy tail.  Far above the prior's width, with ``V = s^2 sigma^2``, coordinates have the
variance ``sigma'^2 s^2 / (1 + s^2)`` and their weight grows with them like a Gaussian's inverse: its tail falls as the power
``1 + s^2 / tau`` (tau of the next step; of all steps since the last resampling, where there was none).  Runs that miss the rare
large weights say an evidence too small and an error much too small.  For the error to be known its estimate must have a
variance, so the power must exceed four: with s = 1 (MCGDiff, whose g is given) only in steps with ``tau < 1/3``, 0.2 of log
sigma; with s = 2 (the default of AFDPS and FPS) always.  These methods therefore resample after every step (``threshold = 1``).
Beyond three reported errors of the log evidence lie, of 50 runs of 200 particles on a Gaussian in three dimensions, 40 steps
from 50 to 0.01: MCGDiff 2, AFDPS 1, FPS 0; and with s = 1 AFDPS 1, FPS 5, errors being 1.4 and 1.6 times too small.
A wide g steers less: with 19 particles in 429 dimensions (downscaling in docs/methods.md) means were 1.5 and 2.3 dB better with
s = 1 and ``threshold = 0.5`` than with these defaults.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from recon.draws import Draws
from recon.errors import InputError
from recon.posterior import Posterior
from recon.samplers.smc.moments import Seen
from recon.samplers.smc.particles import Level, Look, ParticleSampler
from recon.schedules import Grid, LogLinear


@dataclass(frozen=True)
class Sight:
    """What a method says about the seen coordinates at one level: targets, variances, which count, which count for good.

    Each (r,).  ``kept`` ones stay in the product and are not divided out by the next level.
    """

    target: Tensor
    variance: Tensor
    active: Tensor
    kept: Tensor


@dataclass(frozen=True)
class Adapted(ParticleSampler):
    """Contract of the methods of the module: say ``sight`` for a level.  largest: data rows worked with."""

    steps: int = 200
    threshold: float = 1.0
    grid: Grid = field(default_factory=LogLinear)
    largest: int = 1024

    def check(self, posterior: Posterior) -> None:
        super().check(posterior)
        Seen.of(posterior, type(self).__name__, self.largest)

    def seen(self, posterior: Posterior) -> Seen:
        """The data as rows."""
        return Seen.of(posterior, type(self).__name__, self.largest)

    def sight(self, posterior: Posterior, k: int, draws: Draws) -> Sight:
        """``g`` at level ``k`` of the grid (``steps`` is level zero)."""
        raise TypeError(f"{type(self).__name__} must define sight")

    def look(self, posterior: Posterior, z: Tensor, level: Level) -> Look:
        seen, sight = self.seen(posterior), self.sight(posterior, level.k + 1, level.draws)
        denoised = posterior.denoise(z, level.sigma)
        mean, v = _kernel(z, denoised, level)
        gap = (sight.target - coordinates(seen, mean))[:, sight.active].double()
        return {"denoised": denoised, "log_psi": log_product(gap, v + sight.variance[sight.active].double())}

    def move(self, posterior: Posterior, z: Tensor, look: Look, level: Level) -> tuple[Tensor, Tensor]:
        seen, sight = self.seen(posterior), self.sight(posterior, level.k + 1, level.draws)
        mean, v = _kernel(z, look["denoised"], level)
        moved, on = mean, sight.active
        if v > 0:
            rows = seen.rows / seen.squares.sqrt()[:, None]
            noise = level.normal(z).flatten(1)
            gain = torch.where(on, v / (v + sight.variance), 0.0)
            width = torch.where(on, (sight.variance * gain).sqrt(), math.sqrt(v))
            at = coordinates(seen, mean)
            inside = noise @ rows.T
            change = gain * (sight.target - at) + (width - math.sqrt(v)) * inside
            moved = mean + (math.sqrt(v) * noise + change @ rows).reshape(z.shape)
        gone = on & ~sight.kept
        gap = (sight.target - coordinates(seen, moved))[:, gone].double()
        return moved, look["log_psi"] - log_product(gap, sight.variance[gone].double()).cpu()


def _kernel(z: Tensor, denoised: Tensor, level: Level) -> tuple[Tensor, float]:
    tau = 1 - (level.after / level.sigma) ** 2
    return z - tau * (z - denoised), level.after**2 * tau


def coordinates(seen: Seen, z: Tensor) -> Tensor:
    """``c_i`` of states: (n, r)."""
    return z.flatten(1) @ seen.rows.T / seen.squares.sqrt()


def log_product(gap: Tensor, variance: Tensor) -> Tensor:
    """``sum_i log N(gap_i; 0, variance_i)``: (n, r), (r,) -> (n,)."""
    return -0.5 * (gap.square() / variance + (2 * math.pi * variance).log()).sum(1)


def require_positive(value: float, name: str, user: str) -> None:
    """InputError naming ``user`` unless ``value`` is positive."""
    if not 0 < value < math.inf:
        raise InputError(f"{user} needs {name} > 0; got {value}")
