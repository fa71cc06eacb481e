"""``start:`` in a workflow: what is accepted and refused, where, and that draws begin at what it names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from recon.baselines import TVSolver
from recon.draws import Draws
from recon.ensemble import Ensemble
from recon.errors import InputError
from recon.samplers import MMPS, WarmStart, sample
from recon.workflows import comparison, pipeline
from recon.workflows.comparison import untold
from recon.workflows.problem import Job, prepare
from recon.workflows.provenance import identity
from recon.workflows.schema import json_schema, load_workflow, resolved
from recon.workflows.start import started

BRIEF = ("sampler.steps=4", "draws=3", "baselines=[]")


def written(workspace: Path, start: str, sampler: str = "{method: mmps, steps: 12}") -> Path:
    """The workflow of the workspace with another sampler and a start on its last line, beside the original."""
    text = (workspace / "w.yaml").read_text().replace("{method: mmps, steps: 12}", sampler)
    path = workspace / "warm.yaml"
    path.write_text(f"{text}start: {start}\n")
    return path


def job(workspace: Path, start: str, *overrides: str) -> Job:
    workflow = load_workflow(written(workspace, start), overrides, workspace)
    return started(workflow, prepare(workflow, warm=True))


@pytest.fixture(scope="module")
def run(workspace: Path) -> Path:
    """What is read of a finished run, three draws, in the folder ``runs/cold`` of the workspace."""
    made, folder = prepare(load_workflow(workspace / "w.yaml", BRIEF, workspace)), workspace / "runs" / "cold"
    folder.mkdir(parents=True)
    sample(made.posterior, made.sampler, draws=3, seed=5).save(folder / "ensemble.nc")
    return folder


@pytest.mark.parametrize(
    ("start", "sampler", "column", "text"),
    [
        ("{baseline: tv}", "{method: mmps}", 8, "start.sigma: this key is missing"),
        ("{baseline: tv, sigma: 0}", "{method: mmps}", 30, "start.sigma: expected a number > 0; got 0"),
        ("{baseline: fpb, sigma: 1}", "{method: mmps}", 19, "did you mean 'fbp'?"),
        ("{sigma: 0.3}", "{method: mmps}", 8, "start: expected exactly one of baseline, run, file; got none"),
        ("{baseline: tv, file: a.npy, sigma: 1}", "{method: mmps}", 8, "got baseline, file"),
        ("{baseline: tv, draws: true, sigma: 1}", "{method: mmps}", 8, "draws are those of a run"),
        ("{file: a.png, sigma: 1}", "{method: mmps}", 15, "start.file: expected a .npy file; got 'a.png'"),
        ("{baseline: tv, at: 1}", "{method: mmps}", 23, "unknown key"),
        (
            "{baseline: tv, sigma: 1}",
            "{method: reddiff}",
            8,
            "start: REDDiff cannot start in the middle: its first state",
        ),
        (
            "{baseline: tv, sigma: 1}",
            "{method: twistedsmc}",
            8,
            "start: TwistedSMC cannot start in the middle: its draws",
        ),
        ("{baseline: tv, sigma: 1}", "{method: mmps, sigma_max: 3}", 8, "leave sampler.sigma_max out"),
        ("{baseline: tv, sigma: 1}", "{method: mmps, sigma_min: 2}", 8, "lies below sampler.sigma_min 2"),
        ("{run: nowhere, sigma: 1}", "{method: mmps}", 14, "start.run: there is no finished run in"),
        ("{file: no.npy, sigma: 1}", "{method: mmps}", 15, "start.file: there is no file"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_line(
    workspace: Path, start: str, sampler: str, column: int, text: str
) -> None:
    path = written(workspace, start, sampler)
    line = len(path.read_text().splitlines())
    with pytest.raises(InputError) as caught:
        load_workflow(path, (), workspace)
    assert f"warm.yaml:{line}:{column}: " in str(caught.value) and text in str(caught.value)


def test_it_is_in_the_schema_and_comes_back_from_what_is_written_out(
    workspace: Path, run: Path, tmp_path: Path
) -> None:
    assert "start" in json_schema()["properties"] and "Start" in json_schema()["$defs"]
    workflow = load_workflow(written(workspace, "{run: runs/cold, draws: true, sigma: 0.25}"), (), workspace)
    assert workflow.start is not None and workflow.start.run == str(run.resolve()) and workflow.start.draws
    (tmp_path / "again.yaml").write_text(resolved(workflow))
    assert load_workflow(tmp_path / "again.yaml") == workflow
    cold = load_workflow(workspace / "w.yaml", (), workspace)
    assert cold.start is None and "start" not in resolved(cold)
    assert load_workflow(written(workspace, "{baseline: tv, sigma: 1}"), ["start=null"], workspace) == cold


def test_a_baseline_is_made_of_the_data_alone(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weight of TV is the one that the data choose, not the one that comes closest to the truth that is known here."""
    monkeypatch.setattr(comparison, "_WEIGHTS", (0.1, 30.0))
    monkeypatch.setattr(comparison, "_SOLVER", TVSolver(iterations=60, tolerance=3e-2))
    warm = job(workspace, "{baseline: tv, sigma: 0.3}")
    assert isinstance(warm.sampler, WarmStart) and warm.sampler.of == MMPS(steps=12, sigma_max=0.3)
    cold = prepare(load_workflow(workspace / "w.yaml", (), workspace))
    cold.measurement.truth.mul_(-1)  # type: ignore[union-attr]
    name, x = untold("tv", cold)
    assert name == "TV" and torch.equal(warm.sampler.x, x)
    assert any("start from the TV image, with noise of 0.3" in text for text in warm.warnings)


