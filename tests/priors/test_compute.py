"""The same prior computed otherwise: what changes no bit, what must pass the guard, what is refused."""

from __future__ import annotations

import math
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from recon.errors import InputError
from recon.priors import Card, GaussianPrior, NetworkPrior
from recon.priors.accuracy import Accuracy, measure, own_images
from recon.priors.compute import Compute, accelerate, in_chunks
from recon.priors.network import Architecture, build_network
from recon.priors.superposition import ScoreSum
from recon.schedules import Schedule
from recon.space import Space

IMAGE = Space(("y", "x"), (32, 32), {}, "1/m")


def network_prior(network=None, **facts):
    if network is None:
        network = build_network(Architecture(family="adm", size=32, channels=(32, 64), blocks=1), seed=1)
        torch.manual_seed(2)
        for value in network.parameters():
            value.data += 0.02 * torch.randn_like(value)
    return NetworkPrior(IMAGE, Schedule(0.01, 10.0), Card("tiny", "", facts), network, sigma_data=0.5)


def pulled(prior, z, sigma=0.3):
    """The denoised state and two vjps of one evaluation, as a sampler takes them."""
    point = z.detach().requires_grad_()
    out = prior.denoise(point, sigma)
    v = torch.linspace(-1, 1, z.numel()).reshape(z.shape)
    return [out.detach(), *(torch.autograd.grad(out, point, u, retain_graph=True)[0] for u in (v, v.flip(0)))]


