"""Windows of fields, and what a network is told of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr
from scipy.stats import chi2

from recon.datasets.fields import FieldCard, Fields, load_fields
from recon.datasets.sampling import FieldSampler, FieldSampling, aside, window_corner
from recon.errors import InputError
from recon.files import sha256
from recon.priors.conditional import Conditions, LowResolution, TimeOfYear
from recon.space import Space
from tests.bounds import FALSE_ALARM

LOW, DAY = LowResolution(kind="low_resolution", factor=2), TimeOfYear(kind="time_of_year")
MOVING = {"mirror": (0.5, 0.5), "shift": 2, "gain": 0.2}


def fields(n=5, c=2, ny=8, nx=12, known=None, days=None) -> Fields:
    values = np.random.default_rng(0).random((n, c, ny, nx)).astype(np.float32)
    coords = {"variable": tuple("abc"[:c]), "y": np.arange(ny, 0, -1.0), "x": np.arange(nx) * 1.0}
    return Fields("s", values, known, Space(("variable", "y", "x"), (c, ny, nx), coords, "1"), days)


def test_windows_are_the_part_of_the_whole_image_at_their_corner():
    """The same augmentation as without windows, and then a window of it; so too its mask and its phase."""
    mask = np.random.default_rng(1).random((5, 1, 8, 12)) > 0.3
    for source, more in ((fields(), {}), (fields(c=1, known=mask), {"phase": 0.6})):
        plan = {"dataset": "s", **MOVING, **more}
        whole = FieldSampler(FieldSampling(**plan), source, 3).sample(7, range(20))
        part = FieldSampler(FieldSampling(**plan, crop=(3, 5)), source, 3).sample(7, range(20))
        for values, cut in ((whole.values, part.values), (whole.known, part.known)):
            for image, window, (row, column) in zip(values, cut, part.corner.int().tolist(), strict=True):
                assert torch.equal(window, image[:, row : row + 3, column : column + 5])
        assert len(set(map(tuple, part.corner.tolist()))) > 10 and whole.corner is None


def test_corners_are_anywhere_with_equal_chance():
    corners = [window_corner(aside(0, step, 0), (6, 10), (8, 12)) for step in range(1800)]
    _, counts = np.unique(corners, axis=0, return_counts=True)
    assert len(counts) == 9
    assert ((counts - 200) ** 2 / 200).sum() < chi2.isf(FALSE_ALARM, 8)


def test_unknown_cells_are_filled_and_stay_unknown():
    mask = np.ones((5, 2, 8, 12), bool)
    mask[:, :, :3, 4:] = False
    plain, filled = (
        FieldSampler(FieldSampling(dataset="s", shift=2, fill=fill), fields(known=mask), 3).sample(1, range(6))
        for fill in (None, -7.5)
    )
    assert torch.equal(plain.known, filled.known) and 0 < float(plain.known.mean()) < 1
    assert bool((filled.values[filled.known == 0] == -7.5).all())
    assert torch.equal(plain.values[plain.known == 1], filled.values[plain.known == 1])


def test_some_images_of_a_batch_are_those_of_the_whole_batch():
    plan = FieldSampling(dataset="s", **MOVING, crop=(4, 4), conditions=Conditions(inputs=(LOW,), dropout=0.5))
    sampler = FieldSampler(plan, fields(), 3)
    whole, some = sampler.sample(2, range(6)), sampler.sample(2, [1, 4])
    for one, other in zip((*whole[:2], *whole.told, *whole[3:]), (*some[:2], *some.told, *some[3:]), strict=True):
        assert torch.equal(one[[1, 4]], other)


def test_conditions_change_nothing_of_the_images():
    source, days = fields(), np.arange(5.0)
    plain = FieldSampler(FieldSampling(dataset="s", **MOVING), source, 3).batch(2, 4)
    told = Conditions(inputs=(LOW, DAY), dropout=0.5)
    dated = Fields(source.name, source.values, None, source.space, days)
    with_them = FieldSampler(FieldSampling(dataset="s", **MOVING, conditions=told), dated, 3).batch(2, 4)
    assert all(torch.equal(a, b) for a, b in zip(plain, with_them, strict=True))


def test_block_means_of_a_window_are_those_of_its_whole_field():
    told = Conditions(inputs=(LOW,))
    mask = np.random.default_rng(1).random((5, 2, 8, 12)) > 0.2
    plan = {"dataset": "s", **MOVING, "conditions": told}
    whole = FieldSampler(FieldSampling(**plan), fields(known=mask), 3).sample(1, range(12))
    part = FieldSampler(FieldSampling(**plan, crop=(3, 5)), fields(known=mask), 3).sample(1, range(12))
    assert torch.equal(whole.told[0], LOW.of(whole.values, whole.known))
    for image, window, (row, column) in zip(whole.told[0], part.told[0], part.corner.int().tolist(), strict=True):
        assert torch.equal(window, image[:, row : row + 3, column : column + 5])
    assert whole.there is None


def test_the_day_is_that_of_the_field():
    source = fields(days=np.array([0.0, 50.0, 100.0, 200.0, 300.5]))
    sample = FieldSampler(FieldSampling(dataset="s", conditions=Conditions(inputs=(DAY,))), source, 0).sample(
        0, range(20)
    )
    for image, waves in zip(sample.values.numpy(), sample.told[0], strict=True):
        (row,) = [i for i, field in enumerate(source.values) if np.array_equal(field, image)]
        assert torch.equal(waves, DAY.spread(torch.tensor([source.days[row]]), (8, 12))[0])


def test_conditions_are_left_out_with_the_stated_probability():
    plan = FieldSampling(dataset="s", conditions=Conditions(inputs=(LOW,), dropout=0.25))
    there = FieldSampler(plan, fields(1, 1, 2, 2), 0).sample(0, range(2000)).there
    # Binomial: 2000 x 0.75 with standard deviation 19.4; 4.4 of them are passed by chance once in 1e5.
    assert abs(float(there.sum()) - 1500) < 4.42 * 19.4
    assert set(there.tolist()) == {0.0, 1.0}


@pytest.mark.parametrize(
    ("plan", "text"),
    [
        ({"crop": (9, 5)}, "windows of 9 x 5 pixels do not fit the 8 x 12 of s"),
        ({"crop": (0, 5)}, "windows of 0 x 5 pixels do not fit"),
        ({"conditions": Conditions(inputs=(LowResolution(kind="low_resolution", factor=3),))}, "blocks of 3 x 3"),
        ({"conditions": Conditions(inputs=(DAY,))}, "'day' needs the date of every field; the file of s has none"),
    ],
)
def test_plans_that_do_not_fit_are_refused(plan, text):
    with pytest.raises(InputError, match=text):
        FieldSampler(FieldSampling(dataset="s", **plan), fields(), 0)
    if "conditions" in plan and "day" in text:
        with pytest.raises(InputError, match="not all of them"):
            FieldSampler(FieldSampling(dataset="s", **plan), fields(days=np.array([0.0, np.nan, 1.0, 2.0, 3.0])), 0)


def dated(tmp_path, name="time", **changes):
    times = np.array(["2000-01-01T00", "2001-02-01T12", "2004-12-31T18"], "datetime64[ns]")
    path = tmp_path / f"{name}.nc"
    data = xr.Dataset({"a": (("time", "y", "x"), np.ones((3, 4, 6)))})
    data[name] = ("time", times)
    data.to_netcdf(path, engine="h5netcdf")
    facts = {"name": "f", "summary": "", "reader": "fields", "file": str(path), "variables": ["a"], "units": ["K"]}
    facts |= {"licence": "CC0", "source": "drawn", "sha256": sha256(path), "split": {"train": 1.0, "validation": 0.0}}
    return FieldCard.model_validate({**facts, **changes})


def test_dates_become_days_of_their_year(tmp_path):
    assert load_fields(dated(tmp_path), "train").days.tolist() == [0.0, 31.5, 365.75]
    assert load_fields(dated(tmp_path, "when", time="when"), "train").days.tolist() == [0.0, 31.5, 365.75]
    assert load_fields(dated(tmp_path, "when"), "train").days is None
    coarse = load_fields(dated(tmp_path), "train").coarsened(2)
    assert coarse.days.tolist() == [0.0, 31.5, 365.75] and coarse.rows(slice(1, 2)).days.tolist() == [31.5]


def test_a_stated_time_must_be_there_and_hold_dates(tmp_path):
    for name in ("a", "absent"):
        with pytest.raises(InputError, match=f"f: variable '{name}' must hold one date per field"):
            load_fields(dated(tmp_path, time=name), "train")


def test_a_variable_without_any_value_is_refused(tmp_path):
    path = tmp_path / "e.nc"
    arrays = {name: (("time", "y", "x"), np.full((3, 4, 6), value)) for name, value in (("a", 1.0), ("b", np.nan))}
    xr.Dataset(arrays).to_netcdf(path, engine="h5netcdf")
    card = dated(tmp_path, variables=["a", "b"], units=["K", "K"], file=str(path), sha256=sha256(path))
    with pytest.raises(InputError, match=r"e.nc: b of f has no value in any field for 'train'"):
        load_fields(card, "train")
