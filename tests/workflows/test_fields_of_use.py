"""The same path for every field: fan beams, magnetic resonance, stations, masks; a zero network is a Gaussian prior."""

from __future__ import annotations

import json
import math
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import xarray as xr
import yaml

from recon.errors import InputError
from recon.files import sha256
from recon.operators import CartesianMRI, FanBeam, Masked, NonCartesianMRI, PointSensors
from recon.priors import Card, NetworkPrior
from recon.priors.network import Architecture, build_network
from recon.priors.store import save_prior
from recon.schedules import Schedule
from recon.space import Space
from recon.workflows import pipeline
from recon.workflows.problem import prepare
from recon.workflows.schema import load_workflow

FACTS = {
    "data": (), "held_out": (), "denoising": (), "unfit_for": "use", "weights_licence": "CC0",
    "budget": {"images": 0, "seconds": 0.0, "precision": "float32"}, "notes": (),
}  # fmt: skip
LAT, LON = np.linspace(44.0, 40.0, 9), np.arange(-4.0, 7.0)
VARIABLES = ("t", "u")


def zero_network(size, fields):
    network = build_network(Architecture(family="drunet", size=size, fields=fields, channels=(4, 4, 4, 4), blocks=1))
    for p in network.parameters():
        torch.nn.init.zeros_(p)
    return network


