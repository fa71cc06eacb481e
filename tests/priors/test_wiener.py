"""The Wiener filter as the start of a network."""

import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from recon.errors import InputError
from recon.priors import load_prior
from recon.priors.base import Card
from recon.priors.network import Architecture, NetworkPrior, build_network, precondition
from recon.priors.objective import Batch, denoising_loss
from recon.priors.store import save_prior
from recon.priors.wiener import PrincipalSkip, Wiener, WienerSkip
from recon.schedules import Schedule
from recon.space import Space

TINY = Architecture(family="adm", size=16, channels=(32, 64), blocks=1, fields=2, position=True, wiener=True)
SIGMAS = torch.tensor([0.02, 0.7, 9.0])


def images(n=12, fields=2, side=16):
    """Smooth images around a mean that is not flat."""
    torch.manual_seed(0)
    frequency = torch.fft.fftfreq(side)
    power = 1 / (0.01 + frequency[:, None] ** 2 + frequency[None] ** 2)
    white = torch.fft.fft2(torch.randn(n, fields, side, side), norm="ortho")
    bump = torch.linspace(-1, 1, side)[:, None] * torch.linspace(0, 2, side)
    return bump + 0.1 * torch.fft.ifft2(power.sqrt() * white, norm="ortho").real


@pytest.fixture(scope="module")
def fitted():
    network = build_network(TINY, seed=3)
    network.skip.fit(images())
    return network


class Constant(nn.Module):
    """Answers with a constant and remembers what it saw; starts from a white filter of variance one."""

    def __init__(self, shape):
        super().__init__()
        self.skip = WienerSkip(shape)

    def forward(self, z, c_noise):
        self.seen = z
        return torch.full((len(z), *self.skip.mean.shape), 0.25)


def test_a_network_of_zeros_is_the_filter(fitted):
    # The network as it is built answers zero.  float16 rounds a log spectrum below 16 by 2^-8 at most, and the gain
    # S / (S + sigma^2) moves by a quarter of that, so |W - W'| <= 2^-10 |z - m| in root mean square over the pixels.
    z = images(3) + SIGMAS.reshape(-1, 1, 1, 1) * torch.randn(3, 2, 16, 16)
    exact = Wiener.fit(images().double())
    wanted = torch.cat([exact(z[i : i + 1].double(), float(sigma)) for i, sigma in enumerate(SIGMAS)])
    got = precondition(fitted, z, SIGMAS, 0.5).double()
    size = (z.double() - exact.mean).square().mean((1, 2, 3)).sqrt()
    rounded = 2**-11 * exact.mean.abs().max()  # of the mean image
    assert bool(((got - wanted).square().mean((1, 2, 3)).sqrt() <= 2**-10 * size + rounded + 1e-6).all())


def test_white_data_give_the_preconditioning_of_karras():
    network, z = Constant((1, 8, 8)), torch.randn(3, 8, 8)
    total = (SIGMAS.square() + 1).reshape(-1, 1, 1)
    wanted = z / total + 0.25 * SIGMAS.reshape(-1, 1, 1) / total.sqrt()
    assert torch.allclose(precondition(network, z, SIGMAS, 1.0), wanted, rtol=1e-5, atol=1e-6)
    assert torch.allclose(network.seen[:, 0], z / total.sqrt(), rtol=1e-6)
    assert torch.allclose(network.seen[:, 1], z / total, rtol=1e-5, atol=1e-6)


def test_its_error_is_the_mean_squared_error_of_the_filter(fitted):
    # tr[(1 - G) C (1 - G)^T + sigma^2 G G^T] / d with the matrices written out, for each of the fields.
    skip, eye = fitted.skip, torch.eye(256).reshape(256, 1, 16, 16)
    spectrum = skip.log_spectrum.exp()
    covariance = torch.fft.ifft2(spectrum * torch.fft.fft2(eye)).real.reshape(256, 2, 256).transpose(0, 1).double()
    for sigma in SIGMAS:
        level = sigma.reshape(1, 1, 1, 1)
        filtered = (skip(eye + skip.mean, level)[0] - skip.mean).reshape(256, 2, 256).permute(1, 2, 0).double()
        left = torch.eye(256).double() - filtered
        parts = left @ covariance @ left.mT + float(sigma) ** 2 * filtered @ filtered.mT
        mean_square = float(parts.diagonal(dim1=1, dim2=2).mean())
        assert float(skip(eye[:1], level)[1]) == pytest.approx(math.sqrt(mean_square), rel=1e-4)


@pytest.fixture(scope="module")
def principal():
    """A filter of 40 components of images whose directions after the first 40 have little and unequal variance."""
    made = PrincipalSkip((2, 8, 8), 40)
    random = torch.Generator().manual_seed(2)
    directions, _ = torch.linalg.qr(torch.randn(128, 128, generator=random, dtype=torch.float64))
    size = torch.cat([torch.linspace(2, 0.3, 40), torch.linspace(0.05, 0.03, 88)]).double()
    seen = (torch.randn(600, 128, generator=random, dtype=torch.float64) * size) @ directions.T
    seen = (seen + torch.linspace(-1, 1, 128)).reshape(600, 2, 8, 8)
    made.fit(seen)
    return made, seen


