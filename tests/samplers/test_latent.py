"""Latent samplers: DPS where the latent is the image, closed forms where the decoder is linear, the noise of the data else."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

import recon
from recon.checks import check_resume
from recon.draws import Draws
from recon.errors import InputError
from recon.likelihoods import GaussianLikelihood, PoissonLikelihood
from recon.operators import CG, MatrixOperator, Operator, PhaseRetrieval
from recon.priors import Card, GaussianPrior, LatentPrior
from recon.priors.autoencoder import AutoencoderArchitecture, build_autoencoder
from recon.priors.base import Prior
from recon.priors.network import Architecture, build_network
from recon.samplers import DDIM, DPS, LatentDPS, ReSample, State
from recon.samplers.consistency import Fit, descended, measured, solved
from recon.samplers.latent_dps import gluing
from recon.samplers.resample import resampled
from recon.schedules import LogLinear, Schedule
from recon.space import Space
from tests.samplers.affine import law
from tests.samplers.problems import random_problem, scalars


def normal(*shape: int, step: int = 0) -> Tensor:
    return Draws(3, [0]).normal(step, shape, "user", dtype=torch.float64)[0]


class Coded(Prior):
    """White latents seen through ``x = 270 + 10 W z``, ``W`` with orthonormal columns."""

    affine = False

    def __init__(self, weights: Tensor, width: float = 1.0) -> None:
        space = Space.vector(len(weights), "K")
        super().__init__(space, Schedule(1e-3, 100.0), Card("coded"), shift=270.0, scale=10.0)
        self.latent = Space.vector(weights.shape[1])
        self.weights, self.width = weights, width

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64

    def predict(self, z: Tensor, sigma: Tensor) -> Tensor:
        return z * self.width**2 / (self.width**2 + sigma[:, None].square())

    def decode(self, z: Tensor) -> Tensor:
        return super().decode(z @ self.weights.T)

    def encode(self, x: Tensor) -> Tensor:
        return super().encode(x) @ self.weights


def projected(prior: Prior, rows: int, sigma: float | Tensor = 2.0) -> recon.Posterior:
    """Data through a matrix with orthonormal rows, in the prior's unit."""
    matrix = torch.linalg.qr(normal(prior.space.size, rows, step=5))[0].T
    operator = MatrixOperator(matrix, prior.space)
    y = operator.A(prior.decode(1.5 * normal(1, *prior.latent.shape, step=6)))[0]
    return recon.Posterior(prior, GaussianLikelihood(operator, y + sigma * normal(rows, step=7), sigma))


def identity(sigma: float | Tensor = 0.5) -> recon.Posterior:
    """A projector on a correlated Gaussian in units of its own: its latent is the image."""
    return projected(Coded(torch.eye(5).double()), 3, 10 * sigma)


def coded(sigma: float = 4.0) -> recon.Posterior:
    return projected(Coded(torch.linalg.qr(normal(6, 3))[0]), 4, sigma)


def chi2(posterior: recon.Posterior, x: Tensor) -> Tensor:
    """Per datum, of each draw."""
    like = posterior.likelihood.gaussian()
    return (like.residual(x) / like.sigma).square().flatten(1).mean(1)


# --- latent DPS -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "strength"), [("bayes", 0.7), ("norm", 0.02)])
def test_without_an_autoencoder_it_is_dps_bit_for_bit(form: str, strength: float) -> None:
    for posterior in (identity(), random_problem(d=4, m=3)):
        latent = LatentDPS(steps=25, form=form, omega=strength)  # type: ignore[arg-type]
        pixel = DPS(steps=25, form=form, weight=strength)  # type: ignore[arg-type]
        one, other = (recon.sample(posterior, sampler, draws=4, seed=2) for sampler in (latent, pixel))
        assert bool(torch.isfinite(one.x).all()) and torch.equal(one.x, other.x)
        assert all(one.info["cost"][what] == other.info["cost"][what] for what in ("denoiser", "vjp", "forward"))


