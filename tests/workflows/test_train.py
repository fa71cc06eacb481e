import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import yaml

from recon.cli import main
from recon.comm import launched_size
from recon.errors import InputError, Stopped
from recon.files import sha256
from recon.priors import load_prior
from recon.workflows.train import prepare, read_train_file, train

SETTINGS = {
    "name": "toy",
    "summary": "discs",
    "pixel_mm": [1.0, 2.0],
    "normalisation": {"shift": 8.0, "scale": 16.0, "sigma_data": 0.5},
    "schedule": {"sigma_min": 0.01, "sigma_max": 20.0},
    "architecture": {"family": "adm", "size": 16, "channels": [32, 64], "blocks": 1},
    "cuts": [
        {"dataset": "discs", "share": 0.7, "side": [32, 32]},
        {"dataset": "discs", "share": 0.3, "side": [12, 20]},
    ],
    "held_out": ["discs", "others"],
    "training": {"images": 8, "batch": 4, "chunk": 4, "precision": "float32", "validation_sigmas": [0.1, 1.0]},
    "unfit_for": "anything",
    "weights_licence": "CC0",
}


def discs(path, count, seed):
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[-1:1:32j, -1:1:32j]
    radii = rng.uniform(0.3, 0.9, (count, 1, 1))
    with h5py.File(path, "w") as file:
        file["slices"] = np.where(x**2 + y**2 < radii**2, 40, -1000).astype(np.int16)


@pytest.fixture
def lab(tmp_path, monkeypatch):
    monkeypatch.setenv("RECON_DATA", str(tmp_path))
    monkeypatch.setenv("RECON_WORKSPACE", str(tmp_path))
    (tmp_path / "datasets").mkdir()
    for name, use, seed in (("discs", "train", 0), ("others", "test", 1)):
        discs(tmp_path / f"{name}.h5", 6, seed)
        card = {
            "name": name,
            "summary": "discs of water",
            "reader": "hdf5_slices",
            "file": f"{name}.h5",
            "key": "slices",
            "unit": "HU",
            "pixel_mm": 1.0,
            "validation": 0.34 if use == "train" else 0.0,
            "use": use,
            "licence": "CC0",
            "source": "drawn",
            "sha256": sha256(tmp_path / f"{name}.h5"),
        }
        (tmp_path / "datasets" / f"{name}.yaml").write_text(yaml.safe_dump(card))
    before, logged = torch.get_num_threads(), logging.getLogger("recon")
    handlers, level = list(logged.handlers), logged.level
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(before)
    logged.handlers[:], logged.level = handlers, level  # commands set up logging


def write(folder, **changes):
    path = folder / "priors" / "toy" / "train.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({**SETTINGS, **changes}))
    return path


def test_a_training_file_becomes_a_prior(lab):
    path = write(lab)
    assert train(path) == path.parent
    prior = load_prior("toy")
    facts = prior.card.facts
    assert prior.denoise(torch.zeros(1, 16, 16), 1.0).shape == (1, 16, 16)
    assert facts["budget"]["images"] == 8
    assert [(row["data"], row["sigma"]) for row in facts["denoising"]] == [
        (name, sigma) for name in ("discs", "others") for sigma in (0.1, 1.0)
    ]
    assert all(row["identity"] == pytest.approx(row["sigma"], rel=0.1) for row in facts["denoising"])
    assert all(row["wiener"] < row["identity"] for row in facts["denoising"])
    assert facts["data"][0]["slices"] == 3
    assert facts["held_out"][1] == "others: all of it"
    first = (path.parent / "weights.safetensors").read_bytes()
    train(path)
    assert (path.parent / "weights.safetensors").read_bytes() == first
    train(path, resume=False)
    assert (path.parent / "weights.safetensors").read_bytes() == first


def test_the_wiener_start_of_training_is_that_of_the_prior(lab):
    path = write(lab, architecture={**SETTINGS["architecture"], "wiener": True})
    train(path)
    kept = load_prior("toy").network.skip
    trained = prepare(read_train_file(path), None).network.skip
    assert torch.equal(kept.mean, trained.mean) and torch.equal(kept.log_spectrum, trained.log_spectrum)
    assert float(kept.log_spectrum.std()) > 0


@pytest.mark.parametrize("wiener", [False, True])
def test_training_goes_on_from_another_prior(lab, wiener):
    architecture = {**SETTINGS["architecture"], "wiener": wiener}
    train(write(lab, architecture=architecture), lab / "first")
    cuts = [{**SETTINGS["cuts"][0], "side": [16, 32]}]  # of other images, to which no filter is fitted
    file = read_train_file(write(lab, architecture=architecture, cuts=cuts, start=str(lab / "first")))
    given, begun = load_prior(lab / "first").network.state_dict(), prepare(file, None).network.state_dict()
    assert given.keys() == begun.keys()
    assert all(torch.equal(given[name], begun[name]) for name in given)
    assert file.identity != file.model_copy(update={"start": None}).identity


