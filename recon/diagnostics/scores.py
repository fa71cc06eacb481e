r"""Proper scores of an ensemble against a truth, in forms whose mean does not depend on the number of draws.

With weights ``w`` (``1/M`` each when equal) and draws ``X_d``, truth ``t``, and pairs of *different* draws only:

    CRPS       sum_d w_d |X_d - t|        - 1/2 sum_{d,e} w_d w_e |X_d - X_e| / (1 - sum w^2)               per pixel
    energy     sum_d w_d |X_d - t|_2      - 1/2 sum_{d,e} w_d w_e |X_d - X_e|_2 / (1 - sum w^2)             one number
    variogram  sum_{ij} v_ij { sum_d w_d (g_d - g_t)^2 - 1/2 sum_{d,e} w_d w_e (g_d - g_e)^2 / (1 - sum w^2) }

with ``g = |x_i - x_j|^p``.

Fair scores (Ferro, QJRMS 140, 2014; Gneiting & Raftery, JASA 102, 2007; Scheuerer & Hamill, MWR 143, 2015).  Dividing the
pairs by M^2 instead would reward small spread.  They are fair for draws that are exchangeable and independent given the
data: not for coupled particles.  Smaller is better; a fair score of one case may be negative.

CRPS by sorting: ``sum_{d<e} w_d w_e |x_d - x_e| = sum_k w_(k) x_(k) (2 W_k - w_(k) - 1)``, ``W`` the cumulated sorted
weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from recon.diagnostics.given import Array, draws_of, effective, several, truth_of, weights_of
from recon.errors import InputError

CHUNK = 1 << 17  # draws x pixels sorted at a time
PAIRS = 1 << 22  # pairs of pixels x draws held at a time by the variogram score
LARGEST = 4096  # values whose pairs the variogram score compares


def fair_crps(x: Array, truth: Array, log_weights: Array | None = None, antithetic: bool = False) -> Tensor:
    """Fair continuous ranked probability score per pixel, in data units: *space, float64.

    x: (draw, *space).  truth: *space.  log_weights: (draw,).  antithetic: draws ``2 k`` and ``2 k + 1`` have opposite noise;
    they are not a pair of independent draws and are not compared.  O(M log M) per pixel, a slab of pixels at a time.
    Raises InputError for a single draw (antithetic: pair), values that are no numbers, or shapes that do not fit.
    """
    if antithetic:
        return _paired_crps(draws_of(x, 4, "the fair CRPS of antithetic pairs"), truth, log_weights)
    x = draws_of(x, 2, "the fair CRPS")
    truth = truth_of(truth, x)
    w = weights_of(log_weights, len(x))
    equal = bool((w == w[0]).all())
    pairs_share = several(w, "the fair CRPS")
    rows, t = x.reshape(len(x), -1).numpy(), truth.reshape(-1).double().numpy()
    out = np.empty(len(t))
    rank = (2 * np.arange(1, len(x) + 1) - len(x) - 1.0) / (len(x) * (len(x) - 1))
    step = max(1, CHUNK // len(x))
    for first in range(0, len(t), step):
        part = slice(first, first + step)
        # One pixel's draws side by side in memory: what sorting wants.
        error = np.ascontiguousarray(rows[:, part].T, dtype=np.float64) - t[part, None]
        if equal:
            error.sort(axis=1)
            pairs = error @ rank
            out[part] = np.abs(error, out=error).mean(1) - pairs
        else:
            out[part] = _weighted_crps(error, w.numpy(), pairs_share)
    return torch.from_numpy(out).reshape(truth.shape)


def _paired_crps(x: Tensor, truth: Array, log_weights: Array | None) -> Tensor:
    """All pairs less the antithetic ones, over the weight of what is left."""
    w = weights_of(log_weights, len(x))
    share, own = several(w, "the fair CRPS"), w[::2] * w[1::2]
    near = (x - truth_of(truth, x)).double().abs()
    first = torch.einsum("d,d...->...", w, near)
    apart = share * (first - fair_crps(x, truth, log_weights))  # sum_{d<e} w_d w_e |x_d - x_e|
    within = torch.einsum("d,d...->...", own, (x[::2].double() - x[1::2].double()).abs())
    return first - (apart - within) / (share - 2 * float(own.sum()))


def _weighted_crps(error: np.ndarray, w: np.ndarray, distinct: float) -> np.ndarray:
    order = error.argsort(axis=1)
    error, ws = np.take_along_axis(error, order, 1), w[order]
    pairs = (ws * error * (2 * ws.cumsum(1) - ws - 1)).sum(1)
    return np.asarray((ws * np.abs(error)).sum(1) - pairs / distinct)


def energy_score(x: Array, truth: Array, log_weights: Array | None = None) -> float:
    """Fair energy score of the whole field, in data units times the root of the number of pixels.

    x: (draw, *space).  truth: *space.  Blind to most errors of correlation (use ``variogram_score``); O(M^2) distances.
    Raises InputError as ``fair_crps`` does.
    """
    x = draws_of(x, 2, "the energy score")
    error = (x.double() - truth_of(truth, x).double()).reshape(len(x), -1)
    w = weights_of(log_weights, len(x))
    share = several(w, "the energy score")
    # Differences proper: the expanded square |a|^2 + |b|^2 - 2 ab loses half the digits of close draws.
    apart = torch.cdist(error, error, compute_mode="donot_use_mm_for_euclid_dist")
    return float(w @ error.norm(dim=1) - 0.5 * (w @ apart @ w) / share)


def variogram_score(
    x: Array, truth: Array, log_weights: Array | None = None, p: float = 0.5, pair_weights: Array | None = None
) -> float:
    """Fair variogram score over all ordered pairs of values, in data units to the power ``2 p``: sensitive to correlations.

    x: (draw, *space), at most 4096 values per draw (give region means or a coarser image otherwise).  truth: *space.
    p: order, > 0.  pair_weights: (N, N) ``v``, default ones.  Raises InputError for a larger space or shapes that do
    not fit.
    """
    x = draws_of(x, 2, "the variogram score")
    n = x[0].numel()
    if n > LARGEST:
        raise InputError(
            f"the variogram score compares all pairs of at most {LARGEST} values; got {n}: average them first"
        )
    if not p > 0:
        raise InputError(f"the order of a variogram is positive; got {p}")
    rows, t = x.double().reshape(len(x), -1), truth_of(truth, x).double().reshape(-1)
    w = weights_of(log_weights, len(x))
    share = several(w, "the variogram score")
    v = torch.ones(n, n, dtype=torch.float64) if pair_weights is None else torch.as_tensor(pair_weights).double()
    if tuple(v.shape) != (n, n):
        raise InputError(f"pair_weights are ({n}, {n}), one per pair of values; got {tuple(v.shape)}")
    total = 0.0
    for lines in torch.arange(n).split(max(1, PAIRS // (n * len(x)))):
        g = (rows[:, lines, None] - rows[:, None, :]).abs() ** p
        off = g - (t[lines, None] - t[None, :]).abs() ** p
        mean = torch.einsum("d,dij->ij", w, off)
        square = torch.einsum("d,dij->ij", w, off.square())
        # sum w (g - g_t)^2 less half the mean square of differences between draws, which is twice their variance.
        total += float((v[lines] * (square - (square - mean.square()) / share)).sum())
    return total


def spread_and_error(x: Array, truth: Array, log_weights: Array | None = None) -> tuple[float, float]:
    """Mean over pixels of the draws' variance times ``(M+1)/M``, and of the squared error of their mean, data units
    squared.

    The two have equal expectations for calibrated draws, whatever M (Fortin et al., J. Hydrometeorology 15, 2014); pool
    them over cases with ``spread_skill_over_cases``.  Raises InputError as ``fair_crps`` does.
    """
    x = draws_of(x, 2, "a spread")
    rows, t = x.double().reshape(len(x), -1), truth_of(truth, x).double().reshape(-1)
    w = weights_of(log_weights, len(x))
    share, n = several(w, "a spread"), effective(w)
    mean = w @ rows
    variance = (w @ (rows - mean).square()) / share
    return float(variance.mean()) * (n + 1) / n, float((mean - t).square().mean())


def spread_skill_over_cases(spreads: Array | Sequence[float], errors: Array | Sequence[float]) -> tuple[float, float]:
    """Spread-skill ratio ``sqrt(mean spread / mean error)`` over cases and its standard error by the jackknife over cases.

    spreads, errors: (case,) as ``spread_and_error`` gives them (variances are averaged, not standard deviations).  1 for
    calibrated draws; below 1 over-confident.  The error is NaN for fewer than 3 cases.
    Raises InputError for shapes that do not fit, values that are no numbers, or errors that are all zero.
    """
    s, e = np.asarray(spreads, dtype=np.float64), np.asarray(errors, dtype=np.float64)
    if s.shape != e.shape or s.ndim != 1 or not len(s) or not np.isfinite(s + e).all():
        raise InputError(f"one finite spread and one error per case; got {s.shape} and {e.shape}")
    if not e.sum() > 0:
        raise InputError("the errors are all zero, so they have no ratio to the spread")
    ratio, n = math.sqrt(s.sum() / e.sum()), len(s)
    rest = e.sum() - e
    if n < 3 or not (rest > 0).all():
        return ratio, math.nan
    left = np.sqrt((s.sum() - s) / rest)
    return ratio, math.sqrt((n - 1) / n * float(((left - left.mean()) ** 2).sum()))