def test_the_gluing_residual_is_that_of_the_data() -> None:
    """``g = - A^T r`` with the identity for an autoencoder: as long as ``r``, so the weights of both add up."""
    posterior = identity()
    prior, like = posterior.prior, posterior.likelihood.gaussian()
    z = normal(4, 5)
    x = prior.decode(z)
    expected = -like.linear("test").A_adjoint(like.residual(x))
    torch.testing.assert_close(gluing(posterior, z, x), expected, rtol=1e-12, atol=1e-11)
    for form, omega, gamma in (("bayes", 0.4, 0.3), ("norm", 0.01, 0.02)):
        glued = LatentDPS(steps=15, form=form, omega=omega, gamma=gamma)  # type: ignore[arg-type]
        plain = DPS(steps=15, form=form, weight=omega + gamma)  # type: ignore[arg-type]
        one, other = (recon.sample(posterior, sampler, draws=3).x for sampler in (glued, plain))
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-8)


def modes(posterior: recon.Posterior) -> tuple[Tensor, Tensor, Tensor]:
    """Singular values ``a`` of operator and decoder, the data along them, and the latent directions."""
    like, prior = posterior.likelihood.gaussian(), posterior.prior
    assert isinstance(prior, Coded)
    operator = like.linear("test")
    assert isinstance(operator, MatrixOperator)
    left, a, right = torch.linalg.svd(10 * operator.matrix @ prior.weights, full_matrices=False)
    centred = like.y - operator.A(torch.full((1, prior.space.size), 270.0).double())[0]
    return a, centred @ left, right


def recursion(a: Tensor, y: Tensor, pull: Tensor, sigmas: list[float]) -> tuple[Tensor, Tensor]:
    """Mean and variance per mode of ancestral steps with ``D_y = D + sigma^2 g a pull (y - a D)``, prior N(0, 1)."""
    mean, variance = torch.zeros_like(a), torch.full_like(a, sigmas[0] ** 2)
    for sigma, after in zip(sigmas[:-1], sigmas[1:], strict=True):
        g, tau = 1 / (1 + sigma**2), 1 - (after / sigma) ** 2
        constant, slope = sigma**2 * g * a * pull * y, g - sigma**2 * (g * a) ** 2 * pull
        mean = (1 - tau) * mean + tau * (constant + slope * mean)
        variance = (1 - tau + tau * slope) ** 2 * variance + after**2 * tau
    return mean, variance


@pytest.mark.parametrize("gamma", [0.0, 0.6])
def test_with_a_linear_decoder_it_has_the_documented_bias(gamma: float) -> None:
    """The law of the steps is the recursion of its modes; that tends to the closed form, which is not the exact posterior."""
    posterior = coded()
    a, y, right = modes(posterior)
    assert float(a.max() / a.min()) > 1.1
    share = 0.8 + gamma * (a / 10) ** 2  # of omega and gamma, a of the orthonormal parts
    pull = share / 4.0**2
    sampler = LatentDPS(steps=30, grid=LogLinear(), omega=0.8, gamma=gamma, guard=False)
    mean, covariance = law(sampler, posterior)
    expected, variance = recursion(a, y, pull, list(sampler.levels(posterior)))
    torch.testing.assert_close(right @ mean, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(right @ covariance @ right.T, torch.diag(variance), rtol=1e-9, atol=1e-9)
    fine = LogLinear().sigmas(Schedule(1e-3, 100.0), 8000).tolist()
    expected, variance = recursion(a, y, pull, fine)
    q = pull * a**2
    step = math.log(1e5) / 7999  # of log sigma, what a first-order walk loses
    torch.testing.assert_close(expected, y / a * (1 - torch.exp(-q)), rtol=2 * step, atol=0.0)
    torch.testing.assert_close(variance, (1 - torch.exp(-2 * q)) / (2 * q), rtol=2 * step, atol=0.0)
    r = a**2 / 4.0**2
    assert float((expected / (y / a * r / (1 + r)) - 1).abs().max()) > 0.1  # heuristic, and says so


def test_a_draw_alone_is_the_draw_in_company() -> None:
    samplers = [LatentDPS(steps=9, omega=0.01), LatentDPS(steps=9, form="norm"), ReSample(steps=15, every=0.1)]
    adam = ReSample(steps=8, every=0.3, solver="adam", pixel=Fit(20, 0.05), latent=Fit(20, 0.05))
    for sampler in (*samplers, adam):
        together, alone = (recon.sample(scalars(), sampler, draws=5, seed=2, block=b).x for b in (5, 1))
        assert torch.equal(together, alone)
        assert float((together[0] - together[1]).abs().min()) > 0
    glued = LatentDPS(steps=9, omega=0.3, gamma=0.4)
    together, alone = (recon.sample(coded(), glued, draws=5, seed=2, block=b).x for b in (5, 1))
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-10)  # products of matrices round by their size


