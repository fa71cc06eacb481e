"""Feldkamp's reconstruction against objects whose projections are known on paper."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch

from recon.baselines import cgls, fdk
from recon.baselines.fdk import full_turn_weights
from recon.checks import check_batch
from recon.errors import InputError
from recon.operators import ConeBeam, ConeGeometry
from recon.space import Space
from tests import zoo

D, L, RADIUS, MU = 0.05, 0.075, 0.01, 25.0  # a short distance: a fan of 50 degrees


def circle(n: int = 32, **changes) -> ConeGeometry:
    """A detector as fine as n voxels of a 32 mm cube, views so that neighbours are a voxel apart at its rim."""
    width = 0.032 * L / D
    given = {
        "angles": np.arange(3 * n) * (2 * math.pi / (3 * n)) + 0.1, "rows": n, "detectors": n + n // 2,
        "spacing": width / n, "source_distance": D, "detector_distance": L - D,
    }  # fmt: skip
    return ConeGeometry(**(given | changes))


def scanner(n: int = 32, **changes) -> ConeBeam:
    return ConeBeam(Space.grid((5, n, n + 2), 0.032 / n, "1/m"), circle(n, **changes))


def chords(A: ConeBeam, centre=(0.0, 0.0, 0.0), radius=RADIUS, upright=False) -> torch.Tensor:
    """``2 mu sqrt(r^2 - d^2)`` of every ray through a ball; of an upright cylinder, over the cosine to the horizontal."""
    vectors = np.array(A.geometry.measured.vectors)[:, None, None]
    i = (np.arange(A.geometry.rows) - (A.geometry.rows - 1) / 2)[None, :, None, None]
    j = (np.arange(A.geometry.detectors) - (A.geometry.detectors - 1) / 2)[None, None, :, None]
    along = vectors[..., 3:6] + j * vectors[..., 6:9] + i * vectors[..., 9:12] - vectors[..., :3]
    along = along / np.linalg.norm(along, axis=-1, keepdims=True)
    away, level = np.array(centre) - vectors[..., :3], np.ones(along.shape[:-1])
    if upright:
        level = np.linalg.norm(along[..., :2], axis=-1)
        along, away = along[..., :2] / level[..., None], away[..., :2]
        d = np.abs(along[..., 0] * away[..., 1] - along[..., 1] * away[..., 0])
    else:
        d = np.linalg.norm(np.cross(away, along), axis=-1)
    return torch.from_numpy(2 * MU * np.sqrt(np.clip(radius**2 - d**2, 0, None)) / level)


def within(A: ConeBeam, radius: float, centre=(0.0, 0.0)) -> torch.Tensor:
    """Voxels of a slice whose centre is less than ``radius`` away from ``centre``."""
    x, y = A.domain.coords["x"][None, :], A.domain.coords["y"][:, None]
    return torch.from_numpy((x - centre[0]) ** 2 + (y - centre[1]) ** 2 < radius**2)


def test_a_ball_and_a_cylinder_have_their_attenuation_in_the_middle_plane():
    """Away from the rim the sampled ramp leaves the aliases of a projection that ends like a square root; they fall with
    the voxel, unevenly, as the rim falls on or between detectors.  Half a voxel at the rim is ``1 / 2n`` of the volume's
    width: the mean is closer than that, and the root mean square than half of it."""
    for upright in (False, True):
        inside, spread = [], []
        for n in (16, 32, 64):
            A = scanner(n).double()
            x = fdk(A, chords(A, upright=upright))
            assert x.shape == A.domain.shape
            middle = x[2][within(A, 0.75 * RADIUS)]
            inside.append(abs(float(middle.mean()) / MU - 1))
            spread.append(float((middle / MU - 1).square().mean().sqrt()))
            assert inside[-1] < 1 / (2 * n)
            assert spread[-1] < 1 / (4 * n)
            outside = x[2][~within(A, 1.25 * RADIUS) & within(A, 0.015)]
            assert float(outside.abs().max()) < 1.5 / n * MU
        assert spread[0] > 3 * spread[2]


def test_a_ball_off_the_axis_stands_where_it_is():
    A = scanner().double()
    centre = (9e-3, -7e-3)
    image = fdk(A, chords(A, (*centre, 0.0), 4e-3))[2].clamp(min=0)
    weight = image * within(A, 5e-3, centre)
    for dim, expected, axis in (("x", centre[0], 0), ("y", centre[1], 1)):
        place = torch.from_numpy(np.asarray(A.domain.coords[dim]))
        assert float((weight.sum(axis) * place).sum() / weight.sum()) == pytest.approx(expected, abs=0.05e-3)
    assert float(image[within(A, 2.5e-3, centre)].mean()) == pytest.approx(MU, rel=1 / 128)


def test_rows_and_slices_correspond():
    """A small ball above the plane of the source and off the axis, where rows move apart and together from view to view; a
    detector that is shifted upwards, with rows wider than columns."""
    geometry = circle(row_spacing=1.7e-3, rows=26, row_offset=3e-3)
    A = ConeBeam(Space.grid((21, 32, 34), (0.8e-3, 1e-3, 1e-3), "1/m"), geometry).double()
    centre = (11e-3, 3e-3, 4e-3)
    x = fdk(A, chords(A, centre, 3e-3))
    column = x[:, within(A, 1.5e-3, centre)].mean(1) / MU
    away = np.abs(np.asarray(A.domain.coords["z"]) - centre[2])
    assert (away < 2e-3).sum() == 5
    assert float((column[away < 2e-3] - 1).abs().max()) < 0.02  # exact in the plane of the source only, 5 degrees below
    assert float(column[away > 3.8e-3].abs().max()) < 0.05


def test_lengths_are_metres():
    A = scanner(16).double()
    y = chords(A)
    big = ConeBeam(
        Space.grid(A.domain.shape, 2 * 0.002, "1/m"),
        circle(16, spacing=2 * A.geometry.spacing, source_distance=2 * D, detector_distance=2 * (L - D)),
    ).double()
    assert torch.allclose(fdk(big, y), fdk(A, y) / 2, rtol=1e-10, atol=1e-12)


def test_it_starts_where_least_squares_goes():
    """The projector's own data: close to the volume, and closer to the answer of cgls."""
    A = scanner(24)
    truth = (MU * within(A, 8e-3).float() * torch.linspace(0.9, 1.1, 24)[:, None]).expand(A.domain.shape)
    y = A(truth)
    once, solved = fdk(A, y), cgls(A, y[None], 10)[0]
    assert float((once[2] - truth[2]).norm() / truth[2].norm()) < 0.2  # the edge of the disc, over a voxel
    assert float((once[2] - solved[2]).norm() / solved[2].norm()) < 0.2
    inside = within(A, 6e-3)
    assert float(((once - truth)[2][inside]).abs().max() / MU) < 0.05


