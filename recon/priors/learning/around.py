r"""A network that starts as a Gaussian and learns what the Gaussian leaves.

With mean ``m`` and covariance ``C = V diag(v) V^T`` of the Gaussian in latent coordinates and the preconditioning of
``recon.priors.network``, the function

.. math::  F'(c_{in} z, c_{noise}) = \frac{\sigma}{s\sqrt{\sigma^2 + s^2}}
           \left[V \mathrm{diag}\left(\frac{v - s^2}{v + \sigma^2}\right) V^T (z - m) + m\right] + F(c_{in} z, c_{noise})

makes the preconditioned denoiser ``D = D_Gauss + c_out F``: exact for the Gaussian where ``F`` is zero, which is how it starts.
Few measurements say enough of a mean and a covariance, which a small network takes very long to find; the training is spent
on the rest.
"""

from __future__ import annotations

from torch import Tensor, nn

from recon.priors.gaussian import eigen
from recon.priors.learning.moments import Moments, one_thread
from recon.priors.network import Architecture, Context, ShuffledUNet


class AroundGaussian(nn.Module):
    """``F'`` of the module's text around a new ``network``, whose last convolution is set to zero.

    mean: (d,) and covariance: (d, d) of flattened latent images.  sigma_data: ``s``.  Costs ``4 d^2`` operations an image more.
    moments: what both were made of, in physical units, where ``of`` made it; small enough to be stored with the weights.

    Raises InputError for a covariance that is not positive definite.
    """

    mean: Tensor
    vectors: Tensor
    variances: Tensor

    def __init__(self, network: ShuffledUNet, mean: Tensor, covariance: Tensor, sigma_data: float) -> None:
        super().__init__()
        self.network, self.sigma_data = network, sigma_data
        self.moments: Moments | None = None
        variances, vectors = eigen(covariance, mean.numel())
        assert vectors is not None
        self.register_buffer("mean", mean.float())
        self.register_buffer("variances", variances.float())
        self.register_buffer("vectors", vectors.float().contiguous())
        # The last convolution; that of the family "adm" is zero as it is built.
        if network.architecture.family == "drunet":
            nn.init.zeros_(network.unet.m_tail.weight)

    @classmethod
    def of(
        cls, network: ShuffledUNet, moments: Moments, numbers: tuple[float, float], sigma_data: float
    ) -> AroundGaussian:
        """Around ``moments`` in physical units, in latents ``z`` of ``x = shift + scale z`` (numbers: shift, scale).

        The bits do not depend on the number of threads.
        """
        shift, scale = numbers
        with one_thread():
            made = cls(network, (moments.mean - shift) / scale, moments.covariance() / scale**2, sigma_data)
        made.moments = moments
        return made

    @property
    def architecture(self) -> Architecture:
        """Of the network."""
        return self.network.architecture

    def forward(self, z: Tensor, c_noise: Tensor, context: Context | None = None) -> Tensor:
        """As ``ShuffledUNet``: ``z`` (n, fields, ny, nx) of about unit variance, ``c_noise`` (n,)."""
        kind = self.mean.dtype
        square = (8 * c_noise.to(kind)).exp()[:, None]  # sigma^2
        total = square + self.sigma_data**2
        latent = z.to(kind).flatten(1) * total.sqrt()
        gain = (self.variances - self.sigma_data**2) / (self.variances + square)
        moved = (((latent - self.mean) @ self.vectors) * gain) @ self.vectors.T + self.mean
        known = (square / total).sqrt() / self.sigma_data * moved
        out: Tensor = self.network(z, c_noise, context)
        return out + known.reshape(z.shape).to(out.dtype)
