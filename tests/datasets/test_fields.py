"""Gridded fields as data sets, and training images drawn from them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import xarray as xr

from recon.datasets.fields import FieldCard, Fields, Split, load_fields
from recon.datasets.sampling import FieldSampler, FieldSampling, image_space, smooth_phase
from recon.errors import InputError
from recon.files import sha256
from recon.space import Space
from tests.bounds import chi2_bounds

DIMS = ("time", "lat", "lon")


@pytest.fixture
def card(tmp_path):
    """Packed integers with a fill value, as archives store them."""
    values = np.arange(10 * 4 * 6, dtype=np.float64).reshape(10, 4, 6) / 10
    values[:, 0, 0] = np.nan
    path = tmp_path / "f.nc"
    packing = {"dtype": "int16", "scale_factor": 0.1, "_FillValue": -9999}
    coords = {"lat": [1.0, 2.0, 3.0, 4.0], "lon": np.arange(6.0)}
    labels = ("time", np.array([1, 1, 2, 2, 3, 3, 4, 4, 5, 5]))
    data = xr.Dataset({"a": (DIMS, values), "patient": labels}, coords)
    data.to_netcdf(path, engine="h5netcdf", encoding={"a": packing})

    def make(**changes):
        facts = {"name": "f", "summary": "", "reader": "fields", "file": str(path), "variables": ["a"], "units": ["K"]}
        facts |= {"licence": "CC0", "source": "drawn", "sha256": sha256(path)}
        return FieldCard.model_validate({**facts, **changes})

    return make


def test_values_are_unpacked_and_gaps_are_marked(card):
    fields = load_fields(card(factors=(2.0,)), "train")
    assert fields.values.shape == (7, 1, 4, 6) and fields.values.dtype == np.float32
    assert fields.values[3, 0, 2, 5] == pytest.approx(2 * (3 * 24 + 17) / 10, abs=1e-5)
    assert not fields.known[:, 0, 0, 0].any() and fields.known[:, 0, 1:].all()
    expected = np.delete(fields.values[:, 0].reshape(7, -1), 0, axis=1).mean()
    assert fields.values[0, 0, 0, 0] == pytest.approx(expected, rel=1e-6)
    assert fields.space.dims == ("variable", "lat", "lon") and fields.space.coords["lat"].tolist() == [1, 2, 3, 4]


def test_parts_do_not_meet(card):
    parts = {part: load_fields(card(), part).values[:, 0, 1, 0] for part in ("train", "validation", "test")}
    assert [len(p) for p in parts.values()] == [7, 1, 2]
    assert np.concatenate(list(parts.values())).tolist() == sorted(set(np.concatenate(list(parts.values())).tolist()))
    split = {"by": "patient", "validation_labels": [2], "test_labels": [4, 5]}
    rows = {part: card(split=split).split.rows(part, 10, np.repeat(np.arange(1, 6), 2)) for part in parts}
    assert [r.tolist() for r in rows.values()] == [[0, 1, 4, 5], [2, 3], [6, 7, 8, 9]]
    assert len(load_fields(card(split=split), "test")) == 4


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"variables": ["b"]}, "no variable 'b'; it has"),
        ({"variables": ["patient"]}, "must be \\(field, y, x\\)"),
        ({"sha256": "0" * 64}, "is not the file of f"),
        ({"group": "no"}, "cannot be read as the fields"),
        ({"split": {"train": 0.99, "validation": 0.0}}, "has no fields for 'validation'"),
    ],
)
def test_files_that_do_not_fit_are_refused(card, changes, text):
    with pytest.raises(InputError, match=text):
        load_fields(card(**changes), "validation")


def test_senseless_splits_are_refused():
    for wrong in (
        {"train": 0.9, "validation": 0.2},
        {"test_labels": [1]},
        {"by": "p", "validation_labels": [1], "test_labels": [1]},
    ):
        with pytest.raises(ValueError, match="exceed 1|need 'by'|either for validation"):
            Split(**wrong)


def source(n=5, c=1, ny=6, nx=8, known=None) -> Fields:
    values = np.random.default_rng(0).random((n, c, ny, nx)).astype(np.float32)
    coords = {"variable": tuple("abc"[:c]), "y": np.arange(ny, 0, -1.0), "x": np.arange(nx) * 1.0}
    return Fields("s", values, known, Space(("variable", "y", "x"), (c, ny, nx), coords, "1"))


def test_batches_depend_on_the_seed_and_the_step_alone():
    plan = FieldSampling(dataset="s", mirror=(0.5, 0.5), shift=2, gain=0.1)
    one, two = (FieldSampler(plan, source(), 3).batch(7, 4)[0] for _ in range(2))
    assert torch.equal(one, two)
    assert not torch.equal(one, FieldSampler(plan, source(), 4).batch(7, 4)[0])
    assert torch.equal(FieldSampler(plan, source(), 3).batch(7, 2)[0], one[:2])


def test_plain_sampling_gives_the_fields_themselves():
    fields = source(c=3)
    values, known = FieldSampler(FieldSampling(dataset="s"), fields, 0).batch(0, 20)
    assert values.shape == (20, 3, 6, 8) and (known == 1).all()
    assert all(any(np.array_equal(v, f) for f in fields.values) for v in values.numpy())


def test_mirrors_and_shifts_move_the_mask_along():
    mask = np.ones((5, 1, 6, 8), bool)
    mask[:, 0, 1, 2] = False
    fields = source(known=mask)
    fields.values[:, 0, 1, 2] = 99.0
    values, known = FieldSampler(FieldSampling(dataset="s", mirror=(0.5, 0.5), shift=1), fields, 0).batch(0, 50)
    assert torch.equal(values == 99.0, known == 0)
    assert len({tuple(np.argwhere(k[0].numpy() == 0)[0]) for k in known}) > 6


def test_a_phase_keeps_the_magnitude():
    fields = source()
    values, known = FieldSampler(FieldSampling(dataset="s", phase=0.7), fields, 0).batch(0, 30)
    assert values.shape == known.shape == (30, 2, 6, 8)
    magnitude = values.square().sum(1).sqrt().numpy()
    assert all(any(np.allclose(m, f[0], atol=1e-6) for f in fields.values) for m in magnitude)
    space = image_space(fields, True)
    assert space.dims == ("channel", "y", "x") and space.coords["channel"] == ("real", "imag")
    with pytest.raises(InputError, match="has 3 variables"):
        FieldSampler(FieldSampling(dataset="s", phase=0.7), source(c=3), 0)


def test_the_smooth_phase_has_the_stated_spread():
    random, spread, n = np.random.default_rng(0), 0.6, 400
    maps = np.stack([smooth_phase((32, 32), spread, random) for _ in range(n)])
    varying = maps - maps.mean(axis=(1, 2), keepdims=True)
    # The strongest two of nine waves carry most of the power: at least 2 n degrees of freedom.
    low, high = chi2_bounds(2 * n)
    assert low < float(varying.var()) / spread**2 < high
    assert maps.mean(axis=(1, 2)).min() < -0.9 * math.pi and maps.mean(axis=(1, 2)).max() > 0.9 * math.pi


def test_area_means_leave_out_partly_known_blocks():
    mask = np.ones((2, 1, 4, 4), bool)
    mask[0, 0, 0, 0] = False
    fields = source(2, 1, 4, 4, mask).coarsened(2)
    assert fields.values.shape == (2, 1, 2, 2) and fields.known[0, 0].tolist() == [[False, True], [True, True]]
    assert fields.space.coords["x"].tolist() == [0.5, 2.5] and fields.space.shape == (1, 2, 2)
