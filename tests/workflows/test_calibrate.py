"""Campaigns: an exact sampler is found calibrated, an over-confident one is found so and put right; kills change no bit."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch

from recon.cli import main
from recon.comm import SerialAxis, serial
from recon.diagnostics import case_coverage, case_record, fair_crps, spread_and_error
from recon.errors import InputError
from recon.files import sha256
from recon.likelihoods import GaussianLikelihood
from recon.operators import MatrixOperator
from recon.posterior import Posterior, dense
from recon.priors import GaussianMixturePrior, GaussianPrior
from recon.report import campaign_page
from recon.report.campaign_page import write_campaign
from recon.report.panels import Picture
from recon.samplers import METHODS, Sampler, State, sample
from recon.space import Space
from recon.workflows import calibrate as command
from recon.workflows import campaign as engine
from recon.workflows import pipeline, problem
from recon.workflows.calibrate import Wanted, calibrate, calibration_of, campaign_of, failures, table
from recon.workflows.calibration import FILE, findings, identity_of, read_calibration
from recon.workflows.campaign import load_case, seeds_of
from recon.workflows.cases import TILES, Campaign, Population, Posed, regions_of, thinned, tile_means
from recon.workflows.citation import calibration_for, cited, elsewhere, places
from recon.workflows.outliers import as_csv, listed
from recon.workflows.problem import prepare
from recon.workflows.schema import load_workflow, workflow_model
from recon.workflows.truths import posterior_of, prior_truth
from tests.bounds import chi2_bounds, normal_bound

SIDE = 3
WORKFLOW = """\
problem:
  dataset: toy
  index: 2
  operator: {type: masked, share: 0.4}
  noise: {sigma: 0.7}
prior: gaussian
sampler: {method: exact}
draws: 39
seed: 5
baselines: []
"""
CARD = """\
summary: fields that are warmer than the prior knows
reader: fields
file: FILE
variables: [t]
units: [K]
dims: [lat, lon]
split: {train: 0.1, validation: 0.1}
licence: CC0
source: made here
sha256: SHA
"""
DAY = date(2026, 3, 2)
LEVEL = 0.9
MPIEXEC = Path(sys.executable).parent / "mpiexec"
FULL, SOME, FEW = Wanted(105, "prior", DAY), Wanted(40, "prior", DAY), Wanted(4, "both", DAY)


@dataclass(frozen=True)
class Exact(Sampler):
    """Draws of the posterior in closed form, drawn together by ``shrink``; lost for seeds that ``losing`` divides."""

    claim: ClassVar = "exact"
    steps: int = 2
    shrink: float = 1.0
    losing: int = 0

    def init(self, posterior, draws):
        return State(torch.zeros(len(draws), *posterior.space.shape), torch.zeros(len(draws), dtype=torch.float64))

    def step(self, posterior, state, k, draws):
        if k == 0:
            return state
        prior, like = posterior.prior, posterior.likelihood
        A, variance = dense(like.operator).double(), like.sigma.double() ** 2
        start = prior.mean.double()
        precision = prior.covariance().double().inverse() + A.T @ A / variance
        spread = torch.linalg.cholesky(precision.inverse())
        mean = start + spread @ spread.T @ A.T @ (like.y.double().reshape(-1) - A @ start) / variance
        z = mean + self.shrink * draws.normal(k, (posterior.space.size,), "step", dtype=torch.float64) @ spread.T
        if self.losing and draws.seed % self.losing == 0:
            z = z * torch.nan
        return State(z.float().reshape(state.z.shape), state.log_w)


def gaussian() -> GaussianPrior:
    """A smooth field of 3 x 3."""
    at = torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE)).float()
    covariance = 4.0 * torch.exp(-0.5 * torch.cdist(at, at).square() / 1.5**2) + 0.25 * torch.eye(SIDE**2)
    return GaussianPrior(torch.full((SIDE**2,), 3.0), covariance, Space(("lat", "lon"), (SIDE, SIDE), {}, "K"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A workspace with an exact sampler, a Gaussian prior and 20 held-out fields that are 6 K warmer than it says."""
    import xarray as xr

    folder, prior = tmp_path_factory.mktemp("place"), gaussian()
    fields = torch.stack([prior_truth(prior, 1000 + i) for i in range(25)]) + 6.0
    xr.Dataset({"t": (("time", "lat", "lon"), fields.numpy())}).to_netcdf(folder / "toy.nc", engine="h5netcdf")
    for group in ("datasets", "priors/gaussian"):
        (folder / group).mkdir(parents=True)
    card = CARD.replace("FILE", str(folder / "toy.nc")).replace("SHA", sha256(folder / "toy.nc"))
    (folder / "datasets" / "toy.yaml").write_text(card)
    (folder / "priors" / "gaussian" / "card.yaml").write_text("name: gaussian\n")
    (folder / "w.yaml").write_text(WORKFLOW)
    logged = logging.getLogger("recon")
    handlers, level = list(logged.handlers), logged.level
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, "exact", Exact)
        workflow_model.cache_clear()
        patch.setattr(problem, "opened", lambda *_: prior)
        patch.setattr(command, "write_campaign", lambda *_: None)  # pictures take longer than all cases
        yield folder
    workflow_model.cache_clear()
    logged.handlers[:], logged.level = handlers, level


