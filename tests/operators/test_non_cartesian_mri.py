"""Sums along trajectories against the formula, the Cartesian operator and another implementation."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from recon.checks import check_adjoint, check_normal
from recon.errors import InputError
from recon.operators import CartesianMRI, NonCartesianMRI, complex_grid
from recon.operators import coil_images as pieces
from recon.operators import non_cartesian_mri as module
from recon.operators.fourier import to_channels, to_complex
from recon.operators.nufft import Nufft
from recon.operators.toeplitz import Toeplitz
from recon.operators.trajectories import GOLDEN, density, radial, radial_density, spiral, stack
from recon.space import Space
from tests import zoo

GRIDS = [(8, 6), (7, 5), (9, 4), (4, 3, 6)]


def points(grid, shape=(3, 11), step=30) -> np.ndarray:
    """Anywhere in k-space, the far corners included."""
    k = (zoo.Draws(1, [0]).uniform(step, (*shape, len(grid)), "user")[0].numpy() - 0.5) * np.array(grid)
    k.reshape(-1, len(grid))[:2] = np.array(grid) / 2, -np.array(grid) / 2
    return k


def sums(k: np.ndarray, grid) -> torch.Tensor:
    """The matrix of the formula: (samples, pixels)."""
    axes = np.meshgrid(*(np.arange(n) - n // 2 for n in grid), indexing="ij")
    phase = sum(np.outer(k.reshape(-1, len(grid))[:, a], axis.ravel() / grid[a]) for a, axis in enumerate(axes))
    return torch.from_numpy(np.exp(-2j * math.pi * phase) / math.sqrt(math.prod(grid)))


def error(a, b) -> float:
    return float((torch.as_tensor(a) - torch.as_tensor(b)).norm() / torch.as_tensor(b).norm())


# --- The formula --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("coils", [None, 3])
def test_it_is_the_sum_over_pixels(grid, real, coils):
    k = points(grid)
    maps = None if coils is None else zoo.coil_maps(coils, *grid, dtype=torch.float64)
    phase = torch.polar(torch.ones(grid).double(), zoo.normal(*grid, step=1)) if real else None
    domain = Space.grid(grid, 1e-3, "K") if real else complex_grid(grid, 1e-3, "K")
    A = NonCartesianMRI(domain, k, maps, phase).double()
    x = zoo.normal(*domain.shape, step=3)
    image = x * phase if real else to_complex(x, len(grid))
    seen = (image[None] if maps is None else maps * image).flatten(1)
    expected = (seen @ sums(k, grid).T).reshape(-1, 3, 11)
    assert (A.range.dims, A.range.shape, A.range.unit) == (("coil", "readout", "sample"), (coils or 1, 3, 11), "K")
    assert error(A(x), expected) < 1e-11  # the accuracy asked of the library is 1e-13, at the worst sample
    # Single precision: the points of up to pi rad are rounded by 2^-24, so phases up to N/2 pi by N/2 pi 2^-24 per axis.
    rounding = sum(n / 2 * math.pi * 2**-24 for n in grid)
    assert error(A.float()(x.float()), expected) < rounding + 3e-6


@pytest.mark.parametrize("grid", GRIDS)
def test_on_the_grid_it_is_the_cartesian_operator(grid):
    axes = np.meshgrid(*(np.arange(n) - n // 2 for n in grid), indexing="ij")
    k = np.stack(axes, -1).reshape(-1, len(grid))
    maps = zoo.coil_maps(2, *grid, dtype=torch.float64)
    A, C = NonCartesianMRI(complex_grid(grid), k, maps), CartesianMRI(complex_grid(grid), maps)
    x, y = zoo.normal(2, *A.domain.shape), zoo.normal(2, *C.range.shape, dtype=torch.complex128)
    assert A.range.dims == ("coil", "sample")
    assert error(A(x), C(x).flatten(2)) < 1e-11
    assert error(A.A_adjoint(y.flatten(2)), C.A_adjoint(y)) < 1e-11
    assert error(A.normal(x), C.normal(x)) < 1e-11


def test_sigpy_computes_the_same():
    pytest.importorskip("sigpy")
    from recon.operators.coils import _sigpy

    grid, k = (24, 18), radial(7, 40, 18)
    image = zoo.normal(*grid, dtype=torch.complex64)
    theirs = _sigpy("sigpy").nufft(image.numpy(), k.astype(np.float32), oversamp=2, width=6)
    assert error(NonCartesianMRI(complex_grid(grid), k)(to_channels(image))[0], theirs) < 2e-5


@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_the_pair_is_matched_at_the_size_of_a_scan(dtype, bar):
    A = NonCartesianMRI(complex_grid((128, 96)), radial(21, 192, 96), zoo.coil_maps(2, 128, 96)).to(dtype)
    assert check_adjoint(A) < bar / 100
    assert check_normal(A) < bar


def test_single_precision_convolves_with_the_points_it_sums_over():
    """Rounded points move the sums by 2e-5 on 512 pixels; the convolution moves with them."""
    A = NonCartesianMRI(complex_grid((512, 6)), points((512, 6), (4, 50)))
    x = zoo.normal(1, *A.domain.shape, dtype=torch.float32)
    assert error(A.normal(x), A.A_adjoint(A(x))) < 5e-6
    assert error(A.double().normal(x.double()), A.A_adjoint(A(x.double()))) < 1e-10  # made anew, not converted


# --- The convolution ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", GRIDS)
def test_weights_of_samples(grid):
    A = NonCartesianMRI(complex_grid(grid), points(grid), zoo.coil_maps(2, *grid, dtype=torch.float64))
    w, x = zoo.normal(3, 11, step=5).abs(), zoo.normal(2, *A.domain.shape)
    assert error(A.gram(w)(x), A.A_adjoint(w * A(x))) < 1e-11
    assert A.gram(0 * w)(x).abs().max() < 1e-12
    for wrong in (w[0], -w, w * math.nan):
        with pytest.raises(InputError, match=r"weights must be \(3, 11\) finite numbers, none negative"):
            A.gram(wrong)


def test_an_unaffordable_convolution_is_the_two_factors(monkeypatch):
    A = zoo.spokes().double()
    x = zoo.normal(2, *A.domain.shape)
    expected = A.normal(x)
    monkeypatch.setattr(module, "_TOEPLITZ_LIMIT", 10.0)
    assert torch.equal(A.normal(x), A.A_adjoint(A(x)))
    assert error(A.normal(x), expected) < 1e-11
    with pytest.raises(InputError, match=r"would take about .* GB to make, above the limit of 1e-08 GB; use A_adjoint"):
        A.gram(torch.ones(2, 9))


def test_the_memory_of_a_volume_is_foreseen():
    slice_, volume = (Toeplitz(Nufft((256,) * axes, np.zeros((axes, 1))), np.ones(1)).bytes for axes in (2, 3))
    assert slice_ < 1e8 < 4e9 < volume


def test_solve_uses_the_convolution_for_one_weight():
    A = zoo.spokes().double()
    b = zoo.normal(2, *A.domain.shape)
    x = A.solve(b, 0.4, torch.full(A.range.shape, 1.5).double(), cg=module.CG(300, 1e-13))
    assert error(1.5 * A.A_adjoint(A(x)) + 0.4 * x, b) < 1e-10


# --- The same bits, from any thread -------------------------------------------------------------------------------------


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def answers(A, x, y):
    return [A(x), A.A_adjoint(y), A.normal(x)]


def test_neither_threads_nor_company_nor_pieces_change_a_bit(threads, monkeypatch):
    grid = (48, 64)
    # Enough points for the library to share among threads of its own, if it were let.
    A = NonCartesianMRI(complex_grid(grid), radial(40, 600, 48), zoo.coil_maps(2, *grid))
    x, y = zoo.normal(3, 2, *grid, dtype=torch.float32), zoo.normal(3, *A.range.shape, dtype=torch.complex64)
    threads(1)
    expected = answers(A, x, y)
    for count, limit in itertools.product((1, 2, 3), (1, 2**30)):
        threads(count)
        monkeypatch.setattr(pieces, "_PIECE", limit)
        alone = [
            torch.cat(parts) for parts in zip(*(answers(A, x[i : i + 1], y[i : i + 1]) for i in range(3)), strict=True)
        ]
        for one, other, reference in zip(alone, answers(A, x, y), expected, strict=True):
            assert torch.equal(one, reference)
            assert torch.equal(other, reference)


def test_several_threads_may_call_one_operator():
    A = zoo.spokes((24, 20))
    x = zoo.normal(12, 2, 24, 20, dtype=torch.float32)
    y = zoo.normal(12, *A.range.shape, dtype=torch.complex64)
    expected = [answers(A, x[i : i + 1], y[i : i + 1]) for i in range(12)]
    fresh = pickle.loads(pickle.dumps(A))  # no plan yet: all threads make theirs at once
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda i: answers(fresh, x[i : i + 1], y[i : i + 1]), range(12)))
    for one, reference in zip(got, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, reference, strict=True))


def test_nobody_is_lent_a_plan_that_another_uses():
    A = zoo.spokes()
    A.A_adjoint(torch.zeros(A.range.shape, dtype=torch.complex64))
    key = (1, torch.complex64, torch.device("cpu"))
    assert len(A.sums._idle[key]) == 1
    assert A.sums._take(key) is not A.sums._take(key)


def test_the_library_works_on_one_thread(monkeypatch):
    """Its own threads add in any order; this machine may have too few cores to show it."""
    finufft = pytest.importorskip("finufft")
    plain, threads = finufft.Plan, []
    monkeypatch.setattr(finufft, "Plan", lambda *a, **given: threads.append(given["nthreads"]) or plain(*a, **given))
    A = zoo.spokes()
    A.normal(zoo.normal(*A.domain.shape, dtype=torch.float32))
    A(zoo.normal(*A.domain.shape, dtype=torch.float32))
    assert set(threads) == {1}


@pytest.mark.parametrize("threads", [1, 2])
def test_plans_are_used_again_and_never_copied(monkeypatch, threads):
    made = []
    from recon.operators import nufft

    plain = nufft._plan
    monkeypatch.setattr(nufft, "_plan", lambda *given: made.append(given[:2]) or plain(*given))
    A = zoo.spokes()
    x = zoo.normal(5, *A.domain.shape, dtype=torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for batch in (x, x, x, x[:1]):
            A(batch)
    finally:
        torch.set_num_threads(before)
    plans = [kind for kind, grid in made if grid == A.sums.fine(torch.float32, torch.device("cpu")) and kind == 2]
    assert 1 <= len(plans) <= threads  # a thread that starts late may take the plan of one that is done
    twin = copy.deepcopy(A)
    assert twin.sums._idle == {}
    assert len(pickle.dumps(A)) < 40_000
    assert torch.equal(twin(x), A(x))


def test_precision_follows_the_module():
    A = zoo.spokes()
    x = zoo.normal(2, *A.domain.shape)
    single = A(x.float())
    double = A.double()(x)
    again = A.float()(x.float())
    assert torch.equal(single, again)
    assert 0 < error(single, double) < 1e-5
    with pytest.raises(InputError, match=r"holds torch\.float32 numbers; got torch\.float64"):
        A(x)


# --- Trajectories -------------------------------------------------------------------------------------------------------


def test_radial_spokes():
    k = radial(4, 8, 6)
    assert k.shape == (4, 8, 2)
    assert np.array_equal(k[:, 4], np.zeros((4, 2)))
    assert np.allclose(k[0], np.stack([np.zeros(8), (np.arange(8) - 4) * 0.75], -1))  # the first spoke runs along kx
    assert np.allclose(k[2, :, 0], k[0, :, 1])  # a quarter turn later along ky
    turned = radial(3, 8, 6, golden=True)
    assert np.allclose(np.arctan2(*turned[1, -1]), GOLDEN)
    assert math.degrees(GOLDEN) == pytest.approx(111.246, abs=1e-3)


def test_spirals():
    k = spiral(3, 400, 32)
    radius = np.linalg.norm(k, axis=-1)
    assert np.array_equal(k[:, 0], np.zeros((3, 2)))
    assert 0.99 * 16 < radius.max() < 16
    assert (np.diff(radius, axis=1) > 0).all()
    # Arms are one cycle apart: where interleaf 0 points along kx, the radii of all interleaves differ by whole numbers.
    angle = np.unwrap(np.arctan2(k[..., 0], k[..., 1])[:, 1:], axis=1)
    gaps = np.diff(
        np.sort(
            np.concatenate(
                [np.interp(2 * math.pi * np.arange(1, 5), a, r) for a, r in zip(angle, radius[:, 1:], strict=True)]
            )
        )
    )
    assert np.allclose(gaps[2:-2], 1.0, atol=0.05)
    steps = np.linalg.norm(np.diff(k, axis=1), axis=-1)
    assert np.ptp(steps[:, 100:]) < 0.02 * steps[:, 100:].mean()


def test_stacks():
    k = stack(radial(2, 4, 4), 3)
    assert k.shape == (6, 4, 3)
    assert np.array_equal(k[:, 0, 0], [-1, -1, 0, 0, 1, 1])
    assert np.array_equal(k[2:4, :, 1:], radial(2, 4, 4))


def test_density_of_the_grid_is_one():
    axes = np.meshgrid(np.arange(9) - 4, np.arange(12) - 6, indexing="ij")
    k = np.stack(axes, -1)
    w = density(k.reshape(-1, 2), (9, 12))
    assert np.abs(w - 1).max() < 1e-4


def test_density_of_spokes_is_their_area():
    """Within the disc and away from its rim, whose samples have no neighbours outside."""
    k = radial(110, 64, 32)
    area, w = radial_density(k), density(k, (32, 32))
    radius = np.linalg.norm(k, axis=-1)
    inside = (radius > 2) & (radius < 12)
    assert np.abs(w[inside] / area[inside] - 1).max() < 0.05
    assert w[inside].sum() / area[inside].sum() == pytest.approx(1.0, abs=0.005)
    assert area.sum() == pytest.approx(math.pi * 16**2, rel=0.02)
    assert density(k, (32, 32)).shape == k.shape[:2]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: radial(0, 4, 4), "spokes must be a positive whole number; got 0"),
        (lambda: radial(3, 4.5, 4), "samples must be a positive whole number; got 4.5"),
        (lambda: spiral(3, 4, 4, turns=-1), "turns must be a positive number; got -1"),
        (lambda: spiral(3, 4, -4), "pixels must be a positive whole number; got -4"),
        (lambda: stack(np.zeros((4, 2)), 3), r"repeats a trajectory \(readout, sample, 2\); got \(4, 2\)"),
        (lambda: radial_density(np.zeros((4, 1, 2))), "radial_density takes spokes"),
        (lambda: density(radial(3, 4, 4), (4, 4), 0), "iterations must be a positive whole number"),
        (lambda: density(radial(3, 4, 4), (4, 4, 4)), "a trajectory through 3 dimensions"),
    ],
)
def test_trajectories_that_cannot_be(make, text):
    with pytest.raises(InputError, match=text):
        make()


# --- What is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "text"),
    [
        (
            np.zeros((5, 3)),
            r"through 2 dimensions is real \(sample, 2\) or \(readout, sample, 2\).*\(ky, kx\); got float64 \(5, 3\)",
        ),
        (np.zeros(5), r"through 2 dimensions"),
        (np.zeros((0, 2)), r"through 2 dimensions"),
        (np.zeros((5, 2), complex), r"got complex128 \(5, 2\)"),
        (np.full((5, 2), math.nan), "holds 10 values that are NaN or infinite"),
        (radial(3, 20, 20), r"from -N/2 to N/2 = \(4.0, 3.0\); it reaches"),
        (
            radial(3, 20, 6) / 6,
            r"reaches only 0.5; if it is in cycles per pixel, multiply it by the number of pixels \(8, 6\)",
        ),
    ],
)
def test_trajectories_of_another_kind(k, text):
    with pytest.raises(InputError, match=text):
        NonCartesianMRI(complex_grid((8, 6)), k)


def test_domains_of_another_kind():
    with pytest.raises(InputError, match="NonCartesianMRI takes complex images"):
        NonCartesianMRI(Space.vector(5), np.ones((3, 2)))


def test_without_the_libraries(monkeypatch):
    monkeypatch.setitem(sys.modules, "finufft", None)
    with pytest.raises(InputError, match=r"needs the Python package 'finufft'.*pip install 'recon\[mri\]'"):
        zoo.spokes()
    monkeypatch.setitem(sys.modules, "cufinufft", None)
    from recon.operators import nufft

    with pytest.raises(
        InputError, match="on cuda:0 need the Python package 'cufinufft'.*or keep the operator on the CPU"
    ):
        nufft._plan(1, (8, 6), np.zeros((2, 3)), torch.complex64, torch.device("cuda:0"))


def test_a_library_that_counts_from_somewhere_else_is_noticed(monkeypatch):
    from recon.operators import nufft

    plain = nufft._plan
    moved = lambda kind, grid, where, *rest: plain(kind, grid, where + 0.4, *rest)  # noqa: E731
    monkeypatch.setattr(nufft, "_plan", moved)
    with pytest.raises(InputError, match="lays its grid in an unknown way"):
        Nufft((8, 6), np.zeros((2, 3))).forward(torch.zeros(1, 8, 6, 2))
