"""The layers computed the short way are the functions of deepinv and torch, with their derivatives."""

import copy

import pytest
import torch
from deepinv.models.utils import UpDownConv2d
from torch import nn
from torch.nn import functional

from recon.priors.layers import Convolution, Norm, shorten
from recon.priors.network import Architecture, build_network


def seeded(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def norm(groups, channels, dtype=torch.float64):
    made = Norm(groups, channels, dtype=dtype)
    with torch.no_grad():
        made.weight.copy_(seeded(channels, seed=1))
        made.bias.copy_(seeded(channels, seed=2))
    return made


# Forward derivatives make torch compile a few formulas of its own, the old way.
SCRIPTS = pytest.mark.filterwarnings("ignore:`torch.jit.*is deprecated")


@SCRIPTS
@pytest.mark.parametrize(("groups", "channels"), [(2, 6), (4, 4), (1, 3)])
def test_the_pull_of_a_norm_is_its_derivative_and_so_is_the_next(groups, channels):
    layer = norm(groups, channels)
    point = (2 + seeded(2, channels, 3, 2)).requires_grad_()

    def call(x, weight, bias):
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    inputs = (point, layer.weight, layer.bias)
    assert torch.autograd.gradcheck(call, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.parametrize("laid_out", [torch.contiguous_format, torch.channels_last])
def test_a_norm_has_the_gradients_of_torch(laid_out):
    layer = norm(8, 32)
    x, g = (seeded(3, 32, 5, 7, seed=s).to(memory_format=laid_out) for s in (3, 4))
    found = {}
    for name, kind in (("ours", Norm), ("torch", nn.GroupNorm)):
        layer.__class__ = kind
        point = x.clone(memory_format=torch.preserve_format).requires_grad_()
        out = layer(point)
        found[name] = (out, *torch.autograd.grad(out, (point, layer.weight, layer.bias), g))
    for ours, theirs in zip(found["ours"], found["torch"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@SCRIPTS
def test_a_norm_can_be_transformed():
    """As deepinv and others do: vjp, jvp and whole Jacobians by torch.func."""
    layer, x, g = norm(2, 6), seeded(2, 6, 3, 2), seeded(2, 6, 3, 2, seed=3)
    found = []
    for kind in (Norm, nn.GroupNorm):
        layer.__class__ = kind
        out, pull = torch.func.vjp(layer, x)
        jacobians = [how(layer)(x) for how in (torch.func.jacrev, torch.func.jacfwd)]
        found.append((out, pull(g)[0], torch.func.jvp(layer, (x,), (g,))[1], *jacobians))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_a_norm_in_bfloat16_rounds_and_no_more():
    """Three roundings to 8 bits on the way: errors of some 2^-8 of the gradient, and none that add up over pixels."""
    layer = norm(32, 64, torch.float32)
    x, g = (seeded(2, 64, 16, 16, seed=s).bfloat16().to(memory_format=torch.channels_last) for s in (3, 4))
    errors = []
    for kind in (torch.float32, torch.bfloat16):
        point = x.to(kind).requires_grad_()
        (pulled,) = torch.autograd.grad(layer(point), point, g.to(kind))
        assert pulled.dtype == kind
        errors.append(pulled.float())
    exact, rounded = errors
    assert float((rounded - exact).square().mean().sqrt()) < 2**-8 * float(exact.square().mean().sqrt())
    assert float((rounded - exact).abs().max()) < 4 * 2**-8 * float(exact.abs().max())


@pytest.mark.parametrize("pixels", [16, 32])
def test_a_norm_in_bfloat16_is_computed_in_float32_and_rounded_once(pixels):
    layer = norm(32, 64, torch.float32)
    x = (3.0 + seeded(2, 64, pixels, pixels, seed=5)).bfloat16().to(memory_format=torch.channels_last)
    once = functional.group_norm(x.float(), 32, layer.weight, layer.bias, layer.eps).bfloat16()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), once, rtol=2**-8, atol=2**-12)
    out = layer(x.requires_grad_())
    torch.testing.assert_close(out, once, rtol=2**-8, atol=2**-12)
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("how", [{}, {"up": True}, {"down": True}])
@pytest.mark.parametrize("kernel", [0, 1, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_is_that_of_deepinv(how, kernel, bias):
    layer = UpDownConv2d(4, 4 if kernel == 0 else 6, kernel, bias=bias, **how).double()
    if layer.bias is not None:
        layer.bias.data = seeded(6, seed=5)
    x = seeded(2, 4, 8, 6)
    torch.testing.assert_close(Convolution(layer)(x), layer(x), rtol=1e-12, atol=1e-12)


def test_other_filters_are_left_alone():
    layers = nn.Sequential(
        UpDownConv2d(4, 4, 3, up=True, resample_filter=(1, 3, 3, 1)),
        UpDownConv2d(4, 4, 3, down=True, fused_resample=True),
        nn.GroupNorm(2, 4, affine=False),
    )
    before = [type(layer) for layer in layers]
    shorten(layers)
    assert [type(layer) for layer in layers] == before


def test_a_network_is_the_one_of_deepinv_under_the_same_names():
    from deepinv.models import ADMUNet

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = ADMUNet(
            img_resolution=16, in_channels=2, out_channels=2, model_channels=32, channel_mult=(1, 2), num_blocks=1,
            attn_resolutions=(8,), dropout=0.0, pretrained=None,
        ).double()  # fmt: skip
        for p in theirs.parameters():
            p.data += 0.02 * torch.randn_like(p)
    ours = copy.deepcopy(theirs)
    shorten(ours)
    assert not any(isinstance(m, UpDownConv2d) or type(m) is nn.GroupNorm for m in ours.modules())
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    x, level = seeded(2, 2, 16, 16), seeded(2, seed=9)
    found = []
    for network in (ours, theirs):
        point = x.clone().requires_grad_()
        out = network.forward_unet(point, level)
        found.append((out, *torch.autograd.grad(out.square().sum(), (point, *network.parameters()))))
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)


def test_networks_are_built_so():
    made = build_network(Architecture(family="adm", size=16, channels=(32, 64), blocks=1))
    kinds = {type(m).__name__ for m in made.modules()}
    assert {"Norm", "Convolution"} <= kinds
    assert not kinds & {"GroupNorm", "UpDownConv2d"}
