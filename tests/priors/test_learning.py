"""Laps of learning: the same bits after any stop, samples that are judged, and draws of every observation's own posterior."""

import math

import pytest
import torch

from recon.checks import check_adjoint
from recon.draws import Draws
from recon.errors import InputError, ReconError
from recon.likelihoods import GaussianLikelihood, PoissonLikelihood
from recon.operators import CartesianMRI, MatrixOperator
from recon.operators.cg import CG
from recon.posterior import Posterior
from recon.priors import Card, GaussianPrior, NetworkPrior
from recon.priors.learning import Laps, LearningConfig, Moments, load_learnt, side_by_side
from recon.priors.learning.laps import network_of, scale_of
from recon.priors.learning.samples import Scale, Shuffled, judged, misfits
from recon.priors.network import Architecture, ShuffledUNet, precondition
from recon.priors.training import TrainingConfig
from recon.samplers import MMPS
from recon.schedules import LogLinear, Schedule
from recon.space import Space
from recon.workflows.learn import PosteriorDraws, learn_prior
from tests.bounds import normal_bound

ARCHITECTURE = Architecture(family="drunet", size=8, channels=(4, 4, 4, 4), blocks=1, shuffle=1)
TRAINING = TrainingConfig(images=32, batch=8, chunk=4, warmup=8, ema=20, precision="float32", device="cpu")
CONFIG = LearningConfig(laps=2, rank=2, moment_iterations=3, steps=4, cg_iterations=1, block=4, training=TRAINING)
SPACE = Space.grid((8, 8), 1.0, "1")


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def scans(n=10, seed=0):
    """Objects of one bright row each, a quarter of their k-space measured, every mask used twice."""
    out = []
    for i in range(n):
        if i % 2 == 0:
            operator = CartesianMRI(SPACE, None, normal(8, 8, seed=seed + i) > 0.6, packed=True)
        x = torch.zeros(1, 8, 8)
        x[0, i % 8] = 1.0 + 0.1 * i
        clean = operator.A(x)[0]
        noise = torch.view_as_complex(normal(*clean.shape, 2, seed=seed + 100 + i))
        out.append(GaussianLikelihood(operator, clean + 0.05 * noise, 0.05))
    return out


class Stop(Exception):
    """A kill, at a place of the test's choosing."""


def walk(config=CONFIG):
    return PosteriorDraws(MMPS(steps=config.steps, cg=CG(config.cg_iterations, 1e-4), grid=LogLinear()))


def weights(learnt):
    return dict(learnt.prior.network.named_parameters())


def same(one, two):
    return all(torch.equal(one[name], two[name]) for name in one | two)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return learn_prior(scans(), ARCHITECTURE, CONFIG, tmp_path_factory.mktemp("whole"))


# --- Observations side by side ---------------------------------------------------------------------------------------------


def mixed():
    """Complex and real data of different lengths, one operator shared by two draws."""
    one, other = scans(3)[0], scans(3)[2]
    matrix = MatrixOperator(normal(3, 64, seed=5) / 8, SPACE)
    rows = [GaussianLikelihood(matrix, normal(3, seed=6 + i), 0.1 + torch.arange(3.0)) for i in range(2)]
    return [rows[0], one, rows[1], other]


def test_each_draw_goes_through_its_own_operator():
    observations, x = mixed(), normal(4, 8, 8)
    together = side_by_side(observations)
    residual = together.residual(x) / together.sigma
    for i, one in enumerate(observations):
        alone = one.residual(x[i]) / one.sigma
        alone = (torch.view_as_real(alone) if alone.is_complex() else alone).flatten()
        torch.testing.assert_close(residual[i, : len(alone)], alone)
        assert not residual[i, len(alone) :].any()
    difference = together.log_prob(x) - together.log_prob(0 * x)
    expected = torch.stack([o.log_prob(x[i : i + 1])[0] - o.log_prob(0 * x[:1])[0] for i, o in enumerate(observations)])
    torch.testing.assert_close(difference, expected, rtol=1e-4, atol=1e-3)


def test_the_transpose_is_that_of_the_whole_and_of_each_draw():
    operator = side_by_side(mixed()).linear("test").double()
    x, y = normal(4, 8, 8, dtype=torch.float64), normal(4, operator.range.size, seed=1, dtype=torch.float64)
    torch.testing.assert_close((operator.A(x) * y).flatten(1).sum(1), (x * operator.AT(y)).flatten(1).sum(1))
    for part in operator.parts:
        check_adjoint(part)
    with pytest.raises(InputError, match="of 4 objects, one draw each; got 3"):
        operator.A(x[:3])