def test_a_start_that_does_not_fit_is_refused(lab):
    train(write(lab), lab / "first")
    wider = {**SETTINGS["architecture"], "channels": [64, 64]}
    with pytest.raises(InputError, match=r"start: .*first has another network: .*channels=\(32, 64\).*channels=\(64, 64\)"):
        prepare(read_train_file(write(lab, architecture=wider, start=str(lab / "first"))), None)
    numbers = {**SETTINGS["normalisation"], "sigma_data": 0.9}
    with pytest.raises(InputError, match="has sigma_data .* the file says 0.9"):
        prepare(read_train_file(write(lab, normalisation=numbers, start=str(lab / "first"))), None)


def test_test_data_are_never_trained_on(lab):
    path = write(lab, cuts=[{"dataset": "others", "share": 1.0, "side": [32, 32]}])
    with pytest.raises(InputError, match="others is for test; it has no part 'train'"):
        train(path)


def test_wrong_training_files_are_refused_with_the_place(lab):
    with pytest.raises(InputError, match=r"train.yaml:\d+:\d+: colour: unknown key"):
        read_train_file(write(lab, colour="red"))
    with pytest.raises(InputError, match="there is no such file"):
        read_train_file(lab / "absent.yaml")


def test_slices_that_cannot_be_averaged_are_refused(lab):
    architecture = {**SETTINGS["architecture"], "size": 24}
    with pytest.raises(InputError, match="slices of discs have 32 rows, not a multiple of 24"):
        train(write(lab, architecture=architecture))


FIELDS = {
    **{key: SETTINGS[key] for key in ("name", "summary", "schedule", "training", "unfit_for", "weights_licence")},
    "unit": "mixed",
    "normalisation": {"shift": [10.0, 0.0], "scale": [2.0, 0.5], "sigma_data": 1.0},
    "architecture": {"family": "adm", "size": [9, 11], "fields": 2, "channels": [32, 64], "blocks": 1},
    "fields": {"dataset": "weather"},
}


def weather(folder):
    """Two variables on a small grid, with land that never has a value, as a card and a file."""
    import xarray as xr

    rng = np.random.default_rng(0)
    t = 10 + 2 * rng.standard_normal((20, 9, 11))
    t[:, :2, :3] = np.nan
    wind = 0.5 * rng.standard_normal((20, 9, 11))
    dims = ("time", "lat", "lon")
    coords = {"lat": np.linspace(50, 46, 9), "lon": np.arange(11.0)}
    path = folder / "weather.nc"
    xr.Dataset({"t": (dims, t), "u": (dims, wind)}, coords).to_netcdf(path, engine="h5netcdf")
    card = {
        "name": "weather",
        "summary": "two variables",
        "reader": "fields",
        "file": "weather.nc",
        "variables": ["t", "u"],
        "units": ["degC", "m/s"],
        "split": {"train": 0.5, "validation": 0.25},
        "licence": "CC0",
        "source": "drawn",
        "sha256": sha256(path),
    }
    (folder / "datasets" / "weather.yaml").write_text(yaml.safe_dump(card))
    return path


def write_fields(folder, **changes):
    path = folder / "priors" / "toy" / "train.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({**FIELDS, **changes}))
    return path


def test_the_validation_curve_knows_what_is_unknown(lab):
    weather(lab)
    held_out = prepare(read_train_file(write_fields(lab)), None).task.held_out
    assert held_out is not None and held_out.known is not None
    assert held_out.known.shape == held_out.images.shape
    assert bool((held_out.known[:, 0, :2, :3] == 0).all())
    assert float(held_out.known.mean()) == pytest.approx(1 - 6 / (2 * 9 * 11))


def test_what_is_filled_is_learnt_and_not_counted(lab):
    """Land is part of every training image; the errors of the card are those of the sea."""
    weather(lab)
    path = write_fields(lab, fields={"dataset": "weather", "fill": 12.0})
    task = prepare(read_train_file(path), None).task
    images, known, _ = task.batches(0, range(4))
    assert bool((known == 1).all()) and bool((images[:, 0, :2, :3] == (12.0 - 10.0) / 2.0).all())
    assert task.held_out is not None and bool((task.held_out.known[:, 0, :2, :3] == 0).all())
    assert bool((task.held_out.images[:, 0, :2, :3] == 1.0).all())
    _, masked, _ = prepare(read_train_file(write_fields(lab)), None).task.batches(0, range(4))
    assert bool((masked[:, 0, :2, :3] == 0).all())
    write_fields(lab, fields={"dataset": "weather", "fill": 12.0})
    assert load_prior(train(path)).card.facts["fill"] == 12.0


