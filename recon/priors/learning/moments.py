r"""The Gaussian that explains a set of indirect measurements best: mean and low-rank-plus-diagonal covariance by exact EM.

Every object is :math:`x_i = m + W u_i + e_i` with ``u ~ N(0, I_r)`` and ``e ~ N(0, diag(psi))`` (factor analysis; Rubin and
Thayer 1982), seen as :math:`y_i = A_i x_i + n_i`.  Both ``u`` and ``x`` are latent.  With whitened operators and, per operator,

.. math::  B = I + A \Psi A^T = L L^T, \quad U = L^{-1} A, \quad V = U W, \quad G = I + V^T V, \quad r = L^{-1}(y - A m),

the law of the latents given ``y`` is, in closed form,

.. math::
    \bar u = G^{-1} V^T r, \quad \mathrm{Cov}\,u = G^{-1}, \quad \bar e = \Psi U^T (r - V \bar u), \quad
    \mathrm{Cov}(e, u) = -\Psi U^T V G^{-1}, \\
    \mathrm{Cov}\,e = \Psi - \Psi U^T U \Psi + \Psi U^T V G^{-1} V^T U \Psi,

and :math:`\log p(y) = -\frac12 (\log|B| + \log|G| + |r|^2 - (V^T r)^T G^{-1} V^T r) + const`.  The M-step is the regression of
``x`` on ``(u, 1)``.  No step samples, so the likelihood never falls, and a fixed point is a stationary point of it.

EM crawls where most of an object is unseen, so its steps are lengthened as long as the likelihood grows, and one that made it
fall is replaced by the plain step (adaptive overrelaxation, Salakhutdinov and Roweis 2003): still monotone, same fixed points.

Cost of an iteration: ``2 m^2 d`` multiplications per operator with ``m`` data and ``d`` unknowns, however many observations
share it; for images of some 50 x 50 pixels and less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from recon.draws import Draws
from recon.errors import InputError
from recon.likelihoods import GaussianLikelihood
from recon.operators.cg import CG
from recon.priors.gaussian import GaussianPrior
from recon.priors.learning.observations import Scan, require_observations, whitened
from recon.space import Space

_RIDGE = 1e-6  # of the mean information per value: what no observation sees stays at zero in the first guess
_GROWTH = 1.3  # of the step length after a step that raised the likelihood
_SMALLEST = 1e-6  # of the mean variance: diagonal variances are held above it


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums inside torch are split by the number of threads, which moves their last bits: here there is one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Moments:
    """``N(mean, factors factors^T + diag(diagonal))``: float64 (d,), (d, r), (d,), d values of the flattened object."""

    mean: Tensor
    factors: Tensor
    diagonal: Tensor

    def covariance(self) -> Tensor:
        """The covariance as a matrix (d, d)."""
        return self.factors @ self.factors.T + torch.diag(self.diagonal)

    def prior(self, space: Space) -> GaussianPrior:
        """The Gaussian as a prior over ``space``, with its covariance as a matrix."""
        return GaussianPrior(self.mean, self.covariance(), space)

    def tensors(self) -> dict[str, Tensor]:
        """Everything by name, for a file."""
        return {"mean": self.mean, "factors": self.factors, "diagonal": self.diagonal}


@dataclass(frozen=True)
class MomentFit:
    """Moments, and the log-likelihood of all data before each iteration and after the last."""

    moments: Moments
    log_likelihood: tuple[float, ...]


class _Sums(NamedTuple):
    """Expectations given the data, added over observations; ``dx = x - m`` with the mean before the step."""

    objects: float
    log_likelihood: float
    x: Tensor  # (d,)  E dx
    u: Tensor  # (r,)
    xu: Tensor  # (d, r)  E dx u^T
    uu: Tensor  # (r, r)
    xx: Tensor  # (d,)  E dx^2


class _Given(NamedTuple):
    """One operator under the moments of now: the symbols of the module's text."""

    matrix: Tensor
    lower: Tensor
    back: Tensor
    seen: Tensor
    gram: Tensor


