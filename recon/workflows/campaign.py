"""Many cases with known truths, sampled one after the other: what a calibration is computed from.

Each case is whole on one rank and one small file, written aside, flushed and renamed, so a campaign that was killed goes on
by what is missing.  A case is a function of (seed, population, case number) alone: its three seeds are words of
``Draws(seed, [0], case)``, and every block is computed with one thread; so no bit depends on ranks, threads or the order.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from recon.comm import Comm, SerialAxis
from recon.draws import Draws
from recon.errors import InputError, ReconError, Stopped
from recon.files import write_json
from recon.runs import Checkpoints
from recon.samplers import State
from recon.samplers.loop import block_threads
from recon.workflows.cases import Campaign, Population, failed_record, measured

log = logging.getLogger("recon.calibrate")

STEP = 2**20  # of the keyed words that a case's seeds are made of; ties of ranks use the first ones


def conduct(campaign: Campaign, folder: Path, comm: Comm, day: date | None = None) -> None:
    """Compute the cases whose files are missing in ``folder``, dealt over the ranks; collective.

    A case that fails is recorded with its reason.  day: noted in the files, today in UTC by default.
    Raises Stopped between cases when any rank was asked to stop; what is done is kept.
    """
    stamp = (day or datetime.now(UTC).date()).isoformat()
    folder.mkdir(parents=True, exist_ok=True)
    named = {p.name: p for p in campaign.populations}
    todo = [
        (p.name, c) for p in campaign.populations for c in range(p.total) if not case_file(folder, p.name, c).is_file()
    ]
    todo = comm.draws.bcast(todo)  # what one rank sees, all do
    mine = [(named[name], case) for name, case in todo[comm.draws.rank :: comm.draws.size]]
    alone = Comm(SerialAxis(), comm.slab, comm.workers)
    start = time.monotonic()
    with _Interruption.of_signals(folder, comm) as interruption:
        for turn in range(math.ceil(len(todo) / comm.draws.size)):
            if turn < len(mine) and not interruption.asked:
                _one(campaign, *mine[turn], _Desk(folder, alone, interruption, stamp))
            done = min(len(todo), (turn + 1) * comm.draws.size)
            if comm.draws.any(interruption.asked):
                raise Stopped(
                    "stopped between cases, with all that are done kept; the same command goes on with the others"
                )
            gone = time.monotonic() - start
            log.info(
                "%d of %d cases, %.0f s gone, about %.0f s left", done, len(todo), gone, gone / done * len(todo) - gone
            )
    comm.draws.barrier()


def case_file(folder: Path, population: str, case: int) -> Path:
    """The file of one case."""
    return folder / f"{population}-{case:05d}.json"


def load_case(folder: Path, population: str, case: int) -> dict[str, Any]:
    """What ``conduct`` wrote of a case.  Raises InputError when it is missing or no such file."""
    path = case_file(folder, population, case)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not {"record", "needs", "day"} <= set(content):
            raise ValueError("it is no record of a case")
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); remove it and give the same command again") from error
    return dict(content)


def seeds_of(seed: int, population: str, case: int) -> tuple[int, int, int]:
    """Seeds of the truth, the noise and the draws of a case: 64 bits each, keyed by all three arguments."""
    step = STEP + int.from_bytes(population.encode()[:4], "big")
    u = Draws(seed, [0], case).uniform(step, (6,), "probe")[0].numpy()
    words = [int(v * 2.0**32) for v in u]
    return tuple(words[2 * i] << 32 | words[2 * i + 1] for i in range(3))  # type: ignore[return-value]


class _Interruption:
    """What lets a signal end the case that is being sampled; the loop's watcher.  That case is not recorded."""

    def __init__(self, signals: Checkpoints) -> None:
        self.signals = signals

    @property
    def asked(self) -> bool:
        return self.signals.stop

    @classmethod
    @contextmanager
    def of_signals(cls, folder: Path, comm: Comm) -> Iterator[_Interruption]:
        signals = Checkpoints(folder, comm, "")
        with signals.stopping_on_signals():
            yield cls(signals)

    def restore(self, owned: range) -> None:
        """A case is short: it starts afresh."""

    def after_step(self, done: int, steps: int, states: dict[int, State]) -> None:
        """Raise Stopped when it was asked for."""
        if self.asked:
            raise Stopped(f"stopped at step {done} of {steps} of a case")


@dataclass(frozen=True)
class _Desk:
    """Where a rank works on its cases."""

    folder: Path
    comm: Comm
    interruption: _Interruption
    day: str


def _one(campaign: Campaign, population: Population, case: int, desk: _Desk) -> None:
    """Pose, sample and record one case; what it raises is its record."""
    start = time.monotonic()
    content: dict[str, Any] = {"population": population.name, "case": case, "day": desk.day, "about": ""}
    with block_threads(1) as each:
        try:
            content |= each(lambda *_: _computed(campaign, population, case, desk), {0: None})[0]
        except Stopped:
            return
        except Exception as error:
            if not isinstance(error, ReconError):
                log.warning("case %d of %s failed", case, population.name, exc_info=True)
            why = f"{type(error).__name__}: {error}"
            log.warning("case %d of %s gives no numbers: %s", case, population.name, why)
            content |= {"record": failed_record(case, campaign.level, why).summary(), "needs": {}, "spacing": None}
    write_json(case_file(desk.folder, population.name, case), {**content, "seconds": time.monotonic() - start})


def _computed(campaign: Campaign, population: Population, case: int, desk: _Desk) -> dict[str, Any]:
    seed_truth, seed_noise, seed_draws = seeds_of(campaign.seed, population.name, case)
    posed = population.pose(case, seed_truth, seed_noise)
    return measured(campaign, case, posed, seed_draws, (desk.comm, desk.interruption))
