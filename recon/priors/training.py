r"""Training of a denoiser (Karras et al. 2022, table 1 and section 5).

.. math::
    L = E\, \lambda(\sigma)\, \| m \odot (D(z_0 + \sigma n, \sigma) - z_0) \|^2, \qquad
    \lambda(\sigma) = \frac{\sigma^2 + s^2}{(\sigma s)^2}, \qquad \ln\sigma \sim N(P_{mean}, P_{std}^2),

with a mask ``m`` that leaves out pixels of unknown value; a share ``tail`` of the levels is log-uniform over the whole
schedule, so that no level is left untrained.  Adam with warm-up and a cosine decay to zero; the weights that are kept are an
exponential moving average (EMA).  Data, noise and levels of step ``k`` are pure functions of (seed, k): a run that was
stopped and resumed gives the same bits as one that was not, unless the decay is told to follow the clock (``seconds``).
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from recon.errors import InputError
from recon.files import write_json, written_aside
from recon.priors.denoising import denoising_error, network_denoiser
from recon.priors.network import precondition
from recon.schedules import Schedule

Batches = Callable[[int, int], tuple[Tensor, Tensor]]
"""(step, count) -> latent images (count, ny, nx) or (count, field, ny, nx) and their masks, 1.0 where the value is known."""


class TrainingConfig(BaseModel):
    """How a network is trained.

    The end comes at ``images`` or after ``seconds`` of training, whichever is first; the learning rate decays to zero along
    the one that is closer.  A batch is cut into chunks, each the work of one thread; their gradients are added in a fixed
    order, so the result does not depend on the number of threads.  learning_rate is reached after ``warmup`` images.  ema:
    half-life of the average in images, and never more than a twentieth of those seen.  clip: largest norm of the gradient.
    precision: "auto" times both types.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: int = Field(default=0, ge=0)
    images: int = Field(ge=1)
    seconds: float | None = Field(default=None, gt=0)
    batch: int = Field(default=16, ge=1)
    chunk: int = Field(default=4, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    warmup: int = Field(default=1000, ge=0)
    p_mean: float = -1.2
    p_std: float = Field(default=1.2, gt=0)
    tail: float = Field(default=0.1, ge=0, le=1)
    ema: int = Field(default=1000, ge=1)
    clip: float = Field(default=1.0, gt=0)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    progress_seconds: float = Field(default=30, gt=0)
    checkpoint_seconds: float = Field(default=240, gt=0)
    validate_images: int = Field(default=5000, ge=1)
    validation_sigmas: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 3.0, 10.0)

    @model_validator(mode="after")
    def _levels(self) -> TrainingConfig:
        if not all(sigma > 0 for sigma in self.validation_sigmas):
            raise ValueError("validation_sigmas must be positive")
        return self


@dataclass
class Progress:
    """Where a training run stands, and what its log says: one record per progress line or validation."""

    step: int = 0
    images: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)


