"""Point observations against functions that interpolation keeps, against scipy and xarray, and on real stations."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.interpolate import RegularGridInterpolator
from scipy.sparse import coo_matrix
from scipy.stats import norm

from recon.errors import InputError
from recon.likelihoods import GaussianLikelihood
from recon.operators.gather import GatherPair
from recon.operators.point_sensors import PointSensors
from recon.operators.stations import Stations
from recon.space import Space
from tests import zoo

ROUNDING = 64 * np.finfo(float).eps
TURN = 4 * np.finfo(float).eps * 360  # a longitude of a few hundred degrees, reduced to one circle


def space(unit="K", **coords):
    """A field with those axes, in that order."""
    return Space(tuple(coords), tuple(len(v) for v in coords.values()), coords, unit)


def steps(first, last, n):
    return np.linspace(first, last, n)


def rng(seed=0):
    return np.random.default_rng(seed)


def field(domain, function):
    """``function`` of every axis of ``domain`` at once, by name."""
    mesh = np.meshgrid(*(domain.coords[dim] for dim in domain.dims), indexing="ij")
    return torch.from_numpy(np.asarray(function(**dict(zip(domain.dims, mesh, strict=True)))))


def globe(nlat=6, nlon=8, first=0.0, poles=False):
    """Whole circles of longitude, with or without rows at the poles."""
    half = 0 if poles else 90 / nlat
    return space(lat=steps(90 - half, -90 + half, nlat), lon=first + 360 / nlon * np.arange(nlon))


# --- Functions that are linear along every axis -------------------------------------------------------------------------

CROSSING = np.array([170.0, 172.5, 177.0, -179.0, -176.5, -170.0])  # the dateline, unevenly
GREENWICH = np.array([354.0, 356.5, 358.0, 0.5, 3.0])
GRIDS = {
    "profile": dict(level=np.array([1000.0, 850.0, 700.0, 300.0])),
    "line": dict(x=steps(-3.0, 5.0, 7)),
    "plane": dict(y=steps(4.0, -4.0, 5), x=steps(-1.0, 2.0, 4)),
    "uneven plane": dict(y=np.array([-1.0, 0.2, 0.9, 4.0]), x=np.array([5.0, 1.0, -2.0])),
    "volume": dict(z=steps(-1.0, 1.0, 3), y=steps(2.0, -2.0, 5), x=steps(-3.0, 3.0, 4)),
    "region": dict(lat=steps(35.25, 44.25, 7), lon=steps(-9.75, 4.25, 6)),
    "region, falling": dict(lat=steps(60.0, 50.0, 5), lon=steps(8.0, -4.0, 6)),
    "region, columns first": dict(lon=steps(0.0, 20.0, 6), lat=steps(50.0, 60.0, 4)),
    "dateline": dict(lat=steps(-20.0, 20.0, 5), lon=CROSSING),
    "dateline, westward": dict(lat=steps(-20.0, 20.0, 5), lon=CROSSING[::-1]),
    "Greenwich": dict(lat=steps(20.0, -20.0, 5), lon=GREENWICH),
    "levels": dict(level=np.array([200.0, 500.0, 850.0]), lat=steps(60.0, 50.0, 5), lon=CROSSING),
    "globe": dict(lat=steps(-90.0, 90.0, 7), lon=steps(-180.0, 135.0, 8)),
}


def unwrapped(name, lon):
    """Longitudes as one growing number along a region (they fit together where the array jumps)."""
    return np.where(lon < 0, lon + 360, lon) if "dateline" in name or name == "levels" else (
        np.where(lon > 180, lon - 360, lon) if name == "Greenwich" else lon
    )  # fmt: skip


@pytest.mark.parametrize("name", list(GRIDS))
def test_what_is_linear_along_every_axis_is_reproduced(name):
    domain, random = space(**GRIDS[name]), rng(1)
    slopes = {dim: random.normal(size=2) for dim in domain.dims}

    def function(**at):
        at = {dim: unwrapped(name, v) if dim == "lon" else v for dim, v in at.items()}
        return np.prod([slopes[dim][0] + slopes[dim][1] * v / 50 for dim, v in at.items()], axis=0)

    columns = {}
    for dim, v in GRIDS[name].items():
        v = unwrapped(name, v) if dim == "lon" else v
        columns[dim] = np.append(random.uniform(v.min(), v.max(), 40), [v[0], v[-1], v[1]])
    exact = torch.from_numpy(function(**columns))
    for turn in (0.0, 360.0) if "lon" in columns else (0.0,):
        given = {**columns, "lon": columns["lon"] + turn} if turn else columns
        A = PointSensors(domain, Stations(**given)).double()
        x = field(domain, function)
        assert A.range.shape == (43,)
        assert float((A(x) - exact).abs().max()) < (ROUNDING + TURN) * float(x.abs().max())


def test_log_pressure():
    domain = space(level=np.array([1000.0, 700.0, 300.0, 100.0]))
    stations = Stations(level=[1000.0, 123.0, 850.0, 500.0])
    x = field(domain, lambda level: 3 - 2 * np.log(level))
    got = PointSensors(domain, stations, vertical="log").double()(x)
    exact = 3 - 2 * np.log(stations.column("level"))
    assert np.abs(got.numpy() - exact).max() < ROUNDING * np.abs(exact).max()
    linear = PointSensors(domain, stations).double()(x)
    assert float((linear - got).abs().max()) > 0.1


def test_a_station_on_a_point_reads_that_point_alone():
    domain = globe(7, 8, poles=True)
    x = torch.full(domain.shape, torch.nan, dtype=torch.float64)
    x[2, 0], x[6, 7] = 3.0, 4.0
    A = PointSensors(domain, Stations(lat=[30.0, -90.0], lon=[360.0, -45.0])).double()
    assert A(x).tolist() == [3.0, 4.0]


@pytest.mark.parametrize("method", ["linear", "nearest"])
def test_against_scipy(method):
    domain = space(level=np.array([850.0, 500.0, 200.0]), y=np.array([5.0, 1.0, 0.0, -3.0]), x=steps(0.0, 4.0, 6))
    x = zoo.normal(*domain.shape)
    points = np.stack([rng(2).uniform(np.min(c), np.max(c), 50) for c in domain.coords.values()])
    ascending = [np.sort(c) for c in domain.coords.values()]
    values = x.numpy()[::-1, ::-1]
    exact = RegularGridInterpolator(ascending, values, method=method)(points.T)
    A = PointSensors(domain, Stations(**dict(zip(domain.dims, points, strict=True))), method).double()
    assert np.abs(A(x).numpy() - exact).max() < ROUNDING * float(x.abs().max())


def test_against_xarray():
    xarray = pytest.importorskip("xarray")
    domain = space(lat=steps(35.25, 44.25, 7), lon=steps(-9.75, 4.25, 9))
    x = zoo.normal(*domain.shape)
    lat, lon = rng(3).uniform(36, 44, 30), rng(4).uniform(-9, 4, 30)
    array = xarray.DataArray(x.numpy(), dims=domain.dims, coords=dict(domain.coords))
    at = {"lat": xarray.DataArray(lat, dims="station"), "lon": xarray.DataArray(lon, dims="station")}
    got = PointSensors(domain, Stations(lat=lat, lon=lon)).double()(x)
    assert np.abs(got.numpy() - array.interp(at).values).max() < (ROUNDING + TURN) * float(x.abs().max())


# --- The circle ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [0.0, -180.0, 22.5, 180.0])
@pytest.mark.parametrize("westward", [False, True])
def test_a_globe_closes_wherever_its_array_begins(first, westward):
    """Against scipy on the same field with its first column repeated behind the last one."""
    domain = globe(7, 16, first, poles=True)
    x = zoo.normal(*domain.shape)
    lat, lon = domain.coords["lat"], domain.coords["lon"]
    wide = np.concatenate([x.numpy(), x.numpy()[:, :1]], axis=1)[::-1]
    at_lat, at_lon = rng(5).uniform(-90, 90, 60), rng(6).uniform(0, 360, 60)
    exact = RegularGridInterpolator((lat[::-1], np.append(lon, first + 360)), wide)(
        np.stack([at_lat, first + np.mod(at_lon - first, 360)], axis=1)
    )
    if westward:
        domain, x = space(lat=lat, lon=lon[::-1]), x.flip(1)
    got = PointSensors(domain, Stations(lat=at_lat, lon=at_lon)).double()(x)
    assert np.abs(got.numpy() - exact).max() < (ROUNDING + TURN) * float(x.abs().max())


def test_a_region_does_not_close():
    domain = space(lat=[0.0, 1.0], lon=steps(0.0, 330.0, 12))
    assert PointSensors(domain, Stations(lat=0.5, lon=359.0)).range.shape == (1,)
    region = space(lat=[0.0, 1.0], lon=steps(0.0, 300.0, 11))
    with pytest.raises(InputError, match="1 of 1 stations lie outside the grid"):
        PointSensors(region, Stations(lat=0.5, lon=359.0))


def test_a_full_turn_changes_no_bit():
    domain = globe(6, 8, -180.0)
    lat, lon = rng(7).uniform(-90, 90, 50), np.round(rng(8).uniform(-180, 180, 50) * 2**20) / 2**20
    x = zoo.normal(*domain.shape)
    expected = PointSensors(domain, Stations(lat=lat, lon=lon)).double()(x)
    moved = space(lat=domain.coords["lat"], lon=domain.coords["lon"] + 360)
    for grid in (domain, moved):
        for turn in (-360.0, 0.0, 360.0):
            inside = (lon + turn >= -360) & (lon + turn <= 720)
            A = PointSensors(grid, Stations(lat=lat[inside], lon=lon[inside] + turn)).double()
            assert torch.equal(A(x), expected[torch.from_numpy(inside)])


def test_both_conventions_of_a_longitude_are_one_place():
    domain = globe(6, 9, 0.1)
    east = -np.arange(1, 1801) / 10  # decimals, most of them no binary fractions
    x = zoo.normal(*domain.shape)
    one, other = (
        PointSensors(domain, Stations(lat=np.full(1800, 0.3), lon=lon)).double()(x) for lon in (east, east + 360)
    )
    assert torch.equal(one, other)


@pytest.mark.parametrize("poles", [False, True])
def test_the_order_of_the_array_changes_no_bit(poles):
    domain = globe(6, 8, poles=poles)
    stations = Stations(lat=rng(9).uniform(-90, 90, 50), lon=rng(10).uniform(0, 360, 50))
    x = zoo.normal(*domain.shape)
    expected = PointSensors(domain, stations).double()(x)
    turned = space(lat=domain.coords["lat"][::-1], lon=domain.coords["lon"])
    assert torch.equal(PointSensors(turned, stations).double()(x.flip(0)), expected)
    rolled = space(lat=domain.coords["lat"], lon=np.roll(domain.coords["lon"], 3))
    got = PointSensors(rolled, stations).double()(x.roll(3, 1))
    assert float((got - expected).abs().max()) < (ROUNDING + TURN) * float(x.abs().max())


# --- The poles ----------------------------------------------------------------------------------------------------------


def test_a_row_at_the_pole_is_one_place():
    domain = globe(7, 8, poles=True)
    x = zoo.normal(*domain.shape)
    x[0], x[-1] = 1.7, -0.3
    lon = steps(0.0, 350.0, 36)
    for lat, value in ((90.0, 1.7), (-90.0, -0.3)):
        got = PointSensors(domain, Stations(lat=np.full(36, lat), lon=lon)).double()(x)
        assert float((got - value).abs().max()) < ROUNDING


def tangent(lat, lon, sign=1):
    """A scalar that is linear in the plane that touches a pole: ``2 + 0.1 colatitude cos(lon - 50)``."""
    return 2 + 0.1 * (90 - sign * lat) * np.cos(np.deg2rad(lon - 50))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("falling", [False, True])
def test_beyond_the_last_row_the_pole_is_the_mean_of_that_row(sign, falling):
    nlat = 12
    domain = globe(nlat, 10)
    if not falling:
        domain = space(lat=domain.coords["lat"][::-1], lon=domain.coords["lon"])
    x = field(domain, lambda lat, lon: tangent(lat, lon, sign))
    edge = 90 - 90 / nlat
    lat = sign * np.repeat([90.0, 89.0, 85.0, edge + 1e-6, edge], 10)
    lon = np.tile(domain.coords["lon"], 5)
    got = PointSensors(domain, Stations(lat=lat, lon=lon)).double()(x)
    assert np.abs(got.numpy() - tangent(lat, lon, sign)).max() < (ROUNDING + TURN) * float(x.abs().max())
    mean = float(x[0 if (sign > 0) == falling else -1].mean())
    assert float((got[:10] - mean).abs().max()) < ROUNDING * float(x.abs().max())


def test_weights_sum_to_one_and_are_not_negative():
    A = PointSensors(globe(6, 8), Stations(lat=steps(-90.0, 90.0, 37), lon=steps(1.0, 331.0, 37))).double()
    M = zoo.dense(A)
    assert float((M.sum(1) - 1).abs().max()) < ROUNDING
    assert float(M.min()) == 0.0
    assert sorted(set((M != 0).sum(1).tolist())) == [2, 4, 8]  # on a row; between two; at a pole


@pytest.mark.parametrize("sign", [1, -1])
def test_a_vector_at_the_pole(sign):
    """A constant wind in the plane that touches the pole, seen as eastward and northward components."""
    wind = (3.0, -2.0)
    domain = globe(12, 10)
    lat, lon = domain.coords["lat"], np.deg2rad(domain.coords["lon"])
    u = np.broadcast_to(-wind[0] * np.sin(lon) + wind[1] * np.cos(lon), (12, 10))
    v = np.broadcast_to(-sign * (wind[0] * np.cos(lon) + wind[1] * np.sin(lon)), (12, 10))
    both = Space(("variable", "lat", "lon"), (2, 12, 10), {**domain.coords, "variable": ("u", "v")}, "m/s")
    x = torch.from_numpy(np.stack([u, v]))
    at = np.array([0.0, 36.0, 144.0, 324.0, 72.0])
    stations = Stations(lat=sign * np.array([90.0, 90.0, 90.0, 88.0, 84.0]), lon=at, variable=("u", "v", "u", "v", "u"))
    got = PointSensors(both, stations, vectors=("u", "v")).double()(x)
    columns = (at / 36).astype(int)
    exact = [x["uv".index(name), 0, column] for name, column in zip("uvuvu", columns, strict=True)]
    assert np.abs(got.numpy() - np.array(exact)).max() < ROUNDING * 4
    scalar = PointSensors(both, stations).double()(x)
    assert float(scalar[:3].abs().max()) < ROUNDING * 4
    assert lat[0] == 82.5


def test_a_circle_far_from_the_pole_has_none():
    band = space(lat=steps(60.0, 10.0, 6), lon=steps(0.0, 315.0, 8))
    sector = space(lat=steps(-85.0, 85.0, 18), lon=steps(0.0, 90.0, 10))
    for domain, lat in ((band, 70.0), (sector, 89.0)):
        with pytest.raises(InputError, match="1 of 1 stations lie outside"):
            PointSensors(domain, Stations(lat=lat, lon=45.0))


# --- The nearest point --------------------------------------------------------------------------------------------------


def test_nearest_is_the_smallest_distance_along_each_axis():
    domain = globe(6, 9, -170.0)
    lat, lon = rng(11).uniform(-90, 90, 200), rng(12).uniform(-180, 180, 200)
    rows = np.abs(lat[:, None] - domain.coords["lat"]).argmin(1)
    apart = np.abs(np.mod(lon[:, None] - domain.coords["lon"] + 180, 360) - 180)
    x = zoo.normal(*domain.shape)
    A = PointSensors(domain, Stations(lat=lat, lon=lon), "nearest").double()
    assert torch.equal(A(x), x[torch.from_numpy(rows), torch.from_numpy(apart.argmin(1))])


def test_nearest_takes_stations_in_the_outermost_cells():
    domain = space(y=steps(3.0, 0.0, 4), x=steps(0.0, 2.0, 3))
    inside, outside = Stations(y=[3.49, -0.49], x=[-0.49, 2.49]), Stations(y=[3.51], x=[0.0])
    x = zoo.normal(4, 3)
    assert torch.equal(PointSensors(domain, inside, "nearest").double()(x), torch.stack([x[0, 0], x[3, 2]]))
    for stations, method in ((outside, "nearest"), (inside, "linear")):
        with pytest.raises(InputError, match="lie outside the grid"):
            PointSensors(domain, stations, method)


def test_nearest_west_of_the_first_column():
    domain = space(lat=steps(1.0, 0.0, 3), lon=steps(350.0, 362.0, 4))
    x = zoo.normal(3, 4)
    for lon in (-11.9, 348.1, -10.5):
        assert torch.equal(PointSensors(domain, Stations(lat=0.9, lon=lon), "nearest").double()(x), x[0, :1])
    with pytest.raises(InputError, match=r"the grid covers lat 0\.\.1, lon -10\.\.2"):
        PointSensors(domain, Stations(lat=0.9, lon=347.9), "nearest")
    assert torch.equal(PointSensors(domain, Stations(lat=1.0, lon=-10 - 1e-6)).double()(x), x[0, :1])


def test_of_two_equally_near_the_lower_coordinate_is_read():
    for x_axis in (steps(0.0, 2.0, 3), steps(2.0, 0.0, 3)):
        A = PointSensors(space(x=x_axis), Stations(x=0.5), "nearest").double()
        assert float(A(torch.from_numpy(x_axis))) == 0.0


# --- Stations outside ---------------------------------------------------------------------------------------------------

OUTSIDE = Stations(lat=[40.0, 50.0, 41.0], lon=[0.0, 0.0, 9.0], names=("A", "B", "C"), sigma=[1.0, 2.0, 3.0])
REGION = space(lat=steps(36.0, 44.0, 5), lon=steps(-9.0, 3.0, 5))


def test_stations_outside_are_named():
    text = (
        r"2 of 3 stations lie outside the grid: 'B' \(lat=50, lon=0\), 'C' \(lat=41, lon=9\); the grid covers "
        r"lat 36\.\.44, lon -9\.\.3\. PointSensors\.inside"
    )
    with pytest.raises(InputError, match=text):
        PointSensors(REGION, OUTSIDE)
    domain = space(level=[850.0, 200.0], **REGION.coords)
    with pytest.raises(InputError, match=r"'S' \(level=100, lat=40, lon=0\); the grid covers level 200\.\.850"):
        PointSensors(domain, Stations(level=100.0, lat=40.0, lon=0.0, names=["S"]), vertical="log")
    with pytest.raises(InputError, match=r"number 0 \(x=9\), number 1 \(x=9\).* and 2 more; the grid covers x 0\.\.1"):
        PointSensors(space(x=[0.0, 1.0]), Stations(x=np.full(7, 9.0)))


def test_inside_says_which_it_kept():
    A, kept = PointSensors.inside(REGION, OUTSIDE)
    assert kept.tolist() == [True, False, False]
    assert A.stations == OUTSIDE.select(kept)
    assert A.stations.total_sigma().tolist() == [1.0]
    assert A.range.coords["station"] == ("A",)
    x = zoo.normal(*REGION.shape)
    assert torch.equal(A.double()(x), PointSensors(REGION, Stations(lat=40.0, lon=0.0)).double()(x))
    everything, kept = PointSensors.inside(REGION, Stations(lat=[40.0, 44.0], lon=[0.0, -9.0]))
    assert kept.all() and everything.range.shape == (2,)
    with pytest.raises(InputError, match=r"no station is inside the grid \(lat 36\.\.44, lon -9\.\.3\)"):
        PointSensors.inside(REGION, Stations(lat=80.0, lon=0.0))


def test_inside_passes_every_option_on():
    domain = space(level=[850.0, 200.0], lat=globe(6, 8).coords["lat"], lon=globe(6, 8).coords["lon"])
    domain = Space(("variable", *domain.dims), (2, *domain.shape), {**domain.coords, "variable": ("u", "t")}, "mixed")
    stations = Stations(lat=[88.0, 10.0, 10.0], lon=20.0, level=[300.0, 300.0, 9.0], variable=("u", "t", "t"))
    x = zoo.normal(*domain.shape)
    options = {"method": "nearest", "vertical": "log", "units": {"u": "m/s", "t": "K"}, "vectors": ("u",)}
    seen = []
    for given in ({}, *({name: value} for name, value in options.items())):
        A, kept = PointSensors.inside(domain, stations, **given)
        again = PointSensors(domain, stations.select(kept), **given)
        assert torch.equal(A.double()(x), again.double()(x)) and A.units == again.units
        seen.append((tuple(A(x).tolist()), A.units))
    assert len(set(seen)) == 5


def test_a_station_on_the_edge_of_a_single_precision_grid_is_inside():
    axis = np.arange(360, dtype=np.float32) * np.float32(0.1) + np.float32(300)
    domain = space(lat=[0.0, 1.0], lon=axis.astype(float))
    assert float(axis[-1]) < 335.9
    assert PointSensors(domain, Stations(lat=0.0, lon=335.9)).range.shape == (1,)


# --- Variables, levels, units, other axes -------------------------------------------------------------------------------

WEATHER = Space(
    ("variable", "level", "lat", "lon"),
    (3, 2, 5, 5),
    {"variable": ("u", "v", "t"), "level": np.array([850.0, 500.0]), **REGION.coords},
    "mixed",
)
UNITS = {"u": "m/s", "v": "m/s", "t": "K"}


def weather_stations(*variable):
    n = len(variable)
    return Stations(lat=steps(36.0, 43.0, n), lon=steps(-8.0, 3.0, n), level=steps(850.0, 600.0, n), variable=variable)


def test_each_station_observes_its_variable():
    stations = weather_stations("t", "u", "t", "v")
    A = PointSensors(WEATHER, stations, units=UNITS).double()
    x = zoo.normal(*WEATHER.shape)
    one = Space(WEATHER.dims[1:], WEATHER.shape[1:], {d: WEATHER.coords[d] for d in WEATHER.dims[1:]}, "K")
    alone = Stations(lat=stations.lat, lon=stations.lon, level=stations.level)
    every = torch.stack([PointSensors(one, alone).double()(x[i]) for i in range(3)])
    assert torch.equal(A(x), torch.stack([every[2, 0], every[0, 1], every[2, 2], every[1, 3]]))
    assert A.units == ("K", "m/s", "K", "m/s")
    assert A.range.unit == "mixed"
    assert PointSensors(WEATHER, weather_stations("u", "v"), units=UNITS).range.unit == "m/s"
    assert PointSensors(WEATHER, stations).range.unit == "mixed"


def test_other_axes_are_kept():
    domain = Space(("time", "lat", "lon"), (3, 5, 5), {"time": np.arange(3.0), **REGION.coords}, "K")
    stations = Stations(lat=[40.0, 41.3], lon=[0.1, -5.0])
    A, alone = PointSensors(domain, stations).double(), PointSensors(REGION, stations).double()
    x = zoo.normal(2, 3, 5, 5)
    assert A.range.dims == ("time", "station")
    assert A.range.coords["time"].tolist() == [0, 1, 2]
    assert A.range.coords["station"].tolist() == [0, 1]
    assert torch.equal(A(x), torch.stack([alone(x[:, t]) for t in range(3)], dim=1))


HERE = Stations(lat=40.0, lon=0.0)


@pytest.mark.parametrize(
    ("domain", "stations", "given", "text"),
    [
        (REGION, Stations(lat=40.0, lon=0.0, level=5.0), {}, "needs exactly lat, lon"),
        (REGION, Stations(y=1.0, x=1.0), {}, "the stations have y, x; a field .* needs exactly lat, lon"),
        (REGION, HERE, {"method": "cubic"}, "method must be one of linear, nearest; got 'cubic'"),
        (REGION, HERE, {"vertical": "log"}, "vertical='log' needs a 'level' axis"),
        (REGION, Stations(lat=40.0, lon=0.0, variable="t"), {}, "has no 'variable' axis with names"),
        (REGION, HERE, {"vectors": ("u",)}, "vectors names u; the field has no named variables"),
        (WEATHER, Stations(lat=40.0, lon=0.0, level=700.0), {}, "say which each station observes"),
        (WEATHER, weather_stations("q", "t"), {}, r"Stations\.variable names q; the field has u, v, t"),
        (WEATHER, weather_stations("t"), {"units": {"t": "K"}}, r"units must name every variable \(u, v, t\); got t"),
        (Space.vector(5), HERE, {}, "reads fields whose last axes are one or more of level, lat, lon, z, y, x"),
        (Space(("lat", "lon", "time"), (5, 5, 2), REGION.coords), HERE, {}, "reads fields whose last axes"),
        (Space(("lat", "lon"), (2, 2)), HERE, {}, "the axis 'lat' of .* needs numbers as coordinates; it has none"),
        (space(lat=("a", "b"), lon=[0.0, 1.0]), HERE, {}, "the axis 'lat' .* it has names"),
        (space(lat=[0.0, 2.0, 1.0], lon=[0.0, 1.0]), HERE, {}, "'lat' must grow or fall along the whole axis"),
        (space(lat=[0.0, 91.0], lon=[0.0, 1.0]), HERE, {}, "-90 to 90; the grid has 0 to 91"),
        (space(lat=[0.0, np.nan], lon=[0.0, 1.0]), HERE, {}, "coordinates of 'lat' hold values that are NaN"),
        (space(lat=[0.0, 1.0], lon=steps(0.0, 360.0, 9)), HERE, {}, "the same longitude comes twice"),
        (space(lat=[0.0, 1.0], lon=[0.0, 1.0, 1.0]), HERE, {}, "the same longitude comes twice"),
        (space(lat=[0.0, 1.0], lon=[0.0, 2.0, 1.0]), HERE, {}, "longitudes must grow .* eastward along the whole axis"),
        (space(lat=[0.0, 1.0], lon=steps(0.0, 540.0, 9)), HERE, {}, "span less than a circle"),
        (space(level=[0.0, 1.0]), Stations(level=1.0), {"vertical": "log"}, "a logarithmic level needs positive"),
        (space(level=[1.0, 2.0]), Stations(level=-1.0), {"vertical": "log"}, "a logarithmic level must be positive"),
        (Space(("variable", "x"), (2, 2), {"x": [0.0, 1.0]}), Stations(x=0.5), {}, "needs names as coordinates"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(domain, stations, given, text):
    with pytest.raises(InputError, match=text):
        PointSensors(domain, stations, **given)


def test_units_that_contradict_the_field():
    kelvin = Space(WEATHER.dims, WEATHER.shape, WEATHER.coords, "K")
    with pytest.raises(InputError, match="the field has the unit 'K', not .*; a field of several is 'mixed'"):
        PointSensors(kelvin, weather_stations("t"), units=UNITS)


def test_a_single_point_along_an_axis():
    domain = space(level=[500.0], x=[0.0, 1.0])
    assert (
        float(PointSensors(domain, Stations(level=500.0, x=0.25)).double()(torch.tensor([[1.0, 3.0]]).double())) == 1.5
    )
    with pytest.raises(InputError, match="outside"):
        PointSensors(domain, Stations(level=501.0, x=0.25))


# --- The table ----------------------------------------------------------------------------------------------------------


def test_a_table_is_a_value():
    one = Stations(lat=np.array([1.0, 2.0]), lon=(3, 4), level=500, variable="t", names=["a", "b"], sigma=[0.5, 1 / 3])
    assert len(one) == 2
    assert one.level == (500.0, 500.0) and one.variable == ("t", "t") and one.representativeness == (0.0, 0.0)
    assert eval(repr(one)) == one and len({one, eval(repr(one))}) == 1
    assert one != Stations(lat=(1.0, 2.0), lon=(3, 5), level=500, variable="t", names=["a", "b"], sigma=[0.5, 1 / 3])
    assert one.select(np.array([False, True])) == Stations(
        lat=2.0, lon=4.0, level=500, variable="t", names=["b"], sigma=1 / 3
    )


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({}, "Stations need a position: one or more of level, lat, lon, z, y, x"),
        ({"lat": [1.0, 2.0], "lon": [1.0]}, r"one value per row; got \{'lat': 2, 'lon': 1\}"),
        ({"x": []}, "one value per row"),
        ({"x": [[1.0]]}, r"the x of Stations is a list, one number per row; got shape \(1, 1\)"),
        ({"x": "here"}, "the x of Stations must be numbers; got 'here'"),
        (
            {"lat": [1.0, 95.0], "lon": 0.0, "names": ["a", "b"]},
            r"1 of 2 stations have a latitude beyond .*'b' \(lat=95",
        ),
        ({"lat": 1.0, "lon": -998.8888}, "have no possible longitude"),
        ({"x": [1.0, np.nan]}, r"1 of 2 stations have a x that is NaN or infinite; leave them out: number 1"),
        ({"x": 1.0, "sigma": 0.0}, "have a sigma that is not positive"),
        ({"x": 1.0, "representativeness": -1.0}, "have a negative representativeness error"),
        ({"x": [1.0, 2.0], "names": "ab"}, "names must be a list with one name per station; got 'ab'"),
    ],
)
def test_tables_that_cannot_be(given, text):
    with pytest.raises(InputError, match=text):
        Stations(**given)


def test_sigma_of_a_likelihood():
    stations = Stations(lat=[40.0, 41.3], lon=[0.1, -5.0], sigma=[0.3, 0.4], representativeness=0.4)
    assert torch.allclose(stations.total_sigma(), torch.tensor([0.5, np.sqrt(0.32)]).double(), rtol=1e-15)
    A = PointSensors(REGION, stations).double()
    x, y = zoo.normal(3, *REGION.shape), zoo.normal(2, step=1)
    got = GaussianLikelihood(A, y, stations.total_sigma()).log_prob(x)
    exact = norm.logpdf(y.numpy(), A(x).numpy(), [0.5, np.sqrt(0.32)]).sum(1)
    assert np.allclose(got.numpy(), exact, rtol=1e-13)
    with pytest.raises(InputError, match=r"these stations have no sigma; give Stations\(sigma=\.\.\.\)"):
        HERE.total_sigma()


def test_missing_values_are_left_out():
    stations = Stations(x=[0.0, 1.0, 2.0], names=["a", "b", "c"], sigma=[1.0, 2.0, 3.0])
    for y in (np.array([1.0, np.nan, 3.0]), torch.tensor([1.0, np.nan, 3.0])):
        there, values = stations.present(y)
        assert there.names == ("a", "c") and there.sigma == (1.0, 3.0)
        assert type(values) is type(y) and values.dtype == y.dtype and values.tolist() == [1.0, 3.0]
    with pytest.raises(InputError, match=r"one value per station \(3\); got shape \(2,\)"):
        stations.present(np.zeros(2))
    with pytest.raises(InputError, match=r"1 of 3 stations report an infinite value.*: 'b' \(x=1\)"):
        stations.present(np.array([0.0, np.inf, 0.0]))
    with pytest.raises(InputError, match="no station is left of 3"):
        stations.present(np.full(3, np.nan))
    with pytest.raises(InputError, match=r"select takes a bool per station \(3\)"):
        stations.select(np.array([0, 1, 1]))


# --- Gathers ------------------------------------------------------------------------------------------------------------


def test_gathers_are_a_matrix_and_its_transpose():
    """Empty rows and columns, rows of different lengths, entries that come twice."""
    random = rng(13)
    rows, columns, values = random.integers(0, 9, 40), random.integers(2, 12, 40), random.normal(size=40)
    rows = np.where(rows == 4, 5, rows)
    M = torch.from_numpy(coo_matrix((values, (rows, columns)), (9, 13)).toarray())
    pair = GatherPair(rows, columns, values, (9, 13)).double()
    x, y = zoo.normal(3, 13, 2), zoo.normal(3, 9, 2, step=1)
    assert torch.allclose(pair(x), torch.einsum("ij,njk->nik", M, x), rtol=0, atol=1e-14)
    assert torch.allclose(pair.transpose(y), torch.einsum("ij,nik->njk", M, y), rtol=0, atol=1e-14)
    assert torch.equal(pair.along(x.permute(0, 2, 1), 2), pair(x).permute(0, 2, 1))
    assert torch.equal(pair.along(y[None], 2, transpose=True), pair.transpose(y)[None])
    with pytest.raises(InputError, match=r"holds torch\.float64 numbers; got torch\.float32"):
        pair(x.float())


def test_precision_is_not_lost_on_the_way():
    A = PointSensors(REGION, Stations(lat=40.1, lon=0.3))
    direct = PointSensors(REGION, Stations(lat=40.1, lon=0.3)).double()
    x = zoo.normal(*REGION.shape)
    assert A.dtype == torch.float32 and direct.dtype == torch.float64
    assert torch.equal(A.double().float().double()(x), direct(x))
    exact = RegularGridInterpolator([REGION.coords["lat"], REGION.coords["lon"]], x.numpy())([[40.1, 0.3]])
    assert abs(float(direct(x)) - exact[0]) < (ROUNDING + TURN) * float(x.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_bit_depends_on_company_or_threads(dtype):
    domain = globe(30, 61)
    stations = Stations(lat=rng(14).uniform(-90, 90, 333), lon=rng(15).uniform(0, 360, 333))
    A = PointSensors(domain, stations).to(dtype)
    x, y = zoo.normal(37, 30, 61, dtype=dtype), zoo.normal(37, 333, dtype=dtype)
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


# --- Real stations and analyses -----------------------------------------------------------------------------------------


def atmosphere(name):
    netcdf = importlib.import_module("netCDF4")
    path = Path(os.environ.get("RECON_DATA", "")) / "atmosphere" / name
    if not os.environ.get("RECON_DATA") or not path.is_file():
        pytest.skip(f"needs atmosphere/{name} below RECON_DATA")
    return netcdf.Dataset(path)


def read(variable):
    return np.ma.filled(variable[:], np.nan).astype(np.float64)


def wrong_geometries(x):
    """Flips of the last two axes and shifts by one and two cells."""
    yield from (x[:, ::-1], x[:, :, ::-1], x[:, ::-1, ::-1])
    yield from (np.roll(x, by, axis) for by in (-2, -1, 1, 2) for axis in (1, 2))


@pytest.mark.data
@pytest.mark.parametrize("variable", ["tas", "pr"])
def test_real_stations_see_the_analysis_where_they_are(variable):
    """Iberian stations against the E-OBS grid on every third of 1805 winter days; the gaps over sea take the day's mean."""
    with atmosphere("iberia_downscaling_djf_daily.nc") as file:
        grid, table = file["eobs_gridded_obs"], file["stations"]
        x, y = read(grid[variable])[::3], read(table[variable])[::3]
        domain = space(lat=read(grid["lat"]), lon=read(grid["lon"]), unit="degC")
        stations = Stations(lat=read(table["lat"]), lon=read(table["lon"]), names=tuple(table["station_name"][:]))
    A = PointSensors(domain, stations).double()
    seen = A(torch.from_numpy(x)).isfinite().all(0).numpy()
    assert 6 <= seen.sum() < len(stations)  # stations at the coast have sea among their four cells
    assert PointSensors(domain, stations, "nearest").double()(torch.from_numpy(x)).isfinite().all()
    x = np.where(np.isfinite(x), x, np.nanmean(x, axis=(1, 2), keepdims=True))

    def scores(fields):
        out = A(torch.from_numpy(np.ascontiguousarray(fields))).numpy()
        correlation, error = [], []
        for i in np.flatnonzero(seen):
            there = np.isfinite(y[:, i])
            correlation.append(np.corrcoef(out[there, i], y[there, i])[0, 1])
            error.append(np.sqrt(np.mean((out[there, i] - y[there, i]) ** 2)))
        return np.mean(correlation), np.mean(error)

    correlation, error = scores(x)
    wrong = [scores(fields) for fields in wrong_geometries(x)]
    assert correlation > max(c for c, _ in wrong)
    assert error < min(e for _, e in wrong)
    assert correlation > 0.9  # the grid is made of these and other stations


