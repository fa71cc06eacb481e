"""Workflow files: what is accepted, what is refused and how, and that what is written out runs the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from recon.errors import InputError
from recon.operators import CG
from recon.samplers import DDIM, DPS, METHODS, MMPS, DiffPIR
from recon.schedules import Karras, LogLinear
from recon.store import shipped
from recon.workflows.definitions import DicomDefinition, ParallelBeamDefinition, read_definition
from recon.workflows.schema import Workflow, json_schema, load_workflow, resolved
from recon.workflows.sections import sampler_model

TEXT = """\
problem:
  dataset: some_slice
  operator: few_views
  noise: {counts: 1.0e5}
prior: tiny
sampler: {method: mmps, steps: 100}
draws: 16
seed: 0
"""

Load = Callable[..., Workflow]


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A workspace with one definition in every group; none of them is read further than its card."""
    for group, name, text in (
        ("operators", "few_views", "type: parallel_beam\nviews: 20\n"),
        ("datasets", "some_slice", "reader: dicom\nfile: slice.dcm\n"),
    ):
        (tmp_path / group).mkdir()
        (tmp_path / group / f"{name}.yaml").write_text(text)
    (tmp_path / "priors" / "tiny").mkdir(parents=True)
    (tmp_path / "priors" / "tiny" / "card.yaml").write_text("summary: none\n")
    return tmp_path


@pytest.fixture
def load(workspace: Path) -> Load:
    """Load a text as the workflow file ``w.yaml`` of the workspace."""

    def load(text: str = TEXT, *overrides: str) -> Workflow:
        (workspace / "w.yaml").write_text(text)
        return load_workflow(workspace / "w.yaml", overrides, workspace)

    return load


def changed(old: str, new: str) -> str:
    assert old in TEXT
    return TEXT.replace(old, new)


def test_a_workflow_holds_definitions(load: Load, workspace: Path) -> None:
    workflow = load()
    assert workflow.problem.operator == ParallelBeamDefinition(type="parallel_beam", name="few_views", views=20)
    assert workflow.problem.dataset == DicomDefinition(reader="dicom", name="some_slice", file="slice.dcm")
    assert workflow.problem.noise is not None
    assert workflow.problem.noise.counts == 1e5
    assert workflow.prior == str(workspace / "priors" / "tiny")
    assert workflow.sampler.build() == MMPS(steps=100)
    assert (workflow.draws, workflow.seed, workflow.block, workflow.likelihood) == (16, 0, None, "gaussian")


@pytest.mark.parametrize(
    ("section", "sampler"),
    [
        ("{method: mmps}", MMPS()),
        ("{method: mmps, steps: 1e2}", MMPS(steps=100)),
        ("{method: mmps, grid: LogLinear}", MMPS(grid=LogLinear())),
        ("{method: mmps, grid: {kind: Karras, rho: 5}}", MMPS(grid=Karras(rho=5.0))),
        ("{method: mmps, grid: {rho: 5}}", MMPS(grid=Karras(rho=5.0))),
        ("{method: mmps, transition: {kind: DDIM, eta: 0.5}, sigma_max: 3}", MMPS(transition=DDIM(0.5), sigma_max=3.0)),
        ("{method: mmps, cg: {iterations: 9}}", MMPS(cg=CG(9, MMPS().cg.tolerance))),
        ("{method: dps, form: norm, weight: 0.5}", DPS(form="norm", weight=0.5)),
        ("{method: diffpir, lam: 7}", DiffPIR(lam=7.0)),
    ],
)
def test_the_sampler_section_is_the_sampler(load: Load, section: str, sampler: Any) -> None:
    assert load(changed("{method: mmps, steps: 100}", section)).sampler.build() == sampler


@pytest.mark.parametrize("method", METHODS)
def test_every_sampler_has_a_section_with_its_defaults(load: Load, method: str) -> None:
    workflow = load(changed("{method: mmps, steps: 100}", f"{{method: {method}}}"))
    assert workflow.sampler.build() == METHODS[method]()


