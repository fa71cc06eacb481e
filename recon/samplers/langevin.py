r"""Annealed Langevin dynamics (Song and Ermon 2019; with data: Jalal et al. 2021).

Levels ``sigma_k`` from high to low; at each, ``inner`` steps on

    pi(z) ~ p_sigma(z) p(y | decode(z))^beta,    beta = 1 / (1 + sigma^2 c),   c: largest curvature of -log p(y | decode(z))

``p_sigma`` is the prior with noise of ``sigma`` and its score ``(D - z) / sigma^2``; ``beta`` widens the noise of the data
by ``sigma^2 A A^T`` in its stiffest direction (all of them, for one datum) and goes to 1.  Each inner step is

    z = z + eta grad log pi + sqrt(2 eta) xi

rule="curvature": ``eta = rate / (p + beta c)`` with ``p = 1 / sigma^2``, which no score exceeds (``bound="level"``), or
measured per draw where the level begins, ``p = |1 - dD/dz| / sigma^2`` (``bound="local"``, 10 vjps of the denoiser).  The
former is safe and needs no derivatives, but at low levels moves by ``sigma`` per step however wide the posterior.  For N(0,
s^2), ``y = a x + n``, a level's stationary variance is ``1 / (Q (1 - eta Q / 2))`` with ``Q = 1/(s^2 + sigma^2) + beta a^2 /
sigma_y^2``, its mean ``(beta a y / sigma_y^2) / Q``.
rule="snr" (Song et al. 2021b, algorithm 4): ``eta = 2 (snr |xi| / |grad log pi|)^2``, here per draw and with the data's part
of the gradient; a batch's mean instead would make draws depend on their company.  Far from equilibrium the step shrinks, so
it corrects a predictor and cannot do without one; it depends on the state, so its bias has no closed form, and in few
dimensions ``1/|.|^2`` has heavy tails that widen the draws.
metropolis: accept or reject (rule "curvature" only).  ``p_sigma`` is known through its score, so its log-ratio is the line
integral of the score by the trapezoidal rule: exact for Gaussian priors, of third order in the step for others.
predictor: move to the next level by an ancestral step with ``D + sigma^2 beta grad log p(y | decode(z))`` before correcting.

The draws are those of the last level, so ``sigma_min`` must lie below what matters.  Modes are left and entered at high
levels only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from recon.draws import Draws
from recon.errors import InputError
from recon.likelihoods import GaussianLikelihood
from recon.operators.base import LinearOperator
from recon.operators.cg import dot, spread
from recon.posterior import Posterior
from recon.samplers.base import Claim, LevelSampler, State
from recon.samplers.decoupled import noise
from recon.samplers.inner import data_curvature, data_gradient, prior_curvature
from recon.samplers.transitions import Ancestral


@dataclass(frozen=True)
class Langevin(LevelSampler):
    """Annealed Langevin dynamics, by itself or as corrector; see the module's text for the fields."""

    claim: ClassVar[Claim] = "consistent"
    exact_for: ClassVar[str] = (
        "any posterior, as inner steps grow and rate falls, up to the width sigma_min; with metropolis at any rate for "
        "Gaussian priors"
    )
    needs: ClassVar[str] = "differentiable likelihood; bound='local' also a differentiable denoiser"
    cost: ClassVar[str] = "M denoisers + M (A, A^T) per step"
    advice: ClassVar[str] = "lower rate (or snr), or take more steps"

    inner: int = 20
    rule: Literal["curvature", "snr"] = "curvature"
    rate: float = 0.2
    bound: Literal["level", "local"] = "level"
    snr: float = 0.16
    metropolis: bool = False
    predictor: bool = False

    def check(self, posterior: Posterior) -> None:
        super().check(posterior)
        if self.bound not in ("level", "local"):
            raise InputError(f"Langevin bounds the prior's curvature by 'level' or 'local'; got {self.bound!r}")
        if self.rule not in ("curvature", "snr") or self.inner < 1 or not 0 < self.rate < 2 or not self.snr > 0:
            raise InputError(
                f"Langevin needs rule 'curvature' or 'snr', inner >= 1, 0 < rate < 2 and snr > 0; got {self.rule!r}, "
                f"{self.inner}, {self.rate} and {self.snr}"
            )
        if self.rule == "snr" and (self.metropolis or not self.predictor):
            raise InputError(
                "Langevin(rule='snr') is the corrector of a predictor, with steps that depend on the state: set predictor=True "
                "and metropolis=False, or use rule='curvature'"
            )

    def init(self, posterior: Posterior, draws: Draws) -> State:
        start = super().init(posterior, draws)
        return State(start.z, start.log_w, {"curvature": data_curvature(posterior, start.z)})

    def step(self, posterior: Posterior, state: State, k: int, draws: Draws) -> State:
        sigma, key = self.levels(posterior)[k], k * (2 * self.inner + 1)
        z, curvature = state.z, state.aux["curvature"]
        if not _constant(posterior):
            curvature = data_curvature(posterior, posterior.denoise(z, sigma))
        if self.predictor and k > 0:
            before = self.levels(posterior)[k - 1]
            slope = _look(posterior, z, before, 1 / (1 + before**2 * curvature)).slope
            z = Ancestral().step(z, z + before**2 * slope, before, sigma, noise(posterior, draws, key))
        beta = 1 / (1 + sigma**2 * curvature)
        stiff = prior_curvature(posterior, z, sigma) if self.bound == "local" else sigma**-2
        here: _Seen | None = None
        for j in range(self.inner):
            here = here or _look(posterior, z, sigma, beta)
            xi = noise(posterior, draws, key + 1 + j)
            eta = self.rate / (stiff + beta * curvature)
            if self.rule == "snr":
                eta = 2 * self.snr**2 * dot(xi, xi) / dot(here.slope, here.slope)
            moved = z + spread(eta, z) * here.slope + spread((2 * eta).sqrt(), z) * xi
            if not self.metropolis:
                z, here = moved, None
                continue
            there = _look(posterior, moved, sigma, beta)
            chance = draws.uniform(key + 1 + self.inner + j, (1,))[:, 0].to(z.device)
            taken = chance.log() < _log_ratio((z, here), (moved, there), eta, xi)
            z, here = _chosen(taken, moved, z), _Seen(*(_chosen(taken, a, b) for a, b in zip(there, here, strict=True)))
        return State(z, state.log_w, {"curvature": curvature})


