import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from recon.errors import InputError
from recon.priors.base import Card
from recon.priors.network import Architecture, NetworkPrior, build_network, precondition
from recon.schedules import Schedule
from recon.space import Space

TINY = Architecture(family="adm", size=32, channels=(32, 64), blocks=1)


class Recorder(nn.Module):
    """Remembers what it was given and answers with a constant."""

    def forward(self, z, c_noise):
        self.z, self.c_noise = z, c_noise
        return torch.full_like(z, 0.25)


def prior(network, size=32):
    space = Space(("y", "x"), (size, size), {}, "1/m")
    return NetworkPrior(space, Schedule(0.01, 10.0), Card("tiny"), network, sigma_data=0.5, shift=8.0, scale=16.0)


def trained_like(architecture=TINY):
    """A network whose last layer is not zero, as after training."""
    network = build_network(architecture, seed=1)
    torch.manual_seed(2)
    for value in network.parameters():
        value.data += 0.02 * torch.randn_like(value)
    return network


@pytest.mark.parametrize("sigma", [0.01, 0.5, 7.0])
def test_preconditioning_is_equation_7(sigma):
    network, s = Recorder(), 0.5
    z = torch.linspace(-3, 3, 16).reshape(1, 4, 4)
    denoised = precondition(network, z, torch.tensor([sigma]), s)
    total = sigma**2 + s**2
    assert torch.allclose(network.z, z[:, None] / math.sqrt(total), rtol=1e-6)
    assert network.c_noise.item() == pytest.approx(math.log(sigma) / 4, rel=1e-5)
    assert torch.allclose(denoised, s**2 / total * z + sigma * s / math.sqrt(total) * 0.25, rtol=1e-5)


def test_one_noise_level_per_draw():
    network = trained_like()
    z = torch.randn(2, 32, 32)
    both = prior(network).denoise(z, torch.tensor([0.1, 2.0]))
    alone = torch.cat([prior(network).denoise(z[:1], 0.1), prior(network).denoise(z[1:], 2.0)])
    assert torch.allclose(both, alone, atol=1e-5)
    assert not torch.allclose(both, prior(network).denoise(z, 0.1), atol=1e-2)


def test_gradient_is_that_of_the_denoiser_and_spares_the_parameters():
    denoiser = prior(trained_like())
    z = torch.randn(2, 32, 32, requires_grad=True)
    u, v = torch.randn(2, 32, 32), torch.randn(2, 32, 32)
    (gradient,) = torch.autograd.grad(denoiser.denoise(z, 0.3), z, v)
    with torch.no_grad():
        step = 1e-2
        slope = (denoiser.denoise(z + step * u, 0.3) - denoiser.denoise(z - step * u, 0.3)) / (2 * step)
    assert (gradient * u).sum().item() == pytest.approx((slope * v).sum().item(), rel=1e-2)
    assert not any(p.requires_grad for p in denoiser.parameters())


@pytest.mark.parametrize("family", ["adm", "drunet"])
def test_a_draw_does_not_see_its_company(family):
    channels = (32, 64) if family == "adm" else (8, 8, 8, 8)
    size = 32 if family == "adm" else 64
    denoiser = prior(trained_like(Architecture(family=family, size=size, channels=channels, blocks=1)), size)
    z = torch.randn(3, size, size)
    other = z.clone()
    other[1:] = 100 * torch.randn(2, size, size)
    assert torch.equal(denoiser.denoise(z, 0.3)[0], denoiser.denoise(other, 0.3)[0])
    assert torch.allclose(denoiser.denoise(z, 0.3)[:1], denoiser.denoise(z[:1], 0.3), atol=1e-5)


def test_position_is_told_in_two_channels_after_those_of_the_image():
    network, seen = build_network(TINY.model_copy(update={"position": True})), []
    network.unet.enc["16x16_conv"].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    z = torch.randn(2, 1, 32, 32)
    network(z, torch.zeros(2))
    assert seen[0].shape == (2, 6, 16, 16)
    assert torch.equal(seen[0][:, 0], z[:, 0, ::2, ::2])
    y, x = seen[0][1, 4:]
    assert torch.equal(y, x.T)
    assert (y[0] == -1).all()
    assert (y[-1] == 1).all()


