"""A forward model given as a dense matrix: for exact tests and for small problems."""

from __future__ import annotations

import torch
from torch import Tensor

from recon.errors import InputError
from recon.operators.base import LinearOperator
from recon.space import Space


class MatrixOperator(LinearOperator):
    """``y = M x`` on flattened arrays.

    matrix: (range.size, domain.size), real or complex; a complex one measures complex data of real arrays, and of complex
    arrays where ``domain`` says so.  domain, range: default to plain vectors ("component",) and ("datum",).
    Raises InputError when the matrix is not two-dimensional, not finite, or does not fit the spaces.
    """

    parts: Tensor

    def __init__(self, matrix: Tensor, domain: Space | None = None, range: Space | None = None) -> None:
        matrix = torch.as_tensor(matrix)
        numbers = matrix.is_floating_point() or matrix.is_complex()
        if matrix.ndim != 2 or not numbers or not bool(torch.isfinite(matrix).all()):
            raise InputError(
                f"MatrixOperator takes a finite floating-point matrix (m, n); got {matrix.dtype} {tuple(matrix.shape)}"
            )
        m, n = matrix.shape
        domain = domain or Space.vector(n)
        range = range or Space(("datum",), (m,), {}, "1", complex=matrix.is_complex())
        if (range.size, domain.size) != (m, n) or range.complex != (matrix.is_complex() or domain.complex):
            raise InputError(f"{matrix.dtype} matrix {m} x {n} does not map {domain.describe()} to {range.describe()}")
        super().__init__(domain, range)
        self.complex = matrix.is_complex()
        # As parts: conversions of a module to another floating type would drop the imaginary one of a complex buffer.
        self.register_buffer("parts", torch.view_as_real(matrix) if self.complex else matrix)

    @property
    def matrix(self) -> Tensor:
        """``M``: (range.size, domain.size)."""
        return torch.view_as_complex(self.parts) if self.complex else self.parts

    def apply(self, x: Tensor) -> Tensor:
        return self._times(x, self.matrix.T, self.range)

    def apply_adjoint(self, y: Tensor) -> Tensor:
        return self._times(y, self.matrix.conj(), self.domain)

    def _times(self, values: Tensor, matrix: Tensor, target: Space) -> Tensor:
        kind = torch.promote_types(values.dtype, matrix.dtype)
        product = (values.flatten(1).to(kind) @ matrix.to(kind)).reshape(-1, *target.shape)
        return product if target.complex else product.real
