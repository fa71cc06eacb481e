"""Parallel-beam tomography against geometry on paper, against lines by hand, and against three other implementations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from recon.errors import InputError
from recon.operators import ParallelBeam, ParallelGeometry, PlanarVectors
from recon.space import Space
from tests import zoo

PROJECTORS = ("line", "strip", "linear")
PIXEL = 2e-3


def grid(ny=48, nx=48, pixel=PIXEL):
    return Space.grid((ny, nx), pixel, "1/m")


def disc(space: Space, centre=(0.0, 0.0), radius=0.02, mu=20.0, fine=8):
    """A disc of attenuation ``mu`` about ``centre`` (x, y), each pixel the mean over ``fine`` x ``fine`` points."""
    pixel = space.spacing("y")
    offsets = (np.arange(fine) + 0.5) / fine - 0.5
    y = (space.coords["y"][:, None] + offsets * pixel).ravel()[:, None]
    x = (space.coords["x"][:, None] + offsets * pixel).ravel()[None, :]
    inside = (x - centre[0]) ** 2 + (y - centre[1]) ** 2 < radius**2
    ny, nx = space.shape
    return torch.from_numpy(mu * inside.reshape(ny, fine, nx, fine).mean(axis=(1, 3)))


def centre_of_mass(A: ParallelBeam, y: torch.Tensor) -> np.ndarray:
    positions = torch.from_numpy(A.geometry.positions)
    return ((y * positions).sum(-1) / y.sum(-1)).numpy()


# --- The convention -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 3.3e-3, -5e-3])
def test_a_point_is_seen_where_the_formula_says(offset):
    """``s = x cos theta + y sin theta``, in metres, whatever the offset of the detector."""
    angles = np.array([0.0, 0.4, math.pi / 2, 2.0, 3.5, -1.0])
    A = ParallelBeam(grid(40, 56), angles, spacing=PIXEL / 4, offset=offset, projector="strip").double()
    image = torch.zeros(40, 56, dtype=torch.float64)
    row, column = 7, 41
    image[row, column] = 1.0
    x, y = A.domain.coords["x"][column], A.domain.coords["y"][row]
    assert x > 0
    assert y > 0
    expected = x * np.cos(angles) + y * np.sin(angles)
    assert np.abs(centre_of_mass(A, A(image)) - expected).max() < 0.02 * PIXEL


def test_directions_in_words():
    A = ParallelBeam(grid(), [0.0, math.pi / 2], 48, projector="strip").double()
    right, top = torch.zeros(2, 48, 48, dtype=torch.float64)
    right[:, 40] = 1.0
    top[7, :] = 1.0
    along_y, _ = A(right)
    _, along_x = A(top)
    assert int(along_y.argmax()) == 40  # theta = 0 looks along y; its detector runs with the columns
    assert int(along_x.argmax()) == 48 - 1 - 7  # theta = pi/2 looks along x; its detector runs up the page
    assert float(along_y.max()) == pytest.approx(48 * PIXEL)


def test_a_positive_offset_moves_the_detector_towards_growing_s():
    """The detector moves right, so the axis of rotation falls on a smaller column: (J - 1)/2 - offset/spacing."""
    angles, offset = np.linspace(0, math.pi, 7), 3 * PIXEL
    image = disc(grid(), radius=0.008)
    centred = ParallelBeam(grid(), angles, 61, PIXEL, 0.0, "strip").double()
    shifted = ParallelBeam(grid(), angles, 61, PIXEL, offset, "strip").double()
    before, after = centred(image), shifted(image)
    assert torch.allclose(after[:, :-3], before[:, 3:], atol=1e-6 * float(before.max()))
    column = float((after[0] * torch.arange(61)).sum() / after[0].sum())
    assert column == pytest.approx((61 - 1) / 2 - 3, abs=1e-3)
    assert np.allclose(shifted.range.coords["detector"] - centred.range.coords["detector"], offset)


def test_opposite_views_mirror():
    A = ParallelBeam(grid(40, 30), [0.7, 0.7 + math.pi], projector="strip").double()
    one, other = A(zoo.normal(40, 30).abs())
    assert torch.allclose(one, other.flip(0), atol=1e-5 * float(one.max()))


# --- The scale ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("projector", PROJECTORS)
@pytest.mark.parametrize("spacing", [0.5, 1.0])
def test_a_disc_gives_its_chords(projector, spacing):
    """``2 mu sqrt(r^2 - s^2)``; what remains is the staircase of the pixels, 1.3 % at 20 pixels across the radius."""
    space, centre, radius, mu = grid(96, 96, 1e-3), (0.008, -0.011), 0.02, 20.0
    A = ParallelBeam(space, np.arange(30) * math.pi / 30, spacing=spacing * 1e-3, projector=projector).double()
    y = A(disc(space, centre, radius, mu))
    theta, s = np.array(A.geometry.angles)[:, None], A.geometry.positions[None, :]
    s = s - centre[0] * np.cos(theta) - centre[1] * np.sin(theta)
    exact = torch.from_numpy(2 * mu * np.sqrt(np.clip(radius**2 - s**2, 0, None)))
    assert float((y - exact).norm() / exact.norm()) < 0.02
    middle = exact > 0.5 * exact.max()
    assert float((y[middle].mean() / exact[middle].mean() - 1).abs()) < 1e-3


@pytest.mark.parametrize(
    ("projector", "tolerance"),
    # The strip keeps every pixel's mass (float32 kernels remain); the other two sample it with rays a pixel apart.
    [("strip", 1e-4), ("line", 3e-3), ("linear", 3e-3)],
)
def test_mass_is_the_same_in_every_view(projector, tolerance):
    space = grid()
    A = ParallelBeam(space, np.linspace(0, 2 * math.pi, 40), projector=projector).double()
    image = disc(space, (0.006, 0.01), 0.025)
    mass = A(image).sum(1) * A.geometry.spacing
    assert float((mass / (image.sum() * PIXEL**2) - 1).abs().max()) < tolerance


def test_wide_detectors_keep_the_mass_with_strips():
    image = zoo.normal(48, 48).abs()
    A = ParallelBeam(grid(), np.linspace(0, 3, 10), spacing=3.7 * PIXEL, projector="strip").double()
    assert torch.allclose(A(image).sum(1) * 3.7 * PIXEL, image.sum() * PIXEL**2, rtol=1e-4)


def test_lengths_are_metres():
    """The same numbers in pixels twice as large are twice as long."""
    small, large = (ParallelBeam.half_turn((16, 16), pixel, 9).double() for pixel in (1e-3, 2e-3))
    x = zoo.normal(16, 16)
    assert torch.allclose(2 * small(x), large(x), rtol=1e-6)


@pytest.mark.parametrize("projector", PROJECTORS)
@pytest.mark.parametrize("detectors", [16, 17])
def test_rays_along_pixel_borders_count_once(projector, detectors):
    """With an odd detector over an even image the rays of theta = 0 and pi/2 run between the pixels."""
    A = ParallelBeam(grid(16, 16), [0.0, math.pi / 2, math.pi], detectors, projector=projector).double()
    y = A(torch.ones(16, 16, dtype=torch.float64))[:, 1:-1]
    assert torch.allclose(y, torch.full_like(y, 16 * PIXEL), rtol=1e-5)


def test_a_ray_between_two_pixels_counts_half_in_each():
    A = ParallelBeam(grid(4, 4), np.arange(4) * math.pi / 2, 5).double()
    columns, rows = torch.zeros(2, 4, 4, dtype=torch.float64)
    columns[:, 1] = rows[2, :] = 1.0
    half = 2 * PIXEL * torch.tensor([0.0, 1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    for image, view, expected in (
        (columns, 0, half),
        (columns, 2, half.flip(0)),
        (rows, 1, half),
        (rows, 3, half.flip(0)),
    ):
        assert torch.allclose(A(image)[view], expected, rtol=1e-6)


def chord(ray: np.ndarray, x: float, y: float, pixel: float) -> float:
    """Length of a line (point, direction) in a square about (x, y): the overlap of two intervals."""
    point, direction = ray[:2] - (x, y), ray[2:] / np.hypot(*ray[2:])
    low, high = -math.inf, math.inf
    for p, d in zip(point, direction, strict=True):
        ends = sorted(((-pixel / 2 - p) / d, (pixel / 2 - p) / d))
        low, high = max(low, ends[0]), min(high, ends[1])
    return max(high - low, 0.0)


def line_matrix(A: ParallelBeam) -> np.ndarray:
    rays = A.geometry.rays(0, A.geometry.views).reshape(-1, 4)
    y, x = np.meshgrid(A.domain.coords["y"], A.domain.coords["x"], indexing="ij")
    return np.array([[chord(r, a, b, A.pixel) for a, b in zip(x.ravel(), y.ravel(), strict=True)] for r in rays])


def test_every_length_is_right():
    """Weights are float32 numbers of exact lengths; pieces below 1e-9 pixels are left out."""
    A = zoo.shifted_beam("line")
    assert np.abs(zoo.dense(A.double()).numpy() - line_matrix(A)).max() < 6e-8 * math.sqrt(2) * A.pixel


@pytest.mark.parametrize("turned", [False, True])
def test_a_strip_is_the_mean_of_its_lines(turned):
    """Midpoints of h = width/500: wrong by slope h^2 / 8 at each of four kinks of the length over s, by h / 2 at two jumps."""
    angles = [0.3, -2.0, 0.9] if not turned else [0.0, math.pi / 2]
    fine, width = 500, 1.7 * PIXEL
    strips = ParallelBeam(grid(5, 4), angles, 3, width, 0.4 * PIXEL, "strip").double()
    lines = ParallelBeam(grid(5, 4), angles, 3 * fine, width / fine, 0.4 * PIXEL).double()
    mean = zoo.dense(lines).reshape(len(angles), 3, fine, -1).mean(2)
    error = (zoo.dense(strips).reshape(mean.shape) - mean).abs().max()
    assert float(error) < (2 * PIXEL / fine if turned else 4 * PIXEL / fine**2)


def test_the_default_detector_sees_every_corner():
    for A in (ParallelBeam.half_turn((7, 12), PIXEL, 36, projector="strip").double(), zoo.off_centre_beam().double()):
        image = torch.zeros(A.domain.shape, dtype=torch.float64)
        image[0, 0] = image[0, -1] = image[-1, 0] = image[-1, -1] = 1.0
        if A.geometry.projector == "strip":
            mass = A(image).sum(1) * A.geometry.spacing
            assert torch.allclose(mass, torch.full_like(mass, 4 * PIXEL**2), rtol=1e-4)
        corners = [(x, y) for x in A.domain.coords["x"][[0, -1]] for y in A.domain.coords["y"][[0, -1]]]
        reach = max(math.hypot(abs(x) + A.pixel / 2, abs(y) + A.pixel / 2) for x, y in corners)
        assert reach <= A.geometry.positions[-1] + A.geometry.spacing / 2 < reach + A.geometry.spacing


# --- Other implementations ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("projector", PROJECTORS)
def test_astra_itself(projector):
    """ASTRA's own forward and back projection calls, in pixels and centred as most people use it."""
    import astra

    ny, nx, detectors, angles = 33, 40, 60, np.linspace(0, math.pi, 23, endpoint=False)
    A = ParallelBeam(grid(ny, nx), angles, detectors, 0.9 * PIXEL, projector=projector)
    volume = astra.create_vol_geom(ny, nx)
    pid = astra.create_projector(projector, astra.create_proj_geom("parallel", 0.9, detectors, angles), volume)
    x = zoo.normal(ny, nx, dtype=torch.float32)
    y = zoo.normal(len(angles), detectors, dtype=torch.float32)
    first, theirs = astra.create_sino(x.numpy(), pid)
    second, back = astra.create_backprojection(y.numpy(), pid)
    astra.data2d.delete([first, second])
    astra.projector.delete(pid)
    for ours, reference in ((A(x), theirs), (A.A_adjoint(y), back)):
        reference = torch.from_numpy(reference) * PIXEL
        assert float((ours - reference).norm() / reference.norm()) < 1e-4  # their rays go through float32 geometry


