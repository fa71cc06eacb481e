r"""Tweedie moment projected diffusions (Boys et al. 2023): formula (G) of ``matching`` with the row sums of the covariance.

    rows="data":     I + B C B^T  :=  diag( 1 + B (sigma^2 J) B^T 1 ),  B = S^-1/2 A s    # one more vjp, no system
    rows="latent":   C := diag( sigma^2 J 1 ), and the system is solved by CG
    D_y = D + sigma^2 J^T s A^T ( . )^-1 (y - A x(D))

Row sums are the diagonal where the matrix is diagonal: "latent" is exact for Gaussian priors with a diagonal covariance and any
operator, "data" (the published form) where ``A s C s A^T`` is diagonal too (masks, point sensors, means over separate cells).
Ones are in units of the noise: for data of one noise this is the published form, and of fields with units of their own it
adds what can be added.  Where values are correlated a row sum is up to as many times the variance as there are correlated
values, so data are weighed too little at high levels.  Where all correlations are positive, ``diag(row sums) - matrix`` has no
negative eigenvalue and steps of any length are stable; where some are not (several variables, data that are no means; learnt
Jacobians), sums may be far below the variance or negative, which counts as zero, and the published pull overshoots: ``guard``
shortens it (``matching.guarded``).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from recon.errors import InputError
from recon.operators.cg import CG
from recon.posterior import Posterior
from recon.samplers.base import Claim
from recon.samplers.matching import Local, MatchingSampler, guarded


@dataclass(frozen=True)
class TMPD(MatchingSampler):
    """Moment matching by row sums: two vjps per step.

    rows: of which matrix.  guard: shorten a pull that overshoots.  cg: of the system that "latent" solves.
    """

    claim: ClassVar[Claim] = "heuristic"
    exact_for: ClassVar[str] = "Gaussian priors with diagonal covariance (rows: data also needs A C A^T diagonal)"
    needs: ClassVar[str] = "Gaussian likelihood, differentiable denoiser; a nonlinear operator is linearised"
    cost: ClassVar[str] = "1 denoiser + 2 vjp + (3 A, 2 A^T) per step"
    advice: ClassVar[str] = "guard: true, rows: latent, or more steps"

    rows: Literal["data", "latent"] = "data"
    guard: bool = True
    cg: CG = field(default_factory=lambda: CG(iterations=30, tolerance=1e-5))

    def check(self, posterior: Posterior) -> None:
        super().check(posterior)
        if self.rows not in ("data", "latent"):
            raise InputError(f"TMPD takes rows 'data' or 'latent'; got {self.rows!r}")

    def correction(self, at: Local) -> Tensor:
        assert at.pull is not None  # it always differentiates
        level = at.sigma**2
        if self.rows == "latent":
            width = (level * at.pull(torch.ones_like(at.denoised))).clamp(min=0)
            v = self.cg.solve(lambda u: u + at.forward(width * at.back(u)), at.residual)
        else:
            ones = torch.ones_like(at.residual)
            ones = torch.complex(ones.real, ones.real) if ones.is_complex() else ones
            v = _divided(at.residual, at.forward(level * at.pull(at.back(ones))))
        pulled = level * at.pull(at.back(v))
        return guarded(at, v, pulled) if self.guard else pulled


def _divided(residual: Tensor, sums: Tensor) -> Tensor:
    """``r / (1 + sums)`` with negative sums as zero, of complex data in each part."""
    if not residual.is_complex():
        return residual / (1 + sums.clamp(min=0))
    parts = torch.view_as_real(residual) / (1 + torch.view_as_real(sums).clamp(min=0))
    return torch.view_as_complex(parts)
