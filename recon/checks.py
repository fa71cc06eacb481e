"""Public checks of what operators, likelihoods, priors and samplers promise.

Each returns the figure it measured and raises ``recon.errors.CheckFailed``, with the figure in the text, when a promise does
not hold.  Figures are relative, so they mean the same for any unit; inner products and norms are taken in double precision
whatever the precision of the object; complex values count as pairs of real ones.  Probes are fixed normal numbers (stream
"probe" of seed 0): a failure repeats.
Limits, unless given: 1e-10 where the object computes in float64, 1e-5 in float32.
"""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from recon.draws import Draws
from recon.errors import CheckFailed, InputError
from recon.operators.base import LinearOperator, Operator
from recon.selftest import check_resume as check_resume
from recon.selftest import check_sampler as check_sampler
from recon.space import Space

_ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-5}
_DIFFERENCE = {torch.float64: 1e-7, torch.float32: 1e-3}  # what a central difference can resolve, with a margin
_PROBES = 3


def check_adjoint(A: LinearOperator, tolerance: float | None = None) -> float:
    """``A_adjoint`` is the transpose of ``A``: ``max |<A u, v> - <u, A^T v>| / (|A u| |v|)`` over three pairs of probes.

    Raises CheckFailed above ``tolerance``.
    """
    u, v = _probe(A, A.domain, 0), _probe(A, A.range, 1)
    Au, Av = A.A(u).detach(), A.A_adjoint(v).detach()
    gap = (_inner(Au, v) - _inner(u, Av)).abs()
    figure = _largest(gap, _norm(Au) * _norm(v))
    return _judge(A, "the adjoint test |<Au,v> - <u,A'v>| / (|Au||v|)", figure, _limit(tolerance, _dtype(A)))


def check_linear(A: Operator, tolerance: float | None = None) -> float:
    """``A(a u + b v) = a A(u) + b A(v)``: the norm of the difference over the sum of the norms of the two terms.

    Raises CheckFailed above ``tolerance``.
    """
    u, v = _probe(A, A.domain, 0), _probe(A, A.domain, 1)
    a, b = 1.75, -0.625
    one, two = a * A.A(u), b * A.A(v)
    left = A.A(a * u + b * v)
    figure = _largest(_norm(_double(left) - _double(one) - _double(two)), _norm(one) + _norm(two))
    return _judge(A, "linearity |A(au+bv) - aAu - bAv| / (|aAu| + |bAv|)", figure, _limit(tolerance, _dtype(A)))


def check_normal(A: LinearOperator, tolerance: float | None = None) -> float:
    """``normal(x) = A_adjoint(A(x))``: the norm of the difference over that of the right side.

    Raises CheckFailed above ``tolerance``.
    """
    x = _probe(A, A.domain, 0)
    expected = _double(A.A_adjoint(A.A(x)))
    figure = _largest(_norm(_double(A.normal(x)) - expected), _norm(expected))
    return _judge(A, "normal(x) against A_adjoint(A(x))", figure, _limit(tolerance, _dtype(A)))


def check_gradient(A: Operator, x: Tensor | None = None, tolerance: float | None = None) -> float:
    """``vjp`` is the transposed Jacobian, and autograd's backward pass agrees with it.

    x: (n, *domain.shape), where to look; standard normal numbers when left out.
    Central differences ``D = (A(x + h d) - A(x - h d)) / 2h`` against ``vjp``: ``|<D, w> - <d, vjp(x, w)>| / (|D| |w|)`` at the
    best of several ``h`` (a wrong gradient is wrong at all of them); limit 1e-7 in float64, 1e-3 in float32, where differences
    resolve no more: look in double.  Backward passes are compared to rounding, those of ``A_adjoint`` too.
    Returns the first figure.  Raises CheckFailed above ``tolerance``.
    """
    x = _probe(A, A.domain, 0) if x is None else x
    count, dtype = len(x), x.dtype.to_real()
    d, w = (_probe(A, space, step, count).to(x.device) for step, space in ((2, A.domain), (3, A.range)))
    d, w = d.to(x.dtype), w.to(dtype.to_complex() if A.range.complex else dtype)
    claimed = A.vjp(x, w).detach()
    figure = math.inf
    for power in range(1, 1 + round(-math.log10(torch.finfo(dtype).eps) / 2)):
        h = 10.0**-power
        D = (_double(A.A(x + h * d)) - _double(A.A(x - h * d))) / (2 * h)
        figure = min(figure, _largest((_inner(D, w) - _inner(d, claimed)).abs(), _norm(D) * _norm(w)))
    limit = tolerance if tolerance is not None else _DIFFERENCE.get(dtype, 1e-2)
    _judge(A, "vjp against central differences", figure, limit)

    _same(A, "autograd's backward of A against vjp", _backward(A.A, x, w), claimed, dtype)
    if isinstance(A, LinearOperator):
        _same(A, "autograd's backward of A_adjoint against A", _backward(A.A_adjoint, w, d), A.A(d).detach(), dtype)
    return figure


