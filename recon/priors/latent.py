"""A prior over images whose denoiser works in the latent of an autoencoder (Rombach et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from recon.errors import InputError
from recon.priors.autoencoder import Autoencoder
from recon.priors.base import Card, Prior
from recon.priors.network import NetworkPrior
from recon.schedules import Schedule
from recon.space import Space


class LatentPrior(NetworkPrior):
    """``x = shift + scale * d(z)`` with the decoder ``d`` of an autoencoder; the denoiser is over ``z`` (channel, y, x).

    networks: the denoiser's and the autoencoder.  sigma_data: of the standardised latent.  ``encode`` gives the latent of an
    image, whose ``decode`` is the image but for what the autoencoder loses.  ``affine`` is False: samplers that solve in
    physical units refuse, those that need gradients pass through the decoder.

    Raises InputError when space and autoencoder are of different images.
    """

    affine = False

    def __init__(
        self,
        space: Space,
        schedule: Schedule,
        card: Card,
        networks: tuple[nn.Module, Autoencoder],
        *,
        sigma_data: float = 1.0,
        shift: float | Sequence[float] = 0.0,
        scale: float | Sequence[float] = 1.0,
    ) -> None:
        network, coder = networks
        super().__init__(space, schedule, card, network, sigma_data=sigma_data, shift=shift, scale=scale)
        wanted = (coder.architecture.fields, *coder.architecture.sides)
        if (space.size // (wanted[1] * wanted[2]), *space.shape[-2:]) != wanted:
            raise InputError(f"the autoencoder is of images {wanted}; the space is {space.describe()}")
        self.latent = Space(("channel", "y", "x"), coder.architecture.shape, {}, "1")
        self.coder = coder.eval().requires_grad_(False)

    def told(self, condition: Tensor | None, place: tuple[int, int] | None) -> NetworkPrior:
        """Refused: latents of windows or with conditions are not there."""
        raise InputError(
            f"{self.card.name!r} is over latents, which have neither conditions nor a place in a larger field"
        )

    def decode(self, z: Tensor) -> Tensor:
        """From latents (..., channel, y, x) to physical images (..., *space.shape), differentiable."""
        batch = self.latent.require(tuple(z.shape), "decode")
        image = self.coder.decode(z.reshape(-1, *self.latent.shape))
        return Prior.decode(self, image.reshape(*batch, *self.space.shape))

    def decode_linear(self, dz: Tensor) -> Tensor:
        """Refused: the decoder is a network."""
        raise InputError(
            f"{self.card.name!r} decodes through a network, which has no linear part; use a latent sampler, or DPS"
        )

    def encode(self, x: Tensor) -> Tensor:
        """From physical images (..., *space.shape) to latents (..., channel, y, x)."""
        batch = self.space.require(tuple(x.shape), "encode")
        image = Prior.encode(self, x).reshape(-1, *self.space.shape)
        return self.coder.encode(image).reshape(*batch, *self.latent.shape)
