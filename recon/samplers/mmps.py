r"""Moment-matching posterior sampling (Rozet et al. 2024).

``p(z0 | z)`` is approximated by a Gaussian with its own mean ``D`` and covariance ``sigma^2 J`` (Tweedie), so that for a linear
operator ``A`` (here with the prior's affine decoder folded in, ``x = b + s z``) and noise covariance ``S``::

    v   = CG[ S + sigma^2 A s J s A^T ] (y - A x(D))        # one vjp of the denoiser per iteration
    D_y = D + sigma^2 J s A^T v                             # eq. 8 of the paper, and one vjp

The system is solved in whitened data, ``S^-1/2 ( . ) S^-1/2``.  J is symmetric for an exact denoiser; CG stops early where a
learnt one is not positive.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from recon.operators.cg import CG
from recon.posterior import Posterior
from recon.samplers.base import Claim, GuidedSampler
from recon.samplers.requirements import require_affine, require_gaussian


@dataclass(frozen=True)
class MMPS(GuidedSampler):
    """Moment-matching posterior sampling; ``cg`` bounds the inner solve (K iterations cost K + 1 vjps per step)."""

    claim: ClassVar[Claim] = "exact"
    exact_for: ClassVar[str] = "Gaussian priors and linear Gaussian likelihoods, as steps and CG iterations grow"
    needs: ClassVar[str] = "linear operator, Gaussian likelihood, differentiable denoiser"
    cost: ClassVar[str] = "1 denoiser + (K + 1) vjp + (K + 1) (A, A^T) per step"

    cg: CG = field(default_factory=lambda: CG(iterations=5, tolerance=1e-4))

    def check(self, posterior: Posterior) -> None:
        super().check(posterior)
        require_gaussian(posterior, "MMPS").linear("MMPS")
        require_affine(posterior, "MMPS")

    def guide(self, posterior: Posterior, z: Tensor, sigma: float, sigma_next: float) -> Tensor:
        prior, likelihood = posterior.prior, posterior.likelihood.gaussian()
        operator, noise = likelihood.linear("MMPS"), likelihood.sigma
        denoised, pull = posterior.linearize(z, sigma)

        def spread(u: Tensor) -> Tensor:  # sigma^2 J s A^T S^-1/2 u
            back = prior.decode_linear(posterior.adjoint(operator, u / noise))
            return sigma**2 * pull(back)

        def matvec(u: Tensor) -> Tensor:
            return u + posterior.forward(prior.decode_linear(spread(u))) / noise

        residual = (likelihood.y - posterior.forward(prior.decode(denoised))) / noise
        return denoised + spread(self.cg.solve(matvec, residual))
