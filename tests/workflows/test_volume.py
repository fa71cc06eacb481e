"""Volumes as a workflow: whole, on disk, cut over processes; the same bits, the same report, and what is refused."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import xarray as xr
import yaml

from recon.comm import Comm, SerialAxis, serial
from recon.datasets.slices import MU_WATER
from recon.ensemble import Ensemble
from recon.errors import InputError, ReconError, Stopped
from recon.files import sha256
from recon.operators import SliceStack
from recon.priors import Card, NetworkPrior, SlicesPrior, Windowed
from recon.priors.network import Architecture, build_network
from recon.priors.store import save_prior
from recon.runs import Checkpoints
from recon.samplers.volumes.ztv import Coupling
from recon.schedules import Schedule
from recon.space import Space
from recon.workflows import forecast, pipeline, volumes
from recon.workflows.problem import prepare
from recon.workflows.schema import load_workflow

MPIEXEC = Path(sys.executable).parent / "mpiexec"
FACTS = {
    "data": (), "held_out": (), "denoising": (), "unfit_for": "use", "weights_licence": "CC0",
    "budget": {"images": 0, "seconds": 0.0, "precision": "float32"}, "notes": (),
}  # fmt: skip
WORKFLOW = """\
problem:
  dataset: body
  index: 1
  operator: {type: parallel_beam, views: 6}
  noise: {counts: 1.0e5}
prior: {name: rough, slices: {count: 6}}
sampler: {method: dds, steps: 3, coupling: {slope_per_mm: 0.5}, cg: {iterations: 2}}
draws: 2
baselines: [fbp]
checkpoint_every: 1.0e-3
"""
ON_DISK = "run.memory_gb=100"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace: a 16 x 16 prior of random weights, and a volume of 8 slices of 16 x 16, once without their distance."""
    folder = tmp_path_factory.mktemp("volumes")
    network = build_network(Architecture(family="drunet", size=16, channels=(4, 4, 4, 4), blocks=1))
    generator = torch.Generator().manual_seed(0)
    for p in network.parameters():
        p.data.copy_(0.1 * torch.randn(p.shape, generator=generator))
    flat = Space(("y", "x"), (16, 16), {}, "1/m")
    card = Card("rough", "", FACTS)
    prior = NetworkPrior(flat, Schedule(0.01, 20.0), card, network, sigma_data=0.5, shift=18.0, scale=16.0)
    save_prior(folder / "priors" / "rough", prior)
    rng, (y, x) = np.random.default_rng(0), np.mgrid[:16, :16] - 7.5
    disc = np.stack([np.where(np.hypot(y, x - k / 4) < 6, 0.0, -1000.0) for k in range(8)])
    with h5py.File(folder / "body.h5", "w") as file:
        file["hu"] = (disc + 20 * rng.standard_normal(disc.shape)).astype(np.int16)
        file["wide"] = np.full((4, 12, 20), 0, np.int16)
        file["large"] = np.full((3, 32, 32), 0, np.int16)
    (folder / "datasets").mkdir()
    for name, more in {
        "body": {"slice_mm": 3.0}, "pile": {}, "up": {"slice_mm": 3.0, "bottom_up": True},
        "wide": {"key": "wide", "slice_mm": 2.0}, "large": {"key": "large", "slice_mm": 2.0},
    }.items():  # fmt: skip
        facts = {"reader": "hdf5_slices", "file": str(folder / "body.h5"), "key": "hu", "unit": "HU", "pixel_mm": 2.0}
        facts |= {"use": "test", "summary": "made up", "licence": "CC0", "source": "drawn", **more}
        facts["sha256"] = sha256(folder / "body.h5")
        (folder / "datasets" / f"{name}.yaml").write_text(yaml.safe_dump(facts))
    (folder / "w.yaml").write_text(WORKFLOW)
    return folder


def run(lab: Path, out: Path, *changes: str) -> Path:
    return pipeline.run(lab / "w.yaml", out, changes, overwrite=True, workspace=lab)


def job(lab: Path, *changes: str, **more: Any):
    return prepare(load_workflow(lab / "w.yaml", changes, lab), **more)


