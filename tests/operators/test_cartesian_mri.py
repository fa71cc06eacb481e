"""Cartesian magnetic resonance imaging against the formula, closed forms and two other implementations."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from recon.diagnostics import data_fit
from recon.ensemble import Ensemble
from recon.errors import InputError
from recon.likelihoods import GaussianLikelihood
from recon.operators import CG, CartesianMRI, complex_grid
from recon.operators import coil_images as pieces
from recon.operators.fourier import centred_fft, centred_ifft, to_channels, to_complex, transform
from recon.space import Space
from tests import zoo


def waves(n: int) -> np.ndarray:
    """The centred orthonormal transform along one axis, from its formula."""
    i = np.arange(n) - n // 2
    return np.exp(-2j * math.pi * np.outer(i, i) / n) / math.sqrt(n)


def formula(image: np.ndarray) -> np.ndarray:
    """The transform of ([z,] y, x), axis by axis."""
    for axis, n in enumerate(image.shape):
        image = np.moveaxis(np.tensordot(waves(n), image, axes=(1, axis)), 0, axis)
    return image


def close(a, b, tolerance=1e-13) -> bool:
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


GRIDS = [(8, 6), (6, 9), (7, 5), (1, 4), (4, 3, 6), (5, 2, 1)]


# --- The formula --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", GRIDS)
def test_the_transform_is_its_formula(grid):
    z = zoo.normal(*grid, dtype=torch.complex128)
    assert close(centred_fft(z, len(grid)), formula(z.numpy()))
    assert close(centred_ifft(centred_fft(z, len(grid)), len(grid)), z)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("coils", [None, 3])
def test_it_is_mask_times_transform_times_maps(grid, real, coils):
    """``y_c = M F S_c (phase x)`` from explicit exponentials, for even and odd axes, images and volumes."""
    maps = None if coils is None else zoo.coil_maps(coils, *grid, dtype=torch.float64)
    phase = torch.polar(torch.ones(grid).double(), zoo.normal(*grid, step=1)) if real else None
    mask = zoo.normal(*grid, step=2) > -0.5
    domain = Space.grid(grid, 1e-3, "1") if real else complex_grid(grid, 1e-3)
    A = CartesianMRI(domain, maps, mask, phase=phase).double()
    x = zoo.normal(*domain.shape, step=3)
    image = x * phase if real else to_complex(x, len(grid))
    seen = image[None] if maps is None else maps * image
    expected = torch.from_numpy(np.stack([formula(one) for one in seen.numpy()])) * mask
    assert A.range.shape == (coils or 1, *grid)
    assert close(A(x), expected)
    assert bool((A(x)[:, ~mask] == 0).all())


def test_deepinv_computes_the_same():
    deepinv = pytest.importorskip("deepinv")
    maps, mask = zoo.coil_maps(4, 12, 10), zoo.normal(12, 10) > 0
    theirs = deepinv.physics.MultiCoilMRI(mask=mask[None, None].float(), coil_maps=maps[None], img_size=(2, 12, 10))
    A = CartesianMRI(complex_grid((12, 10)), maps, mask)
    x, y = zoo.normal(3, 2, 12, 10, dtype=torch.float32), zoo.normal(3, 4, 12, 10, dtype=torch.complex64)
    assert close(to_channels(A(x)), theirs.A(x).swapaxes(1, 2), 1e-5)
    assert close(A.A_adjoint(y), theirs.A_adjoint(torch.stack([y.real, y.imag], 1)), 1e-5)


def test_coordinates_are_cycles_per_metre():
    A = CartesianMRI(complex_grid((5, 4), (1e-3, 2e-3)))
    assert A.range.dims == ("coil", "ky", "kx")
    assert np.allclose(A.range.coords["kx"], np.array([-2, -1, 0, 1]) / (4 * 2e-3))
    assert np.allclose(A.range.coords["ky"], np.array([2, 1, 0, -1, -2]) / (5 * 1e-3))  # y falls from row to row
    assert CartesianMRI(complex_grid((5, 4))).range.coords == {}


def test_a_wave_of_its_frequency_is_one_sample():
    """A wave of k cycles per metre in the domain's own coordinates lands where the range's coordinate is k."""
    domain = complex_grid((6, 8), 1e-3, "1")
    A = CartesianMRI(domain).double()
    y, x = (domain.coords[dim] for dim in ("y", "x"))
    ky, kx = A.range.coords["ky"][1], A.range.coords["kx"][6]
    wave = np.exp(2j * math.pi * (ky * y[:, None] + kx * x[None, :]))
    spectrum = A(to_channels(torch.from_numpy(wave)))[0].abs()
    assert divmod(int(spectrum.argmax()), 8) == (1, 6)
    assert float(spectrum.max()) == pytest.approx(math.sqrt(48))
    assert float(spectrum.square().sum()) == pytest.approx(48)


# --- Masks --------------------------------------------------------------------------------------------------------------


def test_masks_broadcast_as_numpy_does():
    columns, rows = zoo.normal(5) > 0, zoo.normal(6, 1, step=1) > 0
    maps, domain = zoo.coil_maps(2, 6, 5), complex_grid((6, 5))
    x = zoo.normal(2, 6, 5, dtype=torch.float32)
    full = CartesianMRI(domain, maps)(x)
    assert torch.equal(CartesianMRI(domain, maps, columns)(x), full * columns)
    assert torch.equal(CartesianMRI(domain, maps, rows.int().numpy())(x), full * rows)
    assert torch.equal(CartesianMRI(domain, maps, torch.ones(6, 5))(x), full)


def test_packed_samples_are_those_of_the_full_grid_in_order():
    full, packed = zoo.scan(), zoo.scan(packed=True)
    x, y = zoo.normal(2, 2, 5, 6, dtype=torch.float32), zoo.normal(2, *full.range.shape, dtype=torch.complex64)
    assert packed.range.dims == ("coil", "sample")
    assert torch.equal(packed(x), full(x)[..., full.mask])
    assert np.array_equal(packed.range.coords["sample"], np.flatnonzero(full.mask))
    assert torch.equal(packed.A_adjoint(y[..., full.mask]), full.A_adjoint(y))
    assert torch.equal(packed.sampled(y), y[..., full.mask])
    assert torch.equal(full.sampled(y), y * full.mask)
    assert full.data == packed.data == packed.range.size == 3 * int(full.mask.sum())


def test_zeros_of_the_full_grid_are_no_data():
    """Both layouts give the same posterior: differences of log p, gradients, and the count of data."""
    full, packed = zoo.scan().double(), zoo.scan(packed=True).double()
    kspace = zoo.normal(3, 5, 6, dtype=torch.complex128)
    likes = [GaussianLikelihood(A, A.sampled(kspace), 0.7) for A in (full, packed)]
    x = zoo.normal(4, 2, 5, 6, step=1)
    one, other = (like.log_prob(x) for like in likes)
    assert close(one - one[0], other - other[0], 1e-12)
    gradients = [like.operator.A_adjoint(like.residual(x)) for like in likes]
    assert close(*gradients)
    fits = [data_fit(like, Ensemble(x, full.domain)) for like in likes]
    assert fits[0].data == fits[1].data == 2 * full.data
    assert fits[0].ratio == pytest.approx(fits[1].ratio, rel=1e-12)


# --- Closed forms -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "weighted"),
    [
        (lambda: zoo.scan((4, 6), coils=None), True),
        (lambda: zoo.scan((3, 5), coils=None, packed=True), True),
        (lambda: zoo.scan((4, 3), masked=False), False),
        (lambda: zoo.scan((4, 3), masked=False, real=True), False),
    ],
)
def test_solve_needs_no_iteration_where_a_transform_diagonalises(make, weighted):
    A = make().double()
    weight = zoo.normal(*A.range.shape, step=4).abs() if weighted else torch.full(A.range.shape, 0.6).double()
    b, asked = zoo.normal(3, *A.domain.shape), []
    x = A.solve(b, 0.3, weight, watch=asked.append)
    assert asked == []
    assert close(A.A_adjoint(weight * A(x)) + 0.3 * x, b, 1e-12)


def test_solve_with_one_weight_is_that_of_the_scaled_problem():
    A = zoo.scan().double()
    b, counted = zoo.normal(2, *A.domain.shape), []
    x = A.solve(b, 0.5, torch.full(A.range.shape, 2.0).double(), cg=CG(200, 1e-13), watch=counted.append)
    assert counted
    assert close(2 * A.normal(x) + 0.5 * x, b, 1e-11)
    with pytest.raises(InputError, match="solve needs c > 0"):
        A.solve(b, 0.0)


def test_norms():
    assert zoo.scan((4, 6), coils=None).norm() == 1.0
    maps = zoo.coil_maps(3, 4, 3)
    expected = float(maps.abs().square().sum(0).max().sqrt())
    assert zoo.scan((4, 3), masked=False).norm() == pytest.approx(expected, rel=1e-6)


# --- The same bits ------------------------------------------------------------------------------------------------------


def answers(A: CartesianMRI, x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
    return [A(x), A.A_adjoint(y), A.normal(x)]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("grid", [(48, 128), (9, 31), (8, 20, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_neither_threads_nor_company_nor_pieces_change_a_bit(threads, monkeypatch, grid, dtype):
    """Sizes at which the library's transform of one image was seen to round differently on two threads."""
    A = CartesianMRI(complex_grid(grid), zoo.coil_maps(2, *grid), zoo.normal(*grid) > 0).to(dtype)
    x, y = zoo.normal(3, 2, *grid, dtype=dtype), zoo.normal(3, 2, *grid, dtype=dtype.to_complex())
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


