import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from recon.comm import Comm
from recon.errors import InputError
from recon.likelihoods import GaussianLikelihood
from recon.operators import MatrixOperator
from recon.posterior import Posterior
from recon.priors import Card, LatentPrior, NetworkPrior, load_prior, save_prior
from recon.priors.autoencoder import Autoencoder, AutoencoderArchitecture, Autoencoding, build_autoencoder
from recon.priors.network import Architecture, build_network
from recon.priors.objective import Batch, HeldOut, Task
from recon.priors.training import Training, TrainingConfig
from recon.samplers import DPS, MMPS, sample
from recon.schedules import Schedule
from recon.space import Space

TINY = AutoencoderArchitecture(size=16, channels=(8, 16), latents=2)
SCHEDULE = Schedule(0.01, 10.0)
SPACE = Space.grid((16, 16), 1.0, "1")


def images(count, seed=0):
    """Stripes of a random phase and height: two numbers make an image."""
    random = torch.Generator().manual_seed(seed)
    phase, height = 2 * math.pi * torch.rand(count, 1, 1, generator=random), torch.rand(count, 1, 1, generator=random)
    return (height * torch.cos(math.pi * torch.arange(16) / 4 + phase)).expand(-1, 16, -1).contiguous()


def facts():
    return {
        "data": [{"name": "stripes", "slices": 1, "share": 1.0, "licence": "CC0", "source": "drawn"}],
        "held_out": [],
        "budget": {"images": 0, "seconds": 0.0, "precision": "float32"},
        "denoising": [],
        "unfit_for": "anything",
        "weights_licence": "CC0",
        "autoencoder": {"rmse": {"stripes": 0.1}},
    }


def latent_prior():
    coder = build_autoencoder(TINY, seed=1)
    with torch.no_grad():
        for p in coder.parameters():
            p.copy_(p.to(torch.float16))
    coder.standardise(images(32))
    network = build_network(Architecture(family="adm", size=8, fields=2, shuffle=1, channels=(32, 64), blocks=1))
    coarse = AutoencoderArchitecture(size=32, channels=(8, 16), latents=2)
    assert coarse.shape == (2, 8, 8)
    coder32 = build_autoencoder(coarse, seed=1)
    coder32.load_state_dict(coder.state_dict())
    coder32.mean.copy_(coder.mean)
    coder32.std.copy_(coder.std)
    with torch.no_grad():
        nn.init.normal_(network.unet.out_conv.weight, std=0.05)
        for p in [*network.parameters(), *coder32.parameters()]:
            p.copy_(p.to(torch.float16))
    space = Space.grid((32, 32), 1.0, "1/m")
    return LatentPrior(space, SCHEDULE, Card("coded", "", facts()), (network, coder32), shift=8.0, scale=16.0)


def test_the_sides_say_what_a_latent_is():
    assert TINY.factor == 4
    assert TINY.shape == (2, 4, 4)
    with pytest.raises(ValidationError, match=r"sides \(18, 18\) are not multiples of 4"):
        AutoencoderArchitecture(size=18, channels=(8, 16), latents=2)


def test_latents_are_standardised_channel_by_channel():
    coder, x = build_autoencoder(TINY), images(40)
    coder.standardise(x)
    z = coder.encode(x).transpose(0, 1).flatten(1)
    assert torch.allclose(z.mean(1), torch.zeros(2), atol=1e-5)
    assert torch.allclose(z.std(1), torch.ones(2), atol=1e-5)
    first = coder.mean.clone()
    coder.standardise(x)  # from the network's own latents again, not from standardised ones
    assert torch.equal(coder.mean, first)


def test_decode_undoes_the_standardisation():
    coder, x = build_autoencoder(TINY), images(3)
    plain = coder.decode(coder.encode(x))
    coder.standardise(images(40))
    assert torch.allclose(coder.decode(coder.encode(x)), plain, atol=1e-5)


