"""Decimation against its definition, coordinates on paper, dense linear algebra and deepinv's closed form."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from recon.errors import InputError
from recon.operators import CG, Blur, Downsampling
from recon.space import Space
from tests import zoo


def plain(*shape: int) -> Space:
    return Space(("z", "y", "x")[-len(shape) :], shape)


class NoCG:
    """A solver that must not be used."""

    def solve(self, *_):
        raise AssertionError("a closed form exists")


@pytest.mark.parametrize("boundary", ["periodic", "zero", "reflect", "valid"])
@pytest.mark.parametrize(("factor", "phase"), [((2, 3), (0, 0)), ((2, 3), (1, 2)), ((1, 4), (0, 3)), ((3, 3), None)])
def test_it_is_a_blur_of_which_some_pixels_are_kept(factor, phase, boundary):
    kernel, x = zoo.normal(4, 3), zoo.normal(2, 11, 12, step=1)
    A = Downsampling(plain(11, 12), factor, kernel, phase, boundary)
    p, q = phase or (1, 1)
    expected = Blur(plain(11, 12), kernel, boundary)(x)[:, p :: factor[0], q :: factor[1]]
    assert A.range.shape == expected.shape[1:]
    assert torch.equal(A(x), expected)


@pytest.mark.parametrize("f", [1, 2, 3, 4, 5])
def test_the_default_is_the_mean_of_blocks(f):
    domain = Space.grid((3 * f, 2 * f), (0.5, 0.2), "K")
    A, x = Downsampling(domain, f).double(), zoo.normal(3 * f, 2 * f)
    assert torch.allclose(A(x), x.reshape(3, f, 2, f).mean((1, 3)), atol=1e-7)  # the kernel is held in float32
    for dim, n in (("y", 3), ("x", 2)):
        assert np.allclose(A.range.coords[dim], np.asarray(domain.coords[dim]).reshape(n, f).mean(1))
    assert A.range.unit == "K"


@pytest.mark.parametrize("centre", [None, (0, 3)])
@pytest.mark.parametrize("phase", [0, 1])
def test_coordinates_are_where_the_kernel_weighs(phase, centre):
    """An array that holds its own coordinate is measured at the coordinate of the range, by any kernel of mass one."""
    domain = Space.grid((14, 17), (0.5, 0.2), "m")
    kernel = zoo.normal(3, 4, step=2).abs()
    A = Downsampling(domain, 2, kernel / kernel.sum(), phase, "valid", centre)
    y, x = np.meshgrid(domain.coords["y"], domain.coords["x"], indexing="ij")
    for axis, (dim, values) in enumerate((("y", y), ("x", x))):
        line = A(torch.from_numpy(values)).movedim(axis, 0)
        expected = torch.from_numpy(np.asarray(A.range.coords[dim])).reshape(-1, 1).expand_as(line)
        assert torch.allclose(line, expected, atol=1e-12)


def test_coordinates_that_cannot_be_shifted():
    """A symmetric kernel keeps any coordinate; between uneven pixels there is none; names are kept; derivatives stay put."""
    uneven, names = {"x": np.array([0.0, 1.0, 4.0, 9.0])}, {"x": ("a", "b", "c", "d")}
    line = lambda coords: Space(("x",), (4,), coords)  # noqa: E731
    assert Downsampling(line(uneven), 2, torch.ones(3)).range.coords["x"].tolist() == [0.0, 4.0]
    assert "x" not in Downsampling(line(uneven), 2).range.coords
    assert Downsampling(line(names), 2).range.coords["x"] == ("a", "c")
    even = {"x": np.arange(4.0)}
    assert Downsampling(line(even), 2, torch.tensor([1.0, -1.0])).range.coords["x"].tolist() == [0.0, 2.0]


def test_a_gaussian_in_metres():
    domain = Space.grid((12, 8), 0.5, "K")
    A, x = Downsampling.gaussian(domain, 4, 0.7), zoo.normal(12, 8, dtype=torch.float32)
    assert torch.equal(A(x), Blur.gaussian(domain, 0.7)(x)[1::4, 1::4])


# --- The closed form ----------------------------------------------------------------------------------------------------

EXACT = [
    ((12,), (3,), (4,), None),
    ((6, 9), (2, 3), (4, 3), (1, 2)),
    ((8, 8), (2, 2), (3, 3), (0, 1)),
    ((4, 6), (4, 1), (7, 9), (3, 0)),  # a kernel larger than the image
    ((2, 70), (2, 2), (2, 2), None),
    ((4, 3, 6), (2, 3, 2), (2, 3, 3), (1, 1, 0)),
]


@pytest.mark.parametrize(("shape", "factor", "size", "phase"), EXACT)
@pytest.mark.parametrize("weight", [None, 2.5])
@pytest.mark.parametrize("c", [1e-5, 0.3])
def test_solve_against_linear_algebra(shape, factor, size, phase, weight, c):
    """To rounding times the condition number of the system."""
    A = Downsampling(plain(*shape), factor, zoo.normal(*size), phase)
    assert A.closed
    M, b = zoo.dense(A), zoo.normal(3, *shape, step=1)
    K = (weight or 1.0) * M.T @ M + c * torch.eye(M.shape[1], dtype=torch.float64)
    exact = torch.linalg.solve(K, b.flatten(1).T).T.reshape(b.shape)
    W = None if weight is None else torch.full(A.range.shape, weight, dtype=torch.float64)
    uses = []
    got = A.solve(b, c, W, cg=NoCG(), watch=uses.append)
    assert uses == [3]
    assert float((got - exact).norm() / exact.norm()) < 1e-14 * max(10.0, float(torch.linalg.cond(K)))


@pytest.mark.parametrize(("shape", "factor", "size", "phase"), EXACT)
def test_the_spectrum(shape, factor, size, phase):
    """Eigenvalues of ``A A^T``: the aliases' mean of ``|H|^2``, as Zhao et al. write it."""
    A = Downsampling(plain(*shape), factor, zoo.normal(*size), phase)
    M = zoo.dense(A)
    placed = np.zeros(shape)
    for index in np.ndindex(*size):
        placed[tuple(i % n for i, n in zip(index, shape, strict=True))] += float(zoo.normal(*size)[index])
    power = np.abs(np.fft.fftn(placed)) ** 2
    for axis, f in enumerate(factor):
        power = np.stack(np.split(power, f, axis)).mean(0)
    half = power[..., : power.shape[-1] // 2 + 1]
    assert np.allclose(A.spectrum(M).numpy(), half, rtol=0, atol=1e-13 * power.max())
    eigenvalues = torch.linalg.eigvalsh(M @ M.T)
    assert torch.allclose(eigenvalues, torch.from_numpy(np.sort(power.ravel())), atol=1e-12 * float(power.max()))
    assert A.norm() == pytest.approx(float(eigenvalues.max().sqrt()), rel=1e-12)


def test_deepinv():
    """The measurement, the transpose, and the closed-form proximal step ``(g A^T A + 1)^{-1} (g A^T y + z)``."""
    import deepinv

    kernel, x = zoo.normal(5, 3, dtype=torch.float32).abs(), zoo.normal(2, 1, 12, 16, step=1, dtype=torch.float32)
    theirs = deepinv.physics.Downsampling((1, 12, 16), filter=kernel[None, None], factor=2, padding="circular")
    A = Downsampling(Space(("channel", "y", "x"), (1, 12, 16)), 2, kernel, 0)
    y = theirs(x)
    assert torch.allclose(A(x), y, atol=1e-5)
    assert torch.allclose(A.A_adjoint(y), theirs.A_adjoint(y), atol=1e-5)
    z, gamma = zoo.normal(2, 1, 12, 16, step=2, dtype=torch.float32), 0.7
    step = A.solve(gamma * A.A_adjoint(y) + z, 1.0, torch.full(A.range.shape, gamma), cg=NoCG())
    assert torch.allclose(step, theirs.prox_l2(z, y, gamma), atol=1e-5)


@pytest.mark.parametrize(
    ("make", "weight"),
    [
        (lambda: zoo.downsampled((7, 8)), None),
        (lambda: zoo.downsampled(boundary="zero"), None),
        (zoo.downsampled, torch.tensor([[1.0, 1.0, 2.0]] * 3)),
    ],
)
def test_the_closed_form_is_left_where_it_does_not_hold(make, weight):
    A = make().double()
    b = zoo.normal(2, *A.domain.shape)
    with pytest.raises(AssertionError, match="a closed form exists"):
        A.solve(b, 1.0, weight, cg=NoCG())
    x = A.solve(b, 1.0, weight, cg=CG(200, 1e-13))
    W = torch.ones(A.range.shape) if weight is None else weight
    assert torch.allclose(A.A_adjoint(W * A(x)) + x, b, atol=1e-10)


def test_data_of_no_weight():
    b = zoo.normal(2, 6, 9)
    A = zoo.downsampled().double()
    assert torch.allclose(A.solve(b, 4.0, torch.zeros(A.range.shape, dtype=torch.float64)), b / 4, atol=1e-14)


@pytest.mark.parametrize("shape", [(6, 9), (64, 66), (128, 9)])
def test_neither_threads_nor_company_change_a_bit(shape):
    A, x = zoo.downsampled(shape), zoo.normal(9, *shape, dtype=torch.float32)
    before, answers = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            answers.append(torch.stack([A.A_adjoint(A(x)), A.solve(x, 0.1)]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])
    assert torch.equal(A.solve(x[4:5].clone(), 0.1), answers[0][1, 4:5])


# --- What is refused ----------------------------------------------------------------------------------------------------

GRID = Space.grid((5, 6), 0.5, "K")


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Downsampling(GRID, 0), "the factor of Downsampling is 1 or more; got 0"),
        (
            lambda: Downsampling(GRID, 2.5),
            "the factor of Downsampling is one whole number, or one for each of 2 axes; got 2.5",
        ),
        (lambda: Downsampling(GRID, (2, 2), torch.ones(3)), "one for each of 1 axes"),
        (lambda: Downsampling(GRID, 2, phase=2), r"the phase of Downsampling is 0 to factor - 1 = \(1, 1\); got 2"),
        (lambda: Downsampling(GRID, 2, phase=-1), "the phase of Downsampling is 0 to"),
        (lambda: Downsampling(GRID, 2, phase=(0, 0, 0)), "the phase of Downsampling is one whole number"),
        (
            lambda: Downsampling(GRID, 9, torch.ones(1, 1), 8),
            "the phase 8 of Downsampling lies beyond the 5 pixels along 'y'",
        ),
        (lambda: Downsampling(GRID, 2, torch.ones(9, 9), boundary="valid"), "a kernel of 9 pixels fits nowhere"),
        (lambda: Downsampling(GRID, 2, torch.ones(1, 1, 1)), "a real array of 1 to 2 axes"),
    ],
)
def test_what_cannot_be(make, text):
    with pytest.raises(InputError, match=text):
        make()
