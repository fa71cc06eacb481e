"""Scheduler configurations of diffusers, read as data: which noise a network was trained with.

Only what belongs to the training counts: the table, the prediction type, the range.  How a scheduler walks down the levels (its
steps, spacing, clipping, thresholding) is a sampler's business and has no effect.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from recon.errors import InputError
from recon.priors.checkpoints.base import parsed
from recon.priors.checkpoints.tables import (
    FlowClock,
    Form,
    Kind,
    LogClock,
    Noise,
    SigmaClock,
    betas,
    checked,
    table_noise,
    vp_sigmas,
    zero_terminal,
)
from recon.schedules import Schedule

TABLES = (
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "DDIMScheduler",
    "DDIMInverseScheduler",
    "DDIMParallelScheduler",
    "PNDMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverMultistepInverseScheduler",
    "DPMSolverSinglestepScheduler",
    "DPMSolverSDEScheduler",
    "UniPCMultistepScheduler",
    "SASolverScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
)
"""Schedulers over a table of variances ``beta_t``; one table, whichever of them it is stored for."""
FLOWS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")
EDMS = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
VES = ("ScoreSdeVeScheduler",)

_KINDS: dict[str, Kind] = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample"}


class _Read(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class TableConfig(_Read):
    """A table of variances.  Without prediction_type, which old files do not have, it is epsilon, as it was then."""

    num_train_timesteps: int = Field(ge=2)
    beta_start: float
    beta_end: float
    beta_schedule: str
    trained_betas: tuple[float, ...] | None = None
    prediction_type: Literal["epsilon", "v_prediction", "sample", "flow_prediction"] = "epsilon"
    rescale_betas_zero_snr: bool = False
    timestep_type: Literal["discrete", "continuous"] = "discrete"
    sigma_min: float | None = None
    sigma_max: float | None = None
    flow_shift: float = Field(default=1.0, gt=0)


class FlowConfig(_Read):
    """Rectified flow.  shift: of the times, unless it depends on the size of the image."""

    num_train_timesteps: int = Field(ge=3)
    shift: float = Field(default=1.0, gt=0)
    use_dynamic_shifting: bool = False
    invert_sigmas: Literal[False] = False


class EdmSchedule(_Read):
    """EDM preconditioning outside the network."""

    sigma_min: float = Field(gt=0)
    sigma_max: float = Field(gt=0)
    sigma_data: float = Field(gt=0)
    prediction_type: Literal["epsilon", "v_prediction"]


class VeConfig(_Read):
    """The continuous VE process."""

    sigma_min: float = Field(gt=0)
    sigma_max: float = Field(gt=0)


def scheduler_noise(config: Mapping[str, Any], what: str, embedding: str = "positional") -> Noise:
    """Noise of a scheduler configuration.

    what: names it in errors.  embedding: how the network embeds labels: "positional" (any number), "fourier" (``log sigma``,
    and the answer divided by sigma: VE), "learned" (whole labels of a table).

    Raises InputError for an unknown scheduler, missing keys, or an embedding that the scheduler's labels do not fit.
    """
    name = str(config.get("_class_name"))
    if (embedding == "fourier") != (name in VES):
        raise InputError(f"{what}: a network with {embedding} embedding of its labels was not trained with a {name}")
    if name in VES:
        ve = parsed(VeConfig, config, what)
        return Noise(Form("score", "ve"), SigmaClock(), Schedule(ve.sigma_min, ve.sigma_max))
    if name in TABLES:
        noise = _table(parsed(TableConfig, config, what), whole=embedding == "learned")
    elif name in FLOWS:
        flow = parsed(FlowConfig, config, what)
        noise = _flow(flow.num_train_timesteps, 1.0 if flow.use_dynamic_shifting else flow.shift)
    elif name in EDMS:
        edm = parsed(EdmSchedule, config, what)
        form = Form("edm" if edm.prediction_type == "epsilon" else "edm_v", sigma_data=edm.sigma_data)
        noise = Noise(form, LogClock(), Schedule(edm.sigma_min, edm.sigma_max))
    else:
        known = ", ".join((*TABLES, *FLOWS, *EDMS, *VES))
        raise InputError(f"{what}: no rule for the scheduler {name}; known are {known}")
    if embedding == "learned" and noise.form.kind not in _KINDS.values():
        raise InputError(f"{what}: a network with learned labels takes those of a table; {name} has others")
    return noise


def _table(config: TableConfig, whole: bool) -> Noise:
    if config.prediction_type == "flow_prediction":
        return _flow(config.num_train_timesteps, config.flow_shift)
    if config.trained_betas is not None:
        values = checked(np.array(config.trained_betas))
    else:
        values = betas(config.beta_schedule, config.num_train_timesteps, config.beta_start, config.beta_end)
    sigmas = zero_terminal(values) if config.rescale_betas_zero_snr else vp_sigmas(values)
    kind = _KINDS[config.prediction_type]
    if config.timestep_type == "discrete":
        return table_noise(kind, sigmas, whole=whole)
    low = float(sigmas[0]) if config.sigma_min is None else config.sigma_min
    high = float(sigmas[-1]) if config.sigma_max is None else config.sigma_max
    return Noise(Form(kind), LogClock(), Schedule(low, high))


def _flow(steps: int, shift: float) -> Noise:
    """Times ``i / steps`` shifted to ``s t / (1 + (s - 1) t)``; the last, where no signal is left, is beyond the range."""
    ends = [shift * t / (1 + (shift - 1) * t) for t in (1 / steps, 1 - 1 / steps)]
    return Noise(Form("flow"), FlowClock(steps), Schedule(ends[0] / (1 - ends[0]), ends[1] / (1 - ends[1])))
