"""RED-diff: its gradient and fixed points in closed form, its optimiser against torch's."""

from __future__ import annotations

import math

import pytest
import torch

import recon
from recon.draws import Draws
from recon.errors import InputError
from recon.likelihoods import GaussianLikelihood, PoissonLikelihood
from recon.operators import MatrixOperator
from recon.operators.algebra import Diagonal
from recon.samplers import REDDiff
from recon.selftest import check_resume
from tests.bounds import normal_bound
from tests.samplers.problems import RATIOS, random_problem, scalars, truth

WEIGHTS = {
    "linear": lambda s: s,
    "sqrt": lambda s: s**0.5,
    "square": lambda s: s * s,
    "log": lambda s: math.log(1 + s),
    "const": lambda s: 1.0,
    "clip": lambda s: min(s, 1.0),
    "score": lambda s: 1 / s,
}


def fixed_point(posterior: recon.Posterior, sampler: REDDiff, sigma: float) -> torch.Tensor:
    """Where the mean gradient vanishes; it is affine in mu and in the noise, whose mean is zero."""
    d = posterior.prior.latent.size
    points = torch.cat([torch.zeros(1, d), torch.eye(d)]).double()
    values = sampler.gradient(posterior, points, sigma, torch.zeros(d + 1, d).double())
    return torch.linalg.solve((values[1:] - values[0]).T, -values[0])


@pytest.mark.parametrize("sigma", [0.3, 2.5])
@pytest.mark.parametrize("weighting", WEIGHTS)
def test_the_fixed_point_is_the_closed_form(weighting: str, sigma: float) -> None:
    """(a y / sigma_y^2) / (a^2 / sigma_y^2 + lam f(sigma) sigma / (s^2 + sigma^2)), whatever the weighting."""
    posterior = scalars()
    found = fixed_point(posterior, REDDiff(weighting=weighting, lam=0.7), sigma)  # type: ignore[arg-type]
    pull = 0.7 * WEIGHTS[weighting](sigma) * sigma / (1 + sigma**2)
    torch.testing.assert_close(found, 3 * RATIOS / (RATIOS + pull), rtol=1e-10, atol=0)


def test_the_score_weighting_leads_to_the_map_and_the_others_to_the_data() -> None:
    posterior = random_problem(d=3, m=3)
    like = posterior.likelihood.gaussian()
    data = torch.linalg.solve(like.operator.matrix, like.y)
    expected = truth(posterior)[0]
    score = fixed_point(posterior, REDDiff(lam=1.0, weighting="score"), 1e-3)
    torch.testing.assert_close(score, expected, rtol=0, atol=1e-4)  # sigma^2 is 1e-5 of the least variance
    late = fixed_point(posterior, REDDiff(lam=1.0), 1e-4)
    torch.testing.assert_close(late, data, rtol=1e-3, atol=0)  # lam sigma^2 against the least singular value
    assert float((data - expected).abs().max()) > 0.1


def test_what_the_normalisations_mean() -> None:
    """ "mean": A^T (A mu - y) / m + lam f (e^ - eps) / d.  "sum": 2 A^T (A mu - y) + lam f (e^ - eps).  By hand."""
    posterior, sigma = random_problem(d=3, m=2), 0.6
    like = posterior.likelihood.gaussian()
    mu, eps = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    back = (mu @ like.operator.matrix.T - like.y) @ like.operator.matrix
    apart = (mu + sigma * eps - posterior.prior.denoise(mu + sigma * eps, sigma)) / sigma - eps
    for normalisation, expected in (
        ("likelihood", back / 0.09 + 0.25 * sigma * apart),
        ("mean", back / 2 + 0.25 * sigma * apart / 3),
        ("sum", 2 * back + 0.25 * sigma * apart),
    ):
        found = REDDiff(normalisation=normalisation).gradient(posterior, mu, sigma, eps)  # type: ignore[arg-type]
        torch.testing.assert_close(found, expected)


