r"""Filtered back-projection of parallel-beam sinograms.

``x = sum_theta dtheta (spacing / pixel^2) A_theta^T (h * y_theta)``: the transpose of the projector spreads a view with weights
whose sum over the rays is ``pixel^2 / spacing`` per pixel, so the factor in front makes it an interpolation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import scipy.fft
import torch
from torch import Tensor

from recon.errors import InputError
from recon.operators.parallel_beam import ParallelBeam

Filter = Literal["ramp", "shepp-logan", "cosine", "hamming", "hann"]


def fbp(operator: ParallelBeam, sinogram: Tensor, filter: Filter = "ramp") -> Tensor:
    """Filtered back-projection: ``x = sum_theta dtheta (spacing / pixel^2) A_theta^T (h * y_theta)``.

    sinogram: (*batch, angle, detector).  filter: the band-limited ramp (Kak and Slaney 1988, eq. 61), alone or times a window
    that falls towards the highest frequency.  Each view weighs the angle it stands for, half a turn in all; across a missing
    wedge the views keep their ordinary spacing, so limited-angle images lack that wedge instead of smearing its edges.
    Returns (*batch, y, x) in 1/m.  The transpose spreads each ray over its pixels: with detectors much wider than pixels use
    the "strip" projector.  Raises InputError for another operator, shape or filter.
    """
    if not isinstance(operator, ParallelBeam):
        raise InputError(f"fbp inverts ParallelBeam; got {operator.describe()} (cgls and tv take any linear operator)")
    if filter not in get_args(Filter):
        raise InputError(f"filter must be one of {', '.join(get_args(Filter))}; got {filter!r}")
    operator.range.require(tuple(sinogram.shape), "fbp")
    spacing = operator.geometry.spacing
    response = torch.from_numpy(_response(operator.geometry.detectors, spacing, filter)).to(sinogram)
    padded = 2 * (len(response) - 1)
    filtered = torch.fft.irfft(torch.fft.rfft(sinogram, n=padded) * response, n=padded)
    filtered = filtered[..., : operator.geometry.detectors]
    weights = torch.from_numpy(view_weights(operator.geometry.angles)).to(sinogram)
    return operator.A_adjoint(filtered * weights[:, None]) * (spacing / operator.pixel**2)


def view_weights(angles: Sequence[float]) -> np.ndarray:
    """The angle each parallel view stands for (radians): half the way to both neighbours, modulo half a turn.

    One gap more than twice as wide as any other is a missing wedge and counts as the median of the others.
    """
    turned = np.mod(np.asarray(angles, dtype=np.float64), math.pi)
    order = np.argsort(turned, kind="stable")
    gaps = np.diff(turned[order], append=turned[order[0]] + math.pi)  # gap after each view
    # Opposite views (theta, theta + pi) measure the same lines: rounding must not make a tiny positive gap of them.
    gaps[gaps < 1e-9] = 0.0
    ordered = np.sort(gaps[gaps > 0])
    if len(ordered) > 1 and ordered[-1] > 2 * ordered[-2]:
        gaps[np.argmax(gaps)] = np.median(ordered[:-1])
    weights = np.empty_like(gaps)
    weights[order] = (gaps + np.roll(gaps, 1)) / 2
    return weights


def _response(detectors: int, spacing: float, filter: Filter) -> np.ndarray:
    """Frequency response of the filter for zero-padded rows: float64 (padded / 2 + 1,), 1/m.

    Made from the sampled kernel ``h(0) = 1/(4 t^2), h(odd n) = -1/(n pi t)^2, h(even n) = 0`` and the quadrature weight ``t``:
    sampling ``|f|`` itself would lose the mean of every view.
    """
    padded = scipy.fft.next_fast_len(2 * detectors, real=True)
    padded += padded % 2
    place = np.arange(padded)
    n = np.minimum(place, padded - place)
    kernel = np.where(n % 2 == 1, -1.0 / (math.pi * np.maximum(n, 1)) ** 2, 0.0)
    kernel[0] = 0.25
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
