"""DAPS: exact with matched covariance, biased as published without; its inner kernels against closed forms."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

import recon
from recon.draws import Draws
from recon.errors import InputError
from recon.likelihoods import GaussianLikelihood, PoissonLikelihood
from recon.operators import CG, MatrixOperator, PhaseRetrieval
from recon.priors import GaussianPrior
from recon.priors.base import Card
from recon.samplers import DAPS
from recon.samplers.base import State
from recon.samplers.conditional import Noises, square_root, white_draw
from recon.samplers.daps import langevin_draw
from recon.samplers.inner import Inner, data_curvature
from recon.schedules import Schedule
from recon.selftest import check_resume, check_sampler
from recon.space import Space
from tests.bounds import chi2_bounds, normal_bound
from tests.samplers.probing import affine, end_law
from tests.samplers.problems import RATIOS, random_problem, scalars, truth
from tests.samplers.test_exact import Standard

TIGHT = CG(iterations=40, tolerance=1e-14)


def test_the_square_root_is_that_of_the_matrix() -> None:
    """Whatever the spectrum: clusters exhaust the Krylov space early, and a zero vector has no direction."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))[0]
    v = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    v[3] = 0
    for values in ([1.0, 2, 3, 4, 5, 6], [1.0, 1, 1, 9, 9, 9], [2.0] * 6, [0.0, 0, 1, 1, 2, 2]):
        spectrum = torch.tensor(values, dtype=torch.float64)
        tolerance = 1e-12 if values[0] else 1e-7  # the root of a rounding error
        found = square_root(lambda u, s=spectrum: u @ (basis * s) @ basis.T, v, 6)
        torch.testing.assert_close(found, v @ (basis * spectrum.sqrt()) @ basis.T, rtol=0, atol=tolerance)


