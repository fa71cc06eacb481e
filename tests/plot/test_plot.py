"""Axes in, artists out: what is drawn is what the ensemble, or the same in xarray, says."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pytest
import torch
import xarray as xr
from matplotlib.figure import Figure

from recon import plot
from recon.diagnostics import Coverage, GroupFit, Verdict, intervals, rank_histogram
from recon.ensemble import Ensemble
from recon.errors import InputError
from recon.space import Space

IMAGE = Space.grid((8, 6), 1e-3, "1/m")
LINE = Space(("x",), (60,), {"x": np.arange(60) * 1e-3}, "K")
VOLUME = Space.grid((4, 8, 6), 1e-3, "1/m")


def ensemble(space: Space, draws: int = 40, **rest) -> Ensemble:
    return Ensemble(torch.randn(draws, *space.shape, generator=torch.Generator().manual_seed(1)), space, **rest)


def axes(count: int = 1):
    grid = Figure().subplots(1, count, squeeze=False)[0]
    return grid[0] if count == 1 else grid


@pytest.fixture(autouse=True)
def _settings_stay():
    before = dict(mpl.rcParams)
    yield
    assert dict(mpl.rcParams) == before


def test_mean_and_std_are_those_of_the_ensemble():
    made = ensemble(IMAGE)
    mean, std = plot.mean_std(made, axes(2))
    assert np.allclose(mean.get_array(), made.mean()) and np.allclose(std.get_array(), made.std())
    assert mean.get_extent() == pytest.approx([-3, 3, -4, 4])  # mm, y upwards
    assert std.get_clim()[0] == 0


@pytest.mark.parametrize("kind", ["tree", "posterior", "value", "flat"])
def test_xarray_is_as_good_as_an_ensemble(kind, tmp_path):
    weights = torch.linspace(0, 1, 40, dtype=torch.float64)
    made = ensemble(VOLUME, log_weights=None if kind == "value" else weights)
    made.save(tmp_path / "e.nc")
    with xr.open_datatree(tmp_path / "e.nc", engine="h5netcdf") as opened:
        tree = opened.load()
    given = {"tree": tree, "posterior": tree["posterior"].to_dataset(), "flat": made.to_xarray()}.get(kind)
    back = plot.ensemble_of(tree["posterior"]["value"] if given is None else given)
    assert torch.equal(back.x, made.x) and torch.equal(back.log_weights, made.log_weights)
    assert back.space.mismatch(made.space) is None
    metres = tree["mean"].assign_coords(x=tree["mean"]["x"] / 1e3)
    metres["x"].attrs["units"] = "m"
    (shown,) = plot.field(metres.isel(z=0, drop=True), axes())
    assert shown.get_extent()[:2] == pytest.approx([-3, 3])


def test_arviz_reads_a_saved_ensemble(tmp_path):
    stats = pytest.importorskip("arviz_stats.base").array_stats
    made = ensemble(Space.vector(5, "K"), draws=400)
    made.save(tmp_path / "e.nc")
    with xr.open_datatree(tmp_path / "e.nc", engine="h5netcdf") as tree:
        value = tree["posterior"]["value"].load()
    assert value.dims == ("chain", "draw", "component")
    ess = stats.ess(value.values, chain_axis=0, draw_axis=1, method="bulk")
    # 400 independent draws: an estimate of 400 itself, within the factor 2 that its autocorrelations allow.
    assert ((200 < ess) & (ess < 800)).all()
    assert made.to_xarray()["value"].dims == ("draw", "component")


def test_draws_stand_side_by_side_at_one_scale():
    made = ensemble(IMAGE)
    shown = plot.draws(made, axes(3), first=5)
    assert all(np.allclose(a.get_array(), made.x[5 + i]) for i, a in enumerate(shown))
    assert len({a.get_clim() for a in shown}) == 1
    with pytest.raises(InputError, match="there are 40 draws"):
        plot.draws(made, axes(2), first=40)


def test_intervals_are_those_of_the_rule_for_finite_ensembles():
    made = ensemble(IMAGE)
    low, high, width = plot.intervals(made, axes(3))
    wanted = intervals(made.x)
    assert np.allclose(low.get_array(), wanted.low) and np.allclose(high.get_array(), wanted.high)
    assert np.allclose(width.get_array(), wanted.high - wanted.low, atol=1e-6)
    spot = axes()
    band = plot.intervals(ensemble(LINE), spot)[0]
    edge = intervals(ensemble(LINE).x)
    assert np.allclose(
        [band.get_datalim(spot.transData).y0, band.get_datalim(spot.transData).y1], [edge.low.min(), edge.high.max()]
    )


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (ensemble(IMAGE, 18), "90% intervals need 19"),
        (ensemble(IMAGE, info={"particles": {"ancestors": 19}}), "19 ancestors"),
        (
            ensemble(IMAGE, 60, info={"particles": {"ancestors": 25}}),
            "95% intervals need 39 effective draws; there are 25",
        ),
        (Ensemble(torch.zeros(40, 8, 6), IMAGE), "collapsed"),
        (Ensemble(torch.full((40, 8, 6), torch.nan), IMAGE), "NaN"),
    ],
)
def test_intervals_that_do_not_exist_are_refused(made, words):
    level = 0.95 if "95%" in words else 0.9
    assert words in plot.refusal(made, level)
    with pytest.raises(InputError, match=words):
        plot.intervals(made, axes(3), level)


def test_regions_show_their_means_and_intervals():
    made = ensemble(IMAGE)
    masks = {"top": torch.zeros(8, 6, dtype=torch.bool), "all": torch.ones(8, 6, dtype=torch.bool)}
    masks["top"][:2] = True
    spot = axes()
    wide, _, dots, truth = plot.regions(made, masks, spot, torch.ones(8, 6))
    means = made.x[:, masks["top"]].double().mean(1)
    assert dots.get_xdata()[0] == pytest.approx(float(means.mean()))
    band = intervals(means[:, None])
    assert wide.get_segments()[0][:, 0] == pytest.approx([float(band.low), float(band.high)])
    assert truth.get_xdata().tolist() == [1, 1]
    assert [t.get_text() for t in spot.get_yticklabels()] == ["top", "all"]
    centred = plot.regions(made, masks, axes(), torch.ones(8, 6), centred=True)
    assert centred[2].get_xdata().tolist() == [0, 0]
    assert centred[0].get_segments()[0][0, 0] == pytest.approx(float(band.low - means.mean()))
    with pytest.raises(InputError, match="at least one pixel"):
        plot.regions(made, {"none": torch.zeros(8, 6, dtype=torch.bool)}, axes())


def test_ranks_coverage_and_groups():
    ranks = rank_histogram([0.05] * 30 + list(np.linspace(0.01, 0.99, 30)), draws=9)
    bars = plot.rank_histogram(ranks, axes())[0]
    assert [bar.get_height() for bar in bars] == list(ranks.counts)
    colours = {bar.get_facecolor() for i, bar in enumerate(bars) if i in ranks.outside}
    assert ranks.outside and colours.isdisjoint(
        {bar.get_facecolor() for i, bar in enumerate(bars) if i not in ranks.outside}
    )
    with pytest.raises(InputError, match="number of draws"):
        plot.rank_histogram([0.5, 0.6], axes())
    verdict = Verdict("cannot say", "", 4, 0.01, {})
    over = Coverage(0.9, 4, 0.8, 0.1, 0.5, 0.95, 0.1, 0.1, verdict)
    made = plot.coverage({0.5: 0.4, 0.9: over, 0.95: None}, axes())
    assert made[-1].get_xydata().tolist() == [[0.5, 0.4], [0.9, 0.8]]
    assert made[1].get_segments()[0].tolist() == [[0.9, 0.5], [0.9, 0.95]]
    with pytest.raises(InputError, match="too few"):
        plot.coverage({0.9: None}, axes())
    one = torch.ones(3).double()
    group = GroupFit("coil", ("a", "b", "c"), torch.tensor([1.0, 5.0, 0.9]), one, 0.5 * one, 2 * one, (1,), 0.01)
    for given in (group, group.summary()):
        spot = axes()
        outside = plot.group_fit(given, spot)[-1]
        assert outside.get_xydata().tolist() == [[1, 5]]
        assert [t.get_text() for t in spot.get_xticklabels()] == ["a", "b", "c"]


def test_particles_show_what_was_noted():
    steps = {
        "ess": [9.0, 4.0],
        "distinct": [9.0, 5.0],
        "largest": [0.2, 0.5],
        "log_evidence": [-1.0, -2.0],
        "resampled": [1.0, 0.0],
    }
    made = ensemble(IMAGE, info={"particles": {"ancestors": 5, "steps": steps}})
    lines = plot.particles(made, axes(3))
    assert [line.get_ydata().tolist() for line in lines[:4]] == [
        steps[n] for n in ("ess", "distinct", "largest", "log_evidence")
    ]
    assert [line.get_xdata()[0] for line in lines[4:]] == [1, 1, 1]  # the resampling, on every axes
    with pytest.raises(InputError, match="never met"):
        plot.particles(ensemble(IMAGE), axes(3))


def test_cuts_slices_and_projections_of_a_volume():
    made = ensemble(VOLUME)
    mean = made.mean()
    a, b, c = plot.zcuts(made, axes(3), at=(1, 2, 3))
    for shown, cut in ((a, mean[1]), (b, mean[:, 2]), (c, mean[:, :, 3])):
        assert np.allclose(shown.get_array(), cut)
    assert [np.allclose(s.get_array(), mean[k]) for s, k in zip(plot.slices(made, axes(2)), (0, 3), strict=True)] == [
        True,
        True,
    ]
    tallest = plot.projection(made.to_xarray()["mean"], axes(3))
    assert all(np.allclose(s.get_array(), mean.amax(d)) for d, s in enumerate(tallest))
    profile = plot.z_profile(made, axes(), torch.zeros(VOLUME.shape))
    assert np.allclose(profile[0].get_ydata(), made.std().square().mean((1, 2)).sqrt(), rtol=1e-5)
    assert np.allclose(profile[1].get_ydata(), mean.square().mean((1, 2)).sqrt(), rtol=1e-5)
    for wrong in (lambda: plot.zcuts(made, axes(3), at=(9, 0, 0)), lambda: plot.zcuts(ensemble(IMAGE), axes(3))):
        with pytest.raises(InputError, match=r"cuts are three|expected a volume"):
            wrong()


def test_lines_and_error_against_spread():
    made = ensemble(LINE)
    drawn = plot.profile(made, axes(), torch.zeros(60))
    assert np.allclose(drawn[2].get_ydata(), made.mean()) and len(drawn) == 4
    found = plot.spread_skill(made, torch.zeros(60), axes())
    assert len(found[1].get_xdata()) == 3  # 60 pixels in groups of 20


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(InputError, match="takes 2 axes; got 1"):
        plot.mean_std(ensemble(IMAGE), axes())
    with pytest.raises(InputError, match="dim 'draw'"):
        plot.mean_std(xr.DataArray(np.zeros((3, 3))), axes(2))
    with pytest.raises(InputError, match="variable 'value'"):
        plot.ensemble_of(xr.Dataset())
    with pytest.raises(InputError, match="needs its space"):
        plot.field(np.zeros((3, 3)), axes())
    with pytest.raises(InputError, match="got shape"):
        plot.field(np.zeros((3, 3)), axes(), IMAGE)
