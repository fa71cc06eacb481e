"""One operator per frame: the block-diagonal matrix, each frame's own solver, dynamic tomography."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import torch

from recon.checks import check_adjoint
from recon.errors import InputError
from recon.operators import CG, LinearOperator, MatrixOperator, ParallelBeam, PhaseRetrieval, Sequence
from recon.space import Space
from tests import zoo


class NoCG:
    """A solver that must not be used."""

    def solve(self, *_):
        raise AssertionError("a closed form exists")


class Counting(MatrixOperator):
    """Notes the batch of every call."""

    def __init__(self, matrix):
        super().__init__(matrix)
        self.calls = []

    def apply(self, x):
        self.calls.append(len(x))
        return super().apply(x)


def turning(frames: int = 3, views: int = 2, projector: str = "line") -> Sequence:
    """A few views of each frame, at angles that turn on by the golden angle."""
    domain, golden = Space.grid((6, 7), 2e-3, "1/m"), math.pi * (math.sqrt(5) - 1) / 2
    turns = [np.array([(views * t + k) * golden % math.pi for k in range(views)]) for t in range(frames)]
    return Sequence([ParallelBeam(domain, one, 9, projector=projector) for one in turns], np.arange(frames) * 0.1)  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [zoo.dynamic, lambda: zoo.dynamic(False), turning, lambda: Sequence([zoo.beam()] * 3)])
def test_the_matrix_is_block_diagonal(make):
    A = make().double()
    blocks = [zoo.dense(A.frame(t)) for t in range(len(A.order))]
    assert torch.equal(zoo.dense(A), torch.block_diag(*blocks))


def test_dynamic_tomography():
    """Angles differ between frames, so they are no coordinate of the whole; each frame keeps its own."""
    A = turning()
    assert A.domain.describe() == "(time=3, y=6, x=7) [1/m]"
    assert A.range.describe() == "(time=3, angle=2, detector=9) [1]"
    assert set(A.range.coords) == {"time", "detector"}
    assert np.allclose(A.range.coords["time"], [0.0, 0.1, 0.2])
    assert np.array_equal(A.domain.coords["x"], A.frame(0).domain.coords["x"])
    assert len({A.frame(t).geometry.angles for t in range(3)}) == 3
    assert "angle" in Sequence([zoo.beam()] * 2).range.coords
    x = zoo.normal(4, 3, 6, 7, dtype=torch.float32)
    for t in range(3):
        assert torch.equal(A(x)[:, t], A.frame(t)(x[:, t]))
    check_adjoint(A)


def test_unlike_frames_are_one_vector():
    A = zoo.dynamic(same_range=False).double()
    assert A.range.describe() == "(datum=13) [1]"
    x = zoo.normal(2, 4, 3, 7)
    parts = A.split(A(x))
    assert [part.shape for part in parts] == [(2, 4, 5), (2, 4, 3), (2, 4, 5)]
    for t, part in enumerate(parts):
        assert torch.equal(part, A.frame(t)(x[:, :, t]))
    stacked = zoo.dynamic().double()
    assert torch.equal(torch.stack(stacked.split(stacked(x)), dim=2), stacked(x))


def test_units_of_unlike_frames():
    other = MatrixOperator(zoo.normal(3, 7, dtype=torch.float32), range=Space.vector(3, "K", "datum"))
    assert Sequence([zoo.matrix(), other]).range.unit == "mixed"


def test_frames_of_one_operator_are_one_batch():
    A = Counting(zoo.normal(5, 7))
    other = MatrixOperator(zoo.normal(5, 7, step=1))
    S = Sequence([A, other, A, A])
    assert len(S.operators) == 2
    x = zoo.normal(2, 4, 7)
    y = S(x)
    assert A.calls == [6]
    for t, one in enumerate((A, other, A, A)):
        assert torch.allclose(y[:, t], one(x[:, t]), atol=1e-14)
    twin = pickle.loads(pickle.dumps(S))
    assert twin.frame(0) is twin.frame(2)
    assert torch.equal(twin(x), y)


def test_complex_frames():
    A = Sequence([zoo.coded_diffraction()] * 2, [0.0, 1.0])
    assert A.range.describe() == "(time=2, mask=2, ky=6, kx=8) [1, complex]"
    assert PhaseRetrieval(A)(zoo.normal(3, 2, 4, 5, dtype=torch.float32)).shape == (3, 2, 2, 6, 8)


# --- Frame by frame -----------------------------------------------------------------------------------------------------


def exact_solution(A: LinearOperator, b: torch.Tensor, c: float, weight: torch.Tensor | None) -> torch.Tensor:
    M = zoo.dense(A)
    W = torch.eye(len(M), dtype=M.dtype) if weight is None else torch.diag(weight.flatten())
    K = M.T @ W @ M + c * torch.eye(M.shape[1], dtype=M.dtype)
    return torch.linalg.solve(K, b.flatten(1).T).T.reshape(b.shape)


@pytest.mark.parametrize("weights", [None, (2.0, 2.0, 2.0), (1.0, 2.0, 3.0)])
def test_each_frame_has_its_closed_form(weights):
    """Blurs of different kernels, with one weight, or one for each frame."""
    A = Sequence([zoo.blurred(), zoo.blurred(kernel=(2, 5)), zoo.blurred()]).double()
    b = zoo.normal(2, 3, 7, 8)
    W = None if weights is None else torch.tensor(weights, dtype=torch.float64).reshape(3, 1, 1).expand(A.range.shape)
    got = A.solve(b, 0.4, W, cg=NoCG())
    assert torch.allclose(got, exact_solution(A, b, 0.4, None if W is None else W), rtol=0, atol=1e-12)


@pytest.mark.parametrize("make", [zoo.dynamic, lambda: zoo.dynamic(False)])
def test_each_frame_has_its_weights_and_its_start(make):
    A = make().double()
    b, W = zoo.normal(2, 3, 7), 0.5 + zoo.normal(*A.range.shape, step=1).abs()
    exact = exact_solution(A, b, 1.5, W)
    assert torch.allclose(A.solve(b, 1.5, W, cg=CG(100, 1e-13)), exact, atol=1e-10)
    assert torch.equal(A.solve(b, 1.5, W, x0=exact, cg=CG(1, 1e-6)), exact)  # nothing left to do


def test_draws_do_not_wait_for_each_other():
    """Conjugate gradients stop each draw and frame by itself."""
    A = zoo.dynamic().double()
    b = zoo.normal(3, 3, 7) * torch.tensor([1.0, 1e-3, 1e3], dtype=torch.float64).reshape(-1, 1, 1)
    together = A.solve(b, 0.1, cg=CG(4, 1e-6))
    for i in range(3):
        assert torch.allclose(A.solve(b[i : i + 1], 0.1, cg=CG(4, 1e-6))[0], together[i], rtol=1e-12)


def test_uses_are_counted_for_whole_sequences():
    A = zoo.dynamic().double()
    uses = []
    A.solve(zoo.normal(4, 3, 7), 0.1, cg=CG(5, 0.0), watch=uses.append)
    assert sum(uses) == 5 * 4  # five iterations for four draws, each draw once through all three frames


def test_normal_is_each_frames_own():
    class Shortcut(MatrixOperator):
        def normal(self, x):
            return 7 * x

    A = Sequence([Shortcut(zoo.normal(5, 7))] * 2)
    x = zoo.normal(3, 4, 2, 7)
    assert torch.equal(A.normal(x), 7 * x)


def test_an_unmatched_frame_is_told():
    class Unmatched(MatrixOperator):
        matched = False

    assert Sequence([zoo.matrix(), zoo.matrix()]).matched
    assert not Sequence([zoo.matrix(), Unmatched(zoo.normal(5, 7))]).matched


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Sequence([]), "Sequence needs at least one frame"),
        (lambda: Sequence([zoo.matrix(), zoo.matrix(columns=6)]), "one common domain; frame 1 differs"),
        (lambda: Sequence([zoo.beam(), zoo.shifted_beam()]), "one common domain; frame 1 differs"),
        (
            lambda: Sequence([zoo.matrix(), zoo.darcy()]),
            r"frame 1 is a PDEResidual \(a nonlinear measurement goes around",
        ),
        (lambda: Sequence([zoo.matrix()] * 2, [0.0]), "times are 2 growing numbers of seconds"),
        (lambda: Sequence([zoo.matrix()] * 2, [1.0, 1.0]), "times are 2 growing numbers of seconds"),
        (lambda: Sequence([zoo.matrix()] * 2, [0.0, math.nan]), "times are 2 growing numbers of seconds"),
        (lambda: Sequence([zoo.matrix(), zoo.complex_matrix()]), "cannot join real and complex data"),
    ],
)
def test_what_cannot_be(make, text):
    with pytest.raises(InputError, match=text):
        make()