def test_guidance_is_that_of_each_posterior_alone():
    """One step of MMPS with all observations in company against one posterior at a time."""
    observations = mixed()
    prior = GaussianPrior(torch.zeros(64), 0.3 + normal(64).abs(), SPACE)
    z, sampler = normal(4, 8, 8, seed=2), MMPS(steps=8, cg=CG(4, 1e-6))
    together = sampler.guide(Posterior(prior, side_by_side(observations)), z, 0.7, 0.3)
    alone = [sampler.guide(Posterior(prior, one), z[i : i + 1], 0.7, 0.3) for i, one in enumerate(observations)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


# --- Draws -------------------------------------------------------------------------------------------------------------------


def test_draws_follow_each_observations_exact_posterior():
    """Three posteriors side by side; 64 steps of second order change the variance by some 0.5 %, 3 % is allowed."""
    factor = normal(4, 4, dtype=torch.float64)
    prior = GaussianPrior(normal(4, seed=1, dtype=torch.float64), factor @ factor.T / 4 + 0.2 * torch.eye(4).double())
    kinds = []
    for k in range(3):
        operator = MatrixOperator(normal(2, 4, seed=10 + k, dtype=torch.float64))
        kinds.append(GaussianLikelihood(operator, normal(2, seed=20 + k, dtype=torch.float64), 0.3))
    n = 2000
    sampler = PosteriorDraws(MMPS(steps=64, cg=CG(8, 1e-10), grid=LogLinear()))
    x = sampler.draw(prior, [kinds[i % 3] for i in range(3 * n)], Draws(0, range(3 * n)))
    for k, kind in enumerate(kinds):
        exact = Posterior(prior, kind).exact()
        lower = torch.linalg.cholesky(exact.covariance())
        white = torch.linalg.solve_triangular(lower, (x[k::3] - exact.mean).T, upper=False)
        assert float(white.mean(1).abs().max()) < normal_bound(12) / math.sqrt(n) + 0.02
        covariance = white @ white.T / n - torch.eye(4, dtype=torch.float64)
        assert float(covariance.abs().max()) < normal_bound(30) * math.sqrt(2 / n) + 0.03


def test_draws_keep_the_variance_of_the_prior():
    """With data that say nothing every draw is a multiple of its first noise; second order leaves the variance at 2 %."""
    prior = GaussianPrior(torch.zeros(2).double(), torch.ones(2).double())
    blind = GaussianLikelihood(MatrixOperator(torch.eye(2).double()), torch.zeros(2).double(), 1e4)
    draws = Draws(0, range(5))
    sampler = PosteriorDraws(MMPS(steps=32, cg=CG(2, 1e-10), grid=LogLinear()))
    ratio = sampler.draw(prior, [blind] * 5, draws) / draws.normal(0, (2,), "init", dtype=torch.float64)
    torch.testing.assert_close(ratio, ratio[:1, :1].expand(5, 2), rtol=1e-5, atol=0.0)
    assert float(ratio[0, 0]) ** 2 == pytest.approx(1, abs=0.02)


def test_a_draw_depends_on_its_observation_alone(whole):
    """Not on the company in its block beyond rounding, not on the others' data; and on the seed, the lap and its number."""
    observations, sampler = scans(6), walk()
    draws = sampler.draw(whole.prior, observations, Draws(0, range(6), 2))
    some = sampler.draw(whole.prior, observations[2:4], Draws(0, range(2, 4), 2))
    torch.testing.assert_close(draws[2:4], some, rtol=1e-4, atol=1e-5)
    for other in (Draws(1, range(6), 2), Draws(0, range(6), 3), Draws(0, range(6, 12), 2)):
        assert not torch.allclose(draws, sampler.draw(whole.prior, observations, other), atol=1e-3)


# --- Laps --------------------------------------------------------------------------------------------------------------------


def test_two_runs_are_alike_and_leave_a_prior_and_records(whole, tmp_path):
    again = learn_prior(scans(), ARCHITECTURE, CONFIG, tmp_path)
    assert same(weights(whole), weights(again))
    assert [r["lap"] for r in again.records] == [1, 2]
    assert again.records[1]["samples"]["drawn"] == 10
    assert whole.prior.space.mismatch(SPACE) is None
    assert whole.prior.denoise(normal(2, 8, 8), 0.5).shape == (2, 8, 8)
    other = learn_prior(scans(), ARCHITECTURE, CONFIG.model_copy(update={"seed": 1}), tmp_path / "other")
    assert not same(weights(whole), weights(other))


@pytest.mark.parametrize("place", ["moments 2", "lap 1: drew block 2", "lap 2: drew block 1", "lap 2: 10 samples"])
def test_a_run_killed_anywhere_goes_on_with_the_same_bits(whole, tmp_path, place):
    lines = []

    def say(line):
        lines.append(line)
        if line.startswith(place):
            raise Stop

    with pytest.raises(Stop):
        learn_prior(scans(), ARCHITECTURE, CONFIG, tmp_path, say)
    before = len(lines)
    resumed = learn_prior(scans(), ARCHITECTURE, CONFIG, tmp_path, lines.append)
    assert same(weights(whole), weights(resumed))
    if place.startswith("lap"):
        assert not any(line.startswith("moments") for line in lines[before:])
    if place == "lap 2: drew block 1":
        assert [line for line in lines[before:] if "drew" in line] == [f"lap 2: drew block {b} of 3" for b in (2, 3)]


def test_a_training_killed_in_the_middle_goes_on_with_the_same_bits(whole, tmp_path):
    often = CONFIG.training.model_copy(update={"progress_seconds": 1e-9, "checkpoint_seconds": 1e-9})
    config, said = CONFIG.model_copy(update={"training": often}), []

    def say(line):
        said.append(line)
        if line.startswith("lap 2:  75.0 %"):
            raise Stop

    with pytest.raises(Stop):
        learn_prior(scans(), ARCHITECTURE, config, tmp_path, say)
    assert (tmp_path / "lap-002" / "checkpoint.safetensors").exists()
    del said[:]
    resumed = learn_prior(scans(), ARCHITECTURE, config, tmp_path, said.append)
    assert same(weights(whole), weights(resumed))
    assert not any(line.startswith("lap 2:  25.0 %") for line in said)
    assert not (tmp_path / "lap-002" / "checkpoint.safetensors").exists()


def test_more_laps_go_on_from_a_finished_run(tmp_path):
    learn_prior(scans(), ARCHITECTURE, CONFIG.model_copy(update={"laps": 1}), tmp_path / "run")
    said = []
    more = learn_prior(scans(), ARCHITECTURE, CONFIG, tmp_path / "run", said.append)
    assert not any(line.startswith("lap 1") for line in said)
    assert same(weights(more), weights(learn_prior(scans(), ARCHITECTURE, CONFIG, tmp_path / "straight")))


def test_noise_is_keyed_by_seed_lap_and_sample_and_each_lap_asks_the_prior_before(tmp_path):
    asked = []

    def spy(prior, jobs):
        for job in jobs:
            asked.append((prior.card.name, job.draws.seed, job.draws.case, job.draws.members))
            yield job.number, 0.1 * normal(len(job.draws), 8, 8)

    config = CONFIG.model_copy(update={"laps": 3, "seed": 7, "per_observation": 2, "block": 8, "chi2_limit": 1e6})
    Laps(scans(), ARCHITECTURE, config, tmp_path, spy).run()
    blocks = [tuple(range(8)), tuple(range(8, 16)), tuple(range(16, 20))]
    assert asked == [(f"learnt-{lap - 1}", 7, lap, block) for lap in (2, 3) for block in blocks]
    laps = Laps(scans(), ARCHITECTURE, config, tmp_path, spy)
    assert [laps.observations.index(one) for job in laps._jobs(2) for one in job.observations] == [
        i // 2 for i in range(20)
    ]


def test_laps_start_from_the_weights_of_the_lap_before(tmp_path):
    """A lap that trains on one image at a learning rate of next to nothing keeps the weights it was given."""
    still = CONFIG.training.model_copy(update={"learning_rate": 1e-12})
    laps = Laps(scans(), ARCHITECTURE, CONFIG.model_copy(update={"laps": 1}), tmp_path, walk())
    first = weights(laps.run())
    config = CONFIG.model_copy(update={"training": still})
    (tmp_path / "learning.json").unlink()
    second = weights(Laps(scans(), ARCHITECTURE, config, tmp_path, walk()).run())
    assert all(torch.allclose(first[name], second[name], atol=1e-9) for name in first)


def test_other_data_and_other_settings_are_refused(tmp_path):
    laps = Laps(scans(), ARCHITECTURE, CONFIG, tmp_path, walk())
    with pytest.raises(InputError, match="begun with other observations;"):
        Laps(scans(seed=7), ARCHITECTURE, CONFIG, tmp_path, walk())
    with pytest.raises(InputError, match="begun with other config;"):
        Laps(scans(), ARCHITECTURE, CONFIG.model_copy(update={"steps": 5}), tmp_path, walk())
    with pytest.raises(InputError, match="lap 1 of .* is not finished; none are"):
        laps.prior(1)
    with pytest.raises(InputError, match=r"the architecture is of 1 fields of \(16, 16\) pixels"):
        Laps(scans(), Architecture(**{**ARCHITECTURE.model_dump(), "size": 16}), CONFIG, tmp_path, walk())
    counts = PoissonLikelihood(MatrixOperator(torch.ones(1, 64), SPACE), torch.ones(1))
    with pytest.raises(InputError, match="observation 1 is a PoissonLikelihood"):
        Laps([scans(1)[0], counts], ARCHITECTURE, CONFIG, tmp_path, walk())


def test_the_mask_is_part_of_what_is_learnt_from(tmp_path):
    """Another operator with the same data is other observations."""
    observations = scans(2)
    Laps(observations, ARCHITECTURE, CONFIG, tmp_path, walk())
    first = observations[0]
    mask = first.operator.mask.flip(0)
    moved = GaussianLikelihood(CartesianMRI(SPACE, None, mask, packed=True), first.y, first.sigma)
    with pytest.raises(InputError, match="other observations"):
        Laps([moved, observations[1]], ARCHITECTURE, CONFIG, tmp_path, walk())


# --- Around the Gaussian -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "architecture",
    [
        ARCHITECTURE.model_copy(update={"fields": 2}),
        Architecture(family="adm", size=8, fields=2, channels=(32, 64), blocks=1),
    ],
    ids=["drunet", "adm"],
)
def test_the_network_starts_as_the_gaussian_and_can_leave_it(architecture):
    space = Space(("channel", "y", "x"), (2, 8, 8), {}, "1")
    fitted = Moments(
        normal(128, dtype=torch.float64), normal(128, 3, seed=1, dtype=torch.float64), 0.1 + torch.rand(128).double()
    )
    scale = scale_of(fitted)
    network = network_of(architecture, CONFIG, fitted)
    prior = NetworkPrior(
        space, Schedule(0.01, 20), Card("start"), network, sigma_data=0.5, shift=scale.shift, scale=scale.scale
    )
    exact, sigma = fitted.prior(space), torch.tensor([0.01, 0.3, 2.0, 20.0])
    z = sigma[:, None, None, None] * normal(4, 2, 8, 8, seed=2) + 0.5 * normal(4, 2, 8, 8, seed=3)
    expected = exact.denoise(prior.decode(z).double(), sigma.double() * scale.scale)
    torch.testing.assert_close(prior.decode(prior.denoise(z, sigma)).double(), expected, rtol=1e-5, atol=1e-5)
    parameters = list(network.requires_grad_(True).parameters())
    gradients = torch.autograd.grad(precondition(network, z, sigma, 0.5).square().sum(), parameters, allow_unused=True)
    assert any(g is not None and bool(g.any()) for g in gradients)


