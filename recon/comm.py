"""Who holds which blocks: one process, or many under MPI, behind the same few calls.

Two axes: *draws* (blocks of draws live on different ranks and meet only when they must) and *slab* (one volume cut over
ranks).  Serial is size 1 on both.  MPI is imported only when a launcher announces more than one process, and then any failure
is an error: recon never falls back to N serial copies.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from recon.errors import InputError, ReconError

if TYPE_CHECKING:
    import numpy as np

# What each launcher tells its children; SLURM_STEP_ID is set by srun only, SLURM_NTASKS alone also by salloc.
_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "PALS_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")


class Axis(Protocol):
    """One direction of distribution; every call is collective over it."""

    @property
    def rank(self) -> int:
        """Number of this process along the axis."""

    @property
    def size(self) -> int:
        """Processes along the axis."""

    def barrier(self) -> None:
        """Wait for everyone."""

    def bcast(self, value: Any) -> Any:  # noqa: ANN401  (any picklable value)
        """The value of rank 0, on every rank."""

    def allgather(self, value: Any) -> list[Any]:  # noqa: ANN401
        """Every rank's value, in rank order, on every rank."""

    def any(self, flag: bool) -> bool:
        """True on every rank when it is true on one."""

    def exchange(self, parcels: list[np.ndarray]) -> list[np.ndarray]:
        """Send ``parcels[rank]`` (bytes, any length) to each rank; what came from each, in rank order."""


@dataclass(frozen=True)
class SerialAxis:
    """The twin of an MPI axis for a single process."""

    rank: int = 0
    size: int = 1

    def barrier(self) -> None:
        """Nobody to wait for."""

    def bcast(self, value: Any) -> Any:  # noqa: ANN401
        """The value itself."""
        return value

    def allgather(self, value: Any) -> list[Any]:  # noqa: ANN401
        """The only value."""
        return [value]

    def any(self, flag: bool) -> bool:
        """The flag itself."""
        return flag

    def exchange(self, parcels: list[np.ndarray]) -> list[np.ndarray]:
        """The only parcel comes back."""
        return list(parcels)


class MPIAxis:
    """An mpi4py communicator as an axis."""

    def __init__(self, communicator: Any) -> None:  # noqa: ANN401  (mpi4py is not typed)
        self.communicator = communicator
        self.rank, self.size = communicator.Get_rank(), communicator.Get_size()

    def barrier(self) -> None:
        """Wait for everyone."""
        self.communicator.Barrier()

    def bcast(self, value: Any) -> Any:  # noqa: ANN401
        """The value of rank 0, on every rank."""
        return self.communicator.bcast(value, root=0)

    def allgather(self, value: Any) -> list[Any]:  # noqa: ANN401
        """Every rank's value, in rank order."""
        return list(self.communicator.allgather(value))

    def any(self, flag: bool) -> bool:
        """True on every rank when it is true on one."""
        return any(self.communicator.allgather(bool(flag)))

    def exchange(self, parcels: list[np.ndarray]) -> list[np.ndarray]:
        """Send ``parcels[rank]`` to each rank; what came from each.  A parcel of no bytes is not sent."""
        import numpy as np
        from mpi4py import MPI

        sizes = self.communicator.alltoall([parcel.nbytes for parcel in parcels])
        received = [np.empty(size, np.uint8) for size in sizes]
        others = [rank for rank in range(self.size) if rank != self.rank]
        received[self.rank] = parcels[self.rank]
        waiting = [self.communicator.Irecv(received[r], source=r) for r in others if sizes[r]]
        waiting += [self.communicator.Isend(parcels[r], dest=r) for r in others if parcels[r].nbytes]
        MPI.Request.Waitall(waiting)
        return received


