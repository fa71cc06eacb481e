r"""A trained network made into a denoiser by the preconditioning of Karras et al. (2022, eq. 7).

A network ``F`` sees inputs and targets of unit variance at every noise level; the denoiser is

.. math::
    D(z, \sigma) = c_{skip} z + c_{out} F(c_{in} z, c_{noise}), \qquad
    c_{skip} = \frac{s^2}{\sigma^2 + s^2}, \quad c_{out} = \frac{\sigma s}{\sqrt{\sigma^2 + s^2}}, \quad
    c_{in} = \frac{1}{\sqrt{\sigma^2 + s^2}}, \quad c_{noise} = \tfrac14 \ln\sigma,

with ``s`` the standard deviation of the latent data (``sigma_data``).  ``F`` is a U-Net of deepinv between a pixel
unshuffle and a pixel shuffle: the factor-2 shuffle keeps every value and makes the costly top level four times smaller.
A network with a ``skip`` starts from the Wiener filter of its images instead (``recon.priors.wiener``).
Images whose sides the levels cannot halve are continued by their border values and cut again.

Beside the image a network may be given channels of a condition on the image's grid (Ho et al. 2022, cascaded diffusion), and,
when its images are windows of a larger field, the place of each window (Wang et al. 2023, patch diffusion): ``Context``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from recon.errors import InputError, need
from recon.priors.base import Card, Prior
from recon.priors.layers import shorten
from recon.priors.wiener import PrincipalSkip, WienerSkip
from recon.schedules import Schedule
from recon.space import Space

Side = Annotated[int, Field(ge=8)]


class Context(NamedTuple):
    """What a network is told beside the image and the noise level.

    condition: channels on the image's grid (n, channel, ny, nx), normalised.  corner: row and column, in the whole field, of
    the first pixel of each image (n, 2).  Either is None where the network takes none.
    """

    condition: Tensor | None = None
    corner: Tensor | None = None

    def rows(self, chosen: slice) -> Context:
        """The context of some of the images."""
        return Context(*(None if part is None else part[chosen] for part in self))

    def to(self, device: torch.device) -> Context:
        """The same on ``device``; copies from pinned memory do not wait."""
        return Context(*(None if part is None else part.to(device, non_blocking=True) for part in self))


class Architecture(BaseModel):
    """The hyper-parameters that rebuild a network: the ``architecture`` section of a card.

    family: "adm" (ADMUNet: group norms, noise level embedded in every block) or "drunet" (DRUNet: convolutions without
    norms or biases, noise level as a constant input channel).  size: side of the image, or its two sides (ny, nx).  fields:
    how many values a pixel has (2 for a complex image, one per variable).  shuffle: factor of the pixel shuffle.  channels:
    per level, finest first.  blocks: residual blocks per level.  attention: image sides, after the shuffle, at which blocks
    attend (adm only).  position: give the network two channels that say where a pixel is.  condition: how many channels of
    conditions the network is given with an image.  whole: sides of the field of which the images are windows; None when
    images are whole.  wiener: start from the Wiener filter (``recon.priors.wiener``) in place of the linear estimate of white
    data, and give the network that estimate beside the image.  components: with ``wiener``, let the filter know so many
    principal components in place of a power spectrum; for small grids, whose places differ.

    Raises ValueError when an image is larger than the whole it is a window of, windows ask for the filter of whole images, or
    there cannot be so many components.
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
    condition: int = Field(default=0, ge=0)
    whole: tuple[Side, Side] | None = None
    wiener: bool = False
    components: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _window(self) -> Self:
        if self.whole is not None and any(side > whole for side, whole in zip(self.sides, self.whole, strict=True)):
            raise ValueError(f"images of {self.sides} pixels cannot be windows of a field of {self.whole}")
        if self.wiener and self.whole is not None:
            raise ValueError("windows have no one mean image and spectrum; wiener is for whole images")
        values = self.fields * math.prod(self.sides)
        if self.components and not (self.wiener and self.components < values):
            raise ValueError(f"components are of the filter (wiener: true), and fewer than the {values} values of an image")
        return self

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

    @property
    def placed(self) -> bool:
        """Whether an image means nothing without its place in the whole."""
        return self.whole is not None and (self.position or self.condition > 0)


