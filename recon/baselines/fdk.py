r"""Filtered back-projection of circular cone-beam scans (Feldkamp, Davis and Kress 1984, J. Opt. Soc. Am. A 1:612-619).

With ``D`` from source to axis, ``L`` from source to detector, and ``U = D - x sin theta + y cos theta`` the depth of a voxel,

    mu(x, y, z) = 1/2 \int (D / U)^2 q(theta, s, t) dtheta,     s = L (x cos theta + y sin theta) / U,     t = L z / U,

where ``q`` is the projection times ``L / sqrt(L^2 + s^2 + t^2)``, filtered along the rows by the ramp of spacing
``spacing D / L``, that of the detector brought to the axis.  Exact in the plane of the source; above and below it what no
circle sees (Tuy's condition) is missing, and values of objects that change along z fall off with the cone angle.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from recon.baselines.backprojection import Filter, _response
from recon.errors import InputError
from recon.operators.cone_beam import ConeBeam, ConeGeometry

_VOXELS = 2**21  # back-projected at a time


def fdk(operator: ConeBeam, projections: Tensor, filter: Filter = "ramp") -> Tensor:
    r"""Feldkamp's reconstruction of a full circular scan; the formula is the module's.

    projections: (\*batch, angle, row, detector).  filter: as in ``fbp``.  Each view weighs the angle it stands for.  Voxels are
    looked up on the detector with bilinear interpolation; what falls beside it counts as zero.
    Returns (\*batch, z, y, x) in 1/m.  Raises InputError for another operator, shape or filter, and for scans that the formula
    does not cover: helical or tilted ones, less than a full turn, measured vectors, a detector shifted so far that one side of
    the volume is seen from half of the views only.
    """
    geometry = _circular(operator)
    if filter not in get_args(Filter):
        raise InputError(f"filter must be one of {', '.join(get_args(Filter))}; got {filter!r}")
    batch = operator.range.require(tuple(projections.shape), "fdk")
    y = projections.reshape(-1, *operator.range.shape)
    D = geometry.source_distance
    L = D + geometry.detector_distance
    s, t = torch.from_numpy(geometry.positions), torch.from_numpy(geometry.row_positions)
    cosine = L / (L**2 + s**2 + t[:, None] ** 2).sqrt()
    response = torch.from_numpy(_response(geometry.detectors, geometry.spacing * D / L, filter)).to(y)
    padded = 2 * (len(response) - 1)
    filtered = torch.fft.irfft(torch.fft.rfft(y * cosine.to(y), n=padded) * response, n=padded)
    filtered = (
        filtered[..., : geometry.detectors]
        * torch.from_numpy(full_turn_weights(geometry.angles) / 2).to(y)[:, None, None]
    )
    nz, ny, nx = operator.domain.shape
    step = max(1, _VOXELS // (ny * nx))
    slabs = [_spread(operator, geometry, filtered, slice(z, z + step)) for z in range(0, nz, step)]
    return torch.cat(slabs, dim=1).reshape(*batch, nz, ny, nx)


def full_turn_weights(angles: Sequence[float]) -> np.ndarray:
    """The angle each view of a full turn stands for (radians): half the way to both neighbours.

    Raises InputError when the views leave a gap more than twice as wide as any other: that is no full turn.
    """
    turned = np.mod(np.asarray(angles, dtype=np.float64), 2 * math.pi)
    order = np.argsort(turned, kind="stable")
    gaps = np.diff(turned[order], append=turned[order[0]] + 2 * math.pi)
    ordered = np.sort(gaps[gaps > 1e-9])  # a view measured twice is no gap
    if len(ordered) < 2 or ordered[-1] > 2 * ordered[-2] + 1e-9:
        raise InputError(
            f"fdk needs views around a full turn; these leave {math.degrees(ordered[-1]):.4g} degrees out "
            "(cgls and tv take any scan)"
        )
    weights = np.empty_like(gaps)
    weights[order] = (gaps + np.roll(gaps, 1)) / 2
    return weights


def _spread(operator: ConeBeam, geometry: ConeGeometry, filtered: Tensor, slab: slice) -> Tensor:
    """``sum over views of (D / U)^2 q`` for some planes z: (n, angle, row, detector) to (n, planes, y, x)."""
    z, y, x = (torch.from_numpy(np.asarray(operator.domain.coords[dim])).to(filtered.device) for dim in "zyx")
    z = z[slab, None, None]
    D = geometry.source_distance
    L = D + geometry.detector_distance
    total = filtered.new_zeros(len(filtered), len(z), len(y), len(x))
    row_spacing, bottom, left = float(geometry.row_spacing or 0.0), geometry.row_positions[0], geometry.positions[0]
    for view, theta in enumerate(geometry.angles):
        sin, cos = math.sin(theta), math.cos(theta)
        depth = D - x * sin + y[:, None] * cos
        column = (L * (x * cos + y[:, None] * sin) / depth - left) / geometry.spacing
        row = (L * z / depth - bottom) / row_spacing
        # grid_sample counts from -1 to 1 over the outer edges of the elements.
        place = torch.stack(
            [((2 * column + 1) / geometry.detectors - 1).expand_as(row), (2 * row + 1) / geometry.rows - 1], dim=-1
        )
        seen = torch.nn.functional.grid_sample(
            filtered[None, :, view],
            place.to(filtered.dtype).flatten(0, 1)[None],
            padding_mode="zeros",
            align_corners=False,
        )
        total += seen.reshape(total.shape) * (D / depth).square().to(filtered.dtype)
    return total


def _circular(operator: ConeBeam) -> ConeGeometry:
    """The geometry of a scan that the formula covers; InputError with the way out for any other."""
    way_out = "cgls and tv take any linear operator"
    if not isinstance(operator, ConeBeam):
        raise InputError(f"fdk inverts ConeBeam; got {operator.describe()} ({way_out})")
    geometry = operator.geometry
    if not isinstance(geometry, ConeGeometry):
        raise InputError(f"fdk needs a circular scan given as ConeGeometry; got measured vectors ({way_out})")
    for name, value, unit in (("pitch", geometry.pitch, "m"), ("tilt", geometry.tilt, "rad")):
        if value:
            raise InputError(
                f"fdk needs a circular scan with an upright detector; got {name} {value:g} {unit} ({way_out})"
            )
    if geometry.offset:
        edges = geometry.positions[[0, -1]] + geometry.spacing / 2 * np.array([-1, 1])
        narrow = min(-edges[0], edges[1])
        L = geometry.source_distance + geometry.detector_distance
        seen = geometry.source_distance * narrow / math.hypot(L, narrow)
        ends = [side for dim in ("x", "y") for side in _ends(operator, dim)]
        if seen < min(ends) * (1 - 1e-9):
            raise InputError(
                f"fdk needs a detector that sees both sides of the axis alike; the offset {geometry.offset:g} m leaves "
                f"{seen:.4g} m on the narrow side of a volume that reaches {min(ends):.4g} m ({way_out})"
            )
    return geometry


def _ends(operator: ConeBeam, dim: str) -> tuple[float, float]:
    """How far the volume reaches from the axis to both sides along ``dim``, m."""
    values = np.asarray(operator.domain.coords[dim])
    half = operator.rays.sides["xyz".index(dim)] / 2
    return half - float(values.min()), half + float(values.max())
