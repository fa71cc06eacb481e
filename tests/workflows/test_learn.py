"""From a learn.yaml to a prior: what a file may say, what is measured, the folder that is left, and going on after a stop."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from recon.cli import main
from recon.cli.listing import listing
from recon.datasets.measurement import Measurement
from recon.errors import InputError, Stopped
from recon.files import sha256
from recon.likelihoods import GaussianLikelihood
from recon.operators import ParallelBeam
from recon.priors import NetworkPrior, load_prior
from recon.priors.learning import load_learnt
from recon.priors.learning.around import AroundGaussian
from recon.priors.store import read_card, save_prior, write_card
from recon.space import Space
from recon.workflows import learn_file
from recon.workflows.learn import learn
from recon.workflows.learn_data import observed
from recon.workflows.learn_file import read_learn_file
from recon.workflows.problems import validated
from recon.workflows.source import parse_source

TRAINING = {"images": 16, "batch": 8, "chunk": 4, "warmup": 8, "ema": 20, "precision": "float32", "device": "cpu"}
LEARNING = {
    "laps": 1,
    "rank": 2,
    "moment_iterations": 2,
    "steps": 4,
    "cg_iterations": 1,
    "block": 6,
    "training": TRAINING,
}
SETTINGS: dict[str, Any] = {
    "name": "discs_learnt",
    "summary": "discs nobody has seen",
    "simulate": {
        "dataset": "discs",
        "coarsen": 2,
        "count": 6,
        "operators": {"type": "cartesian_mri", "coils": 1, "acceleration": 2, "centre": 2},
        "alike": 2,
        "noise": {"sigma": 0.02},
    },
    "architecture": {"family": "drunet", "size": 8, "shuffle": 1, "channels": [4, 4, 4, 4], "blocks": 1},
    "learning": LEARNING,
    "unfit_for": "anything",
    "weights_licence": "CC0",
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A workspace with a data set of 20 discs, half of them for training; one thread."""
    folder = tmp_path_factory.mktemp("lab")
    y, x = np.mgrid[-1:1:16j, -1:1:16j]
    with h5py.File(folder / "discs.h5", "w") as file:
        file["slices"] = np.stack([np.where(x**2 + y**2 < r, 1.0, 0.0) for r in np.linspace(0.2, 0.9, 20)])
    card = {
        "summary": "discs", "reader": "fields", "file": "discs.h5", "variables": ["slices"], "units": ["1"], "dims": ["y", "x"],
        "pixel_mm": 1.0, "licence": "CC0", "source": "drawn", "sha256": sha256(folder / "discs.h5"),
        "split": {"train": 0.5, "validation": 0.1},
    }  # fmt: skip
    (folder / "datasets").mkdir()
    (folder / "datasets" / "discs.yaml").write_text(yaml.safe_dump(card))
    (folder / "operators").mkdir()
    (folder / "operators" / "half.yaml").write_text("type: masked\nshare: 0.5\nseed: 3\n")
    before, logged = torch.get_num_threads(), logging.getLogger("recon")
    handlers, level = list(logged.handlers), logged.level
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECON_DATA", str(folder))
        patch.setenv("RECON_WORKSPACE", str(folder))
        yield folder
    torch.set_num_threads(before)
    logged.handlers[:], logged.level = handlers, level  # commands set up logging


def write(folder: Path, drop: tuple[str, ...] = (), **changes: Any) -> Path:
    """``learn.yaml`` of a prior's folder: the settings, changed by dotted keys with ``__`` for dots."""
    settings = yaml.safe_load(yaml.safe_dump(SETTINGS))
    for key, value in changes.items():
        *path, last = key.split("__")
        section = settings
        for part in path:
            section = section[part]
        section[last] = value
    for key in drop:
        del settings[key]
    path = folder / "learn.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def learnt(lab: Path) -> Path:
    """The folder of a prior that one tiny lap has left."""
    return learn(write(lab / "priors" / "discs_learnt"))


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], two[name]) for name in one | two)


