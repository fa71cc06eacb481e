r"""What a ray or a beam meets in an image of square pixels: the entries of a projection matrix, compiled for the CPU.

Coordinates are pixels: ``u`` grows with the column from 0 at the left border to nx, ``v`` with the row from 0 to ny.  A ray is
a point and a unit direction (u, v, du, dv).  Everything is computed in double precision from the ray itself, without running
sums, so weights are right to rounding at any image size.

An entry is (ray, place, weight) with ``place = row << 32 | column`` and the weight in pixels.  Kernels fill arrays and return
how many entries there are, or -1 where the arrays are too short.

"line": Siddon's lengths (1985, Med. Phys. 12:252-255), found row by row along the axis the ray follows: with a slope of at most
one it meets one pixel or two in each.  A ray along a border of two pixels counts half in each.
"linear": Joseph's samples (1982, IEEE Trans. Med. Imaging 1:192-196), interpolated between two pixels of each row.
"strip": the mean of the lengths over a detector's width (parallel rays) or over its opening angle (rays from a source):
``w = 1/width \int chord(s) ds``.  By Green's theorem both are integrals over the pixel's border, in closed form:
``\oint t ds`` and ``\oint r dgamma``, where ``\int r dgamma`` along a straight piece from p to q is
``cross(p, q) 2/L atanh(L / (|p| + |q|))``, L its length.
"""

from __future__ import annotations

import math

import numpy as np

from recon.operators.packs import compiled

SIDE = 64  # of a tile, pixels; a power of two, known to the compiler: places are found by shifts
_NOTHING = 1e-9  # pixels; shorter pieces are rounding


@compiled
def _entry(entries: tuple[np.ndarray, np.ndarray, np.ndarray], n: int, ray: int, place: int, weight: float) -> int:
    rays, places, weights = entries
    rays[n], places[n], weights[n] = ray, place, weight
    return n + 1


