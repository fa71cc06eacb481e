"""Truths for a calibration, and the problems they are seen through: the workflow's own operator, noise and likelihood.

Two populations, which answer different questions:

* ``prior``: draws of the prior itself, exact ones where it is a closed form.  Draws of an exact sampler are then exchangeable
  with the truth, so what is found wrong is the sampler's.
* ``data``: held-out members of the workflow's data set other than its own.  What is found wrong is the sampler's or the
  prior's.
"""

from __future__ import annotations

import dataclasses
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor

from recon.datasets.fields import FieldCard, load_fields
from recon.datasets.slices import SliceCard, load_slices
from recon.draws import Draws
from recon.errors import InputError
from recon.likelihoods import TransmissionLikelihood
from recon.operators.planar import PlanarBeam
from recon.posterior import Posterior
from recon.priors import GaussianMixturePrior, GaussianPrior, Prior
from recon.priors.stationary import InLatentOf, StationaryPrior
from recon.samplers import unconditional
from recon.workflows.cases import Population, Posed
from recon.workflows.problem import Job, likelihood_of, prepare, simulate
from recon.workflows.schema import Workflow

STEPS = 64
"""Heun steps of a draw from a prior without a closed form: 127 evaluations, and an error far below what cases can show."""

PRIOR, DATA = "prior", "data"


@singledispatch
def prior_truth(prior: Prior, seed: int) -> Tensor:
    """One draw of ``prior``, *space.shape, physical units; by its probability flow where no closed form is registered."""
    return unconditional(prior, 1, STEPS, seed).x[0]


@prior_truth.register
def _(prior: GaussianPrior, seed: int) -> Tensor:
    white = prior.variances.sqrt() * _white(prior, seed)
    return (prior.mean + (white if prior.vectors is None else prior.vectors @ white)).reshape(prior.space.shape)


@prior_truth.register
def _(prior: GaussianMixturePrior, seed: int) -> Tensor:
    u = float(Draws(seed, [0]).uniform(0, (1,), "probe"))
    k = int(torch.searchsorted(prior.log_weights.double().exp().cumsum(0), u).clamp(max=len(prior.means) - 1))
    white = prior.variances[k].sqrt() * _white(prior, seed)
    turned = white if prior.vectors is None else prior.vectors[k] @ white
    return (prior.means[k] + turned).reshape(prior.space.shape)


@prior_truth.register
def _(prior: StationaryPrior, seed: int) -> Tensor:
    return prior.exact(Draws(seed, [0]))[0]


@prior_truth.register
def _(prior: InLatentOf, seed: int) -> Tensor:
    return prior.decode(prior_truth(prior.inner, seed)[None])[0]


def _white(prior: Prior, seed: int) -> Tensor:
    return Draws(seed, [0]).normal(0, (prior.space.size,), "user", dtype=prior.dtype)[0].to(prior.device)


def from_prior(workflow: Workflow, job: Job, cases: int, fresh: int = 0) -> Population:
    """The population ``prior``: truths on the workflow's own grid."""

    def pose(case: int, seed_truth: int, seed_noise: int) -> Posed:
        truth = prior_truth(job.prior, seed_truth).cpu()
        return Posed(truth, posterior_of(workflow, job, truth, seed_noise), f"draw {case} of the prior")

    about = f"draws of the prior {job.prior.card.name} itself: they test the sampler"
    return Population(PRIOR, about, cases, pose, fresh)


def from_data(workflow: Workflow, job: Job, cases: int, fresh: int = 0) -> Population:
    """The population ``data``: at most ``cases`` held-out members other than the workflow's own, in a keyed random order.

    More cases later keep the ones there are.  Where there are fewer members than cases and fresh ones, both get their share.
    Raises InputError when there is no such member.
    """
    problem = workflow.problem
    order = [i for i in _shuffled(held_out(problem.dataset), workflow.seed) if i != problem.index]
    if not order:
        raise InputError(
            "there are no held-out truths beside the workflow's own: calibrate with truths from the prior (--truths prior)"
        )

    def pose(case: int, seed_truth: int, seed_noise: int) -> Posed:
        another = problem.model_copy(update={"index": order[case]})
        made = prepare(workflow.model_copy(update={"problem": another, "seed": seed_noise}))
        assert made.measurement.truth is not None  # it was simulated from
        return Posed(made.measurement.truth, made.posterior, made.notes["data"].split(";")[0])

    about = f"held-out members of {problem.dataset.name}: they test the sampler and the prior"  # type: ignore[union-attr]
    total = min(cases + fresh, len(order))
    fresh = total * fresh // (cases + fresh)
    return Population(DATA, about, total - fresh, pose, fresh)


def held_out(definition: Any) -> int:  # noqa: ANN401  (a model of the group datasets)
    """How many truths a data set offers to a workflow; 0 without a data set."""
    if isinstance(definition, FieldCard):
        return len(load_fields(definition, "test"))
    if isinstance(definition, SliceCard):
        return len(load_slices(definition, "test" if definition.use == "test" else "validation"))
    return 0 if definition is None else 1


def _shuffled(n: int, seed: int) -> list[int]:
    """0 to n - 1 in an order that ``seed`` decides; neighbours of a file are alike, so the first few must not be neighbours."""
    return Draws(seed, [0]).uniform(0, (max(1, n),), "probe")[0][:n].argsort(stable=True).tolist()


def posterior_of(workflow: Workflow, job: Job, truth: Tensor, seed: int) -> Posterior:
    """The workflow's problem with another truth: *space.shape, physical units; noise keyed by ``seed``.

    A measurement file keeps its noise: its sigma, or its blank and background counts.
    """
    noise, operator = workflow.problem.noise, job.operator
    if noise is not None:
        made = simulate(operator, truth, noise, seed, job.prior)
    else:
        made = dataclasses.replace(job.measurement, values=_measured_again(job, truth, seed), truth=truth)
    return Posterior(job.prior, likelihood_of(made, operator, workflow.likelihood))


def _measured_again(job: Job, truth: Tensor, seed: int) -> Tensor:
    m, operator = job.measurement, job.operator
    kind = torch.complex64 if operator.range.complex else torch.float32
    normal = Draws(seed, [0]).normal(0, operator.range.shape, "data", dtype=kind)
    if m.blank is not None and m.background is not None and isinstance(operator, PlanarBeam):
        return TransmissionLikelihood(operator, m.values, m.blank, m.background).simulate(truth[None], normal)[0]
    assert m.sigma is not None  # a measurement has counts or sigma
    return operator.A(truth[None])[0] + m.sigma * normal[0]