@pytest.fixture(scope="module")
def era():
    with atmosphere("erainterim_global_075deg.nc") as file:
        group = file["surface_2017_monthly"]
        names = ("latitude", "longitude", "t2m", "u10", "v10")
        yield {name: read(group[name]) for name in names}


@pytest.mark.data
def test_a_thinned_analysis_predicts_what_was_left_out(era):
    """Every second row and column is the grid; every value between is a station.  The seam is as good as the interior."""
    lat, lon, t2m = era["latitude"], era["longitude"], torch.from_numpy(era["t2m"])
    domain = space(lat=lat[::2], lon=lon[::2])
    at = np.stack(np.meshgrid(lat[1:-1:2], lon[1::2], indexing="ij")).reshape(2, -1)
    A = PointSensors(domain, Stations(lat=at[0], lon=np.where(at[1] > 180, at[1] - 360, at[1]))).double()
    truth = t2m[:, 1:-1:2, 1::2]

    def errors(fields):
        return A(fields).reshape(truth.shape) - truth

    fields = t2m[:, ::2, ::2]
    right = errors(fields).square().mean().sqrt()
    wrong = [
        errors(w).square().mean().sqrt()
        for w in (fields.flip(1), fields.flip(2), fields.roll(1, 2), fields.roll(-1, 2))
    ]
    assert right < min(wrong)
    columns = errors(fields).square().mean((0, 1)).sqrt()
    assert columns[-1] < columns.max()  # 359.25 E, between 358.5 E and 0
    # The same stations on the same grid cut at the dateline instead of Greenwich.
    cut = space(lat=lat[::2], lon=np.roll(np.where(lon >= 180, lon - 360, lon)[::2], 120))
    again = PointSensors(cut, A.stations).double()(fields.roll(120, 2))
    assert torch.allclose(again, A(fields), rtol=0, atol=(ROUNDING + TURN) * float(t2m.max()))


