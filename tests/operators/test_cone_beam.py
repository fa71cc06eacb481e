"""Cone-beam tomography against geometry on paper, an independent ray tracer, and ASTRA's fan beam."""

from __future__ import annotations

import math
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates

from recon.checks import check_adjoint
from recon.errors import InputError
from recon.likelihoods import GaussianLikelihood
from recon.operators import ConeBeam, ConeGeometry, Diagonal, Sequence, Stack, VectorGeometry, cone_astra
from recon.space import Space
from tests import zoo

FULL = np.arange(7) * (2 * math.pi / 7)
without_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def scan(angles=FULL, **changes) -> ConeGeometry:
    """Every parameter at work."""
    given = {
        "angles": angles, "rows": 7, "detectors": 9, "spacing": 5e-3, "source_distance": 0.2, "detector_distance": 0.1,
        "row_spacing": 4e-3, "offset": 2.1e-3, "row_offset": -1.3e-3, "tilt": 0.11, "pitch": 4e-3,
    }  # fmt: skip
    return ConeGeometry(**(given | changes))


def plain(angles=FULL, **changes) -> ConeGeometry:
    """A circle with a centred, upright detector."""
    return scan(angles, **({"offset": 0.0, "row_offset": 0.0, "tilt": 0.0, "pitch": 0.0} | changes))


