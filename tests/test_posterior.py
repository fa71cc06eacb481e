"""A posterior refuses what cannot fit, and knows the exact answer where there is one."""

from __future__ import annotations

import pytest
import torch

import recon
from recon.errors import InputError
from recon.likelihoods import GaussianLikelihood, TransmissionLikelihood
from recon.operators import MatrixOperator, Operator, ParallelBeam
from recon.priors import GaussianMixturePrior, GaussianPrior
from recon.samplers import DPS, MMPS, DiffPIR
from recon.space import Space


def double(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def problem(d: int = 5, m: int = 3) -> GaussianLikelihood:
    return GaussianLikelihood(MatrixOperator(double(m, d)), double(m), 0.3)


def test_gaussian_posterior_is_the_normal_equations() -> None:
    prior, like = GaussianPrior(double(5), torch.diag(1 + double(5)) + 0.1), problem()
    exact = recon.Posterior(prior, like).exact()
    matrix = like.operator.matrix
    precision = torch.linalg.inv(prior.covariance()) + matrix.T @ matrix / 0.3**2
    mean = torch.linalg.solve(
        precision, torch.linalg.solve(prior.covariance(), prior.mean) + matrix.T @ like.y / 0.3**2
    )
    torch.testing.assert_close(exact.covariance(), torch.linalg.inv(precision))
    torch.testing.assert_close(exact.mean, mean)


def test_mixture_posterior_density_is_prior_times_likelihood() -> None:
    prior = GaussianMixturePrior(double(3, 5), torch.stack([torch.eye(5).double() * (i + 1) for i in range(3)]))
    like = problem()
    exact = recon.Posterior(prior, like).exact()
    assert isinstance(exact, GaussianMixturePrior)
    x = 2 * double(50, 5) - 1
    ratio = prior.log_prob(x) + like.log_prob(x) - exact.log_prob(x)
    torch.testing.assert_close(ratio, ratio.mean().expand(50))  # the evidence, whatever x


def test_coordinates_come_from_the_operator() -> None:
    operator = ParallelBeam.half_turn((8, 8), 1e-3, 4)
    prior = GaussianPrior(torch.zeros(64), torch.ones(64), Space(("y", "x"), (8, 8), {}, "1/m"))
    posterior = recon.Posterior(prior, GaussianLikelihood(operator, torch.zeros(operator.range.shape), 0.1))
    assert posterior.space.spacing("x") == pytest.approx(1e-3)


class Squares(Operator):
    """A nonlinear operator."""

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        return x**2


class Unmatched(MatrixOperator):
    matched = False


def unmatched() -> MatrixOperator:
    return Unmatched(double(3, 5))


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (
            lambda p: recon.Posterior(GaussianPrior(double(4), double(4)), problem()),
            r"\(component=4\).*\(component=5\)",
        ),
        (
            lambda p: recon.Posterior(GaussianPrior(double(5), double(5), Space.vector(5, "K")), problem()),
            "unit 'K' against '1'",
        ),
        (lambda p: recon.Posterior(p, problem().float()), "call likelihood.double"),
        (
            lambda p: recon.Posterior(GaussianPrior(double(5).float(), double(5).float()), problem()),
            "call likelihood.float",
        ),
    ],
)
def test_posterior_refuses(build, text: str) -> None:
    with pytest.raises(InputError, match=text):
        build(GaussianPrior(double(5), double(5)))


@pytest.mark.parametrize("sampler", [MMPS(steps=5), DiffPIR(steps=5)])
@pytest.mark.parametrize(
    ("like", "text"),
    [
        (lambda: GaussianLikelihood(unmatched(), double(3), 0.1), "matched=False"),
        (
            lambda: TransmissionLikelihood(MatrixOperator(double(3, 5)), double(3), 10.0),
            r"needs a GaussianLikelihood; got Transmission.*likelihood.gaussian\(\)",
        ),
    ],
)
def test_samplers_refuse_before_any_work(sampler: MMPS, like, text: str) -> None:
    posterior = recon.Posterior(GaussianPrior(double(5), 1 + double(5)), like())
    with pytest.raises(InputError, match=text):
        recon.sample(posterior, sampler, draws=2)
    assert not posterior.evaluations


def test_diffpir_refuses_an_operator_that_is_not_linear() -> None:
    squares = GaussianLikelihood(Squares(Space.vector(5), Space.vector(5)), double(5), 0.1)
    posterior = recon.Posterior(GaussianPrior(double(5), 1 + double(5)), squares)
    with pytest.raises(InputError, match="needs a LinearOperator"):
        recon.sample(posterior, DiffPIR(steps=5), draws=2)
    assert not posterior.evaluations


def test_dps_takes_nonlinear_operators_and_counts() -> None:
    prior = GaussianPrior(double(5), 1 + double(5))
    squares = GaussianLikelihood(Squares(Space.vector(5), Space.vector(5)), double(5), 1.0)
    counts = TransmissionLikelihood(MatrixOperator(double(3, 5)), torch.tensor([5.0, 3.0, 2.0]).double(), 10.0)
    for like in (squares, counts):
        ensemble = recon.sample(recon.Posterior(prior, like), DPS(steps=50), draws=3)
        assert torch.isfinite(ensemble.x).all()


def test_noise_levels_outside_the_prior_are_refused() -> None:
    posterior = recon.Posterior(GaussianPrior(double(5), 1 + double(5)), problem())
    with pytest.raises(InputError, match="is good for noise levels"):
        recon.sample(posterior, MMPS(steps=5, sigma_max=1e6), draws=2)
    with pytest.raises(InputError, match="at least 2 steps; got 1"):
        recon.sample(posterior, MMPS(steps=1), draws=2)