@dataclass(frozen=True)
class Comm:
    """The two axes of a run, and how many blocks this process works on at a time.

    workers: threads that compute blocks side by side.  A block is always computed with one thread, so neither workers nor
    ranks change a single bit of the result.
    """

    draws: Axis = field(default_factory=SerialAxis)
    slab: Axis = field(default_factory=SerialAxis)
    workers: int = 1

    @property
    def root(self) -> bool:
        """True on the one process that writes shared files and talks to the user."""
        return self.draws.rank == 0 and self.slab.rank == 0

    def cut(self, slabs: int) -> Comm:
        """The same processes on both axes: every ``slabs`` in a row share the volumes of one rank of draws.

        Ranks of one slab talk within a step and so in one order: a process then works on one block at a time.  Collective.
        Raises InputError when the processes are not a multiple of ``slabs``, or are on both axes already.
        """
        axis = self.draws
        if slabs < 1 or axis.size % slabs or self.slab.size > 1:
            raise InputError(
                f"{axis.size} processes cannot be cut into volumes of {slabs} slabs each"
                + (f" on top of {self.slab.size} slabs" if self.slab.size > 1 else "")
            )
        if isinstance(axis, MPIAxis):
            group, place = divmod(axis.rank, slabs)
            draws, slab = (MPIAxis(axis.communicator.Split(color, axis.rank)) for color in (place, group))
            return Comm(draws, slab)
        return Comm(axis, self.slab)

    def everyone(self, value: Any) -> list[Any]:  # noqa: ANN401  (any picklable value)
        """The value of every process, on both axes, in one order; collective."""
        return [one for row in self.slab.allgather(self.draws.allgather(value)) for one in row]

    def barrier(self) -> None:
        """Wait for all processes, on both axes."""
        self.everyone(None)

    def owned(self, blocks: int) -> range:
        """The blocks of this rank, dealt like cards: rank, rank + size, ..."""
        return range(self.draws.rank, blocks, self.draws.size)


def launched_size(environ: Mapping[str, str] | None = None) -> tuple[int, str]:
    """How many processes a launcher announces, and the variable that says so; (1, "") without one."""
    environ = os.environ if environ is None else environ
    for name in _SIZES:
        if name.startswith("SLURM") and "SLURM_STEP_ID" not in environ:
            continue
        if environ.get(name, "").isdigit():
            return int(environ[name]), name
    return 1, ""


def serial(workers: int | None = None) -> Comm:
    """One process; ``workers`` threads (default: the cores it may use)."""
    return Comm(workers=workers or cores())


def from_environment() -> Comm:
    """The communicator of this process: MPI when a launcher announces more than one, else serial.

    Raises ReconError when a launcher announces several processes and MPI cannot be loaded or sees only one.
    """
    size, variable = launched_size()
    if size == 1:
        return serial()
    way_out = (
        "install mpi4py against the site's MPI (pip install mpi4py), or the wheel pair (pip install 'recon[mpi-wheel]') "
        "and its own mpiexec; `recon doctor` shows what was found"
    )
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py is there and no libmpi
        raise ReconError(f"{variable}={size}, but MPI cannot be loaded ({error}); {way_out}") from error
    world = MPI.COMM_WORLD
    if world.Get_size() == 1:
        library = MPI.Get_library_version().splitlines()[0].strip()
        raise ReconError(
            f"the launcher announces {variable}={size}, but the MPI library {library!r} sees one process: "
            f"mpiexec and library do not belong together; {way_out}"
        )
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    available = cores()
    # Bound ranks already see only their own cores; unbound ranks of a node share what they see.
    shared = node.allreduce(available, op=MPI.MIN) >= (os.cpu_count() or 1)
    workers = max(1, available // node.Get_size()) if shared else available
    return Comm(draws=MPIAxis(world), workers=workers)


def cores() -> int:
    """Cores this process may use: OMP_NUM_THREADS or SLURM_CPUS_PER_TASK when set, else its affinity mask."""
    for name in ("OMP_NUM_THREADS", "SLURM_CPUS_PER_TASK"):
        if os.environ.get(name, "").isdigit() and int(os.environ[name]) > 0:
            return int(os.environ[name])
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
