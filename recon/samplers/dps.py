r"""Diffusion posterior sampling (Chung et al. 2023): the likelihood of the denoised point, differentiated through the denoiser.

``form="bayes"``: ``D_y = D + weight sigma^2 grad_z log p(y | x(D(z)))``.  It ignores the width of ``p(z0 | z)`` and so
over-weights the data; for a Gaussian prior N(0, s^2), ``y = a x + n``, ``r = weight a^2 s^2 / sigma_y^2`` the draws have, as
steps grow (ancestral transition), mean ``(y/a)(1 - e^-r)`` and variance ``s^2 (1 - e^-2r) / (2r)`` instead of
``(y/a) r/(1+r)`` and ``s^2/(1+r)``.

Where the data are precise, explicit steps of that pull ``p = D_y - D`` overshoot and diverge.  ``guard`` shortens a pull
whose step ``tau p`` would take D past where the log-likelihood ``L`` is best along it, by a parabola (``tau``: how much of D_y
a step takes in, ``1 - (sigma_next / sigma)^2`` of an ancestral one)::

    p <- min(1, t / tau) p,      t = <grad_D L, p> / 2 (<grad_D L, p> + L(D) - L(D + p))

As steps grow nothing is shortened, so the bias is the one above.  It costs an evaluation of the operator.  A pull to where the
likelihood is no number any more is shortened until it is one.

``form="norm"``: the published rule, a displacement ``-zeta grad |y - A x(D)|`` per draw and step (algorithm 1; in
variance-exploding coordinates divided by the scales ``1/sqrt(1 + sigma^2)`` of both levels), ``zeta = weight`` for 1000 steps
and rescaled by ``1000 / steps``.  Nothing guards it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from recon.errors import InputError
from recon.operators.cg import dot
from recon.operators.cg import spread as over
from recon.posterior import Posterior
from recon.samplers.base import Claim, GuidedSampler
from recon.samplers.requirements import require_gaussian
from recon.samplers.transitions import Ancestral, Leg

Form = Literal["bayes", "norm"]
_SHRINKS = 16  # by 2^-4 each, until the log-likelihood of where a pull leads is a number


@dataclass(frozen=True)
class Pull:
    """How the data pull: form, weight, steps of the walk (for form norm), ``reach`` of a step if guarded (form bayes)."""

    form: Form
    weight: float
    steps: int
    reach: float | None


@dataclass(frozen=True)
class DPS(GuidedSampler):
    """Diffusion posterior sampling; takes any differentiable operator and likelihood.

    guard: of form "bayes", shorten a pull that overshoots; see the module.
    """

    claim: ClassVar[Claim] = "heuristic"
    exact_for: ClassVar[str] = "noise far above the signal; elsewhere biased as its module states"
    needs: ClassVar[str] = "differentiable operator, likelihood and denoiser"
    cost: ClassVar[str] = "1 denoiser + 1 vjp + 1 (A, A^T) per step; guard: + 1 A"
    advice: ClassVar[str] = (
        "guard: true, more steps or a smaller weight (form 'bayes' without guard is stable only while weight (sigma^2 - "
        "sigma_next^2) |A J|^2 / sigma_y^2 < 2), or a method that solves for the data: MMPS, PiGDM, DiffPIR"
    )

    steps: int = 1000
    form: Form = "bayes"
    weight: float = 1.0
    guard: bool = True

    def check(self, posterior: Posterior) -> None:
        super().check(posterior)
        if self.form not in ("bayes", "norm") or not self.weight > 0:
            raise InputError(f"DPS takes form 'bayes' or 'norm' and weight > 0; got {self.form!r} and {self.weight}")
        require_form(posterior, self, self.form)

    def guide(self, posterior: Posterior, z: Tensor, sigma: float, sigma_next: float) -> Tensor:
        how = Pull(self.form, self.weight, self.steps, reach(self, sigma, sigma_next) if self.guard else None)
        return pulled(posterior, z, (sigma, sigma_next), how)


def reach(sampler: GuidedSampler, sigma: float, sigma_next: float) -> float:
    """How much of ``D_y`` a step takes in: ``1 - (sigma_next / sigma)^2`` of an ancestral one, 1 where all noise is renewed."""
    zero, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    leg = Leg((sigma, sigma_next, 0.0), 0, lambda *_: one, zero)
    return float(sampler.transition.advance(zero, {}, leg)[0])


def require_form(posterior: Posterior, sampler: GuidedSampler, form: str) -> None:
    """InputError where the form "norm" cannot be had: without Gaussian noise, or with another transition than its own."""
    if form == "norm":
        user = f"{type(sampler).__name__}(form='norm')"
        require_gaussian(posterior, user)
        if not isinstance(sampler.transition, Ancestral):
            raise InputError(f"{user} is defined for the Ancestral transition; use form='bayes' with others")


def pulled(
    posterior: Posterior,
    z: Tensor,
    levels: tuple[float, float],
    how: Pull,
    more: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """``D_y`` of the module docstring at ``levels`` (sigma, that after it).

    more: of D and x(D), (n,), taken from the log-likelihood (or minus the norm) before it is differentiated.
    """
    prior, likelihood = posterior.prior, posterior.likelihood
    posterior.count("denoiser", len(z))
    posterior.count("vjp", len(z))
    posterior.count_normal(len(z))
    sigma, sigma_next = levels

    def value_at(denoised: Tensor) -> Tensor:
        x = prior.decode(denoised)
        if how.form == "bayes":
            value = likelihood.log_prob(x)
        else:
            residual = likelihood.gaussian().residual(x)
            value = -dot(residual, residual).sqrt()
        return value if more is None else value - more(denoised, x)

    with torch.enable_grad():
        point = z.detach().requires_grad_()
        denoised = prior.denoise(point, sigma)
        value = value_at(denoised)
        slope, gradient = torch.autograd.grad(value.sum(), (denoised, point))
    denoised = denoised.detach()
    if how.form == "norm":  # divide so that the displacement is the published one
        scales, tau = math.sqrt((1 + sigma**2) * (1 + sigma_next**2)), 1 - (sigma_next / sigma) ** 2
        return denoised + how.weight * 1000 / how.steps * scales / tau * gradient
    pull = how.weight * sigma**2 * gradient
    if how.reach is None:
        return denoised + pull
    for _ in range(_SHRINKS):
        posterior.count("forward", len(z))
        ahead = value_at(denoised + pull).detach()
        if bool(ahead.isfinite().all()):
            break
        pull = over(torch.where(ahead.isfinite(), 1.0, 2.0**-4), pull) * pull
    rise = dot(slope, pull)
    best = rise / (2 * (rise + value.detach() - ahead))
    share = torch.where((best > 0) & (best < how.reach), best / how.reach, torch.ones_like(best))
    return denoised + over(share, pull) * pull