def test_a_stop_leaves_no_trace() -> None:
    assert check_resume(LatentDPS(steps=12, gamma=0.3), coded()) == 6
    assert check_resume(ReSample(steps=8, every=0.2, latent=Fit(10, 0.05)), coded()) == 4


def test_latent_dps_refuses_what_makes_no_sense() -> None:
    posterior = random_problem()
    for sampler in (LatentDPS(form="cubic"), LatentDPS(omega=0.0), LatentDPS(gamma=-1.0)):  # type: ignore[arg-type]
        with pytest.raises(InputError, match="omega > 0 and gamma >= 0"):
            sampler.check(posterior)
    with pytest.raises(InputError, match="projector; that of MatrixOperator.*off by"):
        LatentDPS(gamma=0.1).check(posterior)
    LatentDPS(gamma=0.1).check(coded())
    with pytest.raises(InputError, match="Ancestral transition"):
        LatentDPS(form="norm", transition=DDIM()).check(posterior)
    matrix = MatrixOperator(torch.eye(3).double())
    counts = recon.Posterior(posterior.prior, PoissonLikelihood(matrix, torch.ones(3).double(), 5.0))
    LatentDPS().check(counts)
    for sampler in (LatentDPS(gamma=0.1), LatentDPS(form="norm"), ReSample()):
        with pytest.raises(InputError, match="needs a GaussianLikelihood"):
            sampler.check(counts)
    nonlinear = GaussianLikelihood(PhaseRetrieval(matrix), torch.ones(3).double(), 1.0)
    with pytest.raises(InputError, match="needs a LinearOperator"):
        LatentDPS(gamma=0.1).check(recon.Posterior(posterior.prior, nonlinear))


# --- hard consistency -------------------------------------------------------------------------------------------------------


def problem_of(operator: Operator, sigma: Tensor | float) -> recon.Posterior:
    prior = GaussianPrior(torch.zeros(operator.domain.size).double(), torch.ones(operator.domain.size).double())
    return recon.Posterior(prior, GaussianLikelihood(operator, 3 * normal(*operator.range.shape, step=8), sigma))


SIGMAS = torch.linspace(0.2, 0.6, 4).double()


def unequal() -> recon.Posterior:
    return problem_of(MatrixOperator(normal(4, 7, step=9)), SIGMAS)


def fits(posterior: recon.Posterior, x: Tensor, goal: float = 1.0) -> dict[str, Tensor]:
    """From ``x``, by both ways; the prior's latent is the image."""
    return {
        "solved": x + solved(posterior, x, goal, CG(30, 1e-12)),
        "descended": descended(posterior, x, posterior.prior.decode, goal, Fit(600, 0.1)),
    }