class _Seen(NamedTuple):
    """Of one place: beta log p(y | .) (n,), the prior's score, and the gradient of both, (n, *latent.shape)."""

    value: Tensor
    score: Tensor
    slope: Tensor


def _look(posterior: Posterior, z: Tensor, sigma: float, beta: Tensor) -> _Seen:
    value, slope = data_gradient(posterior, z)
    score = (posterior.denoise(z, sigma) - z) / sigma**2
    return _Seen(beta * value, score, score + spread(beta, z) * slope)


def _log_ratio(here: tuple[Tensor, _Seen], there: tuple[Tensor, _Seen], eta: Tensor, xi: Tensor) -> Tensor:
    """Log of what Metropolis compares with a uniform number: (n,)."""
    (z, now), (moved, new) = here, there
    rise = new.value - now.value + dot(now.score + new.score, moved - z) / 2
    back = z - moved - spread(eta, z) * new.slope
    return rise - dot(back, back) / (4 * eta) + dot(xi, xi) / 2


def _chosen(taken: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(taken.reshape(-1, *[1] * (new.ndim - 1)), new, old)


def _constant(posterior: Posterior) -> bool:
    """Whether the curvature of the data term is the same everywhere."""
    like = posterior.likelihood
    return isinstance(like, GaussianLikelihood) and isinstance(like.operator, LinearOperator) and posterior.prior.affine
