"""A two-dimensional operator lifted to the slices of a volume (adjoints, gradients and batches: see ``test_contract``)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from recon.checks import check_adjoint
from recon.errors import InputError
from recon.operators import CG, CartesianMRI, ParallelBeam, PhaseRetrieval, SliceStack, complex_grid
from recon.operators.slices import separable
from recon.space import Space
from tests import zoo


def test_it_is_the_operator_of_each_slice():
    for kind in ("one", "each", "unlike", "fields"):
        stack = zoo.slices(kind).double()
        x = zoo.normal(2, *stack.domain.shape)
        at = 1 + stack.domain.dims.index("z")
        parts = stack.split(stack.A(x))
        assert stack.stacked == (kind != "unlike")
        for k in range(3):
            torch.testing.assert_close(parts[k], stack.slice(k).A(x.select(at, k)), rtol=0, atol=1e-12)
    assert stack.range.dims == ("z", "datum")
    assert stack.range.coords["z"].tolist() == [0.0, 1.0, 3.0]


def test_a_stack_of_projections_is_the_projector_of_the_stack():
    space = Space.grid((3, 6, 5), 1e-3, "1/m")
    whole = ParallelBeam.half_turn((3, 6, 5), 1e-3, 4).double()
    stack = SliceStack(ParallelBeam.half_turn((6, 5), 1e-3, 4).double(), space)
    x, y = zoo.normal(2, 3, 6, 5), zoo.normal(2, *whole.range.shape)
    assert stack.range.mismatch(whole.range) is None
    assert torch.equal(stack.A(x), whole.A(x))
    assert torch.equal(stack.A_adjoint(y), whole.A_adjoint(y))
    assert separable(stack, "z") and separable(whole, "z") and not separable(stack, "y") and not separable(whole, "y")


def test_coils_of_every_slice():
    """Maps and masks of their own; the volume's channels stand before its slices."""
    domain, image = complex_grid((3, 4, 5), 1e-3), complex_grid((4, 5), 1e-3)
    maps, masks = zoo.coil_maps(2, 3, 4, 5, dtype=torch.float64), zoo.normal(3, 4, 5, step=30) > 0
    stack = SliceStack([CartesianMRI(image, maps[:, k], masks[k]) for k in range(3)], domain)
    check_adjoint(stack)
    x = zoo.normal(1, *domain.shape)
    for k in range(3):
        own = CartesianMRI(image, maps[:, k], masks[k]).A(x[:, :, k])
        torch.testing.assert_close(stack.A(x)[:, k], own, rtol=0, atol=1e-12)
    one = SliceStack(CartesianMRI(image, maps[:, 0]), domain)
    assert one.range.dims == ("z", "coil", "ky", "kx") and one.range.shape == (3, 2, 4, 5)


def test_solve_takes_the_closed_form_of_a_slice_and_counts_draws():
    """One coil of ones is solved in k-space, without one use of the operator; matrices by iterations, counted by the draw."""
    domain = complex_grid((3, 4, 5), 1e-3)
    scan = CartesianMRI(complex_grid((4, 5), 1e-3), None, zoo.normal(4, 5, step=30) > 0).double()
    stack, used = SliceStack(scan, domain), []
    b = zoo.normal(2, *domain.shape)
    x = stack.solve(b, 0.3, watch=used.append)
    torch.testing.assert_close(stack.normal(x) + 0.3 * x, b, rtol=0, atol=1e-12)
    assert used == []
    for kind, weight in (("one", None), ("one", "alike"), ("one", "other"), ("each", "other")):
        stack, used = zoo.slices(kind).double(), []
        b = zoo.normal(2, *stack.domain.shape)
        w = None if weight is None else 0.5 + zoo.normal(*stack.range.shape, step=1).abs()
        if weight == "alike":
            w = w[:1].expand_as(w).contiguous()
        x = stack.solve(b, 0.7, w, cg=CG(60, 1e-13), watch=used.append)
        back = stack.A_adjoint((1.0 if w is None else w) * stack.A(x)) + 0.7 * x
        torch.testing.assert_close(back, b, rtol=0, atol=1e-10)
        assert used and set(used) <= {1, 2}
    start = stack.solve(b, 0.7, w, x0=x, cg=CG(1, 1e-9))
    torch.testing.assert_close(start, x, rtol=0, atol=1e-9)


def test_slices_that_have_converged_wait_for_nobody():
    """Conjugate gradients go slice by slice: two iterations of the stack are two of each slice alone."""
    stack = SliceStack(zoo.image_matrix().double(), Space.grid((3, 4, 3), 0.5, "1/m"))
    b = zoo.normal(2, *stack.domain.shape)
    together = stack.solve(b, 0.1, cg=CG(2, 0.0))
    for k in range(3):
        alone = stack.slice(k).solve(b[:, k], 0.1, cg=CG(2, 0.0))
        torch.testing.assert_close(together[:, k], alone, rtol=0, atol=1e-12)


def test_what_is_not_a_stack_is_refused():
    matrix, domain = zoo.slices().slice(0), zoo.slices().domain
    with pytest.raises(InputError, match="has 3 slices across 'z'; got 2 operators"):
        SliceStack([matrix] * 2, domain)
    with pytest.raises(InputError, match="it has no such axis"):
        SliceStack(matrix, domain, "time")
    with pytest.raises(
        InputError, match=r"the operator of slice 1 does not take a slice across 'z' of .*: \(component=7\)"
    ):
        SliceStack([matrix, zoo.matrix(), matrix], domain)
    with pytest.raises(InputError, match="SliceStack takes linear operators; that of slice 0 is a PhaseRetrieval"):
        SliceStack(PhaseRetrieval(matrix), domain)  # type: ignore[arg-type]
    moved = Space(domain.dims, domain.shape, {**domain.coords, "x": 1.0 + np.arange(3.0)}, "K")
    with pytest.raises(InputError, match="different coordinates along 'x'"):
        SliceStack(matrix, moved)
