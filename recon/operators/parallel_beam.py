r"""Two-dimensional parallel-beam computed tomography in physical units.

A view at angle ``theta`` measures the line integrals

    y(theta, s) = \int mu(s cos theta - t sin theta,  s sin theta + t cos theta) dt

of the attenuation ``mu`` (1/m) over the lines ``x cos theta + y sin theta = s`` (m), so ``y`` is dimensionless and a disc of
attenuation mu and radius r gives ``2 mu sqrt(r^2 - s^2)``.

Convention (ASTRA's): ``x`` grows with the column, ``y`` falls with the row (up on the page is positive), angles are radians
and turn counter-clockwise: theta = 0 looks along y and its detector runs along +x; theta = pi/2 looks along x and its
detector runs along +y.  Detector ``j`` of ``J`` sits at ``s_j = (j - (J - 1)/2) * spacing + offset``: a positive ``offset``
shifts the detector towards growing ``s``, so the axis of rotation projects on column ``(J - 1)/2 - offset/spacing``.

Projectors: "line", "strip" and "linear", in ``planar``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from recon.errors import InputError
from recon.operators.planar import (
    PlanarBeam,
    PlanarVectors,
    Projector,
    cells,
    check_angles,
    check_projector,
    pixels,
    reach,
    whole,
)
from recon.space import Space


@dataclass(frozen=True)
class ParallelGeometry:
    """Where the detectors are; a value: equal scans compare equal, and its repr builds it again.

    angles: radians.  detectors: how many per view.  spacing: between neighbours, m.  offset: of the detector's centre, m.
    Raises InputError for anything that cannot be a scan; warns (UserWarning) of angles that look like degrees.
    """

    angles: tuple[float, ...]
    detectors: int
    spacing: float
    offset: float = 0.0
    projector: Projector = "line"

    def __post_init__(self) -> None:
        object.__setattr__(self, "angles", check_angles(self.angles))
        object.__setattr__(self, "detectors", whole(self.detectors, "detectors"))
        if not 0 < self.spacing < math.inf:
            raise InputError(f"detector spacing must be a positive length in metres; got {self.spacing!r}")
        if not math.isfinite(self.offset):
            raise InputError(f"detector offset must be a finite length in metres; got {self.offset!r}")
        check_projector(self.projector)
        object.__setattr__(self, "spacing", float(self.spacing))
        object.__setattr__(self, "offset", float(self.offset))

    @property
    def fan(self) -> bool:
        """Whether the rays of a view start at one point: they do not."""
        return False

    @property
    def views(self) -> int:
        """How many."""
        return len(self.angles)

    @property
    def positions(self) -> np.ndarray:
        """``s_j``: float64 (detectors,), metres."""
        return cells(self.detectors) * self.spacing + self.offset

    @property
    def range(self) -> Space:
        """Sinograms (angle, detector) of line integrals, unit 1."""
        coords = {"angle": np.array(self.angles), "detector": self.positions}
        return Space(("angle", "detector"), (self.views, self.detectors), coords, "1")

    @property
    def measured(self) -> PlanarVectors:
        """The same scan, view by view."""
        cos, sin = np.cos(self.angles), np.sin(self.angles)
        rows = np.stack([sin, -cos, self.offset * cos, self.offset * sin, self.spacing * cos, self.spacing * sin], 1)
        return PlanarVectors(cast(tuple[tuple[float, ...], ...], rows), self.detectors, "parallel", self.projector)

    def rays(self, first: int, last: int, edges: bool = False) -> np.ndarray:
        """Points and directions of views, or of the borders between detectors: float64 (views, detectors (+ 1), 4), m."""
        cos, sin = np.cos(self.angles[first:last])[:, None], np.sin(self.angles[first:last])[:, None]
        s = cells(self.detectors, edges) * self.spacing + self.offset
        return np.stack(np.broadcast_arrays(s * cos, s * sin, sin, -cos), axis=-1)


class ParallelBeam(PlanarBeam):
    """Parallel-beam projections of a slice, or of every slice of a stack.

    domain: a ``Space.grid(shape, pixel, "1/m")``, (y, x) or (z, y, x).  angles: radians, or a whole scan, which brings the
    numbers that follow.  detectors: per view; None covers the diagonal.  spacing: of the detectors, m; None for the pixel.
    offset: of the detector's centre, m.  limit: bytes the matrix may take; above it the projection is computed on the fly.
    Maps (*batch, [z,] y, x) in 1/m to (*batch, [z,] angle, detector), dimensionless; float32 (``.double()`` for float64).

    Raises InputError for a domain or scan that makes no sense, or without numba.
    Source: Kak and Slaney 1988, chapter 3; conventions in the module's text.
    """

    geometry: Any  # a ParallelGeometry, or PlanarVectors of a measured scan

    def __init__(
        self,
        domain: Space,
        angles: Sequence[float] | np.ndarray | ParallelGeometry | PlanarVectors,
        detectors: int | None = None,
        spacing: float | None = None,
        offset: float = 0.0,
        projector: Projector = "line",
        limit: float = 4e9,
    ) -> None:
        if isinstance(angles, ParallelGeometry | PlanarVectors):
            if angles.fan or (detectors, spacing, offset, projector) != (None, None, 0.0, "line"):
                raise InputError(
                    "ParallelBeam takes a whole scan with parallel rays, which brings its own detectors and projector; "
                    f"got {angles!r:.200}, detectors={detectors}, spacing={spacing}, offset={offset}, projector={projector!r}"
                )
            super().__init__(domain, angles, limit)
            self.geometry = angles
            return
        pixel = pixels(domain, "ParallelBeam").pixel
        spacing = pixel if spacing is None else spacing
        if detectors is None:
            if not 0 < spacing < math.inf:
                raise InputError(f"detector spacing must be a positive length in metres; got {spacing!r}")
            detectors = covering(domain, spacing, offset)
        geometry = ParallelGeometry(cast(tuple[float, ...], angles), detectors, spacing, offset, projector)
        super().__init__(domain, geometry, limit)
        self.geometry = geometry

    @classmethod
    def from_geometry(
        cls, domain: Space, geometry: ParallelGeometry | PlanarVectors, limit: float = 4e9
    ) -> ParallelBeam:
        """The operator of a scan that is at hand.  Raises InputError for one of another kind."""
        return cls(domain, geometry, limit=limit)

    @classmethod
    def from_vectors(
        cls,
        domain: Space,
        vectors: Sequence[Sequence[float]] | np.ndarray,
        detectors: int,
        projector: Projector = "line",
        limit: float = 4e9,
    ) -> ParallelBeam:
        """The operator of a measured scan.

        vectors: (views, 6), metres, as ASTRA's ``parallel_vec``: direction of the rays, centre of the detector, step to the
        next detector, x and y each; any of them may change from view to view.
        """
        rows = cast(tuple[tuple[float, ...], ...], vectors)
        return cls.from_geometry(domain, PlanarVectors(rows, detectors, "parallel", projector), limit)

    @classmethod
    def half_turn(
        cls, shape: tuple[int, ...], pixel: float, views: int, arc: float = math.pi, projector: Projector = "line"
    ) -> ParallelBeam:
        """``views`` views evenly over ``[0, arc)`` radians of a centred image, detectors one pixel apart over the diagonal."""
        if views < 1:
            raise InputError(f"a scan needs at least one view; got {views}")
        return cls(Space.grid(shape, pixel, "1/m"), np.arange(views) * (arc / views), projector=projector)


def covering(domain: Space, spacing: float, offset: float = 0.0) -> int:
    """The smallest number of detectors that sees every corner of the image from every angle.

    ``2 (r + |offset|) / spacing`` rounded up, with ``r`` the distance from the axis of rotation to the farthest corner.
    """
    return max(1, math.ceil(2 * (reach(domain) + abs(offset)) / spacing - 1e-9))
