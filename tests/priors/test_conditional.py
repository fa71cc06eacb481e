"""Priors that are told something: closed forms, conditions as channels, networks, and what training makes of them."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from recon.datasets.slices import area_mean
from recon.errors import InputError
from recon.priors import ConditionalGaussianPrior, ConditionalNetworkPrior, NetworkPrior
from recon.priors.base import Card
from recon.priors.conditional import Conditions, LowResolution, TimeOfYear
from recon.priors.denoising import denoising_error
from recon.priors.network import Architecture, Context, build_network, precondition
from recon.priors.objective import told_denoiser
from recon.priors.training import Batch, Task, Training, TrainingConfig
from recon.schedules import Schedule
from recon.space import Space

LOW, DAY = LowResolution(kind="low_resolution", factor=4), TimeOfYear(kind="time_of_year")


def joint(seed=0, d=5, k=3):
    torch.manual_seed(seed)
    root = torch.randn(d + k, d + k, dtype=torch.float64)
    return torch.randn(d + k, dtype=torch.float64), root @ root.T + 0.2 * torch.eye(d + k, dtype=torch.float64)


def gaussian():
    mean, covariance = joint()
    return ConditionalGaussianPrior(mean, covariance, {"a": Space.vector(2, "K"), "b": Space.vector(1, "m")})


def test_the_conditional_gaussian_is_that_of_the_precision_matrix():
    """An independent form: P = C^-1, x | c ~ N(m_x - P_xx^-1 P_xc (c - m_c), P_xx^-1)."""
    mean, covariance = joint()
    precision = torch.linalg.inv(covariance)
    a, b = torch.tensor([0.3, -1.2], dtype=torch.float64), 2.5
    told = torch.cat([a, torch.tensor([b], dtype=torch.float64)])
    expected = torch.linalg.inv(precision[:5, :5])
    centre = mean[:5] - expected @ precision[:5, 5:] @ (told - mean[5:])
    given = gaussian().given(b=b, a=a)
    # Two inverses of a matrix of condition number below 1e3 in float64.
    assert torch.allclose(given.mean, centre, rtol=0, atol=1e-10)
    assert torch.allclose(given.covariance(), expected, rtol=0, atol=1e-10)
    z, sigma = torch.randn(4, 5, dtype=torch.float64), 0.7
    gain = expected @ torch.linalg.inv(expected + sigma**2 * torch.eye(5, dtype=torch.float64))
    assert torch.allclose(given.denoise(z, sigma), centre + (z - centre) @ gain.T, atol=1e-10)


def test_without_conditions_the_gaussian_is_the_marginal_with_the_same_levels():
    mean, covariance = joint()
    prior = gaussian()
    free = prior.unconditional()
    assert torch.allclose(free.mean, mean[:5]) and torch.allclose(free.covariance(), covariance[:5, :5], atol=1e-12)
    assert free.schedule == prior.given(a=[0.0, 0.0], b=0.0).schedule == prior.schedule
    assert free.space.mismatch(prior.space) is None and free.dtype == prior.dtype == torch.float64


def test_the_marginal_is_the_average_over_the_condition():
    """Law of total variance, exactly: C_xx = Cov[x|c] + Cov(E[x|c]), with E[x|c] affine in c."""
    mean, covariance = joint()
    prior = gaussian()
    base = prior.given(a=mean[5:7], b=mean[7])
    columns = [
        prior.given(a=mean[5:7] + e[:2], b=mean[7] + e[2]).mean - base.mean for e in torch.eye(3, dtype=torch.float64)
    ]
    gain = torch.stack(columns, 1)
    total = base.covariance() + gain @ covariance[5:, 5:] @ gain.T
    assert torch.allclose(total, covariance[:5, :5], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"a": [1.0, 2.0]}, "is given a, b, all at once; missing: b, unknown: none"),
        ({"a": [1.0, 2.0], "b": 1.0, "c": 1.0}, "missing: none, unknown: c"),
        ({"a": [1.0, 2.0, 3.0], "b": 1.0}, r"a must have the shape of \(component=2\) \[K\]; got \(3,\)"),
        ({"a": 1.0, "b": 1.0}, r"a must have the shape of .*; got \(\)"),
        ({"a": [1.0, math.nan], "b": 1.0}, "a holds numbers that are not finite"),
        ({"a": "warm", "b": 1.0}, r"a must be numbers of \(component=2\) \[K\]; got 'warm'"),
    ],
)
def test_values_that_do_not_fit_are_refused(values, text):
    with pytest.raises(InputError, match=text):
        gaussian().given(**values)


def test_a_prior_without_its_conditions_does_not_denoise():
    with pytest.raises(InputError, match=r"depends on a, b: bind them with given\(a=..., b=...\)"):
        gaussian().denoise(torch.zeros(1, 5, dtype=torch.float64), 1.0)


@pytest.mark.parametrize(
    ("mean", "covariance", "told", "text"),
    [
        (torch.zeros(4), torch.eye(4), {}, "the conditions none"),
        (torch.zeros(4), torch.eye(4), {"a": 4}, r"have 1 and 4"),
        (torch.zeros(4), torch.ones(4), {"a": 1}, r"has shape \(4, 4\); got \(4,\)"),
        (torch.zeros(4), torch.ones(4, 4), {"a": 1}, "positive definite"),
    ],
)
def test_senseless_joint_gaussians_are_refused(mean, covariance, told, text):
    with pytest.raises(InputError, match=text):
        ConditionalGaussianPrior(mean, covariance, {name: Space.vector(size) for name, size in told.items()})


def test_block_means_come_back_to_the_grid_linearly():
    """Separable interpolation between block centres, constant beyond them: numpy's, axis after axis."""
    torch.manual_seed(0)
    means = torch.randn(2, 3, 4, 5)
    fine = LOW.spread(means).numpy()
    rows = np.apply_along_axis(lambda v: np.interp(np.arange(16), 4 * np.arange(4) + 1.5, v), 2, means.numpy())
    both = np.apply_along_axis(lambda v: np.interp(np.arange(20), 4 * np.arange(5) + 1.5, v), 3, rows)
    assert fine.shape == (2, 3, 16, 20) and np.abs(fine - both).max() < 1e-6