def card(folder: Path, name: str, path: Path, **more: object) -> None:
    text = {
        "summary": "made up", "reader": "fields", "file": path.name, "licence": "CC0", "source": "drawn",
        "sha256": sha256(path), "split": {"train": 0.4, "validation": 0.2}, **more,
    }  # fmt: skip
    (folder / "datasets").mkdir(exist_ok=True)
    (folder / "datasets" / f"{name}.yaml").write_text(yaml.safe_dump(text))


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Priors and data sets of complex images and of weather with two variables."""
    folder = tmp_path_factory.mktemp("lab")
    rng = np.random.default_rng(0)
    y, x = np.mgrid[-1:1:32j, -1:1:32j]
    with h5py.File(folder / "heads.h5", "w") as file:
        file["slices"] = np.stack([np.where(x**2 + 1.2 * y**2 < r, 0.8, 0.0) for r in np.linspace(0.4, 0.8, 10)])
    card(folder, "heads", folder / "heads.h5", variables=["slices"], units=["1"], dims=["y", "x"], pixel_mm=1.0)
    time = np.arange(20)
    fields = {"t": 285 + 4 * rng.standard_normal((20, 9, 11)), "u": 2 * rng.standard_normal((20, 9, 11))}
    dims, coords = ("time", "lat", "lon"), {"time": time, "lat": LAT, "lon": LON}
    xr.Dataset({n: (dims, v) for n, v in fields.items()}, coords).to_netcdf(folder / "weather.nc", engine="h5netcdf")
    card(folder, "weather", folder / "weather.nc", variables=list(VARIABLES), units=["K", "m/s"])
    head = Space(("channel", "y", "x"), (2, 16, 16), {"channel": ("real", "imag")}, "1")
    air = Space(("variable", "lat", "lon"), (2, 9, 11), {"variable": VARIABLES, "lat": LAT, "lon": LON}, "mixed")
    for name, space, size, numbers in (
        ("head", head, 16, {"shift": 0.0, "scale": 0.5}),
        ("air", air, (9, 11), {"shift": (285.0, 0.0), "scale": (4.0, 2.0)}),
    ):
        prior = NetworkPrior(
            space,
            Schedule(0.002, 80.0),
            Card(name, "a white Gaussian", FACTS),
            zero_network(size, 2),
            sigma_data=1.0,
            **numbers,
        )
        save_prior(folder / "priors" / name, prior)
    return folder


@pytest.fixture(autouse=True)
def _data(lab: Path, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECON_DATA", str(lab))


def written(folder: Path, problem: str, prior: str, more: str = "") -> Path:
    path = folder / "w.yaml"
    rest = f"sampler: {{method: diffpir, steps: 6}}\ndraws: 2\nblock: 2\nseed: 1\n{more}"
    path.write_text(f"problem: {{{problem}}}\nprior: {prior}\n{rest}")
    return path


CASES = {
    "fan": ("dataset: ct_small, operator: {type: fan_beam, views: 24, source_distance_mm: 500, detector_distance_mm: 400}, "
            "noise: {counts: 1.0e5}", "tiny", FanBeam, {"FBP", "TV"}),
    "fan_sigma": ("dataset: ct_small, operator: {type: fan_beam, views: 24, source_distance_mm: 500, detector_distance_mm: 0, "
                  "shape: curved, offset_mm: 2, tilt_degrees: 1}, noise: {relative: 0.01}", "tiny", FanBeam, {"TV"}),
    "mri": ("dataset: heads, index: 1, operator: {type: cartesian_mri, acceleration: 2, centre: 4, coils: 3}, noise: "
            "{relative: 0.02}", "head", CartesianMRI, {"zero-filled", "SENSE"}),
    "mri_one_coil": ("dataset: heads, operator: {type: cartesian_mri, acceleration: 2, centre: 4, coils: 1, pattern: even}, "
                     "noise: {sigma: 0.02}", "head", CartesianMRI, {"zero-filled", "SENSE"}),
    "radial": ("dataset: heads, operator: {type: radial_mri, spokes: 9, coils: 2, golden: true}, noise: {sigma: 0.02}", "head",
               NonCartesianMRI, {"zero-filled", "SENSE"}),
    "stations": ("dataset: weather, operator: {type: stations, count: 12}, noise: {spread: 0.1}", "air", PointSensors,
                 {"least squares"}),
    "masked": ("dataset: weather, operator: {type: masked, share: 0.3}, noise: {spread: 0.1}", "air", Masked,
               {"least squares"}),
}  # fmt: skip


# One of each kind of data with every commit; all of them in the long suite.
@pytest.mark.parametrize(
    "name",
    [name if name in ("mri", "stations") else pytest.param(name, marks=pytest.mark.slow) for name in CASES],
)
def test_a_workflow_becomes_a_report(name: str, lab: Path, workspace: Path, tmp_path: Path) -> None:
    problem, prior, kind, others = CASES[name]
    where = workspace if prior == "tiny" else lab
    folder = pipeline.run(written(tmp_path, problem, prior), tmp_path / "run", workspace=where)
    job = prepare(load_workflow(folder / "config.resolved.yaml", workspace=where))
    assert isinstance(job.operator, kind)
    evidence = xr.open_datatree(folder / "evidence.nc")
    assert set(evidence["image/method"].values) == others
    numbers = json.loads((folder / "report.json").read_text())
    fit = numbers["fit"]
    like = job.posterior.likelihood.gaussian()
    before = like.residual(job.prior.decode(torch.zeros(1, *job.prior.latent.shape))) / like.sigma
    assert fit["ratio"] * fit["data"] < 0.2 * float(before.abs().square().sum())  # the draws know of the data
    measured = xr.open_dataset(folder / "measurement.nc")
    assert ("value_real" in measured) == (kind in (CartesianMRI, NonCartesianMRI))
    assert (folder / "report.html").stat().st_size > 10_000
    warnings = json.loads((folder / "facts.json").read_text())["warnings"]
    assert any("the baseline FBP could not be made: fbp needs an arc" in text for text in warnings) == (
        name == "fan_sigma"
    )
    if kind in (CartesianMRI, NonCartesianMRI):
        assert fit["data"] == 2 * (job.operator.data if kind is CartesianMRI else job.operator.range.size)


def test_the_noise_is_what_was_asked_for(lab: Path, tmp_path: Path) -> None:
    problem = CASES["stations"][0]
    job = prepare(load_workflow(written(tmp_path, problem, "air"), workspace=lab))
    sigma = job.measurement.sigma
    assert sigma is not None
    assert torch.allclose(sigma[:12], torch.tensor(0.4)) and torch.allclose(sigma[12:], torch.tensor(0.2))
    residual = (job.measurement.values - job.operator.A(job.measurement.truth[None])[0]) / sigma
    # 24 standard normal numbers: their mean square is 1 +- sqrt(2 / 24); five of them.
    assert float(residual.square().mean()) == pytest.approx(1.0, abs=5 * math.sqrt(2 / 24))
    problem = CASES["mri"][0]
    job = prepare(load_workflow(written(tmp_path, problem, "head"), workspace=lab))
    clean = job.operator.A(job.measurement.truth[None])[0]
    mask = job.operator.mask.expand_as(clean.real)
    assert float(job.measurement.sigma) == pytest.approx(0.02 * float(clean[mask].abs().mean()), rel=1e-5)
    assert bool((job.measurement.values[~mask] == 0).all())
    parts = torch.view_as_real((job.measurement.values - clean)[mask]).flatten() / job.measurement.sigma
    assert float(parts.square().mean()) == pytest.approx(1.0, abs=5 * math.sqrt(2 / len(parts)))


def test_a_magnitude_gets_a_phase_and_keeps_its_size(lab: Path, tmp_path: Path) -> None:
    job = prepare(load_workflow(written(tmp_path, CASES["mri"][0], "head"), workspace=lab))
    truth = job.measurement.truth
    assert truth.shape == (2, 16, 16)
    size = truth.square().sum(0).sqrt()
    assert float(size.max()) == pytest.approx(0.8, rel=1e-5)
    assert float(truth[1].abs().max()) > 0.01
    assert "averaged 2 x 2, with a made-up smooth phase" in job.notes["data"]


def test_stations_at_given_places(lab: Path, tmp_path: Path) -> None:
    problem = (
        "dataset: weather, operator: {type: stations, positions: [[42.0, 0.0], [41.0, 3.0]]}, noise: {spread: 0.1}"
    )
    job = prepare(load_workflow(written(tmp_path, problem, "air"), workspace=lab))
    assert job.operator.range.shape == (4,)
    clean = job.operator.A(job.measurement.truth[None])[0]
    row, column = int(np.argmin(abs(LAT - 42.0))), int(np.argmin(abs(LON)))
    assert float(clean[0]) == pytest.approx(float(job.measurement.truth[0, row, column]), rel=1e-6)
    assert float(clean[2]) == pytest.approx(float(job.measurement.truth[1, row, column]), rel=1e-6)


def test_random_places_grow_with_their_number(lab: Path, tmp_path: Path) -> None:
    few, many = (
        prepare(
            load_workflow(
                written(
                    tmp_path,
                    f"dataset: weather, operator: {{type: stations, count: {n}}}, noise: {{spread: 0.1}}",
                    "air",
                ),
                workspace=lab,
            )
        ).operator.stations
        for n in (5, 20)
    )
    places = [set(zip(s.lat, s.lon, strict=True)) for s in (few, many)]
    assert len(places[0]) == 5 and len(places[1]) == 20
    assert places[0] < places[1]


@pytest.mark.parametrize(
    ("problem", "prior", "more", "text"),
    [
        ("dataset: heads, operator: {type: cartesian_mri, centre: 9, acceleration: 2}, noise: {sigma: 1.0}", "head", "",
         "9 centre columns are more than the 8 of 16"),
        ("dataset: heads, operator: {type: cartesian_mri, centre: 2}, noise: {counts: 100.0}", "head", "",
         "counts are photons"),
        ("dataset: heads, operator: {type: cartesian_mri, centre: 2}, noise: {spread: 0.1}", "head", "",
         "CartesianMRI takes sigma or relative"),
        ("dataset: weather, operator: {type: stations, count: 100}, noise: {spread: 0.1}", "air", "",
         "100 stations do not fit 99 grid points"),
        ("dataset: weather, operator: {type: stations, positions: [[10.0, 0.0]]}, noise: {spread: 0.1}", "air", "",
         r"stations lie outside the grid"),
        ("dataset: weather, operator: {type: parallel_beam, views: 5}, noise: {sigma: 0.1}", "air", "", "projects slices"),
        ("dataset: weather, index: 8, operator: {type: masked, share: 0.5}, noise: {spread: 0.1}", "air", "",
         "problem.index is 8; weather has 8 held-out fields"),
        ("dataset: weather, operator: {type: masked, share: 0.5}, noise: {spread: 0.1}", "air", "likelihood: transmission\n",
         "transmission likelihood is that of photon counts"),
        ("dataset: heads, operator: {type: masked, share: 0.5}, noise: {spread: 0.1}", "air", "", "whole multiples"),
        ("dataset: weather, operator: {type: stations}, noise: {spread: 0.1}", "air", "", "either count .* or positions"),
    ],
)  # fmt: skip
def test_what_does_not_fit(lab: Path, tmp_path: Path, problem: str, prior: str, more: str, text: str) -> None:
    with pytest.raises(InputError, match=text):
        prepare(load_workflow(written(tmp_path, problem, prior, more), workspace=lab))


def test_a_baseline_of_another_field_is_refused_before_the_run(lab: Path, tmp_path: Path) -> None:
    path = written(tmp_path, CASES["stations"][0], "air", "baselines: [fbp]\n")
    with pytest.raises(
        InputError, match=r"baselines: fbp cannot be made of the data of PointSensors; choose of least_squares"
    ):
        pipeline.run(path, tmp_path / "run", workspace=lab)
    assert not (tmp_path / "run").exists()


def test_least_squares_is_the_posterior_mean_of_a_white_prior(lab: Path, tmp_path: Path) -> None:
    from recon.workflows.comparison import ridge

    job = prepare(load_workflow(written(tmp_path, CASES["stations"][0], "air"), workspace=lab))
    like = job.posterior.likelihood.gaussian()
    got = ridge(job, like).flatten().double()
    matrix = torch.stack([job.operator.A(e.reshape(1, 2, 9, 11))[0] for e in torch.eye(198)], dim=1).double()
    variance = (job.prior.scale.double().expand(2, 9, 11).flatten()) ** 2
    mean = job.prior.shift.double().expand(2, 9, 11).flatten()
    total = matrix @ (variance[:, None] * matrix.T) + torch.diag(like.sigma.double() ** 2)
    exact = mean + variance * (matrix.T @ torch.linalg.solve(total, like.y.double() - matrix @ mean))
    assert float((got - exact).abs().max()) < 1e-3 * float(variance.sqrt().max())


@pytest.mark.parametrize("name", ["mri", "stations"])
def test_check_says_what_would_happen(name: str, lab: Path, tmp_path: Path) -> None:
    problem, prior, kind, _ = CASES[name]
    text = pipeline.check(written(tmp_path, problem, prior), workspace=lab)
    assert kind.__name__ in text
    assert "adjoint test" in text and "2 in 1 blocks of 2" in text
