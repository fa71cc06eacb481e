"""What every prior made of other priors promises, and one prior in the normalisation of another."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import recon
from recon.checks import check_batch, check_pickle
from recon.comm import serial
from recon.errors import InputError
from recon.likelihoods import GaussianLikelihood
from recon.operators import CG
from recon.operators.algebra import Diagonal
from recon.priors import Card, GaussianMixturePrior, GaussianPrior
from recon.priors.base import Prior
from recon.priors.compute import Compute, accelerate
from recon.priors.guidance import Guided
from recon.priors.lifting import SlicesPrior, perpendicular
from recon.priors.superposition import Mixture, ScoreSum, log_density
from recon.priors.tiling import Tiling
from recon.priors.windows import Windowed
from recon.priors.wrapped import Renormalised, together
from recon.samplers import MMPS
from recon.schedules import Schedule
from recon.space import Space


class Scaled(Prior):
    """``x ~ N(mean, C)`` per field in the latent ``z = (x - shift) / scale``: a closed form with a normalisation."""

    def __init__(self, inner, space, *, shift, scale):
        super().__init__(space, inner.schedule, Card("scaled"), shift=shift, scale=scale)
        self.inner = inner

    @property
    def dtype(self):
        return self.inner.dtype

    def predict(self, z, sigma):
        return self.inner.predict(z, sigma)


def covariance(d, seed, dtype=torch.float32):
    factor = torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (factor @ factor.T / d + 0.2 * torch.eye(d, dtype=torch.float64)).to(dtype)


def gaussian(shape=(3, 4), seed=0, dtype=torch.float32, dims=None):
    space = Space(dims or ("variable", "z", "y", "x")[-len(shape) :], shape)
    mean = torch.randn(shape, generator=torch.Generator().manual_seed(100 + seed)).to(dtype)
    return GaussianPrior(mean, covariance(space.size, seed, dtype), space, Schedule(0.01, 50.0))


VOLUME = Space(("z", "y", "x"), (3, 4, 4))
COMPOSED = {
    "accelerated": lambda: accelerate(gaussian(), Compute(chunk=2, recompute="chunks")),
    "windowed": lambda: Windowed(gaussian((4, 6)), Space(("y", "x"), (9, 6)), Tiling(2, margin=0), chunk=4),
    "windowed_shifted": lambda: Windowed(
        gaussian((4, 6)), Space(("y", "x"), (9, 14)), Tiling(2, periodic=("x",), shifted=True), recompute=True
    ),
    "guided": lambda: Guided(gaussian(seed=1), gaussian(seed=2), 1.7, (0.5, 2.0)),
    "mixture": lambda: Mixture([gaussian(seed=1), gaussian(seed=2)], [0.3, 0.7]),
    "score_sum": lambda: ScoreSum([gaussian(seed=1), gaussian(seed=2)], [0.4, 0.9]),
    "slices": lambda: SlicesPrior(gaussian((4, 4)), VOLUME, chunk=4, recompute=True),
    "perpendicular": lambda: perpendicular(
        [
            SlicesPrior(gaussian((4, 4)), VOLUME, "z"),
            SlicesPrior(gaussian((3, 4), dims=("z", "x")), VOLUME, "y"),
        ]
    ),
    "renormalised": lambda: Renormalised(
        gaussian((3, 4)), Scaled(gaussian((3, 4)), Space(("y", "x"), (3, 4)), shift=2.0, scale=3.0)
    ),
}  # fmt: skip
every = pytest.mark.parametrize("make", COMPOSED.values(), ids=COMPOSED.keys())


def states(prior, n=4):
    generator = torch.Generator().manual_seed(7)
    return torch.randn(n, *prior.latent.shape, generator=generator).to(prior.dtype)


@every
def test_a_draw_alone_and_in_company(make):
    prior = make()
    check_batch(lambda z: prior.denoise(z, 0.7), states(prior))


@every
def test_each_draw_has_its_own_noise_level(make):
    prior = make().double()
    z, levels = states(prior), torch.tensor([0.1, 0.7, 0.7, 3.0], dtype=torch.float64)
    alone = torch.cat([prior.denoise(z[i : i + 1], float(levels[i])) for i in range(4)])
    torch.testing.assert_close(prior.denoise(z, levels), alone, rtol=1e-12, atol=1e-12)


@every
def test_threads_side_by_side_give_the_same_bits(make):
    prior = make()
    z = states(prior, 8)
    serial = [prior.denoise(part, 0.7) for part in z.split(2)]
    with ThreadPoolExecutor(4, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        together_ = list(pool.map(lambda part: prior.denoise(part, 0.7), z.split(2)))
    assert all(torch.equal(a, b) for a, b in zip(serial, together_, strict=True))


@every
def test_copies_compute_the_same(make):
    prior = make()
    check_pickle(prior, states(prior), lambda one, z: one.denoise(z, 0.7))


@every
def test_in_double_precision(make):
    prior = make()
    z = states(prior)
    single = prior.denoise(z, 0.7)
    double = prior.double().denoise(z.double(), 0.7)
    assert (single.dtype, double.dtype, prior.dtype) == (torch.float32, torch.float64, torch.float64)
    # Some 50 products are summed, and inverses of matrices of condition below 100 are taken: 5000 roundings at most.
    torch.testing.assert_close(single.double(), double, rtol=0, atol=5000 * 2**-24 * float(z.abs().max()))


@every
def test_the_vjp_is_that_of_the_denoiser(make):
    prior = make().double()
    z, levels = states(prior, 2).requires_grad_(), torch.tensor([0.3, 0.7]).double()
    torch.manual_seed(0)  # the directions that are looked along
    assert torch.autograd.gradcheck(lambda at: prior.denoise(at, levels), z, fast_mode=True)
    out = prior.denoise(z, 0.7)
    one, two = (torch.autograd.grad(out, z, torch.ones_like(out), retain_graph=True)[0] for _ in range(2))
    assert torch.equal(one, two), "a second vjp of one evaluation differs"


@every
def test_units_go_through(make):
    prior = make()
    z = states(prior)
    torch.testing.assert_close(prior.encode(prior.decode(z)), z)
    torch.testing.assert_close(prior.decode(z) - prior.decode(torch.zeros_like(z)), prior.decode_linear(z))
    assert prior.decode(z).shape == z.shape


def drawn(prior, workers=1, block=2):
    """Draws of MMPS from noisy values of every other place."""
    mask = (torch.arange(prior.space.size) % 2).reshape(prior.space.shape).to(prior.dtype)
    operator = Diagonal(mask, prior.space)
    y = operator.A(prior.decode(states(prior, 1))[0])
    posterior = recon.Posterior(prior, GaussianLikelihood(operator, y, 0.3))
    sampler = MMPS(steps=6, cg=CG(iterations=3, tolerance=0.0))
    return recon.sample(posterior, sampler, draws=6, seed=1, block=block, comm=serial(workers)).x


@every
def test_samplers_take_them_on_any_number_of_threads(make):
    prior = make()
    one = drawn(prior)
    assert one.shape == (6, *prior.space.shape)
    assert bool(one.isfinite().all())
    assert torch.equal(one, drawn(prior, workers=3))


def test_a_sampler_draws_the_same_from_a_mixture_and_from_its_closed_form():
    """Six steps multiply differences of rounding by factors that are far below 1e6."""
    parts = [gaussian(seed=seed, dtype=torch.float64) for seed in (1, 2)]
    means = torch.stack([part.mean for part in parts])
    matrices = torch.stack([part.covariance() for part in parts])
    weights = torch.tensor([0.3, 0.7], dtype=torch.float64)
    exact = GaussianMixturePrior(means, matrices, weights, parts[0].space, parts[0].schedule)
    torch.testing.assert_close(drawn(Mixture(parts, [0.3, 0.7])), drawn(exact), rtol=0, atol=1e-9)


FIELDS = Space(("variable", "x"), (2, 5), {"variable": ("p", "t")})


def scaled(shift, scale, mean, matrix):
    """The Gaussian N(mean, matrix) of physical fields (2, 5) behind a normalisation."""
    size = torch.as_tensor(scale, dtype=torch.float64).reshape(-1, 1).expand(2, 5).reshape(-1)
    move = torch.as_tensor(shift, dtype=torch.float64).reshape(-1, 1).expand(2, 5).reshape(-1)
    inner = GaussianPrior((mean - move) / size, matrix / size[:, None] / size, FIELDS, Schedule(0.01, 50.0))
    return Scaled(inner, FIELDS, shift=shift, scale=scale)


def test_renormalised_is_the_same_distribution_in_another_latent():
    mean, matrix = torch.randn(10, dtype=torch.float64), covariance(10, 3, torch.float64)
    one, other = scaled((1.0, -2.0), (2.0, 6.0), mean, matrix), scaled((0.5, 3.0), (1.0, 3.0), mean, matrix)
    moved = Renormalised(one, other)
    z, levels = torch.randn(3, 2, 5, dtype=torch.float64), torch.tensor([0.05, 0.6, 4.0], dtype=torch.float64)
    torch.testing.assert_close(moved.denoise(z, levels), other.denoise(z, levels), rtol=1e-11, atol=1e-11)
    assert moved.schedule == Schedule(0.02, 100.0)
    # The density of the latent changes by the volume that it is stretched: d log rho.
    plain = GaussianPrior(mean, matrix, FIELDS)
    like = Scaled(plain, FIELDS, shift=0.5, scale=4.0)
    stretched = Renormalised(plain, like)
    blurred = matrix + 16 * 0.25 * torch.eye(10).double()
    exact = torch.distributions.MultivariateNormal((mean - 0.5) / 4, blurred / 16).log_prob(z.flatten(1))
    torch.testing.assert_close(log_density(stretched, z, torch.full((3,), 0.5).double()), exact)


def test_together_brings_all_to_the_first():
    mean, matrix = torch.randn(10, dtype=torch.float64), covariance(10, 3, torch.float64)
    priors = [scaled(0.0, 2.0, mean, matrix), scaled(1.0, 4.0, mean, matrix), scaled(0.0, 2.0, 2 * mean, matrix)]
    same, schedule = together(priors, "this")
    assert [type(p) for p in same] == [Scaled, Renormalised, Scaled]
    assert same[0] is priors[0]
    assert schedule == Schedule(0.02, 50.0)
    z = torch.randn(2, 2, 5, dtype=torch.float64)
    torch.testing.assert_close(same[1].denoise(z, 0.3), same[0].denoise(z, 0.3), rtol=1e-11, atol=1e-11)


def latent_of_its_own():
    prior = gaussian()
    prior.affine = False
    return prior


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: together([], "a sum"), "a sum needs at least one prior"),
        (lambda: together([gaussian(), gaussian((3, 5))], "this"), r"different arrays: \(y=3, x=4\)"),
        (lambda: together([gaussian(), gaussian().double()], "this"), "computes in torch.float32"),
        (lambda: together([gaussian(), latent_of_its_own()], "this"), "latents of their own"),
        (
            lambda: together(
                [GaussianPrior(torch.zeros(2), torch.ones(2), None, Schedule(*levels)) for levels in ((1, 2), (3, 4))],
                "this",
            ),
            "no noise level suits",
        ),
        (
            lambda: Renormalised(
                scaled(0.0, (1.0, 2.0), torch.zeros(10).double(), covariance(10, 0, torch.float64)),
                scaled(0.0, 2.0, torch.zeros(10).double(), covariance(10, 0, torch.float64)),
            ),
            r"another factor in each field \(1, 2\)",
        ),
    ],
)
def test_refusals(make, text):
    with pytest.raises(InputError, match=text):
        make()


def test_the_mixture_of_the_contract_is_not_trivial():
    """Both parts have a share somewhere, so that the tests above see the derivative of the shares."""
    prior = COMPOSED["mixture"]().double()
    shares = prior.shares(states(prior), torch.full((4,), 0.7, dtype=torch.float64))
    assert float(shares.min(1).values.max()) > 1e-3