def rms(values):
    return float(values.square().mean().sqrt())


@pytest.mark.data
def test_the_pole_rules_predict_the_pole_rows_of_an_analysis(era):
    """Without its rows at the poles the analysis is extended over them; the rows say what is right."""
    lat, lon = era["latitude"], era["longitude"]
    for row, edge in ((0, 1), (-1, -2)):
        stations = Stations(lat=np.full(len(lon), lat[row]), lon=lon, variable=("t",) * len(lon))
        t2m = torch.from_numpy(era["t2m"])
        domain = Space(
            ("variable", "lat", "lon"), (1, 239, 480), {"variable": ("t",), "lat": lat[1:-1], "lon": lon}, "K"
        )
        got = PointSensors(domain, stations).double()(t2m[:, None, 1:-1])
        assert float(got.std(1).max()) < ROUNDING * float(t2m.max())  # one place, one value
        assert rms(got - t2m[:, row]) < 0.5 * rms(t2m[:, edge] - t2m[:, row])
        for name in ("u10", "v10"):
            wind = torch.from_numpy(era[name])
            # What a wind at one place looks like from every longitude; the file's row also holds traces of its neighbour
            # (its mean is not zero).
            waves = torch.fft.rfft(wind[:, row])
            waves[:, 0], waves[:, 2:] = 0, 0
            pole = torch.fft.irfft(waves, len(lon))
            seen = PointSensors(domain, stations, vectors=("t",)).double()(wind[:, None, 1:-1])
            assert rms(seen - pole) < 0.5 * rms(wind[:, edge] - pole)
            assert rms(seen - pole) < 0.2 * rms(pole)  # the mean of the row, a scalar's rule, gives nothing of it
