"""What an array means: its dimensions, shape, coordinates and unit.

A ``Space`` describes a regular array and nothing else; geometry (detectors, trajectories, stations) belongs to operators.
Lengths are metres and angles radians inside recon; conversions happen where files are read and written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from recon.errors import InputError

Coordinate = np.ndarray | tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Space:
    """A regular array and what it means.

    dims: names of the axes, e.g. ("y", "x").  shape: their lengths.  coords: per axis, positions (metres, radians,
    degrees for lat/lon) or names; an axis without coordinates is only counted.  unit: of the values ("1/m", "K", "1").
    complex: whether the values are complex numbers; only what is measured is (k-space), never what a prior describes.

    Raises InputError when names, lengths and coordinates do not agree.
    """

    dims: tuple[str, ...]
    shape: tuple[int, ...]
    coords: Mapping[str, Coordinate] = field(default_factory=dict)
    unit: str = "1"
    complex: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "dims", tuple(self.dims))
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        if len(self.dims) != len(self.shape) or len(set(self.dims)) != len(self.dims):
            raise InputError(f"a Space needs one distinct name per axis; got dims {self.dims} for shape {self.shape}")
        if any(n < 1 for n in self.shape):
            raise InputError(f"every axis of a Space holds at least one value; got shape {self.shape}")
        coords: dict[str, Coordinate] = {}
        for name, values in self.coords.items():
            coords[name] = tuple(values) if isinstance(values, tuple) else np.asarray(values, dtype=np.float64)
            if name not in self.dims:
                raise InputError(f"coordinates for {name!r}, which is not one of the dims {self.dims}")
            if len(coords[name]) != self.shape[self.dims.index(name)]:
                raise InputError(
                    f"coordinate {name!r} has {len(coords[name])} values; the axis has "
                    f"{self.shape[self.dims.index(name)]}"
                )
        object.__setattr__(self, "coords", coords)

    @classmethod
    def vector(cls, n: int, unit: str = "1", dim: str = "component") -> Space:
        """A plain list of ``n`` numbers."""
        return cls((dim,), (n,), {}, unit)

    @classmethod
    def grid(cls, shape: Sequence[int], pixel: float | Sequence[float], unit: str) -> Space:
        """A centred image (y, x) or volume (z, y, x).

        pixel: side of a pixel in metres, one number or one per axis.  y falls from the first row to the last, x and z grow.
        Raises InputError for another number of axes or sides.
        """
        dims = ("z", "y", "x")[-len(shape) :]
        sides = tuple(pixel) if isinstance(pixel, Sequence) else (pixel,) * len(shape)
        if len(shape) not in (2, 3) or len(sides) != len(shape):
            raise InputError(f"a grid is (y, x) or (z, y, x), with one side or one per axis; got {shape} and {pixel}")
        coords = {}
        for dim, n, side in zip(dims, shape, sides, strict=True):
            centred = (np.arange(n) - (n - 1) / 2) * side
            coords[dim] = -centred if dim == "y" else centred
        return cls(dims, tuple(shape), coords, unit)

    @property
    def size(self) -> int:
        """Number of values in one array of this space."""
        return math.prod(self.shape)

    def spacing(self, dim: str) -> float | None:
        """Distance between neighbours along ``dim`` (its unit), None without evenly spaced coordinates."""
        values = self.coords.get(dim)
        if values is None or isinstance(values, tuple) or len(values) < 2:
            return None
        steps = np.abs(np.diff(values))
        return float(steps.mean()) if np.allclose(steps, steps.mean(), rtol=1e-5, atol=0.0) else None

    def mismatch(self, other: Space) -> str | None:
        """Say in words how ``other`` differs in shape, dims, unit or coordinates; None when arrays of one fit the other.

        Coordinates are compared only where both spaces have them.
        """
        if self.dims != other.dims or self.shape != other.shape:
            return f"{self.describe()} against {other.describe()}"
        if self.unit != other.unit:
            return f"unit {self.unit!r} against {other.unit!r}"
        if self.complex != other.complex:
            return f"{'complex' if self.complex else 'real'} against {'complex' if other.complex else 'real'} values"
        for name in self.coords.keys() & other.coords.keys():
            ours, theirs = self.coords[name], other.coords[name]
            if isinstance(ours, tuple) or isinstance(theirs, tuple):
                same = ours == theirs if isinstance(ours, tuple) and isinstance(theirs, tuple) else False
            else:
                step = float(np.abs(np.diff(ours)).min()) if len(ours) > 1 else 1.0
                same = bool(np.allclose(ours, theirs, rtol=1e-6, atol=1e-3 * step))
            if not same:
                return f"different coordinates along {name!r}"
        return None

    def describe(self) -> str:
        """``(y=128, x=128) [1/m]``; ``(coil=8, ky=128, kx=128) [1, complex]``."""
        axes = ", ".join(f"{d}={n}" for d, n in zip(self.dims, self.shape, strict=True))
        return f"({axes}) [{self.unit}{', complex' if self.complex else ''}]"

    def require(self, shape: tuple[int, ...], what: str) -> tuple[int, ...]:
        """Check that ``shape`` ends with this space's shape and return the batch part in front of it.

        Raises InputError naming ``what``, the expected and the given shape.
        """
        n = len(self.shape)
        if len(shape) < n or tuple(shape[len(shape) - n :]) != self.shape:
            raise InputError(f"{what} takes arrays (*batch, {self.describe()}); got shape {tuple(shape)}")
        return tuple(shape[: len(shape) - n])
