"""Ranks that are uniform for exchangeable draws, ties included, and that see what they should."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scipy import stats

from recon.diagnostics.ranks import case_ranks, probes, rank, rank_histogram, tarp_fraction, tarp_rank
from recon.diagnostics.verdicts import judge_all, judge_ranks
from recon.errors import InputError
from recon.likelihoods import GaussianLikelihood
from recon.operators import MatrixOperator


def test_a_rank_is_counted_and_ties_are_spread():
    values = np.array([1.0, 2.0, 2.0, 5.0])
    assert rank(values, 3.0, 0.5) == pytest.approx(3.5 / 5)
    assert rank(values, 2.0, 0.0) == pytest.approx(1 / 5)
    assert rank(values, 2.0, 1.0) == pytest.approx(4 / 5)
    assert rank(values, 0.0, 0.0) == 0
    assert rank(values, 9.0, 1.0) == 1
    # Equal log-weights change nothing; a draw without weight is not there.
    assert rank(values, 3.0, 0.5, np.zeros(4)) == pytest.approx(3.5 / 5)
    assert rank(values, 3.0, 0.5, np.array([0, 0, 0, -np.inf])) == pytest.approx(3.5 / 4)


def test_ranks_of_exchangeable_whole_numbers_are_uniform():
    rng = np.random.default_rng(0)
    counts = rng.poisson(1.0, size=(4000, 8, 1)).astype(float)
    one = {"value": lambda x: x[:, 0]}
    u = [case_ranks(c[1:], c[0], one, case=i)["value"] for i, c in enumerate(counts)]
    assert stats.kstest(u, "uniform").pvalue > 1e-5
    floored = np.floor(np.array(u) * 8)
    assert stats.chisquare(np.bincount(floored.astype(int), minlength=8)).pvalue > 1e-5


def test_ranks_are_the_same_numbers_for_the_same_case():
    rng = np.random.default_rng(1)
    x, t = rng.normal(size=(9, 4, 4)), rng.normal(size=(4, 4))
    assert case_ranks(x, t, seed=3, case=5) == case_ranks(torch.tensor(x), torch.tensor(t), seed=3, case=5)
    assert case_ranks(x, t, seed=3, case=5) != case_ranks(x, t, seed=3, case=6)


def test_weighted_ranks_of_importance_draws_are_near_uniform():
    rng = np.random.default_rng(2)
    u = []
    for case in range(400):
        x = 1.2 * rng.normal(size=(200, 1))
        log_w = (-(x**2) / 2 + x**2 / (2 * 1.44))[:, 0]
        u.append(case_ranks(x, rng.normal(size=1), {"x": lambda v: v[:, 0]}, log_w, case=case)["x"])
    assert judge_ranks(u, 100).finding == "calibrated"


def test_probes_see_what_pixels_cannot():
    rng = np.random.default_rng(3)
    found = {name: [] for name in probes((6, 6))}
    assert {"mean", "rms", "variation", "wave along axis 0", "wave along axis 1"} < set(found)
    for case in range(60):
        truth = np.full((6, 6), rng.normal())  # constant, while draws are rough, with the same law in each pixel
        for name, value in case_ranks(rng.normal(size=(19, 6, 6)), truth, case=case).items():
            found[name].append(value)
    verdicts = judge_all(found, 19)
    pixel = next(name for name in found if name.startswith("pixel"))
    assert verdicts["variation"].finding == "biased"
    assert verdicts["mean"].finding == "under-dispersed"
    assert verdicts[pixel].strength == 0
    assert verdicts["overall"].finding == "biased"


def test_the_misfit_sees_draws_that_ignore_the_data():
    rng = np.random.default_rng(4)
    found = {"mean": [], "misfit": []}
    for case in range(80):
        truth = rng.normal(size=3)
        like = GaussianLikelihood(
            MatrixOperator(torch.eye(3).double()), torch.tensor(truth + 0.3 * rng.normal(size=3)), 0.3
        )
        ranks = case_ranks(rng.normal(size=(19, 3)), truth, probes((3,), like), case=case)
        for name in found:
            found[name].append(ranks[name])
    verdicts = judge_all(found, 19)
    assert verdicts["mean"].strength == 0  # prior draws are calibrated, on average
    assert verdicts["misfit"].finding == "biased"


def test_one_pixel_and_flat_arrays_have_their_probes():
    assert list(probes((1,))) == ["mean"]
    assert list(probes((1, 1))) == ["mean"]
    assert "wave along axis 0" not in probes((1, 5))
    assert 0 < case_ranks(np.zeros((3, 1)), np.zeros(1))["mean"] < 1


def test_tarp_is_that_of_sbi():
    sbi = pytest.importorskip("sbi.diagnostics.tarp")
    rng = np.random.default_rng(5)
    draws, truth, reference = (torch.tensor(rng.normal(size=s)) for s in ((30, 200, 4), (200, 4), (200, 4)))
    fractions = torch.tensor([tarp_fraction(draws[:, i], truth[i], reference[i]) for i in range(200)])
    away = (draws - reference).norm(dim=2) < (truth - reference).norm(dim=1)
    assert torch.allclose(fractions.double(), away.double().mean(0), atol=1e-12)
    ecp, _ = sbi._run_tarp(draws, truth, reference, num_bins=10)
    ours = torch.histogram(fractions.float(), bins=10, density=True).hist.cumsum(0)
    assert torch.allclose(ecp[1:].double(), (ours / ours[-1]).double(), atol=1e-6)


def test_tarp_needs_references_that_know_the_data():
    rng = np.random.default_rng(6)
    blind, seeing, right = [], [], []
    for case in range(200):
        truth = rng.normal(size=5)
        y = truth + 0.3 * rng.normal(size=5)
        ignoring = rng.normal(size=(20, 5))
        exact = y / 1.09 + np.sqrt(0.09 / 1.09) * rng.normal(size=(20, 5))
        blind.append(tarp_rank(ignoring, truth, rng.normal(size=5), case=case))
        near = y + 0.3 * rng.normal(size=5)
        seeing.append(tarp_rank(ignoring, truth, near, case=case))
        right.append(tarp_rank(exact, truth, near, case=case))
    assert judge_ranks(blind, 20).strength == 0
    assert judge_ranks(seeing, 20).finding == "biased"
    assert judge_ranks(right, 20).strength == 0


def test_histograms_count_and_bound():
    rng = np.random.default_rng(7)
    flat = rank_histogram(rng.uniform(size=1000), 9)
    assert sum(flat.counts) == 1000
    assert len(flat.counts) == 10
    assert flat.expected == 100
    assert flat.outside == ()
    assert rank_histogram(rng.uniform(size=50), 99).expected == 10
    peaked = rank_histogram(rng.beta(4, 4, size=1000), 9)
    assert {0, 9} <= set(peaked.outside)
    assert json.loads(json.dumps(peaked.summary()))["counts"] == list(peaked.counts)
    alarms = sum(rank_histogram(rng.uniform(size=200), 9, false_alarm=0.05).outside != () for _ in range(600))
    assert alarms <= stats.binom.isf(1e-5, 600, 0.05)
    assert rank_histogram([1.0, 0.0], 3, bins=2).counts == (1, 1)


def test_bad_input_is_refused_in_words():
    x, t = np.zeros((4, 3)), np.zeros(3)
    with pytest.raises(InputError, match="must answer one number per draw"):
        case_ranks(x, t, {"bad": lambda v: v})
    with pytest.raises(InputError, match="one number per draw; apply a test function"):
        rank(x, 0.0, 0.5)
    with pytest.raises(InputError, match="has no rank"):
        rank(x[:, 0], np.nan, 0.5)
    with pytest.raises(InputError, match="the truth must be"):
        tarp_rank(x, t, np.zeros(2))
    with pytest.raises(InputError, match="at least one bin"):
        rank_histogram([0.5], 3, bins=0)
    with pytest.raises(InputError, match="fractions"):
        rank_histogram([1.5], 3)
    with pytest.raises(InputError, match="compares with a truth"):
        case_ranks(x, None)
