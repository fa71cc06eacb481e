r"""Correlated noise made white: ``W C W^H = I`` for the noise covariance ``C = L L^H``, with ``W = L^-1``.

Datum ``i`` of ``W y`` is what datum ``i`` adds to the data before it (its innovation), in its own standard deviation: order,
names and coordinates keep their meaning, units are gone.  Complex data count as pairs of real ones whose parts have unit
variance each, so ``C = E[n n^H]`` (circular noise) is whitened by ``sqrt(2) L^-1``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from recon.errors import InputError
from recon.operators.base import LinearOperator, Operator
from recon.space import Space


class Whitening(LinearOperator):
    """``W``: data of ``space`` to data whose noise has unit variance in every real number and no correlation.

    covariance: Hermitian and positive definite, real or complex; (m, m) over the flattened space, or (k, k) along its
    dimension ``dim`` and the same everywhere else.  dtype: real floating type of the numbers kept.  Maps to the same axes,
    unit 1.  ``log_volume``: of one unit of whitened data, ``-log |det W|`` over all real numbers of the space.

    Raises InputError for another shape, a covariance that is not finite, not Hermitian or not positive definite, a complex
    one of real data, or a dim that the space does not have.
    """

    factor: Tensor

    def __init__(
        self, space: Space, covariance: Tensor, dim: str | None = None, dtype: torch.dtype = torch.float64
    ) -> None:
        super().__init__(space, Space(space.dims, space.shape, space.coords, "1", space.complex))
        if dim is not None and dim not in space.dims:
            raise InputError(f"a covariance along {dim!r} needs that dimension; {space.describe()} has none")
        self.axis = None if dim is None else space.dims.index(dim)
        k = space.size if self.axis is None else space.shape[self.axis]
        lower = _cholesky(torch.as_tensor(covariance).detach(), k, space)
        identity = torch.eye(k, dtype=lower.dtype, device=lower.device)
        inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
        if space.complex:
            inverse = math.sqrt(2) * inverse
        parts = 2 if space.complex else 1
        self.log_volume = -parts * (space.size // k) * float(inverse.diagonal().real.log().sum())
        self.complex = inverse.is_complex()
        # As parts: conversions of a module to another floating type would drop the imaginary one of a complex buffer.
        self.register_buffer("factor", (torch.view_as_real(inverse) if self.complex else inverse).to(dtype))

    def of(self, operator: Operator) -> Operator:
        """``W A``: linear where ``operator`` is."""
        return self @ operator if isinstance(operator, LinearOperator) else Whitened(self, operator)

    def apply(self, x: Tensor) -> Tensor:
        return self._times(x, self._matrix(x))

    def apply_adjoint(self, y: Tensor) -> Tensor:
        return self._times(y, self._matrix(y).mH)

    def _matrix(self, like: Tensor) -> Tensor:
        factor = torch.view_as_complex(self.factor) if self.complex else self.factor
        return factor.to(like.dtype)

    def _times(self, values: Tensor, matrix: Tensor) -> Tensor:
        if self.axis is None:
            return (values.flatten(1) @ matrix.mT).reshape(values.shape)
        moved = values.movedim(self.axis + 1, -1)
        return (moved @ matrix.mT).movedim(-1, self.axis + 1).contiguous()


class Whitened(Operator):
    """``W A(x)`` of an operator ``A`` that is not linear (a linear one is composed: ``W @ A``)."""

    def __init__(self, whitening: Whitening, operator: Operator) -> None:
        difference = whitening.domain.mismatch(operator.range)
        if difference:
            raise InputError(f"{whitening.describe()} cannot follow {operator.describe()}: {difference}")
        super().__init__(operator.domain, whitening.range)
        self.whitening, self.operator = whitening, operator

    def apply(self, x: Tensor) -> Tensor:
        return self.whitening.A(self.operator.A(x))


def _cholesky(covariance: Tensor, k: int, space: Space) -> Tensor:
    """The lower factor in double precision, of the kind that multiplies the space's values."""
    if tuple(covariance.shape) != (k, k):
        raise InputError(f"the covariance must be ({k}, {k}) for {space.describe()}; got {tuple(covariance.shape)}")
    if covariance.is_complex() and not space.complex:
        raise InputError(f"the covariance of real data {space.describe()} must be real; got {covariance.dtype}")
    if not bool(torch.isfinite(covariance).all()):
        raise InputError("the covariance holds values that are NaN or infinite")
    precision = torch.finfo(covariance.dtype).eps if covariance.is_floating_point() or covariance.is_complex() else 0.0
    full = covariance.to(torch.complex128 if covariance.is_complex() else torch.float64)
    asymmetry, largest = float((full - full.mH).abs().max()), float(full.abs().max())
    if asymmetry > max(1e-6, 8 * precision) * largest:
        kind = "Hermitian" if space.complex else "symmetric"
        raise InputError(f"the covariance must be {kind}; it differs from its transpose by {asymmetry:.3g}")
    full = 0.5 * (full + full.mH)
    lower, failed = torch.linalg.cholesky_ex(full)
    values = torch.linalg.eigvalsh(full)
    if bool(failed) or not float(values[0]) > 8 * math.sqrt(k) * precision * float(values[-1]):
        raise InputError(
            f"the covariance must be positive definite; its eigenvalues reach from {float(values[0]):.3g} to "
            f"{float(values[-1]):.3g} (add the noise that every datum has by itself to its diagonal)"
        )
    return lower
