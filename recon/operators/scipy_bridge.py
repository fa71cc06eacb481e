r"""Operators as scipy's ``LinearOperator``, and scipy's as operators.

scipy knows vectors and complex-linear maps; recon knows arrays and counts complex numbers as pairs of real ones.  A map from
real arrays to complex ones has exactly one complex-linear continuation, ``A(a + i b) = A a + i A b``, and that is what scipy
gets: a matrix ``M`` becomes ``M``, with ``rmatvec`` its Hermitian transpose.  The other way round a complex scipy operator on
a real domain has the transpose ``Re(M^H y)``.  scipy's solvers then look for complex unknowns; the real ones of a complex
measurement are found by recon's own solvers, or by scipy's on the real and imaginary rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.sparse import linalg
from torch import Tensor

from recon.draws import Draws
from recon.errors import InputError
from recon.operators.base import LinearOperator, Operator
from recon.operators.cg import dot
from recon.space import Space

_ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-5}
_PROBES = 3


def as_scipy(operator: LinearOperator) -> linalg.LinearOperator:
    """``operator`` on flattened arrays: shape (range.size, domain.size), batched in ``matmat`` and ``rmatmat``.

    dtype: that of the operator's numbers, complex where its data are.  The operator is shared, not copied.
    Raises InputError for a map that is not complex-linear: from complex arrays to real ones, or through a real part.
    """
    there, here = operator.domain.complex, operator.range.complex
    if there and not here:
        raise InputError(
            f"{operator.describe()} takes the real part and is not linear over complex numbers, as scipy's operators are; "
            "use the transpose of its transpose: A.H.as_scipy().H"
        )
    if there:
        probe = probes(operator, operator.domain, 0)
        turned = operator.A(1j * probe)
        gap = turned - 1j * operator.A(probe)
        if not float(gap.abs().max()) <= _ROUNDING.get(operator.dtype, 1e-2) * float(turned.abs().max()):
            raise InputError(f"{operator.describe()} is linear over real numbers only: A(i x) differs from i A(x)")
    return _ScipyOperator(operator)


def from_scipy(linop: Any, domain: Space, range: Space) -> LinearOperator:  # noqa: ANN401  (scipy has no types)
    """A matrix, sparse matrix or ``scipy.sparse.linalg.LinearOperator`` as an operator from ``domain`` to ``range``.

    linop: (range.size, domain.size), with a transpose (``rmatvec``); complex ones need a complex range.  It computes on the
    CPU in its own precision or the caller's, whichever is finer; answers come back in the caller's.  ``matched`` says
    whether the transpose passed the dot test, ``adjoint_error`` what was measured.

    Raises InputError for a shape or kind that does not fit the spaces, or without a transpose.
    """
    return ScipyOperator(linop, domain, range)


class ScipyOperator(LinearOperator):
    """``y = M x`` on flattened arrays with a ``scipy.sparse.linalg.LinearOperator`` M; made by ``from_scipy``."""

    kind: Tensor

    def __init__(self, linop: Any, domain: Space, range: Space) -> None:  # noqa: ANN401
        linop = linalg.aslinearoperator(linop)
        if linop.shape != (range.size, domain.size):
            raise InputError(f"a linear operator {linop.shape} does not map {domain.describe()} to {range.describe()}")
        number = np.dtype(linop.dtype if linop.dtype is not None else np.float64)
        if range.complex != (number.kind == "c" or domain.complex):
            raise InputError(
                f"a linear operator of {number} numbers does not map {domain.describe()} to {range.describe()}: the range is "
                "complex where the numbers or the domain are"
            )
        super().__init__(domain, range)
        self.linop, self.number = linop, number
        # Nothing else here carries a floating type, and conversions of the operator must be felt.
        self.register_buffer("kind", torch.zeros(()), persistent=False)
        try:
            linop.rmatvec(np.zeros(range.size, dtype=number))
        except (NotImplementedError, TypeError) as error:  # what scipy answers where there is none
            raise InputError(f"the linear operator has no transpose ({error}): give it rmatvec (or rmatmat)") from error
        self.adjoint_error = adjoint_error(self, torch.float64)
        finest = torch.float64 if number.itemsize // (2 if number.kind == "c" else 1) > 4 else torch.float32
        self.passed = self.adjoint_error <= _ROUNDING[finest]

    @property
    def matched(self) -> bool:
        """Whether the transpose passed the dot test when the operator was made."""
        return self.passed

    def apply(self, x: Tensor) -> Tensor:
        return self._times(self.linop.matmat, x, self.range)

    def apply_adjoint(self, y: Tensor) -> Tensor:
        return self._times(self.linop.rmatmat, y, self.domain)

    def _times(self, product: Callable[[np.ndarray], np.ndarray], values: Tensor, target: Space) -> Tensor:
        kind = values.dtype.to_complex() if target.complex else values.dtype.to_real()
        if not len(values):
            return values.new_zeros((0, *target.shape), dtype=kind)
        columns = values.detach().flatten(1).cpu().numpy().T
        out = np.asarray(product(columns.astype(np.result_type(columns.dtype, self.number))))
        out = out if target.complex else out.real
        return torch.from_numpy(out.T.copy()).to(values.device, kind).reshape(-1, *target.shape)


class _ScipyOperator(linalg.LinearOperator):
    """What ``as_scipy`` returns; columns of a matrix are draws of a batch."""

    def __init__(self, operator: LinearOperator) -> None:
        kind = operator.dtype.to_complex() if operator.range.complex else operator.dtype
        super().__init__(torch.empty(0, dtype=kind).numpy().dtype, (operator.range.size, operator.domain.size))
        self.operator = operator

    def _matvec(self, x: np.ndarray) -> np.ndarray:
        return self._matmat(x.reshape(-1, 1))[:, 0]

    def _rmatvec(self, y: np.ndarray) -> np.ndarray:
        return self._rmatmat(y.reshape(-1, 1))[:, 0]

    def _matmat(self, x: np.ndarray) -> np.ndarray:
        A = self.operator
        return self._linear(A.A, x, A.domain)

    def _rmatmat(self, y: np.ndarray) -> np.ndarray:
        A = self.operator
        if not A.range.complex or A.domain.complex:
            return self._linear(A.A_adjoint, y, A.range)
        # A^T is Re(M^H .), so M^H y = A^T y + i A^T(-i y).
        return self._run(A.A_adjoint, y, A.range) + 1j * self._run(A.A_adjoint, -1j * y, A.range)

    def _linear(self, call: Callable[[Tensor], Tensor], columns: np.ndarray, space: Space) -> np.ndarray:
        """``call`` continued to complex columns where its own arrays are real."""
        if space.complex or not np.iscomplexobj(columns):
            return self._run(call, columns, space)
        return self._run(call, columns.real, space) + 1j * self._run(call, columns.imag, space)

    def _run(self, call: Callable[[Tensor], Tensor], columns: np.ndarray, space: Space) -> np.ndarray:
        kind = self.operator.dtype.to_complex() if space.complex else self.operator.dtype
        rows = torch.from_numpy(np.ascontiguousarray(columns.T)).to(self.operator.device, kind)
        with torch.no_grad():
            return call(rows.reshape(-1, *space.shape)).flatten(1).cpu().numpy().T


def probes(operator: Operator, space: Space, step: int, dtype: torch.dtype | None = None) -> Tensor:
    """Three fixed arrays of standard normal numbers of ``space``, in the floating type and on the device of ``operator``."""
    numbers = [one for one in (*operator.parameters(), *operator.buffers()) if one.is_floating_point()]
    real = dtype or next((one.dtype for one in numbers), torch.float32)
    device = next((one.device for one in numbers), torch.device("cpu"))
    kind = real.to_complex() if space.complex else real
    return Draws(0, range(_PROBES)).normal(step, space.shape, "probe", dtype=kind).to(device)


def adjoint_error(operator: LinearOperator, dtype: torch.dtype | None = None) -> float:
    """The dot test: the largest ``|<A u, v> - <u, A^T v>| / (|A u| |v|)`` of three pairs of probes."""
    u, v = probes(operator, operator.domain, 0, dtype), probes(operator, operator.range, 1, dtype)
    with torch.no_grad():
        Au, Av = _double(operator.A(u)), _double(operator.A_adjoint(v))
    u, v = _double(u), _double(v)
    size = (dot(Au, Au) * dot(v, v)).sqrt()
    gap = (dot(Au, v) - dot(u, Av)).abs()
    return float(torch.where(gap == 0, 0.0, gap / size).max())


def _double(a: Tensor) -> Tensor:
    return a.to(torch.complex128 if a.is_complex() else torch.float64)
