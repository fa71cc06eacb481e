"""Bridges to deepinv and scipy: the same numbers on both sides, their solvers on our operators, their operators in ours."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import warnings

import deepinv
import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from scipy.sparse import linalg as sparse

import recon.operators.deepinv_bridge as bridge
from recon.baselines.least_squares import cgls
from recon.checks import check_adjoint, check_gradient
from recon.errors import InputError
from recon.likelihoods import PoissonLikelihood
from recon.operators import (
    CG,
    LinearOperator,
    MatrixOperator,
    Operator,
    PhaseRetrieval,
    Stack,
    from_deepinv,
    from_scipy,
)
from recon.operators.deepinv_operator import DeepinvLinearOperator, DeepinvOperator, image_shape
from recon.space import Space
from tests import zoo

physics = deepinv.physics

NAMED = ["parallel_beam_line", "matrix", "matrix_of_images", "blur_volume", "stack", "coded_diffraction_channels"]


def images(space: Space, n: int = 3, step: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    kind = dtype.to_complex() if space.complex else dtype
    return zoo.normal(n, *space.shape, step=step, dtype=kind)


def laid(values: torch.Tensor, space: Space) -> torch.Tensor:
    return values.reshape(-1, *image_shape(space))


# --- Operators as deepinv physics ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dims", "shape", "expected"),
    [
        (("y", "x"), (4, 5), (1, 4, 5)),
        (("z", "y", "x"), (3, 4, 5), (1, 3, 4, 5)),
        (("channel", "y", "x"), (2, 4, 5), (2, 4, 5)),
        (("variable", "lat", "lon"), (2, 4, 5), (2, 4, 5)),
        (("variable", "level", "lat", "lon"), (2, 3, 4, 5), (2, 3, 4, 5)),
        (("level", "lat", "lon"), (3, 4, 5), (1, 3, 4, 5)),
        (("component",), (7,), (1, 1, 7)),
        (("channel", "x"), (2, 7), (2, 1, 7)),
    ],
)
def test_the_layout_of_arrays(dims, shape, expected):
    assert image_shape(Space(dims, shape)) == expected


@pytest.mark.parametrize("name", list(zoo.OPERATORS))
def test_a_physics_computes_what_the_operator_does(name):
    A = zoo.OPERATORS[name]().double()
    theirs = A.as_deepinv()
    x = images(A.domain)
    assert theirs.img_size == image_shape(A.domain)
    assert isinstance(theirs, physics.LinearPhysics) is isinstance(A, LinearOperator)
    y = theirs.A(laid(x, A.domain))
    assert y.is_complex() == A.range.complex
    assert torch.equal(y, laid(A.A(x), A.range))
    assert torch.equal(theirs(laid(x, A.domain)), y)
    v = images(A.range, step=1)
    back = theirs.A_vjp(laid(x, A.domain), laid(v, A.range))
    assert torch.equal(back, laid(A.vjp(x, v), A.domain))
    if isinstance(A, LinearOperator):
        assert torch.equal(theirs.A_adjoint(laid(v, A.range)), laid(A.A_adjoint(v), A.domain))
        assert torch.equal(theirs.A_adjoint_A(laid(x, A.domain)), laid(A.normal(x), A.domain))


@pytest.mark.parametrize("name", [name for name in NAMED if not name.startswith("coded")])
def test_deepinvs_own_adjoint_test(name):
    theirs = zoo.OPERATORS[name]().double().as_deepinv()
    assert float(theirs.adjointness_test(dtype=torch.float64, num_samples=3)) < 1e-12


def test_deepinvs_own_adjoint_test_between_complex_arrays():
    theirs = zoo.scipy_matrix(complex_=True, images=True).double().as_deepinv()
    assert float(theirs.adjointness_test(dtype=torch.complex128, num_samples=3)) < 1e-12


@pytest.mark.parametrize("solver", ["CG", "lsqr"])
@pytest.mark.parametrize("name", NAMED)
def test_deepinvs_solvers_find_what_ours_do(name, solver):
    """``argmin gamma/2 |A x - y|^2 + 1/2 |x - z|^2`` solves ``(A^T A + I/gamma) x = A^T y + z/gamma``."""
    A = zoo.OPERATORS[name]().double()
    theirs = A.as_deepinv()
    y, z, gamma = images(A.range), images(A.domain, step=1), 3.0 / A.norm() ** 2
    more = {"eps": 0.0} if solver == "CG" else {}
    found = theirs.prox_l2(laid(z, A.domain), laid(y, A.range), gamma, solver, max_iter=200, tol=1e-12, **more)
    ours = A.solve(A.A_adjoint(y) + z / gamma, 1 / gamma, cg=CG(200, 1e-13))
    torch.testing.assert_close(found, laid(ours, A.domain), rtol=0, atol=1e-9 * float(ours.abs().max()))


def test_deepinvs_pseudo_inverse_is_least_squares():
    """Tikhonov with 1e-8: off by that over the smallest squared singular value, relative."""
    A = zoo.matrix(9, 4).double()
    y = images(A.range)
    found = A.as_deepinv().A_dagger(laid(y, A.range), max_iter=200, tol=1e-12, eps=0.0)
    exact = torch.linalg.lstsq(A.matrix, y.T).solution.T
    smallest = float(torch.linalg.svdvals(A.matrix)[-1])
    assert float((found.flatten(1) - exact).norm() / exact.norm()) < 2e-8 / smallest**2 + 1e-9
    torch.testing.assert_close(cgls(A, y, 30), exact, rtol=1e-9, atol=1e-9)


def test_deepinvs_norm_is_ours():
    A = zoo.beam().double()
    ours = A.norm(200)
    theirs = A.as_deepinv().compute_sqnorm(
        torch.zeros(1, 1, 9, 8, dtype=torch.float64), tol=1e-12, verbose=False, max_iter=500
    )
    assert float(theirs.sqrt()) == pytest.approx(ours, rel=1e-6)


def test_gradients_go_through():
    A = zoo.beam().double()
    theirs, x = A.as_deepinv(), laid(images(A.domain), A.domain).requires_grad_()
    (gradient,) = torch.autograd.grad(theirs.A(x).square().sum(), x)
    torch.testing.assert_close(gradient[:, 0], 2 * A.normal(x.detach()[:, 0]))
    values, pullback = torch.func.vjp(theirs.A, x.detach())
    torch.testing.assert_close(pullback(values)[0], theirs.A_adjoint(values))
    # Implicit differentiation of a solve: d|x|^2/2 / dz = (A^T A + I/gamma)^-1 x / gamma.
    z = images(A.domain, step=1)[:, None].requires_grad_()
    y, gamma = laid(images(A.range), A.range), 2.0 / A.norm() ** 2
    found = theirs.prox_l2(z, y, gamma, max_iter=300, tol=1e-12, eps=0.0)
    (gradient,) = torch.autograd.grad(0.5 * found.square().sum(), z)
    expected = A.solve(found.detach()[:, 0], 1 / gamma, cg=CG(300, 1e-13)) / gamma
    torch.testing.assert_close(gradient[:, 0], expected, rtol=1e-7, atol=1e-9)


def test_each_physics_has_a_noise_model_of_its_own():
    one, other = zoo.matrix().as_deepinv(), zoo.matrix().as_deepinv()
    assert one.noise_model is not other.noise_model
    one.noise_model = physics.GaussianNoise(0.1, rng=torch.Generator().manual_seed(0))
    x = laid(images(zoo.matrix().domain, dtype=torch.float32), zoo.matrix().domain)
    assert torch.equal(other(x), other.A(x))
    assert not torch.equal(one(x), one.A(x))
    one.update(sigma=0.0)
    assert torch.equal(one(x), one.A(x))


def test_nothing_given_to_a_call_stays():
    theirs = zoo.matrix().as_deepinv()
    x = laid(images(zoo.matrix().domain, dtype=torch.float32), zoo.matrix().domain)
    with pytest.raises(TypeError, match="unexpected keyword"):
        theirs.A(x, matrix=torch.zeros(5, 7))
    with pytest.raises(TypeError, match="unexpected keyword"):
        theirs.A_adjoint(theirs.A(x), matrix=torch.zeros(5, 7))


def test_the_operator_moves_with_its_physics():
    A = zoo.beam()
    theirs = A.as_deepinv().double()
    assert A.dtype == torch.float64
    assert {b.dtype for b in theirs.operator.buffers() if b.is_floating_point()} == {torch.float64}
    theirs.to(torch.float32)
    assert theirs.A(torch.ones(1, 1, 9, 8)).dtype == torch.float32


@pytest.mark.parametrize("name", ["parallel_beam_line", "coded_diffraction", "phase_retrieval"])
def test_physics_copy_and_pickle(name):
    A = zoo.OPERATORS[name]()
    theirs, x = A.as_deepinv(), laid(images(A.domain, dtype=torch.float32), A.domain)
    for twin in (pickle.loads(pickle.dumps(theirs)), copy.deepcopy(theirs), theirs.clone()):
        assert type(twin) is type(theirs)
        assert twin.operator is not A
        assert torch.equal(twin.A(x), theirs.A(x))


def test_the_classes_are_found_by_name_and_no_others():
    assert issubclass(bridge.LinearOperatorPhysics, physics.LinearPhysics)
    assert not issubclass(bridge.OperatorPhysics, physics.LinearPhysics)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        bridge.Nothing  # noqa: B018


def test_arrays_of_another_layout_are_refused():
    theirs = zoo.beam().as_deepinv()
    for shape in ((9, 8), (2, 9, 8), (2, 1, 8, 9), (2, 2, 9, 8)):
        with pytest.raises(InputError, match=r"\(y=9, x=8\) \[1/m\] is laid out as \(batch, 1, 9, 8\); got"):
            theirs.A(torch.zeros(shape))


def test_composition_and_stacking_in_deepinv():
    A, B = zoo.blurred().double(), zoo.blurred(kernel=(2, 2)).double()
    x = images(A.domain)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deepinv says that attributes of composed physics are not kept
        product = B.as_deepinv() * A.as_deepinv()
    torch.testing.assert_close(product.A(x[:, None])[:, 0], B.A(A.A(x)))
    both = A.as_deepinv().stack(B.as_deepinv())
    assert torch.equal(both.A(x[:, None])[1][:, 0], B.A(x))


def test_the_poisson_law_is_deepinvs_where_theirs_holds():
    """One image at a time, values only: ``-log p`` up to a constant, deepinv's gain being one over ours."""
    A, gain, background = zoo.positive(6), 0.5, 0.3
    counts = zoo.numbers(0, 3, 1, 0, 2, 5)
    like = PoissonLikelihood(A, counts, 1 / gain, background)
    x = zoo.object_of(like, 4)
    distance = deepinv.optim.PoissonLikelihood(gain=gain, bkg=background, denormalize=False)
    theirs = torch.cat([distance.d(A.A(one[None]), counts[None]) for one in x])
    ours = -like.log_prob(x)
    torch.testing.assert_close(theirs - theirs[0], ours - ours[0])


