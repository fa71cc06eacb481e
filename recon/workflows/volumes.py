"""A measured volume, slice by slice: whole in memory, cut over processes, or on disk with a few slices in memory at a time.

All three see the same truth, noise and operator at each slice, so what comes out is the same to the last bit.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recon.comm import Comm, serial
from recon.datasets.observation import Observation
from recon.draws import Draws
from recon.ensemble import Ensemble
from recon.errors import InputError
from recon.operators.base import LinearOperator
from recon.operators.planar import PlanarBeam
from recon.operators.slabs import Slab, portion
from recon.operators.slices import SliceStack
from recon.operators.streamed import Stream, Streamed
from recon.posterior import Posterior
from recon.priors import Prior, SlicesPrior
from recon.samplers.volumes.base import VolumeSampler
from recon.space import Space
from recon.workflows.memory import PeakMemory
from recon.workflows.operators import build
from recon.workflows.priors import without
from recon.workflows.problem import Job, likelihood_of, simulate
from recon.workflows.schema import Execution, Noise, Workflow
from recon.workflows.stacks import Stack

IN_MEMORY, PER_DRAW = 16, 5
"""The same of volumes in memory: parts of a volume's size that a step holds, and for each draw that is kept."""

SHOWN = "shown"
"""The folder within a run's that holds the evidence of the part that its report shows."""

FIELDS = 12
"""Parts of the volume's size that one process holds at most while it works on one part of a volume that stays on disk."""

BESIDE, SHOWN_DATA = 0.6e9, 131_072
"""Bytes kept free for the report, and the most data whose residuals it compares with simulated ones in that room."""


@dataclass(frozen=True)
class Layout:
    """How a run keeps its volume.

    comm: the processes.  run: of the workflow.  folder: for volumes that stay on disk; a temporary one where it is None.
    """

    comm: Comm
    run: Execution
    folder: Path | None = None

    @property
    def streams(self) -> bool:
        """Whether volumes stay on disk."""
        return self.run.memory_gb is not None

    @property
    def plain(self) -> bool:
        """Whether every process holds whole volumes."""
        return not self.streams and self.comm.slab.size == 1


def layout_of(workflow: Workflow, comm: Comm | None = None, folder: Path | None = None) -> Layout:
    """The layout that a workflow asks for.  Raises InputError where there is no volume, or none of these processes."""
    run, comm = workflow.run or Execution(), comm or serial()
    layout = Layout(comm, run, folder)
    if layout.plain:
        return layout
    asked, sampler = workflow.prior, workflow.sampler.build()
    what = "run.memory_gb" if layout.streams else "run.slabs"
    if isinstance(asked, str) or asked.slices is None or workflow.problem.dataset is None:
        raise InputError(f"{what} is for volumes of a data set's slices: say how many under prior.slices")
    if not isinstance(sampler, VolumeSampler):
        raise InputError(
            f"{what} needs a sampler that works by slices (dds, diffusionmbir); {type(sampler).__name__} wants whole volumes"
        )
    if workflow.likelihood != "gaussian" or workflow.start is not None:
        raise InputError(f"{what} takes the gaussian likelihood, and draws that start in pure noise")
    if layout.streams and comm.draws.size * comm.slab.size > 1:
        raise InputError("run.memory_gb is for one process; over several, run.slabs cuts the volume between them")
    return layout


def cut(comm: Comm, workflow: Workflow) -> Comm:
    """The processes as the workflow shares its volumes among them.  Raises InputError when they cannot be."""
    slabs = workflow.run.slabs if workflow.run else 1
    if slabs == 1:
        return replace(comm, workers=1) if workflow.run and workflow.run.memory_gb else comm
    if comm.draws.size % slabs:
        raise InputError(
            f"run.slabs is {slabs}, and there {'is' if comm.draws.size == 1 else 'are'} {comm.draws.size} process(es): start "
            f"recon with mpiexec -n {slabs} (or a multiple of it), or leave run.slabs out"
        )
    return comm.cut(slabs)


def by_slices(definition: Any) -> bool:  # noqa: ANN401  (a model of the group)
    """Whether an operator sees every slice of a volume by itself, and all of them alike."""
    return getattr(definition, "type", "") in ("parallel_beam", "fan_beam")


