r"""A trained network made into a denoiser by the preconditioning of Karras et al. (2022, eq. 7).

A network ``F`` sees inputs and targets of unit variance at every noise level; the denoiser is

.. math::
    D(z, \sigma) = c_{skip} z + c_{out} F(c_{in} z, c_{noise}), \qquad
    c_{skip} = \frac{s^2}{\sigma^2 + s^2}, \quad c_{out} = \frac{\sigma s}{\sqrt{\sigma^2 + s^2}}, \quad
    c_{in} = \frac{1}{\sqrt{\sigma^2 + s^2}}, \quad c_{noise} = \tfrac14 \ln\sigma,

with ``s`` the standard deviation of the latent data (``sigma_data``).  ``F`` is a U-Net of deepinv between a pixel
unshuffle and a pixel shuffle: the factor-2 shuffle keeps every value and makes the costly top level four times smaller.
Images whose sides the levels cannot halve are continued by their border values and cut again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from recon.errors import InputError, need
from recon.priors.base import Card, Prior
from recon.schedules import Schedule
from recon.space import Space

Side = Annotated[int, Field(ge=8)]


class Architecture(BaseModel):
    """The hyper-parameters that rebuild a network: the ``architecture`` section of a card.

    family: "adm" (ADMUNet: group norms, noise level embedded in every block) or "drunet" (DRUNet: convolutions without
    norms or biases, noise level as a constant input channel).  size: side of the image, or its two sides (ny, nx).  fields:
    how many values a pixel has (2 for a complex image, one per variable).  shuffle: factor of the pixel shuffle.  channels:
    per level, finest first.  blocks: residual blocks per level.  attention: image sides, after the shuffle, at which blocks
    attend (adm only).  position: give the network two channels that say where a pixel is.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    family: Literal["adm", "drunet"]
    size: Side | tuple[Side, Side]
    fields: int = Field(default=1, ge=1)
    shuffle: Literal[1, 2, 4] = 2
    channels: tuple[Annotated[int, Field(ge=1)], ...]
    blocks: int = Field(ge=1)
    attention: tuple[int, ...] = ()
    position: bool = False

    @property
    def sides(self) -> tuple[int, int]:
        """Rows and columns of the image."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    @property
    def padded(self) -> tuple[int, int]:
        """The sides with what the levels need to be halved."""
        step = self.shuffle * 2 ** (len(self.channels) - 1)
        ny, nx = (step * math.ceil(side / step) for side in self.sides)
        return ny, nx


class ShuffledUNet(nn.Module):
    """``F(z, c)``: pixel unshuffle, a deepinv U-Net on (n, fields shuffle^2, ny/shuffle, nx/shuffle), pixel shuffle."""

    position: Tensor

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        rows, columns = (side // architecture.shuffle for side in architecture.padded)
        self.down = nn.PixelUnshuffle(architecture.shuffle)
        self.up = nn.PixelShuffle(architecture.shuffle)
        self.unet = _unet(architecture, max(rows, columns))
        ramps = (torch.linspace(-1, 1, side) for side in (rows, columns))
        grid = torch.stack(torch.meshgrid(*ramps, indexing="ij"))
        self.register_buffer("position", grid[None], persistent=False)

    def forward(self, z: Tensor, c_noise: Tensor) -> Tensor:
        """``z`` (n, fields, ny, nx) of about unit variance, ``c_noise`` (n,); returns the shape of ``z``."""
        n, (ny, nx) = len(z), self.architecture.sides
        below, beside = self.architecture.padded[0] - ny, self.architecture.padded[1] - nx
        if below or beside:
            z = nn.functional.pad(z, (0, beside, 0, below), mode="replicate")
        parts = [self.down(z)]
        if self.architecture.position:
            parts.append(self.position.expand(n, -1, -1, -1))
        if self.architecture.family == "drunet":
            level = torch.stack([c_noise, torch.ones_like(c_noise)], dim=1)
            parts.append(level[:, :, None, None].expand(-1, -1, *parts[0].shape[2:]))
        hidden = torch.cat(parts, dim=1).contiguous(memory_format=torch.channels_last)
        drunet = self.architecture.family == "drunet"
        out: Tensor = self.up(self.unet.forward_unet(hidden) if drunet else self.unet.forward_unet(hidden, c_noise))
        return out[..., :ny, :nx] if below or beside else out


def _unet(architecture: Architecture, side: int) -> Any:  # noqa: ANN401  (a class of deepinv)
    models: Any = need("deepinv.models", "networks")
    channels, pixels = architecture.channels, architecture.fields * architecture.shuffle**2
    inputs = pixels + 2 * architecture.position
    if architecture.family == "drunet":
        if len(channels) != 4 or architecture.attention:
            raise InputError(f"drunet has exactly 4 levels and no attention; got channels {channels}")
        # DRUNet adds one channel for the noise level to those it is told of; the other is a constant, in place of biases.
        return models.DRUNet(inputs + 1, pixels, nc=channels, nb=architecture.blocks, pretrained=None)
    base = channels[0]
    if any(c % 32 or c % base for c in channels):
        raise InputError(f"adm takes channels that are multiples of 32 and of the first one; got {channels}")
    if channels[-1] < 64:
        raise InputError(f"adm attends at the coarsest level with heads of 64 channels; got {channels[-1]} there")
    network = models.ADMUNet(
        img_resolution=side,
        in_channels=inputs,
        out_channels=pixels,
        model_channels=base,
        channel_mult=tuple(c // base for c in channels),
        num_blocks=architecture.blocks,
        attn_resolutions=architecture.attention,
        dropout=0.0,
        pretrained=None,
    )
    nn.init.zeros_(network.out_conv.weight)
    return network


def build_network(architecture: Architecture, seed: int = 0) -> ShuffledUNet:
    """The network of ``architecture`` with random weights that depend on ``seed`` alone, channels last.

    Raises InputError for sizes, levels or channels that the family cannot have.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ShuffledUNet(architecture).to(memory_format=torch.channels_last)


