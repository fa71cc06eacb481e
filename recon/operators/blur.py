r"""Convolution with a known kernel.

    y[i] = sum_j k[j] x[i - (j - c)]

along the last axes, ``c`` the kernel's centre: a point at ``i`` becomes a copy of the kernel whose entry ``c`` sits at ``i``.
Beyond the border the array is
"periodic": repeated.  The operator is diagonal in Fourier space, so ``normal``, ``solve`` and ``norm`` are closed forms.
"zero": nothing.
"reflect": mirrored at its outermost values, which are not repeated (d c b | a b c d | c b a).
"valid": unknown; the range holds the points whose kernel lies inside the array, n - K + 1 along each axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from recon.errors import InputError
from recon.operators.base import LinearOperator
from recon.operators.cg import CG
from recon.operators.row_fft import irfft, rfft
from recon.space import Space

Boundary = Literal["periodic", "zero", "reflect", "valid"]


@dataclass(frozen=True)
class _Axis:
    """How one axis becomes a row of the transform and back.

    size: of the array.  before, after: of the border put around it.  length: of the transform.  start, kept: where in it the
    answer lies.
    """

    size: int
    before: int
    after: int
    length: int
    start: int
    kept: int

    @classmethod
    def of(cls, n: int, kernel: int, centre: int, boundary: str) -> _Axis:
        """For ``n`` values; away from periodic ones a length with small factors, so that no axis is slow."""
        from scipy.fft import next_fast_len

        if boundary == "periodic":
            return cls(n, 0, 0, n, 0, n)
        if boundary == "valid":
            return cls(n, 0, 0, next_fast_len(n), kernel - 1, n - kernel + 1)
        return cls(n, kernel - 1 - centre, centre, next_fast_len(n + kernel - 1), kernel - 1, n)

    def extend(self, x: Tensor, dim: int, mirror: bool) -> Tensor:
        """Put the border around ``x``, and zeros up to the length of the transform."""
        if not mirror:
            return _padded(x, dim, self.before, self.length - self.before - self.size)
        left = x.narrow(dim, 1, self.before).flip(dim)
        right = x.narrow(dim, self.size - 1 - self.after, self.after).flip(dim)
        return _padded(torch.cat([left, x, right], dim), dim, 0, self.length - self.before - self.size - self.after)

    def fold(self, x: Tensor, dim: int, mirror: bool) -> Tensor:
        """The transpose of ``extend``."""
        middle = x.narrow(dim, self.before, self.size)
        if not mirror:
            return middle
        left = x.narrow(dim, 0, self.before).flip(dim)
        right = x.narrow(dim, self.before + self.size, self.after).flip(dim)
        middle = middle + _padded(left, dim, 1, self.size - 1 - self.before)
        return middle + _padded(right, dim, self.size - 1 - self.after, 1)


class Blur(LinearOperator):
    """``y = k * x`` along the last ``kernel.ndim`` axes (one to three); axes before them are left alone.

    kernel: array of any sizes, not normalised for you; a tensor sets the precision, anything else is kept in float32.
    boundary: see the module's text.  centre: index of the kernel's origin, one per axis; None for ``K // 2``, the middle of
    an odd axis and the first value after the middle of an even one.
    Maps (*batch, *domain.shape) to the same in the same unit, less the border where ``boundary`` is "valid".

    Raises InputError for a kernel that is empty, not finite, larger than the array where that cannot be, or has more axes.
    """

    transfer: Tensor

    def __init__(
        self,
        domain: Space,
        kernel: Tensor | np.ndarray | Sequence[float],
        boundary: Boundary = "periodic",
        centre: int | Sequence[int] | None = None,
    ) -> None:
        dtype = kernel.dtype if isinstance(kernel, Tensor) and kernel.is_floating_point() else torch.float32
        values = _kernel(domain, kernel)
        if boundary not in get_args(Boundary):
            raise InputError(f"boundary must be one of {', '.join(get_args(Boundary))}; got {boundary!r}")
        origin = _centre(values.shape, centre)
        sizes = domain.shape[-values.ndim :]
        _refuse_too_large(sizes, values.shape, origin, boundary)
        super().__init__(domain, _valid(domain, values.shape, origin) if boundary == "valid" else domain)
        self.boundary: Boundary = boundary
        self.centre = origin
        self.axes = [_Axis.of(n, k, c, boundary) for n, k, c in zip(sizes, values.shape, origin, strict=True)]
        self.grid = tuple(axis.length for axis in self.axes)
        half = np.fft.rfftn(_placed(values, origin if boundary == "periodic" else (0,) * values.ndim, self.grid))
        transfer = torch.view_as_real(torch.from_numpy(half)).to(dtype)
        self.register_buffer("transfer", transfer, persistent=False)

    @classmethod
    def gaussian(
        cls, domain: Space, width: float | Sequence[float], boundary: Boundary = "periodic", truncate: float = 4.0
    ) -> Blur:
        """A Gaussian of standard deviation ``width`` in metres: see ``gaussian_kernel``."""
        return cls(domain, gaussian_kernel(domain, width, truncate), boundary)

    def apply(self, x: Tensor) -> Tensor:
        for dim, axis in self._numbered():
            x = axis.extend(x, dim, self.boundary == "reflect")
        x = irfft(rfft(x, len(self.grid)) * self._response(x), self.grid)
        for dim, axis in self._numbered():
            x = x.narrow(dim, axis.start, axis.kept)
        return x.contiguous()

    def apply_adjoint(self, y: Tensor) -> Tensor:
        for dim, axis in self._numbered():
            y = _padded(y, dim, axis.start, axis.length - axis.start - axis.kept)
        y = irfft(rfft(y, len(self.grid)) * self._response(y).conj(), self.grid)
        for dim, axis in self._numbered():
            y = axis.fold(y, dim, self.boundary == "reflect")
        return y.contiguous()

    def _numbered(self) -> list[tuple[int, _Axis]]:
        """The blurred axes and their numbers from the end."""
        return list(enumerate(self.axes, start=-len(self.axes)))

    def _response(self, like: Tensor) -> Tensor:
        return torch.view_as_complex(self.transfer.to(like.dtype))

    def power(self, like: Tensor) -> Tensor:
        """``|H|^2`` of the transform's half spectrum, in the type of ``like``."""
        response = self._response(like)
        return response.real.square() + response.imag.square()

    def normal(self, x: Tensor) -> Tensor:
        if self.boundary != "periodic":
            return super().normal(x)
        batch = self.domain.require(tuple(x.shape), f"{self.describe()}.normal")
        flat = x.reshape(-1, *self.domain.shape)
        return irfft(rfft(flat, len(self.grid)) * self.power(x), self.grid).reshape(*batch, *self.domain.shape)

    def solve(
        self,
        b: Tensor,
        c: float,
        weight: Tensor | None = None,
        x0: Tensor | None = None,
        cg: CG | None = None,
        watch: Callable[[int], None] | None = None,
    ) -> Tensor:
        """``(A^T W A + c I)^{-1} b``: for a periodic blur and one weight w ``F^-1 [F b / (w |H|^2 + c)]``, exactly."""
        one = constant(weight)
        if self.boundary != "periodic" or one is None or not c > 0:
            return super().solve(b, c, weight, x0, cg, watch)
        if watch is not None:
            watch(len(b))
        return irfft(rfft(b, len(self.grid)) / (one * self.power(b) + c), self.grid)

    def norm(self, iterations: int = 30) -> float:
        """Largest singular value: the largest ``|H|`` of a periodic blur, by power iteration otherwise."""
        if self.boundary != "periodic":
            return super().norm(iterations)
        return float(self.power(self.transfer).max().sqrt())


