"""What a ``train.yaml`` says: the data, the network and how it is trained."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, model_validator
from torch import Tensor

from recon.datasets.augment import Cut
from recon.datasets.sampling import FieldSampling, Sample
from recon.errors import InputError
from recon.priors.autoencoder import AutoencoderArchitecture
from recon.priors.cards import Normalisation, Sigmas
from recon.priors.conditional import Conditions, LowResolution
from recon.priors.network import Architecture, Context
from recon.priors.training import TrainingConfig
from recon.workflows.autoencode import AutoencoderSection
from recon.workflows.problems import validated
from recon.workflows.source import read_source
from recon.workflows.training_data import FieldData, SliceData, TrainingData


class TrainFile(BaseModel):
    """The content of a ``train.yaml``.

    Training images are ``cuts`` of CT slices, or ``fields`` of a gridded data set, whole or as windows: with ``fields.crop``
    or ``cuts.whole`` the network's size is that of a window, and its place in the whole is told where ``position`` is asked
    for.  pixel_mm: smallest and largest pixel side the cuts come to.  held_out: with cuts, data sets whose validation part
    (training files) or whole (test files) the trained prior is measured on, as area means of the size of its images; fields
    have their own test part.  autoencoder: of a latent prior; it is trained first, and architecture, schedule and sigma_data
    are of its latents.  start: a prior, by name or folder, whose network and Wiener filter training goes on from (same
    architecture and sigma_data); without it the network is new.  unfit_for: what the prior must not be used for.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    summary: str
    unit: str = "1/m"
    pixel_mm: tuple[float, float] | None = None
    normalisation: Normalisation
    schedule: Sigmas
    architecture: Architecture
    autoencoder: AutoencoderSection | None = None
    cuts: tuple[Cut, ...] = ()
    fields: FieldSampling | None = None
    held_out: tuple[str, ...] = ()
    start: str | None = None
    training: TrainingConfig
    unfit_for: str
    weights_licence: str
    notes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _one_source(self) -> TrainFile:
        if bool(self.cuts) == (self.fields is not None):
            raise ValueError("expected either cuts (of CT slices) or fields (of a gridded data set)")
        if self.cuts and (not self.held_out or self.pixel_mm is None):
            raise ValueError("cuts also need held_out and pixel_mm")
        if self.fields is not None and (self.held_out or self.pixel_mm):
            raise ValueError("held_out and pixel_mm belong to cuts; fields are held out by the split on their card")
        return self

    @model_validator(mode="after")
    def _fitting(self) -> TrainFile:
        told = 0 if self.conditions is None else self.conditions.channels(self.architecture.fields)
        if told != self.architecture.condition:
            raise ValueError(
                f"fields.conditions make {told} channels for a network; architecture.condition must say so, it says "
                f"{self.architecture.condition}"
            )
        crop = None if self.fields is None else self.fields.crop
        if crop is not None and crop != self.images.sides:
            raise ValueError(f"fields.crop {crop} is the network's size; architecture.size is {self.images.sides}")
        for name in ("shift", "scale"):
            values = getattr(self.normalisation, name)
            if isinstance(values, tuple) and len(values) != self.images.fields:
                raise ValueError(
                    f"normalisation.{name} has {len(values)} numbers; give one, or one for each of the "
                    f"{self.images.fields} fields of the architecture"
                )
        return self

    @model_validator(mode="after")
    def _latents(self) -> TrainFile:
        if self.autoencoder is None:
            return self
        wanted, told = self.autoencoder.architecture.shape, (self.architecture.fields, *self.architecture.sides)
        if wanted != told:
            raise ValueError(f"the autoencoder's latents are {wanted}; architecture has fields and size {told}")
        windows = (self.fields is not None and self.fields.crop is not None) or any(c.whole for c in self.cuts)
        if windows or self.conditions is not None:
            raise ValueError("a latent prior is over whole images without conditions")
        if self.start is not None:
            raise ValueError("start is for networks of images; those of a latent prior would meet other latents")
        return self

    @property
    def images(self) -> Architecture | AutoencoderArchitecture:
        """The network that sees the images: its sides and fields are theirs."""
        return self.architecture if self.autoencoder is None else self.autoencoder.architecture

    @property
    def conditions(self) -> Conditions | None:
        """What the network is told of each image."""
        return None if self.fields is None else self.fields.conditions

    @property
    def identity(self) -> str:
        """Names what is learnt from what: equal for files that differ in texts and in the training alone."""
        told = self.model_dump(mode="json", include={"normalisation", "schedule", "architecture", "cuts", "fields"})
        # Keys that are younger than some checkpoints are left out where they change nothing.
        if self.fields is not None and self.fields.fill is None:
            del told["fields"]["fill"]
        for name in ("wiener", "components"):
            if not getattr(self.architecture, name):
                del told["architecture"][name]
        if self.start is not None:
            told["start"] = self.start
        if self.autoencoder is not None:
            told["autoencoder"] = self.autoencoder.model_dump(mode="json")
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    def data(self, workspace: Path | None) -> TrainingData:
        """The images the file speaks of, loaded and checked.  Raises InputError for what is missing or does not fit."""
        sides, seed = self.images.sides, self.training.seed
        if self.fields is not None:
            data: TrainingData = FieldData(self.fields, seed, workspace)
        else:
            data = SliceData(self.cuts, self.held_out, sides, seed, workspace)
        fields = 1 if len(data.space.shape) == 2 else data.space.shape[0]
        if (fields, *data.space.shape[-2:]) != (self.images.fields, *sides):
            raise InputError(
                f"the images are {data.space.describe()}; architecture has size {sides} and fields {self.images.fields}"
            )
        if data.space.unit not in (self.unit, "mixed"):
            raise InputError(f"the images are in {data.space.unit!r}; unit says {self.unit!r}")
        return data

    def network(self, data: TrainingData) -> Architecture:
        """The architecture with the sides of the whole field, when the images are windows.

        Raises InputError when the file says others.
        """
        whole = None if data.whole_space is None else data.whole_space.shape[-2:]
        if self.architecture.whole not in (None, whole):
            raise InputError(
                f"architecture.whole is {self.architecture.whole}; the images are "
                f"{'whole' if whole is None else f'windows of fields of {whole[0]} x {whole[1]} pixels'}"
            )
        return self.architecture.model_copy(update={"whole": whole})

    def latent(self, x: Tensor) -> Tensor:
        """``(x - shift) / scale``, field by field where there is one number per field."""
        shift, scale = (torch.tensor(v, dtype=x.dtype) for v in (self.normalisation.shift, self.normalisation.scale))
        if shift.ndim or scale.ndim:
            shift, scale = (v.reshape(-1, 1, 1) for v in (shift, scale))
        return (x - shift) / scale

    def context(self, sample: Sample, told: bool = True) -> Context | None:
        """What the network is told of the images of a sample; with ``told`` false nothing but their place."""
        condition = None
        if self.conditions is not None:
            pairs = zip(self.conditions.inputs, sample.told, strict=True)
            parts = [self.latent(part) if isinstance(kind, LowResolution) else part for kind, part in pairs]
            there = sample.there if told else torch.zeros(len(sample.values))
            condition = self.conditions.joined(parts, there)
        if condition is None and sample.corner is None:
            return None
        return Context(condition, sample.corner)


def read_train_file(path: Path, overrides: Iterable[str] = ()) -> TrainFile:
    """The training file at ``path``, with ``a.b=value`` set.  Raises InputError with every key that is wrong, and where."""
    file: TrainFile = validated(TrainFile, read_source(path).overridden(overrides))
    return file
