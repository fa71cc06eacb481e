"""Image figures against scikit-image, closed forms and hand-made numbers."""

from __future__ import annotations

import math

import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from recon.diagnostics import nrmse, psnr, rmse, ssim
from recon.errors import InputError


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    truth = torch.rand(24, 31, generator=generator, dtype=torch.float64)
    return truth + 0.1 * torch.randn(5, 24, 31, generator=generator, dtype=torch.float64), truth


def test_psnr_and_ssim_agree_with_scikit_image(pair):
    batch, truth = pair
    peak = float(truth.max() - truth.min())
    settings = {"data_range": peak, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    for image, p, s in zip(batch, psnr(batch, truth), ssim(batch, truth), strict=True):
        assert float(p) == pytest.approx(
            peak_signal_noise_ratio(truth.numpy(), image.numpy(), data_range=peak), rel=1e-12
        )
        assert float(s) == pytest.approx(structural_similarity(truth.numpy(), image.numpy(), **settings), rel=1e-12)


def test_a_stated_peak_shifts_psnr_by_its_decibels(pair):
    batch, truth = pair
    assert torch.allclose(psnr(batch, truth, 10.0) - psnr(batch, truth, 1.0), torch.full((5,), 20.0).double())


def test_ssim_of_flat_images_is_the_luminance_term():
    a, b, peak = 0.4, 0.7, 1.0
    c1 = (0.01 * peak) ** 2
    expected = (2 * a * b + c1) / (a**2 + b**2 + c1)
    assert float(ssim(torch.full((16, 16), a), torch.full((16, 16), b), peak)) == pytest.approx(expected, rel=1e-6)


def test_ssim_of_a_volume_is_the_mean_over_its_slices(pair):
    batch, _ = pair
    volume, other = batch[:2], batch[2:4]
    expected = (ssim(volume[0], other[0], 1.0) + ssim(volume[1], other[1], 1.0)) / 2
    assert float(ssim(volume, other, 1.0)) == pytest.approx(float(expected), rel=1e-12)


def test_rmse_and_nrmse_by_hand():
    truth = torch.tensor([3.0, 4.0])
    estimate = torch.tensor([[3.0, 4.0], [3.0, 6.0]])
    assert rmse(estimate, truth).tolist() == pytest.approx([0.0, math.sqrt(2)])
    assert nrmse(estimate, truth).tolist() == pytest.approx([0.0, 0.4])
    assert psnr(estimate, truth, 2.0)[0] == math.inf


@pytest.mark.parametrize("figure", [rmse, nrmse, psnr, ssim])
def test_leading_dims_are_a_batch_and_images_do_not_mix(figure, pair):
    batch, truth = pair
    together = figure(batch[:4].reshape(2, 2, *truth.shape), truth)
    assert together.shape == (2, 2)
    assert figure(batch[3], truth).shape == ()
    assert float(together[1, 1]) == pytest.approx(float(figure(batch[3], truth)), rel=1e-12)


@pytest.mark.parametrize("figure", [rmse, nrmse, psnr, ssim])
def test_a_shape_that_would_broadcast_is_refused(figure):
    with pytest.raises(InputError, match=r"\*truth.shape.*\(16, 16\).*got \(16, 1\)"):
        figure(torch.zeros(16, 1), torch.rand(16, 16))


def test_a_flat_truth_needs_a_stated_peak():
    with pytest.raises(InputError, match="positive, finite peak; the truth's max - min is 0"):
        psnr(torch.ones(12, 12), torch.zeros(12, 12))
    with pytest.raises(InputError, match="the given peak is -1"):
        ssim(torch.ones(12, 12), torch.zeros(12, 12), -1.0)


def test_ssim_refuses_an_image_smaller_than_its_window():
    with pytest.raises(InputError, match="at least 11 pixels"):
        ssim(torch.rand(10, 40), torch.rand(10, 40))
