"""What a ``learn.yaml`` says: the measurements that a prior is learnt from, the network, how many laps.

.. code-block:: yaml

    name: brain_learnt
    summary: brain slices, learnt from a quarter of their k-space
    simulate:                         # or  measurements: scans/*.nc  (one file or pattern, or a list of them)
      dataset: openms_brain           # its training part, seen through the operators and forgotten
      coarsen: 8
      operators: {type: cartesian_mri, coils: 1, acceleration: 4, centre: 4}   # or a list; names and paths too
      alike: 16                       # objects in turn that share an operator; then the next one, or another mask
      noise: {sigma: 0.02}
    architecture: {family: drunet, size: 32, channels: [16, 32, 48, 64], blocks: 1}
    learning: {laps: 4, rank: 20, training: {images: 12000}}
    unfit_for: anything but trying it out
    weights_licence: CC-BY-4.0

A path is relative to the file.  Everything in ``learning`` is described by ``LearningConfig``; ``learning.training`` is the
budget of a lap.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from recon.errors import InputError
from recon.priors.learning import LearningConfig
from recon.priors.network import Architecture
from recon.store import find
from recon.workflows.definitions import DatasetDefinition, OperatorDefinition, read_definition
from recon.workflows.fields import Items, Section, Whole, reference
from recon.workflows.problems import validated
from recon.workflows.schema import Noise, anchored
from recon.workflows.source import KeyPath, Source, dotted, read_source


def _several(value: Any) -> Any:  # noqa: ANN401
    """One value is a list of one."""
    return tuple(value) if isinstance(value, list) else (value,) if isinstance(value, str | dict) else value


_Operator = reference(OperatorDefinition, "operators")


class Simulated(Section):
    """Measurements of the training images of a data set, simulated.

    coarsen: side of the blocks of pixels that are averaged first.  phase: make complex images of magnitudes, with a smooth
    phase of this standard deviation in radians (see ``FieldSampling``).  first, count, every: which images of the training
    part, all that there are without a count.  operators: object ``i`` is seen by number ``i // alike``, counted round and
    round; in each new round an operator that has a ``seed`` gets the next one.  noise: without ``spread``, for there is no
    prior yet.  seed: of noise and phases.
    """

    dataset: reference(DatasetDefinition, "datasets")  # type: ignore[valid-type]
    coarsen: Whole = Field(default=1, ge=1)
    phase: Annotated[float, Field(ge=0)] | None = None
    first: Whole = Field(default=0, ge=0)
    count: Whole | None = Field(default=None, ge=1)
    every: Whole = Field(default=1, ge=1)
    operators: Annotated[tuple[_Operator, ...], BeforeValidator(_several), Field(min_length=1)]  # type: ignore[valid-type]
    alike: Whole = Field(default=1, ge=1)
    noise: Noise
    seed: Whole = Field(default=0, ge=0, lt=2**32)

    @model_validator(mode="after")
    def _without_prior(self) -> Simulated:
        if self.noise.spread is not None:
            raise ValueError(
                "noise as a spread is a share of a prior's; there is none yet: give sigma, relative or counts"
            )
        return self


class LearnFile(Section):
    """The content of a ``learn.yaml``; see the module.

    licence, source: of the measurements; those of a data set stand on its card.  unfit_for: what the prior must not be used
    for.  weights_licence: of the weights.
    """

    name: str = Field(min_length=1)
    summary: str
    measurements: Annotated[tuple[str, ...], BeforeValidator(_several), Field(min_length=1)] | None = None
    licence: str = ""
    source: str = ""
    simulate: Simulated | None = None
    architecture: Architecture
    learning: LearningConfig
    unfit_for: str
    weights_licence: str
    notes: Annotated[tuple[str, ...], Items] = ()

    @model_validator(mode="after")
    def _one_source(self) -> LearnFile:
        if (self.measurements is None) == (self.simulate is None):
            got = "neither" if self.simulate is None else "both"
            raise ValueError(f"expected either measurements (files) or simulate (from a data set); got {got}")
        if self.measurements is not None and not (self.licence and self.source):
            raise ValueError("measurements also need licence and source: whose they are and what may be done with them")
        if self.simulate is not None and (self.licence or self.source):
            raise ValueError("licence and source belong to measurements; those of a data set stand on its card")
        return self


def read_learn_file(path: Path, overrides: Iterable[str] = (), workspace: str | Path | None = None) -> LearnFile:
    """The file at ``path`` with ``a.b=value`` set, definitions in place of names, and the files of its patterns.

    Raises InputError listing every key that is wrong and every reference that leads nowhere, each with its place.
    """
    source = read_source(Path(path)).overridden(overrides)
    return _looked_up(validated(LearnFile, source), source, workspace)


def _looked_up(file: LearnFile, source: Source, workspace: str | Path | None) -> LearnFile:
    wrong: list[str] = []

    def at(place: KeyPath, value: Any, group: Any) -> Any:  # noqa: ANN401
        if not isinstance(value, str):
            return value
        try:
            return read_definition(group, find(group, anchored(value, place, source), workspace).resolve())
        except InputError as error:
            wrong.append(f"{source.where(place)}: {dotted(place)}: {error}")
            return value

    changes: dict[str, Any] = {}
    if file.simulate is not None:
        operators = tuple(
            at(("simulate", "operators", i), v, "operators") for i, v in enumerate(file.simulate.operators)
        )
        dataset = at(("simulate", "dataset"), file.simulate.dataset, "datasets")
        changes["simulate"] = file.simulate.model_copy(update={"dataset": dataset, "operators": operators})
    if file.measurements is not None:
        changes["measurements"] = _files(file.measurements, source, wrong)
    if wrong:
        raise InputError("\n".join(wrong))
    return file.model_copy(update=changes)


def _files(patterns: tuple[str, ...], source: Source, wrong: list[str]) -> tuple[str, ...]:
    """Every file of every pattern, once, in the order of the patterns and by name; what matches nothing goes to ``wrong``."""
    found: dict[str, None] = {}
    for i, pattern in enumerate(patterns):
        place: KeyPath = ("measurements", i)
        path = Path(os.path.abspath(anchored(pattern, place, source, always=True)))  # noqa: PTH100  (takes .. out)
        matches = sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
        files = [str(match) for match in matches if match.is_file()]
        if not files:
            wrong.append(f"{source.where(place)}: {dotted(place)}: there is no file {pattern}")
        found.update(dict.fromkeys(files))
    return tuple(found)
