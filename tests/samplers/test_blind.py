"""Blind inversion against joint posteriors that are known: of an offset in closed form, of others on a grid."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import recon
from recon.draws import Draws
from recon.errors import InputError
from recon.likelihoods import GaussianLikelihood, PoissonLikelihood
from recon.operators import CG, Blur, Family, GainOffset, LinearOperator, MatrixOperator, ParametricOperator
from recon.priors import GaussianPrior
from recon.samplers import DAPS, Blind, State, parameters
from recon.samplers.blind import moved
from recon.selftest import check_resume
from recon.space import Space
from tests.bounds import chi2_bounds, normal_bound
from tests.samplers.probing import Probes, affine
from tests.samplers.problems import random_problem, scalars, truth

MATCHED = DAPS(steps=60, surrogate="matched", cg=CG(20, 1e-14), roots=3)


def offset_problem(std: float = 0.4) -> tuple[recon.Posterior, Tensor, Tensor]:
    """An unknown offset of all data, and mean and covariance of image and offset together: one Gaussian problem."""
    plain = random_problem()
    prior, like = plain.prior, plain.likelihood.gaussian()
    assert isinstance(prior, GaussianPrior)
    posterior = recon.Posterior(prior, GaussianLikelihood(GainOffset(like.operator, None, (0.5, std)), like.y, 0.3))
    both = GaussianPrior(
        torch.cat([prior.mean, torch.tensor([0.5]).double()]),
        torch.block_diag(prior.covariance(), torch.tensor([[std**2]]).double()),
    )
    matrix = torch.cat([like.operator.matrix, torch.ones(2, 1, dtype=torch.float64)], 1)
    return posterior, *truth(recon.Posterior(both, GaussianLikelihood(MatrixOperator(matrix), like.y, 0.3)))


def joint_step(posterior: recon.Posterior, sampler: Blind, k: int):
    def step(both: Tensor, draws: Probes) -> Tensor:
        state = State(both[:, :3], torch.zeros(len(both)), {"theta": both[:, 3:]})
        after = sampler.step(posterior, state, k, draws)  # type: ignore[arg-type]
        return torch.cat([after.z, after.aux["theta"]], 1)

    return step


def test_image_and_offset_have_their_joint_posterior() -> None:
    """The exact law of all steps, without Monte Carlo."""
    posterior, mean, covariance = offset_problem()
    sampler = Blind(inner=MATCHED)
    assert sampler.claim == "exact" and sampler.steps == 60 and not sampler.couples

    def start(_: Tensor, draws: Probes) -> Tensor:
        state = sampler.init(posterior, draws)  # type: ignore[arg-type]
        return torch.cat([state.z, state.aux["theta"]], 1)

    m, _, kick = affine(start, 4)
    law = m, kick @ kick.T
    for k in range(60):
        c, matrix, kick = affine(joint_step(posterior, sampler, k), 4)
        law = c + matrix @ law[0], matrix @ law[1] @ matrix.T + kick @ kick.T
    # A Gibbs sweep between image and offset keeps less than 0.8 of an error: 0.8^60 is 2e-6.
    torch.testing.assert_close(law[0], mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(law[1], covariance, rtol=0, atol=1e-5)


def test_every_step_leaves_the_joint_posterior_with_noise_alone() -> None:
    """Invariance: x + sigma n and theta go to x + sigma' n and theta, of any inner sampler that is exact."""
    posterior, mean, covariance = offset_problem()
    sampler, k = Blind(inner=MATCHED), 40
    sigma, after = MATCHED.levels(posterior)[k : k + 2]
    wide = torch.diag(torch.tensor([1.0, 1, 1, 0]).double())
    c, matrix, kick = affine(joint_step(posterior, sampler, k), 4)
    torch.testing.assert_close(c + matrix @ mean, mean, rtol=0, atol=1e-8)
    moved = matrix @ (covariance + sigma**2 * wide) @ matrix.T + kick @ kick.T
    torch.testing.assert_close(moved, covariance + after**2 * wide, rtol=0, atol=1e-8)


def test_parameters_of_draws_are_joint_with_them() -> None:
    posterior, mean, covariance = offset_problem()
    n = 4000
    draws = recon.sample(posterior, Blind(inner=MATCHED), draws=n)
    both = torch.cat([draws.x, parameters(posterior, draws, seed=1)], 1)
    error = (both.mean(0) - mean) / (covariance.diagonal() / n).sqrt()
    assert float(error.abs().max()) < normal_bound(4)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), (both - mean).T, upper=False)
    low, high = chi2_bounds(n - 1)
    ratio = white.var(1)
    assert low < float(ratio.min()) and float(ratio.max()) < high
    correlation = torch.corrcoef(white).tril(-1) * math.sqrt(n)
    assert float(correlation.abs().max()) < normal_bound(6)