def test_block_means_are_over_what_is_known():
    torch.manual_seed(0)
    values, known = torch.randn(1, 2, 8, 8), torch.ones(1, 2, 8, 8)
    assert torch.allclose(LOW.of(values, known), LOW.spread(torch.from_numpy(area_mean(values.numpy(), 4))), atol=1e-6)
    known[0, 0, :4, :4], known[0, 1, :4, :2] = 0, 0
    spoiled = torch.where(known > 0, values, 77.0)
    expected = torch.from_numpy(area_mean(values.numpy(), 4))
    expected[0, 0, 0, 0] = 77.0  # nothing known: what stands there
    expected[0, 1, 0, 0] = values[0, 1, :4, 2:4].mean()
    assert torch.allclose(LOW.of(spoiled, known), LOW.spread(expected), atol=1e-5)


def test_the_space_of_block_means_has_their_centres():
    field = Space(("variable", "lat", "lon"), (2, 8, 12), {"variable": ("t", "u"), "lat": np.arange(8.0)}, "mixed")
    low = LOW.space(field)
    assert low.shape == (2, 2, 3) and low.coords["lat"].tolist() == [1.5, 5.5] and low.unit == "mixed"
    assert low.coords["variable"] == ("t", "u")
    with pytest.raises(InputError, match=r"8 x 10 pixels has no means over blocks of 4 x 4 \(condition 'low'\)"):
        LOW.space(Space(("y", "x"), (8, 10)))


def test_the_time_of_year_goes_round():
    days = torch.tensor([0.0, 365.2425 / 4, 365.2425 / 2, 365.2425], dtype=torch.float64)
    waves = DAY.spread(days, (3, 2))
    assert waves.shape == (4, 2, 3, 2) and waves.dtype == torch.float32
    assert torch.allclose(waves[:, 0, 1, 1], torch.tensor([1.0, 0.0, -1.0, 1.0]), atol=1e-6)
    assert torch.allclose(waves[:, 1, 2, 0], torch.tensor([0.0, 1.0, 0.0, 0.0]), atol=1e-6)
    for wrong in (-1.0, 367.0):
        with pytest.raises(InputError, match="day is days since 1 January 0:00, from 0 to 366"):
            DAY.spread(torch.tensor([wrong]), (1, 1))


