r"""The best linear denoiser, by itself and as the part of a network that need not be learnt.

Karras et al. (2022) add to ``c_out F`` the linear estimate of white data of variance ``s^2``.  Images are not white.  With
their mean ``m`` and power spectrum ``S``, the Wiener filter ``W`` and its error,

.. math::
    D(z, \sigma) = W_\sigma(z) + e(\sigma) F, \qquad
    W_\sigma(z) = m + \mathcal F^{-1}\left[\frac{S}{S + \sigma^2} \mathcal F (z - m)\right], \qquad
    e(\sigma)^2 = \left\langle \frac{S \sigma^2}{S + \sigma^2} \right\rangle ,

the targets of ``F`` have unit variance again and a network that returns zero is the Wiener filter; with ``m = 0`` and a white
``S = s^2`` this is the preconditioning of Karras et al.  ``<>`` is the mean over frequencies and fields.
"""

from __future__ import annotations

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
        images = images.unsqueeze(1) if images.ndim == 3 else images
        if len(images) < 2 or images.shape[1:] != self.mean.shape or not bool(images.isfinite().all()):
            raise InputError(
                f"a Wiener filter is fitted to two or more finite images of {tuple(self.mean.shape)}; "
                f"got {tuple(images.shape)}"
            )
        found = Wiener.fit(images.double())
        spectrum = found.spectrum.clamp(min=1e-7 * float(found.spectrum.mean()))  # float32 tells no less from nothing
        self.mean.copy_(found.mean.half())
        self.log_spectrum.copy_(spectrum.log().half())

    def forward(self, z: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """``W`` of ``z`` (n, fields, ny, nx) at levels (n, 1, 1, 1), and ``e`` (n, 1, 1, 1)."""
        spectrum, square = self.log_spectrum.exp(), level.square()
        gain = spectrum / (spectrum + square)
        return Wiener(self.mean, spectrum)(z, level), (gain.mean((1, 2, 3), keepdim=True) * square).sqrt()
