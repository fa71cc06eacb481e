r"""How far an image is from the truth.

With ``N`` values per image: ``RMSE = sqrt(sum (x - t)^2 / N)``, ``NRMSE = |x - t| / |t|``,
``PSNR = 20 log10(peak / RMSE)`` dB, and SSIM with the settings of Wang et al. (IEEE Trans. Image Process. 13, 2004): Gaussian
window of 1.5 pixels, ``K = (0.01, 0.03)``, population covariance.  PSNR and SSIM depend on ``peak``, the range of the data:
state it, or the truth's ``max - min`` is taken.  Numbers with different peaks cannot be compared.

All functions take ``estimate`` (\*batch, \*image) and ``truth`` (\*image) and answer with (\*batch,), float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from recon.errors import InputError, need

SSIM_WINDOW = 11  # pixels: the Gaussian window cut off at 3.5 standard deviations


def rmse(estimate: Tensor, truth: Tensor) -> Tensor:
    """Root mean square error ``sqrt(mean (x - t)^2)``, in the unit of the data.

    estimate: (*batch, *truth.shape).  Returns (*batch,).  Raises InputError when shapes do not fit.
    """
    return _rows(estimate, truth).square().mean(-1).sqrt().reshape(_batch(estimate, truth))


def nrmse(estimate: Tensor, truth: Tensor) -> Tensor:
    """Error relative to the truth's Euclidean norm, ``|x - t| / |t|``; infinite or NaN for a truth of zeros.

    estimate: (*batch, *truth.shape).  Returns (*batch,).  Raises InputError when shapes do not fit.
    """
    return rmse(estimate, truth) / truth.double().square().mean().sqrt()


def psnr(estimate: Tensor, truth: Tensor, peak: float | None = None) -> Tensor:
    """Peak signal-to-noise ratio ``20 log10(peak / RMSE)`` in dB; infinite where the estimate is the truth.

    estimate: (*batch, *truth.shape).  peak: range of the data, default the truth's ``max - min``.  Returns (*batch,).
    Raises InputError when shapes do not fit or the peak is not positive.
    """
    return 20 * torch.log10(_peak(truth, peak) / rmse(estimate, truth))


def ssim(estimate: Tensor, truth: Tensor, peak: float | None = None) -> Tensor:
    """Structural similarity of the 2-D slices (last two dims), averaged over the image's other dims; 1 is identical.

    estimate: (*batch, *truth.shape).  peak: range of the data, default the truth's ``max - min``.  Returns (*batch,); NaN for
    non-finite estimates.  One-dimensional data are compared along their only dim.
    Raises InputError when shapes do not fit, the peak is not positive, a slice is narrower than 11 pixels, or scikit-image
    is absent.
    Source: Wang, Bovik, Sheikh, Simoncelli, IEEE TIP 13(4), 2004, as computed by scikit-image.
    """
    structural_similarity = need("skimage.metrics", "metrics").structural_similarity  # type: ignore[attr-defined]

    batch, plane = _batch(estimate, truth), tuple(truth.shape[-2:])
    if min(plane) < SSIM_WINDOW:
        raise InputError(f"SSIM needs at least {SSIM_WINDOW} pixels along each of the last two dims; got {plane}")
    peak = _peak(truth, peak)
    slices = truth.detach().cpu().double().reshape(-1, *plane).numpy()
    values = []
    for image in estimate.detach().cpu().double().reshape(-1, len(slices), *plane).numpy():
        pairs = zip(image, slices, strict=True)
        parts = [
            structural_similarity(a, b, data_range=peak, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
            for a, b in pairs
        ]
        values.append(sum(parts) / len(parts))
    return torch.tensor(values, dtype=torch.float64).reshape(batch)


def _batch(estimate: Tensor, truth: Tensor) -> tuple[int, ...]:
    n = truth.ndim
    if n < 1 or estimate.ndim < n or tuple(estimate.shape[estimate.ndim - n :]) != tuple(truth.shape):
        raise InputError(
            f"images are compared as (*batch, *truth.shape) against {tuple(truth.shape)}; got {tuple(estimate.shape)}"
        )
    return tuple(estimate.shape[: estimate.ndim - n])


def _rows(estimate: Tensor, truth: Tensor) -> Tensor:
    """Errors as (batch size, truth size), float64."""
    _batch(estimate, truth)
    return (estimate.double() - truth.double()).reshape(-1, truth.numel())


def _peak(truth: Tensor, peak: float | None) -> float:
    value = float(truth.max() - truth.min()) if peak is None else float(peak)
    if not value > 0 or not math.isfinite(value):
        source = "the truth's max - min" if peak is None else "the given peak"
        raise InputError(f"PSNR and SSIM need a positive, finite peak; {source} is {value}")
    return value
