"""What the processes of an MPI job do in tests of training: ``python -m tests.priors.ranks FOLDER SECONDS [PAUSE]``."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from torch import nn

from recon.comm import from_environment
from recon.priors import exchange
from recon.priors.exchange import GradientSum, gradient_sum
from recon.priors.network import Context
from recon.priors.training import Batch, EarlyStop, HeldOut, Task, Training, TrainingConfig
from recon.schedules import Schedule

CONFIG = TrainingConfig(
    images=120, batch=10, chunk=2, warmup=8, ema=20, precision="float32", device="cpu",
    validate_images=40, validation_sigmas=(0.1, 0.5, 1.0), early_stop=EarlyStop(patience=100),
)  # fmt: skip


class Small(nn.Module):
    """A network of two convolutions, told a condition; slow enough to be killed while it trains."""

    def __init__(self, pause: float) -> None:
        super().__init__()
        self.pause = pause
        self.first = nn.Conv2d(2, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, z: torch.Tensor, c: torch.Tensor, context: Context) -> torch.Tensor:
        time.sleep(self.pause)
        assert context.condition is not None
        return self.last(
            torch.nn.functional.silu(self.first(torch.cat([z, context.condition], 1)) + c[:, None, None, None])
        )


def images(step: int, rows: list[int]) -> Batch:
    """Smooth images, a few pixels of which are unknown; image by image."""
    made = []
    for row in rows:
        torch.manual_seed(1000 * step + row)
        made.append(torch.randn(2, 1, 8).cumsum(-1).expand(-1, 8, -1))
    both = torch.stack(made)
    known = torch.ones(len(rows), 8, 8)
    known[:, 0, : 1 + step % 3] = 0
    return Batch(both[:, 0], known, Context(both[:, 1:]))


def training(folder: Path | None, seconds: float = 1e9, pause: float = 0.0) -> Training:
    """The run that all tests make, with a checkpoint every so many seconds and a pause in every chunk."""
    torch.manual_seed(0)
    held_out = images(10**6, range(5))
    config = CONFIG.model_copy(update={"checkpoint_seconds": seconds})
    task = Task(Small(pause), images, Schedule(0.01, 10.0), 0.5, HeldOut(held_out.images, held_out.context))
    return Training(config, task, folder, from_environment())


def check_sums() -> None:
    """The shared sum of made-up gradients is that of one process, for every number of chunks, staged or not."""
    comm, layout = from_environment(), [(3, 2), (5,), (1, 1, 2, 2), (2,)]
    network = [
        torch.empty(shape).to(memory_format=torch.channels_last) if len(shape) == 4 else torch.empty(shape)
        for shape in layout
    ]
    kept = exchange._host
    for staged in (False, True):
        exchange._host = torch.empty_like if staged else kept
        shared, alone = gradient_sum(network, comm.draws), GradientSum(network)
        for chunks in range(comm.draws.size, 8):
            torch.manual_seed(chunks)
            parts = [(torch.randn(()), [10 ** (3 * torch.randn(s)) for s in layout]) for _ in range(chunks)]
            for total, mine in ((alone, range(chunks)), (shared, comm.owned(chunks))):
                total.start(chunks, 7.0)
                for chunk in mine:
                    total.add(*parts[chunk])
            assert torch.equal(alone.finish(), shared.finish())
            assert all(torch.equal(a, b) for a, b in zip(alone.gradients, shared.gradients, strict=True))


if __name__ == "__main__":
    torch.set_num_threads(1)
    if from_environment().draws.size > 1:
        check_sums()
    training(Path(sys.argv[1]), *map(float, sys.argv[2:])).run()