def test_latents_of_the_gaussian_have_the_stated_spread():
    fitted = Moments(
        torch.linspace(0, 3, 64).double(), normal(64, 2, dtype=torch.float64), torch.full((64,), 0.2).double()
    )
    draws = fitted.mean + normal(5000, 2, seed=1, dtype=torch.float64) @ fitted.factors.T
    draws += normal(5000, 64, seed=2, dtype=torch.float64) * fitted.diagonal.sqrt()
    latent = scale_of(fitted).latent(draws)
    assert float(latent.mean()) == pytest.approx(0, abs=0.02)
    assert float(latent.std()) == pytest.approx(0.5, rel=0.02)


def test_a_plain_network_is_one_that_a_store_can_keep(tmp_path):
    config = CONFIG.model_copy(update={"around": False, "laps": 1})
    learnt = learn_prior(scans(), ARCHITECTURE, config, tmp_path)
    assert isinstance(learnt.prior.network, ShuffledUNet)
    assert learnt.prior.network.architecture == ARCHITECTURE


def test_what_was_learnt_is_read_back(whole, tmp_path):
    with pytest.raises(InputError, match="is not a folder of learning"):
        load_learnt(tmp_path)
    again = learn_prior(scans(), ARCHITECTURE, CONFIG, tmp_path)
    z = normal(2, 8, 8)
    for prior in (load_learnt(tmp_path), load_learnt(tmp_path, 2), again.prior):
        assert torch.equal(prior.denoise(z, 0.3), whole.prior.denoise(z, 0.3))
        assert prior.space.mismatch(SPACE) is None
    assert not torch.equal(load_learnt(tmp_path, 1).denoise(z, 0.3), whole.prior.denoise(z, 0.3))
    with pytest.raises(InputError, match=r"lap 3 of .* is not finished; \[1, 2\] are"):
        load_learnt(tmp_path, 3)
    (tmp_path / "moments.safetensors").write_bytes(b"short")
    with pytest.raises(InputError, match=r"moments.safetensors is damaged"):
        load_learnt(tmp_path)


