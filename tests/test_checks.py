"""Every public check passes what is right, fails what is wrong, and names the figure."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from recon.checks import (
    check_adjoint,
    check_batch,
    check_gradient,
    check_linear,
    check_normal,
    check_pickle,
    check_taylor,
)
from recon.errors import CheckFailed, InputError
from recon.likelihoods import GaussianLikelihood
from recon.operators import LinearOperator, MatrixOperator, Operator
from recon.space import Space
from tests import zoo

FIGURE = r"gives [0-9.e+-]+|gives inf"


def right(dtype=torch.float64) -> MatrixOperator:
    return zoo.matrix().to(dtype)


class WrongTranspose(MatrixOperator):
    def apply_adjoint(self, y):
        return 1.001 * super().apply_adjoint(y)


class OneWrongEntry(MatrixOperator):
    """Wrong at a single place, as a border handled differently would be."""

    def apply_adjoint(self, y):
        x = super().apply_adjoint(y)
        x[:, 3] *= 1.01
        return x


class SinglePrecisionInside(MatrixOperator):
    """Takes and gives float64 but computes in float32."""

    def apply(self, x):
        return super().apply(x).float().double()


class Affine(MatrixOperator):
    def apply(self, x):
        return super().apply(x) + 1e-3


class Clipped(MatrixOperator):
    """Not linear, though A(0) = 0."""

    def apply(self, x):
        return super().apply(x.clamp(min=0))


class WrongNormal(MatrixOperator):
    def normal(self, x):
        return super().normal(x) * 1.01


class CoupledByTheBatch(MatrixOperator):
    """Centres on the mean over the batch, as batch normalisation does."""

    def apply(self, x):
        return super().apply(x - x.mean(0))


class Cubic(Operator):
    """A smooth nonlinear model."""

    def __init__(self):
        super().__init__(Space.vector(6), Space.vector(4, dim="datum"))
        self.register_buffer("matrix", zoo.normal(4, 6))

    def apply(self, x):
        return torch.exp(0.3 * x @ self.matrix.T) + (x**3) @ self.matrix.T


class CubicWithWrongVjp(Cubic):
    """The gradient of the exponential alone."""

    def vjp(self, x, v):
        return (v * torch.exp(0.3 * x @ self.matrix.T) * 0.3) @ self.matrix


class CubicWithSlightlyWrongVjp(Cubic):
    def vjp(self, x, v):
        return super().vjp(x, v) * (1 + 1e-5)


class CutGraph(LinearOperator):
    """``A`` works on detached numbers, so autograd gets nothing, though ``vjp`` is right."""

    def __init__(self):
        super().__init__(Space.vector(6), Space.vector(6))
        self.register_buffer("diagonal", zoo.normal(6))

    def A(self, x):
        return x.detach() * self.diagonal

    def A_adjoint(self, y):
        return y * self.diagonal


class OtherBackward(MatrixOperator):
    """``A`` bypasses the matched pair: its backward pass goes through other numbers than ``vjp``."""

    def A(self, x):
        return super().A(x.detach()) + 1.01 * (x - x.detach()) @ self.matrix.T


class Unpicklable(MatrixOperator):
    def __init__(self, matrix):
        super().__init__(matrix)
        self.hook = lambda x: x


class Forgetful(MatrixOperator):
    """Its copies lose a number."""

    def __init__(self, matrix):
        super().__init__(matrix)
        self.factor = 2.0

    def apply(self, x):
        return self.factor * super().apply(x)

    def __setstate__(self, state):
        super().__setstate__({**state, "factor": 1.0})


def make(kind):
    return kind(zoo.normal(5, 7))


FAILURES = {
    "wrong transpose": (check_adjoint, lambda: make(WrongTranspose), "adjoint test"),
    "one wrong entry": (check_adjoint, lambda: make(OneWrongEntry), "adjoint test"),
    "single precision inside": (check_adjoint, lambda: make(SinglePrecisionInside), r"at most 1e-10 is allowed"),
    "wrong transpose in float32": (check_adjoint, lambda: make(WrongTranspose).float(), r"at most 1e-05 is allowed"),
    "affine": (check_linear, lambda: make(Affine), "linearity"),
    "clipped": (check_linear, lambda: make(Clipped), "linearity"),
    "not linear": (check_linear, Cubic, "linearity"),
    "wrong normal": (check_normal, lambda: make(WrongNormal), r"normal\(x\) against A_adjoint\(A\(x\)\)"),
    "wrong vjp": (check_gradient, CubicWithWrongVjp, "vjp against central differences"),
    "slightly wrong vjp": (check_gradient, CubicWithSlightlyWrongVjp, "vjp against central differences"),
    "vjp of a wrong transpose": (check_gradient, lambda: make(WrongTranspose), "vjp against central differences"),
    "cut graph": (check_gradient, CutGraph, "cuts the graph"),
    "other backward": (check_gradient, lambda: make(OtherBackward), "autograd's backward of A against vjp"),
}


@pytest.mark.parametrize("case", list(FAILURES))
def test_the_check_can_fail(case):
    check, build, text = FAILURES[case]
    with pytest.raises(CheckFailed, match=text) as caught:
        check(build())
    assert case == "cut graph" or re.search(FIGURE, str(caught.value))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("check", [check_adjoint, check_linear, check_normal, check_gradient])
def test_the_check_passes_what_is_right(check, dtype):
    figure = check(right(dtype))
    assert 0 <= figure <= (1e-3 if check is check_gradient else 1e-5)


def test_the_figure_is_what_it_says():
    figure = check_adjoint(make(WrongTranspose), tolerance=1.0)
    assert 1e-5 < figure < 1e-3  # a thousandth of <Au, v>, which is below |Au||v|
    assert check_normal(make(WrongNormal), tolerance=1.0) == pytest.approx(0.01)


def test_the_same_figure_every_time():
    assert check_adjoint(make(WrongTranspose), 1.0) == check_adjoint(make(WrongTranspose), 1.0)


def test_a_looser_limit_can_be_asked_for():
    check_adjoint(make(WrongTranspose), tolerance=1e-2)
    with pytest.raises(CheckFailed, match="at most 1e-14 is allowed"):
        check_adjoint(make(WrongTranspose).float(), tolerance=1e-14)


def test_gradients_of_nonlinear_models():
    assert check_gradient(Cubic()) < 1e-8
    assert check_gradient(Cubic(), x=2 + zoo.normal(3, 6)) < 1e-7
    assert check_gradient(Cubic().float()) < 1e-3


class _CubeWithWrongBackward(torch.autograd.Function):
    """``x^3`` whose gradient is off by a hundred-thousandth."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return (3 + 3e-5) * x**2 * grad


