r"""How far each map may be off because the draws are few.

Standard errors, per pixel.  Mean: ``sqrt(sum w^2 (x - m)^2 / (1 - sum w^2))`` (``s/sqrt(M)`` for equal weights).  Standard
deviation: the jackknife over draws, which takes the tails as they are; near-Gaussian pixels have ``s / sqrt(2(M-1))``:
27 % at 8 draws, 13 % at 32, 6 % at 128.  Quantile ``q``: half the distance of the quantiles at ``q +- sqrt(q(1-q)/n)``,
which needs no density.  Probability of exceedance: ``sqrt(p(1-p)/n)`` with ``p`` smoothed off 0 and 1.  ``n = 1/sum w^2``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recon import order
from recon.diagnostics.given import Array, draws_of, effective, weights_of
from recon.errors import InputError

CHUNK = 1 << 22  # draws x pixels held at a time


@dataclass(frozen=True, eq=False)
class MonteCarloErrors:
    """Standard errors of maps; what cannot be known from so few draws is None, and ``reasons`` says why.

    mean, std: *space, data units.  quantiles: level -> *space.  ess: effective number of draws.
    """

    mean: Tensor | None
    std: Tensor | None
    quantiles: dict[float, Tensor | None]
    ess: float
    reasons: tuple[str, ...]

    def summary(self) -> dict[str, Any]:
        """JSON values: root mean squares of the maps."""

        def rms(value: Tensor | None) -> float | None:
            return None if value is None else float(value.square().mean().sqrt())

        quantiles = {f"{q:g}": rms(value) for q, value in self.quantiles.items()}
        return {
            "mean": rms(self.mean),
            "std": rms(self.std),
            "quantiles": quantiles,
            "ess": self.ess,
            "reasons": list(self.reasons),
        }


def monte_carlo_errors(
    x: Array, log_weights: Array | None = None, quantiles: Sequence[float] = (0.05, 0.5, 0.95)
) -> MonteCarloErrors:
    """Standard errors of the mean, std and quantile maps of draws (draw, *space).

    Raises InputError for draws or weights that are no numbers, or quantiles outside (0, 1).
    """
    x = draws_of(x)
    w = weights_of(log_weights, len(x))
    ess, shape = effective(w), tuple(x.shape[1:])
    if not all(0 < q < 1 for q in quantiles):
        raise InputError(f"quantiles lie between 0 and 1; got {list(quantiles)}")
    if ess < 1 + 1e-9:
        none = dict.fromkeys(quantiles)
        return MonteCarloErrors(None, None, none, ess, ("one draw does not know how far it is off",))
    reasons = []
    rows = x.reshape(len(x), -1)
    step = max(1, CHUNK // len(x))
    counts = w > 0  # draws without weight are not there
    parts = [_moments(part[counts].double(), w[counts]) for part in rows.split(step, dim=1)]
    mean = torch.cat([m for m, _ in parts]).reshape(shape)
    std = None
    if int(counts.sum()) < 3:
        reasons.append("the error of the std map needs at least 3 draws")
    else:
        std = torch.cat([s for _, s in parts]).reshape(shape)
    levels: dict[float, Tensor | None] = dict.fromkeys(quantiles)
    asked: dict[float, float] = {}  # quantile -> how far the two beside it are
    for q in quantiles:
        half = math.sqrt(q * (1 - q) / ess)
        if q - half < 1 / (ess + 1) - 1e-12 or q + half > ess / (ess + 1) + 1e-12:
            reasons.append(f"the error of the {q:g} quantile needs more than {ess:.3g} draws")
        else:
            asked[q] = half
    ends = order.quantiles(x, [p for q, half in asked.items() for p in (q - half, q + half)], w)
    levels |= {q: (ends[2 * i + 1] - ends[2 * i]).double() / 2 for i, q in enumerate(asked)}
    return MonteCarloErrors(mean, std, levels, ess, tuple(reasons))


def _moments(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Standard errors of the mean and of the std of (draw, n), the latter zeros with fewer than 3 draws."""
    weight, left = w[:, None], (1 - w)[:, None]
    square = (x - weight.mul(x).sum(0)) ** 2
    distinct = 1 - w.square().sum()
    total = (weight * square).sum(0)
    mean = ((weight**2 * square).sum(0) / distinct).sqrt()
    if len(w) < 3:
        return mean, torch.zeros_like(mean)
    # Without draw d: mean m - w r / (1 - w), weighted squares (S - w r^2 / (1 - w)) / (1 - w), and its own share of pairs.
    rest = (1 - w.square().sum() - 2 * w * (1 - w)) / (1 - w) ** 2
    without = ((total - weight * square / left) / left / rest.clamp(min=1e-12)[:, None]).clamp(min=0).sqrt()
    # (draw, weight) are one pair: leaving out a pair is right for weights that depend on the draw, as importance weights do.
    variance = (len(w) - 1) / len(w) * ((without - without.mean(0)) ** 2).sum(0)
    return mean, variance.sqrt()


def exceedance(x: Array, threshold: float | Array, log_weights: Array | None = None) -> tuple[Tensor, Tensor]:
    """Probability that the field exceeds ``threshold``, and its standard error: two maps *space.

    ``(n W + 1/2)/(n + 1)``, never 0 or 1: with M draws nothing rarer than about 1/M can be said.
    threshold: a number or *space.  Raises InputError for values that are no numbers or a threshold that does not fit.
    """
    x = draws_of(x)
    w = weights_of(log_weights, len(x))
    limit = torch.as_tensor(threshold).cpu()
    if limit.ndim and limit.shape != x.shape[1:]:
        raise InputError(f"a threshold is a number or {tuple(x.shape[1:])}; got {tuple(limit.shape)}")
    n = effective(w)
    p = (n * torch.einsum("d,d...->...", w, (x > limit).double()) + 0.5) / (n + 1)
    return p, (p * (1 - p) / n).sqrt()
