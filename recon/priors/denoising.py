r"""How well a denoiser does on images it has not seen, beside the best linear denoiser.

At one noise level the error is :math:`\sqrt{E |D(z_0 + \sigma n, \sigma) - z_0|^2}` per pixel.  Two yardsticks: doing nothing,
whose error is :math:`\sigma`, and the Wiener filter

.. math::  W(z) = m + \mathcal F^{-1}\left[\frac{S}{S + \sigma^2}\, \mathcal F (z - m)\right],

the best denoiser that is linear and stationary, with the mean image ``m`` and power spectrum ``S`` of the training images.
A third, non-local means, needs no training at all.
The noise depends on (seed, sigma, image) alone, so every method that is compared sees the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from recon.errors import need
from recon.priors.network import precondition
from recon.priors.wiener import Wiener

__all__ = ["Denoiser", "Wiener", "denoising_error", "fixed_noise", "network_denoiser", "non_local_means"]

Denoiser = Callable[[Tensor, float], Tensor]
"""(images (n, ny, nx) or (n, field, ny, nx), sigma) -> denoised images."""


def non_local_means(z: Tensor, sigma: float) -> Tensor:
    """Non-local means (Buades et al. 2005) as scikit-image has it, plane by plane, told ``sigma``: a library's denoiser.

    z: (n, ..., ny, nx).  Patches of 5 x 5 pixels, 13 x 13 compared, ``h = 0.8 sigma``.  Raises InputError without scikit-image.
    """
    filtered = need("skimage.restoration", "metrics").denoise_nl_means  # type: ignore[attr-defined]
    planes = z.double().reshape(-1, *z.shape[-2:]).numpy()
    settings = {"patch_size": 5, "patch_distance": 6, "h": 0.8 * sigma, "sigma": sigma, "fast_mode": True}
    out = np.stack([filtered(plane, **settings) for plane in planes])
    return torch.from_numpy(out).to(z.dtype).reshape(z.shape)


def denoising_error(
    denoise: Denoiser, images: Tensor, sigma: float, *, known: Tensor | None = None, seed: int = 0, batch: int = 16
) -> float:
    """Root mean squared error of ``denoise`` on noisy ``images`` (n, ...), over the pixels that are ``known``."""
    total, pixels = 0.0, 0.0
    with torch.no_grad():
        for first in range(0, len(images), batch):
            part = images[first : first + batch]
            noisy = part + sigma * fixed_noise(tuple(part.shape), seed, sigma, first)
            square = (denoise(noisy, sigma) - part).double().square()
            weight = torch.ones_like(square) if known is None else known[first : first + batch].double()
            total += float((weight * square).sum())
            pixels += float(weight.sum())
    return math.sqrt(total / pixels)


def network_denoiser(network: nn.Module, sigma_data: float) -> Denoiser:
    """The preconditioned ``network`` with one noise level for all images."""
    return lambda z, sigma: precondition(network, z, torch.full((len(z),), sigma), sigma_data)


def fixed_noise(shape: tuple[int, ...], seed: int, sigma: float, first: int) -> Tensor:
    """Standard normal noise (n, ...) for images ``first, first + 1, ...`` at one level."""
    level = round(sigma * 1e6) << 24
    keys = [np.array([seed, level + first + i], dtype=np.uint64) for i in range(shape[0])]
    generators = [np.random.Generator(np.random.Philox(key=key)) for key in keys]
    return torch.from_numpy(np.stack([g.standard_normal(shape[1:], dtype=np.float32) for g in generators]))
