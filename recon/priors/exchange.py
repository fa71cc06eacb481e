r"""The gradient of a batch from those of its chunks, added in the order of the chunks on any number of processes.

.. math::  G = (\dots((0 + g_0 / N) + g_1 / N) + \dots) + g_{C-1} / N

Floating-point sums depend on their order, so this one is fixed: one process adds as the chunks come.  Several deal the chunks
like cards (process r computes r, r + R, ...) and exchange one round of R chunks at a time: each process owns a slice of the
gradient, receives that slice of the R chunks, and adds them in order; at the end all gather all slices.  The result is the same
to the last bit for every R.

With P parameters one process keeps P numbers for the sum, and each of several 3 P + P/R, however many chunks there are.  Each
sends and receives P (R - 1)/R numbers per round and as many once at the end: with one chunk each, what a ring all-reduce
costs.  Reductions of MPI and NCCL choose their order by the number of processes and the size of the message, which is why none
is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from recon.comm import Axis, MPIAxis


class GradientSum:
    """Adds the gradients of chunks on one process.

    ``start``, then ``add`` for each chunk in order, then ``finish``; ``gradients`` are views into the sum with the shapes and
    strides of the parameters.
    """

    exchanged = False

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.size = sum(p.numel() for p in parameters)
        # The loss travels with the gradient, as its last number.
        self.total = torch.zeros(self.size + 1, dtype=torch.float32, device=parameters[0].device)
        self.gradients = _views(self.total, parameters)
        self._known = torch.tensor(1.0)
        # Added tensor by tensor they stay in a CPU's cache; a GPU, and an exchange, take a chunk's in one piece.
        whole = self.total.device.type != "cpu" or self.exchanged
        self.chunk = torch.zeros_like(self.total) if whole else self.total.new_zeros(0)
        self._parts = _views(self.chunk, parameters) if whole else []

    def start(self, chunks: int, known: float) -> None:
        """Begin the sum of ``chunks`` gradients, each divided by ``known``."""
        self._known = torch.tensor(known, dtype=torch.float32)
        self.total.zero_()

    def add(self, loss: Tensor, gradients: Sequence[Tensor]) -> None:
        """The next chunk of this process."""
        if self._parts:
            self._take(loss, gradients)
            self.total += self.chunk
            return
        for total, gradient in zip(self.gradients, gradients, strict=True):
            total += gradient / self._known
        self.total[-1] += loss / self._known

    def finish(self) -> Tensor:
        """The loss; ``gradients`` are complete."""
        return self.total[-1].clone()

    def _take(self, loss: Tensor, gradients: Sequence[Tensor]) -> None:
        torch._foreach_copy_(self._parts, list(gradients))
        self.chunk[-1] = loss
        self.chunk /= self._known


class SharedGradientSum(GradientSum):
    """Adds the gradients of chunks that the processes of an MPI axis compute: rank r those with numbers r, r + size, ...

    Every call is collective in effect: all processes start, add their chunks and finish.
    """

    exchanged = True

    def __init__(self, parameters: Sequence[Tensor], axis: MPIAxis) -> None:
        super().__init__(parameters)
        self.axis: Any = axis
        bounds = [len(self.total) * rank // axis.size for rank in range(axis.size + 1)]
        self._starts = bounds[:-1]
        self._lengths = [end - start for start, end in zip(bounds[:-1], bounds[1:], strict=True)]
        self._mine = slice(bounds[axis.rank], bounds[axis.rank + 1])
        self._received = self.total.new_zeros(axis.size, self._lengths[axis.rank])
        self._sent_from, self._gathered = _host(self.chunk), _host(self.total)
        self._received_in = _host(self._received)
        self._chunks = self._round = 0

    def start(self, chunks: int, known: float) -> None:
        super().start(chunks, known)
        self._chunks, self._round = chunks, 0

    def add(self, loss: Tensor, gradients: Sequence[Tensor]) -> None:
        self._take(loss, gradients)
        _copy(self.chunk, self._sent_from)
        self._exchange()

    def finish(self) -> Tensor:
        while self._round * self.axis.size < self._chunks:  # others have a chunk more
            self._exchange()
        _copy(self.total, self._gathered)
        mine = self._gathered[self._mine].clone()
        self.axis.communicator.Allgatherv(mine.numpy(), [self._gathered.numpy(), (self._lengths, self._starts)])
        _copy(self._gathered, self.total)
        return super().finish()

    def _exchange(self) -> None:
        """One round: a chunk from every process that has one left, each slice to its owner."""
        first, size, rank = self._round * self.axis.size, self.axis.size, self.axis.rank
        givers = max(0, min(size, self._chunks - first))
        sends = self._lengths if rank < givers else [0] * size
        length = self._lengths[rank]
        receives = [length if giver < givers else 0 for giver in range(size)]
        self.axis.communicator.Alltoallv(
            [self._sent_from.numpy(), (sends, self._starts)],
            [self._received_in.numpy(), (receives, [giver * length for giver in range(size)])],
        )
        _copy(self._received_in, self._received)
        for giver in range(givers):
            self.total[self._mine] += self._received[giver]
        self._round += 1


def gradient_sum(parameters: Sequence[Tensor], axis: Axis) -> GradientSum:
    """The sum for the processes of ``axis``."""
    if axis.size == 1:
        return GradientSum(parameters)
    assert isinstance(axis, MPIAxis)
    return SharedGradientSum(parameters, axis)


def _views(flat: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Parts of ``flat`` with the shapes and strides of the parameters: fused optimisers pair numbers in the order of memory."""
    views, offset = [], 0
    for p in parameters:
        views.append(flat.as_strided(p.shape, p.stride(), offset))
        offset += p.numel()
    return views


def _host(tensor: Tensor) -> Tensor:
    """The tensor itself on a CPU, else pinned memory of its size: MPI is handed host memory only."""
    if tensor.device.type == "cpu":
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)


def _copy(source: Tensor, target: Tensor) -> None:
    if source is not target:
        target.copy_(source)
