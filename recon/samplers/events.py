r"""Draws given that a user's event ``C(x) > c`` happens, and the event's probability (Finzi et al. 2023, with weights).

``p(z0 | z)``, given the data if there are any, is taken for the Gaussian with mean ``D`` and covariance ``V`` of the
denoiser (Tweedie, and the data's system as in MMPS), C for its tangent at ``D`` with gradient ``g``.  Then the law of ``C``
is ``N(C(D), v)``, ``v = g^T V g``, and with ``a = (C(D) - c) / sqrt(v)``

    D_E = D + phi(a) / Phi(a) V g / sqrt(v)        # mean of the truncated Gaussian: no second derivative, one more vjp

exactly for Gaussian priors, linear data and linear C.  For the rest the draws carry weights.  Where the chain without the
event moves by noise ``eta ~ N(0, 1)``, here it moves by ``eta = xi + s d``: ``d`` would take the step to ``D_E``, and each
draw has one of several ``strengths`` s, by its number.  Against the mixture of these J proposals (Veach and Guibas 1995)

    1 / w = mean_j exp(sum_steps (s_j eta . d - s_j^2 |d|^2 / 2)),      w = 0 where the event did not happen

and ``mean(w h(x))`` estimates ``E[1_E h(x)]`` under the chain without the event without bias, whatever C, prior and the
quality of the guess: so ``P(E) = mean w`` with its standard error.  The strength 0 is a defence: no weight exceeds J, so
where the guess leads past part of an event (behind another mode, say) that part is not lost.  What remains is the solver's
error, of second order.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from recon.draws import Draws
from recon.ensemble import Ensemble
from recon.errors import InputError
from recon.likelihoods import Likelihood
from recon.operators.cg import CG, dot, spread
from recon.posterior import Posterior
from recon.priors.base import Prior
from recon.samplers.base import Claim, LevelSampler, State
from recon.samplers.decoupled import noise
from recon.samplers.requirements import require_affine, require_gaussian
from recon.samplers.transitions import Leg, SASolver

OUTSIDE = -1e300
"""Log-weight of draws without the event: a weight of zero, but a finite number, as a block may hold no other draws."""


@dataclass(frozen=True)
class Event:
    """``function(x) > threshold``; the function takes (n, *space.shape) in physical units to (n,), differentiably."""

    function: Callable[[Tensor], Tensor]
    threshold: float

    def value(self, x: Tensor) -> Tensor:
        """``C(x) - c``: (n,).  Raises InputError when the function does not answer one number per draw."""
        value = self.function(x)
        if tuple(value.shape) != (len(x),):
            raise InputError(f"an event's function answers one number per draw, ({len(x)},); got {tuple(value.shape)}")
        return value - self.threshold


class Conditioned(Posterior):
    """A posterior, or a prior alone, given that an event happens; only ``Events`` draws from it.

    Raises InputError for an event whose function does not answer one number per draw.
    """

    def __init__(self, given: Posterior | Prior, event: Event) -> None:
        self.data = given if isinstance(given, Posterior) else None
        self.prior = given if isinstance(given, Prior) else given.prior
        self.space, self.event = given.space, event
        self.evaluations: Counter[str] = Counter()
        self._lock = threading.Lock()
        event.value(torch.zeros(2, *self.space.shape, dtype=self.prior.dtype, device=self.prior.device))

    @property
    def likelihood(self) -> Likelihood:  # type: ignore[override]
        """None: an event is not a measurement.  Raises InputError."""
        raise InputError("this posterior is conditioned on an event, which only the sampler Events can meet")


@dataclass(frozen=True)
class Probability:
    """Of an event: its estimate with standard error, both also as logarithm (``log``; ``error / value`` is that of ``log``).

    inside: share of draws with the event.  ess: effective sample size of their weights.
    """

    value: float
    error: float
    log: float
    inside: float
    ess: float


def probability(ensemble: Ensemble) -> Probability:
    """What the weights of an ensemble of ``Events`` say of the event's probability.

    Raises InputError with fewer than two draws, or none with the event (then the guess leads past it: take more steps).
    """
    log_w = ensemble.log_weights
    assert log_w is not None  # Ensemble sets it
    n, inside = len(log_w), log_w > OUTSIDE
    if n < 2 or not bool(inside.any()):
        raise InputError(
            f"a probability needs at least two draws and one with the event; got {n} and {int(inside.sum())}"
        )
    top = float(log_w.max())
    w = (log_w - top).exp()
    mean = float(w.mean())
    relative = float(w.std()) / mean / math.sqrt(n)
    value = math.exp(top) * mean
    return Probability(value, value * relative, top + math.log(mean), float(inside.double().mean()), ensemble.ess)


@dataclass(frozen=True)
class Events(LevelSampler):
    """Weighted draws given an event; ``probability`` reads its probability off their weights.

    strengths: of the pull towards the event, taken by the draws in turn; the weights undo whatever they are.  (1.0,) alone
    is best for linear events of Gaussians.  cg: of the data's system.
    """

    claim: ClassVar[Claim] = "consistent"
    exact_for: ClassVar[str] = (
        "weighted draws: any event of any prior, and of Gaussian posteriors, as steps and draws grow"
    )
    needs: ClassVar[str] = "differentiable denoiser and event; data: linear operator, Gaussian likelihood"
    cost: ClassVar[str] = "1 denoiser + 1 vjp per step; with data + 2 (K + 1) vjp + 2 (K + 1) (A, A^T)"
    advice: ClassVar[str] = "take more steps, or smaller strengths"

    strengths: tuple[float, ...] = (0.0, 0.5, 1.0)
    solver: SASolver = field(default_factory=SASolver)
    cg: CG = field(default_factory=lambda: CG(iterations=10, tolerance=1e-6))

    def check(self, posterior: Posterior) -> None:
        super().check(posterior)
        if not isinstance(posterior, Conditioned):
            raise InputError(
                "Events draws from a Conditioned(posterior or prior, event); without one use another sampler"
            )
        if self.solver.tau != 1 or not self.strengths or not all(0 <= s < math.inf for s in self.strengths):
            raise InputError(
                "Events steers the noise of the reverse diffusion: it needs a solver with tau = 1 and strengths >= 0; got "
                f"{self.solver.tau} and {self.strengths}"
            )
        require_affine(posterior, "Events")
        if posterior.data is not None:
            require_gaussian(posterior.data, "Events").linear("Events")

    def init(self, posterior: Posterior, draws: Draws) -> State:
        start = super().init(posterior, draws)
        paths = torch.zeros(len(draws), len(self.strengths), dtype=torch.float64, device=start.z.device)
        return State(start.z, start.log_w, {"paths": paths})

    def step(self, posterior: Posterior, state: State, k: int, draws: Draws) -> State:
        assert isinstance(posterior, Conditioned)  # check
        levels = self.levels(posterior)
        sigma, after = levels[k], levels[k + 1]
        denoised, guided = self.look(posterior, state.z, sigma)
        moved, paths = None, state.aux["paths"]
        if after > 0:
            every = torch.tensor(self.strengths, dtype=torch.float64, device=paths.device)
            own = every[torch.tensor([m % len(every) for m in draws.members], device=paths.device)]
            unit = (math.sqrt(1 - (after / sigma) ** 2) / after) * (guided - denoised)
            moved = noise(posterior, draws, k) + spread(own, unit) * unit
            along, size = dot(moved.double(), unit.double()), dot(unit.double(), unit.double())
            paths = paths + every * along[:, None] - 0.5 * every.square() * size[:, None]
        memory = {name: value for name, value in state.aux.items() if name != "paths"}
        z, memory = self.solver.advance(state.z, memory, Leg(levels, k, lambda *_: denoised, moved))
        log_w = math.log(paths.shape[1]) - torch.logsumexp(paths, 1)
        return State(z, log_w.to(state.log_w.device), {**memory, "paths": paths})

    def look(self, posterior: Conditioned, z: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        """``D`` (given the data) and ``D_E``: (n, *latent.shape) each."""
        prior = posterior.prior
        denoised, cover = _given_data(posterior, z, sigma, self.cg)
        with torch.enable_grad():
            point = denoised.detach().requires_grad_()
            value = posterior.event.value(prior.decode(point))
            (slope,) = torch.autograd.grad(value.sum(), point)
        across = cover(slope)
        # Not positive for some states of a learnt denoiser: no pull there, which the weights allow.
        deviation = dot(slope, across).clamp(min=0.0).sqrt()
        live = deviation > 0
        width = torch.where(live, deviation, 1.0)
        a = value.detach() / width
        pull = (-0.5 * a.square() - 0.5 * math.log(2 * math.pi) - torch.special.log_ndtr(a)).exp() / width
        return denoised, denoised + spread(torch.where(live, pull, 0.0), across) * across

    def finish(self, posterior: Posterior, state: State) -> Ensemble:
        assert isinstance(posterior, Conditioned)  # check
        x = posterior.prior.decode(state.z)
        inside = (posterior.event.value(x) > 0).cpu()
        return Ensemble(x, posterior.space, torch.where(inside, state.log_w, OUTSIDE))


def _given_data(posterior: Conditioned, z: Tensor, sigma: float, cg: CG) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Mean of ``p(z0 | z, y)`` and ``u -> V u`` with its covariance, both as MMPS has them."""
    prior, data = posterior.prior, posterior.data
    denoised, pull = (data or posterior).linearize(z, sigma)

    def prior_cover(u: Tensor) -> Tensor:
        return sigma**2 * pull(u)

    if data is None:
        return denoised, prior_cover
    like = data.likelihood.gaussian()
    operator, scale = like.linear("Events"), like.sigma

    def out(u: Tensor) -> Tensor:  # S^-1/2 A s u
        return data.forward(prior.decode_linear(u)) / scale

    def back(v: Tensor) -> Tensor:  # sigma^2 J s A^T S^-1/2 v
        return prior_cover(prior.decode_linear(data.adjoint(operator, v / scale)))

    def solve(right: Tensor) -> Tensor:
        return cg.solve(lambda v: v + out(back(v)), right)

    def cover(u: Tensor) -> Tensor:
        there = prior_cover(u)
        return there - back(solve(out(there)))

    residual = (like.y - data.forward(prior.decode(denoised))) / scale
    return denoised + back(solve(residual)), cover
