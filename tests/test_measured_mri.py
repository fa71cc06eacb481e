"""Measured multi-coil k-space: coil maps and reconstructions against sigpy on the same data, and against full sampling.

What sigpy computes with the same maps, iterations and regularisation is reproduced to rounding on Cartesian grids, and within
1 % along trajectories.  There the difference is sigpy's gridding at its default accuracy: asked for more, it comes within 1e-4.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from recon.baselines import adjoint_recon, cg_sense, coil_images, rss
from recon.operators import CartesianMRI, NonCartesianMRI, complex_grid
from recon.operators.coils import _sigpy, espirit
from recon.operators.fourier import centred_fft, to_channels, to_complex
from recon.operators.trajectories import density, radial_density

pytestmark = pytest.mark.data


@pytest.fixture(scope="module")
def scans():
    h5py = pytest.importorskip("h5py")
    pytest.importorskip("finufft")
    path = Path(os.environ.get("RECON_DATA", "")) / "mri" / "multicoil_kspace.h5"
    if not path.is_file():
        pytest.skip("needs mri/multicoil_kspace.h5 below RECON_DATA")
    with h5py.File(path) as file:
        yield file


@pytest.fixture(scope="module")
def sigpy():
    pytest.importorskip("sigpy")
    _sigpy("sigpy.mri.app")
    return _sigpy("sigpy")


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def kspace(group) -> torch.Tensor:
    """Scaled so that the largest sample is 1: scanner units are arbitrary."""
    data = group["kspace"][:]
    return torch.from_numpy(data / np.abs(data).max())


def relative(a, b) -> float:
    return float(np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(np.asarray(b)))


def sense(sigpy, y, maps, iterations: int, weight: float, coord=None) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        app = sigpy.mri.app.SenseRecon(
            y.numpy(), maps.numpy(), lamda=weight, coord=coord, max_iter=iterations, show_pbar=False
        )
        return app.run()


def every_third_column() -> np.ndarray:
    mask = np.arange(96) % 3 == 0
    mask[36:60] = True
    return mask


@pytest.mark.parametrize(
    ("name", "weight", "share", "zero_filled", "parallel"),
    [
        # Shares of the samples, and relative distances from the fully sampled image: what was measured, a tenth up.
        pytest.param("brain_8ch_230x180", 0.01, 0.1242, 0.235, 0.118, marks=pytest.mark.slow),
        ("brain_16ch_96x96", 0.0, 0.5, 0.164, 0.0187),
    ],
)
def test_cartesian(scans, sigpy, name, weight, share, zero_filled, parallel):
    group = scans[name]
    full, grid = kspace(group), group["kspace"].shape[1:]
    mask = group["mask_poisson"][:] if "mask_poisson" in group else every_third_column()
    maps = espirit(full)
    power = maps.abs().square().sum(0)
    assert float((power[power > 0] - 1).abs().max()) < 1e-4
    everything, A = CartesianMRI(complex_grid(grid), maps), CartesianMRI(complex_grid(grid), maps, mask)
    assert A.data / everything.data == pytest.approx(share, abs=0.001)
    y, reference = A.sampled(full), to_complex(adjoint_recon(everything, full))
    # The maps explain the measured object: the coil-combined image falls short of the root sum of squares by noise alone.
    combined, squares = reference.abs()[power > 0], rss(coil_images(everything, full))[power > 0]
    assert 0.97 < float(combined.norm() / squares.norm()) <= 1.0
    image = to_complex(cg_sense(A, y, 20, weight))
    assert relative(image, sense(sigpy, y, maps, 20, weight)) < 1e-4
    assert relative(to_complex(adjoint_recon(A, y)), reference) < zero_filled
    assert relative(image, reference) < parallel
    packed = CartesianMRI(complex_grid(grid), maps, mask, packed=True)
    assert relative(to_complex(cg_sense(packed, packed.sampled(full), 20, weight)), image) < 1e-4


@pytest.mark.parametrize(
    ("name", "calibration"),
    [
        ("radial_brick_phantom_16ch_top", 24),
        ("radial_brick_phantom_16ch_bottom", 24),
        ("spiral_phantom_8ch", 24),
        ("spiral_cardiac_8ch", 20),
    ],
)
@pytest.mark.slow
def test_along_trajectories(scans, sigpy, name, calibration):
    group = scans[name]
    n, k, y = int(group.attrs["matrix"]), group["coord"][:], kspace(group)
    weights = density(k, (n, n))
    blind = NonCartesianMRI(complex_grid((n, n)), k, np.ones((len(y), n, n), np.complex64))
    gridded = coil_images(blind, y, weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs, finer = (
            sigpy.nufft_adjoint((y.numpy() * weights).astype(np.complex64), k, (len(y), n, n), **accuracy)
            for accuracy in ({}, {"oversamp": 2, "width": 6})
        )
    assert relative(gridded, theirs) < 0.01
    assert relative(gridded, finer) < 1e-4
    maps = espirit(centred_fft(gridded), calibration)
    A = NonCartesianMRI(complex_grid((n, n)), k, maps)
    # Five iterations, each of which may add the error of the finer gridding.  After 10 or 20, rounding to float32 has moved
    # either answer by 1 % (as far as from its own in float64), which says nothing about the operators.
    fine = sigpy.linop.NUFFT((len(y), n, n), k, oversamp=2, width=6) * sigpy.linop.Multiply((n, n), maps.numpy())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        solved = sigpy.app.LinearLeastSquares(fine, y.numpy(), max_iter=5, show_pbar=False).run()
    image, early = cg_sense(A, y, 20), cg_sense(A, y, 5)
    assert relative(to_complex(early), solved) < 5 * 1e-4
    assert relative(to_complex(early), sense(sigpy, y, maps, 5, 0.0, k)) < 0.01
    # Where rounding moves the answer the data have little to say: what it explains of them is still the same.
    last = to_channels(torch.as_tensor(sense(sigpy, y, maps, 20, 0.0, k)))
    assert relative(A(image), A(last)) < 0.01
    zero = to_channels(torch.zeros(n, n, dtype=torch.complex64))
    misfit = [float((A(x) - y).norm() / y.norm()) for x in (image, early, zero)]
    assert misfit[0] < misfit[1] < misfit[2] == 1.0


def test_spokes_of_the_brick_phantom(scans):
    """69 spokes over a whole turn: the outer samples are 4 apart, so weighting by area gives the sharper image."""
    group = scans["radial_brick_phantom_16ch_top"]
    k = group["coord"][:]
    area, w = radial_density(k), density(k, (192, 192))
    radius = np.linalg.norm(k, axis=-1)
    near = (radius > 2) & (radius < 69 / np.pi * 0.5)  # neighbouring spokes less than half a cycle apart
    assert np.abs(w[near] / area[near] - 1).max() < 0.1
    assert w[radius > 90].max() < 1.01 < area[radius > 90].min()
