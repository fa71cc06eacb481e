"""From a ``train.yaml`` to a prior folder: data sets, training, held-out errors, card and weights."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from recon.datasets.augment import Cut, Cutter
from recon.datasets.slices import SliceCard, Slices, load_slices
from recon.errors import InputError
from recon.priors.base import Card
from recon.priors.denoising import Wiener, denoising_error, network_denoiser
from recon.priors.network import Architecture, NetworkPrior, build_network
from recon.priors.store import Normalisation, Sigmas, save_prior
from recon.priors.training import Training, TrainingConfig
from recon.schedules import Schedule
from recon.space import Space
from recon.store import find
from recon.workflows.definitions import read_definition
from recon.workflows.problems import validated
from recon.workflows.source import read_source

log = logging.getLogger("recon.train")

_FIT_IMAGES = 1024  # training images from which the Wiener filter learns its mean and spectrum


class TrainFile(BaseModel):
    """The content of a ``train.yaml``.

    pixel_mm: smallest and largest pixel side the cuts come to.  held_out: data sets whose validation part (training files)
    or whole (test files) the trained prior is measured on, as area means of the size of its images.  unfit_for: what the
    prior must not be used for.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    summary: str
    unit: str = "1/m"
    pixel_mm: tuple[float, float]
    normalisation: Normalisation
    schedule: Sigmas
    architecture: Architecture
    cuts: tuple[Cut, ...] = Field(min_length=1)
    held_out: tuple[str, ...] = Field(min_length=1)
    training: TrainingConfig
    unfit_for: str
    weights_licence: str
    notes: tuple[str, ...] = ()


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
    cutter = _cutter(file, workspace)

    def batches(step: int, count: int) -> tuple[Tensor, Tensor]:
        mu, known = cutter.batch(step, count)
        return _latent(file, mu), known

    training_sets = [name for name in file.held_out if _card(name, workspace).use == "train"]
    curve = [_thinned(_held_out(file, name, workspace)[0]) for name in training_sets]
    return Training(
        file.training,
        build_network(file.architecture, file.training.seed).train(),
        batches,
        Schedule(file.schedule.sigma_min, file.schedule.sigma_max),
        sigma_data=file.normalisation.sigma_data,
        held_out=_latent(file, torch.cat(curve)) if curve else None,
        folder=folder,
    )


def export(file: TrainFile, training: Training, out: Path, workspace: Path | None = None) -> NetworkPrior:
    """Write the averaged weights of a training run to ``out`` with a card that holds their held-out errors."""
    network = build_network(file.architecture)
    with torch.no_grad():
        for name, value in training.averaged().items():
            network.get_parameter(name).copy_(value.to(torch.float16))
    normalisation, side = file.normalisation, file.architecture.size
    cutter = _cutter(file, workspace)
    facts = {
        "pixel_mm": file.pixel_mm,
        "data": _sources(file, cutter, workspace),
        "held_out": [_says(_card(name, workspace)) for name in file.held_out],
        "budget": {
            "images": training.progress.images,
            "seconds": round(training.progress.seconds),
            "precision": str(training.precision).removeprefix("torch."),
        },
        "denoising": _errors(file, network, cutter, workspace),
        "unfit_for": file.unfit_for,
        "weights_licence": file.weights_licence,
        "notes": file.notes,
    }
    prior = NetworkPrior(
        Space(("y", "x"), (side, side), {}, file.unit),
        Schedule(file.schedule.sigma_min, file.schedule.sigma_max),
        Card(file.name, file.summary, facts),
        network,
        sigma_data=normalisation.sigma_data,
        shift=normalisation.shift,
        scale=normalisation.scale,
    )
    save_prior(out, prior)
    return prior


def _errors(file: TrainFile, network: Any, cutter: Cutter, workspace: Path | None) -> list[dict[str, Any]]:  # noqa: ANN401
    """Held-out errors of the network, of a Wiener filter fitted to the whole-slice cuts, and of doing nothing."""
    whole = [(cut, slices) for cut, slices in cutter.cuts if cut.side[0] == slices.mu.shape[1]] or list(cutter.cuts)
    wiener = Wiener.fit(_latent(file, Cutter(whole, cutter.size, cutter.seed).batch(0, _FIT_IMAGES)[0]))
    denoiser = network_denoiser(network.eval(), file.normalisation.sigma_data)
    rows: list[dict[str, Any]] = []
    for name in file.held_out:
        physical, known = _held_out(file, name, workspace)
        images = _latent(file, physical)
        for sigma in file.training.validation_sigmas:
            ours = denoising_error(denoiser, images, sigma, known=known)
            linear = denoising_error(wiener, images, sigma, known=known)
            nothing = denoising_error(lambda z, _: z, images, sigma, known=known)
            row = {
                "prior": ours,
                "wiener": linear,
                "identity": nothing,
                "prior_physical": ours * file.normalisation.scale,
            }
            rows.append({"data": name, "sigma": sigma, **{key: float(f"{value:.4g}") for key, value in row.items()}})
    return rows


def _cutter(file: TrainFile, workspace: Path | None) -> Cutter:
    names = dict.fromkeys(cut.dataset for cut in file.cuts)
    sources: dict[str, Slices] = {name: load_slices(_card(name, workspace), "train") for name in names}
    return Cutter([(cut, sources[cut.dataset]) for cut in file.cuts], file.architecture.size, file.training.seed)


def _sources(file: TrainFile, cutter: Cutter, workspace: Path | None) -> list[dict[str, Any]]:
    total = sum(cut.share for cut in file.cuts)
    rows = []
    for name in dict.fromkeys(cut.dataset for cut in file.cuts):
        card = _card(name, workspace)
        slices = next(len(slices) for cut, slices in cutter.cuts if cut.dataset == name)
        share = sum(cut.share for cut in file.cuts if cut.dataset == name) / total
        rows.append(
            {"name": name, "slices": slices, "share": round(share, 3), "licence": card.licence, "source": card.source}
        )
    return rows


def _says(card: SliceCard) -> str:
    part = "all of it" if card.use == "test" else f"the last {card.validation:.0%} of each group in file order"
    return f"{card.name}: {part}"


def _held_out(file: TrainFile, name: str, workspace: Path | None) -> tuple[Tensor, Tensor | None]:
    """Held-out slices as area means of the prior's size in physical units (n, size, size), and where they are known."""
    card = _card(name, workspace)
    slices = load_slices(card, "test" if card.use == "test" else "validation")
    factor, rest = divmod(slices.mu.shape[1], file.architecture.size)
    if rest or factor < 1:
        raise InputError(f"slices of {name} have {slices.mu.shape[1]} rows, not a multiple of {file.architecture.size}")
    coarse = slices.coarsened(factor)
    return torch.from_numpy(coarse.mu), None if coarse.valid is None else torch.from_numpy(coarse.valid)


def _thinned(images: Tensor, most: int = 12) -> Tensor:
    return images[:: max(1, len(images) // most)][:most]


def _latent(file: TrainFile, x: Tensor) -> Tensor:
    return (x - file.normalisation.shift) / file.normalisation.scale


def _card(name: str, workspace: Path | None) -> SliceCard:
    card = read_definition("datasets", find("datasets", name, workspace))
    if not isinstance(card, SliceCard):
        raise InputError(
            f"the data set {name} holds no slices in HDF5; priors are trained on and measured with such files"
        )
    return card
