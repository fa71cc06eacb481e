"""Data against prior, compared with the closed forms of a Gaussian posterior."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from recon.diagnostics.split import data_prior_split, determined_by_band, signal_freedom
from recon.errors import InputError
from recon.likelihoods import GaussianLikelihood
from recon.operators import MatrixOperator
from recon.operators.base import Operator
from recon.operators.cg import CG
from recon.space import Space

D, M, SIGMA, TAU = 12, 7, 0.3, 1.5
RNG = np.random.default_rng(0)
MATRIX = RNG.normal(size=(M, D)) / math.sqrt(D)
SIGMAS = SIGMA * RNG.uniform(0.5, 2.0, size=M)
FISHER = MATRIX.T @ np.diag(SIGMAS**-2.0) @ MATRIX
KERNEL = np.linalg.solve(FISHER + np.eye(D) / TAU**2, FISHER)


def problem():
    return GaussianLikelihood(
        MatrixOperator(torch.tensor(MATRIX)), torch.tensor(RNG.normal(size=M)), torch.tensor(SIGMAS)
    )


@pytest.mark.parametrize("weighted", [False, True])
def test_the_split_is_that_of_the_averaging_kernel(weighted):
    rng = np.random.default_rng(1)
    x, log_w = rng.normal(size=(11, D)) + 2, rng.normal(size=11)
    found = data_prior_split(problem(), x, TAU, 0.5, log_w if weighted else None)
    w = np.exp(log_w) / np.exp(log_w).sum() if weighted else np.full(11, 1 / 11)
    covariance = np.cov(x, rowvar=False, aweights=w)
    unseen = np.eye(D) - KERNEL
    assert np.allclose(found.data, np.diag(KERNEL @ covariance @ KERNEL.T), rtol=1e-6)
    assert np.allclose(found.prior, np.diag(unseen @ covariance @ unseen.T), rtol=1e-6)
    assert np.allclose(found.cross, 2 * np.diag(KERNEL @ covariance @ unseen.T), rtol=1e-6, atol=1e-9)
    assert np.allclose(found.data + found.prior + found.cross, np.diag(covariance), rtol=1e-10)
    shift = w @ x - 0.5
    assert np.allclose(found.null_mean, unseen @ shift, atol=1e-7)
    assert found.null_share == pytest.approx(np.linalg.norm(unseen @ shift) / np.linalg.norm(shift), rel=1e-6)
    summary = json.loads(json.dumps(found.summary()))
    assert summary["data_share"] + summary["prior_share"] + summary["cross_share"] == pytest.approx(1)
    assert summary["filter"] == pytest.approx(1 / TAU**2)


def test_nothing_measured_leaves_all_to_the_prior_and_everything_nothing():
    x = np.random.default_rng(2).normal(size=(6, 3))
    eye = MatrixOperator(torch.eye(3).double())
    blind = data_prior_split(GaussianLikelihood(eye, torch.zeros(3).double(), 1e6), x, 1.0)
    assert np.allclose(blind.prior, x.var(0, ddof=1), rtol=1e-6)
    assert blind.null_share == pytest.approx(1.0, abs=1e-6)
    sharp = data_prior_split(GaussianLikelihood(eye, torch.zeros(3).double(), 1e-4), x, 1.0)
    assert np.allclose(sharp.data, x.var(0, ddof=1), rtol=1e-6)


def test_complex_data_count_as_pairs():
    rng = np.random.default_rng(3)
    parts = rng.normal(size=(2, 4, 5))
    matrix = torch.complex(*torch.tensor(parts))
    rows = np.concatenate(parts)
    x = rng.normal(size=(6, 5))
    one = data_prior_split(GaussianLikelihood(MatrixOperator(matrix), torch.zeros(4, dtype=matrix.dtype), 0.5), x, 1.0)
    two = data_prior_split(GaussianLikelihood(MatrixOperator(torch.tensor(rows)), torch.zeros(8).double(), 0.5), x, 1.0)
    assert torch.allclose(one.data, two.data, rtol=1e-6)
    freedom = [
        signal_freedom(GaussianLikelihood(MatrixOperator(m), torch.zeros(len(m), dtype=m.dtype), 0.5), x)
        for m in (matrix, torch.tensor(rows))
    ]
    assert freedom[0] == pytest.approx(freedom[1], rel=1e-9)


def test_blocks_do_not_matter(monkeypatch):
    x = np.random.default_rng(4).normal(size=(9, D))
    like = problem()
    whole = data_prior_split(like, x, TAU), signal_freedom(like, x)
    monkeypatch.setattr("recon.diagnostics.split.BLOCK", 2)
    assert torch.allclose(data_prior_split(like, x, TAU).cross, whole[0].cross, rtol=1e-7, atol=1e-10)
    assert signal_freedom(like, x) == pytest.approx(whole[1], rel=1e-10)


def test_freedom_is_the_trace_of_the_averaging_kernel_within_its_error():
    covariance = np.linalg.inv(FISHER + np.eye(D) / TAU**2)
    exact = np.trace(np.eye(D) - covariance / TAU**2)
    assert exact == pytest.approx(np.trace(KERNEL))
    rng = np.random.default_rng(5)
    like = problem()
    found = [signal_freedom(like, rng.multivariate_normal(np.ones(D), covariance, size=30)) for _ in range(300)]
    values, errors = np.array(found).T
    assert abs(values.mean() - exact) < 4.5 * values.std() / math.sqrt(300)
    assert errors.mean() == pytest.approx(values.std(), rel=0.15)
    weighted = signal_freedom(like, np.zeros((5, D)) + np.arange(5)[:, None], np.array([0, 0, 0, -np.inf, -np.inf]))
    assert weighted[0] == pytest.approx(signal_freedom(like, np.zeros((3, D)) + np.arange(3)[:, None])[0])


@pytest.mark.parametrize("shape", [(16,), (3, 8, 12)])
def test_bands_are_the_ratio_of_spectra_within_their_errors(shape):
    rng = np.random.default_rng(6)
    axes = 1 if len(shape) == 1 else 2
    spatial = shape[-axes:]
    k = np.sqrt(sum(g**2 for g in np.meshgrid(*[np.fft.fftfreq(n) * min(spatial) for n in spatial], indexing="ij")))
    keep = np.where(np.round(k) <= 2, 0.1, 1.0)  # amplitudes left: the data decided 99 % of the low bands

    def field(n, amplitude):
        over = tuple(range(-axes, 0))
        return np.fft.ifftn(np.fft.fftn(rng.normal(size=(n, *shape)), axes=over) * amplitude, axes=over).real + 5

    bands = determined_by_band(field(60, keep), field(80, 1.0))
    expected = np.where(np.arange(min(spatial) // 2 + 1) <= 2, 0.99, 0.0)
    assert bands.cycles == tuple(range(min(spatial) // 2 + 1))
    assert (np.abs(np.array(bands.determined) - expected) < 4.5 * np.array(bands.errors)).all()
    assert max(bands.errors[1:]) < 0.3
    assert json.loads(json.dumps(bands.summary()))["cycles"][0] == 0


def test_what_cannot_be_split_is_said():
    like = problem()
    one = data_prior_split(like, np.ones((1, D)), TAU)
    assert one.data is None
    assert "one draw has no variance" in one.reason
    assert one.null_mean.shape == (D,)
    assert data_prior_split(like, np.zeros((3, D)), TAU).null_share is None
    assert json.loads(json.dumps(one.summary()))["data_share"] is None
    with pytest.raises(InputError, match="prior_std"):
        data_prior_split(like, np.ones((3, D)), 0.0)
    with pytest.raises(InputError, match="prior_mean is a number or"):
        data_prior_split(like, np.ones((3, D)), 1.0, np.zeros(2))
    with pytest.raises(InputError, match="data_prior_split takes arrays"):
        data_prior_split(like, np.ones((3, D + 1)), 1.0)
    with pytest.raises(InputError, match="at least 2 draws"):
        signal_freedom(like, np.ones((1, D)))
    with pytest.raises(InputError, match="at least 3 draws"):
        determined_by_band(np.ones((2, 4)), np.ones((5, 4)))
    with pytest.raises(InputError, match="of one space"):
        determined_by_band(np.ones((3, 4)), np.ones((5, 5)))
    with pytest.raises(InputError, match="do not spread in every band"):
        determined_by_band(np.ones((3, 4)), np.ones((5, 4)))
    with pytest.raises(InputError, match="cannot be spatial"):
        determined_by_band(np.ones((3, 4)), np.ones((5, 4)), axes=2)

    class Square(Operator):
        def apply(self, x):
            return x**2

    curved = GaussianLikelihood(Square(Space.vector(2), Space.vector(2)), torch.zeros(2), 1.0)
    with pytest.raises(InputError, match="needs a LinearOperator"):
        data_prior_split(curved, np.ones((3, 2)), 1.0)
    assert signal_freedom(curved, np.array([[1.0, 0.0], [2.0, 0.0]]))[0] == pytest.approx(4.5)


def test_one_pixel():
    like = GaussianLikelihood(MatrixOperator(torch.ones(1, 1).double()), torch.zeros(1).double(), 1.0)
    found = data_prior_split(like, np.array([[0.0], [2.0]]), 1.0, cg=CG(5))
    assert found.data.tolist() == pytest.approx([0.5])
    assert found.cross.tolist() == pytest.approx([1.0])
