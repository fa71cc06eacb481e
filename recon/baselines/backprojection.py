r"""Filtered back-projection of parallel-beam and fan-beam sinograms.

Parallel rays: ``x = sum_theta dtheta / pixel^2 A_theta^T (h * y_theta)`` with the ramp ``h`` of detectors one unit apart.  The
transpose of the projector spreads a view with weights whose sum over the rays is ``pixel^2 / spacing`` per pixel, so the
factor in front makes it an interpolation, whatever the spacing.

A fan (Kak and Slaney 1988, section 3.4): ``x(p) = sum_theta dtheta W(p) (h * (w cos(gamma) y_theta))(s(p))`` with the angle
gamma of a ray from the line between source and axis, and s(p) where the ray through p meets the detector, linearly
interpolated.  The ramp is homogeneous, ``h(a t) = h(t) / a^2``, which makes the sum exact on any straight detector, shifted
and tilted ones included: ``W = D d / U^2``, with D from source to axis, d from source to detector and U from source to p, both
along the detector's normal.  On an arc about the source h becomes ``(gamma / sin gamma)^2 h(gamma)`` and ``W = D / L^2``, with
L from source to p.

Each line counts once: ``w = c / (c + c')`` (Noo et al. 2002, Phys. Med. Biol. 47:2525-2546), where c falls smoothly to 0 at the
ends of an arc of less than a turn, and at the near end of a shifted detector, and c' is its value at the opposite ray: at
gamma' = -gamma, theta' = theta + pi - 2 gamma.  So a whole turn, a short scan and a detector that covers half of the object are
all the same sum, and lines that nobody measured are simply absent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import scipy.fft
import torch
from torch import Tensor

from recon.errors import InputError
from recon.operators.fan_beam import FanBeam, FanGeometry
from recon.operators.parallel_beam import ParallelBeam, ParallelGeometry
from recon.operators.planar import PlanarVectors

Filter = Literal["ramp", "shepp-logan", "cosine", "hamming", "hann"]
_SHIFTED = 2.0  # detectors; a row that is shifted by less covers the object on both sides


def fbp(operator: ParallelBeam | FanBeam, sinogram: Tensor, filter: Filter = "ramp") -> Tensor:
    """Filtered back-projection, by the formulas of the module's text.

    sinogram: (*batch, [z,] angle, detector).  filter: the band-limited ramp (Kak and Slaney 1988, eq. 61), alone or times a
    window that falls towards the highest frequency.  Each view weighs the angle it stands for; across a missing wedge the views
    keep their ordinary spacing, so limited-angle images lack that wedge instead of smearing its edges.
    Returns (*batch, [z,] y, x) in 1/m.  The transpose of a parallel projector spreads each ray over its pixels: with detectors
    much wider than pixels use the "strip" projector.
    Raises InputError for another operator, shape or filter, a tilted arc, or sources that do not turn on a circle.
    """
    if not isinstance(operator, ParallelBeam | FanBeam):
        raise InputError(
            f"fbp inverts ParallelBeam and FanBeam; got {operator.describe()} (cgls and tv take any linear operator)"
        )
    if filter not in get_args(Filter):
        raise InputError(f"filter must be one of {', '.join(get_args(Filter))}; got {filter!r}")
    batch = operator.range.require(tuple(sinogram.shape), "fbp")
    rows = sinogram.reshape(-1, *operator.range.shape[-2:])
    image = _parallel(operator, rows, filter) if isinstance(operator, ParallelBeam) else _fan(operator, rows, filter)
    return image.reshape(*batch, *operator.domain.shape)


def view_weights(angles: Sequence[float] | np.ndarray, period: float = math.pi) -> np.ndarray:
    """The angle each view stands for (radians): half the way to both neighbours, modulo ``period``.

    period: half a turn for parallel rays, a turn for a fan.  One gap more than twice as wide as any other is a missing wedge
    and counts as the median of the others.
    """
    turned = np.mod(np.asarray(angles, dtype=np.float64), period)
    order = np.argsort(turned, kind="stable")
    gaps = _gaps(turned[order], period)
    wedge = _wedge(gaps)
    if wedge is not None:
        gaps[wedge] = np.median(np.sort(gaps[gaps > 0])[:-1])
    weights = np.empty_like(gaps)
    weights[order] = (gaps + np.roll(gaps, 1)) / 2
    return weights


def _gaps(ordered: np.ndarray, period: float) -> np.ndarray:
    """The gap after each view, to the first one again after the last."""
    gaps = np.diff(ordered, append=ordered[0] + period)
    # Views that measure the same lines: rounding must not make a tiny positive gap of them.
    gaps[gaps < 1e-9] = 0.0
    return gaps


def _wedge(gaps: np.ndarray) -> int | None:
    """Which gap is a missing wedge; None where there is none."""
    ordered = np.sort(gaps[gaps > 0])
    return int(np.argmax(gaps)) if len(ordered) > 1 and ordered[-1] > 2 * ordered[-2] else None


# --- Parallel rays -------------------------------------------------------------------------------------------------------


def _parallel(operator: ParallelBeam, rows: Tensor, filter: Filter) -> Tensor:
    geometry = operator.geometry
    if isinstance(geometry, ParallelGeometry):
        angles, cells = np.asarray(geometry.angles), geometry.positions / geometry.spacing
        weights = 2 * _once(angles, np.add.outer(angles, np.full(len(cells), math.pi)), cells, wide=False)
        if float(np.ptp(weights)) > 0:
            operator, rows, weights = _widened(operator, geometry, rows, weights)
    else:
        vectors = np.asarray(geometry.vectors)
        angles, weights = np.arctan2(vectors[:, 0], -vectors[:, 1]), np.ones((geometry.views, geometry.detectors))
    weights = weights * view_weights(angles)[:, None]
    filtered = _filtered(rows * torch.from_numpy(weights).to(rows), _response(rows.shape[-1], 1.0, filter))
    stacked = filtered.reshape(-1, *operator.range.shape)
    return operator.A_adjoint(stacked).reshape(-1, *operator.domain.shape[-2:]) / operator.pixel**2


def _widened(
    operator: ParallelBeam, geometry: ParallelGeometry, rows: Tensor, weights: np.ndarray
) -> tuple[ParallelBeam, Tensor, np.ndarray]:
    """The same scan with a detector that reaches as far on the near side as on the other, where it measured nothing."""
    low, high = _missing(geometry.positions / geometry.spacing)
    wide = replace(
        geometry,
        detectors=geometry.detectors + low + high,
        offset=geometry.offset + (high - low) / 2 * geometry.spacing,
    )
    made = ParallelBeam.from_geometry(operator.domain, wide).to(operator.device, operator.dtype)
    return made, torch.nn.functional.pad(rows, (low, high)), np.pad(weights, ((0, 0), (low, high)))


# --- A fan ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Fan:
    """What back-projection needs to know of a fan-beam scan.

    angles: theta of the source (views,).  sources: where it is (views, 2), m.  gamma: of the rays (views, detectors).
    """

    geometry: FanGeometry | PlanarVectors
    angles: np.ndarray
    sources: np.ndarray
    gamma: np.ndarray

    @classmethod
    def of(cls, geometry: FanGeometry | PlanarVectors) -> _Fan:
        rays = geometry.rays(0, geometry.views)
        sources = rays[:, 0, :2]
        distance = np.hypot(*sources.T)
        if distance.max() > 1.05 * distance.min():
            raise InputError(
                f"fbp needs a source that turns on a circle about the axis; here it comes from {distance.min():g} to "
                f"{distance.max():g} m from it (cgls and tv take any geometry)"
            )
        angles = np.arctan2(sources[:, 0], -sources[:, 1])
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        across, along = rays[..., 2] * cos + rays[..., 3] * sin, rays[..., 3] * cos - rays[..., 2] * sin
        return cls(geometry, angles, sources, np.arctan2(across, along))

    def place(self, view: int, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the rays through points meet the detector (in detectors from the first one), and ``W``."""
        g, source = self.geometry, self.sources[view]
        x, y, far = x - source[0], y - source[1], float(np.hypot(*source))
        if isinstance(g, FanGeometry) and g.shape == "curved":
            cos, sin = np.cos(self.angles[view]), np.sin(self.angles[view])
            s = g.radius * np.arctan2(x * cos + y * sin, y * cos - x * sin)
            return (s - g.positions[0]) / g.spacing, far / (x * x + y * y)
        vector = np.asarray((g if isinstance(g, PlanarVectors) else g.measured).vectors[view])
        centre, step = vector[2:4] - source, vector[4:]
        spacing = float(np.hypot(*step))
        normal = np.array([-step[1], step[0]]) / spacing
        normal = normal if normal @ centre > 0 else -normal
        depth = float(normal @ centre)
        along = np.maximum(x * normal[0] + y * normal[1], 1e-9 * depth)  # behind the source nothing is measured anyway
        s = ((x * depth / along - centre[0]) * step[0] + (y * depth / along - centre[1]) * step[1]) / spacing**2
        return s + (g.detectors - 1) / 2, far * depth / along**2 / spacing


