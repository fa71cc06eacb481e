"""Coarse means against overlaps counted cell by cell, against areas on paper, and on a real coarse analysis."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from recon.errors import InputError
from recon.operators.coarse_grain import CoarseGrain
from recon.operators.grids import axes, cell_sizes
from recon.space import Space
from tests import zoo

EPS = np.finfo(float).eps


def space(unit="K", **coords):
    """A field with those axes, in that order."""
    return Space(tuple(coords), tuple(len(v) for v in coords.values()), coords, unit)


def steps(first, last, n):
    return np.linspace(first, last, n)


def close(got, exact, terms):
    """Equal to the rounding of sums of ``terms`` numbers."""
    exact = torch.as_tensor(exact, dtype=torch.float64)
    assert got.shape == exact.shape
    assert float((got - exact).abs().max()) <= 8 * terms * EPS * float(exact.abs().max())


def sphere_area(south, north, west, east):
    return (np.sin(np.deg2rad(north)) - np.sin(np.deg2rad(south))) * np.deg2rad(east - west)


# --- Cells --------------------------------------------------------------------------------------------------------------


def test_cells_of_a_globe_cover_the_sphere():
    """With rows at the poles, with cell-centred rows, and with rows that end in between (Gaussian)."""
    lon = np.arange(8) * 45.0
    rows = (steps(-90.0, 90.0, 7), steps(-75.0, 75.0, 6), np.array([-80.0, -50.0, -10.0, 20.0, 50.0, 79.0]))
    for lat in rows:
        for one in (lat, lat[::-1]):
            sizes = cell_sizes(space(lat=one, lon=lon))
            assert sizes.shape == (len(lat), 8)
            assert sizes.sum() == pytest.approx(2 * 360, rel=8 * EPS)
            assert (sizes > 0).all()
    assert np.allclose(axes(space(lat=rows[0], lon=lon), ["lat"])["lat"].bounds(), [-90, -75, -45, -15, 15, 45, 75, 90])


def test_cells_of_a_region_end_half_a_step_beyond_its_points():
    domain = space(lat=steps(36.0, 44.0, 5), lon=np.array([350.0, 354.0, 0.0, 4.0]))
    bounds = axes(domain, ["lat", "lon"])
    assert bounds["lat"].bounds().tolist() == [35, 37, 39, 41, 43, 45]
    assert (bounds["lon"].bounds() + bounds["lon"].origin).tolist() == [348, 352, 357, 362, 366]
    exact = [
        [sphere_area(s, s + 2, w, e) for w, e in ((348, 352), (352, 357), (357, 362), (362, 366))]
        for s in range(35, 45, 2)
    ]
    assert np.allclose(np.deg2rad(1) * cell_sizes(domain), exact, rtol=1e-13)


def test_a_region_at_the_pole_ends_at_the_pole():
    region = space(lat=steps(80.0, 90.0, 3), lon=steps(0.0, 30.0, 4))
    assert axes(region, ["lat"])["lat"].bounds().tolist() == [77.5, 82.5, 87.5, 90.0]


# --- Whole ratios -------------------------------------------------------------------------------------------------------


def test_a_whole_ratio_is_the_mean_of_a_block():
    domain = Space.grid((6, 8), 0.5, "K")
    x = zoo.normal(2, 6, 8)
    A = CoarseGrain(domain, 2).double()
    close(A(x), x.reshape(2, 3, 2, 4, 2).mean((2, 4)), 4)
    assert A.range.unit == "K"
    assert A.range.coords["y"].tolist() == [1.0, 0.0, -1.0]
    assert A.range.coords["x"].tolist() == [-1.5, -0.5, 0.5, 1.5]
    B = CoarseGrain(domain, {"y": 3, "x": 1}).double()
    close(B(x), x.reshape(2, 2, 3, 8).mean(2), 3)


def test_a_volume_and_other_axes():
    domain = Space(("time", "z", "y", "x"), (3, 2, 4, 6), Space.grid((2, 4, 6), 1.0, "1").coords, "1")
    x = zoo.normal(3, 2, 4, 6)
    close(CoarseGrain(domain, 2).double()(x), x.reshape(3, 1, 2, 2, 2, 3, 2).mean((2, 4, 6)), 8)
    levels = Space(("level", "x"), (4, 6), {"level": np.array([0.0, 1.0, 2.0, 3.0]), "x": np.arange(6.0)}, "1")
    x = zoo.normal(4, 6)
    close(CoarseGrain(levels, 3).double()(x), x.reshape(4, 2, 3).mean(2), 3)
    close(CoarseGrain(levels, {"level": 2}).double()(x), x.reshape(2, 2, 6).mean(1), 2)


@pytest.mark.parametrize("falling", [False, True])
def test_blocks_on_the_sphere_are_weighted_with_areas(falling):
    lat, lon = steps(-75.0, 75.0, 6), np.arange(6) * 60.0
    domain = space(lat=lat[::-1] if falling else lat, lon=lon)
    x = zoo.normal(6, 6)
    area = np.array([sphere_area(s - 15, s + 15, 0, 60) for s in domain.coords["lat"]])
    exact = (x.numpy() * area[:, None]).reshape(3, 2, 3, 2).sum((1, 3)) / (2 * area.reshape(3, 2).sum(1))[:, None]
    A = CoarseGrain(domain, 2).double()
    close(A(x), exact, 8)
    assert np.allclose(A.range.coords["lat"], [60, 0, -60] if falling else [-60, 0, 60])
    assert np.allclose(A.range.coords["lon"], [30, 150, 270])


@pytest.mark.parametrize("first", [-180.0, 0.0, 345.0])
def test_coarse_longitudes_follow_the_convention_of_the_fine_ones(first):
    lon = first + np.arange(6) * 10.0
    for one, middles in ((lon, first + np.array([5.0, 25.0, 45.0])), (lon[::-1], first + np.array([45.0, 25.0, 5.0]))):
        assert np.allclose(CoarseGrain(space(lon=one), 2).range.coords["lon"], middles, rtol=0, atol=1e-12)


# --- Overlaps -----------------------------------------------------------------------------------------------------------


def brute_force(fine, coarse, on_sphere=False, period=None):
    """Common area over coarse area, cell by cell.  fine, coarse: bounds per axis as lists of (low, high)."""
    out = np.ones((1, 1))
    for axis, (small, large) in enumerate(zip(fine, coarse, strict=True)):
        M = np.zeros((len(large), len(small)))
        for i, (a, b) in enumerate(large):
            for j, (c, d) in enumerate(small):
                for turn in (-period, 0, period) if period and axis == 1 else (0,):
                    low, high = max(a, c + turn), min(b, d + turn)
                    if high > low:
                        M[i, j] += sphere_area(low, high, 0, 1) if on_sphere and axis == 0 else high - low
        out = np.kron(out, M / M.sum(1, keepdims=True))
    return out


def pairs(bounds):
    return list(zip(bounds[:-1], bounds[1:], strict=True))


@pytest.mark.parametrize("ratio", [2.5, 5 / 3, 1.25, 10.0])
def test_ratios_that_are_not_whole(ratio):
    """10 cells along y and 20 along x, in cells of equal size."""
    domain = space(y=steps(9.0, 0.0, 10), x=steps(0.0, 19.0, 20))
    n, m = round(10 / ratio), round(20 / ratio)
    exact = brute_force(
        [pairs(steps(9.5, -0.5, 11)[::-1])[::-1], pairs(steps(-0.5, 19.5, 21))],
        [pairs(steps(-0.5, 9.5, n + 1))[::-1], pairs(steps(-0.5, 19.5, m + 1))],
    )
    A = CoarseGrain(domain, ratio).double()
    assert A.range.shape == (n, m)
    close(zoo.dense(A), exact, 40)
    assert np.allclose(A.range.coords["y"], 9.5 - (np.arange(n) + 0.5) * ratio, atol=1e-12)


COARSE = {
    "even": (steps(-75.0, 75.0, 6), steps(20.0, 320.0, 6)),
    "uneven": (np.array([-75.0, -30.0, 0.0, 10.0, 55.0]), np.array([0.0, 50.0, 80.0, 200.0, 300.0])),
    "wide": (np.array([-60.0, 0.0, 60.0]), np.array([0.0, 120.0, 240.0])),
    "falling": (np.array([70.0, 30.0, -20.0]), np.array([300.0, 180.0, 60.0])),
    "across the dateline": (np.array([-20.0, 10.0, 31.0]), np.array([130.0, 170.0, -160.0])),
    "across Greenwich": (np.array([-20.0, 10.0, 31.0]), np.array([-50.0, -17.0, 8.0, 11.0])),
    "a column of it": (np.array([80.0, 70.0]), np.array([-179.0, -178.0])),
}


@pytest.mark.parametrize("name", list(COARSE))
@pytest.mark.parametrize("first", [0.0, -180.0, 7.5])
@pytest.mark.parametrize("falling", [False, True])
def test_coarse_coordinates_on_a_globe(name, first, falling):
    """Bounds half way between coordinates; a globe closes, and reaches to its poles."""
    lat, lon = steps(-90.0, 90.0, 13), first + np.arange(16) * 22.5
    domain = space(lat=lat[::-1] if falling else lat, lon=lon)
    rows, columns = COARSE[name]

    def ends(values, close=False, poles=False):
        up = np.sort(values)
        middle = (up[1:] + up[:-1]) / 2
        low, high = up[0] - (middle[0] - up[0]), up[-1] + (up[-1] - middle[-1])
        if close:
            low = (up[0] + up[-1] - 360) / 2
            high = low + 360
        if poles:
            low, high = -90.0 if up[0] + 90 <= up[1] - up[0] else low, 90.0 if 90 - up[-1] <= up[-1] - up[-2] else high
        bounds = pairs(np.concatenate([[low], middle, [high]]))
        return bounds[::-1] if values[0] > values[-1] else bounds

    east = np.where(columns < columns[0] - 200, columns + 360, columns) if name == "across the dateline" else columns
    whole = name in ("even", "uneven", "wide", "falling")
    fine_rows = pairs(np.clip(np.append(lat - 7.5, 97.5), -90, 90))
    exact = brute_force(
        [fine_rows[::-1] if falling else fine_rows, [(w - 11.25, w + 11.25) for w in lon]],
        [ends(rows, poles=whole), ends(east, close=whole)],
        on_sphere=True,
        period=360,
    )
    A = CoarseGrain(domain, {"lat": rows, "lon": columns}).double()
    got = zoo.dense(A)
    assert np.abs(got.numpy() - exact).max() < 360 * 64 * EPS  # degrees of a whole circle, over cells of a degree
    assert A.range.coords["lon"].tolist() == columns.tolist()


def test_single_precision_coordinates_make_no_slivers():
    """Coarse bounds that miss fine ones by rounding are fine ones: no fine cell is shared."""
    lon = np.arange(3600, dtype=np.float32) * np.float32(0.1)
    domain = space(lon=lon.astype(float))
    A = CoarseGrain(domain, {"lon": (lon.reshape(-1, 4).mean(1)).astype(float)}).double()
    assert A.diagonal is not None
    x = zoo.normal(3600)
    # Widths of single-precision cells are uneven by 3e-5 / 0.1.
    assert float((A(x) - x.reshape(-1, 4).mean(1)).abs().max()) < 2e-3


# --- What is kept -------------------------------------------------------------------------------------------------------

EVERY = {
    "plane": (Space.grid((10, 15), (0.5, 2.0), "K"), 2.5),
    "globe": (space(lat=steps(90.0, -90.0, 13), lon=np.arange(16) * 22.5), {"lat": 13 / 5, "lon": 8 / 3}),
    "globe onto coordinates": (
        space(lat=steps(-82.5, 82.5, 12), lon=np.arange(16) * 22.5 - 180),
        {"lat": COARSE["uneven"][0], "lon": COARSE["uneven"][1]},
    ),
    "uneven": (space(lat=np.array([-60.0, -10.0, 20.0, 70.0]), lon=np.array([0.0, 100.0, 150.0, 300.0])), 2),
}


@pytest.mark.parametrize("name", list(EVERY))
def test_constants_and_the_area_mean_are_kept(name):
    domain, target = EVERY[name]
    A = CoarseGrain(domain, target).double()
    one = torch.full(domain.shape, 3.7, dtype=torch.float64)
    close(A(one), np.full(A.range.shape, 3.7), domain.size)
    fine, coarse = torch.from_numpy(cell_sizes(domain)), torch.from_numpy(cell_sizes(A.range))
    if name in ("plane", "globe onto coordinates"):  # elsewhere the middles of the cells do not say their bounds
        assert float(coarse.sum()) == pytest.approx(float(fine.sum()), rel=64 * EPS)
    else:
        coarse = torch.linalg.lstsq(zoo.dense(A).T, fine.flatten()[:, None]).solution.reshape(A.range.shape)
    x = 5 + zoo.normal(*domain.shape)
    assert float((coarse * A(x)).sum()) == pytest.approx(float((fine * x).sum()), rel=8 * domain.size * EPS)


def test_rotations_and_orders_change_nothing():
    lat, lon = steps(-82.5, 82.5, 12), np.arange(16) * 22.5
    x = zoo.normal(12, 16)
    target = {"lat": COARSE["uneven"][0], "lon": COARSE["uneven"][1]}
    A = CoarseGrain(space(lat=lat, lon=lon), target).double()
    for turn in (-360.0, 360.0):
        assert torch.equal(CoarseGrain(space(lat=lat, lon=lon + turn), target).double()(x), A(x))
        assert torch.equal(
            CoarseGrain(space(lat=lat, lon=lon), {**target, "lon": target["lon"] + turn}).double()(x), A(x)
        )
    close(CoarseGrain(space(lat=lat[::-1], lon=lon[::-1]), target).double()(x.flip(0, 1)), A(x), 200)
    close(CoarseGrain(space(lat=lat, lon=np.roll(lon, 5)), target).double()(x.roll(5, 1)), A(x), 200)


# --- Valid cells --------------------------------------------------------------------------------------------------------

LAND = torch.tensor(
    [
        [1, 1, 0, 0, 0, 0],
        [1, 0, 0, 0, 1, 1],
        [0, 0, 1, 1, 1, 1],
        [0, 0, 1, 1, 1, 1],
    ]
).bool()
ISLAND = space(lat=steps(60.0, 57.0, 4), lon=steps(0.0, 5.0, 6))


def test_means_over_valid_cells():
    A, kept = CoarseGrain.covered(ISLAND, 2, LAND)
    A = A.double()
    assert kept.tolist() == [[True, False, True], [False, True, True]]
    assert A.range.dims == ("datum",) and A.range.coords["datum"].tolist() == [0, 2, 4, 5]
    x = zoo.normal(5, 4, 6)
    area = torch.from_numpy(cell_sizes(ISLAND)) * LAND
    blocks = (x * area).reshape(5, 2, 2, 3, 2).sum((2, 4)) / area.reshape(2, 2, 3, 2).sum((1, 3))
    close(A(x), blocks[:, kept], 8)
    hidden = torch.where(LAND, x, torch.nan)
    assert torch.equal(A(hidden), A(x))
    assert float(A.A_adjoint(zoo.normal(4))[~LAND].abs().max()) == 0
    x[:] = 2.5
    close(A(x), np.full((5, 4), 2.5), 8)


def test_cells_without_valid_cells_are_refused_by_name():
    text = (
        r"2 of 6 coarse cells are not covered by enough valid fine cells: \(lat=59\.5, lon=2\.5\) with 0 %, "
        r"\(lat=57\.5, lon=0\.5\) with 0 %; .*CoarseGrain\.covered"
    )
    with pytest.raises(InputError, match=text):
        CoarseGrain(ISLAND, 2, LAND)
    A = CoarseGrain(ISLAND, 2, LAND, kept=[[1, 0, 0], [0, 0, 1]])
    assert A.range.shape == (2,)
    with pytest.raises(InputError, match="1 of 6 coarse cells"):
        CoarseGrain(ISLAND, 2, LAND, kept=[[1, 1, 0], [0, 0, 1]])
    with pytest.raises(InputError, match="6 of 6 coarse cells .* and 1 more"):
        CoarseGrain.covered(ISLAND, 2, torch.zeros(4, 6, dtype=torch.bool))


def test_coverage():
    shares = torch.from_numpy(np.array([[0.75, 0.0, 0.5], [0.0, 1.0, 1.0]]))  # by area, nearly
    for least in (0.4, 0.6, 0.9):
        _, kept = CoarseGrain.covered(ISLAND, 2, LAND, least)
        assert torch.equal(kept, shares > least)
    _, kept = CoarseGrain.covered(ISLAND, 2, None, 1.0)
    assert kept.all()


def test_cells_beyond_the_grid():
    target = {"lat": [59.0, 58.0], "lon": [-1.0, 1.0, 3.0]}  # the first column is half outside
    with pytest.raises(InputError, match=r"2 of 6 coarse cells .*\(lat=59, lon=-1\) with 25 %"):
        CoarseGrain(ISLAND, target)
    A, kept = CoarseGrain.covered(ISLAND, target)
    assert kept.tolist() == [[False, True, True]] * 2
    half = CoarseGrain(ISLAND, target, coverage=0.2).double()
    close(half(torch.full((4, 6), 1.5).double()), np.full((2, 3), 1.5), 8)
    assert half.range.shape == (2, 3)
    assert torch.allclose(half(zoo.normal(4, 6))[:, 1:].flatten(), A.double()(zoo.normal(4, 6))[[0, 1, 2, 3]])
    with pytest.raises(InputError, match="6 of 6 .* with 0 %"):
        CoarseGrain(ISLAND, {"lat": [10.0, 11.0], "lon": [-1.0, 1.0, 3.0]}, coverage=0.0)


def test_valid_cells_may_differ_along_other_axes():
    domain = Space(("level", "lat", "lon"), (2, 4, 6), dict(ISLAND.coords), "K")
    sea = torch.stack([LAND, torch.ones_like(LAND)])
    A, kept = CoarseGrain.covered(domain, 2, sea)
    assert kept.shape == (2, 2, 3) and int(kept.sum()) == 10 and A.range.shape == (10,)
    same, kept = CoarseGrain.covered(domain, 2, LAND)
    assert same.range.shape == (2, 4) and kept.shape == (2, 3)
    x = zoo.normal(2, 4, 6)
    assert torch.equal(same.double()(x)[0], A.double()(x)[:4])


# --- The regularised inverse --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
def test_whole_ratios_are_solved_without_iterations(weighted):
    A, _ = CoarseGrain.covered(ISLAND, 2, LAND)
    for operator in (CoarseGrain(ISLAND, 2).double(), A.double()):
        M = zoo.dense(operator)
        b = zoo.normal(3, 4, 6)
        w = 0.5 + zoo.normal(*operator.range.shape, step=1).abs() if weighted else torch.ones(operator.range.shape)
        seen = []
        got = operator.solve(b, 0.3, w.double() if weighted else None, watch=seen.append)
        K = M.T @ torch.diag(w.flatten().double()) @ M + 0.3 * torch.eye(24).double()
        exact = torch.linalg.solve(K, b.flatten(1).T).T.reshape(b.shape)
        close(got, exact, 24)
        assert seen == [3]


def test_shared_cells_are_solved_by_iterations():
    A = CoarseGrain(space(x=np.arange(10.0)), 2.5).double()
    seen = []
    A.solve(zoo.normal(2, 10), 0.3, watch=seen.append)
    assert A.diagonal is None and len(seen) > 1


# --- What cannot be -----------------------------------------------------------------------------------------------------

LINE = space(x=np.arange(10.0))


@pytest.mark.parametrize(
    ("domain", "target", "given", "text"),
    [
        (LINE, 3, {}, r"a ratio of 3 does not divide the 10 cells along 'x'; 3\.33333 \(3 cells\) or 2\.5 \(4 cells\) would"),
        (LINE, 40, {}, r"a ratio of 40 does not divide the 10 cells along 'x'; 10 \(1 cells\) would"),
        (LINE, 0.5, {}, "the target along 'x' is a ratio >= 1 or a list of coordinates; got 0.5"),
        (LINE, 1, {}, "a ratio of 1 along every axis leaves nothing to average"),
        (LINE, [1.0, 2.0], {}, 'coarse coordinates need their axes, like {"lat": ...'),
        (LINE, {"y": 2}, {}, r"the field is \(x=10\) \[K\], without y"),
        (Space.vector(4), 2, {}, r"averages along axes of space \(lat, lon, z, y, x\)"),
        (LINE, {"x": [4.5]}, {}, "one x alone has no cell size; give a ratio"),
        (LINE, {"x": [4.5, 4.5 + 1e-4]}, {}, "coarse cells along 'x' are smaller than 0.001 of a fine one"),
        (LINE, {"x": [1.0, 5.0, 3.0]}, {}, "'x' must grow or fall along the whole axis"),
        (LINE, {"x": [1.0, np.nan]}, {}, "the target along 'x' is a ratio >= 1 or a list"),
        (space(x=[1.0]), 2, {}, r"does not divide the 1 cells along 'x'; 1 \(1 cells\) would"),
        (LINE, 2, {"valid": np.ones(9)}, r"valid has the shape of \(x=10\) .* got \(9,\)"),
        (LINE, 2, {"valid": np.full(10, 2)}, "valid and kept hold true and false"),
        (LINE, 2, {"coverage": 2.0}, "coverage is a share of the area, 0 to 1; got 2.0"),
        (LINE, 2, {"kept": [True]}, r"kept is a bool per coarse cell \(5,\); got shape \(1,\)"),
        (space(y=[0.0, 1.0], x=[0.0, 1.0]), 2, {"valid": [True, True]}, "all that are averaged"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(domain, target, given, text):
    with pytest.raises(InputError, match=text):
        CoarseGrain(domain, target, **given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_bit_depends_on_company_or_threads(dtype):
    domain = space(lat=steps(90.0, -90.0, 61), lon=np.arange(120) * 3.0)
    A, _ = CoarseGrain.covered(domain, {"lat": 61 / 7, "lon": 2.5}, zoo.normal(61, 120) > -1)
    A = A.to(dtype)
    x, y = zoo.normal(37, *domain.shape, dtype=dtype), zoo.normal(37, *A.range.shape, dtype=dtype)
    many, back = A(x), A.A_adjoint(y)
    for part in (slice(36, None), slice(5, 8), slice(0, 33)):
        assert torch.equal(A(x[part]), many[part])
        assert torch.equal(A.A_adjoint(y[part]), back[part])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2 if before == 1 else 1)
        assert torch.equal(A(x), many)
        assert torch.equal(A.A_adjoint(y), back)
    finally:
        torch.set_num_threads(before)


# --- A real coarse analysis ---------------------------------------------------------------------------------------------


def read(variable):
    return np.ma.filled(variable[:], np.nan).astype(np.float64)


@pytest.mark.data
def test_a_real_coarse_analysis_sees_the_fine_one_where_it_is():
    """Daily temperature: E-OBS (0.5 degrees, gaps over sea) on the Gaussian grid of NCEP, every third of 1805 winter days."""
    netcdf = importlib.import_module("netCDF4")
    path = Path(os.environ.get("RECON_DATA", "")) / "atmosphere" / "iberia_downscaling_djf_daily.nc"
    if not os.environ.get("RECON_DATA") or not path.is_file():
        pytest.skip("needs atmosphere/iberia_downscaling_djf_daily.nc below RECON_DATA")
    with netcdf.Dataset(path) as file:
        fine, coarse = file["eobs_gridded_obs"], file["ncep_gaussian_t62"]
        x, y = read(fine["tas"])[::3], read(coarse["tas"])[::3]
        domain = space(lat=read(fine["lat"]), lon=read(fine["lon"]), unit="degC")
        target = {"lat": read(coarse["lat"]), "lon": read(coarse["lon"])}
    land = np.isfinite(x).all(0)
    A, kept = CoarseGrain.covered(domain, target, land, 0.5)
    A, y = A.double(), y[:, kept.numpy()]
    assert 15 <= y.shape[1] < kept.numel()

    def error(fields):
        return float(np.sqrt(np.mean((A(torch.from_numpy(np.ascontiguousarray(fields))).numpy() - y) ** 2)))

    right = error(x)
    x = np.where(land, x, np.nanmean(x, axis=(1, 2), keepdims=True))
    assert error(x) == right
    wrong = [x[:, ::-1], x[:, :, ::-1], x[:, ::-1, ::-1]]
    wrong += [np.roll(x, by, axis) for by in (-4, -3, -2, 2, 3, 4) for axis in (1, 2)]
    assert right < min(map(error, wrong))
