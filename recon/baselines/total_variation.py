r"""Total-variation reconstruction, each measurement on its own.

Total variation is isotropic, forward differences of neighbouring values along the last two axes, nothing beyond the border:
``TV(x) = sum_ij sqrt((x[i+1,j] - x[i,j])^2 + (x[i,j+1] - x[i,j])^2)``, in the unit of ``x``.

The solver is the primal-dual iteration of Chambolle and Pock (2011, algorithm 1).  It is written here, in a few lines, because
the ready-made ones stop on a norm over the whole batch (so a neighbour would change an answer) or denoise only.  Its one
free number, the ratio of image to dual steps, follows from the scale of the answer: ``t = 0.3 |x| / (|A / sigma| sqrt(m))``,
``sqrt(m)`` being the size that the whitened residual of m data has.  Scanned from 0.03 to 3 over 15 to 120 views, noise
levels and weights, 0.3 was best or near it; adapting it during the run (Goldstein et al. 2013) was not faster.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from recon.errors import InputError
from recon.operators.base import LinearOperator
from recon.operators.cg import dot, spread

_CHECK_EVERY = 10  # iterations between convergence tests
_BALANCE = 0.3


@dataclass(frozen=True)
class TVSolver:
    """How hard to try: stop at ``tolerance`` (see ``tv``), at most ``iterations``; ``nonnegative`` keeps ``x >= 0``."""

    iterations: int = 2000
    tolerance: float = 1e-2
    nonnegative: bool = True

    def __post_init__(self) -> None:
        if self.iterations < 1 or not self.tolerance > 0:
            raise InputError(f"TVSolver needs iterations >= 1 and tolerance > 0; got {self}")


@dataclass(frozen=True)
class TVResult:
    """Images and how they were obtained.

    x: (n, *domain.shape).  objective: its value per image, (n,).  error: first-order bound of the objective's relative error,
    (n,).  iterations: used by each, (n,).  converged: whether ``error`` met the tolerance, (n,).
    """

    x: Tensor
    objective: Tensor
    error: Tensor
    iterations: Tensor
    converged: Tensor


def total_variation(x: Tensor) -> Tensor:
    """Isotropic total variation per image: (n, ..., y, x) -> (n,), in the unit of ``x``."""
    return _differences(x).square().sum(0).sqrt().flatten(1).sum(1)


def tv(
    operator: LinearOperator, y: Tensor, sigma: float | Tensor, weight: float, solver: TVSolver | None = None
) -> TVResult:
    r"""Total-variation reconstruction: ``argmin_x 1/2 |(A x - y)/sigma|^2 + weight TV(x)``, with ``x >= 0`` unless told not to.

    y: (n, \*range.shape).  sigma: standard deviation of the noise, one number or \*range.shape.  weight: per unit of ``x``
    (m for attenuation), so that ``weight TV`` is a negative log-probability like the data term.

    Stops an image when its optimality conditions hold: with ``r_p``, ``r_d`` the residuals of the primal and dual inclusion,
    ``|r_p| |x| + |r_d| |dual| <= tolerance * objective``.  The left side bounds the objective's error to first order; measured
    on phantoms (15 to 120 views, weights a hundredfold apart) the default 1e-2 left an error of 1e-3 to 1e-6.
    Raises InputError for sigma or weight that are not positive, or a shape that does not fit.
    """
    sigma = torch.as_tensor(sigma, dtype=y.dtype, device=y.device)
    if sigma.ndim and tuple(sigma.shape) != operator.range.shape:
        raise InputError(
            f"sigma must be one number or one per datum {operator.range.describe()}; got {tuple(sigma.shape)}"
        )
    if not bool((sigma > 0).all()) or not bool(torch.isfinite(sigma).all()):
        raise InputError("sigma, the standard deviation of the noise, must be positive and finite everywhere")
    if not 0 < weight < math.inf:
        raise InputError(f"weight of the total variation must be positive; got {weight}")
    batch = operator.range.require(tuple(y.shape), "tv")
    if len(batch) != 1:
        raise InputError(f"tv takes measurements (n, {operator.range.describe()}); got shape {tuple(y.shape)}")
    if len(operator.domain.shape) < 2:
        raise InputError(f"total variation needs images with at least two axes; got {operator.domain.describe()}")
    return _Problem(operator, sigma, float(weight), solver or TVSolver()).solve(y / sigma)


@dataclass(frozen=True)
class _Iterate:
    """Image ``x``, its projection ``Kx``, both extrapolated (``ahead``: twice this less the one before), duals p and q."""

    x: Tensor
    Kx: Tensor
    ahead: Tensor
    K_ahead: Tensor
    p: Tensor
    q: Tensor

    def only(self, keep: Tensor) -> _Iterate:
        x, Kx, ahead, K_ahead, p = (part[keep] for part in (self.x, self.Kx, self.ahead, self.K_ahead, self.p))
        return _Iterate(x, Kx, ahead, K_ahead, p, self.q[:, keep])


@dataclass(frozen=True)
class _Problem:
    """``min 1/2 |K x - y|^2 + weight |D x|_{2,1}``: ``K = A / sigma``, ``D`` the differences, ``y`` whitened too.

    Steps: ``t`` for the image, ``s_p = 1/(2 t |K|^2)`` and ``s_q = 1/(2 t 8)`` for the duals, so that
    ``t (s_p |K|^2 + s_q |D|^2) <= 1``.
    """

    operator: LinearOperator
    sigma: Tensor
    weight: float
    solver: TVSolver

    def K(self, x: Tensor) -> Tensor:
        return self.operator.A(x) / self.sigma

    def KT(self, p: Tensor) -> Tensor:
        return self.operator.A_adjoint(p / self.sigma)

    def norm(self, like: Tensor) -> float:
        """``|K|``: power iteration comes from below, so 2 % are added."""
        x = torch.linspace(0.9, 1.1, self.operator.domain.size).to(like).reshape(1, *self.operator.domain.shape)
        for _ in range(30):
            x = self.KT(self.K(x / x.norm()))
        return 1.02 * float(x.norm().sqrt())

    def start(self, y: Tensor) -> _Iterate:
        """The best multiple of ``K^T y``, and zero duals."""
        b = self.KT(y)
        Kb = self.K(b)
        scale = dot(b, b) / dot(Kb, Kb).clamp(min=torch.finfo(y.dtype).tiny)
        x = self.feasible(spread(scale, b) * b)
        Kx = self.K(x)
        return _Iterate(x, Kx, x, Kx, torch.zeros_like(y), torch.zeros_like(_differences(x)))

    def feasible(self, x: Tensor) -> Tensor:
        return x.clamp(min=0) if self.solver.nonnegative else x

    def solve(self, y: Tensor) -> TVResult:
        norm, now = self.norm(y), self.start(y)
        size = dot(now.x, now.x).sqrt()
        step = _BALANCE * torch.where(size > 0, size, 1.0) / (norm * math.sqrt(self.operator.range.size))
        steps = _Steps(step, 1 / (2 * step * norm**2), 1 / (16 * step))
        none = torch.zeros_like(step)
        result = TVResult(now.x.clone(), none.clone(), none.clone(), none.long(), none.bool())
        working = torch.arange(len(y), device=y.device)  # images that have not converged; the others leave the batch
        for k in range(1, self.solver.iterations + 1):
            before, now = now, self.iterate(now, y, steps)
            if k % _CHECK_EVERY and k != self.solver.iterations:
                continue
            value = 0.5 * dot(now.Kx - y, now.Kx - y) + self.weight * total_variation(now.x)
            bound = self.bound(before, now, steps)
            done = bound <= self.solver.tolerance * value
            for all_, part in (
                (result.x, now.x),
                (result.objective, value),
                (result.error, bound / torch.where(value > 0, value, 1.0)),
                (result.iterations, torch.full_like(working, k)),
                (result.converged, done),
            ):
                all_[working] = part
            working, y, steps, now = working[~done], y[~done], steps.only(~done), now.only(~done)
            if len(working) == 0:
                break
        return result

    def iterate(self, now: _Iterate, y: Tensor, steps: _Steps) -> _Iterate:
        """Duals at the extrapolated image, then the image."""
        t, s_p, s_q = steps.spread(now)
        p = (now.p + s_p * (now.K_ahead - y)) / (1 + s_p)
        q = now.q + s_q * _differences(now.ahead)
        q = q / (q.square().sum(0).sqrt() / self.weight).clamp(min=1)
        x = self.feasible(now.x - t * (self.KT(p) + _differences_transposed(q)))
        Kx = self.K(x)
        return _Iterate(x, Kx, 2 * x - now.x, 2 * Kx - now.Kx, p, q)

    def bound(self, before: _Iterate, now: _Iterate, steps: _Steps) -> Tensor:
        """``|r_p| |x| + |r_d| |dual|``, what the last iteration left of the two inclusions.

        Its image step put ``(x' - x)/t - K^T p - D^T q`` into the subgradient of the constraint at ``x``, so
        ``r_p = (x' - x)/t``; its dual step put ``(p' - p)/s_p + K ahead' - y`` where ``K x - y`` should stand, so
        ``r_d = (p' - p)/s_p + K (ahead' - x)``, and the same for ``q`` (primes: ``before``).
        """
        t, s_p, s_q = steps.spread(now)
        r_x = (before.x - now.x) / t
        r_p = (before.p - now.p) / s_p + before.K_ahead - now.Kx
        r_q = (before.q - now.q) / s_q + _differences(before.ahead - now.x)
        return (
            (dot(r_x, r_x) * dot(now.x, now.x)).sqrt()
            + (dot(r_p, r_p) * dot(now.p, now.p)).sqrt()
            + _size(r_q) * _size(now.q)
        )


@dataclass(frozen=True)
class _Steps:
    """Step sizes per image: of ``x``, ``p`` and ``q``, (n,) each."""

    x: Tensor
    p: Tensor
    q: Tensor

    def only(self, keep: Tensor) -> _Steps:
        return _Steps(self.x[keep], self.p[keep], self.q[keep])

    def spread(self, like: _Iterate) -> tuple[Tensor, Tensor, Tensor]:
        return spread(self.x, like.x), spread(self.p, like.p), spread(self.q, like.x)


def _size(q: Tensor) -> Tensor:
    return q.square().sum(0).flatten(1).sum(1).sqrt()


def _differences(x: Tensor) -> Tensor:
    """Forward differences along the last two axes, zero at the far border: (2, *x.shape)."""
    g = x.new_zeros(2, *x.shape)
    g[0, ..., :-1, :] = x[..., 1:, :] - x[..., :-1, :]
    g[1, ..., :-1] = x[..., 1:] - x[..., :-1]
    return g


def _differences_transposed(g: Tensor) -> Tensor:
    """The transpose of ``_differences``: (2, *image) -> (*image)."""
    x = torch.zeros_like(g[0])
    x[..., 1:, :] += g[0, ..., :-1, :]
    x[..., :-1, :] -= g[0, ..., :-1, :]
    x[..., 1:] += g[1, ..., :-1]
    x[..., :-1] -= g[1, ..., :-1]
    return x
