"""Checkpoints of EDM (Karras et al. 2022): state dicts of SongUNet (DDPM++, NCSN++) and DhariwalUNet (ADM) networks.

The whole architecture is read from names and shapes; ``config`` tells the preconditioning and its constants, whose defaults
are the published ones.  Names may begin with ``model.`` (a preconditioned network) or not (the bare U-Net).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
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
from recon.priors.checkpoints.layers import attend, downsample, fourier, sinusoid, upsample
from recon.priors.checkpoints.safe import fill, state_dict
from recon.priors.checkpoints.tables import Clock, Form, LogClock, Noise, TableClock, VPClock
from recon.schedules import Schedule

Tensors = Mapping[str, Tensor]


class EdmConfig(Options):
    """The preconditioning: "edm", or "vp", "ve", "iddpm" for the baselines that were trained with EDM's code.

    sigma_data, channels_per_head and the range [sigma_min, sigma_max] default to the published values of each; beta_d, beta_min
    belong to vp.  zero_label: condition a network with classes on none of them, right only for one trained with dropped labels.
    """

    precondition: Literal["edm", "vp", "ve", "iddpm"] = "edm"
    sigma_data: float = Field(default=0.5, gt=0)
    sigma_min: float | None = Field(default=None, gt=0)
    sigma_max: float | None = Field(default=None, gt=0)
    beta_d: float = Field(default=19.9, gt=0)
    beta_min: float = Field(default=0.1, gt=0)
    steps: int = Field(default=1000, ge=2)
    channels_per_head: int = Field(default=64, ge=1)
    zero_label: bool = False


class Conv(nn.Module):
    """A convolution, a filtered change of size, or both; ``fused`` as the network was trained with it.

    resample: "", "up", "down".  A convolution of the larger grid comes after growing and after shrinking, except fused
    shrinking, where it comes first and the image is padded once for both.
    """

    weight: Tensor | None
    bias: Tensor | None
    resample_filter: Tensor | None

    def __init__(self, tensors: Tensors, name: str, resample: str = "", fused: bool = False) -> None:
        super().__init__()
        self.resample, self.fused = resample, fused
        for part in ("weight", "bias"):
            value = tensors.get(f"{name}.{part}")
            self.register_parameter(part, None if value is None else nn.Parameter(torch.empty(value.shape)))
        kernel = tensors.get(f"{name}.resample_filter")
        self.register_buffer("resample_filter", None if kernel is None else torch.empty(kernel.shape))

    def forward(self, x: Tensor) -> Tensor:
        kernel, weight = self.resample_filter, self.weight
        if self.fused and weight is not None and kernel is not None:
            pad = weight.shape[-1] // 2 + (kernel.shape[-1] - 1) // 2
            x = functional.conv2d(x, weight, padding=pad)
            x = functional.conv2d(x, kernel.expand(x.shape[1], 1, -1, -1), stride=2, groups=x.shape[1])
            return x if self.bias is None else x + self.bias[:, None, None]
        if kernel is not None:
            x = upsample(x, kernel) if self.resample == "up" else downsample(x, kernel)
        return x if weight is None else functional.conv2d(x, weight, self.bias, padding=weight.shape[-1] // 2)


class Style:
    """What tells the two families apart.  groups: of a norm over ``channels``; fixed_groups: 32 whatever the width."""

    def __init__(self, song: bool, channels_per_head: int, fixed_groups: bool = False) -> None:
        self.song, self.channels_per_head, self.fixed_groups = song, channels_per_head, fixed_groups
        self.gain, self.eps = (math.sqrt(0.5), 1e-6) if song else (1.0, 1e-5)

    def norm(self, channels: int, name: str) -> nn.GroupNorm:
        """The group norm called ``name``: groups of at least four channels, at most 32 of them."""
        groups = 32 if self.fixed_groups else min(32, channels // 4)
        if groups < 1 or channels % groups:
            raise InputError(f"{name} has {channels} channels, which its norm cannot split into {groups} groups")
        return nn.GroupNorm(groups, channels, eps=self.eps)

    def heads(self, channels: int) -> int:
        """Attention heads over ``channels``: one in SongUNet."""
        return 1 if self.song else channels // self.channels_per_head


class Block(nn.Module):
    """A residual block with the noise embedding, a change of size and attention where its tensors have them."""

    def __init__(self, tensors: Tensors, name: str, resample: str, style: Style) -> None:
        super().__init__()
        out, self.inside, *_ = tensors[f"{name}.conv0.weight"].shape
        rows, width = tensors[f"{name}.affine.weight"].shape
        self.film, self.gain, self.heads = rows == 2 * out, style.gain, 0
        self.norm0 = style.norm(self.inside, name)
        self.conv0 = Conv(tensors, f"{name}.conv0", resample)
        self.affine = nn.Linear(width, rows)
        self.norm1 = style.norm(out, name)
        self.conv1 = Conv(tensors, f"{name}.conv1")
        self.skip: nn.Module = nn.Identity()
        if any(entry.startswith(f"{name}.skip.") for entry in tensors):
            self.skip = Conv(tensors, f"{name}.skip", resample)
        if f"{name}.qkv.weight" in tensors:
            self.heads = style.heads(out)
            if self.heads < 1 or out % self.heads:
                raise InputError(f"{name} attends with {out} channels; channels_per_head in config must divide them")
            self.norm2 = style.norm(out, name)
            self.qkv, self.proj = Conv(tensors, f"{name}.qkv"), Conv(tensors, f"{name}.proj")

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv0(functional.silu(self.norm0(x)))
        e = self.affine(emb)[:, :, None, None]
        if self.film:
            scale, shift = e.chunk(2, dim=1)
            h = functional.silu(self.norm1(h) * (scale + 1) + shift)
        else:
            h = functional.silu(self.norm1(h + e))
        h = self.gain * (self.conv1(h) + self.skip(x))
        if self.heads:
            n, channels, *sides = h.shape
            qkv = self.qkv(self.norm2(h)).reshape(n, self.heads, channels // self.heads, 3, -1)
            q, k, v = qkv.unbind(3)
            h = self.gain * (h + self.proj(attend(q, k, v).reshape(n, channels, *sides)))
        return h


class EdmUNet(nn.Module):
    """SongUNet or DhariwalUNet, whichever the tensors are of.

    ``forward``: (n, c, ny, nx) and labels (n,) to (n, outputs, ny, nx).  condition: the classes (1, k), zeros for none, or
    None for a network without classes.  Raises InputError for tensors of neither.
    """

    condition: Tensor | None

    def __init__(self, tensors: Tensors, channels_per_head: int = 64, fixed_groups: bool = False) -> None:
        super().__init__()
        self.song = "out_conv.weight" not in tensors
        style = Style(self.song, channels_per_head, fixed_groups)
        width, self.width = tensors["map_layer0.weight"].shape
        self.map_noise = nn.Module()
        self.random = "map_noise.freqs" in tensors
        if self.random:
            self.map_noise.register_buffer("freqs", torch.empty(tensors["map_noise.freqs"].shape))
        self.map_layer0, self.map_layer1 = nn.Linear(self.width, width), nn.Linear(width, width)
        for name in ("map_label", "map_augment"):  # no augmentation is what a prior wants: its map is kept and not used
            if f"{name}.weight" in tensors:
                rows, columns = tensors[f"{name}.weight"].shape
                self.add_module(name, nn.Linear(columns, rows, bias=f"{name}.bias" in tensors))
        self.classes = tensors["map_label.weight"].shape[1] if "map_label.weight" in tensors else 0
        self.enc = _ordered(tensors, "enc", style)
        self.dec = _ordered(tensors, "dec", style)
        if not self.song:
            self.out_norm = style.norm(tensors["out_conv.weight"].shape[1], "out_norm")
            self.out_conv = Conv(tensors, "out_conv")
        self.register_buffer("condition", None, persistent=False)

    def embed(self, label: Tensor, like: Tensor) -> Tensor:
        """Features (n, width) of the labels and the class."""
        if self.random:
            features = fourier(label, self.map_noise.get_buffer("freqs").to(label.dtype))
        else:
            features = sinusoid(label, self.width, endpoint=self.song, sine_first=self.song)
        features, silu = features.to(like.dtype), functional.silu
        classes = None if self.condition is None else self.condition.to(like)
        if self.song:
            if classes is not None:
                features = features + self.get_submodule("map_label")(classes * math.sqrt(self.classes))
            return silu(self.map_layer1(silu(self.map_layer0(features))))
        features = self.map_layer1(silu(self.map_layer0(features)))
        return silu(features if classes is None else features + self.get_submodule("map_label")(classes))

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        emb = self.embed(label, x)
        skips: list[Tensor] = []
        side = x
        for name, block in self.enc.items():
            if "_aux_down" in name:
                side = block(side)
            elif "_aux_skip" in name:
                x = skips[-1] = x + block(side)
            elif "_aux_residual" in name:
                x = skips[-1] = side = (x + block(side)) * math.sqrt(0.5)
            else:
                x = block(x, emb) if isinstance(block, Block) else block(x)
                skips.append(x)
        answer: Tensor | None = None
        normed = x
        for name, block in self.dec.items():
            if "_aux_up" in name:
                answer = block(answer)
            elif "_aux_norm" in name:
                normed = functional.silu(block(x))
            elif "_aux_conv" in name:
                answer = block(normed) if answer is None else answer + block(normed)
            else:
                x = torch.cat([x, skips.pop()], dim=1) if x.shape[1] != block.inside else x
                x = block(x, emb)
        return answer if answer is not None else self.out_conv(functional.silu(self.out_norm(x)))


_KINDS = (
    "conv",
    "down",
    "in0",
    "in1",
    "up",
    "aux_down",
    "aux_skip",
    "aux_residual",
    "block",
    "aux_up",
    "aux_norm",
    "aux_conv",
)
_NAME = re.compile(r"(\d+)x\1_(" + "|".join(_KINDS) + r")(\d*)")


def _ordered(tensors: Tensors, part: str, style: Style) -> nn.ModuleDict:
    """The blocks of the encoder or decoder, in the order they run (files may hold them in any)."""
    names = {name.split(".")[1] for name in tensors if name.startswith(f"{part}.")}
    found = [(match, name) for name in names if (match := _NAME.fullmatch(name))]
    if not found or len(found) != len(names):
        raise InputError(
            f"the blocks of {part} are not those of an EDM network: {', '.join(sorted(names)[:4]) or 'none'}"
        )
    sign = -1 if part == "enc" else 1
    # "aux_down" comes after "down", "aux_up" after the blocks: the order within a level is that of _KINDS
    found.sort(key=lambda one: (sign * int(one[0][1]), _KINDS.index(one[0][2]), int(one[0][3] or 0)))
    blocks = nn.ModuleDict()
    for match, name in found:
        where, kind = f"{part}.{name}", match[2]
        resample = "down" if "down" in kind or kind == "aux_residual" else "up" if kind.endswith("up") else ""
        if f"{where}.conv0.weight" in tensors:
            blocks[name] = Block(tensors, where, resample, style)
        elif kind == "aux_norm":
            blocks[name] = style.norm(len(tensors[f"{where}.weight"]), where)
        else:
            blocks[name] = Conv(tensors, where, resample, fused=kind == "aux_residual")
    return blocks


def grid_of(tensors: Tensors) -> tuple[tuple[int, int], int]:
    """The sides the network was trained on and the number of its levels, from the names of its encoder."""
    sides = {int(name.split(".")[1].split("x")[0]) for name in tensors if re.match(r"enc\.\d+x\d+_", name)}
    return (max(sides), max(sides)), len(sides)


def edm_noise(config: EdmConfig) -> Noise:
    """Noise of a preconditioning: Karras et al. 2022, table 1 (columns EDM, VP, VE, iDDPM), with its published range."""
    if config.precondition == "edm":
        return _ranged(config, Form("edm", sigma_data=config.sigma_data), LogClock(), 0.002, 80.0)
    if config.precondition == "ve":
        return _ranged(config, Form("scaled_score", "ve"), LogClock(1.0, 2.0), 0.02, 100.0)
    if config.precondition == "vp":
        process = VPClock(config.beta_min, config.beta_min + config.beta_d, config.steps - 1)
        return _ranged(config, Form("epsilon"), process, process.sigma(1e-5), process.sigma(1.0))
    sigmas = iddpm_sigmas(config.steps)
    table = TableClock(sigmas, np.arange(len(sigmas)))
    return _ranged(config, Form("epsilon"), table, float(sigmas[0]), float(sigmas[-1]))


def _ranged(config: EdmConfig, form: Form, clock: Clock, low: float, high: float) -> Noise:
    bottom = low if config.sigma_min is None else config.sigma_min
    top = high if config.sigma_max is None else config.sigma_max
    return Noise(form, clock, Schedule(bottom, top))


def iddpm_sigmas(steps: int) -> np.ndarray:
    """Rising levels (steps,) of the improved-DDPM table: Karras et al. 2022, table 1, with C_1 = 0.001, C_2 = 0.008."""
    abar = np.sin(np.pi / 2 * np.arange(steps + 1) / steps / 1.008) ** 2
    u = np.zeros(steps + 1)
    for j in range(steps, 0, -1):
        u[j - 1] = np.sqrt((u[j] ** 2 + 1) / max(abar[j - 1] / abar[j], 0.001) - 1)
    return u[-2::-1]


def load_edm(request: Request) -> CheckpointPrior:
    """The prior of an EDM state dict.  Raises InputError for a file, config or space that do not fit."""
    config = request.options(EdmConfig)
    content, digest = request.read()
    tensors, entry = state_dict(content, request.path, config.entry)
    return edm_prior(request, config, tensors, {"format": "edm", "sha256": digest, "entry": entry})


def edm_prior(
    request: Request, config: EdmConfig, tensors: dict[str, Tensor], source: dict[str, Any], fixed_groups: bool = False
) -> CheckpointPrior:
    """The prior of the tensors of a SongUNet or DhariwalUNet.  fixed_groups: norms of 32 groups whatever their width."""
    tensors = {
        n.removeprefix("model."): v for n, v in tensors.items() if n != "u"
    }  # u: the table of iddpm, computed anew
    try:
        with torch.device("meta"):
            network = EdmUNet(tensors, config.channels_per_head, fixed_groups)
        first = next(value for name, value in tensors.items() if re.fullmatch(r"enc\.\d+x\d+_conv\.weight", name))
        last = "out_conv.weight" if not network.song else next(n for n in tensors if n.endswith("_aux_conv.weight"))
    except (KeyError, StopIteration) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else "its first or last convolution is missing"
        raise InputError(f"{request.path} does not hold an EDM network: {what}") from error
    except InputError as error:
        raise InputError(f"{request.path}: {error}") from error
    check_channels(request, first.shape[1], len(tensors[last]))
    trained, levels = grid_of(tensors)
    check_sides(request.path, image_space(request.space), 2 ** (levels - 1), trained, config.any_size)
    fill(network, tensors, request.path)
    network.condition = class_vector(request, network.classes, config.class_label, config.zero_label)
    noise = edm_noise(config)
    facts = {
        **{key: value for key, value in source.items() if key != "format"},
        "config": config.model_dump(exclude_none=True),
        "architecture": {
            "network": "SongUNet" if network.song else "DhariwalUNet",
            "embedding": "fourier" if network.random else "positional",
            "trained_on": list(trained),
            "levels": levels,
        },
    }
    return CheckpointPrior(request, network, noise, make_card(request, noise, source["format"], facts))