# --- deepinv physics as operators ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(zoo.OPERATORS))
def test_there_and_back_again(name):
    A = zoo.OPERATORS[name]()
    B = from_deepinv(A.as_deepinv())
    assert A.domain.mismatch(B.domain) is None
    assert A.range.mismatch(B.range) is None
    assert isinstance(B, LinearOperator) is isinstance(A, LinearOperator)
    x, v = images(A.domain, dtype=torch.float32), images(A.range, step=1, dtype=torch.float32)
    assert torch.equal(B.A(x), A.A(x))
    assert torch.equal(B.vjp(x, v), A.vjp(x, v))
    if isinstance(B, LinearOperator):
        assert B.matched
        assert torch.equal(B.A_adjoint(v), A.A_adjoint(v))


def blur() -> physics.Blur:
    return physics.Blur(filter=zoo.normal(1, 1, 3, 4, step=21, dtype=torch.float32), padding="circular")


def test_spaces_come_from_the_physics_or_the_caller():
    mask = torch.ones(3, 4, 5)
    plain = from_deepinv(physics.Inpainting(img_size=(3, 4, 5), mask=mask), unit="K")
    assert plain.domain.describe() == plain.range.describe() == "(channel=3, y=4, x=5) [K]"
    grey = from_deepinv(physics.CompressedSensing(m=7, img_size=(1, 4, 5)))
    assert (grey.domain.dims, grey.range.describe()) == (("y", "x"), "(datum=7) [1]")
    volume = from_deepinv(physics.Inpainting(img_size=(1, 2, 4, 5), mask=torch.ones(1, 2, 4, 5)))
    assert volume.domain.dims == ("z", "y", "x")
    grid, image = Space.grid((4, 5), 0.1, "K"), Space(("y", "x"), (2, 2), {}, "K")
    half = physics.Downsampling(img_size=(1, 4, 4), factor=2, filter=None)
    named = from_deepinv(half, Space.grid((4, 4), 0.1, "K"), range=image)
    assert named.range is image
    assert from_deepinv(half, named.domain).range.describe() == "(axis0=2, axis1=2) [1]"
    blurred = from_deepinv(blur(), grid)
    assert blurred.domain is blurred.range is grid


