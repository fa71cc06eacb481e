r"""What a vector of log-weights says: evidence, effective sample size, largest weight; in float64, whole, the same everywhere.

``w_i = exp(l_i)``; ``W_i = w_i / sum w``.  Kish's effective sample size is ``1 / sum W_i^2``, between 1 and the number of
particles.  A particle of weight zero has ``l = -inf``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from recon.errors import ReconError


def normalised(log_w: Tensor) -> Tensor:
    """``W_i``: (K,) float64, sum one.  Raises ReconError when no weight is positive, or one is NaN or infinite."""
    log_w = log_w.double()
    if bool(torch.isnan(log_w).any()) or bool((log_w == torch.inf).any()):
        bad = int((torch.isnan(log_w) | (log_w == torch.inf)).sum())
        raise ReconError(f"{bad} of {len(log_w)} log-weights are NaN or +inf; such particles must be set aside first")
    if len(log_w) == 0 or not bool(torch.isfinite(log_w).any()):
        raise ReconError(
            f"none of {len(log_w)} particles has a weight above zero: the likelihood is zero (or not a number) wherever the "
            "particles are. Check data and noise level, or take more particles or a gentler twist."
        )
    return torch.softmax(log_w, 0)


def effective(weights: Tensor) -> float:
    """``1 / sum W^2`` of normalised weights."""
    return float(1 / weights.square().sum())


def log_mean(log_w: Tensor) -> float:
    """``log (1/K sum exp l_i)``, particles of weight zero included; -inf when all are."""
    return float(torch.logsumexp(log_w.double(), 0)) - math.log(len(log_w))


def evidence_variance(weights: Tensor, first: Tensor, multinomial: int = 0) -> float:
    r"""Estimate, from the same run, of the relative variance of the evidence (Lee and Whiteley 2018, eq. 8).

    ``1 - (K / (K - 1))^(n + 1) (1 - sum_e (sum_{i: e_i = e} W_i)^2)`` with ``e_i`` the particle at the start from which ``i``
    descends and ``n`` the *multinomial* resamplings, whose chance meetings it takes off.  The other schemes make fewer, and
    nothing is taken off for them: what they leave makes the estimate too large rather than too small.  Between 0 and 1; one
    means that all descend from one particle, and then it says nothing.
    """
    K = len(weights)
    if K < 2:
        return math.nan
    shares = torch.zeros(int(first.max()) + 1, dtype=torch.float64).index_add_(0, first.long(), weights)
    together = float(shares.square().sum())
    return min(1.0, max(0.0, 1 - (K / (K - 1)) ** (multinomial + 1) * (1 - together)))


def tempered(base: Tensor, potential: Tensor, floor: float, lowest: float = 0.0) -> float:
    """The largest exponent ``t`` in [lowest, 1] for which weights ``base + t potential`` keep an effective size >= ``floor``.

    By bisection to 2^-40.  ``lowest`` itself is answered where even it keeps less; one where one keeps enough.
    """

    def kept(t: float) -> bool:
        log_w = base + t * potential if t else torch.where(potential > -torch.inf, base, -torch.inf)
        return effective(normalised(log_w)) >= floor

    if kept(1.0):
        return 1.0
    low, high = lowest, 1.0
    if not kept(low):
        return low
    for _ in range(40):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if kept(middle) else (low, middle)
    return low
