"""Conventional reconstructions of the same data, each at its best setting that the data (or a known truth) can choose."""

from __future__ import annotations

import torch
from torch import Tensor

from recon.baselines import TVSolver, fbp, tv
from recon.likelihoods import GaussianLikelihood
from recon.workflows.problem import Job
from recon.workflows.schema import Workflow

_WEIGHTS = (0.1, 0.3, 1.0, 3.0, 10.0)  # of the TV term, m (per unit of attenuation)
_SOLVER = TVSolver(iterations=600, tolerance=3e-2)


def baselines(workflow: Workflow, job: Job) -> dict[str, Tensor]:
    """Name -> image (y, x), 1/m, for the baselines a workflow asks for."""
    gaussian = job.posterior.likelihood.gaussian()
    made: dict[str, Tensor] = {}
    if "fbp" in workflow.baselines:
        made["FBP"] = fbp(job.operator, gaussian.y)
    if "tv" in workflow.baselines:
        made["TV"] = matched_tv(job, gaussian)
    return made


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
