"""The section ``prior:``: what it may say, that it builds what the library has, and that what is written out runs the same."""

from __future__ import annotations

import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import xarray as xr
import yaml
from safetensors.torch import save_file
from torch import Tensor

import recon
from recon.errors import InputError
from recon.files import sha256
from recon.priors import (
    Accelerated,
    Card,
    ConditionalNetworkPrior,
    NetworkPrior,
    ScoreSum,
    SlicesPrior,
    Tiling,
    Windowed,
)
from recon.priors.conditional import Conditions
from recon.priors.network import Architecture, build_network
from recon.priors.store import save_prior
from recon.samplers import DiffPIR
from recon.schedules import Schedule
from recon.space import Space
from recon.workflows import prior_section
from recon.workflows.prior_section import PriorSection, Tile
from recon.workflows.priors import fingerprint
from recon.workflows.problem import Job, prepare
from recon.workflows.problems import validated
from recon.workflows.provenance import identity, weights_sha256
from recon.workflows.schema import load_workflow, resolved
from recon.workflows.source import parse_source
from tests.priors.checkpoints.test_checkpoint_files import CONFIG, weights  # noqa: F401  (a fixture)

FACTS = {
    "data": (), "held_out": (), "denoising": (), "unfit_for": "use", "weights_licence": "CC0",
    "budget": {"images": 0, "seconds": 0.0, "precision": "float32"}, "notes": (),
}  # fmt: skip
TOLD = {"inputs": [{"kind": "low_resolution", "factor": 4}, {"kind": "time_of_year"}], "dropout": 0.1}
SKY = Space(("lat", "lon"), (16, 16), {"lat": np.linspace(50.0, 42.5, 16), "lon": np.arange(16.0)}, "K")
DAYS = np.datetime64("2001-01-01T12:00") + np.arange(10) * np.timedelta64(20, "D")


def network(size: Any, spread: float = 0.0, **more: Any) -> torch.nn.Module:
    """A network of weights drawn with a standard deviation; zeros make the prior a white Gaussian."""
    made = build_network(Architecture(family="drunet", size=size, channels=(4, 4, 4, 4), blocks=1, **more))
    generator = torch.Generator().manual_seed(0)
    for p in made.parameters():
        p.data.copy_(spread * torch.randn(p.shape, generator=generator))
    return made


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, workspace: Path) -> Path:
    """A workspace: priors of slices (zeros and not), of conditions, of windows; a stack of slices, and dated fields."""
    folder = tmp_path_factory.mktemp("lab")
    (folder / "priors").mkdir()
    (folder / "priors" / "tiny").symlink_to(workspace / "priors" / "tiny")
    flat = Space(("y", "x"), (32, 32), {}, "1/m")
    for name, spread in (("rough", 0.2), ("other", 0.1)):
        prior = NetworkPrior(flat, Schedule(0.002, 80.0), Card(name, "", FACTS), network(32, spread), sigma_data=0.5,
                             shift=18.0, scale=16.0)  # fmt: skip
        save_prior(folder / "priors" / name, prior)
    inputs = Conditions.model_validate(TOLD)
    numbers = {"sigma_data": 1.0, "shift": 280.0, "scale": 5.0}
    told = NetworkPrior(SKY, Schedule(0.01, 40.0), Card("told", "", FACTS), network(16, 0.2, condition=4), **numbers)
    save_prior(folder / "priors" / "told", ConditionalNetworkPrior(told, inputs))
    window = Space(("lat", "lon"), (8, 8), {}, "K")
    whole = {"dims": SKY.dims, "shape": SKY.shape, "coords": {k: tuple(v.tolist()) for k, v in SKY.coords.items()}}
    placed = NetworkPrior(window, Schedule(0.01, 40.0), Card("placed", "", {**FACTS, "whole": whole}),
                          network(8, 0.2, position=True, shuffle=1, whole=(16, 16)), **numbers)  # fmt: skip
    save_prior(folder / "priors" / "placed", placed)
    low = Conditions.model_validate({"inputs": [{"kind": "low_resolution", "factor": 4}]})
    downscaling = NetworkPrior(window, Schedule(0.01, 40.0), Card("downscaling", "", {**FACTS, "whole": whole}),
                               network(8, 0.2, shuffle=1, whole=(16, 16), condition=1), **numbers)  # fmt: skip
    save_prior(folder / "priors" / "downscaling", ConditionalNetworkPrior(downscaling, low, SKY))
    rng = np.random.default_rng(0)
    with h5py.File(folder / "stack.h5", "w") as file:
        file["hu"] = (20 * rng.standard_normal((6, 32, 32))).astype(np.int16)
    values = 280 + 5 * rng.standard_normal((10, 16, 16))
    coords = {"time": DAYS.astype("datetime64[ns]"), "lat": SKY.coords["lat"], "lon": SKY.coords["lon"]}
    xr.Dataset({"t": (("time", "lat", "lon"), values)}, coords).to_netcdf(folder / "sky.nc", engine="h5netcdf")
    cards = {
        "stack": {"reader": "hdf5_slices", "file": "stack.h5", "key": "hu", "unit": "HU", "pixel_mm": 2.0, "use": "test"},
        "sky": {"reader": "fields", "file": "sky.nc", "variables": ["t"], "units": ["K"],
                "split": {"train": 0.3, "validation": 0.2}},
    }  # fmt: skip
    (folder / "datasets").mkdir()
    for name, card in cards.items():
        more = {"summary": "made up", "licence": "CC0", "source": "drawn", "sha256": sha256(folder / card["file"])}
        (folder / "datasets" / f"{name}.yaml").write_text(yaml.safe_dump({**card, **more}))
    return folder