def _fan(operator: FanBeam, rows: Tensor, filter: Filter) -> Tensor:
    geometry: Any = operator.geometry
    curved = isinstance(geometry, FanGeometry) and geometry.shape == "curved"
    if curved and geometry.tilt:
        raise InputError("fbp needs an arc about the source; this one is tilted (cgls and tv take any geometry)")
    fan = _Fan.of(geometry)
    step = geometry.spacing / geometry.radius if curved else 1.0
    middle = np.median(fan.gamma, axis=0)
    cells = middle / max(float(np.abs(np.diff(middle)).mean()), 1e-12) if len(middle) > 1 else middle
    weights = _once(fan.angles, fan.angles[:, None] + math.pi - 2 * fan.gamma, cells, wide=True)
    weights = weights * np.cos(fan.gamma) * view_weights(fan.angles, 2 * math.pi)[:, None]
    low, high = _missing(cells)
    wide = torch.nn.functional.pad(rows * torch.from_numpy(weights).to(rows), (low, high))
    filtered = _filtered(wide, _response(wide.shape[-1], step, filter, curved))
    padded = torch.nn.functional.pad(filtered, (1, 2))  # beyond the detector there is nothing
    y, x = np.meshgrid(operator.domain.coords["y"], operator.domain.coords["x"], indexing="ij")
    out = rows.new_zeros(len(rows), x.size)
    for view in range(geometry.views):
        place, weight = fan.place(view, x.ravel(), y.ravel())
        place = np.clip(place + low + 1, 0, wide.shape[-1] + 1)
        first = np.floor(place)
        at = torch.from_numpy(first.astype(np.int64)).to(rows.device)
        near, far = (
            torch.from_numpy(part).to(rows) for part in ((first + 1 - place) * weight, (place - first) * weight)
        )
        out = out + near * padded[:, view, at] + far * padded[:, view, at + 1]
    return out


