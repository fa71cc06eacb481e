"""A sparse matrix and its transpose for torch's own sparse products: what machines other than the CPU use.

Both ``M`` and ``M^T`` are kept as compressed sparse rows: 2 x (bytes of a value + 4) per entry.  Row-parallel products run at
memory speed in both directions, and each row is summed by one thread, so an answer does not depend on the number of threads.
"""

from __future__ import annotations

import functools
import warnings

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor, nn

from recon.errors import InputError

_COLUMNS = 32  # draws per product: wider float64 products fall out of the cache and cost twice as much per draw
_INT32 = 2**31 - 1


class SparsePair(nn.Module):
    """``M`` and ``M^T`` of a system matrix.

    Buffers (not part of ``state_dict``: the geometry that made them is the definition): 32-bit row pointers and columns, and
    values in ``dtype``.  ``.to(...)``, pickling and ``copy.deepcopy`` work.  Raises InputError above 2^31 - 1 entries.
    """

    rows: Tensor
    columns: Tensor
    values: Tensor
    t_rows: Tensor
    t_columns: Tensor
    t_values: Tensor

    def __init__(self, matrix: csr_matrix, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        if matrix.nnz > _INT32:
            raise InputError(f"the sparse matrix has {matrix.nnz} entries; at most {_INT32} fit 32-bit indices")
        self.shape: tuple[int, int] = matrix.shape
        for prefix, part in (("", matrix), ("t_", matrix.T.tocsr())):
            self.register_buffer(f"{prefix}rows", _indices(part.indptr), persistent=False)
            self.register_buffer(f"{prefix}columns", _indices(part.indices), persistent=False)
            self.register_buffer(f"{prefix}values", torch.from_numpy(part.data).to(dtype), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """``M x`` of every row of ``x``: (n, columns of M) -> (n, rows of M)."""
        return _product(_view(self.rows, self.columns, self.values, self.shape), x)

    def transpose(self, y: Tensor) -> Tensor:
        """``M^T y`` of every row of ``y``: (n, rows of M) -> (n, columns of M)."""
        return _product(_view(self.t_rows, self.t_columns, self.t_values, self.shape[::-1]), y)


def _indices(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.int32, copy=False))


def _product(matrix: Tensor, x: Tensor) -> Tensor:
    if x.dtype != matrix.dtype:
        raise InputError(
            f"this operator holds {matrix.dtype} numbers; got {x.dtype} (convert one: operator.to(dtype) or x.to(dtype))"
        )
    parts = [(matrix @ piece.T).T for piece in x.split(_COLUMNS)] if len(x) else [x.new_empty(0, matrix.shape[0])]
    return torch.cat(parts) if len(parts) > 1 else parts[0].contiguous()


def _view(rows: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A sparse tensor around the buffers; nothing is copied."""
    _announce()
    return torch.sparse_csr_tensor(rows, columns, values, shape, check_invariants=False)


@functools.cache
def _announce() -> None:
    # torch says once per process that CSR tensors are young; let it say so here, where nobody has to read it.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows, columns = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([0], dtype=torch.int32)
        torch.sparse_csr_tensor(rows, columns, torch.ones(1), (1, 1), check_invariants=False)
