"""Slices lifted to volumes: independent slices in closed form, and the stated bias of perpendicular ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from recon.errors import InputError
from recon.priors import Card, GaussianPrior, NetworkPrior
from recon.priors.lifting import SlicesPrior, perpendicular
from recon.priors.superposition import Mixture, log_density
from recon.schedules import LogLinear, Schedule
from recon.space import Space

LEVELS = Schedule(0.01, 50.0)
SIGMAS = torch.tensor([0.05, 0.8, 20.0], dtype=torch.float64)


def covariance(d, seed):
    factor = torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return factor @ factor.T / d + 0.2 * torch.eye(d, dtype=torch.float64)


def gaussian(dims, shape, seed=0):
    space = Space(dims, shape)
    mean = torch.randn(space.size, generator=torch.Generator().manual_seed(9 + seed), dtype=torch.float64)
    return GaussianPrior(mean, covariance(space.size, seed), space, LEVELS)


def independent(prior, space, axis):
    """The Gaussian over volumes whose slices across ``axis`` are independent, by its dense covariance."""
    at = space.dims.index(axis)
    slices, one = space.shape[at], prior.space.size
    index = torch.arange(space.size).reshape(space.shape).movedim(at, 0).reshape(slices, one)
    matrix = torch.zeros(space.size, space.size, dtype=torch.float64)
    mean = torch.zeros(space.size, dtype=torch.float64)
    for row in index:
        matrix[row[:, None], row] = prior.covariance()
        mean[row] = prior.mean
    return GaussianPrior(mean, matrix, space, LEVELS)


def states(space, n=3):
    return torch.randn(n, *space.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize(
    ("dims", "shape", "axis"),
    [
        (("z", "y", "x"), (4, 2, 3), "z"),
        (("z", "y", "x"), (4, 2, 3), "y"),
        (("z", "y", "x"), (4, 2, 3), "x"),
        (("channel", "z", "y", "x"), (2, 3, 2, 3), "z"),
        (("z", "channel", "y", "x"), (3, 2, 2, 3), "z"),
        (("time", "y", "x"), (4, 2, 3), "time"),
    ],
)
def test_slices_are_independent_draws_of_the_prior(dims, shape, axis):
    space = Space(dims, shape)
    kept = [(d, n) for d, n in zip(dims, shape, strict=True) if d != axis]
    prior = gaussian(tuple(d for d, _ in kept), tuple(n for _, n in kept))
    lifted, exact, z = SlicesPrior(prior, space, axis), independent(prior, space, axis), states(space)
    torch.testing.assert_close(lifted.denoise(z, SIGMAS), exact.denoise(z, SIGMAS), rtol=0, atol=1e-12)
    torch.testing.assert_close(log_density(lifted, z, SIGMAS), log_density(exact, z, SIGMAS), rtol=1e-12, atol=0)


def test_mixtures_of_volumes_are_exact_too():
    space = Space(("z", "y", "x"), (2, 2, 2))
    parts = [gaussian(("y", "x"), (2, 2), seed) for seed in (1, 2)]
    lifted = Mixture([SlicesPrior(part, space) for part in parts])
    exact = Mixture([independent(part, space, "z") for part in parts])
    z = states(space)
    torch.testing.assert_close(lifted.denoise(z, SIGMAS), exact.denoise(z, SIGMAS), rtol=0, atol=1e-11)


def test_what_the_prior_sees_is_slices_draw_by_draw_in_chunks():
    space, sizes = Space(("z", "y", "x"), (3, 4, 4)), []

    class Seen(torch.nn.Module):
        def forward(self, z, c_noise):
            sizes.append(len(z))
            return z * c_noise[:, None, None, None]

    prior = NetworkPrior(Space(("y", "x"), (4, 4)), LEVELS, Card("seen"), Seen(), sigma_data=0.5, shift=2.0, scale=3.0)
    lifted = SlicesPrior(prior, space, chunk=4)
    z, levels = states(space).float(), torch.tensor([0.1, 1.0, 5.0])
    out = lifted.denoise(z, levels)
    assert sizes == [4, 4, 1]
    for i, level in enumerate(levels):
        for k in range(3):
            torch.testing.assert_close(out[i, k], prior.denoise(z[i, k][None], float(level))[0])
    torch.testing.assert_close(lifted.decode(z), 2 + 3 * z)
    assert lifted.latent.unit == "1" and lifted.latent.shape == (3, 4, 4)


@pytest.mark.parametrize("axis", [0, 1])
def test_each_field_keeps_its_unit(axis):
    dims = ["variable", "y", "x"]
    dims.insert(axis, "z")
    shape = [{"variable": 2, "y": 4, "x": 4, "z": 3}[d] for d in dims]
    image = Space(("variable", "y", "x"), (2, 4, 4))
    prior = NetworkPrior(image, LEVELS, Card("two"), torch.nn.Identity(), sigma_data=0.5, scale=(2.0, 5.0))
    z = torch.ones(1, *shape)
    x = SlicesPrior(prior, Space(tuple(dims), tuple(shape)), "z").decode(z)
    assert x.select(1 + dims.index("variable"), 0).unique().tolist() == [2.0]
    assert x.select(1 + dims.index("variable"), 1).unique().tolist() == [5.0]


def chain(n, correlation):
    return correlation ** (torch.arange(n)[:, None] - torch.arange(n)).abs().double()


def separable():
    """Two priors that know exactly the slices of a volume (z, y=1, x) with covariance C_z x C_x, and that covariance."""
    c_z, c_x = chain(4, 0.8), chain(3, 0.6)
    space = Space(("z", "y", "x"), (4, 1, 3))
    levels = Schedule(1e-3, 200.0)
    across_z = GaussianPrior(torch.zeros(3).double(), c_x, Space(("y", "x"), (1, 3)), levels)
    across_x = GaussianPrior(torch.zeros(4).double(), c_z, Space(("z", "y"), (4, 1)), levels)
    both = perpendicular([SlicesPrior(across_z, space, "z"), SlicesPrior(across_x, space, "x")])
    return both, c_z, c_x


def test_perpendicular_slices_share_the_score():
    both, c_z, c_x = separable()
    z = states(both.space)
    eye = [torch.eye(len(c)).double() for c in (c_z, c_x)]
    lifts = [torch.kron(eye[0], c_x), torch.kron(c_z, eye[1])]
    for sigma in (0.1, 1.0, 30.0):
        gains = [c @ torch.linalg.inv(c + sigma**2 * torch.eye(12).double()) for c in lifts]
        expected = z.flatten(1) @ (sum(gains) / 2)
        torch.testing.assert_close(both.denoise(z, sigma).flatten(1), expected, rtol=0, atol=1e-12)
    assert both.card.facts["claim"].startswith("heuristic")


def test_the_stated_bias_of_perpendicular_slices():
    """Probability flow of a basis gives the covariance it draws: the square root of the true one."""
    both, c_z, c_x = separable()
    top = both.schedule.sigma_max

    def drawn(steps):
        z = top * torch.eye(12, dtype=torch.float64).reshape(12, 4, 1, 3)
        sigmas = LogLinear().sigmas(both.schedule, steps).tolist()
        for sigma, lower in zip(sigmas, sigmas[1:], strict=False):
            slope = (z - both.denoise(z, sigma)) / sigma
            guess = z + (lower - sigma) * slope
            if lower > 0:
                slope = (slope + (guess - both.denoise(guess, lower)) / lower) / 2
            z = z + (lower - sigma) * slope
        return z.flatten(1).T @ z.flatten(1)

    coarse, fine = drawn(150), drawn(300)
    true = torch.kron(c_z, c_x)
    values, vectors = torch.linalg.eigh(true)
    expected = (vectors * values.sqrt()) @ vectors.T
    # Heun's error is that of halving its steps, up to a factor; the start leaves out c / top^2 < 4e-4 of a variance below 5.
    assert float((fine - expected).abs().max()) < 2 * float((fine - coarse).abs().max()) + 2e-3
    assert bool((fine.diagonal() < 0.95 * true.diagonal()).all())
    correlation = fine / fine.diagonal().sqrt()[:, None] / fine.diagonal().sqrt()
    for along in (1, 3):  # neighbours along x and along z
        assert float(correlation[0, along]) < 0.9 * float(true[0, along])


def test_perpendicular_slices_of_white_noise_are_exact():
    space, ones = Space(("z", "y", "x"), (3, 4, 4)), torch.ones(16).double()
    across_z = SlicesPrior(GaussianPrior(0 * ones, 2 * ones, Space(("y", "x"), (4, 4)), LEVELS), space, "z")
    across_y = SlicesPrior(GaussianPrior(0 * ones[:12], 2 * ones[:12], Space(("z", "x"), (3, 4)), LEVELS), space, "y")
    z = states(space)
    expected = z * (2 / (2 + SIGMAS**2))[:, None, None, None]
    torch.testing.assert_close(perpendicular([across_z, across_y]).denoise(z, SIGMAS), expected)


def test_a_prior_of_one_orientation_on_another_is_the_callers_word():
    axial = GaussianPrior(torch.zeros(16).double(), covariance(16, 0), Space.grid((4, 4), 1e-3, "1/m"), LEVELS)
    volume = Space.grid((4, 4, 4), 1e-3, "1/m")
    assert SlicesPrior(axial, volume, "z").slices == 4
    with pytest.raises(InputError, match=r"slices across 'y'.*or set any_plane"):
        SlicesPrior(axial, volume, "y")
    lifted, z = SlicesPrior(axial, volume, "y", any_plane=True), states(volume)
    torch.testing.assert_close(lifted.denoise(z, 0.4)[:, :, 1], axial.denoise(z[:, :, 1], 0.4))


def latent_of_its_own():
    prior = gaussian(("y", "x"), (2, 3))
    prior.affine = False
    return prior


VOLUME = Space(("z", "y", "x"), (4, 2, 3))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: SlicesPrior(gaussian(("y", "x"), (2, 3)), VOLUME, "time"), "it has no such axis"),
        (lambda: SlicesPrior(gaussian(("y", "x"), (2, 4)), VOLUME), r"does not describe slices across 'z'.*x=4.*x=3"),
        (lambda: SlicesPrior(gaussian(("y", "x"), (2, 4)), VOLUME, any_plane=True), "Choose a prior for these slices$"),
        (lambda: SlicesPrior(gaussian(("z", "y", "x"), (4, 2, 3)), VOLUME), "does not describe slices"),
        (lambda: SlicesPrior(latent_of_its_own(), VOLUME), "has a latent of its own"),
        (lambda: SlicesPrior(gaussian(("y", "x"), (2, 3)), VOLUME, chunk=-1), "at least one draw"),
        (
            lambda: SlicesPrior(
                GaussianPrior(torch.zeros(4), torch.ones(4), Space(("y", "x"), (2, 2), {"x": np.arange(2)})),
                Space(("z", "y", "x"), (3, 2, 2), {"x": 2 * np.arange(2)}),
            ),
            "different coordinates along 'x'",
        ),
        (lambda: perpendicular([SlicesPrior(gaussian(("y", "x"), (2, 3)), VOLUME)] * 2), r"got \['z', 'z'\]"),
        (
            lambda: perpendicular(
                [
                    SlicesPrior(gaussian(("y", "x"), (2, 3)), VOLUME),
                    SlicesPrior(gaussian(("z", "x"), (4, 3)), VOLUME, "y"),
                ],
                (0.5, 0.6),
            ),
            "positive and sum to 1; got",
        ),
    ],
)
def test_refusals(make, text):
    with pytest.raises(InputError, match=text):
        make()
