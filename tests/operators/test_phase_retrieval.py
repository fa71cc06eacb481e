"""Diffraction and magnitudes against numpy's transform, symmetries on paper, and deepinv."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from recon.errors import InputError
from recon.operators import CodedDiffraction, MatrixOperator, PhaseRetrieval
from recon.space import Space
from tests import zoo

PIXEL = (2e-6, 1e-6)


def image(ny=5, nx=6) -> Space:
    return Space.grid((ny, nx), PIXEL, "1")


def pair(ny=5, nx=6) -> Space:
    grid = image(ny, nx)
    return Space(("channel", "y", "x"), (2, ny, nx), {**grid.coords, "channel": ("real", "imag")}, "1")


def masks(count=3, ny=5, nx=6) -> torch.Tensor:
    return torch.complex(*zoo.normal(2, count, ny, nx, step=5))


def numpy_far_field(wave: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Centred padding and numpy's shifts and transform."""
    wide = np.zeros((*wave.shape[:-2], *size), dtype=complex)
    first = [m // 2 - n // 2 for m, n in zip(size, wave.shape[-2:], strict=True)]
    wide[..., first[0] : first[0] + wave.shape[-2], first[1] : first[1] + wave.shape[-1]] = wave
    axes = (-2, -1)
    return np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(wide, axes), norm="ortho"), axes)


@pytest.mark.parametrize("shape", [(5, 6), (6, 5), (40, 33), (1, 4)])
@pytest.mark.parametrize("oversampling", [1.0, 1.5, 2.0])
def test_numpy(shape, oversampling):
    x, d = zoo.normal(2, *shape), masks(3, *shape)
    A = CodedDiffraction(image(*shape), d, oversampling)
    size = tuple(int(np.ceil(oversampling * n)) for n in shape)
    expected = numpy_far_field(d.numpy() * x.numpy()[:, None], size)
    assert A.range.shape == (3, *size)
    assert np.allclose(A(x).numpy(), expected, atol=1e-13)
    assert np.allclose(PhaseRetrieval(A)(x).numpy(), np.abs(expected) ** 2, atol=1e-12)
    assert np.allclose(PhaseRetrieval(A, "amplitude", 1e-9)(x).numpy(), np.abs(expected), atol=1e-8)


def test_complex_images_are_two_channels():
    z = torch.complex(*zoo.normal(2, 4, 5, 6))
    A, d = CodedDiffraction(pair(), masks(), 2), masks()
    expected = numpy_far_field((d * z[:, None]).numpy(), (10, 12))
    assert np.allclose(A(torch.stack([z.real, z.imag], 1)).numpy(), expected, atol=1e-13)


def test_without_masks_there_is_one_pattern():
    A, x = CodedDiffraction(image()), zoo.normal(5, 6, dtype=torch.float32)
    assert A.range.dims == ("ky", "kx")
    assert np.allclose(A(x).numpy(), numpy_far_field(x.numpy(), (5, 6)), atol=1e-6)


@pytest.mark.parametrize("oversampling", [1.0, 1.7, 2.0])
def test_no_energy_is_lost(oversampling):
    x, d = zoo.normal(4, 5, 6), masks()
    y = PhaseRetrieval(CodedDiffraction(image(), d, oversampling))(x)
    assert torch.allclose(y.sum((-2, -1)), (d * x[:, None]).abs().square().sum((-2, -1)), rtol=1e-12)


@pytest.mark.parametrize(("row", "column"), [(7, 2), (5, 6), (1, 9)])
def test_coordinates_are_frequencies_in_cycles_per_metre(row, column):
    """The wave ``exp(2 pi i (f_y y + f_x x))`` of the domain's metres falls on the point of the range with these numbers."""
    A = CodedDiffraction(pair(10, 12))
    ky, kx = A.range.coords["ky"], A.range.coords["kx"]
    y, x = np.meshgrid(A.domain.coords["y"], A.domain.coords["x"], indexing="ij")
    wave = torch.from_numpy(np.exp(2j * np.pi * (ky[row] * y + kx[column] * x)))
    power = A(torch.stack([wave.real, wave.imag])).abs().square()
    assert float(power[row, column] / power.sum()) == pytest.approx(1, abs=1e-10)
    assert np.abs(kx).max() == pytest.approx(1 / (2 * PIXEL[1]))  # Nyquist