class ShuffledUNet(nn.Module):
    """``F(z, c)``: pixel unshuffle, a deepinv U-Net on (n, fields shuffle^2, ny/shuffle, nx/shuffle), pixel shuffle.

    A condition is unshuffled like the image.  Position channels run from -1 to 1 over the image, or, for windows, over the
    whole field, at the centres of the shuffled pixels.
    """

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
        self.skip = _skip(architecture)

    def forward(self, z: Tensor, c_noise: Tensor, context: Context | None = None) -> Tensor:
        """``z`` (n, fields, ny, nx) of about unit variance, ``c_noise`` (n,); returns that shape.

        With ``wiener``, ``z`` is (n, 2 fields, ny, nx): the image and its linear estimate.

        Raises InputError when the context is not what the architecture takes.
        """
        condition, corner = context or Context()
        n, (ny, nx) = len(z), self.architecture.sides
        below, beside = self.architecture.padded[0] - ny, self.architecture.padded[1] - nx
        z = self._with_condition(z, condition)
        if below or beside:
            z = nn.functional.pad(z, (0, beside, 0, below), mode="replicate")
        parts = [self.down(z)]
        if self.architecture.position:
            parts.append(self._places(n, corner))
        if self.architecture.family == "drunet":
            level = torch.stack([c_noise, torch.ones_like(c_noise)], dim=1)
            parts.append(level[:, :, None, None].expand(-1, -1, *parts[0].shape[2:]))
        hidden = torch.cat(parts, dim=1).contiguous(memory_format=torch.channels_last)
        drunet = self.architecture.family == "drunet"
        out: Tensor = self.up(self.unet.forward_unet(hidden) if drunet else self.unet.forward_unet(hidden, c_noise))
        return out[..., :ny, :nx] if below or beside else out

    def _with_condition(self, z: Tensor, condition: Tensor | None) -> Tensor:
        channels = self.architecture.condition
        wanted, got = (len(z), channels, *z.shape[2:]), None if condition is None else tuple(condition.shape)
        if got != (wanted if channels else None):
            raise InputError(f"this network takes a condition of shape {wanted if channels else None}; got {got}")
        return z if condition is None else torch.cat([z, condition.to(z.dtype)], dim=1)

    def _places(self, n: int, corner: Tensor | None) -> Tensor:
        """The position channels (n, 2, rows, columns)."""
        whole, side = self.architecture.whole, self.architecture.shuffle
        if whole is None:
            return self.position.expand(n, -1, -1, -1)
        if corner is None or tuple(corner.shape) != (n, 2):
            got = None if corner is None else tuple(corner.shape)
            raise InputError(
                f"this network sees windows of a field {whole} and takes their corners ({n}, 2); got {got}"
            )
        rows, columns = self.position.shape[2:]
        corner = corner.to(self.position.dtype)
        cells = (torch.arange(count, device=corner.device) * side + (side - 1) / 2 for count in (rows, columns))
        y, x = (2 * (corner[:, axis, None] + cell) / (whole[axis] - 1) - 1 for axis, cell in enumerate(cells))
        return torch.stack([y[:, :, None].expand(-1, -1, columns), x[:, None, :].expand(-1, rows, -1)], dim=1)


def _skip(architecture: Architecture) -> WienerSkip | PrincipalSkip | None:
    shape = (architecture.fields, *architecture.sides)
    if architecture.components:
        return PrincipalSkip(shape, architecture.components)
    return WienerSkip(shape) if architecture.wiener else None


def _unet(architecture: Architecture, side: int) -> Any:  # noqa: ANN401  (a class of deepinv)
    models: Any = need("deepinv.models", "networks")
    channels, pixels = architecture.channels, architecture.fields * architecture.shuffle**2
    seen = architecture.fields * (1 + architecture.wiener) + architecture.condition
    inputs = seen * architecture.shuffle**2 + 2 * architecture.position
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
    shorten(network)
    return network


def build_network(architecture: Architecture, seed: int = 0) -> ShuffledUNet:
    """The network of ``architecture`` with random weights that depend on ``seed`` alone, channels last.

    Raises InputError for sizes, levels or channels that the family cannot have.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ShuffledUNet(architecture).to(memory_format=torch.channels_last)


def precondition(
    network: nn.Module, z: Tensor, sigma: Tensor, sigma_data: float, context: Context | None = None
) -> Tensor:
    """``D(z, sigma)`` of the module docstring around ``network``, in float64 for ``z`` in float64, else in float32.

    z: (n, ny, nx) or (n, fields, ny, nx).  sigma: (n,).  context: handed to the network when there is one.
    """
    return estimate(network, z, sigma, sigma_data, context)[0]


def estimate(
    network: nn.Module, z: Tensor, sigma: Tensor, sigma_data: float, context: Context | None = None
) -> tuple[Tensor, Tensor]:
    """``precondition``, and what the network's answer was multiplied by: ``c_out``, or ``e`` of a Wiener start (n, 1, ...)."""
    kind = torch.promote_types(z.dtype, torch.float32)
    images = (z if z.ndim == 4 else z.unsqueeze(1)).to(kind)
    level = sigma.to(kind).reshape(-1, 1, 1, 1)
    total = level.square() + sigma_data**2
    seen, skip = images * total.rsqrt(), getattr(network, "skip", None)
    if skip is None:
        linear, size = (sigma_data**2 / total) * images, level * sigma_data * total.rsqrt()
    else:
        linear, size = skip(images, level)
        seen = torch.cat([seen, linear / sigma_data], dim=1)
    told = () if context is None else (context,)
    output = network(seen, level.reshape(-1).log() / 4, *told).to(kind)
    return (linear + size * output).reshape(z.shape), size.reshape(-1, *[1] * (z.ndim - 1))