def test_matched_daps_is_the_posterior() -> None:
    posterior = random_problem()
    sampler = DAPS(steps=12, surrogate="matched", cg=TIGHT, roots=3)
    assert sampler.claim == "exact"
    mean, covariance = end_law(posterior, sampler)
    expected = truth(posterior)
    # The start at sigma_0 n forgets the prior; each level multiplies what is left of that by v / sigma^2 at most.
    torch.testing.assert_close(mean, expected[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(covariance, expected[1], rtol=1e-9, atol=1e-9)


def test_matched_daps_keeps_its_claim_in_the_loop() -> None:
    check_sampler(DAPS(steps=20, surrogate="matched", cg=CG(10, 1e-9)), draws=1000)


def euler(sigma: float, sampler: DAPS, bottom: float) -> float:
    """Slope of the endpoint of the sampler's ODE for the prior N(0, 1)."""
    n, slope, level = sampler.ode_steps, 1.0, sigma
    for i in range(n):
        top, low = sigma ** (1 / 7), bottom ** (1 / 7)
        after = (top + (i + 1) / (n - 1) * (low - top)) ** 7 if i + 1 < n else 0.0
        slope *= 1 / (1 + level**2) + after / level * (1 - 1 / (1 + level**2))
        level = after
    return slope


@pytest.mark.parametrize(("ode_steps", "width"), [(5, 1.0), (2, 0.7)])
def test_the_published_surrogate_has_its_known_law(ode_steps: int, width: float) -> None:
    """Per level: mean (e z / (width sigma)^2 + r y) / q with q = 1 / (width sigma)^2 + r; then noise of the next."""
    posterior, sampler = scalars(bottom=0.01), DAPS(steps=60, ode_steps=ode_steps, width=width, cg=TIGHT, sigma_min=0.1)
    law = end_law(posterior, sampler)
    levels = sampler.levels(posterior)
    mean, variance = torch.zeros(4).double(), levels[0] ** 2 * torch.ones(4).double()
    for sigma, after in zip(levels[:-1], levels[1:], strict=True):
        e = euler(sigma, sampler, 0.01) if sigma > 0.01 else 1 / (1 + sigma**2)
        pull = (width * sigma) ** -2
        q = pull + RATIOS
        mean = (e * pull * mean + 3 * RATIOS) / q
        variance = (e * pull / q) ** 2 * variance + 1 / q + after**2
    torch.testing.assert_close(law[0], mean, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(law[1].diagonal(), variance, rtol=1e-9, atol=1e-12)


@dataclass(frozen=True)
class ExactODE(DAPS):
    """The endpoint of the ODE of N(0, 1) in closed form."""

    def endpoint(self, posterior: recon.Posterior, z: torch.Tensor, sigma: float) -> torch.Tensor:
        return z / math.sqrt(1 + sigma**2)


@pytest.mark.parametrize(
    ("sampler", "means", "variances", "precision"),
    [
        (ExactODE(cg=TIGHT), (1.78, 1.36, 1.114, 1.005), (1.70, 1.33, 1.107, 1.003), 0.005),
        (DAPS(cg=TIGHT, ode_steps=1), (1.074, 1.030, 1.006, 1.000), (1.017, 1.001, 0.994, 0.997), 0.001),
    ],
)
def test_the_published_bias_is_that_of_the_table(
    sampler: DAPS, means: tuple[float, ...], variances: tuple[float, ...], precision: float
) -> None:
    """Over the posterior, for r = 0.25, 1, 4, 100, to the figures' own precision."""
    posterior = scalars()
    mean, covariance = end_law(posterior, sampler)
    exact = truth(posterior)
    over = mean / exact[0], covariance.diagonal() / exact[1].diagonal()
    torch.testing.assert_close(over[0], torch.tensor(means).double(), rtol=0, atol=precision)
    torch.testing.assert_close(over[1], torch.tensor(variances).double(), rtol=0, atol=precision)


@pytest.mark.parametrize("fields", [True, False])
def test_white_draws_have_the_conditional_law(fields: bool) -> None:
    """N(Q^-1 (z / w^2 + B^T S^-1 (y - A b)), Q^-1), with noise per datum, and units of their own for each field or one."""
    space = Space(("variable", "x"), (2, 2), {}, "mixed")
    if fields:
        prior = Standard(space, Schedule(0.01, 20.0), Card("standard"), shift=(5.0, -1.0), scale=(4.0, 0.25))
    else:
        prior = Standard(space, Schedule(0.01, 20.0), Card("standard"), shift=5.0, scale=4.0)
    matrix = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y, sigma = torch.tensor([1.0, -2.0, 0.5]).double(), torch.tensor([0.5, 1.0, 2.0]).double()
    posterior = recon.Posterior(prior, GaussianLikelihood(MatrixOperator(matrix, space), y, sigma))
    width, centre = 0.7, torch.tensor([0.3, -0.2, 1.0, 0.1]).double()

    def step(_, draws):
        normal = draws.normal
        noises = Noises(normal(0, (2, 2)), normal(1, (3,)))
        start = centre.reshape(2, 2).expand(len(draws), 2, 2)
        return white_draw(posterior, start, width, noises, TIGHT).flatten(1)

    mean, _, noise = affine(step, 4)
    scale, shift = prior.scale.expand(2, 2).flatten(), prior.shift.expand(2, 2).flatten()
    folded = matrix * scale
    precision = torch.eye(4).double() / width**2 + folded.T @ (folded / sigma[:, None] ** 2)
    right = centre / width**2 + folded.T @ ((y - matrix @ shift) / sigma**2)
    torch.testing.assert_close(mean, torch.linalg.solve(precision, right))
    torch.testing.assert_close(noise @ noise.T, torch.linalg.inv(precision))


def test_the_curvature_is_the_largest_eigenvalue() -> None:
    posterior = random_problem(d=5, m=4)
    matrix = posterior.likelihood.gaussian().operator.matrix / 0.3
    z = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = data_curvature(posterior, z, iterations=200)
    expected = torch.linalg.matrix_norm(matrix, 2) ** 2
    torch.testing.assert_close(found, expected.expand(3), rtol=1e-6, atol=0)


def test_langevin_steps_leave_their_stationary_law() -> None:
    """Unadjusted: Q^-1 (1 - eta Q / 2)^-1 with eta = rate / largest Q; many steps from the mean."""
    posterior, rate, width = scalars(), 0.8, 0.5
    q = 1 / width**2 + RATIOS
    eta = rate / (1 / width**2 + RATIOS.max())

    def step(_, draws):
        draws_of = torch.zeros(len(draws), 4, dtype=torch.float64)
        return langevin_draw(posterior, draws_of, width, Inner(300, rate), (draws, 0))

    mean, _, noise = affine(step, 4)
    # 300 steps leave (1 - eta q)^600 of the start's variance; eta q is 0.033 at least: 2e-9.
    torch.testing.assert_close(mean, 3 * RATIOS / q, rtol=1e-4, atol=0)
    torch.testing.assert_close((noise @ noise.T).diagonal(), 1 / (q * (1 - eta * q / 2)), rtol=1e-7, atol=0)


def test_metropolis_takes_the_bias_away() -> None:
    posterior, width, draws = scalars(), 0.5, 3000
    q = 1 / width**2 + RATIOS
    inner = Inner(80, 1.2, metropolis=True)
    centre = torch.zeros(draws, 4, dtype=torch.float64)
    z = langevin_draw(posterior, centre, width, inner, (Draws(3, range(draws)), 0))
    error = (z.mean(0) - 3 * RATIOS / q) * (q * draws).sqrt()
    assert float(error.abs().max()) < normal_bound(4)
    low, high = chi2_bounds(draws - 1)
    ratio = z.var(0) * q
    assert low < float(ratio.min()) and float(ratio.max()) < high
    plain = langevin_draw(posterior, centre, width, Inner(80, 1.2), (Draws(3, range(draws)), 0))
    assert float((plain.var(0) * q).max()) > 2 > high  # 1 / (1 - 0.6) in the stiffest


@pytest.mark.parametrize(
    "sampler",
    [
        DAPS(steps=6),
        DAPS(steps=6, surrogate="matched"),
        DAPS(steps=6, inner="langevin", langevin=Inner(4)),
        DAPS(steps=6, inner="langevin", langevin=Inner(4, metropolis=True)),
    ],
)
def test_a_draw_alone_is_the_draw_in_company(sampler: DAPS) -> None:
    posterior = scalars()
    together, alone = (recon.sample(posterior, sampler, draws=5, seed=2, block=b).x for b in (5, 1))
    assert torch.equal(together, alone)
    assert float((together[0] - together[1]).abs().min()) > 0


@pytest.mark.parametrize(
    "sampler", [DAPS(steps=6, inner="langevin", langevin=Inner(5)), DAPS(steps=6, surrogate="matched")]
)
def test_a_stop_leaves_no_trace(sampler: DAPS) -> None:
    assert check_resume(sampler) == 3


def test_any_differentiable_likelihood_goes_through_langevin_steps() -> None:
    """Counts, against the posterior mean on a grid."""
    ones = torch.ones(1, dtype=torch.float64)
    prior = GaussianPrior(4 * ones, ones)
    like = PoissonLikelihood(MatrixOperator(torch.ones(1, 1, dtype=torch.float64)), torch.tensor([30.0]).double(), 5.0)
    posterior = recon.Posterior(prior, like)
    x = torch.linspace(0.5, 10, 4001, dtype=torch.float64)[:, None]
    log = like.log_prob(x) - 0.5 * (x[:, 0] - 4) ** 2
    weight = torch.softmax(log, 0)
    mean = float((weight * x[:, 0]).sum())
    deviation = math.sqrt(float((weight * (x[:, 0] - mean) ** 2).sum()))
    draws = recon.sample(posterior, DAPS(steps=15, langevin=Inner(20, 0.5, True)), draws=400)
    # The published surrogate's bias at r = 30 / 36 (1.4 times too far from the prior's mean) is what is left.
    error = (float(draws.mean()) - 4) / (mean - 4)
    assert abs(float(draws.mean()) - mean) < deviation and 1 < error < 1.6


def test_it_refuses_what_it_cannot_draw() -> None:
    linear, ones = scalars(), torch.ones(2, dtype=torch.float64)
    prior = GaussianPrior(ones, ones)
    squares = PhaseRetrieval(MatrixOperator(torch.complex(torch.eye(2), torch.eye(2)).to(torch.complex128)))
    nonlinear = recon.Posterior(prior, GaussianLikelihood(squares, ones, 0.3))
    with pytest.raises(InputError, match="inner='langevin' takes any"):
        DAPS(inner="exact").check(nonlinear)
    with pytest.raises(InputError, match="LinearOperator"):
        DAPS(surrogate="matched").check(nonlinear)
    with pytest.raises(InputError, match="Leave inner at 'auto'"):
        DAPS(surrogate="matched", inner="langevin").check(linear)
    with pytest.raises(InputError, match="'heuristic' and 'matched'"):
        DAPS(surrogate="moments")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="width > 0"):
        DAPS(width=0.0)
    with pytest.raises(InputError, match="0 < rate < 2"):
        Inner(rate=2.0)
    assert DAPS().claim == "heuristic"
    DAPS().check(nonlinear)
    state = DAPS().init(nonlinear, Draws(0, [0]))
    assert isinstance(state, State) and bool(
        torch.isfinite(DAPS(steps=3).step(nonlinear, state, 0, Draws(0, [0])).z).all()
    )