def test_what_a_physics_takes_counts_more_than_what_it_declares():
    assert from_deepinv(Single(img_size=SIZE), Space(("y",), (3,))).domain.shape == (3,)


def test_a_foreign_operator_keeps_every_promise_in_double_precision():
    angles = torch.linspace(0, 150, 6)
    tomography = physics.Tomography(angles=angles, img_width=8, normalize=False, circle=False)
    A = from_deepinv(tomography, Space.grid((8, 8), 1e-3, "1/m"))
    assert A.matched and A.adjoint_error < 1e-6 and not A.one_by_one
    assert A.range.size == tomography.A(torch.zeros(1, 1, 8, 8)).numel()
    x = images(A.domain, dtype=torch.float32)
    torch.testing.assert_close(A.A(x).flatten(1), tomography.A(x[:, None]).flatten(1))
    check_gradient(A)


def coil_maps() -> physics.MultiCoilMRI:
    maps = torch.complex(zoo.normal(1, 3, 4, 6, step=1), zoo.normal(1, 3, 4, 6, step=2)).to(torch.complex64)
    return physics.MultiCoilMRI(coil_maps=maps, mask=(zoo.normal(4, 6, step=3) > 0).float())


def test_conversions_keep_the_imaginary_part_of_foreign_numbers():
    domain = Space(("channel", "y", "x"), (2, 4, 6), {"channel": ("real", "imag")})
    mri = coil_maps()
    A = from_deepinv(mri, domain)
    before = A.A(images(domain, dtype=torch.float32))
    assert A.matched and check_adjoint(A) < 1e-6
    for convert in (lambda: A.double(), lambda: A.to(torch.float64)):
        convert()
        assert mri.coil_maps.dtype == torch.complex128
        assert A.dtype == torch.float64
        torch.testing.assert_close(A.A(images(domain)).float(), before, rtol=1e-5, atol=1e-5)
        assert check_adjoint(A) < 1e-12
        A.float()


