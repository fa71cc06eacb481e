"""Coil maps from calibration data, and noise that coils share, against exact laws."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch

from recon.errors import InputError
from recon.likelihoods import GaussianLikelihood
from recon.operators import CartesianMRI, coils, complex_grid
from recon.operators.coils import espirit, mix_coils, noise_covariance, prewhiten, prewhitened
from recon.operators.fourier import centred_fft
from tests import zoo
from tests.bounds import normal_bound


def covariance(n: int, step: int = 40) -> torch.Tensor:
    a = zoo.normal(n, n, step=step, dtype=torch.complex128)
    return a @ a.mH + 0.3 * torch.eye(n)


def smooth_maps(grid: tuple[int, int], count: int) -> torch.Tensor:
    """Gaussian coils around the image with slowly turning phases, ``sum |S|^2 = 1``, phases relative to coil 0."""
    y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in grid), indexing="ij")
    angle = 2 * np.pi * np.arange(count)[:, None, None] / count
    maps = np.exp(-((y - np.sin(angle)) ** 2) - (x - np.cos(angle)) ** 2 + 1j * (angle + y * np.cos(angle)))
    maps = maps / np.sqrt((np.abs(maps) ** 2).sum(0)) * (maps[0].conj() / np.abs(maps[0]))
    return torch.from_numpy(maps)


# --- Maps ---------------------------------------------------------------------------------------------------------------


def object_(grid: tuple[int, int]) -> torch.Tensor:
    y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in grid), indexing="ij")
    disc = (y**2 + x**2 < 0.7).astype(float) * (1 + 0.5 * np.sin(7 * x) * np.cos(5 * y))
    return torch.from_numpy(disc * np.exp(0.6j * y))


@pytest.mark.slow
def test_maps_are_recovered_inside_the_object():
    """Up to what a kernel of 6 samples resolves: a few per cent at the rim, less inside."""
    grid = (40, 36)
    true, image = smooth_maps(grid, 5), object_(grid)
    maps = espirit(centred_fft(true * image), calibration=20)
    power = maps.abs().square().sum(0)
    inside = power > 0
    assert maps.dtype == torch.complex64
    assert float((power[inside] - 1).abs().max()) < 1e-4
    assert bool((maps[0].real[inside] >= 0).all())
    assert float(maps[0].imag.abs().max()) < 1e-6
    body = image.abs() > 0.1
    assert float(inside[body].float().mean()) > 0.98
    corner = torch.zeros(grid, dtype=torch.bool)
    corner[:3, :3] = True
    assert not bool(inside[corner].all())
    difference = (maps - true)[:, body & inside].norm() / true[:, body & inside].norm()
    assert float(difference) < 0.03
    scaled = espirit((1e6 * centred_fft(true * image)).numpy(), calibration=20)
    assert torch.allclose(scaled, maps, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"kspace": np.zeros((3, 8, 8))}, r"complex k-space \(coil, \[kz,\] ky, kx\); got float64 \(3, 8, 8\)"),
        ({"kspace": np.zeros((8, 8), complex)}, "espirit takes complex k-space"),
        ({"calibration": 9}, r"kernel <= calibration <= every axis of k-space \(8, 8\); got 3, 9"),
        ({"kernel": 7, "calibration": 6}, "got 7, 6"),
        ({"kspace": np.zeros((3, 8, 8), complex)}, "the calibration region of k-space is empty"),
        ({"kspace": np.full((3, 8, 8), np.nan + 0j)}, "NaN or infinite"),
        (
            {"kspace": np.arange(8) % 2 * np.ones((3, 8, 8)) * (1 + 0j)},
            "18 of the 36 samples of the calibration region",
        ),
    ],
)
def test_data_that_cannot_be_calibrated_on(change, text):
    given = {"kspace": np.ones((3, 8, 8), complex), "calibration": 6, "kernel": 3} | change
    with pytest.raises(InputError, match=text):
        espirit(given.pop("kspace"), **given)


def test_sigpy_is_imported_without_mpi_where_there_is_no_mpi_library(monkeypatch):
    seen = []

    def need(module: str, extra: str) -> object:
        seen.append((module, extra, sys.modules.get("mpi4py", "absent")))
        if sys.modules.get("mpi4py", "absent") is not None:
            raise RuntimeError("cannot load MPI library")
        return math

    monkeypatch.setattr(coils, "need", need)
    monkeypatch.setitem(sys.modules, "mpi4py", np)
    monkeypatch.setitem(sys.modules, "sigpy", np)  # half imported by the attempt that failed
    assert coils._sigpy("sigpy.mri.app") is math
    assert seen == [("sigpy.mri.app", "mri", np), ("sigpy.mri.app", "mri", None)]
    assert sys.modules["mpi4py"] is np
    assert "sigpy" not in sys.modules


def test_without_sigpy(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "sigpy"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sigpy", None)
    with pytest.raises(InputError, match=r"needs the Python package 'sigpy.mri.app'.*pip install 'recon\[mri\]'"):
        espirit(np.ones((3, 8, 8), complex), calibration=6, kernel=3)


# --- Noise --------------------------------------------------------------------------------------------------------------


def test_covariance_of_noise():
    n = torch.tensor([[1 + 1j, 0, 2], [1j, 3, 0]])
    expected = torch.tensor([[2 + 4, (1 + 1j) * -1j], [1j * (1 - 1j), 1 + 9]]) / 3
    assert torch.allclose(noise_covariance(n), expected.to(torch.complex128))
    assert torch.allclose(noise_covariance(n[..., None].numpy()), expected.to(torch.complex128))
    sigma, count = 0.7, 40_000
    white = sigma * zoo.normal(2, count, dtype=torch.complex128)  # each part of standard deviation sigma
    c = noise_covariance(white)
    # |n|^2 / (2 sigma^2) is exponential: mean 1, standard deviation 1.  Products of two coils likewise, by complex parts.
    bound = normal_bound(4) * 2 * sigma**2 / math.sqrt(count)
    assert float((c - 2 * sigma**2 * torch.eye(2)).abs().max()) < bound
    for wrong in (n.real, n[0], n * math.nan):
        with pytest.raises(InputError, match="noise samples are finite complex numbers"):
            noise_covariance(wrong)
    with pytest.raises(InputError, match="a covariance of 3 coils needs at least as many noise samples; got 2"):
        noise_covariance(n.T)


def test_prewhitening_matrix():
    c = covariance(4)
    w = prewhiten(c)
    assert torch.allclose(w @ c @ w.mH, torch.eye(4, dtype=torch.complex128), atol=1e-12)
    assert torch.equal(w, w.tril())
    with pytest.raises(InputError, match="must be Hermitian; it differs"):
        prewhiten(c + 1j * torch.eye(4))
    with pytest.raises(InputError, match="must be positive definite"):
        prewhiten(c - 2 * float(c.abs().max()) * torch.eye(4))
    with pytest.raises(InputError, match=r"finite \(coil, coil\) matrix; got \(4, 3\)"):
        prewhiten(c[:, :3])


OPERATORS = {
    "full grid": lambda: zoo.scan(),
    "packed": lambda: zoo.scan(packed=True),
    "real": lambda: zoo.scan(real=True),
    "trajectory": lambda: zoo.spokes(),
}


@pytest.mark.parametrize("name", list(OPERATORS))
def test_whitened_maps_and_data_give_the_posterior_of_correlated_noise(name):
    """Against the density ``-n^H C^-1 n`` itself, and against the likelihood that whitens after the operator."""
    A, c = OPERATORS[name]().double(), covariance(3)
    y = zoo.normal(*A.range.shape, step=6, dtype=torch.complex128)
    y = A.sampled(y) if name == "full grid" else y
    white = GaussianLikelihood(*prewhitened(A, y, c))
    x = zoo.normal(4, *A.domain.shape, step=7)
    r = (y - A(x)).reshape(4, 3, -1)
    density = -torch.einsum("ncs,cd,nds->n", r.conj(), torch.linalg.inv(c), r).real
    whitened = GaussianLikelihood.correlated(A, y, c, "coil")
    for like in (white, whitened):
        got = like.log_prob(x)
        assert torch.allclose(got - got[0], density - density[0], rtol=1e-10)
    assert torch.allclose(white.operator.normal(x), whitened.operator.A_adjoint(whitened.operator.A(x)), atol=1e-9)
    assert torch.allclose(white.operator.A(x), whitened.operator.A(x), atol=1e-10)
    assert white.operator.range.unit == "1"
    assert torch.equal(A(x), OPERATORS[name]().double()(x))  # the operator given is left alone


def test_independent_noise_of_sigma_has_twice_its_square_as_covariance():
    """The factor sqrt(2): the same exact posterior as the likelihood with that sigma per part."""
    A, sigma = zoo.scan().double(), 0.3
    y = A.sampled(zoo.normal(*A.range.shape, step=6, dtype=torch.complex128))
    plain, white = (
        GaussianLikelihood(A, y, sigma),
        GaussianLikelihood(*prewhitened(A, y, 2 * sigma**2 * torch.eye(3).double())),
    )
    x = zoo.normal(4, *A.domain.shape, step=7)
    one, other = plain.log_prob(x), white.log_prob(x)
    assert torch.allclose(one - one[0], other - other[0], rtol=1e-11)
    M, W = zoo.dense(A), zoo.dense(white.operator)
    assert torch.allclose(W.T @ W, M.T @ M / sigma**2, atol=1e-10)  # the precision of the data
    back = [like.operator.A_adjoint(like.y / like.sigma**2) for like in (plain, white)]
    assert torch.allclose(*back, atol=1e-10)


def test_white_noise_is_white():
    """Correlated noise, whitened, has variance 1 in every real and imaginary part."""
    A, c, count = CartesianMRI(complex_grid((40, 50)), zoo.coil_maps(3, 40, 50)), covariance(3), 2000
    noise = torch.tensordot(torch.linalg.cholesky(c), zoo.normal(3, 40, 50, dtype=torch.complex128), 1) / math.sqrt(2)
    _, white, sigma = prewhitened(A, noise, c)
    parts = torch.view_as_real(white).movedim(-1, 0).reshape(6, -1)
    spread = parts @ parts.T / count
    assert sigma == 1.0
    # Squares of a normal number: mean 1, variance 2; products of two: mean 0, variance 1.
    assert float((spread - torch.eye(6)).abs().max()) < normal_bound(21) * math.sqrt(2 / count)


def test_mixing_is_refused_where_it_cannot_be():
    A = zoo.scan()
    with pytest.raises(InputError, match=r"finite square matrix of them; got \(2, 2\)"):
        mix_coils(A, np.eye(2))
    with pytest.raises(InputError, match="the covariance is of 2 coils; the operator has 3"):
        prewhitened(A, torch.zeros(A.range.shape, dtype=torch.complex64), covariance(2))
    with pytest.raises(InputError, match=r"prewhitened takes arrays"):
        prewhitened(A, torch.zeros(3, 5, 5, dtype=torch.complex64), covariance(3))


def test_mixing_keeps_shapes_and_layouts():
    A = zoo.scan(packed=True).double()
    x, w = zoo.normal(2, *A.domain.shape), zoo.normal(3, 3, dtype=torch.complex128)
    assert torch.allclose(mix_coils(A, w.numpy())(x), torch.einsum("cd,nds->ncs", w, A(x)), atol=1e-12)
    one = zoo.scan((4, 6), coils=None).double()
    b = zoo.normal(2, *one.domain.shape)
    mixed = mix_coils(one, np.array([[2j]]))
    assert torch.allclose(mixed.normal(b), 4 * one.normal(b), atol=1e-12)
    x = mixed.solve(b, 0.5)
    assert torch.allclose(mixed.normal(x) + 0.5 * x, b, atol=1e-5)
