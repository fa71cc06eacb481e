r"""Cone-beam tomography of a volume that is cut along z over ranks.

Every rank holds a slab of slices and owns some rows of the detector, those on which its slab falls when seen from the middle of
the volume.  Rays are oblique, so a slab falls on rows of its neighbours too, and only what concerns those rows travels:

    A    slices that fall on a row of another rank are projected onto it, and the partial sums go to its owner;
    A^T  the data of the rows that a slab falls on come from their owners.

The rows of a slice.  Joseph's sums interpolate, so slice k is seen by rays through ``k - 1 < z < k + 1`` (slices), at whole x
within the volume for rays that run along x most, at whole y for those along y.  Perspective keeps convex what is convex, so the
first and the last row on which these boxes fall are those of their corners, view by view.

A row is the sum of what its rays gather in each slice, added in the order of the slices, whoever projected them.  So the bits
are the same on any number of ranks, at the price of a partial sum per slice instead of one per slab: a ray that crosses ``c``
slices of another rank brings ``c`` numbers.  (One sum per slab would be a sum whose grouping depends on the cut.)
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recon.errors import InputError
from recon.operators.base import LinearOperator
from recon.operators.cone_beam import ConeBeam, ConeGeometry, Rays, VectorGeometry
from recon.operators.slabs import Slab
from recon.space import Space

Interval = tuple[int, int]


class ConeBeamSlab(LinearOperator):
    """This rank's part of a ``ConeBeam``: its slices of the volume, its rows of the detector.

    slab: the cut of the volume (z, y, x) along z; of one rank, the whole.  geometry: of the whole scan, as for ``ConeBeam``.
    Maps (*batch, *slab.space.shape) to (*batch, angle, own rows, detector); both directions are collective.  ``rows`` are the
    rows owned, ``reach`` those that the slab falls on; ``cut`` takes whole data apart.  What is received is counted in
    ``slab.traffic``: "rows" (a detector row of all views, for one draw) and "row_bytes".

    The same bits as on one rank, for any number of them; those of ``ConeBeam`` to rounding, whose sums run along the ray.
    Rows are dealt once for all views, so a helix is right but sends much: cut it by turns instead.

    Raises InputError for a volume cut across another axis, fewer detector rows than ranks, whatever ``ConeBeam`` refuses, and
    on CUDA, where ASTRA's sums have no fixed order.
    """

    def __init__(self, slab: Slab, geometry: ConeGeometry | VectorGeometry) -> None:
        if slab.axis != "z":
            raise InputError(f"a cone-beam scan is cut across 'z'; this volume is cut across {slab.axis!r}")
        beam, size = ConeBeam(slab.whole, geometry), slab.ranks.size
        if beam.rays.rows < size:
            raise InputError(
                f"{beam.rays.rows} detector rows cannot be dealt to {size} ranks; use at most {beam.rays.rows}"
            )
        starts = [rank * slab.slices // size for rank in range(size + 1)]
        dealt = rows_dealt(beam.rays, starts)
        super().__init__(slab.space, _rows_of(geometry.range, dealt[slab.ranks.rank]))
        self.beam, self.slab, self.geometry = beam, slab, geometry
        self.bands, self.dealt = rows_by_slice(beam.rays), dealt
        self.slices = [range(*pair) for pair in zip(starts[:-1], starts[1:], strict=True)]

    @property
    def rows(self) -> Interval:
        """The detector rows [first, last) that this rank owns."""
        return self.dealt[self.slab.ranks.rank]

    @property
    def reach(self) -> Interval:
        """The detector rows [first, last) on which this rank's slab falls; (0, 0) when on none."""
        return self._reach(self.slab.ranks.rank)

    def cut(self, y: Tensor) -> Tensor:
        """This rank's rows of whole data (*batch, angle, row, detector)."""
        self.beam.range.require(tuple(y.shape), "ConeBeamSlab.cut")
        return y[..., slice(*self.rows), :]

    def received(self) -> tuple[int, int]:
        """Rows (of all views, for one draw) that one ``A`` and one ``A^T`` bring to this rank; as counted in ``traffic``."""
        me = self.slab.ranks.rank
        others = [r for r in range(self.slab.ranks.size) if r != me]
        partial = sum(_length(_common(self.bands[k], self.rows)) for r in others for k in self.slices[r])
        return partial, sum(_length(_common(self.dealt[r], self.reach)) for r in others)

    def apply(self, x: Tensor) -> Tensor:
        machine, me = self._machine(x), self.slab.ranks.rank

        def seen(k: int, rows: Interval) -> Tensor:
            own = k - self.slab.first
            found: Tensor = machine.project(self.beam.rays, x[:, own : own + 1], (k, k + 1), rows)
            return found

        def shared(rank: int, owner: int) -> list[tuple[int, Interval]]:
            """What slices of ``rank`` fall on rows of ``owner``."""
            pairs = [(k, _common(self.bands[k], self.dealt[owner])) for k in self.slices[rank]]
            return [(k, rows) for k, rows in pairs if _length(rows)]

        sent = [[seen(*part) for part in shared(me, r)] if r != me else [] for r in range(len(self.dealt))]
        came = self._exchange(sent)
        out = x.new_zeros(len(x), *self.range.shape)
        for rank, parcel in enumerate(came):
            if rank == me:
                self._add_own(x, out)
                continue
            used = 0
            for _, rows in shared(rank, me):
                part = _view(parcel, used, out[:, :, : _length(rows)])
                used += part.numel() * part.element_size()
                out[:, :, rows[0] - self.rows[0] : rows[1] - self.rows[0]] += part
                self._count(rows, part)
        return out

    def _add_own(self, x: Tensor, out: Tensor) -> None:
        """What this rank's slices give to its own rows, one after the other."""
        from recon.operators.cone_slab_kernels import add_slices

        rows = _common(self.reach, self.rows)
        if _length(rows):
            place = out[:, :, rows[0] - self.rows[0] : rows[1] - self.rows[0]]
            found = place.contiguous()
            add_slices(self.beam.rays, x, found, (self.slab.first, self.slab.last), rows)
            place.copy_(found)

    def apply_adjoint(self, y: Tensor) -> Tensor:
        machine, me, reach = self._machine(y), self.slab.ranks.rank, self.reach
        sent = []
        for rank in range(len(self.dealt)):
            first, last = _common(self.rows, self._reach(rank))
            sent.append([y[:, :, first - self.rows[0] : last - self.rows[0]]] if rank != me and last > first else [])
        came = self._exchange(sent)
        held = y.new_zeros(len(y), y.shape[1], _length(reach), y.shape[3])
        for rank, parcel in enumerate(came):
            rows = _common(self.dealt[rank], reach)
            if not _length(rows):
                continue
            place = held[:, :, rows[0] - reach[0] : rows[1] - reach[0]]
            if rank == me:
                place.copy_(y[:, :, rows[0] - self.rows[0] : rows[1] - self.rows[0]])
            else:
                place.copy_(_view(parcel, 0, place))
                self._count(rows, place)
        if not _length(reach):
            return y.new_zeros(len(y), *self.domain.shape)
        found: Tensor = machine.backproject(self.beam.rays, held, (self.slab.first, self.slab.last), reach)
        return found

    def _reach(self, rank: int) -> Interval:
        seen = [self.bands[k] for k in self.slices[rank] if _length(self.bands[k])]
        return (min(a for a, _ in seen), max(b for _, b in seen)) if seen else (0, 0)

    def _exchange(self, parts: list[list[Tensor]]) -> list[np.ndarray]:
        """Every rank's parts of ours for us, as bytes."""
        if self.slab.alone:
            return [np.empty(0, np.uint8)]
        self.slab._mine()
        none = [np.empty(0, np.uint8)]
        parcels = [
            np.concatenate(none + [part.detach().contiguous().numpy().reshape(-1).view(np.uint8) for part in one])
            for one in parts
        ]
        return self.slab.ranks.exchange(parcels)

    def _count(self, rows: Interval, part: Tensor) -> None:
        self.slab.traffic["rows"] += _length(rows) * len(part)
        self.slab.traffic["row_bytes"] += part.numel() * part.element_size()

    def _machine(self, given: Tensor) -> Any:  # noqa: ANN401  (a module with project and backproject)
        """Who computes on ``given``.  Raises InputError on a GPU."""
        if given.is_cuda:
            raise InputError("a cone-beam scan that is cut over ranks is projected on the CPU; use ConeBeam on a GPU")
        return self.beam._machine(given)