class Mixing(physics.LinearPhysics):
    """Takes several images and mixes them: only one at a time is a fixed map."""

    def A(self, x, **kwargs):
        return 2 * x + x.mean(0, keepdim=True)

    def A_adjoint(self, y, **kwargs):
        return self.A(y)


class Single(physics.LinearPhysics):
    """Takes one image at a time and says so."""

    def A(self, x, **kwargs):
        assert len(x) == 1
        return x.flip(-1) * 2

    def A_adjoint(self, y, **kwargs):
        return self.A(y)


class Bare(physics.LinearPhysics):
    """No transpose of its own, complex data."""

    def A(self, x, **kwargs):
        return torch.fft.fft2(x) + 0.5 * x.roll(1, -1)


class Unmatched(physics.LinearPhysics):
    def A(self, x, **kwargs):
        return x.roll(1, -1)

    def A_adjoint(self, y, **kwargs):
        return 1.001 * y.roll(-1, -1)


class ComplexTranspose(physics.LinearPhysics):
    """``A^H y`` as it is, though its images are real."""

    def A(self, x, **kwargs):
        return torch.fft.fft2(x, norm="ortho")

    def A_adjoint(self, y, **kwargs):
        return torch.fft.ifft2(y, norm="ortho")


class Same(physics.LinearPhysics):
    def A(self, x, **kwargs):
        return x

    def A_adjoint(self, y, **kwargs):
        return y


