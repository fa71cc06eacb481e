"""Simulated scans: which columns are measured, what coils see."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from recon.errors import InputError
from recon.operators.scans import column_mask, ring_of_coils


@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize(("columns", "acceleration", "centre"), [(16, 2, 4), (15, 3, 3), (128, 4, 8), (9, 1, 0), (64, 7.5, 0)])
def test_so_many_columns_and_the_middle_ones(columns, acceleration, centre, even):
    mask = column_mask(columns, acceleration, centre, even, seed=3)
    assert mask.shape == (columns,)
    assert mask.sum() == max(1, round(columns / acceleration))
    first = columns // 2 - centre // 2
    assert mask[first : first + centre].all()
    assert first <= columns // 2 < first + max(1, centre)  # zero frequency, at N // 2, is among them


def test_a_pattern_is_a_function_of_its_seed():
    one, again, other = (column_mask(64, 4, 4, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)


def test_even_gaps_differ_by_one_at_most():
    gaps = np.diff(np.flatnonzero(column_mask(120, 5, 0, even=True)))
    assert gaps.max() - gaps.min() <= 1


def test_coils_share_the_image_evenly():
    maps = ring_of_coils(6, (15, 20))
    assert maps.dtype == torch.complex64
    assert torch.allclose(maps.abs().square().sum(0), torch.ones(15, 20), rtol=0, atol=1e-6)
    # Coil 0 sits to the right, at x = 1; it is the brightest there.
    assert int(maps[:, 7, -1].abs().argmax()) == 0
    assert float(maps[0, 7, -1].abs()) > 2 * float(maps[0, 7, 0].abs())


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: column_mask(16, 4, 5), "5 centre columns are more than the 4 of 16"),
        (lambda: column_mask(16, 0.5, 1), "acceleration >= 1"),
        (lambda: column_mask(16, 2, 17), "at most 16 centre columns"),
        (lambda: ring_of_coils(0, (4, 4)), "at least one coil"),
        (lambda: ring_of_coils(2, (4, 4, 4)), r"a slice \(y, x\)"),
    ],
)
def test_refusals(call, text):
    with pytest.raises(InputError, match=text):
        call()