def test_what_a_far_field_cannot_tell():
    """A real object, its negative, its mirror image and (surrounded by zeros) a shifted copy leave the same magnitudes."""
    x = torch.zeros(8, 9, dtype=torch.float64)
    x[2:5, 3:7] = zoo.normal(3, 4)
    far = PhaseRetrieval(CodedDiffraction(Space.grid((8, 9), 1.0, "1"), oversampling=2).double())
    y = far(x)
    for twin in (-x, x.flip(0, 1), x.roll((2, -1), (0, 1))):
        assert torch.allclose(far(twin), y, atol=1e-12)
    coded = PhaseRetrieval(CodedDiffraction(Space.grid((8, 9), 1.0, "1"), masks(2, 8, 9)))
    assert torch.allclose(coded(-x), coded(x), atol=1e-12)
    assert float((coded(x.flip(0, 1)) - coded(x)).abs().max()) > 0.1  # a mask breaks the other symmetries


# --- Closed forms -------------------------------------------------------------------------------------------------------


class NoCG:
    """A solver that must not be used."""

    def solve(self, *_):
        raise AssertionError("a closed form exists")


@pytest.mark.parametrize("space", [image(), pair()])
def test_the_normal_operator_is_diagonal(space):
    """Also across the channels: ``sum |d|^2`` is real.  ``solve`` and ``norm`` follow, to rounding."""
    d = masks()
    A = CodedDiffraction(space, d, 1.5)
    M, b = zoo.dense(A), zoo.normal(2, *space.shape)
    power = d.abs().square().sum(0).expand(space.shape)
    assert torch.allclose(M.T @ M, torch.diag(power.flatten()), atol=1e-12)
    W = torch.full(A.range.shape, 2.5, dtype=torch.float64)
    K = 2.5 * M.T @ M + 0.3 * torch.eye(M.shape[1], dtype=torch.float64)
    exact = torch.linalg.solve(K, b.flatten(1).T).T.reshape(b.shape)
    uses = []
    assert torch.allclose(A.solve(b, 0.3, W, cg=NoCG(), watch=uses.append), exact, rtol=1e-12)
    assert uses == [2]
    assert A.norm() == pytest.approx(float(torch.linalg.matrix_norm(M, 2)), rel=1e-12)
    W[0, 0, 0] = 2.0
    with pytest.raises(AssertionError, match="a closed form exists"):
        A.solve(b, 0.3, W, cg=NoCG())


def test_gradients_on_paper():
    """``2 B^T (v B x)`` of intensities; ``B^T (v B x / y)`` of amplitudes; where ``B x = 0`` the latter is 0, not NaN."""
    B = CodedDiffraction(image(), masks(), 1.5)
    x, v = zoo.normal(2, 5, 6), zoo.normal(2, *B.range.shape, step=1)
    intensity, amplitude = PhaseRetrieval(B), PhaseRetrieval(B, "amplitude", 0.2)
    assert torch.allclose(intensity.vjp(x, v), 2 * B.A_adjoint(v * B(x)), atol=1e-11)
    assert torch.allclose(amplitude.vjp(x, v), B.A_adjoint(v * B(x) / amplitude(x)), atol=1e-11)
    assert float(amplitude.vjp(0 * x, v).abs().max()) == 0.0


def test_the_smoothing_is_what_it_says():
    B = CodedDiffraction(image(), masks())
    x, s = zoo.normal(5, 6), 0.3
    A, size = PhaseRetrieval(B, "amplitude", s), B(x).abs()
    assert torch.allclose(A(0 * x), torch.tensor(s, dtype=torch.float64))
    extra = A(x) - size
    assert bool((extra > 0).all())
    assert bool((extra <= s**2 / (2 * size)).all())