def _missing(cells: np.ndarray) -> tuple[int, int]:
    """Detectors that a shifted row lacks on its two sides to be as long on both.

    The filter spreads what the long side measured over the short one, where pixels wait for it.
    """
    short = round(float(cells[0] + cells[-1]) * float(np.sign(cells[-1] - cells[0])))
    return (max(short, 0), max(-short, 0)) if abs(short) > _SHIFTED else (0, 0)


def _once(angles: np.ndarray, opposite: np.ndarray, cells: np.ndarray, wide: bool) -> np.ndarray:
    """Weights (views, detectors) that count every line once: ``c / (c + c')``.

    opposite: theta' of every ray.  cells: positions of the detectors about the central ray, in detectors.  wide: whether arcs
    are counted modulo a turn (a fan); parallel views are, by ``view_weights``, modulo half a turn and need this for shifted
    detectors of a whole turn only.
    """
    turned = np.sort(np.mod(angles, 2 * math.pi))
    gaps = _gaps(turned, 2 * math.pi)
    wedge, balance = _wedge(gaps), float(cells[0] + cells[-1])
    shifted = abs(balance) > _SHIFTED
    if not wide and (wedge is not None or not shifted or len(turned) < 2):
        return np.full(opposite.shape, 0.5)
    side = np.ones_like(cells), np.ones_like(cells)
    if shifted:
        near = max(min(abs(cells[0]), abs(cells[-1])) + 0.5, 1.0)
        falling = np.sin(math.pi / 2 * np.clip((near - np.abs(cells)) / (0.2 * near), 0, 1)) ** 2
        short = np.sign(cells) != np.sign(balance)
        side = np.where(short, falling, 1.0), np.where(short, 1.0, falling)
    own, other = np.ones((len(angles), 1)), np.ones(opposite.shape)
    if wedge is not None:
        gap = float(np.median(gaps[gaps > 0]))
        start, arc = turned[(wedge + 1) % len(turned)] - gap / 2, 2 * math.pi - gaps[wedge] + gap
        width = max((arc - math.pi) / 2, math.radians(10), 3 * gap)
        own, other = (_taper(np.mod(a - start, 2 * math.pi), arc, width) for a in (angles[:, None], opposite))
    c, opposed = own * side[0], other * side[1]
    return c / np.maximum(c + opposed, 1e-12)