class NoWayBack(physics.LinearPhysics):
    def A(self, x, **kwargs):
        return x

    def A_adjoint(self, y, **kwargs):
        return y * (1 / 0)


SIZE = (1, 3, 4)


@pytest.mark.parametrize("kind", [Mixing, Single])
def test_draws_never_meet_in_a_foreign_operator(kind):
    A = from_deepinv(kind(img_size=SIZE))
    assert A.one_by_one and A.matched
    x = images(A.domain, 4, dtype=torch.float32)
    alone = torch.cat([A.A(one[None]) for one in x])
    assert torch.equal(A.A(x), alone)
    assert A.A(x[:0]).shape == (0, 3, 4)
    nonlinear = physics.Physics(A=lambda x: (2 * x + x.mean(0, keepdim=True)) ** 2)
    B = from_deepinv(nonlinear, A.domain)
    assert isinstance(B, DeepinvOperator) and B.one_by_one
    assert torch.equal(B.A(x), torch.cat([B.A(one[None]) for one in x]))
    check_gradient(B.double())


@pytest.mark.parametrize("kind", [Bare, ComplexTranspose])
def test_transposes_that_deepinv_has_not_or_has_as_complex_numbers(kind):
    A = from_deepinv(kind(img_size=SIZE))
    assert isinstance(A, DeepinvLinearOperator)
    assert A.range.complex and A.matched and A.automatic is (kind is Bare)
    assert check_adjoint(A.double()) < 1e-13
    check_gradient(A)


def test_a_transpose_that_is_none_is_declared():
    A = from_deepinv(Unmatched(img_size=SIZE))
    assert not A.matched
    assert 1e-5 < A.adjoint_error < 1e-3
    assert not Stack([A, A]).matched  # and told by whatever is built on it
    assert from_deepinv(blur(), Space.grid((5, 6), 0.5, "K")).matched


def test_the_floating_type_is_that_of_the_numbers():
    """deepinv's place holder, float32 and first, says nothing."""
    double = blur()
    double.filter = double.filter.double()
    A = from_deepinv(double, Space.grid((5, 6), 0.5, "K"))
    assert A.dtype == torch.float64
    assert A.matched and A.adjoint_error < 1e-13


@pytest.mark.parametrize("kind", [physics.Physics, physics.LinearPhysics])
def test_a_physics_that_hands_back_its_argument_gets_a_copy(kind):
    A = from_deepinv(kind(A=lambda x: x), PLANE) if kind is physics.Physics else from_deepinv(Same(img_size=SIZE))
    x = images(PLANE, dtype=torch.float32)
    kept = x.clone()
    A.A(x).add_(1)
    assert torch.equal(x, kept)


def test_noise_and_sensor_are_left_out_and_need_not_copy():
    noisy = blur()
    noisy.noise_model = physics.GaussianNoise(5.0, rng=torch.Generator().manual_seed(0))
    noisy.sensor_model = lambda y: y.clamp(max=0)
    A = from_deepinv(noisy, Space.grid((5, 6), 0.5, "K"))
    x = images(A.domain, dtype=torch.float32)
    expected = noisy.A(x[:, None])[:, 0]
    assert torch.equal(A.A(x), expected)
    for twin in (pickle.loads(pickle.dumps(A)), copy.deepcopy(A)):
        assert torch.equal(twin.A(x), expected)
    assert type(noisy.noise_model) is physics.GaussianNoise  # the physics itself is left as it was
    assert not torch.equal(noisy(x[:, None]), noisy.A(x[:, None]))


