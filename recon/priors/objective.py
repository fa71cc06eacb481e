r"""The loss a denoiser is trained on, and where its levels and noise come from (Karras et al. 2022, table 1).

.. math::
    L = E\, \lambda(\sigma)\, \| m \odot (D(z_0 + \sigma n, \sigma) - z_0) \|^2, \qquad
    \lambda(\sigma) = \frac{\sigma^2 + s^2}{(\sigma s)^2}, \qquad \ln\sigma \sim N(P_{mean}, P_{std}^2),

where a network that starts from a Wiener filter has the error of that in place of the weight, and
with a mask ``m`` that leaves out pixels of unknown value; a share ``tail`` of the levels is log-uniform over the whole
schedule, so that no level is left untrained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from recon.priors.denoising import Denoiser, denoising_error
from recon.priors.network import Context, estimate, precondition
from recon.priors.training_config import TrainingConfig
from recon.schedules import Schedule


class Batch(NamedTuple):
    """Latent images (n, ny, nx) or (n, field, ny, nx), masks (1.0 where the value is known), what the network is told."""

    images: Tensor
    known: Tensor
    context: Context | None = None


class HeldOut(NamedTuple):
    """Latent images for the validation curve, what the network is told of them, and where they are known (None: everywhere)."""

    images: Tensor
    context: Context | None = None
    known: Tensor | None = None


Batches = Callable[[int, Sequence[int]], Batch | tuple[Tensor, Tensor]]
"""(step, numbers within the batch of that step) -> those images: a pure function, called from several threads."""


class Objective(Protocol):
    """What training makes small, and the error that its validations report."""

    def loss(self, network: nn.Module, batch: Batch, sigma: Tensor, noise: Tensor) -> Tensor:
        """Of a batch with levels (n,) and white noise of the images' shape, summed over images and pixels: ()."""

    def error(self, network: nn.Module, held_out: HeldOut, sigma: float, device: torch.device) -> float:
        """Of held-out images at one of the validation's levels."""


@dataclass(frozen=True)
class Denoising:
    """``L`` of the module docstring, and the denoising error; sigma_data: standard deviation of the latent images."""

    sigma_data: float

    def loss(self, network: nn.Module, batch: Batch, sigma: Tensor, noise: Tensor) -> Tensor:
        """``denoising_loss``."""
        return denoising_loss(network, batch, sigma, noise, self.sigma_data)

    def error(self, network: nn.Module, held_out: HeldOut, sigma: float, device: torch.device) -> float:
        """``denoising_error``."""
        images, context, known = held_out
        return denoising_error(told_denoiser(network, self.sigma_data, context, device), images, sigma, known=known)


@dataclass(frozen=True)
class Task:
    """What is learnt: a network from its data.

    network: ``F`` of the preconditioned denoiser, trained in place.  batches: the data.  schedule: levels of noise.
    sigma_data: standard deviation of the latent images.  held_out: images for the validation curve.  identity: names the data
    and their normalisation; a checkpoint of another identity is refused.  objective: in place of denoising.
    """

    network: nn.Module
    batches: Batches
    schedule: Schedule
    sigma_data: float
    held_out: HeldOut | None = None
    identity: str = ""
    objective: Objective | None = None

    @property
    def aim(self) -> Objective:
        """What is made small."""
        return Denoising(self.sigma_data) if self.objective is None else self.objective


def denoising_loss(network: nn.Module, batch: Batch, sigma: Tensor, noise: Tensor, sigma_data: float) -> Tensor:
    """``L`` of the module docstring for a batch of ``n`` images at levels ``sigma`` (n,), summed over images and pixels."""
    images, mask, context = batch
    level = sigma.reshape(-1, *[1] * (images.ndim - 1))
    denoised, size = estimate(network, images + level * noise, sigma, sigma_data, context)
    return (mask * ((denoised - images) / size).square()).sum()


def told_denoiser(
    network: nn.Module, sigma_data: float, context: Context | None = None, device: torch.device | None = None
) -> Denoiser:
    """The preconditioned ``network`` as a denoiser of images that come in order, once, on the CPU; ``context`` is of all."""
    seen = 0

    def denoise(z: Tensor, sigma: float) -> Tensor:
        nonlocal seen
        there = z.device if device is None else device
        told = None if context is None else context.rows(slice(seen, seen + len(z))).to(there)
        seen += len(z)
        levels = torch.full((len(z),), sigma, device=there)
        return precondition(network, z.to(there), levels, sigma_data, told).to(z.device)

    return denoise


def levels_and_noise(
    config: TrainingConfig, schedule: Schedule, step: int, shape: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Noise levels (n,) and standard normal noise (n, ...) of a step: a pure function of (seed, step)."""
    # An array of uint64: numpy takes a list with a number above 2^63 through float64, which forgets the step.
    key = np.array([config.seed, (1 << 63) + step], dtype=np.uint64)
    random = np.random.Generator(np.random.Philox(key=key))
    log_sigma = config.p_mean + config.p_std * random.standard_normal(shape[0])
    low, high = math.log(schedule.sigma_min), math.log(schedule.sigma_max)
    flat = random.uniform(low, high, shape[0])
    log_sigma = np.where(random.random(shape[0]) < config.tail, flat, np.clip(log_sigma, low, high))
    noise = random.standard_normal(shape, dtype=np.float32)
    return torch.from_numpy(np.exp(log_sigma)).to(torch.float32), torch.from_numpy(noise)
