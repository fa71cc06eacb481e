"""Which sampler to take for what, from the rows of a comparison, with the reason in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from recon.workflows.pareto import resolution
from recon.workflows.scorecard import Row, mean

NEAR = 0.1  # dB that nobody sees
HONEST = 0.05  # difference from its nominal value up to which a coverage passes
_TRUST = {"exact": 0, "consistent": 1, "heuristic": 2}

Need = Literal["a fast mean", "a calibrated spread"]
MEAN: Need = "a fast mean"
SPREAD: Need = "a calibrated spread"


@dataclass(frozen=True)
class Ties:
    """What counts as equal.  level: of the intervals, 0 to 1.  better: dB of quality.  cheaper: log of seconds."""

    level: float
    better: float
    cheaper: float


@dataclass(frozen=True)
class Advice:
    """One need, the row that serves it best (None when none does), and why."""

    need: Need
    label: str | None
    steps: int | None
    why: str


def advise(rows: Sequence[Row], ties: Ties, measured: bool) -> tuple[Advice, Advice]:
    """Advice for each need, from rows that have figures.  measured: whether there was no truth to score against."""
    if not rows:
        nothing = "no method ran on this problem; the rows say why"
        return Advice(MEAN, None, None, nothing), Advice(SPREAD, None, None, nothing)
    if measured:
        return _quick_fit(rows), _agrees(rows, ties.level)
    return _fast(rows, ties), _calibrated(rows, ties)


def _fast(rows: Sequence[Row], ties: Ties) -> Advice:
    """The fastest of those whose mean is not clearly worse than the best one, or worse by less than anybody sees."""
    best, margin = max(rows, key=_quality), max(NEAR, ties.better)
    near = [row for row in rows if _quality(best) - _quality(row) <= margin]
    chosen = max(_fastest(near, ties), key=_quality)
    why = f"{_told(chosen)} in {chosen.seconds:.3g} s a draw"
    if chosen is best:
        why += ", the best mean, and none as good is clearly faster" if len(rows) > 1 else " (no other was measured)"
    else:
        why += (
            f"; the best mean, of {best.label} with {best.steps} steps, is {_quality(best) - _quality(chosen):.2f} dB better "
            f"(up to {margin:.2f} dB count as equal) and takes {best.seconds / chosen.seconds:.1f} times as long"
        )
    return Advice(MEAN, chosen.label, chosen.steps, why)


def _calibrated(rows: Sequence[Row], ties: Ties) -> Advice:
    """The lowest CRPS among those whose intervals cover what they say; of ties the fastest."""
    level = ties.level
    able = [row for row in rows if math.isfinite(row.coverage) and math.isfinite(_crps(row))]
    if not able:
        return Advice(SPREAD, None, None, f"no method has {level:.0%} intervals here: ask for more draws")
    honest = [row for row in able if abs(row.coverage - level) <= HONEST]
    pool = honest or able
    least = min(_crps(row) for row in pool)
    margin = max(0.02 * abs(least), resolution([row.over_cases("crps") for row in pool]))
    equal = [row for row in pool if _crps(row) - least <= margin]
    chosen = min(_fastest(equal, ties), key=_crps)
    why = f"its {level:.0%} intervals hold {chosen.coverage:.0%} of the truth, CRPS {_crps(chosen):.3g}; "
    if not honest:
        far = "too narrow" if chosen.coverage < level else "too wide"
        why += f"that is {far} by more than {HONEST:.0%}, as are those of all others: recalibrate"
        return Advice(SPREAD, chosen.label, chosen.steps, why)
    if len(honest) == 1:
        why += f"no other covers within {HONEST:.0%} of what it says"
    elif len(equal) == 1:
        why += f"the lowest CRPS of {len(honest)} that cover within {HONEST:.0%}"
    else:
        why += f"{len(equal)} that cover within {HONEST:.0%} have a CRPS as low, and none of them is clearly faster"
    return Advice(SPREAD, chosen.label, chosen.steps, f"{why}; claim: {chosen.claim}")


def _quick_fit(rows: Sequence[Row]) -> Advice:
    """Without a truth: the fastest whose draws fit the data."""
    fitting = [row for row in rows if all(f.fit == "fits" for f in row.figures)]
    if not fitting:
        closest = max(rows, key=_quality)
        why = f"no draws fit the data as the noise says; this one's are closest, chi2 per datum {closest.chi2:.3g}"
        return Advice(MEAN, closest.label, closest.steps, why)
    chosen = min(fitting, key=lambda row: row.seconds)
    why = (
        f"the fastest of {len(fitting)} whose draws fit the data: {chosen.seconds:.3g} s a draw, chi2 per datum "
        f"{chosen.chi2:.3g} (without a truth nobody can say whose mean is nearest)"
    )
    return Advice(MEAN, chosen.label, chosen.steps, why)


def _agrees(rows: Sequence[Row], level: float) -> Advice:
    """Without a truth: fits, agrees with itself, and of those the strongest claim, then the fastest."""
    fitting = [row for row in rows if all(f.fit == "fits" for f in row.figures) and math.isfinite(row.coverage)]
    honest = [row for row in fitting if abs(row.coverage - level) <= HONEST]
    if not honest:
        why = f"none both fits the data and covers its own draws, inferred again, within {HONEST:.0%} of {level:.0%}"
        return Advice(SPREAD, None, None, why)
    chosen = min(honest, key=lambda row: (_TRUST[row.claim], row.seconds))
    why = (
        f"its draws fit the data, and inferred again {chosen.coverage:.0%} of them lie in {level:.0%} intervals; claim: "
        f"{chosen.claim} (the strongest of {len(honest)} that pass, then the fastest)"
    )
    return Advice(SPREAD, chosen.label, chosen.steps, why)


def _quality(row: Row) -> float:
    return mean(list(row.quality))


def _crps(row: Row) -> float:
    return mean(row.over_cases("crps"))


def _fastest(rows: Sequence[Row], ties: Ties) -> list[Row]:
    """The rows as fast as the fastest."""
    least = min(row.seconds for row in rows)
    return [row for row in rows if math.log(row.seconds / least) <= ties.cheaper]


def _told(row: Row) -> str:
    scaled = row.over_cases("rmse")
    return (
        f"error {mean(scaled):.3g} of the truth's spread" if scaled else f"PSNR {mean(row.over_cases('psnr')):.2f} dB"
    )
