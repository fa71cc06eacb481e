r"""Joseph's ray sums through a volume, and their exact transpose, compiled for the CPU.

A ray ``o + t d``, in voxel indices (x, y, z), crosses the planes ``k`` of the axis along which ``d`` is longest.  On each plane
the volume is interpolated bilinearly from four voxels; the sum over planes times the distance between two planes along the ray
is the line integral (Joseph 1982, IEEE Trans. Med. Imaging 1:192-196, extended to three dimensions).  Outside the voxels the
volume is zero, so it fades out over half a voxel at its border.

Volumes carry a border of one zero voxel on every side (no index is tested inside a loop) and come in two layouts: (voxels,)
holds one draw, (voxels, LANES) as many draws as fill a cache line, the draws innermost: coordinates and weights of a ray are
then computed once for all of them, and every multiply-add works on all of them at once.

Every multiply-add is a fused one, asked for by name, and nothing is reordered: a draw gives the same bits alone, in company,
and whatever the number of threads.  A ray is summed by one thread, plane after plane.  The transpose adds rays in their order
to a slab of planes z that one thread owns; a voxel meets the same additions in the same order however the slabs are cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, cast

import numpy as np
import torch
from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.extending import intrinsic, models, register_model
from torch import Tensor

from recon.operators.cone_beam import Rays

LINE_BYTES = 64  # of a cache line, and of the widest registers
_PACK_BYTES = 2**32  # packed volumes are made up to this size; above it draws go one by one
_BLOCK = 16  # planes are prepared in whole blocks: vector code without a remainder

Node = Any  # the compiler's own objects, which carry no Python types
F = TypeVar("F", bound=Callable[..., Any])
_builtin: Callable[[Callable[..., Node]], Callable[..., Any]] = intrinsic
_register: Callable[[Any], Callable[[F], F]] = register_model


def _compiled(function: F) -> F:
    """Without the GIL, kept on disk; no fast mathematics, which would make bits depend on the code around."""
    compiled: Any = njit(nogil=True, cache=True, error_model="numpy")(function)
    return cast(F, compiled)


# --- A pack of draws: one vector register --------------------------------------------------------------------------------


class _Pack(types.Type):
    """``width`` draws of one voxel or ray."""

    def __init__(self, dtype: Node, width: int) -> None:
        self.dtype, self.width = dtype, width
        super().__init__(name=f"Pack({dtype}, {width})")


@_register(_Pack)
class _PackModel(models.PrimitiveModel):
    def __init__(self, manager: Node, pack: _Pack) -> None:
        element = manager.lookup(pack.dtype).get_value_type()
        super().__init__(manager, pack, ir.VectorType(element, pack.width))  # type: ignore[no-untyped-call]


def _pack(array: Node) -> _Pack:
    """What one voxel of ``array`` holds: one draw for (voxels,), a cache line of them for (voxels, LANES)."""
    return _Pack(array.dtype, 1 if array.ndim == 1 else LINE_BYTES // (array.dtype.bitwidth // 8))


def _address(context: Node, builder: Node, array: Node, value: Node, index: Node) -> Node:
    pack = _pack(array)
    data = context.make_array(array)(context, builder, value).data
    first = builder.gep(data, [builder.mul(index, ir.Constant(index.type, pack.width))])
    return builder.bitcast(first, context.get_value_type(pack).as_pointer())


def _align(array: Node) -> int:
    return int(array.dtype.bitwidth) // 8


@_builtin
def _load(typing: Node, array: Node, index: Node) -> Node:
    def code(context: Node, builder: Node, signature: Node, values: Node) -> Node:
        return builder.load(_address(context, builder, array, *values), align=_align(array))

    return _pack(array)(array, types.intp), code


@_builtin
def _store(typing: Node, array: Node, index: Node, pack: Node) -> Node:
    def code(context: Node, builder: Node, signature: Node, values: Node) -> Node:
        builder.store(values[2], _address(context, builder, array, *values[:2]), align=_align(array))
        return context.get_dummy_value()

    return types.void(array, types.intp, pack), code


@_builtin
def _zero(typing: Node, array: Node) -> Node:
    def code(context: Node, builder: Node, signature: Node, values: Node) -> Node:
        return ir.Constant(context.get_value_type(signature.return_type), None)

    return _pack(array)(array), code


@_builtin
def _fma(typing: Node, weight: Node, value: Node, total: Node) -> Node:
    """``weight * value + total`` with one rounding, for every draw of the pack."""

    def code(context: Node, builder: Node, signature: Node, values: Node) -> Node:
        vector = context.get_value_type(total)
        nothing = ir.Constant(vector, ir.Undefined)
        first = builder.insert_element(nothing, values[0], ir.Constant(ir.IntType(32), 0))
        everywhere = ir.Constant(ir.VectorType(ir.IntType(32), vector.count), None)
        spread = builder.shuffle_vector(first, nothing, everywhere)
        name = f"llvm.fma.v{vector.count}f{total.dtype.bitwidth}"
        function = builder.module.globals.get(name) or ir.Function(
            builder.module, ir.FunctionType(vector, [vector] * 3), name
        )
        return builder.call(function, [spread, values[1], values[2]])

    return total(total.dtype, value, total), code


# --- One ray -------------------------------------------------------------------------------------------------------------


@_compiled
def _ray(view: np.ndarray, column: int, row: int, parallel: bool) -> tuple[float, float, float, float, float, float]:
    """Origin and direction in voxel indices: ``view`` is source (or direction), first pixel, column step, row step."""
    x = view[3] + column * view[6] + row * view[9]
    y = view[4] + column * view[7] + row * view[10]
    z = view[5] + column * view[8] + row * view[11]
    if parallel:
        return x, y, z, view[0], view[1], view[2]
    return view[0], view[1], view[2], x - view[0], y - view[1], z - view[2]


@_compiled
def _planes(first: int, last: int, start: float, slope: float, low: float, high: float) -> tuple[int, int]:
    """The planes ``k`` of [first, last) with ``low <= start + k slope < high``.

    Division only guesses; the ends are found by the test itself, which rounding keeps monotone in ``k``, so that no plane is
    lost or won by the limits of a slab.
    """
    if slope == 0.0:
        return (first, last) if low <= start < high else (first, first)
    inverse = 1.0 / slope
    one, other = (low - start) * inverse, (high - start) * inverse
    begin = math.ceil(min(max(min(one, other), float(first)), float(last)))
    end = math.ceil(min(max(max(one, other), float(first)), float(last)))
    while begin < end and not low <= start + begin * slope < high:
        begin += 1
    while begin > first and low <= start + (begin - 1) * slope < high:
        begin -= 1
    while begin < end and not low <= start + (end - 1) * slope < high:
        end -= 1
    while end < last and low <= start + end * slope < high:
        end += 1
    return begin, end


@_compiled
def _samples(
    ray: tuple[float, float, float, float, float, float],
    shape: tuple[int, int, int],
    sides: tuple[float, float, float],
    slab: tuple[int, int],
    at: np.ndarray,
    weights: np.ndarray,
) -> tuple[int, int, int, float]:
    """Where a ray meets the planes z of ``slab`` = [low, high) of a volume of ``shape`` = (nx, ny, nz).

    Fills ``at`` (first of the four voxels of each plane, counted in the slab with its border) and ``weights`` (4, planes).
    Returns the number of planes, the two steps to the other voxels, and the length of the ray between two planes, m.
    """
    ox, oy, oz, dx, dy, dz = ray
    nx, ny, _ = shape
    sx, sy, sz = 1, nx + 2, (nx + 2) * (ny + 2)
    low, high = slab
    if abs(dx) >= abs(dy) and abs(dx) >= abs(dz):
        o, d, s, first, last = ox, dx, sx, 0, nx
        o1, d1, s1, low1, high1 = oy, dy, sy, 0, ny
        o2, d2, s2, low2, high2 = oz, dz, sz, low, high
    elif abs(dy) >= abs(dz):
        o, d, s, first, last = oy, dy, sy, 0, ny
        o1, d1, s1, low1, high1 = ox, dx, sx, 0, nx
        o2, d2, s2, low2, high2 = oz, dz, sz, low, high
    else:
        o, d, s, first, last = oz, dz, sz, low, high
        o1, d1, s1, low1, high1 = ox, dx, sx, 0, nx
        o2, d2, s2, low2, high2 = oy, dy, sy, 0, ny
    inverse = 1.0 / d
    m1, m2 = d1 * inverse, d2 * inverse
    # One voxel on, because of the border: positions are then positive where they count, and truncation rounds down.
    b1, b2 = o1 - o * m1 + 1.0, o2 - o * m2 + 1.0
    first, last = _planes(first, last, b1, m1, float(low1), high1 + 1.0)
    first, last = _planes(first, last, b2, m2, float(low2), high2 + 1.0)
    count = last - first
    origin = s - low * sz
    for j in range((count + _BLOCK - 1) // _BLOCK * _BLOCK):
        k = float(first + j)
        p1, p2 = b1 + k * m1, b2 + k * m2
        i1, i2 = np.int32(p1), np.int32(p2)
        f1, f2 = p1 - i1, p2 - i2
        at[j] = (first + j) * s + i1 * s1 + i2 * s2 + origin
        both = f1 * f2
        weights[0, j] = 1.0 - f1 - (f2 - both)
        weights[1, j] = f1 - both
        weights[2, j] = f2 - both
        weights[3, j] = both
    length = math.sqrt((dx * sides[0]) ** 2 + (dy * sides[1]) ** 2 + (dz * sides[2]) ** 2) * abs(inverse)
    return count, s1, s2, length


# --- All rays ------------------------------------------------------------------------------------------------------------

Grid = tuple[tuple[int, int, int], tuple[float, float, float]]  # voxels and their sides, of the whole volume, x first
Detector = tuple[int, int, int, bool]  # the first row that counts and how many, columns, whether the rays are parallel
Part = tuple[tuple[int, int], tuple[int, int]]  # planes of the volume, rows of the detector


@_compiled
def forward(
    volume: np.ndarray,
    views: np.ndarray,
    out: np.ndarray,
    detector: Detector,
    lines: tuple[int, int],
    slab: tuple[int, int],
    grid: Grid,
) -> None:
    """Line integrals of the detector rows ``lines`` = [first, last), counted over all views, through the planes z of ``slab``.

    volume: those planes with a border, (voxels,) or (voxels, LANES), m^-1.  views: (views, 12), in voxel indices.  out:
    (n, rays), n draws of a pack.
    """
    top, rows, columns, parallel = detector
    shape, sides = grid
    pack = np.zeros_like(volume[:1])
    draws = pack.reshape(pack.size)
    room = (max(shape) + _BLOCK) // _BLOCK * _BLOCK
    at, weights = np.empty(room, np.int64), np.empty((4, room), volume.dtype)
    one = volume.dtype.type(1.0)
    for line in range(lines[0], lines[1]):
        view = views[line // rows]
        for column in range(columns):
            ray = _ray(view, column, top + line % rows, parallel)
            count, s1, s2, length = _samples(ray, shape, sides, slab, at, weights)
            # A sum per corner: none waits for the one before it.
            a, b, c, d = _zero(volume), _zero(volume), _zero(volume), _zero(volume)
            for j in range(count):
                i = at[j]
                a = _fma(weights[0, j], _load(volume, i), a)
                b = _fma(weights[1, j], _load(volume, i + s1), b)
                c = _fma(weights[2, j], _load(volume, i + s2), c)
                d = _fma(weights[3, j], _load(volume, i + s1 + s2), d)
            total = _fma(one, _fma(one, a, b), _fma(one, c, d))
            _store(pack, 0, _fma(volume.dtype.type(length), total, _zero(volume)))
            for draw in range(len(out)):
                out[draw, line * columns + column] = draws[draw]


@_compiled
def adjoint(
    rays: np.ndarray,
    views: np.ndarray,
    volume: np.ndarray,
    detector: Detector,
    slab: tuple[int, int],
    grid: Grid,
) -> None:
    """The transpose of ``forward`` on the planes z of ``slab`` = [low, high).

    rays: (n, rays), n draws of a pack.  volume: the slab with a border of one voxel, added to; what falls on the border belongs
    to other slabs or to nothing.
    """
    top, rows, columns, parallel = detector
    shape, sides = grid
    pack = np.zeros_like(volume[:1])
    draws = pack.reshape(pack.size)
    room = (max(shape) + _BLOCK) // _BLOCK * _BLOCK
    at, weights = np.empty(room, np.int64), np.empty((4, room), volume.dtype)
    for line in range(len(views) * rows):
        view = views[line // rows]
        for column in range(columns):
            ray = _ray(view, column, top + line % rows, parallel)
            count, s1, s2, length = _samples(ray, shape, sides, slab, at, weights)
            if count == 0:
                continue
            for draw in range(len(rays)):
                draws[draw] = rays[draw, line * columns + column]
            value = _fma(volume.dtype.type(length), _load(pack, 0), _zero(volume))
            for j in range(count):
                i = at[j]
                _store(volume, i, _fma(weights[0, j], value, _load(volume, i)))
                _store(volume, i + s1, _fma(weights[1, j], value, _load(volume, i + s1)))
                _store(volume, i + s2, _fma(weights[2, j], value, _load(volume, i + s2)))
                _store(volume, i + s1 + s2, _fma(weights[3, j], value, _load(volume, i + s1 + s2)))


# --- Tensors in, tensors out ---------------------------------------------------------------------------------------------


def project(rays: Rays, x: Tensor, slab: tuple[int, int] | None = None, rows: tuple[int, int] | None = None) -> Tensor:
    """Line integrals of volumes (n, z, y, x): (n, angle, row, detector), of the same type.

    slab: the planes z = [low, high) of the volume that ``x`` holds, the others being zero.  rows: the detector's rows
    [first, last) that are asked for.  Both the whole when left out.
    """
    slab, rows = slab or (0, rays.shape[2]), rows or (0, rays.rows)
    y = x.new_empty(len(x), len(rays.views), rows[1] - rows[0], rays.columns)
    for some, width in _pieces(rays, x):
        _project(rays, x[some].detach(), y[some].flatten(1).numpy(), width, (slab, rows))
    return y


def backproject(
    rays: Rays, y: Tensor, slab: tuple[int, int] | None = None, rows: tuple[int, int] | None = None
) -> Tensor:
    """The transpose of ``project``: (n, angle, row, detector) to (n, z, y, x)."""
    slab, rows = slab or (0, rays.shape[2]), rows or (0, rays.rows)
    x = y.new_empty(len(y), slab[1] - slab[0], *rays.shape[1::-1])
    flat = y.detach().flatten(1).contiguous().numpy()
    for some, width in _pieces(rays, y):
        _backproject(rays, flat[some], x[some], width, (slab, rows))
    return x


def _project(rays: Rays, x: Tensor, y: np.ndarray, width: int, part: Part) -> None:
    """Into ``y`` (n, rays) the integrals of ``x`` (n, z, y, x), n at most ``width``."""
    slab, rows = part
    room = _room((slab[1] - slab[0] + 2, rays.shape[1] + 2, rays.shape[0] + 2), width, x)
    room[1:-1, 1:-1, 1:-1, : len(x)] = x.permute(1, 2, 3, 0)
    volume, detector = _flat(room), (rows[0], rows[1] - rows[0], rays.columns, rays.parallel)

    def run(lines: tuple[int, int]) -> None:
        forward(volume, rays.views, y, detector, lines, slab, (rays.shape, rays.sides))

    _side_by_side(run, len(rays.views) * (rows[1] - rows[0]))


def _backproject(rays: Rays, y: np.ndarray, x: Tensor, width: int, part: Part) -> None:
    """Into ``x`` (n, z, y, x) the transpose of ``y`` (n, rays), n at most ``width``."""
    (low, high), rows = part
    nx, ny, _ = rays.shape
    detector = (rows[0], rows[1] - rows[0], rays.columns, rays.parallel)

    def run(planes: tuple[int, int]) -> None:
        slab = (low + planes[0], low + planes[1])
        room = _room((slab[1] - slab[0] + 2, ny + 2, nx + 2), width, x)
        adjoint(y, rays.views, _flat(room), detector, slab, (rays.shape, rays.sides))
        x[:, planes[0] : planes[1]] = room[1:-1, 1:-1, 1:-1, : len(x)].permute(3, 0, 1, 2)

    _side_by_side(run, high - low)


def _pieces(rays: Rays, given: Tensor) -> Iterator[tuple[slice, int]]:
    """The batch in pieces, and the draws a voxel holds for each: a full pack, or one where a pack is of no use or too large."""
    lanes = LINE_BYTES // given.element_size()
    if LINE_BYTES * math.prod(n + 2 for n in rays.shape) > _PACK_BYTES:
        lanes = 1
    for first in range(0, len(given), lanes):
        last = min(first + lanes, len(given))
        yield slice(first, last), lanes if last - first > 1 else 1


def _room(shape: tuple[int, ...], width: int, like: Tensor) -> Tensor:
    """Zeros (*shape, width) from numpy, which asks for large pages; a pack is a whole cache line, never parts of two."""
    dtype = np.dtype(np.float64 if like.dtype == torch.float64 else np.float32)
    count = math.prod(shape) * width
    room = np.zeros(count + LINE_BYTES // dtype.itemsize, dtype=dtype)
    first = -room.ctypes.data % LINE_BYTES // dtype.itemsize
    return torch.from_numpy(room[first : first + count].reshape(*shape, width))


def _flat(room: Tensor) -> np.ndarray:
    """(voxels,) or (voxels, LANES), in the same memory: what the kernels take."""
    array: np.ndarray = room.reshape(-1, room.shape[-1]).numpy()
    return array if array.shape[1] > 1 else array[:, 0]


def _side_by_side(run: Callable[[tuple[int, int]], None], count: int) -> None:
    """``run`` on contiguous parts of [0, count), one for each of torch's threads.

    Plain threads, not the compiler's own pool, which must not be entered from two threads at once.
    """
    workers = min(torch.get_num_threads(), count)
    ends = [count * i // workers for i in range(workers + 1)]
    parts = list(zip(ends[:-1], ends[1:], strict=True))
    if workers == 1:
        run(parts[0])
        return
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(run, parts))
