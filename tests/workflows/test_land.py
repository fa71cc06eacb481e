"""Truths with land: filled as in training, never observed, left out of every score and map."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
import yaml

import recon
from recon.diagnostics.fit import data_fit
from recon.errors import InputError
from recon.files import sha256
from recon.operators import CoarseGrain, Masked, PointSensors
from recon.priors import Card, NetworkPrior
from recon.priors.network import Architecture, build_network
from recon.priors.store import read_card, save_prior
from recon.report import Evidence
from recon.report.numbers import numbers
from recon.samplers import MMPS
from recon.schedules import Schedule
from recon.space import Space
from recon.store import shipped
from recon.workflows import pipeline
from recon.workflows.problem import Job, prepare
from recon.workflows.schema import load_workflow

FACTS: dict[str, Any] = {
    "data": (), "held_out": (), "denoising": (), "unfit_for": "use", "weights_licence": "CC0",
    "budget": {"images": 0, "seconds": 0.0, "precision": "float32"}, "notes": (),
}  # fmt: skip
GIVEN, FILE = os.environ.get("RECON_DATA", ""), "flow/oisst_tasmania_daily_1982_2012_32x32.nc"
LAT, LON = np.linspace(44.0, 36.5, 16), np.arange(16.0)
LAND = np.zeros((16, 16), dtype=bool)
LAND[:6, :5] = True  # a corner, and an island
LAND[10:12, 10:12] = True


@pytest.fixture(scope="module")
def sea(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A white Gaussian N(15, 2^2) over a sea, once with ``fill`` on its card and once without; fields with land."""
    folder = tmp_path_factory.mktemp("sea")
    network = build_network(Architecture(family="drunet", size=16, channels=(4, 4, 4, 4), blocks=1))
    for p in network.parameters():
        torch.nn.init.zeros_(p)
    space = Space(("lat", "lon"), (16, 16), {"lat": LAT, "lon": LON}, "degC")
    for name, more in (("sea", {"fill": 15.0}), ("dry", {})):
        card, numbers = Card(name, "", {**FACTS, **more}), {"sigma_data": 1.0, "shift": 15.0, "scale": 2.0}
        save_prior(folder / "priors" / name, NetworkPrior(space, Schedule(0.002, 80.0), card, network, **numbers))
    values = 15 + 2 * np.random.default_rng(0).standard_normal((10, 16, 16))
    values[:, LAND] = np.nan
    dims, coords = ("time", "lat", "lon"), {"lat": LAT, "lon": LON}
    xr.Dataset({"sst": (dims, values)}, coords).to_netcdf(folder / "sst.nc", engine="h5netcdf")
    card = {
        "summary": "made up", "reader": "fields", "file": "sst.nc", "variables": ["sst"], "units": ["degC"], "licence": "CC0",
        "source": "drawn", "sha256": sha256(folder / "sst.nc"), "split": {"train": 0.4, "validation": 0.2},
    }  # fmt: skip
    (folder / "datasets").mkdir()
    (folder / "datasets" / "sst.yaml").write_text(yaml.safe_dump(card))
    return folder


