r"""Operators as deepinv physics, and deepinv physics as operators.

deepinv's arrays are (batch, channel, rows, columns) or (batch, channel, depth, rows, columns).  Both bridges lay out a space
the same way: a first axis called "channel" or "variable" is the channel axis, any other space gets one of length 1, and axes
of length 1 are put after it until two follow; so (y, x) travels as (1, y, x), (z, y, x) as (1, z, y, x), ("variable", "lat",
"lon") as it is, and a vector as (1, 1, n).  Measurements are laid out by the same rule; complex ones stay complex, of real
images.  deepinv's ``adjointness_test`` compares complex inner products and is meant for maps between arrays of one kind;
``recon.checks.check_adjoint`` holds for all.

deepinv is imported when one of the functions is first called.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from recon.errors import InputError, need
from recon.operators.algebra import Stack
from recon.operators.base import LinearOperator, Operator
from recon.operators.deepinv_operator import (
    DeepinvLinearOperator,
    DeepinvOperator,
    close,
    image_shape,
    numbers,
    same,
)
from recon.operators.scipy_bridge import probes
from recon.space import Space


def as_deepinv(operator: Operator) -> Any:  # noqa: ANN401  (a class of a library that may be absent)
    """A ``deepinv.physics.LinearPhysics`` that computes with ``operator``; a ``Physics`` where it is not linear.

    The operator is a submodule, shared and not copied: moving or converting one moves the other.  ``img_size`` is set; the
    noise model is a ``ZeroNoise`` of its own (an operator knows no noise: ``physics.noise_model = GaussianNoise(sigma)``).
    ``A`` and ``A_adjoint`` take no parameters beside the array, so nothing can stay behind.  Copies and pickles.
    deepinv's CG adds 1e-8 to its denominators, which small units feel: ``prox_l2(..., eps=0.0)``.
    Raises InputError without deepinv, and later for arrays of another shape.
    """
    nonlinear, linear = _classes()
    return (linear if isinstance(operator, LinearOperator) else nonlinear)(operator)


def from_deepinv(
    physics: Any,  # noqa: ANN401
    domain: Space | None = None,
    range: Space | None = None,
    unit: str = "1",
) -> Operator:
    """The noiseless map ``physics.A`` as an operator: a ``LinearOperator`` for a ``LinearPhysics``; a stack gives a ``Stack``.

    domain: of the images, laid out as the module says; None makes one of ``unit`` without coordinates from the physics's
    ``img_size`` (some physics declare another size than they take, so the probe decides).  range: of the measurements; None
    finds it by a probe (the domain itself where shape and kind agree, else counted axes of unit "1").  The physics is shared:
    parameters that it is given later act here too (``physics.clone()`` keeps it apart).  Its noise and sensor models are left
    out.

    Probes decide the rest: draws are passed one by one where the physics mixes them or cannot take several; the transpose is
    that of the physics, by backpropagation where it has none, and ``matched`` says whether it passed the dot test
    (``adjoint_error``: what was measured).

    Raises InputError for anything but a physics, an unknown image size, images the physics cannot take, measurements that are
    not one tensor or do not fit ``range``, or an ``A`` that answers the same question differently when asked twice.
    """
    deepinv: Any = need("deepinv", "networks")
    kinds = deepinv.physics
    if not isinstance(physics, kinds.Physics):
        raise InputError(f"from_deepinv takes a deepinv.physics.Physics; got {type(physics).__name__}")
    if isinstance(physics, kinds.StackedPhysics):
        return _stack(physics, isinstance(physics, kinds.LinearPhysics), domain, range, unit)
    if isinstance(physics, _classes()):
        domain, range = domain or physics.operator.domain, range or physics.operator.range
    domain = domain or _default_domain(physics, unit)
    probe = probes(physics, domain, 0, numbers(physics)[0])
    y = _first_answer(physics, domain, probe)
    found = range or _default_range(tuple(y.shape[1:]), y.is_complex(), domain)
    if y[0].numel() != found.size or y.is_complex() != found.complex:
        kind = "complex" if y.is_complex() else "real"
        raise InputError(
            f"{_name(physics)} measures {kind} arrays {tuple(y.shape[1:])}; {found.describe()} does not fit"
        )
    if isinstance(physics, kinds.LinearPhysics):
        automatic = physics.A_adj is None and type(physics).A_adjoint is kinds.LinearPhysics.A_adjoint
        return DeepinvLinearOperator(physics, domain, found, tuple(y.shape[1:]), automatic)
    return DeepinvOperator(physics, domain, found)


def __getattr__(name: str) -> Any:  # noqa: ANN401
    """The two physics classes, made when first asked for (by pickle, for one) because they need deepinv."""
    for made in _classes() if name in ("OperatorPhysics", "LinearOperatorPhysics") else ():
        if made.__name__ == name:
            return made
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def _classes() -> tuple[Any, Any]:
    deepinv: Any = need("deepinv", "networks")
    kinds = deepinv.physics
    nonlinear: Any = kinds.Physics
    linear: Any = kinds.LinearPhysics

    class OperatorPhysics(nonlinear):
        """A deepinv physics that computes with a recon operator."""

        def __init__(self, operator: Operator) -> None:
            # Named functions throughout: deepinv's defaults are lambdas, which cannot be pickled.
            super().__init__(A=same, noise_model=_silent(kinds), sensor_model=same)
            self.operator, self.img_size = operator, image_shape(operator.domain)

        def A(self, x: Tensor) -> Tensor:
            return _through(self.operator.A, x, self.operator.domain, self.operator.range)

        def A_vjp(self, x: Tensor, v: Tensor) -> Tensor:
            there, here = self.operator.domain, self.operator.range
            flat = v.reshape(-1, *here.shape)
            return _through(lambda point: self.operator.vjp(point, flat), x, there, there)

    class LinearOperatorPhysics(linear):
        """A linear deepinv physics that computes with a recon operator."""

        def __init__(self, operator: LinearOperator) -> None:
            super().__init__(
                A=same,
                A_adjoint=same,
                img_size=image_shape(operator.domain),
                noise_model=_silent(kinds),
                sensor_model=same,
                device=operator.device,
            )
            self.operator = operator

        def A(self, x: Tensor) -> Tensor:
            return _through(self.operator.A, x, self.operator.domain, self.operator.range)

        def A_adjoint(self, y: Tensor) -> Tensor:
            return _through(self.operator.A_adjoint, y, self.operator.range, self.operator.domain)

        def A_adjoint_A(self, x: Tensor) -> Tensor:
            return _through(self.operator.normal, x, self.operator.domain, self.operator.domain)

    for made in (OperatorPhysics, LinearOperatorPhysics):
        made.__qualname__ = made.__name__  # found again by __getattr__ of this module
    return OperatorPhysics, LinearOperatorPhysics


def _silent(kinds: Any) -> Any:  # noqa: ANN401
    """A noise model of its own: deepinv's default is one object that all physics share."""
    return kinds.ZeroNoise(noise_model=same)