def test_a_sensor_inside_a_physics_is_part_of_its_map():
    inner = blur()
    inner.sensor_model = torch.nn.Threshold(0.3, 0.0)
    A = from_deepinv(physics.PhaseRetrieval(inner), Space.grid((5, 6), 0.5, "1"))
    x = images(A.domain, dtype=torch.float32)
    assert torch.equal(pickle.loads(pickle.dumps(A)).A(x), A.A(x))
    inner.sensor_model = torch.nn.Identity()
    assert not torch.equal(pickle.loads(pickle.dumps(A)).A(x), torch.zeros(3, 5, 6))


def test_a_stack_of_physics_is_a_stack_of_operators():
    first, second = (
        physics.Inpainting(img_size=(1, 4, 4), mask=torch.eye(4)[None]),
        physics.Downsampling(img_size=(1, 4, 4), factor=2, filter=None),
    )
    A = from_deepinv(first.stack(second), Space.grid((4, 4), 0.5, "K"))
    assert isinstance(A, Stack) and A.matched
    x = images(A.domain, dtype=torch.float32)
    y = first.stack(second).A(x[:, None])
    torch.testing.assert_close(A.A(x), torch.cat([part.flatten(1) for part in y], dim=1))
    check_adjoint(A)


class Moving(physics.Physics):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def A(self, x, **kwargs):
        self.calls += 1
        return self.calls * x


PLANE = Space(("y", "x"), (3, 4))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: from_deepinv(torch.nn.Identity()), "takes a deepinv.physics.Physics; got Identity"),
        (lambda: from_deepinv(blur()), r"Blur does not say its image size .*pass domain"),
        (
            lambda: from_deepinv(physics.CompressedSensing(7, (1, 3, 4)), Space(("y", "x"), (4, 4))),
            r"cannot take images \(1, 1, 4, 4\)",
        ),
        (lambda: from_deepinv(physics.Physics(A=lambda x: [x, x]), PLANE), "one tensor .*; got list"),
        (lambda: from_deepinv(physics.Physics(A=lambda x: x.sum()), PLANE), r"one tensor .*; got \(\)"),
        (lambda: from_deepinv(Moving(), PLANE), "answers the same image differently when asked twice"),
        (
            lambda: from_deepinv(physics.Physics(A=lambda x: x + torch.rand(1)), PLANE),
            "answers the same image differently",
        ),
        (
            lambda: from_deepinv(Bare(img_size=SIZE), range=PLANE),
            r"measures complex arrays \(1, 3, 4\); \(y=3, x=4\) \[1\] does not",
        ),
        (lambda: from_deepinv(NoWayBack(img_size=SIZE)), r"failed on \(3, 3, 4\) \(ZeroDivisionError"),
        (lambda: from_deepinv(blur(), PLANE, range=Space.vector(7)), "measures real arrays .* does not fit"),
        (lambda: from_deepinv(physics.Physics().stack(physics.Physics()), PLANE), "a stack of nonlinear physics"),
        (lambda: from_deepinv(blur().stack(blur()), PLANE, range=PLANE), "leave range out"),
        # A mask that broadcasts: it makes four images of one.
        (
            lambda: from_deepinv(
                physics.Inpainting(img_size=(1, 3, 4), mask=torch.ones(1, 3, 4)), Space(("y", "x"), (1, 4))
            ),
            "which is not",
        ),
    ],
)
def test_refusals_of_physics(make, text):
    with pytest.raises(InputError, match=text):
        make()


