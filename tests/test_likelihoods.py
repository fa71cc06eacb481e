"""Likelihoods: the one convention, per draw, and refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal, norm, poisson

import recon
from recon.draws import Draws
from recon.errors import InputError
from recon.likelihoods import GaussianLikelihood, PoissonLikelihood, StackedLikelihood, TransmissionLikelihood
from recon.operators import CG, Joined, LinearOperator, MatrixOperator, Operator, PhaseRetrieval, Stack
from recon.posterior import dense
from recon.priors import GaussianPrior
from recon.samplers import DPS, MMPS, DiffPIR
from recon.space import Space
from tests import zoo
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


def test_whole_numbers_are_taken_as_such() -> None:
    """Counts often come as integers; sigma and blank must not be cut to them."""
    counts = torch.tensor([3, 0, 11, 7])
    like = TransmissionLikelihood(operator(), counts, 40.5, 0.25)
    assert like.counts.dtype == like.blank.dtype == torch.float64
    assert float(like.blank) == 40.5
    assert float(GaussianLikelihood(operator(), counts, 0.5).sigma) == 0.5


# --- Counts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("b", [0.0, 0.7])
@pytest.mark.parametrize("gain", [0.1, 1.0, 7.0, torch.tensor([0.2, 3.0, 1.0, 50.0], dtype=torch.float64)])
def test_poisson_log_prob_and_gradient_are_those_of_the_law_at_any_gain(gain: float | torch.Tensor, b: float) -> None:
    A, counts = operator(), torch.tensor([3.0, 0.0, 11.0, 7.0], dtype=torch.float64)
    x = zoo.normal(5, 6).abs() + 0.5
    like = PoissonLikelihood(A, counts, gain, b, floor=1e-3)
    rate = gain * A.A(x) + b
    assert float(rate.min()) > like.floor
    assert like.log_prob(x).numpy() == pytest.approx(poisson.logpmf(counts.numpy(), rate.numpy()).sum(1), rel=1e-12)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(like.log_prob(x).sum(), x)
    torch.testing.assert_close(gradient, A.A_adjoint(gain * (counts / rate - 1)))
    h, d = 1e-6, zoo.normal(5, 6, step=1)
    laws = [poisson.logpmf(counts.numpy(), (gain * A.A((x + s * h * d).detach()) + b).numpy()).sum(1) for s in (1, -1)]
    assert (gradient * d).sum(1).detach().numpy() == pytest.approx((laws[0] - laws[1]) / (2 * h), rel=1e-6)


def by_rate(counts: float, floor: float, background: float = 0.0) -> PoissonLikelihood:
    """One count whose expected number is ``x`` itself."""
    identity = MatrixOperator(torch.ones(1, 1, dtype=torch.float64))
    return PoissonLikelihood(identity, torch.tensor([counts], dtype=torch.float64), 1.0, background, floor)


@pytest.mark.parametrize("k", [0.0, 1.0, 40.0])
@pytest.mark.parametrize("floor", [0.01, 0.5])
def test_below_the_floor_the_logarithm_goes_on_smoothly_and_leads_back(k: float, floor: float) -> None:
    like = by_rate(k, floor)

    def at(rates: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.tensor(rates, dtype=torch.float64)[:, None].requires_grad_()
        values = like.log_prob(x)
        (slopes,) = torch.autograd.grad(values.sum(), x)
        return values.detach(), slopes[:, 0]

    h = 1e-9 * floor
    values, slopes = at([floor - h, floor, floor + h])
    curvature = k / floor**2 + 1 / floor
    assert values.numpy() == pytest.approx(float(values[1]), abs=4 * h * (k / floor + 1) + 1e-12)
    assert slopes.numpy() == pytest.approx(k / floor - 1, abs=4 * h * curvature + 1e-9 * (k / floor + 1))
    line = torch.linspace(-5, 3 * floor, 401).tolist()
    values, slopes = at(line)
    assert bool((slopes.diff() <= 1e-9 * slopes.abs().max()).all())  # concave
    assert bool((slopes[: line.index(max(r for r in line if r < 0)) + 1] > 0).all())
    if k == 0:
        values, slopes = at([0.0, floor / 3, floor])
        assert float(slopes[0]) == 0
        exact = -torch.tensor([0.0, floor / 3, floor], dtype=torch.float64)
        assert float((values - exact).abs().max()) == pytest.approx(floor / 2)  # the most it is changed, at zero


def test_rates_above_the_floor_are_left_alone() -> None:
    x = torch.tensor([[0.011], [0.3], [8.0]], dtype=torch.float64)
    expected = poisson.logpmf(2, x[:, 0].numpy())
    assert by_rate(2.0, 0.01).log_prob(x).numpy() == pytest.approx(expected, rel=1e-12)
    dark = torch.tensor([[0.0]], dtype=torch.float64)  # a background at or above the floor keeps every object exact
    assert float(by_rate(2.0, 0.01, 0.01).log_prob(dark)) == pytest.approx(poisson.logpmf(2, 0.01), rel=1e-12)


def test_no_counts_come_from_negative_rates() -> None:
    x = torch.full((2000, 1), -3.0, dtype=torch.float64)
    assert not by_rate(0.0, 0.01).simulate(x, zoo.normal(2000, 1)).any()


@pytest.mark.parametrize("rate", [0.3, 2.0, 25.0])
def test_the_gaussian_form_of_counts_is_unbiased_for_a_shared_rate(rate: float) -> None:
    """``sum w y / sum w`` over all counts with their probabilities is the rate itself; weights 1/k are a count too low."""
    gain, background = 4.0, 0.25
    k = torch.arange(200, dtype=torch.float64)
    p = torch.from_numpy(poisson.pmf(k.numpy(), gain * rate + background))
    like = PoissonLikelihood(MatrixOperator(torch.ones(200, 1, dtype=torch.float64)), k, gain, background).gaussian()
    weights = p / like.sigma**2
    assert float((weights * like.y).sum() / weights.sum()) == pytest.approx(rate, rel=1e-10)


def test_the_gaussian_form_has_the_spread_of_many_counts() -> None:
    A, n, rate = operator(1, 1), 2000, 1e4
    x = torch.tensor([[rate]], dtype=torch.float64) / A.matrix
    model = PoissonLikelihood(A, torch.zeros(1, dtype=torch.float64), 0.5, 30.0)
    counts = model.simulate(x.expand(n, 1), Draws(2, range(n)).normal(0, (1,), "data", dtype=torch.float64))
    forms = [PoissonLikelihood(A, k, 0.5, 30.0).gaussian() for k in counts]
    scores = torch.stack([form.residual(x)[0] / form.sigma for form in forms])
    size = (0.5 * rate + 30) ** -0.5  # corrections are of this order
    low, high = chi2_bounds(n)
    assert abs(float(scores.mean())) < normal_bound() / math.sqrt(n) + 2 * size
    assert low * (1 - 4 * size) < float(scores.square().mean()) < high * (1 + 4 * size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rays_through_almost_everything_stay_finite(dtype: torch.dtype) -> None:
    """``exp(-A x)`` is zero in any precision, its logarithm is not; a ray without counts says so and no more."""
    A = MatrixOperator(torch.eye(3, dtype=dtype))
    like = TransmissionLikelihood(A, torch.tensor([0.0, 5.0, 1e5], dtype=dtype), 1e5)
    x = torch.tensor([[30.0, 200.0, 5e3], [0.0, 0.0, 0.0], [-2.0, 1.0, 0.5]], dtype=dtype).requires_grad_()
    values = like.log_prob(x)
    (gradient,) = torch.autograd.grad(values.sum(), x)
    assert bool(torch.isfinite(values).all()) and bool(torch.isfinite(gradient).all())
    rate = 1e5 * torch.exp(-x.detach().double())
    expected = torch.tensor([0.0, 5.0, 1e5]).double() * -1 + rate  # -dk + rate
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-5)
    assert float(values.detach()[0]) == pytest.approx(
        5 * (math.log(1e5) - 200) + 1e5 * (math.log(1e5) - 5e3) - math.lgamma(6) - math.lgamma(1e5 + 1), rel=1e-5
    )


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda y: PoissonLikelihood(operator(), y, gain=0.0),
            r"gain \(expected counts per unit of A x\) must be positive",
        ),
        (lambda y: PoissonLikelihood(operator(), y, floor=0.0), "floor, .* is positive; got 0.0"),
        (lambda y: PoissonLikelihood(operator(), y - 5), "counts must not be negative"),
        (lambda y: PoissonLikelihood(operator(), y, background=-0.1), "background must not be negative"),
        (
            lambda y: PoissonLikelihood(operator(), y, gain=torch.ones(3)),
            r"gain must be one number or one per datum .*\(3,\)",
        ),
        (lambda y: PoissonLikelihood(complex_operator(), y + 0j), "counts are real numbers"),
    ],
)
def test_refusals_of_counts(make, text: str) -> None:
    with pytest.raises(InputError, match=text):
        make(torch.ones(4, dtype=torch.float64))


# --- Correlated noise ---------------------------------------------------------------------------------------------------


def spaced(complex_: bool = False) -> MatrixOperator:
    """Data along (coil, time) = (3, 4) of five unknowns."""
    M = torch.complex(zoo.normal(12, 5), zoo.normal(12, 5, step=1)) if complex_ else zoo.normal(12, 5)
    return MatrixOperator(M, None, Space(("coil", "time"), (3, 4), {}, "V", complex=complex_))


def full(covariance: torch.Tensor, dim: str | None) -> np.ndarray:
    """The covariance over the flattened (coil, time)."""
    C = covariance.numpy()
    return {None: C, "coil": np.kron(C, np.eye(4)), "time": np.kron(np.eye(3), C)}[dim]


@pytest.mark.parametrize(("dim", "k"), [(None, 12), ("coil", 3), ("time", 4)])
def test_correlated_log_prob_is_scipys(dim: str | None, k: int) -> None:
    A, C, x = spaced(), zoo.covariance(k), zoo.normal(3, 5, step=2)
    y = zoo.normal(3, 4, step=3)
    like = GaussianLikelihood.correlated(A, y, C, dim)
    whole = full(C, dim)
    expected = [multivariate_normal.logpdf(y.flatten().numpy(), m.flatten().numpy(), whole) for m in A.A(x)]
    assert like.log_prob(x).numpy() == pytest.approx(np.array(expected), rel=1e-10)
    assert type(like) is GaussianLikelihood and isinstance(like.operator, LinearOperator)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(like.log_prob(x).sum(), x)
    weighed = torch.from_numpy(np.linalg.solve(whole, (y - A.A(x.detach())).flatten(1).numpy().T).T)
    torch.testing.assert_close(gradient, A.A_adjoint(weighed.reshape(3, 3, 4)))


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize(("dim", "k"), [(None, 12), ("coil", 3), ("time", 4)])
def test_correlated_complex_log_prob_is_that_of_circular_noise(dim: str | None, k: int, real: bool) -> None:
    """``E[n n^H] = C``: real and imaginary parts have covariance ``1/2 [[Re C, -Im C], [Im C, Re C]]``."""
    A, C, x = spaced(complex_=True), zoo.covariance(k, complex_=not real), zoo.normal(3, 5, step=2)
    y = torch.complex(zoo.normal(3, 4, step=3), zoo.normal(3, 4, step=4))
    like = GaussianLikelihood.correlated(A, y, C, dim)
    whole = full(C, dim)
    parts = 0.5 * np.block([[whole.real, -whole.imag], [whole.imag, whole.real]])
    residuals = (y - A.A(x)).flatten(1).numpy()
    expected = [multivariate_normal.logpdf(np.concatenate([r.real, r.imag]), None, parts) for r in residuals]
    assert like.log_prob(x).numpy() == pytest.approx(np.array(expected), rel=1e-10)
    single = GaussianLikelihood.correlated(A.float(), y.to(torch.complex64), C, dim)
    assert single.log_prob(x.float()).dtype == torch.float32
    assert single.double().log_prob(x).numpy() == pytest.approx(np.array(expected), rel=1e-4)


def test_a_diagonal_covariance_is_sigma() -> None:
    for A, factor in ((spaced(), 1.0), (spaced(complex_=True), 2.0)):
        sigma = 0.2 + zoo.normal(3, 4, step=5).abs()
        y = torch.ones(3, 4, dtype=torch.complex128 if A.range.complex else torch.float64)
        x = zoo.normal(2, 5, step=2)
        covariance = torch.diag(factor * sigma.flatten() ** 2)
        got = GaussianLikelihood.correlated(A, y, covariance).log_prob(x)
        torch.testing.assert_close(got, GaussianLikelihood(A, y, sigma).log_prob(x))


def test_the_posterior_of_correlated_data_is_the_exact_one() -> None:
    A, C = spaced(), zoo.covariance(12)
    prior = GaussianPrior(torch.zeros(5, dtype=torch.float64), torch.ones(5, dtype=torch.float64))
    y = zoo.normal(3, 4, step=3)
    exact = recon.Posterior(prior, GaussianLikelihood.correlated(A, y, C)).exact()
    assert isinstance(exact, GaussianPrior)
    M, W = A.matrix, torch.linalg.inv(C)
    covariance = torch.linalg.inv(M.T @ W @ M + torch.eye(5, dtype=torch.float64))
    torch.testing.assert_close(exact.covariance(), covariance)
    torch.testing.assert_close(exact.mean, covariance @ (M.T @ W @ y.flatten()))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda A, y: GaussianLikelihood.correlated(A, y, torch.eye(4)), r"must be \(12, 12\) .*; got \(4, 4\)"),
        (lambda A, y: GaussianLikelihood.correlated(A, y, torch.eye(4), "coil"), r"must be \(3, 3\)"),
        (lambda A, y: GaussianLikelihood.correlated(A, y, torch.eye(3), "view"), "along 'view' needs that dimension"),
        (lambda A, y: GaussianLikelihood.correlated(A, y, torch.eye(3) + 0j, "coil"), "must be real"),
        (lambda A, y: GaussianLikelihood.correlated(A, y, torch.eye(3) * math.nan, "coil"), "NaN or infinite"),
        (lambda A, y: GaussianLikelihood.correlated(A, y, torch.ones(3, 3).triu(), "coil"), "must be symmetric"),
        (lambda A, y: GaussianLikelihood.correlated(A, y, torch.ones(3, 3), "coil"), "must be positive definite"),
        (lambda A, y: GaussianLikelihood.correlated(A, y, -torch.eye(3), "coil"), "must be positive definite"),
        (lambda A, y: GaussianLikelihood.correlated(A, y[:2], torch.eye(3), "coil"), "shape of the operator's range"),
    ],
)
def test_refusals_of_covariances(make, text: str) -> None:
    with pytest.raises(InputError, match=text):
        make(spaced(), torch.ones(3, 4, dtype=torch.float64))


def test_a_covariance_of_a_factor_without_enough_columns_is_refused() -> None:
    """Rank deficient, and only rounding hides it."""
    factor = zoo.normal(12, 11)
    with pytest.raises(InputError, match=r"must be positive definite; its eigenvalues reach from .* \(add the noise"):
        GaussianLikelihood.correlated(spaced(), torch.ones(3, 4, dtype=torch.float64), factor @ factor.T)


# --- Several sources ----------------------------------------------------------------------------------------------------


def sources(complex_: bool = False, correlated: bool = False) -> list[GaussianLikelihood]:
    """Measurements of five unknowns, of unlike shapes, noise and kinds."""
    first = MatrixOperator(zoo.normal(2, 5, step=6), None, Space(("station",), (2,), {}, "K"))
    second = spaced(complex_)
    y = torch.complex(zoo.normal(3, 4, step=8), zoo.normal(3, 4, step=9)) if complex_ else zoo.normal(3, 4, step=8)
    parts = [GaussianLikelihood(first, zoo.normal(2, step=7), 0.3), GaussianLikelihood(second, y, 0.4 + y.abs())]
    if correlated:
        parts.append(GaussianLikelihood.correlated(spaced(), zoo.normal(3, 4, step=10), zoo.covariance(4), "time"))
    return parts


def as_one(parts: list[GaussianLikelihood]) -> GaussianLikelihood:
    """The same with one matrix between real numbers."""
    rows, y, sigma = [], [], []
    for part in parts:
        rows.append(dense(part.linear("test")))
        y.append(part.measured.flatten())
        spread = part.sigma.expand(part.operator.range.shape).flatten()
        sigma.append(spread.repeat_interleave(2 if part.operator.range.complex else 1))
    return GaussianLikelihood(MatrixOperator(torch.cat(rows)), torch.cat(y), torch.cat(sigma))


KINDS = [(False, False), (True, False), (True, True)]


@pytest.mark.parametrize(("complex_", "correlated"), KINDS)
def test_a_stack_is_the_sum_and_the_same_as_one_matrix(complex_: bool, correlated: bool) -> None:
    parts, x = sources(complex_, correlated), zoo.normal(4, 5)
    like = StackedLikelihood(parts)
    assert isinstance(like, GaussianLikelihood) and isinstance(like.operator, Stack) and like.gaussian() is like
    torch.testing.assert_close(like.log_prob(x), sum(part.log_prob(x) for part in parts))
    one = as_one(parts)
    volume = sum(float(part.log_volume) for part in parts)
    torch.testing.assert_close(like.log_prob(x), one.log_prob(x) - volume)
    torch.testing.assert_close(like.measured, one.measured)
    torch.testing.assert_close(like.sigma, one.sigma)
    torch.testing.assert_close(dense(like.linear("test")), dense(one.linear("test")))
    for piece, part in zip(like.operator.split(like.y), parts, strict=True):
        assert torch.equal(piece, part.y)
    assert like.operator.range.unit == ("mixed" if len({p.operator.range.unit for p in parts}) > 1 else "K")


def test_a_stack_of_complex_data_stays_complex() -> None:
    part = sources(complex_=True)[1]
    like = StackedLikelihood([part, part])
    assert like.operator.range.complex and like.y.is_complex()
    x = zoo.normal(4, 5)
    torch.testing.assert_close(like.log_prob(x), 2 * part.log_prob(x))


@pytest.mark.parametrize(("complex_", "correlated"), KINDS)
@pytest.mark.parametrize(
    "sampler", [MMPS(steps=12, cg=CG(30, 1e-10)), DiffPIR(steps=12, cg=CG(50, 1e-10)), DPS(steps=12, weight=1e-2)]
)
def test_samplers_draw_the_same_from_a_stack_as_from_one_matrix(sampler, complex_: bool, correlated: bool) -> None:
    parts = sources(complex_, correlated)
    prior = GaussianPrior(torch.zeros(5, dtype=torch.float64), zoo.covariance(5))
    stacked, single = recon.Posterior(prior, StackedLikelihood(parts)), recon.Posterior(prior, as_one(parts))
    draws = [recon.sample(posterior, sampler, draws=4).x for posterior in (stacked, single)]
    torch.testing.assert_close(*draws, rtol=1e-6, atol=1e-8)
    exact = [posterior.exact() for posterior in (stacked, single)]
    torch.testing.assert_close(exact[0].mean, exact[1].mean)
    torch.testing.assert_close(exact[0].covariance(), exact[1].covariance())


def test_mmps_draws_from_the_posterior_of_a_stack() -> None:
    prior = GaussianPrior(torch.zeros(5, dtype=torch.float64), torch.ones(5, dtype=torch.float64))
    posterior = recon.Posterior(prior, StackedLikelihood(sources(complex_=True, correlated=True)))
    exact, n = posterior.exact(), 1000
    assert isinstance(exact, GaussianPrior)
    ensemble = recon.sample(posterior, MMPS(steps=60, cg=CG(6, 1e-8)), draws=n)
    error = (ensemble.mean() - exact.mean) / (exact.covariance().diagonal() / n).sqrt()
    assert float(error.abs().max()) < normal_bound(5)


def mixed(floor: float = 0.01) -> StackedLikelihood:
    """Counts and numbers."""
    A = operator(4, 5)
    counts = PoissonLikelihood(A, torch.tensor([30.0, 55.0, 41.0, 60.0], dtype=torch.float64), 20.0, 1.0, floor)
    return StackedLikelihood([counts, sources()[0]])


def test_a_stack_of_unlike_laws() -> None:
    like, x = mixed(), zoo.normal(4, 5).abs()
    assert not isinstance(like, GaussianLikelihood)
    counts, numbers = like.sources
    torch.testing.assert_close(like.log_prob(x), counts.log_prob(x) + numbers.log_prob(x))
    form = like.gaussian()
    torch.testing.assert_close(form.log_prob(x), counts.gaussian().log_prob(x) + numbers.log_prob(x))
    prior = GaussianPrior(torch.full((5,), 0.8, dtype=torch.float64), torch.full((5,), 0.1, dtype=torch.float64))
    posterior = recon.Posterior(prior, like)
    with pytest.raises(InputError, match="needs a GaussianLikelihood; got StackedLikelihood"):
        MMPS().check(posterior)
    MMPS().check(recon.Posterior(prior, form))
    draws = recon.sample(posterior, DPS(steps=30, weight=0.02), draws=3)
    assert bool(torch.isfinite(draws.x).all())


def test_a_stack_of_operators_that_are_not_linear() -> None:
    parts = [GaussianLikelihood(PhaseRetrieval(spaced(complex_=True)), zoo.normal(3, 4), 0.5), sources()[0]]
    like, x = StackedLikelihood(parts), zoo.normal(3, 5)
    assert isinstance(like.operator, Joined) and not isinstance(like.operator, LinearOperator)
    torch.testing.assert_close(like.log_prob(x), sum(part.log_prob(x) for part in parts))
    with pytest.raises(InputError, match="needs a LinearOperator; got Joined"):
        like.linear("MMPS")


def test_stacks_within_stacks_are_sums_all_the_same() -> None:
    parts, x = sources(complex_=True), zoo.normal(3, 5)
    inner = StackedLikelihood(parts)
    like = StackedLikelihood([inner, mixed()])
    torch.testing.assert_close(like.log_prob(x), inner.log_prob(x) + mixed().log_prob(x))
    assert like.gaussian().operator.range.size == inner.operator.range.size + mixed().operator.range.size


class _Odd(zoo.Likelihood):
    """A law without a Gaussian form."""

    def __init__(self, operator: Operator) -> None:
        super().__init__()
        self.operator = operator


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: StackedLikelihood([]), "needs at least one likelihood"),
        (lambda: StackedLikelihood([operator()]), "part 0 is a MatrixOperator"),  # type: ignore[list-item]
        (lambda: StackedLikelihood([sources()[0], mixed().sources[0].float()]), r"torch.float32 and torch.float64"),
        (
            lambda: StackedLikelihood([sources()[0], GaussianLikelihood(operator(), torch.zeros(4).double(), 1.0)]),
            "needs one common domain",
        ),
        (
            lambda: StackedLikelihood([sources()[0], _Odd(sources()[1].operator)]).gaussian(),
            "part 1 of the stack, of MatrixOperator .*: _Odd has no Gaussian form",
        ),
        (lambda: Stack([sources()[0].operator, PhaseRetrieval(spaced())]), r"Stack takes linear operators; got Phase"),
        (lambda: Joined([]), "Joined needs at least one operator"),
    ],
)
def test_refusals_of_stacks(make, text: str) -> None:
    with pytest.raises(InputError, match=text):
        make()
