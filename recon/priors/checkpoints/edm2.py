"""Checkpoints of EDM2 (Karras et al. 2024, magnitude-preserving U-Nets): state dicts with names as published.

The architecture is read from names and shapes.  Names may begin with ``unet.`` (a preconditioned network; its ``logvar_``
tensors, an estimate of the training loss, are not needed) or not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from recon.errors import InputError
from recon.priors.checkpoints.base import (
    CheckpointPrior,
    Options,
    Request,
    check_channels,
    check_sides,
    class_vector,
    image_space,
    make_card,
)
from recon.priors.checkpoints.edm import grid_of
from recon.priors.checkpoints.layers import attend, downsample, square_kernel, upsample
from recon.priors.checkpoints.safe import fill, state_dict
from recon.priors.checkpoints.tables import Form, LogClock, Noise
from recon.schedules import Schedule

Tensors = Mapping[str, Tensor]


class Edm2Config(Options):
    """Constants that the weights do not show; their defaults are the published ones.

    zero_label: condition a network with classes on none of them, right only for one trained with dropped labels.
    """

    sigma_data: float = Field(default=0.5, gt=0)
    sigma_min: float = Field(default=0.002, gt=0)
    sigma_max: float = Field(default=80.0, gt=0)
    channels_per_head: int = Field(default=64, ge=1)
    res_balance: float = Field(default=0.3, ge=0, le=1)
    attn_balance: float = Field(default=0.3, ge=0, le=1)
    label_balance: float = Field(default=0.5, ge=0, le=1)
    concat_balance: float = Field(default=0.5, ge=0, le=1)
    clip_act: float | None = 256.0
    zero_label: bool = False


def unit(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """``x`` over its root mean square along ``dim``, with 1e-4 added to the latter."""
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    return x / (1e-4 + norm * math.sqrt(norm.numel() / x.numel()))


def silu(x: Tensor) -> Tensor:
    """SiLU that keeps the magnitude of normal numbers (eq. 81)."""
    return functional.silu(x) / 0.596


def mix(a: Tensor, b: Tensor, t: float) -> Tensor:
    """``(1 - t) a + t b`` of unchanged magnitude for uncorrelated ``a``, ``b`` (eq. 88)."""
    return ((1 - t) * a + t * b) / math.hypot(1 - t, t)


def join(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Channels of both, weighted so that they contribute as ``1 - t`` to ``t`` (eq. 103)."""
    p, q = a.shape[1], b.shape[1]
    c = math.sqrt((p + q) / ((1 - t) ** 2 + t**2))
    return torch.cat([a * (c * (1 - t) / math.sqrt(p)), b * (c * t / math.sqrt(q))], dim=1)