@pytest.mark.parametrize("projector", PROJECTORS)
def test_measured_views_are_those_of_astra(projector):
    """Rows of ``parallel_vec`` in metres: every view has its own direction, centre and oblique step."""
    import astra

    angles = np.array([0.2, 1.9, -0.7])
    cos, sin, turned = np.cos(angles), np.sin(angles), angles + np.array([0.2, -0.3, 0.1])
    shift, step = np.array([2.0, -1.0, 0.5]), np.array([0.8, 1.1, -0.9])
    rows = np.stack([3 * sin, -3 * cos, shift * cos, shift * sin, step * np.cos(turned), step * np.sin(turned)], 1)
    metres = rows * [1, 1, *[PIXEL] * 4]
    A = ParallelBeam.from_vectors(grid(20, 24), metres, 31, projector)
    scan = astra.create_proj_geom("parallel_vec", 31, rows)
    pid = astra.create_projector(projector, scan, astra.create_vol_geom(20, 24))
    x = zoo.normal(20, 24, dtype=torch.float32)
    key, theirs = astra.create_sino(x.numpy(), pid)
    astra.data2d.delete(key)
    astra.projector.delete(pid)
    theirs = torch.from_numpy(theirs) * PIXEL
    assert float((A(x) - theirs).norm() / theirs.norm()) < 1e-4


