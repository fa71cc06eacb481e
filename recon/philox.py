"""Philox4x64-10 (Salmon et al. 2011) for many keys at once.

``numpy.random.Philox`` makes one stream quickly but costs microseconds to set up; an ensemble of thousands of small draws
needs a few words of thousands of streams.  Same words, checked against numpy's in the tests.
"""

from __future__ import annotations

import numpy as np

_MULTIPLIERS = (np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157))
_WEYL = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBB67AE8584CAA73B))
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


def _multiply(a: np.uint64, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """High and low 64 bits of ``a * b``, from four products of 32-bit halves."""
    a_high, a_low = a >> _HALF, a & _LOW
    b_high, b_low = b >> _HALF, b & _LOW
    cross = a_high * b_low + (a_low * b_low >> _HALF)
    middle = a_low * b_high + (cross & _LOW)
    return a_high * b_high + (cross >> _HALF) + (middle >> _HALF), a * b


def words(keys: tuple[np.ndarray, np.ndarray], counters: tuple[np.ndarray, ...]) -> np.ndarray:
    """The four output words of each (key, counter).

    keys: two uint64 arrays; counters: four; all of one shape (...).  Returns uint64 (..., 4).
    """
    k0, k1 = keys
    c0, c1, c2, c3 = counters
    with np.errstate(over="ignore"):
        for _ in range(10):
            high0, low0 = _multiply(_MULTIPLIERS[0], c0)
            high1, low1 = _multiply(_MULTIPLIERS[1], c2)
            c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
            k0, k1 = k0 + _WEYL[0], k1 + _WEYL[1]
    return np.stack([c0, c1, c2, c3], axis=-1)
