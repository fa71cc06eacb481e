r"""Operators that compute with a deepinv physics; ``deepinv_bridge`` makes them and says how arrays are laid out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from recon.errors import InputError, need
from recon.operators.base import LinearOperator, Operator
from recon.operators.scipy_bridge import adjoint_error, probes
from recon.space import Space

Call = Callable[[Tensor], Tensor]

CHANNELS = ("channel", "variable")
_ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-5}


def image_shape(space: Space) -> tuple[int, ...]:
    """How deepinv sees one array of ``space``: (channel, rows, columns), or with more axes before the rows."""
    shape = space.shape if space.dims[:1] and space.dims[0] in CHANNELS else (1, *space.shape)
    return (shape[0], *(1,) * (3 - len(shape)), *shape[1:])


class _Bridge(Operator):
    """What both kinds of operators around a physics share."""

    kind: Tensor
    physics: Any

    def __init__(self, physics: Any, domain: Space, range: Space) -> None:  # noqa: ANN401
        super().__init__(domain, range)
        # The first buffer tells the floating type; some physics have none, or hold one of another type before their own.
        dtype, device = numbers(physics)
        self.register_buffer("kind", torch.zeros((), dtype=dtype, device=device), persistent=False)
        self.physics = physics

    def _apply(self, fn: Any, recurse: bool = True) -> Any:  # noqa: ANN401
        """Conversions of the module reach complex buffers as pairs; as they are, some would lose their imaginary part."""

        def whole(t: Tensor) -> Tensor:
            if not t.is_complex():
                return fn(t)
            return torch.view_as_complex(fn(torch.view_as_real(t.resolve_conj())).contiguous())

        convert: Any = super()._apply
        return convert(whole, recurse)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave the noise and sensor models behind: they are not used, and often cannot be copied."""
        return {**self.__dict__, "_modules": {name: _quiet(module) for name, module in self._modules.items()}}


class DeepinvOperator(_Bridge):
    """``physics.A`` of a deepinv ``Physics``, differentiated by autograd; made by ``from_deepinv``."""

    def __init__(self, physics: Any, domain: Space, range: Space) -> None:  # noqa: ANN401
        super().__init__(physics, domain, range)
        self.one_by_one = not _batches(self._rows, probes(self, domain, 0))

    def _rows(self, x: Tensor) -> Tensor:
        return _answer(self.physics.A, x, image_shape(self.domain), self.range)

    def apply(self, x: Tensor) -> Tensor:
        return _each(self._rows, x) if self.one_by_one else self._rows(x)


class DeepinvLinearOperator(_Bridge, LinearOperator):
    """``A`` and ``A_adjoint`` of a deepinv ``LinearPhysics``; made by ``from_deepinv``."""

    def __init__(
        self,
        physics: Any,  # noqa: ANN401
        domain: Space,
        range: Space,
        shape: tuple[int, ...],
        automatic: bool,
    ) -> None:
        super().__init__(physics, domain, range)
        self.shape, self.automatic = shape, automatic
        x, y = probes(self, domain, 0), probes(self, range, 1)
        self.one_by_one = not (_batches(self._rows, x) and _batches(self._rows_back, y))
        self.adjoint_error = adjoint_error(self)
        self.passed = self.adjoint_error <= _limit(self.dtype)

    @property
    def matched(self) -> bool:
        """Whether the transpose passed the dot test when the operator was made."""
        return self.passed

    def _rows(self, x: Tensor) -> Tensor:
        return _answer(self.physics.A, x, image_shape(self.domain), self.range)

    def _rows_back(self, y: Tensor) -> Tensor:
        return _answer(self._back if self.automatic else self.physics.A_adjoint, y, self.shape, self.domain)

    def _back(self, y: Tensor) -> Tensor:
        """Backpropagation through ``A``, in any precision (deepinv's own automatic transpose is float32 and real)."""
        kind = y.dtype if self.domain.complex else y.dtype.to_real()
        with torch.enable_grad():
            x = torch.zeros((len(y), *image_shape(self.domain)), dtype=kind, device=y.device, requires_grad=True)
            return torch.autograd.grad(self.physics.A(x), x, y.detach())[0]

    def apply(self, x: Tensor) -> Tensor:
        return _each(self._rows, x) if self.one_by_one else self._rows(x)

    def apply_adjoint(self, y: Tensor) -> Tensor:
        return _each(self._rows_back, y) if self.one_by_one else self._rows_back(y)


