"""The Gaussian fitted to measurements alone: every step against dense formulas, the fixed point against the likelihood."""

import pytest
import torch

from recon.draws import Draws
from recon.errors import InputError
from recon.likelihoods import GaussianLikelihood
from recon.operators import CartesianMRI, MatrixOperator
from recon.posterior import Posterior
from recon.priors.learning import Moments, fit_moments, posterior_draws, posterior_means
from recon.priors.learning.moments import log_likelihood
from recon.priors.learning.observations import whitened
from recon.space import Space
from tests.bounds import chi2_bounds, normal_bound


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(d, r, seed=0):
    return Moments(normal(d, seed=seed), normal(d, r, seed=seed + 1), 0.05 + 0.3 * normal(d, seed=seed + 2).abs())


def measured(truth, operators, n, seed=0, sigma=0.1):
    """``n`` objects of ``truth``, each seen through one of the operators, the next one in turn."""
    d, r = truth.factors.shape
    x = truth.mean + normal(n, r, seed=seed) @ truth.factors.T + normal(n, d, seed=seed + 1) * truth.diagonal.sqrt()
    observations = []
    for i in range(n):
        operator = operators[i % len(operators)]
        noise = sigma * normal(*operator.range.shape, seed=seed + 10 + i)
        observations.append(GaussianLikelihood(operator, operator.A(x[i]) + noise, sigma))
    return observations


def matrices(count, m, d, seed=50):
    return [MatrixOperator(normal(m, d, seed=seed + i)) for i in range(count)]


def mixed():
    """Fewer data than unknowns, more, and noise of two sizes; d = 5."""
    truth = moments(5, 2)
    few, many = measured(truth, matrices(3, 2, 5), 7), measured(truth, matrices(2, 9, 5), 4, seed=70)
    return truth, [*few, *many, *measured(truth, [few[0].operator], 3, seed=90, sigma=0.4)]


def dense_evidence(mean, factors, diagonal, observations):
    """``sum_i log p(y_i)`` from covariance matrices."""
    covariance, total = factors @ factors.T + torch.diag(diagonal), 0.0
    for one in observations:
        a = one.operator.matrix
        law = a @ covariance @ a.T + torch.diag(one.sigma.expand(len(a)) ** 2)
        total = total + torch.distributions.MultivariateNormal(a @ mean, law).log_prob(one.y)
    return total


def test_likelihood_and_means_are_those_of_dense_conditioning():
    guess, observations = moments(5, 2, seed=30), mixed()[1]
    expected = dense_evidence(guess.mean, guess.factors, guess.diagonal, observations)
    assert log_likelihood(guess, whitened(observations)) == pytest.approx(float(expected), rel=1e-12)
    prior = guess.prior(observations[0].operator.domain)
    exact = torch.stack([Posterior(prior, one).exact().mean for one in observations])
    torch.testing.assert_close(posterior_means(guess, observations), exact)


def test_complex_data_and_unmeasured_places_count_as_they_should():
    """Packed k-space and the full grid with zeros are the same data; both as dense conditioning has them."""
    space, mask = Space.grid((4, 4), 1.0, "1"), normal(4, 4) > 0.3
    guess, x = moments(16, 3), normal(1, 4, 4, seed=5)
    both = []
    for packed in (True, False):
        operator = CartesianMRI(space, None, mask, packed).double()
        y = operator.A(x)[0] + operator.sampled(torch.complex(normal(1, 4, 4, seed=6), normal(1, 4, 4, seed=7)))
        both.append(GaussianLikelihood(operator, y, 0.2))
    packed, full = (posterior_means(guess, [one]) for one in both)
    torch.testing.assert_close(packed, full)
    torch.testing.assert_close(packed[0], Posterior(guess.prior(space), both[0]).exact().mean)


def test_draws_follow_the_exact_posterior():
    guess, n = moments(4, 1), 4000
    observations = [*measured(guess, matrices(1, 3, 4), 1), *measured(guess, matrices(1, 1, 4), 1)]
    for k, one in enumerate(observations):
        exact = Posterior(guess.prior(one.operator.domain), one).exact()
        draws = posterior_draws(guess, [one] * n, Draws(k, range(n)))
        white = torch.linalg.solve_triangular(
            torch.linalg.cholesky(exact.covariance()), (draws - exact.mean).T, upper=False
        )
        assert float(white.mean(1).abs().max()) * n**0.5 < normal_bound(8)
        low, high = chi2_bounds(4 * n)
        assert low < float(white.square().mean()) < high
        # Products of independent standard normal numbers have unit variance.
        off = (white @ white.T / n)[~torch.eye(4, dtype=torch.bool)]
        assert float(off.abs().max()) * n**0.5 < normal_bound(24)


