"""Local particles: exact for tiles on their own and for an endless radius, their bias elsewhere, and what tiles are."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

import recon
from recon.likelihoods import GaussianLikelihood
from recon.operators import CG, MatrixOperator
from recon.priors import GaussianMixturePrior, GaussianPrior
from recon.priors.base import Card, Prior
from recon.samplers import MMPS, LocalisedSMC
from recon.samplers.smc.exchange import Pool
from recon.samplers.smc.localised import tapered
from recon.samplers.smc.tiles import Tiles, shares
from recon.schedules import LogLinear, Schedule
from recon.selftest import check_resume
from recon.space import Space
from tests.bounds import chi2_bounds, normal_bound
from tests.samplers.smc.problems import chain_posterior, gaussian
from tests.samplers.smc.test_particles import unbiased

SHORT = {"sigma_max": 50.0, "sigma_min": 1e-2, "steps": 24}
GUIDE = MMPS(cg=CG(8, 1e-8))


class Modes(Prior):
    """Independent values, each 0.3 N(-2, 1/4) + 0.7 N(2, 1/4)."""

    def __init__(self, size: int) -> None:
        super().__init__(Space.vector(size), Schedule(1e-2, 50.0), Card("modes"))
        means = torch.tensor([[-2.0], [2.0]], dtype=torch.float64)
        self.one = GaussianMixturePrior(means, torch.tensor([0.25]).double(), torch.tensor([0.3, 0.7]).double())

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64

    def predict(self, z: Tensor, sigma: Tensor) -> Tensor:
        return self.one.predict(z.reshape(-1, 1), sigma.repeat_interleave(z.shape[1])).reshape(z.shape)


def probability_under_the_chain(sampler: LocalisedSMC, y: float, noise: float) -> float:
    """P(x > 0 | y) of one value under the law of the ancestral chain, by quadrature step by step."""
    posterior = recon.Posterior(Modes(1), GaussianLikelihood(MatrixOperator(torch.ones(1, 1).double()), Y(1, y), noise))
    one, levels = posterior.prior.one, sampler.levels(posterior)

    def nodes(sigma: float) -> Tensor:
        reach = 4.0 + 7 * sigma
        return torch.linspace(-reach, reach, 1 + 2 * math.ceil(reach / max(0.3 * sigma, 4e-3)), dtype=torch.float64)

    def denoised(x: Tensor, sigma: float) -> Tensor:
        return one.denoise(x[:, None], sigma)[:, 0]

    x = nodes(levels[0])
    weight = torch.softmax(-0.5 * ((x - denoised(torch.zeros(1).double(), levels[0])) / levels[0]) ** 2, 0)
    for sigma, after in itertools.pairwise(levels[:-1]):
        tau, fresh = 1 - (after / sigma) ** 2, nodes(after)
        mean = x - tau * (x - denoised(x, sigma))
        kernel = torch.exp(-0.5 * ((fresh[:, None] - mean) / (after * math.sqrt(tau))) ** 2)
        weight = kernel @ (weight / kernel.sum(0).clamp(min=1e-300))
        x, weight = fresh, weight / weight.sum()
    end = denoised(x, levels[-2])
    weight = weight * torch.exp(-0.5 * ((y - end) / noise) ** 2)
    return float(weight[end > 0].sum() / weight.sum())


def Y(size: int, value: float) -> Tensor:
    return torch.full((size,), value, dtype=torch.float64)


def test_tiles_on_their_own_are_exact_where_plain_weights_collapse() -> None:
    """32 two-mode values with a datum each.

    The guide alone is biased, and weights of the whole are worth few of 64 particles in a step; tile by tile the share of the
    upper mode is that of the chain's posterior.
    """
    size, y, noise, draws, seeds = 32, 0.5, 1.5, 64, 8
    likelihood = GaussianLikelihood(MatrixOperator(torch.eye(size).double()), Y(size, y), noise)
    posterior = recon.Posterior(Modes(size), likelihood)
    sampler = LocalisedSMC(tile=(1,), overlap=0, radius=0.0, guide=GUIDE, **SHORT)
    exact = probability_under_the_chain(sampler, y, noise)
    runs = [recon.sample(posterior, sampler, draws=draws, seed=seed) for seed in range(seeds)]
    found = np.array([float((run.x > 0).double().mean()) for run in runs])
    whole = dataclasses.replace(sampler, radius=math.inf)
    plain = recon.sample(posterior, whole, draws=draws).info["particles"]["smallest_ess"]
    guide = dataclasses.replace(GUIDE, grid=LogLinear(), **SHORT)
    alone = np.array(
        [float((recon.sample(posterior, guide, draws=draws, seed=s).x > 0).double().mean()) for s in range(8)]
    )
    ess = runs[0].info["particles"]["smallest_ess"]
    print(
        f"exact {exact:.4f} tiles {found.mean():.4f} guide {alone.mean():.4f}; ess {ess:.0f}, of the whole {plain:.1f}"
    )
    assert unbiased(found - exact)
    assert not unbiased(alone - exact)
    assert ess > 4 * plain


def test_an_endless_radius_is_plain_smc() -> None:
    """Unbiased for the posterior under the chain, and no particle is made of several."""
    posterior, sampler = gaussian(2, 1), LocalisedSMC(tile=(1,), overlap=1, radius=math.inf, guide=GUIDE, **SHORT)
    exact = chain_posterior(posterior, list(sampler.levels(posterior))).exact()
    assert isinstance(exact, GaussianPrior)
    runs = [recon.sample(posterior, dataclasses.replace(sampler, threshold=0.9), draws=100, seed=s) for s in range(12)]
    error = torch.stack([(run.mean() - exact.mean) / exact.covariance().diagonal().sqrt() for run in runs]).numpy()
    print("rms error", float(np.sqrt((error**2).mean())))
    assert unbiased(error) and np.sqrt((error**2).mean()) < 0.35
    assert all(run.info["particles"]["stitched"] == 0 for run in runs)
    assert all(run.info["particles"]["resamplings"] > 1 for run in runs)


def test_data_on_neighbours_need_a_radius() -> None:
    """The table of the module in small: a sum of neighbours, told by tiles alone, is told wrong; a radius mends it."""
    means = torch.tensor(list(itertools.product((-2.0, 2.0), repeat=3)), dtype=torch.float64)
    weights = torch.where(means < 0, 0.3, 0.7).prod(1)
    operator = MatrixOperator(torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]], dtype=torch.float64))
    prior = GaussianMixturePrior(means, torch.full((3,), 0.25).double(), weights / weights.sum())
    posterior = recon.Posterior(prior, GaussianLikelihood(operator, torch.tensor([0.5, -0.7]).double(), 1.5))
    exact = posterior.exact()
    assert isinstance(exact, GaussianMixturePrior)
    upper = exact.log_weights.exp() @ (means > 0).double()  # modes do not overlap: 4 deviations apart
    error = {}
    for radius in (0.0, 8.0):
        sampler = LocalisedSMC(tile=(1,), overlap=0, radius=radius, guide=GUIDE, **{**SHORT, "steps": 60})
        found = (recon.sample(posterior, sampler, draws=1500).x > 0).double().mean(0)
        error[radius] = float((found - upper).abs().max())
    print("largest error of a probability", error)
    assert error[8.0] < 0.08 < 0.12 < error[0.0]


def test_stitching_keeps_the_variance_of_noise_and_the_mean_of_signal() -> None:
    """Ancestors with signal 3 and unit noise: every value of what is made of them has mean 3 and variance 1, joints too."""
    sampler, size, count = LocalisedSMC(tile=(4,), overlap=4), 12, 1000
    posterior = recon.Posterior(GaussianPrior(torch.zeros(size).double(), torch.ones(size).double()), gaussian_of(size))
    generator = torch.Generator().manual_seed(0)
    signal = torch.full((count, size), 3.0, dtype=torch.float64)
    rows = {name: signal for name in ("denoised", "guided")} | {
        name: torch.zeros(count, 3) for name in ("psi", "first")
    }
    rows["z"] = signal + torch.randn(count, size, generator=generator, dtype=torch.float64)
    places = np.stack([np.arange(count), np.roll(np.arange(count), 1), np.roll(np.arange(count), 2)], 1)
    pool = Pool(rows, {i: i for i in range(count)}, 0, 0)
    z = sampler._stitched(posterior, pool, places, final=False)["z"]
    low, high = chi2_bounds(count - 1)
    assert float(((z.mean(0) - 3) * math.sqrt(count)).abs().max()) < normal_bound(size)
    assert low < float(z.var(0).min()) and float(z.var(0).max()) < high
    same = sampler._stitched(posterior, pool, places[:, :1].repeat(3, 1), final=False)
    assert torch.equal(same["z"], rows["z"]) and not bool(same["stale"].any())
    last = sampler._stitched(posterior, pool, places, final=True)["z"]
    blend = sum(h * rows["z"][torch.from_numpy(places[:, b])] for b, h in enumerate(sampler.tiles(posterior)))
    torch.testing.assert_close(last, blend)


def gaussian_of(size: int) -> GaussianLikelihood:
    return GaussianLikelihood(MatrixOperator(torch.eye(size).double()), torch.zeros(size).double(), 1.0)


@pytest.mark.parametrize(("shape", "sides", "overlap"), [((11,), (4,), 3), ((5, 9), (2, 4), 0), ((2, 7, 6), (3, 3), 2)])
def test_windows_are_a_partition(shape: tuple[int, ...], sides: tuple[int, ...], overlap: int) -> None:
    tiles = Tiles.of(shape, sides, overlap, torch.float64)
    windows = torch.stack(list(tiles))
    assert len(windows) == len(tiles) == math.prod(n // s for n, s in zip(shape[-len(sides) :], sides, strict=True))
    torch.testing.assert_close(windows.sum(0), torch.ones(shape, dtype=torch.float64))
    assert float(windows.min()) >= 0 and (overlap > 0 or bool(((windows == 0) | (windows == 1)).all()))
    values = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = torch.stack([(values * h).flatten(1).sum(1) for h in windows], 1)
    torch.testing.assert_close(tiles.sums(values), expected)
    places = torch.stack(torch.meshgrid(*(torch.arange(n).double() for n in shape), indexing="ij")).flatten(1)
    centres = (windows.flatten(1) @ places.T) / windows.flatten(1).sum(1)[:, None]
    torch.testing.assert_close(tiles.distances(), (centres[:, None] - centres).norm(dim=-1))


def test_shares_are_what_a_datum_sees() -> None:
    matrix = torch.tensor(
        [[2.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, -1.0], [0.0, 0.0, 0.0, 0.0], [1.0, 0.0, 3.0, 0.0]]
    ).double()
    prior = GaussianPrior(torch.zeros(4).double(), torch.ones(4).double())
    posterior = recon.Posterior(prior, GaussianLikelihood(MatrixOperator(matrix), torch.zeros(4).double(), 1.0))
    found = shares(posterior, Tiles.of((4,), (2,), 0, torch.float64), ((2,), (0,)))
    expected = torch.tensor([[1.0, 0.0, 0.5, 0.1], [0.0, 1.0, 0.5, 0.9]], dtype=torch.float64)
    torch.testing.assert_close(found, expected)


def test_overlapping_windows_share_a_datum() -> None:
    prior = GaussianPrior(torch.zeros(4).double(), torch.ones(4).double())
    likelihood = GaussianLikelihood(MatrixOperator(torch.tensor([[0.0, 2.0, 0.0, 0.0]]).double()), Y(1, 0.0), 1.0)
    found = shares(recon.Posterior(prior, likelihood), Tiles.of((4,), (2,), 2, torch.float64), ((2,), (2,)))
    torch.testing.assert_close(found, torch.tensor([[0.75], [0.25]], dtype=torch.float64))


@pytest.mark.parametrize("radius", [0.0, math.inf])
def test_what_was_resampled_starts_again_from_one(radius: float) -> None:
    """Also where a particle was made of several, whose psi is then that of what it has become."""
    posterior, draws = gaussian(3, 2), recon.draws.Draws(0, range(12))
    sampler = LocalisedSMC(tile=(1,), overlap=0, radius=radius, threshold=1.0, **SHORT)
    state, several = sampler.init(posterior, draws), 0
    for k in range(16):
        state = sampler.step(posterior, state, k, draws)
        assert float((state.aux["base"] + state.aux["psi"]).abs().max()) > 1e-3
        state = sampler.couple(posterior, state, k, draws, recon.comm.serial(1))
        rows = sampler._refreshed(posterior, state, k + 1)
        for found in (state.aux, rows):
            torch.testing.assert_close(found["base"], -found["psi"])
        torch.testing.assert_close(rows["psi"], sampler.look(posterior, state.z, k + 1)["psi"])
        several += int(state.aux["stale"].sum())
    assert (several > 10) == (radius == 0)


def test_the_taper_is_that_of_gaspari_and_cohn() -> None:
    far = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    expected = torch.tensor([1.0, 5 / 24, 0.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(tapered(far, 2.0), expected, rtol=0, atol=1e-12)
    assert tapered(far, 0.0).tolist() == [1.0, 0.0, 0.0, 0.0] and tapered(far, math.inf).tolist() == [1.0] * 4
    places = torch.arange(30, dtype=torch.float64)
    matrix = tapered((places[:, None] - places).abs(), 9.0)
    assert float(torch.linalg.eigvalsh(matrix).min()) > -1e-12


def test_below_down_to_nothing_is_resampled() -> None:
    sampler = LocalisedSMC(tile=(1,), overlap=0, radius=0.0, threshold=1.0, down_to=1.0, **SHORT)
    posterior = gaussian(3, 2)
    steps = recon.sample(posterior, sampler, draws=20).info["particles"]["steps"]
    levels = sampler.levels(posterior)
    assert steps["resampled"] == [float(after >= 1.0) for after in levels[1:]] and sum(steps["resampled"]) > 3


@pytest.mark.parametrize("radius", [0.0, math.inf])
def test_a_stop_changes_nothing_and_neither_do_threads(radius: float) -> None:
    sampler = LocalisedSMC(tile=(1,), overlap=1, radius=radius, threshold=1.0, **{**SHORT, "steps": 8})
    check_resume(sampler, gaussian(3, 2), draws=7)
    one, three = (recon.sample(gaussian(3, 2), sampler, draws=11, block=3, comm=recon.comm.serial(n)) for n in (1, 3))
    assert torch.equal(one.x, three.x)
    assert (one.info["particles"]["stitched"] > 0) == (radius == 0)
