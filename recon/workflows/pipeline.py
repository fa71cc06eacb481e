"""The path from a workflow file to a report, read top to bottom; the same on one process and on many."""

from __future__ import annotations

import dataclasses
import logging
import math
import shutil
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import Tensor

from recon import comm as ranks
from recon.comm import Comm
from recon.datasets.fields import FieldCard
from recon.datasets.observation import Observation
from recon.diagnostics.fit import data_fit
from recon.ensemble import Ensemble
from recon.errors import Diverged, InputError
from recon.files import room
from recon.operators.base import LinearOperator
from recon.operators.fan_beam import FanGeometry
from recon.operators.parallel_beam import ParallelGeometry
from recon.operators.planar import PlanarBeam
from recon.report import Evidence, affordable_bands, affordable_split, examined, write_report
from recon.runs import Checkpoints, RunFolder
from recon.samplers import sample
from recon.samplers.loop import describe
from recon.workflows import chunked
from recon.workflows.citation import calibration_for, places
from recon.workflows.comparison import baselines, chosen
from recon.workflows.problem import Job, prepare
from recon.workflows.provenance import environment, identity, weights_sha256
from recon.workflows.schema import Workflow, load_workflow, resolved
from recon.workflows.start import started
from recon.workflows.volumes import SHOWN, beam, cut, gathered, is_volume, scratch_of, shown, stream_of

log = logging.getLogger(__name__)


def run(
    path: str | Path,
    out: str | Path | None = None,
    overrides: Iterable[str] = (),
    overwrite: bool = False,
    workspace: str | Path | None = None,
) -> Path:
    """Carry out a workflow file; returns the run's folder.

    Everything is read and checked before the folder is made.  Raises InputError for what does not fit, Stopped at a checkpoint.
    """
    workflow = load_workflow(path, overrides, workspace)
    comm = cut(ranks.from_environment(), workflow)
    folder = RunFolder(Path(out) if out is not None else Path("runs") / Path(path).stem)
    folder.refuse_existing(overwrite)
    job = _prepared(workflow, comm, folder)
    chosen(workflow, job)  # refuses what the operator cannot have
    job = started(workflow, job)
    facts = environment(comm)
    comm.barrier()  # nobody looks at the folder any more
    if comm.root:
        asked = Path(path).read_text(encoding="utf-8") if Path(path).is_file() else resolved(workflow)
        folder.create(asked, resolved(workflow), facts, overwrite)
        with room(folder.path):
            _save_measurement(workflow, job, folder, comm)
    comm.barrier()
    return _carry_out(workflow, job, folder, comm, facts, workspace)


def resume(path: str | Path) -> Path:
    """Go on with the run in a folder from its last checkpoint; a finished one is left as it is.  Raises InputError."""
    folder = RunFolder(Path(path))
    folder.require_run()
    if folder.done.exists():
        return folder.path
    workflow = load_workflow(folder.config)
    comm = cut(ranks.from_environment(), workflow)
    job = started(workflow, _prepared(workflow, comm, folder))
    return _carry_out(workflow, job, folder, comm, environment(comm))


def check(path: str | Path, overrides: Iterable[str] = (), workspace: str | Path | None = None) -> str:
    """What a workflow would do, found out without doing it: shapes, norm, adjoint test, ranks, memory, size, time."""
    from recon.workflows.forecast import forecast
    from recon.workflows.forecast_volume import forecast_volume

    workflow = load_workflow(path, overrides, workspace)
    if is_volume(workflow):
        return forecast_volume(workflow, ranks.from_environment())
    return forecast(workflow, started(workflow, prepare(workflow, warm=True)), ranks.from_environment())


def report(path: str | Path) -> Path:
    """Write the report of a finished run again from its files; returns the page.  Raises InputError."""
    folder = RunFolder(Path(path))
    folder.require_run()
    if not folder.ensemble.exists():
        raise InputError(f"{folder.path} has no ensemble yet; go on with: recon resume {folder.path}")
    return write_report(Evidence.load(_shown_at(folder)), folder.path)


def _carry_out(
    workflow: Workflow,
    job: Job,
    folder: RunFolder,
    comm: Comm,
    facts: dict[str, Any],
    workspace: str | Path | None = None,
) -> Path:
    """Sample, compare, explain; only rank 0 writes what is not a checkpoint."""
    stream, every = stream_of(job), workflow.checkpoint_every
    checkpoints = Checkpoints(folder.checkpoints, comm, identity(workflow, job), every, stream)
    log.info("%s: %d draws with %s", folder.path, workflow.draws, type(job.sampler).__name__)
    failed: list[str] = []
    with checkpoints.stopping_on_signals(), room(folder.path):
        try:
            ensemble = sample(
                job.posterior, job.sampler, workflow.asked, workflow.seed, workflow.block, comm, checkpoints
            )
        except Diverged as error:  # what is finite is a result, and says what is missing
            if error.ensemble is None:
                raise
            ensemble, failed = error.ensemble, [str(error)]
            job.warnings.extend(failed)
    ensemble = gathered(ensemble, job)
    if comm.root:
        told = {**facts, "identity": checkpoints.identity}
        with room(folder.path):
            _write(workflow, job, ensemble, folder, comm, workspace, told)
        summary = {"finished": datetime.now(UTC).isoformat(timespec="seconds"), "draws": len(ensemble)}
        folder.finish({**summary, "failed": failed} if failed else summary)
        shutil.rmtree(scratch_of(folder.path), ignore_errors=True)
    comm.barrier()
    return folder.path


