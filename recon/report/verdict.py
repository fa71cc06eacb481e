"""The verdict box: what may be concluded, in plain words, from the numbers of a report.

Each statement has a level: ``good``, ``look`` (something to act on), ``bad`` (do not use as it is) or ``open`` (nobody has
checked).  Words are chosen here and nowhere else, so that a page and its ``report.json`` cannot disagree.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from recon.diagnostics.spread import draws_needed

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
    """Statements about data fit, residuals, calibration, sampler, draws, truth and warnings, in this order."""
    facts = numbers["facts"]
    lines = [_fit(numbers["fit"])]
    lines += _whiteness(numbers["fit"])
    lines += [_calibration(facts), _claim(facts)]
    lines += _draws(numbers)
    lines += _against_truth(numbers)
    return lines + [Statement("look", "Warning", str(text)) for text in facts.get("warnings") or []]


def number(value: float | None, digits: int = 3) -> str:
    """A figure for people: ``digits`` significant digits, a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    text = f"{value:.{digits}g}"
    if "e" not in text:
        return text.replace("-", "−")
    mantissa, exponent = text.split("e")
    return f"{mantissa} × 10^{int(exponent)}".replace("-", "−")


def bare(unit: str) -> str:
    """The unit as it follows a number: nothing for dimensionless data."""
    return "" if unit == "1" else unit


def headline(statements: Sequence[Statement]) -> str:
    """What to do with the result, in one sentence."""
    bad = [s.about.lower() for s in statements if s.level == "bad"]
    if bad:
        return f"Do not use this result as it is: see {' and '.join(bad)} below."
    verified = any(s.about == "Calibration" and s.level == "good" for s in statements)
    looks = [s.about.lower() for s in statements if s.level == "look"]
    points = f" Read the points marked “look” ({', '.join(dict.fromkeys(looks))})." if looks else ""
    if verified:
        return "The draws agree with the data, and the uncertainty has been checked in the scope given below." + points
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


def _whiteness(fit: Mapping[str, Any]) -> list[Statement]:
    lags = fit["autocorrelation"]
    if not lags or fit["verdict"] == "undefined":
        return []
    sd = fit["autocorrelation_sd"]
    figures = ", ".join(f"{dim} {number(r, 2)} (white noise: 0 ± {number(sd[dim], 2)})" for dim, r in lags.items())
    if fit["coloured"]:
        where = " and ".join(fit["coloured"])
        text = (
            f"Neighbouring residuals are correlated along {where}: the forward model, the gains or the noise model miss"
        )
        return [Statement("look", "Residual", f"{text} something; see the residual map. Correlation: {figures}.")]
    return [Statement("good", "Residual", f"No structure left between neighbours. Their correlation: {figures}.")]


def _calibration(facts: Mapping[str, Any]) -> Statement:
    stated = facts.get("calibration") or {}
    status = str(stated.get("status", "unverified"))
    if status == "unverified":
        text = (
            "Unverified: it has not been checked, for this operator, noise level and sampler, that intervals hold the truth as "
            "often as they say. Treat the uncertainty as an indication."
        )
        return Statement("open", "Calibration", text)
    text = str(stated.get("text", "")) or "no details were recorded"
    return Statement("good", "Calibration", f"{status[:1].upper()}{status[1:]}: {text.rstrip('.')}.")


def _claim(facts: Mapping[str, Any]) -> Statement:
    sampler = facts.get("sampler") or {}
    name, claim = sampler.get("name", "the sampler"), sampler.get("claim")
    if claim not in CLAIMS:
        return Statement("open", "Sampler", f"{name} states no claim about its draws.")
    return Statement("look" if claim == "heuristic" else "good", "Sampler", f"{name} is {CLAIMS[claim]}.")


def _draws(numbers: Mapping[str, Any]) -> list[Statement]:
    draws, spread, unit = numbers["draws"], numbers["spread"], numbers["space"]["unit"]
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
    if draws["ess"] < 0.99 * draws["count"]:
        count += f", unequally weighted and worth {number(draws['ess'], 2)}"
    if draws["distinct"] is not None and draws["distinct"] < draws["count"]:
        count += f", with {draws['distinct']} distinct ancestors"
    error = (
        f"Monte-Carlo error of the mean map: {number(spread['mean_error'], 2)} {bare(unit)} (rms); "
        f"of the std map: {number(100 * (spread['std_error'] or math.nan), 2)} %."
    )
    missing = [level for level, ok in draws["intervals"].items() if not ok]
    if not missing:
        return [*lines, Statement("good", "Draws", f"{count}: enough for intervals of 50, 90 and 95 %. {error}")]
    needed = ", ".join(f"{100 * float(v):g} % (needs {draws_needed(float(v))})" for v in missing)
    level: Level = "good" if draws["intervals"]["0.9"] else "look"
    return [*lines, Statement(level, "Draws", f"{count}: too few for intervals of {needed}. {error}")]


def _against_truth(numbers: Mapping[str, Any]) -> list[Statement]:
    spread = numbers["spread"]
    skill, inside = spread["skill"], spread["coverage"]["0.9"]
    if skill is None:
        return []
    covered = "" if inside is None else f" The 90 % intervals hold the truth in {100 * inside:.0f} % of the pixels."
    caution = " One image with correlated pixels: a description of this case, not a calibration."
    if skill < 0.8:
        factor = f"{number(1 / skill, 2)} times as large as" if skill > 0 else "not at all as small as"
        text = f"Errors are {factor} the spread says: over-confident here."
        return [Statement("look", "Against the truth", text + covered + caution)]
    if skill > 1.25:
        text = f"The spread is {number(skill, 2)} times as large as the errors: over-cautious here."
        return [Statement("look", "Against the truth", text + covered + caution)]
    text = f"Spread and error agree (spread/error = {number(skill, 2)})."
    return [Statement("good", "Against the truth", text + covered + caution)]