class CubeWithWrongBackward(Cubic):
    def apply(self, x):
        return _CubeWithWrongBackward.apply(x) @ self.matrix.T


def test_the_taylor_remainder_falls_with_the_square():
    """Slope 2 for curvature; 3 where it vanishes (the cube at zero); nothing remains of a linear operator."""
    assert check_taylor(Cubic()) == pytest.approx(2, abs=1e-3)
    assert check_taylor(Cubic().float()) == pytest.approx(2, abs=0.1)
    assert check_taylor(CubeWithWrongBackward(), x=torch.zeros(3, 6, dtype=torch.float64)) == pytest.approx(3, abs=1e-3)
    assert check_taylor(right()) == check_taylor(right(torch.float32)) == float("inf")


def test_a_wrong_derivative_leaves_a_slope_of_one():
    with pytest.raises(CheckFailed, match=r"the slope 0\.9\d+ of the Taylor remainder, subtracted from 2, gives 1\.0"):
        check_taylor(CubeWithWrongBackward())
    with pytest.raises(CheckFailed, match=r"the slope 1 of the Taylor remainder"):
        check_taylor(make(OtherBackward))
    with pytest.raises(CheckFailed, match="cuts the graph"):
        check_taylor(CutGraph())
    broken = Cubic()
    broken.matrix[0, 0] = torch.nan
    with pytest.raises(CheckFailed, match="the slope 0 of the Taylor remainder"):
        check_taylor(broken)


def test_nan_never_passes():
    operator = right()
    operator.matrix[0, 0] = torch.nan
    for check in (check_adjoint, check_linear, check_normal):
        with pytest.raises(CheckFailed, match="gives inf"):
            check(operator)
    with pytest.raises(CheckFailed, match="gives inf"):
        check_gradient(operator)
    with pytest.raises(CheckFailed, match="gives inf"):
        check_batch(operator, zoo.normal(4, 7))


