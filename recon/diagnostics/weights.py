r"""How many draws a weighted ensemble is worth.

Kish ``1 / sum w^2``; entropy ``exp(-sum w log w)`` (never less than Kish); the largest weight; distinct ancestors of
resampled particles; and the Pareto shape k of the largest weights: moments of the weights of order ``1/k`` and above do
not exist, so from about 0.7 on averages cannot be trusted, and no number of draws that one can afford changes it
(Vehtari et al., JMLR 25, 2024).

k is the posterior mean of Zhang & Stephens (Technometrics 51, 2009) for the generalised Pareto law of the tail, drawn
towards 1/2 by ten imagined points.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from recon.diagnostics.given import Array, effective, weights_of

TAIL = 5  # fewest weights that make a tail
LIMIT = 0.7


@dataclass(frozen=True)
class WeightHealth:
    """Figures of the weights of an ensemble.

    draws: their number M.  ess: Kish's.  entropy_ess.  largest: the largest weight.  ancestors: distinct ones, where known.
    pareto_k: None for equal weights (there is no tail) and for fewer than 25 draws.  warnings: what is wrong, in words.
    """

    draws: int
    ess: float
    entropy_ess: float
    largest: float
    ancestors: int | None
    pareto_k: float | None
    warnings: tuple[str, ...]

    def summary(self) -> dict[str, Any]:
        """JSON values."""
        names = ("draws", "ess", "entropy_ess", "largest", "ancestors", "pareto_k")
        return {**{name: getattr(self, name) for name in names}, "warnings": list(self.warnings)}


def weight_health(log_weights: Array, ancestors: int | None = None) -> WeightHealth:
    """The figures of log-weights (draw,); ``ancestors``: number of distinct ancestors, if there was resampling.

    Raises InputError for weights that are none.
    """
    w = weights_of(log_weights, len(log_weights))
    ess, largest = effective(w), float(w.max())
    positive = w[w > 0]
    entropy = math.exp(-float((positive * positive.log()).sum()))
    k = pareto_k(log_weights)
    said = []
    if ess < 20:
        said.append(f"{len(w)} draws are worth {ess:.3g}")
    if k is not None and k > LIMIT:
        said.append(f"the weights have too heavy a tail (Pareto k {k:.2f} > {LIMIT:g}): averages cannot be trusted")
    if ancestors is not None and ancestors < 20:
        said.append(f"the draws descend from {ancestors} ancestors")
    return WeightHealth(len(w), ess, entropy, largest, ancestors, k, tuple(said))


def pareto_k(log_weights: Array) -> float | None:
    """Shape of the generalised Pareto law of the largest ``min(M/5, 3 sqrt M)`` weights; None where they make no tail.

    log_weights: (draw,).  Raises InputError for weights that are none.
    """
    w = weights_of(log_weights, len(log_weights)).numpy()
    count = int(min(len(w) / 5, 3 * math.sqrt(len(w))))
    if count < TAIL or len(w) < 5 * TAIL:
        return None
    # Relative to the largest, so that small numbers keep their digits.
    ordered = np.sort(w / w.max())
    excess = ordered[-count:] - ordered[-count - 1]
    if not excess[-1] > 1e-12 or not excess[0] > 0:
        return None
    return _shape(excess)


def _shape(excess: np.ndarray) -> float:
    """Zhang & Stephens' estimate from sorted positive excesses, with Vehtari's prior."""
    n = len(excess)
    points = 30 + int(math.sqrt(n))
    quartile = excess[int(n / 4 + 0.5) - 1]
    theta = 1 / excess[-1] + (1 - np.sqrt(points / (np.arange(1, points + 1) - 0.5))) / (3 * quartile)
    shape = np.log1p(-theta[:, None] * excess).mean(1)
    profile = n * (np.log(-theta / shape) - shape - 1)
    weight = np.exp(profile - profile.max())
    weight /= weight.sum()
    best = float(theta @ weight)
    k = float(np.log1p(-best * excess).mean())
    return (n * k + 10 * 0.5) / (n + 10)
