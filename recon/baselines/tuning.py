"""The weight of a baseline, chosen on known truths."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from recon.baselines.variation import TVSolver, tv
from recon.errors import InputError
from recon.operators.base import LinearOperator


@dataclass(frozen=True)
class TunedTV:
    """The best weight on some truths, and how the others did.

    weight: with the highest mean PSNR.  psnr: mean over the images per weight tried, dB.  at_edge: whether the best weight is
    the smallest or largest tried, so that a wider list may do better.
    """

    weight: float
    psnr: Mapping[float, float]

    @property
    def at_edge(self) -> bool:
        """Whether the list of weights ended before the optimum was bracketed."""
        return self.weight in (min(self.psnr), max(self.psnr))


def tune_tv(
    operator: LinearOperator,
    ys: Tensor,
    truths: Tensor,
    sigma: float | Tensor,
    weights: Sequence[float],
    solver: TVSolver | None = None,
) -> TunedTV:
    """The total-variation weight with the best mean PSNR on known truths: the competitor at its strongest.

    ys: (n, *range.shape).  truths: (n, *domain.shape).  PSNR is ``20 log10(peak) - 10 log10(mean squared error)`` per image
    with one peak, the largest value of all truths less the smallest.  Raises InputError for shapes that do not pair, no
    weights, or constant truths.
    """
    batch = operator.domain.require(tuple(truths.shape), "tune_tv (truths)")
    if batch != operator.range.require(tuple(ys.shape), "tune_tv (ys)"):
        raise InputError(
            f"tune_tv pairs each measurement with a truth; got {tuple(ys.shape)} and {tuple(truths.shape)}"
        )
    if len(weights) == 0:
        raise InputError("tune_tv needs at least one weight to try")
    peak = float(truths.max() - truths.min())
    if not peak > 0:
        raise InputError("tune_tv needs truths that are not constant: PSNR is relative to their range")
    psnr = {}
    for weight in weights:
        error = (tv(operator, ys, sigma, weight, solver).x - truths).square().flatten(1).mean(1)
        psnr[float(weight)] = float((20 * math.log10(peak) - 10 * error.log10()).mean())
    return TunedTV(max(psnr, key=lambda weight: psnr[weight]), psnr)
