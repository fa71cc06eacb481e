r"""Systems whose matrix should be symmetric and is not quite: GMRES, and the Galerkin answer as far as it can be trusted.

``K x = b`` with ``K`` acting on (n, ...); after ``k`` uses of ``K`` the answer lies in ``span(b, K b, ..., K^(k-1) b)``, of
which Arnoldi's process gives an orthonormal basis ``V`` and ``H = V^T K V``.  Two answers are classical (Saad 2003, ch. 6)::

    minimal residual (GMRES, Saad and Schultz 1986)     y_G = argmin |b - K V y|
    Galerkin         (FOM, Saad 1981)                   y_F = H^-1 V^T b

For a symmetric positive K the second is that of conjugate gradients: the smallest error in the norm of K, far better after few
steps where K is ill-conditioned.  But it divides by the small eigenvalues of ``H``, and those are noise where K is the Jacobian
of a learnt denoiser.  The first never enlarges the residual, whatever the matrix, and shrinks the answer.

``galerkin`` goes from the first towards the second.  What K ought to be is known: symmetric, no eigenvalue below ``least``.
The nearest such matrix to H (in the Frobenius norm) is its symmetric part with the eigenvalues raised to that; the rest, ``E``,
is error of K::

    y = y_G + t (y_F - y_G),     t in [0, 1] the largest with  |E y| <= |b - K V y_G|  and  |b - K V y| <= |b|

so the answer is no more uncertain, through the error of K, than GMRES is through having stopped, and is never further from a
solution than none at all.  Of a matrix without error it is that of CG while the residual has not grown; of one with much,
that of GMRES.

Inner products are per draw, and a draw that has converged adds nothing more, so the answer does not depend on the company.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recon.operators.cg import CG, dot, spread

Matvec = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Projected:
    """A system in its Krylov space; what is small is in float64 on the CPU.

    basis: k + 1 arrays like b.  h: (n, k + 1, k).  scale: |b|, (n,).  r, g: ``h`` made triangular by rotations, and what they
    make of ``|b| e_1``: (n, k, k), (n, k).  Columns of a draw that had converged are zero, and in ``r`` of the identity.
    """

    basis: list[Tensor]
    h: Tensor
    scale: Tensor
    r: Tensor
    g: Tensor

    @property
    def right(self) -> Tensor:
        """``|b| e_1``: (n, k + 1, 1)."""
        return torch.eye(self.h.shape[1], 1, dtype=torch.float64) * self.scale[:, None, None]

    def minimal(self) -> tuple[Tensor, Tensor]:
        """``y_G`` and its residual: (n, k, 1), (n, k + 1, 1)."""
        y = torch.linalg.solve_triangular(self.r, self.g[..., None], upper=True)
        return y, self.right - self.h @ y

    def galerkin(self, least: float = 0.0) -> Tensor:
        """``y`` of the module's text: (n, k, 1).  least: a number that no eigenvalue of ``K`` can be below."""
        y, residual = self.minimal()
        k = self.h.shape[2]
        ended = (self.h == 0).all(1)  # of a draw that had converged: a row of its own, and no right-hand side
        square = self.h[:, :k].masked_fill(ended[..., None], 0.0) + torch.diag_embed(ended * (1.0 + least)).double()
        other, fault = torch.linalg.solve_ex(square, self.right[:, :k])
        step = torch.where((fault == 0)[:, None, None] & other.isfinite(), other - y, 0.0)
        error = _error(square, least)
        sure = _largest((error @ y)[..., 0], (error @ step)[..., 0], residual.square().sum((1, 2)))
        near = _largest(residual[..., 0], (self.h @ step)[..., 0], self.scale**2)
        return y + torch.minimum(sure, near)[:, None, None] * step