def measured(workflow: Workflow, stack: Stack, prior: Prior, layout: Layout) -> tuple[LinearOperator, Observation]:
    """The operator of this process's part of the volume, and its simulated measurement.

    Raises InputError where the slices have no distance that a coupling needs, or there are fewer than ranks, or the memory
    holds not a single one.
    """
    problem, asked = workflow.problem, workflow.prior
    assert not isinstance(asked, str)  # both seen to by the caller
    assert asked.slices is not None
    assert problem.noise is not None
    axis, space = asked.slices.axis, stack.space
    _require_distance(workflow, space, axis)
    one = build(problem.operator, without(space, axis))
    full = SliceStack(one, space, axis)
    noise = _absolute(problem.noise, stack, one)
    keyed = Stream(full.range, axis, 1, Path()).draws(Draws(workflow.seed, [0])).normal(0, full.range.shape, "data")
    assert isinstance(keyed, Streamed)

    def part(first: int, last: int) -> Observation:
        operator = SliceStack(one, portion(space, full.at, slice(first, last)), axis)
        truth = stack.read(first, last).movedim(0, full.at)
        found = simulate(operator, truth, noise, workflow.seed, prior, keyed.read(first, last)[0])
        assert isinstance(found, Observation)
        return found

    if layout.streams:
        stream = _stream(workflow, full, prior, layout)
        operator = SliceStack(one, space, axis, stream)
        values = stream.kept(lambda a, b: part(a, b).values, -len(full.range.shape))
        truth = stream.kept(lambda a, b: stack.read(a, b).movedim(0, full.at))
        return operator, replace(part(0, 1), data=full.range, image=space, values=values, truth=truth)
    slab = Slab(space, axis, layout.comm.slab)
    return SliceStack(one, slab.space, axis, None if slab.alone else slab), part(slab.first, slab.last)


def _require_distance(workflow: Workflow, space: Space, axis: str) -> None:
    coupling = getattr(workflow.sampler.build(), "coupling", None)
    if coupling is None or axis in space.coords or (coupling.weight == 0 and coupling.slope_per_mm is None):
        return
    name = getattr(workflow.problem.dataset, "name", "")
    raise InputError(
        f"the card of the data set {name} does not say how far apart its slices are (slice_mm), and the coupling of slices is "
        "per mm: state it there if they are one volume, or set sampler.coupling.weight: 0"
    )


def _absolute(noise: Noise, stack: Stack, one: LinearOperator) -> Noise:
    """A share of the mean of ``|A x|`` as a number: the mean over slices of each slice's, however the volume is cut."""
    if noise.relative is None:
        return noise
    count = stack.space.size // one.domain.size
    means = [float(one.A(stack.read(k, k + 1)).abs().double().mean()) for k in range(count)]
    level = noise.relative * sum(means) / count
    if not level > 0:
        raise InputError("the noise level is zero because the object projects to nothing; give noise as {sigma: ...}")
    return Noise(sigma=level)


def _stream(workflow: Workflow, full: SliceStack, prior: Prior, layout: Layout) -> Stream:
    """The volume on disk, visited as many slices at a time as the memory allows."""
    assert isinstance(prior, SlicesPrior)
    assert layout.run.memory_gb is not None
    need = Need.of(workflow, full, prior)
    depth = need.depth(layout.run.memory_gb * 1e9)
    if depth < need.chunk:
        raise InputError(
            f"run.memory_gb is {layout.run.memory_gb:g}, and {need.chunk} slice(s) of {full.domain.describe()} at a time take "
            f"about {need.streamed(need.chunk) / 1e9:.2f} (of which the program and the network are {need.least / 1e9:.2f}); "
            "give at least that, or a smaller prior.compute.chunk"
        )
    stream = Stream(full.domain, full.axis, depth, layout.folder or Path(tempfile.mkdtemp(prefix="recon-")))
    weakref.finalize(stream, shutil.rmtree, stream.folder, ignore_errors=True)
    return stream


