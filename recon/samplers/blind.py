r"""Blind inversion: the parameters of the operator drawn along with the image.

Gibbs sampling; Fei et al. (2023) follow a gradient instead.

For a ``ParametricOperator`` ``A(x; theta)``, ``theta ~ N(m, diag(s^2))``, and a sampler whose steps draw the image given the
data (``DAPS``, ``PnPDM``), each step becomes

    x     ~ given y and theta                     # the inner sampler's data step, with each draw's own operator
    theta ~ p(theta | x, y)                       # below
    state = the inner sampler's prior step of x   # which knows neither y nor theta

and the joint law of image and parameters stays what the inner sampler makes of it: where that is exact, so is this.

With ``C = dA/dtheta``, ``P = s^-2 + C^T S^-1 C`` and ``g`` the gradient of ``log p(theta | x, y)``: where A is affine in
theta (gain, offset) theta is drawn from ``N(theta + P^-1 g, P^-1)``, the conditional itself.  Elsewhere Metropolis and
Hastings propose from Student's law about its mode (found from the prior's mean, whatever theta is now) with that width and
heavy tails, ``moves`` times per step; for conditionals with one mode.

shared: one theta for all draws, moved to the maximum of the draws' mean log-density (a step of Monte-Carlo EM), so the draws
are those given the most probable parameters and do not know how uncertain these are.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from recon.comm import Comm
from recon.draws import Draws
from recon.ensemble import Ensemble
from recon.errors import InputError
from recon.likelihoods import GaussianLikelihood
from recon.operators.parametric import ParametricOperator
from recon.posterior import Posterior
from recon.samplers.base import Claim, Sampler, State
from recon.samplers.daps import DAPS
from recon.samplers.decoupled import Decoupled
from recon.samplers.requirements import require_gaussian

_KEY = 1 << 40  # first key of the parameters' noise: above those of the inner sampler
_FREEDOM = 4  # of the proposal's Student law


@dataclass(frozen=True)
class Blind(Sampler):
    """An inner sampler that estimates the operator's parameters as it goes; ``steps`` are the inner sampler's.

    inner: DAPS or PnPDM, whose claim this has.  moves: per step, where the operator is not affine in its parameters.
    ``parameters`` gives those of an ensemble's draws.
    """

    claim: ClassVar[Claim] = "heuristic"
    exact_for: ClassVar[str] = "what the inner sampler is exact for, with Gaussian parameters; not with shared=True"
    needs: ClassVar[str] = "ParametricOperator, Gaussian likelihood"
    cost: ClassVar[str] = "the inner sampler's + 1 A per step (affine), else + about 13 (2 p + 2) + moves A"

    steps: int = 0
    inner: Decoupled = field(default_factory=lambda: DAPS(surrogate="matched"))
    moves: int = 3
    shared: bool = False

    def __post_init__(self) -> None:
        if self.steps not in (0, self.inner.steps):
            raise InputError(f"Blind takes the steps of its inner sampler, {self.inner.steps}; got {self.steps}")
        object.__setattr__(self, "steps", self.inner.steps)
        if self.moves < 1:
            raise InputError(f"Blind needs at least one move of the parameters per step; got {self.moves}")
        object.__setattr__(self, "couples", self.shared)
        object.__setattr__(self, "claim", "heuristic" if self.shared else self.inner.claim)

    def check(self, posterior: Posterior) -> None:
        super().check(posterior)
        require_gaussian(posterior, "Blind")
        operator = parametric(posterior)
        self.inner.check(bound(posterior, operator.mean[None]))

    def init(self, posterior: Posterior, draws: Draws) -> State:
        operator = parametric(posterior)
        start = self.inner.init(bound(posterior, operator.mean[None]), draws)
        theta = operator.mean.expand(len(draws), -1).clone()
        if not self.shared:
            theta = theta + operator.std * draws.normal(_KEY, operator.mean.shape, "init", dtype=torch.float64)
        return replace(start, aux={**start.aux, "theta": theta})

    def step(self, posterior: Posterior, state: State, k: int, draws: Draws) -> State:
        theta = state.aux["theta"]
        found = self.inner.data_step(bound(posterior, theta), state, k, draws)
        x, aux = posterior.prior.decode(found), dict(state.aux)
        if self.shared:
            look = _look(posterior, x, theta)
            aux |= {"slope": look.slope, "precision": look.precision}
        else:
            aux["theta"] = moved(posterior, x, theta, self.moves, (draws, _KEY + k * 2 * self.moves))
        return self.inner.prior_step(posterior, replace(state, aux=aux), found, k, draws)

    def couple(self, posterior: Posterior, state: State, k: int, draws: Draws, comm: Comm) -> State:
        """The shared parameters: one Newton step on the mean over all draws, summed in the order of the draws."""
        mine = {m: (state.aux["slope"][i], state.aux["precision"][i]) for i, m in enumerate(draws.members)}
        everyone: dict[int, tuple[Tensor, Tensor]] = {}
        for theirs in comm.draws.allgather(mine):
            everyone.update(theirs)
        slope, precision = (torch.stack([everyone[m][i] for m in sorted(everyone)]).mean(0) for i in (0, 1))
        return replace(state, aux={**state.aux, "theta": state.aux["theta"] + torch.linalg.solve(precision, slope)})

    def place(self, posterior: Posterior, k: int) -> str:
        return self.inner.place(posterior, k)


def parameters(posterior: Posterior, ensemble: Ensemble, seed: int = 0, moves: int = 20) -> Tensor:
    """Parameters of the draws of an ensemble, each from ``p(theta | x, y)`` of its own image: (draw, p), float64.

    With images from ``p(x | y)`` these are draws of ``p(x, theta | y)``.  moves: of Metropolis and Hastings from the mean,
    where the operator is not affine in theta.  Raises InputError for operators without parameters.
    """
    require_gaussian(posterior, "parameters")
    operator = parametric(posterior)
    theta = operator.mean.expand(len(ensemble), -1)
    return moved(posterior, ensemble.x, theta, moves, (Draws(seed, range(len(ensemble))), 2 * _KEY))


def parametric(posterior: Posterior) -> ParametricOperator:
    """The posterior's operator, known to have parameters; InputError with the way out otherwise."""
    operator = posterior.likelihood.operator
    if not isinstance(operator, ParametricOperator):
        raise InputError(
            f"Blind estimates the parameters of a ParametricOperator; {operator.describe()} has none. Wrap it in "
            "GainOffset, or give a Family of operators; where all is known, use the inner sampler itself."
        )
    return operator


