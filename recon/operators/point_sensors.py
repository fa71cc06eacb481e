r"""Observations of a gridded field at arbitrary points: weather stations, soundings, buoys, probes in a flow.

A station at point ``p`` observes one variable; its value is interpolated linearly along every axis,

    y_i = sum_c w_ic x_c,    w_ic = prod_axes (1 - |p - c| / step)    over the 2^d cells around p,

so fields that are linear along each axis are reproduced exactly and the weights of a station sum to 1.

The sphere.  A grid whose longitudes close the circle wraps around, at the dateline or wherever its array begins; a regional
one does not.  A grid with a row of points at a pole needs no rule there: all longitudes of the row are one place, a scalar
field has one value on it, and a station reads that value whatever its longitude.  Where a whole circle comes within one row
of a pole without reaching it (Gaussian or cell-centred grids), a station beyond the last row is interpolated along its
meridian between that row and the pole, and the value at the pole is the mean of the last row.  A horizontal vector turns with
the longitude it is seen from: the pole value of an eastward or northward component ``f``, seen from longitude ``l``, is its
first harmonic ``2 mean(f(l') cos(l' - l))``.  Both are exact, on the points of the circle, for fields that are linear
(vectors: constant) in the plane that touches the pole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from recon.errors import InputError
from recon.operators.base import LinearOperator
from recon.operators.gather import GatherPair
from recon.operators.grids import CIRCLE, Axis, axes
from recon.operators.stations import POSITIONS, Stations
from recon.space import Space

Method = Literal["linear", "nearest"]
Scale = Literal["linear", "log"]
_Block = tuple[np.ndarray, np.ndarray]  # offsets into the flat field and weights, both (station, corners)


class PointSensors(LinearOperator):
    """``y_i = sum_c w_ic x_c``: each station reads one variable of the field at one point.

    domain: axes in any order of "lat", "lon" (degrees), "z", "y", "x" (metres), "level" (pressure or height), growing or
    falling, evenly spaced or not, and "variable" (names).  Any other axes come first (time, member) and are kept.
    stations: with exactly the positions that the domain has axes for, and ``variable`` where there are several.
    method: "linear", or "nearest" for the value of the cell that holds the station.
    vertical: "log" interpolates linearly in the logarithm of "level" (pressure).
    units: unit of each variable where they differ (then the domain's unit is "mixed").
    vectors: variables that are eastward or northward components of a vector; it matters beyond the last row, at a pole.

    Maps (*batch, *domain.shape) to (*batch, *other axes, station).  Range unit: that of the variables observed, "mixed" where
    they differ; ``units`` holds one per station.  float32; ``.double()`` gives weights in full double precision.
    Raises InputError for axes or stations that do not fit, naming the stations outside the grid: see ``inside``.
    """

    def __init__(
        self,
        domain: Space,
        stations: Stations,
        method: Method = "linear",
        vertical: Scale = "linear",
        units: Mapping[str, str] | None = None,
        vectors: Sequence[str] = (),
    ) -> None:
        grid = _Grid(domain, stations, method, vertical)
        outside = grid.outside()
        if outside.any():
            raise InputError(
                f"{int(outside.sum())} of {len(stations)} stations lie outside the grid: {stations.listing(outside)}; the "
                f"grid covers {grid.extent()}. PointSensors.inside(domain, stations) gives the operator of the others and "
                "the mask of the stations it kept"
            )
        variables = grid.variables()
        station_units = _units(domain, variables, units)
        _known(domain, vectors, "vectors")
        coords = {dim: domain.coords[dim] for dim in grid.kept if dim in domain.coords}
        coords["station"] = np.arange(float(len(stations))) if stations.names is None else tuple(stations.names)
        unit = station_units[0] if len(set(station_units)) == 1 else "mixed"
        shape = (*domain.shape[: len(grid.kept)], len(stations))
        super().__init__(domain, Space((*grid.kept, "station"), shape, coords, unit))
        self.stations, self.method, self.vertical, self.units = stations, method, vertical, station_units
        self.weights = grid.weights(np.array([name in vectors for name in variables]))

    @classmethod
    def inside(
        cls,
        domain: Space,
        stations: Stations,
        method: Method = "linear",
        vertical: Scale = "linear",
        units: Mapping[str, str] | None = None,
        vectors: Sequence[str] = (),
    ) -> tuple[PointSensors, Tensor]:
        """The operator of the stations inside the grid, and which they are: bool (station,).

        ``y[kept]`` is the measurement that fits, ``operator.stations.total_sigma()`` its sigma.
        Raises InputError when no station is inside.
        """
        grid = _Grid(domain, stations, method, vertical)
        outside = grid.outside()
        if outside.all():
            raise InputError(
                f"no station is inside the grid ({grid.extent()}); the stations are {stations.listing(outside)}"
            )
        return cls(domain, stations.select(~outside), method, vertical, units, vectors), torch.from_numpy(~outside)

    def apply(self, x: Tensor) -> Tensor:
        return self.weights(self._fields(x, self.weights.shape[1])).reshape(len(x), *self.range.shape)

    def apply_adjoint(self, y: Tensor) -> Tensor:
        return self.weights.transpose(self._fields(y, self.weights.shape[0])).reshape(len(y), *self.domain.shape)

    def _fields(self, values: Tensor, size: int) -> Tensor:
        """One field per row, whatever axes come first: (n, ...) -> (n * other axes, size, 1)."""
        return values.reshape(len(values) * math.prod(self.range.shape[:-1]), size, 1)


class _Grid:
    """Where stations lie on the axes of a field."""

    def __init__(self, domain: Space, stations: Stations, method: str, vertical: str) -> None:
        for name, given, allowed in (("method", method, get_args(Method)), ("vertical", vertical, get_args(Scale))):
            if given not in allowed:
                raise InputError(f"{name} must be one of {', '.join(allowed)}; got {given!r}")
        self.domain, self.stations, self.method = domain, stations, method
        read = [dim for dim in domain.dims if dim in POSITIONS or dim == "variable"]
        self.kept = domain.dims[: len(domain.dims) - len(read)]
        self.dims = [dim for dim in read if dim != "variable"]
        if not self.dims or list(domain.dims[len(self.kept) :]) != read:
            raise InputError(
                f"PointSensors reads fields whose last axes are one or more of {', '.join(POSITIONS)}, with or without "
                f"'variable'; got {domain.describe()}"
            )
        self._fit(vertical)
        self.axes = axes(domain, self.dims, ("level",) if vertical == "log" else ())
        self.placed = {dim: axis.place(stations.column(dim)) for dim, axis in self.axes.items()}

    def _fit(self, vertical: str) -> None:
        given = [dim for dim in POSITIONS if getattr(self.stations, dim) is not None]
        if set(given) != set(self.dims):
            raise InputError(
                f"the stations have {', '.join(given)}; a field {self.domain.describe()} needs exactly "
                f"{', '.join(self.dims)}"
            )
        if vertical == "log":
            if "level" not in self.dims:
                raise InputError(f"vertical='log' needs a 'level' axis; got {self.domain.describe()}")
            wrong = self.stations.column("level") <= 0
            if wrong.any():
                raise InputError(f"a logarithmic level must be positive; got {self.stations.listing(wrong)}")

    def extent(self) -> str:
        """What the grid covers, in words."""
        return ", ".join(axis.extent() for axis in self.axes.values())

    def outside(self) -> np.ndarray:
        """Stations that no cell (nearest) or no pair of neighbouring points (linear) holds: bool (station,)."""
        wrong = np.zeros(len(self.stations), dtype=bool)
        for dim, axis in self.axes.items():
            if axis.cyclic:
                continue
            cells = self.method == "nearest" and len(axis.values) > 1
            low, high = (axis.bounds() if cells else axis.values)[[0, -1]]
            low, high = -90.0 if axis.poles[0] else low, 90.0 if axis.poles[1] else high
            wrong |= (self.placed[dim] < low - axis.slack()) | (self.placed[dim] > high + axis.slack())
        return wrong

    def variables(self) -> list[str]:
        """What each station observes; "" where the field has one variable without a name.  InputError where unknown."""
        asked, names = self.stations.variable, _names(self.domain)
        if names is None and asked is not None:
            raise InputError(f"the stations name variables; {self.domain.describe()} has no 'variable' axis with names")
        if asked is None:
            if names is not None and len(names) > 1:
                raise InputError(f"the field has the variables {', '.join(names)}; say which each station observes")
            return [names[0] if names else ""] * len(self.stations)
        _known(self.domain, asked, "Stations.variable")
        return list(asked)

    def weights(self, vector: np.ndarray) -> GatherPair:
        """Interpolation weights.  vector: whether a station observes a component of a vector, bool (station,)."""
        rows, columns, values = [], [], []
        capped = self._capped()
        for group in (~capped, capped):
            members = np.flatnonzero(group)
            offsets, weights = np.zeros((len(members), 1), dtype=np.int64), np.ones((len(members), 1))
            for block in self._blocks(members, vector) if len(members) else []:
                offsets = (offsets[:, :, None] + block[0][:, None, :]).reshape(len(members), -1)
                weights = (weights[:, :, None] * block[1][:, None, :]).reshape(len(members), -1)
            used = weights != 0  # a station on a point reads that point alone
            rows.append(np.broadcast_to(members[:, None], used.shape)[used])
            columns.append(offsets[used])
            values.append(weights[used])
        shape = len(self.stations), math.prod(self.domain.shape[len(self.kept) :])
        return GatherPair(np.concatenate(rows), np.concatenate(columns), np.concatenate(values), shape)

    def _capped(self) -> np.ndarray:
        """Stations between the last row and a pole, read by the pole rule: bool (station,)."""
        lat = self.axes.get("lat")
        if lat is None or self.method == "nearest" or not any(lat.poles):
            return np.zeros(len(self.stations), dtype=bool)
        # A last row that misses its pole by rounding is the row at the pole.
        (south, north), slack, placed = lat.poles, lat.slack(), self.placed["lat"]
        south, north = south and lat.values[0] + 90 > slack, north and 90 - lat.values[-1] > slack
        return (north & (placed > lat.values[-1])) | (south & (placed < lat.values[0]))

    def _blocks(self, members: np.ndarray, vector: np.ndarray) -> list[_Block]:
        """One block per axis; latitude and longitude make one together where the pole rule holds."""
        capped = bool(self._capped()[members[0]])
        blocks = []
        for dim, axis in self.axes.items():
            if not (capped and dim in ("lat", "lon")):
                blocks.append(_along(axis, self.placed[dim][members], self._stride(dim), self.method))
        if capped:
            at = self.placed["lat"][members], self.placed["lon"][members]
            strides = self._stride("lat"), self._stride("lon")
            blocks.append(_cap(self.axes["lat"], self.axes["lon"], at, strides, vector[members]))
        names = _names(self.domain)
        if names is not None:
            which = np.array([names.index(name) for name in self.variables()])[members]
            blocks.append(((which * self._stride("variable"))[:, None], np.ones((len(members), 1))))
        return blocks

    def _stride(self, dim: str) -> int:
        return math.prod(self.domain.shape[self.domain.dims.index(dim) + 1 :])


def _along(axis: Axis, placed: np.ndarray, stride: int, method: str) -> _Block:
    """The points below and above on one axis (or the nearest; the lower of two equally near)."""
    lower, upper, share = axis.bracket(placed)
    if method == "nearest":
        return stride * np.where(share <= 0.5, lower, upper)[:, None], np.ones((len(placed), 1))
    return stride * np.stack([lower, upper], axis=1), np.stack([1 - share, share], axis=1)


def _cap(
    lat: Axis, lon: Axis, at: tuple[np.ndarray, np.ndarray], strides: tuple[int, int], vector: np.ndarray
) -> _Block:
    """Between the last row, at the station's longitude, and the pole, where the whole row counts."""
    north = at[0] > 0
    row = np.where(north, lat.order[-1], lat.order[0])[:, None]
    edge, pole = np.where(north, lat.values[-1], lat.values[0]), np.where(north, 90.0, -90.0)
    share = ((at[0] - edge) / (pole - edge))[:, None]
    lower, upper, east = lon.bracket(at[1])
    near = np.stack([1 - east, east], axis=1)
    circle = np.broadcast_to(np.diff(lon.bounds()) / CIRCLE, (len(row), len(lon.values)))
    turn = np.cos(np.deg2rad(lon.values[None, :] - at[1][:, None]))
    circle = np.where(vector[:, None], 2 * circle * turn, circle)
    columns = np.concatenate([np.stack([lower, upper], axis=1), np.broadcast_to(lon.order, circle.shape)], axis=1)
    return strides[0] * row + strides[1] * columns, np.concatenate([(1 - share) * near, share * circle], axis=1)


def _names(domain: Space) -> tuple[str, ...] | None:
    """Names along the "variable" axis."""
    names = domain.coords.get("variable")
    if "variable" in domain.dims and not isinstance(names, tuple):
        raise InputError(f"the 'variable' axis of {domain.describe()} needs names as coordinates, one per variable")
    return names if isinstance(names, tuple) else None


def _known(domain: Space, asked: Sequence[str], what: str) -> None:
    names = _names(domain) or ()
    unknown = sorted(set(asked) - set(names))
    if unknown:
        raise InputError(f"{what} names {', '.join(unknown)}; the field has {', '.join(names) or 'no named variables'}")


def _units(domain: Space, variables: Sequence[str], units: Mapping[str, str] | None) -> tuple[str, ...]:
    """The unit each station reports in."""
    if units is None:
        return (domain.unit,) * len(variables)
    names = _names(domain) or ()
    if set(units) != set(names):
        raise InputError(f"units must name every variable ({', '.join(names)}); got {', '.join(units) or 'none'}")
    if domain.unit != "mixed" and set(units.values()) != {domain.unit}:
        raise InputError(f"the field has the unit {domain.unit!r}, not {dict(units)}; a field of several is 'mixed'")
    return tuple(units[name] for name in variables)
