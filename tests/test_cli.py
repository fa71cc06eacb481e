"""The command line: what it prints, how it ends, and that bad input leaves nothing behind."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from recon import __version__
from recon.cli import main
from recon.errors import CheckFailed, InputError, ReconError, Stopped
from recon.store import GROUPS

WORKFLOW = """\
problem:
  dataset: some_slice
  operator: few_views
  noise: {counts: 1.0e5}
prior: tiny
sampler: {method: mmps, steps: 4}
"""


@pytest.fixture(autouse=True)
def no_leaks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Commands set up logging; a test leaves it as it was, and no test runs under a launcher."""
    for name in ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "RECON_WORKSPACE"):
        monkeypatch.delenv(name, raising=False)
    log = logging.getLogger("recon")
    handlers, level = list(log.handlers), log.level
    yield
    log.handlers[:], log.level = handlers, level


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with one definition in every group and the workflow file w.yaml."""
    for group, name, text in (
        ("operators", "few_views", "summary: twenty views\ntype: parallel_beam\nviews: 20\n"),
        ("datasets", "some_slice", "reader: dicom\nfile: slice.dcm\n"),
    ):
        (tmp_path / group).mkdir()
        (tmp_path / group / f"{name}.yaml").write_text(text)
    (tmp_path / "priors" / "tiny").mkdir(parents=True)
    (tmp_path / "priors" / "tiny" / "card.yaml").write_text("summary: a prior\n")
    (tmp_path / "w.yaml").write_text(WORKFLOW)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A stand-in for the pipeline that records its calls; put an exception in ``fails`` to have it raised."""
    calls: list[tuple] = []
    stand_in = SimpleNamespace(calls=calls, fails=None)

    def answer(name: str, value: object) -> Callable[..., object]:
        def called(*args: object, **named: object) -> object:
            calls.append((name, args, named))
            if stand_in.fails is not None:
                raise stand_in.fails
            return value

        return called

    stand_in.run = answer("run", Path("runs/x"))
    stand_in.resume = answer("resume", Path("runs/x"))
    stand_in.report = answer("report", Path("runs/x/report.html"))
    stand_in.check = answer("check", "it fits")
    monkeypatch.setitem(sys.modules, "recon.workflows.pipeline", stand_in)
    return stand_in


def everything_below(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"recon {__version__}\n"
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    for command in ("demo", "run", "check", "resume", "report", "list", "train", "schema", "doctor"):
        assert f"    {command} " in text
    assert "75 stopped at a" in text


@pytest.mark.parametrize("arguments", [[], ["rum"], ["run"], ["list", "planets"], ["run", "w.yaml", "--draws", "3"]])
def test_usage_errors_end_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    assert "usage: recon" in capsys.readouterr().err


def test_run_passes_what_was_asked(pipeline: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["run", "w.yaml", "--out", "o", "--set", "a.b=1", "--set", "c=2", "--overwrite", "--workspace", "ws"]) == 0
    )
    assert pipeline.calls == [
        (
            "run",
            ("w.yaml",),
            {"out": Path("o"), "overrides": ["a.b=1", "c=2"], "overwrite": True, "workspace": Path("ws")},
        )
    ]
    assert capsys.readouterr().out == "runs/x\n"


def test_run_without_options(pipeline: SimpleNamespace) -> None:
    assert main(["run", "w.yaml"]) == 0
    assert pipeline.calls == [
        ("run", ("w.yaml",), {"out": None, "overrides": [], "overwrite": False, "workspace": None})
    ]


def test_demo_runs_the_shipped_workflow(pipeline: SimpleNamespace) -> None:
    assert main(["demo", "--set", "draws=2"]) == 0
    ((name, (file,), named),) = pipeline.calls
    assert (name, file.name, named["out"], named["overrides"]) == ("run", "demo.yaml", Path("runs/demo"), ["draws=2"])
    assert file.is_file()


@pytest.mark.parametrize(
    ("arguments", "call", "said"),
    [
        (["check", "w.yaml", "--set", "a=1"], ("check", ("w.yaml", ["a=1"], None), {}), "it fits\n"),
        (["resume", "runs/x"], ("resume", (Path("runs/x"),), {}), "runs/x\n"),
        (["report", "runs/x"], ("report", (Path("runs/x"),), {}), "runs/x/report.html\n"),
    ],
)
def test_other_commands_pass_what_was_asked(
    pipeline: SimpleNamespace, capsys: pytest.CaptureFixture[str], arguments: list[str], call: tuple, said: str
) -> None:
    assert main(arguments) == 0
    assert pipeline.calls == [call]
    assert capsys.readouterr().out == said


@pytest.mark.parametrize(
    ("failure", "code", "trace"),
    [
        (InputError("the file is wrong"), 2, False),
        (Stopped("stopped at step 3"), 75, False),
        (CheckFailed("3 of 4"), 1, False),
        (ReconError("no MPI"), 1, False),
        (ZeroDivisionError("a bug"), 1, True),
        (MemoryError("too much"), 1, True),
    ],
)
def test_exit_codes(
    pipeline: SimpleNamespace, capsys: pytest.CaptureFixture[str], failure: Exception, code: int, trace: bool
) -> None:
    pipeline.fails = failure
    assert main(["run", "w.yaml"]) == code
    output = capsys.readouterr()
    assert output.out == ""
    assert str(failure) in output.err
    assert ("Traceback" in output.err) == trace


