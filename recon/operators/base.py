r"""The contract of a forward model, and the algebra of linear ones.

``y = A(x)`` maps (\*batch, \*domain.shape) to (\*batch, \*range.shape): a whole batch of draws at once.  The public call
checks shapes, the subclass writes ``apply``.  A linear operator writes ``apply`` and ``apply_adjoint``; the matched transpose
is also autograd's backward pass, so a compiled projector is as differentiable as a torch expression, to any order.

A space may hold complex numbers (k-space does).  It counts as the real space of real and imaginary parts, with the inner
product ``Re sum conj(a) b``: the transpose of a map from real arrays to complex ones is the real part of the Hermitian one,
which is torch's own convention for gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from recon.errors import InputError
from recon.operators.cg import CG
from recon.space import Space


class Operator(nn.Module):
    """A forward model between two spaces; ``apply`` is the one method a subclass writes."""

    domain: Space
    range: Space

    def __init__(self, domain: Space, range: Space) -> None:
        super().__init__()
        self.domain, self.range = domain, range

    def apply(self, x: Tensor) -> Tensor:  # nn.Module.apply maps over submodules; physics wins
        """The physics; ``x`` is known to be (n, *domain.shape) and the answer must be (n, *range.shape)."""
        raise TypeError(f"{type(self).__name__} must define apply(x)")

    def A(self, x: Tensor) -> Tensor:
        """``A(x)`` for ``x`` (*batch, *domain.shape).  Raises InputError when the shape does not fit."""
        return self._checked(self.apply, x, self.domain, self.range, "A")

    def forward(self, x: Tensor) -> Tensor:
        return self.A(x)

    def vjp(self, x: Tensor, v: Tensor) -> Tensor:
        """``(dA/dx)^T v`` at ``x``: (*batch, *domain.shape), (*batch, *range.shape) -> (*batch, *domain.shape)."""
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.A(point), point, v)
        return gradient

    def _checked(
        self, function: Callable[[Tensor], Tensor], x: Tensor, source: Space, target: Space, name: str
    ) -> Tensor:
        batch = source.require(tuple(x.shape), f"{self.describe()}.{name}")
        if not (x.is_complex() if source.complex else x.is_floating_point()):
            kind = "complex" if source.complex else "floating-point"
            raise InputError(f"{self.describe()}.{name} takes {kind} arrays; got {x.dtype}")
        return function(x.reshape(-1, *source.shape)).reshape(*batch, *target.shape)

    def as_deepinv(self) -> Any:  # noqa: ANN401  (a class of a library that may be absent)
        """A deepinv ``Physics`` (a ``LinearPhysics`` if linear) around this operator; see ``operators.deepinv_bridge``.

        Raises InputError without deepinv.
        """
        from recon.operators.deepinv_bridge import as_deepinv

        return as_deepinv(self)

    def describe(self) -> str:
        """One line that names the operator and its two spaces."""
        return f"{type(self).__name__} {self.domain.describe()} -> {self.range.describe()}"

    # nn.Module hashes by identity and has no value of its own to show: the two spaces are what a reader wants.
    def extra_repr(self) -> str:
        return f"{self.domain.describe()} -> {self.range.describe()}"


class _Matched(torch.autograd.Function):
    """``y = forward(x)`` whose gradient is ``backward(grad_y)``, itself differentiable the same way."""

    @staticmethod
    def forward(x: Tensor, run: Callable[[Tensor], Tensor], transpose: Callable[[Tensor], Tensor]) -> Tensor:
        return run(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401
        _, ctx.run, ctx.transpose = inputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        return _Matched.apply(grads[0], ctx.transpose, ctx.run), None, None


class LinearOperator(Operator):
    """A linear forward model with its transpose.

    Aliases: ``AT``, ``A_adjoint``; ``.H`` and ``.T`` are operators.  Algebra: ``B @ A``, ``A + B``, ``2.0 * A``.
    """

    @property
    def matched(self) -> bool:
        """Whether ``apply_adjoint`` is the exact transpose (to rounding), which that of every operator in it must be.

        Asked each time: some projectors have another back-projector on another device.
        """
        return all(part.matched for part in self.modules() if isinstance(part, LinearOperator) and part is not self)

    def apply_adjoint(self, y: Tensor) -> Tensor:
        """The transpose; ``y`` is known to be (n, *range.shape)."""
        raise TypeError(f"{type(self).__name__} must define apply_adjoint(y)")

    def A(self, x: Tensor) -> Tensor:
        """``A x`` for ``x`` (*batch, *domain.shape).  Raises InputError when the shape does not fit."""
        return self._checked(self._run, x, self.domain, self.range, "A")

    def A_adjoint(self, y: Tensor) -> Tensor:
        """``A^T y`` for ``y`` (*batch, *range.shape).  Raises InputError when the shape does not fit."""
        return self._checked(self._run_adjoint, y, self.range, self.domain, "A_adjoint")

    def AT(self, y: Tensor) -> Tensor:
        """Alias of ``A_adjoint``."""
        return self.A_adjoint(y)

    def _run(self, x: Tensor) -> Tensor:
        return _Matched.apply(x, self.apply, self.apply_adjoint)

    def _run_adjoint(self, y: Tensor) -> Tensor:
        return _Matched.apply(y, self.apply_adjoint, self.apply)

    def vjp(self, x: Tensor, v: Tensor) -> Tensor:
        """``A^T v``, wherever ``x`` is."""
        return self.A_adjoint(v)

    def normal(self, x: Tensor) -> Tensor:
        """``A^T A x``; overridden where it is cheaper than the two factors."""
        return self.A_adjoint(self.A(x))

    def solve(
        self,
        b: Tensor,
        c: float,
        weight: Tensor | None = None,
        x0: Tensor | None = None,
        cg: CG | None = None,
        watch: Callable[[int], None] | None = None,
    ) -> Tensor:
        """``(A^T W A + c I)^{-1} b``.

        b, x0: (n, *domain.shape).  c > 0.  weight: diagonal of ``W``, *range.shape; None for the identity.  Overridden where a
        closed form exists.  watch: told the batch size at each use of ``A`` and ``A^T``.

        Raises InputError for ``c <= 0`` (the system may be singular).
        """
        if not c > 0:
            raise InputError(f"solve needs c > 0 so that A^T W A + c I is positive definite; got {c}")

        def matvec(x: Tensor) -> Tensor:
            if watch is not None:
                watch(len(x))
            if weight is None:
                return self.normal(x) + c * x
            return self.A_adjoint(weight * self.A(x)) + c * x

        return (cg or CG()).solve(matvec, b, x0)

    def norm(self, iterations: int = 30) -> float:
        """Largest singular value of ``A``, by power iteration from a fixed start (a lower bound, tight after ~30)."""
        ramp = torch.linspace(-1, 1, self.domain.size, dtype=self.dtype, device=self.device)
        x = (1 + 0.1 * ramp).reshape(1, *self.domain.shape)
        x = torch.complex(x, 0.3 * x) if self.domain.complex else x
        for _ in range(iterations):
            x = self.normal(x / x.norm())
        return float(x.norm().sqrt())

    def as_scipy(self) -> Any:  # noqa: ANN401  (scipy has no types)
        """A ``scipy.sparse.linalg.LinearOperator`` (range.size, domain.size); see ``operators.scipy_bridge``.

        Raises InputError where the operator is linear over the real numbers only.
        """
        from recon.operators.scipy_bridge import as_scipy

        return as_scipy(self)

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of the operator's numbers (float32 when it has none); of the parts where they are complex."""
        return next((b.dtype for b in self.buffers() if b.is_floating_point()), torch.float32)

    @property
    def device(self) -> torch.device:
        """Where the operator's numbers live."""
        return next((b.device for b in self.buffers()), torch.device("cpu"))

    @property
    def H(self) -> LinearOperator:
        """The transpose as an operator."""
        from recon.operators.algebra import Transposed

        return self.operand if isinstance(self, Transposed) else Transposed(self)

    @property
    def T(self) -> LinearOperator:
        """Alias of ``H``: complex spaces count as real ones of twice the size."""
        return self.H

    def __matmul__(self, other: LinearOperator) -> LinearOperator:
        from recon.operators.algebra import Composed

        return Composed(self, other)

    def __add__(self, other: LinearOperator) -> LinearOperator:
        from recon.operators.algebra import Summed

        return Summed(self, other)

    def __rmul__(self, factor: float) -> LinearOperator:
        from recon.operators.algebra import Scaled

        return Scaled(factor, self)
