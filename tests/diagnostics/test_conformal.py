"""Recalibrated intervals cover further cases as promised, and refuse other problems."""

from __future__ import annotations

import json
import math
from datetime import date

import numpy as np
import pytest
import torch
from scipy import stats

from recon.diagnostics.conformal import (
    Scope,
    case_need,
    recalibrate,
    recalibration_from,
    scope_of,
    stretched,
)
from recon.errors import InputError
from recon.likelihoods import GaussianLikelihood, PoissonLikelihood
from recon.operators import MatrixOperator
from recon.posterior import Posterior
from recon.priors import GaussianPrior
from recon.samplers import MMPS

SCOPE = Scope("A", "sigma", "p", "s", 19, "toys")
PIXELS = 16


def case(rng, factor):
    """Draws and truth of a smooth field; the truth is wider by ``factor``, and cases differ in scale."""
    scale = rng.uniform(0.5, 2.0)

    def field(n):
        return scale * (0.8 * rng.normal(size=(n, 1)) + 0.6 * rng.normal(size=(n, PIXELS)))

    return field(19), factor * field(1)[0]


def inside(x, t, recalibration):
    low, high = stretched(x, recalibration, SCOPE)
    t = torch.tensor(t)
    return float(((t >= low) & (t <= high)).double().mean())


@pytest.mark.parametrize("factor", [0.4, 2.0])
def test_a_further_case_is_covered_as_promised(factor):
    rng = np.random.default_rng(0)
    by_case, on_average, raw = [], [], []
    for _ in range(80):
        needs = [case_need(*case(rng, factor)) for _ in range(19)]
        x, t = case(rng, factor)
        by_case.append(inside(x, t, recalibrate(needs, SCOPE, 0.9, 0.2, "case")) >= 0.9)
        on_average.append(inside(x, t, recalibrate(needs, SCOPE, 0.9, guarantee="average")))
        raw.append(case_need(x, t).excess)
    # ceil(20 * 0.8)/20 = 0.8 exactly, for continuous needs.
    assert abs(np.mean(by_case) - 0.8) < stats.norm.isf(1e-5 / 2) * math.sqrt(0.16 / 80)
    assert np.mean(on_average) >= 0.9 - stats.norm.isf(1e-5) * np.std(on_average) / math.sqrt(80)
    uncovered = np.mean([e > 0 for e in raw])
    assert uncovered > 0.25 if factor > 1 else uncovered < 0.02


def test_too_wide_intervals_shrink_and_never_cross():
    rng = np.random.default_rng(1)
    needs = [case_need(*case(rng, 0.1)) for _ in range(30)]
    found = recalibrate(needs, SCOPE)
    assert found.stretch < -0.5
    x, _ = case(rng, 0.1)
    low, high = stretched(x, found, SCOPE)
    assert bool((low <= high).all())


def test_the_stretch_is_the_right_order_statistic():
    from recon.diagnostics.conformal import Need

    needs = [Need(np.array([i - 1.0, i, i + 0.5, i + 1])) for i in range(9)]
    # level 0.75: the third of four pixels, i + 1/2; alpha 0.2: the ceil(10 * 0.8) = 8th of nine.
    assert recalibrate(needs, SCOPE, 0.75, 0.2).stretch == 7.5
    # average, level 0.5: (n R + 1)/(n + 1) <= 1/2, so n R <= 4: the weight beyond l is 4 at most.
    stretch = recalibrate(needs, SCOPE, 0.5, guarantee="average").stretch
    values = np.sort(np.concatenate([n.excess for n in needs]))
    assert (values > stretch).sum() / 4 <= 4
    assert (values >= stretch).sum() / 4 > 4


@pytest.mark.parametrize(
    ("guarantee", "cases", "enough"),
    [("case", 8, False), ("case", 9, True), ("average", 8, False), ("average", 9, True)],
)
def test_too_few_cases_promise_nothing(guarantee, cases, enough):
    rng = np.random.default_rng(2)
    needs = [case_need(*case(rng, 1.0)) for _ in range(cases)]
    found = recalibrate(needs, SCOPE, 0.9, 0.1, guarantee)
    assert (found.stretch is not None) == enough
    if not enough:
        assert "at least 9 are needed" in found.reason
        with pytest.raises(InputError, match="has no number: 8 calibration cases"):
            stretched(case(rng, 1.0)[0], found, SCOPE)


def test_it_is_stored_with_its_scope_and_refuses_others():
    rng = np.random.default_rng(3)
    found = recalibrate([case_need(*case(rng, 1.0)) for _ in range(12)], SCOPE, day=date(2024, 2, 29))
    assert found.day == "2024-02-29"
    again = recalibration_from(json.loads(json.dumps(found.summary())))
    assert again == found
    other = Scope("A", "sigma", "p", "s", 64, "toys")
    with pytest.raises(InputError, match="of 2024-02-29 does not hold here: draws: 19 against 64"):
        stretched(case(rng, 1.0)[0], again, other)
    with pytest.raises(InputError, match="not a stored recalibration"):
        recalibration_from({"stretch": 1.0})


def posterior(matrix, y, sigma, scale=1.0):
    prior = GaussianPrior(torch.zeros(3).double(), scale * torch.ones(3).double())
    return Posterior(prior, GaussianLikelihood(MatrixOperator(matrix), y, sigma))


def test_the_scope_knows_the_problem_but_not_its_data():
    matrix, y = torch.eye(3).double()[:2], torch.zeros(2).double()
    one = scope_of(posterior(matrix, y, 0.1), MMPS(steps=20), 19, "toys")
    assert one.differences(scope_of(posterior(matrix, y + 1, 0.1), MMPS(steps=20), 19, "toys")) == []
    changed = {
        "operator": scope_of(posterior(2 * matrix, y, 0.1), MMPS(steps=20), 19, "toys"),
        "noise": scope_of(posterior(matrix, y, 0.2), MMPS(steps=20), 19, "toys"),
        "prior": scope_of(posterior(matrix, y, 0.1, 2.0), MMPS(steps=20), 19, "toys"),
        "sampler": scope_of(posterior(matrix, y, 0.1), MMPS(steps=21), 19, "toys"),
        "population": scope_of(posterior(matrix, y, 0.1), MMPS(steps=20), 19, "others"),
    }
    for name, other in changed.items():
        (difference,) = one.differences(other)
        assert difference.startswith(f"{name}: ")
    counts = PoissonLikelihood(MatrixOperator(matrix), y + 3)
    prior = GaussianPrior(torch.zeros(3).double(), torch.ones(3).double())
    more = PoissonLikelihood(MatrixOperator(matrix), y + 5)
    scopes = [scope_of(Posterior(prior, like), MMPS(steps=20), 19, "toys") for like in (counts, more)]
    assert scopes[0] == scopes[1]


def test_bad_input_is_refused_in_words():
    rng = np.random.default_rng(4)
    x, t = case(rng, 1.0)
    with pytest.raises(InputError, match="no intervals to stretch: 90% intervals need 19"):
        case_need(x[:10], t)
    with pytest.raises(InputError, match="collapsed"):
        case_need(np.ones_like(x), t)
    with pytest.raises(InputError, match="do not spread in 1 of 16 pixels"):
        case_need(np.where(np.arange(PIXELS) == 2, 0.0, x), t)
    with pytest.raises(InputError, match="compares with a truth"):
        case_need(x, None)
    with pytest.raises(InputError, match="at least one case"):
        recalibrate([], SCOPE)
