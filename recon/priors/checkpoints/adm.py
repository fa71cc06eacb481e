"""Checkpoints of guided-diffusion (ADM: Dhariwal & Nichol 2021) and of DiffUNet, which has the same tensors.

Widths, depth, attention, class embedding, scale-shift norms and residual resampling are read from the shapes; what shapes do
not show (heads, their order, the noise table) must be in ``config``, under the names of the published flags.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

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
    check_label,
    check_sides,
    check_told,
    image_space,
    make_card,
)
from recon.priors.checkpoints.layers import attend, sinusoid
from recon.priors.checkpoints.safe import fill, state_dict
from recon.priors.checkpoints.tables import Noise, betas, table_noise, vp_sigmas

Tensors = Mapping[str, Tensor]


class AdmConfig(Options):
    """The published flags.  Needed: one of num_heads and num_head_channels, and noise_schedule.

    Flags of the architecture may be given and are checked against the weights; those of training and sampling
    (dropout, use_kl, timestep_respacing, ...) are accepted and change nothing.
    """

    num_heads: int | None = Field(default=None, ge=1)
    num_head_channels: int = -1
    num_heads_upsample: int = -1
    use_new_attention_order: bool = False
    noise_schedule: Literal["linear", "cosine"]
    diffusion_steps: int = Field(default=1000, ge=2)
    predict_xstart: bool = False
    rescale_timesteps: bool = False
    image_size: int | None = None
    num_channels: int | None = None
    num_res_blocks: int | None = None
    channel_mult: str | None = None
    attention_resolutions: str | None = None
    learn_sigma: bool | None = None
    class_cond: bool | None = None
    use_scale_shift_norm: bool | None = None
    resblock_updown: bool | None = None
    dropout: float = 0.0
    use_checkpoint: bool = False
    use_fp16: bool = False
    use_kl: bool = False
    rescale_learned_sigmas: bool = False
    timestep_respacing: str = ""
    sigma_small: bool = False
    batch_size: int | None = None
    num_samples: int | None = None
    use_ddim: bool = False
    clip_denoised: bool = True

    def heads(self, channels: int, up: bool) -> int:
        """Attention heads of a block with ``channels``."""
        if self.num_head_channels != -1:
            return channels // self.num_head_channels
        return self.num_heads_upsample if up and self.num_heads_upsample != -1 else self.num_heads or 0


class Residual(nn.Module):
    """Two normalised convolutions around the embedding, beside a shortcut; ``resample``: "", "up" or "down"."""

    def __init__(self, tensors: Tensors, name: str, resample: str) -> None:
        super().__init__()
        out, inside, *_ = tensors[f"{name}.in_layers.2.weight"].shape
        rows, width = tensors[f"{name}.emb_layers.1.weight"].shape
        self.resample, self.film = resample, rows == 2 * out
        self.in_layers = nn.Sequential(nn.GroupNorm(32, inside), nn.SiLU(), nn.Conv2d(inside, out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(width, rows))
        last = nn.Conv2d(out, out, 3, padding=1)
        self.out_layers = nn.Sequential(nn.GroupNorm(32, out), nn.SiLU(), nn.Identity(), last)
        shortcut = tensors.get(f"{name}.skip_connection.weight")
        self.skip_connection: nn.Module = nn.Identity()
        if shortcut is not None:
            side = shortcut.shape[-1]
            self.skip_connection = nn.Conv2d(inside, out, side, padding=side // 2)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers[1](self.in_layers[0](x))
        h = self.in_layers[2](_resampled(h, self.resample))
        e = self.emb_layers(emb)[:, :, None, None]
        if self.film:
            scale, shift = e.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + e)
        return self.skip_connection(_resampled(x, self.resample)) + h


def _resampled(x: Tensor, how: str) -> Tensor:
    if how == "up":
        return functional.interpolate(x, scale_factor=2, mode="nearest")
    return functional.avg_pool2d(x, 2) if how == "down" else x


class Attention(nn.Module):
    """Self-attention over pixels; ``heads_first``: whether the channels of ``qkv`` run over heads before q, k, v."""

    def __init__(self, channels: int, heads: int, heads_first: bool) -> None:
        super().__init__()
        self.heads, self.heads_first = heads, heads_first
        self.norm = nn.GroupNorm(32, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)
        n, channels, pixels = flat.shape
        parts = (self.heads, 3) if self.heads_first else (3, self.heads)
        qkv = self.qkv(self.norm(flat)).reshape(n, *parts, channels // self.heads, pixels)
        q, k, v = qkv.unbind(2 if self.heads_first else 1)
        return (flat + self.proj_out(attend(q, k, v).reshape(n, channels, pixels))).reshape(x.shape)


class Resample(nn.Module):
    """A plain change of size: a convolution of stride 2 (``op``), or doubling and a convolution (``conv``)."""

    def __init__(self, name: str, channels: int) -> None:
        super().__init__()
        self.up = name == "conv"
        self.add_module(name, nn.Conv2d(channels, channels, 3, stride=1 if self.up else 2, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.get_submodule("conv" if self.up else "op")(_resampled(x, "up" if self.up else ""))


class AdmUNet(nn.Module):
    """The U-Net of guided-diffusion, rebuilt from the shapes of its tensors.

    ``forward``: (n, c, ny, nx) and labels (n,) to (n, c or 2 c, ny, nx).  Raises InputError for tensors of another network.
    """

    def __init__(self, tensors: Tensors, config: AdmConfig) -> None:
        super().__init__()
        self.plan = Plan(tensors)
        width, self.width = tensors["time_embed.0.weight"].shape
        self.time_embed = nn.Sequential(nn.Linear(self.width, width), nn.SiLU(), nn.Linear(width, width))
        self.classes = len(tensors["label_emb.weight"]) if "label_emb.weight" in tensors else 0
        if self.classes:
            self.label_emb = nn.Embedding(self.classes, width)
        make = _Maker(tensors, config, self.plan)
        self.input_blocks = nn.ModuleList(make.block("input_blocks", i) for i in range(self.plan.inputs))
        self.middle_block = make.block("middle_block", None)
        self.output_blocks = nn.ModuleList(make.block("output_blocks", i) for i in range(self.plan.outputs))
        out, last, *_ = tensors["out.2.weight"].shape
        self.out = nn.Sequential(nn.GroupNorm(32, last), nn.SiLU(), nn.Conv2d(last, out, 3, padding=1))
        self.index = 0  # of the class

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        features = sinusoid(label, self.width, endpoint=False, sine_first=False)
        emb = self.time_embed(features.to(x.dtype))
        if self.classes:
            emb = emb + self.label_emb.weight[self.index]
        skips, h = [], x
        for block in self.input_blocks:
            h = _run(block, h, emb)
            skips.append(h)
        h = _run(self.middle_block, h, emb)
        for block in self.output_blocks:
            h = _run(block, torch.cat([h, skips.pop()], dim=1), emb)
        return self.out(h)


def _run(block: nn.Module, h: Tensor, emb: Tensor) -> Tensor:
    for layer in block.children():
        h = layer(h, emb) if isinstance(layer, Residual) else layer(h)
    return h


class Plan:
    """Levels, blocks per level and where sizes change, read from names and shapes.

    Raises InputError when the names are not those of a guided-diffusion U-Net.
    """

    def __init__(self, tensors: Tensors) -> None:
        self.inputs, self.outputs = _count(tensors, "input_blocks"), _count(tensors, "output_blocks")
        # an output block that ends with a change of size has a layer "conv", or a second residual block
        self.ups = [i for i in range(self.outputs) if self._grows(tensors, i)]
        levels = len(self.ups) + 1
        self.levels, self.blocks = levels, self.outputs // levels - 1
        self.residual = not any(name.endswith((".op.weight", ".conv.weight")) for name in tensors)
        fits = self.outputs == levels * (self.blocks + 1) and self.inputs == levels * (self.blocks + 1)
        if not fits or self.ups != [(i + 1) * (self.blocks + 1) - 1 for i in range(levels - 1)]:
            raise InputError(
                f"these are not the blocks of a guided-diffusion U-Net with learned changes of size: {self.inputs} in, "
                f"{self.outputs} out, growing after {self.ups}"
            )

    @staticmethod
    def _grows(tensors: Tensors, i: int) -> bool:
        return any(
            f"output_blocks.{i}.{j}.{name}" in tensors for j in (1, 2) for name in ("conv.weight", "in_layers.0.weight")
        )

    def shrinks(self, i: int) -> bool:
        """Whether input block ``i`` is the step down to the next level."""
        return i > 0 and i % (self.blocks + 1) == 0

    def attention(self, tensors: Tensors) -> list[int]:
        """The factors by which the grid is reduced where input blocks attend."""
        blocks = [i for i in range(self.inputs) if f"input_blocks.{i}.1.qkv.weight" in tensors]
        return sorted({2 ** ((i - 1) // (self.blocks + 1)) for i in blocks})


def _count(tensors: Tensors, part: str) -> int:
    numbers = {int(name.split(".")[1]) for name in tensors if name.startswith(f"{part}.")}
    if not numbers or numbers != set(range(len(numbers))):
        raise InputError(
            f"these are not the tensors of a guided-diffusion U-Net: {part} has the numbers {sorted(numbers)}"
        )
    return len(numbers)


class _Maker:
    """Builds the blocks of ``AdmUNet`` from the names and shapes of their tensors."""

    def __init__(self, tensors: Tensors, config: AdmConfig, plan: Plan) -> None:
        self.tensors, self.config, self.plan = tensors, config, plan

    def block(self, part: str, i: int | None) -> nn.Sequential:
        """Block ``i`` of a part (None: the part is one block)."""
        name = part if i is None else f"{part}.{i}"
        layers: list[nn.Module] = []
        while (layer := self._layer(part, i, f"{name}.{len(layers)}", len(layers))) is not None:
            layers.append(layer)
        return nn.Sequential(*layers)

    def _layer(self, part: str, i: int | None, name: str, place: int) -> nn.Module | None:
        tensors = self.tensors
        if f"{name}.in_layers.0.weight" in tensors:
            down = part == "input_blocks" and self.plan.shrinks(i or 0)
            up = part == "output_blocks" and place > 0
            return Residual(tensors, name, "down" if down else "up" if up else "")
        if f"{name}.qkv.weight" in tensors:
            channels = tensors[f"{name}.qkv.weight"].shape[1]
            heads = self.config.heads(channels, up=part == "output_blocks")
            if heads < 1 or channels % heads:
                raise InputError(
                    f"{name} attends with {channels} channels, which {heads} heads cannot share; see config"
                )
            return Attention(channels, heads, not self.config.use_new_attention_order)
        for kind in ("op", "conv"):
            if f"{name}.{kind}.weight" in tensors:
                return Resample(kind, len(tensors[f"{name}.{kind}.weight"]))
        if f"{name}.weight" in tensors:  # the first convolution
            out, inside, *_ = tensors[f"{name}.weight"].shape
            return nn.Conv2d(inside, out, 3, padding=1)
        return None


def adm_noise(config: AdmConfig) -> Noise:
    """Noise of the published tables: linear from 1e-4 to 0.02 (scaled by 1000 / steps) or cosine; labels 0 ... steps - 1."""
    factor = 1000 / config.diffusion_steps
    sigmas = vp_sigmas(betas(config.noise_schedule, config.diffusion_steps, 1e-4 * factor, 0.02 * factor))
    kind: Literal["sample", "epsilon"] = "sample" if config.predict_xstart else "epsilon"
    return table_noise(kind, sigmas, scale=factor if config.rescale_timesteps else 1.0)


def load_adm(request: Request) -> CheckpointPrior:
    """The prior of a guided-diffusion file.  Raises InputError for a file, config or space that do not fit."""
    config = request.options(AdmConfig)
    if config.num_heads is None and config.num_head_channels == -1:
        raise InputError(
            f"the weights in {request.path} do not show how many heads attend: config needs num_heads or num_head_channels, as "
            "published with them"
        )
    content, digest = request.read()
    tensors, entry = state_dict(content, request.path, config.entry)
    return adm_prior(request, config, tensors, {"format": "adm", "sha256": digest, "entry": entry}, adm_noise(config))


def adm_prior(
    request: Request, config: AdmConfig, tensors: dict[str, Tensor], source: dict[str, Any], noise: Noise
) -> CheckpointPrior:
    """The prior of the tensors of a guided-diffusion U-Net, under a noise table.  Raises InputError."""
    needed = ("time_embed.0.weight", "input_blocks.0.0.weight", "out.2.weight", "middle_block.0.in_layers.0.weight")
    if missing := [name for name in needed if name not in tensors]:
        raise InputError(f"{request.path} does not hold a guided-diffusion U-Net: {', '.join(missing)} is missing")
    try:
        with torch.device("meta"):
            network = AdmUNet(tensors, config)
    except KeyError as error:
        raise InputError(f"{request.path} does not hold a whole guided-diffusion U-Net: {error} is missing") from error
    except InputError as error:
        raise InputError(f"{request.path}: {error}") from error
    inputs, outputs = tensors["input_blocks.0.0.weight"].shape[1], len(tensors["out.2.weight"])
    check_channels(request, inputs, outputs)
    found = _found(network, tensors, outputs == 2 * inputs, config)
    check_told(request.path, config.model_dump(exclude_none=True), found)
    trained = (config.image_size, config.image_size) if config.image_size else None
    check_sides(request.path, image_space(request.space), 2 ** (network.plan.levels - 1), trained, config.any_size)
    check_label(request.path, network.classes, config.class_label)
    network.index = config.class_label or 0
    fill(network, tensors, request.path)
    format = source.pop("format")
    facts = {**source, "config": config.model_dump(exclude_none=True), "architecture": found}
    return CheckpointPrior(request, network, noise, make_card(request, noise, format, facts))


def _found(network: AdmUNet, tensors: Tensors, learned: bool, config: AdmConfig) -> dict[str, Any]:
    """The published flags of the architecture as the weights have them."""
    plan, base = network.plan, network.width
    step = plan.blocks + 1
    widths = [len(tensors[f"input_blocks.{level * step + 1}.0.in_layers.2.weight"]) for level in range(plan.levels)]
    found: dict[str, Any] = {
        "num_channels": base,
        "num_res_blocks": plan.blocks,
        "learn_sigma": learned,
        "class_cond": network.classes > 0,
        "use_scale_shift_norm": next(m.film for m in network.modules() if isinstance(m, Residual)),
    }
    if plan.levels > 1:
        found["resblock_updown"] = plan.residual
    if config.channel_mult:  # an empty one stands for the published default of that image size
        found["channel_mult"] = ",".join(f"{width / base:g}" for width in widths)
    if config.attention_resolutions and config.image_size:
        factors = plan.attention(tensors)
        sides = {config.image_size // int(side) for side in config.attention_resolutions.split(",")}
        reachable = {f for f in sides if f <= 2 ** (plan.levels - 1)}
        same = sorted(reachable) == factors
        found["attention_resolutions"] = (
            config.attention_resolutions if same else ",".join(str(config.image_size // f) for f in factors)
        )
    return found