def test_a_real_operator_loses_signs_alone():
    B, x = zoo.matrix(), zoo.normal(3, 7, dtype=torch.float32)
    assert torch.equal(PhaseRetrieval(B)(x), B(x) ** 2)
    assert torch.allclose(PhaseRetrieval(B, "amplitude", 1e-6)(x), B(x).abs(), atol=2e-6)


def test_units_and_ranges():
    domain = Space.grid((5, 6), PIXEL, "V")
    B = CodedDiffraction(domain, masks())
    assert B.range.complex
    assert PhaseRetrieval(B).range.describe() == "(mask=3, ky=5, kx=6) [(V)^2]"
    assert PhaseRetrieval(B, "amplitude", 1.0).range.describe() == "(mask=3, ky=5, kx=6) [V]"
    assert PhaseRetrieval(zoo.matrix()).range.unit == "1"


def test_deepinv():
    """Its magnitude and gradient of the same complex matrix."""
    import deepinv

    M = torch.complex(*zoo.normal(2, 9, 6))
    B = deepinv.physics.LinearPhysics(A=lambda x: x.to(M.dtype) @ M.T, A_adjoint=lambda y: y @ M.conj())
    theirs = deepinv.physics.PhaseRetrieval(B)
    ours, x, v = PhaseRetrieval(MatrixOperator(M)), zoo.normal(3, 6), zoo.normal(3, 9, step=1)
    assert torch.allclose(ours(x), theirs(x), atol=1e-12)
    assert torch.allclose(ours.vjp(x, v), theirs.A_vjp(x, v).real, atol=1e-12)


@pytest.mark.parametrize("shape", [(5, 6), (64, 40)])
def test_neither_threads_nor_company_change_a_bit(shape):
    A = PhaseRetrieval(CodedDiffraction(image(*shape), masks(3, *shape).to(torch.complex64), 1.5))
    x, v = zoo.normal(5, *shape, dtype=torch.float32), zoo.normal(5, *A.range.shape, dtype=torch.float32)
    before, answers = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            answers.append((A(x), A.vjp(x, v)))
    finally:
        torch.set_num_threads(before)
    alone = A(x[2:3].clone()), A.vjp(x[2:3].clone(), v[2:3].clone())
    for i in (0, 1):
        assert torch.equal(answers[0][i], answers[1][i])
        assert torch.equal(answers[0][i], answers[2][i])
        assert torch.equal(answers[0][i][2:3], alone[i])


# --- What is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: CodedDiffraction(Space.vector(5)), r'takes real images \(y, x\), or \("channel", "y", "x"\)'),
        (lambda: CodedDiffraction(Space(("channel", "y", "x"), (2, 5, 6))), r'with channels \("real", "imag"\); got'),
        (lambda: CodedDiffraction(Space(("y", "x"), (5, 6), complex=True)), "takes real images"),
        (lambda: CodedDiffraction(image(), torch.ones(6, 5)), r"masks are finite arrays.*\(5, 6\); got \(6, 5\)"),
        (lambda: CodedDiffraction(image(), torch.ones(2, 2, 5, 6)), "masks are finite arrays"),
        (lambda: CodedDiffraction(image(), torch.full((5, 6), torch.nan)), "masks are finite arrays"),
        (lambda: CodedDiffraction(image(), oversampling=0.5), "oversampling is 1 or more; got 0.5"),
        (lambda: PhaseRetrieval(zoo.darcy()), "takes the magnitude of a LinearOperator; got PDEResidual"),
        (lambda: PhaseRetrieval(zoo.matrix(), "phase"), "quantity must be one of intensity, amplitude; got 'phase'"),
        (
            lambda: PhaseRetrieval(zoo.matrix(), "amplitude"),
            "amplitudes need smoothing > 0 in the unit of B x.*got None",
        ),
        (lambda: PhaseRetrieval(zoo.matrix(), "amplitude", 0.0), "amplitudes need smoothing > 0.*got 0.0"),
        (lambda: PhaseRetrieval(zoo.matrix(), "intensity", 0.1), "smoothing is for amplitudes"),
    ],
)
def test_what_cannot_be(make, text):
    with pytest.raises(InputError, match=text):
        make()