def check_taylor(A: Operator, x: Tensor | None = None, tolerance: float = 0.1) -> float:
    """``A(x + h d) = A(x) + h J d + O(h^2)``: the norm of the remainder has slope 2 in ``h``, slope 1 for a wrong J.

    x: (n, *domain.shape), where to look; standard normal numbers when left out.  ``J d`` is autograd's, by two backward passes.
    The slope is that of the last octaves of ``h`` at which the remainder stands clear of rounding, so look in double: it finds
    a derivative wrong by 1e-6 there.
    Returns the smallest slope of any draw (infinite where nothing remains, as for linear operators).
    Raises CheckFailed when it falls short of 2 by more than ``tolerance``.
    """
    x = _probe(A, A.domain, 0) if x is None else x
    d = _probe(A, A.domain, 2, len(x)).to(x)
    start, along = _double(A.A(x)), _double(_derivative(A, x, d))
    floor = 1e3 * torch.finfo(x.dtype.to_real()).eps * (_norm(start) + _norm(along))
    remainders = []
    for power in range(1, 60):
        h = 0.5**power
        remainders.append(_norm(_double(A.A(x + h * d)) - start - h * along))
        if not bool((remainders[-1] > floor).any()):
            break
    slope = min(
        (_slope(row, float(low)) for row, low in zip(torch.stack(remainders, 1), floor, strict=True)), default=math.inf
    )
    _judge(A, f"the slope {slope:.3g} of the Taylor remainder, subtracted from 2,", 2 - slope, tolerance)
    return slope


def check_batch(
    function: Callable[..., Any], inputs: Tensor | Sequence[Tensor], tolerance: float | None = None
) -> float:
    """A draw's result does not depend on its company: alone, in the whole batch and in a shuffled half it is the same.

    function: from tensors (n, ...) to a tensor (n, ...) or several; ``operator.A``, ``likelihood.log_prob``,
    ``lambda z: prior.denoise(z, 0.5)``, one step of a sampler.  inputs: one tensor or several, at least 3 draws.
    Returns the largest ``|alone - in company| / |alone|`` of any draw.  Raises CheckFailed above ``tolerance`` or when the
    answer has not one row per draw, InputError for fewer than 3 draws.
    """
    given = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    n = len(given[0])
    if n < 3 or any(len(one) != n for one in given):
        raise InputError(f"check_batch needs at least 3 draws in every input; got {[len(one) for one in given]}")
    name = _name(function)

    def rows(members: list[int]) -> list[Tensor]:
        out = function(*(one[members] for one in given))
        parts = [out] if isinstance(out, Tensor) else list(out)
        for part in parts:
            if part.ndim == 0 or len(part) != len(members):
                raise CheckFailed(
                    f"{name}: {len(members)} draws in, shape {tuple(part.shape)} out; one row per draw is needed"
                )
        return [part.detach() for part in parts]

    alone = [torch.cat(parts) for parts in zip(*(rows([i]) for i in range(n)), strict=True)]
    half = list(range(n - 1, -1, -2))
    figure = 0.0
    for members in (list(range(n)), half):
        for reference, part in zip(alone, rows(members), strict=True):
            expected = _double(reference[members])
            figure = max(figure, _largest(_norm(_double(part) - expected), _norm(expected)))
    floats = [part.dtype.to_real() for part in alone if part.is_floating_point() or part.is_complex()]
    limit = max((_limit(tolerance, dtype) for dtype in floats), default=tolerance or 0.0)
    return _judge(name, "a draw alone against the same draw in company", figure, limit)