PAGES = {name: getattr(pipeline, name) for name in ("write_report", "examined")}


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are drawn, though the module leaves them out."""
    for name, own in PAGES.items():
        monkeypatch.setattr(pipeline, name, own)


@pytest.fixture(scope="module")
def pages_left_out() -> Iterator[None]:
    """No figures are drawn, which takes most of a run here."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pipeline, "write_report", lambda evidence, folder: (folder / "report.html").touch())
        patched.setattr(pipeline, "examined", lambda *_: {})
        yield


@pytest.fixture
def by_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for two slices at a time."""
    monkeypatch.setattr(volumes.Need, "depth", lambda self, memory: 2)


@pytest.fixture(scope="module")
def whole(lab: Path, tmp_path_factory: pytest.TempPathFactory, pages_left_out: None) -> Path:
    """The run in memory, without its pages."""
    return run(lab, tmp_path_factory.mktemp("runs") / "whole")


def bits(folder: Path) -> dict[str, bytes]:
    """Every array of an ensemble file."""
    with xr.open_datatree(folder / "ensemble.nc") as tree:
        return {f"{g}{n}": tree[g][n].values.tobytes() for g in ("/", "/posterior") for n in tree[g].variables}


def test_a_volume_from_file_to_evidence(whole: Path) -> None:
    root = xr.open_dataset(whole / "ensemble.nc")
    assert root["mean"].dims == ("z", "y", "x")
    assert np.allclose(root["z"], (np.arange(6) - 2.5) * 3.0) and root["z"].attrs["units"] == "mm"
    facts = json.loads((whole / "facts.json").read_text())
    assert "6 views" in facts["operator"] and "6 slices" in facts["operator"]
    assert facts["cost"]["denoiser"] == 2 * 3
    with xr.open_datatree(whole / "evidence.nc") as tree:
        assert tree["image"]["baseline"].shape == (1, 6, 16, 16)


def test_on_disk_the_bits_are_the_same(lab: Path, whole: Path, tmp_path: Path, by_two: None) -> None:
    found = run(lab, tmp_path / "a", ON_DISK)
    assert bits(found) == bits(whole)
    assert Ensemble.load(found / "ensemble.nc").x.shape == (2, 6, 16, 16)
    ours, theirs = (xr.open_dataset(f / "measurement.nc") for f in (found, whole))
    assert all(np.array_equal(ours[n].values, theirs[n].values) for n in ("value", "truth", "blank"))
    with h5py.File(found / "ensemble.nc") as file:
        assert file["mean"].chunks == (1, 16, 16), "a chunk is one slice, and has one owner"
        assert file["posterior/value"].chunks == (1, 1, 1, 16, 16)
    facts = json.loads((found / "shown" / "facts.json").read_text())
    assert any("slices 2 to 3 of 6" in text for text in facts["warnings"])
    assert json.loads((found / "DONE.json").read_text())["draws"] == 2
    assert (found / "report.html").is_file() and not volumes.scratch_of(found).exists()


class Halted(Checkpoints):
    """Asked to stop after the second step."""

    def after_step(self, done: int, steps: int, states: dict[int, Any]) -> None:
        self.stop = done == 2
        super().after_step(done, steps, states)


@pytest.mark.parametrize("change", [ON_DISK, "run=null"])
def test_stopped_and_resumed_the_bits_are_the_same(
    lab: Path, whole: Path, tmp_path: Path, by_two: None, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "Checkpoints", Halted)
        with pytest.raises(Stopped):
            run(lab, tmp_path / "a", change)
    assert (tmp_path / "a" / "checkpoints" / "manifest.json").is_file()
    scratch = volumes.scratch_of(tmp_path / "a")
    scratch.mkdir(exist_ok=True)
    (scratch / "field-left.bin").write_bytes(b"of a process that was killed")
    assert bits(pipeline.resume(tmp_path / "a")) == bits(whole)
    assert not scratch.exists()


def test_a_disk_that_is_full_while_results_are_written(lab: Path, whole: Path, tmp_path: Path, by_two: None) -> None:
    """A quota between the size of a field and of the result: what was sampled is not lost."""
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        with pytest.raises(ReconError, match=r"no room left on the disk of .*recon resume"):
            run(lab, tmp_path / "a", ON_DISK, "draws=6")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    left = {p.name for p in (tmp_path / "a").iterdir()}
    assert "ensemble.nc" not in left and "DONE.json" not in left and not any(n.endswith(".tmp") for n in left)
    again = pipeline.resume(tmp_path / "a")
    mean = Ensemble.load(again / "ensemble.nc").x[:2]
    assert torch.equal(mean, Ensemble.load(whole / "ensemble.nc").x)


def test_slices_that_are_not_the_grid_of_the_prior(lab: Path) -> None:
    wide = ("problem.dataset=wide", "problem.index=0", "prior.slices.count=4")
    with pytest.raises(InputError, match=r"12 x 20 pixels; prior 'rough' has 16 x 16.*problem.fit: pad .* or resample"):
        job(lab, *wide)
    with pytest.raises(InputError, match=r"slices of 12 x 20 pixels cannot be padded to 16 x 16; resample them"):
        job(lab, *wide, "problem.fit=pad")
    made = job(lab, *wide, "problem.fit=resample")
    truth, space = made.measurement.truth, made.posterior.space
    assert truth.shape == (4, 16, 16) and space.spacing("x") == pytest.approx(2e-3 * 20 / 16)
    assert space.spacing("z") == pytest.approx(2e-3)
    # Water of 24 x 40 mm in air of 40 x 40 mm: what is resampled keeps its mass.
    area = float(truth[0].sum()) * space.spacing("x") * space.spacing("y")
    assert area == pytest.approx(MU_WATER * 24e-3 * 40e-3, rel=0.02)
    assert "resampled to 16 x 16" in made.notes["data"]
    padded = job(lab, "problem.fit=pad", "problem.dataset=body").measurement.truth
    assert torch.equal(padded, job(lab).measurement.truth), "slices that fit are left alone"
    turned = job(lab, "problem.dataset=up").measurement.truth
    assert torch.equal(turned.flip(1), job(lab).measurement.truth)


def test_slices_larger_than_the_prior(lab: Path) -> None:
    """Windows within every slice: each is denoised as by itself."""
    made = job(lab, "prior.tile={shape: [32, 32], overlap: 8}", "problem.dataset=large", "prior.slices.count=2")
    assert isinstance(made.prior, SlicesPrior) and isinstance(made.prior.prior, Windowed)
    assert made.posterior.space.shape == (2, 32, 32)
    z = torch.linspace(-1, 1, 2 * 32 * 32).reshape(1, 2, 32, 32)
    assert torch.equal(made.prior.denoise(z, 1.0)[0, 1:], made.prior.prior.denoise(z[0, 1:], 1.0))


def test_what_is_refused(lab: Path) -> None:
    with pytest.raises(InputError, match=r"does not say how far apart its slices are \(slice_mm\).*coupling.weight: 0"):
        job(lab, "problem.dataset=pile")
    assert job(lab, "problem.dataset=pile", "sampler.coupling={weight: 0.0}").posterior.space.shape == (6, 16, 16)
    with pytest.raises(InputError, match=r"8 slices, numbered from 0, 9 of them are asked for; ask for 7"):
        job(lab, "prior.slices.count=9")
    with pytest.raises(InputError, match=r"run.memory_gb is 0.001, and 1 slice\(s\) of .* at a time take about"):
        job(lab, "run.memory_gb=0.001")
    with pytest.raises(InputError, match=r"needs a sampler that works by slices .*; MMPS wants whole volumes"):
        job(lab, "run.memory_gb=9", "sampler={method: mmps, steps: 3}")
    with pytest.raises(InputError, match=r"run.memory_gb takes the gaussian likelihood"):
        job(lab, "run.memory_gb=9", "likelihood=transmission")
    with pytest.raises(InputError, match=r"run.memory_gb is for volumes"):
        job(lab, "run.memory_gb=9", "prior=rough")
    with pytest.raises(InputError, match=r"shared by processes \(slabs\) or stays on disk \(memory_gb\), not both"):
        load_workflow(lab / "w.yaml", ["run={slabs: 2, memory_gb: 1.0}"], lab)
    workflow = load_workflow(lab / "w.yaml", ["run={slabs: 2}"], lab)
    with pytest.raises(InputError, match=r"there is 1 process\(es\): start recon with mpiexec -n 2"):
        volumes.cut(serial(1), workflow)
    with pytest.raises(InputError, match=r"has 6 slices across 'z', fewer than the 7 ranks .* use at most 6"):
        job(lab, "run={slabs: 7}", comm=Comm(slab=SerialAxis(0, 7)))
    with pytest.raises(InputError, match=r"weight or a positive slope_per_mm, not both"):
        Coupling(1.0, slope_per_mm=1.0)
    assert Coupling(slope_per_mm=0.5).on(job(lab).posterior.space, "x") == pytest.approx(1 / 500)


@pytest.mark.parametrize("noise", ["{counts: 1.0e5}", "{relative: 0.02}"])
def test_every_rank_measures_its_slices_of_the_same_volume(lab: Path, noise: str) -> None:
    whole = job(lab, f"problem.noise={noise}")
    assert isinstance(whole.operator, SliceStack)
    parts = [job(lab, f"problem.noise={noise}", "run={slabs: 4}", comm=Comm(slab=SerialAxis(k, 4))) for k in range(4)]
    assert [len(p.measurement.values) for p in parts] == [1, 2, 1, 2]
    assert torch.equal(torch.cat([p.measurement.values for p in parts]), whole.measurement.values)
    assert torch.equal(torch.cat([p.measurement.truth for p in parts]), whole.measurement.truth)
    sigma = [p.posterior.likelihood.sigma for p in parts]
    assert torch.equal(torch.cat(sigma) if sigma[0].ndim else sigma[3], whole.posterior.likelihood.sigma)


def test_check_grows_a_few_slices_to_the_whole(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds and bytes of four slices, times six fourths."""
    monkeypatch.setattr(forecast, "_step_seconds", lambda job, draws: float(job.posterior.space.shape[0]))
    text = pipeline.check(lab / "w.yaml", ["draws=1"], lab)
    assert "6.00 s a step and block" in text and "about 18 s" in text
    assert "6 slices of the volume in each" in text
    disk = pipeline.check(lab / "w.yaml", ["run.memory_gb=50"], lab)
    assert "GB of 50, 6 of 6 slices at a time" in disk and "on disk" in disk
    with pytest.raises(InputError, match=r"run.memory_gb is 0.01; 1 slice\(s\) at a time take"):
        pipeline.check(lab / "w.yaml", ["run.memory_gb=0.01"], lab)


@pytest.mark.slow
@pytest.mark.parametrize("change", ["run=null", ON_DISK])
def test_the_pages_of_a_volume(lab: Path, tmp_path: Path, by_two: None, pages: None, change: str) -> None:
    """Of the whole, or of the part that memory holds; written again from the files."""
    found = run(lab, tmp_path / "a", change)
    page = (found / "report.html").read_text()
    assert "orthogonal cuts" in page.lower() and "FBP" in page
    assert ("the pages show slices 2 to 3 of 6" in page) == (change == ON_DISK)
    (found / "report.html").unlink()
    assert pipeline.report(found).read_text() == page


@pytest.mark.slow
@pytest.mark.mpi
@pytest.mark.skipif(not MPIEXEC.exists(), reason="needs the mpiexec of the mpich wheel beside this python")
def test_two_processes_share_a_volume(lab: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "a"
    words = [
        sys.executable,
        "-m",
        "recon",
        "run",
        lab / "w.yaml",
        "--workspace",
        lab,
        "--set",
        "run.slabs=2",
        "--out",
        out,
    ]
    done = subprocess.run(
        [MPIEXEC, "-n", "2", *map(str, words)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert bits(out) == bits(whole)
    assert (out / "report.html").is_file()
