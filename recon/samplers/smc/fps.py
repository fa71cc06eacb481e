r"""Filtering posterior sampling (Dou and Song 2024): the measurement is diffused along with the image.

With one draw ``e`` of noise for all particles, the path of the measurement is ``y_sigma = y + sigma A e``, the deterministic
(DDIM) walk of the paper's algorithm 1 in variance-exploding units.  Given it, states are filtered as those of a state-space
model whose observation at level sigma is ``y_sigma`` (rotated and whitened, ``smc.adapted``: datum i has noise ``1 / b_i``)::

    e ~ N(0, I), once
    for each step, sigma -> sigma':
        g(z')  = prod_i N(t_i + sigma' e_i; c_i(z'), V_i'),   V = 1/b + (spread sigma)^2
        z'     ~ p(z' | z) g(z') / psi(z),     psi(z) = integral of p(z' | z) g(z')        # conjugate: smc.adapted
        l     += log psi(z) - log g'(z')

The published filter keeps the factors g of all levels, and its limit is the posterior only as far as image and path are the
forward process; here each gives way to the next and the last is the likelihood itself, so the limit is the posterior whatever
the path is: path and spread decide how many particles that takes.  ``spread = 1``: path and image have noises of their own,
``N(y_sigma; A z, sigma^2 A A^T + sigma_y^2)``.  ``spread = 0`` would be the paper's coupling, one noise for both; g is then
narrower than a step of the chain, and the weights that take it back have no variance.  From 1 on they have one in every grid,
and from the root of three on their estimated variance has one too (``smc.adapted``).  A path of zeros is ``AFDPS``, which on
Gaussian problems makes better use of its particles.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch

from recon.draws import Draws
from recon.posterior import Posterior
from recon.samplers.base import Claim
from recon.samplers.smc.adapted import Adapted, Sight, require_positive
from recon.samplers.smc.particles import COMMON


@dataclass(frozen=True)
class FPS(Adapted):
    """Filtering posterior sampling with weights; no derivative of the denoiser.  spread: see the module."""

    claim: ClassVar[Claim] = "consistent"
    exact_for: ClassVar[str] = "many particles, up to the error of the grid"
    needs: ClassVar[str] = "linear operator, Gaussian noise, prior with affine decoder"
    cost: ClassVar[str] = "1 denoiser per step"

    spread: float = 2.0

    def check(self, posterior: Posterior) -> None:
        super().check(posterior)
        require_positive(self.spread, "spread", "FPS")

    def sight(self, posterior: Posterior, k: int, draws: Draws) -> Sight:
        seen, sigma = self.seen(posterior), self.levels(posterior)[k]
        own = seen.squares.rsqrt()
        shared = dataclasses.replace(draws, members=(COMMON,))
        path = shared.normal(0, tuple(own.shape), "probe", dtype=own.dtype)[0].to(own.device)
        everywhere = torch.ones_like(own, dtype=torch.bool)
        return Sight(seen.value * own + sigma * path, own**2 + (self.spread * sigma) ** 2, everywhere, ~everywhere)
