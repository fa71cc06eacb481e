"""Fan-beam tomography against geometry on paper, against ASTRA, and against parallel beams."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from recon.errors import InputError
from recon.operators import FanBeam, FanGeometry, ParallelBeam
from recon.space import Space
from tests import zoo
from tests.operators.test_parallel_beam import PIXEL, disc, grid

SHAPES = ("flat", "curved")
SCAN = FanGeometry((0.3, 1.7, 3.0, 4.4, -0.5), 90, 1.7e-3, 0.16, 0.09, 5e-3, 0.12)
"""Nothing is zero: offset, tilt, angles."""


def placed(g: FanGeometry) -> tuple[np.ndarray, np.ndarray]:
    """Sources and detectors (views, ..., 2) by the words of the module: rotations of a picture drawn at theta = 0."""
    s, r = g.positions, g.source_distance + g.detector_distance
    x, y = (s, 0 * s) if g.shape == "flat" else (r * np.sin(s / r), r * np.cos(s / r) - r)
    x, y = x * math.cos(g.tilt) - y * math.sin(g.tilt), x * math.sin(g.tilt) + y * math.cos(g.tilt)
    y = y + g.detector_distance
    sources, detectors = [], []
    for theta in g.angles:
        turn = np.array([[math.cos(theta), -math.sin(theta)], [math.sin(theta), math.cos(theta)]])
        sources.append(turn @ [0, -g.source_distance])
        detectors.append((turn @ np.stack([x, y])).T)
    return np.array(sources)[:, None], np.array(detectors)


def chords(g: FanGeometry, centre, radius: float, mu: float) -> torch.Tensor:
    """``2 mu sqrt(r^2 - d^2)`` with the distance d of the disc's centre from every ray."""
    sources, detectors = placed(g)
    ray, away = detectors - sources, np.asarray(centre) - sources
    d = (ray[..., 0] * away[..., 1] - ray[..., 1] * away[..., 0]) / np.hypot(ray[..., 0], ray[..., 1])
    return torch.from_numpy(2 * mu * np.sqrt(np.clip(radius**2 - d**2, 0, None)))


