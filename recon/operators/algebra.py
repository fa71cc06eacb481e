"""Linear operators made of linear operators: products, sums, multiples, transposes, stacks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from recon.errors import InputError
from recon.operators.base import LinearOperator
from recon.space import Space


class Composed(LinearOperator):
    """``(B @ A) x = B (A x)``.  Raises InputError when A's range is not B's domain."""

    def __init__(self, outer: LinearOperator, inner: LinearOperator) -> None:
        difference = outer.domain.mismatch(inner.range)
        if difference:
            raise InputError(f"{outer.describe()} cannot follow {inner.describe()}: {difference}")
        super().__init__(inner.domain, outer.range)
        self.outer, self.inner = outer, inner
        self.matched = outer.matched and inner.matched

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
        self.matched = left.matched and right.matched

    def apply(self, x: Tensor) -> Tensor:
        return self.left.apply(x) + self.right.apply(x)

    def apply_adjoint(self, y: Tensor) -> Tensor:
        return self.left.apply_adjoint(y) + self.right.apply_adjoint(y)


class Scaled(LinearOperator):
    """``(c A) x = c (A x)``."""

    def __init__(self, factor: float, operand: LinearOperator) -> None:
        super().__init__(operand.domain, operand.range)
        self.factor, self.operand = float(factor), operand
        self.matched = operand.matched

    def apply(self, x: Tensor) -> Tensor:
        return self.factor * self.operand.apply(x)

    def apply_adjoint(self, y: Tensor) -> Tensor:
        return self.factor * self.operand.apply_adjoint(y)


class Transposed(LinearOperator):
    """``A^T`` as an operator; its own transpose is ``A`` again."""

    def __init__(self, operand: LinearOperator) -> None:
        super().__init__(operand.range, operand.domain)
        self.operand = operand
        self.matched = operand.matched

    def apply(self, x: Tensor) -> Tensor:
        return self.operand.apply_adjoint(x)

    def apply_adjoint(self, y: Tensor) -> Tensor:
        return self.operand.apply(y)


class Stack(LinearOperator):
    """Several measurements of the same object, one after the other: ``A x = (A_1 x, A_2 x, ...)`` as one vector.

    range: ("datum",) with the sum of the sizes.  ``split(y)`` gives the parts back in their own shapes.
    Raises InputError for an empty list or parts with different domains.
    """

    def __init__(self, parts: Sequence[LinearOperator]) -> None:
        if not parts:
            raise InputError("Stack needs at least one operator")
        for part in parts[1:]:
            difference = parts[0].domain.mismatch(part.domain)
            if difference:
                raise InputError(f"Stack needs one common domain: {difference}")
        units = {part.range.unit for part in parts}
        size = sum(part.range.size for part in parts)
        super().__init__(parts[0].domain, Space.vector(size, units.pop() if len(units) == 1 else "mixed", "datum"))
        self.parts = nn.ModuleList(parts)
        self.matched = all(part.matched for part in parts)

    def _parts(self) -> list[LinearOperator]:
        return [part for part in self.parts if isinstance(part, LinearOperator)]

    def apply(self, x: Tensor) -> Tensor:
        return torch.cat([part.apply(x).flatten(1) for part in self._parts()], dim=1)

    def apply_adjoint(self, y: Tensor) -> Tensor:
        pieces = [part.apply_adjoint(piece) for part, piece in zip(self._parts(), self.split(y), strict=True)]
        return torch.stack(pieces).sum(0)

    def split(self, y: Tensor) -> list[Tensor]:
        """The parts of ``y`` (*batch, datum), each in the shape of its own range."""
        batch = y.shape[:-1]
        pieces = y.split([part.range.size for part in self._parts()], dim=-1)
        return [piece.reshape(*batch, *part.range.shape) for piece, part in zip(pieces, self._parts(), strict=True)]
