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

from recon import comm as ranks
from recon.comm import Comm
from recon.datasets.sampling import Sample
from recon.priors.base import Card
from recon.priors.conditional import ConditionalNetworkPrior
from recon.priors.denoising import Wiener, denoising_error
from recon.priors.network import NetworkPrior, build_network
from recon.priors.objective import told_denoiser
from recon.priors.store import save_prior
from recon.priors.training import Batch, HeldOut, Task, Training
from recon.schedules import Schedule
from recon.workflows.train_file import TrainFile, read_train_file
from recon.workflows.training_data import TrainingData

__all__ = ["TrainFile", "export", "prepare", "read_train_file", "train"]

log = logging.getLogger("recon.train")

_FIT_IMAGES = 1024  # training images from which the Wiener filter learns its mean and spectrum


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
        (folder / "checkpoint.safetensors").unlink(missing_ok=True)
    training = prepare(file, folder, workspace, comm)
    say(
        f"{file.name}: {sum(p.numel() for p in training.parameters):,} weights on {comm.draws.size} x {training.device.type} "
        f"in {str(training.precision).removeprefix('torch.')}, from image {training.progress.images:,}"
    )
    with _asked_to_stop() as asked:
        training.run(say, stop=asked)
    if comm.root:
        export(file, training, out, workspace)
    comm.draws.barrier()
    return out


def prepare(file: TrainFile, folder: Path | None, workspace: Path | None = None, comm: Comm | None = None) -> Training:
    """The training run of a file: its data sets loaded and checked, its network built, its checkpoint resumed if there is one.

    Raises InputError when a data set is missing, is not what its card says, or is a test set.
    """
    data = file.data(workspace)

    def batches(step: int, rows: Sequence[int]) -> Batch:
        sample = data.sample(step, rows)
        assert sample.known is not None
        return Batch(file.latent(sample.values), sample.known, file.context(sample))

    curve = data.curve()
    task = Task(
        build_network(file.network(data), file.training.seed).train(),
        batches,
        Schedule(file.schedule.sigma_min, file.schedule.sigma_max),
        sigma_data=file.normalisation.sigma_data,
        held_out=HeldOut(file.latent(curve.values), file.context(curve)) if len(curve.values) else None,
        identity=file.identity,
    )
    return Training(file.training, task, folder, comm)


def export(file: TrainFile, training: Training, out: Path, workspace: Path | None = None) -> NetworkPrior:
    """Write the averaged weights of a training run to ``out`` with a card that holds their held-out errors."""
    data = file.data(workspace)
    network = build_network(file.network(data))
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
        "denoising": _errors(file, network, data),
        "unfit_for": file.unfit_for,
        "weights_licence": file.weights_licence,
        "notes": file.notes,
    }
    if file.pixel_mm is not None:
        facts["pixel_mm"] = file.pixel_mm
    if data.whole_space is not None:
        whole = data.whole_space
        coords = {dim: v if isinstance(v, tuple) else tuple(v.tolist()) for dim, v in whole.coords.items()}
        facts["whole"] = {"dims": whole.dims, "shape": whole.shape, "coords": coords}
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
    if file.conditions is not None:
        prior = ConditionalNetworkPrior(prior, file.conditions, data.whole_space)
    save_prior(out, prior)
    return prior


def _errors(file: TrainFile, network: torch.nn.Module, data: TrainingData) -> list[dict[str, Any]]:
    """Held-out errors of the network, of a Wiener filter fitted to whole training images, and of doing nothing.

    A network that was trained with a condition dropout is measured with its conditions and without them.
    """
    wiener = Wiener.fit(file.latent(data.whole(_FIT_IMAGES)))
    rows: list[dict[str, Any]] = []
    for name, sample in data.held_out().items():
        rows += _rows(file, network.eval(), name, sample, wiener, told=True)
        if file.conditions is not None and file.conditions.dropout > 0:
            rows += _rows(file, network, f"{name}, without conditions", sample, wiener, told=False)
    return rows


def _rows(
    file: TrainFile, network: torch.nn.Module, name: str, sample: Sample, wiener: Wiener, told: bool
) -> list[dict[str, Any]]:
    images, known, scale = file.latent(sample.values), sample.known, file.normalisation.scale
    context, rows = file.context(sample, told), []
    for sigma in file.training.validation_sigmas:
        denoiser = told_denoiser(network, file.normalisation.sigma_data, context)
        ours = denoising_error(denoiser, images, sigma, known=known)
        linear = denoising_error(wiener, images, sigma, known=known)
        nothing = denoising_error(lambda z, _: z, images, sigma, known=known)
        row = {"prior": ours, "wiener": linear, "identity": nothing}
        if isinstance(scale, float):
            row["prior_physical"] = ours * scale
        rows.append({"data": name, "sigma": sigma, **{key: float(f"{value:.4g}") for key, value in row.items()}})
    return rows


@contextmanager
def _asked_to_stop() -> Iterator[Callable[[], bool]]:
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