def bound(posterior: Posterior, theta: Tensor) -> Posterior:
    """The posterior of draws that know their parameters: ``theta`` (n, p), or (1, p) for all.  Offsets leave the data."""
    operator, given = parametric(posterior), posterior.likelihood.gaussian()
    theta = theta.to(given.measured.device)
    like: GaussianLikelihood = copy.copy(given)
    like._modules, like._buffers = dict(given._modules), dict(given._buffers)
    like._modules["operator"] = operator.bind(theta)
    offset = operator.offset(theta)
    if offset is not None:
        like._buffers["measured"] = given.measured - offset.to(given.measured.dtype)
    known = copy.copy(posterior)  # with the same counts of evaluations
    known.likelihood = like
    return known


class _Look(NamedTuple):
    """At some parameters: the gradient of log p(theta | x, y) (n, p), and P (n, p, p)."""

    slope: Tensor
    precision: Tensor


def _look(posterior: Posterior, x: Tensor, theta: Tensor) -> _Look:
    operator, like = parametric(posterior), posterior.likelihood.gaussian()
    posterior.count("forward", len(x))
    theta, mean, std = (values.to(x.device) for values in (theta, operator.mean, operator.std))
    slope, precision = operator.information(x, theta, like.y, like.sigma)
    return _Look(slope.double() - (theta - mean) / std**2, precision.double() + torch.diag(std**-2))


