"""What a run on a volume would take, from a few of its slices: time and memory grow with their number."""

from __future__ import annotations

from dataclasses import replace

from recon.comm import Comm
from recon.errors import InputError
from recon.operators.slices import SliceStack
from recon.priors import SlicesPrior
from recon.workflows.forecast import forecast
from recon.workflows.problem import prepare
from recon.workflows.schema import Workflow
from recon.workflows.volumes import Need, cut, layout_of

FEW = 4  # slices that are worked on, and at least two chunks


def forecast_volume(workflow: Workflow, comm: Comm) -> str:
    """The text of ``recon check`` for a volume: one step on some slices from its middle.

    Raises InputError where the volume does not fit the processes or the memory, as the run would.
    """
    comm = cut(comm, workflow)
    layout = layout_of(workflow, comm)
    asked = workflow.prior
    assert not isinstance(asked, str)  # it is a volume
    assert asked.slices is not None
    count = asked.slices.count
    if count is None:
        raise InputError(
            "prior.slices.count: how many slices the volume has must be said when a truth is simulated from"
        )
    if count < comm.slab.size:
        raise InputError(f"the volume has {count} slices, fewer than run.slabs {comm.slab.size}; use at most {count}")
    few = min(count, max(FEW, 2 * (asked.compute.chunk or 1) if asked.compute else 1))
    small = asked.model_copy(update={"slices": asked.slices.model_copy(update={"count": few})})
    index = workflow.problem.index + (count - few) // 2
    problem = workflow.problem.model_copy(update={"index": index})
    job = prepare(workflow.model_copy(update={"prior": small, "problem": problem, "run": None}), warm=True)
    assert isinstance(job.operator, SliceStack)
    assert isinstance(job.prior, SlicesPrior)
    need, own = Need.of(workflow, job.operator, job.prior), -(-count // comm.slab.size)
    if layout.run.memory_gb is None:
        taken = need.whole(own)
        text = f"about {taken / 1e9:.2f} GB a process, {own} slices of the volume in each"
    else:
        depth = min(count, need.depth(layout.run.memory_gb * 1e9))
        if depth < need.chunk:
            least = need.streamed(need.chunk) / 1e9
            raise InputError(
                f"run.memory_gb is {layout.run.memory_gb:g}; {need.chunk} slice(s) at a time take {least:.2f}"
            )
        disk = 20 * need.one * count + 4 * need.one * count * need.draws
        text = (
            f"about {need.streamed(depth) / 1e9:.2f} GB of {layout.run.memory_gb:g}, {depth} of {count} slices at a time; "
            f"about {disk / 1e9:.1f} GB on disk"
        )
    return forecast(workflow, job, replace(comm, workers=1), own / few, text)
