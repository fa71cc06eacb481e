r"""Packs of draws for compiled kernels: arithmetic on as many draws at once as fit one or two cache lines.

An array of places (pixels, rays) comes in three layouts, told apart by the number of its axes: (places,) holds one draw,
(places, lanes) a cache line of draws, (places, 2, lanes) two of them; ``lanes`` is 16 in float32, 8 in float64.  A pack is what
one place holds.  Its multiply-add is a fused one, asked for by name, so a draw gets the same bits in every layout.

This module needs numba: import it inside functions, after ``need("numba", "ct")``.  Kernels that use it are compiled once per
machine and kept beside the source file that defines them; a change here does not make that copy stale, so change both.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, cast

import numpy as np
import torch
from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.extending import intrinsic, models, register_model

LINE_BYTES = 64  # of a cache line, and of the widest registers
_KEPT_BYTES = 2**24  # of a room for the next product

Node = Any  # the compiler's own objects, which carry no Python types
F = TypeVar("F", bound=Callable[..., Any])
_builtin: Callable[[Callable[..., Any]], Any] = intrinsic
_register: Callable[[Any], Callable[[F], F]] = register_model


def compiled(function: F) -> F:
    """Compile ``function`` at its first call: without the GIL, kept on disk, no fast mathematics (bits would move)."""
    result: Any
    try:
        result = njit(nogil=True, cache=True, error_model="numpy")(function)
    except RuntimeError:  # no folder to keep it in: compiled in every process
        result = njit(nogil=True, error_model="numpy")(function)
    return cast(F, result)


# --- One pack ------------------------------------------------------------------------------------------------------------


class _Pack(types.Type):
    """``width`` draws of one place."""

    def __init__(self, dtype: Node, width: int) -> None:
        self.dtype, self.width = dtype, width
        super().__init__(name=f"Pack({dtype}, {width})")


@_register(_Pack)
class _PackModel(models.PrimitiveModel):
    def __init__(self, manager: Node, pack: _Pack) -> None:
        element = manager.lookup(pack.dtype).get_value_type()
        super().__init__(manager, pack, ir.VectorType(element, pack.width))  # type: ignore[no-untyped-call]


def _pack(array: Node) -> _Pack:
    line = LINE_BYTES // (array.dtype.bitwidth // 8)
    return _Pack(array.dtype, {1: 1, 2: line, 3: 2 * line}[array.ndim])


def _address(context: Node, builder: Node, array: Node, value: Node, index: Node) -> Node:
    pack = _pack(array)
    data = context.make_array(array)(context, builder, value).data
    first = builder.gep(data, [builder.mul(index, ir.Constant(index.type, pack.width))])
    return builder.bitcast(first, context.get_value_type(pack).as_pointer())


@_builtin
def load(typing: Node, array: Node, index: Node) -> Node:
    """The pack of place ``index``; nothing is checked."""

    def code(context: Node, builder: Node, signature: Node, values: Node) -> Node:
        return builder.load(_address(context, builder, array, *values), align=array.dtype.bitwidth // 8)

    return _pack(array)(array, types.intp), code


@_builtin
def store(typing: Node, array: Node, index: Node, pack: Node) -> Node:
    """Write a pack to place ``index``."""

    def code(context: Node, builder: Node, signature: Node, values: Node) -> Node:
        where = _address(context, builder, array, *values[:2])
        builder.store(values[2], where, align=array.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, pack), code


@_builtin
def zero(typing: Node, array: Node) -> Node:
    """A pack of zeros."""

    def code(context: Node, builder: Node, signature: Node, values: Node) -> Node:
        return ir.Constant(context.get_value_type(signature.return_type), None)

    return _pack(array)(array), code


@_builtin
def fma(typing: Node, weight: Node, value: Node, total: Node) -> Node:
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


# --- Arrays of packs -----------------------------------------------------------------------------------------------------


def pieces(draws: int, itemsize: int) -> Iterator[tuple[slice, int]]:
    """Draws that travel together, and the lanes of their packs: two cache lines of them, one, or a single draw."""
    line = LINE_BYTES // itemsize
    for first in range(0, draws, 2 * line):
        count = min(2 * line, draws - first)
        yield slice(first, first + count), 1 if count == 1 else line if count <= line else 2 * line


_kept = threading.local()


def room(places: int, lanes: int, dtype: np.dtype, keep: str | None = None) -> np.ndarray:
    """An array (places, lanes) that starts with a cache line; what is in it is anybody's.

    keep: a name under which the memory is used again by the next call from the same thread, up to 16 MB: fresh memory costs a
    small product more than its arithmetic.
    """
    size = places * lanes * dtype.itemsize + LINE_BYTES
    raw: np.ndarray | None = getattr(_kept, keep, None) if keep else None
    if raw is None or len(raw) < size:
        raw = np.empty(size, np.uint8)  # from numpy, which asks for large pages
        if keep and size <= _KEPT_BYTES:
            setattr(_kept, keep, raw)
    first = -raw.ctypes.data % LINE_BYTES
    return raw[first : first + size - LINE_BYTES].view(dtype).reshape(places, lanes)


def packed(array: np.ndarray) -> np.ndarray:
    """An array (places, lanes) of ``room`` in the layout that says its width to kernels; the same memory."""
    lanes, line = array.shape[1], LINE_BYTES // array.itemsize
    if lanes == 1:
        return array[:, 0]
    return array if lanes == line else array.reshape(-1, 2, line)


def side_by_side(run: Callable[[int, int], None], count: int) -> None:
    """``run(first, last)`` on contiguous parts of [0, count), one for each of torch's threads.

    Plain threads, not the compiler's own pool, which must not be entered from two threads at once.
    """
    workers = max(1, min(torch.get_num_threads(), count))
    ends = [count * i // workers for i in range(workers + 1)]
    if workers == 1:
        run(0, count)
        return
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(run, ends[:-1], ends[1:]))