def project(matvec: Matvec, b: Tensor, limits: CG) -> Projected:
    """Arnoldi's process, until every draw's smallest residual is below ``limits.tolerance`` or the iterations are spent."""
    most = limits.iterations
    h = torch.zeros(len(b), most + 1, most, dtype=torch.float64)
    r, g = torch.zeros(len(b), most, most, dtype=torch.float64), torch.zeros(len(b), most, dtype=torch.float64)
    r.diagonal(dim1=1, dim2=2).fill_(1.0)
    length = dot(b, b).sqrt()
    basis, scale, used = [_unit(b, length)], length.double().cpu(), 1
    left, alive = scale, scale > 0
    rotations: list[tuple[Tensor, Tensor]] = []
    for j in range(most):
        if not bool(alive.any()):
            break
        used = j + 1
        w = matvec(basis[-1])
        shares = []
        for v in basis:
            shares.append(dot(v, w))
            w = w - spread(shares[-1], w) * v
        length = dot(w, w).sqrt()
        h[:, : j + 2, j] = torch.stack([*shares, length], 1).double().cpu()  # one copy: a device is waited for once a step
        column = _rotated(h[:, : j + 2, j], rotations)
        whole = torch.hypot(column[:, j], column[:, j + 1])
        new = whole > 0
        c, s = (torch.where(new, column[:, i] / torch.where(new, whole, 1.0), 0.0) for i in (j, j + 1))
        column[:, j] = torch.where(new, whole, 1.0)
        r[:, : j + 1, j], g[:, j], left = column[:, : j + 1], c * left, torch.where(new, -s * left, left)
        rotations.append((c, s))
        alive = alive & (left.abs() > limits.tolerance * scale)
        basis.append(_unit(w, torch.where(alive.to(length.device), length, 0.0)))
    return Projected(basis, h[:, : used + 1, :used], scale, r[:, :used, :used], g[:, :used])


def gmres(matvec: Matvec, b: Tensor, limits: CG) -> Tensor:
    """``x`` with ``matvec(x) = b`` of the smallest residual; all tensors (n, ...).

    limits: most uses of ``matvec`` (each keeps one more array like ``b``), and the relative residual that ends a draw's search.
    """
    system = project(matvec, b, limits)
    return combine(system.minimal()[0], system.basis, b)


def galerkin(matvec: Matvec, b: Tensor, limits: CG, least: float = 0.0) -> Tensor:
    """``x`` with ``matvec(x) = b``, as far from GMRES towards CG as K can be trusted; all tensors (n, ...).

    limits: as of ``gmres``.  least: a number that no eigenvalue of ``K`` can be below.
    """
    system = project(matvec, b, limits)
    return combine(system.galerkin(least), system.basis, b)


def combine(y: Tensor, arrays: Sequence[Tensor], like: Tensor) -> Tensor:
    """``sum_i y_i arrays_i`` per draw: (n, k, 1) and arrays like ``like``, (n, ...); zero of none.

    Of the basis it is the solution ``V y``; of what a linear map makes of the basis, what it makes of the solution.
    """
    x = torch.zeros_like(like)
    for v, weight in zip(arrays, y[..., 0].to(like.device).unbind(1), strict=False):
        x = x + spread(weight, v) * v
    return x


def _error(square: Tensor, least: float) -> Tensor:
    """``square`` less the nearest symmetric matrix without eigenvalues below ``least``: (n, k, k)."""
    middle = (square + square.mT) / 2
    error = square - middle
    # Eigenvalues of ``least`` itself are common (what is not measured has them): rounding does not put them below.
    bound = least - 1e-12 * middle.diagonal(dim1=1, dim2=2).abs().sum(1)
    low = torch.linalg.cholesky_ex(middle - torch.diag_embed(bound[:, None].expand(-1, middle.shape[1]))).info > 0
    low &= middle.isfinite().all(2).all(1)  # a draw that has diverged stays what it is: the sampler's to name
    if bool(low.any()):
        values, vectors = torch.linalg.eigh(middle[low])
        error[low] = square[low] - (vectors * values.clamp(min=least)[:, None]) @ vectors.mT
    return error


def _rotated(column: Tensor, rotations: list[tuple[Tensor, Tensor]]) -> Tensor:
    """A new column of ``h`` after the Givens rotations of those before it: (n, j + 2), a copy."""
    column = column.clone()
    for i, (c, s) in enumerate(rotations):
        a, b = column[:, i].clone(), column[:, i + 1].clone()
        column[:, i], column[:, i + 1] = c * a + s * b, c * b - s * a
    return column


def _largest(start: Tensor, change: Tensor, most: Tensor) -> Tensor:
    """The largest t in [0, 1] with ``|start + t change|^2 <= most``, 0 where there is none; (n, m), (n, m), (n,) -> (n,)."""
    a, half, over = change.square().sum(1), (start * change).sum(1), start.square().sum(1) - most
    root = (half.square() - a * over).clamp(min=0).sqrt() - half
    return torch.where(over > 0, 0.0, torch.where(root < a, root / a, 1.0))


def _unit(v: Tensor, length: Tensor) -> Tensor:
    """``v`` divided by ``length`` per draw; zero where that is zero."""
    inverse = torch.where(length > 0, 1 / torch.where(length > 0, length, 1.0), 0.0)
    return spread(inverse, v) * v
