r"""Is the mean of bounded numbers, one per case, what it should be?  Valid for any law and any number of cases.

Coverage of one image is a fraction whose law nobody knows (its pixels are correlated), often skewed, so Student's t
fails at the 1 % level for tens of cases.  Betting does not: with numbers ``v_i`` in [0, 1] of mean ``m``, the capital

    K = prod_i (1 + b_i (v_i - m)),      b_i = sqrt(2 log(1/alpha) / (n s_i^2)), cut to 3/4 of what could lose all,

has mean 1 whatever the law, as ``b_i`` looks at earlier numbers only (``s_i^2`` is their variance), so ``P(K >= 1/alpha) <=
alpha`` (Markov).  Against too small means one bets the other way.  The order of the cases means nothing: K is averaged over
some fixed shuffles, which keeps its mean.  Source: Waudby-Smith & Ramdas, JRSS B 86(1), 2024 (predictable plug-in bets).
"""

from __future__ import annotations

import math

import numpy as np

SHUFFLES = 16
CUT = 0.75
HALVINGS = 12


def evidence(values: np.ndarray, mean: float, alpha: float) -> tuple[float, float]:
    """Log capital against "the mean is ``mean``" of who bets on more, and of who bets on less; reject at ``log(1/alpha)``.

    values: (case,) in [0, 1].  mean: inside (0, 1).  alpha: the rate the bets are tuned for.
    """
    v, bet = _bets(values, alpha)
    return _capital(v, bet, mean, 1), _capital(v, bet, mean, -1)


def _bets(values: np.ndarray, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """Shuffled values and what is bet on each, from those before it: two of (shuffle, case)."""
    n = len(values)
    random = np.random.Generator(np.random.Philox(key=np.array([n, 1], dtype=np.uint64)))
    v = np.stack([values[random.permutation(n)] for _ in range(SHUFFLES)])
    count = np.arange(1, n + 1)
    centre = (0.5 + v.cumsum(1)) / (count + 1)
    spread = (0.25 + ((v - centre) ** 2).cumsum(1)) / (count + 1)
    before = np.concatenate([np.full((SHUFFLES, 1), 0.25), spread[:, :-1]], axis=1)
    return v, np.sqrt(2 * math.log(1 / alpha) / (n * before))


def _capital(v: np.ndarray, bet: np.ndarray, mean: float, sign: int) -> float:
    """Log of the mean capital over shuffles; falls with ``mean`` for sign 1, grows with it for -1."""
    most = CUT / mean if sign > 0 else CUT / (1 - mean)
    logs = np.log1p(sign * np.minimum(bet, most) * (v - mean)).sum(1)
    return float(np.logaddexp.reduce(logs)) - math.log(len(v))


def interval(values: np.ndarray, alpha: float) -> tuple[float, float]:
    """The means that bets at ``alpha / 2`` per side do not refute: contains the mean with probability ``1 - alpha`` at least.

    values: (case,) in [0, 1].  Found by halving, to 1/4096, rounded outwards.
    """
    v, bet = _bets(values, alpha / 2)
    limit, mean = math.log(2 / alpha), float(values.mean())
    ends = []
    for sign, refuted in ((1, 0.0), (-1, 1.0)):
        kept = mean
        for _ in range(HALVINGS):
            middle = (refuted + kept) / 2
            if 0 < middle < 1 and _capital(v, bet, middle, sign) < limit:
                kept = middle
            else:
                refuted = middle
        ends.append(refuted)
    return ends[0], ends[1]
