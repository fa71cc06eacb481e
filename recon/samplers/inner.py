r"""Langevin steps on a density whose logarithm and gradient are at hand; the inner kernel of several samplers.

    z' = z + eta grad log p(z) + sqrt(2 eta) xi

Unadjusted, its stationary law for a Gaussian of precision ``Q`` has covariance ``Q^-1 (1 - eta Q / 2)^-1``.  With
``metropolis`` each step is accepted with probability ``min(1, p(z') q(z | z') / p(z) q(z' | z))`` (Roberts and Tweedie 1996)
and the law is exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from recon.draws import Draws
from recon.errors import InputError
from recon.operators.cg import dot, spread
from recon.posterior import Posterior
from recon.samplers.decoupled import noise

Target = Callable[[Tensor], tuple[Tensor, Tensor]]
"""``z -> (log p(z), its gradient)``: (n, ...) -> (n,), (n, ...)."""


@dataclass(frozen=True)
class Inner:
    """``steps`` Langevin steps of ``rate`` times the inverse of the largest curvature.

    Stable below rate 2; the variance of the stiffest direction is too large by ``1 / (1 - rate / 2)`` without ``metropolis``,
    which in many dimensions asks for a smaller rate (acceptance falls as ``rate^3`` times their number).
    Raises InputError outside these bounds.
    """

    steps: int = 100
    rate: float = 0.1
    metropolis: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 < self.rate < 2:
            raise InputError(f"Langevin steps need steps >= 1 and 0 < rate < 2; got {self.steps} and {self.rate}")

    @property
    def keys(self) -> int:
        """How many numbers of steps of the noise one run uses."""
        return 2 * self.steps

    def run(
        self, target: Target, z: Tensor, curvature: Tensor, posterior: Posterior, keyed: tuple[Draws, int]
    ) -> Tensor:
        """``z`` after all steps.  curvature: of ``-log p``, (n,).  keyed: the noise and its first key."""
        draws, key = keyed
        value, slope = target(z)
        for j in range(self.steps):
            xi = noise(posterior, draws, key + j)
            # A proposal is compared by a uniform number of its own key; the last slope of an unadjusted run has no use.
            chance = draws.uniform(key + self.steps + j, (1,))[:, 0].to(z.device) if self.metropolis else None
            last = chance is None and j + 1 == self.steps
            z, value, slope = langevin_step(target, (z, value, slope), self.rate / curvature, (xi, chance), last)
        return z


def langevin_step(
    target: Target,
    now: tuple[Tensor, Tensor, Tensor],
    eta: Tensor,
    random: tuple[Tensor, Tensor | None],
    last: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step: (z, log p, gradient) -> the same after it.

    eta: (n,).  random: normal numbers, and uniform ones (n,) for Metropolis or None.  last: leave value and slope as they were.
    """
    z, value, slope = now
    xi, chance = random
    size = spread(eta, z)
    moved = z + size * slope + (2 * size).sqrt() * xi
    if last:
        return moved, value, slope
    new_value, new_slope = target(moved)
    if chance is None:
        return moved, new_value, new_slope
    back = z - moved - size * new_slope
    log_ratio = new_value - value - dot(back, back) / (4 * eta) + dot(xi, xi) / 2
    taken = chance.log() < log_ratio
    keep = spread(taken, z) > 0
    return torch.where(keep, moved, z), torch.where(taken, new_value, value), torch.where(keep, new_slope, slope)


def data_gradient(posterior: Posterior, z: Tensor) -> tuple[Tensor, Tensor]:
    """``log p(y | decode(z))`` and its gradient with respect to ``z``, counted: (n,), (n, *latent.shape)."""
    posterior.count_normal(len(z))
    with torch.enable_grad():
        point = z.detach().requires_grad_()
        value = posterior.likelihood.log_prob(posterior.prior.decode(point))
        (gradient,) = torch.autograd.grad(value.sum(), point)
    return value.detach(), gradient


def data_curvature(posterior: Posterior, z: Tensor, iterations: int = 20) -> Tensor:
    """Largest curvature of ``-log p(y | decode(z))`` at ``z``, in absolute value: (n,).

    By power iteration with second derivatives from one fixed start, so that a draw's figure is its own.
    """
    v = _direction(z)
    size = z.new_zeros(len(z))
    with torch.enable_grad():
        point = z.detach().requires_grad_()
        value = posterior.likelihood.log_prob(posterior.prior.decode(point))
        (gradient,) = torch.autograd.grad(value.sum(), point, create_graph=True)
        posterior.count_normal(len(z))
        if not gradient.requires_grad:
            return size
        for _ in range(iterations):
            posterior.count_normal(len(z))
            (w,) = torch.autograd.grad(gradient, point, v, retain_graph=True)
            size = dot(w, w).sqrt()
            v = w / spread(torch.where(size > 0, size, 1.0), w)
    return size.detach()


def prior_curvature(posterior: Posterior, z: Tensor, sigma: float, iterations: int = 10) -> Tensor:
    """Largest curvature of ``-log p_sigma`` at ``z``, ``|1 - dD/dz| / sigma^2``, in absolute value: (n,).  As above."""
    _, pull = posterior.linearize(z, sigma)
    v, size = _direction(z), z.new_zeros(len(z))
    for _ in range(iterations):
        w = v - pull(v)
        size = dot(w, w).sqrt()
        v = w / spread(torch.where(size > 0, size, 1.0), w)
    return size / sigma**2


def _direction(z: Tensor) -> Tensor:
    """The same unit vector for every draw."""
    start = Draws(0, [0]).normal(0, z.shape[1:], "probe", dtype=z.dtype).to(z.device).expand_as(z)
    return start / spread(dot(start, start).sqrt(), start)
