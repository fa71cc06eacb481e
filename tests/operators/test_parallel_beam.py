"""Parallel-beam tomography against geometry on paper, and against three other implementations."""

from __future__ import annotations

import ast
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import recon.operators
from recon.checks import check_adjoint, check_batch
from recon.errors import InputError
from recon.operators import ParallelBeam, ParallelGeometry
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


# --- The matrix ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("projector", PROJECTORS)
def test_memory_is_predicted(projector):
    A = ParallelBeam.half_turn((64, 64), PIXEL, 24, projector=projector)
    held = sum(buffer.numel() * buffer.element_size() for buffer in A.buffers())
    assert held <= 1.01 * A.bytes
    assert A.bytes <= 1.15 * held


@pytest.mark.parametrize(
    "make", [zoo.shifted_beam, zoo.off_centre_beam, lambda: ParallelBeam(grid(64, 64), [0, 1, 2], 5)]
)
def test_memory_is_not_underestimated(make):
    A = make()
    held = sum(buffer.numel() * buffer.element_size() for buffer in A.buffers())
    assert 0.97 * held <= A.bytes <= 2.5 * held


def test_a_matrix_above_the_limit_is_refused_before_it_is_built():
    with pytest.raises(
        InputError, match=r"720 views x 2897 detectors would take about .* GB, above the limit of 4 GB; use fewer"
    ):
        ParallelBeam.half_turn((2048, 2048), 1e-4, 720)
    with pytest.raises(
        InputError, match="above the limit of 1e-06 GB; use fewer views, detectors or pixels, the line projector"
    ):
        ParallelBeam(grid(), [0.0, 1.0], projector="strip", limit=1e3)


def test_astra_keeps_nothing(capfd):
    import astra

    zoo.beam()
    for store in (astra.matrix, astra.projector, astra.data2d):
        store.info()
        listed = [line for line in capfd.readouterr().out.splitlines() if line[:1].isdigit()]
        assert listed == []


def test_wide_batches_are_cut_without_a_trace():
    A = zoo.beam().double()
    check_batch(A, zoo.normal(70, *A.domain.shape))
    check_adjoint(A)


def test_threads_do_not_change_a_bit():
    A = ParallelBeam.half_turn((64, 64), PIXEL, 40)
    x, y = zoo.normal(6, *A.domain.shape, dtype=torch.float32), zoo.normal(6, *A.range.shape, dtype=torch.float32)
    before = torch.get_num_threads()
    answers = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            answers.append((A(x), A.A_adjoint(y)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(answers[0][0], answers[1][0])
    assert torch.equal(answers[0][1], answers[1][1])


def test_precisions_do_not_mix():
    with pytest.raises(
        InputError, match=r"this operator holds torch\.float32 numbers; got torch\.float64 \(convert one"
    ):
        zoo.beam()(zoo.normal(9, 8))


def test_nothing_of_the_matrix_is_saved_with_weights():
    assert zoo.beam().state_dict() == {}


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
        (Space.vector(5), r"projects one slice \(y, x\); got \(component=5\)"),
        (Space(("z", "y", "x"), (2, 4, 4), {}, "1/m"), r"projects one slice \(y, x\)"),
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


def test_without_astra(monkeypatch):
    monkeypatch.setitem(sys.modules, "astra", None)
    with pytest.raises(InputError, match=r"needs the Python package 'astra'.*pip install 'recon\[ct\]'"):
        zoo.beam()


def test_astra_is_imported_inside_the_operator_only():
    for path in Path(recon.operators.__file__).parent.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            assert not (isinstance(node, ast.Import | ast.ImportFrom) and "astra" in ast.unparse(node)), path.name


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