def test_a_dropout_adds_a_channel_that_says_what_is_there():
    parts = [torch.ones(2, 1, 4, 4), 2 * torch.ones(2, 2, 4, 4)]
    plain, dropped = Conditions(inputs=(LOW, DAY)), Conditions(inputs=(LOW, DAY), dropout=0.1)
    assert (plain.channels(1), dropped.channels(1), dropped.channels(3)) == (3, 4, 6)
    assert plain.joined(parts).shape == (2, 3, 4, 4)
    told = dropped.joined(parts, torch.tensor([1.0, 0.0]))
    assert told[:, :, 1, 1].tolist() == [[1.0, 2.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0]]
    assert dropped.joined(parts)[:, 3].eq(1).all()


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"inputs": [{"kind": "time_of_year"}, {"kind": "time_of_year"}]}, "a name of its own; got day, day"),
        ({"inputs": []}, "at least 1 item"),
        ({"inputs": [{"kind": "low_resolution", "factor": 1}]}, "greater than or equal to 2"),
        ({"inputs": [{"kind": "time_of_year", "name": "a day"}]}, "match pattern"),
        ({"inputs": [{"kind": "tea_time"}]}, "tea_time"),
        ({"inputs": [{"kind": "time_of_year"}], "dropout": 1.0}, "less than 1"),
    ],
)
def test_senseless_conditions_are_refused(wrong, text):
    with pytest.raises(ValidationError, match=text):
        Conditions.model_validate(wrong)


def network_prior(dropout=0.2, whole=None, size=16):
    inputs = Conditions(inputs=(LOW, DAY), dropout=dropout)
    architecture = Architecture(
        family="adm", size=size, fields=2, channels=(32, 64), blocks=1, condition=inputs.channels(2), whole=whole
    )
    network = build_network(architecture, 1)
    torch.manual_seed(2)
    for value in network.parameters():
        value.data += 0.02 * torch.randn_like(value)
    space = Space(("variable", "y", "x"), (2, size, size), {"variable": ("t", "u")}, "mixed")
    plain = NetworkPrior(
        space, Schedule(0.01, 10.0), Card("weather"), network, sigma_data=0.5, shift=(10.0, 0.0), scale=(2.0, 0.5)
    )
    return ConditionalNetworkPrior(plain, inputs)


def test_a_network_is_told_values_in_physical_units():
    prior = network_prior()
    assert {name: space.shape for name, space in prior.conditions.items()} == {"low": (2, 4, 4), "day": (1,)}
    low, z = 10 + torch.randn(2, 4, 4), torch.randn(3, 2, 16, 16)
    latent = torch.stack([(low[0] - 10.0) / 2.0, low[1] / 0.5])
    parts = [LOW.spread(latent[None]), DAY.spread(torch.tensor([45.0]), (16, 16))]
    condition = torch.cat([*parts, torch.ones(1, 1, 16, 16)], 1)
    expected = precondition(prior.network, z, torch.full((3,), 0.3), 0.5, Context(condition.expand(3, -1, -1, -1)))
    given = prior.given(low=low, day=45)
    assert torch.allclose(given.denoise(z, 0.3), expected, atol=1e-6)
    assert not torch.allclose(prior.given(low=low, day=200).denoise(z, 0.3), expected, atol=1e-4)
    assert given.card.name == "weather given low, day" and given.space is prior.space
    assert torch.equal(given.encode(z), prior.encode(z)) and given.latent.mismatch(prior.latent) is None
    assert torch.equal(copy.deepcopy(given).denoise(z, 0.3), given.denoise(z, 0.3))
    alone = torch.cat([given.denoise(part[None], 0.3) for part in z])
    assert torch.allclose(alone, given.denoise(z, 0.3), atol=1e-5)


def test_a_network_trained_with_dropout_knows_the_marginal():
    prior, z = network_prior(), torch.randn(1, 2, 16, 16)
    nothing = Context(torch.zeros(1, 5, 16, 16))
    expected = precondition(prior.network, z, torch.full((1,), 0.3), 0.5, nothing)
    assert torch.equal(prior.unconditional().denoise(z, 0.3), expected)
    with pytest.raises(InputError, match="weather was not trained with a condition dropout: it knows no p"):
        network_prior(dropout=0.0).unconditional()
    with pytest.raises(InputError, match="weather depends on low, day: bind them with given"):
        prior.denoise(z, 0.3)


