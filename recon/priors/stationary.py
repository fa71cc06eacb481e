r"""A Gaussian prior of images that is the same everywhere: a mean image and a power spectrum.

With the orthonormal Fourier transform ``F`` and the spectrum ``S`` (the variance of each coefficient), periodic at the border,

.. math::  D(z, \sigma) = m + F^{-1}\left[\frac{S}{S + \sigma^2}\, F (z - m)\right],

which is the Wiener filter, so this is the best prior that is linear and stationary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recon.draws import Draws
from recon.errors import InputError
from recon.priors.base import Card, Prior
from recon.priors.gaussian import covering_schedule
from recon.priors.wiener import Wiener
from recon.priors.wrapped import Wrapped
from recon.schedules import Schedule
from recon.space import Space


class StationaryPrior(Prior):
    """``z ~ N(mean, F^-1 diag(S) F)``, field by field; the latent is the space itself.

    mean: *space.shape.  spectrum: the same shape, positive, equal at opposite frequencies (that of real images).  The last two
    axes are transformed; fields on an axis before them are independent.

    Raises InputError for shapes that do not fit, or a spectrum that is not positive or not that of a real image.
    """

    mean: Tensor
    spectrum: Tensor

    def __init__(self, mean: Tensor, spectrum: Tensor, space: Space, schedule: Schedule | None = None) -> None:
        for name, value in (("mean", mean), ("spectrum", spectrum)):
            if tuple(value.shape) != space.shape or len(space.shape) < 2:
                raise InputError(f"{name} must be an image of {space.describe()}; got {tuple(value.shape)}")
        if not bool((spectrum > 0).all()):
            raise InputError(f"a spectrum must be positive; its smallest value is {float(spectrum.min()):.3g}")
        opposite = spectrum.flip((-2, -1)).roll((1, 1), (-2, -1))
        if not torch.allclose(spectrum, opposite, rtol=1e-4):
            raise InputError("a spectrum of real images is equal at opposite frequencies; this one is not")
        ends = float(spectrum.min().sqrt()), float(spectrum.max().sqrt())
        super().__init__(
            space, schedule or covering_schedule(*ends), Card("stationary", "Gaussian with a power spectrum")
        )
        self.register_buffer("mean", mean.clone())
        self.register_buffer("spectrum", spectrum.clone())

    @property
    def dtype(self) -> torch.dtype:
        return self.spectrum.dtype

    def filtered(self, z: Tensor, gain: Tensor) -> Tensor:
        """``F^-1 [gain F z]``, real: (n, *space.shape)."""
        out: Tensor = torch.fft.ifft2(gain * torch.fft.fft2(z, norm="ortho"), norm="ortho").real
        return out.to(z.dtype)

    def predict(self, z: Tensor, sigma: Tensor) -> Tensor:
        level = sigma.reshape(-1, *[1] * len(self.space.shape))
        return Wiener(self.mean, self.spectrum)(z, level).to(z.dtype)

    def spread(self, u: Tensor) -> Tensor:
        """The covariance times ``u``: (n, *space.shape)."""
        return self.filtered(u, self.spectrum)

    def exact(self, draws: Draws, step: int = 0) -> Tensor:
        """Independent draws, one per member, keyed by ``step``: (n, *space.shape)."""
        white = draws.normal(step, self.space.shape, "probe", dtype=self.dtype).to(self.device)
        return self.mean + self.filtered(white, self.spectrum.sqrt())


class InLatentOf(Wrapped):
    """``prior``, which speaks of latents, with the normalisation, space and levels of another prior: its linear twin.

    Raises InputError when the other decodes through a network, or its latent has another shape.
    """

    def __init__(self, prior: StationaryPrior, other: Prior) -> None:
        if not other.affine:
            raise InputError(
                f"{other.card.name!r} decodes through a network; only priors with an affine decoder have a twin"
            )
        if prior.space.shape != other.latent.shape:
            raise InputError(
                f"latents of {other.card.name!r} are {other.latent.shape}; got a prior of {prior.space.shape}"
            )
        super().__init__(other, Card(f"{other.card.name}, Gaussian twin", "Gaussian of the same mean and spectrum"))
        self.inner = prior
        self.sigma_data = float(prior.spectrum.mean().sqrt())

    @property
    def dtype(self) -> torch.dtype:
        return self.inner.dtype

    def predict(self, z: Tensor, sigma: Tensor) -> Tensor:
        return self.inner.predict(z, sigma)


def spectrum_of(images: Tensor, space: Space) -> StationaryPrior:
    """The stationary Gaussian with the mean and power of ``images`` (n, *space.shape), n >= 2.

    The mean is one number per field and the power is averaged over rings of equal frequency: what a few images can tell.
    Raises InputError for fewer than two images or shapes that do not fit.
    """
    if len(images) < 2 or tuple(images.shape[1:]) != space.shape:
        raise InputError(f"a spectrum is that of two or more images of {space.describe()}; got {tuple(images.shape)}")
    rows, columns = space.shape[-2:]
    mean = images.mean((0, -2, -1), keepdim=True)[0].expand(space.shape)
    power = torch.fft.fft2(images - mean, norm="ortho").abs().square().mean(0)
    frequency = (torch.fft.fftfreq(rows)[:, None] ** 2 + torch.fft.fftfreq(columns)[None] ** 2).sqrt()
    ring = (frequency * max(rows, columns)).round().long().flatten()
    counts = torch.bincount(ring).to(power.dtype)
    flat = power.reshape(-1, rows * columns)
    sums = torch.zeros(len(flat), len(counts), dtype=power.dtype).index_add_(1, ring, flat)
    averaged = (sums / counts.clamp(min=1))[:, ring].reshape(space.shape)
    floor = 1e-6 * averaged.mean()  # what float32 images cannot tell from nothing
    return StationaryPrior(mean.contiguous(), averaged.clamp(min=float(floor)), space)
