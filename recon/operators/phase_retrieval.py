r"""Magnitudes without phases: ``y = |B x|^2`` or ``|B x|`` for a linear ``B``, and the diffraction of a masked object.

Far from an object the wave is its Fourier transform F (centred, orthonormal), and a detector counts the intensity:

    y_m = |F P (d_m x)|^2

with masks ``d_m`` that modulate the object one after the other (coded diffraction patterns, Candes, Li and Soltanolkotabi
2015) and zeros P around it, which sample the pattern more finely (oversampling 2 and more determines a real object up to a
shift, a flip and a sign).  A mask with zeros says where the object is: its support.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from recon.errors import InputError
from recon.operators.base import LinearOperator, Operator
from recon.operators.blur import constant
from recon.operators.cg import CG
from recon.operators.row_fft import rows
from recon.space import Space

Quantity = Literal["intensity", "amplitude"]


class CodedDiffraction(LinearOperator):
    """``y_m = F P (d_m x)``: the complex wave behind each mask; linear, and an isometry per mask of modulus one.

    domain: real images (y, x), or complex ones as two channels ("channel", "y", "x") with the names ("real", "imag").
    masks: (y, x) or (mask, y, x), real or complex, given as data: draw them with a fixed key and keep them with the
    measurement; None for a single mask of ones.  oversampling: length of the transform over that of the image, 1 or more,
    rounded up to whole samples.
    Maps to complex (*batch, [mask,] ky, kx) in the same unit; coordinates are spatial frequencies in cycles per metre,
    zero at index n // 2.

    Raises InputError for other domains, masks of another shape or with values that are not finite, oversampling below 1.
    """

    masks: Tensor

    def __init__(self, domain: Space, masks: Tensor | np.ndarray | None = None, oversampling: float = 1.0) -> None:
        channels = _channels(domain)
        image = domain.shape[-2:]
        d = torch.ones(image) if masks is None else torch.as_tensor(masks)
        if d.ndim not in (2, 3) or tuple(d.shape[-2:]) != image or not bool(torch.isfinite(d).all()):
            raise InputError(f"masks are finite arrays ([mask,] y, x) with (y, x) = {image}; got {tuple(d.shape)}")
        if not 1 <= oversampling < math.inf:
            raise InputError(f"oversampling is 1 or more; got {oversampling!r}")
        size = tuple(math.ceil(oversampling * n - 1e-9) for n in image)
        super().__init__(domain, _far_field(domain, size, len(d) if d.ndim == 3 else None))
        self.channels = channels
        d = d if d.is_floating_point() or d.is_complex() else d.float()
        # As parts: conversions of a module to another floating type would drop the imaginary one of a complex buffer.
        self.register_buffer("masks", torch.view_as_real(d + 0j * d).reshape(-1, *image, 2).contiguous())

    def _masks(self, like: Tensor) -> Tensor:
        return torch.view_as_complex(self.masks.to(like.real.dtype))

    def apply(self, x: Tensor) -> Tensor:
        wave = torch.complex(x[:, 0], x[:, 1]) if self.channels else x
        wave = self._masks(x) * wave[:, None]
        for axis in (1, 2):
            length = self.range.shape[-axis]
            wave = rows(wave, axis, lambda line, m=length: _spread(line, m))  # type: ignore[misc]
        return wave.reshape(-1, *self.range.shape)

    def apply_adjoint(self, y: Tensor) -> Tensor:
        wave = y.reshape(len(y), len(self.masks), *self.range.shape[-2:])
        for axis in (1, 2):
            length = self.domain.shape[-axis]
            wave = rows(wave, axis, lambda line, n=length: _gathered(line, n))  # type: ignore[misc]
        wave = (self._masks(y).conj() * wave).sum(1)
        return torch.stack([wave.real, wave.imag], dim=1) if self.channels else wave.real.contiguous()

    def _power(self, like: Tensor) -> Tensor:
        """``sum_m |d_m|^2``: (y, x)."""
        return self.masks.to(like.dtype).square().sum((0, -1))

    def normal(self, x: Tensor) -> Tensor:
        """``A^T A x = sum_m |d_m|^2 x``: the transform is an isometry."""
        self.domain.require(tuple(x.shape), f"{self.describe()}.normal")
        return self._power(x) * x

    def solve(
        self,
        b: Tensor,
        c: float,
        weight: Tensor | None = None,
        x0: Tensor | None = None,
        cg: CG | None = None,
        watch: Callable[[int], None] | None = None,
    ) -> Tensor:
        """``(A^T W A + c I)^{-1} b``: ``b / (w sum_m |d_m|^2 + c)`` for one weight w, conjugate gradients otherwise."""
        one = constant(weight)
        if one is None or not c > 0:
            return super().solve(b, c, weight, x0, cg, watch)
        if watch is not None:
            watch(len(b))
        return b / (one * self._power(b) + c)

    def norm(self, iterations: int = 30) -> float:
        """Largest singular value: ``sqrt(max sum_m |d_m|^2)``."""
        return float(self._power(self.masks).max().sqrt())


class PhaseRetrieval(Operator):
    """``y = |B x|^2`` ("intensity") or ``y = sqrt(|B x|^2 + s^2)`` ("amplitude") for a linear ``B``.

    linear: ``B``, with real or complex values, such as ``CodedDiffraction``.  smoothing: ``s`` > 0, in the unit of ``B x``,
    for amplitudes only: it rounds the tip of the cone, so that the gradient exists where ``B x = 0``, and adds ``s`` there
    and ``s^2 / (2 |B x|)`` far away; well below the standard deviation of the noise it cannot be seen.
    Maps the domain of ``B`` to real (*batch, *B.range.shape).  The sign (or the phase) of ``x`` is lost: -x gives the same y.

    Raises InputError for an operator that is not linear, another quantity, or a smoothing that does not fit it.
    """

    def __init__(
        self, linear: LinearOperator, quantity: Quantity = "intensity", smoothing: float | None = None
    ) -> None:
        if not isinstance(linear, LinearOperator):
            raise InputError(f"PhaseRetrieval takes the magnitude of a LinearOperator; got {type(linear).__name__}")
        if quantity not in get_args(Quantity):
            raise InputError(f"quantity must be one of {', '.join(get_args(Quantity))}; got {quantity!r}")
        if quantity == "amplitude" and not (smoothing is not None and 0 < smoothing < math.inf):
            raise InputError(
                f"amplitudes need smoothing > 0 in the unit of B x, so that the gradient exists at zero; got {smoothing!r} "
                "(a hundredth of the noise's standard deviation cannot be seen)"
            )
        if quantity == "intensity" and smoothing is not None:
            raise InputError("smoothing is for amplitudes; intensities are smooth already")
        there = linear.range
        unit = there.unit if quantity == "amplitude" or there.unit == "1" else f"({there.unit})^2"
        super().__init__(linear.domain, Space(there.dims, there.shape, there.coords, unit))
        self.linear, self.quantity, self.smoothing = linear, quantity, smoothing

    def apply(self, x: Tensor) -> Tensor:
        wave = self.linear.A(x)
        intensity = torch.view_as_real(wave).square().sum(-1) if wave.is_complex() else wave.square()
        return intensity if self.smoothing is None else (intensity + self.smoothing**2).sqrt()


def _spread(line: Tensor, m: int) -> Tensor:
    """Centred orthonormal transform of ``n`` values amid zeros up to ``m``: index n // 2 to index m // 2."""
    n = line.shape[-1]
    zeros = line.new_zeros(*line.shape[:-1], m - n)
    wrapped = torch.cat([line[..., n // 2 :], zeros, line[..., : n // 2]], dim=-1)
    return torch.fft.fftshift(torch.fft.fft(wrapped, norm="ortho"), -1)


def _gathered(line: Tensor, n: int) -> Tensor:
    """The transpose of ``_spread``."""
    wrapped = torch.fft.ifft(torch.fft.ifftshift(line, -1), norm="ortho")
    return torch.cat([wrapped[..., line.shape[-1] - n // 2 :], wrapped[..., : n - n // 2]], dim=-1)


def _channels(domain: Space) -> bool:
    """Whether the image is complex (two channels)."""
    pair = domain.dims == ("channel", "y", "x") and domain.coords.get("channel") == ("real", "imag")
    if domain.complex or not (domain.dims == ("y", "x") or pair):
        raise InputError(
            f'CodedDiffraction takes real images (y, x), or ("channel", "y", "x") with channels ("real", "imag"); '
            f"got {domain.describe()}"
        )
    return pair


def _far_field(domain: Space, size: tuple[int, ...], masks: int | None) -> Space:
    coords = {}
    for dim, m in zip(("y", "x"), size, strict=True):
        values, step = domain.coords.get(dim), domain.spacing(dim)
        if values is not None and step is not None:
            coords[f"k{dim}"] = (np.arange(m) - m // 2) / (m * step * np.sign(float(values[-1]) - float(values[0])))
    if masks is None:
        return Space(("ky", "kx"), size, coords, domain.unit, complex=True)
    return Space(("mask", "ky", "kx"), (masks, *size), coords, domain.unit, complex=True)
