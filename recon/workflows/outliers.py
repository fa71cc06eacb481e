"""The cases of a campaign one by one, outliers first, with what makes each an outlier.

A case stands out that gave no numbers; whose draws do not fit the data as the noise says (chi2/m beyond the limits of an exact
sampler); whose error is larger than its spread says, or whose mean is less like the truth, than those of the other cases let
expect (beyond the quartile by 1.5 times the distance of the quartiles; Tukey 1977).  The largest chi2/m and the worst PSNR
of all are named in any case.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from recon.diagnostics import data_fit, psnr
from recon.ensemble import Ensemble
from recon.errors import InputError
from recon.likelihoods import Likelihood

ENOUGH = 8  # cases from which quartiles say what is usual
FENCE = 1.5
COLUMNS = ("case", "about", "fresh", "chi2", "psnr", "excess", "covered", "crps", "why")


def case_figures(likelihood: Likelihood, drawn: Ensemble, truth: Tensor | None) -> dict[str, Any]:
    """What a case file keeps besides its record: chi2/m of its draws with limits, PSNR of the mean in dB; or None.

    truth: where one PSNR means something; *space, of which values may be unknown (NaN).
    """
    found: dict[str, Any] = {"chi2": None, "limits": None, "psnr": None}
    try:
        fit = data_fit(likelihood, drawn)
        if math.isfinite(fit.ratio):
            found |= {"chi2": fit.ratio, "limits": [float(v) for v in fit.limits]}
    except InputError:  # a likelihood without a residual
        pass
    if truth is not None:
        known = ~truth.isnan()
        try:
            value = float(psnr(drawn.mean().cpu()[known], truth[known]))
            found["psnr"] = value if math.isfinite(value) else None
        except InputError:  # a flat truth has no peak
            pass
    return found


def listed(contents: Sequence[Mapping[str, Any]], cases: int) -> list[dict[str, Any]]:
    """A row per case (``COLUMNS``; why: a list of words, failed: the reason), outliers first.

    contents: of the case files, in order; those from number ``cases`` on are fresh.  excess: rms error over rms spread.
    """
    rows = [_row(content, number >= cases) for number, content in enumerate(contents)]
    usable = [row for row in rows if not row["failed"]]
    fences = {name: _fence(usable, name, up) for name, up in (("excess", True), ("psnr", False))}
    for row in rows:
        row["why"] = _why(row, fences)
    for name, best, words in (("chi2", max, "the largest χ²/m of all"), ("psnr", min, "the worst PSNR of all")):
        there = [row for row in usable if row[name] is not None]
        if len(there) > 1:
            best(there, key=lambda row: row[name])["named"].append(words)
    return sorted(rows, key=lambda row: (not row["failed"], -len(row["why"]), -len(row["named"]), row["case"]))


def _row(content: Mapping[str, Any], fresh: bool) -> dict[str, Any]:
    record, figures = content["record"], content.get("figures") or {}
    hits = (record["hits"] or {}).get("all")
    spread, error = record["spread"], record["error"]
    excess = math.sqrt(error / spread) if spread and error is not None else None
    return {
        "case": record["case"],
        "about": content.get("about", ""),
        "fresh": fresh,
        "chi2": figures.get("chi2"),
        "limits": figures.get("limits"),
        "psnr": figures.get("psnr"),
        "excess": excess,
        "covered": None if hits is None else hits["inside"],
        "crps": record["crps"],
        "failed": record["failed"],
        "named": [],
    }


def _fence(rows: Sequence[Mapping[str, Any]], name: str, up: bool) -> tuple[float, float] | None:
    """The value beyond which a case stands out, and the median; None for too few cases."""
    values = [row[name] for row in rows if row[name] is not None]
    if len(values) < ENOUGH:
        return None
    low, middle, high = np.percentile(values, [25, 50, 75])
    return float(high + FENCE * (high - low) if up else low - FENCE * (high - low)), float(middle)


def _why(row: Mapping[str, Any], fences: Mapping[str, tuple[float, float] | None]) -> list[str]:
    if row["failed"]:
        return [f"no numbers: {row['failed']}"]
    why = []
    if row["limits"] is not None and not row["limits"][0] <= row["chi2"] <= row["limits"][1]:
        low, high = row["limits"]
        what = "the data are not fitted" if row["chi2"] > high else "the noise is fitted"
        why.append(f"{what}: χ²/m {row['chi2']:.4g}, an exact sampler's lies in {low:.4g} to {high:.4g}")
    fence = fences["excess"]
    if fence is not None and row["excess"] is not None and row["excess"] > fence[0]:
        why.append(f"the error is {row['excess']:.3g} times the spread, where the median case has {fence[1]:.3g}")
    fence = fences["psnr"]
    if fence is not None and row["psnr"] is not None and row["psnr"] < fence[0]:
        why.append(f"PSNR {row['psnr']:.2f} dB, {fence[1] - row['psnr']:.2f} dB below the median case")
    return why


def as_csv(populations: Mapping[str, Mapping[str, Any]]) -> str:
    """All cases of all populations as CSV, units in the header."""
    units = {"psnr": "psnr (dB)", "excess": "error over spread", "chi2": "chi2 per datum"}
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["truths", *(units.get(name, name) for name in COLUMNS)])
    for name, found in populations.items():
        for row in found.get("listed", []):
            cells = {**row, "why": "; ".join([*row["why"], *row["named"]])}
            writer.writerow([name, *("" if cells[c] is None else cells[c] for c in COLUMNS)])
    return out.getvalue()