def test_the_optimiser_is_adam() -> None:
    posterior, n = random_problem(), 40
    sampler = REDDiff(steps=n, rate=0.05, beta1=0.8, beta2=0.95)
    draws = Draws(4, range(3))
    state = sampler.init(posterior, draws)
    mu = torch.nn.Parameter(state.z.clone())
    adam = torch.optim.Adam([mu], lr=0.05, betas=(0.8, 0.95))
    for k in range(n):
        eps = draws.normal(k, (3,), dtype=torch.float64)
        mu.grad = sampler.gradient(posterior, mu.detach(), sampler.levels(posterior)[k], eps)
        adam.step()
        state = sampler.step(posterior, state, k, draws)
    torch.testing.assert_close(state.z, mu.detach(), rtol=1e-12, atol=1e-12)


def test_draws_gather_at_the_fixed_point_and_not_with_the_posterior_spread() -> None:
    """At one sigma the chain is symmetric about the fixed point, so its mean is that point; its spread is the optimiser's."""
    posterior, n, sigma = scalars(), 2000, 0.5
    sampler = REDDiff(steps=300, rate=0.03, weighting="score", lam=1.0, sigma_max=sigma * (1 + 1e-9), sigma_min=sigma)
    draws = recon.sample(posterior, sampler, draws=n)
    expected = 3 * RATIOS / (RATIOS + 1 / (1 + sigma**2))
    # 300 steps of at most 0.03 go 9 units; the way is 2.4, and what is left of it fades as the momentum does.
    error = (draws.mean() - expected) / (draws.std() / n**0.5)
    assert float(error.abs().max()) < normal_bound(4)
    narrow = draws.std() / truth(posterior)[1].diagonal().sqrt()
    assert float(narrow[:3].max()) < 0.6  # not the posterior's; of the stiffest problem it is more than that
    assert sampler.claim == "heuristic"


def test_the_average_is_that_of_the_last_iterates() -> None:
    posterior, draws = random_problem(), Draws(0, range(2))
    sampler = REDDiff(steps=12, average=5)
    state, seen = sampler.init(posterior, draws), []
    for k in range(12):
        state = sampler.step(posterior, state, k, draws)
        seen.append(state.z)
    torch.testing.assert_close(sampler.finish(posterior, state).x, torch.stack(seen[-5:]).mean(0))
    torch.testing.assert_close(recon.sample(posterior, REDDiff(steps=12), draws=2).x, seen[-1])


def test_a_draw_alone_is_the_draw_in_company() -> None:
    posterior = scalars()
    together, alone = (recon.sample(posterior, REDDiff(steps=9), draws=5, seed=2, block=b).x for b in (5, 1))
    assert torch.equal(together, alone)
    assert float((together[0] - together[1]).abs().min()) > 0


def test_a_stop_leaves_no_trace() -> None:
    assert check_resume(REDDiff(steps=12, average=9)) == 6


def test_it_refuses_what_makes_no_sense() -> None:
    posterior = scalars()
    with pytest.raises(InputError, match="weightings linear, sqrt"):
        REDDiff(weighting="cubic").check(posterior)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"weighs all data alike .* 0\.1 to 2"):
        REDDiff(normalisation="mean").check(posterior)
    with pytest.raises(InputError, match="average"):
        REDDiff(steps=5, average=6).check(posterior)
    with pytest.raises(InputError, match="betas"):
        REDDiff(beta1=1.0).check(posterior)
    counts = PoissonLikelihood(MatrixOperator(torch.eye(4).double()), torch.ones(4).double(), 5.0)
    REDDiff().check(recon.Posterior(posterior.prior, counts))
    with pytest.raises(InputError, match="GaussianLikelihood"):
        REDDiff(normalisation="sum").check(recon.Posterior(posterior.prior, counts))
    same = GaussianLikelihood(Diagonal(torch.ones(4).double(), posterior.space), torch.ones(4).double(), 0.5)
    REDDiff(normalisation="mean").check(recon.Posterior(posterior.prior, same))
