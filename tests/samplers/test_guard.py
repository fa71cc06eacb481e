"""Pulls that overshoot where a method's covariance is too narrow: the published condition, and the guard."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

import recon
from recon.likelihoods import GaussianLikelihood
from recon.operators import CG, MatrixOperator
from recon.priors import GaussianPrior
from recon.samplers import SDA, TMPD, Ancestral, GuidedSampler, PiGDM
from recon.samplers.matching import Local, guarded
from recon.schedules import Schedule
from tests.bounds import normal_bound
from tests.samplers.affine import law
from tests.samplers.problems import random_problem

TIGHT = CG(12, 1e-13)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def means_of_a_smooth_field() -> recon.Posterior:
    """48 values of correlation length 4 on a grid of 6 x 8, seen as 12 precise means of 2 x 2."""
    row, column = torch.arange(48) // 8, torch.arange(48) % 8
    apart = (row[:, None] - row).square() + (column[:, None] - column).square()
    prior = GaussianPrior(
        torch.zeros(48).double(),
        0.99 * torch.exp(-apart.double() / 32) + 0.01 * torch.eye(48),
        schedule=Schedule(0.01, 80),
    )
    A = ((row // 2 * 4 + column // 2) == torch.arange(12)[:, None]).double() / 4
    truth = torch.linalg.cholesky(prior.covariance()) @ random(48, seed=5)
    return recon.Posterior(prior, GaussianLikelihood(MatrixOperator(A), A @ truth + 0.02 * random(12, seed=6), 0.02))


@pytest.mark.parametrize("spread", [0.5, 1.0, 3.0, 20.0])
def test_the_published_pull_of_pigdm_grows_where_its_module_says(spread: float) -> None:
    """A scalar of variance 9 and precise data: the slope of every step; the guarded one has the matched gain at most."""
    ones = torch.ones(1).double()
    prior = GaussianPrior(0 * ones, 9 * ones, schedule=Schedule(1e-2, 100.0))
    problem = recon.Posterior(prior, GaussianLikelihood(MatrixOperator(2 * torch.eye(1).double()), ones, 0.1))
    free, held = (PiGDM(steps=16, spread=spread, guard=guard, cg=TIGHT) for guard in (False, True))
    levels, both, grew = free.levels(problem), torch.tensor([[0.0], [1.0]]).double(), False
    for k, (sigma, after) in enumerate(zip(levels[:-2], levels[1:-1], strict=True)):
        g, tau = 9 / (9 + sigma**2), 1 - (after / sigma) ** 2
        v, r2 = sigma**2 * g, spread**2 * sigma**2 / (spread**2 + sigma**2)
        gains = v * 400 / (1 + r2 * 400), v * 400 / (1 + v * 400)
        slopes = []
        for sampler in (free, held):
            moved = Ancestral().step(both, sampler.guide(problem, both, sigma, after), sigma, after, None)
            slopes.append(float(moved[1] - moved[0]))
        assert slopes[0] == pytest.approx(1 - tau * (1 - g + g * gains[0]), rel=1e-9, abs=1e-9), k
        assert slopes[1] == pytest.approx(1 - tau * (1 - g + g * min(gains)), rel=1e-9, abs=1e-9), k
        assert (abs(slopes[0]) > 1) == (tau * (1 + g * (gains[0] - 1)) > 2)
        grew = grew or abs(slopes[0]) > 1
    assert grew == (spread < 3)


@pytest.mark.parametrize("sampler", [PiGDM(cg=TIGHT), TMPD(), SDA()], ids=lambda s: type(s).__name__)
def test_a_guarded_pull_is_no_further_from_the_matched_one_than_none(
    sampler: GuidedSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the norm of the matched system, at every level; as published each is further at some."""
    problem, seen = means_of_a_smooth_field(), {}

    def noted(at: Local, v: Tensor, pulled: Tensor) -> Tensor:
        short = guarded(at, v, pulled)
        shares = (short * pulled).sum(1) / pulled.square().sum(1)
        eye = torch.eye(12).double()
        matched = torch.stack([at.forward(at.sigma**2 * at.pull(at.back(e.expand(len(v), 12)))) for e in eye], 2) + eye
        best = torch.linalg.solve(matched, at.residual)

        def norm(u: Tensor) -> Tensor:
            return torch.einsum("ni,nij,nj->n", u, matched, u)

        for name, share in (("guarded", shares[:, None]), ("published", 1.0)):
            seen.setdefault(name, []).append(float((norm(share * v - best) / norm(best)).max()))
        return short

    monkeypatch.setitem(type(sampler).correction.__globals__, "guarded", noted)
    if isinstance(sampler, TMPD):  # every other datum with its sign turned: the sums of its rows are no bound any more
        like, turn = problem.likelihood.gaussian(), (-1.0) ** torch.arange(12).double()
        turned = GaussianLikelihood(MatrixOperator(turn[:, None] * like.operator.matrix), turn * like.y, 0.02)
        problem = recon.Posterior(problem.prior, turned)
    recon.sample(problem, dataclasses.replace(sampler, steps=24), draws=4)
    assert max(seen["guarded"]) <= 1 + 1e-9
    assert max(seen["published"]) > 2


def test_guarded_pigdm_is_stable_with_its_documented_bias() -> None:
    """As published 16 steps diverge on means of a smooth field; guarded, draws are as near the posterior as the module says."""
    problem = means_of_a_smooth_field()
    exact = problem.exact()
    assert isinstance(exact, GaussianPrior)
    deviation = exact.covariance().diagonal().sqrt()
    _, wild = law(PiGDM(steps=16, guard=False, cg=TIGHT), problem)
    assert float((wild.diagonal() / deviation.square()).mean()) > 3
    run = recon.sample(problem, PiGDM(steps=64), draws=1000, seed=2)
    off = float(((run.mean() - exact.mean) / deviation).square().mean().sqrt())
    ratio = float((run.std() / deviation).square().mean())
    print(f"off {off:.4f} deviations, variance {ratio:.4f} of the exact one")
    # Of 1000 draws with the posterior's correlations R: the error's norm along its longest axis, the mean of its squares.
    R = exact.covariance() / deviation / deviation[:, None]
    assert abs(off - 0.19) < normal_bound() * math.sqrt(float(torch.linalg.eigvalsh(R).max()) / 48 / 1000)
    assert abs(ratio - 0.86) < normal_bound() * math.sqrt(2 * float(R.square().mean()) / 999)


def test_row_sums_are_those_of_data_in_units_of_their_noise() -> None:
    """Every datum in another unit: the same pull."""
    units, problem = torch.tensor([1.0, 300.0, 0.02]).double(), random_problem(4, 3)
    like = problem.likelihood.gaussian()
    other = GaussianLikelihood(
        MatrixOperator(units[:, None] * like.operator.matrix), units * like.y, units * like.sigma
    )
    z = random(5, 4, seed=9)
    same, again = (TMPD().guide(recon.Posterior(problem.prior, one), z, 0.7, 0.5) for one in (like, other))
    torch.testing.assert_close(again, same, rtol=1e-9, atol=1e-9)
