"""One case in numbers, and many cases in words: what a calibration computes on its nodes and gathers.

``case_record`` turns the draws and the truth of one problem into a few plain numbers; records go through JSON, so cases
may be computed anywhere, in any order; ``assess`` judges them together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from recon.diagnostics.given import Array, draws_of, effective, truth_of, weights_of
from recon.diagnostics.intervals import Coverage, Hit, case_coverage, coverage_over_cases, draws_needed
from recon.diagnostics.ranks import Probe, case_ranks, probes
from recon.diagnostics.scores import energy_score, fair_crps, spread_and_error, spread_skill_over_cases
from recon.diagnostics.verdicts import FALSE_ALARM, Verdict, judge_all
from recon.errors import InputError


@dataclass(frozen=True)
class Ask:
    """What is asked of every case; the same for all that are assessed together.

    level: of the intervals.  regions: name -> mask of *space.  functions: test functions for ranks (default ``probes``).
    seed: of the numbers that break ties.
    """

    level: float = 0.9
    regions: Mapping[str, Array] = field(default_factory=dict)
    functions: Mapping[str, Probe] | None = None
    seed: int = 0


@dataclass(frozen=True)
class CaseRecord:
    """One case in plain numbers; made by ``case_record``.

    case: its number.  ess: effective draws.  ranks: test function -> randomised rank.  hits: region -> coverage, None
    without intervals.  spread, error: mean variance (corrected for M) and squared error of the mean, data units
    squared.  crps: mean fair CRPS.  energy: fair energy score.  failed: why the case gave no numbers; such cases are
    counted, not judged.
    """

    case: int
    ess: float
    level: float
    ranks: Mapping[str, float]
    hits: Mapping[str, Hit] | None
    spread: float
    error: float
    crps: float
    energy: float
    failed: str = ""

    def summary(self) -> dict[str, Any]:
        """JSON values; ``record_from`` reads them back."""
        values = asdict(self)
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def record_from(summary: Mapping[str, Any]) -> CaseRecord:
    """What ``CaseRecord.summary`` wrote.  Raises InputError for anything else."""
    try:
        values: dict[str, Any] = {k: math.nan if v is None and k != "hits" else v for k, v in summary.items()}
        if values["hits"] is not None:
            values["hits"] = {name: Hit(**hit) for name, hit in values["hits"].items()}
        return CaseRecord(**values)
    except (TypeError, KeyError, AttributeError) as error:
        raise InputError(f"this is not a stored case: {error}") from error


def case_record(
    x: Array, truth: Array, ask: Ask | None = None, log_weights: Array | None = None, case: int = 0
) -> CaseRecord:
    """The numbers of one case.

    x: (draw, *space).  truth: *space.  case: its number, different for every case (ties are broken by it).  Draws that are
    no numbers, a collapsed ensemble or a single draw give a record that says so in ``failed``: a sampler that breaks
    down on some cases must not stop the others, nor look calibrated by leaving them out.
    Raises InputError without a truth, or for shapes that do not fit: those are mistakes of the caller.
    """
    ask = ask or Ask()
    raw = torch.as_tensor(x).detach().cpu()
    if raw.ndim < 1:
        raise InputError(f"draws are (draw, *space); got {tuple(raw.shape)}")
    w = weights_of(log_weights, len(raw))
    truth = truth_of(truth, raw)
    why = _unusable(raw, effective(w))
    if why:
        nan = math.nan
        return CaseRecord(case, effective(w), ask.level, {}, None, nan, nan, nan, nan, why)
    rows = draws_of(raw)
    functions = ask.functions if ask.functions is not None else probes(tuple(rows.shape[1:]))
    spread, error = spread_and_error(rows, truth, log_weights)
    return CaseRecord(
        case=case,
        ess=effective(w),
        level=ask.level,
        ranks=case_ranks(rows, truth, functions, log_weights, ask.seed, case),
        hits=case_coverage(rows, truth, ask.level, ask.regions, log_weights),
        spread=spread,
        error=error,
        crps=float(fair_crps(rows, truth, log_weights).mean()),
        energy=energy_score(rows, truth, log_weights),
    )


def _unusable(x: torch.Tensor, ess: float) -> str:
    bad = ~torch.isfinite(x.reshape(len(x), -1)).all(1)
    if bool(bad.any()):
        return f"{int(bad.sum())} of {len(x)} draws hold values that are NaN or infinite"
    if ess < 1 + 1e-9:
        return "one draw only"
    if bool((x == x[:1]).all()):
        return "the ensemble has collapsed: all draws are the same"
    return ""


@dataclass(frozen=True)
class Assessment:
    """What many cases show together.

    cases, failed: how many were judged, and how many gave no numbers (with the first reasons).  ranks: test function ->
    Verdict, and "overall".  coverage: region -> Coverage; None where no case has intervals.  skill, skill_error:
    spread-skill ratio. crps, crps_error: mean over cases.  finding, reason: the strongest of all findings; "cannot say"
    if any case failed and nothing else was found, since what failed was not drawn at random.
    """

    cases: int
    failed: int
    failures: tuple[str, ...]
    ranks: Mapping[str, Verdict]
    coverage: Mapping[str, Coverage] | None
    skill: float
    skill_error: float
    crps: float
    crps_error: float
    finding: str
    reason: str

    def summary(self) -> dict[str, Any]:
        """JSON values; NaN becomes None."""
        names = ("cases", "failed", "skill", "skill_error", "crps", "crps_error", "finding", "reason")
        plain = {n: getattr(self, n) for n in names}
        return {
            **{k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in plain.items()},
            "failures": list(self.failures),
            "ranks": {name: v.summary() for name, v in self.ranks.items()},
            "coverage": None if self.coverage is None else {n: c.summary() for n, c in self.coverage.items()},
        }


def assess(records: Sequence[CaseRecord], false_alarm: float = FALSE_ALARM) -> Assessment:
    """Judge cases together; half of the false-alarm rate goes to the ranks, half to the coverage.

    records: of different cases, all asked the same.  Raises InputError for none that can be judged, a case that comes
    twice, or cases that were asked different things.
    """
    usable = sorted((r for r in records if not r.failed), key=lambda r: r.case)
    failures = [f"case {r.case}: {r.failed}" for r in records if r.failed]
    if not usable:
        raise InputError(f"no case can be judged: {'; '.join(failures[:3]) or 'there is none'}")
    if len({r.case for r in records}) < len(records):
        raise InputError("a case comes twice; each counts once")
    if len({(r.level, tuple(r.ranks)) for r in usable}) > 1:
        raise InputError("the cases were asked different things: one level and one set of test functions")
    least = min(r.ess for r in usable)
    ranks = judge_all({name: [r.ranks[name] for r in usable] for name in usable[0].ranks}, least, false_alarm / 2)
    level, coverage = usable[0].level, None
    if any(r.hits is not None for r in usable):
        coverage = coverage_over_cases([r.hits for r in usable], level, false_alarm / 2)
    skill, skill_error = spread_skill_over_cases([r.spread for r in usable], [r.error for r in usable])
    crps = np.array([r.crps for r in usable])
    finding, reason = _strongest(ranks, coverage, len(failures))
    if coverage is None:
        reason += f"; no {level:.0%} intervals: they need {draws_needed(level)} effective draws"
    return Assessment(
        len(usable),
        len(failures),
        tuple(failures[:3]),
        ranks,
        coverage,
        skill,
        skill_error,
        float(crps.mean()),
        float(crps.std(ddof=1) / math.sqrt(len(crps))) if len(crps) > 1 else math.nan,
        finding,
        reason,
    )


def _strongest(ranks: Mapping[str, Verdict], coverage: Mapping[str, Coverage] | None, failed: int) -> tuple[str, str]:
    covered = {f"coverage of {n}": c.verdict for n, c in (coverage or {}).items()}
    loud = [v for v in (ranks["overall"], *covered.values()) if v.strength > 0]
    if loud:
        # Ranks speak first: they tell a bias from a lack of spread, coverage only notices.
        worst = ranks["overall"] if ranks["overall"].strength > 0 else max(loud, key=lambda v: v.strength)
        return worst.finding, worst.reason
    if failed:
        return "cannot say", f"{failed} cases failed, and those that did not are no fair sample"
    return ranks["overall"].finding, ranks["overall"].reason
