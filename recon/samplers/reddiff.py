r"""RED-diff (Mardani et al. 2023): one point per draw, by stochastic optimisation with the denoiser as regulariser.

A variational law ``N(mu, 0)`` is fitted; ``sigma`` is visited from high to low, one Adam step each (algorithm 1)::

    eps ~ N(0, I);   e^ = (z - D(z; sigma)) / sigma   at   z = mu + sigma eps     # no derivative of the network
    g  = data term + lam f(sigma) (e^ - eps)                                      # eq. 9
    mu = Adam(mu, g)

It seeks a mode: the spread of its draws is that of the optimiser, not of the posterior.

weighting: ``f``; the paper's "linear" (sigma, its default), "sqrt", "square", "log" (log(1 + sigma)), "const", "clip"
(min(sigma, 1)), and "score" (1/sigma), with which ``e^ - eps`` is in the mean minus the score of the noised prior.
normalisation: of the data term, which decides what lam means.  "likelihood": ``-grad log p(y | mu)``, and lam counts in
nats; "mean": ``A^T (A mu - y) / m`` against ``lam f (e^ - eps) / d`` (the authors' code, m data and d unknowns); "sum":
against ``2 A^T (A mu - y)`` with ``lam f (e^ - eps)`` whole (a benchmark's code: the same lam weighs the prior 2 m / d times
less than with "mean").  That port also gives a network of one noise convention the scaled state of another; here states are
variance exploding throughout.

For the prior N(0, s^2) and ``y = a x + n`` the fixed point at a fixed sigma, with "likelihood", is
``mu = (a y / sigma_y^2) / (a^2 / sigma_y^2 + lam f sigma / (s^2 + sigma^2))``: with lam = 1 the MAP estimate for "score" as
sigma goes to 0, and the plain data fit for all others.  So the last steps take the prior out again; a ``sigma_min`` like the
noise of the data stops that, and ``average`` returns the mean of the last iterates.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from recon.draws import Draws
from recon.ensemble import Ensemble
from recon.errors import InputError
from recon.posterior import Posterior
from recon.samplers.base import Claim, LevelSampler, State
from recon.samplers.decoupled import noise
from recon.samplers.inner import data_gradient
from recon.samplers.requirements import require_gaussian

_WEIGHTS: dict[str, Callable[[float], float]] = {
    "linear": lambda s: s,
    "sqrt": math.sqrt,
    "square": lambda s: s**2,
    "log": math.log1p,
    "const": lambda s: 1.0,
    "clip": lambda s: min(s, 1.0),
    "score": lambda s: 1 / s,
}


@dataclass(frozen=True)
class REDDiff(LevelSampler):
    """Regularisation by denoising; each draw is an optimisation of its own.

    lam: weight of the regulariser.  rate, beta1, beta2: of Adam; the rate in units of the latent per step.
    average: iterates at the end whose mean is returned (1: the last).
    """

    claim: ClassVar[Claim] = "heuristic"
    exact_for: ClassVar[str] = "nothing: it seeks a mode, and the spread of its draws is not the posterior's"
    needs: ClassVar[str] = "differentiable likelihood"
    cost: ClassVar[str] = "1 denoiser + 1 (A, A^T) per step"
    advice: ClassVar[str] = "lower rate"

    steps: int = 1000
    lam: float = 0.25
    weighting: Literal["linear", "sqrt", "square", "log", "const", "clip", "score"] = "linear"
    normalisation: Literal["likelihood", "mean", "sum"] = "likelihood"
    rate: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.99
    average: int = 1

    def check(self, posterior: Posterior) -> None:
        super().check(posterior)
        if self.weighting not in _WEIGHTS or self.normalisation not in ("likelihood", "mean", "sum"):
            raise InputError(
                f"REDDiff knows the weightings {', '.join(_WEIGHTS)} and the normalisations likelihood, mean, sum; "
                f"got {self.weighting!r} and {self.normalisation!r}"
            )
        if not (self.lam > 0 and self.rate > 0 and 0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise InputError(f"REDDiff needs lam, rate > 0 and betas in [0, 1); got {self}")
        if not 1 <= self.average <= self.steps:
            raise InputError(f"REDDiff averages 1 to steps = {self.steps} iterates; got {self.average}")
        if self.normalisation != "likelihood":
            user = f"REDDiff(normalisation={self.normalisation!r})"
            like = require_gaussian(posterior, user)
            if float(like.sigma.min()) != float(like.sigma.max()):
                raise InputError(
                    f"{user} weighs all data alike and these have noise of {float(like.sigma.min()):.3g} to "
                    f"{float(like.sigma.max()):.3g}; use normalisation='likelihood'"
                )

    def init(self, posterior: Posterior, draws: Draws) -> State:
        """``mu`` starts where the denoiser sees nothing but noise: near the prior's mean."""
        start = super().init(posterior, draws)
        mu = posterior.denoise(start.z, self.levels(posterior)[0])
        return State(mu, start.log_w, {name: torch.zeros_like(mu) for name in ("first", "second", "mean")})

    def gradient(self, posterior: Posterior, mu: Tensor, sigma: float, eps: Tensor) -> Tensor:
        """``g`` of the module's text: (n, *latent.shape)."""
        z = mu + sigma * eps
        apart = (z - posterior.denoise(z, sigma)) / sigma - eps
        _, slope = data_gradient(posterior, mu)
        operator, size = posterior.likelihood.operator, posterior.prior.latent.size
        data, weight = -slope, self.lam * _WEIGHTS[self.weighting](sigma)
        if self.normalisation != "likelihood":
            variance = float(posterior.likelihood.gaussian().sigma.max()) ** 2
            factor = 2.0 if self.normalisation == "sum" else 1 / operator.range.size
            data = factor * variance * data
        if self.normalisation == "mean":
            weight = weight / size
        return data + weight * apart

    def step(self, posterior: Posterior, state: State, k: int, draws: Draws) -> State:
        sigma = self.levels(posterior)[k]
        g = self.gradient(posterior, state.z, sigma, noise(posterior, draws, k))
        first = self.beta1 * state.aux["first"] + (1 - self.beta1) * g
        second = self.beta2 * state.aux["second"] + (1 - self.beta2) * g.square()
        corrected = (second / (1 - self.beta2 ** (k + 1))).sqrt() + 1e-8
        mu = state.z - self.rate * (first / (1 - self.beta1 ** (k + 1))) / corrected
        kept = k + self.average - self.steps  # number of iterates in the mean before this one
        mean = mu.clone() if kept <= 0 else state.aux["mean"] + (mu - state.aux["mean"]) / (kept + 1)
        return State(mu, state.log_w, {"first": first, "second": second, "mean": mean})

    def finish(self, posterior: Posterior, state: State) -> Ensemble:
        return super().finish(posterior, State(state.aux["mean"], state.log_w))
