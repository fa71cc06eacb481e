r"""Volumes that stay on disk: tensors of which a few slices at a time are in memory.

A ``Streamed`` is a tensor whose slices along one axis are read from a file, or made from other tensors whenever they are asked
for.  Sums, products and whatever else treats every value by itself is put off until then and done a few slices at a time, so a
chain of such operations reads its operands once and writes nothing.  What works on whole slices (an operator, a network)
visits them part by part and puts its answer in a file (``each``).  An operation for which neither holds is an error; none ever
brings a whole volume into memory unasked.

``Stream`` is the ``Slab`` of such volumes: one process holds all slices and visits them ``depth`` at a time.  This is the walk
that ranks do side by side, with the same sums in the order of the slices and the same random numbers at the same places, so
the result is the same to the last bit, and samplers do not know the difference.

Files are written once, before anybody reads them, and removed when the last tensor that needs them is gone; a link to a file
is therefore a checkpoint of it.
"""

from __future__ import annotations

import math
import os
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recon.draws import Draws
from recon.draws import Stream as Kind
from recon.errors import InputError
from recon.files import room
from recon.operators.slabs import Slab
from recon.space import Space

Read = Callable[[int, int], Tensor]
"""(first, last) -> the slices ``first .. last - 1``, in memory."""

DEEPEST = 6  # operations that are put off before the result is written after all
_aten = torch.ops.aten
# Like sums and products, these leave the slices where they are; the first ones as long as the axis of slices is not theirs.
_OF_ROWS = {
    _aten.select.int, _aten.slice.Tensor, _aten.unsqueeze.default, _aten.cat.default, _aten.sum.dim_IntList,
    _aten.mean.dim, _aten.detach.default, _aten.alias.default, _aten.clone.default, _aten._to_copy.default,
    _aten.zeros_like.default, _aten.lift_fresh.default,
}  # fmt: skip
_SHAPED = {_aten.view.default, _aten._unsafe_view.default, _aten.expand.default}