def gaussian_kernel(domain: Space, width: float | Sequence[float], truncate: float = 4.0) -> np.ndarray:
    """A Gaussian of standard deviation ``width``, in the unit of the coordinates (metres), for the last axes of ``domain``.

    width: one number for the last two axes (for the only one of a list), or one per blurred axis; 0 leaves an axis alone.
    The kernel is sampled at the pixels up to ``truncate`` widths away and sums to 1.
    Raises InputError for axes without evenly spaced coordinates or a width that is negative or not finite.
    """
    widths = tuple(width) if isinstance(width, Sequence) else (width,) * min(2, len(domain.shape))
    if not 1 <= len(widths) <= min(3, len(domain.shape)) or not all(0 <= one < math.inf for one in widths):
        raise InputError(f"a Gaussian takes one width, or one per blurred axis, finite and not negative; got {width!r}")
    if not 0 < truncate < math.inf:
        raise InputError(f"truncate is a positive number of widths; got {truncate!r}")
    kernel = np.ones(())
    for dim, one in zip(domain.dims[-len(widths) :], widths, strict=True):
        spacing = domain.spacing(dim)
        if spacing is None and one > 0:
            raise InputError(
                f"a Gaussian needs evenly spaced coordinates along {dim!r} to know how many pixels {one:g} is; "
                "give them to the Space, or give the kernel itself"
            )
        pixels = one / spacing if spacing else 0.0
        reach = math.floor(truncate * pixels)
        line = np.exp(-0.5 * (np.arange(-reach, reach + 1) / pixels) ** 2) if reach else np.ones(1)
        kernel = np.multiply.outer(kernel, line / line.sum())
    return kernel


