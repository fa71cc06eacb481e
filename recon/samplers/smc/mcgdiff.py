r"""Monte Carlo guided diffusion (Cardoso et al. 2023): a noisy datum is the diffusion's own state at its noise level.

Datum ``i`` of the rotated problem, ``t_i = c_i(z0) + n sigma_i``, has the law of coordinate ``i`` of the state at level
``sigma_i``.  Down to it ``g = N(t_i; c_i, sigma^2 - sigma_i^2 + kappa (1 + sigma_i^2))``, the paper's potential with
``alpha_bar = 1/(1 + sigma^2)``; there it stays, and below it the coordinate is free.  Levels of the grid next to a ``sigma_i``
are moved onto it, so nothing is rounded but ``kappa``.  Data less noisy than the last level, or noisier than the first, weigh
at the end with their likelihood.  Proposals as in ``smc.adapted``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from recon.draws import Draws
from recon.posterior import Posterior
from recon.samplers.base import Claim
from recon.samplers.smc.adapted import Adapted, Sight, coordinates, log_product, require_positive
from recon.samplers.smc.particles import Look


@dataclass(frozen=True)
class MCGDiff(Adapted):
    """Monte Carlo guided diffusion; no derivative of the denoiser.  kappa: width of the last factor (paper: 1e-4)."""

    claim: ClassVar[Claim] = "consistent"
    exact_for: ClassVar[str] = "many particles, up to the error of the grid and kappa"
    needs: ClassVar[str] = "linear operator, Gaussian noise, prior with affine decoder"
    cost: ClassVar[str] = "1 denoiser per step"

    kappa: float = 1e-4

    def check(self, posterior: Posterior) -> None:
        super().check(posterior)
        require_positive(self.kappa, "kappa", "MCGDiff")

    def sigmas(self, posterior: Posterior) -> Tensor:
        return torch.tensor(self.levels(posterior), dtype=torch.float64)

    def levels(self, posterior: Posterior) -> tuple[float, ...]:
        plain = tuple(self.grid.sigmas(self.schedule(posterior), self.steps).tolist())
        return _snapped(plain, tuple(self.seen(posterior).squares.rsqrt().tolist()))

    def sight(self, posterior: Posterior, k: int, draws: Draws) -> Sight:
        seen, levels = self.seen(posterior), self.levels(posterior)
        own, sigma = seen.squares.rsqrt(), levels[k]
        between = (own < levels[0]) & (own > levels[-2])
        if sigma == 0:
            return Sight(seen.value * own, own**2, ~between, torch.zeros_like(between))
        active = (sigma >= own * (1 - 1e-9)) & (own < levels[0])
        variance = (sigma**2 - own**2).clamp(min=0.0) + self.kappa * (1 + own**2)
        last = between & active & (levels[k + 1] < own * (1 - 1e-9))
        return Sight(seen.value * own, variance, active, last)

    def last(self, posterior: Posterior, z: Tensor, look: Look) -> Tensor:
        seen, sight = self.seen(posterior), self.sight(posterior, self.steps, Draws(0, [0]))
        gap = (sight.target - coordinates(seen, z))[:, sight.active].double()
        scale = seen.constant - 0.5 * float(seen.squares.double().log().sum())
        return log_product(gap, sight.variance[sight.active].double()) + scale


@cache
def _snapped(levels: tuple[float, ...], wanted: tuple[float, ...]) -> tuple[float, ...]:
    """``levels`` with the one nearest (in log) to each of ``wanted`` moved onto it, each level at most once; still falling."""
    new, taken = list(levels), {0, len(levels) - 2, len(levels) - 1}
    for value in sorted(wanted):
        if not levels[-2] < value < levels[0]:
            continue
        k = min(range(len(levels) - 1), key=lambda i: abs(levels[i] / value - 1))
        if k not in taken:
            taken.add(k)
            new[k] = value
    return tuple(new)
