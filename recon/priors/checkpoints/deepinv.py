"""Weights of deepinv's networks from local files: DRUNet, ADMUNet, NCSNpp and DiffUNet.

``config`` names the ``network`` and what its file does not tell.  DRUNet is deepinv's own class; the others have the tensors of
EDM and of guided-diffusion and are rebuilt by the readers of those (deepinv's norms of ADMUNet and NCSNpp always have 32
groups).  The latent is what the network itself sees: [-1, 1] for DiffUNet and for weights of which deepinv says that they
were trained on it, [0, 1] otherwise.
"""

from __future__ import annotations

import re
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from recon.errors import InputError, need
from recon.priors.base import Prior
from recon.priors.checkpoints.adm import AdmConfig, adm_noise, adm_prior
from recon.priors.checkpoints.base import (
    CheckpointPrior,
    Options,
    Request,
    check_channels,
    check_label,
    make_card,
)
from recon.priors.checkpoints.edm import EdmConfig, edm_prior
from recon.priors.checkpoints.safe import fill, state_dict
from recon.priors.checkpoints.tables import Form, Noise, SigmaClock
from recon.schedules import Schedule


class _Named(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    network: Literal["DRUNet", "ADMUNet", "NCSNpp", "DiffUNet"]


class DrunetConfig(Options):
    """DRUNet.  sigma_min, sigma_max: the levels it was trained on, in units of its images.  Modes as in deepinv."""

    network: Literal["DRUNet"]
    sigma_min: float = Field(gt=0)
    sigma_max: float = Field(gt=0)
    act_mode: Literal["R", "L", "E", "s"] = "R"
    downsample_mode: Literal["avgpool", "maxpool", "strideconv"] = "strideconv"
    upsample_mode: Literal["convtranspose", "pixelshuffle", "upconv"] = "convtranspose"


class KarrasConfig(Options):
    """ADMUNet and NCSNpp.  pixel_std: of the training images (sigma_data); the range defaults to that of the paper."""

    network: Literal["ADMUNet", "NCSNpp"]
    pixel_std: float = Field(gt=0)
    precondition_type: Literal["edm", "baseline_ve"] = "edm"
    sigma_min: float | None = Field(default=None, gt=0)
    sigma_max: float | None = Field(default=None, gt=0)
    zero_label: bool = False


class DiffUnetConfig(Options):
    """DiffUNet has nothing to tell: its heads have 64 channels and its table is linear from 1e-4 to 0.02."""

    network: Literal["DiffUNet"]


class Drunet(nn.Module):
    """deepinv's DRUNet, called with the level: ``D(x, sigma)``.  Sides it cannot halve it pads and cuts itself."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.network(x, sigma.to(x.dtype))


def load_deepinv(request: Request) -> Prior:
    """The prior of a file with weights of a deepinv network.  Raises InputError for what does not fit."""
    name = request.options(_Named).network
    if name == "DRUNet":
        return _drunet(request, request.options(DrunetConfig))
    if name == "DiffUNet":
        return _diffunet(request, request.options(DiffUnetConfig))
    config = request.options(KarrasConfig)
    tensors, source = _tensors(request, config.entry)
    if ("out_conv.weight" in tensors) != (name == "ADMUNet"):
        other = "NCSNpp" if name == "ADMUNet" else "ADMUNet"
        raise InputError(f"{request.path} does not hold the weights of {name}; they look like those of {other}")
    edm = EdmConfig(
        precondition="edm" if config.precondition_type == "edm" else "ve",
        sigma_data=config.pixel_std,
        sigma_min=config.sigma_min,
        sigma_max=config.sigma_max,
        class_label=config.class_label,
        zero_label=config.zero_label,
        any_size=config.any_size,
    )
    return edm_prior(request, edm, tensors, source, fixed_groups=True)


def _tensors(request: Request, entry: str | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    content, digest = request.read()
    tensors, where = state_dict(content, request.path, entry)
    return tensors, {"format": "deepinv", "sha256": digest, "entry": where}


def _diffunet(request: Request, config: DiffUnetConfig) -> CheckpointPrior:
    tensors, source = _tensors(request, config.entry)
    for table in (
        "sqrt_1m_alphas_cumprod",
        "sqrt_alphas_cumprod",
    ):  # kept in files of the whole module, computed anew here
        tensors.pop(table, None)
    adm = AdmConfig(
        num_head_channels=64, noise_schedule="linear", class_label=config.class_label, any_size=config.any_size
    )
    return adm_prior(request, adm, tensors, source, adm_noise(adm))


def _drunet(request: Request, config: DrunetConfig) -> CheckpointPrior:
    tensors, source = _tensors(request, config.entry)
    check_label(request.path, 0, config.class_label)
    heads = [f"m_{part}.weight" for part in ("head", "tail")]
    widths = ["m_down1.0.res.0.weight", "m_down2.0.res.0.weight", "m_down3.0.res.0.weight"]
    body = [name for name in tensors if re.fullmatch(r"m_body\.(\d+\.)?res\.0\.weight", name)]
    if missing := [name for name in (*heads, *widths) if name not in tensors] or ([] if body else ["m_body"]):
        raise InputError(f"{request.path} does not hold a DRUNet: {', '.join(missing)} is missing")
    inputs, outputs = tensors[heads[0]].shape[1] - 1, len(tensors[heads[1]])
    check_channels(request, inputs, outputs)
    channels = (*(len(tensors[name]) for name in widths), len(tensors[body[0]]))
    models: Any = need("deepinv.models", "networks")
    with torch.device("meta"):
        network = models.DRUNet(
            inputs,
            outputs,
            nc=channels,
            nb=len(body),
            act_mode=config.act_mode,
            downsample_mode=config.downsample_mode,
            upsample_mode=config.upsample_mode,
            pretrained=None,
        )
    fill(network, tensors, request.path)
    noise = Noise(Form("sample", "ve"), SigmaClock(), Schedule(config.sigma_min, config.sigma_max))
    facts = {
        "sha256": source["sha256"],
        "entry": source["entry"],
        "config": config.model_dump(exclude_none=True),
        "architecture": {"network": "DRUNet", "channels": list(channels), "blocks": len(body)},
    }
    return CheckpointPrior(request, Drunet(network), noise, make_card(request, noise, "deepinv", facts))
