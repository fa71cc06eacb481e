"""The ``start:`` of a workflow: draws that begin at a reconstruction, a file or another run instead of in pure noise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from recon.ensemble import Ensemble
from recon.errors import InputError
from recon.runs import RunFolder
from recon.samplers.base import LevelSampler
from recon.samplers.loop import block_threads
from recon.samplers.warm import WarmStart
from recon.workflows.comparison import untold
from recon.workflows.problem import Job
from recon.workflows.schema import Workflow

_EQUAL = 0.999  # effective over actual draws from which on weights are all but equal


def started(workflow: Workflow, job: Job) -> Job:
    """``job`` with its sampler started as the workflow says; a reconstruction is made here, with one thread.

    Raises InputError when level, array or run do not fit, before anything is reconstructed where that can be known.
    """
    start, sampler = workflow.start, job.sampler
    if start is None:
        return job
    assert isinstance(sampler, LevelSampler)  # the schema sees to it
    space, frame = job.posterior.space, 0
    # Level and sampler first: a reconstruction may take minutes.
    WarmStart(of=sampler, sigma=start.sigma, x=torch.zeros(space.shape)).check(job.posterior)
    if start.baseline is not None:
        with block_threads(1):  # so that every rank and any number of threads start from the same bits
            name, x = untold(start.baseline, job)
        said = f"the {name} image"
    elif start.file is not None:
        x, said = _array(Path(start.file)), f"the image in {Path(start.file).name}"
        if tuple(x.shape) != space.shape:
            raise InputError(f"start.file: {start.file} holds {tuple(x.shape)}; expected {space.describe()}")
    else:
        assert start.run is not None  # exactly one of the three is given
        x, frame = _run(Path(start.run), workflow, job)
        said = f"{'the draws' if start.draws else 'the mean'} of {Path(start.run).name}"
    warm = WarmStart(of=sampler, sigma=start.sigma, x=x, frame=frame)
    warm.check(job.posterior)
    told = (
        f"the draws start from {said}, with noise of {start.sigma:g} (latent units), and remember it: along a direction of "
        f"posterior variance v their mean is drawn towards it by v / (v + {start.sigma:g}^2), or the root of that"
    )
    return replace(job, sampler=warm, warnings=[*job.warnings, told])


def _run(folder: Path, workflow: Workflow, job: Job) -> tuple[Tensor, int]:
    """Mean or draws of a finished run, and the number of a frame whose noise the run did not use."""
    assert workflow.start is not None
    found = Ensemble.load(RunFolder(folder).ensemble)
    difference = job.posterior.space.mismatch(found.space)
    if difference:
        raise InputError(f"start.run: {folder} is of other arrays: {difference}")
    frame = int(found.info.get("sampler", {}).get("fields", {}).get("frame", 0)) + 1
    if not workflow.start.draws:
        return found.mean(), frame
    if len(found) < workflow.draws:
        raise InputError(f"start.draws: {folder} holds {len(found)} draws; this workflow asks for {workflow.draws}")
    equal = found if found.ess > _EQUAL * len(found) else found.resample(len(found), workflow.seed)
    return equal.x, frame


def _array(path: Path) -> Tensor:
    """The array in a .npy file.  Raises InputError for anything that is not one of real numbers."""
    try:
        values = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"start.file: {path} is no readable .npy file: {error}") from error
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "fiu":
        raise InputError(f"start.file: {path} must hold one array of real numbers, in the prior's physical unit")
    return torch.from_numpy(values.astype(np.float64))