def same(x: Tensor) -> Tensor:
    """Nothing: a placeholder that can be pickled, unlike deepinv's lambdas."""
    return x


def _quiet(module: Any, outermost: bool = True) -> Any:  # noqa: ANN401
    """``module`` without what ``A`` does not use; buffers and parameters are shared.

    The physics itself loses its noise and sensor models, a physics inside it only those that do nothing: its ``A`` may pass
    through them.
    """
    kinds: Any = need("deepinv", "networks")
    kinds = kinds.physics
    twin = copy.copy(module)
    twin.__dict__["_modules"] = {
        name: _quiet(part, False) for name, part in module._modules.items() if part is not None
    }
    if not isinstance(module, kinds.Physics):
        return twin
    if outermost or type(module.noise_model) is kinds.ZeroNoise:
        twin._modules.pop("noise_model", None)
        twin.__dict__["noise_model"] = same
    if outermost or _placeholder(module.sensor_model):
        twin._modules.pop("sensor_model", None)
        twin.__dict__["sensor_model"] = same
    if _placeholder(module.forw):
        twin.__dict__["forw"] = same
    return twin


def _placeholder(function: Any) -> bool:  # noqa: ANN401
    """Whether this is one of deepinv's defaults ``lambda x: x``."""
    return getattr(function, "__name__", "") == "<lambda>" and function.__module__ == "deepinv.physics.forward"


def _answer(call: Call, values: Tensor, shape: tuple[int, ...], target: Space) -> Tensor:
    """``call`` on ``values`` laid out as (n, *shape), in the shape and kind of ``target``; nothing is asked of no draws."""
    kind = values.dtype.to_complex() if target.complex else values.dtype.to_real()
    if not len(values):
        return (values.real.sum() + values.real.new_zeros((0, *target.shape))).to(kind)
    out = call(values.reshape(-1, *shape))
    if out.numel() != len(values) * target.size:
        raise InputError(
            f"deepinv answered {tuple(values.shape)} with {tuple(out.shape)}, which is not {target.describe()}"
        )
    out = out.real if out.is_complex() and not target.complex else out
    if out.untyped_storage().data_ptr() == values.untyped_storage().data_ptr():
        out = out.clone()
    return out.to(kind).reshape(-1, *target.shape)


def _each(rows: Call, values: Tensor) -> Tensor:
    return torch.cat([rows(one[None]) for one in values]) if len(values) else rows(values)


def _batches(rows: Call, probe: Tensor) -> bool:
    """Whether a batch gives what its draws give alone, to rounding."""
    with torch.no_grad():
        try:
            alone = _each(rows, probe)
        except InputError:
            raise
        except Exception as error:  # whatever a foreign physics raises, the reader wants to know on what
            raise InputError(f"deepinv failed on {tuple(probe.shape)} ({type(error).__name__}: {error})") from error
        try:
            together = rows(probe)
        except Exception:  # a physics of one image may fail in any way when it gets three
            return False
    return together.shape == alone.shape and close(together, alone)


def close(a: Tensor, b: Tensor) -> bool:
    """Whether two answers agree to rounding."""
    return bool((a - b).abs().max() <= _limit(a.dtype.to_real()) * b.abs().max())


def _limit(dtype: torch.dtype) -> float:
    return _ROUNDING.get(dtype, 1e-2)


def numbers(physics: Any) -> tuple[torch.dtype, torch.device]:  # noqa: ANN401
    """Floating type and device of what the physics computes with (deepinv's empty place holder is not asked for its type)."""
    named = [*physics.named_buffers(), *physics.named_parameters()]
    held = [t for name, t in named if not name.endswith("_device_holder") and (t.is_floating_point() or t.is_complex())]
    device = next((t.device for _, t in named), torch.device("cpu"))
    return (held[0].dtype.to_real(), held[0].device) if held else (torch.float32, device)