def test_windows_are_given_the_condition_of_the_whole_field():
    prior = network_prior(whole=(24, 32))
    assert prior.conditions["low"].shape == (2, 6, 8)
    low, z = torch.randn(2, 6, 8), torch.randn(1, 2, 16, 16)
    with pytest.raises(InputError, match=r"weather is told its conditions first: given\(...\).at\(8, 3\)"):
        prior.at(8, 3)
    given = prior.given(low=low, day=10)
    with pytest.raises(InputError, match="say which by at"):
        given.denoise(z, 0.3)
    latent = torch.stack([(low[0] - 10.0) / 2.0, low[1] / 0.5])[None]
    window = LOW.spread(latent)[..., 8:24, 3:19]
    condition = torch.cat([window, DAY.spread(torch.tensor([10.0]), (16, 16)), torch.ones(1, 1, 16, 16)], 1)
    expected = precondition(prior.network, z, torch.full((1,), 0.3), 0.5, Context(condition))
    assert torch.allclose(given.at(8, 3).denoise(z, 0.3), expected, atol=1e-6)
    assert prior.unconditional().at(8, 3).denoise(z, 0.3).shape == (1, 2, 16, 16)


def test_a_network_of_other_channels_is_refused():
    prior = network_prior()
    plain = NetworkPrior(prior.space, prior.schedule, prior.card, prior.network, sigma_data=0.5)
    with pytest.raises(InputError, match="the conditions of weather make 4 channels; its network takes 5"):
        ConditionalNetworkPrior(plain, Conditions(inputs=(LOW, DAY)))
    with pytest.raises(InputError, match="make 3 channels; its network takes 5"):
        ConditionalNetworkPrior(plain, Conditions(inputs=(LOW,), dropout=0.3))


def test_each_held_out_image_is_measured_with_its_own_condition():
    """The output cancels the preconditioning and leaves the condition: the error is that of the condition."""

    def network(z, c_noise, context):
        level = (4 * c_noise).exp()[:, None, None, None]
        total = level.square() + 0.25
        skip, out = 0.25 / total, 0.5 * level * total.rsqrt()
        return (context.condition - skip * z * total.sqrt()) / out

    images = torch.arange(40.0)[:, None, None].expand(-1, 8, 8)
    told = told_denoiser(network, 0.5, Context(images[:, None] + 0.25))
    assert denoising_error(told, images, 0.5) == pytest.approx(0.25, abs=1e-4)  # float32 of numbers up to 40


class Pointwise(nn.Module):
    """A pixel's value, its condition and the level through two layers; enough for a field that is white given its condition."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(4, 32, 1), nn.SiLU(), nn.Conv2d(32, 32, 1), nn.SiLU(), nn.Conv2d(32, 1, 1)
        )

    def forward(self, z, c_noise, context):
        level = c_noise[:, None, None, None].expand(-1, 1, *z.shape[2:])
        return self.layers(torch.cat([z, context.condition, level], 1))


def test_training_teaches_both_the_conditional_and_the_marginal_denoiser():
    """x = c + 0.3 n with white c and n: x | c is N(c, 0.09), x is N(0, 1.09), so both optimal errors are known."""
    inputs = Conditions(inputs=(LowResolution(kind="low_resolution", factor=2),), dropout=0.3)

    def drawn(step, count):
        random = np.random.default_rng(step)
        c, n = (torch.from_numpy(random.standard_normal((count, 1, 8, 8), dtype=np.float32)) for _ in range(2))
        return (c + 0.3 * n)[:, 0], c, torch.from_numpy((random.random(count) >= 0.3).astype(np.float32))

    def batches(step, rows):
        x, c, there = (part[list(rows)] for part in drawn(step, 16))
        return Batch(x, torch.ones_like(x), Context(inputs.joined([c], there)))

    torch.manual_seed(0)
    config = TrainingConfig(
        images=16 * 600, batch=16, chunk=16, warmup=160, ema=1600, learning_rate=1e-2, precision="float32", p_mean=0.0
    )
    run = Training(config, Task(Pointwise(), batches, Schedule(0.05, 10.0), math.sqrt(1.09)))
    run.run()
    run.network.load_state_dict(run.averaged())
    x, c, _ = drawn(10**6, 256)
    for sigma in (0.5, 1.0, 2.0):
        noisy = x + sigma * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
        for there, variance in ((1.0, 0.09), (0.0, 1.09)):
            context = Context(inputs.joined([c], torch.full((256,), there)))
            with torch.no_grad():
                denoised = precondition(run.network, noisy, torch.full((256,), sigma), math.sqrt(1.09), context)
            error = (denoised - x).square().mean().sqrt().item()
            # No denoiser beats the optimum but by chance: 16384 pixels scatter an RMS by 0.6 %.
            best = math.sqrt(variance * sigma**2 / (variance + sigma**2))
            assert 0.97 * best < error < 1.1 * best, (sigma, there)