@pytest.mark.parametrize("projector", ["line", "strip", "linear"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_disc_gives_its_chords(shape, projector):
    """With every parameter at work; what remains is the staircase of the pixels, 1.3 % at 20 pixels across the radius."""
    space, centre, radius, mu = grid(96, 96, 1e-3), (0.008, -0.011), 0.02, 20.0
    g = replace(SCAN, shape=shape, projector=projector)
    y, exact = FanBeam(space, g).double()(disc(space, centre, radius, mu)), chords(g, centre, radius, mu)
    assert float((y - exact).norm() / exact.norm()) < 0.02
    middle = exact > 0.5 * exact.max()
    assert float((y[middle].mean() / exact[middle].mean() - 1).abs()) < 1e-3


@pytest.mark.parametrize("shape", SHAPES)
def test_rays_run_from_the_source_to_the_detectors(shape):
    g = replace(SCAN, shape=shape)
    sources, detectors = placed(g)
    rays = g.rays(0, g.views)
    assert np.allclose(rays[..., :2], np.broadcast_to(sources, detectors.shape), atol=1e-15)
    assert np.allclose(rays[..., 2:], detectors - sources, atol=1e-15)
    assert np.allclose(g.rays(2, 4), rays[2:4])
    borders = g.rays(0, g.views, edges=True)
    assert borders.shape == (5, 91, 4)
    finer = replace(g, detectors=2 * 90 + 1, spacing=g.spacing / 2).rays(0, g.views)
    assert np.allclose(borders, finer[:, ::2], atol=1e-15)
    assert np.allclose(rays, finer[:, 1::2], atol=1e-15)


def test_directions_in_words():
    """At theta = 0 the source looks up the page and the detector runs to the right; a quarter turn later it looks left."""
    g = FanGeometry((0.0, math.pi / 2), 41, 2e-3, 0.2, 0.1)
    A = FanBeam(grid(), g).double()
    right, top = disc(grid(), (0.02, 0.0), 0.006), disc(grid(), (0.0, 0.02), 0.006)
    assert np.allclose(g.rays(0, 2)[:, 20], [[0, -0.2, 0, 0.3], [0.2, 0, -0.3, 0]], atol=1e-15)
    # The point (0.02, 0) is 0.2 m from the source of view 0: magnified 0.3 / 0.2 times, 15 detectors to the right.
    columns = (A(torch.stack([right, top])) * torch.arange(41)).sum(-1) / A(torch.stack([right, top])).sum(-1)
    assert columns[0].tolist() == pytest.approx([20 + 15, 20], abs=0.1)
    assert columns[1].tolist() == pytest.approx([20, 20 + 15], abs=0.1)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_positive_offset_moves_the_detector_towards_growing_s(shape):
    g = FanGeometry((0.4, 2.0), 61, 2e-3, 0.2, 0.1, shape=shape)
    image = disc(grid(), (0.004, 0.002), 0.01)
    before, after = (FanBeam(grid(), one).double()(image) for one in (g, replace(g, offset=3 * 2e-3)))
    assert torch.allclose(after[:, :-3], before[:, 3:], atol=1e-6 * float(before.max()))
    assert np.allclose(replace(g, offset=6e-3).range.coords["detector"] - g.range.coords["detector"], 6e-3)


@pytest.mark.parametrize("projector", ["line", "strip"])
def test_astra_itself(projector):
    """ASTRA's own calls for a centred flat detector; its strips take a pixel's width on the detector for a constant."""
    import astra

    ny, nx, angles = 33, 40, np.linspace(0, 2 * math.pi, 17, endpoint=False)
    A = FanBeam(grid(ny, nx), FanGeometry(angles, 60, 1.3 * PIXEL, 150 * PIXEL, 70 * PIXEL, projector=projector))
    scan = astra.create_proj_geom("fanflat", 1.3, 60, angles, 150.0, 70.0)
    pid = astra.create_projector(f"{projector}_fanflat", scan, astra.create_vol_geom(ny, nx))
    x, y = zoo.normal(ny, nx, dtype=torch.float32), zoo.normal(17, 60, dtype=torch.float32)
    first, theirs = astra.create_sino(x.numpy(), pid)
    second, back = astra.create_backprojection(y.numpy(), pid)
    astra.data2d.delete([first, second])
    astra.projector.delete(pid)
    for ours, reference in ((A(x), theirs), (A.A_adjoint(y), back)):
        reference = torch.from_numpy(reference) * PIXEL
        assert float((ours - reference).norm() / reference.norm()) < {"line": 2e-4, "strip": 5e-3}[projector]


def test_measured_views_are_those_of_astra():
    """Rows of ``fanflat_vec`` in metres: offset, tilted, of another step and distance in every view."""
    import astra

    rows = np.asarray(SCAN.measured.vectors) / PIXEL
    rows *= 1 + 0.1 * zoo.normal(*rows.shape).numpy()
    A = FanBeam.from_vectors(grid(20, 24), rows * PIXEL, 31)
    pid = astra.create_projector(
        "line_fanflat", astra.create_proj_geom("fanflat_vec", 31, rows), astra.create_vol_geom(20, 24)
    )
    x = zoo.normal(20, 24, dtype=torch.float32)
    key, theirs = astra.create_sino(x.numpy(), pid)
    astra.data2d.delete(key)
    astra.projector.delete(pid)
    theirs = torch.from_numpy(theirs) * PIXEL
    assert float((A(x) - theirs).norm() / theirs.norm()) < 2e-4


def test_nominal_views_are_measured_ones():
    A = zoo.fan("strip")
    again = FanBeam.from_geometry(A.domain, A.geometry.measured)
    x = zoo.normal(*A.domain.shape, dtype=torch.float32)
    assert torch.allclose(again(x), A(x), atol=1e-6 * float(A(x).abs().max()))
    with pytest.raises(InputError, match="only a flat detector is a source, a centre and a step"):
        zoo.fan(shape="curved").geometry.measured  # noqa: B018


@pytest.mark.parametrize("shape", SHAPES)
def test_every_ray_is_one_of_a_parallel_scan(shape):
    """Ray (theta, gamma) has the angle ``theta - gamma`` and ``s = source_distance sin gamma`` of a parallel beam."""
    g = replace(SCAN, shape=shape, detectors=40)
    x = zoo.normal(24, 20)
    fan = FanBeam(grid(24, 20), g).double()(x)
    gamma = g.fan_angles()
    for view, theta in enumerate(g.angles):
        angles, s = theta - gamma, g.source_distance * np.sin(gamma)
        rows = np.stack([np.sin(angles), -np.cos(angles), s * np.cos(angles), s * np.sin(angles)], 1)
        steps = np.stack([np.cos(angles), np.sin(angles)], 1)
        parallel = ParallelBeam.from_vectors(grid(24, 20), np.concatenate([rows, steps], 1), 1).double()(x)[:, 0]
        assert torch.allclose(fan[view], parallel, atol=1e-6 * float(fan.abs().max()))


@pytest.mark.parametrize("projector", ["line", "strip", "linear"])
@pytest.mark.parametrize("shape", SHAPES)
def test_from_far_away_rays_are_parallel(shape, projector):
    """A source at 1e5 image widths; the rays of both scans differ by 1e-5 pixels."""
    far = 1e5 * 20 * PIXEL
    g = FanGeometry((0.3, 2.0), 41, PIXEL, far, 0.0, 0.3 * PIXEL, shape=shape, projector=projector)
    x = zoo.normal(20, 24)
    parallel = ParallelBeam(grid(20, 24), g.angles, 41, PIXEL, 0.3 * PIXEL, projector).double()(x)
    assert float((FanBeam(grid(20, 24), g).double()(x) - parallel).norm() / parallel.norm()) < 1e-4


@pytest.mark.parametrize("shape", SHAPES)
def test_a_strip_is_the_mean_of_its_lines(shape):
    """Over the opening angle, of 500 lines: kinks of the length cost slope h^2 / 8 each, as for parallel rays."""
    fine, g = 500, replace(zoo.fan("strip", shape).geometry, detectors=3, spacing=6e-3)
    space, edges = Space.grid((5, 4), 1.5e-3, "1/m"), g.fan_angles(edges=True)
    strips = zoo.dense(FanBeam(space, g).double()).reshape(g.views, 3, -1)
    for view, theta in enumerate(g.angles):
        for j in range(3):
            gamma = edges[j] + (np.arange(fine) + 0.5) / fine * (edges[j + 1] - edges[j])
            angles, s = theta - gamma, g.source_distance * np.sin(gamma)
            rows = np.stack([np.sin(angles), -np.cos(angles), s * np.cos(angles), s * np.sin(angles)], 1)
            steps = np.stack([np.cos(angles), np.sin(angles)], 1)
            lines = ParallelBeam.from_vectors(space, np.concatenate([rows, steps], 1), 1).double()
            assert float((zoo.dense(lines).mean(0) - strips[view, j]).abs().max()) < 8 * 1.5e-3 / fine**2 * 4


@pytest.mark.parametrize("projector", ["line", "strip", "linear"])
def test_a_source_beside_the_image_sees_only_ahead(projector):
    """The wide fan of a source two pixels from the image: what lies behind it is not measured."""
    g = FanGeometry((0.0,), 9, 0.03, 12 * PIXEL, 0.0, projector=projector)
    behind = {"y": -14.5 * PIXEL - PIXEL * np.arange(20), "x": grid(20, 20).coords["x"]}
    ones = torch.ones(20, 20, dtype=torch.float64)
    assert float(FanBeam(Space(("y", "x"), (20, 20), behind, "1/m"), g).double()(ones).abs().max()) == 0.0
    assert float(FanBeam(grid(20, 20), g).double()(ones)[0, 4]) > 19 * PIXEL


def test_full_turn_sees_every_corner():
    for shape in SHAPES:
        A = FanBeam.full_turn(Space.grid((12, 17), PIXEL, "1/m"), 12, 0.1, 0.05, shape, "strip").double()
        # Every pixel's mass, divided by its distance from the source: the integral over the opening angle.
        g = A.geometry
        image = torch.zeros(A.domain.shape, dtype=torch.float64)
        image[0, 0] = image[-1, -1] = 1.0
        opening = torch.from_numpy(np.diff(g.fan_angles(edges=True)))
        seen = (A(image) * opening).sum(1)
        x, y = A.domain.coords["x"][[0, -1]], A.domain.coords["y"][[0, -1]]
        sources = placed(g)[0]
        away = np.hypot(x - sources[..., 0], y - sources[..., 1])
        # A pixel h wide at distance r: the mean of 1/r over it is 1/r (1 + O(h^2 / 24 r^2)).
        assert np.allclose(seen.numpy(), (PIXEL**2 / away).sum(1), rtol=1e-4)
        fewer = replace(g, detectors=g.detectors - 2)
        less = (FanBeam(A.domain, fewer).double()(image) * torch.from_numpy(np.diff(fewer.fan_angles(edges=True)))).sum(
            1
        )
        assert bool((less < 0.999 * seen).any())


def test_a_stack_is_its_slices():
    space = Space.grid((3, 6, 11), (1e-3, 1.5e-3, 1.5e-3), "1/m")
    one = zoo.fan("strip", "curved")
    A = FanBeam(space, one.geometry)
    x = zoo.normal(2, 3, 6, 11, dtype=torch.float32)
    assert A.range.dims == ("z", "angle", "detector")
    assert torch.equal(A(x), one(x))


def test_geometries_are_values():
    one = FanGeometry((0.0, 1 / 3), 5, 1e-3, 0.2, 0.1, -2e-4, 0.01, "curved", "strip")
    assert one == FanGeometry(
        np.array([0.0, 1 / 3]), np.int64(5), np.float64(1e-3), 0.2, 0.1, -2e-4, 0.01, "curved", "strip"
    )
    assert one != replace(one, tilt=-0.01)
    assert eval(repr(one)) == one
    assert len({one, eval(repr(one))}) == 1


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"angles": []}, "angles must be a non-empty list"),
        ({"angles": [0.0, 90.0]}, r"more than two turns; if they are degrees, pass numpy\.deg2rad"),
        ({"detectors": 0}, "detectors must be a positive whole number; got 0"),
        ({"spacing": -1e-3}, r"spacing must be a positive length in metres; got -0\.001"),
        ({"source_distance": 0.0}, r"source_distance must be a positive length in metres; got 0\.0"),
        ({"source_distance": math.inf}, "source_distance must be a positive length"),
        ({"detector_distance": -0.1}, r"detector_distance, from the axis, must be a length in metres, not negative; got -0\.1"),
        ({"detector_distance": math.nan}, "detector_distance, from the axis, must be a length"),
        ({"offset": math.nan}, "detector offset must be a finite length in metres; got nan"),
        ({"tilt": 10.0}, r"tilt is in radians, less than a quarter turn; got 10\.0"),
        ({"shape": "round"}, "shape must be one of flat, curved; got 'round'"),
        ({"projector": "cuda"}, "projector must be one of line, strip, linear; got 'cuda'"),
        ({"shape": "curved", "spacing": 0.14}, r"7 detectors 0\.14 m apart reaches 1\.63 radians from its central ray, or"),
        ({"detectors": 7, "spacing": 0.2, "tilt": 1.2}, "or folds back; check spacing, offset and tilt"),
    ],
)  # fmt: skip
def test_scans_that_cannot_be(change, text):
    given = {"angles": [0.0, 1.0], "detectors": 7, "spacing": 1e-3, "source_distance": 0.2, "detector_distance": 0.1}
    with pytest.raises(InputError, match=text):
        FanGeometry(**(given | change))


