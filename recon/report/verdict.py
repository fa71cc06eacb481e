"""The verdict box: what may be concluded, in plain words, from the numbers of a report.

Each statement has a level: ``good``, ``look`` (something to act on), ``bad`` (do not use as it is) or ``open`` (nobody has
checked).  Words are chosen here and nowhere else, so that a page and its ``report.json`` cannot disagree.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from recon.diagnostics.intervals import ANCESTORS
from recon.diagnostics.weights import LIMIT
from recon.plot.canvas import printed

UNKNOWN = "unit not recorded"
Level = Literal["good", "look", "bad", "open"]
CLAIMS = {
    "exact": "exact: its draws have the posterior's law, up to the time grid and the prior's own error",
    "consistent": "consistent: its draws approach the posterior as particles or steps grow in number, and are biased before",
    "heuristic": "heuristic: its draws look plausible but their spread is not that of the posterior; use it as an indication",
}


@dataclass(frozen=True)
class Statement:
    """One line of the verdict: how serious, about what, and the sentence."""

    level: Level
    about: str
    text: str


def verdict(numbers: Mapping[str, Any]) -> list[Statement]:
    """Statements about data fit, residual, calibration, sampler, particles, weights, draws, truth, warnings, in this order."""
    facts = numbers["facts"]
    lines = [_fit(numbers["fit"])]
    lines += _whiteness(numbers)
    lines += [_calibration(facts), _claim(facts)]
    lines += _particles(numbers["draws"]) + _weights(numbers["draws"])
    lines += _draws(numbers)
    lines += _against_truth(numbers)
    return lines + [Statement("look", "Warning", str(text)) for text in facts.get("warnings") or []]


def number(value: float | None, digits: int = 3) -> str:
    """A figure for people: ``digits`` significant digits, a dash where there is none; powers of ten only where needed."""
    if value is None or not math.isfinite(value):
        return "–"
    text = f"{value:.{digits}g}"
    if "e" not in text:
        return text.replace("-", "−")
    mantissa, exponent = text.split("e")
    if 0 < int(exponent) < 6:
        return f"{float(text):,.0f}".replace(",", "\u202f").replace("-", "−")
    return f"{mantissa} × 10^{int(exponent)}".replace("-", "−")


def fixed(value: float | None, resolution: float | None) -> str:
    """``value`` to the second significant digit of ``resolution``, its uncertainty: 101 654 with 37, 0.218 with 0.031."""
    if value is None or not math.isfinite(value):
        return "–"
    if resolution is None or not math.isfinite(resolution) or not resolution > 0 or abs(value) >= 1e9:
        return number(value, 4)
    decimals = 1 - math.floor(math.log10(resolution))
    if decimals > 8:
        return number(value, 4)
    text = f"{round(value, decimals):,.{max(0, decimals)}f}"
    return text.replace(",", "\u202f").replace("-", "−")


def bare(unit: str) -> str:
    """The unit as it follows a number: nothing for dimensionless data, or where it was not recorded."""
    return "" if unit in ("1", "mixed", UNKNOWN) else printed(unit)


def headline(statements: Sequence[Statement]) -> str:
    """What to do with the result, in one sentence."""
    bad = [s.about.lower() for s in statements if s.level == "bad"]
    if bad:
        return f"Do not use this result as it is: see {' and '.join(bad)} below."
    verified = any(s.about == "Calibration" and s.level == "good" for s in statements)
    partly = any(s.about == "Calibration" and s.level == "look" for s in statements)
    looks = [s.about.lower() for s in statements if s.level == "look"]
    points = f" Read the points marked “look” ({', '.join(dict.fromkeys(looks))})." if looks else ""
    if verified:
        return "The draws agree with the data, and the uncertainty has been checked in the scope given below." + points
    if partly:
        return (
            "The draws agree with the data. Part of the uncertainty has been checked, the rest is an indication (Calibration)."
            + points
        )
    return (
        "The draws agree with the data. Their uncertainty is an indication: its calibration has not been verified."
        + points
    )


def _fit(fit: Mapping[str, Any]) -> Statement:
    name = "χ²/m" if fit["statistic"] == "chi2" else "Poisson deviance over its expectation"
    low, high = fit["limits"]
    if fit["verdict"] == "undefined":
        return Statement(
            "bad", "Data fit", f"{name} is not a finite number: the draws cannot be compared with the data."
        )
    figure = (
        f"{name} = {number(fit['ratio'], 4)} averaged over the draws; an exact sampler gives {number(low, 4)} to "
        f"{number(high, 4)} (false-alarm rate {number(fit['false_alarm'])}, m = {fit['data']} data)."
    )
    size = f"The residual is {number(math.sqrt(max(fit['ratio'], 0)), 3)} times the stated noise."
    if fit["verdict"] == "fits":
        return Statement("good", "Data fit", f"The draws fit the data to within the noise: {figure}")
    if fit["verdict"] == "data not fitted":
        advice = "Check the noise level, the geometry and units of the operator; then more steps or stronger guidance."
        return Statement("bad", "Data fit", f"The data are not fitted. {size} {advice} {figure}")
    advice = "Either the stated noise level is too high, or the sampler follows the noise (guidance too strong)."
    return Statement("bad", "Data fit", f"The noise is fitted. {size} {advice} {figure}")


def _whiteness(numbers: Mapping[str, Any]) -> list[Statement]:
    """Of the residual: neighbours, all lags, and groups of data that stand out."""
    fit, rest = numbers["fit"], numbers["residuals"] or {}
    lags = fit["autocorrelation"]
    if fit["verdict"] == "undefined":
        return []
    sd = fit["autocorrelation_sd"]
    faults, figures = [], []
    if lags:
        each = ", ".join(f"{dim} {number(r, 2)} (white noise: 0 ± {number(sd[dim], 2)})" for dim, r in lags.items())
        figures.append(f"Correlation of neighbours: {each}.")
    if fit["coloured"]:
        faults.append(f"neighbouring residuals are correlated along {' and '.join(fit['coloured'])}")
    white = rest.get("whiteness")
    if white and white["white"] is not None:
        noise = f"(white noise: {number(white['expected'])}; p = {number(white['p'], 2)})"
        figures.append(f"Whiteness ratio {number(white['ratio'])} {noise}.")
        if not white["white"]:
            faults.append("the residual as a whole is not white")
    for group in rest.get("groups") or []:
        if group["outside"]:
            faults.append(
                f"{len(group['outside'])} of {len(group['labels'])} places along {group['dim']} are not fitted as the noise "
                f"allows{outside_places(group)}"
            )
    if not lags and not white and not faults:
        return []
    words = " ".join(figures)
    if faults:
        said = "; ".join(faults)
        text = f"{said[:1].upper()}{said[1:]}: the forward model, the gains or the noise model miss something; see Data fit."
        return [Statement("look", "Residual", f"{text} {words}")]
    return [Statement("good", "Residual", f"No structure left. {words}")]


def outside_places(group: Mapping[str, Any]) -> str:
    """`` (90, 93 °)``: the places of a group beyond their limits, five at most; empty where none or most of them are."""
    out = group["outside"]
    if not out or 2 * len(out) > len(group["labels"]):
        return ""
    names = ", ".join(group["labels"][i] for i in out[:5]) + (" …" if len(out) > 5 else "")
    return f" ({names} {group['unit']}".rstrip() + ")"


def calibration_rows(facts: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Quantity, status and words of the calibration section; what was not checked is unverified."""
    stated = facts.get("calibration") or {}
    rows = []
    for name, found in (stated.get("quantities") or {}).items():
        status = str(found.get("status", "unverified"))
        factor, words = found.get("factor"), str(found.get("text", ""))
        if factor is not None and not words:
            words = f"covers when stretched by {number(float(factor))} std of the draws on either side"
        rows.append((str(name), status, words))
    return rows