@pytest.mark.parametrize("command", [["run", "w.yaml"], ["resume", "runs/x"]])
def test_cases_that_failed_end_with_3(
    pipeline: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "x").mkdir(parents=True)
    (tmp_path / "runs" / "x" / "DONE.json").write_text('{"failed": []}')
    assert main(command) == 0
    (tmp_path / "runs" / "x" / "DONE.json").write_text('{"failed": ["case 3"]}')
    assert main(command) == 3


def test_interrupt_ends_with_130(pipeline: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline.fails = KeyboardInterrupt()
    assert main(["run", "w.yaml"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_debug_shows_where_bad_input_was_found(pipeline: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline.fails = InputError("the file is wrong")
    assert main(["--debug", "run", "w.yaml"]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "messages"),
    [
        ("steps: 4", "stebs: 4", ["w.yaml:6:25: sampler.stebs: unknown key (did you mean 'steps'?)"]),
        ("steps: 4", "steps: four", ["w.yaml:6:32: sampler.steps: expected a whole number; got 'four'"]),
        (
            "prior: tiny",
            "prior: tinny",
            ["w.yaml:5:8: prior: there is no 'tinny' among the priors", "did you mean 'tiny'?"],
        ),
        ("few_views", "few_vews", ["w.yaml:3:13: problem.operator: there is no 'few_vews' among the operators"]),
        ("some_slice", "a_slice", ["w.yaml:2:12: problem.dataset: there is no 'a_slice' among the datasets"]),
        ("prior: tiny", "prior: tiny\nprior: tiny", ["w.yaml:6:1: prior: this key was already given in line 5"]),
        (
            "prior: tiny",
            "pior: tiny\ndraws: x",
            ["w.yaml:5:1: pior: unknown", "6:8: draws:", "prior: this key is missing"],
        ),
    ],
)
@pytest.mark.parametrize("command", ["run", "check"])
def test_bad_workflows(
    workspace: Path, capsys: pytest.CaptureFixture[str], command: str, old: str, new: str, messages: list[str]
) -> None:
    (workspace / "w.yaml").write_text(WORKFLOW.replace(old, new))
    before = everything_below(workspace)
    assert main([command, "w.yaml"]) == 2
    output = capsys.readouterr()
    for message in messages:
        assert message in output.err
    assert "Traceback" not in output.err
    assert output.out == ""
    assert everything_below(workspace) == before, "nothing may be written"


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("absent.yaml", "absent.yaml: there is no such file"),
        ("empty.yaml", "file is empty"),
        ("demmo", "did you mean 'demo'?"),
    ],
)
@pytest.mark.parametrize("command", ["run", "check"])
def test_files_that_are_not_there(
    workspace: Path, capsys: pytest.CaptureFixture[str], command: str, file: str, message: str
) -> None:
    (workspace / "empty.yaml").write_text("")
    before = everything_below(workspace)
    assert main([command, file]) == 2
    assert message in capsys.readouterr().err
    assert everything_below(workspace) == before


@pytest.mark.parametrize("command", ["resume", "report"])
def test_folders_that_are_no_runs(workspace: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    before = everything_below(workspace)
    assert main([command, "nowhere"]) == 2
    assert main([command, "operators"]) == 2
    assert capsys.readouterr().err.count("is not a run folder") == 2
    assert everything_below(workspace) == before


def test_wrong_overrides_are_named(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "w.yaml", "--set", "draws=none", "--set", "sampler.stepz=3"]) == 2
    said = capsys.readouterr().err
    assert "--set 'draws=none': draws: expected a whole number; got 'none'" in said
    assert "--set 'sampler.stepz=3': sampler.stepz: unknown key (did you mean 'steps'?)" in said


def test_training_needs_a_file(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "absent.yaml"]) == 2
    assert "absent.yaml" in capsys.readouterr().err


def test_list(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "operators"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(line.split()[0] for line in lines)
    assert [line.split(maxsplit=1)[1] for line in lines if line.startswith("few_views ")] == ["twenty views"]
    assert any(line.startswith("sparse_view_ct ") for line in lines), "shipped definitions are listed too"
    assert main(["list"]) == 0
    text = capsys.readouterr().out
    assert all(f"{group}\n" in text for group in GROUPS)
    assert re.search(r"^tiny +a prior$", text, re.MULTILINE)


def test_list_survives_a_broken_definition(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workspace / "operators" / "broken.yaml").write_text("a: [")
    assert main(["list", "operators"]) == 0
    assert "(unreadable: " in capsys.readouterr().out


def test_list_of_another_workspace(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir("/")
    assert main(["list", "operators", "--workspace", str(workspace)]) == 0
    assert "few_views" in capsys.readouterr().out
    assert main(["list", "operators", "--workspace", str(workspace / "absent")]) == 2
    assert "is not a folder" in capsys.readouterr().err


def test_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "Workflow"
