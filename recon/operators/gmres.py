r"""Generalised minimal residuals (Saad and Schultz 1986) on a whole batch, each system on its own.

Solves ``K x = b`` for any invertible ``K`` acting on (n, ...): what conjugate gradients need symmetric and positive (the
Jacobian of a learnt denoiser is neither, quite) may be anything here.  After ``k`` uses of ``K`` the answer has the smallest
residual of all ``x`` in ``span(b, K b, ..., K^(k-1) b)``.  Inner products are per draw, and a draw that has converged keeps its
answer, so the answer does not depend on the company.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from recon.operators.cg import CG, dot, spread


def gmres(matvec: Callable[[Tensor], Tensor], b: Tensor, limits: CG) -> Tensor:
    """``x`` with ``matvec(x) = b``, started at zero; all tensors (n, ...).

    limits: most uses of ``matvec`` (each keeps one more array like ``b``), and the relative residual that ends a draw's search.
    """
    scale = dot(b, b).sqrt()
    alive = scale > 0
    basis = [b / spread(torch.where(alive, scale, 1.0), b)]
    rotations: list[tuple[Tensor, Tensor]] = []
    columns: list[list[Tensor]] = []
    right = [scale]
    for _ in range(limits.iterations):
        if not bool(alive.any()):
            break
        w = matvec(basis[-1])
        size = dot(w, w).sqrt()
        column = []
        for v in basis:
            h = dot(v, w)
            column.append(h)
            w = w - spread(h, w) * v
        length = dot(w, w).sqrt()
        for i, (c, s) in enumerate(rotations):
            column[i], column[i + 1] = c * column[i] + s * column[i + 1], c * column[i + 1] - s * column[i]
        whole = torch.hypot(column[-1], length)
        alive = alive & (whole > 0)
        safe = torch.where(alive, whole, 1.0)
        c, s = column[-1] / safe, length / safe
        # A draw that has ended gets a row of the identity and no right-hand side: it adds nothing to its answer.
        column[-1] = torch.where(alive, whole, 1.0)
        column[:-1] = [torch.where(alive, h, 0.0) for h in column[:-1]]
        here = right[-1]
        right[-1:] = [torch.where(alive, c * here, 0.0), torch.where(alive, -s * here, 0.0)]
        rotations.append((c, s))
        columns.append(column)
        spent = length <= 1e-14 * size  # the Krylov space is invariant: the answer is exact
        alive = alive & (right[-1].abs() > limits.tolerance * scale) & ~spent
        basis.append(w / spread(torch.where(alive & (length > 0), length, 1.0), w))
    x = torch.zeros_like(b)
    coefficients: list[Tensor] = []
    for i in reversed(range(len(columns))):
        known = sum(
            (columns[j][i] * y for j, y in zip(range(len(columns) - 1, i, -1), coefficients, strict=True)), 0 * scale
        )
        coefficients.append((right[i] - known) / columns[i][i])
    for v, y in zip(basis, reversed(coefficients), strict=False):
        x = x + spread(y, v) * v
    return x