# --- scipy --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(zoo.OPERATORS))
def test_a_scipy_operator_is_the_matrix(name):
    A = zoo.OPERATORS[name]().double()
    if not isinstance(A, LinearOperator):
        assert not hasattr(A, "as_scipy")
        return
    if A.domain.complex and not A.range.complex:
        with pytest.raises(InputError, match=r"takes the real part .*A\.H\.as_scipy\(\)\.H"):
            A.as_scipy()
        assert A.H.as_scipy().H.shape == (A.range.size, A.domain.size)
        return
    S = A.as_scipy()
    unit = torch.eye(A.domain.size, dtype=torch.complex128 if A.domain.complex else torch.float64)
    M = A.A(unit.reshape(-1, *A.domain.shape)).flatten(1).T.numpy()
    assert S.shape == M.shape == (A.range.size, A.domain.size)
    assert S.dtype == M.dtype
    rng = np.random.default_rng(0)
    for cast in (
        lambda a: a,
        lambda a: a + 1j * rng.normal(size=a.shape),
    ):  # scipy's vectors may be complex for any matrix
        x, y = cast(rng.normal(size=(M.shape[1], 3))), cast(rng.normal(size=(M.shape[0], 3)))
        for got, expected in (
            (S.matmat(x), M @ x),
            (S.rmatmat(y), M.conj().T @ y),
            (S.matvec(x[:, 0]), M @ x[:, 0]),
            (S.rmatvec(y[:, 0]), M.conj().T @ y[:, 0]),
            (S.H @ y, M.conj().T @ y),
            ((S.H @ S) @ x, M.conj().T @ (M @ x)),
        ):
            assert got.shape == expected.shape
            assert np.abs(got - expected).max() <= 1e-12 * max(1e-300, np.abs(expected).max())


def test_single_precision_and_batches():
    A = zoo.beam()
    S, calls = A.as_scipy(), []
    assert S.dtype == np.float32
    run = A.apply
    A.apply = lambda x: calls.append(len(x)) or run(x)
    assert S.matmat(np.ones((72, 5))).dtype == np.float32
    assert S.matvec(np.ones(72, dtype=np.int64)).shape == (65,)
    assert calls == [5, 1]


@pytest.mark.parametrize("name", ["parallel_beam_line", "matrix_of_images", "point_sensors"])
def test_scipys_solvers_find_what_ours_do(name):
    A = zoo.OPERATORS[name]().double()
    y, S, damp = images(A.range, 1), A.as_scipy(), 0.3 * A.norm()
    found = sparse.lsqr(S, y.flatten().numpy(), damp=damp, atol=1e-14, btol=1e-14, iter_lim=2000)[0]
    ours = A.solve(A.A_adjoint(y), damp**2, cg=CG(2000, 1e-14))
    torch.testing.assert_close(torch.from_numpy(found), ours.flatten(), rtol=0, atol=1e-10 * float(ours.abs().max()))
    # Undamped and stopped after the same iterations, from zero: lsqr and cgls are the same in exact arithmetic.
    for iterations in (1, 3, 6):
        found = sparse.lsqr(S, y.flatten().numpy(), atol=0, btol=0, conlim=0, iter_lim=iterations)[0]
        torch.testing.assert_close(
            torch.from_numpy(found), cgls(A, y, iterations).flatten(), rtol=1e-9, atol=1e-9 * float(np.abs(found).max())
        )


def test_scipys_largest_singular_value_is_our_norm():
    A = zoo.beam().double()
    assert float(sparse.svds(A.as_scipy(), k=1, return_singular_vectors=False)[0]) == pytest.approx(
        A.norm(200), rel=1e-8
    )


def test_a_map_that_is_linear_over_the_reals_only_is_refused():
    A = zoo.complex_matrix().double()
    with pytest.raises(InputError, match=r"linear over real numbers only: A\(i x\) differs"):
        (A @ A.H).as_scipy()


