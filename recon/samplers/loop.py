"""The only loop: blocks of draws, step by step, on any number of threads and ranks.

Draws travel in blocks whose composition depends on the draw index alone, every block is computed with one thread, and noise is
keyed by draw; so the same ensemble, bit for bit, comes out of 1 thread or 16, 1 rank or 64, with or without a stop in between.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from recon.comm import Comm, serial
from recon.draws import Draws, blocks
from recon.ensemble import Ensemble
from recon.posterior import Posterior
from recon.samplers.base import Sampler, State


class Watcher(Protocol):
    """What a run does around the loop: restores, reports, checkpoints, stops."""

    def restore(self, owned: range) -> tuple[int, dict[int, State]] | None:
        """The step to go on from and the states of the owned blocks; None to start afresh."""

    def after_step(self, done: int, steps: int, states: dict[int, State]) -> None:
        """Called on every rank after each step; may write a checkpoint, may raise Stopped."""


def sample(
    posterior: Posterior,
    sampler: Sampler,
    draws: int = 64,
    seed: int = 0,
    block: int | None = None,
    comm: Comm | None = None,
    run: Watcher | None = None,
) -> Ensemble:
    """Draw an ensemble from ``posterior``; the whole of it comes back on every rank.

    draws: how many.  seed: of the keyed noise.  block: draws that are computed together (default: about 65,000 values, so 4
    images of 128 x 128); part of what the result depends on, to rounding.  comm: ranks and threads (default: this process).
    run: progress, checkpoints and resumption.

    Raises InputError before the first network call when the sampler cannot handle the posterior.
    """
    sampler.check(posterior)
    comm = comm or serial()
    block = block or default_block(posterior)
    pieces = blocks(draws, block)
    keyed = {b: Draws(seed, pieces[b]) for b in comm.owned(len(pieces))}
    start, before = time.monotonic(), Counter(posterior.evaluations)
    with block_threads(comm.workers) as each:
        found = run.restore(comm.owned(len(pieces))) if run else None
        first, states = found or (0, each(lambda b, _: sampler.init(posterior, keyed[b]), dict.fromkeys(keyed)))
        for k in range(first, sampler.steps):
            states = each(lambda b, state, k=k: sampler.step(posterior, state, k, keyed[b]), states)
            if sampler.couples:
                states = _couple(posterior, sampler, states, k, Draws(seed, _members(keyed)), comm)
            if run:
                run.after_step(k + 1, sampler.steps, states)
        parts = each(lambda b, state: sampler.finish(posterior, state), states)
    cost = dict(posterior.evaluations - before) | {"seconds": time.monotonic() - start, "steps": sampler.steps - first}
    info = {"sampler": describe(sampler), "draws": draws, "seed": seed, "block": block}
    return _gather(posterior, parts, info, cost, comm)


def default_block(posterior: Posterior) -> int:
    """Draws per block when nobody says; see ``block_of``."""
    return block_of(posterior.prior.latent.size)


def block_of(values: int) -> int:
    """Draws of so many values that make a block of about 65,000: at least one draw and at most 4096."""
    return max(1, min(4096, 65536 // values))


def describe(sampler: Sampler) -> dict[str, Any]:
    """A sampler as JSON: method, claim and every field."""
    claim = {"claim": sampler.claim, "exact_for": sampler.exact_for}
    return {"method": type(sampler).__name__.lower(), **claim, "fields": _plain(sampler)}


def _plain(value: Any) -> Any:  # noqa: ANN401  (a dataclass field)
    if dataclasses.is_dataclass(value):
        fields = {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return fields if isinstance(value, Sampler) else {"kind": type(value).__name__, **fields}
    return value


@contextmanager
def block_threads(workers: int) -> Iterator[Callable[..., dict[int, Any]]]:
    """Yield ``each(function, blocks)``: ``{b: function(b, value)}``, ``workers`` blocks side by side, one thread each.

    The number of threads inside torch changes how sums are split and so their last bits; it is held at one here and put back.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) if workers > 1 else None

    def work(function: Callable[..., Any], b: int, value: object) -> Any:  # noqa: ANN401
        with torch.no_grad():
            return function(b, value)

    def each(function: Callable[..., Any], items: dict[int, Any]) -> dict[int, Any]:
        if pool is None or len(items) < 2:
            return {b: work(function, b, value) for b, value in items.items()}
        jobs = {b: pool.submit(work, function, b, value) for b, value in items.items()}
        return {b: job.result() for b, job in jobs.items()}

    try:
        yield each
    finally:
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(before)


def _members(keyed: dict[int, Draws]) -> list[int]:
    return [m for draws in keyed.values() for m in draws.members]


def _couple(
    posterior: Posterior, sampler: Sampler, states: dict[int, State], k: int, draws: Draws, comm: Comm
) -> dict[int, State]:
    """Let all draws of this rank meet (and, inside ``couple``, those of other ranks), then cut them into blocks again."""
    sizes = [len(state.z) for state in states.values()]
    parts = [state.tensors() for state in states.values()]
    joined = State.from_tensors({name: torch.cat([p[name] for p in parts]) for name in parts[0]}) if parts else None
    if joined is None:
        return states
    after = sampler.couple(posterior, joined, k, draws, comm).tensors()
    cut = {name: value.split(sizes) for name, value in after.items()}
    return {b: State.from_tensors({name: cut[name][i] for name in cut}) for i, b in enumerate(states)}


def _gather(
    posterior: Posterior, parts: dict[int, Ensemble], info: dict[str, Any], cost: dict[str, Any], comm: Comm
) -> Ensemble:
    """All blocks of all ranks in draw order; costs summed over ranks (seconds: the slowest)."""
    mine: dict[int, tuple[Tensor, Tensor | None]] = {b: (part.x.cpu(), part.log_weights) for b, part in parts.items()}
    everyone: dict[int, tuple[Tensor, Tensor]] = {}
    costs: list[dict[str, Any]] = []
    for theirs, spent in comm.draws.allgather((mine, cost)):
        everyone.update(theirs)
        costs.append(spent)
    ordered = [everyone[b] for b in sorted(everyone)]
    total = {name: sum(c.get(name, 0) for c in costs) for name in ("denoiser", "vjp", "forward", "adjoint")}
    total |= {"seconds": max(c["seconds"] for c in costs), "steps": max(c["steps"] for c in costs)}
    total |= {"ranks": comm.draws.size, "workers": comm.workers}
    x, log_w = torch.cat([x for x, _ in ordered]), torch.cat([w for _, w in ordered])
    return Ensemble(x, posterior.space, log_w, {**info, "cost": total})
