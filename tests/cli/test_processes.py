"""A failure on one of several processes ends them all, soon, with its own exit code and its own name."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent
MPIEXEC = shutil.which("mpiexec", path=str(BIN)) or shutil.which("mpiexec")
SOON = 20  # seconds; a job that hangs would take for ever

PROGRAM = """
import sys, threading, time
from recon.cli.processes import carried_out, start_logging
from recon.errors import InputError, Stopped
from mpi4py import MPI
world = MPI.COMM_WORLD
rank = world.Get_rank()
def command():
    {body}
    world.Barrier()
    {after}
start_logging()
sys.exit(carried_out(command))
"""

pytestmark = [pytest.mark.mpi, pytest.mark.skipif(MPIEXEC is None, reason="no mpiexec here")]


def job(body: str, after: str = "pass") -> tuple[int, str]:
    """Exit code and stderr of two processes that run ``body`` and then wait for each other."""
    pytest.importorskip("mpi4py")
    start = time.monotonic()
    done = subprocess.run(
        [str(MPIEXEC), "-n", "2", sys.executable, "-c", PROGRAM.format(body=body, after=after)],
        capture_output=True,
        text=True,
        timeout=3 * SOON,
        check=False,
    )
    assert time.monotonic() - start < SOON
    return done.returncode, done.stderr


def test_nothing_wrong() -> None:
    assert job("pass") == (0, "")


def test_an_exception_on_one_process() -> None:
    code, said = job("if rank == 1: raise ZeroDivisionError('a bug')")
    assert code == 1
    assert "ZeroDivisionError: a bug" in said
    assert "[1/2 " in said


def test_bad_input_seen_by_one_process() -> None:
    code, said = job("if rank == 1: raise InputError('the file is wrong')")
    assert code == 2
    assert "recon: the file is wrong" in said
    assert "Traceback" not in said


def test_bad_input_seen_by_all_is_said_once() -> None:
    code, said = job("raise InputError('the file is wrong')")
    assert code == 2
    assert said.count("the file is wrong") == 1
    assert "[0/2 " in said


def test_leaving_on_one_process() -> None:
    assert job("if rank == 1: sys.exit(3)")[0] == 3


def test_an_exception_in_a_thread() -> None:
    code, said = job("if rank == 1: threading.Thread(target=lambda: 1 / 0).start(); time.sleep(60)")
    assert code == 1
    assert "ZeroDivisionError" in said


def test_stopping_together() -> None:
    code, said = job("pass", "raise Stopped('stopped at step 3')")
    assert code == 75
    assert said.count("stopped at step 3") == 1
