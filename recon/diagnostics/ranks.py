r"""Where the truth ranks among the draws: simulation-based calibration, rank histograms, TARP.

For a test function f, if truth and draws are exchangeable given the data, the rank of f(truth) among M values f(draw)
is uniform on 0..M (Cook et al. 2006; Talts et al. 2018).  Ties are broken at random, and the rank is returned as
``(r + U)/(M + 1)``, exactly uniform on (0, 1), with keyed U.  With weights, ``(n W + U (n T + 1))/(n + 1)``, ``W`` and ``T``
the weight below and at the truth and ``n = 1/sum w^2``: the same for equal weights, near it for others.

One rank per case and test function.  The pixels of a case are not cases: chi2 over the pixels of one calibrated smooth
image rejects nearly always.

TARP (Lemos et al., ICML 2023): the rank of the truth's distance to a reference point.  A reference that does not depend
on the data cannot see draws that ignore the data; give one that does (``A^T y`` plus noise, another sampler's estimate).

The truth must come from the prior that the sampler uses to test the sampler, from held-out data to test both together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recon.diagnostics.given import Array, draws_of, effective, numbers_of, truth_of, weights_of
from recon.draws import Draws
from recon.errors import InputError
from recon.likelihoods import Likelihood

Probe = Callable[[Tensor], Tensor]
"""A test function: (n, *space) -> (n,)."""


def probes(shape: tuple[int, ...], likelihood: Likelihood | None = None, seed: int = 0) -> dict[str, Probe]:
    """Test functions for arrays of ``shape``: mean, rms, variation, the lowest wave of each axis, four pixels, misfit.

    variation: mean absolute difference of neighbours (order and roughness).  misfit: ``-log p(y | x)`` of
    ``likelihood``, which catches draws that ignore the data.  The pixels are picked by ``seed``.  Those that a small
    array has not are left out.
    """
    size, dims = math.prod(shape), tuple(range(1, len(shape) + 1))
    made: dict[str, Probe] = {"mean": lambda x: x.flatten(1).mean(1)}
    if size > 1:
        made["rms"] = lambda x: x.flatten(1).square().mean(1).sqrt()
        made["variation"] = lambda x: torch.stack(
            [x.diff(dim=d).abs().flatten(1).sum(1) for d in dims if x.shape[d] > 1]
        ).sum(0)
        for axis, n in enumerate(shape):
            if n > 1:
                made[f"wave along axis {axis}"] = _wave(axis, n, len(shape))
        places = Draws(seed, [0]).uniform(0, (4,), "user")[0]
        for place in sorted({int(float(p) * size) for p in places}):
            made[f"pixel {place}"] = lambda x, place=place: x.flatten(1)[:, place]  # type: ignore[misc]
    if likelihood is not None:
        made["misfit"] = lambda x: -likelihood.log_prob(x)
    return made


def _wave(axis: int, n: int, ndim: int) -> Probe:
    wave = torch.cos(torch.pi * (torch.arange(n, dtype=torch.float64) + 0.5) / n)
    wave = wave.reshape([-1 if d == axis else 1 for d in range(ndim)])
    return lambda x: (x.double() * wave).flatten(1).mean(1)


def rank(values: Array, truth: float, u: float, log_weights: Array | None = None) -> float:
    """The randomised rank of one number among those of the draws, in (0, 1).

    values: (draw,).  u: a uniform number in (0, 1).  Raises InputError for values that are no numbers.
    """
    v = draws_of(values)
    if not math.isfinite(truth):
        raise InputError("a truth that is NaN or infinite has no rank")
    w = weights_of(log_weights, len(v))
    n, v = effective(w), v.reshape(len(v), -1)
    if v.shape[1] != 1:
        raise InputError("ranks are of one number per draw; apply a test function first")
    below, ties = float(w[v[:, 0] < truth].sum()), float(w[v[:, 0] == truth].sum())
    return min(1.0, (n * below + u * (n * ties + 1)) / (n + 1))


def case_ranks(
    x: Array,
    truth: Array,
    functions: Mapping[str, Probe] | None = None,
    log_weights: Array | None = None,
    seed: int = 0,
    case: int = 0,
) -> dict[str, float]:
    """Name of each test function -> randomised rank of the truth, for one case.

    x: (draw, *space).  truth: *space.  functions: default ``probes(space)``.  seed, case: of the numbers that break
    ties; give every case its own number.  Judge them over cases with ``judge_all``.
    Raises InputError without a truth, for values that are no numbers, or a function that does not answer one per draw.
    """
    x = draws_of(x)
    truth = truth_of(truth, x).to(x)
    functions = functions if functions is not None else probes(tuple(x.shape[1:]))
    uniform = Draws(seed, [0], case).uniform(0, (max(1, len(functions)),), "user")[0]
    found = {}
    for (name, function), u in zip(functions.items(), uniform.tolist(), strict=False):
        with torch.no_grad():
            # One call: a function's rounding may depend on its batch, and a tie must stay a tie.
            values = function(torch.cat([x, truth[None]]))
        if tuple(values.shape) != (len(x) + 1,):
            raise InputError(f"test function {name!r} must answer one number per draw; got {tuple(values.shape)}")
        found[name] = rank(values[:-1], float(values[-1]), u, log_weights)
    return found


def tarp_fraction(x: Array, truth: Array, reference: Array, log_weights: Array | None = None) -> float:
    """Weight of the draws that lie closer (Euclidean) to ``reference`` than the truth does.

    x: (draw, *space).  truth, reference: *space.  Raises InputError for shapes that do not fit.
    """
    away, own, w = _distances(x, truth, reference, log_weights)
    return float(w[away < own].sum())


def tarp_rank(
    x: Array, truth: Array, reference: Array, log_weights: Array | None = None, seed: int = 0, case: int = 0
) -> float:
    """The randomised rank of the truth's distance to ``reference`` among those of the draws, in (0, 1).

    Uniform over cases for calibrated draws; judge it with ``judge_ranks``.  Raises InputError for shapes that do not fit.
    """
    away, own, _ = _distances(x, truth, reference, log_weights)
    return rank(away, own, float(Draws(seed, [0], case).uniform(1, (1,), "user")), log_weights)


def _distances(x: Array, truth: Array, reference: Array, log_weights: Array | None) -> tuple[Tensor, float, Tensor]:
    x = draws_of(x)
    both = torch.stack([truth_of(truth, x), truth_of(reference, x).to(truth_of(truth, x))])
    rows = torch.cat([x.double(), both[:1].double()]) - both[1].double()
    distance = rows.reshape(len(rows), -1).norm(dim=1)
    return distance[:-1], float(distance[-1]), weights_of(log_weights, len(x))


@dataclass(frozen=True)
class RankHistogram:
    """Counts of randomised ranks over cases.

    counts: (bins,).  expected: per bin.  low, high: between which all bins lie together but for ``false_alarm``.
    outside: the bins that do not.  It shows; ``judge_ranks``, which knows the order of the bins, judges.
    """

    counts: tuple[int, ...]
    expected: float
    low: int
    high: int
    outside: tuple[int, ...]
    false_alarm: float

    def summary(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "counts": list(self.counts),
            "expected": self.expected,
            "low": self.low,
            "high": self.high,
            "outside": list(self.outside),
            "false_alarm": self.false_alarm,
        }


def rank_histogram(
    pit: Any,  # noqa: ANN401
    draws: int,
    bins: int | None = None,
    false_alarm: float = 0.01,
) -> RankHistogram:
    """Histogram of randomised ranks (case,) with a simultaneous band (binomial, shared between the bins).

    bins: default the M + 1 of the ranks, fewer where a bin would expect less than 10 cases.
    Raises InputError for no cases, ranks outside [0, 1], or fewer than one bin.
    """
    from scipy.stats import binom

    u = numbers_of(pit, "ranks")
    if not ((u >= 0) & (u <= 1)).all():
        raise InputError("ranks must be given as fractions (r + U)/(M + 1) between 0 and 1")
    bins = max(1, min(draws + 1, len(u) // 10)) if bins is None else bins
    if bins < 1:
        raise InputError(f"a histogram has at least one bin; got {bins}")
    counts = np.bincount(np.minimum((u * bins).astype(int), bins - 1), minlength=bins)
    tail = false_alarm / (2 * bins)
    # P(count < low) <= tail and P(count > high) <= tail.
    low, high = int(binom.ppf(tail, len(u), 1 / bins)), int(binom.isf(tail, len(u), 1 / bins))
    outside = tuple(int(i) for i in np.flatnonzero((counts < low) | (counts > high)))
    return RankHistogram(tuple(counts.tolist()), len(u) / bins, low, high, outside, false_alarm)