def _write(
    workflow: Workflow,
    job: Job,
    ensemble: Ensemble,
    folder: RunFolder,
    comm: Comm,
    workspace: str | Path | None,
    told: dict[str, Any],
) -> None:
    """Ensemble, evidence and report; of a volume that stays on disk, the evidence and report of a part."""
    stream, place = stream_of(job), folder.path
    if stream is not None:
        chunked.save_ensemble(ensemble, stream, folder.ensemble, told)
        job, ensemble, text = shown(job, ensemble)
        job.warnings.append(text)
        place = folder.path / SHOWN
    elif comm.slab.size > 1:
        job = prepare(workflow, warm=True)  # the whole of it, of which this rank had a part
    known = calibration_for(workflow, job, places(folder.path, workspace), len(ensemble))
    evidence = _evidence(workflow, job, ensemble, told, known)
    if stream is None:
        ensemble.save(folder.ensemble, evidence.facts["provenance"])
    evidence.save(place)
    write_report(evidence, folder.path)


def _prepared(workflow: Workflow, comm: Comm, folder: RunFolder) -> Job:
    """The job of this process; what a run that was killed left of its volumes on disk is removed."""
    scratch = scratch_of(folder.path)
    shutil.rmtree(scratch, ignore_errors=True)
    with room(scratch):
        return prepare(workflow, warm=True, comm=comm, folder=scratch)


def _save_measurement(workflow: Workflow, job: Job, folder: RunFolder, comm: Comm) -> None:
    stream, scan = stream_of(job), job.measurement
    if stream is not None:
        assert isinstance(scan, Observation)  # volumes have no other
        chunked.save_observation(scan, stream, folder.measurement)
        return
    whole = scan if comm.slab.size == 1 else prepare(workflow, warm=True).measurement
    whole.save(folder.measurement)


def _shown_at(folder: RunFolder) -> Path:
    """Where the evidence of a run is that its report shows."""
    return folder.path / SHOWN if (folder.path / SHOWN).is_dir() else folder.path


def _evidence(
    workflow: Workflow, job: Job, ensemble: Ensemble, facts: dict[str, Any], calibration: dict[str, Any]
) -> Evidence:
    log.info("comparing with the data and with %s", ", ".join(chosen(workflow, job)) or "nothing else")
    m, card = job.measurement, job.prior.card
    others, missing = baselines(workflow, job)
    sampler = describe(job.sampler)
    about: dict[str, Any] = {
        "title": card.summary if not workflow.summary else workflow.summary,
        "operator": _scan(job.operator),
        "noise": _noise(job),
        "data": job.notes.get("data", ""),
        "sampler": {"name": type(job.sampler).__name__, **sampler},
        "prior": {"name": card.name, "summary": card.summary, "sha256": weights_sha256(job), **dict(card.facts)},
        "calibration": calibration,
        "cost": dict(ensemble.info["cost"]),
        "provenance": {**facts, "seed": workflow.seed, "draws": workflow.draws, "block": ensemble.info["block"]},
        "warnings": [*job.warnings, *missing],
    }
    fit, measured, space = data_fit(job.posterior.likelihood, ensemble), _shown(job), job.operator.range
    about |= examined(job.posterior.likelihood, ensemble, fit, _units(workflow))
    split, about["split"] = affordable_split(job.posterior.likelihood, job.prior, ensemble)
    bands, why = affordable_bands(job.prior, ensemble)
    about["bands"] = bands or why
    if space.complex:  # the page shows magnitudes
        space = dataclasses.replace(space, complex=False)
        fit = dataclasses.replace(fit, residual=fit.residual.abs() / math.sqrt(2))
    return Evidence(
        ensemble=ensemble,
        measurement=measured,
        range=space,
        fit=fit,
        truth=m.truth,
        baselines=others,
        facts=about,
        prior_std=_prior_std(job),
        split=split,
    )


def _units(workflow: Workflow) -> dict[str, str]:
    """The unit of each variable, where the data set states them."""
    card = workflow.problem.dataset
    return dict(zip(card.variables, card.units, strict=True)) if isinstance(card, FieldCard) else {}


def _prior_std(job: Job) -> Tensor | None:
    """Of the prior's draws, in the unit of the data: one number, or one per value where fields have their own."""
    sigma = getattr(job.prior, "sigma_data", None)
    if sigma is None:
        return None
    std = (job.prior.scale * sigma).float()
    return std.expand(job.posterior.space.shape).contiguous() if std.ndim else std


def _shown(job: Job) -> Tensor:
    """The measurement as the page shows it: line integrals, values, or magnitudes."""
    values = job.posterior.likelihood.gaussian().y
    return values.abs() if values.is_complex() else values


def _scan(operator: LinearOperator) -> str:
    """The operator in a line."""
    one = beam(operator)
    scan, many = getattr(one, "geometry", None), "" if one is operator else f"; {operator.domain.shape[0]} slices"
    if isinstance(scan, ParallelGeometry | FanGeometry):
        return (
            f"{type(one).__name__}: {scan.views} views, {scan.detectors} detectors of {1e3 * scan.spacing:.3g} mm, "
            f"projector {scan.projector}{many}"
        )
    return operator.describe()


def _noise(job: Job) -> str:
    m = job.measurement
    if m.blank is not None:
        form = type(job.posterior.likelihood).__name__
        most, least = float(m.blank.mean()), float(m.values.min())
        return f"photon counts, {most:.4g} without the object, {least:.0f} at least behind it ({form})"
    assert m.sigma is not None
    low, high = float(m.sigma.min()), float(m.sigma.max())
    sigma = f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
    what = "line integrals" if isinstance(beam(job.operator), PlanarBeam) else "values"
    return f"Gaussian, standard deviation {sigma} of {what} up to {float(m.values.abs().max()):.3g}"
