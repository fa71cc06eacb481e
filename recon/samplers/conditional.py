r"""Exact draws of an image that data and a Gaussian speak of.

All by perturbing and solving (Papandreou and Yuille 2010): with ``u`` a draw of the Gaussian ``N(c, C)`` and ``y'`` the data
with fresh noise added to them, for a linear operator ``H`` and noise covariance ``S``,

    z = u + C H^T (S + H C H^T)^-1 (y' - H u) = u + (C^-1 + H^T S^-1 H)^-1 H^T S^-1 (y' - H u)

is a draw of ``N(z; c, C) p(y | z)``, normalised.  Here ``H = A`` after the prior's affine decoder.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from recon.operators.algebra import Diagonal
from recon.operators.cg import CG, dot, spread
from recon.posterior import Posterior


class Noises(NamedTuple):
    """Standard normal numbers of one draw: latent (n, *latent.shape), data (n, *range.shape)."""

    latent: Tensor
    data: Tensor


def white_draw(posterior: Posterior, centre: Tensor, width: float, noises: Noises, cg: CG) -> Tensor:
    """A draw of ``N(z; centre, width^2 I) p(y | z)``, (n, *latent.shape): one solve with ``A^T S^-1 A + I / width^2``.

    For a linear operator, Gaussian noise and an affine decoder.
    """
    prior, likelihood = posterior.prior, posterior.likelihood.gaussian()
    operator = likelihood.linear("an exact draw")
    weight = (1 / likelihood.sigma**2).expand(operator.range.shape)
    start = centre + width * noises.latent
    residual = likelihood.y + likelihood.sigma * noises.data - posterior.forward(prior.decode(start))
    back = posterior.adjoint(operator, weight * residual)
    if prior.scale.ndim == 0:
        scale = float(prior.scale)
        return (
            start + operator.solve(back, 1 / (scale * width) ** 2, weight, cg=cg, watch=posterior.count_normal) / scale
        )
    # Fields in units of their own: solved in the latent, where the width is the same for all of them.
    scaled = operator @ Diagonal(prior.scale.to(start.dtype).expand(operator.domain.shape), operator.domain)
    back = prior.decode_linear(back)
    return start + scaled.solve(back, 1 / width**2, weight, cg=cg, watch=posterior.count_normal)


def matched_draw(posterior: Posterior, z: Tensor, sigma: float, noises: Noises, solvers: tuple[CG, int]) -> Tensor:
    """A draw of ``N(z0; D, sigma^2 J) p(y | z0)`` with mean and covariance of ``p(z0 | z)`` from the denoiser (Tweedie).

    solvers: of the data's system, and the iterations of ``square_root``.  The law of ``z0 | z, y`` itself for a Gaussian prior.
    """
    prior, likelihood = posterior.prior, posterior.likelihood.gaussian()
    operator, scale = likelihood.linear("an exact draw"), likelihood.sigma
    cg, iterations = solvers
    denoised, pull = posterior.linearize(z, sigma)
    start = denoised + sigma * square_root(pull, noises.latent, iterations)

    def back(u: Tensor) -> Tensor:  # sigma^2 J s A^T S^-1/2 u
        return sigma**2 * pull(prior.decode_linear(posterior.adjoint(operator, u / scale)))

    def matvec(u: Tensor) -> Tensor:
        return u + posterior.forward(prior.decode_linear(back(u))) / scale

    residual = (likelihood.y - posterior.forward(prior.decode(start))) / scale + noises.data
    return start + back(cg.solve(matvec, residual, least=1.0))


def square_root(matvec: Callable[[Tensor], Tensor], v: Tensor, iterations: int) -> Tensor:
    """``K^1/2 v`` for symmetric ``K >= 0``, each draw on its own: (n, ...) -> (n, ...).

    Lanczos with full orthogonalisation, ``|v| Q T^1/2 e_1``: exact once the Krylov space of ``v`` is exhausted, and quick to
    get there where the spectrum of ``K`` is a cluster or two.  Negative Ritz values (a learnt denoiser's) count as zero.
    """
    length = dot(v, v).sqrt()
    basis = [v / spread(torch.where(length > 0, length, 1.0), v)]
    diagonal: list[Tensor] = []
    beside: list[Tensor] = []
    for _ in range(iterations):
        w = matvec(basis[-1])
        diagonal.append(dot(w, basis[-1]))
        for _again in range(2):  # once is not enough in floating point
            for q in basis:
                w = w - spread(dot(w, q), w) * q
        size = dot(w, w).sqrt()
        # What is left of an exhausted space is rounding: zero from there on, which the square root does not see.
        largest = torch.stack(diagonal).abs().amax(0)
        left = size > 1e3 * torch.finfo(v.dtype).eps * largest
        beside.append(torch.where(left, size, 0.0))
        basis.append(torch.where(spread(left, w) > 0, w / spread(torch.where(left, size, 1.0), w), 0.0))
    tridiagonal = torch.stack(diagonal, 1), torch.stack(beside, 1)[:, :-1]
    coefficients = length[:, None] * _first_column_of_root(*tridiagonal)
    total = torch.zeros_like(v)
    for i in range(iterations):
        total = total + spread(coefficients[:, i], v) * basis[i]
    return total


def _first_column_of_root(diagonal: Tensor, beside: Tensor) -> Tensor:
    """``T^1/2 e_1`` of symmetric tridiagonal matrices: (n, k), (n, k - 1) -> (n, k)."""
    matrix = torch.diag_embed(diagonal) + torch.diag_embed(beside, 1) + torch.diag_embed(beside, -1)
    values, vectors = torch.linalg.eigh(matrix.double())
    root = values.clamp(min=0.0).sqrt()
    return (vectors * (root * vectors[:, 0])[:, None, :]).sum(2).to(diagonal.dtype)
