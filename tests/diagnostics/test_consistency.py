"""Self-consistency: exact samplers pass, wrong ones do not, and inferring from the new data alone would blame exact ones."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch

from recon.diagnostics.consistency import Again, measured_again, self_consistency, with_data
from recon.diagnostics.ranks import case_ranks
from recon.diagnostics.verdicts import judge_ranks
from recon.ensemble import Ensemble
from recon.errors import InputError
from recon.likelihoods import GaussianLikelihood, PoissonLikelihood, StackedLikelihood
from recon.likelihoods.base import Likelihood
from recon.operators import MatrixOperator
from recon.posterior import Posterior
from recon.priors import GaussianPrior
from recon.samplers.base import Sampler, State

MATRIX = torch.tensor([[1.0, 0.5, 0.0], [0.0, 0.3, 0.2]], dtype=torch.float64)
Y = torch.tensor([2.0, -1.0], dtype=torch.float64)


@dataclass(frozen=True)
class Closed(Sampler):
    """Draws of the exact Gaussian posterior in one go, spread ``factor`` times and moved by ``shift``."""

    claim: ClassVar = "exact"
    steps: int = 2
    factor: float = 1.0
    shift: float = 0.0

    def init(self, posterior, draws):
        exact = posterior.exact()
        root = torch.linalg.cholesky(exact.covariance())
        noise = draws.normal(0, (3,), "init", dtype=torch.float64) @ root.T
        z = exact.mean + self.factor * noise + self.shift * root.diagonal()
        return State(z, torch.zeros(len(draws), dtype=torch.float64))

    def step(self, posterior, state, k, draws):
        return state


def posterior(sigma=0.5):
    prior = GaussianPrior(torch.zeros(3).double(), torch.ones(3).double())
    return Posterior(prior, GaussianLikelihood(MatrixOperator(MATRIX), Y, sigma))


def exact_draws(problem, n, seed):
    exact = problem.exact()
    law = torch.distributions.MultivariateNormal(exact.mean, exact.covariance())
    torch.manual_seed(seed)
    return Ensemble(law.sample((n,)), problem.space)


@pytest.mark.parametrize(
    ("sampler", "finding"),
    [(Closed(), "calibrated"), (Closed(factor=0.5), "under-dispersed"), (Closed(shift=1.0), "biased")],
    ids=["exact", "narrow", "shifted"],
)
def test_words_for_samplers(sampler, finding):
    problem = posterior()
    functions = {"first": lambda x: x[:, 0], "last": lambda x: x[:, 2]}
    found = self_consistency(problem, exact_draws(problem, 100, 0), Again(sampler, 39, 100), functions)
    assert found.verdicts["overall"].finding == finding
    assert all(len(r) == 100 for r in found.ranks.values())
    assert json.loads(json.dumps(found.summary(), allow_nan=False))["verdicts"]["first"]["cases"] == 100


def test_the_new_data_alone_would_blame_an_exact_sampler():
    problem = posterior(1.0)
    starts = exact_draws(problem, 150, 1).x
    alone, both = [], []
    for case, start in enumerate(starts):
        second = with_data(problem.likelihood, MATRIX @ start + torch.randn(2).double())
        for ranks, like in ((alone, second), (both, StackedLikelihood([problem.likelihood, second]))):
            draws = exact_draws(Posterior(problem.prior, like), 39, 1000 + case).x
            ranks.append(case_ranks(draws, start, {"first": lambda x: x[:, 0]}, case=case)["first"])
    assert judge_ranks(alone, 39).finding == "biased"
    assert judge_ranks(both, 39).strength == 0


def test_two_gaussian_measurements_are_one_of_their_mean():
    problem = posterior()
    x = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    merged = measured_again(problem.likelihood, x, seed=1, case=4)
    y = 2 * merged.y - Y
    assert abs(y - MATRIX @ x).max() < 5 * 0.5
    stacked = StackedLikelihood([problem.likelihood, with_data(problem.likelihood, y)])
    one, two = (Posterior(problem.prior, like).exact() for like in (merged, stacked))
    assert torch.allclose(one.mean, two.mean, rtol=1e-10)
    assert torch.allclose(one.covariance(), two.covariance(), rtol=1e-10)
    assert torch.equal(measured_again(problem.likelihood, x, 1, 4).y, merged.y)
    assert not torch.equal(measured_again(problem.likelihood, x, 1, 5).y, merged.y)


def test_counts_and_mixed_sources_are_measured_again():
    operator = MatrixOperator(MATRIX.abs())
    counts = PoissonLikelihood(operator, torch.tensor([3.0, 1.0], dtype=torch.float64), 20.0)
    x = torch.ones(3).double()
    again = measured_again(counts, x, 0, 0)
    assert isinstance(again, StackedLikelihood)
    first, second = again.sources
    assert first is counts
    assert counts.counts.tolist() == [3.0, 1.0]
    assert second.operator is operator
    assert second.counts.tolist() != [3.0, 1.0]
    assert float(second.gain) == 20.0
    mixed = StackedLikelihood([counts, posterior().likelihood])
    new = with_data(mixed, torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64))
    assert new.sources[0].counts.tolist() == [1.0, 2.0]
    assert new.sources[1].y.tolist() == [3.0, 4.0]
    wave = MatrixOperator(torch.complex(MATRIX, -MATRIX))
    complex_like = GaussianLikelihood(wave, torch.zeros(2, dtype=torch.complex128), 0.1)
    assert measured_again(complex_like, x, 0, 0).y.is_complex()


def test_correlated_noise_keeps_its_volume():
    covariance = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    like = GaussianLikelihood.correlated(MatrixOperator(MATRIX), Y, covariance)
    assert torch.allclose(
        with_data(like, like.y).log_prob(torch.ones(1, 3).double()), like.log_prob(torch.ones(1, 3).double())
    )


def test_bad_input_is_refused_in_words():
    problem = posterior()
    draws = exact_draws(problem, 20, 2)
    with pytest.raises(InputError, match="worth 20: draw more"):
        self_consistency(problem, draws, Again(Closed(), 9, 21))
    weighted = Ensemble(draws.x, draws.space, torch.linspace(0, 9, 20))
    with pytest.raises(InputError, match="20 cases take as many independent draws"):
        self_consistency(problem, weighted, Again(Closed(), 9, 20))
    few = self_consistency(problem, draws, Again(Closed(), 9, 5))
    assert few.verdicts["overall"].finding == "cannot say"
    assert "misfit" in few.ranks

    class Strange(Likelihood):
        operator = None

    with pytest.raises(InputError, match="Strange has no buffer 'counts'"):
        with_data(Strange(), Y)


def test_a_slightly_weighted_ensemble_is_resampled():
    problem = posterior()
    draws = exact_draws(problem, 60, 3)
    weighted = Ensemble(draws.x, draws.space, 0.3 * torch.tensor(np.sin(np.arange(60.0))))
    found = self_consistency(problem, weighted, Again(Closed(), 9, 30), {"first": lambda x: x[:, 0]})
    assert found.verdicts["overall"].strength == 0
    assert math.isfinite(found.ranks["first"][0])