@pytest.fixture(autouse=True)
def _data(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECON_DATA", str(lab))


CT = "dataset: ct_small, operator: {type: parallel_beam, views: 8}, noise: {sigma: 0.1}"
STACK = "dataset: stack, index: 1, operator: {type: parallel_beam, views: 8}, noise: {sigma: 0.1}"
FIELD = "dataset: sky, index: 2, operator: {type: masked, share: 0.3}, noise: {spread: 0.1}"


def written(folder: Path, prior: str, problem: str = CT) -> Path:
    path = folder / "w.yaml"
    path.write_text(f"problem: {{{problem}}}\nprior: {prior}\nsampler: {{method: diffpir, steps: 3}}\ndraws: 2\n")
    return path


def job(folder: Path, lab: Path, prior: str, problem: str = CT) -> Job:
    return prepare(load_workflow(written(folder, prior, problem), workspace=lab))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


FULL = """\
prior:
  name: ./priors/tiny
  compute: {precision: bf16, chunk: 3, recompute: true, channels_last: true, otherwise: float32}
  tile: {shape: [64, 64], overlap: 16, shifted: true}
"""


def test_what_is_written_out_runs_the_same(lab: Path, tmp_path: Path) -> None:
    (lab / "w.yaml").write_text(f"problem: {{{CT}}}\n{FULL}sampler: {{method: diffpir}}\n")
    first = load_workflow(lab / "w.yaml", workspace=lab)
    assert isinstance(first.prior, PriorSection)
    assert first.prior.name == str((lab / "priors" / "tiny").resolve())
    assert first.prior.compute is not None
    assert (first.prior.compute.precision, first.prior.compute.recompute) == ("bfloat16", "chunks")
    (tmp_path / "again.yaml").write_text(resolved(first))
    again = load_workflow(tmp_path / "again.yaml")
    assert again == first
    assert resolved(again) == resolved(first)
    assert load_workflow(lab / "w.yaml", ["prior.tile.overlap=8"], lab).prior.tile.overlap == 8
    plain = load_workflow(lab / "w.yaml", ["prior=tiny"], lab)
    assert plain.prior == str((lab / "priors" / "tiny").resolve())


def test_the_example_of_the_text_is_valid() -> None:
    text = textwrap.dedent((prior_section.__doc__ or "").split("code-block:: yaml")[1].split("A plain name")[0])
    section = validated(PriorSection, replace(source := parse_source(text, "the text"), data=source.data["prior"]))
    assert section.given == {"low": "truth", "day": "2009-07-14"}
    assert (section.compute.chunk, section.tile.shape) == (8, (256, 256))


def test_the_section_of_windows_is_that_of_the_library() -> None:
    keys = {"overlap": 7, "margin": 2, "align": 3, "periodic": ("lon",), "shifted": True}
    assert Tile.model_validate(keys).build() == Tiling(**keys)
    assert set(Tile.model_fields) - {"shape"} == set(Tiling.__dataclass_fields__)


def test_what_the_draws_depend_on_has_another_name(lab: Path, tmp_path: Path) -> None:
    plain = job(tmp_path, lab, "rough")
    weights_of = plain.prior.card.facts["weights"]["sha256"]
    assert weights_sha256(plain) == weights_of, "one network by itself goes by its weights"
    assert fingerprint(job(tmp_path, lab, "{name: rough}").prior) == weights_of
    asked = [
        "rough", "{name: rough, compute: {chunk: 2}}", "{name: rough, tile: {shape: [64, 64], overlap: 16}}",
        "{name: rough, tile: {shape: [64, 64], overlap: 8}}", "{sum: [rough, other]}",
        "{sum: [rough, other], weights: [0.9, 0.1]}",
    ]  # fmt: skip
    jobs = [(load_workflow(written(tmp_path, one), workspace=lab), job(tmp_path, lab, one)) for one in asked]
    assert len({fingerprint(made.prior) for _, made in jobs}) == len(asked)
    assert len({identity(*pair) for pair in jobs}) == len(asked)
    days = [job(tmp_path, lab, f"{{name: told, given: {{low: truth, day: {d}}}}}", FIELD).prior for d in (3, 4)]
    assert fingerprint(days[0]) != fingerprint(days[1])


def test_computed_otherwise_and_the_accuracy_is_guarded(lab: Path, tmp_path: Path) -> None:
    plain = job(tmp_path, lab, "rough").prior
    made = job(tmp_path, lab, "{name: rough, compute: {chunk: 1, recompute: blocks, channels_last: true}}").prior
    assert isinstance(made, Accelerated)
    z = noise(3, 32, 32)
    assert torch.allclose(made.denoise(z, 0.5), plain.denoise(z, 0.5), atol=1e-5)
    with pytest.raises(
        InputError, match=r"computed in bfloat16 differs by .* a loss of .* dB, and 1e-06 dB are allowed"
    ):
        job(tmp_path, lab, "{name: rough, compute: {precision: bf16, loss: 1e-6}}")
    fallen = job(tmp_path, lab, "{name: rough, compute: {precision: bf16, loss: 1e-6, otherwise: float32}}").prior
    assert torch.equal(fallen.denoise(z, 0.5), plain.denoise(z, 0.5))


def test_a_field_in_windows(lab: Path, tmp_path: Path) -> None:
    """Under a network of zeros every value is a Gaussian by itself, so windows are exact."""
    made = job(tmp_path, lab, "{name: tiny, compute: {chunk: 2}, tile: {shape: [64, 64], overlap: 16}}")
    assert isinstance(made.prior, Windowed) and isinstance(made.prior.prior, Accelerated)
    assert made.posterior.space.shape == made.measurement.truth.shape == (64, 64)
    z = noise(2, 64, 64)
    assert torch.allclose(made.prior.denoise(z, 2.0), z * 0.25 / 4.25, atol=1e-6)
    assert any("in windows" in text for text in made.warnings)
    assert recon.sample(made.posterior, DiffPIR(steps=2), draws=2).x.shape == (2, 64, 64)
    with pytest.raises(InputError, match=r"prior.tile.shape: the sides of the field must be said for 'tiny'"):
        job(tmp_path, lab, "{name: tiny, tile: {overlap: 8}}")


def test_windows_that_have_a_place(lab: Path, tmp_path: Path) -> None:
    made = job(tmp_path, lab, "{name: placed, compute: {chunk: 1}, tile: {overlap: 2}}", FIELD)
    assert isinstance(made.prior, Windowed)
    assert (made.prior.chunk, made.prior.placed) == (1, True)
    assert np.array_equal(made.posterior.space.coords["lat"], SKY.coords["lat"]), "the whole field stands on the card"
    with pytest.raises(InputError, match=r"'placed' is over windows of a larger field: write prior: .*tile"):
        job(tmp_path, lab, "placed", FIELD)
    with pytest.raises(InputError, match=r"prior.tile.shape: .* for 'placed'; it knows windows of \[16, 16\]"):
        job(tmp_path, lab, "{name: placed, tile: {shape: [32, 32], overlap: 2}}", FIELD)


def test_a_volume_of_slices(lab: Path, tmp_path: Path) -> None:
    made = job(tmp_path, lab, "{name: tiny, compute: {chunk: 2}, slices: {axis: z, count: 3}}", STACK)
    assert isinstance(made.prior, SlicesPrior)
    assert made.posterior.space.dims == ("z", "y", "x")
    truth = made.measurement.truth
    assert truth is not None and truth.shape == (3, 32, 32)
    one = job(tmp_path, lab, "tiny", STACK.replace("index: 1", "index: 2")).measurement.truth
    assert torch.equal(truth[1], one), "the slices after problem.index"
    assert "slice 1 of stack (CC0) and the 2 after it" in made.notes["data"]
    assert any("slices to be independent" in text for text in made.warnings)
    assert recon.sample(made.posterior, DiffPIR(steps=2), draws=2).x.shape == (2, 3, 32, 32)
    with pytest.raises(InputError, match=r"prior.slices.count: how many slices the volume has must be said"):
        job(tmp_path, lab, "{name: tiny, slices: {axis: z}}", STACK)
    with pytest.raises(InputError, match=r"problem.index is 1; stack has 6 slices, numbered from 0, 9 of them"):
        job(tmp_path, lab, "{name: tiny, slices: {count: 9}}", STACK)


def test_conditions(lab: Path, tmp_path: Path) -> None:
    made = job(tmp_path, lab, "{name: told, given: {low: truth, day: truth}}", FIELD)
    truth = made.measurement.truth
    assert truth is not None
    means = truth.reshape(4, 4, 4, 4).mean((1, 3))
    days = float((DAYS[5 + 2] - np.datetime64("2001-01-01")) / np.timedelta64(1, "D"))
    prior = recon.priors.load_prior(lab / "priors" / "told")
    assert isinstance(prior, ConditionalNetworkPrior)
    expected = prior.given(low=means, day=days)
    z = noise(2, 16, 16)
    assert torch.allclose(made.prior.denoise(z, 0.5), expected.denoise(z, 0.5), atol=1e-5)
    np.save(tmp_path / "low.npy", means.numpy())
    xr.Dataset({"low": (("lat", "lon"), means.numpy()), "x": 1.0}).to_netcdf(tmp_path / "low.nc", engine="h5netcdf")
    for low in ("./low.npy", "low.nc", means.tolist()):
        same = job(tmp_path, lab, f"{{name: told, given: {{low: {low}, day: {'2003-05-21T12:00'}}}}}", FIELD).prior
        assert torch.allclose(same.denoise(z, 0.5), made.prior.denoise(z, 0.5), atol=1e-5)
    free = job(tmp_path, lab, "{name: told, given: {}}", FIELD).prior
    assert torch.equal(free.denoise(z, 0.5), prior.unconditional().denoise(z, 0.5))


def test_windows_that_are_told_the_whole_at_low_resolution(lab: Path, tmp_path: Path) -> None:
    made = job(tmp_path, lab, "{name: downscaling, given: {low: truth}, tile: {overlap: 2}}", FIELD)
    truth = made.measurement.truth
    assert isinstance(made.prior, Windowed) and truth is not None
    prior = recon.priors.load_prior(lab / "priors" / "downscaling")
    assert isinstance(prior, ConditionalNetworkPrior)
    whole = prior.given(low=truth.reshape(4, 4, 4, 4).mean((1, 3)))
    z = noise(1, 16, 16)
    # Two windows of 8 along each axis would leave no overlap: there are three, and the corner belongs to the first alone.
    corner = whole.at(0, 0).denoise(z[:, :8, :8], 0.5)[:, :4, :4]
    assert torch.allclose(made.prior.denoise(z, 0.5)[:, :4, :4], corner, atol=1e-5)


@pytest.mark.parametrize(
    ("section", "text"),
    [
        ("told", r"'told' depends on low, day: say them under prior.given, or given: {} for the prior without them"),
        ("{name: told, given: {low: truth}}", r"prior.given: told is given low, day, all at once; missing: day"),
        ("{name: told, given: {low: truth, day: 400}}", r"prior.given: day is days since 1 January"),
        ("{name: told, given: {low: [[1.0]], day: 3}}", r"prior.given: low must have the shape"),
        ("{name: told, given: {low: truth, day: 2003-13-01}}", r"prior.given: day: 2003-13-01 is no date"),
        ("{name: told, given: {low: absent.nc, day: 3}}", r"w.yaml:2:34: prior.given.low: there is no file .*absent.nc"),
        ("{name: told, given: {low: yes, day: 3}}", r"prior.given: low: expected a number, a list .*; got 'yes'"),
        ("{name: told, given: {low: [[1], [1, 2]], day: 3}}", r"prior.given: low: expected a number"),
        ("{name: placed, given: {day: 3}, tile: {overlap: 2}}", r"prior.given: 'placed' takes no conditions"),
    ],
)  # fmt: skip
def test_conditions_that_do_not_fit(lab: Path, tmp_path: Path, section: str, text: str) -> None:
    with pytest.raises(InputError, match=text):
        job(tmp_path, lab, section, FIELD)


def test_scores_of_two_priors(lab: Path, tmp_path: Path) -> None:
    made = job(tmp_path, lab, "{sum: [rough, other], weights: [0.75, 0.25]}")
    assert isinstance(made.prior, ScoreSum)
    z = noise(2, 32, 32)
    parts = [job(tmp_path, lab, name).prior.denoise(z, 0.5) for name in ("rough", "other")]
    assert torch.allclose(made.prior.denoise(z, 0.5), 0.75 * parts[0] + 0.25 * parts[1], atol=1e-6)
    assert any("sum of scores" in text for text in made.warnings)


def test_a_bare_checkpoint(lab: Path, tmp_path: Path, weights: dict[str, Tensor]) -> None:  # noqa: F811
    save_file(weights, tmp_path / "theirs.safetensors")
    told = "grid: {dims: [y, x], shape: [8, 8]}, unit: 1/m, normalisation: {low: 0.0, high: 40.0}"
    section = f"{{name: theirs.safetensors, format: auto, {told}, config: {CONFIG}}}"
    made = job(tmp_path, lab, section)
    assert made.prior.space.shape == (8, 8)
    assert made.prior.card.facts["format"] == "score_sde"
    again = load_workflow(written(tmp_path, section), workspace=lab)
    (tmp_path / "again.yaml").write_text(resolved(again))
    assert load_workflow(tmp_path / "again.yaml") == again
    with pytest.raises(InputError, match=r"prior.name: there is no file .*absent.pt"):
        job(tmp_path, lab, f"{{name: absent.pt, format: auto, {told}}}")


@pytest.mark.parametrize(
    ("section", "text"),
    [
        ("{nane: tiny}", r"w.yaml:2:9: prior.nane: unknown key \(did you mean 'name'\?\)"),
        ("{name: tinny}", r"w.yaml:2:15: prior.name: there is no 'tinny' .*did you mean 'tiny'"),
        ("{sum: [tiny, tinny]}", r"w.yaml:2:21: prior.sum\[1\]: there is no 'tinny'"),
        ("3", r"prior: expected a name \(see `recon list priors`\), a path or a definition; got 3"),
        ("{}", r"prior: expected either name or sum; got neither"),
        ("{name: tiny, sum: [tiny, tiny]}", r"prior: expected either name or sum; got both"),
        ("{mix: [tiny, tiny]}", r"prior: mix: the shares of a mixture .* sum: \[...\] adds their scores"),
        ("{sum: [tiny]}", r"prior.sum: expected at least 2 items"),
        ("{sum: [tiny, tiny], weights: [1.0]}", r"prior: weights are one for each of sum, 2; got 1"),
        ("{name: tiny, compute: {precision: fp8}}", r"prior.compute.precision: expected one of .*bfloat16.*; got 'fp8'"),
        ("{name: tiny, compute: {chunk: 0}}", r"prior.compute.chunk: expected a number >= 1; got 0"),
        ("{name: tiny, compute: {compile: true, recompute: blocks}}", r"prior.compute: a compiled network has no blocks"),
        ("{name: tiny, compute: {recompute: all}}", r"prior.compute.recompute: expected one of .*; got 'all'"),
        ("{name: tiny, compute: {compiled: x}}", r"prior.compute.compiled: unknown key \(did you mean 'compile'\?\)"),
        ("{name: tiny, tile: {overlap: 0}}", r"prior.tile: overlap and align are at least 1"),
        ("{name: tiny, tile: {shape: [64, 64]}}", r"prior.tile.overlap: this key is missing"),
        ("{name: tiny, tile: {overlap: 4, margin: 3}}", r"prior.tile: a margin .* is at most half of it; got 3"),
        ("{name: tiny, sha256: abc}", r"prior: sha256 belong to bare checkpoints: give format too"),
        ("{name: tiny, format: auto}", r"prior: a bare checkpoint has a name .*missing: \['grid', 'unit', 'normalisation'\]"),
    ],
)  # fmt: skip
def test_what_is_refused(lab: Path, tmp_path: Path, section: str, text: str) -> None:
    with pytest.raises(InputError, match=text):
        load_workflow(written(tmp_path, section), workspace=lab)
