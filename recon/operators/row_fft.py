r"""Fourier transforms of the last axes whose bits depend neither on the number of threads nor on the rest of the batch.

Libraries vectorise a transform along several axes, or over strided rows, in groups that change with the batch and the
threads, and with them the rounding.  One contiguous row at a time they do not; short real inverses are the exception and go
through the complex transform.  Costs up to twice the library's own n-dimensional call (256 x 256, one thread: 0.4 ms an image).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_SHORT = 32  # real inverses of fewer than 16 values were seen to change with the threads


def rfft(x: Tensor, axes: int) -> Tensor:
    """Half of the transform of the last ``axes`` axes of a real array: (..., n_1, ..., n_k) -> (..., n_1, ..., n_k//2 + 1)."""
    x = torch.fft.rfft(x.contiguous())
    for axis in range(2, axes + 1):
        x = rows(x, axis, torch.fft.fft)
    return x


def irfft(x: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of ``rfft``; shape: of the real array's transformed axes."""
    for axis in range(2, len(shape) + 1):
        x = rows(x, axis, torch.fft.ifft)
    n = shape[-1]
    if n >= _SHORT:
        return torch.fft.irfft(x.contiguous(), n=n)
    mirror = x[..., 1 : (n + 1) // 2].flip(-1).conj()
    return torch.fft.ifft(torch.cat([x, mirror], dim=-1)).real.contiguous()


def rows(x: Tensor, axis: int, transform: Callable[[Tensor], Tensor]) -> Tensor:
    """``transform``, which works on the last axis of contiguous arrays, along the axis number ``axis`` from the end."""
    return transform(x.movedim(-axis, -1).contiguous()).movedim(-1, -axis)
