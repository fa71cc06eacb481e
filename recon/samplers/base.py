"""The contract of a sampler: explicit state, one draw never sees another, someone else owns the loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import ClassVar, Literal

import torch
from torch import Tensor

from recon.comm import Comm
from recon.draws import Draws
from recon.ensemble import Ensemble
from recon.errors import InputError
from recon.posterior import Posterior
from recon.samplers.transitions import Ancestral, Leg, Transition
from recon.schedules import Grid, Karras, Schedule

Claim = Literal["exact", "consistent", "heuristic"]

_WALK = "walk."  # names in ``aux`` that belong to the transition


@dataclass(frozen=True)
class State:
    """Where some draws are: tensors only, so that saving it is the checkpoint.

    z: (n, *latent.shape).  log_w: (n,) float64.  aux: a method's memory (momenta, duals, previous denoised states).
    """

    z: Tensor
    log_w: Tensor
    aux: Mapping[str, Tensor] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """Everything by name, for a file."""
        return {"z": self.z, "log_w": self.log_w, **{f"aux.{name}": value for name, value in self.aux.items()}}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> State:
        """The inverse of ``tensors``."""
        aux = {name.removeprefix("aux."): value for name, value in tensors.items() if name.startswith("aux.")}
        return cls(tensors["z"], tensors["log_w"], aux)


@dataclass(frozen=True)
class Sampler:
    """Draws from a posterior in ``steps`` steps; its fields are its hyper-parameters and its workflow section.

    claim: what is proven about its draws (``exact_for`` says for which problems).  couples: whether draws meet in ``couple``.
    advice: what to change when its states grow without bound.
    """

    claim: ClassVar[Claim] = "heuristic"
    exact_for: ClassVar[str] = ""
    needs: ClassVar[str] = ""
    cost: ClassVar[str] = ""
    couples: ClassVar[bool] = False
    advice: ClassVar[str] = "take more steps"

    steps: int = 100

    def check(self, posterior: Posterior) -> None:
        """Refuse a posterior this method cannot handle, before any work.  Raises InputError with the way out."""
        if self.steps < 2:
            raise InputError(f"{type(self).__name__} needs at least 2 steps; got {self.steps}")

    def init(self, posterior: Posterior, draws: Draws) -> State:
        """The state before step 0."""
        raise TypeError(f"{type(self).__name__} must define init")

    def step(self, posterior: Posterior, state: State, k: int, draws: Draws) -> State:
        """Step ``k`` of ``steps``; each draw by itself."""
        raise TypeError(f"{type(self).__name__} must define step")

    def couple(self, posterior: Posterior, state: State, k: int, draws: Draws, comm: Comm) -> State:
        """The only place where draws meet, after step ``k``; called when ``couples`` is true."""
        return state

    def place(self, posterior: Posterior, k: int) -> str:
        """Where step ``k`` starts, in words that tell a user more than its number (a noise level)."""
        return f"step {k}"

    def finish(self, posterior: Posterior, state: State) -> Ensemble:
        """The state as draws in physical units."""
        return Ensemble(posterior.prior.decode(state.z), posterior.space, state.log_w)


@dataclass(frozen=True)
class LevelSampler(Sampler):
    """A walk down a grid of noise levels from ``z = sigma_0 n``.

    sigma_max, sigma_min: narrow the prior's range (units of its latent).
    """

    grid: Grid = field(default_factory=Karras)
    sigma_max: float | None = None
    sigma_min: float | None = None

    def schedule(self, posterior: Posterior) -> Schedule:
        """The range of noise levels walked.  Raises InputError when it leaves the prior's."""
        whole = posterior.prior.schedule
        top, bottom = self.sigma_max or whole.sigma_max, self.sigma_min or whole.sigma_min
        if top > whole.sigma_max * (1 + 1e-9) or bottom < whole.sigma_min * (1 - 1e-9):
            raise InputError(
                f"prior {posterior.prior.card.name!r} is good for noise levels {whole.sigma_min:g} to {whole.sigma_max:g}; "
                f"{type(self).__name__} was asked to walk from {top:g} to {bottom:g}"
            )
        return Schedule(bottom, top)

    def sigmas(self, posterior: Posterior) -> Tensor:
        """The grid: float64 (steps + 1,), the last one zero."""
        return self.grid.sigmas(self.schedule(posterior), self.steps)

    def levels(self, posterior: Posterior) -> tuple[float, ...]:
        """``sigmas`` as numbers, computed once for each grid."""
        return _levels(self.grid, self.schedule(posterior), self.steps)

    def check(self, posterior: Posterior) -> None:
        super().check(posterior)
        self.levels(posterior)

    def init(self, posterior: Posterior, draws: Draws) -> State:
        prior = posterior.prior
        noise = draws.normal(0, prior.latent.shape, "init", dtype=prior.dtype).to(prior.device)
        return State(self.levels(posterior)[0] * noise, torch.zeros(len(draws), dtype=torch.float64))

    def place(self, posterior: Posterior, k: int) -> str:
        return f"sigma {self.levels(posterior)[k]:.4g}"


@cache
def _levels(grid: Grid, schedule: Schedule, steps: int) -> tuple[float, ...]:
    return tuple(grid.sigmas(schedule, steps).tolist())


@dataclass(frozen=True)
class GuidedSampler(LevelSampler):
    """A guided denoiser walked down the levels.

    ``D_y(z) = E[z0 | z, y]`` (each method has its approximation, ``guide``), and a ``transition``, any solver, from ``sigma_k``
    to ``sigma_{k+1}``, whose memory is kept in ``aux``.
    """

    transition: Transition = field(default_factory=Ancestral)

    def guide(self, posterior: Posterior, z: Tensor, sigma: float, sigma_next: float) -> Tensor:
        """``D_y``: the denoised state moved towards the data, (n, *latent.shape)."""
        raise TypeError(f"{type(self).__name__} must define guide")

    def step(self, posterior: Posterior, state: State, k: int, draws: Draws) -> State:
        levels, noise = self.levels(posterior), None
        if self.transition.random and levels[k + 1] > 0:
            noise = draws.normal(k, posterior.prior.latent.shape, "step", dtype=state.z.dtype).to(state.z.device)
        leg = Leg(levels, k, lambda z, sigma, after: self.guide(posterior, z, sigma, after), noise)
        memory = {name.removeprefix(_WALK): value for name, value in state.aux.items() if name.startswith(_WALK)}
        own = {name: value for name, value in state.aux.items() if not name.startswith(_WALK)}
        z, memory = self.transition.advance(state.z, memory, leg)
        return State(z, state.log_w, {**own, **{_WALK + name: value for name, value in memory.items()}})