def test_fields_of_several_variables_become_a_prior(lab):
    weather(lab)
    path = write_fields(lab)
    train(path)
    prior = load_prior("toy")
    assert prior.space.dims == ("variable", "lat", "lon") and prior.space.coords["variable"] == ("t", "u")
    assert prior.space.coords["lat"][0] == 50.0 and prior.space.unit == "mixed"
    assert prior.scale.flatten().tolist() == [2.0, 0.5]
    assert prior.denoise(torch.zeros(1, 2, 9, 11), 1.0).shape == (1, 2, 9, 11)
    facts = prior.card.facts
    assert "fill" not in facts
    assert facts["data"][0]["slices"] == 10 and facts["held_out"] == ["weather: the last 25% in file order"]
    # White noise of unit latent variance: the Wiener filter is the optimal denoiser, sigma/sqrt(1 + sigma^2).
    row = facts["denoising"][1]
    assert row["sigma"] == 1.0 and row["wiener"] == pytest.approx(1 / np.sqrt(2), rel=0.15)
    assert "prior_physical" not in row


def test_land_is_marked_as_unknown(lab):
    weather(lab)
    values, known = read_train_file(write_fields(lab)).data(None).batch(0, 3)
    assert (known[:, 0, :2, :3] == 0).all() and (known[:, 1] == 1).all() and (known[:, 0, 2:] == 1).all()
    assert torch.isfinite(values).all()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"architecture": {**FIELDS["architecture"], "size": [9, 12]}}, "architecture has size"),
        (
            {"architecture": {**FIELDS["architecture"], "fields": 1}, "normalisation": SETTINGS["normalisation"]},
            "fields 1",
        ),
        (
            {"architecture": {**FIELDS["architecture"], "fields": 1}},
            "shift has 2 numbers; give one, or one for each of the 1",
        ),
        ({"fields": {"dataset": "weather", "phase": 0.5}}, "a phase is given to one magnitude"),
        ({"fields": {"dataset": "discs"}}, "holds no gridded fields"),
        ({"cuts": SETTINGS["cuts"]}, "either cuts"),
        ({"fields": {"dataset": "weather"}, "held_out": ["discs"]}, "held_out and pixel_mm belong to cuts"),
    ],
)
def test_fields_that_do_not_fit_are_refused(lab, changes, text):
    weather(lab)
    with pytest.raises(InputError, match=text):
        read_train_file(write_fields(lab, **changes)).data(None)


def test_the_command_sets_keys_and_says_where_the_prior_is(lab, capsys):
    path = write(lab)
    assert (
        main(["train", str(path), "--out", str(lab / "out"), "--set", "training.images=4", "--workspace", str(lab)])
        == 0
    )
    assert capsys.readouterr().out == f"{lab / 'out'}\n"
    assert yaml.safe_load((lab / "out" / "card.yaml").read_text())["budget"]["images"] == 4
    assert main(["train", str(path), "--set", "training.batch=2", "--set", "training.chunk=3"]) == 2
    assert "a batch of 2 images has no chunk of 3" in capsys.readouterr().err


def test_a_signal_stops_at_a_checkpoint_and_the_same_command_goes_on(lab):
    """The prior is that of a run that was left alone."""
    path, lines = write(lab, training={**SETTINGS["training"], "images": 16, "progress_seconds": 1e-9}), []
    train(path, lab / "whole")

    def say(line):
        lines.append(line)
        if "8 images" in line:
            signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match="stopped at step 3 with a checkpoint; go on with the same command"):
        train(path, lab / "cut", say=say)
    assert signal.getsignal(signal.SIGTERM) is before
    assert lines[0].startswith("toy: ") and "weights on 1 x cpu in float32, from image 0" in lines[0]
    assert not (lab / "cut" / "card.yaml").exists()
    train(path, lab / "cut", say=lines.append)
    assert any("from image 12" in line for line in lines)
    assert (lab / "cut" / "weights.safetensors").read_bytes() == (lab / "whole" / "weights.safetensors").read_bytes()


def test_a_checkpoint_of_other_data_is_not_continued(lab):
    path = write(lab)
    train(path)
    text = path.read_text().replace("shift: 8.0", "shift: 7.0")
    path.write_text(text)
    with pytest.raises(InputError, match="belongs to other data or another normalisation"):
        train(path)


MPIEXEC = Path(sys.executable).parent / "mpiexec"


@pytest.mark.mpi
@pytest.mark.skipif(not MPIEXEC.exists(), reason="needs the mpiexec of the mpich wheel beside this python")
def test_two_processes_write_the_prior_of_one(lab):
    path = write(lab, training={**SETTINGS["training"], "batch": 6, "chunk": 2, "images": 18, "validate_images": 6})
    train(path, lab / "one")
    command = [str(MPIEXEC), "-n", "2", sys.executable, "-m", "recon", "train", str(path), "--out", str(lab / "two")]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{lab / 'two'}\n" and "weights on 2 x cpu" in done.stderr
    for name in ("weights.safetensors", "card.yaml"):
        one, two = ((lab / folder / name).read_bytes() for folder in ("one", "two"))
        if name == "card.yaml":
            one, two = ({**yaml.safe_load(card), "budget": None} for card in (one, two))
        assert one == two
    assert launched_size()[0] == 1