# --- Samples -----------------------------------------------------------------------------------------------------------------


def spoilt(prior, jobs):
    """An E-step whose first block is not finite and whose second has nothing to do with the data."""
    for job, value in zip(jobs, (math.nan, 3.0, 0.0), strict=True):
        yield job.number, value * normal(len(job.draws), 8, 8)


def test_samples_that_diverged_are_counted_said_and_left_out(tmp_path):
    config = CONFIG.model_copy(update={"diverged_limit": 1.0, "chi2_limit": 1000.0})
    said = []
    records = Laps(scans(), ARCHITECTURE, config, tmp_path / "some", spoilt, said.append).run().records
    counts = records[1]["samples"]
    assert (counts["drawn"], counts["not_finite"], counts["diverged"]) == (10, 4, 4)
    assert counts["lost"] == 0.8
    assert any("10 samples, left out 4 not finite and 4 diverged" in line for line in said)
    with pytest.raises(ReconError, match="80 % of the samples of lap 2 diverged"):
        Laps(scans(), ARCHITECTURE, CONFIG.model_copy(update={"chi2_limit": 1000.0}), tmp_path / "all", spoilt).run()


def test_misfits_are_per_datum_and_per_observation():
    observations = scans(2)
    x = normal(4, 8, 8)
    found = misfits(observations, x)
    for i in range(4):
        one = observations[i // 2]
        square = (one.residual(x[i]) / one.sigma).abs().double().square().sum()
        assert float(found[i]) == pytest.approx(float(square) / (2 * one.y.numel()), rel=1e-5)
    full = CartesianMRI(SPACE, None, observations[0].operator.mask)
    grid = GaussianLikelihood(full, full.A(x[0]), 0.05)
    packed = GaussianLikelihood(observations[0].operator, observations[0].operator.A(x[0]), 0.05)
    torch.testing.assert_close(misfits([grid], x[:2]), misfits([packed], x[:2]))


def test_samples_to_train_on_are_latent_and_good():
    x = normal(3, 8, 8)
    x[1, 0, 0] = math.inf
    kept, quality = judged(scans(3), x, Scale(1.0, 2.0), CONFIG.model_copy(update={"chi2_limit": 1e9}))
    torch.testing.assert_close(kept, (x[[0, 2]] - 1.0) / 2.0)
    assert (quality.not_finite, quality.diverged) == (1, 0)
    assert quality.spread == pytest.approx(float(x[[0, 2]].std(0).mean()), rel=1e-5)


def test_every_epoch_shows_every_image_once_whoever_asks():
    images = torch.arange(10.0).reshape(10, 1, 1).expand(-1, 4, 4).contiguous()
    shown = Shuffled(images, 5, 0)
    epochs = [torch.cat([shown(2 * e + s, range(5)).images[:, 0, 0] for s in range(2)]) for e in range(2)]
    assert all(torch.equal(epoch.sort().values, torch.arange(10.0)) for epoch in epochs)
    assert not torch.equal(*epochs)
    assert torch.equal(shown(1, [3]).images, shown(1, range(5)).images[3:4])
    assert not torch.equal(shown(0, range(5)).images, Shuffled(images, 5, 1)(0, range(5)).images)


def test_mirror_images_come_at_the_chance_asked_for():
    ramp = torch.arange(4.0).expand(1, 4, 4).contiguous()
    shown = Shuffled(ramp, 1000, 0, (0.0, 0.3))(0, range(1000)).images
    share = float((shown[:, 0, 0] == 3.0).double().mean())
    assert abs(share - 0.3) < normal_bound(1) * math.sqrt(0.3 * 0.7 / 1000)
    assert torch.equal(shown[:, 0], shown[:, 3])
    assert float((Shuffled(ramp.mT, 1000, 0, (0.3, 0.0))(0, range(1000)).images[:, 0, 0] == 3.0).double().mean()) > 0.2


def test_the_first_lap_may_be_longer():
    longer = CONFIG.model_copy(update={"first": 2.5})
    assert [longer.lap_training(lap).images for lap in (1, 2)] == [80, 32]
    assert [longer.lap_training(lap).seed for lap in (1, 2)] == [1, 2]
