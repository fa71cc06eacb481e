"""What the README says is so: its example runs, its commands exist, its table is that of the classes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from recon.cli import parser
from recon.samplers import METHODS
from recon.workflows.problems import validated
from recon.workflows.schema import workflow_model
from recon.workflows.source import parse_source

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    found = re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)
    assert found
    return found


def sampler_rows() -> list[str]:
    told = {name: (cls.claim, cls.exact_for, cls.needs, cls.cost) for name, cls in METHODS.items()}
    return [f"| {METHODS[name].__name__} (`{name}`) | {' | '.join(cells)} |" for name, cells in told.items()]


def test_the_table_of_samplers_is_that_of_the_classes() -> None:
    rows = sampler_rows()
    assert "\n".join(rows) in TEXT, "put these rows into README.md:\n" + "\n".join(rows)


@pytest.mark.parametrize("code", blocks("python"))
def test_the_example_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "ensemble.nc").is_file()


@pytest.mark.parametrize("text", blocks("yaml"))
def test_the_workflow_is_valid(text: str) -> None:
    validated(workflow_model(), parse_source(text, "README.md"))


def test_the_commands_exist() -> None:
    known = set(re.findall(r"^    (\w+)(?: |$)", parser().format_help(), re.MULTILINE))
    named = set(re.findall(r"recon (\w+) (?:FILE|DIR|[A-Z]+\.yaml|sparse_view_ct)", TEXT))
    assert {"run", "resume", "train"} <= named <= known
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z-]+)", "\n".join(blocks("sh")))) <= targets


def test_the_folders_exist() -> None:
    for folder in re.findall(r"^\| `(\w+)/` \|", TEXT, re.MULTILINE):
        assert (ROOT / folder).is_dir()
