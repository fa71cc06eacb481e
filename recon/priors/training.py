r"""Training of a denoiser (Karras et al. 2022, section 5), or of what a task's ``objective`` says, on its loss.

Adam with warm-up and a cosine decay to zero; the weights that are kept are an exponential moving average (EMA), at the end of
the run or, with an early stop, at its best validation.  Data, noise and levels of step ``k`` are pure functions of (seed, k),
and the gradient is added in a fixed order (``recon.priors.exchange``): a run gives the same bits on any number of threads and
processes, and when it was killed and resumed, on another number of them too.  The exception is a decay that is told to follow
the clock (``seconds``).

Several processes under MPI, one per GPU where there are GPUs, each compute some chunks of every batch and then take the same
step; rank 0 alone writes.  MPI carries the exchange: libraries that reduce on the device add in an order that depends on how
many they are.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recon.comm import Comm, serial
from recon.errors import InputError, ReconError, Stopped
from recon.priors.exchange import gradient_sum
from recon.priors.feed import Feed, Portion
from recon.priors.hardware import pick_device, pick_precision, repeatable
from recon.priors.objective import Batch, Batches, HeldOut, Task, denoising_loss, levels_and_noise
from recon.priors.training_config import EarlyStop, Progress, TrainingConfig
from recon.priors.training_state import load_training, save_training

__all__ = [
    "Batch", "Batches", "EarlyStop", "HeldOut", "Progress", "Task", "Training", "TrainingConfig", "denoising_loss",
    "levels_and_noise",
]  # fmt: skip

_UNREAD = 1000  # steps whose losses may wait on a GPU before they are looked at


class Training:
    """One training run: a network, its average, its optimiser and its progress.

    task: the network, the data and the levels.  folder: where ``checkpoint.safetensors`` and ``log.json`` are kept; None keeps
    nothing.  comm: the processes of the axis "draws" share the chunks of each batch; ``comm.workers`` threads compute chunks
    side by side on a CPU.

    ``run`` trains to the end; ``averaged`` is what to keep.  A checkpoint found in the folder is resumed.

    Raises InputError when there are more processes than chunks, an early stop has no held-out images, or the device or
    checkpoint does not fit.
    """

    def __init__(
        self, config: TrainingConfig, task: Task, folder: Path | None = None, comm: Comm | None = None
    ) -> None:
        self.config, self.task, self.folder, self.comm = config, task, folder, comm or serial()
        self.axis = self.comm.draws
        chunks = config.chunks
        if self.axis.size > len(chunks):
            raise InputError(
                f"a batch of {config.batch} in chunks of {config.chunk} is work for {len(chunks)} processes; got "
                f"{self.axis.size}: take fewer, a larger batch or smaller chunks"
            )
        if config.early_stop is not None and task.held_out is None:
            raise InputError("early_stop needs held-out images for its validations; this task has none")
        self.device = pick_device(config.device, self.axis)
        self.precision = pick_precision(config.precision, self.device, self.axis)
        self.network = task.network.to(self.device)
        self.on_gpu = self.device.type == "cuda"
        compiled: Any = torch.compile(self.network) if config.compile and self.on_gpu else self.network
        self.forward: nn.Module = compiled
        self.names = [name for name, _ in self.network.named_parameters()]
        self.parameters = [p for _, p in self.network.named_parameters()]
        self.average = [p.detach().clone() for p in self.parameters]
        self.best: list[Tensor] | None = None
        self.optimiser = torch.optim.Adam(self.parameters, lr=config.learning_rate, betas=(0.9, 0.99), fused=True)
        self.sum = gradient_sum(self.parameters, self.axis)
        self.pool = ThreadPoolExecutor(self.comm.workers, initializer=torch.set_num_threads, initargs=(1,))
        self.feed = Feed(config, task, [chunks[c] for c in self.comm.owned(len(chunks))], self.device, self.pool)
        self.ahead = max(1, self.comm.workers) if self.on_gpu else 1
        self.progress = Progress()
        self._unread: list[tuple[int, float, Tensor]] = []
        self._losses: list[float] = []
        load_training(self)

    def run(
        self,
        say: Callable[[str], None] = lambda line: None,
        *,
        stop_after: int | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> Progress:
        """Train to the end, or for ``stop_after`` more steps; checkpoint at the end and every few minutes on the way.

        Raises Stopped, after a checkpoint, once ``stop()`` is true on some process; ReconError when the loss or gradient is
        no longer finite, with the checkpoints left as they are; InputError for data that are not finite.
        """
        started = time.monotonic() - self.progress.seconds
        last_said = last_saved = time.monotonic()
        steps = 0
        with repeatable(self.device):
            while self.share() < 1 and not self.progress.stopped and (stop_after is None or steps < stop_after):
                self._step()
                steps += 1
                now = time.monotonic()
                self.progress.seconds, asked = self._agreed(now - started, stop())
                if now - last_said >= self.config.progress_seconds:
                    say(self._line())
                    last_said = now
                if self.progress.images % self.config.validate_images < self.config.batch:
                    self._validate(say)
                if asked or now - last_saved >= self.config.checkpoint_seconds:
                    self.save()
                    last_saved = now
                if asked:
                    raise Stopped(
                        f"stopped at step {self.progress.step} with a checkpoint; go on with the same command"
                    )
            if self.config.early_stop is not None and self.share() >= 1:
                self._validate(say)
            self.save()
        self.axis.barrier()
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
        """The averaged weights by name, on the CPU: what is kept of a run."""
        kept = self.average if self.best is None else self.best
        return {name: value.to("cpu", copy=True) for name, value in zip(self.names, kept, strict=True)}

    def save(self) -> None:
        """Write the checkpoint and the log aside, then rename; on rank 0, and nothing without a folder.

        Raises ReconError instead of writing what is no longer finite.
        """
        self._read()
        save_training(self)

    def _agreed(self, seconds: float, stop: bool) -> tuple[float, bool]:
        """The clock of rank 0, and whether any process was asked to stop."""
        if self.axis.size == 1:
            return seconds, stop
        everyone = self.axis.allgather((seconds, stop))
        return everyone[0][0], any(asked for _, asked in everyone)

    def _step(self) -> None:
        portion = self.feed.take(self.progress.step, self.ahead)
        known = sum(self._in_order(portion.known))
        if known == 0:
            raise InputError(f"no pixel of the training images of step {self.progress.step} is known")
        self.sum.start(len(self.config.chunks), known)
        for loss, gradients in self._gradients(portion):
            self.sum.add(loss, gradients)
        self._update(self.sum.finish())

    def _in_order(self, mine: tuple[float, ...]) -> list[float]:
        """One number per chunk of the batch, from those of this process's chunks."""
        size, everyone = self.axis.size, self.axis.allgather(mine)
        return [everyone[chunk % size][chunk // size] for chunk in range(len(self.config.chunks))]

    def _gradients(self, portion: Portion) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
        """Loss and gradient of each chunk of this process, in order; on a CPU by threads, with few of them in memory."""
        if self.on_gpu:
            yield from (self._gradient(*portion.piece(chunk)) for chunk in portion.pieces)
            return
        waiting: deque[Future[tuple[Tensor, tuple[Tensor, ...]]]] = deque()
        for chunk in portion.pieces:
            waiting.append(self.pool.submit(self._gradient, *portion.piece(chunk)))
            if len(waiting) > self.comm.workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _gradient(self, batch: Batch, sigma: Tensor, noise: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        # Every weight is used once per pass: a cache of their bfloat16 copies would serve nobody, and threads share it.
        low = self.precision is torch.bfloat16
        with torch.autocast(self.device.type, torch.bfloat16, enabled=low, cache_enabled=False):
            loss = self.task.aim.loss(self.forward, batch, sigma, noise)
        return loss.detach(), torch.autograd.grad(loss, self.parameters)

    def _update(self, loss: Tensor) -> None:
        rate = self.learning_rate()
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        for p, gradient in zip(self.parameters, self.sum.gradients, strict=True):
            p.grad = gradient
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip)
        self._unread.append((self.progress.step, rate, torch.stack([loss, norm])))
        if not self.on_gpu or len(self._unread) >= _UNREAD:
            self._read()  # on a GPU it would wait for the step to end
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.progress.step += 1
        self.progress.images += self.config.batch
        half_life = min(self.config.ema, self.progress.images / 20)
        with torch.no_grad():
            torch._foreach_lerp_(
                self.average, list[Tensor](self.parameters), 1 - 0.5 ** (self.config.batch / half_life)
            )

    def _read(self) -> None:
        """Look at the losses of the steps since the last look."""
        if not self._unread:
            return
        numbers = torch.stack([pair for _, _, pair in self._unread]).tolist()
        for (step, rate, _), (loss, norm) in zip(self._unread, numbers, strict=True):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise ReconError(
                    f"training diverged at step {step}: loss {loss:g}, gradient norm {norm:g}, learning rate {rate:.3g}; "
                    f"checkpoints from before are kept. Lower learning_rate or clip, lengthen warmup, or train in float32, "
                    f"and start again with --fresh"
                )
        self._losses += [loss for loss, _ in numbers]
        self._unread = []

    def _validate(self, say: Callable[[str], None]) -> None:
        """Held-out errors of the average at each level, the levels dealt to processes and threads; may end the run."""
        held_out, config, progress = self.task.held_out, self.config, self.progress
        if held_out is None or progress.validated == progress.images:
            return
        self._read()
        trained = [p.detach().clone() for p in self.parameters]
        levels = config.validation_sigmas
        with torch.no_grad():
            torch._foreach_copy_(list[Tensor](self.parameters), self.average)
            mine = list(self.pool.map(self._error, [levels[i] for i in self.comm.owned(len(levels))]))
            torch._foreach_copy_(list[Tensor](self.parameters), trained)
        everyone = self.axis.allgather(mine)
        errors = {sigma: everyone[i % len(everyone)][i // len(everyone)] for i, sigma in enumerate(levels)}
        record = {"images": progress.images, **{f"rmse@{sigma:g}": error for sigma, error in errors.items()}}
        say("held-out RMSE  " + "  ".join(f"{sigma:g}: {error:.4f}" for sigma, error in errors.items()))
        progress.validated = progress.images
        if config.early_stop is not None:
            record["score"] = config.early_stop.score(errors)
            self._judge(config.early_stop, record["score"], say)
        progress.history.append(record)

    def _error(self, sigma: float) -> float:
        assert self.task.held_out is not None
        return self.task.aim.error(self.network, self.task.held_out, sigma, self.device)

    def _judge(self, stop: EarlyStop, score: float, say: Callable[[str], None]) -> None:
        """Keep the average when it is the best so far; end the run when it has not been for long enough."""
        progress = self.progress
        if progress.best is None or score < progress.best:
            progress.best, progress.best_images, progress.waited = score, progress.images, 0
            self.best = [mean.clone() for mean in self.average]
            return
        progress.waited += 1
        if progress.waited >= stop.patience:
            progress.stopped = True
            say(f"no better for {progress.waited} validations: ends with the average of {progress.best_images} images")

    def _line(self) -> str:
        self._read()
        progress, rate = self.progress, self.progress.images / self.progress.seconds
        loss = sum(self._losses) / len(self._losses)
        self._losses = []
        progress.history.append(
            {"images": progress.images, "seconds": progress.seconds, "loss": loss, "lr": self.learning_rate()}
        )
        left = progress.seconds * (1 - self.share()) / max(self.share(), 1e-9)
        return (
            f"{100 * self.share():5.1f} %  {progress.images} images  {rate:.1f}/s  loss {loss:.4f}  "
            f"lr {self.learning_rate():.2e}  left {left / 60:.1f} min"
        )
