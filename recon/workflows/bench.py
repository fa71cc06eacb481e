"""Samplers side by side on a user's own problem: how good, how honest, how fast; `recon bench`.

Every method runs on the same cases with its own defaults and a number of steps.  With simulated data a case is an image of the
data set and its own noise, and the draws are scored against the truth.  With measured data there is no truth: the draws are
scored by how they fit the data, and by whether the method agrees with itself.  For that a draw ``x'`` of the ensemble is
measured again, ``y' ~ p(y | x')``, and inferred from ``y`` and ``y'`` together: ``x'`` and the new draws are exchangeable, so
their intervals cover ``x'`` as often as they say (``recon.diagnostics.consistency``).
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from recon.comm import serial
from recon.diagnostics.consistency import measured_again
from recon.diagnostics.fit import data_fit
from recon.draws import Draws, blocks
from recon.ensemble import Ensemble
from recon.errors import Diverged, InputError, Stopped
from recon.posterior import Posterior
from recon.samplers import METHODS, Sampler, State, sample
from recon.samplers.loop import block_threads, default_block
from recon.workflows.advice import Advice, Ties, advise
from recon.workflows.memory import PeakMemory
from recon.workflows.pareto import front, resolution
from recon.workflows.problem import Job, prepare
from recon.workflows.schema import Workflow, load_workflow
from recon.workflows.scorecard import Figures, Row, level_of, mean, score

log = logging.getLogger("recon.bench")

DRAWS, CASES = 20, 3
STEPS = {
    "mmps": 32, "pigdm": 64, "tmpd": 64, "sda": 128, "dps": 256, "diffpir": 64, "ddnm": 64, "ddrm": 20, "flowchef": 64,
    "daps": 32, "pnpdm": 16, "reddiff": 256, "langevin": 32, "twistedsmc": 64, "mcgdiff": 64, "afdps": 64, "fksteering": 64,
    "latentdps": 256, "resample": 96, "diffusionmbir": 96, "dds": 48, "fps": 64, "ddsmc": 64, "localisedsmc": 32,
}  # fmt: skip
"""Steps of a method when nobody says, so that draws cost about as much; others take their own default, at most 100."""
LOST = -20.0  # dB: a mean ten times further off than the truth is wide; its draws grew without bound but stayed finite
TIMING = math.log(1.1)  # times of the same work differ by so much from one run to the next


@dataclass(frozen=True)
class Ask:
    """What to measure.

    methods: names in METHODS; none for all, and the workflow's own sampler as the file sets it.  steps: tried for each;
    none for ``default_steps``.  draws: per case.  cases: images of the data set, or draws that are inferred again.
    seconds: budget of all sampling.  Raises InputError for an unknown method or numbers that mean nothing.
    """

    methods: tuple[str, ...] = ()
    steps: tuple[int, ...] = ()
    draws: int = DRAWS
    cases: int = CASES
    seconds: float | None = None

    def __post_init__(self) -> None:
        unknown = [name for name in self.methods if name not in METHODS]
        if unknown:
            raise InputError(f"there is no method {', '.join(unknown)}; there are {', '.join(METHODS)}")
        if self.draws < 2 or self.cases < 1 or any(n < 2 for n in self.steps):
            raise InputError(
                f"a comparison takes 2 or more draws, 1 or more cases and 2 or more steps; got {self.draws} draws, "
                f"{self.cases} cases, steps {list(self.steps) or 'of each method'}"
            )
        if self.seconds is not None and not self.seconds > 0:
            raise InputError(f"the budget is a positive number of seconds; got {self.seconds}")


@dataclass(frozen=True)
class Case:
    """One problem: what is asked, what is true (None for measured data), the seed of the draws, where the truth is known."""

    posterior: Posterior
    truth: Tensor | None
    seed: int
    known: Tensor | None = None


@dataclass(frozen=True)
class Bench:
    """What came out.

    rows: in the order asked.  level: of the intervals.  measured: whether there was no truth.  better, cheaper: differences of
    quality (dB, or of the misfit) and of log seconds up to which rows are ties.  advice: which to take for what.
    """

    rows: tuple[Row, ...]
    ask: Ask
    level: float
    measured: bool
    better: float
    cheaper: float
    advice: tuple[Advice, ...]
    notes: tuple[str, ...]


def bench(
    path: str | Path, ask: Ask | None = None, overrides: Sequence[str] = (), workspace: str | Path | None = None
) -> Bench:
    """Compare samplers on the workflow in a file.

    A method that refuses the problem, diverges, or does not fit into the budget has a row that says so.  Raises InputError
    for a file that does not fit.
    """
    ask = ask or Ask()
    workflow = load_workflow(path, overrides, workspace)
    job = prepare(workflow)
    found, notes = cases(workflow, job, ask.cases)
    entries = [(name, cls) for name, cls in METHODS.items() if name in (ask.methods or METHODS)]
    asked = [
        (name, name, _made(cls, steps)) for name, cls in entries for steps in (ask.steps or (default_steps(name),))
    ]
    if not ask.methods:
        own = type(job.sampler).__name__.lower()
        asked.insert(0, (f"{own} (file)", own, job.sampler))
    rows = _Race(found, ask, workflow.block, job.measurement.truth is None).run(asked)
    notes = [*notes, *job.warnings, f"computed with {serial().workers} thread(s)"]
    return judged(rows, ask, job.measurement.truth is None, tuple(notes))


def default_steps(name: str) -> int:
    """Steps of a method for a comparison: see ``STEPS``."""
    return STEPS.get(name) or min(100, METHODS[name]().steps)


def cases(workflow: Workflow, job: Job, count: int) -> tuple[list[Case], list[str]]:
    """Up to ``count`` cases of a workflow, and what to say about them.

    Simulated: the images from ``problem.index`` on, each with noise of its own, all with one prior.  Measured: the one there
    is.
    """
    truth = job.measurement.truth
    if truth is None or workflow.problem.measurement is not None:
        return [Case(job.posterior, truth, workflow.seed)], []
    made = [Case(job.posterior, truth, workflow.seed)]
    for k in range(1, count):
        problem = workflow.problem.model_copy(update={"index": workflow.problem.index + k})
        try:
            other = prepare(workflow.model_copy(update={"problem": problem, "seed": workflow.seed + k}))
        except InputError as error:
            return made, [f"{len(made)} case{'s' if len(made) > 1 else ''} in place of {count}: {error}"]
        made.append(Case(Posterior(job.prior, other.posterior.likelihood), other.measurement.truth, workflow.seed + k))
    return made, []


def judged(rows: Sequence[Row], ask: Ask, measured: bool, notes: tuple[str, ...]) -> Bench:
    """Rows with their front, ties and advice."""
    ran = [row for row in rows if row.status == "measured"]
    better = resolution([row.quality for row in ran], [mean(list(row.errors)) for row in ran])
    times = [[math.log(f.seconds) for f in row.figures] for row in ran]
    cheaper = max(TIMING, resolution(times))
    points = [(mean(list(row.quality)), mean(logs)) for row, logs in zip(ran, times, strict=True)]
    best = dict(zip((id(row) for row in ran), front(points, better, cheaper), strict=True))
    marked = tuple(dataclasses.replace(row, front=best.get(id(row), False)) for row in rows)
    level = level_of(ask.draws)
    advice = advise([row for row in marked if row.status == "measured"], Ties(level, better, cheaper), measured)
    return Bench(marked, ask, level, measured, better, cheaper, advice, notes)


def measure(
    case: Case, sampler: Sampler, draws: int, block: int | None, deadline: float = math.inf
) -> tuple[Figures, Ensemble]:
    """The figures of one sampler on one case.  Raises as ``sample`` does, and Stopped past the deadline (monotonic seconds)."""
    memory = PeakMemory(case.posterior.prior.device)
    ensemble = sample(case.posterior, sampler, draws, case.seed, block, run=_Deadline(deadline))
    peak = memory.gib()
    cost = ensemble.info["cost"]
    fit = data_fit(case.posterior.likelihood, ensemble)
    found = None if case.truth is None else score(ensemble, case.truth, level_of(draws), case.known)
    calls = {name: cost[name] / draws for name in ("denoiser", "vjp", "forward", "adjoint")}
    return Figures(found, fit.ratio, fit.verdict, cost["seconds"] / draws, peak, calls), ensemble


def _made(cls: type[Sampler], steps: int) -> Sampler | InputError:
    try:
        return cls(steps=steps)
    except InputError as error:
        return error


class _Deadline:
    """Stops a run that takes longer than it may."""

    def __init__(self, at: float) -> None:
        self.at = at

    def restore(self, owned: range) -> tuple[int, dict[int, State]] | None:
        return None

    def after_step(self, done: int, steps: int, states: dict[int, State]) -> None:
        if done < steps and time.monotonic() > self.at:
            raise Stopped(f"the budget was spent after step {done} of {steps}")


class _Race:
    """Runs samplers one after the other, within a budget the cheapest first."""

    def __init__(self, found: Sequence[Case], ask: Ask, block: int | None, measured: bool) -> None:
        self.cases, self.ask, self.block, self.measured = found, ask, block, measured
        self.end = math.inf if ask.seconds is None else time.monotonic() + ask.seconds

    def run(self, asked: Sequence[tuple[str, str, Sampler | InputError]]) -> list[Row]:
        """One row per sampler, in the order given."""
        rows: dict[int, Row] = {}
        waiting: list[tuple[float, int, Sampler]] = []
        for i, (label, method, sampler) in enumerate(asked):
            try:
                if isinstance(sampler, InputError):
                    raise sampler
                for case in self.cases:
                    sampler.check(case.posterior)
                cost = 0.0 if math.isinf(self.end) else self._estimate(sampler)
            except InputError as error:
                steps = 0 if isinstance(sampler, InputError) else sampler.steps
                rows[i] = Row(label, method, METHODS[method].claim, steps, "refused", str(error))
                continue
            waiting.append((cost, i, sampler))
        for cost, i, sampler in sorted(waiting, key=lambda entry: entry[0]):
            label, method, _ = asked[i]
            log.info("%s, %d steps", label, sampler.steps)
            rows[i] = self._row(Row(label, method, sampler.claim, sampler.steps, "skipped"), sampler, cost)
        return [rows[i] for i in range(len(asked))]

    def _row(self, row: Row, sampler: Sampler, cost: float) -> Row:
        left = self.end - time.monotonic()
        if cost > left:
            told = f"would take about {cost:.0f} s, and {max(0.0, left):.0f} s of the budget are left"
            return dataclasses.replace(row, why=told)
        try:
            return self._measured(row, sampler)
        except InputError as error:  # what a method finds out on the way
            return dataclasses.replace(row, status="refused", why=str(error))
        except Diverged as error:
            return dataclasses.replace(row, status="diverged", why=str(error))
        except Stopped as error:
            return dataclasses.replace(row, why=str(error))

    def _measured(self, row: Row, sampler: Sampler) -> Row:
        figures: list[Figures] = []
        again: list[float] = []
        for case in self.cases:
            found, ensemble = measure(case, sampler, self.ask.draws, self.block, self.end)
            figures.append(found)
            if self.measured:
                again = self._again(case, sampler, ensemble)
        scores = [f.score for f in figures if f.score is not None]
        quality = tuple(s.quality for s in scores) or tuple(-misfit(f) for f in figures)
        errors = tuple(s.error for s in scores) or (0.0,) * len(figures)
        if not all(math.isfinite(q) for q in quality):
            return dataclasses.replace(
                row, status="diverged", why="its mean is the truth to the last bit, or no number"
            )
        if scores and min(quality) < LOST:
            why = f"its draws are finite and far from anything: {min(quality):.0f} dB; what may help: {sampler.advice}"
            return dataclasses.replace(row, status="diverged", why=why)
        return dataclasses.replace(
            row, status="measured", figures=tuple(figures), quality=quality, errors=errors, again=tuple(again)
        )

    def _again(self, case: Case, sampler: Sampler, ensemble: Ensemble) -> list[float]:
        """Coverage of draws of ``ensemble`` that were measured and inferred again."""
        starts = ensemble.resample(min(self.ask.cases, len(ensemble)), case.seed).x
        found = []
        for k, start in enumerate(starts):
            likelihood = measured_again(case.posterior.likelihood, start, case.seed, k + 1)
            both = Case(Posterior(case.posterior.prior, likelihood), start, (case.seed + 1) * 2**20 + k)
            score_of, _ = measure(both, sampler, self.ask.draws, self.block, self.end)
            assert score_of.score is not None  # it has a truth
            if score_of.score.coverage is not None:
                found.append(score_of.score.coverage)
        return found

    def _estimate(self, sampler: Sampler) -> float:
        """Seconds for all cases, from the start and the first step of one block."""
        posterior, draws = self.cases[0].posterior, self.ask.draws
        pieces = blocks(draws, self.block or default_block(posterior))
        comm, keyed = serial(), Draws(self.cases[0].seed, pieces[0])
        with block_threads(1) as each:

            def timed(_: int, __: object) -> tuple[float, float]:
                start = time.perf_counter()
                state = sampler.init(posterior, keyed)
                middle = time.perf_counter()
                sampler.step(posterior, state, 0, keyed)
                return middle - start, time.perf_counter() - middle

            begin, step = each(timed, {0: None})[0]
        rounds = math.ceil(len(pieces) / comm.workers)
        runs = len(self.cases) + (self.ask.cases if self.measured else 0)
        return float(runs * rounds * (begin + sampler.steps * step))


def misfit(figures: Figures) -> float:
    """How far chi2 per datum is from what the noise explains: 0 where it fits, else ``|log chi2/m|``."""
    if figures.fit == "fits":
        return 0.0
    return abs(math.log(figures.chi2)) if figures.chi2 > 0 and math.isfinite(figures.chi2) else math.inf