def test_a_file_becomes_a_prior_that_workflows_find(lab: Path, learnt: Path) -> None:
    prior = load_prior("discs_learnt")
    assert isinstance(prior, NetworkPrior)
    assert isinstance(prior.network, AroundGaussian)
    raw = load_learnt(learnt / "learning")
    raw_weights = {name: value.half().float() for name, value in raw.network.named_parameters()}
    assert same(raw_weights, dict(prior.network.named_parameters())), "weights are kept in float16"
    assert all(bool(value.any()) for value in raw_weights.values())
    for name in ("mean", "variances", "vectors"):
        assert torch.equal(getattr(prior.network, name), getattr(raw.network, name))
    assert (float(prior.shift), float(prior.scale)) == (float(raw.shift), float(raw.scale))
    assert re.search(r"^discs_learnt +discs nobody has seen$", listing("priors"), re.MULTILINE)
    facts = prior.card.facts
    assert facts["data"] == [{"name": "discs", "slices": 6, "share": 1.0, "licence": "CC0", "source": "drawn"}]
    assert facts["learnt"]["observations"] == 6
    assert "3 operators (cartesian_mri)" in facts["learnt"]["measured"]
    assert len(facts["learnt"]["laps"]) == 1 and 0 < facts["learnt"]["laps"][0]["chi2"] < 10
    assert (facts["weights_licence"], facts["unfit_for"], facts["budget"]["images"]) == ("CC0", "anything", 16)
    assert facts["pixel_mm"] == pytest.approx([2.0, 2.0])


def test_a_second_call_changes_nothing_and_a_saved_prior_can_be_saved_again(learnt: Path, tmp_path: Path) -> None:
    first = (learnt / "weights.safetensors").read_bytes()
    said: list[str] = []
    learn(learnt / "learn.yaml", say=said.append)
    assert (learnt / "weights.safetensors").read_bytes() == first
    assert not any("lap 1" in line for line in said)
    again = load_prior(learnt)
    assert isinstance(again, NetworkPrior)
    assert save_prior(tmp_path / "again", again).model_dump() == read_card(learnt).model_dump()


