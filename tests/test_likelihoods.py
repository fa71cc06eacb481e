"""Likelihoods: the one convention, per draw, and refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm, poisson

from recon.draws import Draws
from recon.errors import InputError
from recon.likelihoods import GaussianLikelihood, TransmissionLikelihood
from recon.operators import MatrixOperator
from tests.bounds import chi2_bounds, normal_bound


def operator(m: int = 4, n: int = 6) -> MatrixOperator:
    return MatrixOperator(torch.rand(m, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64))


@pytest.mark.parametrize("sigma", [0.3, torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)])
def test_gaussian_log_prob_is_scipys(sigma: float | torch.Tensor) -> None:
    A, x = operator(), torch.rand(5, 6, dtype=torch.float64)
    y = torch.rand(4, dtype=torch.float64)
    expected = norm.logpdf(y.numpy(), A.A(x).numpy(), np.asarray(sigma)).sum(1)
    assert GaussianLikelihood(A, y, sigma).log_prob(x).numpy() == pytest.approx(expected, rel=1e-12)


def test_gaussian_gradient_has_the_half() -> None:
    A, y = operator(), torch.rand(4, dtype=torch.float64)
    x = torch.rand(3, 6, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(GaussianLikelihood(A, y, 0.2).log_prob(x).sum(), x)
    torch.testing.assert_close(gradient, A.A_adjoint(y - A.A(x.detach())) / 0.2**2)


def test_transmission_log_prob_is_scipys() -> None:
    A, x = operator(), torch.rand(5, 6, dtype=torch.float64)
    counts = torch.tensor([3.0, 0.0, 11.0, 7.0], dtype=torch.float64)
    like = TransmissionLikelihood(A, counts, 40.0, 0.5)
    expected = poisson.logpmf(counts.numpy(), (40 * torch.exp(-A.A(x)) + 0.5).numpy()).sum(1)
    assert like.log_prob(x).numpy() == pytest.approx(expected, rel=1e-12)


def test_dark_rays_stay_finite() -> None:
    counts = torch.tensor([0.0, 0.0, 1.0, 1e5], dtype=torch.float64)
    x = torch.full((1, 6), 50.0, dtype=torch.float64)
    like = TransmissionLikelihood(operator(), counts, 1e5)
    assert torch.isfinite(like.log_prob(x)).all()
    gaussian = like.gaussian()
    assert torch.isfinite(gaussian.y).all() and gaussian.sigma[0] > gaussian.sigma[3]


def test_post_log_form_has_the_mean_and_spread_of_counts() -> None:
    """Over many simulated scans (y_hat - A x) / sigma is standard normal to the order 1/sqrt(counts)."""
    A = operator(1, 1)
    x, n = torch.tensor([[1.0]], dtype=torch.float64), 20_000
    model = TransmissionLikelihood(A, torch.zeros(1, dtype=torch.float64), 1e4)
    normal = torch.randn(n, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    counts = model.simulate(x.expand(n, 1), normal)
    rate = float(model.expected(x))
    assert float(counts.mean()) == pytest.approx(rate, abs=normal_bound() * math.sqrt(rate / n))
    score = torch.stack([TransmissionLikelihood(A, k, 1e4).gaussian().residual(x)[0] for k in counts[:2000]])
    score /= rate**-0.5
    low, high = chi2_bounds(2000)
    assert abs(float(score.mean())) < normal_bound() / math.sqrt(2000) + rate**-0.5
    assert low * 0.98 < float(score.square().mean()) < high * 1.02


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: GaussianLikelihood(operator(), torch.rand(5), 0.1), r"shape of the operator's range \(datum=4\)"),
        (
            lambda: GaussianLikelihood(operator(), torch.tensor([1, 2, math.nan, 1.0]), 0.1),
            "1 of 4 values that are NaN",
        ),
        (lambda: GaussianLikelihood(operator(), torch.rand(4), 0.0), "must be positive"),
        (lambda: GaussianLikelihood(operator(), torch.rand(4), torch.rand(3)), "one number or one per datum"),
        (lambda: TransmissionLikelihood(operator(), -torch.rand(4), 1.0), "counts must not be negative"),
        (lambda: TransmissionLikelihood(operator(), torch.rand(4), 0.0), "blank .* must be positive"),
        (lambda: TransmissionLikelihood(operator(), torch.rand(4), 1.0, -1.0), "background must not be negative"),
    ],
)
def test_refusals(make, text: str) -> None:
    with pytest.raises(InputError, match=text):
        make()


def complex_operator(m: int = 4, n: int = 3) -> MatrixOperator:
    parts = torch.rand(2, m, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return MatrixOperator(torch.complex(parts[0], parts[1]))


@pytest.mark.parametrize("sigma", [0.3, torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)])
def test_complex_data_count_as_two_real_ones(sigma: float | torch.Tensor) -> None:
    A, x = complex_operator(), torch.rand(5, 3, dtype=torch.float64)
    y = torch.complex(torch.rand(4, dtype=torch.float64), torch.rand(4, dtype=torch.float64))
    residual = (y - A.A(x)).numpy()
    expected = sum(norm.logpdf(part, 0, np.asarray(sigma)).sum(1) for part in (residual.real, residual.imag))
    like = GaussianLikelihood(A, y, sigma)
    assert like.log_prob(x).numpy() == pytest.approx(expected, rel=1e-12)
    assert torch.equal(like.y, y)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(like.log_prob(x).sum(), x)
    torch.testing.assert_close(gradient, A.A_adjoint((y - A.A(x.detach())) / torch.as_tensor(sigma) ** 2))


def test_conversions_keep_the_imaginary_part() -> None:
    A, y = complex_operator(), torch.complex(torch.ones(4), torch.full((4,), 2.0))
    like = GaussianLikelihood(A.float(), y, 0.1).double()
    assert like.y.dtype == torch.complex128 and torch.equal(like.y.imag, torch.full((4,), 2.0, dtype=torch.float64))


def test_complex_noise_has_the_stated_spread_in_each_part() -> None:
    A, n = complex_operator(), 5000
    like = GaussianLikelihood(A, torch.zeros(4, dtype=torch.complex128), 0.5)
    normal = Draws(3, range(n)).normal(0, (4,), "data", dtype=torch.complex128)
    x = torch.rand(1, 3, dtype=torch.float64)
    noise = torch.view_as_real((like.simulate(x.expand(n, 3), normal) - A.A(x)) / 0.5)
    low, high = chi2_bounds(8 * n)
    assert low < float(noise.square().sum()) / (8 * n) < high
    product = (noise[..., 0] * noise[..., 1]).sum() / math.sqrt(4 * n)  # real and imaginary part are independent
    assert abs(float(product)) < normal_bound(1)


def test_real_data_for_complex_operators_are_refused() -> None:
    with pytest.raises(InputError, match="must be complex"):
        GaussianLikelihood(complex_operator(), torch.zeros(4), 0.1)
    with pytest.raises(InputError, match="must be real"):
        GaussianLikelihood(operator(), torch.zeros(4, dtype=torch.complex128), 0.1)
