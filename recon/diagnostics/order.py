"""Quantiles of draws, many levels from one sort: the order statistics that intervals are made of.

The rule is that of ``recon.Ensemble.quantile``, to the last bit: with equal weights, order statistic ``k`` stands at
``k/(M+1)``, linear in between, clipped at the ends.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from recon.diagnostics.given import Array, weights_of
from recon.ensemble import Ensemble
from recon.space import Space

CHUNK = 1 << 20  # values sorted at a time: they stay in the cache


def quantiles(x: Tensor, levels: Sequence[float], log_weights: Array | None = None) -> Tensor:
    """Weighted quantiles (level, *space) of checked draws (draw, *space), in their floating type."""
    flat, shape = x.reshape(len(x), -1), tuple(x.shape[1:])
    w = weights_of(log_weights, len(x))
    if not levels:
        return flat.new_empty(0, *shape)
    if not bool((w == w[0]).all()):
        log_w = torch.as_tensor(log_weights).double()
        found = Ensemble(flat, Space.vector(flat.shape[1]), log_w).quantile(list(levels))
        return found.reshape(len(levels), *shape)
    return _equal(flat.numpy(), levels, float(1 / w.square().sum())).reshape(len(levels), *shape)


def _equal(rows: np.ndarray, levels: Sequence[float], n: float) -> Tensor:
    """Of (draw, value) with equal weights: every value has its order statistics at the same places."""
    draws, values = rows.shape
    w = torch.full((draws,), 1 / draws, dtype=torch.float64)
    place = ((n * (w.cumsum(0) - w / 2) + 0.5) / (n + 1)).numpy()
    out = np.empty((len(levels), values), rows.dtype)
    step = max(1, CHUNK // draws)
    for first in range(0, values, step):
        part = slice(first, first + step)
        # One value's draws side by side in memory: what sorting wants.
        ordered = np.ascontiguousarray(rows[:, part].T)
        ordered.sort(axis=1)
        for k, level in enumerate(levels):
            upper = min(max(int((place < level).sum()), 1), draws - 1)
            if draws == 1:
                out[k, part] = ordered[:, 0]
                continue
            v0, v1 = (ordered[:, i].astype(np.float64) for i in (upper - 1, upper))
            share = min(max((level - place[upper - 1]) / (place[upper] - place[upper - 1]), 0.0), 1.0)
            out[k, part] = v0 + share * (v1 - v0)
    return torch.from_numpy(out)
