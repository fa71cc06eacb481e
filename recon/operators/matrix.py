"""A forward model given as a dense matrix: for exact tests and for small problems."""

from __future__ import annotations

import torch
from torch import Tensor

from recon.errors import InputError
from recon.operators.base import LinearOperator
from recon.space import Space


class MatrixOperator(LinearOperator):
    """``y = M x`` on flattened arrays.

    matrix: (range.size, domain.size).  domain, range: default to plain vectors ("component",) and ("datum",).
    Raises InputError when the matrix is not two-dimensional, not finite, or does not fit the spaces.
    """

    matrix: Tensor

    def __init__(self, matrix: Tensor, domain: Space | None = None, range: Space | None = None) -> None:
        matrix = torch.as_tensor(matrix)
        if matrix.ndim != 2 or not matrix.is_floating_point() or not bool(torch.isfinite(matrix).all()):
            raise InputError(
                f"MatrixOperator takes a finite floating-point matrix (m, n); got {matrix.dtype} {tuple(matrix.shape)}"
            )
        m, n = matrix.shape
        domain = domain or Space.vector(n)
        range = range or Space.vector(m, dim="datum")
        if (range.size, domain.size) != (m, n):
            raise InputError(f"matrix {m} x {n} does not map {domain.describe()} to {range.describe()}")
        super().__init__(domain, range)
        self.register_buffer("matrix", matrix)

    def apply(self, x: Tensor) -> Tensor:
        return (x.flatten(1) @ self.matrix.T).reshape(-1, *self.range.shape)

    def apply_adjoint(self, y: Tensor) -> Tensor:
        return (y.flatten(1) @ self.matrix).reshape(-1, *self.domain.shape)
