r"""A prior learnt from measurements alone, by expectation-maximisation over diffusion priors (Rozet et al. 2024).

Lap 0 fits a Gaussian (``moments``).  Lap ``k`` draws samples ``x ~ q_{k-1}(x | y_i)`` of every observation ``i`` with the prior
of the lap before, exactly from the Gaussian in lap 1, by a posterior sampler after that, and trains the denoiser on them, from
the weights of the lap before.  With exact draws and a perfect denoiser no lap lowers ``sum_i log q_k(y_i)`` (algorithm 1 and
section 4 of the paper); both are approximations here, so each lap's samples are judged and the log says what they look like.

The noise of a sample depends on (seed, lap, observation, number of the sample) alone.  The folder holds all that is finished:
samples block by block, the checkpoint of the training, the weights of each lap.  A run that was killed goes on with the same
bits as one that was not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from recon.draws import Draws, blocks
from recon.errors import InputError, ReconError, Stopped
from recon.files import write_json, written_aside
from recon.likelihoods import GaussianLikelihood
from recon.priors.base import Card
from recon.priors.cards import Grid
from recon.priors.learning.around import AroundGaussian
from recon.priors.learning.config import LearningConfig
from recon.priors.learning.moments import Moments, fit_moments, one_thread, posterior_draws
from recon.priors.learning.observations import fingerprint, require_observations
from recon.priors.learning.samples import SIGMA_DATA, Quality, Scale, Shuffled, fields, judged
from recon.priors.network import Architecture, NetworkPrior, build_network
from recon.priors.objective import Task
from recon.priors.training import Training
from recon.schedules import Schedule
from recon.space import Space

Say = Callable[[str], None]
_VALUES = 65536  # of a block of samples
_SETTINGS = "learning.json"
_BINDING = ("observations", "config", "architecture")  # what a folder goes on with, or not at all


@dataclass(frozen=True)
class Job:
    """A block of samples to draw: ``draws`` has one member per entry of ``observations``; number: of the block."""

    number: int
    observations: Sequence[GaussianLikelihood]
    draws: Draws


class Sampling(Protocol):
    """How samples are drawn from posteriors of a prior: the E-step."""

    def __call__(self, prior: NetworkPrior, jobs: Sequence[Job]) -> Iterator[tuple[int, Tensor]]:
        """(number of the job, samples (n, *space.shape) in physical units), as they are ready."""


@dataclass(frozen=True)
class Learnt:
    """What learning leaves: the prior of the last lap, the Gaussian of lap 0, and one record per lap."""

    prior: NetworkPrior
    moments: Moments
    records: tuple[Mapping[str, Any], ...]


class Laps:
    """The laps of one run, in a folder.

    observations: of different objects of one space, images (y, x) or several fields on one grid.  sampling: the E-step.
    stop: asked after every block of samples and every training step.  ``run`` goes through all laps that are not finished.

    Raises InputError for observations that do not fit together or the architecture, or a folder of other settings or data.
    """

    def __init__(
        self,
        observations: Sequence[GaussianLikelihood],
        architecture: Architecture,
        config: LearningConfig,
        folder: Path,
        sampling: Sampling,
        say: Say = lambda line: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.space = require_observations(observations)
        _require_images(self.space, architecture)
        self.observations, self.architecture, self.config = observations, architecture, config
        self.folder, self.sampling, self.say, self.stop = Path(folder), sampling, say, stop
        self.schedule = Schedule(config.sigma_min, config.sigma_max)
        self.identity = fingerprint(observations)
        self._claim()

    def run(self) -> Learnt:
        """All laps.

        Raises ReconError when more samples of a lap diverge than the settings allow, Stopped once ``stop()`` is true.
        """
        moments = self._moments()
        for lap in range(1, self.config.laps + 1):
            if not (self._lap(lap) / "record.json").exists():
                self._learn(lap, moments)
        records = [json.loads((self._lap(k) / "record.json").read_text()) for k in range(1, self.config.laps + 1)]
        return Learnt(self.prior(self.config.laps), moments, tuple(records))

    def prior(self, lap: int) -> NetworkPrior:
        """The prior of a finished lap.  Raises InputError when the lap is not finished."""
        return load_learnt(self.folder, lap)

    def _learn(self, lap: int, moments: Moments) -> None:
        folder, scale = self._lap(lap), scale_of(moments)
        folder.mkdir(parents=True, exist_ok=True)
        images, quality = self.samples(lap, moments)
        self.say(f"lap {lap}: {quality.line()}")
        if quality.lost > self.config.diverged_limit:
            raise ReconError(
                f"{100 * quality.lost:.0f} % of the samples of lap {lap} diverged, more than diverged_limit allows; take more "
                "steps, more CG iterations or a longer training of the first lap"
            )
        network = network_of(self.architecture, self.config, moments)
        if lap > 1:
            _fill(network, _read(self._lap(lap - 1) / "weights.safetensors"))
        training = self.training(lap, network, images, folder)
        training.run(lambda line: self.say(f"lap {lap}: {line}"), stop=self.stop)
        with written_aside(folder / "weights.safetensors") as aside:
            save_file({name: value.contiguous() for name, value in training.averaged().items()}, aside)
        done = training.progress
        losses = [entry["loss"] for entry in done.history if "loss" in entry]
        record = {
            "lap": lap,
            "samples": quality.record(),
            "images": done.images,
            "seconds": done.seconds,
            "losses": losses,
        }
        record["scale"] = {"shift": scale.shift, "scale": scale.scale}
        write_json(folder / "record.json", record)
        # The lap is finished: what was kept to go on with it is not needed any more.
        (folder / "checkpoint.safetensors").unlink(missing_ok=True)

    def training(self, lap: int, network: nn.Module, images: Tensor, folder: Path | None) -> Training:
        """The training of a lap on latent ``images``; a checkpoint in the folder is continued."""
        config = self.config.lap_training(lap)
        batches = Shuffled(images, config.batch, config.seed, self.config.mirror)
        task = Task(network.train(), batches, self.schedule, SIGMA_DATA, identity=self.identity)
        return Training(config, task, folder)

    def samples(self, lap: int, moments: Moments) -> tuple[Tensor, Quality]:
        """The latent images a lap is trained on, drawn or read where they were drawn before."""
        folder = self._lap(lap) / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        jobs = self._jobs(lap)
        missing = [job for job in jobs if not _block(folder, job.number).exists()]
        parts = self._gaussian(moments, missing) if lap == 1 else iter(())
        if lap > 1 and missing:
            parts = self.sampling(self.prior(lap - 1), missing)
        for number, x in parts:
            with written_aside(_block(folder, number)) as aside:
                save_file({"x": x.float().contiguous()}, aside)
            self.say(f"lap {lap}: drew block {number + 1} of {len(jobs)}")
            if self.stop():
                raise Stopped(f"stopped in lap {lap} with its samples so far; go on with the same command")
        x = torch.cat([_read(_block(folder, job.number))["x"] for job in jobs])
        return judged(self.observations, x, scale_of(moments), self.config)

    def _jobs(self, lap: int) -> list[Job]:
        each, count = self.config.per_observation, len(self.observations)
        size = self.config.block or max(1, min(4096, _VALUES // self.space.size))
        pieces = blocks(count * each, size)
        return [
            Job(b, [self.observations[m // each] for m in members], Draws(self.config.seed, members, lap))
            for b, members in enumerate(pieces)
        ]

    def _gaussian(self, moments: Moments, jobs: Sequence[Job]) -> Iterator[tuple[int, Tensor]]:
        for job in jobs:
            with one_thread():
                x = posterior_draws(moments, job.observations, job.draws)
            yield job.number, x.reshape(-1, *self.space.shape)

    def _moments(self) -> Moments:
        path = self.folder / "moments.safetensors"
        if not path.exists():
            with one_thread():
                fit = fit_moments(self.observations, self.config.rank, self.config.moment_iterations, say=self.say)
            with written_aside(path) as aside:
                save_file({name: value.contiguous() for name, value in fit.moments.tensors().items()}, aside)
            write_json(self.folder / "moments.json", {"log_likelihood": fit.log_likelihood})
        return Moments(**_read(path))

    def _claim(self) -> None:
        """Say whose folder this is, or refuse it."""
        path = self.folder / _SETTINGS
        coords = {k: v if isinstance(v, tuple) else tuple(v.tolist()) for k, v in self.space.coords.items()}
        grid = Grid(dims=self.space.dims, shape=self.space.shape, coords=coords)
        ours = {
            "observations": self.identity,
            "count": len(self.observations),
            "config": self.config.model_dump(mode="json"),
            "architecture": self.architecture.model_dump(mode="json"),
            "grid": grid.model_dump(mode="json"),
            "unit": self.space.unit,
        }
        if path.exists():
            theirs = json.loads(path.read_text(encoding="utf-8"))
            # More laps may be asked for than before; all that is finished stays as it is.
            different = [key for key in _BINDING if _without_laps(theirs.get(key)) != _without_laps(ours[key])]
            if different:
                raise InputError(
                    f"{self.folder} was begun with other {' and '.join(different)}; choose another folder or remove it"
                )
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(path, ours)

    def _lap(self, lap: int) -> Path:
        return self.folder / f"lap-{lap:03d}"


def load_learnt(folder: Path, lap: int | None = None) -> NetworkPrior:
    """The prior that was learnt in ``folder``: of the last finished lap, or of the one asked for.

    Raises InputError when that lap is not finished, or the folder is none of learning.
    """
    folder = Path(folder)
    if not (folder / _SETTINGS).is_file():
        raise InputError(f"{folder} is not a folder of learning: it has no {_SETTINGS}")
    finished = sorted(int(path.parent.name[4:]) for path in folder.glob("lap-*/weights.safetensors"))
    wanted = lap if lap is not None else max(finished, default=1)
    if wanted not in finished:
        raise InputError(f"lap {wanted} of {folder} is not finished; {finished or 'none'} are")
    settings = json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))
    config = LearningConfig.model_validate(settings["config"])
    moments = Moments(**_read(folder / "moments.safetensors"))
    network = network_of(Architecture.model_validate(settings["architecture"]), config, moments)
    _fill(network, _read(folder / f"lap-{wanted:03d}" / "weights.safetensors"))
    scale = scale_of(moments)
    summary = f"learnt from {settings['count']} observations in {wanted} laps of expectation-maximisation"
    return NetworkPrior(
        Grid.model_validate(settings["grid"]).space(settings["unit"]),
        Schedule(config.sigma_min, config.sigma_max),
        Card(f"learnt-{wanted}", summary),
        network,
        sigma_data=SIGMA_DATA,
        shift=scale.shift,
        scale=scale.scale,
    )


def network_of(architecture: Architecture, config: LearningConfig, moments: Moments) -> nn.Module:
    """The network before any training, around the Gaussian where the settings say so."""
    network = build_network(architecture, config.seed)
    if not config.around:
        return network
    scale = scale_of(moments)
    return AroundGaussian.of(network, moments, (scale.shift, scale.scale), SIGMA_DATA)


def scale_of(moments: Moments) -> Scale:
    """The scale that gives latents of the Gaussian a mean of zero and a standard deviation of ``SIGMA_DATA``, overall."""
    shift = moments.mean.mean()
    variance = (moments.factors.square().sum(1) + moments.diagonal + (moments.mean - shift).square()).mean()
    return Scale(float(shift), float(variance.sqrt()) / SIGMA_DATA)


def _require_images(space: Space, architecture: Architecture) -> None:
    wanted = (architecture.fields, *architecture.sides)
    if len(space.shape) not in (2, 3) or (fields(space), *space.shape[-2:]) != wanted:
        raise InputError(
            f"observations are of {space.describe()}; the architecture is of {architecture.fields} fields of "
            f"{architecture.sides} pixels"
        )
    if architecture.condition or architecture.whole is not None or architecture.wiener:
        raise InputError(
            "learning from observations has no conditions, no windows and a Gaussian start of its own; leave condition, "
            "whole and wiener out"
        )


def _fill(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_(weights[name])


def _without_laps(part: Any) -> Any:  # noqa: ANN401  (a JSON value)
    return {key: value for key, value in part.items() if key != "laps"} if isinstance(part, dict) else part


def _block(folder: Path, number: int) -> Path:
    return folder / f"block-{number:05d}.safetensors"


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise InputError(f"{path} is damaged ({error}); remove it and start again: it is made anew") from error
