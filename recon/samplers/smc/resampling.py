r"""How many children each particle gets, and in which places they go.

Every scheme is unbiased, ``E[children of i] = n W_i``, and a function of weights and uniform numbers in (0, 1) alone, so every
process that knows them finds the same children.  Systematic resampling gives ``floor(n W)`` or ``ceil(n W)`` children and needs
one number; stratified one number per child and less than one child more or less; residual gives ``floor(n W)`` for certain and
draws the rest; multinomial draws all (Douc, Cappe and Moulines 2005).
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from recon.errors import InputError

Scheme = Literal["systematic", "stratified", "residual", "multinomial"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)


def children(weights: Tensor, n: int, uniforms: Tensor, scheme: Scheme = "systematic") -> Tensor:
    """Children of each particle: (K,) int64 with sum ``n``.

    weights: (K,) normalised.  uniforms: (n,) in (0, 1); systematic uses the first, residual as many as are left to draw.
    Raises InputError for an unknown scheme.
    """
    if scheme not in SCHEMES:
        raise InputError(f"resampling takes one of {', '.join(SCHEMES)}; got {scheme!r}")
    if scheme == "residual":
        certain = (n * weights).floor().clamp(min=0)
        left = n - int(certain.sum())
        if left == 0:
            return certain.long()
        rest = (n * weights - certain).clamp(min=0)
        return certain.long() + _picked(rest / rest.sum(), uniforms[:left])
    count = torch.arange(n, dtype=torch.float64)
    places = {
        "systematic": (count + uniforms[0]) / n,
        "stratified": (count + uniforms[:n]) / n,
        "multinomial": uniforms[:n],
    }
    return _picked(weights, places[scheme])


def _picked(weights: Tensor, places: Tensor) -> Tensor:
    """How many ``places`` in (0, 1) fall on each particle's share of the unit interval; never on a share of zero."""
    edges = weights.double().cumsum(0)
    alive = torch.nonzero(weights > 0).flatten()
    picks = torch.searchsorted(edges[alive] / edges[-1], places.double()).clamp(max=len(alive) - 1)
    return torch.bincount(alive[picks], minlength=len(weights))


def parents(counts: Tensor) -> np.ndarray:
    """Whose child stands in each place: (K,) int64, ``parents[i] == i`` for every particle that has a child.

    The other children fill the places of the childless, as near to their parent as can be: inside the same aligned pair
    first, then the same four, eight, ... .  So blocks of particles keep their own children wherever they can, whoever holds
    the blocks, and the answer knows nothing of processes.
    """
    given = counts.numpy()
    place = np.arange(len(given))
    spare, free = np.repeat(place, np.maximum(given - 1, 0)), place[given == 0]
    size = 2
    while len(free):
        s, f = _key(spare // size, len(place)), _key(free // size, len(place))
        _, at_spare, at_free = np.intersect1d(s, f, assume_unique=True, return_indices=True)
        place[free[at_free]] = spare[at_spare]
        spare, free = np.delete(spare, at_spare), np.delete(free, at_free)
        size *= 2
    return place


def _key(groups: np.ndarray, bound: int) -> np.ndarray:
    """One number per element of sorted ``groups``: its group, and how many of the same group stand before it."""
    before = np.arange(len(groups)) - np.searchsorted(groups, groups)
    return groups * (bound + 1) + before