def volume(n=10, width=0.03, flat=1.25) -> Space:
    """About ``width`` metres wide, as ``n`` voxels more or less, of three different sides."""
    return Space.grid((n, n + n // 2, n + n // 5), (width / n * flat, width / n * 0.8, width / n), "1/m")


def lines(geometry: ConeGeometry | VectorGeometry) -> tuple[np.ndarray, np.ndarray]:
    """A point and a unit vector of every ray in metres, (views, rows, columns, 3), from the text of the module."""
    if isinstance(geometry, ConeGeometry):
        theta = np.array(geometry.angles)[:, None, None]
        sin, cos, none = np.sin(theta), np.cos(theta), np.zeros_like(theta)
        s, t = geometry.positions[None, None, :], geometry.row_positions[None, :, None]
        across = s * math.cos(geometry.tilt) - t * math.sin(geometry.tilt)
        up = s * math.sin(geometry.tilt) + t * math.cos(geometry.tilt)
        far, near, rise = geometry.detector_distance, geometry.source_distance, geometry.pitch * theta / (2 * math.pi)
        element = np.stack(np.broadcast_arrays(cos * across - sin * far, sin * across + cos * far, up + rise), -1)
        start = np.stack(np.broadcast_arrays(near * sin, -near * cos, rise + none), -1)
        along = element - start
    else:
        v = np.array(geometry.vectors)[:, None, None]
        i = (np.arange(geometry.rows) - (geometry.rows - 1) / 2)[None, :, None, None]
        j = (np.arange(geometry.detectors) - (geometry.detectors - 1) / 2)[None, None, :, None]
        start = v[..., 3:6] + j * v[..., 6:9] + i * v[..., 9:12]
        along = (v[..., :3] if geometry.beam == "parallel" else start - v[..., :3]) + 0 * start
    return np.broadcast_to(start, along.shape), along / np.linalg.norm(along, axis=-1, keepdims=True)


def gaussian(space: Space, centre=(2e-3, -3e-3, 1e-3), width=5e-3) -> torch.Tensor:
    z, y, x = np.meshgrid(*(space.coords[d] for d in "zyx"), indexing="ij")
    r2 = (x - centre[0]) ** 2 + (y - centre[1]) ** 2 + (z - centre[2]) ** 2
    return torch.from_numpy(np.exp(-r2 / (2 * width**2)))


def distance(geometry, centre, stretch=(1.0, 1.0, 1.0)) -> np.ndarray:
    """Of every ray from ``centre``, both stretched first; and how much the stretch lengthens the ray."""
    start, along = lines(geometry)
    along, away = along * stretch, (np.array(centre) - start) * stretch
    length = np.linalg.norm(along, axis=-1)
    return np.linalg.norm(np.cross(away, along), axis=-1) / length, length


# --- The model ----------------------------------------------------------------------------------------------------------


def joseph(space: Space, geometry, values: np.ndarray) -> np.ndarray:
    """Plane by plane with scipy's interpolation, from lines in metres: shares no code or formula with the kernels."""
    start, along = lines(geometry)
    signs = np.array([1, -1, 1])
    first = np.array([space.coords[d][0] for d in "xyz"])
    step = signs * np.array([space.spacing(d) or space.spacing("x") for d in "xyz"])
    out = np.zeros(start.shape[:-1])
    for place in np.ndindex(*out.shape):
        o, d = (start[place] - first) / step, along[place] / step
        axis = int(np.abs(d).argmax())
        planes = np.arange(space.shape[2 - axis])
        points = o[:, None] + d[:, None] * (planes - o[axis]) / d[axis]
        seen = map_coordinates(values, points[::-1], order=1, mode="grid-constant", cval=0.0)
        out[place] = seen.sum() / abs(d[axis])
    return out


STEEP = np.array([[0.0, 0.01, -0.1, 0.003, 0.0, 0.1, 4e-3, 0.0, 1e-3, 0.0, 5e-3, 0.0]])


@pytest.mark.parametrize(
    ("space", "geometry"),
    [
        (volume(), scan()),
        (
            volume(),
            plain((0.0, math.pi / 4, math.pi / 2, -1.0)),
        ),  # rays along planes, edges and diagonals of the voxels
        (volume(), VectorGeometry(STEEP, 6, 5)),  # looks along z
        (zoo.cone_volume(1), zoo.cone_scan(2, 0.0)),
        (zoo.cone_volume(), zoo.parallel_rays().geometry),
    ],
    ids=["everything", "circle", "along z", "slice", "parallel"],
)
def test_every_ray_is_josephs_sum(space, geometry):
    A = ConeBeam(space, geometry).double()
    x = zoo.normal(*space.shape)
    expected = torch.from_numpy(joseph(space, geometry, x.numpy()))
    assert float(expected.abs().max()) > 1e-3  # the rays meet the volume
    assert torch.allclose(A(x), expected, rtol=0, atol=1e-12 * float(expected.abs().max()))
    assert torch.allclose(A.float()(x.float()).double(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_a_gaussian_gives_its_integrals_to_second_order():
    """``sqrt(2 pi) w exp(-d^2 / 2 w^2)``: half the voxel, a quarter of the error."""
    centre, width, geometry = (2e-3, -3e-3, 1e-3), 3.5e-3, scan(pitch=1e-3, spacing=2e-3, row_spacing=2e-3)
    d, _ = distance(geometry, centre)
    exact = torch.from_numpy(math.sqrt(2 * math.pi) * width * np.exp(-(d**2) / (2 * width**2)))
    errors = []
    for n in (10, 20, 40):
        space = volume(n, 0.04, flat=1.0)
        y = ConeBeam(space, geometry).double()(gaussian(space, centre, width))
        errors.append(float((y - exact).norm() / exact.norm()))
    assert 1.8 < math.log2(errors[0] / errors[1]) < 2.4
    assert 1.8 < math.log2(errors[1] / errors[2]) < 2.2
    # Interpolation adds h^2 / 12 f'' on average along each of two axes, and f'' is f / w^2 at the top.
    assert errors[-1] < (max(volume(40, 0.04, flat=1.0).spacing(d) for d in "xyz") / width) ** 2 / 6


def test_an_ellipsoid_gives_its_chords():
    """``2 sqrt(1 - d^2)`` in units in which it is the unit ball.  The cliff is blurred over a voxel ``h``: the chord is off by
    a part of ``sqrt(2 r h)`` on the share ``2 h / r`` of the rays at the rim, so by a part of ``h / r`` altogether."""
    centre, axes, mu, geometry = (2e-3, -1e-3, 1e-3), np.array([9e-3, 7e-3, 8e-3]), 30.0, scan(spacing=4e-3)
    d, length = distance(geometry, centre, 1 / axes)
    exact = torch.from_numpy(2 * mu * np.sqrt(np.clip(1 - d**2, 0, None)) / length)
    errors = []
    for n in (12, 24, 48):
        space = volume(n, 0.04, flat=1.0)
        fine = [np.asarray(space.coords[k])[:, None] + (np.arange(4) / 4 - 0.375) * space.spacing(k) for k in "zyx"]
        z, y, x = np.meshgrid(*(f.ravel() for f in fine), indexing="ij", sparse=True)
        inside = ((x - centre[0]) / axes[0]) ** 2 + ((y - centre[1]) / axes[1]) ** 2 + (
            (z - centre[2]) / axes[2]
        ) ** 2 < 1
        nz, ny, nx = space.shape
        ball = torch.from_numpy(mu * inside.reshape(nz, 4, ny, 4, nx, 4).mean(axis=(1, 3, 5)))
        errors.append(float((ConeBeam(space, geometry).double()(ball) - exact).norm() / exact.norm()))
        assert errors[-1] < 0.5 * max(space.spacing(k) for k in "xyz") / axes.min()
    assert 2**0.9 < errors[0] / errors[1] < 2**2.3
    assert 2**0.9 < errors[1] / errors[2] < 2**2.3


def test_a_point_is_seen_where_the_words_say():
    """theta = 0 looks along +y: +x is to the right, +z up; theta = pi/2 looks along -x and +y is to the right."""
    A = ConeBeam(volume(9), plain((0.0, math.pi / 2), rows=21, detectors=21, spacing=3e-3, row_spacing=3e-3)).double()
    x = torch.zeros(A.domain.shape, dtype=torch.float64)
    x[7, 2, 8] = 1.0  # above, towards +y, towards +x
    along_y, along_x = A(x)
    assert A.domain.coords["y"][2] > 0 and A.domain.coords["x"][8] > 0 and A.domain.coords["z"][7] > 0
    for view, across in ((along_y, A.domain.coords["x"][8]), (along_x, A.domain.coords["y"][2])):
        depth = {True: A.domain.coords["y"][2], False: -A.domain.coords["x"][8]}[view is along_y]
        rows, columns = (torch.from_numpy(A.range.coords[d]) for d in ("row", "detector"))
        scale = 0.3 / (0.2 + depth)
        assert float((view.sum(0) * columns).sum() / view.sum()) == pytest.approx(scale * across, abs=1e-3)
        assert float((view.sum(1) * rows).sum() / view.sum()) == pytest.approx(
            scale * A.domain.coords["z"][7], abs=1e-3
        )


# --- ASTRA --------------------------------------------------------------------------------------------------------------


def test_vectors_are_astras():
    """Its own conversion of a cone scan to vectors."""
    import astra

    geometry = plain()
    theirs = astra.geom_2vec(astra.create_proj_geom("cone", 5e-3, 4e-3, 7, 9, np.array(geometry.angles), 0.2, 0.1))[
        "Vectors"
    ]
    assert np.allclose(np.array(geometry.measured.vectors), theirs, rtol=0, atol=1e-15)
    moved = astra.geom_postalignment(astra.create_proj_geom("cone_vec", 7, 9, theirs), (2.1e-3 / 5e-3, -1.3e-3 / 4e-3))[
        "Vectors"
    ]
    shifted = plain(offset=2.1e-3, row_offset=-1.3e-3)
    assert np.allclose(np.array(shifted.measured.vectors), moved, rtol=0, atol=1e-15)


@pytest.mark.parametrize("offset", [0.0, 3e-3])
def test_the_middle_row_is_astras_fan_beam(offset):
    """The slice of a volume that does not change along z; ASTRA takes the nearest pixel, off by h / sqrt(12) f' on
    average, where recon interpolates; f' is at most f / w or so, and the differences cancel in part along a ray."""
    import astra

    errors = []
    for n in (64, 256):
        pixel = 0.032 / n
        space = Space.grid((3, n, n + 4), pixel, "1/m")
        geometry = plain(rows=3, detectors=31, spacing=2e-3, offset=offset)
        image = gaussian(space)[1].float()
        ours = ConeBeam(space, geometry)(image.expand(space.shape))[:, 1]
        vectors = np.array(geometry.measured.vectors)[:, [0, 1, 3, 4, 6, 7]] / pixel
        fan = astra.create_proj_geom("fanflat_vec", 31, vectors)
        if offset == 0:
            fan = astra.create_proj_geom("fanflat", 2e-3 / pixel, 31, FULL, 0.2 / pixel, 0.1 / pixel)
        projector = astra.create_projector("line_fanflat", fan, astra.create_vol_geom(n, n + 4))
        key, theirs = astra.create_sino(image.numpy(), projector)
        astra.data2d.delete(key)
        astra.projector.delete(projector)
        theirs = torch.from_numpy(theirs) * pixel
        errors.append(float((ours - theirs).norm() / theirs.norm()))
        assert errors[-1] < pixel / 5e-3 / math.sqrt(12)
    assert errors[0] > 4 * errors[1]


# --- The pair -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cone_beam", "cone_beam_of_a_slice", "cone_beam_parallel"])
def test_the_adjoint_is_the_transposed_matrix(name):
    A = zoo.OPERATORS[name]().double()
    matrix = zoo.dense(A)
    assert int((matrix != 0).sum()) > 4 * A.range.size / 2
    assert torch.allclose(zoo.dense(A.H), matrix.T, rtol=0, atol=1e-15 * 1e-2)


def test_the_pair_is_matched_at_size():
    A = ConeBeam(volume(20), scan(rows=20, detectors=24, spacing=2e-3, row_spacing=2e-3))
    assert A.matched
    assert check_adjoint(A) < 1e-6
    assert check_adjoint(A.double()) < 1e-14
    assert A.mismatch() < 1e-14
    assert A.float().mismatch(1) < 1e-6
    with pytest.raises(InputError, match="mismatch needs at least one pair of probes; got 0"):
        A.mismatch(0)


def test_mismatch_sees_an_adjoint_that_is_not_one(monkeypatch):
    A = zoo.OPERATORS["cone_beam"]().double()
    true = A.apply_adjoint
    monkeypatch.setattr(type(A), "apply_adjoint", lambda self, y: 1.01 * true(y))
    u, v = zoo.normal(*A.domain.shape), zoo.normal(*A.range.shape, step=1)
    scale = float((A(u) * v).sum().abs() / (A(u).norm() * v.norm()))
    assert A.mismatch() > 1e-4 * min(1.0, scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_neither_threads_nor_company_change_a_bit(dtype, monkeypatch):
    """One draw in its own layout, packs, a last pack that is not full, packs that would be too large."""
    A = ConeBeam(volume(7), scan()).to(dtype)
    x, y = zoo.normal(19, *A.domain.shape, dtype=dtype), zoo.normal(19, *A.range.shape, dtype=dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        forward, back = A(x), A.A_adjoint(y)
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(A(x), forward)
            assert torch.equal(A.A_adjoint(y), back)
        for i in (0, 7, 18):
            assert torch.equal(A(x[i]), forward[i])
            assert torch.equal(A.A_adjoint(y[i]), back[i])
    finally:
        torch.set_num_threads(before)
    from recon.operators import cone_kernels

    monkeypatch.setattr(cone_kernels, "_PACK_BYTES", 1)
    assert torch.equal(A(x), forward)
    assert torch.equal(A.A_adjoint(y), back)


def test_several_callers_at_once():
    A = zoo.OPERATORS["cone_beam"]()
    x = zoo.normal(3, *A.domain.shape, dtype=torch.float32)
    expected = A.normal(x)
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(A.normal, [x] * 16):
            assert torch.equal(got, expected)


def test_values_that_are_not_finite_stay_where_they_are():
    """A NaN in one draw, or outside every ray, reaches nothing else."""
    A = zoo.OPERATORS["cone_beam"]().double()
    x = zoo.normal(3, *A.domain.shape)
    expected = A(x)
    x[1, 2, 2, 2] = math.nan
    got = A(x)
    assert torch.equal(got[[0, 2]], expected[[0, 2]])
    assert bool(got[1].isnan().any()) and not bool(got[1].isnan().all())


# --- Geometry -----------------------------------------------------------------------------------------------------------


def test_vectors_say_the_same_as_parameters():
    A = ConeBeam(volume(), scan())
    B = ConeBeam.from_vectors(volume(), np.array(scan().measured.vectors), 7, 9)
    x = zoo.normal(*A.domain.shape, dtype=torch.float32)
    assert torch.equal(A(x), B(x))
    assert A.range.dims == B.range.dims == ("angle", "row", "detector")
    assert A.range.mismatch(B.range) is None
    assert np.allclose(A.range.coords["detector"], (np.arange(9) - 4) * 5e-3 + 2.1e-3)
    assert np.allclose(A.range.coords["row"], (np.arange(7) - 3) * 4e-3 - 1.3e-3)


def test_a_turn_of_the_helix_is_a_shift_of_the_volume():
    space = volume(14)
    rise = 3 * float(space.spacing("z"))
    A = ConeBeam(space, scan((0.4, 0.4 + 2 * math.pi), pitch=rise)).double()
    x = torch.zeros(space.shape, dtype=torch.float64)
    x[5:9] = zoo.normal(4, *space.shape[1:])
    start = A.geometry.pitch * 0.4 / (2 * math.pi)
    assert start > 0
    before, after = A(x)[0], A(torch.roll(x, 3, 0))[1]
    assert torch.allclose(after, before, rtol=0, atol=1e-12 * float(before.abs().max()))
    assert not torch.allclose(A(x)[1], before, rtol=0, atol=1e-2 * float(before.abs().max()))


def test_a_volume_off_the_axis_is_the_volume_seen_from_elsewhere():
    space, shift = volume(), np.array([3e-3, -2e-3, 4e-3])
    coords = {d: np.asarray(space.coords[d]) + shift["xyz".index(d)] for d in "zyx"}
    moved = ConeBeam(Space(space.dims, space.shape, coords, "1/m"), scan()).double()
    vectors = np.array(scan().measured.vectors)
    vectors[:, :3] -= shift
    vectors[:, 3:6] -= shift
    x = zoo.normal(*space.shape)
    expected = ConeBeam.from_vectors(space, vectors, 7, 9).double()(x)
    assert torch.allclose(moved(x), expected, rtol=0, atol=1e-12 * float(expected.abs().max()))


def test_a_distant_source_makes_parallel_rays():
    far, space = 1e4, volume()
    one = plain(source_distance=far, detector_distance=0.0)
    vectors = np.array(one.measured.vectors)
    vectors[:, :3] = vectors[:, 3:6] - vectors[:, :3]
    x = gaussian(space)
    cone = ConeBeam(space, one).double()(x)
    parallel = ConeBeam.from_vectors(space, vectors, 7, 9, "parallel").double()(x)
    assert torch.allclose(cone, parallel, rtol=0, atol=1e-4 * float(cone.max()))


def test_geometries_are_values():
    one = scan((0.0, 0.1, 1 / 3))
    assert one == scan(np.array([0.0, 0.1, 1 / 3]), rows=np.int64(7))
    assert one != scan((0.0, 0.1, 1 / 3), tilt=0.1)
    assert eval(repr(one)) == one
    assert eval(repr(one.measured)) == one.measured
    assert len({one, eval(repr(one)), one.measured}) == 2
    assert plain(row_spacing=None).row_spacing == 5e-3


# --- What is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"angles": []}, "angles must be a non-empty list of finite numbers"),
        ({"angles": [0.0, math.nan]}, "angles must be a non-empty list"),
        (
            {"angles": [0.0, 90.0], "pitch": 0.0},
            r"reach 90, more than 2 turns; if they are degrees, pass numpy\.deg2rad",
        ),
        ({"angles": [0.0, 720.0]}, "reach 720, more than 100 turns"),
        ({"rows": 0}, "rows must be a positive whole number; got 0"),
        ({"detectors": 2.5}, "detectors must be a positive whole number; got 2.5"),
        ({"spacing": 0.0}, "spacing must be a positive length in metres; got 0.0"),
        ({"row_spacing": -1.0}, "row_spacing must be a positive length in metres"),
        ({"source_distance": math.inf}, "source_distance must be a positive length in metres; got inf"),
        (
            {"detector_distance": -0.1},
            "detector_distance, from the axis, must be a length in metres, not negative; got -0.1",
        ),
        ({"offset": math.nan}, "offset must be finite; got nan"),
        ({"pitch": math.inf}, "pitch must be finite; got inf"),
        ({"tilt": 30.0}, r"tilt is in radians, at most a turn; got 30\.0"),
    ],
)
def test_scans_that_cannot_be(change, text):
    with pytest.raises(InputError, match=text):
        scan(**change)


@pytest.mark.parametrize(
    ("vectors", "beam", "text"),
    [
        (np.zeros((3, 6)), "cone", r"vectors must be \(views, 12\) finite numbers in metres: .*; got shape \(3, 6\)"),
        (np.zeros((0, 12)), "cone", r"got shape \(0, 12\)"),
        (STEEP * math.nan, "cone", "finite numbers"),
        (np.zeros((2, 12)), "cone", "the rays of view 0 run along the detector, or its steps are parallel or zero"),
        (np.tile(STEEP, (2, 1)) * [[1.0], [0.0]], "cone", "the rays of view 1 run along the detector"),
        (STEEP, "fan", "beam must be 'cone' or 'parallel'; got 'fan'"),
    ],
)
def test_vectors_that_cannot_be(vectors, beam, text):
    with pytest.raises(InputError, match=text):
        VectorGeometry(vectors, 3, 4, beam)


UP = {d: np.arange(4) * 1.0 for d in "zyx"}


@pytest.mark.parametrize(
    ("space", "text"),
    [
        (Space.grid((4, 4), 1.0, "1/m"), r"ConeBeam projects volumes \(z, y, x\); got \(y=4, x=4\)"),
        (Space.grid((4, 4, 4), 1.0, "K"), "ConeBeam takes attenuation in 1/m; got unit 'K'; make it with Space.grid"),
        (Space(("z", "y", "x"), (4, 4, 4), {}, "1/m"), "needs evenly spaced z, y and x coordinates in metres"),
        (Space(("z", "y", "x"), (4, 4, 4), UP, "1/m"), "needs y falling with the row, and x and z growing"),
        (Space.grid((1, 1, 1), 1.0, "1/m"), "needs evenly spaced z, y and x coordinates"),
        (volume(width=0.5), r"the source of view 0 lies inside the volume .*; check source_distance and the voxel"),
    ],
)
def test_volumes_that_cannot_be_projected(space, text):
    with pytest.raises(InputError, match=text):
        ConeBeam(space, scan())


def test_a_scan_that_misses_the_volume_is_refused():
    text = r"no ray of the scan meets the volume \(z=10, y=15, x=12\) \[1/m\]; check that all lengths are metres"
    with pytest.raises(InputError, match=text):
        ConeBeam(volume(), plain(row_offset=0.3))
    away = np.array(plain().measured.vectors)
    away[:, :3], away[:, 3:6] = 2 * away[:, 3:6], 5 * away[:, 3:6]  # the volume lies behind every source
    with pytest.raises(InputError, match=text):
        ConeBeam.from_vectors(volume(), away, 7, 9)
    one = np.concatenate([plain().measured.vectors[:1], away])
    assert ConeBeam.from_vectors(volume(), one, 7, 9).range.shape == (8, 7, 9)


def test_another_type_or_machine_is_refused():
    A = zoo.OPERATORS["cone_beam"]()
    with pytest.raises(
        InputError, match=r"holds torch\.float32 numbers and computes in float32 or float64; got torch\.float64"
    ):
        A(zoo.normal(*A.domain.shape))
    with pytest.raises(InputError, match=r"holds torch\.float16 numbers .* got torch\.float16"):
        A.half()(zoo.normal(*A.domain.shape).half())
    with pytest.raises(InputError, match=r"ConeBeam .* is on cpu and computes on cpu or cuda; got a tensor on meta"):
        A.float()(torch.zeros(A.domain.shape, device="meta"))


def test_without_numba(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    A = zoo.OPERATORS["cone_beam"]()
    with pytest.raises(InputError, match=r"needs the Python package 'numba'.*pip install 'recon\[ct\]'"):
        A(torch.zeros(A.domain.shape))


def test_an_operator_elsewhere_than_on_the_cpu_is_not_matched():
    A = zoo.OPERATORS["cone_beam"]()
    like = GaussianLikelihood(A, torch.zeros(A.range.shape), 1.0)
    assert like.linear("CG") is A
    A.to("meta")
    assert not A.matched
    with pytest.raises(InputError, match=r"CG needs an exact transpose; ConeBeam .* declares matched=False"):
        like.linear("CG")


@pytest.mark.parametrize(
    "build",
    [
        lambda A: -2.0 * A,
        lambda A: A.H,
        lambda A: A + 3.0 * A,
        lambda A: Diagonal(torch.ones(()), A.range) @ A,
        lambda A: Stack([A, A]),
        lambda A: Sequence([A, A]),
        lambda A: Stack([2.0 * A.H.H]),
    ],
)
def test_what_is_built_on_it_moves_with_it(build):
    whole = build(zoo.OPERATORS["cone_beam"]())
    assert whole.matched
    assert not whole.to("meta").matched


# --- The GPU ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("torch_sees", "astra_sees", "said"), [(False, True, "sees none"), (True, False, "astra does not")]
)
def test_astra_is_never_reached_without_a_gpu(monkeypatch, torch_sees, astra_sees, said):
    """Its 3D routines would end the process."""
    import astra

    def never(*given):
        raise AssertionError("ASTRA was called")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: torch_sees)
    monkeypatch.setattr(astra, "use_cuda", lambda: astra_sees)
    for name in ("create_projector", "set_gpu_index"):
        monkeypatch.setattr(astra, name, never)
    A = zoo.OPERATORS["cone_beam"]()
    for call, space in ((cone_astra.project, A.domain), (cone_astra.backproject, A.range)):
        with pytest.raises(
            InputError, match=rf"ConeBeam on CUDA tensors needs a GPU that both .* can use; torch .*{said}.*; move"
        ):
            call(A.rays, torch.zeros(2, *space.shape))


def test_what_astra_is_told_is_the_same_scan():
    """Rays through unit voxels about the origin, as ASTRA builds them, meet the voxels that the kernels meet."""
    import astra

    for A in (ConeBeam(volume(), scan()).double(), zoo.parallel_rays().double()):
        told, grid = cone_astra.geometries(astra, A.rays)
        nz, ny, nx = A.domain.shape
        assert astra.functions.geom_size(grid) == A.domain.shape
        assert (told["DetectorRowCount"], told["DetectorColCount"]) == A.range.shape[1:]
        assert told["type"] == ("parallel3d_vec" if A.rays.parallel else "cone_vec")
        unit = {d: np.arange(n) - (n - 1) / 2 for d, n in zip("zyx", (nz, ny, nx), strict=True)}
        unit["y"] = unit["y"][::-1]  # recon's rows run down the page, ASTRA's volumes up
        vectors = told["Vectors"] * 1.0
        B = ConeBeam.from_vectors(
            Space(A.domain.dims, A.domain.shape, unit, "1/m"), vectors, *A.range.shape[1:],
            "parallel" if A.rays.parallel else "cone",
        ).double()  # fmt: skip
        x = zoo.normal(*A.domain.shape)
        lengths = cone_astra._lengths(A.rays, x)
        expected = A(x)
        assert torch.allclose(B(x.flip(1)) * lengths, expected, rtol=0, atol=1e-10 * float(expected.abs().max()))
        assert lengths.shape == A.range.shape
    cubes = ConeBeam(Space.grid((3, 4, 5), 2e-3, "1/m"), scan())
    assert float(cone_astra._lengths(cubes.rays, torch.zeros(1))) == pytest.approx(2e-3)


def on_gpu(space: Space, geometry) -> tuple[ConeBeam, ConeBeam]:
    return ConeBeam(space, geometry), ConeBeam(space, geometry).to("cuda")


@pytest.mark.gpu
@without_gpu
@pytest.mark.parametrize("case", ["cubes", "bricks", "parallel"])
def test_the_gpu_projects_the_same(case):
    """Textures interpolate with 8 bits: 2^-9 of a difference between neighbours, which a smooth volume keeps small."""
    geometry = zoo.parallel_rays().geometry if case == "parallel" else scan(rows=30, detectors=40, spacing=1.5e-3)
    space = Space.grid((24, 26, 22), 1.2e-3, "1/m") if case == "cubes" else volume(24)
    cpu, cuda = on_gpu(space, geometry)
    x = gaussian(space).float().expand(3, *space.shape)
    y = cuda(x.cuda())
    assert y.is_cuda
    assert float((y.cpu() - cpu(x)).norm() / cpu(x).norm()) < 2**-9
    back, expected = cuda.A_adjoint(y).cpu(), cpu.A_adjoint(y.cpu())
    assert float((back - expected).norm() / expected.norm()) < 0.1


@pytest.mark.gpu
@without_gpu
def test_the_gpu_is_not_matched():
    _, cuda = on_gpu(volume(24), scan(rows=30, detectors=40, spacing=1.5e-3))
    assert not cuda.matched
    assert 1e-7 < cuda.mismatch() < 0.05
    with pytest.raises(InputError, match="declares matched=False"):
        GaussianLikelihood(cuda, torch.zeros(cuda.range.shape, device="cuda"), 1.0).linear("CG")
    with pytest.raises(InputError, match=r"computes in float32 \(ASTRA's precision\); got torch\.float64"):
        cuda.double()(torch.zeros(cuda.domain.shape, device="cuda", dtype=torch.float64))
