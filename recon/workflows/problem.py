"""From the definitions of a workflow to a posterior: the truth or the measured file, the operator, the noise, the prior."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recon.datasets.measurement import Measurement, read_measurement
from recon.datasets.slices import SliceCard, Slices, load_slices, locate, read_dicom
from recon.draws import Draws
from recon.errors import InputError, need
from recon.likelihoods import GaussianLikelihood, Likelihood, TransmissionLikelihood
from recon.operators.parallel_beam import ParallelBeam, ParallelGeometry, covering
from recon.posterior import Posterior
from recon.priors import Prior, load_prior
from recon.samplers import Sampler
from recon.space import Space
from recon.workflows.schema import Noise, Workflow


@dataclass(frozen=True)
class Job:
    """Everything a run needs, checked against each other.

    notes: what was done to the input on the way, for the report.  warnings: what a reader of the result must know.
    """

    posterior: Posterior
    sampler: Sampler
    measurement: Measurement
    operator: ParallelBeam
    notes: dict[str, str]
    warnings: list[str]

    @property
    def prior(self) -> Prior:
        """The prior of the posterior."""
        return self.posterior.prior


def prepare(workflow: Workflow) -> Job:
    """The job of a looked-up workflow.  Raises InputError when its parts do not fit each other; no network is evaluated."""
    prior = load_prior(workflow.prior)
    problem = workflow.problem
    notes: dict[str, str] = {}
    if problem.measurement is not None:
        measurement = read_measurement(Path(problem.measurement))
        if problem.operator is not None and geometry(problem.operator, measurement.image) != measurement.geometry:
            raise InputError(
                f"{problem.measurement} states another geometry than problem.operator; leave the operator out to use the file's"
            )
        operator = measurement.operator()
        notes["data"] = f"measured: {Path(problem.measurement).name}"
    else:
        truth, image, notes["data"] = _truth(problem.dataset, problem.index, prior)
        operator = ParallelBeam.from_geometry(image, geometry(problem.operator, image))
        assert problem.noise is not None  # the schema asks for it beside a dataset
        measurement = simulate(operator, truth, problem.noise, workflow.seed)
        notes["data"] += "; simulated with the operator that reconstructs (same grid), so model error is absent"
    likelihood = _likelihood(measurement, operator, workflow.likelihood)
    sampler = workflow.sampler.build()
    posterior = Posterior(prior, likelihood)
    sampler.check(posterior)
    return Job(posterior, sampler, measurement, operator, notes, _scope(prior, image=measurement.image))


def geometry(definition: Any, image: Space) -> ParallelGeometry:  # noqa: ANN401  (a model of the group operators)
    """The scan of an operator definition (mm, degrees) for an image grid."""
    pixel = float(image.spacing("x") or 0.0)
    spacing = pixel if definition.spacing_mm is None else definition.spacing_mm * 1e-3
    offset = definition.offset_mm * 1e-3
    first, arc = math.radians(definition.first_degree), math.radians(definition.arc_degrees)
    angles = first + np.arange(definition.views) * (arc / definition.views)
    detectors = definition.detectors or covering(image, spacing, offset)
    return ParallelGeometry(tuple(angles), detectors, spacing, offset, definition.projector)


def simulate(operator: ParallelBeam, truth: Tensor, noise: Noise, seed: int) -> Measurement:
    """A measurement of ``truth`` (y, x) with keyed noise: counts, or Gaussian of a given or relative standard deviation."""
    normal = Draws(seed, [0]).normal(0, operator.range.shape, "data")
    clean = operator.A(truth[None])
    parts = (operator.geometry, operator.domain)
    if noise.counts is not None:
        model = TransmissionLikelihood(operator, torch.zeros(operator.range.shape), noise.counts)
        counts = model.simulate(truth[None], normal)[0]
        return Measurement(*parts, counts, blank=model.blank, background=model.background, truth=truth)
    sigma = noise.sigma if noise.sigma is not None else (noise.relative or 0.0) * float(clean.abs().mean())
    if not sigma > 0:
        raise InputError("the noise level is zero because the object projects to nothing; give noise as {sigma: ...}")
    return Measurement(*parts, (clean + sigma * normal)[0], sigma=torch.tensor(sigma), truth=truth)


def _likelihood(measurement: Measurement, operator: ParallelBeam, kind: str) -> Likelihood:
    m = measurement
    if m.blank is None or m.background is None:
        if kind == "transmission":
            raise InputError(
                "the transmission likelihood is that of photon counts; the measurement holds line integrals"
            )
        assert m.sigma is not None  # read_measurement and simulate see to it
        return GaussianLikelihood(operator, m.values, m.sigma)
    counts = TransmissionLikelihood(operator, m.values, m.blank, m.background)
    return counts if kind == "transmission" else counts.gaussian()


def _truth(definition: Any, index: int, prior: Prior) -> tuple[Tensor, Space, str]:  # noqa: ANN401
    """One slice on the prior's grid, its space, and where it comes from."""
    if isinstance(definition, SliceCard):
        slices = load_slices(definition, "test" if definition.use == "test" else "validation")
        where = f"slice {index} of {definition.name} ({definition.licence})"
    else:
        slices = read_dicom(_dicom_path(definition))
        where = (
            f"{definition.name or definition.file} ({definition.licence})" if definition.licence else definition.file
        )
    if index >= len(slices):
        raise InputError(f"problem.index is {index}; {slices.name} has {len(slices)} slices, numbered from 0")
    one = Slices(slices.name, slices.mu[index : index + 1], None, slices.pixel[index : index + 1])
    rows, columns = one.mu.shape[1:]
    wanted = (prior.space.shape[0], prior.space.shape[1])
    if (rows, columns) != wanted:
        factor = rows // wanted[0]
        if (rows, columns) != (wanted[0] * factor, wanted[1] * factor):
            raise InputError(
                f"{slices.name} has slices of {rows} x {columns} pixels; prior {prior.card.name!r} has "
                f"{wanted[0]} x {wanted[1]}, and only whole multiples are averaged down"
            )
        one = one.coarsened(factor)
        where += f", averaged {factor} x {factor}"
    return torch.from_numpy(one.mu[0].copy()), Space.grid(wanted, float(one.pixel[0]), "1/m"), where


def _dicom_path(definition: Any) -> Path:  # noqa: ANN401
    """The file of a DICOM definition: its own, or one that the pydicom package carries."""
    file = definition.file
    if not file.startswith("pydicom:"):
        return locate(definition.name or file, file, definition.sha256, definition.source)
    need("pydicom", "dicom")
    from pydicom.data import get_testdata_file

    found = get_testdata_file(file.removeprefix("pydicom:"), download=False)
    if found is None:
        raise InputError(f"the installed pydicom package carries no file {file.removeprefix('pydicom:')!r}")
    return locate(definition.name, str(found), definition.sha256, definition.source)


def _scope(prior: Prior, image: Space) -> list[str]:
    """Where the problem leaves what the prior was trained on."""
    limits = prior.card.facts.get("pixel_mm")
    pixel = 1e3 * float(image.spacing("x") or 0.0)
    if limits and not limits[0] * (1 - 1e-6) <= pixel <= limits[1] * (1 + 1e-6):
        return [
            f"pixels of {pixel:.3g} mm are outside the {limits[0]:g} to {limits[1]:g} mm that prior {prior.card.name!r} was "
            "trained on; its draws may not look like the object"
        ]
    return []
