r"""Non-uniform Fourier sums: finufft (cufinufft on a GPU) spreads and interpolates, the transform in between is torch's.

    forward:  c_j = sum_r f_r exp(-i r . x_j)          adjoint:  f_r = sum_j c_j exp(+i r . x_j)

with r counted from index N // 2 along every axis (Barnett, Magland and af Klinteberg 2019).  With a kernel phi of a few points
of a grid M >= 1.5 N (2 N in double precision) and its Fourier series K_r,

    f -> f_r / K_r -> zeros around it -> transform of length M -> sum_l phi(x_j - x_l) (.)_l

so both directions are transposes to rounding, whatever their accuracy.  The library's own transforms take most of its time
(on the CPU 13 of 15 ms at 256 pixels and 2^15 points, against 0.7 ms), hence the division of labour.

Points are spread on one thread per transform, several transforms side by side: the library's threads add to the grid in any
order, and its answers then change from run to run.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from recon.errors import InputError, need
from recon.operators.fourier import transform

Kind = Literal[1, 2]  # as the libraries count: 1 spreads points to the grid, 2 interpolates from it
_Key = tuple[Kind, torch.dtype, torch.device]

# Relative accuracy asked for; single precision rounds the points, which weighs more (``seen``).
_ACCURACY = {torch.float32: 1e-6, torch.float64: 1e-13}
_SMALL = 32  # points of a grid that holds the widest kernel
# Length of the fine grid over that of the image.  In single precision on the CPU a wider kernel on a shorter grid is 1.6 times
# faster and as accurate; in double precision it would be wider than the library has, and cufinufft knows 2 alone.
_FINER = 1.5


class Nufft:
    """Sums between a grid and points.  grid: shape.  points: float64 (d, m) in radians, one row per axis of the grid.

    Complex numbers are pairs of real ones, in the last axis.  Plans are made when first used, one per thread at work, and
    used again; threads may call at the same time.  Copies and pickles hold the grid and the points alone.
    Raises InputError without the library for the device of the numbers.
    """

    def __init__(self, grid: tuple[int, ...], points: np.ndarray) -> None:
        self.grid, self.points = grid, points
        self._lock = threading.Lock()
        self._idle: dict[_Key, list[Any]] = {}
        self._kept: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"grid": self.grid, "points": self.points}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["grid"], state["points"])  # type: ignore[misc]

    def fine(self, dtype: torch.dtype, device: torch.device) -> tuple[int, ...]:
        """Shape of the grid that points are spread to in this precision (real or complex) on this device."""
        factor = _factor(dtype, device)
        return tuple(max(_SMALL, _length(n, factor)) for n in self.grid)

    def seen(self, dtype: torch.dtype, device: torch.device) -> np.ndarray:
        """The points as the sums see them, float64 (d, m): single precision rounds a place on the fine grid to 24 bits.

        On 512 pixels that moves results by 2e-5.  What is made of the points in another way has to move with them.
        """
        if dtype != torch.float32:
            return self.points
        one, half = np.float32(1 / (2 * math.pi)), np.float32(0.5)
        rows = []
        fine = self.fine(dtype, device)
        for row, m in zip(self.points.astype(np.float32), fine, strict=True):
            turns = row * one + half  # as the library does it, rounding every step
            place = (turns - np.floor(turns)) * np.float32(m)
            rows.append(2 * math.pi * (place.astype(np.float64) / m - 0.5))
        return np.ascontiguousarray(np.stack(rows))

    def forward(self, images: Tensor) -> Tensor:
        """(k, *grid, 2) -> (k, m, 2)."""
        weights, fine = self._weights(images), self.fine(images.dtype, images.device)
        padded = images.new_zeros(len(images), *fine, 2)
        for here, there in self._blocks(fine):
            torch.mul(images[here], weights[here[1:]], out=padded[there])
        spectrum = transform(torch.view_as_complex(padded))
        return torch.view_as_real(self._run(2, spectrum, (self.points.shape[1],)))

    def adjoint(self, samples: Tensor) -> Tensor:
        """(k, m, 2) -> (k, *grid, 2): the exact transpose of ``forward``."""
        weights, fine = self._weights(samples), self.fine(samples.dtype, samples.device)
        spectrum = self._run(1, torch.view_as_complex(samples.contiguous()), fine)
        padded = torch.view_as_real(transform(spectrum, inverse=True))
        images = samples.new_empty(len(samples), *self.grid, 2)
        for here, there in self._blocks(fine):
            torch.mul(padded[there], weights[here[1:]], out=images[here])
        return images

    def _blocks(self, fine: tuple[int, ...]) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
        """Where the parts of an image lie (index N // 2 in the middle) and where in the padded one (index 0 first)."""
        axes = [[(slice(None), slice(None))]]
        for n, m in zip(self.grid, fine, strict=True):
            below = n // 2
            axes.append([(slice(below, n), slice(0, n - below)), (slice(0, below), slice(m - below, m))])
        for parts in itertools.product(*axes):
            yield tuple(here for here, _ in parts), tuple(there for _, there in parts)

    def _weights(self, like: Tensor) -> Tensor:
        """``1 / K_r`` and the transform's scale, as pairs of equal numbers (*grid, 2)."""
        key = (like.dtype, like.device)
        with self._lock:
            if key in self._kept:
                return self._kept[key]
        offsets, phi, centred = self._kernel(like)
        fine = self.fine(like.dtype, like.device)
        weights = np.full((), math.sqrt(math.prod(fine)))
        for n, m in zip(self.grid, fine, strict=True):
            r = np.arange(n) - n // 2
            series = np.cos(2 * math.pi / m * np.multiply.outer(r, offsets)) @ phi
            # Where the library counts points from -pi, not from 0, every other frequency changes its sign.
            weights = np.multiply.outer(weights, (1 - 2 * (r % 2) * centred) / series)
        made = torch.from_numpy(weights)[..., None].expand(*self.grid, 2).to(like).contiguous()
        with self._lock:
            return self._kept.setdefault(key, made)

    def _kernel(self, like: Tensor) -> tuple[np.ndarray, np.ndarray, bool]:
        """The library's kernel: offsets in grid steps, values there, and whether the point 0 lies in the middle of the grid.

        It is what a point at 0 spreads to.  Other offsets of the point give the same series to the accuracy asked for.
        """
        axes = len(self.grid)
        one = torch.ones(1, dtype=like.dtype.to_complex(), device=like.device)
        spread = torch.zeros((_SMALL,) * axes, dtype=one.dtype, device=one.device)
        _execute(_plan(1, tuple(spread.shape), np.zeros((axes, 1)), one.dtype, one.device), one, spread)
        values = spread.real.double().cpu().numpy()
        peak = np.unravel_index(values.argmax(), values.shape)
        if peak not in ((0,) * axes, (_SMALL // 2,) * axes):
            raise InputError("this version of the non-uniform transform's library lays its grid in an unknown way")
        centred = bool(peak[0])
        values = values if centred else np.fft.fftshift(values)
        line = values
        for _ in range(axes - 1):
            line = line[..., _SMALL // 2]
        # The other axes contribute phi(0)^(d - 1) to every value, and all of them phi(0)^d to the largest.
        return np.arange(_SMALL) - _SMALL // 2, line / values.max() ** ((axes - 1) / axes), centred

    def _run(self, kind: Kind, values: Tensor, shape: tuple[int, ...]) -> Tensor:
        out = values.new_zeros(len(values), *shape)
        threads = min(torch.get_num_threads(), len(values)) if values.device.type == "cpu" else 1

        def work(first: int) -> None:
            key = (kind, values.dtype, values.device)
            plan = self._take(key)
            for index in range(first, len(values), threads):
                _execute(plan, values[index], out[index])
            with self._lock:
                self._idle[key].append(plan)

        if threads > 1:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(work, range(threads)))
        elif len(values):
            work(0)
        return out

    def _take(self, key: _Key) -> Any:  # noqa: ANN401  (a plan of either library)
        with self._lock:
            idle = self._idle.setdefault(key, [])
            if idle:
                return idle.pop()
        kind, dtype, device = key
        return _plan(kind, self.fine(dtype, device), self.points, dtype, device)


def _plan(kind: Kind, grid: tuple[int, ...], points: np.ndarray, dtype: torch.dtype, device: torch.device) -> Any:  # noqa: ANN401
    real = dtype.to_real()
    name = "complex64" if real == torch.float32 else "complex128"
    settings = {"eps": _ACCURACY[real], "dtype": name, "upsampfac": _factor(real, device)}
    if device.type == "cpu":
        library = cast(Any, need("finufft", "mri"))
        plan = library.Plan(kind, grid, 1, nthreads=1, showwarn=0, spreadinterponly=1, **settings)
    else:
        library = _cufinufft(device)
        plan = library.Plan(kind, grid, 1, gpu_device_id=device.index or 0, gpu_spreadinterponly=1, **settings)
    rows = [torch.from_numpy(np.ascontiguousarray(row)).to(device, real) for row in points]
    plan.setpts(*(row.numpy() if device.type == "cpu" else row for row in rows))
    return plan


def _execute(plan: Any, source: Tensor, out: Tensor) -> None:  # noqa: ANN401
    if source.device.type == "cpu":
        plan.execute(source.numpy(), out=out.numpy())
    else:
        plan.execute(source, out=out)


def _cufinufft(device: torch.device) -> Any:  # noqa: ANN401
    try:
        import cufinufft
    except Exception as error:
        raise InputError(
            f"non-uniform transforms on {device} need the Python package 'cufinufft', which could not be imported "
            f"({type(error).__name__}: {error}); install it with: pip install cufinufft, or keep the operator on the CPU"
        ) from error
    return cufinufft


def _factor(dtype: torch.dtype, device: torch.device) -> float:
    """The least length of the fine grid over that of the image."""
    return _FINER if dtype.to_real() == torch.float32 and device.type == "cpu" else 2.0


def _length(n: int, factor: float) -> int:
    """An even length with small factors, at least ``factor * n``."""
    from scipy.fft import next_fast_len

    return 2 * int(next_fast_len(math.ceil(factor * n / 2)))
