"""Cases as numbers that travel, and what is said of many."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from recon.diagnostics.cases import Ask, assess, case_record, record_from
from recon.errors import InputError

ASK = Ask(0.9, {"centre": np.arange(16).reshape(4, 4) % 4 < 2}, {"mean": lambda x: x.flatten(1).mean(1)})


def records(count, factor=1.0, bias=0.0, draws=19):
    rng = np.random.default_rng(0)

    def field(n):
        return 0.7 * rng.normal(size=(n, 1, 1)) + 0.7 * rng.normal(size=(n, 4, 4))

    return [case_record(field(draws), factor * field(1)[0] + bias, ASK, case=i) for i in range(count)]


@pytest.mark.parametrize(
    ("factor", "bias", "finding"),
    [(1.0, 0.0, "calibrated"), (2.0, 0.0, "under-dispersed"), (0.5, 0.0, "over-dispersed"), (1.0, 0.8, "biased")],
)
def test_many_cases_get_a_word(factor, bias, finding):
    found = assess(records(150, factor, bias))
    assert found.finding == finding
    assert set(found.coverage) == {"all", "centre", "mean of all", "mean of centre"}
    if finding == "calibrated":
        assert abs(found.skill - 1) < 4.5 * found.skill_error
    summary = json.loads(json.dumps(found.summary(), allow_nan=False))
    assert summary["ranks"]["overall"]["finding"] == found.ranks["overall"].finding


def test_records_travel_as_json_and_in_any_order():
    some = records(30)
    again = [record_from(json.loads(json.dumps(r.summary(), allow_nan=False))) for r in some]
    assert again == some
    assert assess(again[::-1]).summary() == assess(some).summary()
    with pytest.raises(InputError, match="not a stored case"):
        record_from({"case": 1})


def test_broken_cases_are_counted_and_forbid_a_good_word():
    good = records(150)
    nan = np.full((19, 4, 4), np.nan)
    bad = [
        case_record(nan, np.zeros((4, 4)), ASK, case=500),
        case_record(np.ones((19, 4, 4)), np.zeros((4, 4)), ASK, case=501),
        case_record(np.ones((1, 4, 4)), np.zeros((4, 4)), ASK, case=502),
    ]
    assert [b.failed for b in bad] == [
        "19 of 19 draws hold values that are NaN or infinite",
        "the ensemble has collapsed: all draws are the same",
        "one draw only",
    ]
    restored = record_from(json.loads(json.dumps(bad[0].summary(), allow_nan=False)))
    assert restored.failed == bad[0].failed
    assert math.isnan(restored.spread)
    found = assess(good + bad)
    assert (found.cases, found.failed) == (150, 3)
    assert found.finding == "cannot say"
    assert "3 cases failed" in found.reason
    assert found.failures[0].startswith("case 500: 19 of 19")
    with pytest.raises(InputError, match="no case can be judged: case 500"):
        assess(bad)


def test_few_draws_have_no_intervals_but_ranks():
    found = assess(records(200, draws=10))
    assert found.coverage is None
    assert "they need 19 effective draws" in found.reason
    assert found.ranks["mean"].cases == 200
    assert found.summary()["coverage"] is None


def test_one_pixel_and_weights():
    rng = np.random.default_rng(1)
    made = [
        case_record(rng.normal(size=(40, 1)), rng.normal(size=1), None, 0.1 * rng.normal(size=40), i) for i in range(20)
    ]
    found = assess(made)
    assert list(found.ranks) == ["mean", "overall"]
    assert found.finding == "cannot say"
    assert made[0].ess < 40


def test_misuse_is_refused():
    some = records(12)
    with pytest.raises(InputError, match="a case comes twice"):
        assess([*some, some[0]])
    other = case_record(np.random.default_rng(2).normal(size=(19, 4, 4)), np.zeros((4, 4)), None, case=99)
    with pytest.raises(InputError, match="asked different things"):
        assess([*some, other])
    with pytest.raises(InputError, match="no case can be judged: there is none"):
        assess([])
    with pytest.raises(InputError, match="compares with a truth"):
        case_record(np.zeros((3, 2)), None)
    with pytest.raises(InputError, match="the truth must be"):
        case_record(np.zeros((3, 2)), np.zeros(3))
