"""From a ``train.yaml`` to a prior folder: data sets, training, held-out errors, card and weights."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, model_validator
from torch import Tensor

from recon.datasets.augment import Cut
from recon.datasets.sampling import FieldSampling
from recon.errors import InputError
from recon.priors.base import Card
from recon.priors.denoising import Wiener, denoising_error, network_denoiser
from recon.priors.network import Architecture, NetworkPrior, build_network
from recon.priors.store import Normalisation, Sigmas, save_prior
from recon.priors.training import Training, TrainingConfig
from recon.schedules import Schedule
from recon.workflows.problems import validated
from recon.workflows.source import read_source
from recon.workflows.training_data import FieldData, SliceData, TrainingData

log = logging.getLogger("recon.train")

_FIT_IMAGES = 1024  # training images from which the Wiener filter learns its mean and spectrum


class TrainFile(BaseModel):
    """The content of a ``train.yaml``.

    Training images are ``cuts`` of CT slices, or ``fields`` of a gridded data set.  pixel_mm: smallest and largest pixel side
    the cuts come to.  held_out: with cuts, data sets whose validation part (training files) or whole (test files) the trained
    prior is measured on, as area means of the size of its images; fields have their own test part.  unfit_for: what the prior
    must not be used for.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    summary: str
    unit: str = "1/m"
    pixel_mm: tuple[float, float] | None = None
    normalisation: Normalisation
    schedule: Sigmas
    architecture: Architecture
    cuts: tuple[Cut, ...] = ()
    fields: FieldSampling | None = None
    held_out: tuple[str, ...] = ()
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

    def data(self, workspace: Path | None) -> TrainingData:
        """The images the file speaks of, loaded and checked.  Raises InputError for what is missing or does not fit."""
        sides, seed = self.architecture.sides, self.training.seed
        if self.fields is not None:
            data: TrainingData = FieldData(self.fields, seed, workspace)
        elif sides[0] != sides[1]:
            raise InputError(f"cuts of CT slices are square; architecture.size is {sides}")
        else:
            data = SliceData(self.cuts, self.held_out, sides[0], seed, workspace)
        fields = 1 if len(data.space.shape) == 2 else data.space.shape[0]
        if (fields, *data.space.shape[-2:]) != (self.architecture.fields, *sides):
            raise InputError(
                f"the images are {data.space.describe()}; architecture has size {sides} and fields {self.architecture.fields}"
            )
        if data.space.unit not in (self.unit, "mixed"):
            raise InputError(f"the images are in {data.space.unit!r}; unit says {self.unit!r}")
        return data


def train(
    path: Path,
    out: Path | None = None,
    resume: bool = True,
    workspace: Path | None = None,
    say: Callable[[str], None] = log.info,
) -> Path:
    """Train the prior that a file describes and write it to ``out`` (the file's own folder by default), which is returned.

    Checkpoint and log are kept in ``out/training``; with ``resume`` a checkpoint found there is continued.  ``say`` receives
    the lines of progress.

    Raises InputError for a wrong file, data that are missing or not what their cards say, or a checkpoint of other settings.
    """
    file = read_train_file(path)
    out = path.parent if out is None else out
    folder = out / "training"
    if not resume:
        (folder / "checkpoint.safetensors").unlink(missing_ok=True)
    training = prepare(file, folder, workspace)
    training.run(say)
    export(file, training, out, workspace)
    return out


def read_train_file(path: Path) -> TrainFile:
    """The training file at ``path``.  Raises InputError with every key that is wrong, and where."""
    file: TrainFile = validated(TrainFile, read_source(path))
    return file


def prepare(file: TrainFile, folder: Path | None, workspace: Path | None = None) -> Training:
    """The training run of a file: its data sets loaded and checked, its network built, its checkpoint resumed if there is one.

    Raises InputError when a data set is missing, is not what its card says, or is a test set.
    """
    data = file.data(workspace)

    def batches(step: int, count: int) -> tuple[Tensor, Tensor]:
        values, known = data.batch(step, count)
        return _latent(file, values), known

    curve = data.curve()
    return Training(
        file.training,
        build_network(file.architecture, file.training.seed).train(),
        batches,
        Schedule(file.schedule.sigma_min, file.schedule.sigma_max),
        sigma_data=file.normalisation.sigma_data,
        held_out=_latent(file, curve) if len(curve) else None,
        folder=folder,
    )


def export(file: TrainFile, training: Training, out: Path, workspace: Path | None = None) -> NetworkPrior:
    """Write the averaged weights of a training run to ``out`` with a card that holds their held-out errors."""
    network = build_network(file.architecture)
    with torch.no_grad():
        for name, value in training.averaged().items():
            network.get_parameter(name).copy_(value.to(torch.float16))
    data = file.data(workspace)
    facts: dict[str, Any] = {
        "data": data.sources(),
        "held_out": data.says(),
        "budget": {
            "images": training.progress.images,
            "seconds": round(training.progress.seconds),
            "precision": str(training.precision).removeprefix("torch."),
        },
        "denoising": _errors(file, network, data),
        "unfit_for": file.unfit_for,
        "weights_licence": file.weights_licence,
        "notes": file.notes,
    }
    if file.pixel_mm is not None:
        facts["pixel_mm"] = file.pixel_mm
    normalisation = file.normalisation
    prior = NetworkPrior(
        data.space,
        Schedule(file.schedule.sigma_min, file.schedule.sigma_max),
        Card(file.name, file.summary, facts),
        network,
        sigma_data=normalisation.sigma_data,
        shift=normalisation.shift,
        scale=normalisation.scale,
    )
    save_prior(out, prior)
    return prior


def _errors(file: TrainFile, network: Any, data: TrainingData) -> list[dict[str, Any]]:  # noqa: ANN401
    """Held-out errors of the network, of a Wiener filter fitted to whole training images, and of doing nothing."""
    wiener = Wiener.fit(_latent(file, data.whole(_FIT_IMAGES)))
    denoiser = network_denoiser(network.eval(), file.normalisation.sigma_data)
    scale = file.normalisation.scale
    rows: list[dict[str, Any]] = []
    for name, (physical, known) in data.held_out().items():
        images = _latent(file, physical)
        for sigma in file.training.validation_sigmas:
            ours = denoising_error(denoiser, images, sigma, known=known)
            linear = denoising_error(wiener, images, sigma, known=known)
            nothing = denoising_error(lambda z, _: z, images, sigma, known=known)
            row = {"prior": ours, "wiener": linear, "identity": nothing}
            if isinstance(scale, float):
                row["prior_physical"] = ours * scale
            rows.append({"data": name, "sigma": sigma, **{key: float(f"{value:.4g}") for key, value in row.items()}})
    return rows


def _latent(file: TrainFile, x: Tensor) -> Tensor:
    """``(x - shift) / scale``, field by field where there is one number per field."""
    shift, scale = (torch.tensor(v, dtype=x.dtype) for v in (file.normalisation.shift, file.normalisation.scale))
    if shift.ndim or scale.ndim:
        shift, scale = (v.reshape(-1, 1, 1) for v in (shift, scale))
    return (x - shift) / scale
