"""Windows: equal to the whole field where nothing looks further than the margin, and to their formula everywhere."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from recon.errors import InputError
from recon.priors import Card, GaussianPrior, NetworkPrior
from recon.priors.base import Prior
from recon.priors.network import Architecture, build_network
from recon.priors.tiling import Cut, Tiling
from recon.priors.windows import Windowed
from recon.schedules import Schedule
from recon.space import Space


class Convolved(Prior):
    """A denoiser of known reach: ``layers`` 3 x 3 convolutions with a nonlinearity, its edge continued by zeros or around.

    stride > 1 looks at blocks of pixels, so it commutes with shifts by multiples of ``stride`` alone; its reach is
    ``layers * stride`` and the rest of a block.
    """

    def __init__(self, space, layers=2, *, fields=1, stride=1, around=()):
        super().__init__(space, Schedule(0.01, 50.0), Card("convolved"))
        channels = fields * stride**2
        generator = torch.Generator().manual_seed(5)
        shape = (layers, channels, channels, 3, 3)
        self.register_buffer("kernels", torch.randn(shape, generator=generator, dtype=torch.float64) / 3)
        self.stride, self.around = stride, around

    @property
    def dtype(self):
        return self.kernels.dtype

    def predict(self, z, sigma):
        hidden = z.reshape(len(z), -1, *z.shape[-2:]) / (1 + sigma[:, None, None, None])
        hidden = functional.pixel_unshuffle(hidden, self.stride)
        for kernel in self.kernels:
            across = functional.pad(hidden, (1, 1, 0, 0), mode="circular" if "x" in self.around else "constant")
            padded = functional.pad(across, (0, 0, 1, 1), mode="circular" if "y" in self.around else "constant")
            hidden = functional.conv2d(padded, kernel).tanh()
        return functional.pixel_shuffle(hidden, self.stride).reshape(z.shape)


def plane(ny, nx, fields=None, dims=("y", "x")):
    return Space(dims, (ny, nx)) if fields is None else Space(("variable", *dims), (fields, ny, nx))


def field(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("around", [(), ("x",), ("y", "x")])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("fields", [None, 2])
def test_equal_to_the_whole_field_when_the_reach_fits_the_margin(around, shifted, fields):
    whole = Convolved(plane(23, 37, fields), fields=fields or 1, around=around)
    part = Convolved(plane(12, 16, fields), fields=fields or 1)
    windowed = Windowed(part, whole.space, Tiling(6, margin=2, periodic=around, shifted=shifted))
    z, levels = field(3, *whole.space.shape), torch.tensor([0.1, 0.9, 0.9], dtype=torch.float64)
    # Sums of at most 36 products and four windows' weights: some hundred roundings of numbers below 3.
    torch.testing.assert_close(windowed.denoise(z, levels), whole.denoise(z, levels), rtol=0, atol=3e2 * 2**-53)


def test_a_margin_below_the_reach_shows_and_only_at_the_seams():
    whole, part = Convolved(plane(12, 40)), Convolved(plane(12, 16))
    windowed = Windowed(part, whole.space, Tiling(6, margin=1))
    z = field(2, 12, 40)
    gap = (windowed.denoise(z, 0.3) - whole.denoise(z, 0.3)).abs().amax((0, 1))
    seams = torch.zeros(40, dtype=torch.bool)
    for cut in windowed.cuts(0.3):
        inner = [s for s in cut.starts if s > 0] + [s + 16 for s in cut.starts if s + 16 < 40]
        for edge in inner:
            seams[edge - 2 : edge + 2] = True
    assert float(gap[~seams].max()) < 1e-13
    assert float(gap[seams].max()) > 1e-4


def test_windows_of_a_strided_network_stand_at_multiples_of_its_stride():
    whole, part = Convolved(plane(24, 44), 1, stride=4), Convolved(plane(24, 24), 1, stride=4)
    z = field(2, 24, 44)
    aligned = Windowed(part, whole.space, Tiling(12, margin=5, align=4))
    assert all(start % 4 == 0 for cut in aligned.cuts(0.3) for start in cut.starts)
    torch.testing.assert_close(aligned.denoise(z, 0.3), whole.denoise(z, 0.3), rtol=0, atol=3e2 * 2**-53)
    astray = Windowed(part, whole.space, Tiling(11, margin=5))
    assert any(start % 4 for cut in astray.cuts(0.3) for start in cut.starts)
    assert float((astray.denoise(z, 0.3) - whole.denoise(z, 0.3)).abs().max()) > 1e-3


LAYOUTS = [
    dict(zip(("n", "width", "overlap", "margin", "align", "periodic", "sigma"), values, strict=True))
    for values in itertools.product(
        (17, 24, 40), (8, 16), (3, 4), (0, 1), (1, 4), (False, True), (None, 0.02, 0.7, 31.0)
    )
    # The others are refused: windows must go the whole way in steps of align.
    if (values[0] if values[5] else values[0] - values[1]) % values[4] == 0
]  # fmt: skip


@pytest.mark.parametrize("plan", LAYOUTS, ids=lambda p: "-".join(map(str, p.values())))
def test_weights_are_a_partition_of_unity(plan):
    n, width, align = plan["n"], plan["width"], plan["align"]
    tiling = Tiling(
        plan["overlap"], plan["margin"], align, ("x",) if plan["periodic"] else (), plan["sigma"] is not None
    )
    prior = Windowed(Convolved(plane(6, width)), plane(6, n), tiling)
    (cut,) = prior.cuts(plan["sigma"] or 1.0)
    weights = cut.weights(tiling)
    total = np.zeros(n)
    for start, row in zip(cut.starts, weights, strict=True):
        np.add.at(total, (start + np.arange(width)) % n, row)
    np.testing.assert_allclose(total, 1.0, atol=4 * 2**-53)
    assert (weights >= 0).all()
    gaps = np.diff([*cut.starts, cut.starts[0] + n] if plan["periodic"] else cut.starts)
    assert (gaps <= width - plan["overlap"]).all(), "neighbours share less than the overlap"
    assert all(start % align == 0 for start in cut.starts)
    if not plan["periodic"]:
        assert cut.starts[0] == 0 and cut.starts[-1] == n - width
    for start, row in zip(cut.starts, weights, strict=True):
        if plan["periodic"] or start > 0:
            assert (row[: tiling.edge] == 0).all()
        if plan["periodic"] or start + width < n:
            assert (row[width - tiling.edge :] == 0).all()


def test_weights_rise_smoothly():
    cut = Cut(-1, 40, 16, (0, 12, 24), False)
    weights = cut.weights(Tiling(4, margin=0))
    place = (np.arange(4) + 0.5) / 4
    np.testing.assert_allclose(weights[1, :4], np.sin(0.5 * math.pi * place) ** 2, rtol=1e-14)
    np.testing.assert_allclose(weights[0], [1.0] * 12 + list(np.cos(0.5 * math.pi * place) ** 2), rtol=1e-14)


def test_join_is_the_transpose_of_split():
    cut = Cut(-2, 14, 6, (1, 5, 10), True)
    z, windows = field(2, 14, 3), field(2, 3, 6, 3)
    ones = torch.ones(3, 6).double()
    torch.testing.assert_close((cut.split(z) * windows).sum(), (z * cut.join(windows, ones)).sum())


def stationary(n, spectrum):
    """The covariance (n, n) of a periodic stationary field from its spectrum."""
    row = torch.fft.ifft(torch.as_tensor(spectrum, dtype=torch.float64)).real
    index = (torch.arange(n)[:, None] - torch.arange(n)) % n
    return row[index]


def exponential(n, length):
    """``exp(-|distance| / length)``, a Markov chain."""
    return torch.exp(-(torch.arange(n)[:, None] - torch.arange(n)).abs().double() / length)


def test_gaussian_windows_are_their_formula():
    """``sum_k R_k^T w_k C_w (C_w + sigma^2)^-1 R_k`` with dense matrices, around a circle."""
    n, width, sigma = 30, 12, 0.8
    covariance = stationary(n, 4.0 * torch.exp(-((torch.fft.fftfreq(n).double() * 8) ** 2)) + 0.05)
    inner = GaussianPrior(torch.zeros(1, width).double(), covariance[:width, :width], Space(("y", "x"), (1, width)))
    windowed = Windowed(inner, Space(("y", "x"), (1, n)), Tiling(4, margin=1, periodic=("x",)))
    (cut,) = windowed.cuts(sigma)
    weights = torch.from_numpy(cut.weights(windowed.tiling))
    gain = covariance[:width, :width] @ torch.linalg.inv(
        covariance[:width, :width] + sigma**2 * torch.eye(width).double()
    )
    matrix = torch.zeros(n, n, dtype=torch.float64)
    for start, weight in zip(cut.starts, weights, strict=True):
        where = (start + torch.arange(width)) % n
        matrix[where[:, None], where] += weight[:, None] * gain
    z = field(3, 1, n)
    torch.testing.assert_close(windowed.denoise(z, sigma)[:, 0], z[:, 0] @ matrix.T, rtol=1e-11, atol=1e-11)


def test_what_a_window_cannot_see_fades_with_the_margin():
    """Against the whole of a Markov chain in closed form: the error decays per value as its smoother forgets.

    Knowing the rest of the field moves the estimate at an inner edge by some ``e``, and that at distance ``m`` from it by
    ``lam^m e`` (where the smoother is stationary), ``lam + 1/lam = a + 1/a + (1 - a^2) / (a sigma^2)``, ``a = exp(-1/length)``.
    """
    n, width, length, sigma = 96, 48, 6.0, 0.5
    covariance = exponential(n, length)
    space = Space(("y", "x"), (1, n))
    whole = GaussianPrior(torch.zeros(1, n).double(), covariance, space)
    inner = GaussianPrior(torch.zeros(1, width).double(), covariance[:width, :width], Space(("y", "x"), (1, width)))
    z = field(200, 1, n) + 0.7
    exact = whole.denoise(z, sigma)
    a = math.exp(-1 / length)
    both = a + 1 / a + (1 - a**2) / (a * sigma**2)
    forgets = both / 2 - math.sqrt((both / 2) ** 2 - 1)
    for margin in (1, 4, 8, 12):
        windowed = Windowed(inner, space, Tiling(24, margin))
        (cut,) = windowed.cuts(sigma)
        assert cut.starts == (0, 24, 48)
        expected = torch.zeros(200, n, dtype=torch.float64)
        for start, weight in zip(cut.starts, torch.from_numpy(cut.weights(windowed.tiling)), strict=True):
            missed = (inner.denoise(z[..., start : start + width], sigma) - exact[..., start : start + width])[:, 0]
            place = torch.arange(width)
            for edge in ([0] if start > 0 else []) + ([width - 1] if start + width < n else []):
                expected[:, start : start + width] += weight * missed[:, [edge]] * forgets ** (place - edge).abs()
        error = windowed.denoise(z, sigma)[:, 0] - exact[:, 0]
        scale = float(error.abs().max())
        assert float((error - expected).abs().max()) < 1e-4 * scale
        assert scale < 3 * forgets**margin


def test_shifted_windows_move_with_the_level_alone():
    windowed = Windowed(Convolved(plane(8, 16)), plane(8, 64), Tiling(4, periodic=("x",), shifted=True))
    levels = [50 * 0.8**k for k in range(30)]
    places = [windowed.cuts(sigma)[0].starts for sigma in levels]
    assert places == [windowed.cuts(sigma)[0].starts for sigma in levels]
    assert places == [windowed.cuts(float(torch.tensor(sigma)))[0].starts for sigma in levels], "float32 moves them"
    counts = np.bincount([starts[0] % 12 for starts in places], minlength=11)
    assert (counts[:11] > 0).sum() >= 9, "seams stay where they were"
    still = Windowed(Convolved(plane(8, 16)), plane(8, 64), Tiling(4, periodic=("x",)))
    assert len({still.cuts(sigma)[0].starts for sigma in levels}) == 1


def test_chunks_and_recomputation_change_nothing():
    part, space = Convolved(plane(12, 16)), plane(23, 37)
    z = field(2, 23, 37).requires_grad_()
    plain, lean = Windowed(part, space, Tiling(6)), Windowed(part, space, Tiling(6), chunk=5, recompute=True)
    ours, theirs = lean.denoise(z, 0.3), plain.denoise(z, 0.3)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)
    v = field(2, 23, 37).flip(0)
    one, other = (torch.autograd.grad(out, z, v)[0] for out in (ours, theirs))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-14)


class Placed(nn.Module):
    """A network that answers with the row and column it is told, so that places can be checked."""

    def __init__(self, architecture):
        super().__init__()
        self.architecture = architecture

    def forward(self, z, c_noise, context=None):
        _, corner = context
        ny, nx = z.shape[-2:]
        rows = corner[:, :1] + torch.arange(ny)
        columns = corner[:, 1:] + torch.arange(nx)
        return (100 * rows[:, None, :, None] + columns[:, None, None, :]).expand_as(z)


def test_windows_that_have_a_place_are_told_it():
    architecture = Architecture(
        family="adm", size=(16, 8), channels=(32, 64), blocks=1, position=True, whole=(40, 20), shuffle=2
    )
    prior = NetworkPrior(plane(16, 8), Schedule(0.01, 10.0), Card("placed"), Placed(architecture), sigma_data=0.5)
    windowed = Windowed(prior, plane(40, 20), Tiling(4))
    sigma = 1e-2
    out = windowed.denoise(torch.zeros(2, 40, 20), sigma)
    c_out = sigma * 0.5 / math.hypot(sigma, 0.5)
    expected = 100.0 * torch.arange(40)[:, None] + torch.arange(20)
    torch.testing.assert_close(out / c_out, expected.expand(2, -1, -1), rtol=1e-5, atol=1e-3)
    for space, plan, text in (
        (plane(40, 24), Tiling(4), r"windows of a field of \(40, 20\)"),
        (plane(40, 20), Tiling(4, periodic=("x",)), "by their place"),
    ):
        with pytest.raises(InputError, match=text):
            Windowed(prior, space, plan)


def test_a_trained_network_is_told_the_place_and_the_condition_of_each_window():
    architecture = Architecture(
        family="adm", size=16, channels=(32, 64), blocks=1, position=True, condition=1, whole=(32, 48)
    )
    network = build_network(architecture, seed=1)
    nn.init.normal_(network.unet.out_conv.weight)
    prior = NetworkPrior(plane(16, 16), Schedule(0.01, 10.0), Card("placed"), network, sigma_data=0.5)
    told = prior.told(torch.randn(1, 1, 32, 48), None)
    windowed = Windowed(told, plane(32, 48), Tiling(4))
    z = torch.randn(2, 32, 48, requires_grad=True)
    out = windowed.denoise(z, 0.4)
    rows, columns = windowed.cuts(0.4)
    assert (rows.starts, columns.starts) == ((0, 8, 16), (0, 10, 21, 32))
    # The middle of a window belongs to it alone: 4 rows and 4 columns that no neighbour covers.
    for row, column in ((0, 0), (16, 32), (0, 32)):
        alone = told.at(row, column).denoise(z[:, row : row + 16, column : column + 16], 0.4)
        inside = (slice(None), slice(0, 8) if row == 0 else slice(8, 16), slice(0, 10) if column == 0 else slice(6, 16))
        whole = out[:, row : row + 16, column : column + 16]
        torch.testing.assert_close(whole[inside], alone[inside], rtol=0, atol=1e-5)
    assert bool(torch.autograd.grad(out.square().sum(), z)[0].isfinite().all())


def test_a_network_takes_windows_of_its_fields():
    architecture = Architecture(family="adm", size=16, fields=2, channels=(32, 64), blocks=1)
    prior = NetworkPrior(
        plane(16, 16, 2),
        Schedule(0.01, 10.0),
        Card("two"),
        build_network(architecture),
        sigma_data=0.5,
        shift=(1.0, 2.0),
        scale=(3.0, 4.0),
    )
    windowed = Windowed(prior, plane(24, 40, 2), Tiling(8, align=4))
    z = torch.randn(2, 2, 24, 40)
    assert windowed.denoise(z, 0.4).shape == z.shape
    torch.testing.assert_close(windowed.decode(z)[:, 1], 2 + 4 * z[:, 1])
    assert windowed.card.facts["claim"].startswith("approximate")
    assert windowed.latent.shape == (2, 24, 40) and windowed.latent.unit == "1"


def coordinates(step, n, dim="x"):
    return Space(("y", dim), (6, n), {dim: step * np.arange(n)})


def test_a_whole_circle_of_longitude_is_periodic():
    part = Convolved(coordinates(10.0, 16, "lon"))
    assert Windowed(part, coordinates(10.0, 36, "lon"), Tiling(4, periodic=("lon",))).cuts(1.0)[0].periodic
    with pytest.raises(InputError, match="'lon' goes 350 degrees, not once around"):
        Windowed(part, coordinates(10.0, 35, "lon"), Tiling(4, periodic=("lon",)))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Tiling(0), "at least 1; got 0"),
        (lambda: Tiling(4, margin=3), "at most half of it; got 3"),
        (lambda: Windowed(Convolved(plane(8, 16)), plane(8, 16), Tiling(4)), "no larger than a window"),
        (lambda: Windowed(Convolved(plane(8, 16)), plane(6, 32), Tiling(4)), "smaller than a window"),
        (lambda: Windowed(Convolved(plane(8, 16)), plane(8, 32), Tiling(9)), "more than half a window of 16 along 'x'"),
        (lambda: Windowed(Convolved(plane(8, 16)), plane(8, 31), Tiling(4, align=4)), "must divide 15"),
        (lambda: Windowed(Convolved(plane(8, 16)), plane(8, 32), Tiling(4, align=16)), "cannot move by align = 16"),
        (lambda: Windowed(Convolved(plane(8, 16)), plane(8, 32), Tiling(4, periodic=("y",))), "periodic names y"),
        (lambda: Windowed(Convolved(plane(8, 16)), plane(8, 32, dims=("lat", "x")), Tiling(4)), "dims or unit differ"),
        (lambda: Windowed(Convolved(plane(8, 16)), plane(8, 32), Tiling(4), chunk=0), "at least one draw"),
        (
            lambda: Windowed(Convolved(coordinates(0.5, 16)), coordinates(0.6, 32), Tiling(4)),
            "grid step of 0.5 along 'x', the field one of 0.6",
        ),
        (
            lambda: Windowed(
                Convolved(Space(("v", "x"), (2, 8), {"v": ("p", "t")})),
                Space(("v", "x"), (2, 16), {"v": ("p", "u")}),
                Tiling(4),
            ),
            "different coordinates along 'v'",
        ),
        (
            lambda: Windowed(
                Convolved(Space(("v", "x"), (2, 8), {"v": ("p", "t")})), Space(("v", "x"), (6, 8)), Tiling(1)
            ),
            "whose values have names",
        ),
    ],
)
def test_refusals(make, text):
    with pytest.raises(InputError, match=text):
        make()