def _calibration(facts: Mapping[str, Any]) -> Statement:
    stated = facts.get("calibration") or {}
    status = str(stated.get("status", "unverified"))
    said = str(stated.get("text", "")).rstrip(".")
    if status not in ("verified", "recalibrated"):
        lead = f"Unverified: {said}. " if said else ""
        text = (
            "Unverified: it has not been checked, for this operator, noise level and sampler, that intervals hold the truth as "
            "often as they say. "
        )
        return Statement("open", "Calibration", (lead or text) + "Treat the uncertainty as an indication.")
    text = said or "no details were recorded"
    when = f" ({stated['date']})" if stated.get("date") else ""
    cases = f" Cases: {stated['cases']}." if stated.get("cases") is not None else ""
    scope = f" It holds for: {_scope(stated['scope'])}." if stated.get("scope") else ""
    left = [name for name, found, _ in calibration_rows(facts) if found not in ("verified", "recalibrated")]
    gaps = f" Not verified: {', '.join(left)}." if left else ""
    level: Level = "look" if left else "good"
    return Statement(level, "Calibration", f"{status[:1].upper()}{status[1:]}{when}: {text}.{cases}{scope}{gaps}")


def _scope(scope: Any) -> str:  # noqa: ANN401  (a text or a mapping)
    if isinstance(scope, Mapping):
        return "; ".join(f"{name}: {value}" for name, value in scope.items()).rstrip(".")
    return str(scope).rstrip(".")


def _claim(facts: Mapping[str, Any]) -> Statement:
    sampler = facts.get("sampler") or {}
    name, claim = sampler.get("name", "The sampler"), sampler.get("claim")
    if claim not in CLAIMS:
        return Statement("open", "Sampler", f"{name} states no claim about its draws.")
    return Statement("look" if claim == "heuristic" else "good", "Sampler", f"{name} is {CLAIMS[claim]}.")


