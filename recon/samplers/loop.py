"""The only loop: blocks of draws, step by step, on any number of threads and ranks.

Draws travel in blocks whose composition depends on the draw index alone, every block is computed with one thread, and noise is
keyed by draw; so the same ensemble, bit for bit, comes out of 1 thread or 16, 1 rank or 64, with or without a stop in between.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from recon.comm import Comm, serial
from recon.draws import Draws, Pairs, blocks
from recon.ensemble import Ensemble
from recon.errors import Diverged, InputError
from recon.posterior import Posterior
from recon.samplers.base import Sampler, State

log = logging.getLogger("recon.samplers")

RECORD = "aux.record."
"""Names of state tensors without a row per draw: what a coupled method notes about all of them, equal in every block."""

MOVED = ("resampled_bytes", "resampled_bytes_planned")
"""Counts of what coupled methods send between ranks; part of the cost when there are any."""


class Watcher(Protocol):
    """What a run does around the loop: restores, reports, checkpoints, stops."""

    def restore(self, owned: range) -> tuple[int, dict[int, State]] | None:
        """The step to go on from and the states of the owned blocks; None to start afresh."""

    def after_step(self, done: int, steps: int, states: dict[int, State]) -> None:
        """Called on every rank after each step; may write a checkpoint, may raise Stopped."""


def sample(
    posterior: Posterior,
    sampler: Sampler,
    draws: int | Pairs = 64,
    seed: int = 0,
    block: int | None = None,
    comm: Comm | None = None,
    run: Watcher | None = None,
) -> Ensemble:
    """Draw an ensemble from ``posterior``; the whole of it comes back on every rank.

    draws: how many, or ``Pairs(n)`` with opposite noise: each draw has the law that it has alone, their mean is known far
    better (on CT, two draws in place of thirty), their quantiles as from half as many.  seed: of the keyed noise.  block: draws
    that are computed together (default: about 65,000 values, so 4 images of 128 x 128); part of what the result depends on, to
    rounding.  comm: ranks and threads (default: this process).  run: progress, checkpoints and resumption.

    A block whose state is not finite any more is stopped at that step, with a warning in the log; the others go on.

    Raises InputError before the first network call when the sampler cannot handle the posterior or draws cannot be paired;
    Diverged, with the draws that are fine, when some are not finite (at once when none is left, or when draws meet).
    """
    sampler.check(posterior)
    comm = comm or serial()
    antithetic, draws = isinstance(draws, Pairs), 2 * draws.count if isinstance(draws, Pairs) else draws
    block = block or default_block(posterior, antithetic)
    if antithetic:
        _require_pairs(sampler, block)
    pieces = blocks(draws, block)
    keyed = {b: Draws(seed, pieces[b], antithetic=antithetic) for b in comm.owned(len(pieces))}
    start, before = time.monotonic(), Counter(posterior.evaluations)
    with block_threads(comm.workers) as each:
        found = run.restore(comm.owned(len(pieces))) if run else None
        first, states = found or (0, each(lambda b, _: sampler.init(posterior, keyed[b]), dict.fromkeys(keyed)))
        lost = _Lost(posterior, sampler, keyed, comm)
        lost.note(states, first - 1)
        for k in range(first, sampler.steps):
            alive = {b: state for b, state in states.items() if b not in lost.at}
            moved = each(lambda b, state, k=k: sampler.step(posterior, state, k, keyed[b]), alive)
            lost.note(moved, k)
            states = {**states, **moved}
            if sampler.couples:
                states = _couple(posterior, sampler, states, k, Draws(seed, _members(keyed)), comm)
            if run:
                run.after_step(k + 1, sampler.steps, states)
        alive = {b: state for b, state in states.items() if b not in lost.at}
        parts = each(lambda b, state: sampler.finish(posterior, state), alive)
    cost = dict(posterior.evaluations - before) | {"seconds": time.monotonic() - start, "steps": sampler.steps - first}
    info = {"sampler": describe(sampler), "draws": draws, "seed": seed, "block": block}
    info |= {"antithetic": True} if antithetic else {}
    return _gather(posterior, parts, info, cost, lost)


def default_block(posterior: Posterior, antithetic: bool = False) -> int:
    """Draws per block when nobody says; see ``block_of``.  Whole pairs where draws come in such."""
    found = block_of(posterior.prior.latent.size)
    return found + found % 2 if antithetic else found


def _require_pairs(sampler: Sampler, block: int) -> None:
    """Raises InputError where draws with opposite noise would be parted, or mean nothing."""
    if sampler.couples:
        raise InputError(
            f"{type(sampler).__name__} lets draws meet, so their noise does not stay in pairs; ask for a number of draws"
        )
    if block % 2:
        raise InputError(f"a block holds whole pairs of draws, so it must be even; got {block}")


def block_of(values: int) -> int:
    """Draws of so many values that make a block of about 65,000: at least one draw and at most 4096."""
    return max(1, min(4096, 65536 // values))


def describe(sampler: Sampler) -> dict[str, Any]:
    """A sampler as JSON: method, claim and every field."""
    claim = {"claim": sampler.claim, "exact_for": sampler.exact_for}
    return {"method": type(sampler).__name__.lower(), **claim, "fields": _plain(sampler)}


def _plain(value: Any, inside: bool = False) -> Any:  # noqa: ANN401  (a dataclass field)
    if dataclasses.is_dataclass(value):
        fields = {f.name: _plain(getattr(value, f.name), inside=True) for f in dataclasses.fields(value)}
        if isinstance(value, Sampler):
            return {"method": type(value).__name__.lower(), **fields} if inside else fields
        return {"kind": type(value).__name__, **fields}
    if isinstance(value, Tensor):
        digest = hashlib.sha256(value.detach().cpu().contiguous().numpy().tobytes()).hexdigest()
        return {"shape": list(value.shape), "sha256": digest}
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
    """Let all draws of this rank meet (and, inside ``couple``, those of other ranks), then cut them into blocks again.

    ``couple`` is collective: it is called on every rank, with a state of no rows on one that owns no block.
    """
    parts = [state.tensors() for state in states.values()]
    shared, rows = _template(parts[0] if parts else None, comm)
    joined = {name: torch.cat([p[name] for p in parts]) if parts else empty for name, empty in rows.items()}
    after = sampler.couple(posterior, State.from_tensors({**joined, **shared}), k, draws, comm).tensors()
    sizes = [len(state.z) for state in states.values()]
    common = {name: after[name] for name in after if name.startswith(RECORD)}
    cut = {name: value.split(sizes) for name, value in after.items() if name not in common and states}
    return {b: State.from_tensors({**{name: cut[name][i] for name in cut}, **common}) for i, b in enumerate(states)}


def _template(mine: dict[str, Tensor] | None, comm: Comm) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors that all draws share, and those with a row per draw, without rows; on a rank without blocks too."""
    if comm.draws.any(mine is None):
        kinds = None
        if mine is not None:
            kinds = {n: v if n.startswith(RECORD) else v[:0] for n, v in mine.items()}
        kinds = next(kind for kind in comm.draws.allgather(kinds) if kind is not None)
    else:
        assert mine is not None  # nobody is without blocks
        kinds = mine
    shared = {name: value for name, value in kinds.items() if name.startswith(RECORD)}
    return shared, {name: value[:0] for name, value in kinds.items() if name not in shared}