def test_scikit_image():
    """radon rotates the image with interpolation: the same sinogram to 2 % on a smooth phantom."""
    from skimage.transform import radon

    n, degrees = 64, np.arange(0, 180, 12.0)
    space = grid(n, n)
    image = disc(space, (0.012, 0.009), 0.03, 10.0) + disc(space, (-0.02, 0.02), 0.012, 20.0)
    theirs = radon(image.numpy(), theta=degrees, circle=True).T * PIXEL  # (angle, detector), n detectors a pixel apart
    A = ParallelBeam(space, np.deg2rad(degrees), n).double()
    # radon turns about pixel n // 2, half a pixel right and below the centre that recon uses.
    c = PIXEL / 2
    moved = ParallelBeam(
        Space(("y", "x"), (n, n), {"y": space.coords["y"] + c, "x": space.coords["x"] - c}, "1/m"),
        np.deg2rad(degrees), n, PIXEL, -c,
    ).double()  # fmt: skip
    ours = moved(image).numpy()
    assert np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) < 0.02
    assert np.linalg.norm(A(image).numpy() - theirs) > np.linalg.norm(ours - theirs)


def test_deepinv():
    """Tomography rotates with bilinear interpolation, with its own geometry: the same sinogram to 0.5 % (strips)."""
    import deepinv

    n, degrees = 64, torch.arange(0, 180, 12.0)
    space = grid(n, n)
    image = disc(space, (0.012, 0.009), 0.03, 10.0).float() + disc(space, (-0.02, 0.02), 0.012, 20.0).float()
    theirs = deepinv.physics.Tomography(angles=degrees, img_width=n, circle=True, normalize=False)(image[None, None])
    A = ParallelBeam(space, np.deg2rad(degrees.numpy()), n, projector="strip")
    theirs = theirs[0, 0].T * PIXEL  # (detector, angle) there
    assert float((A(image) - theirs).norm() / theirs.norm()) < 0.005


