r"""An autoencoder of images: a small latent in which a denoiser is cheap.

The encoder ``e(x)`` and decoder ``d(z)`` are trained as a variational autoencoder whose encoder has the fixed noise ``s``
(Kingma and Welling 2014, eq. 10, with both variances given), per image

.. math::
    L = \| m \odot (d(e(x) + s n) - x) \|^2 + g^2 \| e(x) \|^2, \qquad n \sim N(0, I),

with the mask ``m`` of known pixels and the standard deviation ``g`` that the decoder is allowed.  The noise makes the decoder
smooth: a latent that is a little wrong decodes to an image that is a little wrong, which samplers rely on.  The latent that a
denoiser sees is standardised channel by channel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from recon.errors import InputError
from recon.priors.network import Side
from recon.priors.objective import Batch, HeldOut

_GROUP = 8  # channels that are normalised together


class AutoencoderArchitecture(BaseModel):
    """The hyper-parameters that rebuild an autoencoder.

    size: side of the image, or its two sides.  fields: values of a pixel.  shuffle: factor of the pixel shuffle at both ends.
    channels: per level, finest first; each level after the first halves the sides.  blocks: residual blocks per level.
    latents: channels of the latent.

    Raises ValueError for sides that the levels cannot halve.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: Side | tuple[Side, Side]
    fields: int = Field(default=1, ge=1)
    shuffle: Literal[1, 2, 4] = 2
    channels: tuple[Annotated[int, Field(ge=_GROUP, multiple_of=_GROUP)], ...] = Field(min_length=1)
    blocks: int = Field(default=1, ge=1)
    latents: int = Field(ge=1)

    @model_validator(mode="after")
    def _halved(self) -> AutoencoderArchitecture:
        if any(side % self.factor for side in self.sides):
            raise ValueError(
                f"sides {self.sides} are not multiples of {self.factor}, by which the levels shrink an image"
            )
        return self

    @property
    def sides(self) -> tuple[int, int]:
        """Rows and columns of the image."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    @property
    def factor(self) -> int:
        """How many pixels of the image, along each side, one of the latent stands for."""
        return int(self.shuffle * 2 ** (len(self.channels) - 1))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the latent of one image: (latents, rows, columns)."""
        return (self.latents, self.sides[0] // self.factor, self.sides[1] // self.factor)


class Autoencoder(nn.Module):
    """Encoder and decoder; ``encode`` and ``decode`` speak the standardised latent ``(e(x) - mean) / std``."""

    mean: Tensor
    std: Tensor

    def __init__(self, architecture: AutoencoderArchitecture) -> None:
        super().__init__()
        self.architecture = a = architecture
        pixels, widths = a.fields * a.shuffle**2, a.channels
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(a.shuffle), _conv(pixels, widths[0]), *_levels(widths, a.blocks, down=True),
            *_ending(widths[-1], a.latents),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            _conv(a.latents, widths[-1]), *_levels(widths[::-1], a.blocks, down=False),
            *_ending(widths[0], pixels), nn.PixelShuffle(a.shuffle),
        )  # fmt: skip
        self.register_buffer("mean", torch.zeros(a.latents, 1, 1), persistent=False)
        self.register_buffer("std", torch.ones(a.latents, 1, 1), persistent=False)

    def forward(self, image: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """``e(x)`` and ``d(e(x) + noise)`` of images (n, fields, ny, nx)."""
        latent = self.encoder(image.contiguous(memory_format=torch.channels_last))
        return latent, self.decoder(latent + noise)

    def encode(self, image: Tensor) -> Tensor:
        """Images (n, ny, nx) or (n, fields, ny, nx) to standardised latents (n, latents, rows, columns)."""
        planes = image.reshape(len(image), -1, *image.shape[-2:]).to(self.mean.dtype)
        latent = self.encoder(planes.contiguous(memory_format=torch.channels_last))
        return ((latent - self.mean) / self.std).contiguous().to(image.dtype)

    def decode(self, z: Tensor) -> Tensor:
        """Standardised latents to images (n, fields, ny, nx), differentiable."""
        latent = z.to(self.mean.dtype) * self.std + self.mean
        out: Tensor = self.decoder(latent.contiguous(memory_format=torch.channels_last))
        return out.contiguous().to(z.dtype)

    def standardise(self, images: Tensor, batch: int = 16) -> None:
        """Take mean and standard deviation of each latent channel from images (n, [fields,] ny, nx)."""
        self.mean.zero_()
        self.std.fill_(1.0)
        with torch.no_grad():
            latents = torch.cat([self.encode(part) for part in images.split(batch)])
        values = latents.double().transpose(0, 1).flatten(1)
        self.mean.copy_(values.mean(1).reshape(-1, 1, 1))
        self.std.copy_(values.std(1).clamp(min=1e-6).reshape(-1, 1, 1))

    def known(self, mask: Tensor) -> Tensor:
        """Where a latent is known: its pixels all are.  (n, [fields,] ny, nx), bool or numbers 0 and 1, to (n, latents, rows,
        columns).
        """
        planes = mask.reshape(len(mask), -1, *mask.shape[-2:]).amin(1, keepdim=True)
        unknown = 1 - planes.to(self.mean.dtype)  # pooling knows no bool
        pooled = 1 - nn.functional.max_pool2d(unknown, self.architecture.factor)
        return pooled.to(mask.dtype).expand(-1, self.architecture.latents, -1, -1)


def build_autoencoder(architecture: AutoencoderArchitecture, seed: int = 0) -> Autoencoder:
    """The autoencoder with random weights that depend on ``seed`` alone, channels last."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Autoencoder(architecture).to(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Autoencoding:
    """The loss of the module docstring as an objective of training; ``noise`` is ``s``, ``fidelity`` is ``g``.

    Raises InputError when either is not positive.
    """

    noise: float
    fidelity: float

    def __post_init__(self) -> None:
        if not (self.noise > 0 and self.fidelity > 0):
            raise InputError(f"an autoencoder needs noise > 0 and fidelity > 0; got {self.noise} and {self.fidelity}")

    def loss(self, network: nn.Module, batch: Batch, sigma: Tensor, noise: Tensor) -> Tensor:
        """Summed over images and pixels.  The levels ``sigma`` are those of denoisers and play no part."""
        images, mask, _ = batch
        planes = _planes(images)
        latent, back = network(planes, self.noise * _latent_noise(network, noise))
        wrong: Tensor = (_planes(mask) * (back - planes)).square().sum()
        return wrong + self.fidelity**2 * latent.square().sum()

    def error(self, network: nn.Module, held_out: HeldOut, sigma: float, device: torch.device) -> float:
        """RMSE per pixel of images that were coded, disturbed by ``sigma`` in the latent, and decoded."""
        total, images = 0.0, held_out.images
        generator = torch.Generator().manual_seed(0)
        for part in images.split(16):
            noise = torch.randn(part.shape, generator=generator).to(device)
            planes = _planes(part.to(device))
            with torch.no_grad():
                _, back = network(planes, sigma * _latent_noise(network, noise))
            total += float((back - planes).double().square().sum())
        return math.sqrt(total / images.numel())


def _latent_noise(network: nn.Module, noise: Tensor) -> Tensor:
    """White noise of the shape of a latent out of white noise of that of an image.

    Raises InputError when a latent has more values than an image.
    """
    architecture = network.architecture
    assert isinstance(architecture, AutoencoderArchitecture)
    cells = nn.functional.pixel_unshuffle(_planes(noise), architecture.factor)
    if cells.shape[1] < architecture.latents:
        raise InputError(
            f"{architecture.latents} latent channels are more than the {cells.shape[1]} values they stand for"
        )
    return cells[:, : architecture.latents]


def _planes(images: Tensor) -> Tensor:
    return images.unsqueeze(1) if images.ndim == 3 else images


class _Residual(nn.Module):
    """``x + c(a(n(c(a(n(x))))))``: group norms, SiLU and 3 x 3 convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.GroupNorm(width // _GROUP, width), nn.SiLU(), _conv(width, width),
            nn.GroupNorm(width // _GROUP, width), nn.SiLU(), _conv(width, width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.layers(x)
        return out


def _levels(widths: tuple[int, ...], blocks: int, down: bool) -> list[nn.Module]:
    """Residual blocks of each width with a change of sides between widths."""
    layers: list[nn.Module] = []
    for i, width in enumerate(widths):
        if i and down:
            layers.append(nn.Conv2d(widths[i - 1], width, 3, stride=2, padding=1))
        elif i:
            layers += [nn.Upsample(scale_factor=2.0, mode="nearest"), _conv(widths[i - 1], width)]
        layers += [_Residual(width) for _ in range(blocks)]
    return layers


def _ending(width: int, channels: int) -> list[nn.Module]:
    return [nn.GroupNorm(width // _GROUP, width), nn.SiLU(), _conv(width, channels)]


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)