def held(place: Path, out: Path, *changes: str, wanted: Wanted = FEW) -> Path:
    return calibrate(place / "w.yaml", wanted, out, changes, place)


@pytest.fixture(scope="module")
def exact(place: Path) -> Path:
    """The campaign of the exact sampler, in the workspace where runs look."""
    return calibrate(place / "w.yaml", replace(FULL, truths="both"), None, (), place)


@pytest.fixture(scope="module")
def narrow(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The campaign of draws whose spread is 0.45 of what it should be."""
    return held(place, tmp_path_factory.mktemp("narrow") / "c", "sampler.shrink=0.45", wanted=SOME)


def cite(place: Path, folder: Path, *changes: str) -> dict:
    workflow = load_workflow(place / "w.yaml", changes, place)
    return calibration_for(workflow, prepare(workflow), [folder])


def test_the_exact_sampler_is_found_calibrated_and_the_wrong_prior_is_not(exact: Path, place: Path) -> None:
    found = read_calibration(exact / FILE)["populations"]
    assert exact.parent == place / "calibrations" and list(found) == ["data", "prior"]
    prior, data = found["prior"], found["data"]
    assert (prior["finding"], prior["cases"], prior["failed"]) == ("calibrated", 105, 0), prior["reason"]
    # Of the mean there is one trial per case: 105 do not tell its coverage, or the spread-skill ratio, to 0.1.
    unsure = ("90 % interval of the mean", "standard deviation")
    assert {q["finding"] for name, q in prior["quantities"].items() if name not in unsure} == {"calibrated"}
    assert all(prior["quantities"][name]["finding"] in ("calibrated", "cannot say") for name in unsure)
    # Of 25 fields 20 are held out, and one is the workflow's own.
    assert (data["finding"], data["cases"]) == ("biased", 19) and "above the draws" in data["reason"]
    assert prior["date"] == data["date"] == "2026-03-02"
    assert not any(histogram["outside"] for histogram in prior["histograms"].values())


def test_the_table_says_it_in_words(exact: Path) -> None:
    said = table(exact)
    for word in (
        "draws of the prior gaussian itself: they test the sampler (105 cases of 39 draws)",
        "calibrated: the spread of the draws can be taken at its word",
        "biased: the draws lie to one side of the truth",
        "90 % interval of each pixel ",
        "rank of misfit ",
        "spread/error ",
        "reports of this configuration will say: recalibrated",
        str(exact),
    ):
        assert word in said


def test_the_page_shows_it_and_stands_alone(exact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = lambda figure, alt, caption: Picture("data:", "data:", alt, caption)  # noqa: E731
    monkeypatch.setattr(campaign_page, "finish", drawn)  # to turn figures into bytes takes seconds
    calibration = read_calibration(exact / FILE)
    calibration["populations"]["data"] |= {"assessment": None, "quantities": {}}
    one = {"mean": 0.9, "error": 0.012, "cases": 20}
    told = {
        "stated": one,
        "shown": {**one, "error": None},
        "tolerance": 0.02,
        "decision": "cannot say",
        "cases_needed": 77,
    }
    fresh = {"cases": 20, "failed": 1, "intervals": {"90 % interval of each pixel": {"raw": told}}}
    calibration["populations"]["prior"]["fresh"] = fresh
    bad = listed([record_of(0, chi2=3.0), record_of(1, failed="lost & gone"), record_of(2), record_of(3)], 3)
    calibration["populations"]["prior"]["listed"] = bad
    page = write_campaign(calibration, cited(calibration), command.WORDS, tmp_path).read_text()
    assert page.count("<img ") == page.count("<figcaption>") == 3
    assert "http" not in page and "<script" not in page and "Orange: outside the band" in page
    assert "105 cases: draws of the prior gaussian itself" in page and "share 0.4" in page
    for words in (
        "2 of 4 cases stand out",
        "lost &amp; gone",
        "3 (fresh)",
        "cannot say: 77 cases",
        "90.0 % ± 1.2",
        "1 failed",
    ):
        assert words in page
    assert page.index("lost &amp; gone") < page.index("χ²/m 3,") < page.rindex("The other")
    assert "Over all cases their ratio is 1.0" in page or "Over all cases their ratio is 0.9" in page


def test_an_overconfident_sampler_is_found_so_and_its_factors_make_new_cases_covered(
    narrow: Path, place: Path, tmp_path: Path
) -> None:
    found = read_calibration(narrow / FILE)["populations"]["prior"]
    # Draws that are drawn together are smoother than the truth too, which may stand out more than their spread.
    assert found["finding"] in ("under-dispersed", "biased")
    words = {name: quantity["finding"] for name, quantity in found["quantities"].items()}
    assert {words[name] for name in ("90 % interval of each pixel", "standard deviation")} == {"under-dispersed"}
    # One rank a case: 40 find a spread wrong by 2.2 in most worlds, and in no world may it be called right or too wide.
    assert words["rank of mean"] in ("under-dispersed", "biased", "cannot say")
    assert found["assessment"]["skill"] == pytest.approx(0.45, abs=0.1)
    fresh = held(place, tmp_path / "fresh", "sampler.shrink=0.45", "seed=6", wanted=SOME)
    needs = [load_case(fresh / "cases", "prior", case)["needs"] for case in range(40)]
    calibrating = [load_case(narrow / "cases", "prior", case)["needs"] for case in range(40)]
    for name, made in found["recalibrations"].items():
        factor = made["stretch"]
        assert factor > 0.3, name
        raw, inside = (np.array([np.mean(np.array(n[name]) <= limit) for n in needs]) for limit in (0.0, factor))
        old = np.array([np.mean(np.array(n[name]) <= factor) for n in calibrating])
        error = normal_bound(4) * np.sqrt(inside.var(ddof=1) / 40 + old.var(ddof=1) / 40)
        assert raw.mean() < 0.8 and LEVEL - error < inside.mean() < LEVEL + 1 / 41 + error, name


def test_fresh_cases_check_what_the_others_state_and_change_nothing_else(
    narrow: Path, place: Path, tmp_path: Path
) -> None:
    checked = held(place, tmp_path / "c", "sampler.shrink=0.45", wanted=replace(SOME, fresh=25))
    found, alone = (read_calibration(folder / FILE)["populations"]["prior"] for folder in (checked, narrow))
    fresh = found.pop("fresh")
    assert len(found.pop("listed")) == 65 and len(alone.pop("listed")) == 40
    assert alone.pop("fresh") is None and found == alone
    assert (fresh["cases"], fresh["failed"]) == (25, 0)
    one, stretch = fresh["intervals"]["90 % interval of each pixel"], found["recalibrations"]["all"]["stretch"]
    needs = [load_case(checked / "cases", "prior", case)["needs"]["all"] for case in range(65)]
    raw, stretched = (np.array([np.mean(np.array(n) <= limit) for n in needs]) for limit in (0.0, stretch))
    assert one["raw"]["stated"]["mean"] == pytest.approx(raw[:40].mean())
    assert one["raw"]["shown"]["mean"] == pytest.approx(raw[40:].mean())
    assert one["stretched"]["shown"]["mean"] == pytest.approx(stretched[40:].mean())
    told = found["quantities"]["90 % interval of each pixel"]
    assert told["stretched"] == one["stretched"]["stated"]
    assert told["figures"]["coverage"] == pytest.approx(raw[:40].mean())
    assert "90 % interval of each pixel, raw: states " in table(checked) and "fresh cases show" in table(checked)
    said = cite(place, checked, "sampler.shrink=0.45")["quantities"]["90 % interval of each pixel"]
    assert f"then {100 * told['stretched']['mean']:.1f} ± " in said["text"]


def test_data_that_are_short_are_shared_between_cases_and_fresh_ones(place: Path) -> None:
    workflow = load_workflow(place / "w.yaml", (), place)
    (data,) = campaign_of(workflow, prepare(workflow), Wanted(30, "data", fresh=10)).populations
    assert (data.cases, data.fresh, data.total) == (15, 4, 19)
    with pytest.raises(InputError, match="fresh cases is 0 or more"):
        Wanted(3, fresh=-1)


def test_tiles_are_means_over_parts_of_the_image_that_hold_something() -> None:
    rng = np.random.default_rng(0)
    x, known = torch.tensor(5 + rng.normal(size=(3, 2, 12, 9))), torch.ones(2, 12, 9, dtype=torch.bool)
    known[:, :4, :4] = False  # one tile is not known at all, another in part
    x[:, 1, 4:8, 4:] *= 1e-3  # air
    wanted = []
    for image in range(2):
        for rows in (range(4), range(4, 8), range(8, 12)):
            for columns in (range(5), range(5, 9)):
                inside = torch.zeros(2, 12, 9, dtype=torch.bool)
                inside[image, rows.start : rows.stop, columns.start : columns.stop] = True
                if bool((inside & known).any()) and (image, rows.start, columns.start) != (1, 4, 5):
                    wanted.append(x[:, inside & known].mean(1))
    torch.testing.assert_close(tile_means(x, known), torch.stack(wanted, 1))
    assert tile_means(torch.ones(3, 128, 100), torch.ones(128, 100, dtype=torch.bool)).shape == (3, 64)
    assert tile_means(torch.ones(3, 7), torch.ones(7, dtype=torch.bool)) is None
    assert tile_means(torch.ones(3, 7, 7), torch.ones(7, 7, dtype=torch.bool)) is None


def test_reports_cite_it_by_quantity(exact: Path, narrow: Path, place: Path, tmp_path: Path) -> None:
    said = cite(place, narrow.parent, "sampler.shrink=0.45")
    assert (said["status"], said["date"], said["cases"]) == ("recalibrated", "2026-03-02", 40)
    assert set(said) == {"status", "text", "date", "cases", "scope", "quantities"}
    assert said["scope"]["draws"] == "39" and "share 0.4" in said["scope"]["operator"]
    pixels = said["quantities"]["90 % interval of each pixel"]
    assert pixels["status"] == "recalibrated" and "under-dispersed" in pixels["text"]
    stretch = read_calibration(narrow / FILE)["populations"]["prior"]["recalibrations"]["all"]["stretch"]
    assert pixels["factor"] == stretch
    assert said["quantities"]["rank of rms"] | {"text": ""} == {"status": "unverified", "text": ""}
    mean = cite(place, exact)["quantities"]["rank of mean"]
    assert mean["status"] == "unverified"  # one population of two found it calibrated
    assert "prior truths: calibrated, " in mean["text"] and "data truths: biased, " in mean["text"]
    both = read_calibration(exact / FILE)
    (tmp_path / "one").mkdir()
    sampler_only = {**both, "populations": {"prior": both["populations"]["prior"]}}
    (tmp_path / "one" / FILE).write_text(json.dumps(sampler_only))
    said = cite(place, tmp_path)
    assert said["status"] == "verified" and said["quantities"]["rank of rms"]["status"] == "verified"
    assert "factor" not in said["quantities"]["90 % interval of each pixel"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("problem.operator.share=0.5", "operator.share is 0.5, in the campaign 0.4"),
        ("problem.noise.sigma=0.8", "noise.sigma is 0.8, in the campaign 0.7"),
        ("sampler.shrink=0.9", "sampler.shrink is 0.9, in the campaign 1.0"),
        ("sampler={method: mmps}", 'sampler.method is "mmps", in the campaign "exact"'),
        ("draws=20", "draws is 20, in the campaign 39"),
    ],
)
def test_another_configuration_is_unverified_and_says_what_changed(
    exact: Path, place: Path, change: str, named: str
) -> None:
    said = cite(place, exact.parent, change)
    assert said["status"] == "unverified" and said["text"] == f"the campaign of 2026-03-02 does not hold here: {named}"
    assert {q["status"] for q in said["quantities"].values()} == {"unverified"} and said["cases"] == 0


def test_another_prior_and_nothing_at_all_are_unverified(
    exact: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "no calibration campaign" in cite(place, tmp_path)["text"]
    other = gaussian()
    other.mean += 1e-3
    monkeypatch.setattr(problem, "opened", lambda *_: other)
    said = cite(place, exact)
    assert said["status"] == "unverified" and "prior.sha256 is" in said["text"] and "sampler" not in said["text"]


def test_what_does_not_change_the_draws_law_does_not_matter(exact: Path, place: Path) -> None:
    assert cite(place, exact, "seed=9", "problem.index=4", "summary=other", "block=3")["status"] == "recalibrated"


def test_a_run_cites_the_campaigns_of_its_workspace_and_beside_it(
    exact: Path, whole: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "write_report", lambda *_: None)
    folder = pipeline.run(place / "w.yaml", tmp_path / "run", workspace=place)
    said = json.loads((folder / "facts.json").read_text())["calibration"]
    assert said == cite(place, exact) and said["status"] == "recalibrated" and said["cases"] == 124
    workflow = load_workflow(place / "w.yaml", (), place)
    beside = calibration_for(workflow, prepare(workflow), places(whole.parent / "run"))
    assert (beside["status"], beside["cases"]) == ("unverified", 8) and "cannot say" in beside["text"]
    lost = calibration_for(workflow, prepare(workflow), places(whole.parent / "run"), draws=30)
    assert "draws is 30, in the campaign 39" in lost["text"]


@pytest.fixture(scope="module")
def whole(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small campaign of both kinds of truths that nobody disturbed."""
    return held(place, tmp_path_factory.mktemp("whole") / "c")


def test_a_killed_campaign_goes_on_to_the_same_bits(
    whole: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, sound = [], engine.write_json

    def dying(path: Path, value: object) -> None:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(path)
        sound(path, value)

    monkeypatch.setattr(engine, "write_json", dying)
    with pytest.raises(KeyboardInterrupt):
        held(place, tmp_path / "c")
    assert len(list((tmp_path / "c" / "cases").iterdir())) == 3 and not (tmp_path / "c" / FILE).exists()
    before = {path: path.stat().st_mtime_ns for path in written}
    monkeypatch.setattr(engine, "write_json", sound)
    held(place, tmp_path / "c")
    assert (tmp_path / "c" / FILE).read_bytes() == (whole / FILE).read_bytes()
    assert {path: path.stat().st_mtime_ns for path in before} == before  # what was there was not computed again


def test_a_signal_stops_in_the_middle_of_a_case_and_exits_with_75(
    whole: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sound, asked = Exact.step, []

    def step(self, posterior, state, k, draws):
        asked.append(k)
        if len(asked) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return sound(self, posterior, state, k, draws)

    monkeypatch.setattr(Exact, "step", step)
    given = [
        "calibrate",
        str(place / "w.yaml"),
        "--cases",
        "4",
        "--out",
        str(tmp_path / "c"),
        "--workspace",
        str(place),
    ]
    assert main(given) == 75
    assert "stopped between cases, with all that are done kept" in capsys.readouterr().err
    assert len(list((tmp_path / "c" / "cases").iterdir())) == 2  # the third was given up at its first step
    monkeypatch.setattr(Exact, "step", sound)
    held(place, tmp_path / "c")
    theirs, ours = read_calibration(whole / FILE), read_calibration(tmp_path / "c" / FILE)
    for one in (theirs, ours):  # the first cases of ours were computed on another day
        one.pop("date")
        for population in one["populations"].values():
            population.pop("date"), population.pop("recalibrations")
    assert ours == theirs


class Two(SerialAxis):
    """One of two ranks, run one after the other: the first tells what the second hears."""

    def __init__(self, rank: int, told: list) -> None:
        super().__init__(rank, 2)
        object.__setattr__(self, "told", told)

    def bcast(self, value):
        if self.rank == 0:
            self.told.append(value)
        return self.told[0]


def test_two_ranks_find_the_same_bits(whole: Path, place: Path, tmp_path: Path) -> None:
    workflow = load_workflow(place / "w.yaml", (), place)
    job, told = prepare(workflow), []
    campaign = campaign_of(workflow, job, FEW)
    for rank, cases in ((0, 4), (1, 8)):
        engine.conduct(campaign, tmp_path, replace(serial(2), draws=Two(rank, told)), DAY)
        assert len(list(tmp_path.iterdir())) == cases
    found = calibration_of(campaign, tmp_path, identity_of(workflow, job))
    assert found == read_calibration(whole / FILE)


def test_failed_cases_are_recorded_and_counted(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lost = [case for case in range(12) if seeds_of(5, "prior", case)[2] % 4 == 0]
    assert 0 < len(lost) < 12
    given = ["calibrate", str(place / "w.yaml"), "--cases", "12", "--truths", "prior", "--set", "sampler.losing=4"]
    assert main([*given, "--out", str(tmp_path / "c"), "--workspace", str(place)]) == 3
    assert f"({12 - len(lost)} cases of 39 draws, {len(lost)} failed)" in capsys.readouterr().out
    found = read_calibration(tmp_path / "c" / FILE)["populations"]["prior"]
    assert found["cases"] == 12 - len(lost) and found["failed"] == failures(tmp_path / "c") == len(lost)
    assert found["finding"] == "cannot say" and "no fair sample" in found["reason"]
    why = load_case(tmp_path / "c" / "cases", "prior", lost[0])["record"]["failed"]
    assert why.startswith("Diverged: ") and "not finite after step 2 of 2" in why
    assert found["assessment"]["failures"][0] == f"case {lost[0]}: {why}"


def test_a_campaign_of_nothing_but_failures_says_so(place: Path, tmp_path: Path) -> None:
    folder = held(place, tmp_path / "c", "sampler.losing=1", wanted=Wanted(3, "prior", DAY))
    found = read_calibration(folder / FILE)["populations"]["prior"]
    assert (found["cases"], found["failed"], found["finding"]) == (0, 3, "cannot say")
    assert "no case can be judged: case 0: Diverged" in found["reason"] and "3 failed" in table(folder)
    assert cite(place, folder, "sampler.losing=1")["status"] == "unverified"


def test_a_bug_in_a_case_is_a_failed_case(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(self, posterior, state, k, draws):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(Exact, "step", broken)
    folder = held(place, tmp_path / "c", wanted=Wanted(1, "prior", DAY))
    assert load_case(folder / "cases", "prior", 0)["record"]["failed"] == "ZeroDivisionError: a bug"
    assert "Traceback" in caplog.text


def test_more_cases_keep_those_there_are(whole: Path, place: Path, tmp_path: Path) -> None:
    held(place, tmp_path / "c", wanted=Wanted(3, "prior", DAY))
    first = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "c" / "cases").iterdir()}
    held(place, tmp_path / "c")
    now = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "c" / "cases").iterdir()}
    assert len(first) == 3 and len(now) == 8 and first.items() <= now.items()
    assert (tmp_path / "c" / FILE).read_bytes() == (whole / FILE).read_bytes()


def test_a_folder_of_something_else_is_refused(whole: Path, place: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds another campaign \(draws is 20, in the campaign 39\)"):
        held(place, whole, "draws=20")
    with pytest.raises(InputError, match="these come in pairs; set antithetic: false"):
        held(place, tmp_path / "pairs", "antithetic=true", "draws=20")
    (tmp_path / "note").write_text("mine")
    with pytest.raises(InputError, match="is not empty and holds no campaign"):
        held(place, tmp_path)
    with pytest.raises(InputError, match="at least 1 case"):
        Wanted(0)


@pytest.mark.slow
@pytest.mark.mpi
@pytest.mark.skipif(not MPIEXEC.exists(), reason="needs the mpiexec of the mpich wheel beside this python")
def test_two_processes_find_the_same_bits_as_one(workspace: Path, tmp_path: Path) -> None:
    """The command itself, with a network, under mpiexec."""
    for ranks in (1, 2):
        launcher = [str(MPIEXEC), "-n", str(ranks)] if ranks > 1 else []
        given = [
            "calibrate",
            workspace / "w.yaml",
            "--cases",
            3,
            "--workspace",
            workspace,
            "--out",
            tmp_path / f"{ranks}",
        ]
        changes = ["--set", "draws=3", "--set", "sampler.steps=3"]
        line = [*launcher, sys.executable, "-m", "recon", *map(str, given), *changes]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("reports of this configuration will say: unverified") == 1
    assert (tmp_path / "1" / FILE).read_bytes() == (tmp_path / "2" / FILE).read_bytes()


def test_damaged_files_are_named(whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, place: Path) -> None:
    (tmp_path / "prior-00000.json").write_text('{"record": ')
    with pytest.raises(InputError, match="prior-00000.json cannot be read .* remove it"):
        load_case(tmp_path, "prior", 0)
    (tmp_path / FILE).write_text('{"schema": "recon.calibration/1", "identity": {}, "populations": []}')
    (tmp_path / "c").mkdir()
    inner = read_calibration(whole / FILE)
    inner["populations"]["prior"]["quantities"] = {"rank of rms": {}}
    (tmp_path / "c" / FILE).write_text(json.dumps(inner))
    assert "no calibration campaign" in cite(place, tmp_path)["text"]
    assert "no calibration that can be read" in caplog.text and caplog.text.count("is left out") == 2


def test_data_truths_are_others_than_the_workflows_own_and_never_twice(whole: Path, place: Path) -> None:
    about = [load_case(whole / "cases", "data", case)["about"] for case in range(4)]
    assert len(set(about)) == 4 and not any(text.startswith("field 2 ") for text in about)
    workflow = load_workflow(place / "w.yaml", (), place)
    measured = workflow.model_copy(update={"problem": workflow.problem.model_copy(update={"dataset": None})})
    with pytest.raises(InputError, match="no held-out truths beside the workflow's own"):
        campaign_of(measured, prepare(workflow), Wanted(3, "data"))
    assert [p.name for p in campaign_of(measured, prepare(workflow), Wanted(3)).populations] == ["prior"]


def test_outlying_draws_are_found_by_their_standard_deviation() -> None:
    """Ranks and coverage are right; a draw in a hundred is far off: only the second moment sees it."""
    rng, records = np.random.default_rng(1), []
    for case in range(120):
        x, truth = rng.normal(size=(39, 16)), rng.normal(size=16)
        x[0] += 20 * (case % 3 == 0)
        records.append(case_record(x, truth, case=case))
    contents = [{"record": r.summary(), "needs": {}, "spacing": None, "day": "2026-03-02"} for r in records]
    campaign = Campaign((), Exact(), 39)
    identity = dict.fromkeys(("operator", "noise", "prior", "sampler", "draws"), "")
    found = findings(campaign, Population("some", "made here", 120, None), contents, identity)
    assert found["assessment"]["finding"] in ("calibrated", "cannot say")
    assert found["finding"] == "over-dispersed" and found["reason"].startswith("standard deviation: spread is ")
    sound = [replace(r, spread=r.error * (1.2 if r.case % 2 else 0.8)) for r in records]
    contents = [{**c, "record": r.summary()} for c, r in zip(contents, sound, strict=True)]
    found = findings(campaign, Population("some", "made here", 120, None), contents, identity)
    assert found["quantities"]["standard deviation"]["finding"] == "calibrated"


def test_fields_with_unknown_values_are_judged_where_they_are_known(tmp_path: Path) -> None:
    """Two fields with scales of their own; land in the truth counts neither for nor against the draws."""
    space = Space(("variable", "y", "x"), (2, SIDE, SIDE), {"variable": ("t", "q")}, "mixed")
    prior = GaussianPrior(torch.zeros(space.size), torch.ones(space.size).diag(), space)
    prior.scale, prior.shift = torch.tensor([2.0, 500.0]).reshape(2, 1, 1), torch.tensor([0.0, 1e4]).reshape(2, 1, 1)
    operator = MatrixOperator(torch.eye(space.size)[:4], space)

    def pose(case: int, *_: int) -> Posed:
        truth = prior.decode(prior_truth(prior, case)).float()
        truth[:, 0] = torch.nan
        return Posed(truth, Posterior(prior, GaussianLikelihood(operator, torch.zeros(4), 1.0)), "a truth")

    campaign = Campaign((Population("some", "made here", 2, pose),), Exact(), 40, seed=3)
    engine.conduct(campaign, tmp_path, serial(1), DAY)
    kept = load_case(tmp_path, "some", 1)
    posed = pose(1)
    drawn = prior.encode(sample(posed.posterior, Exact(), 40, seeds_of(3, "some", 1)[2]).x.double())
    known = ~posed.truth.isnan()
    truth = prior.encode(posed.truth.double())
    spread, error = spread_and_error(drawn[:, known], truth[known])
    assert kept["record"]["spread"] == pytest.approx(spread) and kept["record"]["error"] == pytest.approx(error)
    assert kept["record"]["crps"] == pytest.approx(float(fair_crps(drawn[:, known], truth[known]).mean()))
    q = torch.zeros_like(known)
    q[1] = known[1]
    hits = case_coverage(drawn[:, known], truth[known], LEVEL, {"q": q[known]})
    for name in ("all", "q", "mean of all", "mean of q"):
        assert kept["record"]["hits"][name] == asdict(hits[name])
    assert set(kept["needs"]) == {f"{a}{b}" for a in ("", "mean of ") for b in ("all", "t", "q")}
    assert len(kept["needs"]["all"]) == int(known.sum()) and len(kept["needs"]["q"]) == SIDE * (SIDE - 1)
    assert len(kept["needs"]["mean of t"]) == 1
    assert "misfit" in kept["record"]["ranks"] and kept["spacing"] is None
    found = calibration_of(campaign, tmp_path, dict.fromkeys(("operator", "noise", "prior", "sampler"), ""))
    assert "90 % interval of the mean of q" in found["populations"]["some"]["quantities"]


def test_each_seed_moves_its_own_part(place: Path) -> None:
    workflow = load_workflow(place / "w.yaml", (), place)
    prior, data = campaign_of(workflow, prepare(workflow), Wanted(2)).populations
    one, truth, noise = prior.pose(0, 1, 2), prior.pose(0, 3, 2), prior.pose(0, 1, 4)
    assert torch.equal(one.truth, noise.truth) and not torch.equal(one.truth, truth.truth)
    assert not torch.equal(one.posterior.likelihood.y, noise.posterior.likelihood.y)
    residuals = [posed.posterior.likelihood.residual(posed.truth[None]) for posed in (one, truth)]
    torch.testing.assert_close(*residuals)  # the noise alone
    first, again, other = data.pose(0, 1, 2), data.pose(0, 3, 2), data.pose(0, 1, 4)
    assert torch.equal(first.posterior.likelihood.y, again.posterior.likelihood.y)
    assert not torch.equal(first.posterior.likelihood.y, other.posterior.likelihood.y)


def test_a_measured_scan_is_measured_again_with_its_own_counts(
    tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scan file of 1e4 photons, and the workflow that simulated it, make the same counts of a new truth."""
    side = 8
    space = Space(("y", "x"), (side, side), {}, "1/m")
    prior = GaussianPrior(torch.full((side**2,), 18.0), torch.full((side**2,), 9.0), space)
    monkeypatch.setattr(problem, "opened", lambda *_: prior)
    changes = ["problem.operator={type: parallel_beam, views: 3}", "problem.noise={counts: 1.0e4}", "problem.index=0"]
    simulated = load_workflow(place / "w.yaml", ["problem.dataset=ct_small", *changes], place)
    prepare(simulated).measurement.save(tmp_path / "scan.nc")
    measured = load_workflow(place / "w.yaml", [f"problem={{measurement: {tmp_path / 'scan.nc'}}}"], place)
    truth = prior_truth(prior, 7)
    likelihoods = [posterior_of(w, prepare(w), truth, 11).likelihood for w in (simulated, measured)]
    torch.testing.assert_close(likelihoods[0].y, likelihoods[1].y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(likelihoods[0].sigma, likelihoods[1].sigma, rtol=1e-5, atol=0.0)
    assert not torch.equal(likelihoods[1].y, prepare(measured).posterior.likelihood.y)
    assert identity_of(measured, prepare(measured))["noise"]["stated"].startswith("GaussianLikelihood ")


def test_another_spacing_is_another_scope(exact: Path, place: Path) -> None:
    workflow = load_workflow(place / "w.yaml", (), place)
    job = prepare(workflow)
    scaled = SimpleNamespace(operator=SimpleNamespace(domain=Space.grid((SIDE, SIDE), 2e-3, "K")))
    one = {"populations": {"a": {"spacing": [1e-3, 1.5e-3]}, "b": {"spacing": None}}}
    assert elsewhere(one, scaled) == ["spacing along x is 0.002, in the campaign 0.001 to 0.0015"]
    assert elsewhere({"populations": {"a": {"spacing": [1e-3, 2e-3]}}}, scaled) == elsewhere(one, job) == []


def test_seeds_are_a_function_of_seed_population_and_case() -> None:
    words = [w for s in (0, 1) for p in ("prior", "data") for c in range(50) for w in seeds_of(s, p, c)]
    assert len(set(words)) == len(words) == 600 and all(0 <= w < 2**64 for w in words)
    assert seeds_of(3, "data", 7) == seeds_of(3, "data", 7)


def test_thinning_never_asks_for_less() -> None:
    rng = np.random.default_rng(0)
    excess = np.sort(rng.normal(size=5003))
    kept = thinned(excess, 100)
    assert len(kept) == 100 and set(kept) <= set(excess) and kept[-1] == excess[-1]
    for share in (0.5, 0.9, 0.99):
        need, asked = excess[int(np.ceil(share * 5003)) - 1], kept[int(np.ceil(share * 100)) - 1]
        assert need <= asked <= excess[min(5002, int(np.ceil((share + 0.01) * 5003)))]
    assert thinned(excess, 5003) is excess


def test_truths_of_closed_forms_have_their_law() -> None:
    mean, covariance = torch.tensor([1.0, -2.0]), torch.tensor([[2.0, 1.2], [1.2, 1.0]])
    x = torch.stack([prior_truth(GaussianPrior(mean, covariance), seed) for seed in range(400)])
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), (x - mean).T, upper=False)
    assert float(white.mean(1).abs().max()) < normal_bound(2) / 400**0.5
    low, high = chi2_bounds(800)
    assert low < float(white.square().mean()) < high
    assert abs(float((white[0] * white[1]).mean())) < normal_bound() / 400**0.5
    mixture = GaussianMixturePrior(torch.tensor([[0.0], [50.0]]), torch.tensor([1.0]), torch.tensor([0.2, 0.8]))
    x = torch.stack([prior_truth(mixture, seed) for seed in range(400)])[:, 0]
    assert abs(float((x > 25).double().mean()) - 0.8) < normal_bound() * (0.16 / 400) ** 0.5
    assert float((x - 50.0 * (x > 25)).std()) == pytest.approx(1.0, abs=normal_bound() / 800**0.5)


def test_tiles_are_judged_as_one_kind_of_interval(tmp_path: Path) -> None:
    """Means of 8 tiles of 4 x 4 pixels under a white prior: covered as often as pixels, and kept as numbers of the case."""
    space = Space.grid((8, 16), 1e-3, "1/m")
    prior = GaussianPrior(torch.full((space.size,), 3.0), torch.ones(space.size).diag(), space)
    operator = MatrixOperator(torch.eye(space.size)[:4], space)

    def pose(case: int, *_: int) -> Posed:
        truth = prior_truth(prior, case).float()
        return Posed(truth, Posterior(prior, GaussianLikelihood(operator, torch.zeros(4), 100.0)), "a truth")

    campaign = Campaign((Population("some", "made here", 12, pose),), Exact(), 40, seed=3)
    engine.conduct(campaign, tmp_path, serial(1), DAY)
    kept = load_case(tmp_path, "some", 1)
    posed = pose(1)
    x = sample(posed.posterior, Exact(), 40, seeds_of(3, "some", 1)[2]).x
    means = tile_means(torch.cat([x, posed.truth[None]]), torch.ones(space.shape, dtype=torch.bool))
    assert means.shape == (41, 8) and len(kept["needs"][TILES]) == 8
    assert kept["record"]["hits"][TILES] == asdict(case_coverage(means[:-1], means[-1], LEVEL)["all"])
    assert np.mean(np.array(kept["needs"][TILES]) <= 0) == kept["record"]["hits"][TILES]["inside"]
    found = calibration_of(campaign, tmp_path, dict.fromkeys(("operator", "noise", "prior", "sampler"), ""))
    tiles = found["populations"]["some"]["quantities"]["90 % interval of the mean of each tile"]
    assert abs(tiles["figures"]["coverage"] - LEVEL) < normal_bound() * math.sqrt(0.09 / 96)


def record_of(case: int, error: float = 1.0, chi2: float = 1.0, db: float = 30.0, failed: str = "") -> dict:
    """A case file: spread 1, limits of chi2/m from 0.9 to 1.1."""
    hits = None if failed else {"all": {"below": 0.05, "inside": 0.9, "above": 0.05}}
    value = None if failed else 1.0
    record = {"case": case, "hits": hits, "spread": value, "error": None if failed else error, "crps": value}
    figures = {} if failed else {"chi2": chi2, "limits": [0.9, 1.1], "psnr": db}
    return {"about": f"slice {case}", "record": {**record, "failed": failed}, "figures": figures}


def test_outliers_come_first_and_say_what_they_are() -> None:
    usual = [record_of(c, 1 + 0.01 * (c % 5), 1 + 0.002 * c, 30 + 0.1 * (c % 7)) for c in range(12)]
    assert [row["why"] for row in listed(usual, 12)] == [[]] * 12
    first = [(row["case"], row["named"]) for row in listed(usual, 12)[:2]]
    assert first == [(0, ["the worst PSNR of all"]), (11, ["the largest χ²/m of all"])]
    cases = [*usual, record_of(12, 9.0), record_of(13, chi2=1.3), record_of(14, db=22.0), record_of(15, chi2=0.8)]
    rows = listed([*cases, record_of(16, failed="Diverged: at step 3")], 14)
    found = {row["case"]: row for row in rows}
    assert [row["case"] for row in rows[:5]] == [16, 13, 14, 12, 15] and rows[5]["why"] == []
    assert found[16]["why"] == ["no numbers: Diverged: at step 3"]
    assert found[12]["why"] == ["the error is 3 times the spread, where the median case has 1"]
    assert found[13]["why"] == ["the data are not fitted: χ²/m 1.3, an exact sampler's lies in 0.9 to 1.1"]
    assert found[14]["why"] == ["PSNR 22.00 dB, 8.15 dB below the median case"]
    assert found[15]["why"][0].startswith("the noise is fitted: χ²/m 0.8")
    assert found[13]["named"] == ["the largest χ²/m of all"] and found[14]["named"] == ["the worst PSNR of all"]
    assert [found[case]["fresh"] for case in (13, 14)] == [False, True]
    table = as_csv({"data": {"listed": rows}}).splitlines()
    assert table[0] == "truths,case,about,fresh,chi2 per datum,psnr (dB),error over spread,covered,crps,why"
    assert table[1] == "data,16,slice 16,True,,,,,,no numbers: Diverged: at step 3" and len(table) == 18
    # Few cases have no quartiles, and old files no figures: nothing is made up.
    assert listed([record_of(0, 9.0, db=1.0), {**record_of(1), "figures": {}}], 2)[0]["why"] == []


def test_a_case_keeps_its_fit_and_its_likeness(whole: Path) -> None:
    kept = load_case(whole / "cases", "data", 0)["figures"]
    assert kept["limits"][0] < 1 < kept["limits"][1] and kept["chi2"] > 0 and math.isfinite(kept["psnr"])
    rows = read_calibration(whole / FILE)["populations"]["data"]["listed"]
    assert {row["case"]: row["chi2"] for row in rows}[0] == kept["chi2"] and len(rows) == 4
    lines = (whole / "cases.csv").read_text().splitlines()
    assert len(lines) == 9 and {line.split(",")[0] for line in lines[1:]} == {"prior", "data"}


def test_regions() -> None:
    fields = regions_of(Space(("variable", "y", "x"), (2, 8, 8), {"variable": ("t", "q")}, "K"))
    assert list(fields) == ["t", "q"] and int(fields["q"].sum()) == 64 and bool(fields["q"][1].all())
    image = regions_of(Space.grid((8, 12), 1e-3, "1/m"))
    assert int(image["middle"].sum()) == 4 * 6 and bool((image["middle"] ^ image["border"]).all())
    assert regions_of(Space.vector(5)) == {}
