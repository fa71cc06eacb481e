r"""Operators with a few unknown numbers: gains and offsets of detectors, the width of a blur, where the axis of rotation is.

``y = A(x; theta) + n`` with ``theta ~ N(mean, diag(std^2))`` before any data.  By itself such an operator is that of ``mean``,
so every sampler takes it as known; ``recon.samplers.Blind`` estimates ``theta`` along with the image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from recon.errors import InputError
from recon.operators.base import LinearOperator, Operator

Pair = tuple[float, float]
"""(mean, standard deviation) of a parameter before any data; a standard deviation of zero: known."""


class ParametricOperator(Operator):
    """The contract: ``bind`` and ``offset``, of one parameter vector per draw.

    names: of the parameters.  mean, std: (p,), float64.  affine: whether ``A(x; theta)`` is affine in theta for every x.
    Raises InputError for parameters without a name, or a standard deviation that is not positive.
    """

    mean: Tensor
    std: Tensor
    affine: bool = False

    def __init__(self, like: Operator, names: Sequence[str], mean: Tensor, std: Tensor) -> None:
        super().__init__(like.domain, like.range)
        mean, std = torch.as_tensor(mean).double(), torch.as_tensor(std).double()
        if not names or not len(names) == mean.numel() == std.numel() or not bool((std > 0).all()):
            raise InputError(
                f"{type(self).__name__} needs one name, mean and positive standard deviation per parameter; got {list(names)}, "
                f"{mean.tolist()} and {std.tolist()}"
            )
        self.names = tuple(names)
        # Kept in double whatever the data: whole modules are converted to float32, and these are few.
        self.mean, self.std = mean.reshape(-1), std.reshape(-1)

    def bind(self, theta: Tensor) -> Operator:
        """The operator of draws with parameters ``theta`` (n, p), or (1, p) for any number of draws; without ``offset``."""
        raise TypeError(f"{type(self).__name__} must define bind(theta)")

    def offset(self, theta: Tensor) -> Tensor | None:
        """What is added to the data whatever the image, (n, *range.shape); None for nothing."""
        return None

    def at(self, x: Tensor, theta: Tensor) -> Tensor:
        """``A(x; theta)``: (n, *domain.shape), (n, p) -> (n, *range.shape)."""
        y, offset = self.bind(theta).A(x), self.offset(theta)
        return y if offset is None else y + offset.to(y.dtype)

    def apply(self, x: Tensor) -> Tensor:
        return self.at(x, self.mean[None])

    def information(self, x: Tensor, theta: Tensor, y: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Of the data term ``-1/2 |(y - A(x; theta)) / sigma|^2``: gradient in theta (n, p), and ``C^T S^-1 C`` (n, p, p).

        ``C = dA/dtheta``, here by central differences of a thousandth of a standard deviation.  float64.
        """
        columns = []
        for j, std in enumerate(self.std.tolist()):
            step = torch.zeros_like(theta)
            step[:, j] = 1e-3 * std
            columns.append((self.at(x, theta + step) - self.at(x, theta - step)) / (2e-3 * std))
        change = torch.stack([_real(c / sigma) for c in columns], 1)
        residual = _real((y - self.at(x, theta)) / sigma)
        return (change * residual[:, None]).sum(2), (change[:, :, None] * change[:, None]).sum(3)


