r"""The best linear denoiser, by itself and as the part of a network that need not be learnt.

Karras et al. (2022) add to ``c_out F`` the linear estimate of white data of variance ``s^2``.  Images are not white.  With
their mean ``m`` and power spectrum ``S``, the Wiener filter ``W`` and its error,

.. math::
    D(z, \sigma) = W_\sigma(z) + e(\sigma) F, \qquad
    W_\sigma(z) = m + \mathcal F^{-1}\left[\frac{S}{S + \sigma^2} \mathcal F (z - m)\right], \qquad
    e(\sigma)^2 = \left\langle \frac{S \sigma^2}{S + \sigma^2} \right\rangle ,

the targets of ``F`` have unit variance again and a network that returns zero is the Wiener filter; with ``m = 0`` and a white
``S = s^2`` this is the preconditioning of Karras et al.  ``<>`` is the mean over frequencies and fields.

A power spectrum is all of a covariance where images look alike everywhere.  Fields on a map do not: coasts, currents and land
stay in their places.  For small grids the filter of their principal components is better, that of the Gaussian with the
covariance ``sum_k v_k u_k u_k^T`` of ``r`` of them and one variance ``v_0`` in all other directions (Tipping and Bishop 1999),

.. math::
    W_\sigma(z) = m + g_0 (z - m) + \sum_{k \le r} (g_k - g_0)\, u_k u_k^T (z - m), \qquad
    g_k = \frac{v_k}{v_k + \sigma^2}, \qquad e(\sigma)^2 = \sigma^2 \Big[\sum_{k \le r} g_k + (d - r) g_0\Big] / d .
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from recon.errors import InputError


@dataclass(frozen=True)
class Wiener:
    """The Wiener filter of images with a mean and a power spectrum (..., ny, nx), field by field, periodic at the border."""

    mean: Tensor
    spectrum: Tensor

    @classmethod
    def fit(cls, images: Tensor) -> Wiener:
        """Mean and spectrum of ``images`` (n, ..., ny, nx)."""
        mean = images.mean(0)
        power = torch.fft.fft2(images - mean, norm="ortho").abs().square().mean(0)
        return cls(mean, power)

    def __call__(self, z: Tensor, sigma: float | Tensor) -> Tensor:
        """Denoised ``z`` (n, ..., ny, nx); sigma: a number, or what broadcasts with ``z``."""
        gain = self.spectrum / (self.spectrum + sigma**2)
        return self.mean + torch.fft.ifft2(gain * torch.fft.fft2(z - self.mean)).real


class WienerSkip(nn.Module):
    """``W`` and ``e`` for images (n, fields, ny, nx) of the shape (fields, ny, nx); white, of variance one, until ``fit``.

    Kept as the mean and the logarithm of the spectrum, rounded to float16 at once: weights are stored in it, and what is
    stored must be what the network was trained with.
    """

    mean: Tensor
    log_spectrum: Tensor

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("log_spectrum", torch.zeros(shape))

    def fit(self, images: Tensor) -> None:
        """Take mean and spectrum from latent ``images`` (n, ny, nx) or (n, fields, ny, nx), n >= 2.

        Raises InputError for other shapes, or images that are no finite numbers.
        """
        found = Wiener.fit(_fitting(images, self.mean))
        spectrum = found.spectrum.clamp(min=1e-7 * float(found.spectrum.mean()))  # float32 tells no less from nothing
        self.mean.copy_(found.mean.half())
        self.log_spectrum.copy_(spectrum.log().half())

    def forward(self, z: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """``W`` of ``z`` (n, fields, ny, nx) at levels (n, 1, 1, 1), and ``e`` (n, 1, 1, 1)."""
        spectrum, square = self.log_spectrum.exp(), level.square()
        gain = spectrum / (spectrum + square)
        return Wiener(self.mean, spectrum)(z, level), (gain.mean((1, 2, 3), keepdim=True) * square).sqrt()


class PrincipalSkip(nn.Module):
    """``W`` and ``e`` of ``components`` principal components; as ``WienerSkip`` otherwise, float16 included."""

    mean: Tensor
    vectors: Tensor
    log_variances: Tensor
    log_rest: Tensor

    def __init__(self, shape: tuple[int, int, int], components: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("vectors", torch.eye(components, math.prod(shape)))
        self.register_buffer("log_variances", torch.zeros(components))
        self.register_buffer("log_rest", torch.zeros(1))

    def fit(self, images: Tensor) -> None:
        """Take mean and components from latent ``images`` (n, ny, nx) or (n, fields, ny, nx), n >= 2.

        Raises InputError for other shapes, or images that are no finite numbers.
        """
        images = _fitting(images, self.mean)
        mean, kept = images.mean(0), len(self.vectors)
        moved = (images - mean).flatten(1)
        variances, vectors = torch.linalg.eigh(moved.T @ moved / len(moved))  # ascending
        least = 1e-7 * variances.mean()  # float32 tells no less from nothing
        self.mean.copy_(mean.half())
        self.vectors.copy_(vectors[:, -kept:].T.half())
        self.log_variances.copy_(variances[-kept:].clamp(min=least).log().half())
        self.log_rest.copy_(variances[:-kept].mean().clamp(min=least).log().half())

    def forward(self, z: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """``W`` of ``z`` (n, fields, ny, nx) at levels (n, 1, 1, 1), and ``e`` (n, 1, 1, 1)."""
        square, unknowns = level.square().flatten(1), self.mean.numel()
        gain, rest = (v / (v + square) for v in (self.log_variances.exp(), self.log_rest.exp()))
        moved = (z - self.mean).flatten(1)
        filtered = rest * moved + ((moved @ self.vectors.T) * (gain - rest)) @ self.vectors
        known = gain.sum(1, keepdim=True) + (unknowns - len(self.vectors)) * rest
        return self.mean + filtered.reshape(z.shape), (known / unknowns * square).sqrt()[:, :, None, None]


def _fitting(images: Tensor, mean: Tensor) -> Tensor:
    """``images`` as (n, fields, ny, nx) in float64.  Raises InputError where no filter can be fitted to them."""
    images = images.unsqueeze(1) if images.ndim == 3 else images
    if len(images) < 2 or images.shape[1:] != mean.shape or not bool(images.isfinite().all()):
        raise InputError(
            f"a Wiener filter is fitted to two or more finite images of {tuple(mean.shape)}; got {tuple(images.shape)}"
        )
    return images.double()