def constant(weight: Tensor | None) -> float | None:
    """The one number that all of ``weight`` repeats (1 for None), or None where weights differ."""
    if weight is None:
        return 1.0
    first = weight.flatten()[0]
    return float(first) if bool((weight == first).all()) else None


def _padded(x: Tensor, dim: int, before: int, after: int) -> Tensor:
    """Zeros in front of and behind one axis."""
    return torch.nn.functional.pad(x, (*[0, 0] * (-1 - dim), before, after)) if before or after else x


def _kernel(domain: Space, kernel: Tensor | np.ndarray | Sequence[float]) -> np.ndarray:
    values = np.asarray(kernel.detach().cpu() if isinstance(kernel, Tensor) else kernel)
    if domain.complex:
        raise InputError(f"Blur takes real arrays; got {domain.describe()}; hold complex ones as two channels")
    if not 1 <= values.ndim <= min(3, len(domain.shape)) or values.size == 0 or values.dtype.kind not in "fiu":
        raise InputError(
            f"the kernel of a blur of {domain.describe()} is a real array of 1 to {min(3, len(domain.shape))} axes; "
            f"got {values.dtype} {values.shape}"
        )
    if not np.isfinite(values).all():
        raise InputError("the kernel of a blur must be finite everywhere")
    return values.astype(np.float64)


def _centre(shape: tuple[int, ...], centre: int | Sequence[int] | None) -> tuple[int, ...]:
    if centre is None:
        return tuple(k // 2 for k in shape)
    indices = tuple(int(i) for i in np.atleast_1d(np.asarray(centre)))
    if len(indices) != len(shape) or not all(0 <= i < k for i, k in zip(indices, shape, strict=True)):
        raise InputError(f"centre is an index into the kernel {shape}, one per axis; got {centre!r}")
    return indices


def _refuse_too_large(sizes: Sequence[int], kernel: Sequence[int], centre: Sequence[int], boundary: str) -> None:
    for n, k, c in zip(sizes, kernel, centre, strict=True):
        if boundary == "valid" and k > n:
            raise InputError(f"a kernel of {k} pixels fits nowhere into an axis of {n}; use another boundary")
        if boundary == "reflect" and max(c, k - 1 - c) > n - 1:
            raise InputError(
                f"a kernel of {k} pixels reaches beyond the mirror image of an axis of {n}; cut the kernel"
            )


def _valid(domain: Space, kernel: tuple[int, ...], centre: tuple[int, ...]) -> Space:
    """Where the whole kernel lies inside: indices K - 1 - c to n - 1 - c."""
    shape, coords = list(domain.shape), dict(domain.coords)
    first = len(shape) - len(kernel)
    for axis, (k, c) in enumerate(zip(kernel, centre, strict=True), start=first):
        kept = slice(k - 1 - c, shape[axis] - c)
        if domain.dims[axis] in coords:
            coords[domain.dims[axis]] = coords[domain.dims[axis]][kept]
        shape[axis] -= k - 1
    return Space(domain.dims, tuple(shape), coords, domain.unit)


def _placed(kernel: np.ndarray, origin: tuple[int, ...], grid: Sequence[int]) -> np.ndarray:
    """The kernel on the transform's grid, wrapped around it, its entry ``origin`` at index 0."""
    out = np.zeros(grid)
    places = [(np.arange(k) - c) % n for k, c, n in zip(kernel.shape, origin, grid, strict=True)]
    np.add.at(out, np.ix_(*places), kernel)
    return out
