"""Regions of a page: the user's, given as ranges of coordinates, or a coarse grid of them.

``facts["regions"]`` of a run folder may name regions, each a mapping from a dim to ``[first, last]`` in the unit of the figures
(mm, degrees; names or index where there are no positions); ``recon report DIR`` then writes the page with them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recon.ensemble import labelled
from recon.errors import InputError
from recon.space import Space

WHOLE = "whole field"
_ROWS = {"y": ("upper", "middle", "lower"), "lat": ("north", "middle", "south"), "z": ("first", "middle", "last")}
_COLUMNS = {"x": ("left", "centre", "right"), "lon": ("west", "centre", "east")}
LEAST = 6  # pixels along a dim that is divided


def regions_of(space: Space, given: Mapping[str, Any] | None = None, variable: str = "") -> dict[str, Tensor]:
    """Name of each region -> mask, bool *space.shape; the whole field first.

    given: name -> {dim: [first, last]}, see the module; one with ``variable: NAME`` is of that variable alone.  Without it,
    thirds of the last two dims (of the only one in 1-D, of z too in volumes), where they hold at least 6 pixels.
    Raises InputError for a dim that the space has not, or a region without pixels.
    """
    masks = {WHOLE: torch.ones(space.shape, dtype=torch.bool)}
    if given:
        mine = {str(name): ranges for name, ranges in given.items() if _is_of(ranges, variable)}
        return masks | {name: _stated(space, name, ranges) for name, ranges in mine.items()}
    divided = [d for d, n in list(zip(space.dims, space.shape, strict=True))[-2:] if n >= LEAST]
    if len(space.dims) >= 2 and len(divided) < 2:
        return masks
    for places in product(range(3), repeat=len(divided)):
        name = " ".join(dict.fromkeys(_word(space, d, k) for d, k in zip(divided, places, strict=True)))
        mask = torch.ones(space.shape, dtype=torch.bool)
        for dim, k in zip(divided, places, strict=True):
            mask &= _along(space, dim, _third(space, dim, k))
        masks[name] = mask
    if space.dims[0] == "z" and len(space.dims) == 3 and space.shape[0] >= LEAST:
        for k in range(3):
            masks[f"{_ROWS['z'][k]} slices"] = _along(space, "z", _third(space, "z", k)).expand(space.shape).clone()
    return masks


def _is_of(ranges: Any, variable: str) -> bool:  # noqa: ANN401
    return not isinstance(ranges, Mapping) or ranges.get("variable", variable) == variable


def _stated(space: Space, name: str, ranges: Any) -> Tensor:  # noqa: ANN401
    if not isinstance(ranges, Mapping):
        raise InputError(f"region {name!r} is a mapping from a dim to [first, last]; got {ranges!r}")
    mask = torch.ones(space.shape, dtype=torch.bool)
    for dim, ends in ranges.items():
        if dim == "variable" and dim not in space.dims:
            continue
        if dim not in space.dims:
            raise InputError(f"region {name!r} names the dim {dim!r}; the field has {', '.join(space.dims)}")
        if not isinstance(ends, Sequence) or isinstance(ends, str) or len(ends) != 2:
            raise InputError(f"region {name!r}: {dim} is [first, last]; got {ends!r}")
        values = np.arange(space.shape[space.dims.index(dim)], dtype=np.float64)
        if dim in space.coords and not isinstance(space.coords[dim], tuple):
            values = np.asarray(labelled(dim, space.coords[dim])[0], dtype=np.float64)
        low, high = sorted(float(v) for v in ends)
        mask &= _along(space, dim, torch.from_numpy((values >= low) & (values <= high)))
    if not bool(mask.any()):
        raise InputError(f"region {name!r} holds no pixel: {dict(ranges)}")
    return mask


def _third(space: Space, dim: str, k: int) -> Tensor:
    n = space.shape[space.dims.index(dim)]
    edges = np.linspace(0, n, 4).round().astype(int)
    inside = torch.zeros(n, dtype=torch.bool)
    inside[edges[k] : edges[k + 1]] = True
    return inside


def _along(space: Space, dim: str, inside: Tensor) -> Tensor:
    axis = space.dims.index(dim)
    return inside.reshape([-1 if i == axis else 1 for i in range(len(space.dims))])


def _word(space: Space, dim: str, k: int) -> str:
    """Where a third lies as the figure shows it: y and latitude fall from top to bottom."""
    values = space.coords.get(dim)
    rising = values is not None and not isinstance(values, tuple) and len(values) > 1 and values[0] < values[-1]
    if dim in _ROWS:
        upwards = rising and dim == "lat"
        return _ROWS[dim][2 - k if upwards else k]
    if dim in _COLUMNS:
        falling = values is not None and not rising and dim in space.coords
        return _COLUMNS[dim][2 - k if falling else k]
    return f"{dim} third {k + 1}"
