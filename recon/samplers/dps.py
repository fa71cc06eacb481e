r"""Diffusion posterior sampling (Chung et al. 2023): the likelihood of the denoised point, differentiated through the denoiser.

``form="bayes"``: ``D_y = D + weight sigma^2 grad_z log p(y | x(D(z)))``.  It ignores the width of ``p(z0 | z)`` and so
over-weights the data; for a Gaussian prior N(0, s^2), ``y = a x + n``, ``r = weight a^2 s^2 / sigma_y^2`` the draws have, as
steps grow (ancestral transition), mean ``(y/a)(1 - e^-r)`` and variance ``s^2 (1 - e^-2r) / (2r)`` instead of
``(y/a) r/(1+r)`` and ``s^2/(1+r)``.

``form="norm"``: the published rule, a displacement ``-zeta grad |y - A x(D)|`` per draw and step (algorithm 1; in
variance-exploding coordinates divided by the scales ``1/sqrt(1 + sigma^2)`` of both levels), ``zeta = weight`` for 1000 steps
and rescaled by ``1000 / steps``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from recon.errors import InputError
from recon.operators.cg import dot
from recon.posterior import Posterior
from recon.samplers.base import Claim, GuidedSampler
from recon.samplers.requirements import require_gaussian
from recon.samplers.transitions import Ancestral


@dataclass(frozen=True)
class DPS(GuidedSampler):
    """Diffusion posterior sampling; takes any differentiable operator and likelihood."""

    claim: ClassVar[Claim] = "heuristic"
    exact_for: ClassVar[str] = "noise far above the signal; elsewhere biased as its module states"
    needs: ClassVar[str] = "differentiable operator, likelihood and denoiser"
    cost: ClassVar[str] = "1 denoiser + 1 vjp + 1 (A, A^T) per step"
    advice: ClassVar[str] = (
        "more steps or a smaller weight (form 'bayes' is stable only while weight (sigma^2 - sigma_next^2) |A J|^2 / sigma_y^2 "
        "< 2), or a method that solves for the data: MMPS, PiGDM, DiffPIR"
    )

    steps: int = 1000
    form: Literal["bayes", "norm"] = "bayes"
    weight: float = 1.0

    def check(self, posterior: Posterior) -> None:
        super().check(posterior)
        if self.form not in ("bayes", "norm") or not self.weight > 0:
            raise InputError(f"DPS takes form 'bayes' or 'norm' and weight > 0; got {self.form!r} and {self.weight}")
        if self.form == "norm":
            require_gaussian(posterior, "DPS(form='norm')")
            if not isinstance(self.transition, Ancestral):
                raise InputError(
                    "DPS(form='norm') is defined for the Ancestral transition; use form='bayes' with others"
                )

    def guide(self, posterior: Posterior, z: Tensor, sigma: float, sigma_next: float) -> Tensor:
        prior, likelihood = posterior.prior, posterior.likelihood
        for what in ("denoiser", "vjp", "forward", "adjoint"):
            posterior.count(what, len(z))
        with torch.enable_grad():
            point = z.detach().requires_grad_()
            denoised = prior.denoise(point, sigma)
            x = prior.decode(denoised)
            if self.form == "bayes":
                value = likelihood.log_prob(x)
            else:
                residual = require_gaussian(posterior, "DPS").residual(x)
                value = -dot(residual, residual).sqrt()
            (gradient,) = torch.autograd.grad(value.sum(), point)
        if self.form == "bayes":
            return denoised.detach() + self.weight * sigma**2 * gradient
        scales = math.sqrt((1 + sigma**2) * (1 + sigma_next**2))
        # The ancestral step moves by tau (D_y - z): divide so that the displacement is the published one.
        tau = 1 - (sigma_next / sigma) ** 2
        return denoised.detach() + self.weight * 1000 / self.steps * scales / tau * gradient
