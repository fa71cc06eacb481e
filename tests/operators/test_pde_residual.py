"""The residual of an equation against manufactured solutions, conservation, and a matrix assembled point by point."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from recon.checks import check_batch, check_gradient, check_pickle
from recon.errors import InputError
from recon.likelihoods import GaussianLikelihood
from recon.operators import PDEResidual
from recon.operators.pde_residual import Darcy
from recon.space import Space
from tests import zoo

STEPS = (0.5, 0.4)


def fields(ny: int, nx: int, sides=(1.0, 1.0)) -> Space:
    """Points on a rectangle of these sides, the outermost ones on its border."""
    grid = Space.grid((ny, nx), (sides[0] / (ny - 1), sides[1] / (nx - 1)), "1")
    return Space(("channel", "y", "x"), (2, ny, nx), {**grid.coords, "channel": ("coefficient", "solution")}, "mixed")


def manufactured(domain: Space) -> tuple[torch.Tensor, torch.Tensor]:
    """Smooth fields (a, u) and the source ``-div(a grad u)`` that belongs to them."""
    y, x = np.meshgrid(domain.coords["y"], domain.coords["x"], indexing="ij")
    a = np.exp(np.sin(2 * x + 3 * y))
    ax, ay = 2 * np.cos(2 * x + 3 * y) * a, 3 * np.cos(2 * x + 3 * y) * a
    s, c = np.sin(1.7 * x - 2.3 * y), np.cos(1.7 * x - 2.3 * y)
    u, ux, uy = c + x * y**2, -1.7 * s + y**2, 2.3 * s + 2 * x * y
    uxx, uyy = -(1.7**2) * c, -(2.3**2) * c + 2 * x
    source = -(ax * ux + ay * uy + a * (uxx + uyy))
    return torch.from_numpy(np.stack([a, u])), torch.from_numpy(source)


def slopes(errors: list[float], steps: list[float]) -> np.ndarray:
    return np.diff(np.log(errors)) / np.diff(np.log(steps))


@pytest.mark.parametrize("mean", ["arithmetic", "harmonic"])
@pytest.mark.parametrize("log", [False, True])
def test_the_residual_of_a_solution_falls_with_the_square_of_the_spacing(mean, log):
    """At the worst point, on a grid with unlike spacings."""
    errors, steps = [], []
    for n in (32, 64, 128):
        domain = fields(n + 1, 3 * n // 2 + 1, sides=(1.0, 1.3))
        x, source = manufactured(domain)
        if log:
            x[0] = x[0].log()
        A = PDEResidual.darcy(domain, source, x[1].clone(), mean, log)
        errors.append(float(A(x).abs().max()))
        steps.append(1 / n)
    assert np.abs(slopes(errors, steps) - 2).max() < 0.1


@pytest.mark.parametrize("mean", ["arithmetic", "harmonic"])
def test_the_field_that_leaves_no_residual_converges_to_the_solution(mean):
    errors, steps = [], []
    for n in (8, 16, 32):
        domain = fields(n + 1, n + 3)
        x, source = manufactured(domain)
        A = PDEResidual.darcy(domain, source, x[1].clone(), mean)
        K, rest = linear_system(A, x[0])
        inner = torch.linalg.solve(K, -rest)
        errors.append(float((inner - x[1, 1:-1, 1:-1].flatten()).abs().max()))
        steps.append(1 / n)
    assert np.abs(slopes(errors, steps) - 2).max() < 0.1


def linear_system(A: PDEResidual, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``r = K u + rest`` in the inner values of u, for a fixed coefficient."""
    ny, nx = A.domain.shape[1:]
    n = (ny - 2) * (nx - 2)
    u = torch.zeros(n + 1, ny, nx, dtype=a.dtype)
    u[:n, 1:-1, 1:-1] = torch.eye(n, dtype=a.dtype).reshape(n, ny - 2, nx - 2)
    r = A(torch.stack([a.expand_as(u), u], dim=1)).flatten(1)
    return (r[:n] - r[n]).T, r[n]


@pytest.mark.parametrize("mean", ["arithmetic", "harmonic"])
def test_the_matrix_point_by_point(mean):
    """Five weights per point, symmetric and positive definite in the inner values."""
    grid = Space.grid((5, 6), STEPS, "1")
    domain = Space(("channel", "y", "x"), (2, 5, 6), {**grid.coords, "channel": ("coefficient", "solution")}, "mixed")
    a = 0.1 + zoo.normal(5, 6).abs()
    K, rest = linear_system(PDEResidual.darcy(domain, mean=mean, boundary=0.0), a)
    expected = torch.zeros_like(K)
    places = [(i, j) for i in range(1, 4) for j in range(1, 5)]
    for row, (i, j) in enumerate(places):
        for di, dj, h in ((1, 0, STEPS[0]), (-1, 0, STEPS[0]), (0, 1, STEPS[1]), (0, -1, STEPS[1])):
            p, q = a[i, j], a[i + di, j + dj]
            face = (p + q) / 2 if mean == "arithmetic" else 2 / (1 / p + 1 / q)
            expected[row, row] += face / h**2
            if (i + di, j + dj) in places:
                expected[row, places.index((i + di, j + dj))] -= face / h**2
    assert torch.allclose(K, expected, rtol=1e-12, atol=1e-12)
    assert torch.allclose(K, K.T, atol=1e-12)
    assert float(torch.linalg.eigvalsh(K).min()) > 0
    assert float(rest.abs().max()) == 0.0


