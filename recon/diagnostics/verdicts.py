r"""From numbers of many cases to a word: calibrated, biased, over- or under-dispersed, misshapen, or cannot say.

A case (one problem with a known truth) gives one number per test function.  Pixels of one case are correlated, so they are
never counted as trials; cases are.  The tests hold for any number of draws and cases (with weighted draws, nearly).

From ranks.  With the randomised rank ``u = (r + U)/(M + 1)``, uniform on (0, 1) exactly if truth and draws are
exchangeable, ``z = Phi^-1(u)`` is standard normal, so over ``n`` cases

    bias         sqrt(n) mean(z)             ~ N(0, 1)          truths above (+) or below (-) the draws
    spread       sum (z - mean z)^2          ~ chi2_{n-1}       large: under-dispersed, small: over-dispersed draws
    shape        Cramer-von Mises of u       its own law        anything else

each at a third of the false-alarm rate.  If several fail, the one furthest from its law gives the word.  A bias whose sign
changes from case to case is a lack of spread to any such test.

"calibrated" is only said where a bias of ``BIAS`` or a spread wrong by ``SPREAD`` would have been found with probability
``POWER``; that is computed with the law of ranks among M draws of a normal posterior.  Else: cannot say.

From z-scores ``(truth - mean)/std`` with M draws: ``z sqrt(M/(M+1))`` is Student's t with M - 1 degrees of freedom for
normal posteriors; its normal score takes the place of the rank's.  From coverage, a fraction per case: see ``betting``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from recon.diagnostics.betting import evidence, interval
from recon.diagnostics.given import numbers_of
from recon.errors import InputError

Finding = Literal["calibrated", "biased", "over-dispersed", "under-dispersed", "misshapen", "cannot say"]

BIAS, SPREAD, POWER = 0.5, 1.5, 0.8  # posterior sd, factor of a sd, probability
TOLERANCE = 0.1  # of coverage
FALSE_ALARM = 0.01
FEWEST = 8  # cases below which nothing is tested


@dataclass(frozen=True)
class Verdict:
    """What the cases show.

    finding: the word.  reason: one sentence with the numbers.  cases: how many.  false_alarm: probability of another
    word than "calibrated" or "cannot say" for calibrated draws.  figures: p-values or evidence, estimates, what would
    have been found. strength: by how many standard deviations of a normal law the finding stands out (0 for the two
    words that find nothing).
    """

    finding: Finding
    reason: str
    cases: int
    false_alarm: float
    figures: Mapping[str, float]
    strength: float = 0.0

    def summary(self) -> dict[str, Any]:
        """JSON values; figures that are not finite become None."""
        figures = {name: float(v) if math.isfinite(v) else None for name, v in self.figures.items()}
        return {
            "finding": self.finding,
            "reason": self.reason,
            "cases": self.cases,
            "false_alarm": self.false_alarm,
            "strength": self.strength if math.isfinite(self.strength) else None,
            "figures": figures,
        }


def judge_ranks(pit: Any, draws: float, false_alarm: float = FALSE_ALARM) -> Verdict:  # noqa: ANN401
    """The verdict on randomised ranks of one test function.

    pit: (case,), in (0, 1), as ``recon.diagnostics.ranks`` makes them.  draws: M (the effective number, the smallest of the
    cases).  Raises InputError for ranks outside [0, 1], no cases, or a rate outside (0, 1).
    """
    _rate(false_alarm)
    u = numbers_of(pit, "ranks")
    if not ((u >= 0) & (u <= 1)).all():
        raise InputError("ranks must be given as fractions (r + U)/(M + 1) between 0 and 1")
    if draws < 1:
        raise InputError(f"ranks are among at least 1 draw; got {draws}")
    from scipy.special import ndtri

    tiny = 2.0**-33  # half a step of the generator: a uniform number is never closer to 0 or 1
    return _judge_normal(ndtri(u.clip(tiny, 1 - tiny)), u, draws, false_alarm)


def judge_scores(scores: Any, draws: float, false_alarm: float = FALSE_ALARM) -> Verdict:  # noqa: ANN401
    """The verdict on z-scores ``(truth - mean)/std`` of one quantity over cases; exact for normal posteriors only.

    scores: (case,).  draws: M >= 3, with which mean and std (ddof 1) were estimated.  A score that is not finite (a
    collapsed ensemble) raises InputError, as do fewer draws and rates outside (0, 1).
    """
    _rate(false_alarm)
    z = numbers_of(scores, "z-scores (a collapsed ensemble has none)")
    if draws < 3:
        raise InputError(f"z-scores say nothing with {draws} draws; at least 3 are needed")
    from scipy.special import ndtri
    from scipy.stats import t

    student = z * math.sqrt(draws / (draws + 1))
    # The lower tail of the smaller side keeps its digits.
    normal = -np.sign(student) * ndtri(t.cdf(-np.abs(student), draws - 1).clip(1e-300))
    return _judge_normal(normal, t.cdf(student, draws - 1), draws, false_alarm)


def _judge_normal(z: np.ndarray, u: np.ndarray, draws: float, false_alarm: float) -> Verdict:
    from scipy.special import chdtr, chdtrc, ndtr, ndtri

    n = len(z)
    if n < FEWEST:
        return _silent(f"{n} cases are too few: at least {FEWEST} are needed for any test", n, false_alarm)
    each = false_alarm / 3
    sum_of_squares = float(((z - z.mean()) ** 2).sum())
    p_bias = 2 * float(ndtr(-abs(z.mean()) * math.sqrt(n)))
    p_spread = min(1.0, 2 * float(min(chdtr(n - 1, sum_of_squares), chdtrc(n - 1, sum_of_squares))))
    p_shape = _cramer_von_mises(u)
    bias, spread = float(z.mean()), math.sqrt(sum_of_squares / (n - 1))
    size = {"bias": abs(bias) * math.sqrt(n), "spread": abs(_cube_root_score(sum_of_squares, n - 1))}
    power_bias, power_spread = _power(round(draws), n, each)
    figures = {
        "p_bias": p_bias,
        "p_spread": p_spread,
        "p_shape": p_shape,
        "bias": bias,
        "spread": spread,
        "power_bias": power_bias,
        "power_spread": power_spread,
    }
    failed = [name for name, p in (("bias", p_bias), ("spread", p_spread)) if p < each]
    where = f"{n} cases, {draws:.4g} draws"
    if failed:
        worst = max(failed, key=lambda name: size[name])
        if worst == "bias":
            side = "above" if bias > 0 else "below"
            off = f"mean normal score {bias:+.2f}, expected 0 +- {1 / math.sqrt(n):.2f}"
            reason = f"truths lie {side} the draws: {off} ({where})"
            return Verdict("biased", reason, n, false_alarm, figures, size["bias"])
        finding: Finding = "under-dispersed" if spread > 1 else "over-dispersed"
        reason = (
            f"normal scores of the ranks spread by {spread:.2f}, expected 1 +- {1 / math.sqrt(2 * n):.2f} ({where})"
        )
        return Verdict(finding, reason, n, false_alarm, figures, size["spread"])
    if p_shape < each:
        reason = (
            f"ranks are not uniform (p = {p_shape:.1g}), though neither their mean nor their spread is off ({where})"
        )
        return Verdict("misshapen", reason, n, false_alarm, figures, -float(ndtri(p_shape / 2)))
    if min(power_bias, power_spread) < POWER:
        reason = (
            f"nothing was found, but a bias of {BIAS:g} sd would be found with probability {power_bias:.2f} and a spread wrong "
            f"by a factor {SPREAD:g} with {power_spread:.2f} ({where}): more cases are needed"
        )
        return Verdict("cannot say", reason, n, false_alarm, figures)
    reason = f"bias below {BIAS:g} sd and spread right within a factor {SPREAD:g}, else it would have shown ({where})"
    return Verdict("calibrated", reason, n, false_alarm, figures)


def judge_coverage(
    inside: Any,  # noqa: ANN401
    level: float,
    below: Any = None,  # noqa: ANN401
    false_alarm: float = FALSE_ALARM,
    tolerance: float = TOLERANCE,
) -> Verdict:
    """The verdict on the fraction of each case's pixels (or regions) inside intervals of probability ``level``.

    inside: (case,) in [0, 1].  below: (case,), the fraction below the lower ends; with it a bias of one sign in all
    cases is told from a lack of spread, without it too little coverage is called under-dispersed, whatever its cause.
    tolerance: "calibrated" is said where the coverage is known (at 1 - false_alarm) to be that close to ``level``.
    Raises InputError for numbers outside [0, 1], levels or rates outside (0, 1).
    """
    _rate(false_alarm)
    v = numbers_of(inside, "coverage")
    if not 0 < level < 1 or not ((v >= 0) & (v <= 1)).all():
        raise InputError("coverage is a fraction per case in [0, 1], and its level lies between 0 and 1")
    n, share = len(v), false_alarm / (2 if below is None else 4)
    if n < FEWEST:
        return _silent(f"{n} cases are too few: at least {FEWEST} are needed for any test", n, false_alarm)
    more, less = evidence(v, level, share)
    low, high = interval(v, false_alarm)
    figures = {"coverage": float(v.mean()), "low": low, "high": high, "evidence_more": more, "evidence_less": less}
    said = {"over-dispersed": more, "under-dispersed": less}
    if below is not None:
        b = numbers_of(below, "fractions below")
        if b.shape != v.shape or not ((b >= 0) & (b + v <= 1 + 1e-9)).all():
            raise InputError("fractions below and inside are given per case and sum to 1 at most")
        tilt = ((2 * b + v).clip(0, 2)) / 2  # (1 + below - above) / 2: one half without bias
        figures["asymmetry"] = float(2 * tilt.mean() - 1)
        said["biased"] = max(evidence(tilt, 0.5, share))
    finding, most = max(said.items(), key=lambda item: item[1])
    # A bias loses on one side more than the coverage lacks; a lack of spread loses the same on both.
    if said.get("biased", 0.0) >= math.log(1 / share) and abs(figures["asymmetry"]) > level - float(v.mean()):
        finding, most = "biased", said["biased"]
    where = f"coverage {v.mean():.3f}, between {low:.3f} and {high:.3f}, of nominal {level:g} ({n} cases)"
    if most >= math.log(1 / share):
        word: Finding = finding  # type: ignore[assignment]
        extra = "" if below is not None or word == "over-dispersed" else "; a bias would look the same"
        return Verdict(word, where + extra, n, false_alarm, figures, math.sqrt(2 * most))
    if not low <= level <= high or max(high - level, level - low) > tolerance:
        return Verdict(
            "cannot say", f"{where}: not known to {tolerance:g}; more cases are needed", n, false_alarm, figures
        )
    return Verdict("calibrated", where, n, false_alarm, figures)


def judge_all(pits: Mapping[str, Any], draws: float, false_alarm: float = FALSE_ALARM) -> dict[str, Verdict]:
    """One verdict per test function, the false-alarm rate shared between them, and their sum under ``"overall"``.

    pits: name -> (case,).  The overall finding is the strongest one; without any, "cannot say" if one function cannot.
    Raises InputError for no functions, or as ``judge_ranks`` does.
    """
    if not pits:
        raise InputError("there is no test function to judge")
    each = {name: judge_ranks(pit, draws, false_alarm / len(pits)) for name, pit in pits.items()}
    quiet = ("calibrated", "cannot say")
    loud = {name: v for name, v in each.items() if v.finding not in quiet}
    unsure = {name: v for name, v in each.items() if v.finding == "cannot say"}
    pool = loud or unsure or each
    name, worst = max(pool.items(), key=lambda item: item[1].strength)
    overall = Verdict(
        worst.finding, f"{name}: {worst.reason}", worst.cases, false_alarm, dict(worst.figures), worst.strength
    )
    return {**each, "overall": overall}


def _silent(reason: str, cases: int, false_alarm: float) -> Verdict:
    return Verdict("cannot say", reason, cases, false_alarm, {})


def _rate(false_alarm: float) -> None:
    if not 0 < false_alarm < 1:
        raise InputError(f"false_alarm is a probability between 0 and 1; got {false_alarm}")


def _cramer_von_mises(u: np.ndarray) -> float:
    """p-value of ``1/(12 n) + sum (u_(i) - (2i-1)/2n)^2`` for uniform numbers.

    The limiting law (Anderson & Darling, Ann. Math. Stat. 23, 1952), at Stephens' (JRSS B 32, 1970) equivalent for n numbers.
    """
    from scipy.special import gamma, kve

    n = len(u)
    statistic = 1 / (12 * n) + float(((np.sort(u) - (np.arange(n) + 0.5) / n) ** 2).sum())
    x = max((statistic - 0.4 / n + 0.6 / n**2) * (1 + 1 / n), 1e-3)
    if x > 4:
        return math.exp(-(math.pi**2) * x / 2)  # its leading exponential, 1e-9 and less
    j = np.arange(12)
    t = (4 * j + 1) ** 2 / (16 * x)
    term = gamma(j + 0.5) / (gamma(0.5) * gamma(j + 1)) * np.sqrt(4 * j + 1) * kve(0.25, t) * np.exp(-2 * t)
    return float(np.clip(1 - term.sum() / (math.pi * math.sqrt(x)), 0, 1))


def _cube_root_score(chi2: float, freedom: int) -> float:
    """Normal score of a chi-squared number (Wilson & Hilferty 1931), finite however far out."""
    width = 2 / (9 * freedom)
    return float(((chi2 / freedom) ** (1 / 3) - (1 - width)) / math.sqrt(width))


@lru_cache(maxsize=256)
def _moments(draws: int, bias: float, factor: float) -> tuple[float, float, float]:
    """``E z, E z^2, E z^4`` of the normal score of a rank among M draws of N(0, 1) for a truth of N(bias, factor^2)."""
    from scipy.special import ndtr, ndtri
    from scipy.stats import binom

    nodes, weights = np.polynomial.hermite_e.hermegauss(96)
    p = ndtr(bias + factor * nodes)
    chance = binom.pmf(np.arange(draws + 1)[:, None], draws, p[None]) @ (weights / weights.sum())
    edge = ndtri(np.arange(draws + 2) / (draws + 1))
    a = np.where(np.isfinite(edge), edge, 0.0)  # x^k phi(x) vanishes at both ends
    phi = np.where(np.isfinite(edge), np.exp(-0.5 * a**2) / math.sqrt(2 * math.pi), 0.0)
    parts = (-phi, -a * phi, -(a**3 + 3 * a) * phi)
    first, second, fourth = ((draws + 1) * np.diff(part) for part in parts)
    values = (first, 1 + second, 3 + fourth)
    one, two, four = (float(chance @ value) for value in values)
    return one, two, four


@lru_cache(maxsize=1024)
def _power(draws: int, cases: int, each: float) -> tuple[float, float]:
    """Probability that a bias of BIAS, and that a spread wrong by SPREAD (the harder way), is found."""
    from scipy.stats import chi2, norm

    one, two, _ = _moments(draws, BIAS, 1.0)
    sd = math.sqrt(two - one**2)
    found_bias = float(norm.cdf((one * math.sqrt(cases) - norm.isf(each / 2)) / sd))
    found = []
    for factor, limit in ((SPREAD, chi2.isf(each / 2, cases - 1)), (1 / SPREAD, chi2.ppf(each / 2, cases - 1))):
        _, two, four = _moments(draws, 0.0, factor)
        gap = (cases - 1) * two - float(limit)
        width = math.sqrt((cases - 1) * max(four - two**2, 1e-12))
        found.append(float(norm.cdf(gap / width if factor > 1 else -gap / width)))
    return found_bias, min(found)
