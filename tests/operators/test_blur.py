"""Convolutions against their definition, dense linear algebra, Gaussian identities and deepinv."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.signal import convolve

from recon.errors import InputError
from recon.operators import Blur
from recon.operators.blur import constant, gaussian_kernel
from recon.operators.row_fft import irfft, rfft
from recon.space import Space
from tests import zoo

PAD = {"periodic": "wrap", "zero": "constant", "reflect": "reflect"}


def defined(x: np.ndarray, kernel: np.ndarray, centre: tuple[int, ...], boundary: str) -> np.ndarray:
    """The sum of the module's text, on the extended array."""
    borders = [(k - 1 - c, c) for k, c in zip(kernel.shape, centre, strict=True)]
    wide = x if boundary == "valid" else np.pad(x, borders, mode=PAD[boundary])
    return convolve(wide, kernel, mode="valid", method="direct")


CASES = [
    ((12,), (5,), None),
    ((9,), (4,), (0,)),
    ((7, 9), (3, 3), None),
    ((8, 6), (4, 5), None),
    ((7, 9), (2, 6), (1, 5)),
    ((40, 33), (7, 4), (0, 2)),
    ((4, 5, 6), (2, 3, 4), (1, 0, 2)),
]


@pytest.mark.parametrize("boundary", ["periodic", "zero", "reflect", "valid"])
@pytest.mark.parametrize(("shape", "size", "centre"), CASES)
def test_the_definition(shape, size, centre, boundary):
    dims = ("z", "y", "x")[-len(shape) :]
    kernel, x = zoo.normal(*size), zoo.normal(2, *shape, step=1)
    A = Blur(Space(dims, shape), kernel, boundary, centre)
    middle = centre or tuple(k // 2 for k in size)
    for one, y in zip(x, A(x), strict=True):
        expected = torch.from_numpy(defined(one.numpy(), kernel.numpy(), middle, boundary))
        assert y.shape == expected.shape
        assert torch.allclose(y, expected, rtol=0, atol=1e-13 * float(expected.abs().max()))


def test_a_periodic_kernel_may_be_larger_than_the_array():
    kernel, x = zoo.normal(11, 8), zoo.normal(5, 6, step=1)
    expected = defined(x.numpy(), kernel.numpy(), (5, 4), "periodic")
    assert torch.allclose(Blur(Space(("y", "x"), (5, 6)), kernel)(x), torch.from_numpy(expected), atol=1e-12)


@pytest.mark.parametrize(("size", "centre"), [((3, 3), (1, 1)), ((4, 2), (2, 1))])
def test_a_point_becomes_the_kernel_about_its_centre(size, centre):
    kernel, x = zoo.normal(*size), torch.zeros(9, 9, dtype=torch.float64)
    x[4, 5] = 1.0
    y = Blur(Space(("y", "x"), (9, 9)), kernel, "zero")(x)
    top, left = 4 - centre[0], 5 - centre[1]
    assert torch.allclose(y[top : top + size[0], left : left + size[1]], kernel, atol=1e-14)
    assert float(y.abs().sum()) == pytest.approx(float(kernel.abs().sum()))


def test_leading_axes_are_left_alone():
    A, one = zoo.blurred("zero", leading=True).double(), zoo.blurred("zero").double()
    x = zoo.normal(3, 2, 7, 8)
    assert torch.allclose(A(x)[:, 1], one(x[:, 1]), atol=1e-14)


def test_the_range_keeps_its_coordinates():
    domain = Space.grid((7, 8), 0.5, "K")
    assert Blur(domain, torch.ones(3, 4)).range.mismatch(domain) is None
    valid = Blur(domain, torch.ones(3, 4), "valid", centre=(1, 3)).range
    assert valid.shape == (5, 5)
    assert valid.unit == "K"
    assert np.array_equal(valid.coords["y"], domain.coords["y"][1:6])
    assert np.array_equal(valid.coords["x"], domain.coords["x"][:5])


# --- Closed forms -------------------------------------------------------------------------------------------------------


class NoCG:
    """A solver that must not be used."""

    def solve(self, *_):
        raise AssertionError("a closed form exists")


@pytest.mark.parametrize(("shape", "size"), [((9,), (4,)), ((5, 6), (3, 4)), ((40, 3), (2, 3)), ((3, 4, 5), (2, 2, 3))])
@pytest.mark.parametrize("weight", [None, 2.5])
@pytest.mark.parametrize("c", [1e-6, 0.3])
def test_solve_against_linear_algebra(shape, size, weight, c):
    """To rounding times the condition number of the system."""
    A = Blur(Space(("z", "y", "x")[-len(shape) :], shape), zoo.normal(*size))
    M, b = zoo.dense(A), zoo.normal(3, *shape, step=1)
    K = (weight or 1.0) * M.T @ M + c * torch.eye(len(M), dtype=torch.float64)
    exact = torch.linalg.solve(K, b.flatten(1).T).T.reshape(b.shape)
    W = None if weight is None else torch.full(A.range.shape, weight, dtype=torch.float64)
    uses = []
    got = A.solve(b, c, W, cg=NoCG(), watch=uses.append)
    assert uses == [3]
    condition = float(torch.linalg.cond(K))
    assert float((got - exact).norm() / exact.norm()) < 1e-14 * max(10.0, condition)


def test_the_closed_form_is_left_where_it_does_not_hold():
    A = zoo.blurred().double()
    b, weight = zoo.normal(1, 7, 8), torch.ones(7, 8, dtype=torch.float64)
    weight[3, 3] = 2.0
    with pytest.raises(AssertionError, match="a closed form exists"):
        A.solve(b, 1.0, weight, cg=NoCG())
    with pytest.raises(AssertionError, match="a closed form exists"):
        zoo.blurred("zero").double().solve(b, 1.0, cg=NoCG())


@pytest.mark.parametrize("shape", [(9,), (7, 8), (3, 4, 5)])
def test_the_norm_is_exact(shape):
    A = Blur(Space(("z", "y", "x")[-len(shape) :], shape), zoo.normal(*(3,) * len(shape)))
    assert A.norm() == pytest.approx(float(torch.linalg.matrix_norm(zoo.dense(A), 2)), rel=1e-12)


def test_one_weight_or_many():
    assert constant(None) == 1.0
    assert constant(torch.full((2, 3), 0.25)) == 0.25
    assert constant(torch.tensor(4.0).expand(2, 3)) == 4.0
    assert constant(torch.tensor([1.0, 1.0, 1.5])) is None


# --- Gaussians ----------------------------------------------------------------------------------------------------------


def test_the_width_is_in_metres():
    """The kernel's variance along each axis, in metres, whatever the pixels."""
    domain = Space.grid((61, 61), (0.5e-3, 0.25e-3), "1/m")
    kernel = gaussian_kernel(domain, 1e-3, truncate=9)
    assert kernel.shape == (37, 73)
    assert kernel.sum() == pytest.approx(1, abs=1e-14)
    for axis, pixel in enumerate((0.5e-3, 0.25e-3)):
        line = kernel.sum(1 - axis)
        place = (np.arange(len(line)) - len(line) // 2) * pixel
        assert (line * place**2).sum() == pytest.approx(1e-3**2, rel=1e-10)


@pytest.mark.parametrize("boundary", ["periodic", "reflect"])
def test_blurs_add_their_variances(boundary):
    domain = Space.grid((48, 50), 0.01, "K")
    three, four, five = (Blur.gaussian(domain, n * 0.005, boundary, truncate=9).double() for n in (3, 4, 5))
    x = zoo.normal(48, 50)
    assert torch.allclose(three(four(x)), five(x), atol=1e-6)  # kernels are held in float32


def test_a_constant_stays():
    A = Blur.gaussian(Space.grid((20, 21), 0.5, "K"), 1.0, "reflect")
    y = A(torch.full((20, 21), 7.0))
    assert torch.allclose(y, torch.tensor(7.0), rtol=1e-6)


def test_which_axes_a_width_blurs():
    volume, line = Space.grid((4, 5, 6), 1.0, "K"), Space(("x",), (8,), {"x": np.arange(8.0)}, "K")
    assert gaussian_kernel(volume, 0.5).ndim == 2
    assert gaussian_kernel(volume, (0.5, 0.0, 1.0)).shape == (5, 1, 9)
    assert gaussian_kernel(line, 0.5).shape == (5,)


# --- Another implementation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("theirs", "ours"), [("circular", "periodic"), ("reflect", "reflect"), ("valid", "valid")])
def test_deepinv(theirs, ours):
    """Odd kernels: their centre of even ones is another."""
    import deepinv

    kernel, x = zoo.normal(5, 3, dtype=torch.float32), zoo.normal(2, 1, 12, 11, step=1, dtype=torch.float32)
    y = deepinv.physics.Blur(filter=kernel[None, None], padding=theirs)(x)
    A = Blur(Space(("channel", "y", "x"), (1, 12, 11)), kernel, ours)
    assert torch.allclose(A(x), y, atol=1e-5)


# --- Precision, threads, company ----------------------------------------------------------------------------------------


def test_a_tensor_sets_the_precision():
    domain = Space(("y", "x"), (5, 6))
    assert Blur(domain, zoo.normal(3, 3)).dtype == torch.float64
    assert Blur(domain, zoo.normal(3, 3).numpy()).dtype == Blur(domain, [[1.0, 2.0]]).dtype == torch.float32
    assert Blur(domain, zoo.normal(3, 3))(torch.ones(5, 6)).dtype == torch.float32


SHAPES = [(7,), (7, 9), (5, 6), (64, 64), (33, 40), (11, 13, 9)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_neither_threads_nor_company_change_a_bit(shape, dtype):
    A = Blur(Space(("z", "y", "x")[-len(shape) :], shape), zoo.normal(*(3,) * len(shape), dtype=dtype))
    x = zoo.normal(9, *shape, step=1, dtype=dtype)
    before, answers = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            answers.append(torch.stack([A(x), A.A_adjoint(x), A.normal(x), A.solve(x, 0.1)]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])
    for rows in (slice(4, 5), slice(2, 7)):
        some = x[rows].clone()
        again = torch.stack([A(some), A.A_adjoint(some), A.normal(some), A.solve(some, 0.1)])
        assert torch.equal(again, answers[0][:, rows])


@pytest.mark.parametrize("shape", [*SHAPES, (1,), (2,), (3, 1), (4, 31), (2, 32), (2, 33)])
def test_the_transforms(shape):
    axes = tuple(range(-len(shape), 0))
    x = zoo.normal(3, *shape)
    assert torch.allclose(rfft(x, len(shape)), torch.fft.rfftn(x, dim=axes), atol=1e-12)
    assert torch.allclose(irfft(rfft(x, len(shape)), shape), x, atol=1e-13)


# --- What is refused ----------------------------------------------------------------------------------------------------

GRID = Space.grid((5, 6), 0.5, "K")


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Blur(GRID, torch.ones(2, 2, 2)), r"a real array of 1 to 2 axes; got float32 \(2, 2, 2\)"),
        (lambda: Blur(GRID, torch.ones(0, 2)), r"a real array of 1 to 2 axes; got float32 \(0, 2\)"),
        (lambda: Blur(GRID, torch.ones(2, 2, dtype=torch.complex64)), "a real array of 1 to 2 axes; got complex64"),
        (lambda: Blur(GRID, 3.0), r"a real array of 1 to 2 axes; got float64 \(\)"),
        (lambda: Blur(GRID, torch.tensor([1.0, math.nan])), "the kernel of a blur must be finite"),
        (lambda: Blur(Space(("x",), (5,), complex=True), torch.ones(2)), "takes real arrays.*hold complex ones as two"),
        (lambda: Blur(GRID, torch.ones(2, 2), "mirror"), "boundary must be one of periodic, zero, reflect, valid; got"),
        (lambda: Blur(GRID, torch.ones(2, 2), centre=2), r"centre is an index into the kernel \(2, 2\).*got 2"),
        (lambda: Blur(GRID, torch.ones(2, 2), centre=(0, 2)), r"centre is an index into the kernel \(2, 2\)"),
        (lambda: Blur(GRID, torch.ones(6, 2), "valid"), "a kernel of 6 pixels fits nowhere into an axis of 5"),
        (lambda: Blur(GRID, torch.ones(11, 2), "reflect"), "a kernel of 11 pixels reaches beyond the mirror image"),
        (
            lambda: Blur.gaussian(GRID, -1.0),
            "takes one width, or one per blurred axis, finite and not negative; got -1",
        ),
        (lambda: Blur.gaussian(GRID, math.nan), "finite and not negative; got nan"),
        (lambda: Blur.gaussian(GRID, (1.0, 1.0, 1.0)), "takes one width, or one per blurred axis"),
        (lambda: Blur.gaussian(GRID, 1.0, truncate=0.0), "truncate is a positive number of widths; got 0"),
        (lambda: Blur.gaussian(Space(("y", "x"), (5, 6)), 1.0), "needs evenly spaced coordinates along 'y' to know"),
    ],
)
def test_blurs_that_cannot_be(make, text):
    with pytest.raises(InputError, match=text):
        make()
