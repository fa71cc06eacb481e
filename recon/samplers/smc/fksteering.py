r"""Feynman-Kac steering (Singhal et al. 2025): the prior's own proposals, weighed by a reward of the denoised state.

Reward ``r(z) = strength log p(y | x(D(z)))``; log psi is, of the rewards that a particle has met on its way,

    difference   the last one            max   the largest            sum   all of them

and at the end the reward of the draw itself, so that along every surviving line the factors multiply to
``exp(strength log p(y | x))`` whatever the potential: the target is ``p(x) p(y | x)^strength``.  Needs neither a gradient nor
a linear operator.  Particles meet every ``every`` steps only; weights are kept in between.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from recon.draws import Draws
from recon.errors import InputError
from recon.posterior import Posterior
from recon.samplers.base import Claim, State
from recon.samplers.smc.adapted import require_positive
from recon.samplers.smc.particles import Level, Look, ParticleSampler
from recon.samplers.smc.twists import Plain, Twist
from recon.schedules import Grid, LogLinear


@dataclass(frozen=True)
class FKSteering(ParticleSampler):
    """Feynman-Kac steering by the likelihood, a black box."""

    claim: ClassVar[Claim] = "consistent"
    exact_for: ClassVar[str] = "many particles (strength 1), up to the error of the grid"
    needs: ClassVar[str] = "nothing but the likelihood's value"
    cost: ClassVar[str] = "1 denoiser + 1 A per step"

    steps: int = 200
    grid: Grid = field(default_factory=LogLinear)
    potential: Literal["difference", "max", "sum"] = "difference"
    strength: float = 1.0
    every: int = 1

    def check(self, posterior: Posterior) -> None:
        super().check(posterior)
        require_positive(self.strength, "strength", "FKSteering")
        if self.potential not in ("difference", "max", "sum") or self.every < 1:
            raise InputError(
                f"FKSteering takes potential difference, max or sum and every >= 1; got {self.potential!r}, {self.every}"
            )

    def may_resample(self, k: int) -> bool:
        return (k + 1) % self.every == 0

    def look(self, posterior: Posterior, z: Tensor, level: Level) -> Look:
        denoised = posterior.denoise(z, level.sigma)
        return {"denoised": denoised, "log_psi": self._reward(posterior, denoised)}

    def move(self, posterior: Posterior, z: Tensor, look: Look, level: Level) -> tuple[Tensor, Tensor]:
        return Twist.move(Plain(), posterior, z, look, level)

    def last(self, posterior: Posterior, z: Tensor, look: Look) -> Tensor:
        return self._reward(posterior, z)

    def _reward(self, posterior: Posterior, z: Tensor) -> Tensor:
        posterior.count("forward", len(z))
        with torch.no_grad():
            return self.strength * posterior.likelihood.log_prob(posterior.prior.decode(z)).double()

    def init(self, posterior: Posterior, draws: Draws) -> State:
        state = super().init(posterior, draws)
        return State(state.z, state.log_w, {**state.aux, "memory": state.aux["log_psi"]})

    def step(self, posterior: Posterior, state: State, k: int, draws: Draws) -> State:
        after = super().step(posterior, state, k, draws)
        if k == self.steps - 1 or self.potential == "difference":
            return after
        met, reward = state.aux["memory"], after.aux["log_psi"]
        whole = torch.maximum(met, reward) if self.potential == "max" else met + reward
        return dataclasses.replace(after, aux={**after.aux, "log_psi": whole, "memory": whole})
