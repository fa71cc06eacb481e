r"""Guidance through a decoder (Rout et al. 2023): DPS in the latent of an autoencoder, and its gluing term.

With the denoised latent ``D = D(z; sigma)``, ``x = decode(D)``, and, where the rows of ``A`` are orthonormal, the image ``x``
with the data put in, which encoded should be the latent again::

    r = y - A x                                           residual of the data
    g = s (D - encode(x + A^T r))                         residual of the gluing, s the prior's scale (r.m.s.)

``form="bayes"``: ``D_y = D + sigma^2 grad_z (omega log p(y | x) - gamma |g|^2 / (2 sigma_y^2))``, sigma_y the r.m.s. of the
data's noise.  ``form="norm"``, the published rule: a displacement ``- grad_z (omega |r| + gamma |g|)`` per draw and step,
for 1000 steps and rescaled by ``1000 / steps``, as ``DPS`` has it.  The measurement is the same at every step: the authors'
code adds fresh noise to ``A x``, which is noise that no likelihood has.

gamma = 0 is latent DPS; with an affine decoder that is ``DPS``, bit for bit.  There ``g = - A^T r`` too, so both residuals have
one norm.  With a decoder ``x = W z`` of orthonormal columns, ``encode = W^T``, latents N(0, s^2) and ``a`` a singular value of
``A W``, the draws of form "bayes" are as biased as those of DPS with weight ``omega + gamma a^2``: with
``q = (omega + gamma a^2) a^2 s^2 / sigma_y^2`` mean ``(y/a)(1 - e^-q)`` and variance ``s^2 (1 - e^-2q) / (2q)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from recon.draws import Draws
from recon.errors import InputError
from recon.operators.base import LinearOperator
from recon.operators.cg import dot
from recon.posterior import Posterior
from recon.samplers.base import Claim, GuidedSampler
from recon.samplers.dps import Form, Pull, pulled, reach, require_form
from recon.samplers.requirements import require_gaussian

_PROJECTOR = 1e-3  # relative error of A^T A A^T A = A^T A that rounding and interpolation may leave


@dataclass(frozen=True)
class LatentDPS(GuidedSampler):
    """Guidance by the decoded latent, differentiated through decoder and denoiser.

    omega: weight of the data (the zeta of the published rule).  gamma: weight of the gluing term, 0 without one; it encodes
    and so costs the encoder's gradient too.  guard: of form "bayes", shorten a pull that overshoots, as ``DPS`` does.
    """

    claim: ClassVar[Claim] = "heuristic"
    exact_for: ClassVar[str] = "nothing; biased as DPS is, and by what the autoencoder loses"
    needs: ClassVar[str] = (
        "differentiable operator, likelihood, decoder and denoiser; gamma: also an encoder, Gaussian noise, A with A A^T = I"
    )
    cost: ClassVar[str] = (
        "1 denoiser and decoder + their vjp + 1 (A, A^T) per step; guard: + decoder, 1 A; gamma: + encoder, 2 (A, A^T)"
    )
    advice: ClassVar[str] = (
        "guard: true, more steps or a smaller omega and gamma (form 'bayes' without guard is stable only while omega "
        "(sigma^2 - sigma_next^2) |A J|^2 / sigma_y^2 < 2, J that of decoder and denoiser), or form 'norm'"
    )

    steps: int = 1000
    form: Form = "bayes"
    omega: float = 1.0
    gamma: float = 0.0
    guard: bool = True

    def check(self, posterior: Posterior) -> None:
        super().check(posterior)
        if self.form not in ("bayes", "norm") or not self.omega > 0 or not self.gamma >= 0:
            raise InputError(
                f"LatentDPS takes form 'bayes' or 'norm', omega > 0 and gamma >= 0; got {self.form!r}, {self.omega} and "
                f"{self.gamma}"
            )
        require_form(posterior, self, self.form)
        if self.gamma > 0:
            require_gaussian(posterior, "LatentDPS(gamma > 0)")
            _orthonormal(posterior)

    def guide(self, posterior: Posterior, z: Tensor, sigma: float, sigma_next: float) -> Tensor:
        def glued(denoised: Tensor, x: Tensor) -> Tensor:
            return self.gamma / self.omega * self._gluing(posterior, denoised, x)

        more = glued if self.gamma > 0 else None
        how = Pull(self.form, self.omega, self.steps, reach(self, sigma, sigma_next) if self.guard else None)
        return pulled(posterior, z, (sigma, sigma_next), how, more)

    def _gluing(self, posterior: Posterior, denoised: Tensor, x: Tensor) -> Tensor:
        """``|g|^2 / (2 sigma_y^2)``, or ``|g|`` for the norm: (n,)."""
        like = posterior.likelihood.gaussian()
        for _ in range(2):  # there and back
            posterior.count_normal(len(x))
        g = gluing(posterior, denoised, x)
        if self.form == "norm":
            return torch.linalg.vector_norm(g.flatten(1), dim=1)  # whose gradient at zero is zero
        return 0.5 * dot(g, g) / like.sigma.square().mean()


def gluing(posterior: Posterior, denoised: Tensor, x: Tensor) -> Tensor:
    """``s (D - encode(x + A^T (y - A x)))`` for ``x = decode(D)``: (n, *latent.shape), in units of ``x``."""
    prior, like = posterior.prior, posterior.likelihood.gaussian()
    filled = x + like.linear("the gluing term").A_adjoint(like.residual(x))
    return prior.scale.square().mean().sqrt().to(x.real.dtype) * (denoised - prior.encode(filled))


def _orthonormal(posterior: Posterior) -> None:
    """InputError unless ``A^T A`` is a projector, tried on one vector."""
    operator: LinearOperator = posterior.likelihood.gaussian().linear("LatentDPS(gamma > 0)")
    domain, prior = operator.domain, posterior.prior
    kind = prior.dtype.to_complex() if domain.complex else prior.dtype
    probe = Draws(0, [0]).normal(0, domain.shape, "probe", dtype=kind).to(prior.device)
    once = operator.normal(probe)
    off = (operator.normal(once) - once).abs().square().sum().sqrt() / once.abs().square().sum().sqrt()
    if not float(off) <= _PROJECTOR:
        raise InputError(
            f"LatentDPS(gamma > 0) puts the data into an image as A^T y + (I - A^T A) x, for which A^T A has to be a "
            f"projector; that of {operator.describe()} is not (off by {float(off):.2g}). Use gamma = 0, or ReSample; where "
            "A A^T is a multiple of the identity, divide operator and data by the operator's norm."
        )
