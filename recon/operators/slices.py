"""A measurement of slices, lifted to volumes: every slice of the volume seen by itself.

One two-dimensional operator serves all slices (parallel-beam tomography of a stack, multi-coil imaging with one set of maps),
or each slice has its own (maps and masks that change along the axis).  Slices are so many more draws, so whatever an operator
does cheaply for a batch (one reading of a system matrix, a closed-form ``solve``) it does for the volume.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from recon.errors import InputError
from recon.operators.base import LinearOperator
from recon.operators.cg import CG
from recon.operators.planar import PlanarBeam
from recon.operators.sequence import Sequence as Frames
from recon.operators.slabs import Slab, portion
from recon.operators.streamed import Streamed
from recon.space import Space


class SliceStack(LinearOperator):
    """``y_k = A_k x_k`` for the slices ``x_k`` of ``domain`` across ``axis``.

    slices: one operator for all, or a list with one per slice (the same object may stand several times; its slices are then
    worked on as one batch).  domain: of the volume, which is a slice with one axis more anywhere among the others: (z, y, x),
    (channel, z, y, x).  slab: the cut of which ``domain`` is this rank's part (``Slab.space``); None for whole volumes.
    Maps (*batch, *domain.shape) to (*batch, axis, *range of a slice) where the ranges agree in dims, shape and unit, else to
    one vector ("datum",), slice by slice; ``split`` gives the slices' data back.  ``normal`` and ``solve`` are those of the
    slices, so conjugate gradients take a step of their own in every slice.

    Raises InputError when a slice of the domain is not what an operator takes, an operator is not linear, their number is not
    that of the slices, or the domain is not the slab's.
    """

    def __init__(
        self,
        slices: LinearOperator | Sequence[LinearOperator],
        domain: Space,
        axis: str = "z",
        slab: Slab | None = None,
    ) -> None:
        if axis not in domain.dims:
            raise InputError(f"slices across {axis!r} of {domain.describe()}: it has no such axis")
        at = domain.dims.index(axis)
        count = domain.shape[at]
        given = [slices] * count if isinstance(slices, nn.Module) else list(slices)
        if len(given) != count:
            raise InputError(f"{domain.describe()} has {count} slices across {axis!r}; got {len(given)} operators")
        _require_slices(given, domain, axis)
        if slab is not None and (slab.axis != axis or (difference := slab.space.mismatch(domain))):
            found = difference if slab.axis == axis else f"it is cut across {slab.axis!r}"
            raise InputError(f"the slab of this rank does not fit the slices across {axis!r}: {found}")
        frames = Frames(given)
        # The range of the frames with their axis named after the volume's, and its coordinates.
        measured = frames.range
        if frames.stacked:
            dims = (axis, *measured.dims[1:])
            if axis in measured.dims[1:]:
                raise InputError(f"the data of a slice have an axis {axis!r} of their own: {measured.describe()}")
            own = {axis: domain.coords[axis]} if axis in domain.coords else {}
            coords = {**{d: v for d, v in measured.coords.items() if d != "time"}, **own}
            measured = Space(dims, measured.shape, coords, measured.unit, measured.complex)
        super().__init__(domain, measured)
        self.axis, self.at, self.count, self.slab = axis, at, count, slab
        self.one = given[0] if len(frames.operators) == 1 else None
        self.frames = frames

    @property
    def stacked(self) -> bool:
        """Whether the data are an array with the axis of the slices in front; if not, one vector."""
        return self.frames.stacked

    def slice(self, k: int) -> LinearOperator:
        """The operator of slice ``k``."""
        return self.frames.frame(k)

    def split(self, y: Tensor) -> list[Tensor]:
        """The data of each slice: (*batch, *range.shape) -> a list of (*batch, *range of the slice)."""
        self.range.require(tuple(y.shape), f"{self.describe()}.split")
        return self.frames.split(y)

    def folded(self, x: Tensor) -> Tensor:
        """The slices of volumes as a batch: (n, *domain.shape) -> (n slices, *slice), those of a draw side by side."""
        return x.movedim(1 + self.at, 1).flatten(0, 1)

    def unfolded(self, slices: Tensor) -> Tensor:
        """The inverse of ``folded``."""
        return self._stood(slices, self.count)

    def _stood(self, slices: Tensor, count: int) -> Tensor:
        """As volumes of ``count`` slices, which may be a part of them."""
        return slices.reshape(-1, count, *slices.shape[1:]).movedim(1, 1 + self.at).contiguous()

    def _only(self) -> LinearOperator:
        """The operator of all slices of volumes that stay on disk.  Raises InputError where slices have their own."""
        if self.one is None:
            raise InputError(f"{self.describe()}: volumes that stay on disk take one operator for all slices")
        return self.one

    def apply(self, x: Tensor) -> Tensor:
        if isinstance(x, Streamed):
            only = self._only()
            return x.each(
                lambda part: only.apply(self.folded(part)).reshape(len(part), -1, *only.range.shape),
                -len(self.range.shape),
            )
        if self.one is not None:
            return self.one.apply(self.folded(x)).reshape(-1, *self.range.shape)
        return self.frames.apply(x.movedim(1 + self.at, 1))

    def apply_adjoint(self, y: Tensor) -> Tensor:
        if isinstance(y, Streamed):
            only = self._only()
            return y.each(lambda part: self._stood(only.apply_adjoint(part.flatten(0, 1)), part.shape[1]))
        if self.one is not None:
            return self.unfolded(self.one.apply_adjoint(y.flatten(0, 1)))
        return self.frames.apply_adjoint(y).movedim(1, 1 + self.at).contiguous()

    def normal(self, x: Tensor) -> Tensor:
        batch = self.domain.require(tuple(x.shape), f"{self.describe()}.normal")
        if isinstance(x, Streamed):
            only = self._only()
            return x.each(lambda part: self._stood(only.normal(self.folded(part)), part.shape[1 + self.at]))
        flat = x.reshape(-1, *self.domain.shape)
        if self.one is not None:
            out = self.unfolded(self.one.normal(self.folded(flat)))
        else:
            out = self.frames.normal(flat.movedim(1 + self.at, 1)).movedim(1, 1 + self.at).contiguous()
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
        """``(A^T W A + c I)^{-1} b``, slice by slice with each operator's own ``solve``.

        ``watch`` counts a use for one draw whenever all slices of it have been worked on.
        """
        if isinstance(b, Streamed):
            return self._solved_by_parts(b, c, weight, cg, watch)
        together = self._same(weight)
        if self.one is not None and together:
            own = None if weight is None else weight.expand(self.range.shape)[0]
            start = None if x0 is None else self.folded(x0)
            # Every slice of every draw goes through each use, so a use of n slices is one of n / count draws.
            told = None if watch is None else lambda n: watch(n // self.count)
            return self.unfolded(self.one.solve(self.folded(b), c, own, start, cg, told))
        moved = b.movedim(1 + self.at, 1), None if x0 is None else x0.movedim(1 + self.at, 1)
        return self.frames.solve(moved[0], c, weight, moved[1], cg, watch).movedim(1, 1 + self.at).contiguous()

    def _solved_by_parts(
        self, b: Streamed, c: float, weight: Tensor | None, cg: CG | None, watch: Callable[[int], None] | None
    ) -> Tensor:
        """``solve`` of volumes that stay on disk, from zero; ``watch`` counts the uses for the first part."""
        only, right = self._only(), b.stored()

        def solved(first: int, last: int) -> Tensor:
            part = SliceStack(only, portion(self.domain, self.at, slice(first, last)), self.axis)
            own = weight.read(first, last) if isinstance(weight, Streamed) else weight
            return part.solve(right.read(first, last), c, own, None, cg, watch if first == 0 else None)

        return b.stream.kept(solved)

    def _same(self, weight: Tensor | None) -> bool:
        """Whether all slices are weighed alike."""
        if weight is None:
            return True
        rows = weight.expand(self.range.shape)
        return rows.stride(0) == 0 or self.count == 1 or torch.equal(rows, rows[:1].expand_as(rows))

    def norm(self, iterations: int = 30) -> float:
        """Largest singular value: the largest of the slices'."""
        return max(part.norm(iterations) for part in self.frames.operators if isinstance(part, LinearOperator))


def separable(operator: LinearOperator, axis: str) -> bool:
    """Whether what is measured of a slice across ``axis`` depends on that slice alone, as far as the operator's kind tells."""
    if isinstance(operator, SliceStack):
        return operator.axis == axis
    return isinstance(operator, PlanarBeam) and axis in operator.domain.dims[:-2]


def _require_slices(given: Sequence[LinearOperator], domain: Space, axis: str) -> None:
    """Every operator is linear and takes a slice of ``domain`` across ``axis``."""
    kept = [(d, n) for d, n in zip(domain.dims, domain.shape, strict=True) if d != axis]
    coords = {d: values for d, values in domain.coords.items() if d != axis}
    one = Space(tuple(d for d, _ in kept), tuple(n for _, n in kept), coords, domain.unit, domain.complex)
    for k, operator in enumerate(given):
        if not isinstance(operator, LinearOperator):
            raise InputError(f"SliceStack takes linear operators; that of slice {k} is a {type(operator).__name__}")
        if difference := operator.domain.mismatch(one):
            raise InputError(
                f"the operator of slice {k} does not take a slice across {axis!r} of {domain.describe()}: {difference}"
            )