def test_an_operator_that_gives_nothing_is_no_failure():
    zero = MatrixOperator(torch.zeros(3, 4, dtype=torch.float64))
    assert check_adjoint(zero) == check_linear(zero) == check_normal(zero) == 0.0


# --- Draws in company ---------------------------------------------------------------------------------------------------


def test_draws_that_meet_are_found():
    with pytest.raises(CheckFailed, match=r"CoupledByTheBatch.*a draw alone against the same draw in company gives"):
        check_batch(make(CoupledByTheBatch).A, zoo.normal(4, 7))


def test_batch_normalisation_is_found():
    network = nn.Sequential(nn.Linear(7, 7), nn.BatchNorm1d(7), nn.SiLU()).double()
    with pytest.raises(
        (CheckFailed, ValueError), match=r"alone|more than 1 value"
    ):  # torch refuses a batch of one itself
        check_batch(network, zoo.normal(4, 7))
    check_batch(network.eval(), zoo.normal(4, 7))


def test_a_norm_over_the_batch_is_found():
    """The trap of guidance: a residual divided by its norm over all draws."""
    x = zoo.normal(5, 7)
    with pytest.raises(CheckFailed, match="in company"):
        check_batch(lambda one: one / one.norm(), x)
    check_batch(lambda one: one / one.norm(dim=1, keepdim=True), x)


def test_a_draw_that_depends_on_its_place_is_found():
    with pytest.raises(CheckFailed, match="in company"):
        check_batch(lambda one: one * torch.arange(1, len(one) + 1).reshape(-1, 1), zoo.normal(4, 7))


def test_a_small_leak_into_one_draw_is_found():
    """The measure is per draw: a neighbour a million times larger hides nothing."""
    x = zoo.normal(4, 7) * torch.tensor([1e6, 1.0, 1e-3, 1e3]).reshape(-1, 1)
    with pytest.raises(CheckFailed, match="in company"):
        check_batch(lambda one: torch.cat([one[:-1], one[-1:] * (1 + 1e-6 * (len(one) > 1))]), x.flip(0))


def test_several_inputs_and_outputs():
    x, w = zoo.normal(4, 7), zoo.normal(4, step=1)
    assert check_batch(lambda a, b: (a * b[:, None], b.exp()), [x, w]) == 0.0
    with pytest.raises(CheckFailed, match="in company"):
        check_batch(lambda a, b: (a, b - b.mean()), [x, w])


def test_likelihoods_are_checked_too():
    likelihood = GaussianLikelihood(right(), zoo.normal(5), 0.1)
    assert check_batch(likelihood.log_prob, zoo.normal(6, 7)) < 1e-12
    with pytest.raises(CheckFailed, match=r"3 draws in, shape \(\) out|1 draws in, shape \(\) out"):
        check_batch(lambda x: likelihood.log_prob(x).sum(), zoo.normal(4, 7))


def test_two_draws_are_too_few():
    with pytest.raises(InputError, match=r"check_batch needs at least 3 draws in every input; got \[2\]"):
        check_batch(right(), zoo.normal(2, 7))
    with pytest.raises(InputError, match=r"got \[4, 3\]"):
        check_batch(lambda a, b: a, [zoo.normal(4, 7), zoo.normal(3)])


# --- Copies -------------------------------------------------------------------------------------------------------------


def test_copies():
    assert check_pickle(right(), zoo.normal(3, 7)) == 0.0
    likelihood = GaussianLikelihood(right(), zoo.normal(5), 0.1)
    assert check_pickle(likelihood, zoo.normal(3, 7), call=lambda one, x: one.log_prob(x)) == 0.0


def test_what_cannot_be_copied_is_found():
    with pytest.raises(CheckFailed, match=r"Unpicklable: pickle failed \(.*"):
        check_pickle(make(Unpicklable), zoo.normal(3, 7))


def test_a_copy_that_lost_something_is_found():
    with pytest.raises(CheckFailed, match="Forgetful: a copy against the original gives 0.5"):
        check_pickle(make(Forgetful), zoo.normal(3, 7))
