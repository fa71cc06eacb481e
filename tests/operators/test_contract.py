"""One body per promise of an operator, run over the whole zoo in both precisions."""

from __future__ import annotations

import gc

import pytest
import torch

from recon.checks import (
    check_adjoint,
    check_batch,
    check_gradient,
    check_linear,
    check_normal,
    check_pickle,
    check_taylor,
)
from recon.errors import InputError
from recon.operators import CG, LinearOperator, Operator
from tests import zoo

DTYPES = {"float32": torch.float32, "float64": torch.float64}


@pytest.fixture(scope="module", params=list(DTYPES))
def dtype(request) -> torch.dtype:
    return DTYPES[request.param]


@pytest.fixture(scope="module", params=list(zoo.OPERATORS))
def operator(request, dtype) -> Operator:
    return zoo.OPERATORS[request.param]().to(dtype)


@pytest.fixture(scope="module", params=list(zoo.LINEAR))
def linear(request, dtype) -> LinearOperator:
    return zoo.LINEAR[request.param]().to(dtype)


@pytest.fixture(scope="module", params=list(zoo.NONLINEAR))
def nonlinear(request, dtype) -> tuple[Operator, torch.dtype]:
    """``dtype``: of the data, which an operator without numbers of its own takes in single precision."""
    operator = zoo.NONLINEAR[request.param]().to(dtype)
    assert not isinstance(operator, LinearOperator), "list it under LINEAR, where more is asked of it"
    return operator, next((b.dtype for b in operator.buffers() if b.is_floating_point()), torch.float32)


def data(space, *batch, dtype, step=0):
    return zoo.normal(*batch, *space.shape, step=step, dtype=dtype.to_complex() if space.complex else dtype)


def close(a, b):
    tolerance = 1e-5 if a.dtype.to_real() == torch.float32 else 1e-12
    return torch.allclose(a, b, rtol=0, atol=tolerance * float(b.abs().max()))


def test_the_adjoint_is_the_transpose(linear):
    assert linear.matched
    check_adjoint(linear)


def test_it_is_linear(linear):
    check_linear(linear)


def test_normal_is_both_factors(linear):
    check_normal(linear)


def test_gradients(operator):
    check_gradient(operator)


def test_draws_do_not_meet(linear):
    check_batch(linear.A, data(linear.domain, 5, dtype=linear.dtype))
    check_batch(linear.A_adjoint, data(linear.range, 5, dtype=linear.dtype))
    check_batch(linear.normal, data(linear.domain, 5, dtype=linear.dtype))


def test_copies_compute_the_same(linear):
    check_pickle(linear, data(linear.domain, 2, dtype=linear.dtype))


def test_draws_do_not_meet_in_a_nonlinear_operator(nonlinear):
    operator, dtype = nonlinear
    x, v = data(operator.domain, 5, dtype=dtype), data(operator.range, 5, dtype=dtype, step=1)
    check_batch(operator.A, x)
    check_batch(operator.vjp, [x, v])


def test_copies_of_a_nonlinear_operator_compute_the_same(nonlinear):
    operator, dtype = nonlinear
    check_pickle(operator, data(operator.domain, 2, dtype=dtype))


def test_the_derivative_of_a_nonlinear_operator(nonlinear):
    operator, dtype = nonlinear
    if dtype == torch.float64:  # single precision leaves no octaves between curvature and rounding
        assert abs(check_taylor(operator) - 2) < 0.1


@pytest.mark.parametrize("batch", [(), (1,), (2, 3), (0,)])
def test_any_batch_shape_of_a_nonlinear_operator(nonlinear, batch):
    operator, dtype = nonlinear
    x, v = data(operator.domain, *batch, dtype=dtype), data(operator.range, *batch, dtype=dtype)
    assert operator(x).shape == v.shape
    assert operator.vjp(x, v).shape == x.shape
    assert (operator(x).dtype, operator.vjp(x, v).dtype) == (v.dtype, x.dtype)


@pytest.mark.parametrize("batch", [(), (1,), (3,), (2, 3), (0,)])
def test_any_batch_shape(linear, batch):
    x, y = data(linear.domain, *batch, dtype=linear.dtype), data(linear.range, *batch, dtype=linear.dtype)
    assert linear(x).shape == (*batch, *linear.range.shape)
    assert linear.A_adjoint(y).shape == (*batch, *linear.domain.shape)
    assert (linear(x).dtype, linear.A_adjoint(y).dtype) == (y.dtype, x.dtype)
    assert linear(x).real.dtype == linear.A_adjoint(y).real.dtype == linear.dtype


def test_a_batch_is_its_rows(linear):
    x, y = data(linear.domain, 2, 3, dtype=linear.dtype), data(linear.range, 2, 3, dtype=linear.dtype)
    assert close(linear(x)[1, 2], linear(x[1, 2]))
    assert close(linear.A_adjoint(y)[1, 2], linear.A_adjoint(y[1, 2]))