def test_a_fit_stops_at_the_noise() -> None:
    """Five per cent is asked for; by conjugate gradients the way is cut where it crosses, by Adam within one per cent."""
    for posterior in (unequal(), problem_of(MatrixOperator(normal(4, 7, step=9)), 0.2)):
        found = fits(posterior, normal(3, 7))
        torch.testing.assert_close(chi2(posterior, found["solved"]), torch.ones(3).double(), rtol=1e-9, atol=0)
        assert all(0.99 <= value <= 1 for value in chi2(posterior, found["descended"]).tolist())
    posterior = problem_of(PhaseRetrieval(MatrixOperator(normal(4, 7, step=9))), SIGMAS)
    posterior.likelihood.gaussian().measured.abs_()
    found = descended(posterior, normal(3, 7), posterior.prior.decode, 1.0, Fit(600, 0.05))
    assert all(0.99 <= value <= 1 for value in chi2(posterior, found).tolist())


def test_the_goal_is_that_of_each_draw_and_who_is_there_stays() -> None:
    posterior = unequal()
    x = normal(3, 7)
    x[1] = fits(posterior, x, 0.5)["solved"][1]
    for name, found in fits(posterior, x).items():
        assert torch.equal(found[1], x[1]), name
        values = chi2(posterior, found)
        assert float(values[1]) == pytest.approx(0.5, rel=1e-9)
        assert all(0.99 <= float(values[i]) <= 1 + 1e-9 for i in (0, 2))
        # Matrix products round by their size, and Adam divides by a root of squares: so not bit for bit here.
        torch.testing.assert_close(found[2:], fits(posterior, x[2:])[name], rtol=1e-7, atol=1e-7)


def test_without_a_goal_the_solution_is_the_nearest_that_meets_the_data() -> None:
    posterior = unequal()
    like, x = posterior.likelihood.gaussian(), normal(2, 7)
    matrix = like.operator.matrix
    nearest = x + like.residual(x) @ torch.linalg.pinv(matrix).T
    torch.testing.assert_close(x + solved(posterior, x, 0.0, CG(30, 1e-12)), nearest, rtol=1e-8, atol=1e-8)


def test_what_is_not_measured_stays_as_it_is() -> None:
    """No decay of weights; and an entry that the data never had is no datum."""
    mask = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0]).double()
    posterior = problem_of(MatrixOperator(torch.diag(mask)), 0.1)
    like = posterior.likelihood.gaussian()
    like.measured.mul_(mask)
    x = normal(2, 5, step=4)
    assert measured(like.residual(x)).tolist() == [3.0, 3.0]
    for name, found in fits(posterior, x).items():
        assert torch.equal(found[:, mask == 0], x[:, mask == 0]), name
        share = chi2(posterior, found) * 5 / 3
        assert all(0.99 <= value <= 1 + 1e-9 for value in share.tolist()), name


def test_a_fit_that_cannot_be_reached_ends() -> None:
    """Two data that contradict each other: the best is their mean, at ``chi2 = 25``."""
    posterior = problem_of(MatrixOperator(torch.ones(2, 1).double()), 0.1)
    posterior.likelihood.gaussian().measured.copy_(torch.tensor([0.5, 1.5]))
    x = torch.tensor([[4.0]]).double()
    torch.testing.assert_close(x + solved(posterior, x, 1.0, CG()), torch.ones(1, 1).double())
    posterior.evaluations.clear()
    found = descended(posterior, x, posterior.prior.decode, 1.0, Fit(1000, 0.2, patience=8))
    torch.testing.assert_close(found, torch.ones(1, 1).double(), rtol=3e-3, atol=0)
    assert posterior.evaluations["adjoint"] < 500
    both = torch.tensor([[4.0], [1.03]]).double()  # each halves its rate in its own time
    together = descended(posterior, both, posterior.prior.decode, 1.0, Fit(80, 0.2, patience=6))
    for i in range(2):
        alone = descended(posterior, both[i : i + 1], posterior.prior.decode, 1.0, Fit(80, 0.2, patience=6))
        assert torch.equal(together[i : i + 1], alone)


