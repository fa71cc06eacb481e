"""What weighted draws are worth."""

from __future__ import annotations

import json

import numpy as np
import pytest

from recon.diagnostics.weights import pareto_k, weight_health
from recon.errors import InputError


def test_equal_weights_are_worth_their_number():
    health = weight_health(np.full(50, -7.0))
    assert (health.ess, health.entropy_ess, health.largest) == (
        pytest.approx(50),
        pytest.approx(50),
        pytest.approx(0.02),
    )
    assert health.pareto_k is None
    assert health.warnings == ()


def test_figures_of_known_weights():
    health = weight_health(np.log([0.5, 0.25, 0.25]), ancestors=2)
    assert health.ess == pytest.approx(1 / 0.375)
    assert health.entropy_ess == pytest.approx(2**1.5)
    assert health.largest == pytest.approx(0.5)
    assert health.warnings == ("3 draws are worth 2.67", "the draws descend from 2 ancestors")
    one = weight_health([0.0, -np.inf])
    assert (one.ess, one.entropy_ess) == (1.0, 1.0)
    assert json.loads(json.dumps(one.summary()))["draws"] == 2


@pytest.mark.parametrize("draws", [30, 400, 2000])
@pytest.mark.parametrize("spread", [0.3, 1.0, 4.0])
def test_pareto_k_is_that_of_arviz(draws, spread):
    stat = pytest.importorskip("arviz_stats.base").array_stats
    log_w = spread * np.random.default_rng(draws).normal(size=draws)
    # Theirs takes log-ratios with the opposite sign, of a leave-one-out likelihood.
    _, theirs = stat.psislw(-log_w)
    assert pareto_k(log_w) == pytest.approx(float(theirs), rel=1e-8)


def test_heavy_tails_are_warned_of():
    rng = np.random.default_rng(0)
    heavy = weight_health(rng.exponential(size=4000) * 1.2)  # weights of a Pareto law with k = 1.2
    light = weight_health(rng.exponential(size=4000) * 0.2)
    assert heavy.pareto_k == pytest.approx(1.2, abs=0.4)
    assert "too heavy a tail" in heavy.warnings[-1]
    assert light.pareto_k == pytest.approx(0.2, abs=0.3)
    assert light.warnings == ()


def test_weights_that_make_no_tail_have_no_k():
    assert pareto_k(np.zeros(24) + np.arange(24)) is None
    assert pareto_k(np.repeat([0.0, 1.0], 50)) is None
    with pytest.raises(InputError, match="at least one must be finite"):
        pareto_k([-np.inf, -np.inf])
