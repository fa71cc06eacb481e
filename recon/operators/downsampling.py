r"""Blur, then keep every f-th pixel: the operator of super-resolution.

    y[m] = sum_j k[j] x[p + f m - (j - c)]

along the last axes, with the factor f, the phase p (index of the first kept pixel), the kernel k and its centre c.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from recon.errors import InputError
from recon.operators.base import LinearOperator
from recon.operators.blur import Blur, Boundary, constant, gaussian_kernel
from recon.operators.cg import CG
from recon.operators.row_fft import irfft, rfft
from recon.space import Space


class Downsampling(LinearOperator):
    """``y = S (k * x)`` along the last axes.

    factor: whole number, one or one per axis; one number holds for the kernel's axes, without a kernel for the last two.
    kernel: low-pass filter, see ``Blur``; None for the mean of the f x f pixels of each block.  phase: index of the first
    kept pixel, 0 to f - 1; None for ``(f - 1) // 2``, with which the default kernel covers the pixels f m to f m + f - 1.
    boundary, centre: see ``Blur`` ("valid" counts the phase from the first point whose kernel lies inside the array).
    Maps (*batch, *domain.shape) to an array of ceil((n - p) / f) values along each of these axes, in the same unit; their
    coordinates are where the kernel's centre of mass lies, left out where that is between unevenly spaced pixels.

    ``solve`` is exact and costs one A and one A^T for a periodic boundary, sizes that f divides, and one weight (Zhao et
    al. 2016, equation 21); conjugate gradients otherwise.
    Raises InputError for a factor or phase that is not such a number, and what Blur refuses.
    """

    def __init__(
        self,
        domain: Space,
        factor: int | Sequence[int],
        kernel: Tensor | np.ndarray | Sequence[float] | None = None,
        phase: int | Sequence[int] | None = None,
        boundary: Boundary = "periodic",
        centre: int | Sequence[int] | None = None,
    ) -> None:
        axes = min(2, len(domain.shape)) if kernel is None else np.ndim(kernel)
        factors = _whole("factor", factor, len(factor) if isinstance(factor, Sequence) and kernel is None else axes)
        if any(f < 1 for f in factors):
            raise InputError(f"the factor of Downsampling is 1 or more; got {factor!r}")
        phases = tuple((f - 1) // 2 for f in factors) if phase is None else _whole("phase", phase, len(factors))
        if not all(0 <= p < f for p, f in zip(phases, factors, strict=True)):
            raise InputError(
                f"the phase of Downsampling is 0 to factor - 1 = {tuple(f - 1 for f in factors)}; got {phase!r}"
            )
        values = np.ones(factors) / np.prod(factors) if kernel is None else kernel
        blur = Blur(domain, values, boundary, centre)
        super().__init__(domain, _kept(blur, _offsets(values, blur.centre), factors, phases))
        self.blur, self.factors, self.phases = blur, factors, phases

    @classmethod
    def gaussian(
        cls, domain: Space, factor: int, width: float, phase: int | None = None, boundary: Boundary = "periodic"
    ) -> Downsampling:
        """Over the last two axes with a Gaussian of standard deviation ``width`` in the unit of the coordinates (metres)."""
        return cls(domain, factor, gaussian_kernel(domain, width), phase, boundary)

    def apply(self, x: Tensor) -> Tensor:
        return self.blur.apply(x)[_every(self.phases, self.factors)].contiguous()

    def apply_adjoint(self, y: Tensor) -> Tensor:
        full = y.new_zeros(len(y), *self.blur.range.shape)
        full[_every(self.phases, self.factors)] = y
        return self.blur.apply_adjoint(full)

    @property
    def closed(self) -> bool:
        """Whether ``A A^T`` is a convolution on the coarse grid, so that ``solve`` is exact."""
        sizes = self.domain.shape[-len(self.factors) :]
        whole = all(n % f == 0 for n, f in zip(sizes, self.factors, strict=True))
        return self.blur.boundary == "periodic" and whole

    def spectrum(self, like: Tensor) -> Tensor:
        """Eigenvalues of ``A A^T`` on the coarse grid's half spectrum: ``|H|^2`` averaged over the aliases.

        Written as the transform of every f-th value of the kernel's autocorrelation, which is the same.
        """
        correlation = irfft(self.blur.power(like)[None].to(like.dtype.to_complex()), self.blur.grid)
        coarse = correlation[_every((0,) * len(self.factors), self.factors)]
        return rfft(coarse, len(self.factors)).real.clamp(min=0)

    def solve(
        self,
        b: Tensor,
        c: float,
        weight: Tensor | None = None,
        x0: Tensor | None = None,
        cg: CG | None = None,
        watch: Callable[[int], None] | None = None,
    ) -> Tensor:
        """``(A^T W A + c I)^{-1} b = [b - A^T (A A^T + c/w)^{-1} A b] / c`` where that is closed (see the class)."""
        one = constant(weight)
        if not self.closed or not one or not c > 0:
            return super().solve(b, c, weight, x0, cg, watch)
        if watch is not None:
            watch(len(b))
        coarse = rfft(self.A(b), len(self.factors)) / (self.spectrum(b) + c / one)
        sizes = self.range.shape[-len(self.factors) :]
        return (b - self.A_adjoint(irfft(coarse, sizes))) / c

    def norm(self, iterations: int = 30) -> float:
        """Largest singular value: from the spectrum of ``A A^T`` where that is closed, by power iteration otherwise."""
        if not self.closed:
            return super().norm(iterations)
        return float(self.spectrum(self.blur.transfer).max().sqrt())


def _every(phases: Sequence[int], factors: Sequence[int]) -> Any:  # noqa: ANN401
    """The index of the kept pixels along the last axes."""
    return (..., *(slice(p, None, f) for p, f in zip(phases, factors, strict=True)))


def _whole(name: str, value: int | Sequence[int], axes: int) -> tuple[int, ...]:
    given = np.atleast_1d(np.asarray(value, dtype=np.float64))
    if given.ndim != 1 or len(given) not in (1, axes) or not (np.isfinite(given) & (given == np.floor(given))).all():
        raise InputError(
            f"the {name} of Downsampling is one whole number, or one for each of {axes} axes; got {value!r}"
        )
    return tuple(int(one) for one in np.broadcast_to(given, axes))


def _offsets(kernel: Tensor | np.ndarray | Sequence[float], centre: tuple[int, ...]) -> list[float]:
    """Pixels from the kept one to the middle of what is weighed; 0 for kernels without mass (derivatives)."""
    values = np.asarray(kernel.detach().cpu() if isinstance(kernel, Tensor) else kernel, dtype=np.float64)
    if abs(values.sum()) < 1e-6 * np.abs(values).sum():
        return [0.0] * values.ndim
    means = [
        float((values.sum(tuple(set(range(values.ndim)) - {axis})) * np.arange(k)).sum() / values.sum())
        for axis, k in enumerate(values.shape)
    ]
    return [c - mean for c, mean in zip(centre, means, strict=True)]


def _kept(blur: Blur, offsets: Sequence[float], factors: Sequence[int], phases: Sequence[int]) -> Space:
    """The space of the kept pixels."""
    space = blur.range
    shape, coords = list(space.shape), dict(space.coords)
    first = len(shape) - len(factors)
    for axis, (offset, f, p) in enumerate(zip(offsets, factors, phases, strict=True), start=first):
        dim, n = space.dims[axis], shape[axis]
        if p >= n:
            raise InputError(f"the phase {p} of Downsampling lies beyond the {n} pixels along {dim!r}")
        shape[axis] = len(range(p, n, f))
        values = coords.pop(dim, None)
        if values is None:
            continue
        if isinstance(values, tuple) or abs(offset) < 1e-6:
            coords[dim] = values[p::f]
        elif space.spacing(dim) is not None:
            coords[dim] = values[p::f] + offset * (values[-1] - values[0]) / (n - 1)
    return Space(space.dims, tuple(shape), coords, space.unit)