def test_working_arrays_are_bounded(threads, monkeypatch):
    threads(1)
    A = zoo.scan((8, 8), coils=4)
    monkeypatch.setattr(pieces, "_PIECE", 3 * 8 * 8 * 8)
    used = [(d.stop - d.start, c.stop - c.start) for d, c in A.images.pieces(2)]
    assert used == [(1, 3), (1, 1)] * 2
    monkeypatch.setattr(pieces, "_PIECE", 12 * 8 * 8 * 8)
    assert [(d.stop - d.start, c.stop - c.start) for d, c in A.images.pieces(5)] == [(3, 4), (2, 4)]


def test_an_empty_stack_is_transformed():
    assert transform(torch.zeros(0, 4, 5, dtype=torch.complex64)).shape == (0, 4, 5)


# --- Precision ----------------------------------------------------------------------------------------------------------


def test_maps_set_the_precision_and_do_not_mix():
    assert CartesianMRI(complex_grid((4, 3)), zoo.coil_maps(2, 4, 3, dtype=torch.float64)).dtype == torch.float64
    A = zoo.scan()
    assert A.dtype == torch.float32
    with pytest.raises(InputError, match=r"holds torch\.float32 numbers; got torch\.float64 \(convert one"):
        A(zoo.normal(*A.domain.shape))
    with pytest.raises(InputError, match="got torch.complex128"):
        A.A_adjoint(zoo.normal(*A.range.shape, dtype=torch.complex128))