def _particles(draws: Mapping[str, Any]) -> list[Statement]:
    """Whether coupled particles are still an ensemble."""
    kept = draws["particles"]
    if not kept:
        return []
    ancestors, smallest = kept.get("ancestors"), kept.get("smallest_ess")
    told = f"{draws['count']} particles descend from {ancestors} of the start"
    evidence = f"log evidence {number(kept.get('log_evidence'), 5)} ± {number(kept.get('log_evidence_error'), 2)}"
    figures = f"Smallest effective number on the way {number(smallest)}; {evidence}."
    aside = kept.get("quarantined") or 0
    if aside:
        figures += f" {aside} particles were set aside because they were not numbers."
    if ancestors is not None and ancestors < ANCESTORS:
        text = (
            f"The ensemble has collapsed: {told}, fewer than {ANCESTORS}. No interval maps are drawn, and the spread shown is "
            f"smaller than the posterior's. Take more particles, or a proposal that knows the data better. {figures}"
        )
        return [Statement("bad", "Particles", text)]
    level: Level = "look" if aside or (smallest is not None and smallest < ANCESTORS) else "good"
    return [Statement(level, "Particles", f"{told}. {figures}")]


def _weights(draws: Mapping[str, Any]) -> list[Statement]:
    """The health of unequal weights."""
    health = draws["weights"]
    if health["ess"] >= 0.99 * health["draws"]:
        return []
    k = health["pareto_k"]
    figures = f"Largest weight {number(health['largest'])}, effective number {number(health['ess'])} of {health['draws']} draws"
    figures += f", Pareto k {number(k, 2)}." if k is not None else "."
    if k is not None and k > LIMIT:
        text = f"The weights have too heavy a tail (Pareto k above {LIMIT:g}): averages cannot be trusted. {figures}"
        return [Statement("bad", "Weights", text)]
    level: Level = "look" if health["largest"] > 0.2 or health["ess"] < ANCESTORS else "good"
    return [Statement(level, "Weights", figures)]


def _draws(numbers: Mapping[str, Any]) -> list[Statement]:
    draws = numbers["draws"]
    lines = []
    if draws["not_finite"]:
        where = f"{draws['draws_not_finite']} of {draws['count']} draws"
        text = f"{where} hold values that are NaN or infinite, {draws['not_finite']} in all."
        lines.append(Statement("bad", "Draws", text + " Nothing on this page can be trusted until that is solved."))
    count = f"{draws['count']} draws"
    if draws["count"] == 1:
        return [
            *lines,
            Statement("look", "Draws", "A single draw says nothing about uncertainty: no spread, no intervals."),
        ]
    if draws.get("antithetic"):
        count += f" in pairs with opposite noise, for intervals worth {number(draws['ess'], 2)}"
    elif draws["ess"] < 0.99 * draws["count"]:
        count += f", unequally weighted and worth {number(draws['ess'], 2)}"
    if draws["distinct"] is not None and draws["distinct"] < draws["count"]:
        count += f", with {draws['distinct']} distinct ancestors"
    errors = "; ".join(_map_error(q) for q in numbers["quantities"])
    share = number(100 * (numbers["quantities"][0]["spread"]["std_error"] or math.nan), 2)
    error = f"Monte-Carlo error of the mean map (rms): {errors}; of the std map: {share} %."
    if any(s.about == "Particles" and s.level == "bad" for s in _particles(draws)):
        return [*lines, Statement("bad", "Draws", f"{count}: no intervals of any probability, see Particles. {error}")]
    missing = [level for level, ok in draws["intervals"].items() if not ok]
    if not missing:
        return [*lines, Statement("good", "Draws", f"{count}: enough for intervals of 50, 90 and 95 %. {error}")]
    needed = ", ".join(f"{100 * float(v):g} % (needs {draws['needed'][v]})" for v in missing)
    level: Level = "good" if draws["intervals"]["0.9"] else "look"
    return [*lines, Statement(level, "Draws", f"{count}: too few for intervals of {needed}. {error}")]


def _map_error(quantity: Mapping[str, Any]) -> str:
    spread = quantity["spread"]
    name = f"{quantity['name']} " if quantity["name"] else ""
    return f"{name}{number(spread['mean_error'], 2)} {bare(quantity['unit'])}".rstrip()


def _against_truth(numbers: Mapping[str, Any]) -> list[Statement]:
    """Spread against error of each quantity; the worst gives the level."""
    lines = [(q["name"], _agreement(q["spread"])) for q in numbers["quantities"] if q["spread"]["skill"] is not None]
    if not lines:
        return []
    caution = "One image with correlated pixels: a description of this case, not a calibration."
    level: Level = "good" if all(found[0] == "good" for _, found in lines) else "look"
    text = " ".join(f"{name}: {words}" if name else f"{words[:1].upper()}{words[1:]}" for name, (_, words) in lines)
    return [Statement(level, "Against the truth", f"{text} {caution}")]


def _agreement(spread: Mapping[str, Any]) -> tuple[Level, str]:
    skill, inside = spread["skill"], spread["coverage"]["0.9"]
    covered = "" if inside is None else f" The 90 % intervals hold the truth in {100 * inside:.0f} % of the pixels."
    if skill < 0.8:
        factor = f"{number(1 / skill, 2)} times as large as" if skill > 0 else "not at all as small as"
        return "look", f"errors are {factor} the spread says: over-confident here.{covered}"
    if skill > 1.25:
        return "look", f"the spread is {number(skill, 2)} times as large as the errors: over-cautious here.{covered}"
    return "good", f"spread and error agree (spread/error = {number(skill, 2)}).{covered}"
