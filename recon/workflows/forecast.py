"""What a run would take: shapes, operator figures, layout over ranks, memory, time and size, from one timed step."""

from __future__ import annotations

import math
import resource
import time

from recon.checks import check_adjoint
from recon.comm import Comm
from recon.draws import Draws, blocks
from recon.samplers.loop import block_threads, default_block
from recon.workflows.problem import Job
from recon.workflows.schema import Workflow


def forecast(workflow: Workflow, job: Job, comm: Comm, growth: float = 1.0, memory: str | None = None) -> str:
    """The text of ``recon check``; computes one sampler step of one block.  Raises CheckFailed for a wrong transpose.

    growth: how many times the work of ``job`` the run is.  memory: what it takes, where that is not seen from ``job``.
    """
    operator, sampler = job.operator, job.sampler
    block = workflow.block or default_block(job.posterior, workflow.antithetic)
    pieces = blocks(workflow.draws, block)
    per_worker = math.ceil(math.ceil(len(pieces) / comm.draws.size) / comm.workers)
    seconds = _step_seconds(job, Draws(workflow.seed, pieces[0]))
    total = growth * seconds * sampler.steps * per_worker
    values = growth * workflow.draws * job.posterior.space.size
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    held = 0.2 * comm.workers
    rows = [
        ("data", job.notes.get("data", "")),
        ("operator", operator.describe()),
        ("operator norm", f"{operator.norm():.4g} {operator.range.unit} per {operator.domain.unit}"),
        ("adjoint test", f"{check_adjoint(operator):.1e}, below 1e-5"),
        ("likelihood", type(job.posterior.likelihood).__name__),
        ("prior", f"{job.prior.card.name}: {job.prior.card.summary}"),
        ("sampler", f"{sampler!r}"),
        ("claim", sampler.claim + (f", {sampler.exact_for}" if sampler.exact_for else "")),
        ("draws", f"{workflow.draws} in {len(pieces)} blocks of {block}, seed {workflow.seed}"),
        (
            "layout",
            f"{comm.draws.size} ranks x {comm.workers} threads, at most {per_worker} blocks one after the other",
        ),
        ("memory", memory or f"about {peak + held:.1f} GiB a rank ({peak:.1f} GiB now, with one block worked on)"),
        ("time", f"about {_clock(total)} ({growth * seconds:.2f} s a step and block), and the baselines"),
        ("ensemble.nc", f"about {max(0.1, values * 4 / 2**20):.1f} MiB"),
        *[("warning", text) for text in job.warnings],
    ]
    return "\n".join(f"{name:<14} {text}" for name, text in rows)


def _step_seconds(job: Job, draws: Draws) -> float:
    """Wall time of one step of one block on one thread, the second of two (the first warms up)."""
    with block_threads(1) as each:

        def two(_: int, __: object) -> float:
            state = job.sampler.init(job.posterior, draws)
            job.sampler.step(job.posterior, state, 0, draws)
            start = time.perf_counter()
            job.sampler.step(job.posterior, state, 0, draws)
            return time.perf_counter() - start

        return float(each(two, {0: None})[0])


def _clock(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )
