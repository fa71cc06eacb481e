"""Krylov solvers for systems that are not quite symmetric: the classical answers, and what lies between them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from recon.operators import CG
from recon.operators.krylov import galerkin, gmres

Solver = Callable[[Callable[[Tensor], Tensor], Tensor, CG], Tensor]
BOTH = pytest.mark.parametrize("solver", [gmres, galerkin], ids=["gmres", "galerkin"])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def times(matrices: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda u: (matrices @ u[..., None])[..., 0]


def krylov(matrix: Tensor, b: Tensor, steps: int) -> Tensor:
    """Orthonormal basis of the Krylov space: (d, steps)."""
    vectors = [b]
    for _ in range(steps - 1):
        vectors.append(matrix @ vectors[-1])
    return torch.linalg.qr(torch.stack(vectors, 1))[0]


@BOTH
def test_any_system_is_solved_and_draws_are_kept_apart(solver: Solver) -> None:
    matrices = random(5, 6, 6) + 3 * torch.eye(6).double()
    matrices[2] = torch.eye(6)  # converges at once
    b = random(5, 6, seed=1)
    b[3] = 0
    exact = torch.linalg.solve(matrices, b)
    torch.testing.assert_close(solver(times(matrices), b, CG(6, 0.0)), exact, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(solver(times(matrices), b, CG(20, 1e-12)), exact, rtol=1e-9, atol=1e-10)
    matrices = torch.cat([matrices, random(45, 6, 6, seed=2) + 2 * torch.eye(6).double()])
    b = torch.cat([b, random(45, 6, seed=3)])
    for limits in (CG(3, 1e-3), CG(5, 0.4)):  # of the second, some end earlier than others
        together = solver(times(matrices), b, limits)
        for i in range(len(b)):
            alone = solver(times(matrices[i : i + 1]), b[i : i + 1], limits)
            torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-11, atol=1e-12)
    assert solver(times(matrices), torch.zeros_like(b), CG(3, 1e-3)).eq(0).all()


@BOTH
def test_a_draw_that_is_no_number_stays_one_and_spoils_no_other(solver: Solver) -> None:
    matrices, b = random(3, 6, 6) + 3 * torch.eye(6).double(), random(3, 6, seed=1)
    good = solver(times(matrices), b, CG(3, 0.0))
    b[1, 2] = torch.nan
    found = solver(times(matrices), b, CG(3, 0.0))
    assert found[1].isnan().all()
    torch.testing.assert_close(found[::2], good[::2], rtol=1e-12, atol=1e-13)


@BOTH
def test_the_search_ends_where_the_smallest_residual_is_within_the_tolerance(solver: Solver) -> None:
    turn = torch.linalg.qr(random(3, 30, 30))[0]
    matrices, b = (turn * torch.linspace(1, 4, 30, dtype=torch.float64)) @ turn.mT, random(3, 30, seed=1)
    left = [
        (times(matrices)(gmres(times(matrices), b, CG(k, 0.0))) - b).norm(dim=1) / b.norm(dim=1) for k in range(1, 12)
    ]
    calls = 0

    def counted(u: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return times(matrices)(u)

    solver(counted, b, CG(11, 1e-2))
    enough = next(k for k, each in enumerate(left, 1) if float(each.max()) <= 1e-2)
    assert calls == enough and 1 < enough < 11


def test_gmres_has_the_smallest_residual_of_its_space() -> None:
    matrix, b = random(6, 6) + 3 * torch.eye(6).double(), random(6, seed=1)
    basis = krylov(matrix, b, 3)
    best = basis @ torch.linalg.lstsq(matrix @ basis, b).solution
    torch.testing.assert_close(gmres(times(matrix[None]), b[None], CG(3, 0.0))[0], best, rtol=1e-9, atol=1e-10)


def test_of_a_matrix_without_error_galerkin_is_cg() -> None:
    """Ill-conditioned, few steps: the answers of CG, far from those of GMRES."""
    turn = torch.linalg.qr(random(4, 20, 20))[0]
    matrices = (turn * torch.logspace(0, 2, 20, dtype=torch.float64)) @ turn.mT
    b = random(4, 20, seed=1)
    matvec, limits = times(matrices), CG(4, 0.0)
    ours, cg, other = galerkin(matvec, b, limits, least=1.0), limits.solve(matvec, b), gmres(matvec, b, limits)
    torch.testing.assert_close(ours, cg, rtol=1e-6, atol=1e-9)
    assert float((other - cg).norm() / cg.norm()) > 0.3


def pieces(matrix: Tensor, b: Tensor, steps: int, least: float) -> tuple[Tensor, Tensor, Tensor, float]:
    """By dense algebra: the two classical answers, the part of the projected matrix that is error, and what GMRES leaves."""
    basis = krylov(matrix, b, steps)
    square, right = basis.T @ matrix @ basis, basis.T @ b
    small = torch.linalg.lstsq(matrix @ basis, b).solution
    values, vectors = torch.linalg.eigh((square + square.T) / 2)
    error = square - vectors @ torch.diag(values.clamp(min=least)) @ vectors.T
    return small, torch.linalg.solve(square, right), error, float((b - matrix @ basis @ small).norm())


@pytest.mark.parametrize("fault", ["skew", "negative"])
@pytest.mark.parametrize("size", [0.01, 0.3, 3.0, 100.0])
def test_what_lies_between_is_as_uncertain_as_gmres_is_short(fault: str, size: float) -> None:
    """|E y| = |r_G| or |b - K x| = |b| where neither end is taken, the last where neither is reached, else the first."""
    steps, seen = 4, set()
    for seed in range(20):
        turn = torch.linalg.qr(random(12, 12, seed=seed))[0]
        proper = (turn * torch.logspace(0, 3, 12, dtype=torch.float64)) @ turn.T
        wrong = random(12, 12, seed=100 + seed)
        wrong = wrong - wrong.T if fault == "skew" else -(wrong @ wrong.T)
        matrix, b = proper + size * wrong, random(12, seed=200 + seed)
        small, large, error, left = pieces(matrix, b, steps, 1.0)
        x = galerkin(times(matrix[None]), b[None], CG(steps, 0.0), least=1.0)[0]
        y = krylov(matrix, b, steps).T @ x
        step = large - small
        share = float((y - small) @ step / step.square().sum())
        torch.testing.assert_close(y, small + share * step, rtol=1e-6, atol=1e-8)
        # Of either limit, the share of it that is used: of the error, and of the residual.
        used = max(float((error @ y).norm()) / left, float((b - matrix @ x).norm() / b.norm()))
        assert -1e-9 <= share <= 1 + 1e-9
        if share > 1 - 1e-9:
            assert used <= 1 + 1e-6
        elif share < 1e-9:
            assert used >= 1 - 1e-6
        else:
            assert used == pytest.approx(1, rel=1e-6)
        seen.add("end" if share > 1 - 1e-9 else "start" if share < 1e-9 else "between")
    assert "end" in seen if size == 0.01 else "end" not in seen if size == 100.0 else seen