def test_the_likelihood_never_falls_and_ends_where_its_gradient_vanishes():
    """The fixed point is a stationary point of the likelihood, by automatic differentiation of dense formulas."""
    truth = moments(4, 1)
    observations = measured(truth, matrices(6, 3, 4), 240)
    fit = fit_moments(observations, 1, 300)
    history = torch.tensor(fit.log_likelihood, dtype=torch.float64)
    rounding = 1e-11 * float(history.abs().max())
    assert bool((history.diff() >= -rounding).all())
    assert float(history[-1] - history[0]) > 10

    def gradient(at):
        free = [t.clone().requires_grad_() for t in (at.mean, at.factors, at.diagonal.log())]
        grads = torch.autograd.grad(dense_evidence(free[0], free[1], free[2].exp(), observations), free)
        return torch.cat([g.flatten() for g in grads])

    assert float(gradient(fit.moments).norm()) < 1e-4 * float(gradient(truth).norm())
    assert history[-1] > float(dense_evidence(truth.mean, truth.factors, truth.diagonal, observations))


def test_overrelaxation_gets_there_sooner():
    observations = measured(moments(5, 2), matrices(6, 2, 5), 120)
    few, many = fit_moments(observations, 2, 60).log_likelihood, fit_moments(observations, 2, 12).log_likelihood
    assert few[:12] == many[:12]
    scans, plain = whitened(observations), fit_moments(observations, 2, 1).moments
    for _ in range(59):  # the first step of a fit is a plain one
        plain = fit_moments(observations, 2, 1, start=plain).moments
    assert few[-1] > log_likelihood(plain, scans)


def test_the_covariance_is_recovered_within_its_statistical_error():
    """The estimate's distance from the truth, in the metric of the information of the data, is chi-squared."""
    d, n = 4, 3000
    truth = moments(d, 1, seed=3)
    observations = measured(truth, matrices(5, 2, d), n)
    found = fit_moments(observations, 1, 2000, tolerance=1e-9).moments
    sign = torch.sign((found.factors * truth.factors).sum())  # only W W^T is known

    def packed(m, sign=1.0):
        return torch.cat([m.mean, sign * m.factors[:, 0], m.diagonal.log()])

    groups = [[o for o in observations if o.operator is op] for op in {o.operator for o in observations}]

    def loss(theta):
        covariance = torch.outer(theta[d : 2 * d], theta[d : 2 * d]) + torch.diag(theta[2 * d :].exp())
        total = 0.0
        for group in groups:
            a, y = group[0].operator.matrix, torch.stack([o.y for o in group])
            law = a @ covariance @ a.T + 0.01 * torch.eye(len(a), dtype=torch.float64)
            total = total - torch.distributions.MultivariateNormal(a @ theta[:d], law).log_prob(y).sum()
        return total

    information = torch.autograd.functional.hessian(loss, packed(found, sign))
    step = packed(found, sign) - packed(truth)
    assert float(step @ information @ step) / (3 * d) < chi2_bounds(3 * d)[1]
    # The bound is worth something: it tells a covariance that is 20 % too large.
    spoiled = Moments(found.mean, found.factors * 1.1, found.diagonal * 1.2)
    off = packed(spoiled, sign) - packed(truth)
    assert float(off @ information @ off) / (3 * d) > chi2_bounds(3 * d)[1]


def test_shared_operators_change_nothing():
    observations = measured(moments(4, 1), matrices(1, 2, 4), 30)
    apart = [GaussianLikelihood(MatrixOperator(o.operator.matrix.clone()), o.y, o.sigma) for o in observations]
    assert len(whitened(observations)) == 1
    assert len(whitened(apart)) == 30
    one, other = (fit_moments(some, 1, 5) for some in (observations, apart))
    torch.testing.assert_close(one.moments.covariance(), other.moments.covariance())
    assert one.log_likelihood == pytest.approx(other.log_likelihood)


def test_what_does_not_fit_is_refused():
    observations = mixed()[1]
    with pytest.raises(InputError, match="got none"):
        fit_moments([], 1)
    with pytest.raises(InputError, match=r"rank lies in 1 \.\. 4 .* got 5"):
        fit_moments(observations, 5)
    with pytest.raises(InputError, match=r"factors \(5, 3\); got \(5, 2\)"):
        fit_moments(observations, 3, start=moments(5, 2))
    other = measured(moments(4, 1), matrices(1, 2, 4), 1)
    with pytest.raises(InputError, match="observations 0 and 14 are of different objects"):
        fit_moments([*observations, *other], 2)
    with pytest.raises(InputError, match="one member per observation: 14; got 3"):
        posterior_draws(moments(5, 2), observations, Draws(0, range(3)))
