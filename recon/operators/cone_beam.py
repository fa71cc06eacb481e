r"""Three-dimensional cone-beam computed tomography in physical units.

A view measures ``y = \int mu dl``, the line integrals of the attenuation ``mu`` (1/m) along the lines from the source through
the centres of the detector's elements, so ``y`` is dimensionless and a ball of attenuation mu and radius r whose centre the
line misses by ``d`` gives ``2 mu sqrt(r^2 - d^2)``.  The whole line counts (ASTRA's habit), so the detector may be a virtual
one on the axis.

Convention (ASTRA's, and that of ``ParallelBeam``): ``x`` grows with the column, ``y`` falls with the row of a slice, ``z``
grows with the slice and is the axis of rotation.  Angles are radians and turn counter-clockwise about z.  At ``theta`` the
source sits at ``source_distance * (sin theta, -cos theta)`` and the beam looks along ``w = (-sin theta, cos theta)``: theta = 0
looks along +y.  The detector stands across at ``detector_distance * w``; its columns run along
``u = (cos theta, sin theta, 0)``, its rows along ``v = (0, 0, 1)``.  Element (i, j) of I x J sits
``s_j = (j - (J - 1)/2) * spacing + offset`` along ``u`` and ``t_i = (i - (I - 1)/2) * row_spacing + row_offset`` along ``v``
from where the line from the source through the axis meets the detector.  ``tilt`` turns ``u`` towards +z and ``v`` with it,
in the plane of the detector.  On a helix, source and detector stand ``pitch * theta / (2 pi)`` higher.  A measured scan gives
source, detector, ``u`` and ``v`` of every view.

Projector: Joseph's (``cone_kernels``), because its sums are continuous in the ray, second order in the voxel, and the model of
ASTRA's CUDA projector, so that one operator means the same on both machines.  On the CPU the transpose is exact.  On CUDA
tensors ASTRA projects (``cone_astra``); its back-projector is not the transpose, and the operator says ``matched = False``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from recon.draws import Draws
from recon.errors import InputError, need
from recon.operators.base import LinearOperator
from recon.space import Space

Beam = Literal["cone", "parallel"]
_TURNS = 100  # a helix of more is a scan in degrees


@dataclass(frozen=True)
class ConeGeometry:
    """A circular or helical scan from its nominal parameters; a value: equal scans compare equal, and its repr builds it again.

    angles: radians.  rows, detectors: of the detector, per view.  spacing: between columns, m; row_spacing: between rows, m,
    the same when None.  source_distance: from source to axis, m.  detector_distance: from axis to detector, m.  offset,
    row_offset: of the detector's centre along its columns and rows, m.  tilt: of the detector in its plane, radians.
    pitch: rise per turn, m.  Raises InputError for anything that cannot be a scan.
    """

    angles: tuple[float, ...]
    rows: int
    detectors: int
    spacing: float
    source_distance: float
    detector_distance: float
    row_spacing: float | None = None
    offset: float = 0.0
    row_offset: float = 0.0
    tilt: float = 0.0
    pitch: float = 0.0

    def __post_init__(self) -> None:
        values = np.asarray(self.angles, dtype=np.float64)
        if values.ndim != 1 or values.size == 0 or not np.isfinite(values).all():
            raise InputError(f"angles must be a non-empty list of finite numbers (radians); got {self.angles!r}")
        turns = _TURNS if self.pitch else 2
        if np.abs(values).max() > turns * 2 * math.pi:
            raise InputError(
                f"angles are radians and reach {np.abs(values).max():g}, more than {turns} turns; "
                "if they are degrees, pass numpy.deg2rad(angles)"
            )
        if self.row_spacing is None:
            object.__setattr__(self, "row_spacing", self.spacing)
        for name in ("spacing", "row_spacing", "source_distance"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} must be a positive length in metres; got {getattr(self, name)!r}")
        if not 0 <= self.detector_distance < math.inf:
            raise InputError(
                f"detector_distance, from the axis, must be a length in metres, not negative; got {self.detector_distance!r}"
            )
        for name in ("offset", "row_offset", "tilt", "pitch"):
            if not math.isfinite(getattr(self, name)):
                raise InputError(f"{name} must be finite; got {getattr(self, name)!r}")
        if abs(self.tilt) > 2 * math.pi:
            raise InputError(f"tilt is in radians, at most a turn; got {self.tilt!r} (numpy.deg2rad takes degrees)")
        object.__setattr__(self, "angles", tuple(values.tolist()))
        _whole(self, "rows", "detectors")
        for name in ("spacing", "row_spacing", "source_distance", "detector_distance", *_OFFSETS):
            object.__setattr__(self, name, float(getattr(self, name)))

    @property
    def positions(self) -> np.ndarray:
        """``s_j``: float64 (detectors,), metres."""
        return (np.arange(self.detectors) - (self.detectors - 1) / 2) * self.spacing + self.offset

    @property
    def row_positions(self) -> np.ndarray:
        """``t_i``: float64 (rows,), metres."""
        return (np.arange(self.rows) - (self.rows - 1) / 2) * float(self.row_spacing or 0.0) + self.row_offset

    @property
    def measured(self) -> VectorGeometry:
        """The same scan, view by view."""
        theta = np.asarray(self.angles)
        zero, one = np.zeros_like(theta), np.ones_like(theta)
        along = np.stack([-np.sin(theta), np.cos(theta), zero], axis=1)
        across, up = np.stack([np.cos(theta), np.sin(theta), zero], axis=1), np.stack([zero, zero, one], axis=1)
        u = math.cos(self.tilt) * across + math.sin(self.tilt) * up
        v = math.cos(self.tilt) * up - math.sin(self.tilt) * across
        height = (self.pitch / (2 * math.pi) * theta)[:, None] * up
        source = height - self.source_distance * along
        centre = height + self.detector_distance * along + self.offset * u + self.row_offset * v
        vectors = np.concatenate([source, centre, self.spacing * u, float(self.row_spacing or 0.0) * v], axis=1)
        return VectorGeometry(cast(tuple[tuple[float, ...], ...], vectors), self.rows, self.detectors)

    @property
    def range(self) -> Space:
        """Projections (angle, row, detector) of line integrals, unit 1."""
        coords = {"angle": np.array(self.angles), "row": self.row_positions, "detector": self.positions}
        return Space(tuple(coords), (len(self.angles), self.rows, self.detectors), coords, "1")


_OFFSETS = ("offset", "row_offset", "tilt", "pitch")


@dataclass(frozen=True)
class VectorGeometry:
    """A measured scan; a value like ``ConeGeometry``.

    vectors: (views, 12), metres, ASTRA's ``cone_vec``: source xyz, centre of the detector xyz, step to the next column xyz,
    step to the next row xyz.  For beam "parallel" (``parallel3d_vec``) the direction of the rays stands in place of the source.
    Raises InputError for another shape, numbers that are not finite, or views whose rays run along the detector.
    """

    vectors: tuple[tuple[float, ...], ...]
    rows: int
    detectors: int
    beam: Beam = "cone"

    def __post_init__(self) -> None:
        vectors = np.asarray(self.vectors, dtype=np.float64)
        if vectors.ndim != 2 or vectors.shape[1] != 12 or len(vectors) == 0 or not np.isfinite(vectors).all():
            raise InputError(
                "vectors must be (views, 12) finite numbers in metres: source, detector centre, column step, row step, "
                f"xyz each; got shape {vectors.shape}"
            )
        if self.beam not in ("cone", "parallel"):
            raise InputError(f"beam must be 'cone' or 'parallel'; got {self.beam!r}")
        object.__setattr__(self, "vectors", tuple(map(tuple, vectors.tolist())))
        _whole(self, "rows", "detectors")
        u, v = vectors[:, 6:9], vectors[:, 9:12]
        ray = vectors[:, :3] if self.beam == "parallel" else vectors[:, 3:6] - vectors[:, :3]
        volume = np.abs((np.cross(u, v) * ray).sum(1))
        flat = volume <= 1e-9 * np.linalg.norm(u, axis=1) * np.linalg.norm(v, axis=1) * np.linalg.norm(ray, axis=1)
        if flat.any():
            raise InputError(
                f"the rays of view {int(flat.argmax())} run along the detector, or its steps are parallel or zero; "
                "each row is source, detector centre, column step, row step"
            )

    @property
    def range(self) -> Space:
        """Projections (angle, row, detector) of line integrals, unit 1; the views are only counted."""
        return Space(("angle", "row", "detector"), (len(self.vectors), self.rows, self.detectors), {}, "1")

    @property
    def measured(self) -> VectorGeometry:
        """Itself."""
        return self


def _whole(geometry: object, *names: str) -> None:
    for name in names:
        value = getattr(geometry, name)
        if not float(value).is_integer() or value < 1:
            raise InputError(f"{name} must be a positive whole number; got {value!r}")
        object.__setattr__(geometry, name, int(value))


@dataclass(frozen=True, eq=False)
class Rays:
    """A scan in voxel indices, where voxels are unit cubes about whole numbers and y grows with the row; axes x first.

    views: float64 (views, 12), source (or direction), first element, column step, row step.  shape: voxels.  sides: m.
    """

    views: np.ndarray
    rows: int
    columns: int
    parallel: bool
    shape: tuple[int, int, int]
    sides: tuple[float, float, float]

    @classmethod
    def of(cls, domain: Space, geometry: VectorGeometry) -> Rays:
        """The rays of ``geometry`` in the voxels of ``domain``.  Raises InputError for a domain that is no volume."""
        first, step = _voxels(domain)
        vectors = np.asarray(geometry.vectors).reshape(-1, 4, 3)
        views = vectors / step
        views[:, 1] -= first / step
        if geometry.beam == "cone":
            views[:, 0] -= first / step
        corner = (geometry.detectors - 1) / 2 * views[:, 2] + (geometry.rows - 1) / 2 * views[:, 3]
        views[:, 1] -= corner
        nz, ny, nx = domain.shape
        sides = tuple(np.abs(step).tolist())
        parallel = geometry.beam == "parallel"
        return cls(views.reshape(-1, 12), geometry.rows, geometry.detectors, parallel, (nx, ny, nz), sides)

    def shadows(self) -> np.ndarray:
        """Columns and rows on which the eight corners of the volume fall: (views, 8, 2); NaN for those behind a source."""
        ends = [(-0.5, n - 0.5) for n in self.shape]
        return self.fall(np.array([(x, y, z) for x in ends[0] for y in ends[1] for z in ends[2]]))

    def fall(self, points: np.ndarray) -> np.ndarray:
        """Columns and rows on which ``points`` (n, 3) fall: (views, n, 2); NaN for those behind a source."""
        a, first, u, v = (part[:, None] for part in self.views.reshape(-1, 4, 3).swapaxes(0, 1))
        normal = np.cross(u, v)
        if self.parallel:
            hit = points + ((first - points) * normal).sum(-1, keepdims=True) / (a * normal).sum(-1, keepdims=True) * a
        else:
            along = points - a
            depth = (along * normal).sum(-1, keepdims=True) / ((first - a) * normal).sum(-1, keepdims=True)
            hit = a + along / np.where(depth > 1e-12, depth, np.nan)
        area = (normal * normal).sum(-1)
        away = hit - first
        return np.stack(
            [(np.cross(away, v) * normal).sum(-1) / area, (np.cross(u, away) * normal).sum(-1) / area], axis=-1
        )


class ConeBeam(LinearOperator):
    """Cone-beam projections of a volume: ``y[a, i, j]`` is the line integral of ``mu`` along the ray to element (i, j), view a.

    domain: a ``Space.grid((nz, ny, nx), (dz, dy, dx), "1/m")``; one voxel alone is as wide as those of another axis.
    geometry: a ``ConeGeometry`` or a ``VectorGeometry``.
    Maps (*batch, z, y, x) in 1/m to (*batch, angle, row, detector), dimensionless; float32, or float64 after ``.double()``;
    ``torch.get_num_threads()`` threads, with the same bits for any number of them.  After ``.to("cuda")`` ASTRA projects,
    in float32 and with ``matched = False``.

    Raises InputError for a domain that is no volume, a source inside the volume, a scan whose rays all miss it; without numba,
    or on CUDA without a usable astra-toolbox, at the first projection.
    Source: Joseph 1982; conventions in the module's text.
    """

    sides: Tensor

    def __init__(self, domain: Space, geometry: ConeGeometry | VectorGeometry) -> None:
        rays = Rays.of(domain, geometry.measured)
        _refuse_nonsense(rays, domain)
        super().__init__(domain, geometry.range)
        self.geometry, self.rays = geometry, rays
        # The geometry stays in double precision whatever the operator's; this buffer only says which type and machine it is on.
        self.register_buffer("sides", torch.tensor(rays.sides, dtype=torch.float32), persistent=False)

    @classmethod
    def from_vectors(
        cls,
        domain: Space,
        vectors: Sequence[Sequence[float]] | np.ndarray,
        rows: int,
        detectors: int,
        beam: Beam = "cone",
    ) -> ConeBeam:
        """The operator of a measured scan: ``vectors`` (views, 12) in metres, as in ``VectorGeometry``."""
        return cls(domain, VectorGeometry(cast(tuple[tuple[float, ...], ...], vectors), rows, detectors, beam))

    @property
    def matched(self) -> bool:
        """Whether the adjoint is the exact transpose: on the CPU it is, ASTRA's on CUDA is not."""
        return self.sides.device.type == "cpu"

    def apply(self, x: Tensor) -> Tensor:
        return self._machine(x).project(self.rays, x)

    def apply_adjoint(self, y: Tensor) -> Tensor:
        return self._machine(y).backproject(self.rays, y)

    def mismatch(self, probes: int = 3) -> float:
        """How far the adjoint is from the transpose: ``max |<A u, v> - <u, A^T v>| / (|A u| |v|)`` over random pairs.

        Rounding for the CPU pair; the price of ASTRA's back-projector on CUDA.  Raises InputError for ``probes < 1``.
        """
        if probes < 1:
            raise InputError(f"mismatch needs at least one pair of probes; got {probes}")
        draws = Draws(0, range(probes))
        u, v = (draws.normal(i, s.shape, "probe", dtype=self.dtype) for i, s in enumerate((self.domain, self.range)))
        u, v = u.to(self.device), v.to(self.device)
        Au, Av = self.A(u).double(), self.A_adjoint(v).double()
        gap = (Au * v).flatten(1).sum(1) - (u * Av).flatten(1).sum(1)
        return float((gap.abs() / (Au.flatten(1).norm(dim=1) * v.double().flatten(1).norm(dim=1))).max())

    def _machine(self, given: Tensor) -> Any:  # noqa: ANN401  (a module with project and backproject)
        """Who computes on ``given``.  Raises InputError when it is not where the operator is, or of another type."""
        if given.device != self.sides.device or given.device.type not in ("cpu", "cuda"):
            raise InputError(
                f"{self.describe()} is on {self.sides.device} and computes on cpu or cuda; got a tensor on {given.device} "
                "(move one: operator.to(device) or x.to(device))"
            )
        if given.dtype != self.sides.dtype or given.dtype not in (torch.float32, torch.float64):
            raise InputError(
                f"this operator holds {self.sides.dtype} numbers and computes in float32 or float64; got {given.dtype} "
                "(convert one: operator.to(dtype) or x.to(dtype))"
            )
        if given.is_cuda:
            from recon.operators import cone_astra

            return cone_astra
        need("numba", "ct")
        from recon.operators import cone_kernels

        return cone_kernels


