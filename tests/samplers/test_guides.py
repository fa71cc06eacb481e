"""Guides by moment matching: exact where they say so, with their known bias elsewhere.  No Monte Carlo but in one test."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

import recon
from recon.errors import InputError
from recon.likelihoods import GaussianLikelihood
from recon.operators import CG, Blur, Masked, MatrixOperator, Operator, PhaseRetrieval, complex_grid
from recon.operators.krylov import galerkin, gmres
from recon.priors import GaussianMixturePrior, GaussianPrior
from recon.priors.base import Card, Prior
from recon.samplers import MMPS, SDA, TMPD, Ancestral, DPMSolver2M, GuidedSampler, PiGDM, SASolver
from recon.samplers.matching import Tangent, local, solved
from recon.samplers.widths import closed_covariance, prior_spread
from recon.schedules import LogLinear, Schedule
from recon.space import Space
from tests.bounds import chi2_bounds, normal_bound
from tests.samplers.affine import errors, law

TIGHT = CG(12, 1e-13)
D, M = 4, 3


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(kind: str) -> Tensor:
    if kind == "full":
        factor = random(D, D, seed=1)
        return factor @ factor.T / D + 0.1 * torch.eye(D).double()
    return torch.full((D,), 2.25).double() if kind == "white" else torch.tensor([0.3, 2.0, 1.0, 0.6]).double()


def posterior(kind: str, data: str = "matrix") -> recon.Posterior:
    """Prior covariance full, white or diagonal; data of a matrix (independent sigmas) or of a mask."""
    operator = MatrixOperator(random(M, D, seed=2)) if data == "matrix" else None
    operator = operator or Masked(Space.vector(D), torch.tensor([1, 0, 1, 1])).double()
    sigma = torch.tensor([0.2, 0.4, 0.3]).double()
    prior = GaussianPrior(random(D, seed=3), covariance(kind))
    return recon.Posterior(prior, GaussianLikelihood(operator, random(M, seed=4), sigma))


EXACT = [
    (MMPS(cg=TIGHT), "full", "matrix"),
    (MMPS(cg=TIGHT, solver="cg"), "full", "matrix"),
    (MMPS(cg=TIGHT, covariance="closed"), "full", "matrix"),
    (PiGDM(cg=TIGHT), "white", "matrix"),
    (PiGDM(cg=TIGHT), "white", "mask"),
    (PiGDM(cg=TIGHT, jacobian=False), "white", "matrix"),
    (TMPD(cg=TIGHT, rows="latent"), "diagonal", "matrix"),
    (TMPD(), "diagonal", "mask"),
]


@pytest.mark.parametrize(("sampler", "kind", "data"), EXACT)
def test_the_law_converges_to_the_posterior(sampler: GuidedSampler, kind: str, data: str) -> None:
    """Mean: what the start leaves, v / sigma_0^2 <= 1e-4.  Covariance: the solver's error, which is of third order here."""
    problem = posterior(kind, data)
    found = []
    for steps in (48, 96):
        walk = dataclasses.replace(sampler, steps=steps, grid=LogLinear(), transition=SASolver())
        found.append(errors(walk, problem))
    assert found[-1][0] < 2e-4
    assert 6 < found[0][1] / found[1][1] < 10
    assert found[-1][1] < 0.005


@pytest.mark.parametrize(
    ("sampler", "kind", "data", "off"),
    [
        (PiGDM(cg=TIGHT, guard=False), "full", "matrix", 0.05),
        (TMPD(guard=False), "diagonal", "matrix", 0.05),
        (TMPD(cg=TIGHT, rows="latent", guard=False), "full", "matrix", 0.05),
        (SDA(guard=False), "white", "matrix", 0.05),
        (MMPS(cg=CG(1, 0.0)), "white", "matrix", 0.01),
    ],
)
def test_they_are_not_exact_elsewhere(sampler: GuidedSampler, kind: str, data: str, off: float) -> None:
    walk = dataclasses.replace(sampler, steps=96, grid=LogLinear(), transition=SASolver())
    mean, spread = errors(walk, posterior(kind, data))
    assert max(mean, spread) > off