@compiled
def lines(
    rays: np.ndarray,
    shape: tuple[int, int],
    kind: tuple[bool, bool],
    entries: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> int:
    """The entries of ``rays`` (n, 4) in an image of ``shape`` = (ny, nx).

    kind: whether to interpolate ("linear") instead of measuring lengths; whether the rays start at their points (a source), or
    run both ways.
    """
    linear, starts = kind
    room, n = len(entries[2]), 0
    for ray in range(len(rays)):
        if n + 2 * max(shape) > room:
            return -1
        ou, ov, du, dv = rays[ray, 0], rays[ray, 1], rays[ray, 2], rays[ray, 3]
        if abs(dv) >= abs(du):  # along the rows
            o, d, across, slope, count, width, step, side = ov, dv, ou, du / dv, shape[0], shape[1], 1 << 32, 1
        else:
            o, d, across, slope, count, width, step, side = ou, du, ov, dv / du, shape[1], shape[0], 1, 1 << 32
        across -= o * slope
        length = math.sqrt(1.0 + slope * slope)
        middle = across + 0.5 * count * slope
        border = abs(slope) * count < _NOTHING and abs(middle - round(middle)) < _NOTHING
        for k in range(count):
            if starts and (k + 0.5 - o) * d < 0:
                continue
            p, q = across + k * slope, across + (k + 1) * slope
            share = 1.0
            if linear:
                i = math.floor(across + (k + 0.5) * slope - 0.5)
                j = i + 1
                share = j + 0.5 - (across + (k + 0.5) * slope)
            elif border:
                j = round(middle)
                i, share = j - 1, 0.5
            else:
                i, j = math.floor(p), math.floor(q)
                if i != j:
                    share = (max(i, j) - p) / slope
            if 0 <= i < width and share > _NOTHING:
                n = _entry(entries, n, ray, k * step + i * side, length * share)
            if i != j and 0 <= j < width and 1.0 - share > _NOTHING:
                n = _entry(entries, n, ray, k * step + j * side, length * (1.0 - share))
    return n


@compiled
def _passed(edges: np.ndarray, view: int, turn: float, u: float, v: float, guess: int) -> int:
    """How many edges of a view lie before the point; they follow each other in the sense of ``turn``."""
    k = guess
    while (
        k < edges.shape[1]
        and turn * (edges[view, k, 2] * (v - edges[view, k, 1]) - edges[view, k, 3] * (u - edges[view, k, 0])) >= 0.0
    ):
        k += 1
    while (
        k > 0
        and turn
        * (edges[view, k - 1, 2] * (v - edges[view, k - 1, 1]) - edges[view, k - 1, 3] * (u - edges[view, k - 1, 0]))
        < 0.0
    ):
        k -= 1
    return k


@compiled
def _width(edges: np.ndarray, view: int, k: int, fan: bool) -> float:
    """Of cell ``k``: the angle between its edges, or their distance."""
    du, dv, eu, ev = edges[view, k, 2], edges[view, k, 3], edges[view, k + 1, 2], edges[view, k + 1, 3]
    if fan:
        return abs(math.atan2(du * ev - dv * eu, du * eu + dv * ev))
    return abs(du * (edges[view, k + 1, 1] - edges[view, k, 1]) - dv * (edges[view, k + 1, 0] - edges[view, k, 0]))


@compiled
def _swept(edges: np.ndarray, fan: bool, far: float, ends: tuple[float, float, float, float]) -> float:
    r"""From (pu, pv) to (qu, qv): ``\int (r - far) dgamma`` seen from the edges' source, or ``\int t ds`` along the first edge.

    far: any number, since the angles of a closed line sum to zero; that of the pixel keeps a distant source from costing
    digits.
    """
    pu, pv, qu, qv = ends
    along, up = qu - pu, qv - pv
    if not fan:
        t = (0.5 * (pu + qu)) * edges[0, 2] + (0.5 * (pv + qv)) * edges[0, 3]
        return t * (edges[0, 2] * up - edges[0, 3] * along)
    su, sv = edges[0, 0], edges[0, 1]
    pu, pv, qu, qv = pu - su, pv - sv, qu - su, qv - sv
    p, q = math.sqrt(pu * pu + pv * pv), math.sqrt(qu * qu + qv * qv)
    cross = pu * up - pv * along
    x, y = (along * along + up * up) / (p + q) ** 2, cross / (p * q)
    if (
        x < 1e-3
    ):  # the series of atanh(sqrt(x)) / sqrt(x) and asin(y) / y, whose next terms are below 1e-13 of the first
        distance = 2.0 / (p + q) * (1.0 + x * (1 / 3 + x * (1 / 5 + x * (1 / 7 + x / 9))))
        y *= y
        angle = 1.0 / (p * q) * (1.0 + y * (1 / 6 + y * (3 / 40 + y * (15 / 336 + y * 105 / 3456))))
        return cross * (distance - far * angle)
    return cross * (2.0 / (p + q) * math.atanh(math.sqrt(x)) / math.sqrt(x)) - far * math.asin(y)


@compiled
def _crossing(edges: np.ndarray, k: int, ends: tuple[float, float, float, float]) -> tuple[float, float]:
    """Where an edge cuts a side of a pixel, which runs along one axis; never beyond the ends of that side."""
    pu, pv, qu, qv = ends
    eu, ev, du, dv = edges[k, 0], edges[k, 1], edges[k, 2], edges[k, 3]
    if pv == qv:
        u = eu + (pv - ev) * du / dv if dv != 0.0 else qu
        return min(max(u, min(pu, qu)), max(pu, qu)), pv
    v = ev + (pu - eu) * dv / du if du != 0.0 else qv
    return pu, min(max(v, min(pv, qv)), max(pv, qv))


@compiled
def _side(
    edges: np.ndarray,
    fan: bool,
    far: float,
    ends: tuple[float, float, float, float],
    cells: tuple[int, int],
    sums: np.ndarray,
    first: int,
) -> None:
    """Add a side of a pixel, cut at the edges between its ends, to the sums of the cells ``first``, ``first + 1``, ..."""
    pu, pv, qu, qv = ends
    cell = cells[0]
    while cell != cells[1]:
        up = cells[1] > cell
        u, v = _crossing(edges, cell if up else cell - 1, (pu, pv, qu, qv))
        sums[cell - first] += _swept(edges, fan, far, (pu, pv, u, v))
        pu, pv = u, v
        cell += 1 if up else -1
    sums[cell - first] += _swept(edges, fan, far, (pu, pv, qu, qv))


@compiled
def _view(
    edges: np.ndarray, view: int, fan: bool, shifted: np.ndarray, widths: np.ndarray
) -> tuple[float, float, float, tuple[float, float]]:
    """Where a view's edges start, which way they turn and where they look; fills in their directions and the cells' widths."""
    cells = edges.shape[1] - 1
    su, sv, du, dv = edges[view, 0, 0], edges[view, 0, 1], edges[view, 0, 2], edges[view, 0, 3]
    eu, ev = edges[view, cells, 0] - su, edges[view, cells, 1] - sv
    if fan:
        eu, ev = edges[view, cells, 2], edges[view, cells, 3]
    turn = 1.0 if du * ev - dv * eu > 0.0 else -1.0
    for k in range(cells + 1):
        shifted[k, 2], shifted[k, 3] = edges[view, k, 2], edges[view, k, 3]
    for k in range(cells):
        widths[k] = _width(edges, view, k, fan)
    return su, sv, turn, (du + edges[view, cells, 2], dv + edges[view, cells, 3])


@compiled
def strips(
    edges: np.ndarray,
    shape: tuple[int, int],
    fan: bool,
    entries: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> int:
    """The entries of views whose cells lie between ``edges`` (views, cells + 1, 4), rays in the order of the detector.

    fan: whether the edges of a view start at one point.  Rays are counted view after view.
    """
    ny, nx = shape
    views, borders = edges.shape[0], edges.shape[1]
    cells, room, n = borders - 1, len(entries[2]), 0
    sums, widths = np.zeros(borders + 1), np.empty(cells)
    above, below = np.zeros(nx + 1, np.int64), np.zeros(nx + 1, np.int64)
    shifted = np.empty((borders, 4))
    corners, around = np.array([[0.0, -1.0], [1.0, -1.0], [1.0, 0.0], [0.0, 0.0]]), np.empty(4, np.int64)
    for view in range(views):
        su, sv, turn, ahead = _view(edges, view, fan, shifted, widths)
        for v in range(ny + 1):
            above, below = below, above
            guess = 0
            for u in range(nx + 1):
                if fan and (u - su) * ahead[0] + (v - sv) * ahead[1] <= 0.0:  # behind the source, to one side
                    beyond = turn * (ahead[0] * (v - sv) - ahead[1] * (u - su)) > 0.0
                    below[u] = borders if beyond else 0
                    continue
                guess = _passed(edges, view, turn, float(u), float(v), guess)
                below[u] = guess
            if v == 0:
                continue
            for u in range(nx):
                k0, k1, k2, k3 = above[u], above[u + 1], below[u + 1], below[u]
                low, high = min(k0, k1, k2, k3), max(k0, k1, k2, k3)
                if high == 0 or low == borders:
                    continue
                if fan and (u + 0.5 - su) * ahead[0] + (v - 0.5 - sv) * ahead[1] <= 0.0:
                    continue
                if n + high - low + 1 > room:
                    return -1
                # Coordinates about the pixel: sums of large numbers that nearly cancel would lose digits.
                for k in range(low, high):
                    shifted[k, 0], shifted[k, 1] = edges[view, k, 0] - u, edges[view, k, 1] - v
                shifted[0, 0], shifted[0, 1] = su - u, sv - v
                far = math.hypot(u + 0.5 - su, v - 0.5 - sv)
                around[0], around[1], around[2], around[3] = k0, k1, k2, k3
                for i in range(4):
                    j = (i + 1) & 3
                    ends = (corners[i, 0], corners[i, 1], corners[j, 0], corners[j, 1])
                    _side(shifted, fan, far, ends, (around[i], around[j]), sums, low)
                for k in range(low, high + 1):
                    if 0 < k < borders:
                        weight = abs(sums[k - low]) / widths[k - 1]
                        if weight > _NOTHING:
                            n = _entry(entries, n, view * cells + k - 1, (v - 1) << 32 | u, weight)
                    sums[k - low] = 0.0
    return n


@compiled
def into_blocks(
    entries: tuple[np.ndarray, np.ndarray, np.ndarray],
    count: int,
    scale: float,
    layout: tuple[int, int, int],
    blocks: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray],
) -> int:
    """Sort ``count`` entries of a group by tile and ray, in their order within each; returns the number of runs.

    scale: metres per pixel.  layout: rays of the group, tiles across, tiles.  blocks: values, places, rows,
    starts, pointers, as in ``block_kernels``; long enough.
    """
    rays, places, weights = entries
    per_group, across, tiles = layout
    values, locals_, rows, starts, pointers = blocks
    cursor = np.zeros(tiles * per_group, np.int64)
    for e in range(count):
        v, u = places[e] >> 32, places[e] & 0xFFFFFFFF
        cursor[(v // SIDE * across + u // SIDE) * per_group + rays[e]] += 1
    run, at = 0, 0
    for tile in range(tiles):
        pointers[tile] = run
        for ray in range(per_group):
            here = cursor[tile * per_group + ray]
            cursor[tile * per_group + ray] = at
            if here:
                rows[run], starts[run] = ray, at
                run += 1
                at += here
    pointers[tiles], starts[run] = run, at
    for e in range(count):
        v, u = places[e] >> 32, places[e] & 0xFFFFFFFF
        key = (v // SIDE * across + u // SIDE) * per_group + rays[e]
        values[cursor[key]] = weights[e] * scale
        locals_[cursor[key]] = v % SIDE * (SIDE + 1) + u % SIDE
        cursor[key] += 1
    return run
