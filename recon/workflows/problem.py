"""From the definitions of a workflow to a posterior: the truth or the measured file, the operator, the noise, the prior."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from recon.comm import Comm
from recon.datasets.fields import FieldCard, load_fields
from recon.datasets.measurement import Measurement, read_measurement
from recon.datasets.observation import Observation
from recon.datasets.sampling import FieldSampler, FieldSampling, image_space
from recon.draws import Draws
from recon.errors import InputError
from recon.likelihoods import GaussianLikelihood, Likelihood, TransmissionLikelihood
from recon.operators.base import LinearOperator
from recon.operators.coarse_grain import CoarseGrain
from recon.operators.masked import Masked
from recon.operators.parallel_beam import ParallelBeam
from recon.operators.planar import PlanarBeam
from recon.operators.point_sensors import PointSensors
from recon.operators.slices import SliceStack
from recon.posterior import Posterior
from recon.priors import Prior
from recon.priors.conditional import ConditionalNetworkPrior, LowResolution, TimeOfYear
from recon.priors.wrapped import sigma_data_of
from recon.samplers import Sampler
from recon.space import Space
from recon.workflows.operators import build, parallel_geometry
from recon.workflows.prior_section import Asked
from recon.workflows.priors import Target, finished, opened, target
from recon.workflows.schema import Noise, Problem, Workflow
from recon.workflows.stacks import slice_stack

if TYPE_CHECKING:
    from recon.workflows.volumes import Layout

AVERAGING = (PointSensors, CoarseGrain, Masked)
"""Operators whose data are means of the field, in its own units."""

PHASE = 0.5  # radians: how much the made-up phase of a magnitude image varies


@dataclass(frozen=True)
class Job:
    """Everything a run needs, checked against each other.

    notes: what was done to the input on the way, for the report.  warnings: what a reader of the result must know.
    """

    posterior: Posterior
    sampler: Sampler
    measurement: Measurement | Observation
    operator: LinearOperator
    notes: dict[str, str]
    warnings: list[str]

    @property
    def prior(self) -> Prior:
        """The prior of the posterior."""
        return self.posterior.prior


def prepare(workflow: Workflow, warm: bool = False, comm: Comm | None = None, folder: Path | None = None) -> Job:
    """The job of a looked-up workflow.  Raises InputError when its parts do not fit each other.

    No network is evaluated, but where ``prior.compute`` asks for a precision or a compiler whose accuracy has to be measured.
    Its sampler begins in pure noise.  warm: whoever asks gives it the workflow's ``start`` afterwards (``start.started``);
    all others are refused a workflow that has one.  comm, folder: processes that share a volume, and of the run that keeps it
    on disk (``run`` of the workflow).
    """
    if workflow.start is not None and not warm:
        raise InputError(
            "this command samples from pure noise and would pass over start; leave it out with --set start=null"
        )
    from recon.workflows.volumes import layout_of  # stands on this module

    layout = layout_of(workflow, comm, folder)
    bare, problem = opened(workflow.prior), workflow.problem
    notes: dict[str, str] = {}
    if problem.measurement is not None:
        scan = read_measurement(Path(problem.measurement))
        _require_same_scan(problem.operator, scan, problem.measurement)
        operator: LinearOperator = scan.operator()
        measurement: Measurement | Observation = scan
        notes["data"] = f"measured: {Path(problem.measurement).name}"
        prior = finished(workflow.prior, bare, scan.image, lambda name: _condition(name, bare, None, None))
    else:
        prior, operator, measurement, notes["data"] = _simulated(workflow, bare, layout)
        notes["data"] += "; simulated with the operator that reconstructs (same grid), so model error is absent"
    likelihood = likelihood_of(measurement, operator, workflow.likelihood)
    sampler = workflow.sampler.build()
    posterior = Posterior(prior, likelihood)
    sampler.check(posterior)
    warnings = [*_scope(prior, image=measurement.image), *_doubts(workflow.prior)]
    return Job(posterior, sampler, measurement, operator, notes, warnings)


def _simulated(
    workflow: Workflow, bare: Prior, layout: Layout
) -> tuple[Prior, LinearOperator, Measurement | Observation, str]:
    """Prior, operator, data and where they come from, of a truth seen through the operator."""
    from recon.workflows.volumes import is_volume, measured

    problem, aim, asked = workflow.problem, target(workflow.prior, bare), workflow.prior
    assert problem.noise is not None  # the schema asks for it beside a dataset
    if is_volume(workflow) and not isinstance(problem.dataset, FieldCard):
        stack = slice_stack(problem.dataset, problem.index, aim, problem.fit)

        def over(space: Space) -> Prior:
            return finished(asked, bare, space, lambda name: _condition(name, bare, None, None))

        whole = over(stack.space)
        operator, scan = measured(workflow, stack, whole, layout)
        return over(operator.domain) if layout.comm.slab.size > 1 else whole, operator, scan, stack.where
    if not layout.plain:
        raise InputError("run: volumes that are cut or stay on disk are seen slice by slice (parallel_beam, fan_beam)")
    truth, image, where = _truth(problem, aim)
    made = build(problem.operator, image, ~truth.isnan())
    prior = finished(asked, bare, image, lambda name: _condition(name, bare, truth, problem))
    return prior, made, simulate(made, truth, problem.noise, workflow.seed, prior), where


def _doubts(asked: Asked) -> list[str]:
    """What a reader must know of a prior that is no longer the one that was trained."""
    if isinstance(asked, str):
        return []
    said = []
    if asked.sum is not None:
        said.append("the prior is a sum of scores, the score of no distribution: the draws' spread is not a posterior's")
    if asked.tile is not None:
        said.append("the prior sees the field in windows: structures longer than one come out as far as neighbours agree")
    if asked.slices is not None:
        said.append("the prior takes slices to be independent: only data and the sampler's coupling hold neighbours together")
    return said


def _require_same_scan(definition: Any, measurement: Measurement, file: str) -> None:  # noqa: ANN401
    """Refuse an operator that is not the scan a measurement file states."""
    if definition is None:
        return
    same = definition.type == "parallel_beam"
    if not same or parallel_geometry(definition, measurement.image) != measurement.geometry:
        raise InputError(
            f"{file} states another geometry than problem.operator; leave the operator out to use the file's"
        )


def simulate(
    operator: LinearOperator,
    truth: Tensor,
    noise: Noise,
    seed: int,
    prior: Prior | None,
    normal: Tensor | None = None,
) -> Measurement | Observation:
    """A measurement of ``truth`` with keyed noise: counts, or Gaussian of a given or relative standard deviation.

    truth: NaN where it is unknown (land), which no datum may depend on.  prior: noise as a spread is a share of its own.
    normal: the random numbers, (*range.shape), where they are not those of ``seed`` from the first on.
    Raises InputError for noise that the operator's data cannot have, and data that would depend on unknown values.
    """
    kind = torch.complex64 if operator.range.complex else torch.float32
    normal = Draws(seed, [0]).normal(0, operator.range.shape, "data", dtype=kind) if normal is None else normal
    known, full = ~truth.isnan(), truth
    if not bool(known.all()):
        if bool((operator.A((~known).to(truth.dtype)[None]) != 0).any()):
            raise InputError(f"{type(operator).__name__} would observe values of the truth that are unknown (land, gaps)")
        full = torch.where(known, truth, truth[known].mean())  # which value is all the same
    if noise.counts is not None:
        if not isinstance(operator.one if isinstance(operator, SliceStack) else operator, PlanarBeam):
            raise InputError(
                f"counts are photons; data of {type(operator).__name__} have noise of sigma, relative or spread"
            )
        model = TransmissionLikelihood(operator, torch.zeros(operator.range.shape), noise.counts)
        counts = model.simulate(full[None], normal)[0]
        return _measured(operator, counts, truth, blank=model.blank, background=model.background)
    clean = operator.A(full[None])
    sigma = _sigma(operator, clean, noise, prior)
    noisy = clean + sigma * normal
    sampled = getattr(operator, "sampled", None)  # k-space that was not measured stays zero
    return _measured(operator, (noisy if sampled is None else sampled(noisy))[0], truth, sigma=sigma)


def _measured(
    operator: LinearOperator,
    values: Tensor,
    truth: Tensor,
    sigma: Tensor | None = None,
    blank: Tensor | None = None,
    background: Tensor | None = None,
) -> Measurement | Observation:
    """In the format of parallel-beam scans where it is one."""
    if isinstance(operator, ParallelBeam) and operator.domain.dims == ("y", "x"):
        return Measurement(operator.geometry, operator.domain, values, sigma, blank, background, truth)
    return Observation(operator.range, operator.domain, values, sigma, blank, background, truth)


def _sigma(operator: LinearOperator, clean: Tensor, noise: Noise, prior: Prior | None) -> Tensor:
    """Standard deviation of the data: (), or one per datum with ``spread``."""
    if noise.spread is not None:
        if prior is None or not isinstance(operator, AVERAGING):
            raise InputError(
                "noise as a spread is a share of the prior's standard deviation, for operators that average the field "
                f"(stations, coarse_grain, masked); {type(operator).__name__} takes sigma or relative"
            )
        size = (prior.scale.abs() * (sigma_data_of(prior) or 1.0)).float()  # closed forms have latents of spread 1
        return noise.spread * operator.A(size.expand(operator.domain.shape)[None].contiguous())[0]
    measured = clean.abs()
    seen = measured[measured > 0] if clean.is_complex() else measured  # zeros of k-space were not measured
    level = float(seen.mean()) if seen.numel() else 0.0
    sigma = noise.sigma if noise.sigma is not None else (noise.relative or 0.0) * level
    if not sigma > 0:
        raise InputError("the noise level is zero because the object projects to nothing; give noise as {sigma: ...}")
    return torch.tensor(sigma)


def likelihood_of(measurement: Measurement | Observation, operator: LinearOperator, kind: str) -> Likelihood:
    """Of what was measured; kind: "gaussian", or "transmission" of photon counts.  Raises InputError for that of other data."""
    m = measurement
    if m.blank is None or m.background is None:
        if kind == "transmission":
            raise InputError("the transmission likelihood is that of photon counts; the measurement holds other data")
        assert m.sigma is not None  # read_measurement and simulate see to it
        return GaussianLikelihood(operator, m.values, m.sigma)
    counts = TransmissionLikelihood(operator, m.values, m.blank, m.background)
    return counts if kind == "transmission" else counts.gaussian()


def _truth(problem: Problem, prior: Target) -> tuple[Tensor, Space, str]:
    """One image, or a stack of slices from ``index`` on, on the prior's grid; its space, and where it comes from.

    NaN where the truth is unknown and the card of the prior says what stood there in training (``fill``).
    """
    definition = problem.dataset
    if isinstance(definition, FieldCard):
        return _field(definition, problem.index, prior)
    stack = slice_stack(definition, problem.index, prior, problem.fit)
    return stack.whole(), stack.space, stack.where


def _field(card: FieldCard, index: int, prior: Prior | Target) -> tuple[Tensor, Space, str]:
    """One held-out field; a magnitude gets the smooth phase of a complex prior's training images."""
    fields = load_fields(card, "test")
    if index >= len(fields):
        raise InputError(f"problem.index is {index}; {card.name} has {len(fields)} held-out fields, numbered from 0")
    one = fields.rows(slice(index, index + 1))
    where = f"field {index} of the held-out ones of {card.name} ({card.licence})"
    factor = max(1, one.space.shape[-1] // prior.space.shape[-1])
    if tuple(n // factor for n in one.space.shape[-2:]) != prior.space.shape[-2:]:
        raise InputError(
            f"{card.name} has fields of {one.space.shape[-2]} x {one.space.shape[-1]}; prior {prior.card.name!r} has "
            f"{prior.space.shape[-2]} x {prior.space.shape[-1]}, and only whole multiples are averaged down"
        )
    if factor > 1:
        where += f", averaged {factor} x {factor}"
    phase = PHASE if prior.space.coords.get("channel") == ("real", "imag") else None
    if phase is not None:
        where += ", with a made-up smooth phase"
    one = one.coarsened(factor)
    values, known = FieldSampler(FieldSampling(dataset=card.name, phase=phase), one, index).batch(0, 1)
    space = image_space(one, phase is not None)
    unknown = int((known == 0).sum())
    if unknown and prior.card.facts.get("fill") is None:
        raise InputError(
            f"field {index} of {card.name} has {unknown} unknown values (land, gaps); a truth to simulate from must be known "
            "everywhere, but for a prior whose card says what stood there in training (fill)"
        )
    if unknown:
        where += f"; {unknown} unknown values (land) are neither observed nor scored"
    return torch.where(known > 0, values, torch.nan).reshape(space.shape), space, where


def _condition(name: str, prior: Prior, truth: Tensor | None, problem: Problem | None) -> Tensor:
    """The value of a condition for the truth that is simulated from."""
    if truth is None or problem is None:
        raise InputError(f"{name}: a measurement has no truth to take it from")
    if not isinstance(prior, ConditionalNetworkPrior):
        raise InputError(f"{name}: give {prior.card.name!r} a value; only networks are told of the truth")
    kind = next((one for one in prior.inputs.inputs if one.name == name), None)
    if isinstance(kind, LowResolution):
        planes, known = truth.reshape(1, -1, *truth.shape[-2:]), ~truth.isnan().reshape(1, -1, *truth.shape[-2:])
        fill = float(prior.card.facts.get("fill") or 0.0)
        return kind.means(planes.nan_to_num(fill), known.to(planes.dtype)).reshape(prior.conditions[name].shape)
    if isinstance(kind, TimeOfYear) and isinstance(problem.dataset, FieldCard):
        days = load_fields(problem.dataset, "test").days
        if days is not None and np.isfinite(days[problem.index]):
            return torch.tensor([days[problem.index]], dtype=torch.float64)
    raise InputError(f"{name}: the truth does not say it; give a value")


def _scope(prior: Prior, image: Space) -> list[str]:
    """Where the problem leaves what the prior was trained on."""
    limits = prior.card.facts.get("pixel_mm")
    pixel = 1e3 * float((image.spacing("x") if "x" in image.dims else None) or 0.0)
    if limits and pixel and not limits[0] * (1 - 1e-6) <= pixel <= limits[1] * (1 + 1e-6):
        return [
            f"pixels of {pixel:.3g} mm are outside the {limits[0]:g} to {limits[1]:g} mm that prior {prior.card.name!r} was "
            "trained on; its draws may not look like the object"
        ]
    return []
