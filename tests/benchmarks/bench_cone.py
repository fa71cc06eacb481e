"""Cone-beam projection on the CPU against the floor of its ray model, one thread.

Every sample of a ray (one plane of the volume) costs its coordinates and weights once, and four fused multiply-adds with an
operand from memory for each draw; the transpose as many, each with a store.  The arithmetic floor is the number of samples of
this scan, counted, times what the plainest loops of those two kinds take here when everything lies in the first-level cache.
The memory floor is the time to stream the volumes of all draws past once for every view (for the transpose in and out): they
are larger than the caches of one core.  The floor is the larger of the two; it is below what any order of the rays can reach.
All are processor times, and the smallest of several rounds.  A bar that falls short is reported, never an error.

    python tests/benchmarks/bench_cone.py [--size 64] [--views 60] [--rounds 5]
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable

import numpy as np
import torch
from numba import njit

from recon.operators import ConeBeam, ConeGeometry
from recon.operators import cone_kernels as kernels
from recon.space import Space

BAR = 3.0
_fma, _load, _store, _zero = kernels._fma, kernels._load, kernels._store, kernels._zero


@njit(nogil=True)
def add_up(volume, out, weights, reps):
    """Four multiply-adds a step from a buffer in order, a sum each."""
    for _ in range(reps):
        a, b, c, d = _zero(volume), _zero(volume), _zero(volume), _zero(volume)
        for j in range(0, len(volume), 4):
            a = _fma(weights[0], _load(volume, j), a)
            b = _fma(weights[1], _load(volume, j + 1), b)
            c = _fma(weights[2], _load(volume, j + 2), c)
            d = _fma(weights[3], _load(volume, j + 3), d)
        _store(out, 0, _fma(weights[0], a, b))
        _store(out, 1, _fma(weights[0], c, d))


@njit(nogil=True)
def add_to(volume, out, weights, reps):
    """Four multiply-adds a step to a buffer in order."""
    for _ in range(reps):
        value = _load(out, 0)
        for j in range(0, len(volume), 4):
            _store(volume, j, _fma(weights[0], value, _load(volume, j)))
            _store(volume, j + 1, _fma(weights[1], value, _load(volume, j + 1)))
            _store(volume, j + 2, _fma(weights[2], value, _load(volume, j + 2)))
            _store(volume, j + 3, _fma(weights[3], value, _load(volume, j + 3)))


@njit(nogil=True)
def weigh(at, weights, reps):
    """Coordinates and weights of the samples of a ray, without its ends, limits and length."""
    for r in range(reps):
        m1, m2 = 0.3 + 1e-9 * r, 0.1
        for j in range(len(at)):
            p1, p2 = 1.5 + j * m1, 2.5 + j * m2
            i1, i2 = np.int32(p1), np.int32(p2)
            f1, f2 = p1 - i1, p2 - i2
            at[j] = j * 4356 + i1 * 66 + i2
            both = f1 * f2
            weights[0, j] = 1.0 - f1 - (f2 - both)
            weights[1, j] = f1 - both
            weights[2, j] = f2 - both
            weights[3, j] = both


@njit(nogil=True)
def count(views, rows, columns, shape, sides):
    """Samples of all rays."""
    at, weights, total = np.empty(max(shape) + 32, np.int64), np.empty((4, max(shape) + 32), np.float32), 0
    for v in range(len(views)):
        for r in range(rows):
            for c in range(columns):
                total += kernels._samples(
                    kernels._ray(views[v], c, r, False), shape, sides, (0, shape[2]), at, weights
                )[0]
    return total


def best(call: Callable[[], object], rounds: int) -> float:
    """Smallest processor time of a call, seconds; the first call, which compiles, is not counted."""
    call()
    times = []
    for _ in range(rounds):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return min(times)


def floors(size: int, draws: int, rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds per sample of a pack in the first-level cache, and per view of streaming the volumes, for both directions."""
    lanes = () if draws == 1 else (16,)
    near, out, far = (
        kernels._flat(kernels._room((count,), *(lanes or (1,)), torch.empty(0)))
        for count in (16384 // 4 // math.prod(lanes), 2, size**3 // 4 * 4)
    )
    weights, at, table = np.full(4, 0.25, np.float32), np.empty(size, np.int64), np.empty((4, size), np.float32)
    reps = 4_000_000 // len(near)
    weighing = best(lambda: weigh(at, table, 20_000), rounds) / (20_000 * size)
    sample, stream = {}, {}
    for name, loop in (("A", add_up), ("A^T", add_to)):
        sample[name] = weighing + best(lambda loop=loop: loop(near, out, 0 * weights, reps), rounds) / (
            reps * len(near) / 4
        )
        stream[name] = best(lambda loop=loop: loop(far, out, 0 * weights, 1), rounds)
    return sample, stream


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--views", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    n, views = given.size, given.views
    pixel, wide = 1e-3, n + n // 2
    angles = tuple(np.arange(views) * (2 * math.pi / views))
    geometry = ConeGeometry(angles, wide, wide, 1.3 * pixel, 3 * n * pixel, 1.5 * n * pixel)
    A = ConeBeam(Space.grid((n, n, n), pixel, "1/m"), geometry)
    samples = count(A.rays.views, wide, wide, A.rays.shape, A.rays.sides)
    print(f"{n}^3 voxels, {views} views of {wide} x {wide}, {samples / 1e6:.1f} million samples, float32, one thread")
    print(f"{'':10s}{'draws':>6s}{'measured':>12s}{'arithmetic':>12s}{'memory':>10s}{'ratio':>8s}   seconds")
    for draws in (1, 16):
        x, y = torch.rand(draws, *A.domain.shape), torch.rand(draws, *A.range.shape)
        sample, stream = floors(n, draws, given.rounds)
        for name, call in (("A", lambda x=x: A(x)), ("A^T", lambda y=y: A.A_adjoint(y))):
            took = best(call, given.rounds)
            arithmetic, memory = samples * sample[name], views * stream[name]
            ratio = took / max(arithmetic, memory)
            verdict = "" if ratio <= BAR else f"   above the bar of {BAR:g}"
            print(f"{name:10s}{draws:6d}{took:12.3f}{arithmetic:12.3f}{memory:10.3f}{ratio:8.2f}{verdict}")


if __name__ == "__main__":
    main()