class GainOffset(ParametricOperator):
    """``y = g A x + o``: a gain and an offset of the whole range, or one each per place along one of its dimensions.

    gain, offset: (mean, standard deviation), the latter in units of the range; None: one and zero.  along: a dimension of the
    range (detectors give rings, views a drift of the source).
    Raises InputError for neither of the two, a range without that dimension, or an offset of complex data.
    """

    affine = True

    def __init__(
        self, operand: Operator, gain: Pair | None = (1.0, 0.1), offset: Pair | None = None, along: str | None = None
    ) -> None:
        space = operand.range
        if along is not None and along not in space.dims:
            raise InputError(
                f"{operand.describe()} has no dimension {along!r} along which gains or offsets could differ"
            )
        if offset is not None and space.complex:
            raise InputError(f"GainOffset knows real offsets only; {operand.describe()} measures complex numbers")
        groups = 1 if along is None else space.shape[space.dims.index(along)]
        given = [(name, pair) for name, pair in (("gain", gain), ("offset", offset)) if pair is not None]
        if not given:
            raise InputError("GainOffset needs a gain or an offset that is not known, as (mean, standard deviation)")
        names = [name if along is None else f"{name}[{along}={i}]" for name, _ in given for i in range(groups)]
        values = torch.tensor([pair for _, pair in given for _ in range(groups)], dtype=torch.float64)
        super().__init__(operand, names, values[:, 0], values[:, 1])
        self.operand, self.groups = operand, groups
        self.has_gain, self.has_offset = gain is not None, offset is not None
        self.axis = 0 if along is None else space.dims.index(along)

    def _spread(self, values: Tensor) -> Tensor:
        """(n, groups) as it broadcasts over (n, *range.shape)."""
        shape = [1] * len(self.range.shape)
        shape[self.axis] = self.groups
        return values.reshape(-1, *shape)

    def bind(self, theta: Tensor) -> Operator:
        if not self.has_gain:
            return self.operand
        gain = self._spread(theta[:, : self.groups])
        kind = _LinearGain if isinstance(self.operand, LinearOperator) else _Gain
        return kind(self.operand, gain)

    def offset(self, theta: Tensor) -> Tensor | None:
        return self._spread(theta[:, -self.groups :]) if self.has_offset else None

    def information(self, x: Tensor, theta: Tensor, y: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        line = self.operand.A(x)
        residual = y - self.at(x, theta)
        weight = (1 / sigma.double() ** 2).expand(self.range.shape)
        columns = [line] * self.has_gain + [torch.ones_like(line)] * self.has_offset
        slope = torch.cat([self._sums(weight * (c.conj() * residual).real.double()) for c in columns], 1)
        blocks = [
            [torch.diag_embed(self._sums(weight * (a.conj() * b).real.double())) for b in columns] for a in columns
        ]
        return slope, torch.cat([torch.cat(row, 2) for row in blocks], 1)

    def _sums(self, values: Tensor) -> Tensor:
        """(n, *range.shape) summed over all but ``along``: (n, groups)."""
        if self.groups == 1:
            return values.flatten(1).sum(1, keepdim=True)
        return values.movedim(1 + self.axis, 1).reshape(len(values), self.groups, -1).sum(2)


class Family(ParametricOperator):
    """Operators made by a function of the parameters: ``make(theta)`` with ``theta`` (p,), e.g. the width of a blur.

    Every ``make(theta)`` must map between the spaces of ``make(mean)``.  One operator is made per draw and derivatives are
    central differences, so this is for cheap operators or few draws.  Raises InputError for other spaces.
    """

    def __init__(self, make: Callable[[Tensor], Operator], names: Sequence[str], mean: Tensor, std: Tensor) -> None:
        first = make(torch.as_tensor(mean).double().reshape(-1))
        super().__init__(first, names, mean, std)
        self.make, self.nominal = make, first

    def bind(self, theta: Tensor) -> Operator:
        each = [self.make(row) for row in theta.double().cpu()]
        for one in each:
            difference = self.domain.mismatch(one.domain) or self.range.mismatch(one.range)
            if difference:
                raise InputError(f"the members of a Family map between the same spaces; {one.describe()}: {difference}")
        if all(isinstance(one, LinearOperator) for one in each):
            return _LinearEach(each)
        return _Each(each)


class _Gain(Operator):
    """``g A(x)`` with one gain per draw."""

    def __init__(self, operand: Operator, gain: Tensor) -> None:
        super().__init__(operand.domain, operand.range)
        self.operand, self.gain = operand, gain

    def apply(self, x: Tensor) -> Tensor:
        return self.gain.to(x.real.dtype) * self.operand.A(x)


class _LinearGain(_Gain, LinearOperator):
    """The same of a linear operator."""

    operand: LinearOperator

    def apply(self, x: Tensor) -> Tensor:
        return self.gain.to(x.real.dtype) * self.operand.apply(x)

    def apply_adjoint(self, y: Tensor) -> Tensor:
        return self.operand.apply_adjoint(self.gain.to(y.real.dtype) * y)


class _Each(Operator):
    """One operator per draw, or one for all."""

    def __init__(self, each: Sequence[Operator]) -> None:
        super().__init__(each[0].domain, each[0].range)
        self.each = nn.ModuleList(each)

    def apply(self, x: Tensor) -> Tensor:
        return self._map(x, "A")

    def _map(self, values: Tensor, name: str) -> Tensor:
        if len(self.each) == 1:
            return getattr(self.each[0], name)(values)
        rows = [getattr(one, name)(values[i : i + 1]) for i, one in enumerate(self.each)]
        if len(rows) != len(values):
            raise InputError(f"an operator bound to {len(rows)} draws was given {len(values)}")
        return torch.cat(rows)


class _LinearEach(_Each, LinearOperator):
    """The same of linear operators."""

    def apply(self, x: Tensor) -> Tensor:
        return self._map(x, "apply")

    def apply_adjoint(self, y: Tensor) -> Tensor:
        return self._map(y, "apply_adjoint")


def _real(values: Tensor) -> Tensor:
    """(n, ...) as (n, numbers) in float64; complex numbers as pairs."""
    return (torch.view_as_real(values) if values.is_complex() else values).flatten(1).double()