# --- Stacks and measured views ------------------------------------------------------------------------------------------


def test_a_stack_is_its_slices():
    space = Space.grid((3, 9, 8), (5e-3, PIXEL, PIXEL), "1/m")
    A, one = (
        ParallelBeam(space, [0.1, 1.0], 13, projector="strip"),
        ParallelBeam(grid(9, 8), [0.1, 1.0], 13, projector="strip"),
    )
    assert (A.range.dims, A.range.shape) == (("z", "angle", "detector"), (3, 2, 13))
    assert np.array_equal(A.range.coords["z"], space.coords["z"])
    x, y = zoo.normal(4, 3, 9, 8, dtype=torch.float32), zoo.normal(4, 3, 2, 13, dtype=torch.float32)
    assert torch.equal(A(x), one(x))
    assert torch.equal(A.A_adjoint(y), one.A_adjoint(y))
    assert A.bytes == one.bytes  # slices share the matrix


def test_nominal_views_are_measured_ones():
    A = zoo.shifted_beam("strip")
    rows = A.geometry.measured
    again = ParallelBeam.from_vectors(A.domain, rows.vectors, 9, "strip")
    x = zoo.normal(*A.domain.shape, dtype=torch.float32)
    assert torch.allclose(again(x), A(x), atol=1e-6 * float(A(x).abs().max()))
    assert again.geometry == rows
    assert eval(repr(rows)) == rows
    assert rows != PlanarVectors(rows.vectors, 9, "parallel", "line")
    assert len({rows, eval(repr(rows))}) == 1
    assert ParallelBeam.from_geometry(A.domain, rows).geometry == rows


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        (
            [],
            r"vectors must be \(views, 6\) finite numbers in metres: ray direction, detector centre, .*; got shape \(0,\)",
        ),
        ([[1.0] * 5], r"vectors must be \(views, 6\) .* got shape \(1, 5\)"),
        ([[0, 1, 0, 0, math.nan, 0]], r"vectors must be \(views, 6\) finite"),
        ([[0, 1, 0, 0, 1, 0], [1, 0, 0, 0, 2, 0]], "the rays of view 1 run along the detector"),
        ([[0, 0, 0, 0, 1, 0]], "the rays of view 0 run along the detector, or a direction or step is zero"),
        ([[0, 1, 0, 0, 0, 0]], "the rays of view 0 run along the detector, or a direction or step is zero"),
    ],
)
def test_views_that_cannot_be(rows, text):
    with pytest.raises(InputError, match=text):
        ParallelBeam.from_vectors(grid(4, 4), rows, 5)


