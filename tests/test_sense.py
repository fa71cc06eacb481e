"""Reconstructions of magnetic resonance data without a prior, against dense solutions and inverse transforms."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from recon.baselines import adjoint_recon, cg_sense, coil_images, rss
from recon.errors import InputError
from recon.operators import CartesianMRI, NonCartesianMRI, complex_grid
from recon.operators.fourier import centred_ifft, to_channels, to_complex
from recon.operators.trajectories import radial, radial_density
from tests import zoo


def relative(a, b) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("make", [zoo.scan, lambda: zoo.scan(packed=True), zoo.spokes, lambda: zoo.scan(real=True)])
def test_cg_sense_is_the_regularised_least_squares_solution(make):
    A = make().double()
    y, M = zoo.normal(2, *A.range.shape, dtype=torch.complex128), zoo.dense(A)
    flat = torch.view_as_real(y).flatten(1)
    exact = torch.linalg.solve(M.T @ M + 0.2 * torch.eye(M.shape[1]).double(), M.T @ flat.T).T.reshape(
        2, *A.domain.shape
    )
    assert relative(cg_sense(A, y, 100, 0.2), exact) < 1e-9
    assert relative(cg_sense(A, y[0], 100, 0.2), exact[0]) < 1e-9
    assert relative(cg_sense(A, y, 2, 0.2), exact) > 1e-3


def test_cg_sense_with_weights():
    A, w = zoo.spokes().double(), zoo.normal(2, 9, step=5).abs()
    y, M = zoo.normal(2, *A.range.shape, dtype=torch.complex128), zoo.dense(A)
    W = torch.diag(w.flatten().repeat(3).repeat_interleave(2))
    flat = torch.view_as_real(y).flatten(1)
    exact = torch.linalg.solve(M.T @ W @ M + 0.2 * torch.eye(M.shape[1]).double(), M.T @ W @ flat.T).T
    assert relative(cg_sense(A, y, 100, 0.2, w).flatten(1), exact) < 1e-9
    assert relative(cg_sense(A.float(), y.to(torch.complex64), 60, 0.2, w).flatten(1).double(), exact) < 1e-4


def test_coil_images_are_inverse_transforms():
    A = zoo.scan().double()
    y = A.sampled(zoo.normal(2, *A.range.shape, dtype=torch.complex128))
    images = coil_images(A, y)
    assert images.shape == (2, 3, 5, 6)
    assert relative(images, centred_ifft(y)) < 1e-13
    packed = zoo.scan(packed=True).double()
    assert relative(coil_images(packed, y[..., packed.mask]), images) < 1e-13
    volume = zoo.scan((3, 4, 2), coils=2).double()
    kspace = volume.sampled(zoo.normal(*volume.range.shape, dtype=torch.complex128))
    assert relative(coil_images(volume, kspace), centred_ifft(kspace, 3)) < 1e-13
    assert relative(coil_images(zoo.scan(real=True).double(), y), images) < 1e-13


def test_root_of_the_sum_of_squares():
    z = torch.tensor([3 + 4j, 12.0]).reshape(2, 1, 1).expand(2, 2, 3)
    assert torch.allclose(rss(z), torch.full((2, 3), 13.0))
    assert torch.allclose(rss(z[None, :, None], dim=-4), torch.full((1, 1, 2, 3), 13.0))


def test_full_sampling_is_inverted_whatever_the_scale_of_the_maps():
    grid = (6, 7)
    maps = zoo.coil_maps(3, *grid)
    maps[:, 0, :2] = 0
    A = CartesianMRI(complex_grid(grid), maps)
    image = zoo.normal(*grid, dtype=torch.complex64)
    image[0, :2] = 0
    x = to_channels(image)
    assert relative(adjoint_recon(A, A(x)), x) < 1e-5
    assert bool((adjoint_recon(A, A(x))[:, 0, :2] == 0).all())


def test_gridding_is_an_image_in_the_right_units():
    """A Gaussian, which neither the disc of spokes nor the field of view cuts off, comes back to a few per cent."""
    grid = (32, 32)
    y, x = np.meshgrid(*(np.arange(n) - n // 2 for n in grid), indexing="ij")
    image = torch.from_numpy(2.5 * np.exp(-((y - 3) ** 2 + (x + 2) ** 2) / 18 + 0.1j * x)).to(torch.complex64)
    A = NonCartesianMRI(complex_grid(grid), radial(64, 64, 32), torch.ones(1, *grid, dtype=torch.complex64))
    kspace = A(to_channels(image))
    by_area = to_complex(adjoint_recon(A, kspace, radial_density(A.trajectory)))
    by_iteration = to_complex(adjoint_recon(A, kspace))
    assert relative(by_area, image) < 0.05
    assert relative(by_iteration, image) < 0.05
    assert relative(coil_images(A, kspace)[0], by_iteration) < 1e-5


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: cg_sense(zoo.matrix(), torch.zeros(5)),
            "cg_sense takes CartesianMRI or NonCartesianMRI; cgls and tv take",
        ),
        (lambda: adjoint_recon(zoo.matrix(), torch.zeros(5)), "adjoint_recon takes CartesianMRI"),
        (lambda: coil_images(zoo.matrix(), torch.zeros(5)), "coil_images takes CartesianMRI"),
        (
            lambda: cg_sense(zoo.scan(), torch.zeros(3, 5, 6) + 0j, 0),
            "iterations >= 1 and regularisation >= 0; got 0, 0.0",
        ),
        (lambda: cg_sense(zoo.scan(), torch.zeros(3, 5, 6) + 0j, 3, -1.0), "got 3, -1.0"),
        (lambda: cg_sense(zoo.scan(), torch.zeros(3, 5, 6) + 0j, weights=np.ones(3)), "weights are for non-Cartesian"),
        (lambda: adjoint_recon(zoo.scan(), torch.zeros(3, 5, 6) + 0j, np.ones(3)), "weights are for non-Cartesian"),
        (lambda: coil_images(zoo.scan(), torch.zeros(3, 5) + 0j), "coil_images takes arrays"),
    ],
)
def test_what_is_refused(call, text):
    with pytest.raises(InputError, match=text):
        call()