def test_a_filter_of_components_is_that_of_their_gaussian(principal):
    # With float16 numbers: variances move by 2^-8 at most, gains by a quarter of it, directions by 2^-11 of their size.
    skip, seen = principal
    mean, flat = seen.mean(0), (seen - seen.mean(0)).flatten(1)
    variances, vectors = torch.linalg.eigh(flat.T @ flat / len(flat))
    variances[:88] = variances[:88].mean()
    covariance = vectors @ torch.diag(variances) @ vectors.T
    z = mean + torch.randn(3, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    filtered, error = skip(z.float(), SIGMAS.reshape(-1, 1, 1, 1))
    for row, sigma in enumerate(SIGMAS.tolist()):
        noisy = covariance + sigma**2 * torch.eye(128, dtype=torch.float64)
        gain = torch.linalg.solve(noisy, covariance).T
        wanted = mean + (gain @ (z[row] - mean).flatten()).reshape(2, 8, 8)
        size = float((z[row] - mean).square().mean().sqrt())
        assert float((filtered[row] - wanted).square().mean().sqrt()) < (2**-10 + 2 * 2**-11) * size + 2**-11
        mean_square = float((sigma**2 * gain).diagonal().mean())  # tr of the posterior covariance
        assert float(error[row]) == pytest.approx(math.sqrt(mean_square), rel=2**-8)


def test_components_beat_a_spectrum_where_places_differ(principal):
    skip, seen = principal
    z = seen.float() + 0.5 * torch.randn(600, 2, 8, 8, generator=torch.Generator().manual_seed(4))
    level = torch.full((600, 1, 1, 1), 0.5)
    ours = (skip(z, level)[0] - seen).square().mean()
    assert float(ours) < 0.8 * float((Wiener.fit(seen)(z.double(), 0.5) - seen).square().mean())


def test_a_new_network_of_components_is_their_filter():
    shape = TINY.model_copy(update={"components": 30})
    network = build_network(shape, seed=3)
    network.skip.fit(images(60))
    z = images(3) + SIGMAS.reshape(-1, 1, 1, 1) * torch.randn(3, 2, 16, 16)
    assert torch.equal(precondition(network, z, SIGMAS, 0.5), network.skip(z, SIGMAS.reshape(-1, 1, 1, 1))[0])
    for wrong in ({"components": 512}, {"components": 30, "wiener": False}):
        with pytest.raises(ValidationError, match="components are of the filter"):
            Architecture(**{**TINY.model_dump(), **wrong})


def test_the_loss_counts_in_errors_of_the_filter(fitted):
    x, noise = images(3), torch.randn(3, 2, 16, 16)
    loss = denoising_loss(fitted, Batch(x, torch.ones_like(x)), SIGMAS, noise, 0.5).detach()
    level = SIGMAS.reshape(-1, 1, 1, 1)
    linear, error = fitted.skip(x + level * noise, level)
    assert float(loss) == pytest.approx(float(((linear - x) / error).square().sum()), rel=1e-5)


@pytest.mark.parametrize("components", [0, 20])
def test_stored_and_loaded_it_is_the_same_network(tmp_path, components):
    network = build_network(TINY.model_copy(update={"components": components}), seed=3)
    network.skip.fit(images())
    torch.manual_seed(5)
    for value in network.parameters():
        value.data = (value.data + 0.02 * torch.randn_like(value)).half().float()
    facts = {
        "data": [], "held_out": [], "denoising": [], "unfit_for": "anything", "weights_licence": "CC0",
        "budget": {"images": 1, "seconds": 1, "precision": "float32"},
    }  # fmt: skip
    space, schedule = Space(("field", "y", "x"), (2, 16, 16), {}, "1"), Schedule(0.01, 10.0)
    prior = NetworkPrior(space, schedule, Card("toy", "toy", facts), network, sigma_data=0.5)
    save_prior(tmp_path / "toy", prior)
    z = torch.randn(2, 2, 16, 16)
    loaded = load_prior(tmp_path / "toy")
    assert torch.equal(loaded.denoise(z, 0.4), prior.denoise(z, 0.4))
    kept = loaded.network.skip.state_dict()
    assert kept.keys() == network.skip.state_dict().keys()
    assert all(torch.equal(kept[name], value) for name, value in network.skip.state_dict().items())


def test_what_has_no_filter_is_refused():
    with pytest.raises(ValidationError, match="wiener is for whole images"):
        Architecture(family="adm", size=16, channels=(32, 64), blocks=1, whole=(32, 32), wiener=True)
    skip = WienerSkip((2, 16, 16))
    for wrong in (images(1), images(side=8), images(fields=1), torch.full((4, 2, 16, 16), torch.nan)):
        with pytest.raises(InputError, match="two or more finite images"):
            skip.fit(wrong)
