"""The workflow file: what is reconstructed, with which prior and sampler, how many draws.

.. code-block:: yaml

    problem:
      dataset: ct_small               # or  measurement: FILE  in place of dataset and noise
      operator: sparse_view_ct
      noise: {counts: 1.0e5}          # or {sigma: 0.01} in data units, {relative: 0.01} of the mean |A x|, {spread: 0.1}
    prior: ct_axial
    sampler: {method: mmps, steps: 100}
    draws: 16
    seed: 0
    start: {baseline: tv, sigma: 0.3}   # optional: begin at a reconstruction, not in pure noise

An operator, data set or prior is a name (`recon list`), a path, or the definition itself; that of a prior says how it is
computed, what it is told and which field it is laid over (``prior_section``).  A path in a file is
relative to that file; one given with ``--set`` is relative to the current folder.  Loading looks every reference up, so a
``Workflow`` holds definitions, not names, and what ``resolved`` writes runs the same anywhere on this machine.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationInfo, create_model, field_validator, model_validator

from recon.errors import InputError
from recon.store import find
from recon.workflows.definitions import DatasetDefinition, OperatorDefinition, read_definition
from recon.workflows.fields import Items, Positive, Section, Whole, reference
from recon.workflows.prior_section import PriorSection
from recon.workflows.priors import located
from recon.workflows.problems import validated
from recon.workflows.sections import Made, sampler_section
from recon.workflows.source import KeyPath, Source, dotted, read_source, to_yaml

Baseline = Literal["fbp", "tv", "zero_filled", "sense", "least_squares"]


class Noise(Section):
    """The noise that is added to simulated data; exactly one of the four.

    counts: photons per detector without an object (CT).  sigma: standard deviation in data units (of the real and the
    imaginary part each).  relative: the same as a share of the mean of ``|A x|`` over what was measured.  spread: as a share
    of the prior's own standard deviation, variable by variable (stations, coarse grids, masks).
    """

    counts: Positive | None = None
    sigma: Positive | None = None
    relative: Positive | None = None
    spread: Positive | None = None

    @model_validator(mode="after")
    def _one(self) -> Noise:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"expected exactly one of counts, sigma, relative, spread; got {', '.join(given) or 'none'}")
        return self


class Problem(Section):
    """What was measured: a measurement file, or a truth from a data set seen through an operator with noise.

    index: which image of the data set, or the first of the slices that ``prior.slices`` stacks.  operator: needed with a data
    set; with a measurement only when its file does not state the geometry.  fit: CT slices that are neither the prior's grid
    nor a whole multiple of it are refused, set in air (pad), or resampled.
    """

    dataset: reference(DatasetDefinition, "datasets") | None = None  # type: ignore[valid-type]
    index: Whole = Field(default=0, ge=0)
    measurement: Annotated[str, Field(min_length=1)] | None = None
    operator: reference(OperatorDefinition, "operators") | None = None  # type: ignore[valid-type]
    noise: Noise | None = None
    fit: Literal["refuse", "pad", "resample"] = "refuse"

    @model_validator(mode="after")
    def _complete(self) -> Problem:
        if (self.dataset is None) == (self.measurement is None):
            got = "neither" if self.dataset is None else "both"
            raise ValueError(f"expected either dataset (simulate from a truth) or measurement (a file); got {got}")
        if self.dataset is not None and (self.operator is None or self.noise is None):
            missing = [name for name in ("operator", "noise") if getattr(self, name) is None]
            raise ValueError(f"simulating from a dataset also needs {' and '.join(missing)}")
        if self.measurement is not None and self.noise is not None:
            raise ValueError("noise is for simulated data; the noise of a measurement is stated in its file")
        if self.measurement is not None and self.index:
            raise ValueError("index chooses a slice of a dataset; it has no meaning with a measurement")
        return self


class Start(Section):
    """Where draws begin when not in pure noise: ``encode(x) + sigma n`` with ``x`` one of three.

    baseline: a conventional reconstruction, its weight chosen by the data alone.  run: a finished run of the same grid and
    unit, its mean; draws: each of its draws in place of the mean.  file: a .npy array in the prior's physical unit.  sigma: the
    level, in units of the prior's latent; some three times the larger of posterior width and error of ``x``.  All steps of the
    sampler lie below it.
    """

    baseline: Baseline | None = None
    run: Annotated[str, Field(min_length=1)] | None = None
    draws: bool = False
    file: Annotated[str, Field(min_length=1)] | None = None
    sigma: Positive

    @field_validator("file")
    @classmethod
    def _known_format(cls, file: str | None) -> str | None:
        if file is not None and not file.endswith(".npy"):
            raise ValueError(f"expected a .npy file; got {file!r}")
        return file

    @model_validator(mode="after")
    def _one(self) -> Start:
        given = [name for name in ("baseline", "run", "file") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"expected exactly one of baseline, run, file; got {', '.join(given) or 'none'}")
        if self.draws and self.run is None:
            raise ValueError("draws are those of a run; a baseline or a file is one image for all")
        return self


class Execution(Section):
    """Where a volume is kept while it is worked on; changes no bit of the result.

    slabs: processes that share one volume, each with some of its slices (``mpiexec -n``).  memory_gb: what one process may
    take (10^9 bytes); the volume then stays on disk, in the run's folder, and a few slices at a time are in memory.
    """

    slabs: Whole = Field(default=1, ge=1)
    memory_gb: Positive | None = None

    @model_validator(mode="after")
    def _one(self) -> Execution:
        if self.slabs > 1 and self.memory_gb is not None:
            raise ValueError("a volume is shared by processes (slabs) or stays on disk (memory_gb), not both")
        return self


class Workflow(Section):
    """A whole workflow file.

    summary: one line for `recon list`.  likelihood: of the post-log data (gaussian) or of the photon counts (transmission).
    start: where the draws begin; null is pure noise.
    draws: how many.  antithetic: in pairs with opposite noise, whose mean converges several times faster while intervals count
    half the draws.  seed: of all random numbers.  block: draws that are computed together; null leaves it to recon.
    baselines: conventional reconstructions for comparison; null is those that suit the operator.  checkpoint_every: seconds
    between checkpoints.  run: of volumes, whether they are cut over processes or stay on disk.
    """

    summary: str = ""
    problem: Problem
    likelihood: Literal["gaussian", "transmission"] = "gaussian"
    prior: reference(PriorSection, "priors")  # type: ignore[valid-type]
    sampler: Made
    start: Start | None = None
    draws: Whole = Field(default=16, ge=1, le=2**32)
    antithetic: bool = False
    seed: Whole = Field(default=0, ge=0, lt=2**64)
    block: Whole | None = Field(default=None, ge=1)
    baselines: Annotated[tuple[Baseline, ...], Items] | None = None
    checkpoint_every: Positive = 60.0
    run: Execution | None = None

    @property
    def asked(self) -> Any:  # noqa: ANN401  (an int, or recon.draws.Pairs, whose module loads torch)
        """What ``recon.sample`` is asked for."""
        from recon.draws import Pairs

        return Pairs(self.draws // 2) if self.antithetic else self.draws

    @field_validator("start")
    @classmethod
    def _startable(cls, start: Start | None, info: ValidationInfo) -> Start | None:
        from recon.samplers.warm import why_not

        sampler = info.data.get("sampler")  # missing when it was wrong itself
        if start is None or sampler is None:
            return start
        reason = why_not(sampler.makes)
        if reason:
            raise ValueError(f"{sampler.makes.__name__} cannot start in the middle: {reason}")
        if sampler.sigma_max is not None:
            raise ValueError("the walk begins at start.sigma; leave sampler.sigma_max out")
        if sampler.sigma_min is not None and sampler.sigma_min >= start.sigma:
            raise ValueError(f"start.sigma {start.sigma:g} lies below sampler.sigma_min {sampler.sigma_min:g}")
        return start

    @model_validator(mode="after")
    def _fits(self) -> Workflow:
        noise = self.problem.noise
        if self.likelihood == "transmission" and noise is not None and noise.counts is None:
            raise ValueError(
                "the transmission likelihood is that of photon counts; give problem.noise as {counts: ...}"
            )
        if self.antithetic and getattr(self.sampler.makes, "couples", False):
            raise ValueError(f"{self.sampler.makes.__name__} lets draws meet, so they cannot be antithetic pairs")
        if self.antithetic and (self.draws % 2 or (self.block or 2) % 2):
            raise ValueError(f"antithetic draws come in pairs: make draws and block even; got {self.draws}, {self.block}")
        if self.antithetic and self.draws < 4:
            raise ValueError(f"a single pair of draws says nothing of its spread: draws must be at least 4; got {self.draws}")
        return self


@cache
def workflow_model() -> type[Workflow]:
    """``Workflow`` with the sampler section made from the samplers there are; loads torch."""
    from recon.samplers import METHODS

    return create_model(
        "Workflow", __base__=Workflow, __doc__=Workflow.__doc__, sampler=(sampler_section(METHODS), ...)
    )


def load_workflow(path: str | Path, overrides: Iterable[str] = (), workspace: str | Path | None = None) -> Workflow:
    """The workflow in a file, checked as a whole and with its references looked up.

    path: a file, or the name of a shipped workflow.  overrides: ``a.b=value``.  workspace: a folder with definitions.

    Raises InputError listing everything that is wrong, each with file, line, column and key.
    """
    named = (
        isinstance(path, str) and "/" not in path and not path.endswith((".yaml", ".yml")) and not Path(path).exists()
    )
    source = read_source(find("workflows", path, workspace) if named else Path(path)).overridden(overrides)
    return looked_up(validated(workflow_model(), source), source, workspace)


def looked_up(workflow: Workflow, source: Source, workspace: str | Path | None = None) -> Workflow:
    """``workflow`` with definitions in place of names and absolute paths; ``source`` is where it was read.

    Raises InputError listing every reference that leads nowhere or to a definition that does not fit.
    """
    wrong: list[str] = []

    def at(path: KeyPath, value: Any, group: Any) -> Any:  # noqa: ANN401
        if not isinstance(value, str):
            return value
        try:
            there = find(group, anchored(value, path, source), workspace).resolve()
            return str(there) if group == "priors" else read_definition(group, there)
        except InputError as error:
            wrong.append(f"{source.where(path)}: {dotted(path)}: {error}")
            return value

    problem = workflow.problem
    changes: dict[str, Any] = {
        "dataset": at(("problem", "dataset"), problem.dataset, "datasets"),
        "operator": at(("problem", "operator"), problem.operator, "operators"),
    }
    prior = located(
        workflow.prior, lambda path, name: at(path, name, "priors"), lambda path, name: _file(path, name, source, wrong)
    )
    if problem.measurement is not None:
        changes["measurement"] = _file(("problem", "measurement"), problem.measurement, source, wrong)
    start = _start_found(workflow.start, source, wrong)
    if wrong:
        raise InputError("\n".join(wrong))
    found = {"problem": problem.model_copy(update=changes), "prior": prior, "start": start}
    return workflow.model_copy(update=found)


def _file(place: KeyPath, value: str, source: Source, wrong: list[str]) -> str:
    """The absolute path of a file (of a diffusers checkpoint: a folder); what leads nowhere is added to ``wrong``."""
    file = Path(anchored(value, place, source, always=True)).resolve()
    if not (file.is_file() or (place[0] == "prior" and file.is_dir())):
        wrong.append(f"{source.where(place)}: {dotted(place)}: there is no file {file}")
    return str(file)


def _start_found(start: Start | None, source: Source, wrong: list[str]) -> Start | None:
    """``start`` with absolute paths; what leads nowhere is added to ``wrong``."""
    key = None if start is None else next((k for k in ("run", "file") if getattr(start, k) is not None), None)
    if start is None or key is None:
        return start
    here: KeyPath = ("start", key)
    path = Path(anchored(getattr(start, key), here, source, always=True)).resolve()
    there = path / "ensemble.nc" if key == "run" else path
    if not there.is_file():
        missing = f"there is no finished run in {path}" if key == "run" else f"there is no file {path}"
        wrong.append(f"{source.where(here)}: {dotted(here)}: {missing}")
    return start.model_copy(update={key: str(path)})


def resolved(workflow: Workflow) -> str:
    """``workflow`` as YAML text with every value written out; loading it gives the same workflow."""
    return to_yaml(_plain(workflow))


def json_schema() -> dict[str, Any]:
    """The JSON schema of workflow files, for editors."""
    return workflow_model().model_json_schema()


def anchored(value: str, path: KeyPath, source: Source, always: bool = False) -> str:
    """``value`` as it is when it is a name or absolute, else the path it means."""
    is_path = always or "/" in value or value.endswith((".yaml", ".yml"))
    place = source.places.get(path)
    if not is_path or (place is not None and place.override):
        return value
    return str(Path(source.name).parent / Path(value).expanduser())


def _plain(value: Any) -> Any:  # noqa: ANN401
    """Sections as dicts, without keys that are null by default."""
    if isinstance(value, BaseModel):
        fields = type(value).model_fields
        pairs = {name: getattr(value, name) for name in fields}
        return {k: _plain(v) for k, v in pairs.items() if not (v is None and fields[k].default is None)}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