class Weighted(nn.Module):
    """A linear layer or convolution whose rows have unit norm, whatever is stored (eqs. 47, 66)."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        stored = self.weight
        w = unit(stored, tuple(range(1, stored.ndim))) * (gain / math.sqrt(stored[0].numel()))
        return x @ w.T if w.ndim == 2 else functional.conv2d(x, w, padding=w.shape[-1] // 2)


class Block2(nn.Module):
    """A block of the encoder or decoder (figure 21); ``resample``: "", "up", "down"."""

    def __init__(self, tensors: Tensors, name: str, resample: str, config: Edm2Config) -> None:
        super().__init__()
        self.encodes, self.resample, self.config = name.startswith("enc."), resample, config
        self.emb_gain = nn.Parameter(torch.empty(()))
        for part in ("conv_res0", "emb_linear", "conv_res1"):
            self.add_module(part, Weighted(tensors[f"{name}.{part}.weight"].shape))
        self.conv_skip = _optional(tensors, f"{name}.conv_skip")
        self.attn_qkv = _optional(tensors, f"{name}.attn_qkv")
        self.attn_proj = _optional(tensors, f"{name}.attn_proj")
        channels = len(tensors[f"{name}.conv_res1.weight"])
        self.heads = channels // config.channels_per_head if self.attn_qkv is not None else 0
        if self.attn_qkv is not None and (self.heads < 1 or channels % self.heads):
            raise InputError(f"{name} attends with {channels} channels; channels_per_head in config must divide them")

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        config = self.config
        if self.resample:
            x = (upsample if self.resample == "up" else downsample)(x, square_kernel((1, 1)).to(x))
        if self.encodes:
            x = unit(x if self.conv_skip is None else self.conv_skip(x), 1)
        h = self.get_submodule("conv_res0")(silu(x))
        e = self.get_submodule("emb_linear")(emb, self.emb_gain) + 1
        h = self.get_submodule("conv_res1")(silu(h * e[:, :, None, None]))
        if not self.encodes and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = mix(x, h, config.res_balance)
        if self.attn_qkv is not None and self.attn_proj is not None:
            n, channels, *sides = x.shape
            qkv = self.attn_qkv(x).reshape(n, self.heads, channels // self.heads, 3, -1)
            q, k, v = unit(qkv, 2).unbind(3)
            x = mix(x, self.attn_proj(attend(q, k, v).reshape(n, channels, *sides)), config.attn_balance)
        return x if config.clip_act is None else x.clamp(-config.clip_act, config.clip_act)


def _optional(tensors: Tensors, name: str) -> Weighted | None:
    return Weighted(tensors[f"{name}.weight"].shape) if f"{name}.weight" in tensors else None


class Edm2UNet(nn.Module):
    """The U-Net of EDM2.  ``forward``: (n, c, ny, nx) and labels (n,) to (n, c, ny, nx).

    condition: the classes (1, k), zeros for none, or None for a network without classes.
    """

    condition: Tensor | None

    def __init__(self, tensors: Tensors, config: Edm2Config) -> None:
        super().__init__()
        self.config = config
        self.out_gain = nn.Parameter(torch.empty(()))
        self.emb_fourier = nn.Module()
        for name in ("freqs", "phases"):
            self.emb_fourier.register_buffer(name, torch.empty(tensors[f"emb_fourier.{name}"].shape))
        self.emb_noise = Weighted(tensors["emb_noise.weight"].shape)
        self.emb_label = _optional(tensors, "emb_label")
        self.classes = 0 if self.emb_label is None else self.emb_label.weight.shape[1]
        self.enc, self.dec = _ordered(tensors, "enc", config), _ordered(tensors, "dec", config)
        self.out_conv = Weighted(tensors["out_conv.weight"].shape)
        self.register_buffer("condition", None, persistent=False)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        freqs, phases = (self.emb_fourier.get_buffer(name).to(label.dtype) for name in ("freqs", "phases"))
        emb = self.emb_noise((math.sqrt(2) * (label[:, None] * freqs + phases).cos()).to(x.dtype))
        if self.emb_label is not None and self.condition is not None:
            classes = self.emb_label(self.condition.to(x) * math.sqrt(self.classes))
            emb = mix(emb, classes, self.config.label_balance)
        emb = silu(emb)
        x, skips = torch.cat([x, torch.ones_like(x[:, :1])], dim=1), []
        for block in self.enc.values():
            x = block(x, emb) if isinstance(block, Block2) else block(x)
            skips.append(x)
        for name, block in self.dec.items():
            x = block(join(x, skips.pop(), self.config.concat_balance) if "_block" in name else x, emb)
        return self.out_conv(x, self.out_gain)


_KINDS = ("conv", "down", "in0", "in1", "up", "block")


def _ordered(tensors: Tensors, part: str, config: Edm2Config) -> nn.ModuleDict:
    """The blocks of one part in the order they run (files may hold them in any)."""
    names = {name.split(".")[1] for name in tensors if name.startswith(f"{part}.")}

    def rank(name: str) -> tuple[int, int, int]:
        sides, _, kind = name.partition("_")
        stem = kind if kind in _KINDS else "block"
        number = kind.removeprefix("block") if stem == "block" else "0"
        if not number.isdigit() or not sides.split("x")[0].isdigit():
            raise InputError(f"{part}.{name} is no block of an EDM2 network")
        return (-1 if part == "enc" else 1) * int(sides.split("x")[0]), _KINDS.index(stem), int(number)

    blocks = nn.ModuleDict()
    for name in sorted(names, key=rank):
        where = f"{part}.{name}"
        if name.endswith("_conv"):
            blocks[name] = Weighted(tensors[f"{where}.weight"].shape)
        else:
            resample = "down" if name.endswith("_down") else "up" if name.endswith("_up") else ""
            blocks[name] = Block2(tensors, where, resample, config)
    return blocks


def load_edm2(request: Request) -> CheckpointPrior:
    """The prior of an EDM2 state dict.  Raises InputError for a file, config or space that do not fit."""
    config = request.options(Edm2Config)
    content, digest = request.read()
    named, entry = state_dict(content, request.path, config.entry)
    tensors = {n.removeprefix("unet."): v for n, v in named.items() if not n.startswith("logvar_")}
    try:
        with torch.device("meta"):
            network = Edm2UNet(tensors, config)
        first = next(v for n, v in tensors.items() if n.startswith("enc.") and n.endswith("_conv.weight"))
    except (KeyError, StopIteration) as error:
        raise InputError(f"{request.path} does not hold an EDM2 network: {error or 'enc'} is missing") from error
    except InputError as error:
        raise InputError(f"{request.path}: {error}") from error
    check_channels(request, first.shape[1] - 1, len(tensors["out_conv.weight"]))
    trained, levels = grid_of(tensors)
    check_sides(request.path, image_space(request.space), 2 ** (levels - 1), trained, config.any_size)
    fill(network, tensors, request.path)
    network.condition = class_vector(request, network.classes, config.class_label, config.zero_label)
    noise = Noise(Form("edm", sigma_data=config.sigma_data), LogClock(), Schedule(config.sigma_min, config.sigma_max))
    facts = {
        "sha256": digest,
        "entry": entry,
        "config": config.model_dump(),
        "architecture": {"network": "EDM2 UNet", "trained_on": list(trained), "levels": levels},
    }
    return CheckpointPrior(request, network, noise, make_card(request, noise, "edm2", facts))
