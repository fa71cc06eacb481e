"""Conventional reconstructions of the same data, each at its best setting that the data (or a known truth) can choose."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from recon.baselines import TVSolver, adjoint_recon, cg_sense, fbp, tv
from recon.errors import InputError
from recon.likelihoods import GaussianLikelihood
from recon.operators.base import LinearOperator
from recon.operators.cartesian_mri import CartesianMRI
from recon.operators.cg import CG
from recon.operators.fan_beam import FanBeam
from recon.operators.non_cartesian_mri import NonCartesianMRI
from recon.operators.parallel_beam import ParallelBeam
from recon.operators.planar import PlanarBeam
from recon.workflows.problem import Job
from recon.workflows.schema import Baseline, Workflow
from recon.workflows.volumes import beam

_WEIGHTS = (0.1, 0.3, 1.0, 3.0, 10.0)  # of the TV term, m (per unit of attenuation)
_SOLVER = TVSolver(iterations=600, tolerance=3e-2)


def suited(operator: LinearOperator) -> tuple[Baseline, ...]:
    """The conventional reconstructions of an operator's field."""
    if isinstance(beam(operator), ParallelBeam | FanBeam):
        return ("fbp", "tv")
    if isinstance(operator, CartesianMRI | NonCartesianMRI):
        return ("zero_filled", "sense")
    return ("least_squares",)


def chosen(workflow: Workflow, job: Job) -> tuple[Baseline, ...]:
    """Those a workflow asks for, or else those that suit.  Raises InputError for one that the operator cannot have."""
    asked = suited(job.operator) if workflow.baselines is None else workflow.baselines
    _require(asked, job, "baselines")
    return asked


def _require(asked: tuple[Baseline, ...], job: Job, key: str) -> None:
    """InputError naming the workflow's ``key`` for baselines that cannot be made of the operator's data."""
    mri = isinstance(job.operator, CartesianMRI | NonCartesianMRI)
    fits = {
        "fbp": isinstance(beam(job.operator), ParallelBeam | FanBeam),
        "tv": isinstance(beam(job.operator), PlanarBeam),
        "zero_filled": mri,
        "sense": mri,
        "least_squares": True,
    }
    wrong = [name for name in asked if not fits[name]]
    if wrong:
        raise InputError(
            f"{key}: {', '.join(wrong)} cannot be made of the data of {type(job.operator).__name__}; choose of "
            f"{', '.join(name for name, fit in fits.items() if fit)}, or leave the key out"
        )


def baselines(workflow: Workflow, job: Job) -> tuple[dict[str, Tensor], list[str]]:
    """Name -> image on the prior's grid, physical units, for the baselines of a workflow; and why some could not be made.

    They come after the sampling, so a scan that one of them cannot take must not cost the run.
    """
    gaussian = job.posterior.likelihood.gaussian()
    made: dict[str, Tensor] = {}
    missing: list[str] = []
    for name in chosen(workflow, job):
        title, make = _MAKERS[name]
        try:
            made[title] = make(job, gaussian)
        except InputError as error:
            missing.append(f"the baseline {title} could not be made: {error}")
    return made, missing


def untold(name: Baseline, job: Job) -> tuple[str, Tensor]:
    """Title and image of one baseline made of the data alone: a truth that is known chooses nothing.

    Raises InputError when the operator cannot have it, or it cannot take the scan.
    """
    _require((name,), job, "start.baseline")
    title, make = _MAKERS[name]
    blindfolded = replace(job, measurement=replace(job.measurement, truth=None))
    return title, make(blindfolded, job.posterior.likelihood.gaussian())


def ridge(job: Job, likelihood: GaussianLikelihood) -> Tensor:
    """``argmin |(y - A x) / sigma|^2 + |(x - b) / s|^2``: the prior's shift and scale, without any structure between cells."""
    prior, operator = job.prior, likelihood.linear("least squares")
    shift, scale = (v.to(torch.float32).expand(operator.domain.shape) for v in (prior.shift, prior.scale))
    residual = (likelihood.y - operator.A(shift[None])[0]) / likelihood.sigma
    back = scale * operator.A_adjoint((residual / likelihood.sigma)[None])

    def normal(v: Tensor) -> Tensor:
        return v + scale * operator.A_adjoint(operator.A(scale * v) / likelihood.sigma**2)

    return shift + scale * CG(200, 1e-5).solve(normal, back)[0]


def matched_tv(job: Job, likelihood: GaussianLikelihood) -> Tensor:
    """The total-variation image with the weight that comes closest to a known truth, or else fits the data.

    Without a truth: Morozov's discrepancy principle, the weight whose residual is nearest to one standard deviation per datum.
    """
    truth, operator = job.measurement.truth, job.operator
    best, best_loss = None, float("inf")
    for weight in _WEIGHTS:
        image = tv(operator, likelihood.y[None], likelihood.sigma, weight, _SOLVER).x[0]
        if truth is not None:
            loss = float((image - truth).square().mean())
        else:
            loss = abs(float((likelihood.residual(image[None]) / likelihood.sigma).square().mean().log()))
        if loss < best_loss:
            best, best_loss = image, loss
    assert isinstance(best, torch.Tensor)  # there is at least one weight
    return best


_MAKERS: Mapping[str, tuple[str, Callable[[Job, GaussianLikelihood], Tensor]]] = {
    "fbp": ("FBP", lambda job, like: fbp(beam(job.operator), like.y)),  # type: ignore[arg-type]  # seen to by ``chosen``
    "tv": ("TV", matched_tv),
    "zero_filled": ("zero-filled", lambda job, like: adjoint_recon(job.operator, like.y)),  # type: ignore[arg-type]
    "sense": ("SENSE", lambda job, like: cg_sense(job.operator, like.y, 20)),  # type: ignore[arg-type]
    "least_squares": ("least squares", ridge),
}
