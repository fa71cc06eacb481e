r"""Scans to simulate: which columns of k-space are measured, and the sensitivities of coils around a body.

Random choices are counter-based: a pure function of the seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from recon.draws import Draws
from recon.errors import InputError


def column_mask(columns: int, acceleration: float, centre: int, even: bool = False, seed: int = 0) -> np.ndarray:
    """Which of ``columns`` phase-encoding steps are measured: bool (columns,), centred order.

    ``round(columns / acceleration)`` of them: the ``centre`` middle ones, and others at random, or evenly spread.
    Raises InputError where the centre alone is more than that, or acceleration < 1.
    """
    if not acceleration >= 1 or not 0 <= centre <= columns:
        raise InputError(
            f"a mask needs acceleration >= 1 and at most {columns} centre columns; got {acceleration}, {centre}"
        )
    total = max(1, round(columns / acceleration))
    if centre > total:
        raise InputError(
            f"{centre} centre columns are more than the {total} of {columns} that acceleration {acceleration:g} leaves; "
            "take fewer of them or a lower acceleration"
        )
    mask = np.zeros(columns, dtype=bool)
    first = columns // 2 - centre // 2
    mask[first : first + centre] = True
    rest = np.flatnonzero(~mask)
    more = total - centre
    if even and more:
        chosen = rest[np.floor((np.arange(more) + 0.5) * len(rest) / more).astype(int)]
    else:
        chosen = rest[np.argsort(Draws(seed, [0]).uniform(0, (len(rest),), "user")[0].numpy(), kind="stable")[:more]]
    mask[chosen] = True
    return mask


def ring_of_coils(coils: int, grid: Sequence[int]) -> torch.Tensor:
    """Smooth complex sensitivities of ``coils`` loops around a slice (y, x): complex64 (coil, y, x), ``sum_c |S_c|^2 = 1``.

    Coil c sits at the angle ``2 pi c / coils`` on the circle about the image; its magnitude falls like a Gaussian as wide as
    half the image, its phase grows across it.  Raises InputError for fewer than one coil or another number of axes.
    """
    if coils < 1 or len(grid) != 2:
        raise InputError(f"a ring of coils needs at least one coil and a slice (y, x); got {coils} and {tuple(grid)}")
    y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in grid), indexing="ij")
    maps = []
    for angle in 2 * math.pi * np.arange(coils) / coils:
        distance = (y - math.sin(angle)) ** 2 + (x - math.cos(angle)) ** 2
        maps.append(np.exp(-0.5 * distance + 1j * (angle + y * math.cos(angle) - x * math.sin(angle))))
    stacked = np.stack(maps)
    return torch.from_numpy((stacked / np.sqrt((np.abs(stacked) ** 2).sum(0))).astype(np.complex64))