def _value(posterior: Posterior, x: Tensor, theta: Tensor) -> Tensor:
    """``log p(theta | x, y)`` but for a constant: (n,)."""
    operator, like = parametric(posterior), posterior.likelihood.gaussian()
    posterior.count("forward", len(x))
    theta, mean, std = (values.to(x.device) for values in (theta, operator.mean, operator.std))
    whitened = (like.y - operator.at(x, theta)) / like.sigma
    size = (torch.view_as_real(whitened) if whitened.is_complex() else whitened).flatten(1).double().square().sum(1)
    return -0.5 * (size + ((theta - mean) / std).square().sum(1))


def moved(posterior: Posterior, x: Tensor, theta: Tensor, moves: int, keyed: tuple[Draws, int]) -> Tensor:
    """``theta`` after draws from ``p(theta | x, y)``: (n, p).  One where that is Gaussian, else ``moves`` proposals."""
    (draws, key), theta = keyed, theta.to(x.device)
    if parametric(posterior).affine:
        look = _look(posterior, x, theta)
        return _gaussian(theta + _solved(look.precision, look.slope), look.precision, draws, key)
    mode, look = most_probable(posterior, x)
    half = (_FREEDOM + theta.shape[1]) / 2

    def excess(theta: Tensor) -> Tensor:  # log of the density over the proposal's
        tail = 1 + ((look.precision @ (theta - mode)[:, :, None])[:, :, 0] * (theta - mode)).sum(1) / _FREEDOM
        return _value(posterior, x, theta) + half * tail.log()

    here = excess(theta)
    for j in range(moves):
        u = draws.uniform(key + 2 * j + 1, (3,)).to(x.device)
        chi2 = -2 * u[:, :2].log().sum(1, keepdim=True)  # of four degrees of freedom
        kick = _gaussian(torch.zeros_like(mode), look.precision, draws, key + 2 * j)
        there = mode + kick * (_FREEDOM / chi2).sqrt()
        new = excess(there)
        taken = u[:, 2].log() < new - here
        theta = torch.where(taken[:, None], there, theta)
        here = torch.where(taken, new, here)
    return theta


def most_probable(posterior: Posterior, x: Tensor, iterations: int = 12) -> tuple[Tensor, _Look]:
    """The mode of ``p(theta | x, y)`` for each image, by Levenberg-Marquardt from the prior's mean: (n, p); and P there."""
    theta = parametric(posterior).mean.expand(len(x), -1).to(x.device)
    value, look = _value(posterior, x, theta), _look(posterior, x, theta)
    damping = torch.full((len(x),), 1e-3, dtype=torch.float64, device=x.device)
    for _ in range(iterations):
        damped = look.precision + torch.diag_embed(damping[:, None] * look.precision.diagonal(dim1=1, dim2=2))
        there = theta + _solved(damped, look.slope)
        new = _value(posterior, x, there)
        better = new >= value
        theta, value = torch.where(better[:, None], there, theta), torch.where(better, new, value)
        damping = torch.where(better, damping / 10, damping * 10)
        look = _look(posterior, x, theta)
    return theta, look


def _gaussian(centre: Tensor, precision: Tensor, draws: Draws, key: int) -> Tensor:
    """A draw of ``N(centre, precision^-1)``: (n, p)."""
    xi = draws.normal(key, centre.shape[1:], dtype=torch.float64).to(centre.device)
    factor = torch.linalg.cholesky(precision)
    return centre + torch.linalg.solve_triangular(factor.mT, xi[:, :, None], upper=True)[:, :, 0]


def _solved(precision: Tensor, right: Tensor) -> Tensor:
    return torch.cholesky_solve(right[:, :, None], torch.linalg.cholesky(precision))[:, :, 0]