def rows_by_slice(rays: Rays) -> list[Interval]:
    """The detector rows [first, last) that rays through each plane z of the volume meet, in any view; empty where none."""
    nx, ny, nz = rays.shape
    # Rays along x cross planes of whole x, those along y of whole y; those along z cross the plane itself.
    sides = [(0, nx - 1, -1, ny), (-1, nx, 0, ny - 1)]
    aside = [(x, y) for x0, x1, y0, y1 in sides for x in (x0, x1) for y in (y0, y1)]
    upright = [(x, y) for x in (-1, nx) for y in (-1, ny)]
    lows, highs = np.full(nz, np.inf), np.full(nz, -np.inf)
    for view in rays.views:
        one = dataclasses.replace(rays, views=view[None])
        low, high = _extent(one, aside, np.arange(-1, nz + 1))
        flat = _extent(one, upright, np.arange(nz))
        lows = np.minimum(lows, np.minimum(np.minimum(low[:-2], low[2:]), flat[0]))
        highs = np.maximum(highs, np.maximum(np.maximum(high[:-2], high[2:]), flat[1]))
    # Rows strictly between, where rounding may put a ray that grazes a corner on either side.
    first = np.clip(np.ceil(lows - 1e-9), 0, rays.rows).astype(int)
    last = np.clip(np.floor(highs + 1e-9) + 1, 0, rays.rows).astype(int)
    return [(a, max(a, b)) for a, b in zip(first.tolist(), last.tolist(), strict=True)]


