"""The contract of a likelihood, and what every measurement is asked before it is taken in."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from recon.errors import InputError
from recon.operators.base import Operator

if TYPE_CHECKING:
    from recon.likelihoods.gaussian import GaussianLikelihood


class Likelihood(nn.Module):
    """An operator, what was measured, and the law of the noise."""

    operator: Operator

    def log_prob(self, x: Tensor) -> Tensor:
        """``log p(y | x)``: (n, *domain.shape) -> (n,)."""
        raise TypeError(f"{type(self).__name__} must define log_prob(x)")

    def simulate(self, x: Tensor, normal: Tensor) -> Tensor:
        """A measurement of ``x`` (n, *domain.shape) made with standard normal numbers ``normal`` (n, *range.shape)."""
        raise TypeError(f"{type(self).__name__} must define simulate(x, normal)")

    def gaussian(self) -> GaussianLikelihood:
        """This likelihood as a Gaussian one (itself, or its large-count limit).  Raises InputError where there is none."""
        raise InputError(f"{type(self).__name__} has no Gaussian form; use a sampler that takes any likelihood (DPS)")


def measured(operator: Operator, values: Tensor, what: str) -> Tensor:
    """``values`` as floating-point numbers of the operator's range; whole ones take the operator's floating type.

    Raises InputError naming ``what`` for another kind or shape, or values that are not finite.
    """
    values = torch.as_tensor(values)
    if values.is_complex() != operator.range.complex:
        kind = "complex" if operator.range.complex else "real"
        raise InputError(f"{what} must be {kind}, as {operator.range.describe()} is; got {values.dtype}")
    if tuple(values.shape) != operator.range.shape:
        raise InputError(
            f"{what} must have the shape of the operator's range {operator.range.describe()}; got {tuple(values.shape)}"
        )
    if not (values.is_floating_point() or values.is_complex()):
        floats = (b.dtype for b in operator.buffers() if b.is_floating_point())
        return values.to(next(floats, torch.get_default_dtype()))
    if not bool(torch.isfinite(values).all()):
        bad = int((~torch.isfinite(values)).sum())
        raise InputError(
            f"{what} holds {bad} of {values.numel()} values that are NaN or infinite; "
            "leave them out of the operator and of the data"
        )
    return values


def per_datum(operator: Operator, value: float | Tensor, what: str, dtype: torch.dtype) -> Tensor:
    """One number, or one per datum of the range, as ``dtype``.  Raises InputError naming ``what`` for another shape."""
    value = torch.as_tensor(value, dtype=dtype)
    if value.ndim and tuple(value.shape) != operator.range.shape:
        raise InputError(
            f"{what} must be one number or one per datum {operator.range.describe()}; got {tuple(value.shape)}"
        )
    return value
