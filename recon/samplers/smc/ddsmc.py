r"""Sequential Monte Carlo around a decoupled kernel (Ekstrom Kelvinius, Zhao and Lindsten 2025; generalised DAPS).

Per step ``sigma -> sigma'``, with ``Delta = sigma^2 - sigma'^2``, ``w = Delta / (eta sigma'^2 + Delta)``, the guess
``z0 | z ~ N(D, rho^2 I)`` and, in the rotated and whitened coordinates of the data (``Seen``), ``m = rho^2 / (1 + rho^2 b)``,
``x~ = m (b t + D / rho^2)``::

    p(z' | z)    = N((1 - w) z + w D,   sigma'^2 w)                                     # the chain of the prior
    z'           ~ N((1 - w) z + w x~,  sigma'^2 w - w^2 (rho^2 - m)) = q(z' | z, y)    # data drawn in, per coordinate
    psi(z)       = prod_i N(t_i; c_i(D), 1/b_i + rho^2)
    l           += log p(z' | z) - log q(z' | z, y)

``eta = 1`` is the ancestral chain (``w = tau``), ``eta = 0`` renews all noise in every step, as DAPS does (``w = 1``).  The
limit of many particles is the posterior under the chain's own prior, and only ``eta = 1`` keeps the marginals of the forward
process in small steps: the others renew noise around D and lose what z0 has around it, again in every step.  Of N(0, 1), in
100 even steps of log sigma from 50 to 0.01, that prior's variance is 0.919 for eta = 1, 0.630 for 0.5 and 0.479 for 0; in
1,000 steps 0.991, 0.663 and 0.498.

``rho^2 = s^2 sigma^2 / (s^2 + sigma^2)`` with ``s`` the prior's standard deviation (``width``), not above ``sigma'^2 / w``,
which keeps the variance of q positive.  The last step is the kernel's own, ``z' = D``: q of no width elsewhere would have no
ratio to it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from recon.errors import InputError
from recon.posterior import Posterior
from recon.samplers.base import Claim
from recon.samplers.smc.adapted import Adapted, coordinates, log_product
from recon.samplers.smc.particles import Level, Look
from recon.samplers.widths import prior_spread


@dataclass(frozen=True)
class DDSMC(Adapted):
    """Decoupled-diffusion particles; eta: 1 ancestral ... 0 full renewal of the noise.  width: see the module."""

    claim: ClassVar[Claim] = "consistent"
    exact_for: ClassVar[str] = "eta=1: many particles, up to the error of the grid"
    needs: ClassVar[str] = "linear operator, Gaussian noise, prior with affine decoder"
    cost: ClassVar[str] = "1 denoiser per step"

    threshold: float = 0.5  # its proposals are as wide as its kernel: weights of no heavy tail
    eta: float = 1.0
    width: float | None = None

    def check(self, posterior: Posterior) -> None:
        super().check(posterior)
        prior_spread(posterior.prior, self.width, "DDSMC")
        if not 0 <= self.eta <= 1:
            raise InputError(f"DDSMC needs 0 <= eta <= 1; got {self.eta}")

    def share(self, level: Level) -> float:
        """``w``."""
        gone = level.sigma**2 - level.after**2
        return gone / (self.eta * level.after**2 + gone)

    def spread2(self, posterior: Posterior, level: Level) -> float:
        """``rho^2``."""
        s2 = prior_spread(posterior.prior, self.width, "DDSMC") ** 2
        white = s2 * level.sigma**2 / (s2 + level.sigma**2)
        return min(white, level.after**2 / self.share(level)) if level.after > 0 else white

    def look(self, posterior: Posterior, z: Tensor, level: Level) -> Look:
        seen = self.seen(posterior)
        denoised = posterior.denoise(z, level.sigma)
        own = seen.squares.rsqrt()
        gap = (seen.value * own - coordinates(seen, denoised)).double()
        variance = own.double() ** 2 + self.spread2(posterior, level)
        return {"denoised": denoised, "log_psi": log_product(gap, variance)}

    def move(self, posterior: Posterior, z: Tensor, look: Look, level: Level) -> tuple[Tensor, Tensor]:
        denoised = look["denoised"]
        if level.after == 0:
            return denoised, torch.zeros(len(z), dtype=torch.float64)
        seen, w, rho2 = self.seen(posterior), self.share(level), self.spread2(posterior, level)
        wide = level.after**2 * w
        gain = rho2 * seen.squares / (1 + rho2 * seen.squares)  # x~ - D = gain (t - D), rho^2 - m = gain rho^2
        narrow = wide - w**2 * rho2 * gain
        shift = w * gain * (seen.value * seen.squares.rsqrt() - coordinates(seen, denoised))
        noise = level.normal(z).flatten(1)
        rows = seen.rows / seen.squares.sqrt()[:, None]
        inside = noise @ rows.T
        change = shift + (narrow.sqrt() - math.sqrt(wide)) * inside
        moved = (1 - w) * z + w * denoised + (math.sqrt(wide) * noise + change @ rows).reshape(z.shape)
        away = (shift + narrow.sqrt() * inside).double()
        own = 0.5 * inside.double().square() - 0.5 * away.square() / wide
        return moved, (own + 0.5 * (narrow.double() / wide).log()).sum(1).cpu()