def test_the_loss_is_that_of_its_formula():
    coder, x = build_autoencoder(TINY), images(3)
    noise, mask = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.ones(3, 16, 16)
    mask[0, :5] = 0
    loss = Autoencoding(0.3, 0.2).loss(coder, Batch(x, mask), torch.ones(3), noise)
    latent = coder.encoder(x[:, None])
    n = nn.functional.pixel_unshuffle(noise[:, None], 4)[:, :2]
    wrong = mask * (coder.decoder(latent + 0.3 * n)[:, 0] - x)
    assert torch.allclose(loss, wrong.square().sum() + 0.04 * latent.square().sum(), rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_an_unknown_pixel_makes_its_latent_unknown(dtype):
    mask = torch.ones(2, 16, 16)
    mask[1, 5, 14] = 0
    known = build_autoencoder(TINY).known(mask.to(dtype))
    assert known.dtype == dtype
    assert known.shape == (2, 2, 4, 4)
    assert [tuple(i) for i in (known == 0).nonzero().tolist()] == [(1, 0, 1, 3), (1, 1, 1, 3)]


def training(folder=None, images_seen=1500):
    config = TrainingConfig(
        images=images_seen,
        batch=20,
        chunk=10,
        learning_rate=3e-3,
        ema=100,
        precision="float32",
        validation_sigmas=(0.01,),
    )

    def batches(step, rows):
        x = images(20, 100 + step)[list(rows)]
        return Batch(x, torch.ones_like(x))

    task = Task(
        build_autoencoder(TINY).train(),
        batches,
        SCHEDULE,
        1.0,
        HeldOut(images(32, 5)),
        objective=Autoencoding(0.05, 0.02),
    )
    return Training(config, task, folder, Comm(workers=1))


def test_training_codes_images_it_has_not_seen():
    run = training()
    held_out = images(64, 7)
    before = run.task.aim.error(run.network, HeldOut(held_out), 0.01, run.device)
    run.run()
    after = run.task.aim.error(run.network, HeldOut(held_out), 0.01, run.device)
    shaken = run.task.aim.error(run.network, HeldOut(held_out), 1.0, run.device)
    spread = float(held_out.std())
    assert before > 0.9 * spread
    assert after < 0.5 * spread  # the mean image leaves all of it
    assert shaken > 2 * after  # the level is that of the disturbance


def test_its_training_resumes_bit_for_bit(tmp_path):
    whole = training(tmp_path / "whole", 100)
    whole.run()
    training(tmp_path / "cut", 100).run(stop_after=2)
    resumed = training(tmp_path / "cut", 100)
    resumed.run()
    one, two = whole.averaged(), resumed.averaged()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_latent_prior_survives_its_files(tmp_path):
    prior = latent_prior()
    card = save_prior(tmp_path / "priors" / "coded", prior)
    loaded = load_prior(tmp_path / "priors" / "coded")
    assert isinstance(loaded, LatentPrior)
    assert card.autoencoder is not None
    assert card.autoencoder.rmse == {"stripes": 0.1}
    z, x = torch.randn(2, 2, 8, 8), 8 + 16 * torch.randn(2, 32, 32)
    assert torch.equal(loaded.denoise(z, 0.7), prior.denoise(z, 0.7))
    assert torch.equal(loaded.decode(z), prior.decode(z))
    assert torch.equal(loaded.encode(x), prior.encode(x))
    assert not torch.equal(loaded.encode(x), build_autoencoder(card.autoencoder.architecture).encode((x - 8) / 16))


def test_units_are_physical_outside():
    prior = latent_prior()
    z = torch.randn(3, 2, 8, 8)
    assert torch.allclose(prior.decode(z), 8 + 16 * prior.coder.decode(z)[:, 0])
    x = 8 + 16 * images(1).repeat(1, 2, 2)
    assert torch.equal(prior.encode(x), prior.coder.encode((x - 8) / 16))


def test_gradients_pass_through_the_decoder():
    prior = latent_prior().double()
    z = torch.randn(1, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    direction = torch.randn(z.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    (gradient,) = torch.autograd.grad(prior.decode(z).square().sum(), z)
    h = 1e-5
    with torch.no_grad():
        there, back = (prior.decode(z + s * h * direction).square().sum() for s in (1, -1))
    # Central differences: an error of h^2 times the third derivative, and of rounding over h.
    assert float((gradient * direction).sum()) == pytest.approx(float((there - back) / (2 * h)), rel=1e-5)


class Identity(Autoencoder):
    """A latent that is the image."""

    def encode(self, image):
        return image.reshape(len(image), 1, *image.shape[-2:])

    def decode(self, z):
        return z


def test_with_the_identity_as_coder_dps_on_latents_is_dps_on_pixels():
    architecture = Architecture(family="adm", size=16, channels=(32, 64), blocks=1)
    network = build_network(architecture)
    with torch.no_grad():
        nn.init.normal_(network.unet.out_conv.weight, std=0.05)
    coder = Identity(AutoencoderArchitecture(size=16, shuffle=1, channels=(8,), latents=1))
    pixels = NetworkPrior(SPACE, SCHEDULE, Card("p"), network, sigma_data=1.0, shift=2.0, scale=3.0)
    latents = LatentPrior(SPACE, SCHEDULE, Card("l"), (network, coder), shift=2.0, scale=3.0)
    operator = MatrixOperator(torch.randn(5, 256, generator=torch.Generator().manual_seed(0)) / 16, SPACE)
    likelihood = GaussianLikelihood(operator, torch.ones(5), 1.0)
    one, two = (sample(Posterior(prior, likelihood), DPS(steps=6), draws=3, seed=1).x for prior in (pixels, latents))
    assert bool(torch.isfinite(one).all())
    assert torch.equal(one, two)
    with pytest.raises(InputError, match=r"affine decoder; 'l' decodes through a network"):
        sample(Posterior(latents, likelihood), MMPS(steps=6), draws=1)


def test_it_refuses():
    prior = latent_prior()
    with pytest.raises(InputError, match="no linear part; use a latent sampler"):
        prior.decode_linear(torch.zeros(1, 2, 8, 8))
    with pytest.raises(InputError, match="neither conditions nor a place"):
        prior.told(None, (0, 0))
    with pytest.raises(InputError, match=r"the autoencoder is of images \(1, 32, 32\); the space is"):
        LatentPrior(SPACE, SCHEDULE, Card("x"), (prior.network, prior.coder))
    with pytest.raises(InputError, match="needs noise > 0 and fidelity > 0; got 0"):
        Autoencoding(0, 1)
    many = build_autoencoder(AutoencoderArchitecture(size=16, shuffle=1, channels=(8,), latents=2))
    with pytest.raises(InputError, match="2 latent channels are more than the 1 values"):
        Autoencoding(0.1, 0.1).loss(many, Batch(images(1), torch.ones(1, 16, 16)), torch.ones(1), images(1))
