"""Stated coverage is that of cases which did not choose the stretch; fresh cases confirm or refute it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from recon.diagnostics import Scope, Share, check, covered, left_out, recalibrate, share
from recon.diagnostics.conformal import Need
from recon.errors import InputError
from tests.bounds import normal_bound

SCOPE = Scope("", "", "", "", 19, "")
LEVEL = 0.9


def cases(seed: int, n: int, pixels: int = 40, wide: float = 1.0) -> list[Need]:
    """Excesses of ``n`` cases; pixels of one share a shift, so cases differ."""
    rng = np.random.default_rng(seed)
    return [Need(np.sort(wide * (0.4 * rng.normal() + rng.normal(size=pixels + i % 3)) - 0.8)) for i in range(n)]


def test_each_case_is_covered_by_what_the_others_choose() -> None:
    needs = cases(0, 14)
    found = left_out(needs, LEVEL)
    for i, need in enumerate(needs):
        stretch = recalibrate([*needs[:i], *needs[i + 1 :]], SCOPE, LEVEL, guarantee="average").stretch
        assert found[i] == np.mean(need.excess <= stretch)
    assert not left_out(needs[:9], LEVEL).size and left_out(needs[:10], LEVEL).size == 10
    found = left_out(needs, LEVEL, "estimate")
    for i, need in enumerate(needs):
        stretch = recalibrate([*needs[:i], *needs[i + 1 :]], SCOPE, LEVEL, guarantee="estimate").stretch
        assert found[i] == np.mean(need.excess <= stretch)
    assert not left_out(needs[:2], LEVEL, "estimate").size and left_out(needs[:3], LEVEL, "estimate").size == 3
    assert not left_out([], LEVEL).size


def test_a_share_is_a_mean_over_cases() -> None:
    needs = cases(1, 5)
    values = covered(needs, 0.3)
    assert values.tolist() == [np.mean(n.excess <= 0.3) for n in needs]
    found = share(values)
    assert found.mean == pytest.approx(values.mean()) and found.cases == 5
    assert found.error == pytest.approx(values.std(ddof=1) / math.sqrt(5))
    assert share([0.5]) == Share(0.5, None, 1) and share([]) == Share(None, None, 0)


def test_what_is_stated_is_what_further_cases_show() -> None:
    """60 cases state a coverage; 3000 more show it but for the cases' spread, and no flattery by those that chose."""
    needs, more = cases(2, 60), cases(3, 3000)
    stated = share(left_out(needs, LEVEL))
    stretch = recalibrate(needs, SCOPE, LEVEL, guarantee="average").stretch
    shown = share(covered(more, stretch))
    # The stretch varies too, as much again as the cases it was chosen from.
    assert abs(stated.mean - shown.mean) < normal_bound() * math.hypot(math.sqrt(2) * stated.error, shown.error)
    assert LEVEL - normal_bound() * stated.error < shown.mean < LEVEL + 1 / 61 + normal_bound() * stated.error


def test_the_best_guess_covers_its_own_cases_and_adds_nothing() -> None:
    """The promise of 12 cases covers far more than 90 % of 3000 further ones, the guess 90 % but for its error."""
    needs, more = cases(9, 12), cases(10, 3000)
    guess, promise = (recalibrate(needs, SCOPE, LEVEL, guarantee=g).stretch for g in ("estimate", "average"))
    own = covered(needs, guess)
    assert own.mean() >= LEVEL > covered(needs, np.nextafter(guess, -np.inf)).mean()
    assert abs(covered(more, guess).mean() - LEVEL) < normal_bound() * share(own).error
    assert covered(more, promise).mean() > covered(more, guess).mean() + 0.03
    assert recalibrate(needs[:1], SCOPE, LEVEL, guarantee="estimate").reason.startswith(
        "1 calibration cases cannot estimate"
    )


def test_a_statement_is_confirmed_refuted_or_left_open() -> None:
    right, wrong = share(covered(cases(4, 3000))), share(covered(cases(5, 3000, wide=1.5)))
    assert check(right, share(covered(cases(6, 3000)))).decision == "within"
    assert check(right, wrong).decision == "beyond"
    open_ = check(share(covered(cases(7, 20))), share(covered(cases(8, 20))))
    assert open_.decision == "cannot say"
    each = [np.var(covered(cases(seed, 20)), ddof=1) for seed in (7, 8)]
    assert open_.cases_needed == math.ceil(1.96**2 * sum(each) / 0.02**2) > 20
    assert check(share([0.9]), right).decision == "cannot say" and check(share([0.9]), right).cases_needed is None
    assert check(right, right).summary()["stated"]["cases"] == 3000
    same = share([1.0] * 50)  # 50 of 50 inside: the error is not zero, it is not known
    assert check(same, right).decision == check(right, same).decision == check(same, same).decision == "cannot say"
    close = [Share(0.9, 0.001, n) for n in (7, 8)]
    assert [check(one, close[1]).decision for one in close] == ["cannot say", "within"]
    assert check(close[0], close[1]).cases_needed == 8
    with pytest.raises(InputError, match="a tolerance is positive"):
        check(right, right, 0.0)
