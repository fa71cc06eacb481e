"""``recon train`` with windows and conditions: from the file to a prior that is told something, and what is refused."""

from __future__ import annotations

import h5py
import numpy as np
import pytest
import torch
import yaml

from recon.errors import InputError
from recon.files import sha256
from recon.priors import ConditionalNetworkPrior, load_prior
from recon.workflows.train import prepare, read_train_file, train

FIELDS = {
    "name": "toy",
    "summary": "waves",
    "unit": "mixed",
    "normalisation": {"shift": [10.0, 0.0], "scale": [2.0, 0.5], "sigma_data": 1.0},
    "schedule": {"sigma_min": 0.01, "sigma_max": 20.0},
    "architecture": {
        "family": "adm", "size": [8, 12], "fields": 2, "channels": [32, 64], "blocks": 1, "shuffle": 1, "position": True,
        "condition": 5,
    },
    "fields": {
        "dataset": "waves",
        "crop": [8, 12],
        "mirror": [0.0, 0.5],
        "conditions": {
            "dropout": 0.3, "inputs": [{"kind": "low_resolution", "factor": 4}, {"kind": "time_of_year", "name": "date"}],
        },
    },
    "training": {"images": 8, "batch": 4, "chunk": 2, "precision": "float32", "validation_sigmas": [0.1, 1.0]},
    "unfit_for": "anything",
    "weights_licence": "CC0",
}  # fmt: skip


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """Two variables on a grid of 16 x 20 with dates, and CT slices."""
    import xarray as xr

    monkeypatch.setenv("RECON_DATA", str(tmp_path))
    monkeypatch.setenv("RECON_WORKSPACE", str(tmp_path))
    (tmp_path / "datasets").mkdir()
    rng, dims = np.random.default_rng(0), ("time", "lat", "lon")
    t = 10 + 2 * rng.standard_normal((20, 16, 20))
    t[:, :2, :3] = np.nan
    coords = {"time": np.arange("2001-01-01", "2001-01-21", dtype="datetime64[D]").astype("datetime64[ns]")}
    coords |= {"lat": np.linspace(50, 42.5, 16), "lon": np.arange(20.0)}
    arrays = {"t": (dims, t), "u": (dims, 0.5 * rng.standard_normal((20, 16, 20)))}
    xr.Dataset(arrays, coords).to_netcdf(tmp_path / "waves.nc", engine="h5netcdf")
    y, x = np.mgrid[-1:1:32j, -1:1:32j]
    with h5py.File(tmp_path / "discs.h5", "w") as file:
        file["slices"] = np.where(x**2 + y**2 < rng.uniform(0.3, 0.9, (6, 1, 1)) ** 2, 40, -1000).astype(np.int16)
    common = {"summary": "drawn", "licence": "CC0", "source": "drawn"}
    split = {"train": 0.5, "validation": 0.25}
    cards = {
        "waves": {"reader": "fields", "file": "waves.nc", "variables": ["t", "u"], "units": ["degC", "m/s"], "split": split},
        "discs": {
            "reader": "hdf5_slices", "file": "discs.h5", "key": "slices", "unit": "HU", "pixel_mm": 1.0, "validation": 0.34,
        },
    }  # fmt: skip
    for name, card in cards.items():
        card = {"name": name, **common, **card, "sha256": sha256(tmp_path / card["file"])}
        (tmp_path / "datasets" / f"{name}.yaml").write_text(yaml.safe_dump(card))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(before)


def write(folder, **changes):
    """FIELDS with changes; a change to a section is made inside it."""
    content = {k: {**v, **changes[k]} if isinstance(v, dict) and changes.get(k) else v for k, v in FIELDS.items()}
    content |= {k: v for k, v in changes.items() if not isinstance(FIELDS.get(k), dict) or v is None}
    path = folder / "priors" / "toy" / "train.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}))
    return path


