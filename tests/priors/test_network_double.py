"""What ``double()`` promises: every part of a network prior in float64, or a refusal."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import recon
from recon.errors import InputError
from recon.likelihoods import GaussianLikelihood
from recon.operators import Masked
from recon.priors import Card, ConditionalNetworkPrior, NetworkPrior
from recon.priors.conditional import Conditions
from recon.priors.learning.around import AroundGaussian
from recon.priors.learning.moments import Moments
from recon.priors.network import Architecture, build_network
from recon.samplers import MMPS
from recon.schedules import Schedule
from recon.space import Space

SIDES = (16, 24)
TOLD = Conditions.model_validate({"inputs": [{"kind": "low_resolution", "factor": 4}], "dropout": 0.2})


def trained_like(architecture: Architecture) -> nn.Module:
    network = build_network(architecture, seed=1)
    generator = torch.Generator().manual_seed(2)
    for value in network.parameters():
        value.data += 0.05 * torch.randn(value.shape, generator=generator)
    return network


def made(kind: str, tell: str = "low") -> NetworkPrior:
    """A prior of each kind of network there is, ready to denoise."""
    common = {"size": SIDES, "shuffle": 1, "blocks": 1}
    if kind in ("adm", "windows"):
        more = {"position": True, "whole": (40, 40), "condition": 2} if kind == "windows" else {}
        architecture = Architecture(family="adm", channels=(32, 64), **common, **more)
    else:
        architecture = Architecture(family="drunet", channels=(4, 4, 4, 4), position=True, **common)
    network = trained_like(architecture)
    space, numbers = Space(("y", "x"), SIDES, {}, "1"), {"shift": 1.5, "scale": 2.0}
    if kind == "around":
        d, generator = 16 * 24, torch.Generator().manual_seed(0)
        factors = torch.randn(d, 2, generator=generator, dtype=torch.float64)
        moments = Moments(torch.linspace(1, 2, d).double(), factors, 0.2 + torch.rand(d, generator=generator).double())
        network = AroundGaussian.of(network, moments, (1.5, 2.0), 0.5)
    prior = NetworkPrior(space, Schedule(0.01, 20.0), Card(kind), network, sigma_data=0.5, **numbers)
    if kind != "windows":
        return prior
    told = ConditionalNetworkPrior(prior, TOLD)
    means = torch.linspace(-1, 1, 100).reshape(10, 10).double()
    return (told.given(low=means) if tell == "low" else told.unconditional()).at(3, 5)


@pytest.mark.parametrize("kind", ["adm", "drunet", "around", "windows"])
def test_double_computes_in_double(kind: str) -> None:
    """In the line through a point the error of a central difference is that of its fourth derivative and of rounding.

    With step h it is O(h^2), so halving h takes it to a quarter, down to rounding / h: some 1e-16 / 1e-4 in float64, where
    float32 would leave 1e-7 / 1e-4 = 1e-3 of the slope.
    """
    single = made(kind)
    z = torch.randn(2, *SIDES, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    before = single.denoise(z, 0.7)
    double = single.double()
    assert double.dtype == torch.float64
    after = double.denoise(z, 0.7)
    scale = float(after.abs().max())
    assert 0 < float((after - before).abs().max()) < 1e-4 * scale, "the same function, to the rounding of float32"
    u, v = (torch.randn(2, *SIDES, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in (4, 5))
    point = z.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(double.denoise(point, 0.7), point, v)
    exact, h = float((gradient * u).sum()), 1e-4
    with torch.no_grad():
        slopes = [
            float((v * (double.denoise(z + s * u, 0.7) - double.denoise(z - s * u, 0.7))).sum()) for s in (h, h / 2)
        ]
    errors = [abs(slope / (2 * s) - exact) / abs(exact) for slope, s in zip(slopes, (h, h / 2), strict=True)]
    assert max(errors) < 1e-6


def test_a_place_is_told_in_double_too() -> None:
    """Before ``double()`` or after it: the same windows, to the rounding of float64."""
    architecture = Architecture(
        family="drunet", size=16, shuffle=1, channels=(4,) * 4, blocks=1, position=True, whole=(40, 50)
    )
    z = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def prior() -> NetworkPrior:
        space, network = Space(("y", "x"), (16, 16), {}, "1"), trained_like(architecture)
        return NetworkPrior(space, Schedule(0.01, 20.0), Card("placed"), network, sigma_data=0.5)

    before, after = prior().at(3, 5).double(), prior().double().at(3, 5)
    assert after.dtype == torch.float64
    assert float((before.denoise(z, 0.7) - after.denoise(z, 0.7)).abs().max()) < 1e-12


def test_a_network_without_weights_is_no_exception() -> None:
    class Third(nn.Module):
        def forward(self, z: torch.Tensor, c_noise: torch.Tensor) -> torch.Tensor:
            return z / 3

    space = Space(("y", "x"), (4, 4), {}, "1")
    prior = NetworkPrior(space, Schedule(0.01, 20.0), Card("third"), Third(), sigma_data=1.0)
    z = torch.full((1, 4, 4), 0.7, dtype=torch.float64)
    exact = (0.5 + 0.5 / 3) * z  # sigma = s = 1: c_skip = 1/2, c_out c_in = 1/2
    assert float((prior.denoise(z, 1.0) - exact).abs().max()) > 1e-9
    assert float((prior.double().denoise(z, 1.0) - exact).abs().max()) < 1e-15
    assert prior.float().dtype == torch.float32


def test_a_posterior_in_double_is_sampled_in_double() -> None:
    prior = made("drunet").double()
    like = GaussianLikelihood(Masked(prior.space, torch.arange(384).reshape(SIDES) % 3 == 0), torch.ones(128), 0.1)
    with pytest.raises(InputError, match="likelihood is float32 and prior 'drunet' computes in float64"):
        recon.Posterior(prior, like)
    ensemble = recon.sample(recon.Posterior(prior, like.double()), MMPS(steps=2), draws=2)
    assert ensemble.x.dtype == torch.float64


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_shorter_types_are_refused_with_the_way_out(kind: torch.dtype) -> None:
    prior = made("drunet").to(kind)
    with pytest.raises(InputError, match=r"computes in float32 or float64; .*Compute\(precision=\"bfloat16\"\)"):
        prior.denoise(torch.zeros(1, *SIDES), 1.0)
