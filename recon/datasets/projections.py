"""Raw projections made into photon counts: flat and dark fields, detector gain, axis of rotation.

A detector reports ``p = g k + d``: ``k`` photons times a gain ``g`` plus a dark signal ``d``.  Dividing by the gain gives what
``TransmissionLikelihood`` takes, ``k ~ Poisson(I0 exp(-A x) + b)`` with ``I0 = (flat - dark) / g`` and ``b = dark / g``.  The
gain follows from repeated flat fields: the variance of a Poisson count is its mean, so that
``g = var(flat) / (mean(flat) - dark)``, the photon transfer method of detector physics.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from recon.errors import InputError

_FEWEST_FLATS = 5  # below, the variance of a pixel is too uncertain to set the noise level by


@dataclass(frozen=True, eq=False)
class PhotonCounts:
    """What a counting detector would have reported.

    counts: (angle, *detector), float32, never negative.  blank, background: (*detector,), counts without the object and
    without the beam.  dead: (*detector,), True where a pixel has no signal and must be left out.  gain: of the detector.
    """

    counts: Tensor
    blank: Tensor
    background: Tensor
    dead: Tensor
    gain: float

    def line_integrals(self) -> tuple[Tensor, Tensor]:
        """``y = -log((k - b) / I0)`` and its standard deviation ``sqrt(k) / (k - b)``, both (angle, *detector).

        Dead pixels have y = 0 and an infinite standard deviation.
        """
        count = self.counts + 0.5
        signal = (count - self.background).clamp(min=1.0)
        y, sigma = torch.log(self.blank.clamp(min=1e-6) / signal), count.sqrt() / signal
        return torch.where(self.dead, 0.0, y), torch.where(self.dead, math.inf, sigma)


def photon_counts(
    projections: np.ndarray, flats: np.ndarray, darks: np.ndarray, gain: float | None = None
) -> PhotonCounts:
    """Raw projections (angle, *detector) as counts, with flat and dark fields (repeat, *detector) or one average (*detector).

    gain: detector units per photon; None estimates it from the spread of at least five flat fields (pixel by pixel, median).
    A pixel is dead where its flat field does not rise above a hundredth of the median one.
    Raises InputError for shapes that do not fit, non-finite values, or a gain that cannot be estimated.
    """
    projections, flats, darks = (np.asarray(a, dtype=np.float64) for a in (projections, flats, darks))
    detector = projections.shape[1:]
    for name, field in (("flats", flats), ("darks", darks)):
        if field.shape[-len(detector) :] != detector or field.ndim > projections.ndim:
            raise InputError(f"{name} must be (repeat, {detector}) or {detector} as the projections; got {field.shape}")
    if not all(np.isfinite(a).all() for a in (projections, flats, darks)):
        raise InputError("projections, flats and darks must be finite; replace or leave out what is not")
    flat = flats.reshape(-1, *detector)
    dark = darks.reshape(-1, *detector).mean(0)
    signal = flat.mean(0) - dark
    dead = signal <= 0.01 * np.median(signal)
    if dead.all():
        raise InputError("no pixel of the flat fields rises above the dark ones; are the two exchanged?")
    if gain is None:
        if len(flat) < _FEWEST_FLATS:
            raise InputError(
                f"the gain of the detector needs at least {_FEWEST_FLATS} flat fields, or gain=; got {len(flat)} flat"
            )
        # The median of a scaled chi-square with n - 1 degrees of freedom lies below its mean (Wilson-Hilferty).
        freedom = len(flat) - 1
        gain = float(np.median(flat.var(0, ddof=1)[~dead] / signal[~dead]) / (1 - 2 / (9 * freedom)) ** 3)
    if not 0 < gain < math.inf:
        raise InputError(f"the gain must be positive; got {gain:g} (equal flat fields have no noise to measure it by)")
    counts, blank, background = (
        torch.from_numpy((a / gain).astype(np.float32)) for a in (projections.clip(min=0.0), signal, dark)
    )
    return PhotonCounts(counts, blank, background, torch.from_numpy(dead), gain)


def rotation_axis(line_integrals: np.ndarray | Tensor, angles: Sequence[float] | np.ndarray) -> float:
    """The detector column on which the axis of rotation projects, from opposite views of a parallel-beam scan.

    Views half a turn apart see the same lines from both sides, ``y(theta + pi, c + s) = y(theta, c - s)``: the axis ``c`` is
    where one view correlates best with the mirror image of the other, over all pairs of views and all detector rows, each
    overlap normalised, to a fraction of a column by a parabola through the three best values.

    line_integrals: (angle, *row, column).  angles: radians.  A pair is off by at most one step of the angles, which shifts
    the result by a fraction of a column.  Raises InputError when no two views are opposite.
    """
    angles = np.asarray(angles, dtype=np.float64)
    views = np.asarray(line_integrals, dtype=np.float64)
    views = views.reshape(len(angles), -1, views.shape[-1])
    step = float(np.median(np.abs(np.diff(angles)))) if len(angles) > 1 else 0.0
    away = np.abs(_wrapped(angles[None, :] - angles[:, None] - math.pi))
    partner = away.argmin(1)
    pairs = [(i, j) for i, j in enumerate(partner) if i < j and away[i, j] <= 1.05 * step]
    if not pairs:
        raise InputError(
            f"no two of the {len(angles)} views are half a turn apart (angles span {np.ptp(angles):.3g} rad); "
            "state the axis instead"
        )
    columns = views.shape[-1]
    length = 4 * columns
    weight = np.fft.rfft(np.ones(columns), length)
    sums = np.zeros((3, length))  # of products, and of squares of either view over the overlap, by twice the axis
    for i, j in pairs:
        a, b = np.fft.rfft(views[i], length), np.fft.rfft(views[j], length)
        squares = (np.fft.rfft(views[k] ** 2, length) * weight for k in (i, j))
        sums += np.stack([np.fft.irfft(part, length).sum(0) for part in (a * b, *squares)])
    # Views that overlap by less than half say nothing about where the axis is.
    place = np.arange(columns // 2, 2 * (columns - 1) - columns // 2 + 1)
    likeness = sums[0, place] / np.sqrt(np.maximum(sums[1, place] * sums[2, place], 1e-300))
    best = int(likeness.argmax().clip(1, len(place) - 2))
    before, top, after = likeness[best - 1 : best + 2]
    return float(place[best] + 0.5 * (before - after) / (before - 2 * top + after)) / 2


def _wrapped(angles: np.ndarray) -> np.ndarray:
    """Angles brought to [-pi, pi)."""
    return np.mod(angles + math.pi, 2 * math.pi) - math.pi
