"""From a ``learn.yaml`` to the observations that a prior is learnt from: files that were measured, or simulations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recon.datasets.fields import FieldCard, load_fields
from recon.datasets.measurement import read_measurement
from recon.datasets.sampling import FieldSampler, FieldSampling, image_space
from recon.datasets.slices import SliceCard, Slices, load_slices
from recon.errors import InputError
from recon.likelihoods import GaussianLikelihood
from recon.operators.base import LinearOperator
from recon.space import Space
from recon.workflows.learn_file import LearnFile, Simulated
from recon.workflows.operators import build
from recon.workflows.problem import likelihood_of, simulate


@dataclass(frozen=True)
class Observed:
    """Observations of different objects, and what a card says of them.

    likelihoods: those that share an operator hold the same one.  sources: as in the ``data`` of a card.  says: what was
    measured, in a line.
    """

    likelihoods: Sequence[GaussianLikelihood]
    sources: list[dict[str, Any]]
    says: str

    @property
    def pixel_mm(self) -> tuple[float, float] | None:
        """Smallest and largest pixel of images with metres along their axes."""
        image = self.likelihoods[0].operator.domain
        pixel = 1e3 * float((image.spacing("x") if "x" in image.dims else None) or 0.0)
        return (pixel, pixel) if pixel else None


def observed(file: LearnFile) -> Observed:
    """The observations of a file.

    Raises InputError for files and data sets that cannot be read, hold too little, or do not fit the operators.
    """
    if file.simulate is not None:
        return _simulated(file.simulate)
    assert file.measurements is not None  # the file has one of the two
    return _measured(file, [Path(name) for name in file.measurements])


def _measured(file: LearnFile, paths: Sequence[Path]) -> Observed:
    shared: dict[Any, LinearOperator] = {}
    likelihoods = []
    for path in paths:
        scan = read_measurement(path)
        key = (scan.geometry, scan.image.shape, scan.image.spacing("x"))
        operator = shared.setdefault(key, scan.operator()) if key not in shared else shared[key]
        likelihoods.append(likelihood_of(scan, operator, "gaussian").gaussian())
    source = {
        "name": "measurements",
        "slices": len(paths),
        "share": 1.0,
        "licence": file.licence,
        "source": file.source,
    }
    says = f"{len(paths)} measurement files, {len(shared)} geometries: {next(iter(shared.values())).describe()}"
    return Observed(likelihoods, [source], says)


def _simulated(plan: Simulated) -> Observed:
    card = plan.dataset
    if not isinstance(card, FieldCard | SliceCard):
        raise InputError(
            f"{card.name or card.file} is a single image; a prior is learnt from measurements of many objects"
        )
    images, space = _fields(plan, card) if isinstance(card, FieldCard) else _slices(plan, card)
    likelihoods: list[GaussianLikelihood] = []
    operator: LinearOperator | None = None
    for i, image in enumerate(images):
        if operator is None or i % plan.alike == 0:
            operator = build(_turned(plan.operators, i // plan.alike), space)
        # No two objects have the same noise, whatever the seed.
        measured = simulate(operator, image, plan.noise, (plan.seed << 32) + i, None)
        likelihoods.append(likelihood_of(measured, operator, "gaussian").gaussian())
    licences = {"licence": card.licence, "source": card.source}
    source = {"name": card.name, "slices": len(likelihoods), "share": 1.0, **licences}
    operators = -(-len(likelihoods) // plan.alike)
    kinds = ", ".join(dict.fromkeys(str(definition.type) for definition in plan.operators))  # type: ignore[attr-defined]
    says = (
        f"simulated from the training part of {card.name} with {operators} operators ({kinds}), never shown as images"
    )
    return Observed(likelihoods, [source], says)


def _turned(definitions: Sequence[Any], number: int) -> Any:  # noqa: ANN401
    """Definition ``number``, counted round and round, with as many added to its seed as there were rounds."""
    rounds, which = divmod(number, len(definitions))
    definition = definitions[which]
    if "seed" not in type(definition).model_fields:
        return definition
    return definition.model_copy(update={"seed": definition.seed + rounds})


def _chosen(plan: Simulated, count: int, name: str) -> slice:
    """Which of ``count`` training images are measured."""
    if plan.first >= count:
        raise InputError(f"simulate.first is {plan.first}; {name} has {count} training images, numbered from 0")
    last = count if plan.count is None else plan.first + plan.every * plan.count
    if last - plan.every >= count:
        raise InputError(
            f"{name} has {count} training images; {plan.count} of them from {plan.first} in steps of {plan.every} are too many"
        )
    return slice(plan.first, min(last, count), plan.every)


def _fields(plan: Simulated, card: FieldCard) -> tuple[list[Tensor], Space]:
    fields = load_fields(card, "train")
    fields = fields.rows(_chosen(plan, len(fields), card.name)).coarsened(plan.coarsen)
    if fields.known is not None and not fields.known.all():
        raise InputError(
            f"{card.name} has {int((~fields.known).sum())} unknown values among the chosen fields (land, gaps); an object that "
            "is measured must be known everywhere"
        )
    space, sampling = image_space(fields, plan.phase is not None), FieldSampling(dataset=card.name, phase=plan.phase)
    samplers = (FieldSampler(sampling, fields.rows(slice(i, i + 1)), plan.seed) for i in range(len(fields)))
    return [sampler.batch(i, 1)[0].reshape(space.shape) for i, sampler in enumerate(samplers)], space


def _slices(plan: Simulated, card: SliceCard) -> tuple[list[Tensor], Space]:
    if plan.phase is not None:
        raise InputError(f"simulate.phase is for magnitude images; {card.name} holds CT slices")
    slices = load_slices(card, "train")
    rows = _chosen(plan, len(slices), card.name)
    valid = None if slices.valid is None else slices.valid[rows]
    chosen = Slices(slices.name, slices.mu[rows], valid, slices.pixel[rows]).coarsened(plan.coarsen)
    if np.ptp(chosen.pixel) > 1e-6 * chosen.pixel.max():
        raise InputError(
            f"the chosen slices of {card.name} have pixels of {1e3 * chosen.pixel.min():.3g} to {1e3 * chosen.pixel.max():.3g} "
            "mm; measured images share one grid: choose some of one size (first, count, every), or another data set"
        )
    space = Space.grid(chosen.mu.shape[1:], float(chosen.pixel[0]), "1/m")
    return [torch.from_numpy(image.copy()) for image in chosen.mu], space
