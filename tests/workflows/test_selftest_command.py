"""``recon selftest``: every sampler where the exact posterior is known, on built-in problems and on a workflow's own."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from recon.cli import main
from recon.errors import InputError
from recon.workflows.selftest import Line, selftest, table


@pytest.fixture(autouse=True)
def quiet_again() -> Iterator[None]:
    """Commands set up logging; it is put back."""
    logged = logging.getLogger("recon")
    handlers, level = list(logged.handlers), logged.level
    yield
    logged.handlers[:], logged.level = handlers, level


def test_methods_are_measured_on_the_built_in_problem(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["selftest", "--method", "diffpir", "--method", "tmpd", "--draws", "60"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == [
        "method",
        "verdict",
        "bias/sd",
        "variance",
        "50",
        "%",
        "90",
        "%",
        "denoiser",
        "vjp",
        "seconds",
    ]
    assert [line.split()[0] for line in out[1:3]] == ["diffpir", "tmpd"]
    assert out[1].split()[1] == "biased-as-documented"


@pytest.mark.slow
def test_the_twin_of_a_workflow_is_measured_with_its_own_sampler(workspace: Path) -> None:
    """Its prior is a white Gaussian, so its twin is all but itself and a fine walk of MMPS is exact."""
    changes = [
        "sampler={method: mmps, steps: 80, cg: {iterations: 60, tolerance: 1.0e-7}, transition: {kind: SASolver}}"
    ]
    (line,) = selftest(workspace / "w.yaml", draws=64, overrides=changes, workspace=workspace)
    assert (line.method, line.verdict) == ("mmps", "exact")
    assert line.cost is not None and line.cost["denoiser"] == 64 * 80
    assert line.coverage is not None and line.coverage[1] == pytest.approx(0.9, abs=0.04)


def test_a_rough_walk_is_wrong_on_it_and_the_way_out_is_named(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = ["--set", "sampler={method: mmps, steps: 5}"]
    assert main(["selftest", str(workspace / "w.yaml"), "--workspace", str(workspace), "--draws", "32", *changes]) == 1
    said = capsys.readouterr()
    assert "mmps: outside the limits of exact draws; what may help: more cg iterations" in said.out
    assert "mmps: not what is claimed" in said.err


def test_what_cannot_be_measured_is_said() -> None:
    with pytest.raises(InputError, match="there is no method mpms; there are mmps"):
        selftest(methods=["mpms"])
    text = table([Line("a", "refused", why="it needs a mask"), Line("b", "exact", 0.01, 1.0, (0.5, 0.9), COST)])
    assert text.splitlines()[1].split() == ["a", "refused", *"-------"]
    assert text.splitlines()[2].split() == ["b", "exact", "0.010", "1.000", "50.0", "90.0", "8", "4", "0.2"]
    assert text.splitlines()[3] == "a: it needs a mask"


COST = {"denoiser": 8, "vjp": 4, "seconds": 0.2}
