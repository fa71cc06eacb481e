r"""Two-dimensional parallel-beam computed tomography in physical units.

A view at angle ``theta`` measures the line integrals

    y(theta, s) = \int mu(s cos theta - t sin theta,  s sin theta + t cos theta) dt

of the attenuation ``mu`` (1/m) over the lines ``x cos theta + y sin theta = s`` (m), so ``y`` is dimensionless and a disc of
attenuation mu and radius r gives ``2 mu sqrt(r^2 - s^2)``.

Convention (ASTRA's): ``x`` grows with the column, ``y`` falls with the row (up on the page is positive), angles are radians
and turn counter-clockwise: theta = 0 looks along y and its detector runs along +x; theta = pi/2 looks along x and its
detector runs along +y.  Detector ``j`` of ``J`` sits at ``s_j = (j - (J - 1)/2) * spacing + offset``: a positive ``offset``
shifts the detector towards growing ``s``, so the axis of rotation projects on column ``(J - 1)/2 - offset/spacing``.

Projectors (ASTRA's CPU kernels, exported once as a sparse matrix, so the transpose is exact):
"line": length of the ray through the detector's centre in each pixel; the fewest entries.
"strip": mean over the detector's width; keeps the mass of every pixel exactly; right for detectors wider than a pixel.
"linear": the ray samples the image with linear interpolation (Joseph 1982).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from scipy.sparse import csr_matrix, vstack
from torch import Tensor

from recon.errors import InputError, need
from recon.operators.base import LinearOperator
from recon.operators.csr import SparsePair, pair_bytes
from recon.space import Space

Projector = Literal["line", "strip", "linear"]

# ASTRA reserves the worst case per ray, so a whole scan at once would need several times the final memory.
_VIEWS_PER_EXPORT = 16


@dataclass(frozen=True)
class ParallelGeometry:
    """Where the detectors are; a value: equal scans compare equal, and its repr builds it again.

    angles: radians.  detectors: how many per view.  spacing: between neighbours, m.  offset: of the detector's centre, m.
    Raises InputError for anything that cannot be a scan.
    """

    angles: tuple[float, ...]
    detectors: int
    spacing: float
    offset: float = 0.0
    projector: Projector = "line"

    def __post_init__(self) -> None:
        values = np.asarray(self.angles, dtype=np.float64)
        if values.ndim != 1 or values.size == 0 or not np.isfinite(values).all():
            raise InputError(f"angles must be a non-empty list of finite numbers (radians); got {self.angles!r}")
        if np.abs(values).max() > 4 * math.pi:
            raise InputError(
                f"angles are radians and reach {np.abs(values).max():g}, more than two turns; "
                "if they are degrees, pass numpy.deg2rad(angles)"
            )
        if not float(self.detectors).is_integer() or self.detectors < 1:
            raise InputError(f"detectors must be a positive whole number; got {self.detectors!r}")
        if not 0 < self.spacing < math.inf:
            raise InputError(f"detector spacing must be a positive length in metres; got {self.spacing!r}")
        if not math.isfinite(self.offset):
            raise InputError(f"detector offset must be a finite length in metres; got {self.offset!r}")
        if self.projector not in get_args(Projector):
            raise InputError(f"projector must be one of {', '.join(get_args(Projector))}; got {self.projector!r}")
        object.__setattr__(self, "angles", tuple(values.tolist()))
        object.__setattr__(self, "detectors", int(self.detectors))
        object.__setattr__(self, "spacing", float(self.spacing))
        object.__setattr__(self, "offset", float(self.offset))

    @property
    def positions(self) -> np.ndarray:
        """``s_j``: float64 (detectors,), metres."""
        return (np.arange(self.detectors) - (self.detectors - 1) / 2) * self.spacing + self.offset

    @property
    def range(self) -> Space:
        """Sinograms (angle, detector) of line integrals, unit 1."""
        coords = {"angle": np.array(self.angles), "detector": self.positions}
        return Space(("angle", "detector"), (len(self.angles), self.detectors), coords, "1")

    def vectors(self, pixel: float) -> np.ndarray:
        """Rays, detector centres and detector steps in pixels, as ASTRA's ``parallel_vec`` wants them: (views, 6)."""
        cos, sin = np.cos(self.angles), np.sin(self.angles)
        shift, step = self.offset / pixel, self.spacing / pixel
        return np.stack([sin, -cos, shift * cos, shift * sin, step * cos, step * sin], axis=1)

    def entries(self, shape: tuple[int, int], pixel: float) -> float:
        """Number of non-zero matrix entries to expect (an upper estimate, within ~10 % when every ray hits the image)."""
        cos, sin = np.abs(np.cos(self.angles)), np.abs(np.sin(self.angles))
        ny, nx = shape
        step = self.spacing / pixel
        per_pixel = {
            "line": (cos + sin) / step,
            "strip": (cos + sin) / step + 1,
            "linear": 2 * np.maximum(cos, sin) / step,
        }
        longest = np.minimum(ny / np.maximum(cos, 1e-9), nx / np.maximum(sin, 1e-9))
        per_ray = {
            "line": longest * (cos + sin) + 1,
            "strip": longest * (cos + sin + step) + 2,
            "linear": 2.0 * max(ny, nx),
        }
        return float(np.minimum(ny * nx * per_pixel[self.projector], self.detectors * per_ray[self.projector]).sum())