@pytest.mark.parametrize("name", ["parallel_beam_line", "matrix_complex", "scipy_complex_both"])
def test_there_and_back_again_with_scipy(name):
    A = zoo.OPERATORS[name]().double()
    B = from_scipy(A.as_scipy(), A.domain, A.range).double()
    x, y = images(A.domain), images(A.range, step=1)
    assert B.matched
    torch.testing.assert_close(B.A(x), A.A(x), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(B.A_adjoint(y), A.A_adjoint(y), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("cast", [lambda M: M, csr_matrix, sparse.aslinearoperator])
@pytest.mark.parametrize("kind", [np.float64, np.float32, np.complex128, np.int64])
def test_anything_scipy_multiplies_with_is_taken(cast, kind):
    M = (10 * zoo.normal(5, 6).numpy()).astype(kind)
    M = M + 1j * zoo.normal(5, 6, step=1).numpy() if kind is np.complex128 else M
    domain, range_ = Space(("y", "x"), (3, 2)), Space(("datum",), (5,), complex=kind is np.complex128)
    A = from_scipy(cast(M), domain, range_)
    reference = MatrixOperator(torch.from_numpy(M.astype(np.result_type(kind, np.float64))), domain, range_)
    assert A.matched and A.dtype == torch.float32
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-14)):
        x, y = images(domain, dtype=dtype), images(range_, step=1, dtype=dtype)
        assert A.A(x).real.dtype == dtype
        expected = reference.A(images(domain))
        scale = float(expected.abs().max())
        assert float((A.A(x) - expected.to(A.A(x).dtype)).abs().max()) <= 3 * tolerance * scale
        back = reference.A_adjoint(images(range_, step=1))
        assert float((A.A_adjoint(y) - back.to(dtype)).abs().max()) <= 3 * tolerance * float(back.abs().max())
    x = images(domain)
    torch.testing.assert_close(A.A(x), torch.cat([A.A(one[None]) for one in x]), rtol=1e-14, atol=1e-14)


def test_real_numbers_act_on_both_parts_of_complex_arrays():
    M = zoo.normal(5, 6)
    A = from_scipy(M.numpy(), Space.vector(6), Space(("datum",), (5,)))
    spaces = (Space(("k",), (6,), complex=True), Space(("datum",), (5,), complex=True))
    B = from_scipy(M.numpy(), *spaces)
    x = images(spaces[0])
    torch.testing.assert_close(B.A(x), torch.complex(A.A(x.real), A.A(x.imag)))
    assert check_adjoint(B.double()) < 1e-14


def test_a_wrong_transpose_is_declared_and_a_missing_one_refused():
    M = zoo.normal(5, 6).numpy()
    wrong = sparse.LinearOperator((5, 6), lambda x: M @ x, lambda y: 1.001 * (M.T @ y), dtype=np.float64)
    A = from_scipy(wrong, Space.vector(6), Space.vector(5))
    assert not A.matched and 1e-5 < A.adjoint_error < 1e-2
    none = sparse.LinearOperator((5, 6), lambda x: M @ x, dtype=np.float64)
    with pytest.raises(InputError, match=r"has no transpose \(.*\): give it rmatvec"):
        from_scipy(none, Space.vector(6), Space.vector(5))


@pytest.mark.parametrize(
    ("M", "domain", "range_", "text"),
    [
        (np.ones((5, 6)), Space.vector(5), Space.vector(6), r"a linear operator \(5, 6\) does not map"),
        (
            np.ones((5, 6)) * 1j,
            Space.vector(6),
            Space.vector(5),
            "a linear operator of complex128 numbers does not map",
        ),
        (np.ones((5, 6)), Space.vector(6), Space(("datum",), (5,), complex=True), "of float64 numbers does not map"),
    ],
)
def test_refusals_of_scipy_operators(M, domain, range_, text):
    with pytest.raises(InputError, match=text):
        from_scipy(M, domain, range_)


# --- Imports ------------------------------------------------------------------------------------------------------------


def test_nothing_is_imported_before_it_is_needed():
    code = (
        "import sys, recon.operators, recon.likelihoods; print('deepinv' in sys.modules, 'torchvision' in sys.modules); "
        "sys.modules['deepinv'] = None\n"
        "from recon.errors import InputError\n"
        "import torch\n"
        "try: recon.operators.MatrixOperator(torch.eye(2)).as_deepinv()\n"
        "except InputError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert first == "False False"
    assert "needs the Python package 'deepinv'" in second and "recon[networks]" in second


def test_the_methods_are_on_the_operators():
    assert hasattr(Operator, "as_deepinv") and hasattr(LinearOperator, "as_scipy") and not hasattr(Operator, "as_scipy")
    assert isinstance(PhaseRetrieval(zoo.matrix()).as_deepinv(), physics.Physics)