@pytest.mark.parametrize("mean", ["arithmetic", "harmonic"])
def test_nothing_is_lost_between_volumes(mean):
    """``sum (r + f) dx dy`` is what leaves through the outer faces, whatever the fields."""
    A = zoo.darcy(mean, log=True).double()
    x, (dy, dx) = zoo.normal(3, 2, 5, 6), STEPS
    fy, fx = A.residual.fluxes(x)
    out = (fy[:, -1] - fy[:, 0]).sum(1) * dx + (fx[:, :, -1] - fx[:, :, 0]).sum(1) * dy
    held = ((A(x) + A.residual.source) * dx * dy).sum((1, 2))
    assert torch.allclose(held, out, rtol=1e-12)


def test_fluxes_point_downhill_along_growing_index():
    A = zoo.darcy().double()
    x = torch.ones(1, 2, 5, 6, dtype=torch.float64)
    x[:, 1] = 3.0 * STEPS[1] * torch.arange(6) - 2.0 * STEPS[0] * torch.arange(5)[:, None]
    fy, fx = A.residual.fluxes(x)
    assert (fy.shape, fx.shape) == ((1, 4, 4), (1, 3, 5))
    assert torch.allclose(fx, torch.tensor(-3.0, dtype=torch.float64))
    assert torch.allclose(fy, torch.tensor(2.0, dtype=torch.float64))


@pytest.mark.parametrize("axis", [1, 2])
def test_layers_are_exact_with_harmonic_means(axis):
    """A jump half-way between two points: the flux is constant where the slopes are as 1/a."""
    domain, a = fields(9, 9), torch.ones(9, dtype=torch.float64)
    a[4:] = 50.0
    drops = 1 / torch.tensor([1.0] * 3 + [2 / (1 + 1 / 50)] + [50.0] * 4, dtype=torch.float64)
    u = torch.cat([torch.zeros(1, dtype=torch.float64), drops.cumsum(0)])
    x = torch.stack([a, u])[:, :, None].expand(2, 9, 9) if axis == 1 else torch.stack([a, u])[:, None].expand(2, 9, 9)
    scale = float(8**2)  # one over the spacing squared
    assert float(PDEResidual.darcy(domain, mean="harmonic")(x).abs().max()) < 1e-12 * scale
    assert float(PDEResidual.darcy(domain, mean="arithmetic")(x).abs().max()) > 0.1 * scale


def test_it_is_bilinear_with_arithmetic_means():
    A = PDEResidual.darcy(fields(5, 6))
    x, other = zoo.normal(2, 5, 6), zoo.normal(2, 5, 6, step=1)
    for channel in (0, 1):
        y = x.clone()
        y[channel] = other[channel]
        mixed = x.clone()
        mixed[channel] = 2.0 * x[channel] - 3.0 * other[channel]
        assert torch.allclose(A(mixed), 2.0 * A(x) - 3.0 * A(y), atol=1e-11)


def test_lengths_are_metres():
    x = zoo.normal(2, 5, 6)
    small, large = (PDEResidual.darcy(fields(5, 6, sides)) for sides in ((1.0, 1.0), (2.0, 2.0)))
    assert torch.allclose(small(x), 4 * large(x), rtol=1e-12)


def test_the_source_and_its_sign():
    domain, x = fields(5, 6), zoo.normal(2, 5, 6)
    source = zoo.normal(5, 6, step=1)
    bare = PDEResidual.darcy(domain)(x)
    assert torch.allclose(PDEResidual.darcy(domain, source)(x), bare - source[1:-1, 1:-1], atol=1e-12)
    assert torch.allclose(PDEResidual.darcy(domain, 0.1)(x), bare - 0.1, rtol=1e-15, atol=1e-12)


# --- The boundary -------------------------------------------------------------------------------------------------------


def test_a_given_boundary_replaces_the_solutions_own():
    domain, x = fields(5, 6), zoo.normal(2, 5, 6)
    g = zoo.normal(5, 6, step=1)
    moved = x.clone()
    moved[1, 0], moved[1, -1], moved[1, :, 0], moved[1, :, -1] = g[0], g[-1], g[:, 0], g[:, -1]
    free, given = PDEResidual.darcy(domain), PDEResidual.darcy(domain, boundary=g)
    assert torch.equal(given(x), free(moved))
    back = given.vjp(x, torch.ones(3, 4, dtype=torch.float64))
    rim = torch.ones(5, 6, dtype=torch.bool)
    rim[1:-1, 1:-1] = False
    assert float(back[1][rim].abs().max()) == 0.0
    assert float(free.vjp(x, torch.ones(3, 4, dtype=torch.float64))[1][rim].abs().max()) > 0.0
    number = PDEResidual.darcy(domain, boundary=0.7)
    assert torch.equal(number(x), PDEResidual.darcy(domain, boundary=torch.full((5, 6), 0.7, dtype=torch.float64))(x))


