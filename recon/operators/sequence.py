"""An object that changes while it is measured: one linear operator per frame.

Each frame sees its own part of the unknown, so the operator is block diagonal over time: dynamic tomography with a few views
at turning angles, a mask or a set of sensors that moves.  Nonlinear measurements of every frame are made around it:
``BeamHardening(Sequence([...]), ...)``, ``PhaseRetrieval(Sequence([...]))``.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Listed

import numpy as np
import torch
from torch import Tensor, nn

from recon.errors import InputError
from recon.operators.base import LinearOperator
from recon.operators.blur import constant
from recon.operators.cg import CG
from recon.space import Coordinate, Space


class Sequence(LinearOperator):
    """``y_t = A_t x_t`` for the frames t = 0 .. T - 1.

    frames: one operator per frame, with one domain; the same object may stand several times (``[A] * 8``): its frames are
    then worked on as one batch.  times: of the frames, s; None leaves them counted.
    Maps (*batch, time, *frame) to (*batch, time, *range) where the ranges agree in dims, shape and unit (coordinates that
    change from frame to frame are left out; each operator keeps its own), else to one vector ("datum",), frame by frame.
    ``split(y)`` gives the frames' data back in their own shapes.  ``normal`` and ``solve`` go frame by frame, each through
    its own operator's.

    Raises InputError for an empty list, operators that are not linear, domains that differ, or times that do not grow.
    """

    def __init__(self, frames: Listed[LinearOperator], times: Listed[float] | np.ndarray | None = None) -> None:
        frames = list(frames)
        if not frames:
            raise InputError("Sequence needs at least one frame")
        for t, frame in enumerate(frames):
            if not isinstance(frame, LinearOperator):
                raise InputError(
                    f"Sequence takes linear operators; frame {t} is a {type(frame).__name__} (a nonlinear measurement goes "
                    "around the sequence: BeamHardening(Sequence([...]), ...))"
                )
            if difference := frames[0].domain.mismatch(frame.domain):
                raise InputError(f"Sequence needs one common domain; frame {t} differs: {difference}")
        clock = _times(times, len(frames))
        first, ranges = frames[0].domain, [frame.range for frame in frames]
        domain = Space(
            ("time", *first.dims), (len(frames), *first.shape), {**first.coords, **clock}, first.unit, first.complex
        )
        stacked = all(_alike(ranges[0], other) for other in ranges)
        super().__init__(domain, _stacked(ranges, clock) if stacked else _vector(ranges))
        self.stacked = stacked
        distinct = list({id(frame): frame for frame in frames}.values())
        places = {id(frame): i for i, frame in enumerate(distinct)}
        self.operators = nn.ModuleList(distinct)
        self.order = tuple(places[id(frame)] for frame in frames)

    def frame(self, t: int) -> LinearOperator:
        """The operator of frame ``t``."""
        operator = self.operators[self.order[t]]
        assert isinstance(operator, LinearOperator)
        return operator

    def split(self, y: Tensor) -> list[Tensor]:
        """The data of each frame: (*batch, *range.shape) -> a list of (*batch, *range of the frame)."""
        batch = self.range.require(tuple(y.shape), f"{self.describe()}.split")
        if self.stacked:
            return list(y.unbind(len(batch)))
        ranges = [self.frame(t).range for t in range(len(self.order))]
        pieces = y.split([one.size for one in ranges], dim=-1)
        return [piece.reshape(*batch, *one.shape) for piece, one in zip(pieces, ranges, strict=True)]

    def apply(self, x: Tensor) -> Tensor:
        return self._join(self._each(x.unbind(1), lambda operator, one: operator.apply(one)))

    def apply_adjoint(self, y: Tensor) -> Tensor:
        return torch.stack(self._each(self.split(y), lambda operator, one: operator.apply_adjoint(one)), dim=1)

    def normal(self, x: Tensor) -> Tensor:
        batch = self.domain.require(tuple(x.shape), f"{self.describe()}.normal")
        flat = x.reshape(-1, *self.domain.shape)
        out = torch.stack(self._each(flat.unbind(1), lambda operator, one: operator.normal(one)), dim=1)
        return out.reshape(*batch, *self.domain.shape)

    def solve(
        self,
        b: Tensor,
        c: float,
        weight: Tensor | None = None,
        x0: Tensor | None = None,
        cg: CG | None = None,
        watch: Callable[[int], None] | None = None,
    ) -> Tensor:
        """``(A^T W A + c I)^{-1} b``, frame by frame with each operator's own ``solve``.

        ``watch`` counts a use for one draw whenever T frames have been worked on.
        """
        # A weight that does not change lets the frames of one operator stay together, and its closed form serve.
        one = constant(weight)
        counted = None if watch is None else _per_sequence(watch, len(self.order))
        weights = None if weight is None else self.split(weight.expand(self.range.shape))
        starts = None if x0 is None else x0.unbind(1)
        parts = list(b.unbind(1))
        for members in self._groups() if one is not None else [[t] for t in range(len(self.order))]:
            together = torch.cat([parts[t] for t in members])
            start = None if starts is None else torch.cat([starts[t] for t in members])
            own = None if weights is None else weights[members[0]]
            solved = self.frame(members[0]).solve(together, c, own, start, cg, counted)
            for t, part in zip(members, solved.chunk(len(members)), strict=True):
                parts[t] = part
        return torch.stack(parts, dim=1)

    def _groups(self) -> list[list[int]]:
        """The frames of each distinct operator."""
        return [[t for t, place in enumerate(self.order) if place == i] for i in range(len(self.operators))]

    def _each(self, parts: Listed[Tensor], run: Callable[[LinearOperator, Tensor], Tensor]) -> list[Tensor]:
        """``run`` on every frame, the frames of one operator as one batch."""
        done: list[Tensor] = list(parts)
        for members in self._groups():
            answer = run(self.frame(members[0]), torch.cat([parts[t] for t in members]))
            rows = len(parts[members[0]])
            for i, t in enumerate(members):
                done[t] = answer[i * rows : (i + 1) * rows]
        return done

    def _join(self, parts: Listed[Tensor]) -> Tensor:
        return (
            torch.stack(list(parts), dim=1) if self.stacked else torch.cat([part.flatten(1) for part in parts], dim=1)
        )


def _per_sequence(watch: Callable[[int], None], frames: int) -> Callable[[int], None]:
    """``watch`` for whole sequences, told of single frames."""
    rest = 0

    def counted(n: int) -> None:
        nonlocal rest
        whole, rest = divmod(rest + n, frames)
        if whole:
            watch(whole)

    return counted


def _times(times: Listed[float] | np.ndarray | None, count: int) -> dict[str, Coordinate]:
    if times is None:
        return {}
    values = np.asarray(times, dtype=np.float64)
    if values.shape != (count,) or not np.isfinite(values).all() or (np.diff(values) <= 0).any():
        raise InputError(f"times are {count} growing numbers of seconds, one per frame; got {times!r}")
    return {"time": values}


def _alike(one: Space, other: Space) -> bool:
    return (one.dims, one.shape, one.unit, one.complex) == (other.dims, other.shape, other.unit, other.complex)


def _stacked(ranges: list[Space], clock: dict[str, Coordinate]) -> Space:
    first = ranges[0]
    shared: dict[str, Coordinate] = dict(clock)
    for dim, values in first.coords.items():
        alone = Space((dim,), (len(values),), {dim: values})
        if all(
            dim in r.coords and alone.mismatch(Space((dim,), (len(values),), {dim: r.coords[dim]})) is None
            for r in ranges
        ):
            shared[dim] = values
    return Space(("time", *first.dims), (len(ranges), *first.shape), shared, first.unit, first.complex)


def _vector(ranges: list[Space]) -> Space:
    units, kinds = {r.unit for r in ranges}, {r.complex for r in ranges}
    if len(kinds) > 1:
        raise InputError("Sequence cannot join real and complex data in one vector")
    unit = units.pop() if len(units) == 1 else "mixed"
    return Space(("datum",), (sum(r.size for r in ranges),), {}, unit, kinds.pop())
