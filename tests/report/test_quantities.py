"""Nothing mixes units; collapsed particles get no intervals; figures and numbers lie beside the page."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr

from recon.diagnostics import data_fit, fair_crps, group_fit, psnr, rmse, spread_skill
from recon.diagnostics.intervals import intervals
from recon.ensemble import Ensemble
from recon.errors import InputError
from recon.likelihoods import GaussianLikelihood
from recon.operators import MatrixOperator
from recon.report import Evidence, affordable_split, examined, panels, write_report
from recon.report.numbers import numbers
from recon.report.quantities import quantities
from recon.report.regions import regions_of
from recon.report.schema import FILE, Report, json_schema, shipped_schema
from recon.report.verdict import bare, fixed, headline, number, verdict
from recon.space import Space

UNITS = {"msl": "Pa", "t": "K"}
SCALE = torch.tensor([100.0, 2.0])
SHIFT = torch.tensor([101000.0, 280.0])
FIELD = Space(
    ("variable", "lat", "lon"),
    (2, 12, 14),
    {"variable": ("msl", "t"), "lat": np.linspace(55.0, 44.0, 12), "lon": np.arange(14.0)},
    "mixed",
)
RANGE = Space(("station",), (24,), {}, "mixed")
PARTICLES = {
    "log_evidence": -31.5,
    "log_evidence_error": 0.2,
    "ancestors": 30,
    "smallest_ess": 25.0,
    "resamplings": 2,
    "quarantined": 0,
    "largest_weight": 0.05,
    "steps": {
        "ess": [40.0, 25.0, 38.0],
        "distinct": [40.0, 33.0, 30.0],
        "largest": [0.03, 0.08, 0.05],
        "log_evidence": [-10.0, -22.0, -31.5],
        "temper": [1.0, 1.0, 1.0],
        "resampled": [0.0, 1.0, 1.0],
        "quarantined": [0.0, 0.0, 0.0],
    },
}


@pytest.fixture(autouse=True)
def drafts(monkeypatch):
    """Figures are made, not drawn."""

    def draft(figure, alt, caption, data=None):
        assert figure.axes
        return panels.Picture("data:image/png;base64,", "data:image/png;base64,", alt, caption, dict(data or {}))

    for name in ("figures", "data_figures", "region_figures", "volume_figures"):
        monkeypatch.setattr(f"recon.report.{name}.finish", draft)


def evidence_on(space: Space, draws: int = 40, info: dict | None = None, range_: Space = RANGE, **facts) -> Evidence:
    """Calibrated toy evidence; the values of a field of variables have their own sizes."""
    rng = np.random.default_rng(3)
    centre = rng.normal(size=space.shape)
    x = torch.tensor(centre + 0.3 * rng.normal(size=(draws, *space.shape)), dtype=torch.float32)
    truth = torch.tensor(centre + 0.3 * rng.normal(size=space.shape), dtype=torch.float32)
    if space is FIELD:
        x, truth = (v * SCALE[:, None, None] + SHIFT[:, None, None] for v in (x, truth))
    matrix = torch.tensor(rng.normal(size=(range_.size, space.size)) / math.sqrt(space.size), dtype=torch.float32)
    operator = MatrixOperator(matrix, space, range_)
    y = operator.A(truth[None])[0] + 0.5 * torch.tensor(rng.normal(size=range_.shape), dtype=torch.float32)
    ensemble = Ensemble(x, space, None, info or {})
    likelihood = GaussianLikelihood(operator, y, 0.5)
    return Evidence(ensemble, y, range_, data_fit(likelihood, ensemble), truth, {"other": truth + 1}, facts)


@pytest.fixture(scope="module")
def field() -> Evidence:
    return evidence_on(FIELD, units=UNITS)


def test_each_variable_has_its_own_numbers_and_unit(field):
    value = numbers(field)
    assert value["spread"] is value["images"] is value["gains"] is None
    assert [(q["name"], q["unit"]) for q in value["quantities"]] == list(UNITS.items())
    for i, told in enumerate(value["quantities"]):
        x, truth = field.ensemble.x[:, i], field.truth[i]
        alone = Ensemble(x, Space(("lat", "lon"), (12, 14)))
        assert told["images"]["posterior mean"]["psnr"] == pytest.approx(float(psnr(alone.mean(), truth)))
        assert told["images"]["posterior mean"]["rmse"] == pytest.approx(float(rmse(alone.mean(), truth)))
        assert told["spread"]["crps"] == pytest.approx(float(fair_crps(x, truth).mean()))
        assert told["spread"]["skill"] == pytest.approx(spread_skill(alone, truth))
        assert told["intervals"]["0.9"]["mean_width"] == pytest.approx(intervals(x).summary()["mean_width"])
        assert told["monte_carlo"]["rms_std"] == pytest.approx(float(alone.std().square().mean().sqrt()), rel=1e-5)
        whole = told["regions"][0]
        assert (whole["name"], whole["pixels"]) == ("whole field", 168)
        assert whole["mean"] == pytest.approx(float(x.double().mean()), rel=1e-6)
        assert whole["truth"] == pytest.approx(float(truth.double().mean()), rel=1e-6)
    assert [r["name"] for r in value["quantities"][0]["regions"]][1:4] == ["north west", "north centre", "north east"]


def test_the_page_speaks_of_each_variable_and_never_of_mixed_units(field, tmp_path):
    page = write_report(field, tmp_path).read_text(encoding="utf-8")
    assert "<h3>msl (Pa)</h3>" in page and "<h3>t (K)</h3>" in page
    assert "mixed" not in page
    assert [q.unit for q in quantities(replace(field, facts={}))] == ["unit not recorded"] * 2
    shared = evidence_on(Space(FIELD.dims, FIELD.shape, FIELD.coords, "m2/s2"))
    assert [q.unit for q in quantities(shared)] == ["m2/s2", "m2/s2"]
    assert bare("m2/s2") == "m²/s²" and bare("m s**-1") == "m s⁻¹" and bare("1/m") == "1/m"


def test_a_complex_image_is_magnitude_and_phase(tmp_path):
    space = Space(("channel", "y", "x"), (2, 16, 16), {"channel": ("real", "imag")}, "1")
    made = evidence_on(space)
    turn = torch.polar(torch.ones(()), torch.tensor(3.1))  # phases about the cut of the angle
    z = torch.complex(1 + 0.1 * made.ensemble.x[:, 0], 0.1 * made.ensemble.x[:, 1]) * turn
    truth = torch.complex(1 + 0.1 * made.truth[0], 0.1 * made.truth[1]) * turn
    x = torch.stack([z.real, z.imag], 1)
    ensemble = Ensemble(x, space)
    evidence = replace(
        made, ensemble=ensemble, truth=torch.stack([truth.real, truth.imag]), baselines={}, prior_std=torch.tensor(0.5)
    )
    size, phase = quantities(evidence)
    assert (size.kind, phase.kind, phase.unit) == ("magnitude", "phase", "rad")
    assert torch.allclose(size.ensemble.mean(), z.abs().mean(0))
    expected = 1 - x.double().var(0).sum(0) / 0.5
    assert torch.allclose(size.determined, expected)
    # About the cut the naive angles jump by 2 pi; those to the mean's phase do not.
    assert float(z.angle().std(0).max()) > 2
    assert float(phase.ensemble.std().max()) < 0.5
    off = torch.remainder(phase.truth - truth.angle() + math.pi, 2 * math.pi) - math.pi
    assert float(off.abs().max()) < 1e-5
    told = numbers(evidence)["quantities"][1]
    assert told["images"]["posterior mean"]["psnr"] is None and told["regions"] == []
    page = write_report(evidence, tmp_path).read_text(encoding="utf-8")
    assert "Magnitudes |x|" in page and "phase (rad)" in page


def test_where_the_truth_is_unknown_nothing_is_compared(tmp_path):
    made = evidence_on(Space.grid((16, 16), 1e-3, "K"))
    truth = made.truth.clone()
    truth[:8] = torch.nan
    value = numbers(replace(made, truth=truth, baselines={}))["quantities"][0]
    assert value["pixels"] == 128
    seen = value["images"]["posterior mean"]
    assert seen["rmse"] == pytest.approx(float(rmse(made.ensemble.mean()[8:], made.truth[8:])))
    assert seen["ssim"] is None
    assert "upper left" not in [r["name"] for r in value["regions"]]
    write_report(replace(made, truth=truth, baselines={}), tmp_path)


def test_regions_are_the_users_where_given(field, tmp_path):
    box = {"lat": [46.5, 50.5], "lon": [1, 3]}
    mask = regions_of(quantities(field)[0].space, {"box": box})["box"]
    assert mask.nonzero()[:, 0].unique().tolist() == [5, 6, 7, 8] and mask.nonzero()[:, 1].unique().tolist() == [
        1,
        2,
        3,
    ]
    stated = replace(field, facts={"units": UNITS, "regions": {"box": box, "warm": {"variable": "t", "lat": [44, 46]}}})
    rows = [[r["name"] for r in q["regions"]] for q in numbers(stated)["quantities"]]
    assert rows == [["whole field", "box"], ["whole field", "box", "warm"]]
    grid = Space.grid((12, 12), 1e-3, "1/m")  # positions of the page are mm, from -5.5 to 5.5
    assert int(regions_of(grid, {"a": {"x": [-6, -3.4]}})["a"].sum()) == 36
    assert bool(regions_of(grid)["upper left"][0, 0])
    for wrong, words in (
        ({"q": {"z": [0, 1]}}, "names the dim 'z'"),
        ({"q": {"x": [99, 100]}}, "holds no pixel"),
        ({"q": {"x": 3}}, r"x is \[first, last\]"),
        ({"q": 3}, "is a mapping"),
    ):
        with pytest.raises(InputError, match=words):
            regions_of(grid, wrong)


def test_collapsed_particles_get_no_intervals_and_the_verdict_says_so(tmp_path):
    image = Space.grid((12, 12), 1e-3, "1/m")
    fine = evidence_on(image, info={"particles": PARTICLES})
    page = write_report(fine, tmp_path).read_text(encoding="utf-8")
    assert "<h3>Particles</h3>" in page and "−31.5 ± 0.2" in page
    assert "maps of the lower end" in page
    levels = {s.about: s.level for s in verdict(numbers(fine))}
    assert levels["Particles"] == "good"
    lost = Ensemble(fine.ensemble.x, image, None, {"particles": {**PARTICLES, "ancestors": 7}})
    value = numbers(replace(fine, ensemble=lost))
    assert all(not held for held in value["draws"]["intervals"].values())
    assert value["spread"]["coverage"] == {"0.5": None, "0.9": None}
    assert all(found["mean_width"] is None for found in value["quantities"][0]["intervals"].values())
    assert all(row["low"] is None for row in value["quantities"][0]["regions"])
    (said,) = [s for s in verdict(value) if s.about == "Particles"]
    assert "no intervals of any probability" in next(s.text for s in verdict(value) if s.about == "Draws")
    assert said.level == "bad" and "collapsed" in said.text and "No interval maps are drawn" in said.text
    assert headline(verdict(value)).startswith("Do not use this result")
    page = write_report(replace(fine, ensemble=lost), tmp_path).read_text(encoding="utf-8")
    assert "maps of the lower end" not in page and "No maps of 90 % intervals or any other" in page


def test_draws_that_are_all_the_same_give_a_page_without_intervals(tmp_path):
    made = evidence_on(Space.grid((12, 12), 1e-3, "1/m"))
    same = Ensemble(made.ensemble.x[:1].expand(40, 12, 12).clone(), made.ensemble.space)
    page = write_report(replace(made, ensemble=same), tmp_path).read_text(encoding="utf-8")
    assert "the ensemble has collapsed: all draws are the same" in page and "maps of the lower end" not in page


def test_heavy_weights_are_told():
    made = evidence_on(Space.grid((12, 12), 1e-3, "1/m"), draws=100)
    tail = -1.5 * torch.log(torch.linspace(0.005, 1, 100, dtype=torch.float64))  # weights u^-1.5: Pareto k 1.5
    value = numbers(replace(made, ensemble=Ensemble(made.ensemble.x, made.ensemble.space, tail)))
    (said,) = [s for s in verdict(value) if s.about == "Weights"]
    assert value["draws"]["weights"]["pareto_k"] > 0.7
    assert said.level == "bad" and "cannot be trusted" in said.text


@pytest.mark.parametrize(
    ("stated", "level", "words"),
    [
        ({"status": "unverified", "text": "there is no campaign"}, "open", "Unverified: there is no campaign."),
        (
            {
                "status": "recalibrated",
                "text": "a campaign",
                "date": "2026-01-02",
                "cases": 200,
                "scope": {"noise": "1 %"},
                "quantities": {
                    "mean": {"status": "verified", "text": "80 cases"},
                    "90 % intervals": {"status": "recalibrated", "text": "", "factor": 0.2},
                },
            },
            "good",
            "Recalibrated (2026-01-02): a campaign. Cases: 200. It holds for: noise: 1 %.",
        ),
        (
            {"status": "verified", "text": "x", "quantities": {"std": {"status": "unverified", "text": "few cases"}}},
            "look",
            "Not verified: std.",
        ),
    ],
)
def test_calibration_is_told_per_quantity(stated, level, words, tmp_path):
    made = evidence_on(Space.vector(8, "K"), calibration=stated)
    (said,) = [s for s in verdict(numbers(made)) if s.about == "Calibration"]
    assert said.level == level and words in said.text
    section = (
        write_report(made, tmp_path).read_text(encoding="utf-8").split('id="calibration"')[1].split("</section>")[0]
    )
    assert ("recon calibrate" in section) == (stated["status"] == "unverified")
    for name, found in stated.get("quantities", {}).items():
        assert f'<th scope="row">{name}</th>' in section and f"{found['status']}</span>" in section
    assert ("stretched by 0.2 std" in section) == ("90 % intervals" in stated.get("quantities", {}))


def test_residuals_are_examined_and_shown(tmp_path):
    range_ = Space(("angle", "detector"), (3, 8), {"angle": np.linspace(0, 2, 3), "detector": np.arange(8) * 1e-3})
    made = evidence_on(Space.grid((12, 12), 1e-3, "1/m"), range_=range_)
    rng = np.random.default_rng(0)
    matrix = torch.tensor(rng.normal(size=(24, 144)) / 12, dtype=torch.float32)
    operator = MatrixOperator(matrix, made.ensemble.space, range_)
    y = operator.A(made.truth[None])[0]
    y = y + 0.5 * torch.tensor(rng.normal(size=(3, 8)), dtype=torch.float32)
    y[1] += 4.0  # a view with a gain that the model lacks
    likelihood = GaussianLikelihood(operator, y, 0.5)
    fit = data_fit(likelihood, made.ensemble)
    facts = examined(likelihood, made.ensemble, fit)
    views = {g["dim"]: g for g in facts["residuals"]["groups"]}
    found = group_fit(likelihood, made.ensemble, "angle").summary()
    assert views["angle"] == found | {"unit": "°", "labels": ["0", "57.2958", "114.592"]}
    assert views["angle"]["outside"] == [1]
    told = replace(made, measurement=y, fit=fit, facts=facts)
    (said,) = [s for s in verdict(numbers(told)) if s.about == "Residual"]
    assert (
        said.level == "look"
        and "1 of 3 places along angle are not fitted as the noise allows (57.2958 °)" in said.text
        and "Whiteness ratio" in said.text
    )
    assert "detector: " in write_report(told, tmp_path).read_text(encoding="utf-8")


def test_a_line_of_stations_is_judged_datum_by_datum(field):
    rng = np.random.default_rng(5)
    matrix = torch.tensor(rng.normal(size=(24, FIELD.size)) / 20, dtype=torch.float32)
    likelihood = GaussianLikelihood(MatrixOperator(matrix, FIELD, RANGE), torch.zeros(24), 1e4)
    fit = data_fit(likelihood, field.ensemble)
    (group,) = examined(likelihood, field.ensemble, fit, UNITS)["residuals"]["groups"]
    # One datum has one degree of freedom; limits by the quantiles of chi2 itself.
    from scipy.stats import chi2

    tail = 1e-3 / 24 / (2 * math.e)
    assert group["low"][0] == pytest.approx(chi2.ppf(tail, 1)) and group["high"][0] == pytest.approx(chi2.isf(tail, 1))
    assert group["ratio"] == pytest.approx(fit.per_view.tolist())


def test_stations_have_a_map_per_variable(field, tmp_path):
    lat, lon = [50.0] * 12 + [46.0] * 12, [float(i) for i in range(12)] * 2
    table = {"lat": lat, "lon": lon, "variable": ["msl"] * 12 + ["t"] * 12, "unit": ["Pa"] * 12 + ["K"] * 12}
    page = write_report(replace(field, facts={"units": UNITS, "stations": table}), tmp_path).read_text(encoding="utf-8")
    assert "Maps of the stations" in page and "Dots: stations." in page
    assert "χ²/m of the data of each variable" in page
    with xr.open_datatree(tmp_path / "figures.nc", engine="h5netcdf") as tree:
        assert tree["measurement"]["measured of t"].attrs["units"] == "K"
        assert tree["measurement"]["lat of t"].values.tolist() == lat[12:]


def test_the_numbers_behind_every_figure_lie_beside_the_page(field, tmp_path):
    page = write_report(field, tmp_path).read_text(encoding="utf-8")
    with xr.open_datatree(tmp_path / "figures.nc", engine="h5netcdf") as tree:
        leaves = {node.path: node.to_dataset().load() for node in tree.leaves}
    assert len(leaves) == page.count("<figure>")
    assert all(len(data) for data in leaves.values())
    mean = leaves["/quantity_1/images"]["posterior mean"]
    assert mean.attrs["units"] == "K" and mean["lat"].attrs["units"] == "degrees_north"
    assert np.allclose(mean.values, field.ensemble.mean()[1].numpy(), rtol=1e-6)
    assert all(data.attrs["alt"] and data.attrs["caption"] for data in leaves.values())


def test_a_volume_has_cuts_slices_and_a_profile(tmp_path):
    space = Space.grid((4, 16, 12), 1e-3, "1/m")
    made = evidence_on(space)
    page = write_report(made, tmp_path).read_text(encoding="utf-8")
    for words in ("orthogonal cuts", "strip of slices", "maximum-intensity", "Uncertainty by slice"):
        assert words in page
    told = json.loads((tmp_path / "report.json").read_text())["quantities"][0]["slices"]
    peak = float(made.truth.max() - made.truth.min())
    expected = [float(psnr(made.ensemble.mean()[k], made.truth[k], peak)) for k in range(4)]
    assert told["psnr"] == pytest.approx(expected)
    assert told["std"] == pytest.approx(made.ensemble.std().square().mean((1, 2)).sqrt().tolist())
    assert told["z"] == pytest.approx([-1.5, -0.5, 0.5, 1.5]) and len(told["ssim"]) == 4
    with xr.open_datatree(tmp_path / "figures.nc", engine="h5netcdf") as tree:
        assert np.allclose(tree["largest"]["along z"], made.ensemble.mean().amax(0))


def test_the_split_is_kept_drawn_and_adds_up(tmp_path):
    from recon.diagnostics import data_prior_split

    space = Space.grid((6, 6), 1e-3, "1/m")
    made = evidence_on(space, draws=12)
    matrix = torch.eye(36)[:18]
    likelihood = GaussianLikelihood(MatrixOperator(matrix, space, Space.vector(18)), torch.zeros(18), 0.1)
    split = data_prior_split(likelihood, made.ensemble.x, 1.0)
    told = replace(made, split=split)
    told.save(tmp_path)
    back = Evidence.load(tmp_path)
    assert all(torch.equal(getattr(back.split, n), getattr(split, n)) for n in ("data", "prior", "cross", "null_mean"))
    assert back.split.filter == 1.0
    page = write_report(back, tmp_path).read_text(encoding="utf-8")
    kept = json.loads((tmp_path / "report.json").read_text())["split"]
    assert kept["data_share"] + kept["prior_share"] + kept["cross_share"] == pytest.approx(1)
    assert f"{number(100 * kept['data_share'])} % lies where the data see" in page


def test_a_split_that_costs_too_much_is_left_out_with_its_reason():
    from recon.priors import GaussianPrior

    space = Space.vector(6)
    likelihood = GaussianLikelihood(MatrixOperator(torch.eye(6), space, space), torch.zeros(6), 0.1)
    prior = GaussianPrior(torch.zeros(6), torch.eye(6))
    ensemble = Ensemble(
        torch.randn(8, 6, generator=torch.Generator().manual_seed(0)), space, None, {"cost": {"forward": 10}}
    )
    assert affordable_split(likelihood, prior, ensemble) == (
        None,
        "the prior states no standard deviation of its images",
    )
    prior.sigma_data = 1.0
    assert "cost too much" in affordable_split(likelihood, prior, ensemble)[1]
    rich = Ensemble(ensemble.x, space, None, {"cost": {"forward": 10**6, "adjoint": 10**6}})
    split, why = affordable_split(likelihood, prior, rich)
    assert why == ""
    assert torch.allclose(split.null_mean, rich.mean().double() / 101, atol=1e-5)  # lambda / (1/0.01 + lambda)


def test_the_schema_is_that_of_the_models_and_ships():
    assert shipped_schema() == json_schema(), f"write {FILE} again: python -m recon.report.schema"


def test_a_report_that_breaks_the_schema_is_seen(field, tmp_path):
    write_report(field, tmp_path)
    kept = json.loads((tmp_path / "report.json").read_text())
    Report.model_validate(kept)
    for change in ({"extra": 1}, {"schema": "recon.report/1"}, {"quantities": [{"name": "t"}]}):
        with pytest.raises(ValueError, match="validation error"):
            Report.model_validate(kept | change)


def test_the_shipped_schema_takes_what_is_written(field):
    """As another program would check it, without recon."""
    jsonschema = pytest.importorskip("jsonschema")
    value = numbers(field) | {"headline": "", "verdict": []}
    jsonschema.validate(value, shipped_schema())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(value | {"extra": 1}, shipped_schema())


def test_figures_to_their_resolution():
    assert fixed(101654.3, 37) == "101\u202f654" and fixed(0.21834, 0.031) == "0.218" and fixed(-1.5, 0.2) == "−1.50"
    assert fixed(101654.3, 370) == "101\u202f650"
    assert fixed(None, 1) == "–" and fixed(3.0, None) == "3" and fixed(math.nan, 1) == "–"
    assert number(101650.0) == "102\u202f000" and number(1.5e7) == "1.5 × 10^07".replace("07", "7")
