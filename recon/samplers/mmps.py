r"""Moment-matching posterior sampling (Rozet et al. 2024).

``p(z0 | z)`` is approximated by a Gaussian with its own mean ``D`` and covariance ``C = sigma^2 J`` (Tweedie), so that for a
linear operator ``A`` (here with the prior's affine decoder folded in, ``x = b + s z``) and noise covariance ``S``::

    v   = (S + A s C s A^T)^-1 (y - A x(D))         # Krylov; one vjp of the denoiser per iteration
    D_y = D + sigma^2 J s A^T v                     # eq. 8 of the paper; no vjp of its own, as v is a sum of
                                                    # vectors whose pulls the iterations have made

The system is solved in whitened data, ``S^-1/2 ( . ) S^-1/2``.  J is symmetric for an exact denoiser, and its system positive:
CG (the paper's solver) is then the best there is.  A learnt J is neither at large noise, where ``sigma^2 J`` is its errors made
large, and the answer of CG can leave the data further away than no pull at all (of sea surface temperature seen through a blur,
in half of the evaluations, and some draws ended tens of kelvins off).  The default, ``galerkin``, is CG's answer as far as the
system shows itself to be what it should, and GMRES's, which never enlarges the residual, where it does not; it costs what
they do (``recon.operators.krylov``).  GMRES throughout is the safest and stops furthest from the answer.

``covariance="closed"`` puts ``C = (C_x^-1 + sigma^-2)^-1``, the answer of a Gaussian prior of covariance ``C_x``, in both
places (``sigma^2 J = C``): no network is differentiated; a step costs one evaluation and needs the memory of inference
alone.  ``C_x`` is the covariance of a Gaussian or mixture prior, else ``spread^2 I`` (see ``widths``); where the
true one is another, the draws are biased as those of PiGDM are.

An operator that is not linear is taken for its Jacobian at ``x(D)`` (one step of Gauss and Newton): not exact any more.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from recon.errors import InputError
from recon.operators.cg import CG
from recon.operators.krylov import combine, project
from recon.posterior import Posterior
from recon.samplers.base import Claim
from recon.samplers.matching import Local, MatchingSampler
from recon.samplers.widths import closed_covariance, prior_spread


@dataclass(frozen=True)
class MMPS(MatchingSampler):
    """Moment-matching posterior sampling; ``cg`` bounds the inner solve (K iterations cost K vjps per step).

    solver: galerkin, gmres or cg (one vjp more), within the limits ``cg``.  covariance: jacobian, or closed (no vjp; always
    solved by CG); see the module.  spread: standard deviation of the latent, for priors whose covariance is not known.
    """

    claim: ClassVar[Claim] = "exact"
    exact_for: ClassVar[str] = "Gaussian priors and linear Gaussian likelihoods, as steps and CG iterations grow"
    needs: ClassVar[str] = "Gaussian likelihood, differentiable denoiser; a nonlinear operator is linearised"
    cost: ClassVar[str] = "1 denoiser + K vjp + (K + 1) A + K A^T per step"
    advice: ClassVar[str] = "more cg iterations, or covariance: closed"

    cg: CG = field(default_factory=lambda: CG(iterations=5, tolerance=1e-4))
    solver: Literal["galerkin", "gmres", "cg"] = "galerkin"
    covariance: Literal["jacobian", "closed"] = "jacobian"
    spread: float | None = None

    @property
    def differentiates(self) -> bool:
        return self.covariance == "jacobian"

    def check(self, posterior: Posterior) -> None:
        super().check(posterior)
        if self.solver not in ("galerkin", "gmres", "cg") or self.covariance not in ("jacobian", "closed"):
            raise InputError(
                f"MMPS takes solver 'galerkin', 'gmres' or 'cg' and covariance 'jacobian' or 'closed'; "
                f"got {self.solver!r} and {self.covariance!r}"
            )
        if self.covariance == "closed":
            prior_spread(posterior.prior, self.spread, "MMPS(covariance='closed')")

    def correction(self, at: Local) -> Tensor:
        if at.pull is None:
            shrink = closed_covariance(at.posterior.prior, at.sigma, self.spread, "MMPS")
        else:
            pull, level = at.pull, at.sigma**2

            def shrink(u: Tensor) -> Tensor:
                return level * pull(u)

        def matvec(u: Tensor) -> Tensor:
            return u + at.forward(shrink(at.back(u)))

        if self.solver == "cg" or at.pull is None:
            return shrink(at.back(self.cg.solve(matvec, at.residual, least=1.0)))
        pulled: list[Tensor] = []

        def remembered(u: Tensor) -> Tensor:
            pulled.append(shrink(at.back(u)))
            return u + at.forward(pulled[-1])

        system = project(remembered, at.residual, self.cg)
        y = system.minimal()[0] if self.solver == "gmres" else system.galerkin(least=1.0)
        return combine(y, pulled, at.denoised)