def rows_dealt(rays: Rays, starts: list[int]) -> list[Interval]:
    """Who owns which rows [first, last): those on which the middle of each slab falls, in the mean over views; at least one.

    starts: the first slice of every slab, and the number of slices.
    """
    nx, ny, _ = rays.shape
    middle = np.array([((nx - 1) / 2, (ny - 1) / 2, start - 0.5) for start in starts])
    edges = np.nan_to_num(np.nanmean(rays.fall(middle)[..., 1], axis=0))
    falling = edges[-1] < edges[0]  # rows that run down the volume
    if falling:
        edges = edges[::-1]
    size = len(starts) - 1
    ends = [0, *(int(np.ceil(edge)) for edge in edges[1:-1]), rays.rows]
    for rank in range(1, size):
        ends[rank] = min(max(ends[rank], ends[rank - 1] + 1), rays.rows - (size - rank))
    dealt = list(zip(ends[:-1], ends[1:], strict=True))
    return dealt[::-1] if falling else dealt


def _extent(rays: Rays, aside: list[tuple[int, int]], heights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The least and the largest row on which points at these x, y fall, height by height; all where one is behind a source."""
    points = np.array([(x, y, z) for z in heights for x, y in aside], dtype=np.float64)
    rows = rays.fall(points)[0, :, 1].reshape(len(heights), len(aside))
    behind = np.isnan(rows).any(1)
    return np.where(behind, -np.inf, rows.min(1)), np.where(behind, np.inf, rows.max(1))


def _common(a: Interval, b: Interval) -> Interval:
    first = max(a[0], b[0])
    return first, max(first, min(a[1], b[1]))


def _length(rows: Interval) -> int:
    return rows[1] - rows[0]


def _view(parcel: np.ndarray, start: int, like: Tensor) -> Tensor:
    """Numbers from ``start`` of a parcel, in the shape of ``like``."""
    raw = parcel[start : start + like.numel() * like.element_size()]
    return torch.from_numpy(np.frombuffer(raw.tobytes(), dtype=np.uint8).copy()).view(like.dtype).reshape(like.shape)


def _rows_of(whole: Space, rows: Interval) -> Space:
    coords = {d: values[slice(*rows)] if d == "row" else values for d, values in whole.coords.items()}
    return Space(whole.dims, (whole.shape[0], _length(rows), whole.shape[2]), coords, whole.unit)