def scalars(ratios: tuple[float, ...], variance: float = 1.0) -> tuple[recon.Posterior, Tensor]:
    """Independent scalars N(0, variance) with data y = 3 at several signal-to-noise ratios."""
    r = torch.tensor(ratios).double()
    prior = GaussianPrior(0 * r, 0 * r + variance, schedule=Schedule(1e-3, 100.0))
    operator = MatrixOperator(torch.eye(len(r)).double())
    return recon.Posterior(prior, GaussianLikelihood(operator, 0 * r + 3.0, (variance / r).sqrt())), r


def recursion(weight, sampler: GuidedSampler, problem: recon.Posterior, variance: float) -> tuple[Tensor, Tensor]:
    """Mean and variance of ancestral steps with ``D_y = g z + sigma^2 g weight(sigma) (3 - g z)``, ``g`` the prior's gain."""
    levels = sampler.sigmas(problem).tolist()
    noise2 = problem.likelihood.gaussian().sigma ** 2
    mean, spread = torch.zeros_like(noise2), levels[0] ** 2 * torch.ones_like(noise2)
    for sigma, after in zip(levels[:-1], levels[1:], strict=True):
        g, tau = variance / (variance + sigma**2), 1 - (after / sigma) ** 2
        pull = weight(sigma, noise2, g)
        slope = 1 - tau + tau * (g - pull * g)
        mean, spread = slope * mean + tau * pull * 3, slope**2 * spread + after**2 * tau
    return mean, spread


