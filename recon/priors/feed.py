"""The images, noise and levels of each step, made ahead of time by threads.

What a step needs is a pure function of (seed, step), so it may be made early, by any thread, and by each process for its own
chunks alone; only the noise of a batch is one stream, which every process draws whole.  On a GPU what is made ahead lies in
pinned memory and is copied while the GPU computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor, Future
from typing import NamedTuple

import torch
from torch import Tensor

from recon.errors import InputError
from recon.priors.network import Context
from recon.priors.objective import Batch, Task, levels_and_noise
from recon.priors.training_config import TrainingConfig


class Portion(NamedTuple):
    """What one process computes of one step: ``pieces`` say which images are whose chunk; ``known`` pixels of each piece."""

    batch: Batch
    sigma: Tensor
    noise: Tensor
    pieces: tuple[slice, ...]
    known: tuple[float, ...]

    def piece(self, chosen: slice) -> tuple[Batch, Tensor, Tensor]:
        """Images, levels and noise of one chunk."""
        images, known, context = self.batch
        part = Batch(images[chosen], known[chosen], None if context is None else context.rows(chosen))
        return part, self.sigma[chosen], self.noise[chosen]


class Feed:
    """Portions of the steps in turn, ``ahead`` of them in the making.

    chunks: the images of each chunk of this process within the batch.  Raises InputError, when a portion is taken, for images
    that are not finite, or that do not fit their masks.
    """

    def __init__(
        self, config: TrainingConfig, task: Task, chunks: Sequence[slice], device: torch.device, pool: Executor
    ) -> None:
        self.config, self.task, self.device, self.pool = config, task, device, pool
        self.rows = [row for chunk in chunks for row in range(chunk.start, chunk.stop)]
        ends = [sum(c.stop - c.start for c in chunks[: i + 1]) for i in range(len(chunks))]
        self.pieces = tuple(
            slice(end - (chunk.stop - chunk.start), end) for chunk, end in zip(chunks, ends, strict=True)
        )
        self._coming: dict[int, Future[Portion]] = {}

    def take(self, step: int, ahead: int = 1) -> Portion:
        """The portion of ``step`` on the device; those of the ``ahead`` steps after it are begun."""
        for later in range(step, step + ahead + 1):
            if later not in self._coming:
                self._coming[later] = self.pool.submit(self._made, later)
        self._coming = {number: future for number, future in self._coming.items() if number >= step}
        portion = self._coming.pop(step).result()
        if self.device.type == "cpu":
            return portion
        batch = portion.batch
        images, known, sigma, noise = (
            t.to(self.device, non_blocking=True) for t in (batch.images, batch.known, portion.sigma, portion.noise)
        )
        context = None if batch.context is None else batch.context.to(self.device)
        return portion._replace(batch=Batch(images, known, context), sigma=sigma, noise=noise)

    def _made(self, step: int) -> Portion:
        images, known, context = Batch(*self.task.batches(step, self.rows))
        if len(images) != len(self.rows) or images.shape != known.shape:
            raise InputError(
                f"step {step} needs {len(self.rows)} images with masks of their shape; got images "
                f"{tuple(images.shape)} and masks {tuple(known.shape)}"
            )
        for what, tensor in {"image": images, "condition": context.condition if context else None}.items():
            if tensor is not None and not bool(tensor.isfinite().all()):
                wrong = [row for row, one in zip(self.rows, tensor, strict=True) if not bool(one.isfinite().all())]
                raise InputError(
                    f"the {what} of training image {wrong[0]} of step {step} holds numbers that are not finite "
                    f"({len(wrong)} images like it in this batch); mask or repair them in the data set"
                )
        shape = (self.config.batch, *images.shape[1:])
        sigma, noise = levels_and_noise(self.config, self.task.schedule, step, shape)
        if len(self.rows) < self.config.batch:
            sigma, noise = sigma[self.rows], noise[self.rows]
        counts = tuple(float(known[piece].sum(dtype=torch.float64)) for piece in self.pieces)
        if self.device.type == "cuda":
            images, known, sigma, noise = (t.pin_memory() for t in (images, known, sigma, noise))
            context = None if context is None else Context(*(None if c is None else c.pin_memory() for c in context))
        return Portion(Batch(images, known, context), sigma, noise, self.pieces, counts)