def test_closed_faces():
    """Harmonic means next to a coefficient that is not positive let nothing through, and keep their gradients finite."""
    A = PDEResidual.darcy(fields(5, 6), mean="harmonic")
    x = zoo.normal(2, 5, 6)
    x[0] = 1.0
    x[0, 2, 2], x[0, 2, 3] = -0.5, 0.0
    assert float(A(x)[1, 1].abs()) == 0.0
    assert bool(torch.isfinite(A.vjp(x, torch.ones(3, 4, dtype=torch.float64))).all())


# --- As a measurement ---------------------------------------------------------------------------------------------------


def test_it_is_a_likelihood():
    A = zoo.darcy(log=True).double()
    likelihood = GaussianLikelihood(A, torch.zeros(3, 4, dtype=torch.float64), 0.1)
    check_batch(likelihood.log_prob, zoo.normal(4, 2, 5, 6))
    x = zoo.normal(2, 2, 5, 6)
    expected = -0.5 * (A(x) / 0.1).square().sum((1, 2)) - 12 * math.log(0.1 * math.sqrt(2 * math.pi))
    assert torch.allclose(likelihood.log_prob(x), expected, rtol=1e-12)


def test_where_the_residual_lives():
    A = zoo.darcy()
    assert A.range.describe() == "(y=3, x=4) [1]"
    for dim in ("y", "x"):
        assert np.array_equal(A.range.coords[dim], A.domain.coords[dim][1:-1])
    assert PDEResidual.darcy(A.domain, unit="kg/m3").range.unit == "kg/m3"


class Burgers(nn.Module):
    """``u_t + u u_x`` on a periodic line, a user's own equation."""

    def __init__(self, dt: float, dx: float) -> None:
        super().__init__()
        self.register_buffer("steps", torch.tensor([dt, dx]))

    def forward(self, u):
        dt, dx = self.steps
        middle = (u[:, 1:] + u[:, :-1]) / 2
        slope = (middle.roll(-1, 2) - middle.roll(1, 2)) / (2 * dx)
        return (u[:, 1:] - u[:, :-1]) / dt + middle * slope


def test_any_equation_written_with_torch():
    domain, range_ = Space(("time", "x"), (4, 9), {}, "m/s"), Space(("time", "x"), (3, 9), {}, "m/s2")
    A = PDEResidual(domain, range_, Burgers(0.1, 0.2)).double()
    check_gradient(A)
    check_pickle(A, zoo.normal(3, 4, 9))
    assert torch.equal(A(torch.ones(2, 4, 9, dtype=torch.float64)), torch.zeros(2, 3, 9, dtype=torch.float64))
    plain = PDEResidual(domain, range_, lambda u: u.diff(dim=1))
    assert torch.equal(plain(zoo.normal(4, 9)), zoo.normal(4, 9).diff(dim=0))


def test_the_stencil_alone():
    x = zoo.normal(3, 2, 5, 6)
    A = zoo.darcy().double()
    assert torch.equal(Darcy(A.residual.steps, zoo.normal(5, 6, step=14, dtype=torch.float32).double())(x), A(x))


GRID = fields(5, 6)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: PDEResidual(Space.vector(5), Space.vector(5), lambda u: u[:, 1:]),
            r"has shape \(2, 4\); got range \(comp",
        ),
        (
            lambda: PDEResidual.darcy(Space.grid((5, 6), 1.0, "1")),
            r'takes fields \("channel", "y", "x"\) with the channels',
        ),
        (lambda: PDEResidual.darcy(Space(("channel", "y", "x"), (2, 5, 6))), "with channels None"),
        (lambda: PDEResidual.darcy(fields(2, 6)), "needs at least 3 by 3 points, evenly spaced"),
        (
            lambda: PDEResidual.darcy(
                Space(("channel", "y", "x"), (2, 5, 6), {"channel": ("coefficient", "solution")}, "mixed")
            ),
            "needs at least 3 by 3 points, evenly spaced",
        ),
        (
            lambda: PDEResidual.darcy(GRID, mean="geometric"),
            "mean must be one of arithmetic, harmonic; got 'geometric'",
        ),
        (
            lambda: PDEResidual.darcy(GRID, torch.ones(6, 5)),
            r"source must be one finite number.*\(5, 6\); got \(6, 5\)",
        ),
        (lambda: PDEResidual.darcy(GRID, math.nan), "source must be one finite number"),
        (lambda: PDEResidual.darcy(GRID, boundary=np.ones(5)), r"boundary must be one finite number.*got \(5,\)"),
    ],
)
def test_what_cannot_be(make, text):
    with pytest.raises(InputError, match=text):
        make()