class ParallelBeam(LinearOperator):
    """Parallel-beam projections of a slice: ``y[a, j] = sum_p (length of ray (a, j) in pixel p) * mu[p]``.

    domain: a ``Space.grid(shape, pixel, "1/m")``.  angles: radians.  detectors: per view; None covers the diagonal.
    spacing: of the detectors, m; None for the pixel.  offset: of the detector's centre, m.  limit: bytes the matrix may take.
    Maps (*batch, y, x) in 1/m to (*batch, angle, detector), dimensionless; float32 (``.double()`` for float64).

    Raises InputError for a domain or scan that makes no sense, a matrix above ``limit``, or without astra-toolbox.
    Source: van Aarle et al. 2016 (ASTRA); conventions in the module's text.
    """

    def __init__(
        self,
        domain: Space,
        angles: Sequence[float] | np.ndarray,
        detectors: int | None = None,
        spacing: float | None = None,
        offset: float = 0.0,
        projector: Projector = "line",
        limit: float = 4e9,
    ) -> None:
        pixel = _pixel(domain)
        spacing = pixel if spacing is None else spacing
        if detectors is None:
            if not 0 < spacing < math.inf:
                raise InputError(f"detector spacing must be a positive length in metres; got {spacing!r}")
            detectors = covering(domain, spacing, offset)
        geometry = ParallelGeometry(cast(tuple[float, ...], angles), detectors, spacing, offset, projector)
        super().__init__(domain, geometry.range)
        self.geometry, self.pixel = geometry, pixel
        _refuse_above(limit, self.bytes, geometry)
        self.matrix = SparsePair(_export(domain, geometry, pixel))

    @classmethod
    def from_geometry(cls, domain: Space, geometry: ParallelGeometry, limit: float = 4e9) -> ParallelBeam:
        """The operator of a ``ParallelGeometry``."""
        g = geometry
        return cls(domain, g.angles, g.detectors, g.spacing, g.offset, g.projector, limit)

    @classmethod
    def half_turn(
        cls, shape: tuple[int, int], pixel: float, views: int, arc: float = math.pi, projector: Projector = "line"
    ) -> ParallelBeam:
        """``views`` views evenly over ``[0, arc)`` radians of a centred image, detectors one pixel apart over the diagonal."""
        if views < 1:
            raise InputError(f"a scan needs at least one view; got {views}")
        return cls(Space.grid(shape, pixel, "1/m"), np.arange(views) * (arc / views), projector=projector)

    @property
    def bytes(self) -> int:
        """Memory of the matrix and its transpose, predicted from the geometry."""
        ny, nx = self.domain.shape
        entries = self.geometry.entries((ny, nx), self.pixel)
        return pair_bytes(entries, self.range.size, self.domain.size, torch.float32)

    def apply(self, x: Tensor) -> Tensor:
        return self.matrix(x.flatten(1)).reshape(-1, *self.range.shape)

    def apply_adjoint(self, y: Tensor) -> Tensor:
        return self.matrix.transpose(y.flatten(1)).reshape(-1, *self.domain.shape)


