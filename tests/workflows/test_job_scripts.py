"""The job scripts: they start, go on, requeue and end as a run's folder and exit code ask; launchers are stand-ins."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from recon.store import shipped

SCRIPTS = shipped() / "workflows"


@pytest.fixture
def launchers(tmp_path: Path) -> Path:
    """srun, mpiexec, scontrol and qsub that write down how they were called; the first two end with $CODE."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, code in (("srun", "${CODE:-0}"), ("mpiexec", "${CODE:-0}"), ("scontrol", "0"), ("qsub", "0")):
        script = folder / name
        script.write_text(f'#!/bin/sh\necho "{name} $*" >> "{tmp_path}/calls"\nexit {code}\n')
        script.chmod(0o755)
    return tmp_path


def submitted(launchers: Path, script: str, code: int, **extra: str) -> tuple[int, list[str]]:
    """Exit code of a job script and the calls it made, for the workflow w.yaml and the folder ``run``."""
    arguments = {"slurm.sh": ["w.yaml", "run"], "pbs.sh": [], "mpiexec.sh": ["2", "w.yaml", "run"]}[script]
    environment = {
        "PATH": f"{launchers / 'bin'}:{os.environ['PATH']}", "CODE": str(code), "SLURM_JOB_ID": "17",
        "SLURM_CPUS_PER_TASK": "4", "WORKFLOW": "w.yaml", "FOLDER": "run", "SCRIPT": "pbs.sh", **extra,
    }  # fmt: skip
    calls = launchers / "calls"
    calls.unlink(missing_ok=True)
    done = subprocess.run(
        ["bash", str(SCRIPTS / script), *arguments], cwd=launchers, env=environment, check=False, capture_output=True
    )
    return done.returncode, calls.read_text().splitlines() if calls.exists() else []


START = {
    "slurm.sh": "srun --cpus-per-task=4 recon run w.yaml --out run",
    "pbs.sh": "mpiexec -n 4 recon run w.yaml --out run",
    "mpiexec.sh": "mpiexec -n 2 recon run w.yaml --out run",
}
AGAIN = {name: call.replace("run w.yaml --out run", "resume run") for name, call in START.items()}
REQUEUE = {
    "slurm.sh": ["scontrol requeue 17"],
    "pbs.sh": ["qsub -v WORKFLOW=w.yaml,FOLDER=run,SCRIPT=pbs.sh pbs.sh"],
    "mpiexec.sh": [],
}
each = pytest.mark.parametrize("script", list(START))


@each
def test_a_first_start(launchers: Path, script: str) -> None:
    assert submitted(launchers, script, 0) == (0, [START[script]])


@each
def test_a_stopped_run_goes_on_and_asks_for_more_time(launchers: Path, script: str) -> None:
    (launchers / "run").mkdir()
    (launchers / "run" / "config.resolved.yaml").write_text("")
    assert submitted(launchers, script, 75) == (75, [AGAIN[script], *REQUEUE[script]])


@each
@pytest.mark.parametrize("code", [1, 2, 3])
def test_a_failure_is_passed_on_and_not_repeated(launchers: Path, script: str, code: int) -> None:
    assert submitted(launchers, script, code) == (code, [START[script]])


@each
def test_a_finished_run_is_left_alone(launchers: Path, script: str) -> None:
    (launchers / "run").mkdir()
    (launchers / "run" / "DONE.json").write_text("{}")
    assert submitted(launchers, script, 1) == (0, [])


def test_slurm_is_asked_for_the_signal_recon_listens_to() -> None:
    text = (SCRIPTS / "slurm.sh").read_text()
    assert "#SBATCH --signal=USR1@300" in text
    assert "#SBATCH --requeue" in text


def test_pbs_sends_the_signal_before_the_end(launchers: Path) -> None:
    (launchers / "bin" / "mpiexec").write_text("#!/bin/sh\ntrap 'kill $!; exit 75' USR1\nsleep 20 &\nwait $!\n")
    code, calls = submitted(launchers, "pbs.sh", 0, SECONDS_TO_RUN="1")
    assert code == 75
    assert calls == REQUEUE["pbs.sh"]
