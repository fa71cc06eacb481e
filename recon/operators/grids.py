"""The axes of gridded fields: regular and uneven ones, latitudes, longitudes that close a circle, cells and their sizes.

Every axis is brought to one form first, ``Axis``: values that grow, whatever the order of the array, and longitudes that count
degrees east of the first one, whatever the convention (0..360, -180..180, across the dateline).  Cells reach half way to the
neighbouring points; the outermost ones reach as far beyond their point as they do towards its neighbour, at most to a pole.
Where a whole circle of longitudes comes within one step of a pole, the outermost cells reach to the pole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from recon.errors import InputError
from recon.space import Space

SPATIAL = ("lat", "lon", "z", "y", "x")
"""Dimensions a field extends over in space: degrees north, degrees east, metres."""

TOLERANCE = 1e-3
"""Coordinates are taken as equal within this share of a step (single-precision files; ``Space.mismatch`` does the same)."""

CIRCLE = 360.0


@dataclass(frozen=True, eq=False)
class Axis:
    """The points of one axis in growing order.

    values: float64 (n,); longitudes count from ``origin`` (0 on other axes).  order: position of each value in the array.
    cyclic: whether the point after the last is the first.  poles: whether the first and last cell reach to a pole.
    log: whether ``values`` are logarithms.
    """

    dim: str
    values: np.ndarray
    order: np.ndarray
    origin: float = 0.0
    cyclic: bool = False
    poles: tuple[bool, bool] = (False, False)
    log: bool = False

    def place(self, points: np.ndarray) -> np.ndarray:
        """``points`` (in the unit of the coordinate) on the scale of ``values``; a longitude as near the grid as it gets."""
        if self.dim != "lon":
            return np.log(points) if self.log else points
        offset = _east(points, self.origin)
        if self.cyclic:
            return offset
        beyond = (self.values[-1] + CIRCLE) / 2
        return np.where(offset > beyond, offset - CIRCLE, offset)

    def steps(self) -> np.ndarray:
        """Distances between neighbours, around the circle where it closes: (n - 1,) or (n,)."""
        end = [self.values[0] + CIRCLE] if self.cyclic else []
        return np.diff(np.append(self.values, end))

    def slack(self) -> float:
        """How far a point may lie from another and still count as the same."""
        steps = self.steps()
        return float(TOLERANCE * steps.min()) if len(steps) else 1e-9 * max(1.0, abs(float(self.values[0])))

    def bounds(self) -> np.ndarray:
        """Ends of the cells, growing: (n + 1,).  Raises InputError for a single point, which has no size."""
        steps = self.steps()
        if not len(steps):
            raise InputError(f"one {self.dim} alone has no cell size; give a ratio, or at least two coordinates")
        if self.cyclic:
            inner = self.values + steps / 2
            return np.concatenate([inner[-1:] - CIRCLE, inner])
        v = self.values
        bounds = np.concatenate([v[:1] - steps[:1] / 2, v[:-1] + steps / 2, v[-1:] + steps[-1:] / 2])
        if self.dim == "lat":
            bounds = np.clip(bounds, -90.0, 90.0)
            south, north = self.poles
            bounds[0], bounds[-1] = -90.0 if south else bounds[0], 90.0 if north else bounds[-1]
        return bounds

    def extent(self) -> str:
        """``lat 35.2..44.3`` in the user's unit."""
        first, last = self.values[0] + self.origin, self.values[-1] + self.origin
        first, last = (np.exp(first), np.exp(last)) if self.log else (first, last)
        turn = CIRCLE if self.dim == "lon" and last > CIRCLE else 0.0
        first, last = first - turn, last - turn
        return f"{self.dim} {first:g}..{last:g}"

    def bracket(self, placed: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Array positions below and above each placed point, and how far it lies from the one to the other (0 to 1)."""
        n = len(self.values)
        knots = np.append(self.values, self.values[0] + CIRCLE) if self.cyclic else self.values
        if len(knots) == 1:
            here = np.repeat(self.order, len(placed))
            return here, here, np.zeros(len(placed))
        lower = np.clip(np.searchsorted(knots, placed, side="right") - 1, 0, len(knots) - 2)
        share = np.clip((placed - knots[lower]) / (knots[lower + 1] - knots[lower]), 0.0, 1.0)
        return self.order[lower], self.order[(lower + 1) % n], share


def axes(space: Space, dims: Sequence[str], log: Sequence[str] = ()) -> dict[str, Axis]:
    """The axes ``dims`` of ``space``, those in ``log`` on a logarithmic scale.

    Raises InputError for axes without usable coordinates: missing, names, not finite, not in order, latitudes beyond a pole,
    longitudes that come twice.
    """
    found = {dim: _longitudes(space) if dim == "lon" else _plain(space, dim, dim in log) for dim in dims}
    # The pole rule asks whether the circle is whole, also when only latitudes are wanted.
    if "lat" in found and "lon" in space.dims and "lon" in space.coords and _longitudes(space).cyclic:
        lat = found["lat"]
        gaps, steps = (lat.values[0] + 90, 90 - lat.values[-1]), lat.steps()
        if len(steps):
            near = [gap <= step * (1 + TOLERANCE) for gap, step in zip(gaps, (steps[0], steps[-1]), strict=True)]
            found["lat"] = replace(lat, poles=(near[0], near[1]))
    return found


def measure(dim: str, positions: np.ndarray) -> np.ndarray:
    """What cell sizes are differences of: ``sin`` of a latitude (areas on the sphere), the coordinate itself elsewhere."""
    return np.sin(np.deg2rad(positions)) if dim == "lat" else positions


def cell_sizes(space: Space) -> np.ndarray:
    """Relative sizes of the cells of a field: float64, one axis per spatial dim of ``space``, in its order.

    Products of lengths (m), or of ``sin(lat)`` differences and longitudes: exact areas of latitude-longitude cells.
    Raises InputError for axes without usable coordinates.
    """
    sizes = np.ones(())
    dims = [dim for dim in space.dims if dim in SPATIAL]
    for dim, axis in axes(space, dims).items():
        size = np.empty(len(axis.values))
        size[axis.order] = np.diff(measure(dim, axis.bounds()))
        sizes = sizes[..., None] * size
    return sizes


def _coordinate(space: Space, dim: str) -> np.ndarray:
    values = space.coords.get(dim)
    if values is None or isinstance(values, tuple):
        what = "names" if isinstance(values, tuple) else "none"
        raise InputError(f"the axis {dim!r} of {space.describe()} needs numbers as coordinates; it has {what}")
    if not np.isfinite(values).all():
        raise InputError(f"the coordinates of {dim!r} hold values that are NaN or infinite")
    return values


def _plain(space: Space, dim: str, log: bool) -> Axis:
    values = _coordinate(space, dim)
    if dim == "lat" and np.abs(values).max() > 90 * (1 + 1e-9):
        raise InputError(f"latitudes are degrees north, -90 to 90; the grid has {values.min():g} to {values.max():g}")
    if log and values.min() <= 0:
        raise InputError(f"a logarithmic {dim} needs positive coordinates (pressure); got {values.min():g}")
    order = np.arange(len(values))
    if len(values) > 1 and values[0] > values[-1]:
        values, order = values[::-1], order[::-1]
    if (np.diff(values) <= 0).any():
        raise InputError(f"the coordinates of {dim!r} must grow or fall along the whole axis; sort the field along it")
    return Axis(dim, np.log(values) if log else values, order.copy(), log=log)


def _longitudes(space: Space) -> Axis:
    values = _coordinate(space, "lon")
    order = np.arange(len(values))
    # Steps the short way round: -180 after 179 is one step east.
    steps = _east(np.diff(values), 0.0)
    steps = np.where(steps > CIRCLE / 2, steps - CIRCLE, steps)
    if len(steps) and steps[0] < 0:
        values, order, steps = values[::-1], order[::-1], -steps[::-1]
    origin = float(_east(values[:1], 0.0)[0])
    offsets = _east(values, origin)
    offsets[0] = 0.0
    if (steps == 0).any() or (len(values) > 1 and _same(offsets[-1], steps)):
        raise InputError(
            "the same longitude comes twice; leave out the repeated column (a whole circle closes by itself)"
        )
    if (steps < 0).any() or (np.diff(offsets) <= 0).any():
        raise InputError("longitudes must grow (or fall) eastward along the whole axis and span less than a circle")
    closing = CIRCLE - offsets[-1]
    cyclic = len(steps) > 0 and closing <= steps.max() * (1 + TOLERANCE)
    return Axis("lon", offsets, order.copy(), origin, bool(cyclic))


def _same(last: float, steps: np.ndarray) -> bool:
    """Whether the last point of a circle is the first again."""
    return bool(min(last, CIRCLE - last) < TOLERANCE * np.abs(steps).min())


def _east(points: np.ndarray, origin: float) -> np.ndarray:
    """Degrees east of ``origin``, in [0, 360).

    Both conventions of a longitude become the same number first, so that -3.7 and 356.3 give the same weights.
    """
    offset = np.mod(np.mod(points, CIRCLE) - origin, CIRCLE)
    return np.where(offset >= CIRCLE, 0.0, offset)
