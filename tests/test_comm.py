"""Who holds what, and never N serial copies by accident."""

from __future__ import annotations

import subprocess
import sys

import pytest

from recon.comm import Comm, SerialAxis, launched_size, serial


class Ranked(SerialAxis):
    """A serial axis that says it is one of several."""


def test_blocks_are_dealt_once_each() -> None:
    owned = [b for rank in range(3) for b in Comm(draws=SerialAxis(rank, 3)).owned(8)]
    assert sorted(owned) == list(range(8))


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, (1, "")),
        ({"PMI_SIZE": "4"}, (4, "PMI_SIZE")),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, (2, "OMPI_COMM_WORLD_SIZE")),
        ({"SLURM_STEP_NUM_TASKS": "8"}, (1, "")),  # an allocation without srun
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_ID": "0"}, (8, "SLURM_STEP_NUM_TASKS")),
        ({"PMI_SIZE": "many"}, (1, "")),
    ],
)
def test_launchers(environ: dict[str, str], expected: tuple[int, str]) -> None:
    assert launched_size(environ) == expected


def test_serial_is_its_own_world() -> None:
    comm = serial(3)
    assert comm.root and comm.workers == 3 and comm.draws.allgather("a") == ["a"] and comm.draws.any(True)
    comm.draws.barrier()


@pytest.mark.parametrize(
    ("prepare", "text"),
    [
        ("import sys; sys.modules['mpi4py'] = None", "PMI_SIZE=4, but MPI cannot be loaded"),
        ("", "the launcher announces PMI_SIZE=4, but the MPI library .* sees one process"),
    ],
)
def test_a_launch_without_working_mpi_is_an_error(prepare: str, text: str) -> None:
    pytest.importorskip("mpi4py.MPI", exc_type=Exception) if not prepare else None
    # Open MPI's variables hidden from MPICH and the reverse: the library starts alone, as with a foreign mpiexec.
    code = (
        f"{prepare}\nimport os; os.environ['PMI_SIZE'] = '4'\n"
        "import recon.comm as c\n"
        "from recon.errors import ReconError\n"
        "try: c.from_environment()\nexcept ReconError as e: print(e)"
    )
    if not prepare:  # the library reads PMI_SIZE at start: set it after MPI has started
        code = "from mpi4py import MPI\n" + code
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    import re

    assert re.search(text, done.stdout), done.stdout + done.stderr
