"""What a campaign found, and for what it holds: ``calibration.json``.

The findings of each population of truths stand under an identity: operator, noise, prior, sampler with all its
hyper-parameters, number of draws.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from recon.diagnostics import (
    Assessment,
    CaseRecord,
    Scope,
    Share,
    assess,
    check,
    covered,
    left_out,
    rank_histogram,
    recalibrate,
    record_from,
    scope_of,
    share,
)
from recon.diagnostics.conformal import Need
from recon.diagnostics.verdicts import FEWEST
from recon.errors import InputError
from recon.samplers.loop import describe
from recon.workflows.cases import MEAN, TILES, WHOLE, Campaign, Population
from recon.workflows.outliers import listed
from recon.workflows.prior_section import TRUTH
from recon.workflows.problem import Job
from recon.workflows.provenance import weights_sha256
from recon.workflows.schema import Workflow

SCHEMA, FILE = "recon.calibration/1", "calibration.json"
KEYS = ("about", "cases", "failed", "date", "spacing", "finding", "reason", "quantities", "assessment")
STD = "standard deviation"
QUIET = ("calibrated", "cannot say")
ALARM, CLOSE = 0.001, 0.1  # false-alarm rate of the spread-skill ratio, and how near 1 it has to be
NAMES = ("operator", "noise", "prior", "sampler", "draws")


def identity_of(workflow: Workflow, job: Job) -> dict[str, Any]:
    """What a calibration of this workflow holds for: nested JSON values under ``NAMES``.

    Definitions speak for operator and noise where there are such, the digest of their numbers for a measurement file.
    """
    problem, given = workflow.problem, scope_of(job.posterior, job.sampler, workflow.draws, "")
    operator: dict[str, Any] = {"scan": given.operator}
    noise: dict[str, Any] = {"likelihood": workflow.likelihood, "stated": given.noise}
    if problem.noise is not None:
        told = problem.operator.model_dump(mode="json", exclude={"name", "summary"}, exclude_none=True)  # type: ignore[union-attr]
        operator = {**told, "grid": job.operator.domain.describe()}
        noise = {"likelihood": workflow.likelihood, **problem.noise.model_dump(exclude_none=True)}
    sampler = describe(job.sampler)
    value = {
        "operator": operator,
        "noise": noise,
        "prior": _prior(workflow, job, given.prior.rsplit(" ", 1)[-1]),
        "sampler": {"method": sampler["method"], **sampler["fields"]},
        "draws": workflow.draws,
        **({"antithetic": True} if workflow.antithetic else {}),
    }
    return dict(json.loads(json.dumps(value, default=str)))


def _prior(workflow: Workflow, job: Job, digest: str) -> dict[str, Any]:
    """Its weights and what it is told; ``digest`` speaks for a closed form.  What the truth tells it differs by the case."""
    asked, weights = workflow.prior, job.prior.card.facts.get("weights")
    told = (
        {} if isinstance(asked, str) else asked.model_dump(mode="json", exclude={"name", "sum"}, exclude_defaults=True)
    )
    sha256 = weights_sha256(job) or digest
    if TRUTH in (told.get("given") or {}).values() and isinstance(weights, Mapping):
        sha256 = str(weights["sha256"])
    return {"name": job.prior.card.name, "sha256": sha256, **told}


def changes(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """In words, where ``ours`` is another identity than ``theirs``, that of a campaign."""
    found: list[str] = []
    for part in {**theirs, **ours}:
        then, now = _flat(theirs.get(part), part), _flat(ours.get(part), part)
        kind = next((name for name in (f"{part}.method", f"{part}.type") if then.get(name) != now.get(name)), None)
        # Another kind of thing has other parameters: those are not told one by one.
        names = [kind] if kind else [name for name in {**then, **now} if then.get(name) != now.get(name)]
        found += [f"{name} is {_told(now, name)}, in the campaign {_told(then, name)}" for name in names]
    return found


def _flat(value: Any, above: str = "") -> dict[str, Any]:  # noqa: ANN401  (JSON)
    if not isinstance(value, Mapping):
        return {above: value}
    return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{above}.{key}".strip(".")).items()}


def _told(values: Mapping[str, Any], name: str) -> str:
    return json.dumps(values[name]) if name in values else "not there"


def scope_text(identity: Mapping[str, Any]) -> dict[str, str]:
    """An identity as one line of text per name."""
    lines = {}
    for name in NAMES:
        flat = _flat(identity[name])
        lines[name] = ", ".join(f"{k} {v}" if k else str(v) for k, v in flat.items() if v is not None)
    return lines


def findings(
    campaign: Campaign, population: Population, contents: Sequence[Mapping[str, Any]], identity: Mapping[str, Any]
) -> dict[str, Any]:
    """What the cases of one population show, JSON values.

    contents: of their files, fresh ones last.  Keys: about, cases, failed, date, spacing, finding, reason, quantities,
    assessment, histograms, recalibrations; the last three are null or empty where no case can be judged.  fresh: null, or
    what the fresh cases show of the coverage that the others state; nothing else but ``listed``, all cases with the
    outliers first, depends on them.
    """
    every, contents, fresh = contents, contents[: population.cases], contents[population.cases :]
    records = [record_from(content["record"]) for content in contents]
    spacings = [content["spacing"] for content in contents if content["spacing"] is not None]
    value: dict[str, Any] = {
        "about": population.about,
        "figures": _by_case(records),
        "date": max(content["day"] for content in contents),
        "spacing": [min(spacings), max(spacings)] if spacings else None,
        "failed": sum(bool(record.failed) for record in records),
        "level": campaign.level,
        "fresh": None,
        "listed": listed(every, population.cases),
    }
    try:
        assessment = assess(records)
    except InputError as error:
        empty: dict[str, Any] = {"assessment": None, "histograms": {}, "recalibrations": {}, "quantities": {}}
        return {**value, **empty, "cases": 0, "finding": "cannot say", "reason": str(error)}
    usable = [record for record in records if not record.failed]
    least = int(min(record.ess for record in usable))
    scope = Scope(**_scope_strings(identity), draws=campaign.draws, population=population.about)
    word, reason, std = assessment.finding, assessment.reason, _std(assessment)
    if word in QUIET and std["finding"] not in QUIET:
        word, reason = std["finding"], f"{STD}: {std['reason']}"
    judged = [c for c in contents if c["needs"]]
    stretches = _recalibrations(judged, scope, campaign.level, value["date"])
    stated = {name: _stated(_needs_of(judged, name), campaign.level) for name in stretches}
    return {
        **value,
        "fresh": _checks(fresh, stated, stretches, campaign.level),
        "cases": assessment.cases,
        "finding": word,
        "reason": reason,
        "assessment": assessment.summary(),
        "histograms": {
            name: rank_histogram([record.ranks[name] for record in usable], least).summary() for name in usable[0].ranks
        },
        "recalibrations": stretches,
        "quantities": _quantities(assessment, stretches, campaign.level, stated),
    }


def _by_case(records: Sequence[CaseRecord]) -> dict[str, list[float]]:
    """Figures of the cases that can be judged, one number each."""
    usable = [record for record in records if not record.failed]
    return {name: [getattr(record, name) for record in usable] for name in ("case", "ess", "spread", "error", "crps")}


def _scope_strings(identity: Mapping[str, Any]) -> dict[str, str]:
    return {name: json.dumps(identity[name], sort_keys=True) for name in NAMES if name != "draws"}


def _recalibrations(
    contents: Sequence[Mapping[str, Any]], scope: Scope, level: float, day: str
) -> dict[str, dict[str, Any]]:
    """Name of an interval -> what ``recalibrate`` promises on average over values and cases; estimate: its best guess."""
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(name for content in contents for name in content["needs"]):
        lists = [content["needs"][name] for content in contents if name in content["needs"]]
        missing = [text for text in lists if isinstance(text, str)]
        needs = [Need(np.array(values)) for values in lists if not isinstance(values, str)]
        if not needs:
            found[name] = {"stretch": None, "estimate": None, "reason": missing[0]}
            continue
        made = recalibrate(needs, scope, level, guarantee="average", day=date.fromisoformat(day)).summary()
        if missing or not math.isfinite(made["stretch"] or 0.0):
            why = missing[0] if missing else "no stretch covers enough of the cases"
            made |= {"stretch": None, "reason": f"{len(missing)} cases have no intervals: {why}" if missing else why}
        guess = recalibrate(needs, scope, level, guarantee="estimate", day=date.fromisoformat(day)).stretch
        found[name] = {**made, "estimate": guess if made["stretch"] is not None or not missing else None}
    return found


def _needs_of(contents: Sequence[Mapping[str, Any]], name: str) -> list[Need]:
    """Of the cases that have such intervals."""
    lists = [content["needs"].get(name) for content in contents]
    return [Need(np.array(values)) for values in lists if values is not None and not isinstance(values, str)]


def _stated(needs: Sequence[Need], level: float) -> dict[str, Share]:
    """What cases say of intervals: as they are, and stretched by either rule (each case by what the others choose)."""
    return {
        "raw": share(covered(needs)),
        "stretched": share(left_out(needs, level)),
        "estimated": share(left_out(needs, level, "estimate")),
    }


def _checks(
    fresh: Sequence[Mapping[str, Any]],
    stated: Mapping[str, Mapping[str, Share]],
    stretches: Mapping[str, Mapping[str, Any]],
    level: float,
) -> dict[str, Any] | None:
    """Title of an interval -> kind (see ``_stated``): stated, shown, decision; and the number of fresh cases."""
    if not fresh:
        return None
    found = {}
    for name, made in stretches.items():
        seen = _needs_of(fresh, name)
        shown = {"raw": share(covered(seen))}
        for kind, stretch in (("stretched", made["stretch"]), ("estimated", made["estimate"])):
            if stretch is not None:
                shown[kind] = share(covered(seen, stretch))
        found[title(name, level)] = {kind: check(stated[name][kind], one).summary() for kind, one in shown.items()}
    failed = sum(bool(content["record"]["failed"]) for content in fresh)
    return {"cases": len(fresh) - failed, "failed": failed, "intervals": found}


def title(name: str, level: float) -> str:
    """The name of an interval as a report shows it."""
    if name == TILES:
        return f"{100 * level:g} % interval of the mean of each tile"
    mean = name.startswith(MEAN)
    region = name.removeprefix(MEAN)
    what = "the mean" if mean else "each pixel"
    return f"{100 * level:g} % interval of {what}" + ("" if region == WHOLE else f" of {region}")


def _quantities(
    assessment: Assessment,
    stretches: Mapping[str, Mapping[str, Any]],
    level: float,
    stated: Mapping[str, Mapping[str, Share]],
) -> dict[str, dict[str, Any]]:
    """Name of a quantity -> {finding, reason, figures, factor (None without one), interval}.

    Of intervals also estimate, the best guess of the factor, and the coverage that cases state after either: stretched,
    estimated.
    """
    found: dict[str, dict[str, Any]] = {STD: _std(assessment)}
    for name, stretch in stretches.items():
        part = (assessment.coverage or {}).get(name)
        one: dict[str, Any] = {"finding": "cannot say", "reason": str(stretch["reason"]), "figures": {}}
        if part is not None:
            figures = {"coverage": part.inside, "error": part.error if math.isfinite(part.error) else None}
            one = {"finding": part.finding, "reason": part.verdict.reason, "figures": figures}
        after = None if stretch["stretch"] is None else stated[name]["stretched"].summary()
        best = None if stretch["estimate"] is None else stated[name]["estimated"].summary()
        found[title(name, level)] = {
            **one,
            "factor": stretch["stretch"],
            "stretched": after,
            "estimate": stretch["estimate"],
            "estimated": best,
            "interval": True,
        }
    for name, verdict in assessment.ranks.items():
        if name != "overall":
            told = verdict.summary()
            one = {key: told[key] for key in ("finding", "reason", "figures")}
            found[f"rank of {name}"] = {**one, "factor": None, "interval": False}
    return found


def _std(assessment: Assessment) -> dict[str, Any]:
    """The draws' standard deviation, by the spread-skill ratio and its jackknife error (Student's t, nearly).

    Outlying draws that ranks and intervals hardly notice stand out here.
    """
    from scipy.stats import t

    ratio, error, n = assessment.skill, assessment.skill_error, assessment.cases
    word, reason = "cannot say", f"spread is {ratio:.3g} of the error, over {n} cases"
    one: dict[str, Any] = {"figures": {"ratio": ratio, "error": None}, "factor": None, "interval": False}
    if n < FEWEST or not math.isfinite(error):
        return {**one, "finding": word, "reason": f"{reason}: too few"}
    limit = float(t.isf(ALARM / 2, n - 1)) * error
    if abs(ratio - 1) > limit:
        word = "over-dispersed" if ratio > 1 else "under-dispersed"
    elif abs(ratio - 1) + limit <= CLOSE:
        word = "calibrated"
    one["figures"]["error"] = error
    return {**one, "finding": word, "reason": f"{reason}, known to {limit:.2g}"}


def read_calibration(path: Path) -> dict[str, Any]:
    """What stands in a ``calibration.json``.  Raises InputError when it is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        parts = [set(part) for part in value["populations"].values()]
        if value["schema"] != SCHEMA or not set(NAMES) <= set(value["identity"]) or not parts:
            raise ValueError(f"it does not follow {SCHEMA}")
        if not all(set(KEYS) <= part for part in parts):
            raise ValueError(f"a population lacks one of {', '.join(KEYS)}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} holds no calibration that can be read: {error}") from error
    return dict(value)
