r"""Centred, orthonormal Fourier transforms, and complex images as two real channels.

    X[i] = prod(N)^(-1/2) sum_j x[j] exp(-2 pi i sum_a (i_a - N_a//2) (j_a - N_a//2) / N_a)

Both origins sit at index N // 2: ``fftshift(fft(ifftshift(x)))``, as the MRI world has it, for even and odd sizes.  Shifting
the output of an even axis is an alternating sign on the input: an operator that multiplies the input anyway, and rolls it
once for all coils, pays for neither shift.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from recon.errors import InputError
from recon.operators.row_fft import rows
from recon.space import Space

CHANNELS = ("real", "imag")
_AXES = ("z", "y", "x")


def complex_grid(shape: Sequence[int], pixel: float | Sequence[float] | None = None, unit: str = "1") -> Space:
    """The space of complex images ("channel", [z,] y, x), channels ("real", "imag").

    shape: ([z,] y, x).  pixel: side in metres, one number or one per axis; None leaves the axes without coordinates.
    Raises InputError as ``Space.grid`` does.
    """
    plain = Space.grid(shape, 1.0 if pixel is None else pixel, unit)
    coords = {} if pixel is None else dict(plain.coords)
    return Space(("channel", *plain.dims), (2, *plain.shape), {**coords, "channel": CHANNELS}, unit)


def image_grid(domain: Space, who: str) -> tuple[tuple[int, ...], bool]:
    """Shape of the image ([z,] y, x) that ``domain`` holds, and whether it is complex.

    Raises InputError naming ``who`` for anything else than a real image or two channels ("real", "imag") in front of it.
    """
    channels = domain.dims[:1] == ("channel",)
    dims = domain.dims[1:] if channels else domain.dims
    named = not channels or domain.coords.get("channel") == CHANNELS
    if domain.complex or dims not in (_AXES, _AXES[1:]) or not named:
        raise InputError(
            f'{who} takes complex images ("channel", [z,] y, x) with channels ("real", "imag"), made by complex_grid, '
            f"or real ones ([z,] y, x); got {domain.describe()}"
        )
    return domain.shape[1:] if channels else domain.shape, channels


def complex_twin(domain: Space) -> Space:
    """The complex images on the pixels of ``domain``, which holds real or complex ones."""
    dims = tuple(dim for dim in domain.dims if dim != "channel")
    shape = domain.shape[-len(dims) :]
    coords = {dim: domain.coords[dim] for dim in dims if dim in domain.coords}
    return Space(("channel", *dims), (2, *shape), {**coords, "channel": CHANNELS}, domain.unit)


def to_complex(x: Tensor, axes: int = 2) -> Tensor:
    """Two channels to complex numbers: (*batch, 2, *grid) -> (*batch, *grid), ``axes`` the length of grid."""
    if x.is_complex() or x.ndim <= axes or x.shape[-axes - 1] != 2:
        raise InputError(f"complex images are real arrays (*batch, 2, *grid); got {x.dtype} {tuple(x.shape)}")
    real, imaginary = x.unbind(-axes - 1)
    return torch.complex(real.contiguous(), imaginary.contiguous())


def to_channels(z: Tensor, axes: int = 2) -> Tensor:
    """Complex numbers to two channels: (*batch, *grid) -> (*batch, 2, *grid)."""
    return torch.stack([z.real, z.imag], dim=-axes - 1)


def centred_fft(x: Tensor, axes: int = 2) -> Tensor:
    """Centred orthonormal transform of the last ``axes`` axes of a complex array; same shape."""
    return _centred(x, axes, inverse=False)


def centred_ifft(x: Tensor, axes: int = 2) -> Tensor:
    """The inverse, and the transpose, of ``centred_fft``."""
    return _centred(x, axes, inverse=True)


def _centred(x: Tensor, axes: int, inverse: bool) -> Tensor:
    if not x.is_complex() or axes not in (2, 3) or x.ndim < axes:
        raise InputError(
            f"a centred transform takes complex images or volumes; got {x.dtype} {tuple(x.shape)}, axes={axes}"
        )
    last = tuple(range(-axes, 0))
    turned = torch.fft.ifftshift(x, last)
    values = transform(turned.reshape(-1, *x.shape[-axes:]).contiguous(), inverse).reshape(x.shape)
    return torch.fft.fftshift(values, last)


def signs(grid: Sequence[int]) -> np.ndarray:
    """``(-1)^(j - N/2)`` along every even axis: on a centred image it shifts that axis of the transform to the centre."""
    out = np.ones(())
    for n in grid:
        out = np.multiply.outer(out, np.where((np.arange(n) - n // 2) % 2, -1.0, 1.0) if n % 2 == 0 else np.ones(n))
    return out


def centred_rows(x: Tensor, inverse: bool = False) -> Tensor:
    """The transform of (k, *grid) whose input is rolled and signed already: what ``signs`` leaves to do, for odd axes."""
    grid = x.shape[1:]
    odd = [axis for axis, n in enumerate(grid, start=1) if n % 2]
    shifts = [grid[axis - 1] // 2 for axis in odd]
    if inverse:
        return transform(x.roll([-s for s in shifts], odd) if odd else x, inverse)
    values = transform(x)
    return values.roll(shifts, odd) if odd else values


def transform(x: Tensor, inverse: bool = False) -> Tensor:
    """Orthonormal transform of each array of a contiguous complex stack (k, *grid), uncentred; the same bits in any company.

    The library splits an image over threads, and rounds differently, only where there are fewer images than threads: then
    the stack is filled up with zeros.  Volumes go plane by plane and then through the first axis.
    """
    grid = x.shape[1:]
    if len(grid) == 3:
        planes = transform(x.reshape(-1, *grid[1:]), inverse).reshape(x.shape)
        line = torch.fft.ifft if inverse else torch.fft.fft
        return rows(planes, 3, lambda values: line(values, norm="ortho")).contiguous()
    call = torch.fft.ifftn if inverse else torch.fft.fftn
    missing = torch.get_num_threads() - len(x) if x.device.type == "cpu" and len(x) else 0
    if missing <= 0:
        return call(x, dim=(-2, -1), norm="ortho")
    return call(torch.cat([x, x.new_zeros(missing, *grid)]), dim=(-2, -1), norm="ortho")[: len(x)]


def frequencies(domain: Space) -> dict[str, np.ndarray]:
    """Coordinates ("kz", "ky", "kx") in cycles per metre, zero at N // 2, of the axes whose positions ``domain`` gives."""
    out = {}
    for dim, n in zip(domain.dims, domain.shape, strict=True):
        values, step = domain.coords.get(dim), domain.spacing(dim)
        if step is not None and not isinstance(values, tuple) and values is not None:
            direction = 1.0 if values[-1] > values[0] else -1.0
            out[f"k{dim}"] = direction * (np.arange(n) - n // 2) / (n * step)
    return out