def _taper(place: np.ndarray, arc: float, width: float) -> np.ndarray:
    """1 inside [0, arc], falling to 0 at both ends over ``width``."""
    inside = np.minimum(place, arc - place)
    taper: np.ndarray = np.sin(math.pi / 2 * np.clip(inside / min(width, arc / 2), 0, 1)) ** 2
    return taper


# --- The filter ----------------------------------------------------------------------------------------------------------


def _filtered(rows: Tensor, response: np.ndarray) -> Tensor:
    padded = 2 * (len(response) - 1)
    spectrum = torch.fft.rfft(rows, n=padded) * torch.from_numpy(response).to(rows)
    return torch.fft.irfft(spectrum, n=padded)[..., : rows.shape[-1]]


def _response(detectors: int, spacing: float, filter: Filter, arc: bool = False) -> np.ndarray:
    """Frequency response of the filter for zero-padded rows: float64 (padded / 2 + 1,), 1/spacing.

    Made from the sampled kernel ``h(0) = 1/(4 t^2), h(odd n) = -1/(n pi t)^2, h(even n) = 0`` and the quadrature weight ``t``:
    sampling ``|f|`` itself would lose the mean of every view.  arc: whether the spacing is the angle between rays of a fan,
    whose kernel is ``(n t / sin(n t))^2`` times that.
    """
    padded = scipy.fft.next_fast_len(2 * detectors, real=True)
    padded += padded % 2
    place = np.arange(padded)
    n = np.minimum(place, padded - place)
    kernel = np.where(n % 2 == 1, -1.0 / (math.pi * np.maximum(n, 1)) ** 2, 0.0)
    kernel[0] = 0.25
    if arc:
        kernel /= np.sinc(np.where(n < detectors, n, 0) * spacing / math.pi) ** 2
    response: np.ndarray = np.fft.rfft(kernel).real / spacing
    f = np.fft.rfftfreq(padded)  # cycles per detector, up to 1/2
    window = {
        "ramp": np.ones_like(f),
        "shepp-logan": np.sinc(f),
        "cosine": np.cos(math.pi * f),
        "hamming": 0.54 + 0.46 * np.cos(2 * math.pi * f),
        "hann": 0.5 + 0.5 * np.cos(2 * math.pi * f),
    }
    return response * window[filter]
