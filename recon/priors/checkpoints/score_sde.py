"""Checkpoints of score_sde (Song et al. 2021): NCSN++, DDPM++ and DDPM networks trained on the VE, VP or sub-VP process.

``config`` is the published configuration with its sections ``training``, ``data`` and ``model`` (as a mapping, JSON or YAML);
keys that are not needed are passed over, keys that are needed have no defaults.  Its section ``recon`` may hold the keys of
every format (``entry``, ``any_size``).  Training files hold the network and an average of its weights: ``entry`` chooses
("model" or "ema").
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from recon.errors import InputError
from recon.priors.checkpoints.base import (
    CheckpointPrior,
    Options,
    Request,
    check_channels,
    check_label,
    check_sides,
    image_space,
    make_card,
)
from recon.priors.checkpoints.ncsnpp import NcsnPP
from recon.priors.checkpoints.safe import fill, state_dict
from recon.priors.checkpoints.tables import (
    Clock,
    Form,
    Kind,
    Noise,
    SigmaClock,
    TableClock,
    VPClock,
    betas,
    table_noise,
    vp_sigmas,
)
from recon.schedules import Schedule


class _Published(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, protected_namespaces=())


class Training(_Published):
    """The process, and whether the network was trained at all times or at those of a table."""

    sde: Literal["vesde", "vpsde", "subvpsde"]
    continuous: bool


class Data(_Published):
    """Images.  centered: the network sees them as they are; otherwise it doubles them and subtracts 1 itself."""

    image_size: int = Field(ge=1)
    num_channels: int = Field(ge=1)
    centered: bool


class Model(_Published):
    """The network.  Keys from fir on belong to ncsnpp alone; sigma_min and sigma_max are used by VE, the betas by VP."""

    name: Literal["ncsnpp", "ddpm"]
    nf: int = Field(ge=4)
    ch_mult: tuple[int, ...]
    num_res_blocks: int = Field(ge=1)
    attn_resolutions: tuple[int, ...]
    resamp_with_conv: bool
    conditional: bool
    scale_by_sigma: bool
    nonlinearity: Literal["swish", "elu", "relu", "lrelu"]
    num_scales: int = Field(ge=2)
    sigma_min: float = Field(gt=0)
    sigma_max: float = Field(gt=0)
    beta_min: float = Field(gt=0)
    beta_max: float = Field(gt=0)
    fir: bool | None = None
    fir_kernel: tuple[float, ...] | None = None
    skip_rescale: bool | None = None
    resblock_type: Literal["ddpm", "biggan"] | None = None
    progressive: Literal["none", "output_skip"] | None = None
    progressive_input: Literal["none", "input_skip", "residual"] | None = None
    progressive_combine: Literal["sum", "cat"] | None = None
    embedding_type: Literal["fourier", "positional"] | None = None

    @model_validator(mode="after")
    def _complete(self) -> Model:
        own = (
            "fir",
            "skip_rescale",
            "resblock_type",
            "progressive",
            "progressive_input",
            "progressive_combine",
            "embedding_type",
        )
        missing = [key for key in own if getattr(self, key) is None] if self.name == "ncsnpp" else []
        missing += ["fir_kernel"] if self.fir and self.fir_kernel is None else []
        if missing:
            raise ValueError(f"ncsnpp needs {', '.join(missing)}")
        taps = self.fir_kernel or ()
        if self.fir and (len(taps) % 2 or not taps or taps != taps[::-1]):
            raise ValueError(f"fir_kernel is an even number of symmetric weights; got {taps}")
        return self


class ScoreSdeConfig(_Published):
    """The sections of a published configuration, and ``recon`` for the keys of every format."""

    training: Training
    data: Data
    model: Model
    recon: Options = Options()


def score_noise(config: ScoreSdeConfig) -> Noise:
    """Noise of a configuration: what the network answers and which labels it takes under each process.

    VP and sub-VP networks answer the noise; VE networks the score, or the score times sigma where the published network
    divides by sigma itself (``scale_by_sigma``; the division is left out here and in the network, so that levels between
    table entries lose nothing).  Labels: VE sigma, or the index in the falling table; VP 999 t, or the index.
    """
    model, steps = config.model, config.model.num_scales
    if config.training.sde == "vesde":
        kind: Kind = "scaled_score" if model.scale_by_sigma else "score"
        levels = np.geomspace(model.sigma_min, model.sigma_max, steps)
        fourier = model.embedding_type == "fourier"
        clock: Clock = SigmaClock() if fourier else TableClock(levels, np.arange(steps)[::-1].copy())
        return Noise(Form(kind, "ve"), clock, Schedule(model.sigma_min, model.sigma_max))
    if model.scale_by_sigma:
        raise InputError("scale_by_sigma divides by levels of the VE process; a VP configuration has it false")
    sub = config.training.sde == "subvpsde"
    if config.training.continuous or sub:
        process = VPClock(model.beta_min, model.beta_max, 999.0, sub)
        form = Form("epsilon", "subvp" if sub else "vp")
        return Noise(form, process, Schedule(process.sigma(1e-5), process.sigma(1.0)))
    return table_noise("epsilon", vp_sigmas(betas("linear", steps, model.beta_min / steps, model.beta_max / steps)))


def load_score_sde(request: Request) -> CheckpointPrior:
    """The prior of a score_sde file.  Raises InputError for a file, config or space that do not fit."""
    config = request.options(ScoreSdeConfig)
    fourier = config.model.name == "ncsnpp" and config.model.embedding_type == "fourier"
    if fourier and (config.training.sde != "vesde" or not config.training.continuous):
        raise InputError(
            f"{request.path}: fourier features embed log sigma of the continuous VE process alone; see config"
        )
    check_label(request.path, 0, config.recon.class_label)
    content, digest = request.read()
    tensors, entry = _weights(content, request.path, config.recon.entry)
    _check_table(tensors.pop("sigmas", None), config, request.path)
    try:
        with torch.device("meta"):
            network = NcsnPP(config.model, config.data)
    except ValueError as error:
        raise InputError(f"the config for {request.path} describes no network: {error}") from error
    channels, side, levels = config.data.num_channels, config.data.image_size, len(config.model.ch_mult)
    check_channels(request, channels, channels)
    check_sides(request.path, image_space(request.space), 2 ** (levels - 1), (side, side), config.recon.any_size)
    fill(network, tensors, request.path)
    noise = score_noise(config)
    facts: dict[str, Any] = {
        "sha256": digest,
        "entry": entry,
        "config": config.model_dump(mode="json", exclude_none=True),
    }
    return CheckpointPrior(request, network, noise, make_card(request, noise, "score_sde", facts))


def _weights(content: object, path: Path, entry: str | None) -> tuple[dict[str, Tensor], str]:
    """Named tensors of a training file ("model" or "ema") or of a plain state dict."""
    average = content.get("ema") if isinstance(content, Mapping) else None
    shadow = average.get("shadow_params") if isinstance(average, Mapping) else None
    if not isinstance(content, Mapping) or not isinstance(shadow, list):
        return state_dict(content, path, entry)
    if entry not in ("model", "ema"):
        raise InputError(
            f"{path} holds the network as trained and the average of its weights: config needs recon.entry, 'model' or 'ema' "
            f"(samples were published from the average); got {entry}"
        )
    tensors, _ = state_dict({"model": content.get("model")}, path, "model")
    if entry == "model":
        return tensors, entry
    # the average is a list in the order of the trained parameters: all but the table and the random frequencies
    names = [name for name in tensors if name != "sigmas" and name != "all_modules.0.W"]
    shapes = [tuple(tensors[name].shape) for name in names]
    if [tuple(value.shape) for value in shadow] != shapes:
        raise InputError(
            f"{path}: the {len(shadow)} averaged weights do not have the shapes of the {len(names)} trained ones; take "
            "recon.entry 'model'"
        )
    return {**tensors, **dict(zip(names, shadow, strict=True))}, entry


def _check_table(table: Tensor | None, config: ScoreSdeConfig, path: Path) -> None:
    """The levels stored with the network are those of the config."""
    if table is None:
        return
    model = config.model
    levels = np.geomspace(model.sigma_max, model.sigma_min, model.num_scales)
    if tuple(table.shape) != levels.shape or not np.allclose(table.double().numpy(), levels, rtol=1e-4):
        ends = f"{float(table[0]):g} to {float(table[-1]):g} in {len(table)}"
        raise InputError(
            f"{path} was trained with other levels than its config: {ends} steps, config {levels[0]:g} to {levels[-1]:g} in "
            f"{len(levels)}"
        )