def test_windows_with_conditions_become_a_prior_that_is_told_both(lab):
    train(write(lab, training={"learning_rate": 0.03, "warmup": 0}))
    prior = load_prior("toy")
    assert isinstance(prior, ConditionalNetworkPrior) and prior.whole == (16, 20)
    assert prior.space.shape == (2, 8, 12) and set(prior.space.coords) == {"variable"}
    assert {name: space.shape for name, space in prior.conditions.items()} == {"low": (2, 4, 5), "date": (1,)}
    assert prior.conditions["low"].coords["lat"][0] == pytest.approx(49.25)
    z = torch.randn(1, 2, 8, 12)
    given = prior.given(low=np.full((2, 4, 5), 10.0), date=12.5)
    assert given.at(8, 8).denoise(z, 1.0).shape == z.shape
    assert prior.unconditional().at(0, 0).denoise(z, 1.0).shape == z.shape
    rows = prior.card.facts["denoising"]
    assert [(row["data"], row["sigma"]) for row in rows] == [
        (name, sigma) for name in ("waves", "waves, without conditions") for sigma in (0.1, 1.0)
    ]
    assert rows[1]["prior"] != rows[3]["prior"] and rows[1]["wiener"] == rows[3]["wiener"]
    first = (lab / "priors" / "toy" / "weights.safetensors").read_bytes()
    train(lab / "priors" / "toy" / "train.yaml", resume=False)
    assert (lab / "priors" / "toy" / "weights.safetensors").read_bytes() == first


def test_the_network_sees_what_the_prior_will_be_given(lab):
    """A training image's context is that of ``given(...).at(...)`` for the field it was cut from."""
    file = read_train_file(write(lab, fields={"mirror": [0.0, 0.0]}))
    sampler = file.data(None).sampler
    batch = prepare(file, None).task.batches(3, range(6))
    sample = sampler.sample(3, range(6))
    prior = ConditionalNetworkPrior(bare(file), file.fields.conditions)
    fields = torch.from_numpy(sampler.fields.values)
    for row, (y, x) in enumerate(sample.corner.int().tolist()):
        (index,) = [i for i, f in enumerate(fields) if torch.equal(f[:, y : y + 8, x : x + 12], sample.values[row])]
        bound = prior.given(low=block_means(sampler.fields, index), date=float(sampler.fields.days[index])).at(y, x)
        context = bound._context(1)
        assert torch.equal(context.corner[0], batch.context.corner[row])
        # Normalised before or after the interpolation: rounding of numbers of order 1.
        assert torch.allclose(context.condition[0] * sample.there[row], batch.context.condition[row], atol=1e-5)
    assert set(sample.there.tolist()) == {0.0, 1.0}


def block_means(fields, index):
    """Means over the known of 4 x 4 pixels; of all that stands there where nothing is known."""
    values, known = (v[index].astype(np.float64).reshape(2, 4, 4, 5, 4) for v in (fields.values, fields.known))
    count = known.sum((2, 4))
    return np.where(count > 0, (values * known).sum((2, 4)) / np.maximum(count, 1), values.mean((2, 4)))


def bare(file):
    from recon.priors import Card, NetworkPrior
    from recon.priors.network import build_network
    from recon.schedules import Schedule

    data, n = file.data(None), file.normalisation
    return NetworkPrior(
        data.space, Schedule(0.01, 20.0), Card("bare"), build_network(file.network(data)),
        sigma_data=1.0, shift=n.shift, scale=n.scale,
    )  # fmt: skip


CUTS = {
    "unit": "1/m",
    "pixel_mm": [1.0, 2.0],
    "normalisation": {"shift": 8.0, "scale": 16.0, "sigma_data": 0.5},
    "architecture": {"size": 16, "fields": 1, "condition": 0},
    "fields": None,
    "cuts": [{"dataset": "discs", "share": 1.0, "side": [32, 32], "whole": 32}],
    "held_out": ["discs"],
}