def test_degrees_are_doubted():
    with pytest.warns(UserWarning, match="span more than a turn"):
        FanGeometry(tuple(range(13)), 5, 1e-3, 0.2, 0.1)


def test_operators_that_cannot_be():
    with pytest.raises(
        InputError, match="FanBeam takes a FanGeometry, or PlanarVectors of beam 'fan'; got ParallelGeo"
    ):
        FanBeam(grid(), zoo.beam().geometry)
    with pytest.raises(InputError, match="FanBeam takes a FanGeometry, or PlanarVectors of beam 'fan'; got PlanarVec"):
        FanBeam(grid(), zoo.beam().geometry.measured)
    with pytest.raises(InputError, match=r"the source of view 1 lies inside the image .*; check source_distance"):
        FanBeam.from_vectors(grid(), [[0, -0.2, 0, 0, 1e-3, 0], [0, -0.04, 0, 0, 1e-3, 0]], 5)
    with pytest.raises(InputError, match="a scan needs at least one view; got 0"):
        FanBeam.full_turn(grid(), 0, 0.2, 0.1)
    with pytest.raises(
        InputError, match=r"the source, 0\.06 m from the axis, turns inside the image, which reaches 0\.067"
    ):
        FanBeam.full_turn(grid(), 9, 0.06, 0.1)