def on_a_grid(posterior: recon.Posterior, theta: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of a scalar image and one parameter."""
    operator, like, prior = posterior.likelihood.operator, posterior.likelihood.gaussian(), posterior.prior
    assert isinstance(operator, ParametricOperator) and isinstance(prior, GaussianPrior)
    rows = []
    for value in theta:
        y = operator.at(x[:, None], value.reshape(1, 1))
        log = -0.5 * ((like.y - y) / like.sigma).square().sum(1) - 0.5 * (x - prior.mean).square() / prior.variances
        rows.append(log - 0.5 * ((value - operator.mean[0]) / operator.std[0]) ** 2)
    weight = torch.softmax(torch.stack(rows).flatten(), 0).reshape(len(theta), len(x))
    both = (theta, weight.sum(1)), (x, weight.sum(0))
    means = [float((value * w).sum()) for value, w in both]
    deviations = [math.sqrt(float(((value - m) ** 2 * w).sum())) for (value, w), m in zip(both, means, strict=True)]
    return torch.tensor(means), torch.tensor(deviations)


def curved(theta: Tensor) -> MatrixOperator:
    return MatrixOperator(torch.stack([theta.exp(), 1 + theta**2]).double())


class Rows(LinearOperator):
    """Another matrix (2, 1) for each draw."""

    def __init__(self, values: Tensor) -> None:
        super().__init__(Space.vector(1), Space(("datum",), (2,)))
        self.values = values

    def apply(self, x: Tensor) -> Tensor:
        return self.values * x

    def apply_adjoint(self, y: Tensor) -> Tensor:
        return (self.values * y).sum(1, keepdim=True)


class Curved(ParametricOperator):
    """``curved`` for many draws at once."""

    def __init__(self) -> None:
        super().__init__(Rows(torch.ones(1, 2)), ["theta"], torch.tensor([0.2]), torch.tensor([0.5]))

    def bind(self, theta: Tensor) -> Rows:
        return Rows(torch.cat([theta.exp(), 1 + theta**2], 1))


def test_a_family_is_its_members() -> None:
    """One operator per draw, against the same for all draws at once."""
    family = Family(curved, ["theta"], torch.tensor([0.2]), torch.tensor([0.5]))
    theta, x = torch.tensor([[0.1], [-0.4], [1.0]]).double(), torch.tensor([[1.0], [2.0], [3.0]]).double()
    bound, same = family.bind(theta), Curved().bind(theta)
    assert isinstance(bound, LinearOperator)
    torch.testing.assert_close(bound.A(x), same.A(x))
    torch.testing.assert_close(bound.A_adjoint(same.A(x)), same.A_adjoint(same.A(x)))
    y, sigma = torch.ones(2).double(), torch.tensor(0.3).double()
    change = torch.cat([theta.exp(), 2 * theta], 1) * x / 0.3
    slope, precision = family.information(x, theta, y, sigma)
    torch.testing.assert_close(precision[:, 0, 0], change.square().sum(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(slope[:, 0], (change * (y - same.A(x)) / 0.3).sum(1), rtol=1e-6, atol=1e-6)
    with pytest.raises(InputError, match="bound to 3 draws was given 2"):
        bound.A(x[:2])


@pytest.mark.parametrize("kind", ["gain", "curved"])
def test_a_parameter_that_multiplies_the_image(kind: str) -> None:
    """Not jointly Gaussian: against a grid.  The gain is drawn exactly, the other by Metropolis and Hastings."""
    ones = torch.ones(1, dtype=torch.float64)
    operator = (
        GainOffset(MatrixOperator(torch.tensor([[1.0], [0.5]]).double()), (1.2, 0.3)) if kind == "gain" else Curved()
    )
    like = GaussianLikelihood(operator, torch.tensor([2.0, 1.4]).double(), 0.4)
    posterior = recon.Posterior(GaussianPrior(1.5 * ones, 0.16 * ones), like)
    theta = torch.linspace(-1.5, 3, 901, dtype=torch.float64)
    means, deviations = on_a_grid(posterior, theta, torch.linspace(-1, 4, 501, dtype=torch.float64))
    n = 1500
    inner = DAPS(steps=15, surrogate="matched", cg=CG(3, 1e-12), roots=1)
    draws = recon.sample(posterior, Blind(inner=inner, moves=2), draws=n, seed=3)
    both = torch.cat([parameters(posterior, draws, seed=1), draws.x], 1)
    error = (both.mean(0) - means) / deviations * math.sqrt(n)
    print(
        kind,
        "means off by",
        error.tolist(),
        "standard errors; deviations over exact",
        (both.std(0) / deviations).tolist(),
    )
    assert float(error.abs().max()) < normal_bound(2)
    # A kurtosis of 5 at most doubles the variance of a sample variance.
    low, high = chi2_bounds((n - 1) / 2)
    assert low < float((both.var(0) / deviations**2).min()) and float((both.var(0) / deviations**2).max()) < high


def test_shared_parameters_are_the_most_probable_ones() -> None:
    """EM on an offset: its fixed point is the mean of p(theta | y); noise of the draws, over 1 - rate of its convergence."""
    posterior, mean, covariance = offset_problem()
    n, sampler = 500, Blind(inner=MATCHED, shared=True)
    assert sampler.couples and sampler.claim == "heuristic"
    found: list[Tensor] = []

    class Watch:
        def restore(self, owned: range) -> None:
            return None

        def after_step(self, done: int, steps: int, states: dict[int, State]) -> None:
            found.append(states[0].aux["theta"])

    recon.sample(posterior, sampler, draws=n, run=Watch())
    assert bool((found[-1] == found[-1][:1]).all())
    information = 1 / 0.4**2 + 2 / 0.3**2  # of theta, were the image known
    seen = 1 / covariance[3, 3]
    # Draws differ in the sum of two residuals; their variance given theta is (1 / seen - 1 / information) by the law of total
    # variance, times what EM magnifies it by.
    spread = math.sqrt(float(1 / seen - 1 / information) / n) / float(seen / information)
    assert abs(float(found[-1][0, 0] - mean[3])) < normal_bound() * spread
    assert spread < 0.2 * float(covariance[3, 3]) ** 0.5


@pytest.mark.parametrize("along", [None, "view", "detector"])
def test_gains_and_offsets_inform_as_differences_do(along: str | None) -> None:
    """The closed form of GainOffset against central differences of the contract."""
    space = Space(("view", "detector"), (3, 4), {}, "1")
    matrix = torch.randn(12, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    operator = GainOffset(MatrixOperator(matrix, None, space), (0.9, 0.2), (0.1, 0.3), along)
    draws = Draws(0, range(2))
    x, y = draws.normal(0, (5,), dtype=torch.float64), draws.normal(1, (3, 4), dtype=torch.float64)
    theta = operator.mean + operator.std * draws.normal(2, operator.mean.shape, dtype=torch.float64)
    sigma = 0.2 + draws.uniform(3, (3, 4))[0]
    for ours, theirs in zip(
        operator.information(x, theta, y, sigma),
        ParametricOperator.information(operator, x, theta, y, sigma),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)
    assert len(operator.names) == 2 * {None: 1, "view": 3, "detector": 4}[along]


def test_gain_and_offset_are_drawn_together() -> None:
    """Given the image: N(P^-1 (m / s^2 + C^T y / sigma^2), P^-1) with C = (A x, 1), from wherever theta was."""
    plain = random_problem(m=5)
    like = plain.likelihood.gaussian()
    operator = GainOffset(like.operator, (0.9, 0.5), (0.1, 0.7))
    posterior = recon.Posterior(plain.prior, GaussianLikelihood(operator, like.y, 0.3))
    x = torch.tensor([[1.0, -2.0, 0.5]]).double()
    columns = torch.cat([like.operator.A(x), torch.ones(1, 5, dtype=torch.float64)]).T
    precision = torch.diag(operator.std**-2) + columns.T @ columns / 0.09
    mean = torch.linalg.solve(precision, operator.mean / operator.std**2 + columns.T @ like.y / 0.09)

    def step(theta: Tensor, draws: Probes) -> Tensor:
        return moved(posterior, x.expand(len(theta), 3), theta, 1, (draws, 0))  # type: ignore[arg-type]

    c, matrix, kick = affine(step, 2)
    torch.testing.assert_close(c, mean)
    torch.testing.assert_close(kick @ kick.T, torch.linalg.inv(precision))
    assert float(matrix.abs().max()) < 1e-9


@pytest.mark.parametrize("along", [None, "datum"])
def test_bound_operators_have_their_transposes(along: str | None) -> None:
    matrix = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    operator = GainOffset(MatrixOperator(matrix), (1.0, 0.5), (0.0, 1.0), along)
    draws = Draws(0, range(3))
    theta = draws.normal(0, operator.mean.shape, dtype=torch.float64)
    bound = operator.bind(theta)
    assert isinstance(bound, LinearOperator) and bound.matched
    x, y = draws.normal(1, (3,), dtype=torch.float64), draws.normal(2, (4,), dtype=torch.float64)
    torch.testing.assert_close((bound.A(x) * y).sum(1), (x * bound.A_adjoint(y)).sum(1))
    groups = 1 if along is None else 4
    torch.testing.assert_close(operator.at(x, theta), theta[:, :groups] * (x @ matrix.T) + theta[:, groups:])


def test_complex_data_have_gains() -> None:
    matrix = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    operator = GainOffset(MatrixOperator(torch.complex(matrix[0], matrix[1])), (1.0, 0.2), along="datum")
    y = operator.at(torch.ones(1, 3).double(), torch.tensor([[0.8, 1.1, 0.9, 1.3]]).double())[0]
    prior = GaussianPrior(torch.ones(3).double(), 0.01 * torch.ones(3).double())
    posterior = recon.Posterior(prior, GaussianLikelihood(operator, y, 0.05))
    draws = recon.sample(posterior, Blind(inner=MATCHED), draws=400)
    found = parameters(posterior, draws).mean(0)
    assert float((found - torch.tensor([0.8, 1.1, 0.9, 1.3])).abs().max()) < 0.1
    for ours, theirs in zip(
        *(f(operator, torch.ones(1, 3).double(), operator.mean[None], y, torch.tensor(0.05)) for f in (
            GainOffset.information, ParametricOperator.information)), strict=True
    ):  # fmt: skip
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_the_width_of_a_blur_is_found() -> None:
    """Two points far from each other; the width in steps of the grid, 1.5 in truth, 2.5 +- 1 before."""
    space = Space(("x",), (24,), {"x": range(24)}, "1")

    def make(theta: Tensor) -> Blur:
        return Blur(space, torch.exp(-0.5 * (torch.arange(-9, 10).double() / theta.clamp(min=0.3)) ** 2))

    image = torch.zeros(1, 24, dtype=torch.float64)
    image[0, [5, 16]] = 3.0
    operator = Family(make, ["width"], torch.tensor([2.5]), torch.tensor([1.0]))
    y = operator.at(image, torch.tensor([[1.5]]))[0] + 0.05 * Draws(0, [0]).normal(5, (24,), dtype=torch.float64)[0]
    prior = GaussianPrior(image[0], 1e-4 * torch.ones(24, dtype=torch.float64), space)
    posterior = recon.Posterior(prior, GaussianLikelihood(operator, y, 0.05))
    sampler = Blind(inner=DAPS(steps=6, surrogate="matched"), moves=2)
    draws = recon.sample(posterior, sampler, draws=4)
    found = parameters(posterior, draws, moves=5)
    assert float((found - 1.5).abs().max()) < 0.1


@pytest.mark.parametrize("shared", [False, True])
def test_a_draw_alone_is_the_draw_in_company(shared: bool) -> None:
    plain = scalars()
    operator = GainOffset(plain.likelihood.operator, (1.0, 0.1), (0.0, 0.3))
    like = GaussianLikelihood(operator, plain.likelihood.gaussian().y, plain.likelihood.gaussian().sigma)
    posterior = recon.Posterior(plain.prior, like)
    sampler = Blind(inner=DAPS(steps=6), shared=shared)
    together, alone = (recon.sample(posterior, sampler, draws=5, seed=2, block=b).x for b in (5, 1))
    assert torch.equal(together, alone)
    assert float((together[0] - together[1]).abs().min()) > 0


@pytest.mark.parametrize("shared", [False, True])
def test_a_stop_leaves_no_trace(shared: bool) -> None:
    assert check_resume(Blind(inner=DAPS(steps=6), shared=shared), offset_problem()[0]) == 3


def test_it_refuses_what_it_cannot_estimate() -> None:
    plain = random_problem()
    operator = plain.likelihood.operator
    with pytest.raises(InputError, match="Wrap it in GainOffset"):
        Blind().check(plain)
    counts = PoissonLikelihood(GainOffset(operator), torch.ones(2).double(), 5.0)
    with pytest.raises(InputError, match="Blind needs a GaussianLikelihood"):
        Blind().check(recon.Posterior(plain.prior, counts))
    with pytest.raises(InputError, match="no dimension 'view'"):
        GainOffset(operator, along="view")
    with pytest.raises(InputError, match="a gain or an offset"):
        GainOffset(operator, None, None)
    with pytest.raises(InputError, match="positive standard deviation"):
        GainOffset(operator, (1.0, 0.0))
    with pytest.raises(InputError, match="at least one move"):
        Blind(moves=0)
    with pytest.raises(InputError, match="steps of its inner sampler"):
        Blind(steps=7)
    grown = Family(
        lambda t: MatrixOperator(torch.ones(1 + (t > 0.5), 3).double()), ["a"], torch.zeros(1), torch.ones(1)
    )
    with pytest.raises(InputError, match="same spaces"):
        grown.bind(torch.ones(1, 1))
    # Known or not, the operator of the mean serves every other sampler.
    torch.testing.assert_close(
        GainOffset(operator, (2.0, 0.1)).A(torch.ones(1, 3).double()), 2 * operator.A(torch.ones(1, 3).double())
    )
