"""Latent diffusion: the denoiser works in the latent space of an autoencoder, and decode is a network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from recon.errors import InputError
from recon.priors.base import Card
from recon.priors.checkpoints.base import CheckpointPrior, Request
from recon.priors.checkpoints.tables import Noise
from recon.space import Space


class Codec(nn.Module):
    """A diffusers autoencoder between images and the latents its diffusion was trained on.

    ``z = (latent - shift_factor) * scaling_factor``, or, where the autoencoder stores the mean and standard deviation of its
    latents, ``z = (latent - mean) * scaling_factor / std``.  The latent of an image is the mean of the encoder's normal
    distribution (AutoencoderKL), or the vector before it is quantised (VQModel).
    """

    shift: Tensor
    gain: Tensor

    def __init__(self, autoencoder: Any) -> None:  # noqa: ANN401  (a class of diffusers)
        super().__init__()
        self.autoencoder = autoencoder.eval().requires_grad_(False)
        config = autoencoder.config
        self.factor = 2 ** (len(config.block_out_channels) - 1)
        self.channels = (config.in_channels, config.out_channels)
        self.latents = config.latent_channels
        mean, std = config.get("latents_mean"), config.get("latents_std")
        shift, gain = torch.tensor(float(config.get("shift_factor") or 0.0)), torch.tensor(float(config.scaling_factor))
        if mean is not None and std is not None:
            shift, gain = torch.tensor(mean).reshape(-1, 1, 1), gain / torch.tensor(std).reshape(-1, 1, 1)
        self.register_buffer("shift", shift, persistent=False)
        self.register_buffer("gain", gain, persistent=False)

    def encode(self, image: Tensor) -> Tensor:
        """(n, c, ny, nx) to (n, latents, ny / factor, nx / factor)."""
        coded = self.autoencoder.encode(image.to(self.gain.dtype))
        latent = coded.latent_dist.mean if hasattr(coded, "latent_dist") else coded.latents
        return ((latent - self.shift) * self.gain).to(image.dtype)

    def decode(self, z: Tensor) -> Tensor:
        """(n, latents, ny / factor, nx / factor) to (n, c, ny, nx), differentiable."""
        latent = z.to(self.gain.dtype) / self.gain + self.shift
        return self.autoencoder.decode(latent, return_dict=False)[0].to(z.dtype)


class LatentCheckpointPrior(CheckpointPrior):
    """A denoiser over ``latent`` (channel, y, x); ``x = shift + scale * codec.decode(z)``.

    Gradients pass through the decoder.  ``affine`` is False and ``decode_linear`` refuses.
    """

    affine = False

    def __init__(self, request: Request, network: nn.Module, noise: Noise, card: Card, codec: Codec) -> None:
        super().__init__(request, network, noise, card)
        rows, columns = (side // codec.factor for side in self.space.shape[-2:])
        self.latent = Space(("channel", "y", "x"), (codec.latents, rows, columns), {}, "1")
        self.codec = codec

    def decode(self, z: Tensor) -> Tensor:
        self.latent.require(tuple(z.shape), "decode")
        image = self.codec.decode(z.reshape(-1, *self.latent.shape))
        return super().decode(image.reshape(*z.shape[:-3], *self.space.shape))

    def decode_linear(self, dz: Tensor) -> Tensor:
        raise InputError(
            f"{self.card.name!r} decodes through a network, which has no linear part; use a latent sampler"
        )

    def encode(self, x: Tensor) -> Tensor:
        batch = self.space.require(tuple(x.shape), "encode")
        rows, columns = self.space.shape[-2:]
        image = super().encode(x).reshape(-1, self.codec.channels[0], rows, columns)
        return self.codec.encode(image).reshape(*batch, *self.latent.shape)
