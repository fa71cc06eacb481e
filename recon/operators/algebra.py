"""Operators made of operators: products, sums, multiples and transposes of linear ones, stacks of any."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from recon.errors import InputError
from recon.operators.base import LinearOperator, Operator
from recon.space import Space


class Composed(LinearOperator):
    """``(B @ A) x = B (A x)``.  Raises InputError when A's range is not B's domain."""

    def __init__(self, outer: LinearOperator, inner: LinearOperator) -> None:
        difference = outer.domain.mismatch(inner.range)
        if difference:
            raise InputError(f"{outer.describe()} cannot follow {inner.describe()}: {difference}")
        super().__init__(inner.domain, outer.range)
        self.outer, self.inner = outer, inner

    def apply(self, x: Tensor) -> Tensor:
        return self.outer.apply(self.inner.apply(x))

    def apply_adjoint(self, y: Tensor) -> Tensor:
        return self.inner.apply_adjoint(self.outer.apply_adjoint(y))


class Summed(LinearOperator):
    """``(A + B) x = A x + B x``.  Raises InputError when domains or ranges differ."""

    def __init__(self, left: LinearOperator, right: LinearOperator) -> None:
        difference = left.domain.mismatch(right.domain) or left.range.mismatch(right.range)
        if difference:
            raise InputError(f"{left.describe()} cannot be added to {right.describe()}: {difference}")
        super().__init__(left.domain, left.range)
        self.left, self.right = left, right

    def apply(self, x: Tensor) -> Tensor:
        return self.left.apply(x) + self.right.apply(x)

    def apply_adjoint(self, y: Tensor) -> Tensor:
        return self.left.apply_adjoint(y) + self.right.apply_adjoint(y)


class Scaled(LinearOperator):
    """``(c A) x = c (A x)``."""

    def __init__(self, factor: float, operand: LinearOperator) -> None:
        super().__init__(operand.domain, operand.range)
        self.factor, self.operand = float(factor), operand

    def apply(self, x: Tensor) -> Tensor:
        return self.factor * self.operand.apply(x)

    def apply_adjoint(self, y: Tensor) -> Tensor:
        return self.factor * self.operand.apply_adjoint(y)


class Diagonal(LinearOperator):
    """``y = d x`` entry by entry.

    values: (*domain.shape) or what broadcasts to it.  range: the domain, or one of the same shape in another unit.
    Raises InputError for values that do not fit or are not finite.
    """

    values: Tensor

    def __init__(self, values: Tensor, domain: Space, range: Space | None = None) -> None:
        range = range or domain
        try:
            full = values.expand(domain.shape)
        except RuntimeError as error:
            raise InputError(
                f"a diagonal on {domain.describe()} takes one number per entry; got {tuple(values.shape)}"
            ) from error
        if range.shape != domain.shape or range.complex != domain.complex or not values.is_floating_point():
            raise InputError(f"a diagonal of {values.dtype} does not map {domain.describe()} to {range.describe()}")
        if not bool(torch.isfinite(values).all()):
            raise InputError("a diagonal must be finite everywhere")
        super().__init__(domain, range)
        self.register_buffer("values", full)

    def apply(self, x: Tensor) -> Tensor:
        return self.values * x

    def apply_adjoint(self, y: Tensor) -> Tensor:
        return self.values * y

    def normal(self, x: Tensor) -> Tensor:
        return self.values.square() * x


class Transposed(LinearOperator):
    """``A^T`` as an operator; its own transpose is ``A`` again."""

    def __init__(self, operand: LinearOperator) -> None:
        super().__init__(operand.range, operand.domain)
        self.operand = operand

    def apply(self, x: Tensor) -> Tensor:
        return self.operand.apply_adjoint(x)

    def apply_adjoint(self, y: Tensor) -> Tensor:
        return self.operand.apply(y)


class _Joined(Operator):
    """Several measurements of the same object as one vector; what stacks of any operators share."""

    parts: nn.ModuleList

    def __init__(self, parts: Sequence[Operator]) -> None:
        name = type(self).__name__
        if not parts:
            raise InputError(f"{name} needs at least one operator")
        for part in parts[1:]:
            difference = parts[0].domain.mismatch(part.domain)
            if difference:
                raise InputError(f"{name} needs one common domain: {difference}")
        units, kinds = {part.range.unit for part in parts}, [part.range.complex for part in parts]
        pairs = any(kinds) and not all(kinds)
        size = sum(part.range.size * (2 if pairs and part.range.complex else 1) for part in parts)
        unit = units.pop() if len(units) == 1 else "mixed"
        super().__init__(parts[0].domain, Space(("datum",), (size,), {}, unit, complex=all(kinds)))
        self.parts = nn.ModuleList(parts)

    def _each(self) -> list[Operator]:
        return [part for part in self.parts if isinstance(part, Operator)]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """One array per part, (*batch, *its range), as one vector (*batch, datum); the inverse of ``split``."""
        flat = []
        for part, values in zip(self._each(), parts, strict=True):
            batch = part.range.require(tuple(values.shape), f"{type(self).__name__}.join")
            real = torch.view_as_real(values) if values.is_complex() and not self.range.complex else values
            flat.append(real.reshape(*batch, self._size(part)))
        return torch.cat(flat, dim=-1)

    def split(self, y: Tensor) -> list[Tensor]:
        """The parts of ``y`` (*batch, datum), each in the shape of its own range."""
        batch = y.shape[:-1]
        pieces = y.split([self._size(part) for part in self._each()], dim=-1)
        out = []
        for piece, part in zip(pieces, self._each(), strict=True):
            if part.range.complex and not self.range.complex:
                piece = torch.complex(piece[..., ::2], piece[..., 1::2])
            out.append(piece.reshape(*batch, *part.range.shape))
        return out

    def _size(self, part: Operator) -> int:
        return part.range.size * (2 if part.range.complex and not self.range.complex else 1)

    def apply(self, x: Tensor) -> Tensor:
        return self.join([part.A(x) for part in self._each()])


class Joined(_Joined):
    """``A(x) = (A_1(x), A_2(x), ...)`` as one vector, of operators that need not be linear; else as ``Stack``."""


class Stack(_Joined, LinearOperator):
    """Several measurements of the same object, one after the other: ``A x = (A_1 x, A_2 x, ...)`` as one vector.

    range: ("datum",) with the sum of the sizes; complex where all parts are.  Where only some are, their real and imaginary
    parts stand side by side as two real data.  ``split(y)`` gives the parts back in their own shapes and kinds, ``join`` is
    its inverse.
    Raises InputError for an empty list, parts with different domains, or parts that are not linear.
    """

    def __init__(self, parts: Sequence[LinearOperator]) -> None:
        for part in parts:
            if not isinstance(part, LinearOperator):
                raise InputError(f"Stack takes linear operators; got {type(part).__name__} (Joined takes any)")
        super().__init__(parts)

    def _parts(self) -> list[LinearOperator]:
        return [part for part in self.parts if isinstance(part, LinearOperator)]

    def apply(self, x: Tensor) -> Tensor:
        return self.join([part.apply(x) for part in self._parts()])

    def apply_adjoint(self, y: Tensor) -> Tensor:
        pieces = [part.apply_adjoint(piece) for part, piece in zip(self._parts(), self.split(y), strict=True)]
        return torch.stack(pieces).sum(0)