@pytest.mark.parametrize("variance", [1.0, 4.0])
@pytest.mark.parametrize("jacobian", [True, False])
@pytest.mark.parametrize("method", ["pigdm", "sda"])
def test_scalar_recursions(method: str, jacobian: bool, variance: float) -> None:
    """With a spread of one that the prior does not have (PiGDM) and gamma = 0.1 (SDA)."""
    problem, _ = scalars((0.25, 1.0, 25.0), variance)
    sampler: GuidedSampler = SDA(steps=40, gamma=0.1, jacobian=jacobian, guard=False)
    if method == "pigdm":
        sampler = PiGDM(steps=40, spread=1.0, jacobian=jacobian, guard=False, cg=TIGHT)

    def weight(sigma: float, noise2: Tensor, g: float) -> Tensor:
        width = sigma**2 / (1 + sigma**2) if method == "pigdm" else 0.1 * sigma**2
        outer = g * sigma**2 if jacobian else width if method == "pigdm" else sigma**2
        return outer / (noise2 + width)

    mean, spread = law(sampler, problem)
    torch.testing.assert_close(mean, recursion(weight, sampler, problem, variance)[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        spread.diagonal(), recursion(weight, sampler, problem, variance)[1], rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize(
    ("gamma", "means"),
    [(0.01, (1.09, 1.24, 1.22, 1.01)), (0.1, (1.04, 1.13, 1.16, 1.01)), (1.0, (0.82, 0.79, 0.85, 0.98))],
)
def test_sda_has_its_tabulated_bias(gamma: float, means: tuple[float, ...]) -> None:
    problem, r = scalars((0.25, 1.0, 4.0, 100.0))
    sampler = SDA(steps=200, gamma=gamma, guard=False, grid=LogLinear(), transition=SASolver())
    mean, _ = law(sampler, problem)
    torch.testing.assert_close(mean * (1 + r) / (3 * r), torch.tensor(means).double(), rtol=0.0, atol=0.01)


def test_pigdm_has_its_tabulated_bias() -> None:
    for variance, low, high in ((0.25, (0.865, 1.0), (1.005, 1.115)), (4.0, (1.005, 1.15), (0.825, 0.995))):
        problem, r = scalars((0.25, 1.0, 4.0, 25.0, 100.0), variance)
        sampler = PiGDM(steps=120, spread=1.0, guard=False, grid=LogLinear(), transition=SASolver(), cg=TIGHT)
        mean, spread = law(sampler, problem)
        ratio, width = mean * (1 + r) / (3 * r), spread.diagonal() * (1 + r) / variance
        assert low[0] < float(ratio.min()) and float(ratio.max()) < low[1]
        assert high[0] < float(width.min()) and float(width.max()) < high[1]


def test_the_operators_own_solve_is_the_system_of_the_formula() -> None:
    space = Space.grid((6, 6), 1.0, "1")
    blur = Blur(space, torch.tensor([[0.1, 0.2], [0.3, 0.4]]).double())
    scales = GaussianPrior(torch.zeros(36).double(), torch.ones(36).double(), space)
    for operator in (blur, MatrixOperator(random(5, 36, seed=6), space)):
        y = random(*operator.range.shape, seed=7)
        problem = recon.Posterior(scales, GaussianLikelihood(operator, y, 0.3))
        at = local(problem, random(2, 6, 6, seed=8), 0.7)
        direct = at.back(CG(60, 1e-14).solve(lambda u, at=at: u + 0.4 * at.forward(at.back(u)), at.residual))
        torch.testing.assert_close(solved(at, 0.4, CG(60, 1e-14)), direct, rtol=1e-9, atol=1e-10)


class Standard(Prior):
    """Standard normal in a latent of other units."""

    def predict(self, z: Tensor, sigma: Tensor) -> Tensor:
        return z / (1 + sigma.reshape(-1, 1, 1).square())

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64


@pytest.mark.parametrize("scale", [2.5, (0.5, 3.0)])
def test_the_solve_is_in_latent_units(scale) -> None:
    space = Space(("variable", "x"), (2, 3))
    prior = Standard(space, Schedule(1e-2, 20.0), Card("standard"), shift=1.0, scale=scale)
    like = GaussianLikelihood(MatrixOperator(random(4, 6), space), random(4, seed=1), 0.4)
    at = local(recon.Posterior(prior, like), random(2, 2, 3, seed=2), 0.7)
    direct = at.back(CG(60, 1e-14).solve(lambda u: u + 0.4 * at.forward(at.back(u)), at.residual))
    torch.testing.assert_close(solved(at, 0.4, CG(60, 1e-14)), direct, rtol=1e-9, atol=1e-10)


class Affine(Operator):
    """A linear map that does not say so, for the path of nonlinear operators."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__(Space.vector(matrix.shape[1]), Space.vector(len(matrix), dim="datum"))
        self.register_buffer("matrix", matrix)

    def apply(self, x: Tensor) -> Tensor:
        return x @ self.matrix.T


@pytest.mark.parametrize(
    "sampler",
    [MMPS(steps=6, cg=TIGHT), PiGDM(steps=6, cg=TIGHT), TMPD(steps=6), SDA(steps=6)],
    ids=lambda s: type(s).__name__,
)
def test_gauss_newton_is_the_linear_rule_where_the_operator_is_linear(sampler: GuidedSampler) -> None:
    linear = posterior("full")
    like = linear.likelihood.gaussian()
    hidden = recon.Posterior(linear.prior, GaussianLikelihood(Affine(random(M, D, seed=2)), like.y, like.sigma))
    draws = [recon.sample(one, sampler, draws=3) for one in (linear, hidden)]
    torch.testing.assert_close(draws[0].x, draws[1].x, rtol=1e-7, atol=1e-7)
    if not isinstance(sampler, PiGDM):  # whose linear system is solved by the operator
        assert draws[0].info["cost"]["adjoint"] == draws[1].info["cost"]["adjoint"]


def test_the_tangent_of_a_complex_nonlinear_operator() -> None:
    operator = PhaseRetrieval(MatrixOperator(torch.complex(random(4, D), random(4, D, seed=1))))
    x, u, v = random(2, D, seed=2), random(2, D, seed=3), random(2, 4, seed=4)
    tangent = Tangent(operator, x)
    step = 1e-6
    difference = (operator.A(x + step * u) - operator.A(x - step * u)) / (2 * step)
    torch.testing.assert_close(tangent.forward(u), difference, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(tangent.adjoint(v), operator.vjp(x, v))
    torch.testing.assert_close(tangent.value, operator.A(x))


def test_nonlinear_data_are_fitted() -> None:
    """Squares of half the values seen: draws of MMPS and PiGDM explain the data, those of the prior do not."""

    class Square(Operator):
        def apply(self, x: Tensor) -> Tensor:
            return x[:, :2].square()

    prior = GaussianPrior(torch.full((D,), 2.0).double(), torch.full((D,), 0.5).double())
    operator = Square(Space.vector(D), Space.vector(2, dim="datum"))
    y = torch.tensor([2.0, 7.0]).double()
    problem = recon.Posterior(prior, GaussianLikelihood(operator, y, 0.1))
    for sampler in (MMPS(steps=60, grid=LogLinear()), PiGDM(steps=60, grid=LogLinear())):
        misfit = (operator.A(recon.sample(problem, sampler, draws=32).x) - y) / 0.1
        assert float(misfit.square().mean()) < 3  # one for the posterior; about 700 for the prior


class Cut(Operator):
    """No second derivative."""

    def apply(self, x: Tensor) -> Tensor:
        return x.detach()


@pytest.mark.parametrize(
    ("sampler", "text"),
    [
        (PiGDM(spread=-1.0), "spread > 0"),
        (SDA(gamma=-0.1), "gamma >= 0"),
        (TMPD(rows="columns"), "rows 'data' or 'latent'"),  # type: ignore[arg-type]
        (MMPS(solver="lu"), "solver 'galerkin', 'gmres' or 'cg'"),  # type: ignore[arg-type]
        (MMPS(covariance="open"), "covariance 'jacobian' or 'closed'"),  # type: ignore[arg-type]
    ],
)
def test_refusals(sampler: GuidedSampler, text: str) -> None:
    problem = posterior("white")
    with pytest.raises(InputError, match=text):
        recon.sample(problem, sampler, draws=1)
    assert not problem.evaluations


def test_operators_that_cannot_be_linearised_are_refused() -> None:
    space = Space.vector(D)
    problem = recon.Posterior(posterior("white").prior, GaussianLikelihood(Cut(space, space), random(D), 0.1))
    with pytest.raises(InputError, match="differentiated twice"):
        recon.sample(problem, PiGDM(steps=4), draws=1)
    assert not problem.evaluations


def test_where_the_spread_comes_from() -> None:
    assert prior_spread(posterior("white").prior, None, "t") == pytest.approx(1.5)
    assert prior_spread(posterior("white").prior, 0.7, "t") == 0.7
    means = torch.tensor([[-1.0, 0.0], [3.0, 0.0]]).double()
    mixture = GaussianMixturePrior(means, torch.tensor([0.5, 0.5]).double(), torch.tensor([0.25, 0.75]).double())
    assert prior_spread(mixture, None, "t") ** 2 == pytest.approx((0.5 + 3.0 + 0.5) / 2)  # 16 * 3/16 between the means
    trained = torch.nn.Module()
    inner = torch.nn.Module()
    inner.sigma_data = 0.25
    trained.part = inner
    assert prior_spread(trained, None, "t") == 0.25  # type: ignore[arg-type]
    bare = Prior(Space.vector(2), Schedule(0.1, 1.0), Card("bare"))
    with pytest.raises(InputError, match="prior 'bare' does not state; give it as spread"):
        prior_spread(bare, None, "PiGDM")


def test_closed_covariances_are_those_of_the_denoiser() -> None:
    """``sigma^2 J`` for a Gaussian; for a mixture that of a Gaussian with its moments."""
    prior = posterior("full").prior
    z, u, sigma = random(3, D), random(3, D, seed=9), 0.8
    _, pull = posterior("full").linearize(z, sigma)
    torch.testing.assert_close(closed_covariance(prior, sigma, None, "t")(u), sigma**2 * pull(u))
    mixture = GaussianMixturePrior(random(3, D), covariance("full"))
    centred = mixture.means - mixture.means.mean(0)
    total = covariance("full") + centred.T @ centred / 3
    expected = torch.linalg.inv(torch.linalg.inv(total) + torch.eye(D).double() / sigma**2)
    torch.testing.assert_close(closed_covariance(mixture, sigma, None, "t")(u), u @ expected)


@pytest.mark.parametrize(
    "sampler",
    [
        MMPS(steps=30, cg=TIGHT, transition=DPMSolver2M()),
        PiGDM(steps=30),
        SDA(steps=30, guard=False),
        TMPD(steps=30, rows="latent"),
    ],
    ids=lambda s: type(s).__name__,
)
def test_the_loop_draws_from_the_law(sampler: GuidedSampler) -> None:
    problem, draws = posterior("diagonal"), 1000
    mean, spread = law(sampler, problem)
    x = recon.sample(problem, sampler, draws=draws, seed=1).x
    lower = torch.linalg.cholesky(spread)
    white = torch.linalg.solve_triangular(lower, (x - mean).T, upper=False)
    assert float(white.mean(1).abs().max()) * math.sqrt(draws) < normal_bound(D)
    low, high = chi2_bounds(draws * D)
    assert low < float(white.square().mean()) < high


class Rough(Prior):
    """A denoiser whose Jacobian at large noise is that of a unit Gaussian, and errors that are neither symmetric nor small."""

    def __init__(self, errors: Tensor) -> None:
        super().__init__(Space.vector(len(errors)), Schedule(0.01, 80.0), Card("rough"))
        self.register_buffer("errors", errors)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64

    def predict(self, z: Tensor, sigma: Tensor) -> Tensor:
        s2 = sigma[:, None] ** 2
        return z / (1 + s2) + 1e-3 * z @ self.errors.T


def test_a_jacobian_that_is_not_symmetric_does_not_drive_the_data_away() -> None:
    """The share of problems whose data are further away after the pull than before it, by solver."""
    worse = {"gmres": 0, "galerkin": 0, "cg": 0}
    for seed in range(40):
        prior = Rough(random(8, 8, seed=seed))
        likelihood = GaussianLikelihood(MatrixOperator(random(8, 8, seed=100 + seed)), random(8, seed=200 + seed), 0.1)
        problem, z = recon.Posterior(prior, likelihood), 80 * random(5, 8, seed=300 + seed)
        before = likelihood.residual(prior.denoise(z, 80.0)).square().sum(1)
        for solver in worse:
            pulled = MMPS(solver=solver).guide(problem, z, 80.0, 40.0)  # type: ignore[arg-type]
            worse[solver] += int((likelihood.residual(pulled).square().sum(1) > before).sum())
    print(f"of 200 states, further from the data after the pull: {worse}")
    assert worse["gmres"] == 0
    assert worse["cg"] > 4 * max(worse["galerkin"], 5)  # the residual of its system never grows; the pull may still be long


@pytest.mark.parametrize(("solver", "vjps"), [("galerkin", 3), ("gmres", 3), ("cg", 4)])
def test_the_pull_of_the_solution_is_made_of_those_of_the_iterations(solver: str, vjps: int) -> None:
    """The same as one vjp more at the solution itself, of a network whose Jacobian is not symmetric."""
    prior, sigma, limits = Rough(random(8, 8, seed=1)), 3.0, CG(3, 0.0)
    likelihood = GaussianLikelihood(MatrixOperator(random(8, 8, seed=2)), random(8, seed=3), 0.1)
    problem, z = recon.Posterior(prior, likelihood), 3 * random(5, 8, seed=4)
    at = local(problem, z, sigma)

    def matvec(u: Tensor) -> Tensor:
        return u + sigma**2 * at.forward(at.pull(at.back(u)))  # type: ignore[misc]

    answers = {
        "galerkin": lambda: galerkin(matvec, at.residual, limits, least=1.0),
        "gmres": lambda: gmres(matvec, at.residual, limits),
        "cg": lambda: limits.solve(matvec, at.residual, least=1.0),
    }
    expected = sigma**2 * at.pull(at.back(answers[solver]()))  # type: ignore[misc]
    sampler = MMPS(cg=limits, solver=solver)  # type: ignore[arg-type]
    before = problem.evaluations["vjp"]
    torch.testing.assert_close(sampler.correction(at), expected, rtol=1e-9, atol=1e-9)
    assert problem.evaluations["vjp"] - before == vjps * len(z)


def test_a_guide_of_many_solvers() -> None:
    """One guide, first against second order: the error of the covariance at the same steps."""
    problem = posterior("white")
    by = {
        type(s).__name__: errors(PiGDM(steps=64, grid=LogLinear(), cg=TIGHT, transition=s), problem)[1]
        for s in (Ancestral(), DPMSolver2M(), SASolver())
    }
    assert by["DPMSolver2M"] < by["Ancestral"] / 10
    assert by["SASolver"] < by["Ancestral"] / 10


def test_complex_images_are_guided() -> None:
    """A nonlinear operator on two channels runs through the guides that solve."""
    space = complex_grid((2, 2))
    operator = PhaseRetrieval(MatrixOperator(torch.complex(random(6, 8), random(6, 8, seed=1)), space))
    prior = GaussianPrior(torch.ones(8).double(), torch.ones(8).double(), space)
    problem = recon.Posterior(prior, GaussianLikelihood(operator, random(6, seed=2).abs(), 0.5))
    for sampler in (MMPS(steps=8), PiGDM(steps=8)):
        assert bool(torch.isfinite(recon.sample(problem, sampler, draws=2).x).all())