def same_bits(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


class Live(TorchDispatchMode):
    """The largest number of bytes held at once by tensors that operations within made."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.seen = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for part in out if isinstance(out, tuple | list) else (out,):
            if isinstance(part, torch.Tensor):
                storage = part.untyped_storage()
                if storage._cdata not in self.seen:
                    size = storage.nbytes()
                    self.seen[storage._cdata] = weakref.finalize(storage, self._gone, storage._cdata, size)
                    self.now += size
                    self.peak = max(self.peak, self.now)
        return out

    def _gone(self, key, size):
        self.seen.pop(key, None)
        self.now -= size


def peak(prior, z):
    with Live() as live:
        pulled(prior, z)
    return live.peak


def test_float32_as_it_is_changes_no_bit():
    prior, z = network_prior(), torch.randn(4, 32, 32)
    plain = accelerate(prior, Compute())
    assert same_bits(pulled(plain, z), pulled(prior, z))
    assert plain.prior is prior
    assert plain.accuracy == ()
    assert plain.card.facts["compute"]["precision"] == "float32"


def test_chunks_are_what_the_network_sees():
    prior, z, sizes = network_prior(), torch.randn(5, 32, 32), []
    prior.network.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    levels = torch.tensor([0.1, 0.2, 0.5, 1.0, 3.0])
    chunked = accelerate(prior, Compute(chunk=2)).denoise(z, levels)
    assert sizes == [2, 2, 1]
    torch.testing.assert_close(chunked, prior.denoise(z, levels), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["adm", "drunet"])
def test_recomputed_blocks_are_the_same_bits_for_less_memory(family):
    channels = (32, 64) if family == "adm" else (8, 8, 8, 8)
    prior = network_prior(build_network(Architecture(family=family, size=32, channels=channels, blocks=3), seed=1))
    for value in prior.network.parameters():
        value += 0.02 * torch.randn_like(value)
    z = torch.randn(4, 32, 32)
    lean = accelerate(prior, Compute(recompute="blocks"))
    assert same_bits(pulled(lean, z), pulled(prior, z))
    with torch.no_grad():
        assert torch.equal(lean.denoise(z, 0.3), prior.denoise(z, 0.3))
    assert peak(lean, z) < 0.75 * peak(prior, z)
    ours, theirs = dict(lean.prior.named_parameters()), dict(prior.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(ours[name] is theirs[name] for name in ours), "the weights are held twice"
    assert not any("forward" in vars(block) for block in prior.modules()), "the prior itself was changed"


def test_blocks_are_found_inside_priors_made_of_priors():
    prior, z = network_prior(), torch.randn(4, 32, 32)
    both = ScoreSum([prior, network_prior()])
    lean = accelerate(both, Compute(recompute="blocks"))
    assert same_bits(pulled(lean, z), pulled(both, z))
    assert peak(lean, z) < 0.75 * peak(both, z)


def test_recomputed_chunks_are_the_same_bits_for_the_memory_of_one():
    prior, z = network_prior(), torch.randn(8, 32, 32)
    lean, held = (accelerate(prior, Compute(chunk=2, recompute=how)) for how in ("chunks", "nothing"))
    assert same_bits(pulled(lean, z), pulled(held, z))
    # One of four chunks is held, besides arrays of the size of the state.
    assert peak(lean, z) < 0.4 * peak(held, z)


def test_a_recomputing_copy_still_recomputes():
    prior, z = network_prior(), torch.randn(4, 32, 32)
    lean = accelerate(prior, Compute(recompute="blocks"))
    again = pickle.loads(pickle.dumps(lean))
    assert same_bits(pulled(again, z), pulled(prior, z))
    assert peak(again, z) == peak(lean, z)


def test_weights_are_laid_out_channels_last_in_a_copy():
    network = build_network(Architecture(family="adm", size=32, channels=(32, 64), blocks=1), seed=1)
    for value in network.parameters():
        value.data = (value + 0.02 * torch.randn_like(value)).contiguous()
    prior, z = network_prior(network), torch.randn(2, 32, 32)
    laid = accelerate(prior, Compute(channels_last=True))
    wide = [p for p in laid.parameters() if p.ndim == 4]
    assert wide and all(p.is_contiguous(memory_format=torch.channels_last) for p in wide)
    assert all(p.is_contiguous() for p in prior.parameters()), "the prior itself was changed"
    assert not any(p.requires_grad for p in laid.parameters())
    torch.testing.assert_close(laid.denoise(z, 0.3), prior.denoise(z, 0.3), rtol=0, atol=1e-5)


def test_bfloat16_is_in_force_and_the_rest_is_float32():
    prior, z, kinds = network_prior(), torch.randn(3, 32, 32), set()
    for module in prior.network.modules():
        if isinstance(module, nn.Linear) or "Conv" in type(module).__name__:
            module.register_forward_hook(lambda m, i, out: kinds.add(out.dtype))
    half = accelerate(prior, Compute("bfloat16", recompute="chunks"), probe=0.5 * torch.randn(2, 32, 32))
    kinds.clear()
    out, vjp, _ = pulled(half, z)
    assert kinds == {torch.bfloat16}
    assert out.dtype == vjp.dtype == torch.float32
    plain = prior.denoise(z, 0.3)
    difference = float((out - plain).square().mean().sqrt())
    # c_out F with 8 bits of mantissa: above half a rounding of the output alone, below a hundred.
    c_out = 0.3 * 0.5 / math.hypot(0.3, 0.5)
    scale = c_out * float(((plain - 0.25 / 0.34 * z) / c_out).square().mean().sqrt())
    assert 2**-9 / 2 < difference / scale < 100 * 2**-9
    assert 0 < max(one.loss for one in half.accuracy) <= 0.05
    assert not torch.is_autocast_enabled("cpu")


class Fragile(nn.Module):
    """``w z - 300 z`` with a convolution of weight 300.37: nothing is left of it in bfloat16."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 1, bias=False)
        nn.init.constant_(self.layer.weight, 300.37)

    def forward(self, z, c_noise):
        return self.layer(z) - 300 * z


def test_a_loss_above_the_limit_is_refused_or_avoided():
    prior = network_prior(Fragile(), denoising=ROWS)
    with pytest.raises(InputError, match=r"'tiny' computed in bfloat16 differs by .* a loss of .* dB, and 0.05 dB are"):
        accelerate(prior, Compute("bfloat16"))
    avoided = accelerate(prior, Compute("bfloat16", otherwise="float32"))
    assert avoided.compute.precision == "float32"
    assert max(one.loss for one in avoided.accuracy) > 0.05
    z = torch.randn(2, 32, 32)
    assert torch.equal(avoided.denoise(z, 0.3), prior.denoise(z, 0.3))
    allowed = accelerate(prior, Compute("bfloat16", loss=100.0))
    assert not torch.equal(allowed.denoise(z, 0.3), prior.denoise(z, 0.3))


ROWS = [
    {"data": "one", "sigma": 0.1, "prior": 0.04},
    {"data": "two", "sigma": 0.1, "prior": 0.03},
    {"data": "one", "sigma": 1.0, "prior": 0.2},
    {"data": "one", "sigma": 99.0, "prior": 0.3},
]


class Offset(GaussianPrior):
    """A denoiser that is wrong by a known amount."""

    by = 0.006

    def predict(self, z, sigma):
        return super().predict(z, sigma) + self.by * sigma[:, None]


def test_the_guard_measures_what_it_says():
    plain, other = (
        kind(torch.zeros(4).double(), torch.ones(4).double(), None, Schedule(0.01, 10.0))
        for kind in (GaussianPrior, Offset)
    )
    plain.card = Card("plain", "", {"denoising": ROWS})
    found = measure(plain, other, torch.zeros(2, 4).double())
    assert [(one.sigma, one.error) for one in found] == [(0.1, 0.03), (1.0, 0.2)]
    assert [one.difference for one in found] == pytest.approx([0.0006, 0.006])
    assert found[1].loss == pytest.approx(10 * math.log10(1 + 0.03**2))
    assert Accuracy(1.0, 1.0, math.sqrt(10**0.005 - 1)).loss == pytest.approx(0.05)
    assert Accuracy(1.0, 0.5, math.nan).loss == Accuracy(1.0, 0.0, 0.1).loss == math.inf
    assert Accuracy(1.0, 0.0, 0.0).loss == 0


def test_without_a_card_the_error_is_that_on_the_probe():
    """``E |D - x|^2 = 1 / (1 + 1 / sigma^2)`` per value for a standard normal prior; 4000 values, 5 standard errors."""
    prior = GaussianPrior(torch.zeros(2000).double(), torch.ones(2000).double(), None, Schedule(0.1, 10.0))
    images = torch.randn(2, 2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = measure(prior, prior, images)
    assert [one.sigma for one in found] == pytest.approx([0.1 * 100 ** (i / 5) for i in range(6)])
    for one in found:
        exact = math.sqrt(1 / (1 + one.sigma**-2))
        assert one.error == pytest.approx(exact, rel=5 / math.sqrt(2 * 4000))


def test_own_images_look_like_draws():
    """Euler's probability flow of N(0, v) is linear; its factor is followed step by step."""
    prior = GaussianPrior(torch.zeros(300).double(), torch.full((300,), 2.0).double(), None, Schedule(0.01, 50.0))
    images = own_images(prior)
    assert images.shape == (2, 300)
    assert float(images.square().mean()) == pytest.approx(2.0, rel=0.5)
    assert torch.equal(images, own_images(prior))


class Small(nn.Module):
    """Two layers that a compiler is soon done with."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, z, c_noise):
        return self.two(torch.nn.functional.silu(self.one(z) + c_noise[:, None, None, None]))


def test_compiled_takes_several_vjps_and_is_checked():
    torch.manual_seed(0)
    prior, z = network_prior(Small()), torch.randn(2, 32, 32)
    quick = accelerate(prior, Compute(compiled="aot_eager"), probe=0.5 * torch.randn(2, 32, 32))
    for ours, theirs in zip(pulled(quick, z), pulled(prior, z), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert len(quick.accuracy) == 6
    again = pickle.loads(pickle.dumps(quick))
    torch.testing.assert_close(again.denoise(z, 0.3), prior.denoise(z, 0.3), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_inductor_takes_several_vjps():
    prior, z = network_prior(), torch.randn(2, 32, 32)
    quick = accelerate(prior, Compute(compiled="inductor"))
    for ours, theirs in zip(pulled(quick, z), pulled(prior, z), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_no_compiler_is_said_plainly():
    def absent(graph, inputs):
        raise RuntimeError("no C++ compiler was found\nand many more lines")

    torch._dynamo.register_backend(absent, name="recon_test_absent")
    with pytest.raises(InputError, match=r"cannot be computed this way here \(.*no C\+\+ compiler.*leave compiled out"):
        accelerate(network_prior(Fragile()), Compute(compiled="recon_test_absent"))
    with pytest.raises(InputError, match="cannot be computed this way here .*nonesuch"):
        accelerate(network_prior(Fragile()), Compute(compiled="nonesuch"))


def test_in_chunks_of_nothing():
    assert in_chunks(lambda z, sigma: 2 * z, torch.zeros(0, 3), torch.zeros(0), 2).shape == (0, 3)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Compute(chunk=0), "at least one draw; got 0"),
        (lambda: Compute(loss=0.0), "positive number of decibel; got 0.0"),
        (lambda: Compute(compiled="inductor", recompute="blocks"), "no blocks left"),
        (lambda: accelerate(network_prior(Fragile()), Compute(recompute="blocks")), "has no list of blocks"),
        (
            lambda: accelerate(network_prior(), Compute("bfloat16"), probe=torch.zeros(2, 8, 8)),
            r"got shape \(2, 8, 8\)",
        ),
    ],
)
def test_refusals(make, text):
    with pytest.raises(InputError, match=text):
        make()
