"""Polychromatic projections against the sum over energies, their limits on paper, and autograd."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from recon.checks import check_gradient
from recon.errors import InputError
from recon.operators import BeamHardening, MatrixOperator, ParallelBeam, Sequence, Stack
from recon.operators.beam_hardening import _Hardened, slope
from recon.space import Space
from tests import zoo

WEIGHTS, RELATIVE = [0.1, 0.4, 0.3, 0.2], [2.5, 1.4, 1.0, 0.6]


def line(n: int = 41) -> MatrixOperator:
    """The identity: the unknown is the line integral itself."""
    return MatrixOperator(torch.eye(n, dtype=torch.float64))


def hardened(p: torch.Tensor, weights=WEIGHTS, relative=RELATIVE) -> torch.Tensor:
    return BeamHardening(line(len(p)), weights, relative)(p)


def test_the_sum_over_energies():
    p = torch.linspace(-3, 12, 41, dtype=torch.float64)
    signal = sum(w * np.exp(-r * p.numpy()) for w, r in zip(WEIGHTS, RELATIVE, strict=True))
    assert np.allclose(hardened(p).numpy(), -np.log(signal), rtol=1e-13, atol=1e-14)


def test_one_energy_is_the_linear_operator_bit_for_bit():
    A, x = zoo.beam(), zoo.normal(3, 9, 8, dtype=torch.float32)
    assert torch.equal(BeamHardening(A, [1.0], [1.0])(x), A(x))
    v = zoo.normal(3, *A.range.shape, dtype=torch.float32)
    assert torch.equal(BeamHardening(A, [1.0], [1.0]).vjp(x, v), A.A_adjoint(v))
    assert torch.equal(BeamHardening(A, [0.5, 0.5], [1.0, 1.0])(x), A(x))


def test_thin_and_thick_objects():
    """``y = p sum w r`` for p to 0; ``y = p r* - log w*`` for a large p, where only the hardest part is left."""
    mean = float(np.dot(WEIGHTS, RELATIVE))
    thin = torch.tensor([-1e-7, 0.0, 1e-7], dtype=torch.float64)
    assert torch.allclose(hardened(thin), mean * thin, rtol=1e-6, atol=1e-15)
    for p, i in ((80.0, 3), (1e3, 3), (1e6, 3), (-80.0, 0), (-1e6, 0)):
        expected = RELATIVE[i] * p - math.log(WEIGHTS[i])
        assert float(hardened(torch.tensor([p], dtype=torch.float64))) == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_line_integral_overflows(dtype):
    p = torch.tensor([-1e30, -1e5, -100.0, 0.0, 100.0, 1e5, 1e30], dtype=dtype)
    A = BeamHardening(line(7).to(dtype), WEIGHTS, RELATIVE)
    assert bool(torch.isfinite(A(p)).all())
    assert bool(torch.isfinite(A.vjp(p, torch.ones_like(p))).all())


def test_the_slope_is_the_mean_attenuation_of_what_is_left():
    p = torch.linspace(-5, 30, 41, dtype=torch.float64)
    w, r = torch.tensor(WEIGHTS, dtype=torch.float64), torch.tensor(RELATIVE, dtype=torch.float64)
    share = torch.softmax(w.log() - r * p[:, None], dim=1)
    assert torch.allclose(slope(p, w, r), share @ r, rtol=1e-13)
    assert bool((slope(p, w, r).diff() < 0).all())  # the beam hardens
    assert float(slope(torch.zeros(1, dtype=torch.float64), w, r)) == pytest.approx(float(w @ r))


def test_second_derivatives():
    p = torch.tensor([-2.0, -0.1, 0.0, 0.7, 5.0], dtype=torch.float64, requires_grad=True)
    w, r = torch.tensor(WEIGHTS, dtype=torch.float64), torch.tensor(RELATIVE, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(lambda p: _Hardened.apply(p, w, r), (p,))
    (first,) = torch.autograd.grad(_Hardened.apply(p, w, r).sum(), p, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), p)
    share = torch.softmax(w.log() - r * p.detach()[:, None], dim=1)
    assert torch.allclose(second, (share @ r) ** 2 - share @ r**2, atol=1e-13)  # minus the variance


def test_energies_without_signal_are_left_out():
    p = torch.linspace(-3, 12, 41, dtype=torch.float64)
    more = hardened(p, [0.0, *WEIGHTS, 0.0], [40.0, *RELATIVE, 0.01])
    assert torch.equal(more, hardened(p))
    assert bool(torch.isfinite(more).all())


def test_cupping():
    """A disc looks less attenuating in its middle than a thin one: the artefact that gives the effect its name."""
    A = ParallelBeam.half_turn((32, 32), 1e-3, 4).double()
    y, x = np.meshgrid(A.domain.coords["y"], A.domain.coords["x"], indexing="ij")
    disc = torch.from_numpy(200.0 * (y**2 + x**2 < 0.012**2))
    ratio = BeamHardening(A, WEIGHTS, RELATIVE)(disc) / A(disc)
    ratio = ratio[0][A(disc)[0] > 0.5]
    assert float(ratio[len(ratio) // 2]) < 0.95 * float(ratio[0])


def test_it_goes_around_stacks_and_sequences():
    x = 30 * zoo.normal(2, 9, 8).abs()
    for A, at in (
        (Stack([zoo.beam(), zoo.beam("strip", 3)]).double(), x),
        (Sequence([zoo.beam()] * 2).double(), x[None]),
    ):
        B = BeamHardening(A, WEIGHTS, RELATIVE)
        assert B.range.mismatch(A.range) is None
        check_gradient(B, at)


def test_memory_does_not_grow_with_the_energies():
    """The graph of one draw keeps the line integrals, not a copy for every energy."""
    A = BeamHardening(line(1000), np.full(50, 1 / 50), np.linspace(0.5, 2, 50))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        A(torch.ones(1, 1000, dtype=torch.float64, requires_grad=True))
    assert sum(kept) < 3000


def test_threads_do_not_change_a_bit():
    A = BeamHardening(zoo.beam(), WEIGHTS, RELATIVE)
    x = 30 * zoo.normal(40, 9, 8, dtype=torch.float32)
    before, answers = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            answers.append((A(x), A.vjp(x, A(x))))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(answers[0][0], answers[1][0])
    assert torch.equal(answers[0][1], answers[1][1])


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: BeamHardening(zoo.image_matrix(), [1.0], [1.0]),
            "needs dimensionless line integrals; got MatrixOperator",
        ),
        (lambda: BeamHardening(zoo.complex_matrix(), [1.0], [1.0]), "needs dimensionless line integrals"),
        (lambda: BeamHardening(zoo.beam(), [0.5, 0.5], [1.0]), "got 2 weights and 1 attenuations"),
        (lambda: BeamHardening(zoo.beam(), [], []), "got 0 weights and 0 attenuations"),
        (lambda: BeamHardening(zoo.beam(), [1.5, -0.5], [1.0, 1.0]), "finite and not negative"),
        (lambda: BeamHardening(zoo.beam(), [0.5, 0.5], [1.0, -1.0]), "finite and not negative"),
        (lambda: BeamHardening(zoo.beam(), [0.5, 0.5], [1.0, math.inf]), "finite and not negative"),
        (lambda: BeamHardening(zoo.beam(), [0.5, math.nan], [1.0, 1.0]), "finite and not negative"),
        (lambda: BeamHardening(zoo.beam(), [2.0, 3.0], [1.0, 1.0]), "sum to 1; got 5: divide them by their sum"),
    ],
)
def test_spectra_that_are_none(make, text):
    with pytest.raises(InputError, match=text):
        make()


def test_a_space_without_unit_is_enough():
    A = BeamHardening(line(3), [1.0], [2.0])
    assert A.domain.mismatch(Space.vector(3)) is None
    assert torch.allclose(A(torch.ones(3, dtype=torch.float64)), torch.tensor(2.0, dtype=torch.float64))