def check_pickle(thing: Any, x: Tensor, call: Callable[[Any, Tensor], Tensor] | None = None) -> float:  # noqa: ANN401
    """A pickled and a deep copy compute the same as the original.

    call: what to compute, ``thing(x)`` when left out (for a likelihood: ``lambda like, x: like.log_prob(x)``).
    Returns the larger relative difference.  Raises CheckFailed when ``thing`` cannot be copied or a copy differs.
    """
    name = type(thing).__name__
    run = call or (lambda one, at: one(at))
    expected = _double(run(thing, x))
    figure = 0.0
    copies: dict[str, Callable[[Any], Any]] = {"pickle": _pickled, "deepcopy": copy.deepcopy}
    for how, again in copies.items():
        try:
            twin = again(thing)
        except Exception as error:
            raise CheckFailed(f"{name}: {how} failed ({type(error).__name__}: {error})") from error
        difference = _norm((_double(run(twin, x)) - expected)[None])
        figure = max(figure, _largest(difference, _norm(expected[None])))
    return _judge(name, "a copy against the original", figure, _limit(None, x.dtype))


def _pickled(thing: Any) -> Any:  # noqa: ANN401
    return pickle.loads(pickle.dumps(thing))


def _dtype(A: Operator) -> torch.dtype:
    numbers = (*A.parameters(), *A.buffers())
    return next((one.dtype for one in numbers if one.is_floating_point()), torch.float32)


def _probe(A: Operator, space: Space, step: int, count: int = _PROBES) -> Tensor:
    device = next((one.device for one in (*A.parameters(), *A.buffers())), torch.device("cpu"))
    dtype = _dtype(A).to_complex() if space.complex else _dtype(A)
    return Draws(0, range(count)).normal(step, space.shape, "probe", dtype=dtype).to(device)


def _limit(tolerance: float | None, dtype: torch.dtype) -> float:
    return tolerance if tolerance is not None else _ROUNDING.get(dtype.to_real(), 1e-2)


def _double(a: Tensor) -> Tensor:
    """Real numbers in double precision, (n, values): complex ones as their parts."""
    a = a.detach()
    return (torch.view_as_real(a) if a.is_complex() else a).double().reshape(len(a), -1)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return (_double(a) * _double(b)).sum(1)


def _norm(a: Tensor) -> Tensor:
    return _double(a).square().sum(1).sqrt()


def _largest(difference: Tensor, size: Tensor) -> float:
    """The largest ratio; nothing against nothing is no difference, something against nothing (or NaN) is infinite."""
    ratio = torch.where(difference == 0, 0.0, difference / size).nan_to_num(nan=math.inf, posinf=math.inf)
    return float(ratio.max())


def _name(function: Callable[..., Any]) -> str:
    """``Class.method`` of the object a method is bound to (not of the class that wrote it), else the name."""
    if (owner := getattr(function, "__self__", None)) is not None:
        return f"{type(owner).__name__}.{getattr(function, '__name__', '')}"
    return getattr(function, "__qualname__", type(function).__name__)


def _judge(who: Operator | str, what: str, figure: float, limit: float) -> float:
    if not figure <= limit:
        name = who if isinstance(who, str) else who.describe()
        raise CheckFailed(f"{name}: {what} gives {figure:.3g}; at most {limit:.3g} is allowed")
    return figure


def _backward(function: Callable[[Tensor], Tensor], at: Tensor, v: Tensor) -> Tensor:
    with torch.enable_grad():
        point = at.detach().requires_grad_()
        out = function(point)
        if not out.requires_grad:
            raise CheckFailed(f"{_name(function)} cuts the graph: its answer has no gradient")
        return torch.autograd.grad(out, point, v)[0].detach()


def _derivative(A: Operator, x: Tensor, d: Tensor) -> Tensor:
    """``J d`` at ``x``: the derivative of ``w -> <J^T w, d>``."""
    with torch.enable_grad():
        point = x.detach().requires_grad_()
        out = A.A(point)
        if not out.requires_grad:
            raise CheckFailed(f"{A.describe()} cuts the graph: its answer has no gradient")
        w = torch.zeros_like(out, requires_grad=True)
        (back,) = torch.autograd.grad(out, point, w, create_graph=True)
        return torch.autograd.grad(back, w, d)[0].detach()


def _slope(remainders: Tensor, floor: float) -> float:
    """Of the last three octaves above ``floor``, infinite where there are none; NaN counts as no slope at all."""
    if not bool(torch.isfinite(remainders).all()):
        return 0.0
    clear = int((remainders > floor).long().cumprod(0).sum())
    if clear < 2:
        return math.inf
    first = max(0, clear - 4)
    return float(torch.log2(remainders[first] / remainders[clear - 1])) / (clear - 1 - first)


def _same(A: Operator, what: str, got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    figure = _largest(_norm(_double(got) - _double(expected)), _norm(expected))
    _judge(A, what, figure, _limit(None, dtype))