def test_without_maps_double_precision_is_exact():
    """Nothing that was rounded to single precision stays behind, for odd sizes either."""
    A = CartesianMRI(complex_grid((7, 5))).double()
    x = zoo.normal(3, 2, 7, 5)
    assert close(A.A_adjoint(A(x)), x, 1e-14)
    assert torch.equal(A.normal(x), x)


def test_nothing_of_the_maps_is_saved_with_weights():
    assert zoo.scan(packed=True).state_dict() == {}


# --- What is refused ----------------------------------------------------------------------------------------------------

GOOD = zoo.coil_maps(2, 4, 3)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"maps": GOOD[:, :3]}, r"coil maps must be \(coil, 4, 3\) like the image; got \(2, 3, 3\)"),
        ({"maps": GOOD[0]}, r"coil maps must be \(coil, 4, 3\)"),
        ({"maps": GOOD[:0]}, r"coil maps must be \(coil, 4, 3\)"),
        ({"maps": GOOD * math.nan}, "coil maps hold 24 values that are NaN or infinite"),
        ({"maps": 0 * GOOD}, "coil maps are zero everywhere"),
        ({"maps": np.array([["a"]])}, "arrays of numbers"),
        ({"mask": np.zeros((4, 3))}, "the mask is empty"),
        ({"mask": np.ones((4, 3)) * 0.5}, "a mask holds true and false, or 1 and 0"),
        (
            {"mask": np.ones(4)},
            r"shape of k-space \(4, 3\) or broadcast to it.*columns: \(3,\); rows: \(4, 1\).*got \(4,\)",
        ),
        ({"mask": np.ones((2, 4, 3))}, "broadcast to it as numpy does"),
        ({"phase": np.ones((4, 3))}, "this domain holds complex images already"),
        ({"domain": Space.vector(5)}, "CartesianMRI takes complex images .* made by complex_grid, or real ones"),
        ({"domain": Space(("channel", "y", "x"), (2, 4, 3))}, r'channels \("real", "imag"\)'),
        ({"domain": Space(("y", "x"), (4, 3), complex=True)}, "CartesianMRI takes complex images"),
        (
            {"domain": Space.grid((4, 3), 1.0, "1"), "phase": np.ones((3, 4))},
            r"shape of the image \(4, 3\); got \(3, 4\)",
        ),
        ({"domain": Space.grid((4, 3), 1.0, "1"), "phase": np.full((4, 3), 0.5)}, "complex numbers of modulus 1"),
    ],
)
def test_scans_that_cannot_be(given, text):
    with pytest.raises(InputError, match=text):
        CartesianMRI(**{"domain": complex_grid((4, 3)), **given})


def test_data_of_the_wrong_kind():
    A = zoo.scan()
    with pytest.raises(InputError, match="takes complex arrays; got torch.float32"):
        A.A_adjoint(torch.zeros(A.range.shape))
    with pytest.raises(InputError, match=r"sampled takes k-space \(\*batch, 3, 5, 6\); got \(3, 5, 5\)"):
        A.sampled(torch.zeros(3, 5, 5, dtype=torch.complex64))
    with pytest.raises(InputError, match=r"complex images are real arrays \(\*batch, 2, \*grid\)"):
        to_complex(torch.zeros(3, 5, 5))
    with pytest.raises(InputError, match="a centred transform takes complex images or volumes"):
        centred_fft(torch.zeros(4, 4))
