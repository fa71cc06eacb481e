"""Pieces that several published U-Nets share: sinusoids, filtered resampling, attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional


def sinusoid(label: Tensor, width: int, *, endpoint: bool, sine_first: bool) -> Tensor:
    """Features (n, width) of labels (n,): sines and cosines of ``label * 10000^(-k / K)``, ``k = 0 ... width // 2 - 1``.

    endpoint: whether the slowest has exactly 1/10000 (``K = width // 2 - 1``) or not (``K = width // 2``).  sine_first: order
    of the two halves.  An odd width ends with a zero.  Fractional labels are allowed.
    """
    half = width // 2
    k = torch.arange(half, dtype=label.dtype, device=label.device)
    angle = label[:, None] * (k * (-math.log(10000) / (half - 1 if endpoint else half))).exp()
    parts = [angle.sin(), angle.cos()] if sine_first else [angle.cos(), angle.sin()]
    return functional.pad(torch.cat(parts, dim=1), (0, width % 2))


def fourier(label: Tensor, frequencies: Tensor) -> Tensor:
    """Random Fourier features (n, 2 k): sines, then cosines, of ``2 pi label frequencies``."""
    angle = label[:, None] * (2 * math.pi * frequencies)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def downsample(x: Tensor, kernel: Tensor) -> Tensor:
    """Filter every channel with the (k, k) ``kernel``, k even, and keep every second pixel: zeros outside the image."""
    n, pad = x.shape[1], (kernel.shape[-1] - 1) // 2
    return functional.conv2d(x, kernel.to(x.dtype).expand(n, 1, -1, -1), stride=2, padding=pad, groups=n)


def upsample(x: Tensor, kernel: Tensor) -> Tensor:
    """Zeros between the pixels, then four times the (k, k) ``kernel``: the transpose of ``downsample``, times four."""
    n, pad = x.shape[1], (kernel.shape[-1] - 1) // 2
    return functional.conv_transpose2d(x, 4 * kernel.to(x.dtype).expand(n, 1, -1, -1), stride=2, padding=pad, groups=n)


def square_kernel(taps: tuple[float, ...] | list[float]) -> Tensor:
    """The outer product (k, k) of ``taps`` with itself, of unit sum."""
    line = torch.tensor(taps, dtype=torch.float32)
    return torch.outer(line, line) / line.sum().square()


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``softmax(q^T k / sqrt(c)) v`` for (n, heads, c, pixels)."""
    q, k, v = (part.transpose(-1, -2) for part in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v).transpose(-1, -2)
