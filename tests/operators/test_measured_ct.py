"""Measured X-ray and neutron scans, from the geometry that their files state.

What makes a geometry right is that some image explains the data: the residual of a few conjugate-gradient iterations is
smaller for the stated geometry than for the same scan with its axis moved, its rotation reversed or its detector turned round.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from recon.baselines import cgls, fbp
from recon.datasets.projections import photon_counts, rotation_axis
from recon.operators import LinearOperator, ParallelBeam
from recon.operators.fan_beam import FanBeam, FanGeometry
from recon.space import Space

pytestmark = pytest.mark.data


@pytest.fixture(scope="module")
def scans():
    h5py = pytest.importorskip("h5py")
    path = Path(os.environ.get("RECON_DATA", "")) / "ct" / "measured_projections.h5"
    if not path.is_file():
        pytest.skip("needs ct/measured_projections.h5 below RECON_DATA")
    with h5py.File(path) as file:
        yield file


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def parallel(angles: np.ndarray, columns: int, axis: float, side: int) -> ParallelBeam:
    """A scan with detector columns (and image pixels) of one millimetre whose axis falls on column ``axis``."""
    return ParallelBeam(Space.grid((side, side), 1e-3, "1/m"), angles, columns, 1e-3, ((columns - 1) / 2 - axis) * 1e-3)


def misfit(operator: LinearOperator, y: torch.Tensor, iterations: int = 12) -> float:
    x = cgls(operator, y[None], iterations)
    return float((operator.A(x)[0] - y).norm() / y.norm())


def assert_geometry(y: torch.Tensor, angles: np.ndarray, axis: float, side: int, step: float) -> float:
    """The misfit of the stated geometry, which every wrong one exceeds."""
    columns = y.shape[-1]
    right = misfit(parallel(angles, columns, axis, side), y)
    wrong = {
        f"axis moved by {-step}": parallel(angles, columns, axis - step, side),
        f"axis moved by {step}": parallel(angles, columns, axis + step, side),
        "angles in another order": parallel(np.roll(angles, len(angles) // 5), columns, axis, side),
        "detector turned round": parallel(angles, columns, columns - 1 - axis, side),
    }
    for name, operator in wrong.items():
        assert misfit(operator, y) > right, name
    return right


def test_tooth(scans):
    """APS, 181 views over 179 degrees, raw counts; the axis is documented as about column 296."""
    group = scans["tooth_aps"]
    angles = np.deg2rad(group["angles_deg"][:])
    counts = photon_counts(group["projections"][:], group["flats"][:], group["darks"][:])
    assert not counts.dead.any()
    y, _ = counts.line_integrals()
    axis = rotation_axis(y, angles)
    assert axis == pytest.approx(296.0, abs=1.0)  # first and last view are one degree short of opposite
    binned = y[:, 0].reshape(181, 160, 4).mean(-1)
    assert_geometry(binned, angles, (296.0 - 1.5) / 4, 140, step=0.5)
    image = fbp(parallel(angles, 640, 296.0, 560), y[:, 0], "hann")
    enamel, air = image[230:330, 180:220], image[20:120, 20:540]
    assert float(enamel.max()) > 20 * float(air.std())


def test_diamond_stack(scans):
    """Diamond Light Source 24737, 91 views, one averaged flat and dark; the file states the axis, column 85.8."""
    group = scans["diamond_24737"]
    angles = np.deg2rad(group["angles_deg"][:])
    counts = photon_counts(group["projections"][:], group["flat"][:], group["dark"][:], gain=1.0)
    y, _ = counts.line_integrals()
    stated = float(group.attrs["rotation_centre_column"])
    assert rotation_axis(y, angles) == pytest.approx(stated, abs=0.1)
    for row in (67, 100):
        assert not counts.dead[row].any()
        assert_geometry(y[:, row], angles, stated, 160, step=4.0)


def test_neutron_sinogram(scans):
    """459 views over a whole turn, flat-field corrected; no axis is stated: opposite views give it."""
    transmission = scans["neutron_360/sinogram"][:].astype(np.float64)
    open_beam = np.median(transmission[:, :10])
    y = torch.from_numpy(-np.log(np.maximum(transmission, 0.01 * open_beam) / open_beam)).float()
    angles = np.arange(len(y)) * (2 * math.pi / len(y))
    axis = rotation_axis(y, angles)
    binned = y[::3, :500].reshape(153, 125, 4).mean(-1)
    assert_geometry(binned, angles[::3], (axis - 1.5) / 4, 125, step=0.5)


def helsinki(group, name: str, every: int, turned: int = 1, side: int = 256):
    """Sinogram, operator on a ``side`` x ``side`` grid and reference segmentation of one disc; ``turned`` -1: the wrong way."""
    attrs, disc = group.attrs, group[name]
    angles = np.deg2rad(disc["angles_deg"][::every].astype(np.float64))
    source = float(attrs["distanceSourceOrigin"]) * 1e-3
    total = float(attrs["distanceSourceDetector"]) * 1e-3
    columns, spacing = int(attrs["numDetectorsPost"]), float(attrs["pixelSizePost"]) * 1e-3
    truth = disc["groundtruth_segmentation"][:]
    pixel = float(attrs["effectivePixelSizePost"]) * 1e-3 * len(truth) / side
    geometry = FanGeometry(tuple(turned * angles), columns, spacing, source, total - source)
    operator = FanBeam(Space.grid((side, side), pixel, "1/m"), geometry)
    factor = len(truth) // side
    return (
        torch.from_numpy(disc["sinogram"][::every]).float(),
        operator,
        truth.reshape(side, factor, side, factor).mean((1, 3)) > 0.5,
    )


def matthews(found: np.ndarray, truth: np.ndarray) -> float:
    return float(np.corrcoef(found.ravel().astype(float), truth.ravel().astype(float))[0, 1])


@pytest.mark.parametrize(
    ("name", "every", "least"),
    [("tb", 4, 0.9), ("ta", 2, 0.9), ("tc", 1, 0.0), pytest.param("tb", 1, 0.9, marks=pytest.mark.slow)],
)
def test_helsinki_discs(scans, name, every, least):
    """Fan beam, micro-CT of acrylic discs; the segmentation of a least-squares image against the challenge's reference.

    549 views over 308 degrees, 242 views over 121 and 81 views over 40: the last is a limited-angle problem that no image
    without a prior solves, so its figure is only printed.
    """
    filters = pytest.importorskip("skimage.filters")
    y, operator, truth = helsinki(scans["htc2022"], name, every)
    image = cgls(operator, y[None], 15)[0].numpy()
    score = matthews(image > filters.threshold_otsu(image), truth)
    print(f"HTC2022 {name}, {len(y)} views: Matthews correlation {score:.3f}")
    assert score >= least


def test_helsinki_geometry_is_the_files_own(scans):
    """The other sense of rotation fits the data worse, and its image the reference, too."""
    y, right, truth = helsinki(scans["htc2022"], "tb", 12, side=128)
    _, wrong, _ = helsinki(scans["htc2022"], "tb", 12, turned=-1, side=128)
    assert misfit(right, y) < 0.5 * misfit(wrong, y)
    images = [cgls(operator, y[None], 12)[0].numpy() for operator in (right, wrong)]
    assert matthews(images[0] > images[0].mean(), truth) > matthews(images[1] > images[1].mean(), truth)
