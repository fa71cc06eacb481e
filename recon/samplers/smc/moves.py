r"""Langevin moves of particles at one noise level, accepted or refused, so that copies of one particle part.

Target at level sigma: ``p_sigma(z) psi_sigma(z)``.  Proposal ``z' = z + h (D_y - z) + sigma sqrt(2 h) xi``; the prior's
density is known through its score alone, and its ratio along the move is taken by the trapezium rule,

    log p_sigma(z') - log p_sigma(z) = 1/2 (s(z) + s(z')) . (z' - z),      s = (D - z) / sigma^2,

exact for a Gaussian prior and of third order in the move otherwise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from recon.errors import InputError
from recon.operators.cg import dot
from recon.operators.cg import spread as over
from recon.posterior import Posterior

if TYPE_CHECKING:
    from recon.samplers.smc.particles import Level, Look, ParticleSampler


@dataclass(frozen=True)
class Moves:
    """``count`` moves after each resampling, of length ``size`` (h above)."""

    count: int = 0
    size: float = 0.1

    def __post_init__(self) -> None:
        if self.count < 0 or not 0 < self.size:
            raise InputError(f"Moves need count >= 0 and size > 0; got {self.count} and {self.size}")

    def apply(
        self, sampler: ParticleSampler, posterior: Posterior, z: Tensor, look: Look, level: Level
    ) -> tuple[Tensor, Look]:
        """States and looks after the moves; the law of the target is kept."""
        uniforms = level.draws.uniform(level.k, (self.count,), "user").to(z.device)
        for i in range(self.count):
            noise = level.draws.normal(
                level.k, tuple(z.shape[1:]), "resample", dtype=z.dtype, first=i * z[:1].numel()
            ).to(z.device)
            denoised, guided = sampler.fields(posterior, look)
            forth = self.size * (guided - z)
            moved = z + forth + level.sigma * math.sqrt(2 * self.size) * noise
            after = sampler.look(posterior, moved, level)
            denoised_after, guided_after = sampler.fields(posterior, after)
            back = self.size * (guided_after - moved)
            width = 4 * self.size * level.sigma**2
            gap = moved - z
            log_ratio = dot(denoised - z + denoised_after - moved, gap) / (2 * level.sigma**2)
            log_ratio = log_ratio + (dot(gap - forth, gap - forth) - dot(gap + back, gap + back)) / width
            log_ratio = log_ratio.double() + after["log_psi"].to(z.device) - look["log_psi"].to(z.device)
            taken = uniforms[:, i].log() < log_ratio
            z = torch.where(over(taken, z).bool(), moved, z)
            look = {name: _chosen(taken, after[name], value) for name, value in look.items()}
        return z, look


def _chosen(taken: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(taken.to(old.device).reshape(-1, *[1] * (old.ndim - 1)), new.to(old.device), old)