@pytest.fixture(autouse=True)
def _data(sea: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECON_DATA", str(sea))


def written(folder: Path, operator: str, prior: str = "sea", noise: str = "sigma: 0.2", steps: int = 8) -> Path:
    path = folder / "w.yaml"
    path.write_text(
        f"problem: {{dataset: sst, index: 1, operator: {operator}, noise: {{{noise}}}}}\nprior: {prior}\n"
        f"sampler: {{method: mmps, steps: {steps}}}\ndraws: 4\nseed: 3\n"
    )
    return path


def job(folder: Path, sea: Path, operator: str, **more: Any) -> Job:
    return prepare(load_workflow(written(folder, operator, **more), workspace=sea))


@pytest.mark.parametrize(
    ("operator", "kind", "data"),
    [
        ("{type: masked, share: 0.5}", Masked, None),
        ("{type: stations, count: 40}", PointSensors, 40),
        ("{type: stations, positions: [[40.0, 8.2], [37.0, 1.0]]}", PointSensors, 2),
        ("{type: coarse_grain, factor: 2}", CoarseGrain, 57),  # 16 cells of 2 x 2 less 6 of land, and one of the island
    ],
)
def test_land_is_never_observed(sea: Path, tmp_path: Path, operator: str, kind: type, data: int | None) -> None:
    made = job(tmp_path, sea, operator)
    assert isinstance(made.operator, kind)
    flood = torch.from_numpy(np.where(LAND, 1e6, 0.0)).float()
    assert not made.operator.A(flood[None]).any()
    assert data is None or made.operator.range.size == data
    truth = made.measurement.truth
    assert truth is not None
    assert torch.equal(truth.isnan(), torch.from_numpy(LAND))
    assert bool(made.measurement.values.isfinite().all())
    assert "34 unknown values (land) are neither observed nor scored" in made.notes["data"]


def test_the_gaps_are_those_of_the_field_without_land(sea: Path, tmp_path: Path) -> None:
    made = job(tmp_path, sea, "{type: masked, share: 0.5}").operator
    whole = Masked(made.domain, torch.ones(16, 16))
    assert isinstance(made, Masked)
    assert whole.range.size > made.range.size == int(made.mask.sum()) < 128
    clean = made.A(torch.arange(256.0).reshape(1, 16, 16))
    assert not set(clean[0].long().tolist()) & set(np.flatnonzero(LAND).tolist())


@pytest.mark.parametrize(
    ("operator", "more", "text"),
    [
        (
            "{type: masked, share: 0.5}",
            {"prior": "dry"},
            r"34 unknown values .* whose card says what stood there .*fill",
        ),
        (
            "{type: stations, positions: [[43.0, 2.0], [40.0, 9.0]]}",
            {},
            r"1 of 2 stations read cells .* \(land\): number 0",
        ),
        ("{type: stations, positions: [[43.0, 4.5]]}", {}, r"1 of 1 stations read cells that are unknown"),
        ("{type: stations, count: 223}", {}, r"223 stations do not fit 222 grid points"),
        (
            "{type: parallel_beam, views: 4}",
            {},
            r"34 unknown values .*which parallel_beam cannot leave out; stations, coarse",
        ),
    ],
)
def test_what_is_refused(sea: Path, tmp_path: Path, operator: str, more: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        job(tmp_path, sea, operator, **more)


def test_scores_leave_land_out(sea: Path, tmp_path: Path) -> None:
    made = job(tmp_path, sea, "{type: masked, share: 0.6}")
    posterior, truth = made.posterior, made.measurement.truth
    assert truth is not None
    ensemble = recon.sample(posterior, MMPS(steps=4), draws=4)
    assert bool(ensemble.x.isfinite().all())
    fit = data_fit(posterior.likelihood, ensemble)
    evidence = Evidence(ensemble, made.measurement.values, made.operator.range, fit, truth)
    evidence.save(tmp_path / "run")
    found, known = numbers(Evidence.load(tmp_path / "run")), ~truth.isnan()
    error = (ensemble.mean() - truth)[known].double().square().mean().sqrt()
    assert found["images"]["posterior mean"]["rmse"] == pytest.approx(float(error), rel=1e-6)
    spread = ensemble.std()[known].double().square().mean().sqrt()
    assert found["spread"]["std"] == pytest.approx(float(spread), rel=1e-6)
    assert found["quantities"][0]["pixels"] == int(known.sum()) == 222
    assert found["spread"]["crps"] is not None


@pytest.mark.slow
def test_a_report_without_land(sea: Path, tmp_path: Path) -> None:
    folder = pipeline.run(written(tmp_path, "{type: masked, share: 0.6}"), tmp_path / "run", workspace=sea)
    evidence = xr.open_datatree(folder / "evidence.nc")
    truth = torch.from_numpy(evidence["image/truth"].values)
    assert torch.equal(truth.isnan(), torch.from_numpy(LAND))
    ensemble = recon.Ensemble.load(folder / "ensemble.nc")
    assert bool(ensemble.x.isfinite().all())
    told = json.loads((folder / "report.json").read_text())
    known = ~truth.isnan()
    rmse = float((ensemble.mean() - truth)[known].double().square().mean().sqrt())
    assert told["images"]["posterior mean"]["rmse"] == pytest.approx(rmse, rel=1e-6)
    assert told["quantities"][0]["pixels"] == 222
    assert (folder / "report.html").stat().st_size > 10_000
    again = pipeline.report(folder)
    assert again.is_file()


def test_the_shipped_card_says_what_stood_on_land() -> None:
    card = read_card(shipped() / "priors" / "sst_tasmania")
    assert card.fill == 15.5
    told = yaml.safe_load((shipped() / "priors" / "sst_tasmania" / "train.yaml").read_text())
    assert told["fields"]["fill"] == card.fill


@pytest.mark.data
@pytest.mark.slow
def test_the_sea_off_tasmania(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shipped workflow at reduced size: closer to the truth than the noise, and than what the prior alone says."""
    if not GIVEN or not (Path(GIVEN) / FILE).is_file():
        pytest.skip(f"needs {FILE} below RECON_DATA")
    monkeypatch.setenv("RECON_DATA", GIVEN)
    made = prepare(load_workflow("sea_surface_gaps"))
    truth = made.measurement.truth
    assert truth is not None
    known = ~truth.isnan()
    assert int((~known).sum()) == 83
    assert not made.operator.A((~known).float()[None]).any()
    mean = recon.sample(made.posterior, MMPS(steps=16), draws=4, seed=0).mean()
    rmse = float((mean - truth)[known].square().mean().sqrt())
    assert rmse < 0.2 < float(truth[known].std()) / 5
