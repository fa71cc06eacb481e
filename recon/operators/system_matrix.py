r"""The matrix of any set of rays through an image: made once and kept, or made again whenever it is needed.

One copy serves both directions: blocks of rays and tiles (``scan_blocks``) are read along the rays for ``M x`` and scattered
for ``M^T y``.  It takes 6 bytes an entry (a float32 and a 16-bit place), where compressed sparse rows of a matrix and its
transpose take 16.  On one core, float32, 256 x 256 pixels, 180 views, both products are some 50 times faster than ASTRA's calls
for 32 draws, and 5 times for one draw, which has to wait for the memory (tests/benchmarks/bench_operators.py).

Large matrices are kept on disk and mapped (``matrix_cache``), so processes of one machine share the same memory.  A matrix that
would take more than ``limit`` bytes is not kept: each product makes it group by group, the same numbers in the same order, so
both ways agree to the last bit; that takes as long as two to four of ASTRA's calls, for any number of draws up to 512.  CUDA
tensors go through torch's sparse products with a matrix and its transpose (``csr``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from recon.errors import InputError
from recon.operators import matrix_cache
from recon.operators.csr import SparsePair
from recon.operators.scan_blocks import NAMES, Arrays, ScanBlocks, kernels

_DRAWS = 512  # that share one making of a matrix that is not kept
_GROUPS = 8  # made at a time for that: they share their rooms


class SystemMatrix(nn.Module):
    """``M x`` and ``M^T y`` of a scan for whole batches.

    limit: bytes the matrix may take; above it, each product makes the matrix again.
    Buffers (not part of ``state_dict``: the geometry that made them is the definition): the arrays of ``scan_blocks``.
    ``.to(...)``, pickling and ``copy.deepcopy`` work.  Raises InputError without numba.
    """

    values: Tensor

    def __init__(self, blocks: ScanBlocks, limit: float) -> None:
        super().__init__()
        self.blocks, self.shape = blocks, blocks.shape
        predicted = blocks.predicted()
        self.stored = predicted <= limit
        arrays: Arrays = {"values": np.zeros(1, np.float32)}  # says which type and device the operator has
        if self.stored:
            arrays = matrix_cache.kept(blocks, predicted)
        for name, array in arrays.items():
            self.register_buffer(name, torch.from_numpy(array), persistent=False)
        self._made: dict[str, Any] = {}

    @property
    def bytes(self) -> int:
        """Memory that the matrix holds."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers(recurse=False))

    def forward(self, x: Tensor) -> Tensor:
        """``M x`` of every row of ``x``: (n, pixels) -> (n, rays)."""
        self._require(x)
        if x.device.type != "cpu":
            return torch.cat([pair(x) for _, pair in self._pairs()], dim=1)
        return self._by_kernels(x, self.shape[0], "project")

    def transpose(self, y: Tensor) -> Tensor:
        """``M^T y`` of every row of ``y``: (n, rays) -> (n, pixels)."""
        self._require(y)
        if y.device.type != "cpu":
            out = y.new_zeros(len(y), self.shape[1])
            for first, pair in self._pairs():
                out += pair.transpose(y[:, first : first + pair.shape[0]])
            return out
        return self._by_kernels(y, self.shape[1], "backproject")

    def __getstate__(self) -> dict[str, Any]:
        """Without what can be made again."""
        return {**self.__dict__, "_made": {}}

    def _require(self, given: Tensor) -> None:
        if given.dtype != self.values.dtype or given.dtype not in (torch.float32, torch.float64):
            raise InputError(
                f"this operator holds {self.values.dtype} numbers and computes in float32 or float64; got {given.dtype} "
                "(convert one: operator.to(dtype) or x.to(dtype))"
            )
        if given.device != self.values.device:
            raise InputError(
                f"this operator is on {self.values.device}; got a tensor on {given.device} "
                "(move one: operator.to(device) or x.to(device))"
            )

    def _by_kernels(self, given: Tensor, width: int, what: str) -> Tensor:
        products, grid = kernels("block_products"), self.blocks.grid
        layout = products.Layout((grid.ny, grid.nx), grid.tiles, self.shape[0], self.blocks.rays_per_group)
        out = given.new_empty(len(given), width)
        given = given.detach().contiguous()
        # Making the matrix costs more than a product: many draws share it.  Where it is kept, few at a time save memory.
        share = products.together(given.element_size()) if self.stored else _DRAWS
        for first in range(0, len(given), share):
            few, result = given[first : first + share].numpy(), out[first : first + share].numpy()
            getattr(products, what)(self._groups(), layout, few, result)
        return out

    def _groups(self) -> Iterator[tuple[int, Arrays]]:
        """All groups at once where they are kept, else one after the other, a few made at a time."""
        if self.stored:
            yield 0, self._once("arrays", self._arrays)
            return
        dtype, count = self.values.cpu().numpy().dtype, self.blocks.groups
        step = max(_GROUPS, torch.get_num_threads())
        for first in range(0, count, step):
            for number, arrays in enumerate(self.blocks.some(first, min(first + step, count)), first):
                yield number, {**arrays, "values": arrays["values"].astype(dtype, copy=False)}

    def _pairs(self) -> Iterator[tuple[int, SparsePair]]:
        """Matrices for torch on the operator's device, with the first ray of each: one that is kept, or a group at a time."""
        if self.stored:
            yield 0, self._once("pair", lambda: self._sparse(self._arrays()))
            return
        for group, arrays in self._groups():
            yield group * self.blocks.rays_per_group, self._sparse(arrays, group)

    def _once(self, name: str, make: Callable[[], Any]) -> Any:  # noqa: ANN401  (arrays or a pair)
        """What ``make`` gives, kept until the buffers are others (``.to`` makes new ones)."""
        if self._made.get("of") is not self.values:
            self._made = {"of": self.values}
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def _arrays(self) -> Arrays:
        return {name: getattr(self, name).cpu().numpy() for name in NAMES}

    def _sparse(self, arrays: Arrays, group: int = 0) -> SparsePair:
        return SparsePair(self.blocks.csr(arrays, group), self.values.dtype).to(self.values.device)
