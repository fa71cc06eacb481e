"""A comparison of samplers as text, and as JSON values."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from recon.workflows.bench import Bench
from recon.workflows.scorecard import Row, mean, standard_error


def table(bench: Bench) -> str:
    """One line per row, refusals with their reason; what the columns mean, and the advice, below."""
    columns = _columns(bench, [row for row in bench.rows if row.status == "measured"])
    lines = [("", "method", "steps", *(name for name, _ in columns))]
    for row in bench.rows:
        start = ("*" if row.front else "", row.label, str(row.steps or "-"))
        told = (f"{row.status}: {row.why}",)
        lines.append((*start, *((make(row) for _, make in columns) if row.status == "measured" else told)))
    whole = [line for line in lines if len(line) == len(lines[0])]
    widths = [max(len(line[i]) for line in (lines if i < 3 else whole)) for i in range(len(lines[0]))]
    text = ["  ".join(_set(i, cell, widths) for i, cell in enumerate(line)).rstrip() for line in lines]
    return "\n".join([*text, "", *_legend(bench), *(f"note: {note}" for note in bench.notes), "", *_advice(bench)])


def as_json(bench: Bench) -> dict[str, Any]:
    """Everything, as JSON values; numbers that are not finite are null."""
    rows = [
        {**dataclasses.asdict(row), "seconds": row.seconds, "chi2": row.chi2, "coverage": row.coverage}
        for row in bench.rows
    ]
    whole = {
        "ask": dataclasses.asdict(bench.ask),
        "level": bench.level,
        "measured": bench.measured,
        "ties": {"quality": bench.better, "log_seconds": bench.cheaper},
        "rows": rows,
        "advice": [dataclasses.asdict(advice) for advice in bench.advice],
        "notes": list(bench.notes),
    }
    found: dict[str, Any] = _plain(whole)
    return found


def _columns(bench: Bench, rows: Sequence[Row]) -> list[tuple[str, Any]]:
    """Heading and maker of the cells of each column that has anything to say."""
    columns: list[tuple[str, Any]] = []
    first = next((row.figures[0].score for row in rows if row.figures[0].score is not None), None)
    if first is not None and not bench.measured:
        if first.psnr is not None:
            columns.append(("PSNR/dB", lambda row: _bar(row.over_cases("psnr"), "{:.2f}")))
        else:
            columns.append(("RMSE/sd", lambda row: _bar(row.over_cases("rmse"), "{:.3f}")))
            for name in first.by_variable:
                columns.append((name, lambda row, n=name: _number(_variable(row, n), "{:.3f}")))
        if first.ssim is not None:
            columns.append(("SSIM", lambda row: _bar(row.over_cases("ssim"), "{:.3f}")))
        columns.append((f"CRPS/{first.unit}", lambda row: _bar(row.over_cases("crps"), "{:.3g}")))
        columns.append((f"in {bench.level:.0%}", lambda row: _number(100 * row.coverage, "{:.1f} %")))
    if bench.measured:
        columns.append(("fit", lambda row: row.figures[0].fit))
        columns.append((f"again in {bench.level:.0%}", lambda row: _number(100 * row.coverage, "{:.1f} %")))
    columns.append(("chi2/m", lambda row: _number(row.chi2, "{:.3g}")))
    columns.append(("s/draw", lambda row: _number(row.seconds, "{:.3g}")))
    columns.append(("GiB", lambda row: _number(max(f.memory for f in row.figures), "{:.2f}")))
    return columns


def _legend(bench: Bench) -> list[str]:
    cases = max((len(row.figures) for row in bench.rows), default=0)
    bars = (
        f"+- is the standard error over {cases} cases"
        if cases > 1
        else "one case: ties are judged by the error over draws"
    )
    what = "misfit" if bench.measured else "dB"
    lines = [
        f"* no other is clearly better or faster: {what} up to {bench.better:.2g} and times up to "
        f"{100 * math.expm1(bench.cheaper):.0f} % apart are ties; {bars}",
    ]
    if bench.level < 0.9:
        lines.append(f"{bench.ask.draws} draws have no 90 % intervals (19 do); their widest hold {bench.level:.0%}")
    if bench.measured:
        lines.append(
            f"no truth: 'again' is how often draws that were measured and inferred again ({bench.ask.cases} each) lie in the "
            "intervals of the new ones"
        )
    return lines


def _advice(bench: Bench) -> list[str]:
    return [
        f"for {advice.need}: " + (f"{advice.label}, {advice.steps} steps: " if advice.label else "") + advice.why
        for advice in bench.advice
    ]


def _variable(row: Row, name: str) -> float:
    return mean([f.score.by_variable[name] for f in row.figures if f.score is not None])


def _bar(values: list[float], form: str) -> str:
    """A mean with its standard error over cases, where there are several."""
    error = standard_error(values)
    return _number(mean(values), form) + (f" +- {form.format(error)}" if math.isfinite(error) else "")


def _number(value: float, form: str) -> str:
    return form.format(value) if math.isfinite(value) else "-"


def _set(i: int, cell: str, widths: Sequence[int]) -> str:
    """A cell in its column: names to the left, numbers to the right; a reason is wider than its column."""
    if i < 2 or len(cell) > widths[i]:
        return cell.ljust(widths[i])
    return cell.rjust(widths[i])


def _plain(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, dict):
        return {str(key): _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