def covering(domain: Space, spacing: float, offset: float = 0.0) -> int:
    """The smallest number of detectors that sees every corner of the image from every angle.

    ``2 (r + |offset|) / spacing`` rounded up, with ``r`` the distance from the axis of rotation to the farthest corner.
    """
    half = _pixel(domain) / 2
    y, x = (float(np.abs(np.asarray(domain.coords[dim])).max()) + half for dim in ("y", "x"))
    return max(1, math.ceil(2 * (math.hypot(y, x) + abs(offset)) / spacing - 1e-9))


def _pixel(domain: Space) -> float:
    """Side of the square pixels of ``domain``; InputError when it is not a grid this operator can project."""
    way_out = 'make it with Space.grid((ny, nx), pixel, "1/m")'
    if domain.dims != ("y", "x"):
        raise InputError(f"ParallelBeam projects one slice (y, x); got {domain.describe()}; {way_out}")
    if domain.unit != "1/m":
        raise InputError(f"ParallelBeam takes attenuation in 1/m; got unit {domain.unit!r}; {way_out}")
    sides = [domain.spacing(dim) for dim, n in zip(domain.dims, domain.shape, strict=True) if n > 1]
    if not sides or any(side is None or side <= 0 for side in sides) or not set(domain.dims) <= domain.coords.keys():
        raise InputError(f"ParallelBeam needs evenly spaced y and x coordinates in metres; {way_out}")
    pixel = float(sides[0] or 0.0)
    if not math.isclose(pixel, float(sides[-1] or 0.0), rel_tol=1e-5):
        raise InputError(f"ParallelBeam needs square pixels; got {sides[0]:g} m by {sides[-1]:g} m; {way_out}")
    y, x = np.asarray(domain.coords["y"]), np.asarray(domain.coords["x"])
    if (np.diff(y) > 0).any() or (np.diff(x) < 0).any():
        raise InputError(f"ParallelBeam needs y falling from the first row to the last and x growing; {way_out}")
    return pixel


def _refuse_above(limit: float, size: int, geometry: ParallelGeometry) -> None:
    if size > limit:
        raise InputError(
            f"the system matrix of {len(geometry.angles)} views x {geometry.detectors} detectors would take about "
            f"{size / 1e9:.3g} GB, above the limit of {limit / 1e9:.3g} GB; use fewer views, detectors or pixels"
            f"{'' if geometry.projector == 'line' else ', the line projector'}, or raise limit="
        )


def _export(domain: Space, geometry: ParallelGeometry, pixel: float) -> csr_matrix:
    """The system matrix in metres (float32), rows (angle, detector), columns (y, x).  ASTRA's own copies are freed."""
    astra: Any = need("astra", "ct")
    ny, nx = domain.shape
    x, y = np.asarray(domain.coords["x"]) / pixel, np.asarray(domain.coords["y"]) / pixel
    volume = astra.create_vol_geom(ny, nx, x[0] - 0.5, x[-1] + 0.5, y[-1] - 0.5, y[0] + 0.5)
    vectors = geometry.vectors(pixel)
    parts = []
    for first in range(0, len(vectors), _VIEWS_PER_EXPORT):
        views = vectors[first : first + _VIEWS_PER_EXPORT]
        scan = astra.create_proj_geom("parallel_vec", geometry.detectors, views)
        projector = astra.create_projector(geometry.projector, scan, volume)
        exported = astra.projector.matrix(projector)
        try:
            part = astra.matrix.get(exported).astype(np.float32)
        finally:
            astra.matrix.delete(exported)
            astra.projector.delete(projector)
        part.eliminate_zeros()
        part.sort_indices()
        part.data *= np.float32(pixel)
        parts.append(part)
    return vstack(parts, format="csr")
