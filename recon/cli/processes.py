"""How a command ends, alone or as one of many processes.

Alone, bad input ends with its message and anything unforeseen with a traceback.  Under MPI a process that just ends leaves the
others waiting for ever, so a failure on any of them, in any thread, ends the whole job.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable

from recon.comm import launched_size
from recon.errors import InputError, ReconError, Stopped

log = logging.getLogger("recon")

EXIT = {InputError: 2, Stopped: 75}
"""Exit codes of the errors that have their own; other failures end with 1."""

_RANKS = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "PALS_RANKID", "MV2_COMM_WORLD_RANK", "SLURM_PROCID")
_COURTESY = 1.0  # seconds by which other ranks let the first speak, when all of them met the same bad input
_PASSING = 1.0  # seconds for the launcher to pass on what was said: it may drop the rest of a job that aborts


def size() -> int:
    """How many processes the launcher announced."""
    return launched_size()[0]


def rank() -> int:
    """The number of this process among them; 0 when alone."""
    if size() == 1:
        return 0
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None:
        return int(mpi.COMM_WORLD.Get_rank())
    return next((int(os.environ[name]) for name in _RANKS if os.environ.get(name, "").isdigit()), 0)


def root() -> bool:
    """True on the process that speaks for all."""
    return rank() == 0


def start_logging(quiet: bool = False) -> None:
    """Send what recon logs to stderr: progress from the first process, warnings from all, whole lines only."""
    name = f"[{rank()}/{size()} {socket.gethostname()}] " if size() > 1 else ""
    handler = logging.StreamHandler()
    handler.setLevel(logging.WARNING if quiet or not root() else logging.INFO)
    handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s {name}%(name)s: %(message)s", "%H:%M:%S"))
    for old in [h for h in log.handlers if getattr(h, "of_command_line", False)]:
        log.removeHandler(old)
    handler.of_command_line = True  # type: ignore[attr-defined]
    log.addHandler(handler)
    log.setLevel(logging.INFO)


def carried_out(command: Callable[[], int | None], debug: bool = False) -> int:
    """Run ``command`` and return the exit code, its own number if it gives one.

    When it fails on one of several processes, the whole job ends.
    """
    if size() > 1:
        threading.excepthook = _thread_failed
    try:
        return command() or 0
    except Stopped as stopped:  # all processes agreed to stop, so nobody waits
        if root():
            _complain(str(stopped))
        return EXIT[Stopped]
    except SystemExit as leaving:
        return _failed(leaving, leaving.code if isinstance(leaving.code, int) else 1, "")
    except KeyboardInterrupt as interrupted:
        return _failed(interrupted, 130, "interrupted")
    except ReconError as error:
        code = next((code for kind, code in EXIT.items() if isinstance(error, kind)), 1)
        return _failed(error, code, _trace(error) if debug else str(error))
    except BaseException as error:
        log.critical("%s", _trace(error))  # to stderr, and to the log of a run that has one
        return _failed(error, 1, "")


def _failed(error: BaseException, code: int, text: str) -> int:
    """Say ``text`` and see to it that no other process goes on waiting."""
    if rank() > 0 and isinstance(error, ReconError):
        time.sleep(_COURTESY)
    if text:
        _complain(text)
    if size() > 1 and "mpi4py.MPI" in sys.modules:
        from mpi4py.run import set_abort_status

        set_abort_status(SystemExit(code))
    return code


def _thread_failed(failure: threading.ExceptHookArgs) -> None:
    """An exception that left a thread: nobody would notice, and the other processes would wait."""
    if failure.exc_value is None or isinstance(failure.exc_value, SystemExit):
        return
    _complain(_trace(failure.exc_value))
    time.sleep(_PASSING)
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None:
        mpi.COMM_WORLD.Abort(1)
    os._exit(1)


def _trace(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)).rstrip()


def _complain(text: str) -> None:
    """One write to stderr, marked with the process when there are several."""
    mark = f"[{rank()}/{size()} {socket.gethostname()}] " if size() > 1 else ""
    sys.stderr.write("".join(f"{mark}{line}\n" for line in f"recon: {text}".splitlines()))
    sys.stderr.flush()
