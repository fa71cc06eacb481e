r"""Fourier transforms of the last axes whose bits depend neither on the number of threads nor on the rest of the batch.

Libraries vectorise a transform along several axes, or over strided rows, in groups that change with the batch and the
threads, and with them the rounding.  One contiguous complex row at a time they do not; real ones do (inverses of few values
on any processor, both directions of 64 values on some), and go through the complex transform.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def rfft(x: Tensor, axes: int) -> Tensor:
    """Half of the transform of the last ``axes`` axes of a real array: (..., n_1, ..., n_k) -> (..., n_1, ..., n_k//2 + 1)."""
    kind = torch.promote_types(x.dtype, torch.complex64)
    x = torch.fft.fft(x.to(kind).contiguous())[..., : x.shape[-1] // 2 + 1]
    for axis in range(2, axes + 1):
        x = rows(x, axis, torch.fft.fft)
    return x


def irfft(x: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of ``rfft``; shape: of the real array's transformed axes."""
    for axis in range(2, len(shape) + 1):
        x = rows(x, axis, torch.fft.ifft)
    mirror = x[..., 1 : (shape[-1] + 1) // 2].flip(-1).conj()
    return torch.fft.ifft(torch.cat([x, mirror], dim=-1)).real.contiguous()


def rows(x: Tensor, axis: int, transform: Callable[[Tensor], Tensor]) -> Tensor:
    """``transform``, which works on the last axis of contiguous arrays, along the axis number ``axis`` from the end."""
    return transform(x.movedim(-axis, -1).contiguous()).movedim(-1, -axis)
