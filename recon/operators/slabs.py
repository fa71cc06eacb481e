r"""One volume cut along an axis over ranks: who holds which slices, what neighbours tell each other, sums in slice order.

A rank holds the slices ``first .. last - 1``.  Differences along the axis,

.. math::  (D x)_k = (x_{k+1} - x_k) / |z_{k+1} - z_k|,

belong to the rank of slice ``k``; what it needs of its neighbours is one slice (``neighbours``), and no other slice travels.
Inner products are sums of one number per slice, which every rank gathers and adds in the order of the slices: the same bits
whatever the number of ranks, provided that the same holds for what is done within a slice.

A ``Slab`` of one rank is a whole volume, so the serial program and the distributed one are the same.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from recon.comm import Axis, SerialAxis
from recon.draws import Draws, Stream
from recon.errors import InputError, ReconError
from recon.operators.base import LinearOperator
from recon.space import Space


class Slab:
    """The slices of ``whole`` across ``axis`` that one of the ranks along ``ranks`` holds.

    space: of this rank's part.  first, last: its slices are ``first .. last - 1`` of ``slices``, dealt as evenly as they go.
    traffic: what this rank has received so far, in "slices", "bytes" of slices and "reductions" (global sums).

    Slices of several draws are counted by the draw: a halo for n draws is n slices.  Ranks talk in one order, so a volume that
    is cut takes one thread (``Comm.cut`` sets that).

    Raises InputError without that axis, or with fewer slices than ranks.
    """

    def __init__(self, whole: Space, axis: str = "z", ranks: Axis | None = None) -> None:
        self.ranks: Axis = ranks or SerialAxis()
        if axis not in whole.dims:
            raise InputError(f"{whole.describe()} has no axis {axis!r} to be cut along")
        self.whole, self.axis, self.at = whole, axis, whole.dims.index(axis)
        self.slices, rank, size = whole.shape[self.at], self.ranks.rank, self.ranks.size
        if self.slices < size:
            raise InputError(
                f"{whole.describe()} has {self.slices} slices across {axis!r}, fewer than the {size} ranks that are to share "
                f"them; use at most {self.slices}"
            )
        self.first, self.last = rank * self.slices // size, (rank + 1) * self.slices // size
        self.space = portion(whole, self.at, slice(self.first, self.last))
        self.traffic: Counter[str] = Counter()
        self._thread: int | None = None

    @property
    def alone(self) -> bool:
        """Whether this rank holds the whole volume."""
        return self.ranks.size == 1

    def cut(self, x: Tensor) -> Tensor:
        """This rank's part of whole volumes, (*batch, *whole.shape)."""
        self.whole.require(tuple(x.shape), "Slab.cut")
        return x.narrow(self.at - len(self.whole.shape), self.first, self.last - self.first)

    def gather(self, x: Tensor) -> Tensor:
        """Whole volumes on every rank, from each rank's part (*batch, *space.shape); for results, not for steps."""
        self.space.require(tuple(x.shape), "Slab.gather")
        if self.alone:
            return x
        self._mine()
        parts = self.ranks.allgather(x.detach().cpu().numpy())
        return torch.cat([torch.from_numpy(part) for part in parts], self.at - len(self.whole.shape)).to(x.device)

    def neighbours(
        self, x: Tensor, below: bool = True, above: bool = True, periodic: bool = False
    ) -> tuple[Tensor | None, Tensor | None]:
        """The slice before this rank's first and the one after its last, (n, *slice) each; collective.

        x: (n, *space.shape).  below, above: which are wanted, the same on every rank.  None where they are not, and at the
        ends of a volume that is not periodic.
        """
        size = self.ranks.size
        if self.alone:
            ends = (below and periodic, above and periodic)
            return (self.end(x, True) if ends[0] else None), (self.end(x, False) if ends[1] else None)
        start, end = self.end(x, False), self.end(x, True)
        self._mine()
        down, up = self.ranks.rank - 1, self.ranks.rank + 1
        lower = down % size if periodic or down >= 0 else None
        upper = up % size if periodic or up < size else None
        # To a rank above goes the last slice, which is the one below it; where both are one rank, that one comes first.
        parcels = [np.empty(0, np.uint8) for _ in range(size)]
        if below and upper is not None:
            parcels[upper] = _bytes(end)
        if above and lower is not None:
            parcels[lower] = np.concatenate([parcels[lower], _bytes(start)])
        came = self.ranks.exchange(parcels)
        wide, found = _bytes(start).nbytes, [None, None]
        received: list[Tensor | None] = [*found]
        if below and lower is not None:
            received[0] = _slice(came[lower][:wide], start)
        if above and upper is not None:
            received[1] = _slice(came[upper][-wide:], start)
        arrived = sum(one is not None for one in received)
        self.traffic["slices"] += arrived * len(x)
        self.traffic["bytes"] += arrived * wide
        return received[0], received[1]

    def end(self, x: Tensor, last: bool) -> Tensor:
        """The first or the last slice of this rank's part: (n, *space.shape) -> (n, *slice)."""
        return x.select(1 + self.at, -1 if last else 0)

    def shifted(self, x: Tensor, by: int, end: Tensor) -> Tensor:
        """Slice ``k + by`` in place of slice ``k``, with ``end`` where there is none: by is 1 or -1."""
        at, n = 1 + self.at, x.shape[1 + self.at]
        kept = x.narrow(at, max(by, 0), n - 1)
        return torch.cat([kept, end.unsqueeze(at)] if by > 0 else [end.unsqueeze(at), kept], at)

    def parts(self, a: Tensor, b: Tensor) -> Tensor:
        """Inner products slice by slice: (n, *space.shape) twice -> (n, slices of this rank), float64."""
        one = 1 + self.at
        # Slice by slice: how a library splits the sum over an array may depend on how many rows there are.
        sums = [(a.select(one, k) * b.select(one, k)).flatten(1).sum(1) for k in range(a.shape[one])]
        return torch.stack(sums, 1).double()

    def dots(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Inner products over the whole volume, draw by draw: a list of (n,), float64; one reduction for all; collective."""
        mine = torch.stack([self.parts(a, b) for a, b in pairs])
        self.traffic["reductions"] += 1
        if not self.alone:
            self._mine()
            mine = torch.cat([torch.from_numpy(p) for p in self.ranks.allgather(mine.cpu().numpy())], 2).to(mine.device)
        return list(mine.contiguous().sum(2))

    def draws(self, draws: Draws) -> Draws:
        """The same random numbers, of this rank's part of the volume alone."""
        return draws if self.alone else _Part(draws, self)

    def _mine(self) -> None:
        """Refuse a second thread, whose messages would meet those of the first in no order."""
        here = threading.get_ident()
        self._thread = self._thread or here
        if self._thread != here:
            raise ReconError("a volume that is cut over ranks is worked on by one thread; make its Comm with Comm.cut")


class _Part(Draws):
    """Draws whose normal numbers are those of a slab at their global positions."""

    def __init__(self, of: Draws, slab: Slab) -> None:
        super().__init__(of.seed, of.members, of.case, of.antithetic)
        object.__setattr__(self, "slab", slab)

    def normal(
        self,
        step: int,
        shape: Sequence[int],
        stream: Stream = "step",
        *,
        dtype: torch.dtype = torch.float32,
        first: int = 0,
    ) -> Tensor:
        slab: Slab = self.slab  # type: ignore[attr-defined]
        if tuple(shape) != slab.space.shape or first:
            return super().normal(step, shape, stream, dtype=dtype, first=first)
        inner = math.prod(shape[slab.at + 1 :])
        own = (slab.last - slab.first) * inner
        # What stands before the axis (channels) repeats the whole stretch of it.
        stretches = [
            super(_Part, self).normal(step, (own,), stream, dtype=dtype, first=(i * slab.slices + slab.first) * inner)
            for i in range(math.prod(shape[: slab.at]))
        ]
        return torch.stack(stretches, 1).reshape(len(self), *shape)


class AxisDifference(LinearOperator):
    """``(D x)_k = (x_{k+1} - x_k) / |z_{k+1} - z_k|`` along one axis of a volume, of which a rank may hold a slab.

    slab: a ``Slab``, or the space of a whole volume.  periodic: the last slice is followed by the first, at the mean distance
    of neighbours; otherwise the last difference is zero (no flux through the ends).  The axis needs its coordinates, which
    need not be even; differences are per unit of them (metres).
    Maps (*batch, *space.shape) to the same shape, in "unit/m".  Of a neighbour, ``D`` takes the slice above, ``D^T`` the
    one below, ``normal`` both at once.

    Raises InputError for an axis without coordinates, with names for coordinates, or two slices at one place.
    """

    def __init__(self, slab: Slab | Space, axis: str = "z", periodic: bool = False) -> None:
        slab = Slab(slab, axis) if isinstance(slab, Space) else slab
        inverse = _inverse_steps(slab, periodic)
        space = slab.space
        super().__init__(space, Space(space.dims, space.shape, space.coords, f"{space.unit}/m"))
        self.slab, self.periodic = slab, periodic
        # 1/h of the pair below this rank's first slice, then of its own pairs; float64, as coordinates are.
        places = [(slab.first - 1 + k) % slab.slices for k in range(slab.last - slab.first + 1)]
        self.inverse = tuple(float(inverse[k]) for k in places)
        self.register_buffer("kind", torch.zeros(()), persistent=False)  # follows ``to``: type and place of the operator

    def apply(self, x: Tensor) -> Tensor:
        _, above = self.slab.neighbours(x, below=False, periodic=self.periodic)
        return self._scaled(self._raised(x, above) - x)

    def apply_adjoint(self, y: Tensor) -> Tensor:
        g = self._scaled(y)
        below, _ = self.slab.neighbours(g, above=False, periodic=self.periodic)
        return self._lowered(g, below) - g

    def normal(self, x: Tensor) -> Tensor:
        return self._checked(self._normal, x, self.domain, self.domain, "normal")

    def _normal(self, x: Tensor) -> Tensor:
        below, above = self.slab.neighbours(x, periodic=self.periodic)
        g = self._scaled(self._scaled(self._raised(x, above) - x))
        if below is not None:
            square = self.inverse[0]
            below = ((self.slab.end(x, False) - below) * square) * square
        return self._lowered(g, below) - g

    def _scaled(self, differences: Tensor) -> Tensor:
        shape = [1] * len(self.domain.shape)
        shape[self.slab.at] = -1
        inverse = torch.tensor(self.inverse[1:], dtype=differences.dtype, device=differences.device)
        return differences * inverse.reshape(shape)

    def _raised(self, x: Tensor, above: Tensor | None) -> Tensor:
        """The slice after each; the last one's own where there is none."""
        return self.slab.shifted(x, 1, self.slab.end(x, True) if above is None else above)

    def _lowered(self, g: Tensor, below: Tensor | None) -> Tensor:
        """The slice before each; zero where there is none."""
        return self.slab.shifted(g, -1, torch.zeros_like(self.slab.end(g, False)) if below is None else below)


def _inverse_steps(slab: Slab, periodic: bool) -> np.ndarray:
    """``1 / |z_{k+1} - z_k|`` of the whole volume; the last one zero, or that of the wrap."""
    values = slab.whole.coords.get(slab.axis)
    if values is None or isinstance(values, tuple):
        raise InputError(
            f"differences along {slab.axis!r} are per metre, and {slab.whole.describe()} has no coordinates there; give the "
            f"space coords={{{slab.axis!r}: positions of its {slab.slices} slices in metres}} (Space.grid does)"
        )
    steps = np.abs(np.diff(values))
    if not (steps > 0).all():
        raise InputError(f"two neighbouring slices of {slab.whole.describe()} lie at one place along {slab.axis!r}")
    if periodic and slab.slices < 3:
        raise InputError(f"a periodic axis has at least 3 slices; got {slab.slices}")
    return np.append(1 / steps, 1 / steps.mean() if periodic else 0.0)


def portion(whole: Space, at: int, part: slice) -> Space:
    """The space of some slices of volumes across their axis number ``at``."""
    name = whole.dims[at]
    shape = tuple(len(range(n)[part]) if i == at else n for i, n in enumerate(whole.shape))
    coords = {dim: values[part] if dim == name else values for dim, values in whole.coords.items()}
    return Space(whole.dims, shape, coords, whole.unit, whole.complex)


def _bytes(values: Tensor) -> np.ndarray:
    return values.detach().cpu().contiguous().numpy().reshape(-1).view(np.uint8)


def _slice(raw: np.ndarray, like: Tensor) -> Tensor:
    values = torch.from_numpy(np.frombuffer(raw.tobytes(), dtype=np.uint8).copy())
    return values.view(like.dtype).reshape(like.shape).to(like.device)