class Streamed(Tensor):
    """A tensor of which ``read(first, last)`` brings slices into memory; made by a ``Stream``.

    at: place of the axis of slices, counted from the end (negative).  stream: whose slices they are.  depth: operations that
    are put off; 0 for a file.
    """

    at: int
    stream: Stream
    depth: int
    path: Path | None
    read: Read

    # Without it torch would take whatever is computed from a streamed tensor for one itself.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls: type[Streamed], stream: Stream, shape: Sequence[int], dtype: torch.dtype, at: int, read: Read
    ) -> Streamed:
        made: Streamed = torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype)
        made.stream, made.at, made.read, made.depth, made.path = stream, at, read, 0, None
        return made

    def __init__(self, *arguments: object) -> None:
        super().__init__()

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"Streamed({tuple(self.shape)}, {self.dtype}, slices along {self.at})"

    def each(self, function: Callable[[Tensor], Tensor], at: int | None = None) -> Streamed:
        """``function`` of every part, which keeps its slices: computed now, part by part, and kept in a file.

        at: place of the slices in the answer; None where they are in the volume.
        """
        source = self.stored()
        return self.stream.kept(lambda first, last: function(source.read(first, last)), at)

    def stored(self) -> Streamed:
        """This tensor as a file: what was put off is computed once."""
        if self.depth:
            kept = self.stream.kept(self.read, self.at)
            self.read, self.depth, self.path = kept.read, 0, kept.path
        return self

    @classmethod
    def __torch_dispatch__(
        cls,
        func: Any,  # noqa: ANN401  (torch's own protocol)
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        named = kwargs or {}
        operands = [a for a in _flat((args, list(named.values()))) if isinstance(a, Streamed)]
        first = operands[0]
        if func in (_aten.all.default, _aten.any.default):
            whole = [func(first.read(a, b)) for a, b in first.stream.parts_of()]
            return func(torch.stack(whole))
        if func is _aten.new_zeros.default and math.prod(args[1]) <= 1:
            return torch.zeros(args[1], dtype=named.get("dtype") or first.dtype)
        pointwise = torch.Tag.pointwise in func.tags
        if func._schema.is_mutable or not (pointwise or func in _OF_ROWS or func in _SHAPED):
            raise InputError(f"{func} is not done to volumes that stay on disk; read the slices that are needed")
        return _put_off(func, args, named, operands)


def _put_off(func: Any, args: Any, named: dict[str, Any], operands: list[Streamed]) -> Streamed:  # noqa: ANN401
    stream, at = operands[0].stream, operands[0].at
    sizes = args[1] if func in _SHAPED else None

    def run(pick: Callable[[Streamed], Tensor], rows: tuple[int, int] | None) -> Tensor:
        given, more = _swapped((list(args), named), pick, rows, at, stream.slices)
        if sizes is not None and rows is not None:
            given[1] = [*sizes[:at], rows[1] - rows[0], *(sizes[at + 1 :] if at < -1 else [])]
        more.pop("device", None)
        result: Tensor = func(*given, **more)
        return result

    meta = run(lambda s: torch.empty(s.shape, dtype=s.dtype, device="meta"), None)
    if any(s.at != at for s in operands) or meta.ndim < -at or meta.shape[at] != stream.slices:
        raise InputError(f"{func} does not keep the slices of volumes that stay on disk where they are")

    def read(first: int, last: int) -> Tensor:
        return run(lambda s: s.read(first, last), (first, last))

    return stream.lazy(meta.shape, meta.dtype, at, read, 1 + max(s.depth for s in operands))


def _swapped(value: Any, pick: Callable[[Streamed], Tensor], rows: tuple[int, int] | None, at: int, n: int) -> Any:  # noqa: ANN401
    """``value`` with slices in place of streamed tensors; an ordinary one that has the axis of slices is cut too."""
    if isinstance(value, Streamed):
        return pick(value)
    if isinstance(value, Tensor):
        if rows is None:
            return value.to("meta")
        return value.narrow(at, rows[0], rows[1] - rows[0]) if value.ndim >= -at and value.shape[at] == n > 1 else value
    if isinstance(value, list | tuple):
        return type(value)(_swapped(v, pick, rows, at, n) for v in value)
    return {k: _swapped(v, pick, rows, at, n) for k, v in value.items()} if isinstance(value, dict) else value


def _flat(value: Any) -> Iterator[Any]:  # noqa: ANN401
    if isinstance(value, list | tuple):
        for one in value:
            yield from _flat(one)
    else:
        yield value


class Stream(Slab):
    """The slices of volumes ``whole`` across ``axis``, on disk in ``folder`` and visited ``depth`` at a time.

    written: bytes that were put on disk so far.

    Raises InputError without that axis, or for a depth below one.
    """

    def __init__(self, whole: Space, axis: str, depth: int, folder: Path) -> None:
        super().__init__(whole, axis)
        if depth < 1:
            raise InputError(f"at least one slice is visited at a time; got {depth}")
        self.depth, self.folder, self.written = min(depth, self.slices), Path(folder), 0
        self.place = self.at - len(whole.shape)

    def parts_of(self) -> list[tuple[int, int]]:
        """First slice, and the one after the last, of every part."""
        return [(first, min(first + self.depth, self.slices)) for first in range(0, self.slices, self.depth)]

    def lazy(self, shape: Sequence[int], dtype: torch.dtype, at: int, read: Read, depth: int = 1) -> Streamed:
        """A tensor whose slices are what ``read`` makes of them; written when too much has been put off."""
        made = Streamed(self, shape, dtype, at, read)
        made.depth = depth
        return made.stored() if depth > DEEPEST else made

    def kept(self, read: Read, at: int | None = None) -> Streamed:
        """The tensor whose slices ``read`` makes, part by part, in a file.  Raises ReconError when the disk is full."""
        at = self.place if at is None else at
        path = self._new()
        try:
            with room(self.folder), path.open("wb") as file:
                for first, last in self.parts_of():
                    part = read(first, last)
                    rows = part.movedim(at, 0).contiguous()
                    file.write(rows.numpy().data)
                    self.written += rows.nbytes
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        shape = list(part.shape)
        shape[at] = self.slices
        return self.opened(path, shape, part.dtype, at)

    def _new(self) -> Path:
        """An empty file that is nobody else's: one left behind by a process that was killed may be part of a checkpoint."""
        self.folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(".bin", "field-", self.folder)
        os.close(handle)
        return Path(name)

    def opened(self, path: Path, shape: Sequence[int], dtype: torch.dtype, at: int | None = None) -> Streamed:
        """The tensor in a file of this stream's folder, slices outermost; the file goes when the tensor does."""
        at = self.place if at is None else at
        rows = [n for i, n in enumerate(shape) if i != len(shape) + at]
        kind = torch.empty(0, dtype=dtype).numpy().dtype
        one = math.prod(rows)

        def read(first: int, last: int) -> Tensor:
            values = np.fromfile(path, kind, (last - first) * one, offset=first * one * kind.itemsize)
            return torch.from_numpy(values.reshape(last - first, *rows)).movedim(0, at)

        made = Streamed(self, shape, dtype, at, read)
        made.path = path
        # The reader of the file outlives the tensor where something that was put off still needs it.
        weakref.finalize(read, path.unlink, missing_ok=True)
        return made

    def taken(self, path: Path, shape: Sequence[int], dtype: torch.dtype) -> Streamed:
        """The tensor that ``linked`` put at ``path``, which stays as it is."""
        own = self._new()
        _link(path, own)
        return self.opened(own, shape, dtype)

    def parts(self, a: Tensor, b: Tensor) -> Tensor:
        """As a slab's, part by part; of streamed tensors."""
        a, b = (x.stored() if isinstance(x, Streamed) else x for x in (a, b))
        assert isinstance(a, Streamed)
        assert isinstance(b, Streamed)
        return torch.cat([super(Stream, self).parts(a.read(i, j), b.read(i, j)) for i, j in self.parts_of()], 1)

    def cut(self, x: Tensor) -> Tensor:
        """Whole volumes in memory as a streamed tensor, (*batch, *whole.shape)."""
        self.whole.require(tuple(x.shape), "Stream.cut")
        return self.kept(lambda first, last: x.narrow(self.place, first, last - first))

    def end(self, x: Tensor, last: bool) -> Tensor:
        """As a slab's: one slice, in memory."""
        assert isinstance(x, Streamed)
        k = self.slices - 1 if last else 0
        return x.read(k, k + 1).squeeze(x.at)

    def shifted(self, x: Tensor, by: int, end: Tensor) -> Tensor:
        """As a slab's, when it is read."""
        assert isinstance(x, Streamed)
        n, filled = self.slices, end.unsqueeze(x.ndim + x.at)

        def read(first: int, last: int) -> Tensor:
            low, high = max(0, first + by), min(n, last + by)
            parts = [x.read(low, high)] if high > low else []
            if high - low < last - first:
                parts.insert(len(parts) if by > 0 else 0, filled)
            return torch.cat(parts, x.at)

        return self.lazy(x.shape, x.dtype, x.at, read, x.depth + 1)

    def draws(self, draws: Draws) -> Draws:
        """The same random numbers, made slice by slice when they are read."""
        return _Streamed(draws, self)


class _Streamed(Draws):
    """Draws whose normal numbers of a whole volume are streamed."""

    def __init__(self, of: Draws, stream: Stream) -> None:
        super().__init__(of.seed, of.members, of.case, of.antithetic)
        object.__setattr__(self, "stream", stream)

    def normal(
        self,
        step: int,
        shape: Sequence[int],
        stream: Kind = "step",
        *,
        dtype: torch.dtype = torch.float32,
        first: int = 0,
    ) -> Tensor:
        home: Stream = self.stream  # type: ignore[attr-defined]
        if tuple(shape) != home.whole.shape or first:
            return super().normal(step, shape, stream, dtype=dtype, first=first)
        inner, own = math.prod(shape[home.at + 1 :]), super().normal

        def read(low: int, high: int) -> Tensor:
            size = ((high - low) * inner,)
            places = [(i * home.slices + low) * inner for i in range(math.prod(shape[: home.at]))]
            rows = torch.stack([own(step, size, stream, dtype=dtype, first=place) for place in places], 1)
            return rows.reshape(len(self), *shape[: home.at], high - low, *shape[home.at + 1 :])

        return home.lazy((len(self), *shape), dtype, home.place, read)


def linked(field: Streamed, path: Path) -> None:
    """Keep a streamed tensor at ``path``, on the same disk: a link to its file, which nobody writes any more."""
    stored = field.stored()
    assert stored.path is not None
    _link(stored.path, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError as error:
        raise InputError(
            f"{target.parent} cannot hold links to files ({error.strerror}); volumes that stay on disk need a file system that "
            "does: choose another folder for the run (--out DIR)"
        ) from error


def slices_of(values: Tensor) -> Iterator[Tensor]:
    """A tensor slice by slice where it stays on disk, else as it is."""
    if isinstance(values, Streamed):
        yield from (values.read(k, k + 1) for k in range(values.stream.slices))
    else:
        yield values
