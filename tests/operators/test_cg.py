"""Batched conjugate gradients: right, and each system on its own."""

from __future__ import annotations

import pytest
import torch

from recon.checks import check_batch
from recon.errors import InputError
from recon.operators import CG
from tests import zoo


def systems(n: int, d: int, conditions) -> torch.Tensor:
    """Positive definite matrices (n, d, d), one per condition number."""
    matrices = []
    for i, condition in zip(range(n), conditions, strict=True):
        q, _ = torch.linalg.qr(zoo.normal(d, d, step=i))
        matrices.append(q @ torch.diag(torch.logspace(0, float(torch.tensor(condition).log10()), d).double()) @ q.T)
    return torch.stack(matrices)


def product(K):
    return lambda x: torch.einsum("nij,nj->ni", K, x)


def test_it_solves():
    K, b = systems(4, 12, [1.0, 10.0, 1e3, 1e5]), zoo.normal(4, 12, step=9)
    exact = torch.linalg.solve(K, b[..., None])[..., 0]
    x = CG(200, 1e-12).solve(product(K), b)
    assert float(((x - exact).norm(dim=1) / exact.norm(dim=1)).max()) < 1e-7
    start = CG(200, 1e-12).solve(product(K), b, x0=exact + 0.1 * zoo.normal(4, 12))
    assert float(((start - exact).norm(dim=1) / exact.norm(dim=1)).max()) < 1e-7


def test_it_ends_after_as_many_iterations_as_distinct_eigenvalues():
    K = torch.diag_embed(torch.tensor([[1.0, 1.0, 5.0, 5.0, 9.0]])).double()
    b = zoo.normal(1, 5)
    assert torch.allclose(CG(3, 0.0).solve(product(K), b), torch.linalg.solve(K, b[..., None])[..., 0], atol=1e-12)
    assert not torch.allclose(CG(2, 0.0).solve(product(K), b), torch.linalg.solve(K, b[..., None])[..., 0], atol=1e-6)


def test_the_tolerance_is_that_of_the_residual():
    K, b = systems(3, 30, [10.0, 1e2, 1e3]), zoo.normal(3, 30, step=9)
    for tolerance in (1e-2, 1e-5):
        r = b - product(K)(CG(500, tolerance).solve(product(K), b))
        ratio = r.norm(dim=1) / b.norm(dim=1)
        assert bool((ratio <= 1.01 * tolerance).all())
        assert bool((ratio > 1e-3 * tolerance).all())  # and it stopped there instead of going on


def test_systems_do_not_meet():
    K, b = systems(5, 12, [1.0, 2.0, 10.0, 1e3, 1e4]), zoo.normal(5, 12, step=9)
    b = b * torch.tensor([1.0, 1e6, 1e-6, 1.0, 0.0]).double()[:, None]
    for iterations in (1, 3, 50):
        check_batch(lambda k, y: CG(iterations, 1e-8).solve(product(k), y), [K, b])  # noqa: B023


def test_converged_systems_stand_still():
    """A system that is done keeps its answer to the bit while its neighbours go on."""
    K, b = systems(2, 20, [1.0, 1e4]), zoo.normal(2, 20, step=9)
    first = CG(1, 1e-6).solve(product(K), b)
    later = CG(40, 1e-6).solve(product(K), b)
    assert torch.equal(first[0], later[0])
    assert not torch.equal(first[1], later[1])


def test_work_stops_when_all_are_done():
    calls = []
    K, b = systems(3, 10, [1.0, 1.0, 1.0]), zoo.normal(3, 10)

    def matvec(x):
        calls.append(1)
        return product(K)(x)

    CG(100, 1e-8).solve(matvec, b)
    assert len(calls) <= 2


def test_an_indefinite_system_does_not_blow_up():
    """A direction of negative curvature freezes that system at its last good iterate; the neighbour is solved."""
    good, bad = systems(1, 8, [10.0])[0], torch.diag(torch.tensor([1.0, 2, 3, 4, 5, 6, 7, -8.0])).double()
    K, b = torch.stack([bad, good]), torch.ones(2, 8, dtype=torch.float64)
    x = CG(100, 1e-10).solve(product(K), b)
    assert bool(torch.isfinite(x).all())
    assert float(x[0].norm()) < 10 * float(b[0].norm())
    assert torch.allclose(x[1], torch.linalg.solve(good, b[1]), atol=1e-8)
    all_negative = CG(10).solve(product(-K), b)
    assert torch.equal(all_negative[1], torch.zeros(8, dtype=torch.float64))


def test_a_direction_of_too_little_curvature_is_left_out():
    """K should be at least the identity; an eigenvalue of 1e-4 in one system would make its answer 10^4 times too large."""
    proper, wrong = (torch.diag(torch.tensor([2.0, 3, 4, 5, 6, 7, 8, last])).double() for last in (9.0, 1e-4))
    K, b = torch.stack([wrong, proper]), torch.ones(2, 8, dtype=torch.float64)
    free, bounded = CG(100, 1e-12).solve(product(K), b), CG(100, 1e-12).solve(product(K), b, least=1.0)
    assert float(free[0].norm()) > 1e3
    assert float(bounded[0].norm()) <= float(b[0].norm())
    assert torch.equal(free[1], bounded[1])


def test_nothing_asked_nothing_given():
    K, b = systems(2, 6, [1.0, 10.0]), torch.zeros(2, 6, dtype=torch.float64)
    assert torch.equal(CG().solve(product(K), b), b)


def test_a_perfect_start_is_kept():
    K = systems(1, 6, [10.0])
    x = zoo.normal(1, 6)
    assert torch.equal(CG().solve(product(K), product(K)(x), x0=x), x)


def test_any_number_of_axes():
    b = zoo.normal(3, 2, 4, 5)
    scale = torch.tensor([1.0, 2.0, 4.0]).double().reshape(3, 1, 1, 1)
    assert torch.allclose(CG().solve(lambda x: scale * x, b), b / scale)


def test_gradients_flow_through():
    K = systems(1, 6, [10.0])
    b = zoo.normal(1, 6).requires_grad_()
    v = zoo.normal(1, 6, step=3)
    (gradient,) = torch.autograd.grad(CG(50, 1e-12).solve(product(K), b), b, v)
    assert torch.allclose(gradient, torch.linalg.solve(K, v[..., None])[..., 0], atol=1e-6)


def test_it_refuses():
    with pytest.raises(InputError, match="CG needs iterations >= 1 and tolerance >= 0"):
        CG(iterations=0)
    with pytest.raises(InputError, match="CG needs iterations >= 1 and tolerance >= 0"):
        CG(tolerance=-1.0)