def test_memory_order_does_not_matter(linear):
    x = data(linear.domain, 4, dtype=linear.dtype)
    turned = x.movedim(0, -1).contiguous().movedim(-1, 0)
    assert not turned.is_contiguous() or x.numel() == len(x)
    assert close(linear(turned), linear(x))
    wide = torch.stack([x, x], dim=-1)[..., 0]
    assert close(linear(wide), linear(x))


def test_inputs_are_left_alone(linear):
    x, y = data(linear.domain, 2, dtype=linear.dtype), data(linear.range, 2, dtype=linear.dtype)
    kept = x.clone(), y.clone()
    linear(x), linear.A_adjoint(y), linear.normal(x)
    assert torch.equal(x, kept[0])
    assert torch.equal(y, kept[1])


def test_answers_own_their_memory(linear):
    x = data(linear.domain, 2, dtype=linear.dtype)
    first = linear(x)
    kept = first.clone()
    linear(2 * x)
    assert torch.equal(first, kept)


def test_wrong_shapes_are_refused_by_name(linear):
    for call, space, method in ((linear.A, linear.domain, "A"), (linear.A_adjoint, linear.range, "A_adjoint")):
        expected = rf"{type(linear).__name__} .*\.{method} takes arrays \(\*batch, .*\); got shape"
        for shape in ((*space.shape[:-1], space.shape[-1] + 1), space.shape[:-1], (*space.shape, 2)):
            with pytest.raises(InputError, match=expected):
                call(torch.zeros(shape, dtype=linear.dtype.to_complex() if space.complex else linear.dtype))


def test_whole_numbers_are_refused(linear):
    with pytest.raises(InputError, match=r"takes (floating-point|complex) arrays; got torch\.int64"):
        linear.A(torch.zeros(linear.domain.shape, dtype=torch.int64))


def test_real_and_complex_numbers_are_not_confused(linear):
    for call, space in ((linear.A, linear.domain), (linear.A_adjoint, linear.range)):
        wrong = linear.dtype if space.complex else linear.dtype.to_complex()
        with pytest.raises(InputError, match=rf"takes {'complex' if space.complex else 'floating-point'} arrays; got"):
            call(torch.zeros(space.shape, dtype=wrong))


def test_it_says_what_it_maps(operator):
    assert operator.domain.describe() in operator.describe()
    assert operator.range.describe() in repr(operator)


def test_norm_is_the_largest_singular_value(linear):
    exact = float(torch.linalg.matrix_norm(zoo.dense(linear), 2))
    assert 0.97 * exact <= linear.norm() <= exact * (1 + 1e-5)


def test_solve_is_the_regularised_inverse(linear):
    M = zoo.dense(linear).double()
    b = data(linear.domain, 3, dtype=linear.dtype)
    weight = 0.5 + data(linear.range, dtype=linear.dtype, step=1).abs()  # real, one per datum
    scale = float(M.square().sum(0).mean())  # comparable to A^T A, so that neither term hides the other
    for w in (None, weight):
        per_part = weight.flatten().double().repeat_interleave(len(M) // linear.range.size)
        W = torch.eye(len(M), dtype=torch.float64) if w is None else torch.diag(per_part)
        K = M.T @ W @ M + scale * torch.eye(M.shape[1], dtype=torch.float64)
        # The unknowns as zoo.dense orders them: all real parts, then all imaginary ones.
        flat = torch.cat([b.real, b.imag]).reshape(2, len(b), -1).swapaxes(0, 1) if b.is_complex() else b
        exact = torch.linalg.solve(K, flat.flatten(1).double().T).T
        if b.is_complex():
            exact = torch.complex(*exact.chunk(2, 1))
        exact = exact.reshape(b.shape)
        got = linear.solve(b, scale, weight=w, cg=CG(200, 1e-12 if linear.dtype == torch.float64 else 1e-6))
        assert float((got - exact).norm() / exact.norm()) < (1e-9 if linear.dtype == torch.float64 else 1e-4)


def test_solve_refuses_a_singular_system(linear):
    with pytest.raises(InputError, match="solve needs c > 0"):
        linear.solve(data(linear.domain, 1, dtype=linear.dtype), 0.0)


@pytest.mark.parametrize("name", list(zoo.OPERATORS))
def test_precision_changes_rounding_only(name):
    make = zoo.OPERATORS[name]
    x = data(make().domain, 2, dtype=torch.float32)
    wide = x.to(torch.complex128 if x.is_complex() else torch.float64)
    expected = make().double()(wide)
    assert close(make()(x), expected.to(torch.complex64 if expected.is_complex() else torch.float32))


def test_the_zoo_is_complete():
    missing = {found.__name__ for found in zoo.public_operators() - zoo.classes()}
    assert not missing, f"add a tiny instance of {sorted(missing)} to tests/zoo.py"


def test_a_forgotten_operator_is_found():
    forgotten = type("Forgotten", (LinearOperator,), {"__module__": "recon.operators.forgotten"})
    try:
        assert zoo.public_operators() - zoo.classes() >= {forgotten}
    finally:
        del forgotten
        gc.collect()  # classes live in cycles, and __subclasses__ lists the living
