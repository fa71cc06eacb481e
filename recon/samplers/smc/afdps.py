r"""Weighted ensemble for a moving target, without a guess of ``p(y | z)`` (Chen et al. 2025), in discrete time.

The target at level sigma is ``p_sigma(z) exp(-mu_sigma(z))`` with the data misfit of the noisy state itself,
``mu = |y - A z|^2 / (2 R)``, ``R = sigma_y^2 + gamma^2 sigma^2 a^2`` for a direction of gain ``a``.  The guided equation
drifts by ``grad log p - grad mu`` per unit of ``sigma^2``, and its weights grow by ``1/2 (|grad mu|^2 - Lap mu) - grad log p .
grad mu`` and the change of mu.  Here each step's weight is the exact ratio of kernels that this rate is the limit of,

    l += log p(z' | z) - log q(z' | z, y),      w = exp(l - mu_sigma'(z')),

so the step adds no error of time, and no Laplacian is needed.  The sub-step of a linear operator is exact (``smc.adapted``,
with ``V_i = 1/b_i + gamma^2 sigma^2``, where gamma = 2 makes the reported error of the evidence one to be trusted); another
operator takes a gradient step, ``q = N(m - v grad mu', v I)``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from recon.draws import Draws
from recon.errors import InputError
from recon.likelihoods import GaussianLikelihood
from recon.operators.base import LinearOperator
from recon.operators.cg import dot
from recon.posterior import Posterior
from recon.samplers.base import Claim
from recon.samplers.smc.adapted import Adapted, Sight, require_positive
from recon.samplers.smc.particles import Level, Look, ParticleSampler


@dataclass(frozen=True)
class AFDPS(Adapted):
    """Approximation-free weighted ensemble; gamma: how fast the data's noise grows with the level.

    stiffness: gain over noise of an operator that is not linear, in units of the latent (see ``Plain``).
    """

    claim: ClassVar[Claim] = "consistent"
    exact_for: ClassVar[str] = "many particles, up to the error of the grid"
    needs: ClassVar[str] = "differentiable likelihood; exact sub-steps where it is linear and Gaussian"
    cost: ClassVar[str] = "1 denoiser per step; 1 (A, A^T) more where the operator is not linear"

    gamma: float = 2.0
    stiffness: float | None = None

    def check(self, posterior: Posterior) -> None:
        require_positive(self.gamma, "gamma", "AFDPS")
        if self._linear(posterior):
            super().check(posterior)
            return
        ParticleSampler.check(self, posterior)
        if self.stiffness is None or not self.stiffness > 0:
            raise InputError(
                "AFDPS with an operator that is not linear, or noise that is not Gaussian, needs stiffness > 0: the gain of "
                "the operator over the noise of the data, per unit of the latent"
            )

    def _linear(self, posterior: Posterior) -> bool:
        likelihood = posterior.likelihood
        if not isinstance(likelihood, GaussianLikelihood) or not posterior.prior.affine:
            return False
        operator = likelihood.operator
        parts = 2 if operator.range.complex else 1
        return isinstance(operator, LinearOperator) and operator.matched and parts * operator.range.size <= self.largest

    def sight(self, posterior: Posterior, k: int, draws: Draws) -> Sight:
        seen, sigma = self.seen(posterior), self.levels(posterior)[k]
        own = seen.squares.rsqrt()
        everywhere = torch.ones_like(own, dtype=torch.bool)
        return Sight(seen.value * own, own**2 + (self.gamma * sigma) ** 2, everywhere, ~everywhere)

    def look(self, posterior: Posterior, z: Tensor, level: Level) -> Look:
        if self._linear(posterior):
            return super().look(posterior, z, level)
        power = self._power(level.sigma)
        posterior.count("forward", len(z))
        with torch.no_grad():
            value = posterior.likelihood.log_prob(posterior.prior.decode(z)).double()
        return {"denoised": posterior.denoise(z, level.sigma), "log_psi": power * value}

    def _power(self, sigma: float) -> float:
        return 1 / (1 + (self.gamma * sigma * (self.stiffness or 0.0)) ** 2)

    def move(self, posterior: Posterior, z: Tensor, look: Look, level: Level) -> tuple[Tensor, Tensor]:
        if self._linear(posterior):
            return super().move(posterior, z, look, level)
        tau = 1 - (level.after / level.sigma) ** 2
        mean, width = z - tau * (z - look["denoised"]), level.after * math.sqrt(tau)
        if level.after == 0:
            return mean, torch.zeros(len(z), dtype=torch.float64)
        posterior.count("forward", len(z))
        posterior.count("adjoint", len(z))
        with torch.enable_grad():
            point = mean.detach().requires_grad_()
            value = posterior.likelihood.log_prob(posterior.prior.decode(point))
            (gradient,) = torch.autograd.grad(value.sum(), point)
        shift = self._power(level.after) * width**2 * gradient
        noise = level.normal(z)
        ratio = -dot(shift.double(), width * noise.double() + 0.5 * shift.double()) / width**2
        return mean + shift + width * noise, ratio.cpu()
