"""The split that DAPS and PnP-DM share: data and prior in turns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from recon.draws import Draws
from recon.posterior import Posterior
from recon.samplers.base import LevelSampler, State


@dataclass(frozen=True)
class Decoupled(LevelSampler):
    """``data_step`` draws an image that the data know of, ``prior_step`` takes it to the next level.

    What is estimated along with the image (``Blind``) is drawn between the two.
    """

    advice: ClassVar[str] = "take more steps, or a smaller rate where the data's step is one of Langevin steps"

    def data_step(self, posterior: Posterior, state: State, k: int, draws: Draws) -> Tensor:
        """A draw given the data and the state, in the latent: (n, *latent.shape)."""
        raise TypeError(f"{type(self).__name__} must define data_step")

    def prior_step(self, posterior: Posterior, state: State, found: Tensor, k: int, draws: Draws) -> State:
        """The next state from ``found``, what ``data_step`` drew; the data have no part in it."""
        raise TypeError(f"{type(self).__name__} must define prior_step")

    def keys(self) -> int:
        """How many keys of the noise a step uses; those of step ``k`` begin at ``k`` times that."""
        raise TypeError(f"{type(self).__name__} must define keys")

    def step(self, posterior: Posterior, state: State, k: int, draws: Draws) -> State:
        return self.prior_step(posterior, state, self.data_step(posterior, state, k, draws), k, draws)


def noise(posterior: Posterior, draws: Draws, key: int) -> Tensor:
    """Standard normal numbers in the shape, type and place of the prior's states: (n, *latent.shape)."""
    prior = posterior.prior
    return draws.normal(key, prior.latent.shape, "step", dtype=prior.dtype).to(prior.device)


def data_noise(posterior: Posterior, draws: Draws, key: int) -> Tensor:
    """Standard normal numbers in the shape, type and place of Gaussian data: (n, *range.shape)."""
    y = posterior.likelihood.gaussian().y
    return draws.normal(key, posterior.likelihood.operator.range.shape, "step", dtype=y.dtype).to(y.device)