def test_draws_do_not_meet_and_types_are_kept(monkeypatch):
    A = scanner(16)
    y = zoo.normal(4, *A.range.shape, dtype=torch.float32)
    check_batch(lambda y: fdk(A, y), y, tolerance=1e-6)
    x = fdk(A, y.reshape(2, 2, *A.range.shape))
    assert (x.shape, x.dtype) == ((2, 2, *A.domain.shape), torch.float32)
    assert fdk(A, y[:0]).shape == (0, *A.domain.shape)
    monkeypatch.setattr(sys.modules["recon.baselines.fdk"], "_VOXELS", 1)  # the package has a function of that name
    assert torch.equal(fdk(A, y), x.flatten(0, 1))
    wide = fdk(A.double(), y.double())
    assert float((wide - fdk(A.float(), y)).norm() / wide.norm()) < 1e-5


def test_views_weigh_the_angle_they_stand_for():
    angles = np.array([0.0, 0.5, 1.5, 3.0, 4.5, 6.0])
    weights = full_turn_weights([*angles, 0.5 + 2 * math.pi])
    assert weights.sum() == pytest.approx(2 * math.pi)
    assert weights[3] == pytest.approx(1.5)
    assert weights[1] + weights[6] == pytest.approx(0.75)
    # More views on one side than on the other change nothing.
    uneven = np.concatenate([np.arange(0, 96, 2), np.arange(1, 48, 2)]) * (2 * math.pi / 96)
    A = scanner(angles=uneven).double()
    x = fdk(A, chords(A))[2]
    assert float(x[within(A, 0.75 * RADIUS)].mean()) == pytest.approx(MU, rel=1 / 64)


def test_filters():
    A = scanner(16).double()
    y = chords(A) + 0.05 * zoo.normal(*A.range.shape)
    rough = {f: float(fdk(A, y, f)[2].diff().square().sum()) for f in ("ramp", "shepp-logan", "cosine", "hann")}
    assert rough["ramp"] > rough["shepp-logan"] > rough["cosine"] > rough["hann"]
    with pytest.raises(InputError, match="filter must be one of ramp, .*; got 'box'"):
        fdk(A, y, "box")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"pitch": 1e-3}, r"fdk needs a circular scan with an upright detector; got pitch 0\.001 m \(cgls and tv"),
        ({"tilt": 0.1}, r"got tilt 0\.1 rad \(cgls and tv"),
        (
            {"offset": 0.02},
            r"sees both sides of the axis alike; the offset 0\.02 m leaves 0\.01.* m on the narrow side .*cgls",
        ),
        ({"angles": np.linspace(0, 4, 40)}, r"needs views around a full turn; these leave 130\.\d degrees out \(cgls"),
        ({"angles": [0.0]}, "needs views around a full turn; these leave 360 degrees out"),
    ],
)
def test_scans_that_the_formula_does_not_cover(change, text):
    A = scanner(**change)
    with pytest.raises(InputError, match=text):
        fdk(A, torch.zeros(A.range.shape))


def test_a_small_offset_is_part_of_the_geometry():
    A = scanner(offset=1.3e-3, row_offset=-0.4e-3).double()
    x = fdk(A, chords(A))
    assert float(x[2][within(A, 0.75 * RADIUS)].mean()) == pytest.approx(MU, rel=1 / 64)


def test_other_operators_and_shapes():
    A = scanner(16)
    with pytest.raises(InputError, match=r"fdk inverts ConeBeam; got ParallelBeam"):
        fdk(zoo.beam(), torch.zeros(5, 13))
    measured = ConeBeam(A.domain, A.geometry.measured)
    with pytest.raises(InputError, match="needs a circular scan given as ConeGeometry; got measured vectors"):
        fdk(measured, torch.zeros(measured.range.shape))
    with pytest.raises(InputError, match=r"fdk takes arrays \(\*batch, .*\); got shape"):
        fdk(A, torch.zeros(3, 4))
