r"""The coverage that calibration cases state, and whether fresh cases show it.

Of one kind of interval, stretched by ``l`` (0: as they are), case ``i`` covers the fraction ``c_i`` of its values.

* As they are, the calibration cases state the mean of ``c_i``; its error is their standard deviation over ``sqrt(n)``.
* Stretched, they state the mean over ``i`` of what case ``i`` covers with the stretch of the other ``n - 1`` (leave one out):
  the cases that chose a stretch would flatter it.

Fresh cases, which chose nothing, check both.  With ``d`` the difference, ``e`` its error (both sides), ``t`` the tolerance and
``z`` = 1.96, statements hold "within" where ``|d| + z e <= t``, are "beyond" where ``|d| - z e > t``, and cannot be decided in
between; so many cases on either side as make ``z e = t`` are needed to decide at all, were the difference zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from recon.diagnostics.conformal import Guarantee, Need, enough_covered, least_cases
from recon.errors import InputError

TOLERANCE = 0.02
SURE = 1.96  # standard errors: one false alarm in 20
FEWEST = 8  # cases on either side from which a spread between them says something

Decision = Literal["within", "beyond", "cannot say"]


@dataclass(frozen=True)
class Share:
    """A mean over cases.  mean: coverage, 0 to 1; None without cases.  error: its standard error, None for one case."""

    mean: float | None
    error: float | None
    cases: int

    def summary(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def share(covered: Sequence[float] | np.ndarray) -> Share:
    """Of one fraction per case."""
    values = np.asarray(covered, dtype=np.float64)
    n = len(values)
    error = float(values.std(ddof=1) / math.sqrt(n)) if n > 1 else None
    return Share(float(values.mean()) if n else None, error, n)


def covered(needs: Sequence[Need], stretch: float = 0.0) -> np.ndarray:
    """Fraction of the values of each case (case,) that intervals stretched by ``stretch`` hold."""
    return np.array([np.mean(need.excess <= stretch) for need in needs])


def left_out(needs: Sequence[Need], level: float, guarantee: Guarantee = "average") -> np.ndarray:
    """What each case (case,) covers with the stretch that the others choose; empty where those are too few for one.

    The rule is the one of ``recalibrate`` with guarantee "average" or "estimate"; all excesses are sorted once.
    """
    n = len(needs)
    if n - 1 < least_cases(level, 1 - level, guarantee):
        return np.empty(0)
    values = np.concatenate([need.excess for need in needs])
    weight = np.concatenate([np.full(len(need.excess), 1 / len(need.excess)) for need in needs])
    owner = np.repeat(np.arange(n), [len(need.excess) for need in needs])
    order = values.argsort(kind="stable")
    values, weight, owner = values[order], weight[order], owner[order]
    found = []
    for i, need in enumerate(needs):
        missed = n - 1 - np.where(owner == i, 0.0, weight).cumsum()
        stretch = values[
            np.flatnonzero((weight * (owner != i) > 0) & enough_covered(missed, n - 1, level, guarantee))[0]
        ]
        found.append(float(np.mean(need.excess <= stretch)))
    return np.array(found)


@dataclass(frozen=True)
class Check:
    """A statement, what fresh cases show, and whether they agree within ``tolerance``.

    cases_needed: on either side, for a decision; None where the spread between cases is unknown.
    """

    stated: Share
    shown: Share
    tolerance: float
    decision: Decision
    cases_needed: int | None

    def summary(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def check(stated: Share, shown: Share, tolerance: float = TOLERANCE) -> Check:
    """Hold what fresh cases show against what was stated.  Raises InputError for a tolerance that is not positive."""
    if not tolerance > 0:
        raise InputError(f"a tolerance is positive; got {tolerance}")
    if not stated.error or not shown.error or stated.mean is None or shown.mean is None:
        return Check(stated, shown, tolerance, "cannot say", None)  # all cases alike tell no error
    difference = abs(shown.mean - stated.mean)
    error = SURE * math.hypot(stated.error, shown.error)
    variance = stated.error**2 * stated.cases + shown.error**2 * shown.cases
    needed = math.ceil(SURE**2 * variance / tolerance**2)
    decision: Decision = "cannot say"
    if min(stated.cases, shown.cases) < FEWEST:
        return Check(stated, shown, tolerance, decision, max(FEWEST, needed))
    if difference + error <= tolerance:
        decision = "within"
    elif difference - error > tolerance:
        decision = "beyond"
    return Check(stated, shown, tolerance, decision, max(FEWEST, needed))