@dataclass(frozen=True)
class Need:
    """What a run on a volume takes, in bytes.

    least: what the program holds, and the network takes at its peak.  one: a slice of all draws of a block, of the volume or
    of its data.  chunk: slices that are denoised at a time.  draws: of the ensemble, over those of a block.
    """

    least: float
    one: float
    chunk: int
    draws: float

    @classmethod
    def of(cls, workflow: Workflow, operator: SliceStack, prior: SlicesPrior) -> Need:
        """Measured: the network is evaluated once."""
        chunk, block = prior.chunk or 1, workflow.block or 1
        one = 4 * block * max(operator.domain.size, operator.range.size) / operator.count
        return cls(held_now() + _evaluation(prior, chunk), one, chunk, workflow.draws / block)

    def streamed(self, depth: int) -> float:
        """Of a volume that stays on disk, ``depth`` slices at a time."""
        return self.least + BESIDE + FIELDS * self.one * depth

    def depth(self, memory: float) -> int:
        """How many slices at a time ``memory`` has room for; whole chunks."""
        return int((memory - self.least - BESIDE) // (FIELDS * self.one)) // self.chunk * self.chunk

    def whole(self, slices: int) -> float:
        """Of a volume in memory: what a step holds, then the draws and what is written of them."""
        return self.least + BESIDE + (IN_MEMORY + PER_DRAW * self.draws) * self.one * slices


def held_now() -> float:
    """Bytes that this process holds."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return float(pages * os.sysconf("SC_PAGE_SIZE"))
    except OSError:  # no such file elsewhere: the peak so far
        return PeakMemory(torch.device("cpu")).gib() * 2**30


def _evaluation(prior: SlicesPrior, chunk: int) -> float:
    """Bytes that one evaluation of ``chunk`` slices takes at its peak, measured."""
    z = torch.zeros(chunk, *prior.prior.latent.shape, dtype=prior.dtype)
    before, watch = held_now(), PeakMemory(torch.device("cpu"))
    with torch.no_grad():
        prior.prior.denoise(z, prior.schedule.sigma_max)
    return max(0.0, watch.gib() * 2**30 - before)


def part_of(job: Job, first: int, last: int) -> Job:
    """The job of slices ``first .. last - 1`` alone, in memory.

    What neighbours say to them is left out, so it is for looking at draws and for timing, not for drawing.
    """
    whole, prior, m = job.operator, job.prior, job.measurement
    assert isinstance(whole, SliceStack)
    assert isinstance(prior, SlicesPrior)
    assert isinstance(m, Observation)
    assert whole.one is not None
    space = portion(whole.domain, whole.at, slice(first, last))
    operator = SliceStack(whole.one, space, whole.axis)

    def here(values: Tensor | None) -> Tensor | None:
        if values is None or not values.ndim:
            return values
        return values.read(first, last) if isinstance(values, Streamed) else values.narrow(0, first, last - first)

    values, truth = here(m.values), None if m.truth is None else taken(m.truth, whole.at, first, last)
    assert values is not None
    sigma, blank, background = here(m.sigma), here(m.blank), here(m.background)
    scan = Observation(operator.range, space, values, sigma, blank, background, truth)
    own = SlicesPrior(prior.prior, space, whole.axis, chunk=prior.chunk, any_plane=True)
    posterior = Posterior(own, likelihood_of(scan, operator, "gaussian"))
    return replace(job, posterior=posterior, measurement=scan, operator=operator)


def taken(x: Tensor, at: int, first: int, last: int) -> Tensor:
    """Some slices of a volume, or of draws of it, in memory; ``at``: number of their axis in a volume."""
    if isinstance(x, Streamed):
        return x.read(first, last)
    return x.narrow(at - 3, first, last - first)


def shown(job: Job, ensemble: Ensemble) -> tuple[Job, Ensemble, str]:
    """The slices in the middle of a volume on disk that a report shows, its evidence and figures being several times as large.

    The third of what is answered says in words which slices they are.
    """
    stream = stream_of(job)
    assert stream is not None
    data = SHOWN_DATA * stream.slices // job.operator.range.size
    many = min(stream.slices, max(2, min(data, stream.depth // (4 + 2 * len(ensemble)))))
    first = (stream.slices - many) // 2
    last = first + many
    job = part_of(job, first, last)
    x = taken(ensemble.x, stream.at, first, last)
    text = (
        f"the pages show slices {first} to {last - 1} of {stream.slices}, as many as memory holds; ensemble.nc has all"
    )
    return job, Ensemble(x, job.posterior.space, ensemble.log_weights, ensemble.info), text


def stream_of(job: Job) -> Stream | None:
    """The stream of a job whose volume stays on disk."""
    slab = getattr(job.operator, "slab", None)
    return slab if isinstance(slab, Stream) else None


def beam(operator: LinearOperator) -> LinearOperator:
    """What sees one slice of a volume, where all are seen alike; any other operator itself."""
    if isinstance(operator, SliceStack) and isinstance(operator.one, PlanarBeam):
        return operator.one
    return operator


def gathered(ensemble: Ensemble, job: Job) -> Ensemble:
    """The whole volumes of an ensemble of which every process has its slices; collective."""
    slab = getattr(job.operator, "slab", None)
    if not isinstance(slab, Slab) or slab.alone:
        return ensemble
    space = Space(
        slab.whole.dims, slab.whole.shape, {**job.posterior.space.coords, **slab.whole.coords}, slab.whole.unit
    )
    return Ensemble(slab.gather(ensemble.x), space, ensemble.log_weights, ensemble.info)


def is_volume(workflow: Workflow) -> bool:
    """Whether a workflow simulates a volume that its operator sees slice by slice."""
    asked, problem = workflow.prior, workflow.problem
    stacked = not isinstance(asked, str) and asked.slices is not None
    return stacked and problem.dataset is not None and by_slices(problem.operator)


def scratch_of(folder: Path) -> Path:
    """Where the volumes of the run in ``folder`` stay while it goes on: beside it, as the folder itself may be replaced."""
    return folder.with_name(f".{folder.name}.volumes")
