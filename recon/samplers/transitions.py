r"""One step from noise level ``sigma`` to ``sigma_next``, given the (guided) denoised state ``D``.

With ``tau = 1 - sigma_next^2 / sigma^2`` and ``e = (z - D) / sigma``; ``xi`` is fresh standard normal noise.
A transition never sees the data: whatever guides has already moved ``D``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from recon.errors import InputError


@dataclass(frozen=True)
class Transition:
    """``step(z, denoised, sigma, sigma_next, noise) -> z_next``; ``noise`` is None on the last step and when not random."""

    @property
    def random(self) -> bool:
        """Whether the step needs noise."""
        return True

    def step(self, z: Tensor, denoised: Tensor, sigma: float, sigma_next: float, noise: Tensor | None) -> Tensor:
        """The state at ``sigma_next``: (n, ...)."""
        raise TypeError("Transition is a contract; use Ancestral(), DDIM() or Renoise()")


@dataclass(frozen=True)
class Ancestral(Transition):
    """``z - tau (z - D) + sigma_next sqrt(tau) xi`` (Ho et al. 2020, variance-exploding form).

    The reverse kernel if ``p(z0 | z)`` had no width; output variance is low by about one step of ``log sigma``.
    """

    def step(self, z: Tensor, denoised: Tensor, sigma: float, sigma_next: float, noise: Tensor | None) -> Tensor:
        tau = 1 - (sigma_next / sigma) ** 2
        moved = z - tau * (z - denoised)
        return moved if noise is None else moved + sigma_next * math.sqrt(tau) * noise


@dataclass(frozen=True)
class DDIM(Transition):
    """``D + sqrt(sigma_next^2 - s^2) e + s xi`` with ``s = eta sigma_next sqrt(tau)`` (Song et al. 2021, eq. 12).

    eta = 0 is the Euler step of the probability-flow ODE, eta = 1 is ``Ancestral``.
    """

    eta: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise InputError(f"DDIM needs 0 <= eta <= 1; got {self.eta}")

    @property
    def random(self) -> bool:
        return self.eta > 0

    def step(self, z: Tensor, denoised: Tensor, sigma: float, sigma_next: float, noise: Tensor | None) -> Tensor:
        up = self.eta * sigma_next * math.sqrt(1 - (sigma_next / sigma) ** 2)
        moved = denoised + math.sqrt(sigma_next**2 - up**2) / sigma * (z - denoised)
        return moved if noise is None else moved + up * noise


@dataclass(frozen=True)
class Renoise(Transition):
    """``D + sigma_next (sqrt(1 - zeta) e + sqrt(zeta) xi)`` (Zhu et al. 2023, algorithm 1).

    A fixed share of noise is renewed per step, so it does not converge to the reverse SDE as steps grow.
    """

    zeta: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.zeta <= 1:
            raise InputError(f"Renoise needs 0 <= zeta <= 1; got {self.zeta}")

    @property
    def random(self) -> bool:
        return self.zeta > 0

    def step(self, z: Tensor, denoised: Tensor, sigma: float, sigma_next: float, noise: Tensor | None) -> Tensor:
        moved = denoised + sigma_next * math.sqrt(1 - self.zeta) / sigma * (z - denoised)
        return moved if noise is None else moved + sigma_next * math.sqrt(self.zeta) * noise
