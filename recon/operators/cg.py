"""Conjugate gradients on a whole batch, each system on its own.

Solves ``K x = b`` for symmetric positive definite ``K`` acting on (n, ...): every inner product is per draw, and a draw that
has converged (or met a direction of less curvature than ``K`` can have, as the Jacobian of a learnt denoiser produces) keeps
its last iterate while the others go on.  So the answer for one draw does not depend on its company.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from recon.errors import InputError

_ROUNDING = 1e-3  # of sums over many float32 values, where K is all but ``least`` times the identity


@dataclass(frozen=True)
class CG:
    """How hard to try: at most ``iterations``, stop at ``|r| <= tolerance |b|`` (per draw)."""

    iterations: int = 30
    tolerance: float = 1e-6

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.tolerance < 0:
            raise InputError(f"CG needs iterations >= 1 and tolerance >= 0; got {self}")

    def solve(
        self, matvec: Callable[[Tensor], Tensor], b: Tensor, x0: Tensor | None = None, least: float = 0.0
    ) -> Tensor:
        """``x`` with ``matvec(x) = b``; all tensors (n, ...).

        least: a number that no eigenvalue of ``K`` can be below.  A step divides by the curvature ``p^T K p / p^T p``, so where
        ``K`` is not what it should be, a direction with less of it is noise made large, and the draw stops before it.
        """
        x = torch.zeros_like(b) if x0 is None else x0.clone()
        r = b.clone() if x0 is None else b - matvec(x0)
        p = r
        rr = dot(r, r)
        goal = self.tolerance**2 * dot(b, b)
        active = rr > goal
        for _ in range(self.iterations):
            if not bool(active.any()):
                break
            q = matvec(p)
            curvature = dot(p, q)
            active = active & (curvature > 0) & (curvature >= (1 - _ROUNDING) * least * dot(p, p))
            alpha = torch.where(active, rr / torch.where(active, curvature, 1.0), 0.0)
            x = x + spread(alpha, p) * p
            r = r - spread(alpha, q) * q
            new = dot(r, r)
            active = active & (new > goal)
            beta = torch.where(active, new / torch.where(rr > 0, rr, 1.0), 0.0)
            p = r + spread(beta, p) * p
            rr = new
        return x


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product per draw, of complex arrays the real part: (n, ...), (n, ...) -> (n,)."""
    if a.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    return (a * b).flatten(1).sum(1)


def spread(values: Tensor, like: Tensor) -> Tensor:
    """(n,) reshaped to (n, 1, ..., 1) so that it multiplies a batch like ``like``."""
    return values.reshape(-1, *([1] * (like.ndim - 1))).to(like.real.dtype)
