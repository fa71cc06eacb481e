r"""Fit the data hard, and stop where their noise begins: the discrepancy principle (Morozov 1966), per draw.

With the whitened residual ``r = (y - A x) / sigma`` and ``m`` the number of data, ``chi2 = |r|^2 / m`` of the truth is about 1;
whoever makes it smaller fits noise.  From a given image the data are met by steps that leave alone what they do not see, and a
draw stops at ``chi2 = goal``, on the way of its last step.  Each draw stops by itself and is left as it is while others go on.

``solved``: where the unknown is an image and the operator linear, conjugate gradients on the least squares problem, whose
iterates regularise when stopped (Hanke 1995).  ``descended``: Adam on any unknown with a differentiable way to the data.

Data whose residual is exactly zero at the start were not measured (samples outside a mask), and are not counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from recon.errors import InputError
from recon.operators.cg import CG, dot, spread
from recon.posterior import Posterior
from recon.priors.base import Prior

_CLOSE = 0.01  # how far below the goal a draw may stop, as a share of it
_BETAS = (0.9, 0.999)
_GAIN = 1e-3  # share of its residual that a draw has to lose in ``patience`` steps to go on as it does
_HALVINGS = 8


@dataclass(frozen=True)
class Fit:
    """Adam: at most ``iterations`` steps of ``rate``, in units of the unknown; without weight decay.

    patience: a draw that gains nothing in that many steps goes on from its best point with half the rate, eight times at most.
    Raises InputError for numbers that are not positive.
    """

    iterations: int = 500
    rate: float = 0.005
    patience: int = 50

    def __post_init__(self) -> None:
        if self.iterations < 1 or not self.rate > 0 or self.patience < 1:
            raise InputError(f"a Fit needs iterations >= 1, rate > 0 and patience >= 1; got {self}")


def solved(posterior: Posterior, x: Tensor, goal: float, cg: CG) -> Tensor:
    """``du`` with which ``x + s du`` meets the data, ``s`` the prior's scale: (n, *space.shape).

    Conjugate gradients on ``|S^-1/2 (y - A x - A s du)|^2`` from ``du = 0``; the step that crosses the goal is cut short there.
    Also stops at ``|B^T r| <= tolerance`` times its first value: no more of these data can be met.  Needs a linear operator.
    """
    like, prior = posterior.likelihood.gaussian(), posterior.prior
    operator = like.linear("fitting the data")

    def back(r: Tensor) -> Tensor:
        return Prior.decode_linear(prior, posterior.adjoint(operator, r / like.sigma))

    posterior.count("forward", len(x))
    r = like.residual(x) / like.sigma
    limit, chi2 = goal * measured(r), dot(r, r)
    p = back(r)
    size = dot(p, p)
    du, least = torch.zeros_like(p), cg.tolerance**2 * size
    active = (chi2 > limit) & (size > least)
    for _ in range(cg.iterations):
        if not bool(active.any()):
            break
        q = posterior.forward(Prior.decode_linear(prior, p)) / like.sigma
        curvature = dot(q, q)
        active = active & (curvature > 0)
        alpha = torch.where(active, size / torch.where(curvature > 0, curvature, 1.0), 0.0)
        # chi2 falls by alpha size (2 t - t^2) on the share t of this step.
        drop = torch.where(active, alpha * size, 1.0)
        reached = active & (chi2 - drop <= limit)
        t = torch.where(reached, 1 - (1 - (chi2 - limit) / drop).clamp(min=0).sqrt(), 1.0)
        du = du + spread(t * alpha, p) * p
        r = r - spread(t * alpha, r) * q
        chi2, s = dot(r, r), back(r)
        new = dot(s, s)
        active = active & ~reached & (new > least)
        p = s + spread(torch.where(active, new / torch.where(size > 0, size, 1.0), 0.0), p) * p
        size = new
    return du


def descended(posterior: Posterior, u: Tensor, decode: Callable[[Tensor], Tensor], goal: float, fit: Fit) -> Tensor:
    """``u`` whose ``decode(u)`` meets the data, by Adam from ``u``: (n, ...).  decode: to physical units, differentiable."""
    like = posterior.likelihood.gaussian()

    def residual(at: Tensor) -> Tensor:
        return like.residual(decode(at)) / like.sigma

    def evaluated(at: Tensor) -> _Point:
        posterior.count_normal(len(at))
        with torch.enable_grad():
            point = at.detach().requires_grad_()
            r = residual(point)
            value = dot(r, r)
            (slope,) = torch.autograd.grad(0.5 * value.sum(), point)
        return _Point(at, value.detach(), slope)

    posterior.count("forward", len(u))
    with torch.no_grad():
        limit = goal * measured(residual(u))
    best = here = evaluated(u)
    adam, mark = _Adam.fresh(here, fit.rate), here.value
    active, age = here.value > limit, torch.zeros_like(mark)
    for _ in range(fit.iterations):
        if not bool(active.any()):
            break
        moved = adam.step(here)
        there = evaluated(moved)
        reached = active & (there.value <= limit)
        if bool(reached.any()):
            there = there.moved(*_cut(posterior, residual, (here.u, moved), (there.value, reached), limit))
        here = there
        best = best.unless(active & (here.value < best.value), here)
        gained = here.value < (1 - _GAIN) * mark
        mark, age = torch.where(gained, here.value, mark), torch.where(gained, 0.0, age + 1)
        active = active & ~reached
        stale = active & (age >= fit.patience)
        if bool(stale.any()):
            adam.again(stale)
            here, age = here.unless(stale, best), torch.where(stale, 0.0, age)
            active = active & (adam.rate > fit.rate * 2.0**-_HALVINGS)
    return best.u


class _Point(NamedTuple):
    """Some unknowns (n, ...), their squared residuals (n,), and half the gradient of those."""

    u: Tensor
    value: Tensor
    slope: Tensor

    def unless(self, condition: Tensor, other: _Point) -> _Point:
        """``other`` in the draws where ``condition`` (n,) holds."""
        rows = spread(condition, self.u) > 0
        value = torch.where(condition, other.value, self.value)
        return _Point(torch.where(rows, other.u, self.u), value, torch.where(rows, other.slope, self.slope))

    def moved(self, u: Tensor, value: Tensor) -> _Point:
        """The same with other unknowns and residuals; of draws that are done, whose gradient has no use any more."""
        return _Point(u, value, self.slope)


@dataclass
class _Adam:
    """Moments (n, ...), rate and number of steps (n,), of each draw by itself."""

    first: Tensor
    second: Tensor
    rate: Tensor
    steps: Tensor

    @classmethod
    def fresh(cls, at: _Point, rate: float) -> _Adam:
        return cls(torch.zeros_like(at.u), torch.zeros_like(at.u), torch.full_like(at.value, rate), 0 * at.value)

    def step(self, at: _Point) -> Tensor:
        """Where all draws go from ``at``; of those that are done, nobody looks any more."""
        (b1, b2), self.steps = _BETAS, self.steps + 1
        self.first = b1 * self.first + (1 - b1) * at.slope
        self.second = b2 * self.second + (1 - b2) * at.slope.square()
        size = (self.second / spread(1 - b2**self.steps, at.u)).sqrt() + 1e-8
        way = spread(self.rate / (1 - b1**self.steps), at.u)
        return at.u - way * self.first / size

    def again(self, which: Tensor) -> None:
        """Begin afresh with half the rate in some draws."""
        kept = spread(~which, self.first)
        self.first, self.second = kept * self.first, kept * self.second
        self.rate, self.steps = torch.where(which, self.rate / 2, self.rate), torch.where(which, 0.0, self.steps)


def measured(r: Tensor) -> Tensor:
    """How many real numbers of a residual (n, ...) are data, per draw: (n,)."""
    parts = (torch.view_as_real(r) if r.is_complex() else r).flatten(1)
    return (parts != 0).sum(1).clamp(min=1).to(parts.dtype)


def _cut(
    posterior: Posterior, residual: Callable[[Tensor], Tensor], ends: tuple[Tensor, Tensor],
    found: tuple[Tensor, Tensor], limit: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The draws that crossed the limit taken back along their step until they are at it, by bisection."""
    (start, end), (value, crossed) = ends, found
    low, high = torch.zeros_like(value), torch.ones_like(value)
    for _ in range(30):
        open_ = crossed & (value < (1 - _CLOSE) * limit)
        if not bool(open_.any()):
            break
        middle = 0.5 * (low + high)
        posterior.count("forward", len(value))
        with torch.no_grad():
            r = residual(start + spread(middle, start) * (end - start))
        there = dot(r, r)
        inside = open_ & (there <= limit)
        high, value = torch.where(inside, middle, high), torch.where(inside, there, value)
        low = torch.where(open_ & ~inside, middle, low)
    share = spread(torch.where(crossed, high, 1.0), start)
    return torch.where(share < 1, start + share * (end - start), end), value