def precondition(network: nn.Module, z: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
    """``D(z, sigma)`` of the module docstring in float32 around ``network``.

    z: (n, ny, nx) or (n, fields, ny, nx).  sigma: (n,).
    """
    level = sigma.to(torch.float32).reshape(-1, *[1] * (z.ndim - 1))
    z32 = z.to(torch.float32)
    total = level.square() + sigma_data**2
    inputs = z32 * total.rsqrt()
    output = network(inputs if z.ndim == 4 else inputs.unsqueeze(1), level.reshape(-1).log() / 4)
    output = output.to(torch.float32).reshape(z.shape)
    return (sigma_data**2 / total) * z32 + (level * sigma_data * total.rsqrt()) * output


class NetworkPrior(Prior):
    """A prior over images (y, x), or several fields on one grid (field, y, x), whose denoiser is a trained network.

    The parameters take no gradients.  network: ``F``.  sigma_data: standard deviation of the latent training data.
    ``x = shift + scale * z``, each one number or one per field.

    Raises InputError when the space has not two or three axes or sigma_data is not positive.
    """

    def __init__(
        self,
        space: Space,
        schedule: Schedule,
        card: Card,
        network: nn.Module,
        *,
        sigma_data: float,
        shift: float | Sequence[float] = 0.0,
        scale: float | Sequence[float] = 1.0,
    ) -> None:
        super().__init__(space, schedule, card, shift=shift, scale=scale)
        if len(space.shape) not in (2, 3):
            raise InputError(f"a NetworkPrior is over images (y, x) or (field, y, x); got {space.describe()}")
        if not sigma_data > 0:
            raise InputError(f"sigma_data must be positive; got {sigma_data}")
        self.sigma_data = float(sigma_data)
        self.network = network.eval().requires_grad_(False)

    def predict(self, z: Tensor, sigma: Tensor) -> Tensor:
        """The preconditioned network, differentiable with respect to ``z``; computes in float32, returns ``z.dtype``."""
        return precondition(self.network, z, sigma, self.sigma_data).to(z.dtype)
