r"""Two-dimensional fan-beam computed tomography in physical units.

A view measures ``y = \int mu dl`` (dimensionless) along the rays from the source through the detectors; a disc of attenuation
mu (1/m) and radius r whose centre a ray misses by d gives ``2 mu sqrt(r^2 - d^2)``.  Rays run on behind the detector, so the
detector may be a virtual one on the axis (``detector_distance`` 0).

Convention (ASTRA's, and that of ``ParallelBeam``): ``x`` grows with the column, ``y`` falls with the row, angles are radians
and turn counter-clockwise.  At ``theta`` the source sits at ``source_distance * (sin theta, -cos theta)`` and the beam looks
along ``w = (-sin theta, cos theta)``: theta = 0 looks along +y.  The central ray, through the axis, meets the detector at
``C = detector_distance * w``.  Detector ``j`` of ``J`` sits ``s_j = (j - (J - 1)/2) * spacing + offset`` metres from C along
the detector, which runs along ``u = (cos theta, sin theta)``: growing ``s`` is growing ``x`` at theta = 0.

"flat": ``C + s u``.  "curved": on the arc about the source, ``s / R`` radians from C, with R from source to detector; ``s`` is
an arc length.  ``tilt`` then turns the detector about C, counter-clockwise, in the plane of the slice.

Projectors: "line", "strip" and "linear", in ``planar``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

import numpy as np

from recon.errors import InputError
from recon.operators.planar import (
    PlanarBeam,
    PlanarVectors,
    Projector,
    cells,
    check_angles,
    check_projector,
    reach,
    whole,
)
from recon.space import Space

Shape = Literal["flat", "curved"]


@dataclass(frozen=True)
class FanGeometry:
    """A scan on a circle; a value: equal scans compare equal, and its repr builds it again.

    angles: radians.  detectors: how many per view.  spacing: between neighbours, m, at the detector (along the arc of a curved
    one).  source_distance: from source to axis, m.  detector_distance: from axis to detector, m.  offset: of the detector's
    centre along the detector, m.  tilt: of the detector in the plane, radians.  shape: "flat" or "curved".
    Raises InputError for anything that cannot be a scan; warns (UserWarning) of angles that look like degrees.
    """

    angles: tuple[float, ...]
    detectors: int
    spacing: float
    source_distance: float
    detector_distance: float
    offset: float = 0.0
    tilt: float = 0.0
    shape: Shape = "flat"
    projector: Projector = "line"

    def __post_init__(self) -> None:
        object.__setattr__(self, "angles", check_angles(self.angles))
        object.__setattr__(self, "detectors", whole(self.detectors, "detectors"))
        for name in ("spacing", "source_distance"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} must be a positive length in metres; got {getattr(self, name)!r}")
        if not 0 <= self.detector_distance < math.inf:
            raise InputError(
                f"detector_distance, from the axis, must be a length in metres, not negative; got {self.detector_distance!r}"
            )
        if not math.isfinite(self.offset):
            raise InputError(f"detector offset must be a finite length in metres; got {self.offset!r}")
        if not abs(self.tilt) < math.pi / 2:
            raise InputError(
                f"tilt is in radians, less than a quarter turn; got {self.tilt!r} (numpy.deg2rad takes degrees)"
            )
        if self.shape not in get_args(Shape):
            raise InputError(f"shape must be one of {', '.join(get_args(Shape))}; got {self.shape!r}")
        check_projector(self.projector)
        for name in ("spacing", "source_distance", "detector_distance", "offset", "tilt"):
            object.__setattr__(self, name, float(getattr(self, name)))
        gamma = self.fan_angles(edges=True)
        if np.abs(gamma).max() >= math.pi / 2 or not (np.diff(gamma) > 0).all():
            raise InputError(
                f"the fan of {self.detectors} detectors {self.spacing:g} m apart reaches {np.abs(gamma).max():.3g} radians "
                "from its central ray, or folds back; check spacing, offset and tilt, in metres and radians"
            )

    @property
    def fan(self) -> bool:
        """Whether the rays of a view start at one point: they do."""
        return True

    @property
    def views(self) -> int:
        """How many."""
        return len(self.angles)

    @property
    def radius(self) -> float:
        """From source to detector along the central ray, m."""
        return self.source_distance + self.detector_distance

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
        """The same scan, view by view.  Raises InputError for a curved detector, which has no such rows."""
        if self.shape != "flat":
            raise InputError("only a flat detector is a source, a centre and a step; this one is curved")
        theta = np.asarray(self.angles)
        u, w = np.stack([np.cos(theta), np.sin(theta)], 1), np.stack([-np.sin(theta), np.cos(theta)], 1)
        along = math.cos(self.tilt) * u + math.sin(self.tilt) * w
        centre = self.detector_distance * w + self.offset * along
        rows = np.concatenate([-self.source_distance * w, centre, self.spacing * along], 1)
        return PlanarVectors(cast(tuple[tuple[float, ...], ...], rows), self.detectors, "fan", self.projector)

    def fan_angles(self, edges: bool = False) -> np.ndarray:
        """Angles between the rays and the central one, growing with ``s``, radians: (detectors,); or of the borders."""
        across, along = self._from_source(edges)
        return np.arctan2(across, along)

    def rays(self, first: int, last: int, edges: bool = False) -> np.ndarray:
        """Points and directions of views, or of the borders between detectors: float64 (views, detectors (+ 1), 4), m."""
        across, along = self._from_source(edges)
        cos, sin = np.cos(self.angles[first:last])[:, None], np.sin(self.angles[first:last])[:, None]
        d = self.source_distance
        rays = d * sin, -d * cos, across * cos - along * sin, across * sin + along * cos
        return np.stack(np.broadcast_arrays(*rays), axis=-1)

    def _from_source(self, edges: bool) -> tuple[np.ndarray, np.ndarray]:
        """Where detectors, or their borders, are as seen from the source: across and along the central ray, m."""
        s = cells(self.detectors, edges) * self.spacing + self.offset
        if self.shape == "flat":
            across, along = s, np.zeros_like(s)
        else:
            across, along = self.radius * np.sin(s / self.radius), self.radius * (np.cos(s / self.radius) - 1)
        cos, sin = math.cos(self.tilt), math.sin(self.tilt)
        return across * cos - along * sin, self.radius + across * sin + along * cos


class FanBeam(PlanarBeam):
    """Fan-beam projections of a slice, or of every slice of a stack.

    domain: a ``Space.grid(shape, pixel, "1/m")``, (y, x) or (z, y, x).  geometry: a ``FanGeometry``, or ``PlanarVectors`` of
    beam "fan".  limit: bytes the matrix may take; above it the projection is computed on the fly.
    Maps (*batch, [z,] y, x) in 1/m to (*batch, [z,] angle, detector), dimensionless; float32 (``.double()`` for float64).

    Raises InputError for a domain or scan that makes no sense, a source inside the image, or without numba.
    Source: Kak and Slaney 1988, chapter 3; conventions in the module's text.
    """

    def __init__(self, domain: Space, geometry: FanGeometry | PlanarVectors, limit: float = 4e9) -> None:
        if not isinstance(geometry, FanGeometry | PlanarVectors) or not geometry.fan:
            raise InputError(f"FanBeam takes a FanGeometry, or PlanarVectors of beam 'fan'; got {geometry!r:.200}")
        super().__init__(domain, geometry, limit)
        self.geometry = geometry

    @classmethod
    def from_geometry(cls, domain: Space, geometry: FanGeometry | PlanarVectors, limit: float = 4e9) -> FanBeam:
        """The operator of a scan that is at hand; the constructor under the name that ``ParallelBeam`` has for it."""
        return cls(domain, geometry, limit)

    @classmethod
    def from_vectors(
        cls,
        domain: Space,
        vectors: Sequence[Sequence[float]] | np.ndarray,
        detectors: int,
        projector: Projector = "line",
        limit: float = 4e9,
    ) -> FanBeam:
        """The operator of a measured scan with a flat detector.

        vectors: (views, 6), metres, as ASTRA's ``fanflat_vec``: source, centre of the detector, step to the next detector, x
        and y each; any of them may change from view to view.
        """
        rows = cast(tuple[tuple[float, ...], ...], vectors)
        return cls(domain, PlanarVectors(rows, detectors, "fan", projector), limit)

    @classmethod
    def full_turn(
        cls,
        domain: Space,
        views: int,
        source_distance: float,
        detector_distance: float,
        shape: Shape = "flat",
        projector: Projector = "line",
        arc: float = 2 * math.pi,
    ) -> FanBeam:
        """``views`` views evenly over ``[0, arc)`` radians; as many detectors as see the whole image.

        Neighbouring rays are one pixel apart on the axis.  Raises InputError where the source comes closer to the axis than a
        corner of the image.
        """
        if views < 1:
            raise InputError(f"a scan needs at least one view; got {views}")
        spacing = float(domain.spacing("x") or domain.spacing("y") or 0.0) * (1 + detector_distance / source_distance)
        detectors = covering_fan(domain, source_distance, detector_distance, spacing, shape)
        angles = tuple(np.arange(views) * (arc / views))
        geometry = FanGeometry(
            angles, detectors, spacing, source_distance, detector_distance, shape=shape, projector=projector
        )
        return cls(domain, geometry)


def covering_fan(
    domain: Space, source_distance: float, detector_distance: float, spacing: float, shape: Shape = "flat"
) -> int:
    """The smallest number of detectors, centred on the axis of rotation, that sees every corner of the image; lengths in m.

    Raises InputError where the source comes closer to the axis than a corner of the image.
    """
    far, radius = reach(domain), source_distance + detector_distance
    if not far < source_distance:
        raise InputError(
            f"the source, {source_distance:g} m from the axis, turns inside the image, which reaches {far:g} m"
        )
    half = math.asin(far / source_distance)
    half = radius * (math.tan(half) if shape == "flat" else half)
    return max(1, math.ceil(2 * half / spacing - 1e-9))