def _voxels(domain: Space) -> tuple[np.ndarray, np.ndarray]:
    """Centre of the first voxel and signed steps (x, y, z), m; InputError for a domain this operator cannot project."""
    way_out = 'make it with Space.grid((nz, ny, nx), (dz, dy, dx), "1/m")'
    if domain.dims != ("z", "y", "x"):
        raise InputError(f"ConeBeam projects volumes (z, y, x); got {domain.describe()}; {way_out}")
    if domain.unit != "1/m":
        raise InputError(f"ConeBeam takes attenuation in 1/m; got unit {domain.unit!r}; {way_out}")
    sides = {d: domain.spacing(d) for d, n in zip(domain.dims, domain.shape, strict=True) if n > 1}
    known = [side for side in sides.values() if side]
    if not known or len(known) < len(sides) or not set(domain.dims) <= domain.coords.keys():
        raise InputError(f"ConeBeam needs evenly spaced z, y and x coordinates in metres; {way_out}")
    x, y, z = (np.asarray(domain.coords[dim]) for dim in ("x", "y", "z"))
    if (np.diff(y) > 0).any() or (np.diff(x) < 0).any() or (np.diff(z) < 0).any():
        raise InputError(f"ConeBeam needs y falling with the row, and x and z growing; {way_out}")
    dx, dy, dz = (sides.get(dim) or known[-1] for dim in ("x", "y", "z"))
    return np.array([x[0], y[0], z[0]], dtype=np.float64), np.array([dx, -dy, dz], dtype=np.float64)


def _refuse_nonsense(rays: Rays, domain: Space) -> None:
    """A source inside the volume, and volumes that no view sees: most often lengths in other units than metres."""
    if not rays.parallel:
        source, half = rays.views[:, :3], np.array(rays.shape) / 2
        inside = (np.abs(source - (half - 0.5)) < half).all(axis=1)
        if inside.any():
            raise InputError(
                f"the source of view {int(inside.argmax())} lies inside the volume {domain.describe()}; "
                "check source_distance and the voxel, both in metres"
            )
    shadows = rays.shadows()
    low, high = np.nanmin(shadows, axis=1, initial=np.inf), np.nanmax(shadows, axis=1, initial=-np.inf)
    partly = np.isnan(shadows).any(axis=(1, 2)) & ~np.isnan(shadows).all(axis=(1, 2))
    size = np.array([rays.columns, rays.rows])
    seen = ((high > -0.5) & (low < size - 0.5)).all(axis=1) | partly
    if not seen.any():
        raise InputError(
            f"no ray of the scan meets the volume {domain.describe()}; check that all lengths are metres, and the angles and "
            "offsets"
        )
