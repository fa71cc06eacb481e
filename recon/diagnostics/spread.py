r"""Is the spread of the draws as large as their errors, and how well do M draws know it?

With weights ``w`` (``1/M`` each when equal), effective size ``M = 1/sum w^2``, draws ``x_d`` and truth ``t``:

* Monte-Carlo error of the mean map ``std / sqrt(M)``, and relative error of the std map ``1 / sqrt(2 (M - 1))``.
* Central interval of probability ``p``: between the order statistics at ``k/(M+1)`` (see ``recon.order``); it exists when
  ``1/(M+1) <= (1-p)/2``: from 3 draws for 50 %, 19 for 90 %, 39 for 95 %.
* Spread-skill ratio ``sqrt(mean var) / RMSE(mean) * sqrt((M+1)/M)``: 1 when errors are as large as the spread says; below 1 the
  ensemble is over-confident (Fortin et al., J. Hydrometeorology 15, 2014).
* Fair CRPS ``E|X - t| - 1/2 E|X - X'|`` with pairs of different draws only, so that it does not depend on M on average (Ferro,
  QJRMS 140, 2014).  Sorted form: ``sum_{d<e} w_d w_e |x_d - x_e| = sum_k w_k x_(k) (2 W_k - w_k - 1)``, ``W`` the cumulated
  sorted weights.
* ``determined = 1 - Var_post / Var_prior``: 1 where the data decided, 0 where the prior did.

The pixels of one image are correlated: averages over them *describe* one case.  They verify nothing; that takes many
independent problems (one number per problem).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recon.diagnostics.intervals import draws_needed as draws_needed  # the pages ask for it here
from recon.diagnostics.scores import fair_crps
from recon.ensemble import Ensemble
from recon.errors import InputError
from recon.order import quantiles

LEVELS = (0.5, 0.9)
GROUP = 20  # fewest pixels whose rms error is worth a point


@dataclass(frozen=True)
class Spread:
    """Spread of an ensemble in single numbers, and against the truth where it is known; made by ``ensemble_spread``.

    std: root mean square of the std map, in data units.  mean_error: rms Monte-Carlo error of the mean map, in data units.
    std_error: relative Monte-Carlo error of the std map.  coverage: probability -> fraction of pixels inside, None where the
    draws are too few.  skill: spread-skill ratio.  crps: mean fair CRPS, in data units.  outside: fraction of pixels outside
    the range of the draws; outside_expected ``2/(M+1)``.  determined: mean of ``1 - Var_post/Var_prior``.
    """

    std: float
    mean_error: float
    std_error: float
    coverage: Mapping[float, float | None]
    skill: float | None
    crps: float | None
    outside: float | None
    outside_expected: float
    determined: float | None


def ensemble_spread(
    ensemble: Ensemble, truth: Tensor | None = None, prior_variance: float | Tensor | None = None
) -> Spread:
    """All figures of this module; those that need a truth, a prior variance or more draws are None.

    truth, prior_variance: *space.shape (the latter or a number), in data units and their square.
    Raises InputError when shapes do not fit.
    """
    several = len(ensemble) > 1
    std = ensemble.std().double() if several else None
    known = truth is not None and several
    fraction = determined(ensemble, prior_variance)
    return Spread(
        std=_rms(std) if std is not None else math.nan,
        mean_error=_rms(mean_error(ensemble)) if several else math.nan,
        std_error=std_error(ensemble),
        coverage=dict.fromkeys(LEVELS) if truth is None else _coverages(ensemble, truth, LEVELS),
        skill=spread_skill(ensemble, truth) if known and truth is not None else None,
        crps=_mean_crps(ensemble, truth) if known and truth is not None else None,
        outside=outside(ensemble, truth) if truth is not None else None,
        outside_expected=2 / (ensemble.ess + 1),
        determined=None if fraction is None else float(fraction.mean()),
    )


def mean_error(ensemble: Ensemble) -> Tensor:
    """Monte-Carlo standard error of the mean map: *space.shape.

    ``std / sqrt(ESS)``; of antithetic draws, from the means of their pairs.  Raises InputError for a single draw or pair.
    """
    return ensemble.mean_variance().sqrt() if ensemble.antithetic else ensemble.std() / math.sqrt(ensemble.ess)


def std_error(ensemble: Ensemble) -> float:
    """Relative Monte-Carlo error of the std map, ``1 / sqrt(2 (ESS - 1))`` for near-Gaussian pixels; NaN for a single draw."""
    return 1 / math.sqrt(2 * (ensemble.ess - 1)) if ensemble.ess > 1 + 1e-9 else math.nan


def coverage(ensemble: Ensemble, truth: Tensor, level: float = 0.9) -> float | None:
    """Fraction of pixels whose truth lies in the central interval of probability ``level``; None with too few draws.

    truth: *space.shape.  Compare with ``level``.  Raises InputError when shapes do not fit or the level is outside (0, 1).
    """
    return _coverages(ensemble, truth, (level,))[level]


def _coverages(ensemble: Ensemble, truth: Tensor, levels: Sequence[float]) -> dict[float, float | None]:
    """``coverage`` at several levels, from one sort of the draws."""
    truth = _fitting(ensemble, truth).cpu()
    found: dict[float, float | None] = dict.fromkeys(levels)
    there = [level for level in levels if ensemble.ess >= draws_needed(level) - 1e-6]
    ends = quantiles(
        ensemble.x.detach().cpu(),
        [p for level in there for p in ((1 - level) / 2, (1 + level) / 2)],
        ensemble.weights.cpu(),
    )
    for i, level in enumerate(there):
        found[level] = float(((truth >= ends[2 * i]) & (truth <= ends[2 * i + 1])).double().mean())
    return found


def outside(ensemble: Ensemble, truth: Tensor) -> float:
    """Fraction of pixels whose truth lies outside the range of the draws; ``2/(M+1)`` is expected.  truth: *space.shape."""
    truth, ensemble = _fitting(ensemble, truth), ensemble.independent()
    return float(((truth < ensemble.x.amin(0)) | (truth > ensemble.x.amax(0))).double().mean())


def spread_skill(ensemble: Ensemble, truth: Tensor) -> float:
    """Spread over error, ``sqrt(mean var) / RMSE(mean) * sqrt((M+1)/M)``; below 1: over-confident.

    truth: *space.shape.  Raises InputError when shapes do not fit or there is one draw only.
    """
    error = _rms(ensemble.mean().double() - _fitting(ensemble, truth).double())
    if ensemble.antithetic:  # whose mean is better than that of as many draws
        ratio = _rms((ensemble.std().square() + ensemble.mean_variance()).sqrt())
    else:
        ratio = math.sqrt((ensemble.ess + 1) / ensemble.ess) * _rms(ensemble.std())
    return ratio / error if error > 0 else math.inf


def crps(ensemble: Ensemble, truth: Tensor) -> Tensor:
    """Fair continuous ranked probability score per pixel, in data units; smaller is better.

    truth: *space.shape.  Returns *space.shape, float64; O(M log M) per pixel, a slab of pixels at a time.
    Raises InputError when shapes do not fit, values are no numbers, or one draw only counts (the fair score compares pairs).
    """
    if len(ensemble) < 2:
        raise InputError("the fair CRPS needs at least 2 draws")
    return fair_crps(ensemble.x, _fitting(ensemble, truth), ensemble.log_weights, ensemble.antithetic)


def determined(ensemble: Ensemble, prior_variance: float | Tensor | None) -> Tensor | None:
    """``1 - Var_post / Var_prior`` per pixel: what the data decided; None without a prior variance or with one draw.

    prior_variance: a number or *space.shape, data units squared.  Below 0: the draws spread more than the prior.
    Raises InputError for a variance that is not positive or does not fit.
    """
    if prior_variance is None or len(ensemble) < 2:
        return None
    variance = torch.as_tensor(prior_variance, dtype=torch.float64)
    if variance.ndim and tuple(variance.shape) != ensemble.space.shape:
        raise InputError(f"a prior variance is a number or {ensemble.space.describe()}; got {tuple(variance.shape)}")
    if not bool((variance > 0).all()):
        raise InputError("a prior variance must be positive everywhere")
    return 1 - ensemble.std().double().cpu().square() / variance


def reliability(ensemble: Ensemble, truth: Tensor, bins: int = 10) -> tuple[list[float], list[float]]:
    """Error against spread: pixels in groups of equal size by std; rms spread and rms error of the mean in each.

    truth: *space.shape.  bins: number of groups, fewer where they would hold less than 20 pixels.  Calibrated draws give equal
    numbers in every group, for any M: each half of the draws groups the pixels for the other half, whose spread is measured,
    since a group picked for its small std would have too small a std; and the spread carries the factor ``sqrt((M+1)/M)``.
    Raises InputError when shapes do not fit or there are fewer than 4 draws.
    """
    ensemble = ensemble.independent()
    if len(ensemble) < 4:
        raise InputError(f"error against spread takes two halves of at least 2 draws; got {len(ensemble)} draws")
    error = (ensemble.mean().double() - _fitting(ensemble, truth).double()).flatten()
    log_w, factor = ensemble.weights.log(), math.sqrt((ensemble.ess + 1) / ensemble.ess)
    halves = [Ensemble(ensemble.x[h::2], ensemble.space, log_w[h::2]).std().double().flatten() for h in (0, 1)]
    groups = [half.argsort().tensor_split(max(1, min(bins, half.numel() // GROUP))) for half in halves]
    spreads, errors = [], []
    for first, second in zip(*groups, strict=True):
        spreads.append(factor * _rms(torch.cat([halves[1][first], halves[0][second]])))
        errors.append(_rms(torch.cat([error[first], error[second]])))
    return spreads, errors


def _mean_crps(ensemble: Ensemble, truth: Tensor) -> float:
    """NaN, which a page shows as no number, where draws are none or one has all the weight."""
    usable = bool(torch.isfinite(ensemble.x).all()) and ensemble.ess > 1 + 1e-9
    return float(crps(ensemble, truth).mean()) if usable else math.nan


def _rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())


def _fitting(ensemble: Ensemble, truth: Tensor) -> Tensor:
    if tuple(truth.shape) != ensemble.space.shape:
        raise InputError(f"the truth must be {ensemble.space.describe()}; got {tuple(truth.shape)}")
    return truth.to(ensemble.x.device)
