"""Noise levels and grids of them."""

from __future__ import annotations

import math

import pytest
import torch

from recon.errors import InputError
from recon.schedules import Grid, Karras, LogLinear, Schedule

SCHEDULE = Schedule(0.01, 40.0)
GRIDS = [Karras(), Karras(rho=1.0), Karras(rho=3.0), LogLinear()]


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (-1.0, 1.0), (1.0, 1.0), (2.0, 1.0), (0.1, math.inf), (math.nan, 1.0)]
)
def test_schedules_that_cannot_be(low, high):
    with pytest.raises(InputError, match="a Schedule needs 0 < sigma_min < sigma_max; got"):
        Schedule(low, high)


@pytest.mark.parametrize("grid", GRIDS, ids=repr)
@pytest.mark.parametrize("steps", [2, 3, 100])
def test_grids_fall_from_the_top_to_zero(grid, steps):
    sigmas = grid.sigmas(SCHEDULE, steps)
    assert sigmas.dtype == torch.float64
    assert sigmas.shape == (steps + 1,)
    assert float(sigmas[0]) == pytest.approx(40.0, rel=1e-12)
    assert float(sigmas[-2]) == pytest.approx(0.01, rel=1e-9)
    assert float(sigmas[-1]) == 0.0
    assert bool((sigmas.diff() < 0).all())


def test_karras_by_its_formula():
    sigmas = Karras(7.0).sigmas(Schedule(0.002, 80.0), 18)  # the values of Karras et al. 2022, table 1
    by_hand = [(80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(18)]
    assert sigmas[:-1].tolist() == pytest.approx(by_hand, rel=1e-12)
    assert sigmas[1:3].tolist() == pytest.approx([57.586, 40.786], rel=1e-4)


def test_log_linear_has_even_ratios():
    levels = LogLinear().sigmas(SCHEDULE, 9)[:-1]
    ratios = levels[1:] / levels[:-1]
    assert torch.allclose(ratios, ratios[0].expand(8), rtol=1e-12)


@pytest.mark.parametrize("grid", GRIDS, ids=repr)
def test_one_step_is_too_few(grid):
    with pytest.raises(InputError, match="a sampler needs at least 2 steps; got 1"):
        grid.sigmas(SCHEDULE, 1)


def test_the_contract_names_the_ways_out():
    with pytest.raises(TypeError, match=r"use Karras\(\) or LogLinear\(\)"):
        Grid().sigmas(SCHEDULE, 5)


def test_grids_and_schedules_are_values():
    assert Karras(7.0) == Karras()
    assert Karras(5.0) != Karras()
    assert eval(repr(SCHEDULE)) == SCHEDULE