class Training:
    """One training run: a network, its average, its optimiser and its progress.

    network: ``F`` of the preconditioned denoiser, trained in place.  batches: the data.  held_out: latent images (n, ...)
    for the validation curve.  folder: where ``checkpoint.safetensors`` and ``log.json`` are kept; None keeps nothing.

    ``run`` trains to the end; ``average`` holds the weights to keep.  A checkpoint found in the folder is resumed.
    """

    def __init__(
        self,
        config: TrainingConfig,
        network: nn.Module,
        batches: Batches,
        schedule: Schedule,
        *,
        sigma_data: float,
        held_out: Tensor | None = None,
        folder: Path | None = None,
    ) -> None:
        self.config, self.network, self.batches, self.schedule = config, network, batches, schedule
        self.sigma_data, self.held_out, self.folder = sigma_data, held_out, folder
        self.names = [name for name, _ in network.named_parameters()]
        self.parameters = [p for _, p in network.named_parameters()]
        self.average = [p.detach().clone() for p in self.parameters]
        self.optimiser = torch.optim.Adam(self.parameters, lr=config.learning_rate, betas=(0.9, 0.99), fused=True)
        self.precision = pick_precision() if config.precision == "auto" else getattr(torch, config.precision)
        cores = len(os.sched_getaffinity(0))
        self.pool = ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,))
        self.coming: Future[tuple[Tensor, Tensor]] | None = None
        self.progress = Progress()
        if folder is not None and (folder / "checkpoint.safetensors").exists():
            self._resume(folder / "checkpoint.safetensors")

    def run(self, say: Callable[[str], None] = lambda line: None, *, stop_after: int | None = None) -> Progress:
        """Train to the end, or for ``stop_after`` more steps; checkpoint at the end and every few minutes on the way."""
        started = time.monotonic() - self.progress.seconds
        last_said = last_saved = time.monotonic()
        losses: list[float] = []
        steps = 0
        while self.share() < 1 and (stop_after is None or steps < stop_after):
            losses.append(self._step())
            steps += 1
            now = time.monotonic()
            self.progress.seconds = now - started
            if now - last_said >= self.config.progress_seconds:
                say(self._line(losses))
                last_said, losses = now, []
            if self.progress.images % self.config.validate_images < self.config.batch and self.held_out is not None:
                say(self.pool.submit(self._validate).result())
            if self.folder is not None and now - last_saved >= self.config.checkpoint_seconds:
                self.save()
                last_saved = now
        self.save()
        return self.progress

    def share(self) -> float:
        """Share of the run that is done, from 0 to 1."""
        clock = self.progress.seconds / self.config.seconds if self.config.seconds else 0.0
        return min(1.0, max(self.progress.images / self.config.images, clock))

    def learning_rate(self) -> float:
        """Of the next step: linear warm-up, then half a cosine to zero."""
        warm = min(1.0, (self.progress.images + self.config.batch) / max(1, self.config.warmup))
        return self.config.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * self.share()))

    def averaged(self) -> dict[str, Tensor]:
        """The averaged weights by name: what is kept of a run."""
        return {name: value.clone() for name, value in zip(self.names, self.average, strict=True)}

    def _step(self) -> float:
        config = self.config
        coming = self.coming or self.pool.submit(self.batches, self.progress.step, config.batch)
        images, mask = coming.result()
        self.coming = self.pool.submit(self.batches, self.progress.step + 1, config.batch)
        sigma, noise = levels_and_noise(config, self.schedule, self.progress.step, tuple(images.shape))
        chunks = [slice(first, first + config.chunk) for first in range(0, config.batch, config.chunk)]
        parts = list(self.pool.map(lambda c: self._gradient(images[c], mask[c], sigma[c], noise[c]), chunks))
        # Done by a worker too: threads of one operation that wait for each other stall on a machine shared with other work.
        return self.pool.submit(self._update, parts, mask.sum()).result()

    def _update(self, parts: list[tuple[Tensor, tuple[Tensor, ...]]], known: Tensor) -> float:
        for group in self.optimiser.param_groups:
            group["lr"] = self.learning_rate()
        for index, p in enumerate(self.parameters):
            # With the strides of the parameter: the fused optimiser pairs elements in the order of memory.
            p.grad = torch.zeros_like(p)
            for _, grads in parts:
                p.grad += grads[index] / known
        torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.progress.step += 1
        self.progress.images += self.config.batch
        half_life = min(self.config.ema, self.progress.images / 20)
        with torch.no_grad():
            torch._foreach_lerp_(
                self.average, list[Tensor](self.parameters), 1 - 0.5 ** (self.config.batch / half_life)
            )
        return float(sum(loss for loss, _ in parts) / known)

    def _gradient(
        self, images: Tensor, mask: Tensor, sigma: Tensor, noise: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.precision is torch.bfloat16):
            loss = denoising_loss(self.network, images, mask, sigma, noise, self.sigma_data)
        return loss.detach(), torch.autograd.grad(loss, self.parameters)

    def _validate(self) -> str:
        assert self.held_out is not None
        denoiser = network_denoiser(self.network, self.sigma_data)
        trained = [p.detach().clone() for p in self.parameters]
        with torch.no_grad():
            for p, mean in zip(self.parameters, self.average, strict=True):
                p.copy_(mean)
            errors = {sigma: denoising_error(denoiser, self.held_out, sigma) for sigma in self.config.validation_sigmas}
            for p, value in zip(self.parameters, trained, strict=True):
                p.copy_(value)
        self.progress.history.append(
            {"images": self.progress.images, **{f"rmse@{sigma:g}": error for sigma, error in errors.items()}}
        )
        return "held-out RMSE  " + "  ".join(f"{sigma:g}: {error:.4f}" for sigma, error in errors.items())

    def _line(self, losses: list[float]) -> str:
        progress, rate = self.progress, self.progress.images / self.progress.seconds
        loss = sum(losses) / len(losses)
        progress.history.append(
            {"images": progress.images, "seconds": progress.seconds, "loss": loss, "lr": self.learning_rate()}
        )
        left = progress.seconds * (1 - self.share()) / max(self.share(), 1e-9)
        return (
            f"{100 * self.share():5.1f} %  {progress.images} images  {rate:.1f}/s  loss {loss:.4f}  "
            f"lr {self.learning_rate():.2e}  left {left / 60:.1f} min"
        )

    def save(self) -> None:
        """Write the checkpoint and the log aside, then rename; nothing without a folder."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {}
        for name, p, mean in zip(self.names, self.parameters, self.average, strict=True):
            tensors |= {f"network.{name}": p.detach().contiguous(), f"average.{name}": mean.contiguous()}
            for key, value in self.optimiser.state.get(p, {}).items():
                tensors[f"adam.{key}.{name}"] = value.contiguous()
        state = {"config": self.config.model_dump_json(), "progress": json.dumps(vars(self.progress))}
        with written_aside(self.folder / "checkpoint.safetensors") as aside:
            save_file(tensors, aside, metadata=state)
        write_json(self.folder / "log.json", self.progress.history)

    def _resume(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                stated: Mapping[str, str] = file.metadata()
            tensors = load_file(path)
        except SafetensorError as error:
            raise InputError(f"{path} is damaged ({error}); remove it to train from the start") from error
        if json.loads(stated["config"]) != json.loads(self.config.model_dump_json()):
            raise InputError(f"{path} belongs to another training configuration; remove it or choose another folder")
        if {n.removeprefix("network.") for n in tensors if n.startswith("network.")} != set(self.names):
            raise InputError(f"{path} belongs to another network; remove it or choose another folder")
        with torch.no_grad():
            for name, p, mean in zip(self.names, self.parameters, self.average, strict=True):
                p.copy_(tensors[f"network.{name}"])
                mean.copy_(tensors[f"average.{name}"])
                keys = [k for k in ("step", "exp_avg", "exp_avg_sq") if f"adam.{k}.{name}" in tensors]
                if keys:
                    state = {k: torch.zeros_like(p) if k != "step" else torch.zeros(()) for k in keys}
                    self.optimiser.state[p] = {k: v.copy_(tensors[f"adam.{k}.{name}"]) for k, v in state.items()}
        self.progress = Progress(**json.loads(stated["progress"]))


def denoising_loss(
    network: nn.Module, images: Tensor, mask: Tensor, sigma: Tensor, noise: Tensor, sigma_data: float
) -> Tensor:
    """``L`` of the module docstring for ``images`` (n, ...) at levels ``sigma`` (n,), summed over images and pixels."""
    level = sigma.reshape(-1, *[1] * (images.ndim - 1))
    denoised = precondition(network, images + level * noise, sigma, sigma_data)
    weight = (level.square() + sigma_data**2) / (level * sigma_data).square()
    return (weight * mask * (denoised - images).square()).sum()


def levels_and_noise(
    config: TrainingConfig, schedule: Schedule, step: int, shape: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Noise levels (n,) and standard normal noise (n, ...) of a step: a pure function of (seed, step)."""
    # An array of uint64: numpy takes a list with a number above 2^63 through float64, which forgets the step.
    key = np.array([config.seed, (1 << 63) + step], dtype=np.uint64)
    random = np.random.Generator(np.random.Philox(key=key))
    log_sigma = config.p_mean + config.p_std * random.standard_normal(shape[0])
    low, high = math.log(schedule.sigma_min), math.log(schedule.sigma_max)
    flat = random.uniform(low, high, shape[0])
    log_sigma = np.where(random.random(shape[0]) < config.tail, flat, np.clip(log_sigma, low, high))
    noise = random.standard_normal(shape, dtype=np.float32)
    return torch.from_numpy(np.exp(log_sigma)).to(torch.float32), torch.from_numpy(noise)


def pick_precision() -> torch.dtype:
    """The faster of float32 and bfloat16 for a 3 x 3 convolution on this processor, by a measurement of some 50 ms."""
    times: dict[torch.dtype, float] = {}
    for dtype in (torch.float32, torch.bfloat16):
        layer = nn.Conv2d(64, 64, 3, padding=1, dtype=dtype).to(memory_format=torch.channels_last)
        image = torch.zeros(4, 64, 32, 32, dtype=dtype).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            layer(image)
            start = time.perf_counter()
            for _ in range(3):
                layer(image)
            times[dtype] = time.perf_counter() - start
    return torch.bfloat16 if times[torch.bfloat16] < 0.7 * times[torch.float32] else torch.float32
