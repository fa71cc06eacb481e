"""What the ``card.yaml`` of a prior says: what it was made from, what it is good for, how to rebuild its network."""

from __future__ import annotations

from typing import Annotated, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from recon.priors.autoencoder import AutoencoderArchitecture
from recon.priors.conditional import Conditions
from recon.priors.network import Architecture
from recon.space import Space


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Grid(_Section):
    """Axes and lengths of the images.  coords: of the axes that have some: numbers, or the names of variables."""

    dims: tuple[str, ...]
    shape: tuple[int, ...]
    coords: dict[str, tuple[float, ...] | tuple[str, ...]] = Field(default_factory=dict)

    def space(self, unit: str) -> Space:
        """The space of the prior."""
        coords = {k: v if isinstance(v[0], str) else np.array(v) for k, v in self.coords.items()}
        return Space(self.dims, self.shape, coords, unit)


Positive = Annotated[float, Field(gt=0)]


class Normalisation(_Section):
    """``z = (x - shift) / scale``, one number or one per field; sigma_data: standard deviation of ``z`` in training."""

    shift: float | tuple[float, ...]
    scale: Positive | tuple[Positive, ...]
    sigma_data: float = Field(gt=0)


class Sigmas(_Section):
    """The noise levels the denoiser is good for, in units of the latent."""

    sigma_min: float = Field(gt=0)
    sigma_max: float = Field(gt=0)


class Coder(_Section):
    """The autoencoder of a latent prior, and the mean and standard deviation of each channel of its latents.

    rmse: of held-out images that were coded and decoded, in the physical unit, by data set.
    """

    architecture: AutoencoderArchitecture
    mean: tuple[float, ...]
    std: tuple[Positive, ...]
    rmse: dict[str, float] = Field(default_factory=dict)


class Source(_Section):
    """A data set that was trained on.  share: of the training images."""

    name: str
    slices: int
    share: float
    licence: str
    source: str


class Weights(_Section):
    """The file of the weights: its sha256, the type they are stored in and how many they are."""

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    dtype: Literal["float16", "float32"]
    parameters: int


class Budget(_Section):
    """What the training cost."""

    images: int
    seconds: float
    precision: str


class Lap(_Section):
    """The samples of a lap of learning: their mean misfit per datum, their spread in the physical unit, the share left out."""

    chi2: float
    spread: float
    lost: float


class LearntFrom(_Section):
    """Of a prior learnt from measurements alone: from how many of them, what they were, and how its laps went."""

    observations: int
    measured: str
    laps: tuple[Lap, ...]


class Around(_Section):
    """The Gaussian that a network starts from (``learning.around``), kept with the weights: factors of its covariance."""

    rank: int = Field(ge=1)


class Error(_Section):
    """Held-out error at one noise level: RMSE in units of the latent, and of the prior alone in the physical unit if one."""

    data: str
    sigma: float
    prior: float
    wiener: float
    identity: float
    non_local_means: float | None = None  # as scikit-image has them
    prior_physical: float | None = None


class Likeness(_Section):
    """How unlike held-out images the prior's draws are, beside training images: see ``diagnostics.samples``.

    images: how many on each side.  spectrum (dB), histogram and sliced (standard deviations): of draws against held-out images;
    with ``_training``: of training images against the same, the mean over several subsets.
    """

    data: str
    images: int
    spectrum: float
    spectrum_training: float
    histogram: float
    histogram_training: float
    sliced: float
    sliced_training: float


class Drawn(_Section):
    """The draws that were looked at: how many, in how many steps; ``draws.png`` shows the first ones."""

    count: int
    steps: int
    seed: int
    likeness: tuple[Likeness, ...]


class PriorCard(_Section):
    """The content of ``card.yaml``.

    conditions: what the network is told beside the image.  whole: the grid of the field of which the images are windows.
    fill: the value, in the physical unit, that stood in training where images are unknown (land).  learnt, around: of a prior
    learnt from measurements alone.  autoencoder: of a prior whose denoiser works on latents; architecture, schedule and
    sigma_data are of those.
    """

    name: str
    summary: str
    grid: Grid
    unit: str
    pixel_mm: tuple[float, float] | None = None
    normalisation: Normalisation
    schedule: Sigmas
    architecture: Architecture
    autoencoder: Coder | None = None
    conditions: Conditions | None = None
    whole: Grid | None = None
    fill: float | None = None
    around: Around | None = None
    learnt: LearntFrom | None = None
    weights: Weights
    data: tuple[Source, ...]
    held_out: tuple[str, ...]
    budget: Budget
    denoising: tuple[Error, ...]
    draws: Drawn | None = None
    unfit_for: str
    weights_licence: str
    notes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _channels(self) -> Self:
        told = 0 if self.conditions is None else self.conditions.channels(self.architecture.fields)
        if told != self.architecture.condition:
            raise ValueError(
                f"conditions make {told} channels; architecture.condition is {self.architecture.condition}"
            )
        return self


FACTS = (
    "pixel_mm", "whole", "fill", "learnt", "data", "held_out", "budget", "denoising", "draws", "unfit_for", "weights_licence",
    "notes",
)  # fmt: skip
"""Keys of the card that the prior itself does not know; ``prior.card.facts`` holds them."""
