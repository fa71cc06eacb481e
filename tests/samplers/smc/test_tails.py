"""How heavy the tail of the weights is that the adapted methods make: the power that their module states."""

from __future__ import annotations

import pytest
import torch

import recon
from recon.likelihoods import GaussianLikelihood
from recon.operators import MatrixOperator
from recon.priors import GaussianPrior
from recon.samplers import AFDPS, FPS, MCGDiff
from recon.samplers.smc.adapted import Adapted, log_product
from recon.samplers.smc.particles import Level
from recon.schedules import Schedule


@pytest.mark.parametrize(
    ("sampler", "spread"),
    [(MCGDiff(steps=24), 1.0), (AFDPS(steps=24), 2.0), (FPS(steps=48, spread=1.5), 1.5)],
    ids=lambda value: type(value).__name__,
)
def test_the_tail_of_a_step_has_the_stated_power(sampler: Adapted, spread: float) -> None:
    """log w is a c^2 + ..., c of variance v under the proposal, so P(w > x) falls as x^(-1 / (2 a v)).

    At levels a thousand times the prior's width: its share of the variance is 1e-6.
    """
    ones = torch.ones(2, dtype=torch.float64)
    prior = GaussianPrior(0 * ones, torch.diag(ones) + 0.5, schedule=Schedule(1e-2, 1e4))
    posterior = recon.Posterior(
        prior, GaussianLikelihood(MatrixOperator(torch.tensor([[0.8, -1.5]]).double()), ones[:1], 0.3)
    )
    levels = sampler.levels(posterior)
    seen, row = sampler.seen(posterior), sampler.seen(posterior).rows[0]
    unit, draws = row / row.norm(), recon.draws.Draws(0, [0, 1, 2])
    for k in (1, 2):
        sigma, after = levels[k], levels[k + 1]
        level = Level(k, sigma, after, draws)
        c = sigma * torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
        z = c[:, None] * unit
        before = sampler.sight(posterior, k, draws)
        gap = before.target - z @ seen.rows.T / seen.squares.sqrt()
        log_w = sampler.look(posterior, z, level)["log_psi"] - log_product(gap, before.variance)
        twice_a = float(log_w[0] - 2 * log_w[1] + log_w[2]) / sigma**2
        variance = float(before.variance[0]) * sigma**2 / (float(before.variance[0]) + sigma**2)
        assert 1 / (twice_a * variance) == pytest.approx(1 + spread**2 / (1 - (after / sigma) ** 2), rel=1e-4)


def test_the_defaults_leave_the_estimated_error_a_variance() -> None:
    """A power above four however long the steps are: tau = 1."""
    assert 1 + AFDPS().gamma ** 2 > 4 and 1 + FPS().spread ** 2 > 4
    assert AFDPS().threshold == FPS().threshold == MCGDiff().threshold == 1.0
