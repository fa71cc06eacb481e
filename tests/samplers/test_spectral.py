"""Spectral and projection methods: the spectral form is the operator, and each method is its own formula."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import recon
from recon.checks import check_resume
from recon.errors import InputError
from recon.likelihoods import GaussianLikelihood
from recon.operators import CG, Blur, Diagonal, LinearOperator, Masked, MatrixOperator
from recon.posterior import dense
from recon.priors import GaussianPrior
from recon.priors.base import Card, Prior
from recon.samplers import DDIM, DDNM, DDRM, FlowChef, Sampler
from recon.samplers.spectral import Spectral, data_norm, spectral_form
from recon.schedules import LogLinear, Schedule
from recon.space import Space
from tests.bounds import chi2_bounds, normal_bound
from tests.samplers.affine import Injected, law


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Scaled(Prior):
    """Standard normal in a latent of other units."""

    def predict(self, z: Tensor, sigma: Tensor) -> Tensor:
        return z / (1 + sigma.reshape(-1, *[1] * (z.ndim - 1)).square())

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64


IMAGES = Space.grid((4, 5), 1.0, "1")
FIELDS = Space(("variable", "y", "x"), (2, 3, 4))


def operators() -> dict[str, LinearOperator]:
    mask = torch.tensor([[1, 0, 1, 1], [0, 1, 1, 0], [1, 1, 0, 0]])
    return {
        "mask": Masked(FIELDS, mask).double(),
        "mask of zeros": Masked(FIELDS, mask, zeros=True).double(),
        "diagonal": Diagonal(random(2, 3, 4).abs() * torch.cat([torch.zeros(1, 3, 4), torch.ones(1, 3, 4)]), FIELDS),
        "blur": Blur(FIELDS, torch.tensor([[0.1, 0.6], [-0.4, 0.2]]).double()),
        "blur with a zero": Blur(FIELDS, torch.tensor([[0.25, 0.5, 0.25]]).double()),
        "tall matrix": MatrixOperator(random(30, 24), FIELDS),
        "flat matrix": MatrixOperator(random(5, 24), FIELDS),
        "complex matrix": MatrixOperator(torch.complex(random(5, 24), random(5, 24, seed=1)), FIELDS),
        "dense blur": Blur(FIELDS, torch.tensor([[0.1, 0.6], [-0.4, 0.2]]).double(), "zero"),
    }


def problem(name: str, sigma: float | None = None) -> recon.Posterior:
    operator = operators()[name]
    y = operator.A(random(*FIELDS.shape, seed=5))
    each = torch.rand(operator.range.shape, generator=torch.Generator().manual_seed(6)).double() + 0.5
    prior = Scaled(FIELDS, Schedule(1e-3, 50.0), Card("scaled"), shift=(1.0, -2.0), scale=(0.5, 3.0))
    noise = sigma or (0.3 if name.startswith("blur") else 0.3 * each)
    return recon.Posterior(prior, GaussianLikelihood(operator, y, noise))


@pytest.mark.parametrize("name", operators())
def test_the_spectral_form_is_the_operator(name: str) -> None:
    """``B^T B z`` and ``B^T S^-1/2 (y - A b)`` through the coefficients against the operator itself."""
    posterior = problem(name)
    form, prior, like = spectral_form(posterior, "t"), posterior.prior, posterior.likelihood.gaussian()
    operator, z = like.linear("t"), random(3, *FIELDS.shape, seed=7)
    weight = 1 / like.sigma**2
    normal = prior.decode_linear(operator.A_adjoint(weight * operator.A(prior.decode_linear(z))))
    torch.testing.assert_close(form.synthesise(form.gain**2 * form.analyse(z)), normal, rtol=1e-9, atol=1e-9)
    back = prior.decode_linear(operator.A_adjoint(weight * like.residual(prior.decode(0 * z))))
    mapped = form.synthesise((form.gain**2 * form.data).expand(3, *form.gain.shape))
    torch.testing.assert_close(mapped, back, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(form.synthesise(form.analyse(z)), z, rtol=1e-12, atol=1e-12)
    unseen = form.gain == 0
    assert bool((form.data[unseen] == 0).all())
    scales = prior.decode_linear(torch.ones(1, *FIELDS.shape).double()).flatten()
    parts = like.sigma.expand(operator.range.shape).flatten().repeat_interleave(2 if operator.range.complex else 1)
    norm = torch.linalg.matrix_norm(dense(operator) * scales / parts[:, None], 2)
    assert float(form.gain.max()) == pytest.approx(float(norm), rel=1e-9)
    assert data_norm(posterior, "t") == pytest.approx(float(norm), rel=0.05)  # power iteration: from below


def test_it_is_made_once() -> None:
    posterior = problem("flat matrix")
    assert spectral_form(posterior, "t") is spectral_form(posterior, "t")


@pytest.mark.parametrize("sampler", [DDRM(steps=6), DDNM(steps=6)])
def test_large_operators_without_a_form_are_refused(sampler: Sampler) -> None:
    space = Space.vector(2000)
    prior = GaussianPrior(torch.zeros(2000), torch.ones(2000), space)
    large = recon.Posterior(prior, GaussianLikelihood(MatrixOperator(torch.ones(1, 2000)), torch.ones(1), 1.0))
    with pytest.raises(InputError, match=r"spectral form.*PiGDM and DiffPIR take any linear operator"):
        recon.sample(large, sampler, draws=1)
    assert not large.evaluations


def scalars(ratios: tuple[float, ...]) -> tuple[recon.Posterior, Tensor]:
    r = torch.tensor(ratios).double()
    prior = GaussianPrior(0 * r, 1 + 0 * r, schedule=Schedule(1e-3, 100.0))
    return recon.Posterior(prior, GaussianLikelihood(Diagonal(1 + 0 * r, prior.space), 0 * r + 3, r.rsqrt())), r


def ddrm_law(sampler: DDRM, posterior: recon.Posterior) -> tuple[Tensor, Tensor, set[str]]:
    """Mean and variance by eq. 7-8 for N(0, 1) and y = 3 observed directly, and the branches taken."""
    levels, w = sampler.levels(posterior), posterior.likelihood.gaussian().sigma
    mean, variance, taken = torch.zeros_like(w), torch.zeros_like(w), set()
    for i, width in enumerate(w.tolist()):
        m, v = (3.0, levels[0] ** 2 - width**2) if width <= levels[0] else (0.0, levels[0] ** 2)
        for sigma, s in zip(levels[:-1], levels[1:], strict=True):
            g = 1 / (1 + sigma**2)
            if s >= width:
                taken.add("clear")
                slope, shift, kick = (1 - sampler.eta_b) * g, sampler.eta_b * 3, s**2 - sampler.eta_b**2 * width**2
            else:
                taken.add("faint")
                kept = math.sqrt(1 - sampler.eta**2) * s / width
                slope, shift, kick = (1 - kept) * g, kept * 3, sampler.eta**2 * s**2
            m, v = slope * m + shift, slope**2 * v + kick
        mean[i], variance[i] = m, v
    return mean, variance, taken


@pytest.mark.parametrize("eta", [0.5, 0.85, 1.0])
@pytest.mark.parametrize("eta_b", [0.7, 1.0])
def test_ddrm_follows_its_formula(eta: float, eta_b: float) -> None:
    posterior, _ = scalars((1e-5, 0.25, 1.0, 100.0))
    sampler = DDRM(steps=15, eta=eta, eta_b=eta_b, grid=LogLinear())
    mean, covariance = law(sampler, posterior)
    expected, variance, taken = ddrm_law(sampler, posterior)
    assert taken == {"clear", "faint"}
    torch.testing.assert_close(mean, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(covariance, torch.diag(variance), rtol=1e-10, atol=1e-12)


def test_ddrm_gets_worse_with_more_steps() -> None:
    posterior, r = scalars((0.25, 1.0, 4.0, 100.0))
    few, _, _ = ddrm_law(DDRM(steps=20, grid=LogLinear()), posterior)
    many, variance, _ = ddrm_law(DDRM(steps=1000, grid=LogLinear()), posterior)
    assert float(many[0]) / (3 * 0.25 / 1.25) == pytest.approx(4.4, abs=0.05)
    assert float((variance * (1 + r)).max()) < 0.04
    assert float((few - 3 * r / (1 + r)).abs().max()) < float((many - 3 * r / (1 + r)).abs().max())


def test_ddrm_is_continuous_where_a_coefficient_becomes_faint() -> None:
    sampler, c, d, xi = DDRM(eta=1.0), random(1), random(1, seed=1), random(1, seed=2)
    edges = [
        sampler.mixed(torch.tensor([g]).double(), torch.tensor([2.0]).double(), (c, d, xi), 1.0, 0.5)
        for g in (1.999999, 2.000001)
    ]
    # For eta = eta_b = 1: mean d + 0 (y - d) below and y above; the variance s^2 below falls to s^2 - w^2 = 0 above.
    torch.testing.assert_close(edges[0], d + 0.5 * xi)
    torch.testing.assert_close(edges[1], torch.tensor([2.0]).double() + 0.5e-3 * xi, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("eta", [0.0, 0.85, 1.0])
def test_ddnm_follows_its_scalar_recursion(eta: float) -> None:
    posterior, r = scalars((1e-5, 0.25, 1.0, 100.0))
    sampler = DDNM(steps=15, eta=eta, grid=LogLinear())
    levels, w = sampler.levels(posterior), r.rsqrt()
    mean, variance = 0 * r, 0 * r + levels[0] ** 2
    for sigma, s in zip(levels[:-1], levels[1:], strict=True):
        g, share = 1 / (1 + sigma**2), (s / w).clamp(max=1)
        left = (s**2 - (share * w) ** 2).clamp(min=0).sqrt()
        kept = left * math.sqrt(1 - eta**2) / sigma * (1 - g)
        mean, variance = (
            ((1 - share) * g + kept) * mean + share * 3,
            ((1 - share) * g + kept) ** 2 * variance + (left * eta) ** 2,
        )
    found, covariance = law(sampler, posterior)
    torch.testing.assert_close(found, mean, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(covariance, torch.diag(variance), rtol=1e-9, atol=1e-12)
    assert float(found[2]) > 1.2 * 3 * 0.5  # it overfits: the posterior mean is 1.5


@pytest.mark.parametrize(
    ("sampler", "left"),
    [
        (DDRM(steps=12), 1e-3),
        (DDNM(steps=12), 1e-3),
        (DDNM(steps=12, form="plain"), 1e-6),
        (DDNM(steps=12, form="plain", travel=3, repeats=2), 1e-6),
    ],
)
def test_precise_data_are_met(sampler: Sampler, left: float) -> None:
    """To the noise of the lowest level, sigma_min; without noise to the ridge of the pseudo-inverse.  Latent units, scale 3."""
    posterior = problem("mask", 1e-7)
    like = posterior.likelihood.gaussian()
    x = recon.sample(posterior, sampler, draws=3).x
    assert float(like.residual(x).abs().max()) < 3 * left * normal_bound(3 * 14)


def test_plain_null_space_restoration_takes_any_operator() -> None:
    """``A x' = y`` in the noise-free rule, with CG in place of a closed form; what is not seen is the denoiser's."""
    posterior = problem("flat matrix", 1e-3)
    sampler = DDNM(steps=10, form="plain", ridge=1e-9, cg=CG(60, 1e-13))
    x = recon.sample(posterior, sampler, draws=3).x
    assert float(posterior.likelihood.gaussian().residual(x).abs().max()) < 1e-4


def test_time_travel_uses_fresh_noise_and_more_evaluations() -> None:
    posterior = problem("mask", 0.3)
    once = recon.sample(posterior, DDNM(steps=9), draws=2)
    same = recon.sample(posterior, DDNM(steps=9, travel=3), draws=2)
    again = recon.sample(posterior, DDNM(steps=9, travel=3, repeats=3), draws=2)
    assert torch.equal(once.x, same.x)
    assert not torch.allclose(once.x, again.x)
    assert (once.info["cost"]["denoiser"], again.info["cost"]["denoiser"]) == (18, 2 * (9 + 2 * 3 * 2))
    assert check_resume(DDNM(steps=9, travel=3, repeats=2), posterior) == 4


def test_time_travel_walks_the_levels_again() -> None:
    """travel = 2, repeats = 2 on scalars: after every second step back by fresh noise, both steps again; then on."""
    posterior, r = scalars((1e-6, 0.25, 4.0))
    sampler = DDNM(steps=4, travel=2, repeats=2, eta=1.0, grid=LogLinear(), sigma_max=3.0, sigma_min=1.0)
    levels, w = sampler.levels(posterior), r.rsqrt()
    mean, variance = 0 * r, 0 * r + levels[0] ** 2

    def down(k: int, m: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        sigma, s = levels[k], levels[k + 1]
        g, share = 1 / (1 + sigma**2), (s / w).clamp(max=1)
        return (1 - share) * g * m + share * 3, ((1 - share) * g) ** 2 * v + s**2 - (share * w) ** 2

    for k in (0, 1):
        mean, variance = down(k, mean, variance)
    variance = variance + levels[0] ** 2 - levels[2] ** 2
    for k in (0, 1, 2, 3):
        mean, variance = down(k, mean, variance)
    found, covariance = law(sampler, posterior)
    torch.testing.assert_close(found, mean, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(covariance.diagonal(), variance, rtol=1e-10, atol=1e-12)


def test_no_noise_is_used_twice() -> None:
    class Recording(Injected):
        def normal(self, step: int, shape, stream: str = "step", *, dtype: torch.dtype) -> Tensor:
            used.append((step, stream))
            return super().normal(step, shape, stream, dtype=dtype)

    posterior, _ = scalars((0.25, 4.0))
    used: list[tuple[int, str]] = []
    sampler, draws = DDNM(steps=9, travel=3, repeats=4), Recording(2)
    state = sampler.init(posterior, draws)  # type: ignore[arg-type]
    for k in range(sampler.steps):
        state = sampler.step(posterior, state, k, draws)  # type: ignore[arg-type]
    assert (
        len(set(used)) == len(used) == 1 + 8 + 2 * 3 * (1 + 3)
    )  # the start, steps but the last, and two travels of four


def test_ddrm_starts_with_what_the_data_leave_open() -> None:
    posterior, _ = scalars((1e-5, 1 / 50**2, 0.25))
    sampler = DDRM(steps=5, grid=LogLinear(), sigma_max=100.0)
    still, moved = (
        sampler.init(posterior, Injected(1, 0, torch.full((1, 3), value).double())).z[0]  # type: ignore[arg-type]
        for value in (0.0, 1.0)
    )
    torch.testing.assert_close(still, torch.tensor([0.0, 3.0, 3.0]).double())
    torch.testing.assert_close(moved - still, (1e4 - torch.tensor([0.0, 2500.0, 4.0]).double()).sqrt())


def test_flowchef_is_the_published_step_in_a_rectified_flow() -> None:
    """x = z / (1 + sigma): shift by the rate times the residual at the denoised point, then one Euler step of the velocity."""
    posterior = problem("tall matrix", 0.3)
    sampler, sigma, after = FlowChef(steps=20, rate=0.2), 0.9, 0.6
    z, prior, like = random(2, *FIELDS.shape, seed=8), posterior.prior, posterior.likelihood.gaussian()
    guided = DDIM().step(z, sampler.guide(posterior, z, sigma, after), sigma, after, None)
    t, t_after = sigma / (1 + sigma), after / (1 + after)
    x, denoised = (1 - t) * z, prior.denoise(z, sigma)
    velocity = (x - denoised) / t
    residual = like.residual(prior.decode(denoised)) / like.sigma**2
    gradient = prior.decode_linear(like.linear("t").A_adjoint(residual)) / data_norm(posterior, "t") ** 2
    moved = x + 0.2 * gradient - (t - t_after) * velocity
    torch.testing.assert_close(guided, moved / (1 - t_after), rtol=1e-10, atol=1e-10)


def test_flowchef_meets_precise_data() -> None:
    prior = GaussianPrior(torch.zeros(3).double(), torch.ones(3).double())
    like = GaussianLikelihood(MatrixOperator(torch.eye(3).double()), torch.tensor([1.0, -2.0, 0.5]).double(), 1e-4)
    x = recon.sample(recon.Posterior(prior, like), FlowChef(steps=100, rate=0.3), draws=4).x
    assert float((x - like.y).abs().max()) < 1e-3


@pytest.mark.parametrize(
    "sampler", [DDRM(steps=10, grid=LogLinear()), DDNM(steps=10, grid=LogLinear()), FlowChef(steps=10)]
)
def test_the_loop_draws_from_the_law(sampler: Sampler) -> None:
    r = torch.tensor([0.25, 1.0, 2.0]).double()
    prior = GaussianPrior(0 * r, 1 + 0 * r, schedule=Schedule(0.05, 20.0))
    posterior = recon.Posterior(prior, GaussianLikelihood(Diagonal(1 + 0 * r, prior.space), 0 * r + 1, r.rsqrt()))
    mean, covariance = law(sampler, posterior)
    draws = 2000
    white = (recon.sample(posterior, sampler, draws=draws, seed=4).x - mean) / covariance.diagonal().sqrt()
    assert float(white.mean(0).abs().max()) * math.sqrt(draws) < normal_bound(3)
    low, high = chi2_bounds(draws)
    assert low < float(white.square().mean(0).min()) and float(white.square().mean(0).max()) < high


@pytest.mark.parametrize(
    ("sampler", "text"),
    [
        (DDRM(eta=1.5), r"eta and eta_b in \[0, 1\]"),
        (DDNM(form="minus"), "form 'plus' or 'plain'"),  # type: ignore[arg-type]
        (DDNM(travel=0), "travel >= 1"),
        (FlowChef(rate=2.5), "rate between 0 and 2"),
        (FlowChef(transition=DDIM(eta=0.5)), "defined for the Euler step"),
    ],
)
def test_refusals(sampler: Sampler, text: str) -> None:
    posterior = problem("mask")
    with pytest.raises(InputError, match=text):
        recon.sample(posterior, sampler, draws=1)
    assert not posterior.evaluations


def test_a_form_holds_what_it_says() -> None:
    assert {"gain", "data", "analyse", "synthesise"} == set(Spectral.__dataclass_fields__)
