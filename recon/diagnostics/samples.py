r"""Whether two sets of images could come from one law: three statistics, each zero for equal laws and many images.

spectrum: of the azimuthally averaged power spectra about the common mean image, in dB over the ``K`` bands,

    d = sqrt( mean_k ( 10 log10 S_a(k) / S_b(k) )^2 )

histogram: Wasserstein-1 distance of all values pooled, over their standard deviation in the second set.
sliced: sliced Wasserstein-1 (Bonneel et al. 2015), the mean over random unit directions ``u`` of the Wasserstein-1 distance of
``<u, x>``, over the root mean variance of a projection in the second set.

None is zero for finite sets: hold them against the same figure of two sets that do share a law (``floor``).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from recon.errors import InputError


@dataclass(frozen=True)
class Distances:
    """The three statistics; see the module's text.  spectrum in dB, the others in standard deviations."""

    spectrum: float
    histogram: float
    sliced: float


def distances(a: Tensor, b: Tensor, directions: int = 512, seed: int = 0) -> Distances:
    """The statistics of ``a`` (n, ..., ny, nx) against ``b``, as many images of the same shape.

    Images of several fields count as such: spectra are averaged over fields in dB, so give them in comparable units.
    Raises InputError for other shapes, fewer than two images, or values that are not finite.
    """
    if a.shape != b.shape or a.ndim < 3 or len(a) < 2:
        raise InputError(
            f"two sets of at least two images (n, ..., ny, nx), of one shape, are compared; got {tuple(a.shape)} "
            f"and {tuple(b.shape)}"
        )
    if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise InputError("images that are compared must be finite")
    from scipy.stats import wasserstein_distance

    a, b = a.double(), b.double()
    mean = torch.cat([a, b]).mean(0)
    ratio = 10 * torch.log10(spectrum(a - mean) / spectrum(b - mean))
    values = [x.flatten().numpy() for x in (a, b)]
    histogram = float(wasserstein_distance(*values)) / float(b.std())
    return Distances(float(ratio.square().mean().sqrt()), histogram, _sliced(a, b, directions, seed))


def spectrum(x: Tensor) -> Tensor:
    """Azimuthal mean of ``|FFT|^2`` of images (n, ..., ny, nx) over rings of one cycle per field of view: (..., bands).

    Bands 1, 2, ... up to the Nyquist frequency of the shorter side; the mean of each image is left out.
    """
    ny, nx = x.shape[-2:]
    power = torch.fft.fft2(x, norm="ortho").abs().square().mean(0)
    cycles = torch.hypot(
        *torch.meshgrid(torch.fft.fftfreq(ny) * min(ny, nx), torch.fft.fftfreq(nx) * min(ny, nx), indexing="ij")
    )
    ring = cycles.round().long().flatten()
    last = min(ny, nx) // 2
    total = torch.zeros(*power.shape[:-2], int(ring.max()) + 1, dtype=power.dtype)
    total.index_add_(-1, ring, power.flatten(-2))
    return (total / torch.bincount(ring))[..., 1 : last + 1]


def floor(pool: Tensor, b: Tensor, sets: int = 8, seed: int = 0) -> list[Distances]:
    """The statistics of ``sets`` random subsets of ``pool``, each of as many images as ``b``, against ``b``.

    What images of the training law itself come to.  Raises InputError for a pool smaller than ``b``.
    """
    if len(pool) < len(b):
        raise InputError(f"a floor needs at least as many images as are compared; got {len(pool)} for {len(b)}")
    random = np.random.default_rng(seed)
    picks = [torch.from_numpy(random.permutation(len(pool))[: len(b)]) for _ in range(sets)]
    return [distances(pool[pick], b) for pick in picks]


def _sliced(a: Tensor, b: Tensor, directions: int, seed: int) -> float:
    size = a[0].numel()
    random = np.random.Generator(np.random.Philox(key=np.array([seed, size], dtype=np.uint64)))
    u = torch.from_numpy(random.standard_normal((size, directions)))
    u = u / u.norm(dim=0)
    # Projections of images less the mean of the second set: a common shift changes nothing and keeps the digits.
    mean = b.mean(0)
    p, q = ((x - mean).flatten(1) @ u for x in (a, b))
    gap = (p.sort(0).values - q.sort(0).values).abs().mean()
    return float(gap / q.var(0).mean().sqrt())