def fit_moments(
    observations: Sequence[GaussianLikelihood],
    rank: int,
    iterations: int = 16,
    tolerance: float = 0.0,
    start: Moments | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> MomentFit:
    """Mean and covariance of maximum likelihood, by ``iterations`` of exact EM from ``start`` (default: ``first_guess``).

    rank: of the low-rank part, below the number of values.  tolerance: end when the log-likelihood per observation grows by
    less.  Diagonal variances are held above 1e-6 of the mean variance.

    Raises InputError for observations that do not fit together, a rank out of range, or a start of another shape.
    """
    space = require_observations(observations)
    if not 1 <= rank < space.size or iterations < 1:
        raise InputError(f"rank lies in 1 .. {space.size - 1} and iterations are at least 1; got {rank}, {iterations}")
    if start is not None and tuple(start.factors.shape) != (space.size, rank):
        raise InputError(f"start must have factors ({space.size}, {rank}); got {tuple(start.factors.shape)}")
    scans = whitened(observations)
    moments = first_guess(scans, rank) if start is None else start
    history: list[float] = []
    sure, stretch = moments, 1.0
    for iteration in range(iterations):
        sums = _expectations(moments, scans)
        if history and sums.log_likelihood < history[-1]:
            moments, stretch = sure, 1.0
            sums = _expectations(moments, scans)
        history.append(sums.log_likelihood)
        say(f"moments {iteration}: log-likelihood {sums.log_likelihood / sums.objects:.4f} per observation")
        if len(history) > 1 and history[-1] - history[-2] < tolerance * sums.objects:
            return MomentFit(moments, tuple(history))
        sure = _maximised(moments, sums)
        moments, stretch = _stretched(moments, sure, stretch), stretch * _GROWTH
    last = log_likelihood(moments, scans)
    if last < history[-1]:
        moments, last = sure, log_likelihood(sure, scans)
    return MomentFit(moments, (*history, last))


def first_guess(scans: Sequence[Scan], rank: int) -> Moments:
    """Where EM starts: least-squares mean, one variance for all values, factors from the spread of crude reconstructions."""
    d = scans[0].matrix.shape[1]
    rows = sum(len(scan.rows) for scan in scans)

    def normal(v: Tensor) -> Tensor:
        seen = torch.zeros_like(v)
        for scan in scans:
            matrix = scan.matrix.to(v.dtype)
            seen += len(scan.rows) * ((v @ matrix.T) @ matrix)
        return seen + ridge * v

    information = sum(len(scan.rows) * float(scan.matrix.double().square().sum()) for scan in scans)
    ridge = _RIDGE * information / d
    right = torch.stack([scan.data.sum(0) @ scan.matrix.double() for scan in scans]).sum(0)
    mean = CG(20, 1e-4).solve(normal, right[None])[0]
    square, freedom = 0.0, 0
    for scan in scans:
        square += float((scan.data - scan.matrix.double() @ mean).square().sum())
        freedom += scan.data.numel()
    variance = max(square - freedom, 1e-3 * square) / information
    plain = Moments(mean, mean.new_zeros(d, 1), torch.full_like(mean, variance))
    crude = _assembled(plain, scans, rows) - mean
    _, values, vectors = torch.linalg.svd(crude, full_matrices=False)
    kept = min(rank, len(values))
    factors = mean.new_zeros(d, rank)
    factors[:, :kept] = vectors[:kept].T * values[:kept] / rows**0.5
    # EM never leaves factors that are exactly zero.
    factors[:, kept:] = 1e-3 * variance**0.5 * Draws(0, range(rank - kept)).normal(0, (d,), dtype=mean.dtype).T
    return Moments(mean, factors, plain.diagonal)


def log_likelihood(moments: Moments, scans: Sequence[Scan]) -> float:
    """``sum_i log p(y_i)``."""
    return sum(_evidence(scan, _given(moments, scan.matrix), moments) for scan in scans)


def posterior_means(moments: Moments, observations: Sequence[GaussianLikelihood]) -> Tensor:
    """``E[x_i | y_i]``: float64 (n, d)."""
    return _assembled(moments, whitened(observations), len(observations))


def posterior_draws(moments: Moments, observations: Sequence[GaussianLikelihood], draws: Draws) -> Tensor:
    """One exact draw of ``p(x_i | y_i)`` per observation: float64 (n, d).  draws: one member per observation.

    A draw of the prior is corrected by what its simulated data miss of the measured ones (Matheron's rule).
    """
    if len(draws) != len(observations):
        raise InputError(f"one member per observation: {len(observations)}; got {len(draws)}")
    d, r = moments.factors.shape
    normal = draws.normal(0, (r + 2 * d,), "init", dtype=torch.float64)
    x = moments.mean + normal[:, :r] @ moments.factors.T + normal[:, r : r + d] * moments.diagonal.sqrt()
    for scan in whitened(observations):
        given = _given(moments, scan.matrix)
        simulated = x[scan.rows] @ given.matrix.T + normal[scan.rows, r + d : r + d + scan.matrix.shape[0]]
        x[scan.rows] += _correction(given, moments, scan.data - simulated)
    return x


def _given(moments: Moments, matrix: Tensor) -> _Given:
    matrix = matrix.double()
    spread = torch.eye(len(matrix), dtype=matrix.dtype) + (matrix * moments.diagonal) @ matrix.T
    lower = torch.linalg.cholesky(spread)
    back = torch.linalg.solve_triangular(lower, matrix, upper=False)
    seen = back @ moments.factors
    gram = torch.linalg.cholesky(torch.eye(seen.shape[1], dtype=matrix.dtype) + seen.T @ seen)
    return _Given(matrix, lower, back, seen, gram)


def _latents(given: _Given, residual: Tensor) -> tuple[Tensor, Tensor]:
    """``r`` (n, m) and the mean of ``u`` (n, r), for residuals ``y - A m`` (n, m)."""
    r = torch.linalg.solve_triangular(given.lower, residual.T, upper=False).T
    return r, torch.cholesky_solve((r @ given.seen).T, given.gram).T


def _correction(given: _Given, moments: Moments, residual: Tensor) -> Tensor:
    """``C A^T (A C A^T + I)^-1 residual``: (n, d)."""
    r, u = _latents(given, residual)
    return u @ moments.factors.T + ((r - u @ given.seen.T) @ given.back) * moments.diagonal


def _assembled(moments: Moments, scans: Sequence[Scan], count: int) -> Tensor:
    means = moments.mean.expand(count, -1).clone()
    for scan in scans:
        given = _given(moments, scan.matrix)
        means[scan.rows] += _correction(given, moments, scan.data - given.matrix @ moments.mean)
    return means


def _stretched(old: Moments, new: Moments, factor: float) -> Moments:
    """``old + factor (new - old)``, of the logarithm for variances; ``new`` itself for a factor of 1."""
    if factor == 1.0:
        return new
    ratio = (new.diagonal / old.diagonal) ** factor
    return Moments(
        old.mean + factor * (new.mean - old.mean),
        old.factors + factor * (new.factors - old.factors),
        old.diagonal * ratio,
    )


def _evidence(scan: Scan, given: _Given, moments: Moments) -> float:
    r, u = _latents(given, scan.data - given.matrix @ moments.mean)
    quadratic = r.square().sum() - (u * (r @ given.seen)).sum() + scan.lost.sum()
    logs = 2 * len(scan.rows) * (given.lower.diagonal().log().sum() + given.gram.diagonal().log().sum())
    return -0.5 * float(quadratic + logs) - len(scan.rows) * scan.constant


def _expectations(moments: Moments, scans: Sequence[Scan]) -> _Sums:
    """The E-step: exact, operator by operator in order."""
    d, rank = moments.factors.shape
    x, u = torch.zeros(d, dtype=torch.float64), torch.zeros(rank, dtype=torch.float64)
    eu, uu, ee = x.new_zeros(d, rank), x.new_zeros(rank, rank), x.new_zeros(d)
    total, count = 0.0, 0
    for scan in scans:
        n, given = len(scan.rows), _given(moments, scan.matrix)
        total += _evidence(scan, given, moments)
        count += n
        r, mean_u = _latents(given, scan.data - given.matrix @ moments.mean)
        mean_e = ((r - mean_u @ given.seen.T) @ given.back) * moments.diagonal
        width = torch.cholesky_inverse(given.gram)
        reach = (given.back.T @ given.seen) * moments.diagonal[:, None]  # Psi U^T V
        shared = reach @ width
        variance = moments.diagonal - moments.diagonal.square() * given.back.square().sum(0) + (shared * reach).sum(1)
        x += mean_e.sum(0)
        u += mean_u.sum(0)
        eu += mean_e.T @ mean_u - n * shared
        uu += mean_u.T @ mean_u + n * width
        ee += mean_e.square().sum(0) + n * variance
    w = moments.factors
    square = ee + 2 * (w * eu).sum(1) + ((w @ uu) * w).sum(1)
    return _Sums(float(count), total, x + w @ u, u, eu + w @ uu, uu, square)


def _maximised(moments: Moments, sums: _Sums) -> Moments:
    """The M-step: regression of ``x`` on ``(u, 1)``, and the variance of what is left over."""
    n, rank = sums.objects, len(sums.u)
    against = torch.cat([sums.xu, sums.x[:, None]], 1) / n
    second = torch.eye(rank + 1, dtype=torch.float64)
    second[:rank, :rank], second[:rank, rank], second[rank, :rank] = sums.uu / n, sums.u / n, sums.u / n
    weights = torch.linalg.solve(second, against.T).T
    left = sums.xx / n - (weights * against).sum(1)
    factors, step = weights[:, :rank], weights[:, rank]
    smallest = _SMALLEST * float((left.clamp(min=0) + factors.square().sum(1)).mean())
    return Moments(moments.mean + step, factors.contiguous(), left.clamp(min=smallest))
