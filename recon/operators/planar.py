r"""What the projectors of slices share: the pixels of a slice, stacks of slices, measured rays, the matrix.

A measured view of a flat detector is six numbers in metres, as in ASTRA's ``parallel_vec`` and ``fanflat_vec``: the direction
of the rays (parallel) or the place of the source (fan), the detector's centre, the step to the next detector, x and y each.
``x`` grows with the column, ``y`` falls with the row.

Projectors (``ray_kernels``; weights are right to rounding, so the matrix and its transpose are those of the geometry):
"line": length of the ray through the detector's centre in each pixel; the fewest entries.
"strip": mean over the detector's width, in a fan over its opening angle; every pixel keeps its mass, so it is right for
detectors wider than a pixel.
"linear": the ray samples the image with linear interpolation (Joseph 1982).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import numpy as np
from torch import Tensor

from recon.errors import InputError
from recon.operators.base import LinearOperator
from recon.operators.scan_blocks import Grid, Scan, ScanBlocks
from recon.operators.system_matrix import SystemMatrix
from recon.space import Space

Projector = Literal["line", "strip", "linear"]


class PlanarScan(Scan, Protocol):
    """A scan that knows the space of its sinograms."""

    @property
    def range(self) -> Space:
        """Sinograms (angle, detector) of line integrals, unit 1."""


class PlanarBeam(LinearOperator):
    """Projections of a slice, or of every slice of a stack: ``y[a, j] = sum_p weight(ray (a, j), pixel p) * mu[p]``.

    domain: (y, x) or (z, y, x), unit "1/m", square pixels.  limit: bytes the matrix may take; above it the projection is
    computed on the fly: the same numbers, no memory, more time.
    Maps (*batch, [z,] y, x) in 1/m to (*batch, [z,] angle, detector), dimensionless; float32 (``.double()`` for float64).

    Raises InputError for a domain that makes no sense, a source inside the image, or without numba.
    """

    def __init__(self, domain: Space, geometry: PlanarScan, limit: float) -> None:
        grid = pixels(domain, type(self).__name__)
        if geometry.fan:
            _refuse_source_inside(grid, geometry, domain)
        one = geometry.range
        stack = domain.dims[:-2]
        coords = {**{dim: domain.coords[dim] for dim in stack if dim in domain.coords}, **one.coords}
        super().__init__(domain, Space((*stack, *one.dims), (*domain.shape[:-2], *one.shape), coords, one.unit))
        self.pixel = grid.pixel
        self.matrix = SystemMatrix(ScanBlocks(geometry, grid), limit)

    @property
    def bytes(self) -> int:
        """Memory that the matrix holds."""
        return self.matrix.bytes

    @property
    def stored(self) -> bool:
        """Whether the matrix is kept; if not, each projection makes it again."""
        return self.matrix.stored

    # Slices are so many more draws: one reading of the matrix serves all of them.
    def apply(self, x: Tensor) -> Tensor:
        return self.matrix(x.reshape(-1, self.matrix.shape[1])).reshape(-1, *self.range.shape)

    def apply_adjoint(self, y: Tensor) -> Tensor:
        return self.matrix.transpose(y.reshape(-1, self.matrix.shape[0])).reshape(-1, *self.domain.shape)


@dataclass(frozen=True)
class PlanarVectors:
    """A measured scan with a flat detector, view by view; a value: equal scans compare equal, and its repr builds it again.

    vectors: (views, 6), metres: direction of the rays (beam "parallel", of any length) or place of the source ("fan"), centre
    of the detector, step to the next detector, x and y each.
    Raises InputError for another shape, numbers that are not finite, or a view whose rays run along the detector.
    """

    vectors: tuple[tuple[float, ...], ...]
    detectors: int
    beam: Literal["parallel", "fan"]
    projector: Projector = "line"

    def __post_init__(self) -> None:
        values = np.asarray(self.vectors, dtype=np.float64)
        first = "source" if self.beam == "fan" else "ray direction"
        if values.ndim != 2 or values.shape[1] != 6 or len(values) == 0 or not np.isfinite(values).all():
            raise InputError(
                f"vectors must be (views, 6) finite numbers in metres: {first}, detector centre, detector step, x and y each; "
                f"got shape {values.shape}"
            )
        if self.beam not in ("parallel", "fan"):
            raise InputError(f"beam must be 'parallel' or 'fan'; got {self.beam!r}")
        object.__setattr__(self, "vectors", tuple(map(tuple, values.tolist())))
        object.__setattr__(self, "detectors", whole(self.detectors, "detectors"))
        check_projector(self.projector)
        ray = values[:, 2:4] - values[:, :2] if self.fan else values[:, :2]
        step = values[:, 4:]
        cross = np.abs(ray[:, 0] * step[:, 1] - ray[:, 1] * step[:, 0])
        along = cross <= 1e-9 * np.hypot(*ray.T) * np.hypot(*step.T)
        if along.any():
            raise InputError(
                f"the rays of view {int(along.argmax())} run along the detector, or a direction or step is zero; "
                f"each row is {first}, detector centre, detector step"
            )

    @property
    def fan(self) -> bool:
        """Whether the rays of a view start at one point."""
        return self.beam == "fan"

    @property
    def views(self) -> int:
        """How many."""
        return len(self.vectors)

    @property
    def range(self) -> Space:
        """Sinograms (angle, detector) of line integrals, unit 1; views and detectors are only counted."""
        return Space(("angle", "detector"), (self.views, self.detectors), {}, "1")

    def rays(self, first: int, last: int, edges: bool = False) -> np.ndarray:
        """Points and directions of views, or of the borders between detectors: float64 (views, detectors (+ 1), 4), m."""
        vectors = np.asarray(self.vectors[first:last])[:, None]
        places = cells(self.detectors, edges)[:, None]
        on = vectors[..., 2:4] + places * vectors[..., 4:]
        start = np.broadcast_to(vectors[..., :2], on.shape)
        return np.concatenate([start, on - start] if self.fan else [on, start], axis=-1)


def cells(detectors: int, edges: bool = False) -> np.ndarray:
    """Places of detectors about the middle of the row, or of the borders between them, in steps."""
    return np.arange(detectors + edges) - (detectors - 1 + edges) / 2


def check_angles(angles: Sequence[float] | np.ndarray) -> tuple[float, ...]:
    """Angles in radians as a tuple of floats.

    Raises InputError for none, numbers that are not finite, or more than two turns.  Warns (UserWarning) of angles that look
    like degrees within two turns: at least three that span more than a turn and are whole numbers, or multiples of 0.05 in
    equal steps, as 0, 0.5, ..., 12 are.  Steps of a scan in radians are parts of a turn, which is no round number.
    """
    values = np.asarray(angles, dtype=np.float64)
    if values.ndim != 1 or values.size == 0 or not np.isfinite(values).all():
        raise InputError(f"angles must be a non-empty list of finite numbers (radians); got {angles!r}")
    if np.abs(values).max() > 4 * math.pi:
        raise InputError(
            f"angles are radians and reach {np.abs(values).max():g}, more than two turns; "
            "if they are degrees, pass numpy.deg2rad(angles)"
        )
    steps = np.diff(np.sort(values))
    finest = 20 if len(steps) and np.ptp(steps) < 1e-9 else 1
    round_numbers = bool(np.abs(finest * values - np.round(finest * values)).max() < 1e-9)
    if len(values) > 2 and round_numbers and float(np.ptp(values)) > 2 * math.pi:
        warnings.warn(
            f"angles are radians, and these {len(values)} round numbers from {values.min():g} to {values.max():g} span more "
            "than a turn; if they are degrees, pass numpy.deg2rad(angles)",
            UserWarning,
            stacklevel=4,
        )
    return tuple(values.tolist())


def check_projector(projector: str) -> None:
    """Raises InputError for an unknown one."""
    if projector not in get_args(Projector):
        raise InputError(f"projector must be one of {', '.join(get_args(Projector))}; got {projector!r}")


def whole(number: float, name: str) -> int:
    """A positive whole number.  Raises InputError for another."""
    if not float(number).is_integer() or number < 1:
        raise InputError(f"{name} must be a positive whole number; got {number!r}")
    return int(number)


def pixels(domain: Space, who: str) -> Grid:
    """The pixels of a slice of ``domain``; InputError when it is not a grid that ``who`` can project."""
    way_out = 'make it with Space.grid((ny, nx), pixel, "1/m"), or (nz, ny, nx) and (dz, pixel, pixel) for a stack'
    if domain.dims not in (("y", "x"), ("z", "y", "x")):
        raise InputError(f"{who} projects slices (y, x) or stacks (z, y, x); got {domain.describe()}; {way_out}")
    if domain.unit != "1/m":
        raise InputError(f"{who} takes attenuation in 1/m; got unit {domain.unit!r}; {way_out}")
    sides = [domain.spacing(dim) for dim, n in zip(("y", "x"), domain.shape[-2:], strict=True) if n > 1]
    if not sides or any(side is None or side <= 0 for side in sides) or not {"y", "x"} <= domain.coords.keys():
        raise InputError(f"{who} needs evenly spaced y and x coordinates in metres; {way_out}")
    pixel = float(sides[0] or 0.0)
    if not math.isclose(pixel, float(sides[-1] or 0.0), rel_tol=1e-5):
        raise InputError(f"{who} needs square pixels; got {sides[0]:g} m by {sides[-1]:g} m; {way_out}")
    y, x = np.asarray(domain.coords["y"]), np.asarray(domain.coords["x"])
    if (np.diff(y) > 0).any() or (np.diff(x) < 0).any():
        raise InputError(f"{who} needs y falling from the first row to the last and x growing; {way_out}")
    ny, nx = domain.shape[-2:]
    return Grid(ny, nx, pixel, float(x[0]) - pixel / 2, float(y[0]) + pixel / 2)


def reach(domain: Space) -> float:
    """Distance from the axis of rotation to the farthest corner of the image, m."""
    grid = pixels(domain, "a scan")
    across = max(abs(grid.left), abs(grid.left + grid.nx * grid.pixel))
    return math.hypot(across, max(abs(grid.top), abs(grid.top - grid.ny * grid.pixel)))


def _refuse_source_inside(grid: Grid, geometry: PlanarScan, domain: Space) -> None:
    for view in range(geometry.views):
        x, y = geometry.rays(view, view + 1)[0, 0, :2]
        right, bottom = grid.left + grid.nx * grid.pixel, grid.top - grid.ny * grid.pixel
        if (
            grid.left < x + grid.pixel
            and x - grid.pixel < right
            and bottom < y + grid.pixel
            and y - grid.pixel < grid.top
        ):
            raise InputError(
                f"the source of view {view} lies inside the image {domain.describe()}, or within a pixel of it; "
                "check source_distance and the pixel, both in metres"
            )