def test_windows_of_cuts_become_a_prior_with_a_place(lab):
    path = write(lab, **CUTS)
    content = yaml.safe_load(path.read_text())
    content["normalisation"] = CUTS["normalisation"]
    path.write_text(yaml.safe_dump(content))
    data = read_train_file(path).data(None)
    whole, part = data.cutter.images(2, range(8)), data.sample(2, range(8))
    for image, window, (row, column) in zip(whole[0], part.values, part.corner.int().tolist(), strict=True):
        assert torch.equal(window, image[row : row + 16, column : column + 16])
    assert not torch.equal(data.sample(3, range(8)).corner, part.corner)
    held_out = data.held_out()["discs"]
    assert held_out.values.shape[1:] == data.curve().values.shape[1:] == data.whole(4).shape[1:] == (16, 16)
    assert len(held_out.corner) == len(held_out.values) and len(data.curve().corner) == len(data.curve().values)
    train(path)
    prior = load_prior("toy")
    assert prior.whole == (32, 32) and prior.at(16, 16).denoise(torch.zeros(1, 16, 16), 1.0).shape == (1, 16, 16)
    assert prior.card.facts["whole"]["shape"] == [32, 32]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"architecture": {"condition": 4}}, "fields.conditions make 5 channels for a network; .* it says 4"),
        ({"architecture": {"condition": 5, "size": [8, 8]}}, r"fields.crop \(8, 12\) is the network's size; .*\(8, 8\)"),
        ({"architecture": {"whole": [32, 40]}}, r"whole is \(32, 40\); the images are windows of fields of 16 x 20"),
        ({"fields": {"crop": None}, "architecture": {"size": [16, 20], "whole": [16, 20]}}, "the images are whole"),
        ({"fields": {"crop": [24, 12]}, "architecture": {"size": [24, 12]}}, "windows of 24 x 12 pixels do not fit"),
        ({"fields": {"conditions": {"inputs": [{"kind": "low_resolution", "factor": 3}], "dropout": 0.1}},
          "architecture": {"condition": 3}}, "16 x 20 pixels has no means over blocks of 3 x 3"),
        ({"fields": {"conditions": {"inputs": [{"kind": "low_resolution", "factr": 3}]}}},
         r"train.yaml:\d+:\d+: fields.conditions.inputs\[0\].factr: unknown key \(did you mean 'factor'\?\)"),
        ({"fields": {"conditions": {"inputs": [{"kind": "low_resolutions", "factor": 4}]}}},
         r"inputs\[0\].kind: expected one of low_resolution, time_of_year; got 'low_resolutions' \(did you mean"),
        ({"fields": {"conditions": {"inputs": [{"factor": 4}]}}}, r"inputs\[0\].kind: this key is missing"),
        ({"training": {"chunk": 8}}, "training: a batch of 4 images has no chunk of 8"),
        ({"normalisation": {"shift": [1.0, 2.0, 3.0]}}, "normalisation.shift has 3 numbers; give one, or one for each"),
        (CUTS | {"cuts": [{"dataset": "discs", "share": 1.0, "side": [32, 32], "whole": 32},
                          {"dataset": "discs", "share": 1.0, "side": [32, 32]}]}, "all cuts are brought to one size"),
        (CUTS | {"cuts": [{"dataset": "discs", "share": 1.0, "side": [32, 32], "whole": 12}]}, "fit the 12 x 12 of cuts"),
    ],
)  # fmt: skip
def test_files_that_do_not_fit_are_refused(lab, changes, text):
    path = write(lab, **changes)
    if "cuts" in changes:
        content = yaml.safe_load(path.read_text())
        path.write_text(yaml.safe_dump({**content, "normalisation": CUTS["normalisation"]}))
    with pytest.raises(InputError, match=text):
        prepare(read_train_file(path), None)


def test_fields_without_dates_have_no_time_of_year(lab):
    card = yaml.safe_load((lab / "datasets" / "waves.yaml").read_text())
    (lab / "datasets" / "waves.yaml").write_text(yaml.safe_dump({**card, "time": "lat"}))
    with pytest.raises(InputError, match="variable 'lat' must hold one date per field"):
        read_train_file(write(lab)).data(None)