def test_whole_scans_bring_their_own_numbers():
    rows = zoo.measured_beam().geometry
    with pytest.raises(InputError, match="beam must be 'parallel' or 'fan'; got 'cone'"):
        PlanarVectors(rows.vectors, 8, "cone")
    with pytest.raises(InputError, match="takes a whole scan with parallel rays"):
        ParallelBeam.from_geometry(grid(4, 4), zoo.fan().geometry.measured)
    with pytest.raises(InputError, match="which brings its own detectors and projector; got .* detectors=5"):
        ParallelBeam(grid(4, 4), rows, 5)


# --- What is refused or doubted -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "degrees", [np.arange(13), np.arange(0, 12.5, 0.5), [0, 10, 5], -np.arange(8.0), np.linspace(-5, 5, 101)]
)
def test_degrees_within_two_turns_are_doubted(degrees):
    with pytest.warns(
        UserWarning, match=r"round numbers from .* span more than a turn; if they are degrees, pass numpy"
    ):
        ParallelBeam(grid(4, 4), degrees, 5)


@pytest.mark.parametrize(
    "radians",
    [
        [0.0, 1.0, 2.0],
        [0.0, 7.0],
        [0.3, -2.0, 7.0, 1.2],
        np.linspace(0, 4 * math.pi, 100),
        np.linspace(0, 2 * math.pi, 361),
        np.arange(50) * 2.399963 % (4 * math.pi),
        np.deg2rad(np.arange(0, 720, 0.5)),
        np.zeros(5),
    ],
)
def test_scans_in_radians_are_not(radians):
    assert ParallelGeometry(tuple(radians), 5, 1e-3).views == len(radians)


