r"""Joseph's ray sums with the sum of every slice on its own, compiled for the CPU.

``total = start + S_0 + S_1 + ...`` in the order of the slices, where ``S_k`` is what a ray gathers in slice k: the bits that
``cone_kernels.project`` of that slice alone gives.  Sums of slices do not depend on where a volume is cut, so neither does
their sum, as long as it goes on where another left off (``start``).  One walk along the ray, however many slices it crosses.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from recon.operators.cone_beam import Rays
from recon.operators.cone_kernels import (
    _BLOCK,
    Detector,
    Grid,
    _compiled,
    _flat,
    _fma,
    _load,
    _pieces,
    _ray,
    _room,
    _samples,
    _side_by_side,
    _store,
    _zero,
)


@_compiled
def forward_by_slice(
    volume: np.ndarray,
    views: np.ndarray,
    out: np.ndarray,
    detector: Detector,
    lines: tuple[int, int],
    slab: tuple[int, int],
    grid: Grid,
) -> None:
    """Adds to ``out`` (n, rays) what the slices of ``slab`` give, one after the other; the rest as ``cone_kernels.forward``."""
    top, rows, columns, parallel = detector
    shape, sides = grid
    pack = np.zeros_like(volume[:1])
    draws = pack.reshape(pack.size)
    room = (max(shape) + _BLOCK) // _BLOCK * _BLOCK
    at, weights = np.empty(room, np.int64), np.empty((4, room), volume.dtype)
    one, plane = volume.dtype.type(1.0), (shape[0] + 2) * (shape[1] + 2)
    # What slice k gives as the lower and as the upper one of two that a ray passes between; k counts the border.
    height = slab[1] - slab[0] + 2
    lower, upper = np.zeros_like(volume[:height]), np.zeros_like(volume[:height])
    for line in range(lines[0], lines[1]):
        view = views[line // rows]
        for column in range(columns):
            ray = _ray(view, column, top + line % rows, parallel)
            count, s1, s2, length = _samples(ray, shape, sides, slab, at, weights)
            if count == 0:
                continue
            within = s2 != plane  # rays along z: all four voxels lie in one slice
            here = at[0] // plane
            lowest, highest = here, here
            a, b, c, d = _zero(volume), _zero(volume), _zero(volume), _zero(volume)
            for j in range(count):
                i = at[j]
                if not here * plane <= i < (here + 1) * plane:
                    _store(lower, here, _fma(one, a, b))
                    _store(upper, here if within else here + 1, _fma(one, c, d))
                    here = i // plane
                    lowest, highest = min(lowest, here), max(highest, here)
                    a, b, c, d = _zero(volume), _zero(volume), _zero(volume), _zero(volume)
                a = _fma(weights[0, j], _load(volume, i), a)
                b = _fma(weights[1, j], _load(volume, i + s1), b)
                c = _fma(weights[2, j], _load(volume, i + s2), c)
                d = _fma(weights[3, j], _load(volume, i + s1 + s2), d)
            _store(lower, here, _fma(one, a, b))
            _store(upper, here if within else here + 1, _fma(one, c, d))
            for draw in range(len(out)):
                draws[draw] = out[draw, line * columns + column]
            total = _load(pack, 0)
            for k in range(lowest, min(highest + (1 if within else 2), height)):
                if 0 < k < height - 1:
                    both = _fma(one, _load(lower, k), _load(upper, k))
                    total = _fma(one, total, _fma(volume.dtype.type(length), both, _zero(volume)))
                _store(lower, k, _zero(volume))
                _store(upper, k, _zero(volume))
            _store(pack, 0, total)
            for draw in range(len(out)):
                out[draw, line * columns + column] = draws[draw]


def add_slices(rays: Rays, x: Tensor, y: Tensor, slab: tuple[int, int], rows: tuple[int, int]) -> None:
    """Adds to ``y`` (n, angle, rows, detector), contiguous, the slices ``x`` (n, z, y, x) of ``slab``, one after the other."""
    detector = (rows[0], rows[1] - rows[0], rays.columns, rays.parallel)
    for some, width in _pieces(rays, x):
        room = _room((slab[1] - slab[0] + 2, rays.shape[1] + 2, rays.shape[0] + 2), width, x)
        room[1:-1, 1:-1, 1:-1, : len(x[some])] = x[some].detach().permute(1, 2, 3, 0)
        volume, out = _flat(room), y[some].flatten(1).numpy()

        def run(lines: tuple[int, int], volume: np.ndarray = volume, out: np.ndarray = out) -> None:
            forward_by_slice(volume, rays.views, out, detector, lines, slab, (rays.shape, rays.sides))

        _side_by_side(run, len(rays.views) * detector[1])
