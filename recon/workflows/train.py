"""From a ``train.yaml`` to a prior folder: training, held-out errors, card and weights.

The same call under ``mpiexec`` or ``srun`` shares each batch among the processes; rank 0 writes, and the files are the same.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from recon import comm as ranks
from recon.comm import Comm
from recon.datasets.sampling import Sample
from recon.errors import InputError
from recon.priors.autoencoder import Autoencoder
from recon.priors.base import Card, Prior
from recon.priors.conditional import ConditionalNetworkPrior
from recon.priors.denoising import Denoiser, Wiener, denoising_error, network_denoiser
from recon.priors.latent import LatentPrior
from recon.priors.loading import load_prior
from recon.priors.network import NetworkPrior, ShuffledUNet, build_network
from recon.priors.objective import told_denoiser
from recon.priors.store import save_prior
from recon.priors.training import Batch, HeldOut, Task, Training
from recon.schedules import Schedule
from recon.workflows.autoencode import Shown, coded, fitted, loss_of_coding, seen_through
from recon.workflows.train_file import TrainFile, read_train_file
from recon.workflows.training_data import TrainingData

__all__ = ["TrainFile", "export", "prepare", "read_train_file", "train"]

log = logging.getLogger("recon.train")

_CODER = "autoencoder"  # folder of its training, beside that of the denoiser
_FIT_IMAGES = 1024  # training images from which the Wiener filter learns its mean and spectrum
_FIT_EACH = 24  # at least so many for each of its principal components


def train(
    path: Path,
    out: Path | None = None,
    resume: bool = True,
    workspace: Path | None = None,
    say: Callable[[str], None] = log.info,
    overrides: Iterable[str] = (),
    comm: Comm | None = None,
) -> Path:
    """Train the prior that a file describes and write it to ``out`` (the file's own folder by default), which is returned.

    Checkpoint and log are kept in ``out/training``; with ``resume`` a checkpoint found there is continued.  ``say`` receives
    the lines of progress.  overrides: ``a.b=value`` for keys of the file.  comm: the processes that share the work, by
    default those of the launcher.

    Raises InputError for a wrong file, data that are missing or not what their cards say, or a checkpoint of other settings;
    Stopped, after a checkpoint, on SIGTERM, SIGINT or SIGUSR1; ReconError when the training diverges.
    """
    file = read_train_file(path, overrides)
    comm = ranks.from_environment() if comm is None else comm
    out = path.parent if out is None else out
    folder = out / "training"
    if not resume and comm.root:
        for place in (folder, folder / _CODER):
            (place / "checkpoint.safetensors").unlink(missing_ok=True)
    with asked_to_stop() as asked:
        coder = autoencoder(file, folder, workspace, comm, say, asked)
        training = prepare(file, folder, workspace, comm, coder)
        say(
            f"{file.name}: {sum(p.numel() for p in training.parameters):,} weights on {comm.draws.size} x "
            f"{training.device.type} in {str(training.precision).removeprefix('torch.')}, from image "
            f"{training.progress.images:,}"
        )
        training.run(say, stop=asked)
    if comm.root:
        export(file, training, out, workspace, coder)
    comm.draws.barrier()
    return out


def autoencoder(
    file: TrainFile,
    folder: Path | None,
    workspace: Path | None = None,
    comm: Comm | None = None,
    say: Callable[[str], None] = log.info,
    stop: Callable[[], bool] = lambda: False,
) -> Autoencoder | None:
    """The autoencoder of a latent prior's file, trained or resumed below ``folder``; None where the file asks for none."""
    if file.autoencoder is None:
        return None
    data, place = file.data(workspace), None if folder is None else folder / _CODER
    held_out, everyone = file.latent(data.curve().values), ranks.serial() if comm is None else comm
    shown = Shown(_normalised(file, data), held_out, file.identity)
    return fitted(file.autoencoder, shown, place, everyone, say, stop)


def prepare(
    file: TrainFile,
    folder: Path | None,
    workspace: Path | None = None,
    comm: Comm | None = None,
    coder: Autoencoder | None = None,
) -> Training:
    """The training run of a file: its data sets loaded and checked, its network built, its checkpoint resumed if there is one.

    coder: the autoencoder of a latent prior.
    Raises InputError when a data set is missing, is not what its card says, or is a test set; or a latent prior has no coder.
    """
    if (coder is None) != (file.autoencoder is None):
        raise InputError(
            f"the autoencoder of {file.name} comes first: prepare takes it, and only where the file asks for one"
        )
    data = file.data(workspace)
    curve = data.curve()
    task = Task(
        _network(file, data, coder).train(),
        seen_through(coder, _normalised(file, data)),
        Schedule(file.schedule.sigma_min, file.schedule.sigma_max),
        sigma_data=file.normalisation.sigma_data,
        held_out=_held_out(file, curve, coder),
        identity=file.identity,
    )
    return Training(file.training, task, folder, comm)


def _network(file: TrainFile, data: TrainingData, coder: Autoencoder | None) -> ShuffledUNet:
    """The network before any training: that of another prior, or a new one with the filter it starts from if it has one."""
    network = build_network(file.network(data), file.training.seed)
    if file.start is not None:
        _go_on_from(load_prior(file.start), file, network)
    elif network.skip is not None:
        count = max(_FIT_IMAGES, _FIT_EACH * network.architecture.components)
        network.skip.fit(coded(coder, file.latent(data.whole(count))))
    return network


def _go_on_from(start: Prior, file: TrainFile, network: ShuffledUNet) -> None:
    """Give ``network`` the weights and the filter of ``start``.  Raises InputError when they are of another network."""
    theirs = start.network if isinstance(start, NetworkPrior) else None
    if not isinstance(theirs, ShuffledUNet) or theirs.architecture != network.architecture:
        told = theirs.architecture if isinstance(theirs, ShuffledUNet) else type(theirs or start).__name__
        raise InputError(f"start: {file.start} has another network: {told}; the file asks for {network.architecture}")
    assert isinstance(start, NetworkPrior)
    if start.sigma_data != file.normalisation.sigma_data:
        raise InputError(
            f"start: {file.start} has sigma_data {start.sigma_data}, by which its answers are multiplied; the file says "
            f"{file.normalisation.sigma_data}"
        )
    network.load_state_dict(theirs.state_dict())


def _held_out(file: TrainFile, curve: Sample, coder: Autoencoder | None) -> HeldOut | None:
    """Images of the validation curve as the denoiser sees them."""
    if not len(curve.values):
        return None
    known = curve.known if coder is None or curve.known is None else coder.known(curve.known)
    return HeldOut(coded(coder, file.latent(curve.values)), file.context(curve), known)


def _normalised(file: TrainFile, data: TrainingData) -> Callable[[int, Sequence[int]], Batch]:
    def batches(step: int, rows: Sequence[int]) -> Batch:
        sample = data.sample(step, rows)
        assert sample.known is not None
        filled = file.fields is not None and file.fields.fill is not None
        known = torch.ones_like(sample.known) if filled else sample.known
        return Batch(file.latent(sample.values), known, file.context(sample))

    return batches


def export(
    file: TrainFile, training: Training, out: Path, workspace: Path | None = None, coder: Autoencoder | None = None
) -> NetworkPrior:
    """Write the averaged weights of a training run to ``out`` with a card that holds their held-out errors."""
    data = file.data(workspace)
    network = build_network(file.network(data))
    if network.skip is not None:
        network.skip.load_state_dict(training.network.get_submodule("skip").state_dict())
    with torch.no_grad():
        for name, value in training.averaged().items():
            network.get_parameter(name).copy_(value.to(torch.float16))
    facts: dict[str, Any] = {
        "data": data.sources(),
        "held_out": data.says(),
        "budget": {
            "images": training.progress.best_images or training.progress.images,
            "seconds": round(training.progress.seconds),
            "precision": str(training.precision).removeprefix("torch."),
        },
        "denoising": _errors(file, network, data, coder),
        "unfit_for": file.unfit_for,
        "weights_licence": file.weights_licence,
        "notes": file.notes,
    }
    if file.pixel_mm is not None:
        facts["pixel_mm"] = file.pixel_mm
    if file.fields is not None and file.fields.fill is not None:
        facts["fill"] = file.fields.fill
    if data.whole_space is not None:
        whole = data.whole_space
        coords = {dim: v if isinstance(v, tuple) else tuple(v.tolist()) for dim, v in whole.coords.items()}
        facts["whole"] = {"dims": whole.dims, "shape": whole.shape, "coords": coords}
    schedule, numbers = Schedule(file.schedule.sigma_min, file.schedule.sigma_max), file.normalisation.model_dump()
    if coder is not None:
        facts["autoencoder"] = {"rmse": _coding(file, data, coder)}
        latent = LatentPrior(data.space, schedule, Card(file.name, file.summary, facts), (network, coder), **numbers)
        save_prior(out, latent)
        return latent
    prior = NetworkPrior(data.space, schedule, Card(file.name, file.summary, facts), network, **numbers)
    if file.conditions is not None:
        prior = ConditionalNetworkPrior(prior, file.conditions, data.whole_space)
    save_prior(out, prior)
    return prior


def _coding(file: TrainFile, data: TrainingData, coder: Autoencoder) -> dict[str, float]:
    """What the autoencoder loses of held-out images: RMSE in the physical unit; of several fields, in their scales."""
    scale = file.normalisation.scale if isinstance(file.normalisation.scale, float) else 1.0
    held_out = data.held_out().items()
    lost = {name: scale * loss_of_coding(coder, file.latent(sample.values), sample.known) for name, sample in held_out}
    return {name: float(f"{value:.4g}") for name, value in lost.items()}


def _errors(
    file: TrainFile, network: torch.nn.Module, data: TrainingData, coder: Autoencoder | None = None
) -> list[dict[str, Any]]:
    """Held-out errors of the network, of a Wiener filter fitted to whole training images, and of doing nothing.

    A network that was trained with a condition dropout is measured with its conditions and without them; one over latents on
    the latents of the images.
    """
    wiener = Wiener.fit(coded(coder, file.latent(data.whole(_FIT_IMAGES))))
    rows: list[dict[str, Any]] = []
    for name, sample in data.held_out().items():
        if coder is not None:
            denoiser = network_denoiser(network.eval(), file.normalisation.sigma_data)
            known = None if sample.known is None else coder.known(sample.known)
            latents = coded(coder, file.latent(sample.values))
            rows += [_row(denoiser, name, latents, known, wiener, s) for s in file.training.validation_sigmas]
            continue
        rows += _rows(file, network.eval(), name, sample, wiener, told=True)
        if file.conditions is not None and file.conditions.dropout > 0:
            rows += _rows(file, network, f"{name}, without conditions", sample, wiener, told=False)
    return rows


def _rows(
    file: TrainFile, network: torch.nn.Module, name: str, sample: Sample, wiener: Wiener, told: bool
) -> list[dict[str, Any]]:
    images, context = file.latent(sample.values), file.context(sample, told)
    rows = []
    for sigma in file.training.validation_sigmas:
        denoiser = told_denoiser(network, file.normalisation.sigma_data, context)
        rows.append(_row(denoiser, name, images, sample.known, wiener, sigma))
        scale = file.normalisation.scale
        if isinstance(scale, float):
            rows[-1]["prior_physical"] = _short(rows[-1]["prior"] * scale)
    return rows


def _row(
    denoiser: Denoiser, name: str, images: Tensor, known: Tensor | None, wiener: Wiener, sigma: float
) -> dict[str, Any]:
    ways: dict[str, Denoiser] = {"prior": denoiser, "wiener": wiener, "identity": lambda z, _: z}
    errors = {way: _short(denoising_error(how, images, sigma, known=known)) for way, how in ways.items()}
    return {"data": name, "sigma": sigma, **errors}


def _short(value: float) -> float:
    return float(f"{value:.4g}")


@contextmanager
def asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Whether SIGUSR1, SIGTERM or SIGINT came; a second SIGINT stops at once."""
    came: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        if came and number == signal.SIGINT:
            raise KeyboardInterrupt
        came.append(number)

    if threading.current_thread() is not threading.main_thread():  # only the main thread may be told
        yield lambda: False
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
