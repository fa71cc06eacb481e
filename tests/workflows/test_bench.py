"""``recon bench``: every method has a row, refusals speak, ties are ties, and the advice follows from the figures."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import chi2, t

from recon.cli import main
from recon.draws import Draws
from recon.ensemble import Ensemble
from recon.errors import InputError
from recon.priors import GaussianPrior
from recon.samplers import METHODS
from recon.space import Space
from recon.workflows import bench as module
from recon.workflows.advice import Ties, advise
from recon.workflows.bench import Ask, bench, default_steps, judged, misfit
from recon.workflows.bench_text import as_json, table
from recon.workflows.pareto import dominates, front, resolution
from recon.workflows.scorecard import Figures, Row, Score, level_of, score

SMALL = ["problem.operator.views=4", "block=32"]


@pytest.fixture(autouse=True)
def quiet_again() -> Iterator[None]:
    """Commands set up logging; it is put back."""
    logged = logging.getLogger("recon")
    handlers, level = list(logged.handlers), logged.level
    yield
    logged.handlers[:], logged.level = handlers, level


def row(
    label: str, quality: list[float], seconds: float, crps: float = 1.0, coverage: float = 0.9, **more: object
) -> Row:
    """A row as a race makes it, with invented figures."""
    figures = tuple(
        Figures(Score(q, 0.1, q, None, None, {}, crps, "1", coverage), 1.0, "fits", seconds, 0.5) for q in quality
    )
    given = {"claim": "heuristic", "steps": 8, "status": "measured", **more}
    return Row(label, label, figures=figures, quality=tuple(quality), errors=(0.1,) * len(quality), **given)


# --- the front


def test_the_front_of_points_without_ties_is_paretos() -> None:
    points = [(30.0, 1.0), (31.0, 2.0), (29.0, 3.0), (31.0, 5.0), (20.0, 0.1)]
    assert front(points) == [True, True, False, False, True]


def test_ties_stand_together_and_clear_losses_fall() -> None:
    # In dB and log seconds: b is 0.3 dB below a and as fast, c as good as a and clearly slower, d clearly worse than b.
    points = [(31.0, 0.0), (30.7, 0.05), (30.9, 1.0), (29.9, 0.02)]
    assert front(points, better=0.5, cheaper=0.1) == [True, True, False, False]
    assert front(points, better=0.0, cheaper=0.0) == [True, False, False, False]
    assert front([(31.0, 1.0), (30.8, 0.0)], better=0.5, cheaper=0.1) == [False, True]  # as good, and cheaper
    assert dominates(points[0], points[2], 0.5, 0.1) and not dominates(points[0], points[1], 0.5, 0.1)


def test_no_three_points_dominate_each_other_in_a_circle() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        points = [tuple(p) for p in rng.integers(0, 5, (7, 2)).astype(float)]
        above = np.array([[dominates(a, b, 1.0, 1.0) for b in points] for a in points])
        reach = above.copy()
        for _ in points:
            reach = reach | (reach.astype(int) @ above.astype(int) > 0)
        assert not reach.diagonal().any()
        assert any(front(points, 1.0, 1.0))


def test_two_ways_are_compared_case_by_case() -> None:
    """Of two the threshold is that of the paired t test, however much the cases differ."""
    one, other = [30.0, 35.0, 20.0, 28.0], [30.5, 35.3, 20.8, 28.2]
    gaps = np.subtract(other, one)
    expected = float(t.isf(0.025, 3)) * gaps.std(ddof=1) / 2
    assert resolution([one, other]) == pytest.approx(expected, rel=1e-12)
    assert resolution([[a + 100 * k for k, a in enumerate(way)] for way in (one, other)]) == pytest.approx(expected)


def test_one_wild_way_does_not_make_ties_of_the_others() -> None:
    rng = np.random.default_rng(1)
    tame = (rng.normal(0, 0.1, (8, 5)) + rng.normal(0, 5, 5)).tolist()
    wild = [*tame, (rng.normal(0, 50, 5)).tolist()]
    assert resolution(wild) < 2 * resolution(tame)


def test_the_threshold_is_unbiased_for_normal_noise() -> None:
    """Over 100 tables its square is ``t^2 2 / J`` for noise of variance 1, to 5 standard errors.

    Without the correction it would be 0.69 of that; a finite table's median is a few per cent above its own limit.
    """
    ways, cases = 12, 3
    values = [torch.randn(ways, cases, generator=torch.Generator().manual_seed(s)).tolist() for s in range(100)]
    found = np.array([resolution(v) for v in values]) ** 2
    expected = float(t.isf(0.025, (ways - 1) * (cases - 1))) ** 2 * 2 / cases
    tolerance = 5 * found.std(ddof=1) / math.sqrt(len(found))
    assert float(chi2.median(2)) / 2 < 1 - tolerance / expected
    assert found.mean() == pytest.approx(expected, abs=tolerance)


def test_one_case_is_judged_by_the_error_over_draws() -> None:
    assert resolution([[1.0], [2.0], [9.0]], [0.1, 0.2, 5.0]) == pytest.approx(1.959964 * math.sqrt(2) * 0.2, rel=1e-6)
    assert resolution([[1.0], [2.0]]) == resolution([[1.0, 2.0]]) == resolution([]) == 0.0


# --- the figures


def test_the_score_of_an_ensemble_is_that_of_its_parts() -> None:
    space = Space(("y", "x"), (16, 16), {}, "1/m")
    x, truth = Draws(0, range(19)).normal(0, (16, 16), "user") + 3, Draws(1, [0]).normal(0, (16, 16), "user")[0] + 3
    found = score(Ensemble(x, space), truth)
    mean = x.double().mean(0)
    error = float((mean - truth.double()).square().mean().sqrt())
    assert (
        found.psnr
        == found.quality
        == pytest.approx(20 * math.log10(float(truth.max() - truth.min()) / error), abs=1e-6)
    )
    assert found.ssim is not None and found.rmse is None and found.unit == "1/m"
    assert found.coverage == pytest.approx(0.9, abs=0.1)
    assert found.crps == pytest.approx(1 / math.sqrt(math.pi), rel=0.15)  # of N(0, 1) draws and truth
    # Far from the truth the error is all but linear in the mean, and the jackknife is sd / sqrt(draws) of its slope.
    far = score(Ensemble(x, space), truth - 30)
    gap = mean - (truth.double() - 30)
    slope = -20 / math.log(10) * gap / float(gap.square().sum())
    parts = ((x.double() - mean) * slope).flatten(1).sum(1)
    assert far.error == pytest.approx(float(parts.std() / math.sqrt(19)), rel=0.01)


def test_variables_in_units_of_their_own_are_scaled_by_the_truth() -> None:
    space = Space(("variable", "y", "x"), (2, 4, 5), {"variable": ("t", "u")}, "mixed")
    truth = Draws(1, [0]).normal(0, (2, 4, 5), "user")[0].double()
    x = truth + 0.3 * Draws(0, range(9)).normal(0, (2, 4, 5), "user").double()
    units = torch.tensor([1.0, 1e5], dtype=torch.float64)[:, None, None]
    plain, scaled = score(Ensemble(x, space), truth), score(Ensemble(x * units, space), truth * units)
    assert scaled.rmse == pytest.approx(plain.rmse) and scaled.crps == pytest.approx(plain.crps)
    error = (x.mean(0) - truth).square().mean((1, 2)).sqrt() / truth.flatten(1).std(1, correction=0)
    assert list(scaled.by_variable.values()) == pytest.approx(error.tolist())
    assert scaled.rmse == pytest.approx(float(error.square().mean().sqrt()))
    assert scaled.quality == pytest.approx(-20 * math.log10(scaled.rmse)) and scaled.psnr is None
    assert scaled.unit == "sd" and scaled.coverage is None  # nine draws have no 90 % interval
    assert score(Ensemble(x, space), truth, level_of(9)).coverage is not None
    half = torch.zeros(2, 4, 5, dtype=torch.bool)
    half[:, :2] = True
    inside = Ensemble(x[:, :, :2], Space(space.dims, (2, 2, 5), space.coords, "mixed"))
    level = level_of(9)
    off = torch.where(half, x, x + 5)  # what is not known is not looked at
    assert score(Ensemble(off, space), truth, level, known=half) == score(inside, truth[:, :2], level)


def test_a_complex_image_is_compared_by_its_magnitude() -> None:
    space = Space(("channel", "y", "x"), (2, 12, 12), {"channel": ("real", "imag")}, "1")
    truth = Draws(1, [0]).normal(0, (2, 12, 12), "user")[0]
    turned = torch.stack([-truth[1], truth[0]])  # another phase, the same magnitude
    near = Ensemble(turned.expand(3, 2, 12, 12) + 1e-4 * Draws(0, range(3)).normal(0, (2, 12, 12), "user"), space)
    found = score(near, truth)
    assert found.quality > 70 and found.ssim is not None and found.crps > 0.1


def test_weighted_draws_and_a_collapsed_ensemble() -> None:
    space = Space.vector(30)
    x, truth = Draws(0, range(5)).normal(0, (30,), "user"), torch.linspace(0, 1, 30)
    heavy = Ensemble(x, space, torch.tensor([0.0, 0.0, -torch.inf, -torch.inf, -torch.inf]))
    assert score(heavy, truth).quality == pytest.approx(score(Ensemble(x[:2], space), truth).quality)
    alone = score(Ensemble(x, space, torch.tensor([0.0] + [-1e4] * 4)), truth, level_of(5))
    assert (
        math.isnan(alone.crps) and math.isnan(alone.error) and alone.coverage is None and math.isfinite(alone.quality)
    )


def test_a_misfit_is_nothing_where_the_data_fit() -> None:
    fine = Figures(None, 1.02, "fits", 1.0, 0.1)
    assert misfit(fine) == 0.0
    assert misfit(dataclasses.replace(fine, chi2=4.0, fit="data not fitted")) == pytest.approx(math.log(4))
    assert misfit(dataclasses.replace(fine, chi2=0.25, fit="noise fitted")) == pytest.approx(math.log(4))
    assert misfit(dataclasses.replace(fine, chi2=math.nan, fit="undefined")) == math.inf


# --- the advice

TIES = Ties(level=0.9, better=0.3, cheaper=math.log(1.1))


def test_the_mean_that_is_nearly_the_best_and_faster_is_advised() -> None:
    rows = [row("slow", [31.0, 33.0], 8.0), row("quick", [30.9, 32.8], 1.0), row("poor", [25.0, 26.0], 0.1)]
    fast, _ = advise(rows, TIES, measured=False)
    assert (
        fast.label == "quick" and "slow with 8 steps, is 0.15 dB better" in fast.why and "8.0 times as long" in fast.why
    )
    clearly, _ = advise([rows[0], row("quick", [30.0, 32.0], 1.0)], TIES, measured=False)
    assert clearly.label == "slow" and "best mean" in clearly.why
    tied, _ = advise([row("a", [30.9], 1.0), row("b", [31.0], 1.05)], TIES, measured=False)
    assert tied.label == "b"  # as fast, so the better one


def test_the_spread_that_covers_is_advised_before_a_sharper_one() -> None:
    rows = [
        row("sharp", [31.0, 32.0], 1.0, crps=0.5, coverage=0.6),
        row("honest", [30.0, 31.0], 2.0, crps=0.7, coverage=0.88, claim="exact"),
        row("wide", [30.0, 31.0], 0.5, crps=0.9, coverage=0.92),
    ]
    _, spread = advise(rows, TIES, measured=False)
    assert spread.label == "honest" and "hold 88% of the truth" in spread.why and "claim: exact" in spread.why
    _, none = advise(rows[:1], TIES, measured=False)
    assert none.label == "sharp" and "too narrow by more than 5%, as are those of all others: recalibrate" in none.why
    _, alike = advise([rows[1], row("twin", [30.0, 31.0], 0.2, crps=0.7, coverage=0.9)], TIES, measured=False)
    assert alike.label == "twin" and "none of them is clearly faster" in alike.why
    blind = row("few", [30.0], 1.0)
    nothing = dataclasses.replace(
        blind,
        figures=tuple(dataclasses.replace(f, score=dataclasses.replace(f.score, coverage=None)) for f in blind.figures),
    )
    assert "ask for more draws" in advise([nothing], TIES, measured=False)[1].why


def test_without_a_truth_fit_and_agreement_decide() -> None:
    def blind(label: str, fit: str, seconds: float, again: tuple[float, ...], claim: str = "heuristic") -> Row:
        figures = (Figures(None, 1.0 if fit == "fits" else 3.0, fit, seconds, 0.1),)
        return Row(label, label, claim, 8, "measured", "", figures, (-misfit(figures[0]),), (0.0,), again)

    rows = [
        blind("off", "data not fitted", 0.1, (0.9,)),
        blind("quick", "fits", 0.5, (0.4, 0.5)),
        blind("plain", "fits", 1.0, (0.9, 0.88)),
        blind("exact", "fits", 2.0, (0.91, 0.89), "exact"),
    ]
    fast, spread = advise(rows, TIES, measured=True)
    assert fast.label == "quick" and "chi2 per datum 1 " in fast.why
    assert spread.label == "exact" and "the strongest of 2 that pass" in spread.why
    fast, spread = advise(rows[:1], TIES, measured=True)
    assert "no draws fit the data" in fast.why and spread.label is None
    assert all(advice.label is None for advice in advise([], TIES, measured=True))


def test_rows_that_did_not_run_take_no_part() -> None:
    lost = Row("lost", "lost", "exact", 8, "diverged", "not finite after step 3")
    found = judged([lost, row("a", [30.0, 31.0], 1.0), row("b", [10.0, 11.0], 2.0)], Ask(draws=20), False, ())
    assert [r.front for r in found.rows] == [False, True, False]
    text = table(found).splitlines()
    assert text[1].split()[:3] == ["lost", "8", "diverged:"] and text[1].endswith("not finite after step 3")
    assert text[2].startswith("*  a") and "30.50 +- 0.50" in text[2] and "90.0 %" in text[2]


# --- whole comparisons


def test_every_method_has_a_row_and_refusals_are_texts(workspace: Path) -> None:
    found = bench(workspace / "w.yaml", Ask(steps=(2,), draws=4, cases=2), SMALL, workspace)
    assert [r.method for r in found.rows] == ["mmps", *METHODS]
    assert found.rows[0].label == "mmps (file)" and found.rows[0].steps == 12
    status = {r.label: r.status for r in found.rows}
    assert status["mmps"] == status["diffpir"] == "measured"
    assert status["twistedsmc"] == "refused"
    for r in found.rows:
        assert (r.status == "measured") == bool(r.figures)
        assert r.why or r.status == "measured"
    twisted = next(r for r in found.rows if r.label == "twistedsmc")
    assert "TwistedSMC(twist=Matched()) works with one row per datum" in twisted.why
    assert any(r.front for r in found.rows)
    text = table(found)
    assert all(any(line.lstrip("* ").startswith(f"{name} ") for line in text.splitlines()) for name in METHODS)
    assert "1 case in place of 2: problem.index is 1; " in text and " has 1 slices" in text
    assert "4 draws have no 90 % intervals (19 do); their widest hold 60%" in text
    assert "for a fast mean: " in text and "for a calibrated spread: " in text
    measured = next(r for r in found.rows if r.label == "diffpir")
    assert measured.figures[0].calls["denoiser"] == 2
    values = json.loads(json.dumps(as_json(found), allow_nan=False))
    assert values["rows"][0]["figures"][0]["score"]["psnr"] == found.rows[0].quality[0]


def test_what_does_not_fit_the_budget_is_left_out_and_said(workspace: Path) -> None:
    ask = Ask(("diffpir", "ddnm"), (4, 10**5), draws=2, cases=1, seconds=10.0)
    found = bench(workspace / "w.yaml", ask, SMALL, workspace)
    assert [(r.label, r.steps, r.status) for r in found.rows] == [
        ("diffpir", 4, "measured"),
        ("diffpir", 10**5, "skipped"),
        ("ddnm", 4, found.rows[2].status),
        ("ddnm", 10**5, found.rows[3].status),
    ]
    assert "would take about" in found.rows[1].why and "of the budget are left" in found.rows[1].why


def test_a_run_past_its_deadline_stops_at_a_step(workspace: Path) -> None:
    from recon.errors import Stopped
    from recon.workflows.problem import prepare
    from recon.workflows.schema import load_workflow

    workflow = load_workflow(workspace / "w.yaml", SMALL, workspace)
    job = prepare(workflow)
    (case,), _ = module.cases(workflow, job, 1)
    with pytest.raises(Stopped, match="the budget was spent after step 1 of 6"):
        module.measure(case, METHODS["diffpir"](steps=6), 2, None, deadline=0.0)


def test_measured_data_are_judged_by_fit_and_agreement(workspace: Path, tmp_path: Path) -> None:
    from recon.workflows.problem import prepare
    from recon.workflows.schema import load_workflow

    job = prepare(load_workflow(workspace / "w.yaml", SMALL, workspace))
    dataclasses.replace(job.measurement, truth=None).save(tmp_path / "scan.nc")
    text = (workspace / "w.yaml").read_text().split("prior:")[1]
    (tmp_path / "m.yaml").write_text(f"problem: {{measurement: {tmp_path / 'scan.nc'}}}\nprior:{text}")
    ask = Ask(("diffpir", "ddnm"), (4,), draws=19, cases=2)
    found = bench(tmp_path / "m.yaml", ask, ["block=32"], workspace)
    assert found.measured and all(r.status == "measured" and len(r.again) == 2 for r in found.rows)
    assert all(r.figures[0].score is None and 0 < r.coverage <= 1 for r in found.rows)
    text = table(found)
    assert (
        "again in 90%" in text and "PSNR" not in text and "chi2/m" in text and "no truth: 'again' is how often" in text
    )


def test_exact_draws_agree_with_themselves() -> None:
    """On a Gaussian problem solved exactly, draws measured and inferred again are covered as often as the intervals say."""
    asked: list[float] = []
    from recon.likelihoods import GaussianLikelihood
    from recon.operators import MatrixOperator
    from recon.posterior import Posterior
    from recon.samplers import Sampler, State

    @dataclasses.dataclass(frozen=True)
    class Exact(Sampler):
        """Independent exact draws."""

        def init(self, posterior: Posterior, draws: Draws) -> State:
            law = posterior.exact()
            asked.append(float(posterior.likelihood.gaussian().sigma))
            assert isinstance(law, GaussianPrior)
            root = torch.linalg.cholesky(law.covariance().double())
            z = law.mean + draws.normal(0, (12,), "init").double() @ root.T
            return State(z, torch.zeros(len(draws), dtype=torch.float64))

        def step(self, posterior: Posterior, state: State, k: int, draws: Draws) -> State:
            return state

    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    prior = GaussianPrior(torch.zeros(12, dtype=torch.float64), torch.eye(12, dtype=torch.float64))
    likelihood = GaussianLikelihood(MatrixOperator(matrix), matrix @ torch.ones(12, dtype=torch.float64), 0.3)
    case = module.Case(Posterior(prior, likelihood), None, 3)
    race = module._Race([case], Ask(draws=39, cases=30), None, measured=True)
    _, ensemble = module.measure(case, Exact(steps=2), 39, None)
    found = race._again(case, Exact(steps=2), ensemble)
    # Components of a case depend on each other; over cases they do not, so the mean over 30 is within 5 standard errors.
    assert len(found) == 30
    assert asked == pytest.approx([0.3] + 30 * [0.3 / math.sqrt(2)])  # y and y' together are their mean, less noisy
    assert np.mean(found) == pytest.approx(0.9, abs=5 * np.std(found, ddof=1) / math.sqrt(30))


def test_what_a_method_finds_out_on_the_way_is_a_row() -> None:
    from recon.errors import Diverged
    from recon.likelihoods import GaussianLikelihood
    from recon.operators import MatrixOperator
    from recon.posterior import Posterior
    from recon.samplers import Sampler, State

    @dataclasses.dataclass(frozen=True)
    class Late(Sampler):
        """Fails in its first step."""

        error: type[Exception] = InputError

        def init(self, posterior: Posterior, draws: Draws) -> State:
            raise self.error("only now is it clear")

    prior = GaussianPrior(torch.zeros(2), torch.eye(2))
    case = module.Case(Posterior(prior, GaussianLikelihood(MatrixOperator(torch.eye(2)), torch.zeros(2), 0.3)), None, 3)
    race = module._Race([case], Ask(draws=4), None, measured=True)
    rows = race.run(
        [("a", "mmps", Late(2)), ("b", "mmps", Late(2, Diverged)), ("c", "mmps", InputError("no such steps"))]
    )
    assert [(r.status, r.why) for r in rows] == [
        ("refused", "only now is it clear"),
        ("diverged", "only now is it clear"),
        ("refused", "no such steps"),
    ]


def test_draws_that_grew_without_bound_are_no_result() -> None:
    from recon.likelihoods import GaussianLikelihood
    from recon.operators import MatrixOperator
    from recon.posterior import Posterior
    from recon.samplers import Sampler, State

    @dataclasses.dataclass(frozen=True)
    class Far(Sampler):
        """Draws at a distance."""

        size: float = 1.0

        def init(self, posterior: Posterior, draws: Draws) -> State:
            noise = draws.normal(0, (2,), "init")
            return State(noise + self.size, torch.zeros(len(draws), dtype=torch.float64))

        def step(self, posterior: Posterior, state: State, k: int, draws: Draws) -> State:
            return state

    prior = GaussianPrior(torch.zeros(2), torch.eye(2))
    likelihood = GaussianLikelihood(MatrixOperator(torch.eye(2)), torch.zeros(2), 0.3)
    case = module.Case(Posterior(prior, likelihood), torch.tensor([0.0, 1.0]), 3)
    race = module._Race([case], Ask(draws=4), None, measured=False)
    near, far = race.run([("near", "mmps", Far(2)), ("far", "mmps", Far(2, 100.0))])
    assert near.status == "measured" and near.quality[0] > -20
    assert far.status == "diverged" and "finite and far from anything: -40 dB" in far.why and not far.figures


# --- the command


def test_the_command_prints_the_table_and_writes_the_figures(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [
        "bench",
        str(workspace / "w.yaml"),
        "--workspace",
        str(workspace),
        "--method",
        "diffpir",
        "--steps",
        "3",
        "4",
    ]
    more = [
        "--draws",
        "2",
        "--cases",
        "1",
        "--json",
        str(tmp_path / "b.json"),
        *(x for s in SMALL for x in ("--set", s)),
    ]
    assert main([*line, *more]) == 0
    out = capsys.readouterr().out
    assert [text.split()[-8:][0] for text in out.splitlines()[1:3]] and "PSNR/dB" in out.splitlines()[0]
    written = json.loads((tmp_path / "b.json").read_text())
    assert [(r["label"], r["steps"]) for r in written["rows"]] == [("diffpir", 3), ("diffpir", 4)]
    assert written["environment"]["recon"] and written["ask"]["draws"] == 2


@pytest.mark.parametrize(
    ("ask", "text"),
    [
        ({"methods": ("mpms",)}, "there is no method mpms; there are mmps"),
        ({"draws": 1}, "2 or more draws"),
        ({"steps": (1,)}, "2 or more steps"),
        ({"seconds": 0.0}, "a positive number of seconds"),
    ],
)
def test_what_cannot_be_asked(ask: dict, text: str) -> None:
    with pytest.raises(InputError, match=text):
        Ask(**ask)


def test_every_method_has_a_number_of_steps() -> None:
    assert all(default_steps(name) >= 2 for name in METHODS)
    assert not set(module.STEPS) - set(METHODS)
