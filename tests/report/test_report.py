"""The page stands alone and says what its numbers say; the evidence survives its files."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
import math
import re
from dataclasses import fields, replace
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import torch
import xarray as xr
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

import recon.report
from recon.diagnostics import DataFit, coverage, crps, data_fit, psnr, rmse, spread_skill, ssim
from recon.ensemble import Ensemble
from recon.errors import InputError
from recon.likelihoods import GaussianLikelihood
from recon.operators import MatrixOperator
from recon.plot.canvas import Look, scale
from recon.report import Evidence, panels, write_report
from recon.report.numbers import numbers
from recon.report.page import cell, rows
from recon.report.schema import Report
from recon.report.tables import write_tables
from recon.report.verdict import headline, number, verdict
from recon.space import Space

FACTS = {
    "title": "Two views <of> a thing & more",
    "operator": "dense matrix",
    "noise": {"law": "Gaussian", "sigma": 0.5},
    "sampler": {"name": "MMPS", "claim": "consistent", "fields": {"steps": 100}},
    "prior": {"name": "toy", "source": "https://example.org/weights"},
    "cost": {"seconds": 12.5, "denoiser_evaluations": 123456},
    "provenance": {"seed": 0, "versions": {"recon": "0.1.0"}, "dirty": False},
    "warnings": ["the beam was not monochromatic"],
}


def make(
    space: Space, draws: int = 20, *, known: bool = True, facts: dict | None = None, dtype=torch.float32
) -> Evidence:
    """Calibrated toy evidence on any space: pixels independent, 3 views of 8 rays."""
    rng = np.random.default_rng(7)
    centre = rng.normal(size=space.shape)
    x = torch.tensor(centre + 0.3 * rng.normal(size=(draws, *space.shape)), dtype=dtype)
    truth = torch.tensor(centre + 0.3 * rng.normal(size=space.shape), dtype=dtype)
    coords = {"angle": np.linspace(0, np.pi, 3, endpoint=False), "detector": np.arange(8) * 1e-3}
    range_ = Space(("angle", "detector"), (3, 8), coords, "1")
    matrix = torch.tensor(rng.normal(size=(24, space.size)) / math.sqrt(space.size), dtype=dtype)
    operator = MatrixOperator(matrix, space, range_)
    y = operator.A(truth[None])[0] + 0.5 * torch.tensor(rng.normal(size=(3, 8)), dtype=dtype)
    ensemble = Ensemble(x, space, None, {"sampler": "toy"})
    fit = data_fit(GaussianLikelihood(operator, y, 0.5), ensemble)
    if not known:
        return Evidence(ensemble, y, range_, fit, facts=facts or {})
    other = {"FBP": truth + 0.5, "TV (λ = 0.1)": truth * 0.9}
    return Evidence(ensemble, y, range_, fit, truth, other, FACTS if facts is None else facts, torch.tensor(1.0))


GRID = Space.grid((32, 24), 1e-3, "1/m")
SPACES = {
    "image": GRID,
    "vector": Space.vector(30, "K"),
    "long vector": Space(("x",), (200,), {"x": np.arange(200) * 1e-3}, "K"),
    "one pixel": Space(("y", "x"), (1, 1)),
    "one number": Space.vector(1),
    "volume": Space(("z", "y", "x"), (4, 12, 12), {"z": np.arange(4) * 2e-3}, "1/m"),
    "channels": Space(
        ("variable", "lat", "lon"), (2, 12, 14), {"variable": ("t2m", "u10"), "lat": np.arange(12.0)}, "K"
    ),
    "four dims": Space(("t", "z", "y", "x"), (2, 2, 5, 6)),
    "thread": Space(("y", "x"), (2, 60), {"y": np.arange(2) * 1e-3, "x": np.arange(60) * 1e-3}),
}


@pytest.fixture
def drafts(monkeypatch):
    """Figures that are made but not drawn: a tenth of the time, for tests about what the page says."""
    blank = io.BytesIO()
    Image.new("L", (1, 1)).save(blank, "png")
    picture = "data:image/png;base64," + base64.b64encode(blank.getvalue()).decode()

    def draft(figure, alt, caption, data=None):
        assert figure.axes
        return panels.Picture(picture, picture, alt, caption, dict(data or {}))

    for name in ("figures", "data_figures", "region_figures", "volume_figures"):
        monkeypatch.setattr(f"recon.report.{name}.finish", draft)


@pytest.fixture(autouse=True)
def _every_report_keeps_its_schema(tmp_path):
    """Whatever a test wrote is valid under the shipped schema."""
    yield
    for path in tmp_path.rglob("report.json"):
        Report.model_validate_json(path.read_text())


def pictures(page: str) -> list[Image.Image]:
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in re.findall(r'png;base64,([^"]+)"', page)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def written(folder):
    evidence = make(GRID)
    path = write_report(evidence, folder)
    return evidence, path.read_text(encoding="utf-8"), json.loads((folder / "report.json").read_text())


def test_the_page_stands_alone(written):
    _, page, _ = written
    for forbidden in ("http://", "https://", "<script", "<link", "@import", "url(", "javascript:"):
        assert forbidden not in page
    assert "example.org/weights" in page  # the address is shown, as text
    assert page.lstrip().startswith("<!DOCTYPE html>")
    assert len(page) < 3e6


def test_every_figure_has_an_alternative_text_a_caption_and_two_themes(written):
    _, page, _ = written
    images = re.findall(r"<img [^>]*>", page)
    assert len(images) == 7
    for tag in images:
        assert len(re.search(r'alt="([^"]+)"', tag).group(1)) > 20
    assert page.count("<figcaption>") == page.count('prefers-color-scheme: dark)" srcset') == 7
    loaded = pictures(page)
    assert len(loaded) == 14
    corners = {image.convert("RGB").getpixel((0, 0)) for image in loaded}
    assert corners == {(255, 255, 255), (0x14, 0x17, 0x1A)}


def test_names_from_outside_are_escaped(written):
    _, page, _ = written
    assert "<h1>Two views &lt;of&gt; a thing &amp; more</h1>" in page


def test_sections_come_in_order(written):
    _, page, _ = written
    ids = re.findall(r'<section[^>]* id="(\w+)"', page)
    order = ["verdict", "result", "regions", "against", "fit", "split", "sampling", "calibration", "setting", "again"]
    assert ids == [*order, "glossary"]
    assert {link for link in re.findall(r'href="#(\w+)"', page)} == set(ids)
    for text in (
        "recon resume",
        "recon run config.resolved.yaml",
        "123\u202f456",
        "beam was not monochromatic",
        "sampler · steps",
    ):
        assert text in page


def test_report_json_holds_the_recomputed_numbers(written):
    evidence, page, kept = written
    mean, truth = evidence.ensemble.mean(), evidence.truth
    assert kept["schema"] == "recon.report/2"
    Report.model_validate(kept)
    (only,) = kept["quantities"]
    assert all(only[name] == kept[name] for name in ("images", "gains", "spread"))
    found = kept["images"]["posterior mean"]
    assert found["psnr"] == pytest.approx(float(psnr(mean, truth)))
    assert found["ssim"] == pytest.approx(float(ssim(mean, truth)))
    assert kept["images"]["one draw"]["rmse"] == pytest.approx(float(rmse(evidence.ensemble.x[0], truth)))
    assert kept["gains"]["FBP"] == pytest.approx(found["psnr"] - float(psnr(truth + 0.5, truth)), abs=1e-4)
    assert kept["spread"]["skill"] == pytest.approx(spread_skill(evidence.ensemble, truth))
    assert kept["spread"]["crps"] == pytest.approx(float(crps(evidence.ensemble, truth).mean()))
    assert kept["spread"]["coverage"]["0.9"] == coverage(evidence.ensemble, truth, 0.9)
    assert kept["fit"]["ratio"] == pytest.approx(float(evidence.fit.chi2.mean()) / 24)
    assert kept["fit"]["verdict"] == evidence.fit.verdict
    assert kept["draws"]["count"] == 20
    assert kept["facts"]["prior"]["source"] == "https://example.org/weights"
    assert f"{found['psnr']:.2f}" in page
    assert html.escape(kept["headline"]) in page


@pytest.mark.usefixtures("drafts")
def test_evidence_survives_its_files(written, tmp_path):
    evidence, page, kept = written
    evidence.save(tmp_path)
    loaded = Evidence.load(tmp_path)
    assert torch.equal(loaded.measurement, evidence.measurement)
    assert torch.equal(loaded.truth, evidence.truth)
    assert float(loaded.prior_std) == 1.0
    assert list(loaded.baselines) == list(evidence.baselines)
    assert all(torch.equal(loaded.baselines[n], v) for n, v in evidence.baselines.items())
    assert loaded.range.mismatch(evidence.range) is None
    assert loaded.facts == evidence.facts
    for f in fields(DataFit):
        a, b = getattr(loaded.fit, f.name), getattr(evidence.fit, f.name)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, f.name
    again = write_report(loaded, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text()) == kept
    assert again.read_text().count("<figure>") == page.count("<figure>")


def test_files_carry_units_and_say_what_they_hold(written, tmp_path):
    written[0].save(tmp_path)
    with xr.open_datatree(tmp_path / "evidence.nc", engine="h5netcdf") as tree:
        image, measured = tree["image"], tree["measurement"]
        assert image["truth"].attrs["units"] == "1/m"
        assert image["x"].attrs["units"] == "mm"
        assert float(image["x"][1] - image["x"][0]) == pytest.approx(1.0)
        assert measured["angle"].attrs["units"] == "degree"
        assert float(measured["angle"][1]) == pytest.approx(60)
        assert set(measured.data_vars) == {"value", "residual", "per_view", "per_view_sd", "chi2"}


def test_an_ensemble_that_is_there_is_kept(written, tmp_path):
    (tmp_path / "ensemble.nc").write_bytes(b"the run's own")
    written[0].save(tmp_path)
    assert (tmp_path / "ensemble.nc").read_bytes() == b"the run's own"
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("name", "known"),
    [*((name, True) for name in SPACES), ("image", False), ("long vector", False), ("one pixel", False)],
)
@pytest.mark.usefixtures("drafts")
def test_any_space_gives_a_page(name, known, tmp_path):
    evidence = make(SPACES[name], draws=5, known=known)
    evidence.save(tmp_path)
    page = write_report(Evidence.load(tmp_path), tmp_path).read_text(encoding="utf-8")
    assert ("Against the truth" in page) == known
    assert pictures(page)


@pytest.mark.slow
def test_one_pixel_survives_the_layout(tmp_path):
    assert len(pictures(write_report(make(SPACES["one pixel"], draws=5), tmp_path).read_text(encoding="utf-8"))) == 12


@pytest.mark.usefixtures("drafts")
def test_slices_are_named(tmp_path):
    page = write_report(make(SPACES["volume"]), tmp_path).read_text(encoding="utf-8")
    assert "Shown: z 4 mm (number 3 of 4)." in page
    page = write_report(make(SPACES["four dims"]), tmp_path).read_text(encoding="utf-8")
    assert "Shown: t number 2 of 2, z number 2 of 2." in page


@pytest.mark.usefixtures("drafts")
@pytest.mark.parametrize("space", [GRID, SPACES["vector"]], ids=["image", "vector"])
def test_values_that_are_not_numbers_are_reported_not_fatal(space, tmp_path):
    good = make(space)
    x = torch.full_like(good.ensemble.x, torch.nan)
    residual = torch.full_like(good.fit.residual, torch.nan)
    fit = replace(good.fit, chi2=good.fit.chi2 * torch.nan, ratio=math.nan, mean_chi2=math.nan, residual=residual)
    nan = torch.full(space.shape, torch.nan)
    bad = Evidence(Ensemble(x, space), good.measurement * torch.nan, good.range, fit, nan, {"FBP": nan})
    path = write_report(bad, tmp_path)
    kept = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert kept["draws"]["draws_not_finite"] == 20
    assert kept["fit"]["ratio"] is None
    assert kept["headline"].startswith("Do not use this result")
    text = re.sub(r"<style>.*</style>|base64,[^\"]+", "", path.read_text(), flags=re.DOTALL).replace(
        "NaN or infinite", ""
    )
    assert not re.search(r"\b(nan|inf|None)\b", text)


@pytest.mark.usefixtures("drafts")
@pytest.mark.parametrize("space", [GRID, SPACES["vector"]], ids=["image", "vector"])
def test_a_single_draw_of_a_flat_truth(space, tmp_path):
    one = make(space, draws=1)
    flat = replace(one, truth=torch.zeros(space.shape), baselines={})
    page = write_report(flat, tmp_path).read_text(encoding="utf-8")
    assert "A single draw says nothing about uncertainty" in page
    assert "run more draws" in page
    assert numbers(flat)["images"]["one draw"]["psnr"] is None


def levels(evidence: Evidence) -> dict[str, str]:
    return {s.about: s.level for s in verdict(numbers(evidence))}


def test_the_verdict_says_what_the_numbers_say():
    evidence = make(GRID)
    assert levels(evidence) == {
        "Data fit": "good",
        "Residual": "good",
        "Calibration": "open",
        "Sampler": "good",
        "Draws": "good",
        "Against the truth": "good",
        "Warning": "look",
    }
    few = make(GRID, draws=16)
    text = " ".join(s.text for s in verdict(numbers(few)))
    assert "too few for intervals of 90 % (needs 19), 95 % (needs 39)" in text
    assert levels(few)["Draws"] == "look"
    narrow = Ensemble(evidence.ensemble.mean() + 0.2 * (evidence.ensemble.x - evidence.ensemble.mean()), GRID)
    sentences = {s.about: s for s in verdict(numbers(replace(evidence, ensemble=narrow)))}
    assert sentences["Against the truth"].level == "look"
    assert "over-confident" in sentences["Against the truth"].text


@pytest.mark.parametrize(
    ("ratio", "words"),
    [(1.0, "fit the data"), (4.0, "The data are not fitted. The residual is 2 times"), (0.01, "The noise is fitted.")],
)
def test_the_verdict_on_fit(ratio, words):
    evidence = make(GRID)
    lines = verdict(numbers(replace(evidence, fit=replace(evidence.fit, ratio=ratio))))
    assert words in lines[0].text
    assert headline(lines).startswith("Do not use" if ratio != 1.0 else "The draws agree")


def test_calibration_and_claims_come_from_the_facts():
    checked = {
        "calibration": {"status": "verified", "text": "coverage 0.89 over 200 slices"},
        "sampler": {"claim": "heuristic"},
    }
    lines = {s.about: s for s in verdict(numbers(make(GRID, facts=checked)))}
    assert lines["Calibration"].level == "good"
    assert "Verified: coverage 0.89 over 200 slices." in lines["Calibration"].text
    assert lines["Sampler"].level == "look"
    blank = {s.about: s for s in verdict(numbers(make(GRID, facts={})))}
    assert blank["Calibration"].text.startswith("Unverified")
    assert blank["Sampler"].level == "open"


def test_weights_and_ancestors_are_told():
    evidence = make(GRID)
    info = {"distinct": 4}
    weighted = Ensemble(evidence.ensemble.x, GRID, torch.linspace(0, 6, 20), info)
    text = " ".join(s.text for s in verdict(numbers(replace(evidence, ensemble=weighted))))
    assert f"effective number {number(weighted.ess)} of 20 draws" in text
    assert f"unequally weighted and worth {number(weighted.ess, 2)}" in text
    assert "4 distinct ancestors" in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"truth": torch.zeros(2, 2)}, "the truth must be"),
        ({"baselines": {"TV": torch.zeros(2, 2)}}, "baseline 'TV' must be"),
        ({"measurement": torch.zeros(3, 9)}, "the measurement must be"),
        ({"prior_std": torch.ones(3)}, "prior's standard deviation must be"),
        ({"ensemble": Ensemble(torch.zeros(4, 32, 24), GRID)}, "the fit is of 20 draws and the ensemble has 4"),
    ],
)
def test_evidence_that_does_not_fit_is_refused(change, words):
    with pytest.raises(InputError, match=words):
        replace(make(GRID), **change)


def test_missing_and_damaged_files_are_named(written, tmp_path):
    with pytest.raises(InputError, match="not a readable ensemble file"):
        Evidence.load(tmp_path)
    written[0].save(tmp_path)
    (tmp_path / "evidence.nc").write_bytes(b"\x00" * 100)
    with pytest.raises(InputError, match=r"no readable evidence\.nc"):
        Evidence.load(tmp_path)


@pytest.mark.usefixtures("drafts")
def test_a_crowd_of_baselines_is_cut_and_the_caption_says_so(tmp_path):
    crowd = {f"method {i}": torch.zeros(GRID.shape) for i in range(6)}
    page = write_report(replace(make(GRID), baselines=crowd), tmp_path).read_text(encoding="utf-8")
    assert "Not shown: method 4, method 5." in page
    assert '<th scope="row">method 5</th>' in page


@pytest.mark.usefixtures("drafts")
def test_figures_leave_matplotlib_as_it_was(tmp_path):
    before = dict(mpl.rcParams)
    write_report(make(SPACES["one number"]), tmp_path)
    assert dict(mpl.rcParams) == before
    folder = Path(recon.report.__file__).parent
    assert not [p.name for p in folder.glob("*.py") if re.search(r"import .*pyplot|pyplot import", p.read_text())]


def opaque(rgb: np.ndarray) -> np.ndarray:
    return np.concatenate([rgb, np.full((*rgb.shape[:2], 1), 255, np.uint8)], axis=2)


def test_a_palette_keeps_every_colour_it_can_and_never_loses_a_rare_one():
    few = np.random.default_rng(0).choice(np.array([0, 90, 255], dtype=np.uint8), size=(20, 30, 3))
    index, light, dark = panels.palettes(opaque(few))
    assert (light[index] == few).all() and (dark[index] == few).all()
    grey = np.repeat(np.random.default_rng(1).integers(0, 256, size=(40, 40, 1), dtype=np.uint8), 3, axis=2)
    grey[5, 5] = (255, 0, 0)
    index, light, _ = panels.palettes(opaque(grey))
    kept = light[index].astype(int)
    assert tuple(kept[5, 5]) == (255, 0, 0)
    assert np.abs(kept - grey).max() <= 2


def test_dark_pages_turn_ink_and_paper_and_nothing_else():
    ink, blue = (0x1D, 0x21, 0x25), (47, 134, 201)
    drawn = np.array([[(*ink, 255), (*ink, 128), (*blue, 255), (*blue, 51), (29, 29, 29, 255), (7, 7, 7, 0)]], np.uint8)
    index, light, dark = panels.palettes(drawn)
    half = lambda a, b, share: np.rint(share * np.array(a) + (1 - share) * np.array(b)).tolist()  # noqa: E731
    paper, night, chalk = (255, 255, 255), (0x14, 0x17, 0x1A), (0xE4, 0xE6, 0xE8)
    share = 128 / 255
    assert light[index][0].tolist() == [
        [*ink], half(ink, paper, share), [*blue], half(blue, paper, 0.2), [29, 29, 29], [*paper]
    ]  # fmt: skip
    assert dark[index][0].tolist() == [
        [*chalk], half(chalk, night, share), [*blue], half(blue, night, 0.2), [29, 29, 29], [*night]
    ]  # fmt: skip


def test_nothing_stands_outside_a_figure_or_on_its_neighbour():
    """Images of two proportions, a bar of two of them, a curve with long labels, and a legend above."""
    figure, grid = panels.new_figure(6.0, 2, 3, (1, 2, 1))
    for k, axes in enumerate(grid.flat):
        axes.set(ylabel="a label", xlabel=f"x {k}", title=f"panel {k}")
        if k == 4:
            axes.plot([0, 1], [-1e6, 1e6], label="a line")
            axes.set_yticks([-1e6, 1e6], ["minus a million", "a million"])
        else:
            made = axes.imshow(np.eye(4), extent=(0, 4, 0, 2 if k == 1 else 4))
    scale(figure, made, grid[0, :2], Look("gray", 0, 1, "value (1/m)"))
    scale(figure, made, grid[1, 2], Look("gray", 0, 1, "other"))
    figure.legend(*grid[1, 1].get_legend_handles_labels(), loc="upper left")
    assert panels.finish(figure, "alt", "caption").light.startswith("data:image/png")
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [axes.get_tightbbox(renderer) for axes in figure.axes] + [figure.legends[0].get_window_extent(renderer)]
    for i, box in enumerate(boxes):
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height
        assert not any(box.overlaps(other) for other in boxes[:i])
    bar, last = figure.axes[6].get_position(), grid[0, 1].get_position()
    assert last.y0 < bar.y0 < bar.y1 < last.y1 or bar.y1 - bar.y0 < 1  # beside its axes
    shapes = [axes.bbox.height / axes.bbox.width for axes in grid.flat]
    assert shapes[0] == pytest.approx(1) and shapes[1] == pytest.approx(0.5)


def test_a_figure_of_images_alone_leaves_no_blank():
    figure, grid = panels.new_figure(9.0, 1, 3)
    for axes in grid.flat:
        axes.imshow(np.eye(4))
    panels.finish(figure, "alt", "caption")
    assert figure.get_figheight() < 4
    figure, grid = panels.new_figure(2.0, 1, 3)
    for axes in grid.flat:
        made = axes.imshow(np.eye(4))
    scale(figure, made, grid[0], Look("gray", 0, 1, "value"))
    panels.finish(figure, "alt", "caption")
    right = grid[0, 2].get_position()
    assert 0 < figure.axes[3].get_position().x0 - right.x1 < 0.03


def test_curves_and_tables_are_kept_as_csv(tmp_path):
    folder = tmp_path / "figures"
    draft = panels.Picture("", "", "", "", {})
    curve = xr.DataArray([1.0, np.nan], {"x": ("x", [0.5, 1.5], {"units": "mm"})}, ("x",), attrs={"units": "K"})
    other = xr.DataArray([3, 4], {"x": ("x", [0.5, 1.5], {"units": "mm"})}, ("x",), attrs={"units": "1"})
    table = xr.DataArray([[1.0, 2.0]], {"column": ["a", "b"]}, ("group", "column"), attrs={"units": "1/m"})
    plain = xr.DataArray(["u, v", "w", "z"], dims=("name",))
    data = {"mean": curve, "count": other, "pairs": table, "words": plain, "map": xr.DataArray(np.eye(2))}
    made = write_tables({"a/b": replace(draft, data=data), "maps": replace(draft, data={"m": data["map"]})}, tmp_path)
    assert made == [folder / "a_b.csv"]
    assert made[0].read_text() == (
        "x (mm),mean (K),count,group (number),a (1/m),b (1/m),name (number),words\n"
        '0.5,1.0,3,0,1.0,2.0,0,"u, v"\n1.5,,4,,,,1,w\n,,,,,,2,z\n'
    )


@pytest.mark.usefixtures("written")
def test_the_csv_of_a_report_hold_its_figures(folder):
    rows = list(csv.DictReader(io.StringIO((folder / "figures" / "fit.csv").read_text(encoding="utf-8"))))
    assert [float(r["angle (degree)"]) for r in rows[:3]] == pytest.approx([0, 60, 120])
    assert len([r for r in rows if r["ratio of each draw"]]) == 20
    assert not (folder / "figures" / "images.csv").exists()
    with xr.open_datatree(folder / "figures.nc", engine="h5netcdf") as tree:
        assert tree["fit"]["ratio of each draw"].values.tolist() == [float(r["ratio of each draw"]) for r in rows]


def test_figures_for_people():
    assert number(0.00001234) == "1.23 × 10^−5"
    assert number(-0.5) == "−0.5"
    assert number(math.nan) == number(None) == "–"
    assert cell(12345) == "12\u202f345"
    assert cell([True, 2, "a"]) == "yes, 2, a"
    assert rows({"a": {"b_c": 1, "d": None}}) == [("a · b c", "1")]