def test_answers_in_the_type_of_the_state():
    assert prior(trained_like()).denoise(torch.randn(1, 32, 32, dtype=torch.float64), 0.3).dtype == torch.float64


def test_weights_depend_on_the_seed_alone_and_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    one, two, other = (dict(build_network(TINY, seed).named_parameters()) for seed in (3, 3, 4))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"channels": (32, 48)}, r"multiples of 32 and of the first one; got \(32, 48\)"),
        ({"channels": (32,)}, "heads of 64 channels; got 32"),
        ({"family": "drunet"}, "exactly 4 levels"),
    ],
)
def test_refuses_networks_that_cannot_be(change, text):
    with pytest.raises(InputError, match=text):
        build_network(TINY.model_copy(update=change))


def test_refuses_unknown_hyper_parameters():
    with pytest.raises(ValidationError, match="depth"):
        Architecture(family="adm", size=32, channels=(32, 64), blocks=1, depth=3)


def test_refuses_lists_and_senseless_scales():
    space = Space(("time", "z", "y", "x"), (2, 2, 4, 4))
    with pytest.raises(InputError, match=r"images \(y, x\) or \(field, y, x\); got \(time=2"):
        NetworkPrior(space, Schedule(0.1, 1.0), Card("v"), Recorder(), sigma_data=0.5)
    with pytest.raises(InputError, match="sigma_data must be positive; got 0"):
        NetworkPrior(Space(("y", "x"), (4, 4)), Schedule(0.1, 1.0), Card("v"), Recorder(), sigma_data=0.0)


@pytest.mark.parametrize("family", ["adm", "drunet"])
def test_sides_that_cannot_be_halved_are_continued_and_cut(family):
    channels = (32, 64) if family == "adm" else (8, 8, 8, 8)
    odd = Architecture(family=family, size=(11, 13), fields=3, channels=channels, blocks=1, position=family == "adm")
    network = trained_like(odd)
    z = torch.randn(2, 3, 11, 13)
    answer = network(z, torch.zeros(2))
    assert answer.shape == z.shape
    ny, nx = odd.padded
    whole = Architecture(**{**odd.model_dump(), "size": (ny, nx)})
    twin = build_network(whole)
    twin.load_state_dict(network.state_dict())
    continued = torch.nn.functional.pad(z, (0, nx - 13, 0, ny - 11), mode="replicate")
    assert torch.equal(twin(continued, torch.zeros(2))[..., :11, :13], answer)


def test_several_fields_have_their_own_units():
    architecture = Architecture(family="adm", size=(8, 12), fields=2, channels=(32, 64), blocks=1)
    space = Space(("variable", "lat", "lon"), (2, 8, 12), {"variable": ("p", "t")}, "mixed")
    made = NetworkPrior(
        space,
        Schedule(0.01, 10.0),
        Card("two"),
        trained_like(architecture),
        sigma_data=1.0,
        shift=(1e5, 280.0),
        scale=(900.0, 8.0),
    )
    z = torch.randn(3, 2, 8, 12)
    x = made.decode(z)
    assert torch.allclose(x[:, 0], 1e5 + 900 * z[:, 0]) and torch.allclose(x[:, 1], 280 + 8 * z[:, 1])
    assert torch.allclose(made.encode(x), z, atol=1e-4)
    assert torch.allclose(made.decode_linear(z)[:, 1], 8 * z[:, 1])
    assert made.denoise(z, 0.5).shape == z.shape
    with pytest.raises(InputError, match="one number or one per variable"):
        NetworkPrior(space, Schedule(0.01, 10.0), Card("two"), Recorder(), sigma_data=1.0, scale=(1.0, 2.0, 3.0))