def _through(call: Callable[[Tensor], Tensor], x: Tensor, source: Space, target: Space) -> Tensor:
    """``call`` on arrays of two spaces, from and to deepinv's layout."""
    expected = image_shape(source)
    if tuple(x.shape[1:]) != expected or not x.ndim:
        raise InputError(
            f"{source.describe()} is laid out as (batch, {', '.join(map(str, expected))}); got {tuple(x.shape)}"
        )
    return call(x.reshape(-1, *source.shape)).reshape(-1, *image_shape(target))


def _first_answer(physics: Any, domain: Space, probe: Tensor) -> Tensor:  # noqa: ANN401
    """``A`` of one image, asked for twice."""
    image = probe[:1].reshape(1, *image_shape(domain))
    with torch.no_grad():
        try:
            y, again = physics.A(image), physics.A(image)
        except Exception as error:  # whatever a foreign physics raises, the reader wants to know which and on what
            raise InputError(
                f"{_name(physics)} cannot take images (1, {', '.join(map(str, image.shape[1:]))}), as {domain.describe()} is "
                f"laid out ({type(error).__name__}: {error}); pass the domain it is made for"
            ) from error
    if not isinstance(y, Tensor) or not y.ndim or len(y) != 1:
        kind = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise InputError(f"{_name(physics)} must answer one image with one tensor (1, ...); got {kind}")
    if y.shape != again.shape or not close(y, again):
        raise InputError(
            f"{_name(physics)} answers the same image differently when asked twice; an operator is a fixed map (draw its "
            "random parts once, and keep noise in noise_model)"
        )
    return y


def _default_domain(physics: Any, unit: str) -> Space:  # noqa: ANN401
    declared = getattr(physics, "img_size", None)
    if declared is None or len(declared) not in (3, 4):
        raise InputError(
            f"{_name(physics)} does not say its image size (channel, rows, columns); img_size is {declared}: "
            "pass domain=Space(...)"
        )
    axes = ("z", "y", "x")[-len(declared) + 1 :]
    if declared[0] == 1:
        return Space(axes, tuple(declared)[1:], {}, unit)
    return Space(("channel", *axes), tuple(declared), {}, unit)


def _default_range(shape: tuple[int, ...], complex_: bool, domain: Space) -> Space:
    if shape == image_shape(domain) and complex_ == domain.complex:
        return domain
    counted = shape[1:] if len(shape) > 1 and shape[0] == 1 else shape
    dims = ("datum",) if len(counted) < 2 else tuple(f"axis{i}" for i, _ in enumerate(counted))
    return Space(dims, counted or (1,), {}, "1", complex=complex_)


def _stack(physics: Any, linear: bool, domain: Space | None, range: Space | None, unit: str) -> Stack:  # noqa: ANN401
    if not linear:
        raise InputError(
            "a stack of nonlinear physics becomes several operators: from_deepinv of each part, and a StackedLikelihood"
        )
    if range is not None:
        raise InputError("a stack measures one vector of its own; leave range out, or bridge its parts one by one")
    parts = [from_deepinv(part, domain, None, unit) for part in physics.physics_list]
    return Stack([part for part in parts if isinstance(part, LinearOperator)])


def _name(physics: Any) -> str:  # noqa: ANN401
    return f"deepinv's {type(physics).__name__}"