# --- resample ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sigma", "after", "gamma"), [(1.3, 1.1, 40.0), (0.2, 0.05, 0.7), (60.0, 50.0, 3.0)])
def test_the_resample_step_is_the_closed_form(sigma: float, after: float, gamma: float) -> None:
    """Against the paper's formula in variance-preserving coordinates, z = sqrt(abar) z_VE."""
    z, found = normal(2, 4), normal(2, 4, step=1)
    t, p = 1 / (1 + sigma**2), 1 / (1 + after**2)  # abar of the two levels
    width = gamma * (1 - p) / (1 - t) * (1 - t / p)
    mean = (width * math.sqrt(p) * found + (1 - p) * math.sqrt(p) * z) / (width + 1 - p)
    variance = 1 / (1 / width + 1 / (1 - p))
    still = resampled(z, found, sigma, after, gamma, torch.zeros_like(z))
    kicked = resampled(z, found, sigma, after, gamma, torch.ones_like(z))
    torch.testing.assert_close(still * math.sqrt(p), mean, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        (kicked - still) * math.sqrt(p), torch.full_like(z, math.sqrt(variance)), rtol=1e-10, atol=0
    )


def test_at_infinite_gamma_noise_is_put_on_the_fitted_point() -> None:
    z, found, xi = normal(2, 4), normal(2, 4, step=1), normal(2, 4, step=2)
    assert torch.equal(resampled(z, found, 1.0, 0.7, math.inf, xi), found + 0.7 * xi)
    torch.testing.assert_close(resampled(z, found, 1.0, 0.7, 1e12, xi), found + 0.7 * xi, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(resampled(z, found, 1.0, 0.7, 1e-20, xi), z, rtol=1e-8, atol=1e-8)
    posterior, draws = coded(), Draws(0, range(3))
    sampler = ReSample(steps=20, every=0.1, gamma=math.inf, guidance=0.0, first=0.0, split=1.0)
    k = next(k for k in range(20) if sampler.stage(k))
    state = State(5 * normal(3, 3), torch.zeros(3).double())
    levels = sampler.levels(posterior)
    D = posterior.prior.denoise(state.z, levels[k])
    z = D + levels[k + 1] / levels[k] * (state.z - D)
    for j in range(k + 1, k + 5):  # four plain steps lead to the fifth evaluation
        D = posterior.prior.denoise(z, levels[j])
        z = D + levels[j + 1] / levels[j] * (z - D)
    ahead = posterior.prior.denoise(z, levels[k + 5])
    found = posterior.prior.encode(sampler.hard_image(posterior, posterior.prior.decode(ahead)))
    xi = draws.normal(k, (3,), dtype=torch.float64)
    expected = found + levels[k + 1] * xi
    torch.testing.assert_close(sampler.step(posterior, state, k, draws).z, expected, rtol=1e-12, atol=1e-10)


def test_the_data_are_met_where_the_paper_meets_them() -> None:
    """500 steps: every tenth from the last third on, counted down; 17 times in images, then 16 times in latents."""
    sampler = ReSample(steps=500)
    stages = [sampler.stage(k) for k in range(500)]
    left = {name: [499 - k for k in range(500) if stages[k] == name] for name in ("pixel", "latent")}
    assert left == {"pixel": list(range(330, 160, -10)), "latent": list(range(160, 0, -10))}
    few = [ReSample(steps=50).stage(k) for k in range(50)]
    assert few[:15] == [None] * 15 and few[-1] is None and few.count("pixel") == 17 and few.count("latent") == 16


def test_the_guidance_is_the_published_displacement() -> None:
    """``- 0.5 abar_t grad |r|`` of the variance-preserving state, for 500 steps; with its own noise per datum whitened."""
    posterior, z = random_problem(d=4, m=3), 20 * normal(2, 4)
    like = posterior.likelihood.gaussian()
    sampler = ReSample(steps=250, guidance=0.1, first=1.0)
    sigma, after = sampler.levels(posterior)[100:102]
    D = posterior.prior.denoise(z, sigma)
    plain = D + after / sigma * (z - D)
    moved = sampler.step(posterior, State(z, torch.zeros(2)), 100, Draws(0, range(2))).z
    for i in range(2):
        vp = (z[i : i + 1] / math.sqrt(1 + sigma**2)).requires_grad_()
        size = like.residual(posterior.prior.denoise(vp * math.sqrt(1 + sigma**2), sigma)).norm()
        (gradient,) = torch.autograd.grad(size, vp)
        step = -2 * 0.1 / (1 + sigma**2) * gradient[0]  # twice, for half the steps
        torch.testing.assert_close((moved - plain)[i], step * math.sqrt(1 + after**2))
    loud = GaussianLikelihood(like.operator, like.y, torch.tensor([0.1, 0.2, 5.0]).double())
    point = z.clone().requires_grad_()
    r = loud.residual(posterior.prior.denoise(point, sigma)) / loud.sigma
    (gradient,) = torch.autograd.grad((loud.sigma.square().mean().sqrt() * r.norm(dim=1)).sum(), point)
    moved = sampler.step(recon.Posterior(posterior.prior, loud), State(z, torch.zeros(2)), 100, Draws(0, range(2))).z
    torch.testing.assert_close(moved - plain, -0.2 * math.sqrt((1 + after**2) / (1 + sigma**2)) * gradient)


def test_the_guidance_goes_no_further_than_the_noise() -> None:
    """On a straight line the residual's norm is linear: however strong, the guided point is then at chi2 = 1, or stays."""
    posterior = problem_of(MatrixOperator(torch.tensor([[2.0]]).double()), 0.3)
    sampler, z = ReSample(steps=10, guidance=1e6, first=1.0), torch.tensor([[9.0], [-4.0]]).double()
    sigma, after = sampler.levels(posterior)[5:7]
    moved = sampler.step(posterior, State(z, torch.zeros(2)), 5, Draws(0, range(2))).z
    g = 1 / (1 + sigma**2)  # of the denoiser
    plain = g * z + after / sigma * (z - g * z)
    torch.testing.assert_close(chi2(posterior, g * (z + moved - plain)), torch.ones(2).double(), rtol=1e-9, atol=0)
    z = posterior.likelihood.gaussian().y / 2 / g * torch.ones(1, 1).double()  # meets the data already
    moved = sampler.step(posterior, State(z, torch.zeros(1)), 5, Draws(0, [0])).z
    assert torch.equal(moved, g * z + after / sigma * (z - g * z))


@pytest.mark.parametrize("solver", ["auto", "adam"])
def test_every_draw_ends_at_the_noise(solver: str) -> None:
    settings = {"pixel": Fit(100, 0.05), "latent": Fit(400, 0.05, patience=20)}
    sampler = ReSample(steps=12, every=0.2, lookahead=2, solver=solver, **settings)  # type: ignore[arg-type]
    loud = torch.tensor([0.2, 0.3, 0.7]).double()
    for posterior in (identity(loud), projected(Coded(torch.linalg.qr(normal(6, 3))[0]), 2, 2.0)):
        draws = recon.sample(posterior, sampler, draws=6, seed=1)
        values = chi2(posterior, draws.x)
        assert 0.95 <= float(values.max()) <= 1 + 1e-9  # who is lower was so before the last fit
        assert float((draws.x[0] - draws.x[1]).abs().max()) > 1e-3


def test_resample_refuses_what_makes_no_sense() -> None:
    posterior = random_problem()
    wrong = {"first": 1.5, "split": -0.1, "every": 0.0, "lookahead": 0, "solver": "sgd"}
    for name, value in wrong.items():
        with pytest.raises(InputError, match="first and split in"):
            ReSample(**{name: value}).check(posterior)  # type: ignore[arg-type]
    for name in ("guidance", "gamma", "discrepancy"):
        with pytest.raises(InputError, match="gamma > 0 and discrepancy >= 0"):
            ReSample(**{name: -1.0}).check(posterior)  # type: ignore[arg-type]
    for numbers in ((0, 0.1, 1), (1, 0.0, 1), (1, 0.1, 0)):
        with pytest.raises(InputError, match="iterations >= 1"):
            Fit(*numbers)


# --- a network --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network_posterior() -> recon.Posterior:
    """Random weights, images of 16 x 16 in units of 1/m, latents of 2 x 8 x 8, all float32 as on a graphics card."""
    coder = build_autoencoder(AutoencoderArchitecture(size=16, channels=(8,), latents=2), seed=1)
    network = build_network(Architecture(family="adm", size=8, fields=2, shuffle=1, channels=(32, 64), blocks=1))
    nn.init.normal_(network.unet.out_conv.weight, std=0.05, generator=torch.Generator().manual_seed(0))  # type: ignore[union-attr]
    space = Space.grid((16, 16), 1.0, "1/m")
    prior = LatentPrior(space, Schedule(0.01, 10.0), Card("coded"), (network, coder), shift=8.0, scale=4.0)
    matrix = torch.linalg.qr(normal(256, 40, step=3))[0].T.float().contiguous()
    operator = MatrixOperator(matrix, space)
    with torch.no_grad():
        x = prior.decode(normal(1, 2, 8, 8).float())
    y = operator.A(x)[0] + 0.2 * normal(40, step=4).float()
    return recon.Posterior(prior, GaussianLikelihood(operator, y, 0.2))


@pytest.mark.parametrize(
    "sampler",
    [
        LatentDPS(steps=4, form="norm", omega=0.01, gamma=0.01),
        LatentDPS(steps=4, omega=1e-4, gamma=1e-4),
        ReSample(steps=9, every=0.2, lookahead=2, pixel=Fit(5, 0.01), latent=Fit(400, 0.05)),
        ReSample(steps=9, every=0.2, lookahead=2, solver="adam", pixel=Fit(5, 0.01), latent=Fit(400, 0.05)),
    ],
    ids=["norm", "bayes", "resample", "adam"],
)
def test_a_network_keeps_its_shapes_and_types(
    network_posterior: recon.Posterior, sampler: recon.samplers.Sampler
) -> None:
    posterior, draws = network_posterior, Draws(0, range(2))
    with torch.no_grad():
        sampler.check(posterior)
        state = sampler.init(posterior, draws)
        for k in range(sampler.steps):
            state = sampler.step(posterior, state, k, draws)
            assert state.z.shape == (2, 2, 8, 8) and state.z.dtype == torch.float32
            assert state.z.device == posterior.prior.device and not state.z.requires_grad
        x = sampler.finish(posterior, state).x
    assert x.shape == (2, 16, 16) and x.dtype == torch.float32 and bool(torch.isfinite(x).all())
    if isinstance(sampler, ReSample):
        assert all(0.95 <= value <= 1 + 1e-5 for value in chi2(posterior, x).tolist())


def test_draws_of_a_network_do_not_depend_on_their_company(network_posterior: recon.Posterior) -> None:
    """Convolutions round by the size of their batch, Adam divides by the root of small squares: close, not equal."""
    sampler = ReSample(steps=6, every=0.4, lookahead=1, gamma=1.0, latent=Fit(20, 0.02))
    together, alone = (recon.sample(network_posterior, sampler, draws=3, block=b).x for b in (3, 1))
    assert float((together - alone).abs().max()) < 0.05 * float(together.std())
    assert float((together[0] - together[1]).std()) > 0.5 * float(together.std())


def test_fields_are_a_section() -> None:
    from recon.workflows.sections import sampler_model

    made = sampler_model(ReSample).model_validate({"method": "resample", "pixel": {"rate": 0.1}, "every": 0.1}).build()
    assert made == dataclasses.replace(ReSample(), pixel=Fit(2000, 0.1), every=0.1)