class _Lost:
    """The blocks of this rank that stopped being finite: ``at[b]`` is the step after which."""

    def __init__(self, posterior: Posterior, sampler: Sampler, keyed: dict[int, Draws], comm: Comm) -> None:
        self.posterior, self.sampler, self.keyed, self.comm = posterior, sampler, keyed, comm
        self.at: dict[int, int] = {}

    def note(self, states: dict[int, State], k: int) -> None:
        """Look at the states after step ``k``; raise Diverged at once when draws meet or nothing is left to compute."""
        for b, state in states.items():
            lost = not bool(torch.isfinite(state.z).all()) or bool(torch.isnan(state.log_w).any())
            if self.comm.slab.any(lost):  # the ranks of one volume go on together or not at all
                self.at[b] = k
                log.warning("%s", self.describe(b))
        everyone = self.comm.draws.any(bool(self.at)) if self.sampler.couples else False
        if everyone or (self.comm.draws.size == 1 and len(self.at) == len(self.keyed)):
            self.fail([self.describe(b) for b in self.at] or ["draws of another rank are not finite"], None)

    def describe(self, b: int) -> str:
        """Which draws, where."""
        members, k = self.keyed[b].members, self.at[b]
        where = "at the start" if k < 0 else f"after step {k + 1} of {self.sampler.steps}"
        place = f" ({self.sampler.place(self.posterior, k)})" if k >= 0 else ""
        return f"{type(self.sampler).__name__}: draws {members[0]} to {members[-1]} are not finite {where}{place}"

    def fail(self, where: list[str], kept: Ensemble | None) -> None:
        """Raise Diverged."""
        count = f"; {len(kept)} draws are fine and come with this error" if kept is not None else ""
        raise Diverged(
            f"{'; '.join(where)}{count}. Likely cause: the pull of the data is too strong for explicit steps of this size (or "
            f"the prior gave values that are not finite). What may help: {self.sampler.advice}",
            kept,
        )


def _gather(
    posterior: Posterior, parts: dict[int, Ensemble], info: dict[str, Any], cost: dict[str, Any], lost: _Lost
) -> Ensemble:
    """All blocks of all ranks in draw order; costs summed over ranks (seconds: the slowest).  Raises Diverged."""
    comm = lost.comm
    mine: dict[int, tuple[Tensor, Tensor | None]] = {b: (part.x.cpu(), part.log_weights) for b, part in parts.items()}
    everyone: dict[int, tuple[Tensor, Tensor]] = {}
    costs: list[dict[str, Any]] = []
    failed: list[str] = []
    # What a method itself says of its draws is the same on every rank that has some.
    own = next((dict(part.info) for part in parts.values()), {})
    for theirs, spent, gone, said in comm.draws.allgather((mine, cost, [lost.describe(b) for b in lost.at], own)):
        own = own or said
        everyone.update(theirs)
        costs.append(spent)
        failed += gone
    if not everyone:
        lost.fail(failed, None)
    ordered = [everyone[b] for b in sorted(everyone)]
    counted = ("denoiser", "vjp", "forward", "adjoint", *(name for name in MOVED if any(name in c for c in costs)))
    total = {name: sum(c.get(name, 0) for c in costs) for name in counted}
    total |= {"seconds": max(c["seconds"] for c in costs), "steps": max(c["steps"] for c in costs)}
    total |= {"ranks": comm.draws.size, "workers": comm.workers}
    x, log_w = torch.cat([x for x, _ in ordered]), torch.cat([w for _, w in ordered])
    ensemble = Ensemble(x, posterior.space, log_w, {**own, **info, "cost": total})
    if failed:
        lost.fail(failed, ensemble)
    return ensemble