def test_resolved_reruns_the_same(load: Load, tmp_path: Path) -> None:
    first = load(
        changed("steps: 100", "steps: 30, transition: {kind: DDIM, eta: 0.3}, cg: {tolerance: 1e-3}"), "seed=7"
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "again.yaml").write_text(resolved(first))
    again = load_workflow(elsewhere / "again.yaml")
    assert again == first
    assert resolved(again) == resolved(first)
    assert "few_views" in resolved(first), "definitions keep their names"


def test_paths_are_relative_to_the_file(load: Load, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (workspace / "mine.yaml").write_text("type: parallel_beam\nviews: 3\n")
    monkeypatch.chdir("/")
    workflow = load(changed("few_views", "./mine.yaml"))
    assert workflow.problem.operator.name == "mine"
    assert workflow.problem.operator.views == 3


def test_paths_of_overrides_are_relative_to_the_current_folder(
    load: Load, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path_factory.mktemp("here")
    (here / "mine.yaml").write_text("type: parallel_beam\nviews: 4\n")
    monkeypatch.chdir(here)
    assert load(TEXT, "problem.operator=./mine.yaml").problem.operator.views == 4


def test_definitions_may_stand_in_the_file(load: Load) -> None:
    text = changed("few_views", "{type: parallel_beam, views: 7, arc_degrees: 90, projector: strip}")
    operator = load(text.replace("some_slice", "{reader: dicom, file: a.dcm}")).problem.operator
    assert (operator.views, operator.arc_degrees, operator.projector) == (7, 90.0, "strip")


def test_a_measurement_takes_the_place_of_dataset_and_noise(load: Load, workspace: Path) -> None:
    (workspace / "scan.h5").write_bytes(b"")
    workflow = load("problem: {measurement: scan.h5}\nprior: tiny\nsampler: {method: mmps}\n")
    assert workflow.problem.measurement == str(workspace / "scan.h5")
    with pytest.raises(InputError, match=r"w\.yaml:1:25: problem\.measurement: there is no file .*other\.h5"):
        load("problem: {measurement: other.h5}\nprior: tiny\nsampler: {method: mmps}\n".replace(" {", "  {", 1))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("counts:", "count:", r"w\.yaml:4:11: problem\.noise\.count: unknown key \(did you mean 'counts'\?\); expected"),
        ("draws: 16", "draws: yes", r"w\.yaml:7:8: draws: expected a whole number; got 'yes'"),
        ("draws: 16", "draws: true", r"w\.yaml:7:8: draws: expected a whole number; got true"),
        ("draws: 16", "draws: 0", r"draws: expected a number >= 1; got 0"),
        ("draws: 16", "draws: '16'", r"draws: expected a whole number; got '16'"),
        ("draws: 16", "draws:", r"w\.yaml:7:7: draws: expected a whole number; got nothing"),
        ("seed: 0", "seed: 1.5", r"w\.yaml:8:7: seed: expected a whole number; got 1\.5"),
        ("seed: 0", "seed: -1", r"seed: expected a number >= 0; got -1"),
        ("1.0e5", "true", r"problem\.noise\.counts: expected a number; got true"),
        ("1.0e5", ".nan", r"problem\.noise\.counts: expected a finite number; got nan"),
        ("1.0e5", "-3", r"problem\.noise\.counts: expected a number > 0; got -3"),
        ("1.0e5", "1.0e5, sigma: 1", r"noise: expected exactly one of counts, sigma, relative, spread; got counts, sigma"),
        ("{counts: 1.0e5}", "{}", r"problem\.noise: expected exactly one .* got none"),
        ("{counts: 1.0e5}", "[1]", r"problem\.noise: expected a section with keys of its own; got a list"),
        ("mmps", "mmsp", r"w\.yaml:6:19: sampler\.method: expected one of .*; got 'mmsp' \(did you mean 'mmps'\?\)"),
        ("method: mmps, ", "", r"w\.yaml:6:10: sampler\.method: this key is missing; expected one of"),
        ("{method: mmps, steps: 100}", "mmps", r"sampler: expected a section with method: one of .*; got 'mmps'"),
        ("steps: 100", "step: 100", r"w\.yaml:6:25: sampler\.step: unknown key \(did you mean 'steps'\?\)"),
        ("steps: 100", "grid: Karas", r"sampler\.grid\.kind: .*got 'Karas' \(did you mean 'Karras'\?\)"),
        ("steps: 100", "grid: {roh: 7}", r"sampler\.grid\.roh: unknown key \(did you mean 'rho'\?\)"),
        ("steps: 100", "transition: {kind: DDIM, eta: 3}", r"sampler\.transition: DDIM needs 0 <= eta <= 1; got 3"),
        ("steps: 100", "cg: {iterations: 0}", r"sampler\.cg: CG needs iterations >= 1"),
        ("few_views", "few_veiws", r"w\.yaml:3:13: problem\.operator: there is no 'few_veiws' .*did you mean 'few_views'"),
        ("some_slice", "some_slcie", r"w\.yaml:2:12: problem\.dataset: there is no 'some_slcie' .*did you mean 'some_slice'"),
        ("tiny", "tinny", r"w\.yaml:5:8: prior: there is no 'tinny' .*did you mean 'tiny'"),
        ("few_views", "nowhere/o.yaml", r"w\.yaml:3:13: problem\.operator: there is no file .*nowhere/o\.yaml"),
        ("few_views", "3", r"problem\.operator: expected a name \(see `recon list operators`\), a path or a definition; got 3"),
        ("few_views", "{views: 3}", r"problem\.operator\.type: this key is missing"),
        ("few_views", "{type: parallel_beam, views: 0}", r"problem\.operator\.views: expected a number > 0; got 0"),
        ("some_slice", "{reader: dcm, file: x}", r"dataset\.reader: expected one of dicom, fields, hdf5_slices; got 'dcm'"),
        ("  dataset: some_slice\n", "", r"problem: expected either dataset .* or measurement .*; got neither"),
        ("  dataset:", "  measurement: x\n  dataset:", r"problem: expected either dataset .*; got both"),
        ("  dataset: some_slice", "  measurement: x", r"problem: noise is for simulated data"),
        ("  noise: {counts: 1.0e5}\n", "", r"problem: simulating from a dataset also needs noise"),
        ("prior: tiny\n", "", r"w\.yaml:1:1: prior: this key is missing"),
        ("prior: tiny", "prior: {a: 1}", r"prior.a: unknown key; expected one of name, sum, weights, given"),
        ("prior: tiny", "prior: 3", r"prior: expected a name \(see `recon list priors`\), a path or a definition; got 3"),
        ("seed: 0", "baselines: [fpb]", r"8:13: baselines\[0\]: expected one of .*; got 'fpb' \(did you mean 'fbp'"),
        ("seed: 0", "draws: 3", r"w\.yaml:8:1: draws: this key was already given in line 7"),
        ("seed: 0", "checkpoint_every: 0", r"checkpoint_every: expected a number > 0; got 0"),
        ("seed: 0", "likelihood: poisson", r"likelihood: expected one of 'gaussian', 'transmission'; got 'poisson'"),
        ("draws: 16", "draws: 15\nantithetic: true", "antithetic draws come in pairs: make draws and block even; got 15"),
        ("draws: 16", "draws: 2\nantithetic: true", "a single pair of draws says nothing of its spread"),
        ("draws: 16", "block: 3\nantithetic: true", "make draws and block even; got 16, 3"),
        ("{method: mmps, steps: 100}", "{method: twistedsmc}\nantithetic: true", "TwistedSMC lets draws meet, so they cannot"),
        ("{counts: 1.0e5}", "{sigma: 1}\nlikelihood: transmission", r"the transmission likelihood is that of photon counts"),
    ],
)  # fmt: skip
def test_what_is_refused(load: Load, old: str, new: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(changed(old, new))


def test_all_that_is_wrong_is_said_at_once(load: Load) -> None:
    text = changed("draws: 16", "draws: x").replace("sampler:", "sampeler:").replace("counts", "count")
    with pytest.raises(InputError) as raised:
        load(text, "block=0")
    lines = str(raised.value).splitlines()
    assert len(lines) == 5
    for part in (
        "draws:",
        "sampler: this key is missing",
        "sampeler: unknown key",
        "noise.count:",
        "--set 'block=0': block:",
    ):
        assert sum(part in line for line in lines) == 1, part


def test_all_references_that_lead_nowhere_are_said_at_once(load: Load) -> None:
    with pytest.raises(InputError) as raised:
        load(TEXT.replace("few_views", "a").replace("some_slice", "b").replace("tiny", "c"))
    assert len(str(raised.value).splitlines()) == 3


def test_errors_in_a_definition_name_its_own_file(load: Load, workspace: Path) -> None:
    (workspace / "operators" / "few_views.yaml").write_text("type: parallel_beam\nviewz: 20\n")
    with pytest.raises(InputError) as raised:
        load()
    assert "few_views.yaml:2:1: viewz: unknown key (did you mean 'views'?)" in str(raised.value)
    assert "few_views.yaml:1:1: views: this key is missing" in str(raised.value)


@pytest.mark.parametrize(
    "key", ["problem", "dataset", "operator", "noise", "counts", "prior", "sampler", "method", "steps", "draws"]
)
def test_any_key_misspelt_by_one_letter_is_found(load: Load, key: str) -> None:
    wrong = key[:1] + key[2:]
    with pytest.raises(InputError, match=rf"w\.yaml:\d+:\d+: .*\b({wrong}|{key})\b"):
        load(TEXT.replace(f"{key}:", f"{wrong}:"))


def test_workflows_cannot_be_changed(load: Load) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load().draws = 3  # type: ignore[misc]


@dataclass(frozen=True)
class Odd:
    """A sampler with fields of every kind."""

    levels: tuple[float, ...] = (1.0, 2.0)
    name: str = "x"
    flag: bool = False
    inner: CG = field(default_factory=lambda: CG(3, 0.1))
    maybe: int | None = None


@dataclass(frozen=True)
class Unfit:
    """A sampler with a field that no file can hold."""

    function: Callable[[], None]


def test_sections_are_made_from_any_dataclass() -> None:
    model = sampler_model(Odd)
    assert model.model_validate({"method": "odd"}).build() == Odd()
    made = model.model_validate(
        {"method": "odd", "levels": [3, 4], "flag": True, "inner": {"iterations": 9}, "maybe": 2}
    )
    assert made.build() == Odd((3.0, 4.0), "x", True, CG(9, 0.1), 2)
    with pytest.raises(TypeError, match=r"Unfit\.function has type .*, which a workflow file cannot hold"):
        sampler_model(Unfit)


def test_the_schema_names_every_key() -> None:
    schema = json_schema()
    assert set(schema["properties"]) == set(Workflow.model_fields)
    assert schema["additionalProperties"] is False
    assert set(METHODS) == {
        schema["$defs"][ref["$ref"].rsplit("/", 1)[-1]]["properties"]["method"]["const"]
        for ref in schema["properties"]["sampler"]["oneOf"]
    }


@pytest.mark.parametrize("path", sorted((shipped() / "operators").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_operators_are_valid_and_say_what_they_are(path: Path) -> None:
    definition = read_definition("operators", path)
    assert definition.name == path.stem
    assert definition.summary


@pytest.mark.parametrize("path", sorted((shipped() / "datasets").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_datasets_state_source_licence_and_checksum(path: Path) -> None:
    definition = read_definition("datasets", path)
    assert definition.name == path.stem
    assert all((definition.summary, definition.source, definition.licence, definition.sha256))


@pytest.mark.parametrize("path", sorted((shipped() / "workflows").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_workflows_are_valid(path: Path, workspace: Path) -> None:
    workflow = load_workflow(path, ["prior=tiny"], workspace)
    assert workflow.summary


def test_a_shipped_workflow_is_found_by_name(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)
    assert load_workflow("demo", ["prior=tiny"], workspace) == load_workflow(
        shipped() / "workflows" / "demo.yaml", ["prior=tiny"], workspace
    )