class NetworkPrior(Prior):
    """A prior over images (y, x), or several fields on one grid (field, y, x), whose denoiser is a trained network.

    The parameters take no gradients.  It computes in float32, after ``.double()`` in float64 throughout.  network: ``F``.
    sigma_data: standard deviation of the latent training data.  ``x = shift + scale * z``, each one number or one per field.
    A prior over windows of a larger field that were trained with their place denoises only once it is told where it stands:
    ``at``.

    Raises InputError when the space has not two or three axes or sigma_data is not positive.
    """

    condition: Tensor | None
    corner: Tensor | None
    one: Tensor

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
        self.register_buffer("condition", None)
        self.register_buffer("corner", None)
        # Of the type that ``double()`` and ``float()`` give the network, which may have no weights to tell.
        kind = next((p.dtype for p in network.parameters()), torch.float32)
        self.register_buffer("one", torch.ones((), dtype=kind), persistent=False)
        self.place: tuple[int, int] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Float32, or float64 after ``double()``.  Raises InputError for shorter types, in which no answer is right."""
        if self.one.dtype not in (torch.float32, torch.float64):
            raise InputError(
                f"{self.card.name} computes in float32 or float64; for {self.one.dtype} give the prior as it was loaded to "
                'accelerate(prior, Compute(precision="bfloat16"))'
            )
        return self.one.dtype

    @property
    def whole(self) -> tuple[int, int] | None:
        """Sides of the field of which the images are windows; None when they are whole."""
        architecture = getattr(self.network, "architecture", None)
        return architecture.whole if isinstance(architecture, Architecture) else None

    def at(self, row: int, column: int) -> NetworkPrior:
        """The prior of the window whose first pixel is (row, column) of the whole field; the network is shared.

        Raises InputError when the images are no windows, or the window does not lie inside the whole.
        """
        if self.whole is None:
            raise InputError(f"the images of {self.card.name} are whole; only windows of a larger field have a place")
        reach = [whole - side for whole, side in zip(self.whole, self.space.shape[-2:], strict=True)]
        if not (0 <= row <= reach[0] and 0 <= column <= reach[1]):
            raise InputError(
                f"windows of {self.card.name} start at rows 0 to {reach[0]} and columns 0 to {reach[1]}; got "
                f"({row}, {column})"
            )
        return self.told(self.condition, (row, column))

    def told(self, condition: Tensor | None, place: tuple[int, int] | None) -> NetworkPrior:
        """The same prior with a condition (1, channel, ny, nx), of the whole field for windows, and a window's place."""
        twin = NetworkPrior(self.space, self.schedule, self.card, self.network, sigma_data=self.sigma_data)
        twin.latent, twin.shift, twin.scale, twin.one = self.latent, self.shift, self.scale, self.one
        twin.condition, twin.place = condition, place
        twin.corner = None if place is None else torch.tensor([place], dtype=torch.float32, device=self.device)
        return twin

    def predict(self, z: Tensor, sigma: Tensor) -> Tensor:
        """The preconditioned network, differentiable with respect to ``z``; computes in ``dtype``, returns that of ``z``."""
        inner = z.to(self.dtype)
        return precondition(self.network, inner, sigma, self.sigma_data, self._context(len(z))).to(z.dtype)

    def _context(self, n: int) -> Context | None:
        condition, corner = self.condition, self.corner
        architecture = getattr(self.network, "architecture", None)
        if corner is None and isinstance(architecture, Architecture) and architecture.placed:
            raise InputError(f"{self.card.name} is over windows of a field {self.whole}: say which by at(row, column)")
        if condition is None and corner is None:
            return None
        if condition is not None:
            if self.place is not None:
                (row, column), (ny, nx) = self.place, self.space.shape[-2:]
                condition = condition[..., row : row + ny, column : column + nx]
            condition = condition.expand(n, -1, -1, -1)
        return Context(condition, None if corner is None else corner.expand(n, -1))