def test_what_the_data_cannot_give_is_refused_before_it_is_made(workspace: Path) -> None:
    with pytest.raises(InputError, match=r"start\.baseline: sense cannot be made of the data of ParallelBeam"):
        job(workspace, "{baseline: sense, sigma: 0.3}")
    with pytest.raises(InputError, match="good for noise levels 0.002 to 80"):
        job(workspace, "{baseline: tv, sigma: 90}")


def test_a_file_is_an_array_in_physical_units(workspace: Path) -> None:
    image = np.linspace(0, 30, 1024).reshape(32, 32)
    np.save(workspace / "image.npy", image)
    warm = job(workspace, "{file: image.npy, sigma: 0.01}", "sampler.steps=2", "draws=2")
    assert isinstance(warm.sampler, WarmStart)
    np.testing.assert_array_equal(warm.sampler.x.numpy(), image)
    state = warm.sampler.init(warm.posterior, Draws(0, range(2)))
    away = (state.z - warm.prior.encode(torch.from_numpy(image).float())) / 0.01
    assert 0.9 < float(away.std()) < 1.1
    for wrong, text in ((image[:5], r"holds \(5, 32\); expected \(y=32, x=32\)"), (image * np.nan, "finite values")):
        np.save(workspace / "image.npy", wrong)
        with pytest.raises(InputError, match=text):
            job(workspace, "{file: image.npy, sigma: 0.01}")
    np.save(workspace / "image.npy", image + 1j)
    with pytest.raises(InputError, match="one array of real numbers"):
        job(workspace, "{file: image.npy, sigma: 0.01}")
    (workspace / "image.npy").write_text("no array")
    with pytest.raises(InputError, match="no readable .npy file"):
        job(workspace, "{file: image.npy, sigma: 0.01}")


def test_a_run_starts_another_with_other_noise(workspace: Path, run: Path) -> None:
    found = Ensemble.load(run / "ensemble.nc")
    mean = job(workspace, "{run: runs/cold, sigma: 0.3}", "draws=16")
    each = job(workspace, "{run: runs/cold, draws: true, sigma: 0.3}", "draws=3")
    assert isinstance(mean.sampler, WarmStart) and isinstance(each.sampler, WarmStart)
    assert torch.equal(mean.sampler.x, found.mean()) and torch.equal(each.sampler.x, found.x)
    assert mean.sampler.frame == each.sampler.frame == 1
    with pytest.raises(InputError, match=r"start\.draws: .*holds 3 draws; this workflow asks for 4"):
        job(workspace, "{run: runs/cold, draws: true, sigma: 0.3}", "draws=4")


@pytest.mark.slow
def test_a_warm_run_is_whole_says_so_and_can_start_the_next(workspace: Path, run: Path) -> None:
    path = written(workspace, "{run: runs/cold, draws: true, sigma: 0.3}")
    out = pipeline.run(path, workspace / "runs" / "warm", BRIEF, workspace=workspace)
    info = Ensemble.load(out / "ensemble.nc").info["sampler"]
    assert info["method"] == "warmstart" and info["fields"]["of"]["method"] == "mmps"
    assert "remember it" in (out / "report.html").read_text()
    follows = job(workspace, "{run: runs/warm, sigma: 0.3}")
    assert isinstance(follows.sampler, WarmStart) and follows.sampler.frame == 2
    assert "WarmStart" in pipeline.check(path, BRIEF, workspace)


def test_a_start_that_changed_is_another_run(workspace: Path) -> None:
    """What is read from a file is part of the identity that a checkpoint must have."""
    seen = []
    for value in (20.0, 20.0, 21.0):
        np.save(workspace / "image.npy", np.full((32, 32), value))
        workflow = load_workflow(written(workspace, "{file: image.npy, sigma: 0.1}"), (), workspace)
        seen.append(identity(workflow, started(workflow, prepare(workflow, warm=True))))
    assert seen[0] == seen[1] != seen[2]


def test_commands_that_sample_from_noise_do_not_pass_over_it(workspace: Path) -> None:
    workflow = load_workflow(written(workspace, "{baseline: fbp, sigma: 0.1}"), (), workspace)
    with pytest.raises(InputError, match="leave it out with --set start=null"):
        prepare(workflow)
