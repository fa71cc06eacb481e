"""Quantiles of weighted draws, many levels from one sort: the order statistics that intervals are made of.

With weights ``w`` of sorted draws, ``C`` their sums and ``n = 1/sum w^2``, a draw stands at ``(n (C - w/2) + 1/2) / (n + 1)``:
with equal weights order statistic ``k`` at ``k/(M+1)``.  Linear in between, clipped at the ends.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

CHUNK = 1 << 20  # values sorted at a time: they stay in the cache


def quantiles(x: Tensor, levels: Sequence[float], weights: Tensor) -> Tensor:
    """Quantiles (level, *space) of draws (draw, *space) with weights (draw,) that sum to one, in the draws' floating type."""
    flat, shape = x.reshape(len(x), -1), tuple(x.shape[1:])
    if not levels:
        return flat.new_empty(0, *shape)
    if bool((weights == weights[0]).all()) and not x.is_cuda:
        return _equal(flat.detach().numpy(), levels).reshape(len(levels), *shape)
    return _weighted(flat, levels, weights.to(x.device)).reshape(len(levels), *shape)


def _place(weights: Tensor, ordered: Tensor) -> Tensor:
    """Where sorted draws stand, from their weights before and after sorting (draw, ...)."""
    n = float(1 / weights.square().sum())
    return (n * (ordered.cumsum(0) - ordered / 2) + 0.5) / (n + 1)


def _weighted(flat: Tensor, levels: Sequence[float], weights: Tensor) -> Tensor:
    values, order = flat.double().sort(0)
    place = _place(weights, weights[order])
    return torch.stack([_interpolate(place, values, level) for level in levels]).to(flat.dtype)


def _interpolate(place: Tensor, values: Tensor, level: float) -> Tensor:
    """Linear interpolation of ``values`` (M, n) known at ``place`` (M, n), at one level, clipped to the ends."""
    if len(place) == 1:
        return values[0]
    upper = (place < level).sum(0).clamp(1, len(place) - 1)
    lower = upper - 1
    p0, p1 = place.gather(0, lower[None])[0], place.gather(0, upper[None])[0]
    v0, v1 = values.gather(0, lower[None])[0], values.gather(0, upper[None])[0]
    share = ((level - p0) / (p1 - p0)).clamp(0, 1)
    return v0 + share * (v1 - v0)


def _equal(rows: np.ndarray, levels: Sequence[float]) -> Tensor:
    """Of (draw, value) with equal weights, to the same bits: every value has its order statistics at the same places."""
    draws, values = rows.shape
    w = torch.full((draws,), 1 / draws, dtype=torch.float64)
    place = _place(w, w).numpy()
    out = np.empty((len(levels), values), rows.dtype)
    step = max(1, CHUNK // draws)
    for first in range(0, values, step):
        part = slice(first, first + step)
        # One value's draws side by side in memory: what sorting wants.
        ordered = np.ascontiguousarray(rows[:, part].T)
        ordered.sort(axis=1)
        for k, level in enumerate(levels):
            if draws == 1:
                out[k, part] = ordered[:, 0]
                continue
            upper = min(max(int((place < level).sum()), 1), draws - 1)
            v0, v1 = (ordered[:, i].astype(np.float64) for i in (upper - 1, upper))
            share = min(max((level - place[upper - 1]) / (place[upper] - place[upper - 1]), 0.0), 1.0)
            out[k, part] = v0 + share * (v1 - v0)
    return torch.from_numpy(out)
