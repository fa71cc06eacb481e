r"""Plug-and-play diffusion models: split Gibbs sampling (Wu et al. 2024).

The image is doubled and the two copies coupled, ``p(y | u) p(x) exp(-|x - u|^2 / 2 rho^2)``; per step (algorithm 1)::

    u ~ p(y | u) N(u; x, rho^2 I)         # data: exact for linear Gaussian likelihoods, Langevin steps otherwise
    x ~ p(x) N(x; u, rho^2 I)             # prior: the reverse diffusion from u at sigma = rho, exactly rho, down to 0
    rho = max(decay rho, rho_min)

At a fixed rho the chain is ergodic for the doubled law, so its x has the posterior of a likelihood with ``rho^2 A A^T``
added to the noise covariance (linear operators): for N(0, s^2), ``y = a x + n``, variance
``1/(1/s^2 + a^2/(sigma_y^2 + a^2 rho^2))``. u has that of a prior widened by rho^2.  ``rho_min = sigma_y / (3 |A|)`` (the
default) widens no variance by more than 11 %. Where data are silent it mixes by a share of about ``rho^2`` (in units of the
prior's variance) per step, so rho falls slowly.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from recon.draws import Draws
from recon.errors import InputError
from recon.operators.cg import CG
from recon.posterior import Posterior
from recon.samplers.base import Claim, State
from recon.samplers.conditional import Noises, white_draw
from recon.samplers.daps import Kernel, draws_exactly, langevin_draw, largest_step, require_kernel
from recon.samplers.decoupled import Decoupled, data_noise, noise
from recon.samplers.inner import Inner
from recon.samplers.transitions import Leg, Renoise, SASolver, Transition
from recon.schedules import Grid, Karras, Schedule


@dataclass(frozen=True)
class PnPDM(Decoupled):
    """Split Gibbs sampling; each draw is the end of a chain of its own.

    rho_max, rho_min: of the coupling, units of the latent (left out: largest noise level of the prior; ``sigma_y / (3 |A|)``).
    decay: of rho per step (left out: so that rho_min is reached after three quarters of the steps).
    prior_steps, solver: of the reverse diffusion, on ``grid`` from rho to the smallest noise level; with 20 the variance is
    right to 1 %.  inner, langevin, cg: the data's step, as in DAPS.
    """

    claim: ClassVar[Claim] = "consistent"
    exact_for: ClassVar[str] = (
        "any prior, as rho_min goes to 0 and steps grow; at finite rho biased as its module states"
    )
    needs: ClassVar[str] = "differentiable likelihood; exact data steps need a linear operator and Gaussian noise"
    cost: ClassVar[str] = "P denoisers + one solve or M (A, A^T) per step"

    grid: Grid = field(default_factory=lambda: Karras(rho=3.0))
    rho_max: float | None = None
    rho_min: float | None = None
    decay: float | None = None
    prior_steps: int = 20
    solver: Transition = field(default_factory=SASolver)
    inner: Kernel = "auto"
    langevin: Inner = field(default_factory=Inner)
    cg: CG = field(default_factory=lambda: CG(iterations=20, tolerance=1e-5))

    def check(self, posterior: Posterior) -> None:
        super().check(posterior)
        schedule = self.schedule(posterior)
        require_kernel(posterior, self.inner, "PnPDM")
        if self.prior_steps < 2 or (self.decay is not None and not 0 < self.decay < 1):
            raise InputError(f"PnPDM needs prior_steps >= 2 and 0 < decay < 1; got {self.prior_steps} and {self.decay}")
        for name, rho in (("rho_max", self.rho_max), ("rho_min", self.rho_min)):
            if rho is not None and not schedule.sigma_min <= rho <= schedule.sigma_max * (1 + 1e-9):
                raise InputError(
                    f"the reverse diffusion starts at rho: {name} must lie in the noise levels of prior "
                    f"{posterior.prior.card.name!r}, {schedule.sigma_min:g} to {schedule.sigma_max:g}; got {rho:g}"
                )
        if not self.solver.random or isinstance(self.solver, Renoise):
            raise InputError(
                f"PnPDM's prior step is a draw of p(x | u), by the reverse diffusion; {self.solver} is not that. "
                "Use SASolver() or Ancestral()."
            )
        if self.rho_min is None and not draws_exactly(posterior, "auto"):
            raise InputError(
                "PnPDM finds rho_min = sigma_y / (3 |A|) for linear Gaussian likelihoods only; give rho_min, in units of the "
                "prior's latent"
            )

    def init(self, posterior: Posterior, draws: Draws) -> State:
        schedule = self.schedule(posterior)
        bottom = torch.tensor(self.rho_min or 0.0, dtype=torch.float64)
        if self.rho_min is None:
            bottom = (1 / (3 * largest_step(posterior))).clamp(schedule.sigma_min, self.top(posterior))
        start = super().init(posterior, draws)
        return State(
            start.z * (self.top(posterior) / schedule.sigma_max), start.log_w, {"rho_min": bottom.repeat(len(draws))}
        )

    def top(self, posterior: Posterior) -> float:
        """The first rho."""
        return self.rho_max or self.schedule(posterior).sigma_max

    def rho(self, posterior: Posterior, state: State, k: int) -> float:
        """The coupling of step ``k``."""
        top, bottom = self.top(posterior), float(state.aux["rho_min"][0])
        decay = self.decay or min(1.0, bottom / top) ** (1 / max(1, round(0.75 * self.steps)))
        return max(top * decay**k, bottom)

    def keys(self) -> int:
        return self.prior_steps + self.langevin.keys + 2

    def place(self, posterior: Posterior, k: int) -> str:
        return f"step {k}"  # rho is in the state

    def data_step(self, posterior: Posterior, state: State, k: int, draws: Draws) -> Tensor:
        rho, key = self.rho(posterior, state, k), k * self.keys() + self.prior_steps
        if draws_exactly(posterior, self.inner):
            noises = Noises(noise(posterior, draws, key), data_noise(posterior, draws, key + 1))
            return white_draw(posterior, state.z, rho, noises, self.cg)
        return langevin_draw(posterior, state.z, rho, self.langevin, (draws, key + 2))

    def prior_step(self, posterior: Posterior, state: State, found: Tensor, k: int, draws: Draws) -> State:
        rho, bottom = self.rho(posterior, state, k), self.schedule(posterior).sigma_min
        levels = [rho, 0.0]
        if rho > bottom * (1 + 1e-9):
            levels = self.grid.sigmas(Schedule(bottom, rho), self.prior_steps).tolist()
        z, memory = found, dict[str, Tensor]()
        for i in range(len(levels) - 1):
            xi = noise(posterior, draws, k * self.keys() + i) if levels[i + 1] > 0 else None
            leg = Leg(levels, i, lambda z, sigma, _: posterior.denoise(z, sigma), xi)
            z, memory = self.solver.advance(z, memory, leg)
        return State(z, state.log_w, state.aux)