# --- What is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"angles": []}, "angles must be a non-empty list of finite numbers"),
        ({"angles": 0.5}, "angles must be a non-empty list of finite numbers"),
        ({"angles": [[0.0, 1.0]]}, "angles must be a non-empty list of finite numbers"),
        ({"angles": [0.0, math.nan]}, "angles must be a non-empty list of finite numbers"),
        ({"angles": [0.0, 90.0]}, r"reach 90, more than two turns; if they are degrees, pass numpy\.deg2rad\(angles\)"),
        ({"detectors": 0}, "detectors must be a positive whole number; got 0"),
        ({"detectors": 2.5}, "detectors must be a positive whole number; got 2.5"),
        ({"detectors": math.nan}, "detectors must be a positive whole number; got nan"),
        ({"spacing": -1e-3}, r"detector spacing must be a positive length in metres; got -0\.001"),
        ({"spacing": 0.0, "detectors": None}, "detector spacing must be a positive length"),
        ({"spacing": math.nan, "detectors": None}, "detector spacing must be a positive length"),
        ({"offset": math.inf}, "detector offset must be a finite length in metres; got inf"),
        ({"projector": "fan"}, "projector must be one of line, strip, linear; got 'fan'"),
    ],
)
def test_scans_that_cannot_be(change, text):
    given = {"angles": [0.0, 1.0], "detectors": 5, "spacing": 1e-3, "offset": 0.0, "projector": "line"} | change
    with pytest.raises(InputError, match=text):
        ParallelBeam(grid(4, 4), **given)


def test_no_views():
    with pytest.raises(InputError, match="a scan needs at least one view; got 0"):
        ParallelBeam.half_turn((4, 4), PIXEL, 0)


UP = {"y": np.arange(4) * 1.0, "x": np.arange(4) * 1.0}


@pytest.mark.parametrize(
    ("space", "text"),
    [
        (Space.vector(5), r"ParallelBeam projects slices \(y, x\) or stacks \(z, y, x\); got \(component=5\)"),
        (Space(("channel", "y", "x"), (2, 4, 4), {}, "1/m"), r"projects slices \(y, x\) or stacks \(z, y, x\)"),
        (Space(("z", "y", "x"), (2, 4, 4), {}, "1/m"), "needs evenly spaced y and x coordinates in metres"),
        (Space.grid((2, 4, 4), (1.0, 2.0, 1.0), "1/m"), "needs square pixels; got 2 m by 1 m"),
        (Space.grid((4, 4), 1.0, "K"), "takes attenuation in 1/m; got unit 'K'; make it with Space.grid"),
        (Space(("y", "x"), (4, 4), {}, "1/m"), "needs evenly spaced y and x coordinates in metres"),
        (Space(("y", "x"), (4, 4), {"y": UP["y"]}, "1/m"), "needs evenly spaced y and x coordinates in metres"),
        (Space(("y", "x"), (4, 4), UP, "1/m"), "needs y falling from the first row to the last and x growing"),
        (Space(("y", "x"), (4, 4), {"y": -UP["y"], "x": 2 * UP["x"]}, "1/m"), "needs square pixels; got 1 m by 2 m"),
        (Space.grid((1, 1), 1.0, "1/m"), "needs evenly spaced y and x coordinates"),
    ],
)
def test_domains_that_cannot_be_projected(space, text):
    with pytest.raises(InputError, match=text):
        ParallelBeam(space, [0.0])


def test_a_single_row_is_an_image():
    A = ParallelBeam(grid(1, 5), [0.0, math.pi / 2], 5).double()
    y = A(torch.arange(5, dtype=torch.float64)[None])
    assert torch.allclose(y[0], PIXEL * torch.arange(5, dtype=torch.float64), rtol=1e-6)
    assert float(y[1].sum()) == pytest.approx(10 * PIXEL)


# --- The geometry is a value --------------------------------------------------------------------------------------------


def test_geometries_are_values():
    one = ParallelGeometry((0.0, 0.1, 1 / 3), 5, 1e-3, -2e-4, "strip")
    assert one == ParallelGeometry(np.array([0.0, 0.1, 1 / 3]), np.int64(5), np.float64(1e-3), -2e-4, "strip")
    assert one != ParallelGeometry((0.0, 0.1, 1 / 3), 5, 1e-3, 2e-4, "strip")
    assert eval(repr(one)) == one
    assert len({one, eval(repr(one))}) == 1


def test_an_operator_is_made_again_from_its_geometry():
    A = zoo.shifted_beam()
    again = ParallelBeam.from_geometry(A.domain, A.geometry)
    x = zoo.normal(*A.domain.shape, dtype=torch.float32)
    assert torch.equal(A(x), again(x))
    assert A.range.mismatch(again.range) is None