def test_weights_without_their_gaussian_are_refused(learnt: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(learnt, broken, ignore=shutil.ignore_patterns("learning"))
    tensors = load_file(broken / "weights.safetensors")
    del tensors["around.factors"]
    save_file(tensors, broken / "weights.safetensors")
    card = read_card(broken)
    changed = card.weights.model_copy(update={"sha256": sha256(broken / "weights.safetensors")})
    write_card(broken, card.model_copy(update={"weights": changed}))
    with pytest.raises(
        InputError, match=r"weights.safetensors has not the Gaussian of its card: around.diagonal, around.mean"
    ):
        load_prior(broken)
    write_card(broken, card.model_copy(update={"weights": changed, "around": None}))
    with pytest.raises(InputError, match=r"belongs to another architecture than its card: around.diagonal"):
        load_prior(broken)


def test_a_signal_ends_it_with_what_is_finished_and_the_next_call_goes_on(
    lab: Path, learnt: Path, tmp_path: Path
) -> None:
    path = write(tmp_path / "discs_learnt")

    def say(line: str) -> None:
        if line.startswith("lap 1: drew block 1"):
            os.kill(os.getpid(), signal.SIGTERM)

    # A block of three: the signal comes while the first one is being told of.
    with pytest.raises(Stopped, match="stopped in lap 1 with its samples so far; go on with the same command"):
        learn(path, say=say, overrides=["learning.block=3"])
    said: list[str] = []
    learn(path, say=said.append, overrides=["learning.block=3"])
    assert [line for line in said if "drew" in line] == ["lap 1: drew block 2 of 2"]
    with pytest.raises(InputError, match="was begun with other config; choose another folder"):
        learn(path)
    learn(path, resume=False)
    mine, theirs = load_learnt(path.parent / "learning"), load_learnt(learnt / "learning")
    assert same(dict(mine.network.named_parameters()), dict(theirs.network.named_parameters()))


def test_each_object_has_its_own_noise_and_groups_their_own_operator(lab: Path, tmp_path: Path) -> None:
    changes = {
        "simulate__alike": 2,
        "simulate__count": 10,
        "simulate__operators": ["half", {"type": "masked", "share": 0.25}],
    }
    seen = observed(read_learn_file(write(tmp_path, **changes)))
    ops = [one.operator for one in seen.likelihoods]
    assert [ops.index(op) for op in ops] == [0, 0, 2, 2, 4, 4, 6, 6, 8, 8]
    assert [op.range.size for op in ops[::2]] == [32, 16, 32, 16, 32]
    masks = [op.mask for op in ops[::2]]
    for i, j in ((0, 2), (2, 4), (0, 4), (1, 3)):
        assert not torch.equal(masks[i], masks[j]), "the next round has the next seed"
    known = read_learn_file(write(tmp_path, **changes)).simulate
    assert known is not None
    assert known.operators[0].seed == 3, "named definitions are looked up"
    images = h5py.File(lab / "discs.h5")["slices"][:10].reshape(10, 8, 2, 8, 2).mean((2, 4))
    noise = [
        one.y - one.operator.A(torch.tensor(x, dtype=torch.float32)[None])[0]
        for one, x in zip(seen.likelihoods, images, strict=True)
    ]
    assert not torch.allclose(noise[0], noise[1], atol=1e-3), "objects that share an operator do not share their noise"
    every = torch.cat(noise)
    # 256 numbers of standard deviation 0.02: five times the deviation of their root mean square.
    assert float(every.square().mean().sqrt()) == pytest.approx(0.02, rel=5 / np.sqrt(2 * len(every)))
    again = observed(read_learn_file(tmp_path / "learn.yaml"))
    assert all(torch.equal(a.y, b.y) for a, b in zip(seen.likelihoods, again.likelihoods, strict=True))


def test_some_of_the_images_and_complex_ones(lab: Path, tmp_path: Path) -> None:
    all_of_them = observed(read_learn_file(write(tmp_path, simulate__count=None))).likelihoods
    assert len(all_of_them) == 10, "the training half"
    some = observed(
        read_learn_file(write(tmp_path, simulate__count=3, simulate__first=1, simulate__every=4))
    ).likelihoods
    assert len(some) == 3
    with pytest.raises(InputError, match=r"discs has 10 training images; 3 of them from 2 in steps of 4 are too many"):
        observed(read_learn_file(write(tmp_path, simulate__count=3, simulate__first=2, simulate__every=4)))
    with pytest.raises(InputError, match=r"simulate.first is 10; discs has 10 training images"):
        observed(read_learn_file(write(tmp_path, simulate__first=10)))
    (one,) = observed(read_learn_file(write(tmp_path, simulate__count=1, simulate__phase=0.3))).likelihoods
    assert one.operator.domain.dims == ("channel", "y", "x")


def scan(path: Path, views: int = 6, level: float = 1.0) -> None:
    """A parallel-beam measurement file of a disc."""
    image = Space.grid((8, 8), 1e-3, "1/m")
    operator = ParallelBeam(image, np.arange(views) * np.pi / views)
    y, x = np.mgrid[-1:1:8j, -1:1:8j]
    truth = torch.from_numpy(np.where(x**2 + y**2 < 0.5, level, 0.0).astype(np.float32))
    values = operator.A(truth[None])[0]
    Measurement(operator.geometry, image, values, torch.tensor(0.01), truth=truth).save(path)


def test_measurement_files(lab: Path, tmp_path: Path) -> None:
    (tmp_path / "scans").mkdir()
    for name, views in (("b", 6), ("a", 6), ("c", 9)):
        scan(tmp_path / "scans" / f"{name}.nc", views)
    told = {"measurements": ["scans/[ab].nc", "scans/*.nc"], "licence": "CC0", "source": "ours"}
    file = read_learn_file(write(tmp_path, drop=("simulate",), **told))
    assert [Path(name).name for name in file.measurements or ()] == ["a.nc", "b.nc", "c.nc"]
    seen = observed(file)
    first, second, third = seen.likelihoods
    assert isinstance(first, GaussianLikelihood)
    assert first.operator is second.operator and first.operator is not third.operator
    assert (seen.sources[0]["licence"], seen.sources[0]["slices"]) == ("CC0", 3)
    assert "3 measurement files, 2 geometries: ParallelBeam" in seen.says
    with pytest.raises(InputError, match=r"learn.yaml:\d+:\d+: measurements(\[0\])?: there is no file none/\*.nc"):
        read_learn_file(write(tmp_path, drop=("simulate",), **{**told, "measurements": "none/*.nc"}))


@pytest.mark.parametrize(
    ("changes", "drop", "text"),
    [
        ({"colour": "red"}, (), r"learn.yaml:\d+:1: colour: unknown key"),
        ({"simulate__alike": 0}, (), r"learn.yaml:\d+:\d+: simulate.alike: expected a number >= 1; got 0"),
        ({"simulate__operator": "half"}, (), r"simulate.operator: unknown key \(did you mean 'operators'\?\)"),
        ({"simulate__operators": "hlaf"}, (), r"simulate.operators\[0\]: there is no 'hlaf' .*did you mean 'half'"),
        ({"simulate__operators": [{"type": "masked"}]}, (), r"simulate.operators\[0\].share: this key is missing"),
        ({"simulate__dataset": "disks"}, (), r"simulate.dataset: there is no 'disks' .*did you mean 'discs'"),
        ({"simulate__noise": {"spread": 0.1}}, (), r"simulate: noise as a spread is a share of a prior's"),
        ({"learning__lap": 3}, (), r"learning.lap: unknown key \(did you mean 'laps'\?\)"),
        ({"learning__training__batch": 0}, (), r"learning.training.batch: expected a number >= 1; got 0"),
        ({"architecture__family": "unet"}, (), r"architecture.family: expected one of 'adm', 'drunet'; got 'unet'"),
        ({}, ("simulate",), r"expected either measurements \(files\) or simulate .*; got neither"),
        ({"measurements": "*.nc"}, (), r"expected either measurements .* got both"),
        ({"measurements": "*.nc"}, ("simulate",), r"measurements also need licence and source"),
        ({"licence": "CC0"}, (), r"licence and source belong to measurements"),
        ({}, ("weights_licence",), r"weights_licence: this key is missing"),
    ],
)  # fmt: skip
def test_what_is_refused(lab: Path, tmp_path: Path, changes: dict[str, Any], drop: tuple[str, ...], text: str) -> None:
    with pytest.raises(InputError, match=text):
        read_learn_file(write(tmp_path, drop, **changes))


def test_the_example_of_the_text_is_valid() -> None:
    text = textwrap.dedent((learn_file.__doc__ or "").split("code-block:: yaml")[1].split("A path is relative")[0])
    file = validated(learn_file.LearnFile, parse_source(text, "the text"))
    assert (file.simulate.alike, file.learning.laps, file.learning.training.images) == (16, 4, 12000)


def test_what_cannot_be_learnt_from(lab: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the architecture is of 1 fields of \(16, 16\) pixels"):
        learn(write(tmp_path, architecture__size=16))
    one = {"reader": "dicom", "file": "pydicom:CT_small.dcm"}
    with pytest.raises(InputError, match="is a single image; a prior is learnt from measurements of many objects"):
        observed(read_learn_file(write(tmp_path, simulate__dataset=one)))


@pytest.mark.slow
def test_from_masked_fields_to_a_reconstruction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands, one after the other: smooth fields of which half is seen teach a prior, which fills the gaps of another.

    Between random gaps a prior without structure knows the mean alone; one that has learnt how neighbours go together leaves a
    part of its error.
    """
    for name in ("RECON_DATA", "RECON_WORKSPACE"):
        monkeypatch.setenv(name, str(tmp_path))
    y, x = np.mgrid[0:12, 0:12]
    near = np.exp(-((y.reshape(-1, 1) - y.reshape(1, -1)) ** 2 + (x.reshape(-1, 1) - x.reshape(1, -1)) ** 2) / 18.0)
    root = np.linalg.cholesky(near + 1e-4 * np.eye(144))
    fields = 3 + (root @ np.random.default_rng(0).standard_normal((144, 240))).T.reshape(240, 12, 12)
    with h5py.File(tmp_path / "smooth.h5", "w") as file:
        file["slices"] = fields
    card = {
        "summary": "smooth fields", "reader": "fields", "file": "smooth.h5", "variables": ["slices"], "units": ["1"],
        "dims": ["y", "x"], "pixel_mm": 1.0, "licence": "CC0", "source": "drawn", "sha256": sha256(tmp_path / "smooth.h5"),
        "split": {"train": 0.8, "validation": 0.1},
    }  # fmt: skip
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "smooth.yaml").write_text(yaml.safe_dump(card))
    mask = {"type": "masked", "share": 0.5}
    simulate = {"dataset": "smooth", "operators": mask, "alike": 4, "noise": {"sigma": 0.1}}
    training = {**TRAINING, "images": 2000, "batch": 16, "chunk": 16, "warmup": 200, "ema": 200}
    path = write(
        tmp_path / "priors" / "smooth_learnt",
        name="smooth_learnt",
        simulate=simulate,
        architecture__size=12,
        learning={"laps": 2, "rank": 12, "moment_iterations": 12, "steps": 16, "training": training},
    )
    assert main(["learn", str(path)]) == 0
    laps = load_prior("smooth_learnt").card.facts["learnt"]["laps"]
    assert len(laps) == 2
    # The misfit per datum of exact draws is 1 on average; of 192 fields with 72 data each its mean is known to 1.2 %.
    assert all(0.9 < lap["chi2"] < 1.1 and lap["lost"] == 0 for lap in laps)
    text = yaml.safe_dump(
        {"problem": {"dataset": "smooth", "index": 5, "operator": {**mask, "seed": 99}, "noise": {"sigma": 0.1}},
         "prior": "smooth_learnt", "sampler": {"method": "mmps", "steps": 24}, "draws": 8}
    )  # fmt: skip
    (tmp_path / "w.yaml").write_text(text)
    assert main(["run", str(tmp_path / "w.yaml"), "--out", str(tmp_path / "run")]) == 0
    images = json.loads((tmp_path / "run" / "report.json").read_text())["images"]
    assert images["posterior mean"]["rmse"] < 0.5 * images["least squares"]["rmse"]
