"""The page of a calibration campaign: one self-contained HTML file with its verdict, rank histograms, coverage and spread."""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from recon.diagnostics.ranks import RankHistogram
from recon.files import write_text
from recon.plot.canvas import BLUE, GREEN, INKED, ORANGE, labels, legend, tidy
from recon.plot.checks import rank_histogram
from recon.report.panels import Picture, finish, new_figure

PAGE = "calibration.html"
COLUMNS = 4


def write_campaign(
    calibration: Mapping[str, Any], said: Mapping[str, Any], words: Mapping[str, str], folder: str | Path
) -> Path:
    """Write ``calibration.html`` into ``folder``, whole or not at all; returns its path.

    calibration: the content of ``calibration.json``.  said: what a report of the same configuration cites, with status and
    scope.  words: finding -> what it means.
    """
    from jinja2 import Environment, StrictUndefined

    folder = Path(folder)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files("recon.report").joinpath("campaign.html.j2").read_text(encoding="utf-8"))
    pictures = {key: pictures_of(part) for key, part in calibration["populations"].items()}
    level = next(iter(calibration["populations"].values())).get("level", 0.9)
    tools = {"mark": _mark, "figure": _figure, "share": _share, "level": level}
    about = {"c": calibration, "said": said, "words": words, "name": folder.name, "pictures": pictures}
    write_text(folder / PAGE, template.render(about | tools).lstrip())
    return folder / PAGE


def pictures_of(found: Mapping[str, Any]) -> list[Picture]:
    """The pictures of one population: ranks, coverage, spread against error; none where no case can be judged."""
    if found["assessment"] is None:
        return []
    made = [_ranks(found["histograms"]), _coverage(found["assessment"]["coverage"] or {}), _spread(found)]
    return [picture for picture in made if picture is not None]


def _mark(finding: str) -> str:
    return {"calibrated": "calibrated", "cannot say": "say"}.get(finding, "other")


def _figure(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}g}".replace("-", "−")


def _share(one: Mapping[str, Any]) -> str:
    """Coverage in per cent with its standard error over cases."""
    if one["mean"] is None:
        return "–"
    return f"{100 * one['mean']:.1f} %" + ("" if one["error"] is None else f" ± {100 * one['error']:.1f}")


def _ranks(histograms: Mapping[str, Mapping[str, Any]]) -> Picture:
    rows = math.ceil(len(histograms) / COLUMNS)
    figure, grid = new_figure(0.4 + 1.75 * rows, rows, COLUMNS)
    for axes, (name, kept) in zip(grid.flat, histograms.items(), strict=False):
        listed = {**kept, "counts": tuple(kept["counts"]), "outside": tuple(kept["outside"])}
        rank_histogram(RankHistogram(**listed), axes)
        labels(axes, "", "", name)
    for axes in grid.flat[len(histograms) :]:
        axes.set_axis_off()
    band = 1 - next(iter(histograms.values()))["false_alarm"]
    caption = (
        "Rank of the truth among the draws, cases per bin, for each test function; where truth and draws are "
        f"exchangeable all bins of one lie in its green band together with probability {band:g}. A hump: the draws "
        "spread too much; a hollow: too little; a slope: they lie to one side. Orange: outside the band."
    )
    return finish(figure, f"Histograms of ranks of {', '.join(histograms)}.", caption)


def _coverage(coverage: Mapping[str, Mapping[str, Any]]) -> Picture | None:
    if not coverage:
        return None
    level, rows = next(iter(coverage.values()))["level"], np.arange(len(coverage))
    inside, low, high = (np.array([part[name] for part in coverage.values()]) for name in ("inside", "low", "high"))
    figure, grid = new_figure(1.1 + 0.28 * len(rows), 1, 1)
    axes = grid[0, 0]
    right = (low <= level) & (level <= high)
    axes.axvline(level, color=GREEN, linewidth=1.2, label=f"{100 * level:g} %, what they say")
    for i in rows:
        axes.plot([low[i], high[i]], [i, i], color=BLUE if right[i] else ORANGE, linewidth=2)
        axes.plot(inside[i], i, "o", color=BLUE if right[i] else ORANGE, markersize=5)
    axes.set_yticks(rows, list(coverage))
    axes.set(xlim=(max(0.0, float(low.min()) - 0.03), 1.02), ylim=(len(rows) - 0.5, -0.5))
    labels(axes, "truth inside", "")
    legend(axes, loc="lower left", bbox_to_anchor=(0, 1))
    tidy(axes)
    rate = next(iter(coverage.values()))["verdict"]["false_alarm"]
    caption = (
        f"How often intervals of {100 * level:g} % hold the truth: of pixels (all, regions) and of averages (mean of, means "
        "of tiles). "
        f"A bar holds the mean over cases with probability {1 - rate:.4g}; the case is the unit. "
        f"Orange: it excludes {100 * level:g} %."
    )
    return finish(figure, f"Coverage of {100 * level:g} % intervals by region.", caption)


def _spread(found: Mapping[str, Any]) -> Picture | None:
    spread, error = (np.sqrt(np.array(found["figures"][name], dtype=np.float64)) for name in ("spread", "error"))
    if len(spread) < 2:
        return None
    figure, grid = new_figure(3.2, 1, 2)
    axes, beside = grid[0]
    top = 1.08 * max(float(spread.max()), float(error.max()), 1e-300)
    axes.plot([0, top], [0, top], ":", gid=INKED, color="0.2", linewidth=0.8, label="error = spread")
    axes.plot(spread, error, "o", color=BLUE, markersize=4, label="cases")
    axes.set(xlim=(0, top), ylim=(0, top))
    labels(axes, "spread: rms std of the draws", "rms error of their mean")
    legend(axes)
    beside.hist(np.array(found["figures"]["crps"]), bins=min(20, max(4, len(spread) // 4)), color=BLUE)
    labels(beside, "CRPS", "cases")
    for one in (axes, beside):
        tidy(one)
    ratio, sd = found["assessment"]["skill"], found["assessment"]["skill_error"]
    text = "" if ratio is None else f" Over all cases their ratio is {ratio:.3g}" + (f" ± {sd:.2g}." if sd else ".")
    caption = (
        "Left: above the dotted line, errors are larger than the spread says (over-confident); below, over-cautious."
        f"{text} Right: distance of the draws from the truth (fair CRPS). Fields with units of their own count in units of the "
        "prior's scale."
    )
    return finish(figure, "Error against spread by case, and a histogram of the CRPS.", caption)
