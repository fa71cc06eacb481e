"""score_sde and EDM2 against the published formulas; ADM and EDM against deepinv, which has networks of the same tensors."""

import math

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from recon.errors import InputError
from recon.priors.checkpoints import load_checkpoint, pixel_range
from recon.priors.checkpoints.adm import AdmConfig, AdmUNet
from recon.priors.checkpoints.edm import EdmUNet
from recon.priors.checkpoints.edm2 import Edm2Config, Edm2UNet
from recon.priors.checkpoints.ncsnpp import NcsnPP
from recon.priors.checkpoints.score_sde import ScoreSdeConfig
from recon.space import Space
from tests.priors.checkpoints.published import NcsnppReference, edm2_reference, randomise

RGB = Space(("field", "y", "x"), (3, 8, 8), {}, "1/m")
GREY = Space(("y", "x"), (8, 8), {}, "1/m")
PIXELS = {"shift": 0.0, "scale": 1.0}


def noisy(space, sigma, n=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(n, *space.shape, dtype=dtype, generator=generator) * math.sqrt(0.25 + sigma**2)


def same(got, expected, tolerance=1e-11):
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


# --- score_sde ---------------------------------------------------------------------------------------------------------

MODEL = {
    "name": "ncsnpp", "nf": 8, "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [4], "resamp_with_conv": True,
    "conditional": True, "scale_by_sigma": True, "nonlinearity": "swish", "num_scales": 200, "sigma_min": 0.01,
    "sigma_max": 50.0, "beta_min": 0.1, "beta_max": 20.0, "fir": True, "fir_kernel": [1, 3, 3, 1], "skip_rescale": True,
    "resblock_type": "biggan", "progressive": "output_skip", "progressive_input": "input_skip", "progressive_combine": "sum",
    "embedding_type": "fourier",
}  # fmt: skip
VARIANTS = {
    "ffhq_256_ncsnpp_continuous": ("vesde", True, False, {}),
    "cat": ("vesde", True, False, {"progressive_combine": "cat"}),
    "cifar10_ncsnpp_continuous": (
        "vesde", True, False, {"progressive": "none", "progressive_input": "residual", "ch_mult": [1, 2, 2]},
    ),
    "cifar10_ddpmpp_continuous": (
        "vpsde", True, True,
        {"embedding_type": "positional", "fir": False, "progressive": "none", "progressive_input": "none",
         "scale_by_sigma": False, "nonlinearity": "elu"},
    ),
    "ddpm_blocks": (
        "subvpsde", True, True,
        {"embedding_type": "positional", "fir": False, "progressive": "none", "progressive_input": "none",
         "scale_by_sigma": False, "resblock_type": "ddpm", "skip_rescale": False, "resamp_with_conv": False},
    ),
    "cifar10_ddpm": ("vpsde", False, True, {"name": "ddpm", "nf": 32, "scale_by_sigma": False}),
    "unconditional": ("vesde", False, False, {"embedding_type": "positional", "conditional": False}),
}  # fmt: skip


def score_config(variant):
    sde, continuous, centered, changes = VARIANTS[variant]
    # configurations of ddpm end before these
    left_out = list(MODEL)[list(MODEL).index("fir") :] if changes.get("name") == "ddpm" else ()
    return {
        "training": {"sde": sde, "continuous": continuous, "batch_size": 128},
        "data": {"image_size": 8, "num_channels": 3, "centered": centered, "dataset": "CIFAR10"},
        "model": {**{k: v for k, v in MODEL.items() if k not in left_out}, **changes, "ema_rate": 0.999},
        "seed": 42,
    }


def score_state(config, seed=0):
    parsed = ScoreSdeConfig.model_validate(config)
    return randomise(NcsnPP(parsed.model, parsed.data).state_dict(), seed)


def published_denoiser(config, state, z, sigma):
    """x + sigma^2 score (VE), or (x_t - sigma_t eps) / alpha_t, with score and eps as score_sde computes them."""
    model, sde = config["model"], config["training"]["sde"]
    network = NcsnppReference(state, {**model, **config["data"]})
    level = sigma[:, None, None, None]
    if sde == "vesde":
        n = model["num_scales"]
        discrete = (n - 1) * (torch.log(model["sigma_max"] / sigma) / math.log(model["sigma_max"] / model["sigma_min"]))
        answer = network(z, sigma if model.get("embedding_type") == "fourier" else discrete)
        score = answer / level if model["scale_by_sigma"] else answer
        return z + level**2 * score
    if config["training"]["continuous"]:
        b0, b1 = model["beta_min"], model["beta_max"]
        alpha = (1 + sigma**2).rsqrt() if sde == "vpsde" else ((sigma**2 + 4).sqrt() - sigma) / 2
        t = (-b0 + (b0**2 - 4 * (b1 - b0) * alpha.log()).sqrt()) / (b1 - b0)  # alpha = exp(-t^2 (b1 - b0)/4 - t b0/2)
        label = 999 * t
    else:
        beta = torch.linspace(model["beta_min"], model["beta_max"], model["num_scales"], dtype=torch.float64)
        abar = torch.cumprod(1 - beta / model["num_scales"], 0)
        logs = (1 / abar - 1).log() / 2
        above = torch.searchsorted(logs, sigma.log())
        label = above - 1 + (sigma.log() - logs[above - 1]) / (logs[above] - logs[above - 1])
        alpha = (1 + sigma**2).rsqrt()
    a = alpha[:, None, None, None]
    return (a * z - a * level * network(a * z, label)) / a


@pytest.mark.parametrize("variant", VARIANTS)
def test_score_sde_is_the_published_network(tmp_path, variant):
    config = score_config(variant)
    state = score_state(config)
    torch.save({f"module.{name}": value for name, value in state.items()}, tmp_path / "score.pth")
    prior = load_checkpoint(tmp_path / "score.pth", "score_sde", space=RGB, config=config, **PIXELS).double()
    for sigma in (0.03, 0.31, 3.7):
        level = torch.tensor([sigma, 1.3 * sigma], dtype=torch.float64)
        z = noisy(RGB, sigma)
        same(
            prior.denoise(z, level),
            published_denoiser(config, state, z, level),
            1e-8 if variant == "cifar10_ddpm" else 1e-11,
        )
    assert prior.card.facts["sigma_range"] == [prior.schedule.sigma_min, prior.schedule.sigma_max]


def training_file(path, config):
    """What score_sde's save_checkpoint writes: network, average (a list), optimizer, step; levels as a buffer."""
    state, average = score_state(config), score_state(config, seed=1)
    levels = torch.logspace(math.log10(50), -2, config["model"]["num_scales"], dtype=torch.float64)
    shadow = [value for name, value in average.items() if name != "all_modules.0.W"]
    torch.save(
        {
            "optimizer": {
                "state": {0: {"step": 3, "exp_avg": torch.zeros(2)}},
                "param_groups": [{"lr": 2e-4, "params": [0]}],
            },
            "model": {f"module.{n}": v for n, v in {"sigmas": levels, **state}.items()},
            "ema": {"decay": 0.999, "num_updates": 10, "shadow_params": shadow},
            "step": 10,
        },
        path,
    )
    return state, {**average, "all_modules.0.W": state["all_modules.0.W"]}


def test_score_sde_training_files_give_the_network_or_its_average(tmp_path):
    config = score_config("ffhq_256_ncsnpp_continuous")
    state, average = training_file(tmp_path / "checkpoint_8.pth", config)
    z, level = noisy(RGB, 0.3), torch.tensor([0.3, 0.4], dtype=torch.float64)
    for entry, weights in {"model": state, "ema": average}.items():
        told = {**config, "recon": {"entry": entry}}
        prior = load_checkpoint(tmp_path / "checkpoint_8.pth", space=RGB, config=told, **PIXELS).double()
        same(prior.denoise(z, level), published_denoiser(config, weights, z, level))
        assert prior.card.facts["entry"] == entry
        assert prior.card.facts["format"] == "score_sde"
    with pytest.raises(InputError, match="needs recon.entry, 'model' or 'ema'.*got None"):
        load_checkpoint(tmp_path / "checkpoint_8.pth", space=RGB, config=config, **PIXELS)
    other = {**config, "model": {**config["model"], "sigma_max": 348.0}}
    with pytest.raises(InputError, match="other levels than its config: 50 to 0.01.*config 348 to 0.01"):
        load_checkpoint(tmp_path / "checkpoint_8.pth", space=RGB, config={**other, "recon": {"entry": "ema"}}, **PIXELS)


@pytest.mark.parametrize(
    ("section", "change", "text"),
    [
        ("model", {"nf": 16}, "does not hold the network it should: all_modules.0.W is \\(8,\\), expected \\(16,\\)"),
        ("model", {"ch_mult": [1, 2, 2]}, "is missing"),
        ("model", {"fir": None}, "ncsnpp needs fir"),
        ("model", {"fir_kernel": [1, 2, 3]}, "even number of symmetric"),
        ("model", {"progressive": "residual"}, "model.progressive"),
        ("model", {"sigma_max": None}, "model.sigma_max"),
        ("training", {"sde": "vpsde"}, "fourier features embed log sigma"),
        ("data", {"num_channels": 1}, "network for 1 channels; .* has 3"),
        ("data", {"image_size": 16}, "trained on 16 x 16; got 8 x 8"),
    ],
)
def test_score_sde_refuses_what_does_not_fit(tmp_path, section, change, text):
    config = score_config("ffhq_256_ncsnpp_continuous")
    torch.save(score_state(config), tmp_path / "score.pth")
    told = {**config, section: {**config[section], **change}}
    with pytest.raises(InputError, match=text):
        load_checkpoint(tmp_path / "score.pth", "score_sde", space=RGB, config=told, **PIXELS)


# --- EDM2 --------------------------------------------------------------------------------------------------------------


def edm2_state(classes=0):
    """The names and shapes of an EDM2 network of two levels, 64 and 128 channels, written out."""
    w, emb = {"8": 64, "4": 128}, 128
    shapes = {"out_gain": (), "emb_fourier.freqs": (64,), "emb_fourier.phases": (64,), "emb_noise.weight": (emb, 64)}
    if classes:
        shapes["emb_label.weight"] = (emb, classes)

    def block(name, inside, out, attention=False, enc=True):
        shapes[f"{name}.emb_gain"] = ()
        shapes[f"{name}.conv_res0.weight"] = (out, out if enc else inside, 3, 3)
        shapes[f"{name}.emb_linear.weight"] = (out, emb)
        shapes[f"{name}.conv_res1.weight"] = (out, out, 3, 3)
        if inside != out:
            shapes[f"{name}.conv_skip.weight"] = (out, inside, 1, 1)
        if attention:
            shapes[f"{name}.attn_qkv.weight"] = (3 * out, out, 1, 1)
            shapes[f"{name}.attn_proj.weight"] = (out, out, 1, 1)

    shapes["enc.8x8_conv.weight"] = (64, 3 + 1, 3, 3)
    block("enc.8x8_block0", 64, w["8"])
    block("enc.4x4_down", 64, 64)
    block("enc.4x4_block0", 64, w["4"], attention=True)
    block("dec.4x4_in0", 128, 128, attention=True, enc=False)
    block("dec.4x4_in1", 128, 128, enc=False)
    block("dec.4x4_block0", 256, 128, attention=True, enc=False)
    block("dec.4x4_block1", 128 + 64, 128, attention=True, enc=False)
    block("dec.8x8_up", 128, 128, enc=False)
    block("dec.8x8_block0", 128 + 64, 64, enc=False)
    block("dec.8x8_block1", 64 + 64, 64, enc=False)
    shapes["out_conv.weight"] = (3, 64, 3, 3)
    state = {f"unet.{name}": torch.empty(shape) for name, shape in shapes.items()}
    state |= {
        "logvar_fourier.freqs": torch.ones(4),
        "logvar_fourier.phases": torch.ones(4),
        "logvar_linear.weight": torch.ones(1, 4),
    }
    return randomise(state)


@pytest.mark.parametrize("label", [None, 2, "zero"])
def test_edm2_is_the_published_network(tmp_path, label):
    state = edm2_state(0 if label is None else 5)
    save_file(state, tmp_path / "edm2.safetensors")  # sorts the names: their order must not matter
    config = {} if label is None else {"zero_label": True} if label == "zero" else {"class_label": label}
    classes = None if label is None else torch.zeros(1, 5) if label == "zero" else torch.eye(5)[label : label + 1]
    prior = load_checkpoint(tmp_path / "edm2.safetensors", space=RGB, config=config, **PIXELS).double()
    assert prior.card.facts["format"] == "edm2"
    for sigma in (0.002, 0.4, 60.0):
        level = torch.tensor([sigma, 1.1 * sigma], dtype=torch.float64)
        z = noisy(RGB, sigma)
        same(prior.denoise(z, level), edm2_reference(state, z, level, classes))


def test_edm2_gradient_is_finite_at_zero(tmp_path):
    """The norms have a square root in them, whose slope at an image of zeros must not be infinite times zero."""
    state = {n.removeprefix("unet."): v for n, v in edm2_state().items() if n.startswith("unet.")}
    with torch.device("meta"):
        network = Edm2UNet(state, Edm2Config())
    network.load_state_dict(
        {n: torch.zeros_like(v) if "block0.conv" in n else v for n, v in state.items()}, assign=True
    )
    x = torch.zeros(1, 3, 8, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(network(x, torch.zeros(1, dtype=torch.float64)).sum(), x)
    assert gradient.isfinite().all()


def test_edm2_refuses_what_does_not_fit(tmp_path):
    torch.save(edm2_state(5), tmp_path / "edm2.pt")
    for config, text in (
        ({}, "5 classes: config needs class_label from 0 to 4; got None"),
        ({"class_label": 5}, "got 5"),
        ({"class_label": 1, "zero_label": True}, "not both"),
        (
            {"class_label": 1, "channels_per_head": 256},
            "attends with 128 channels; channels_per_head in config must divide",
        ),
        ({"class_label": 1, "sigma_date": 0.5}, "sigma_date: Extra"),
    ):
        with pytest.raises(InputError, match=text):
            load_checkpoint(tmp_path / "edm2.pt", "edm2", space=RGB, config=config, **PIXELS)
    with pytest.raises(InputError, match="network for 3 channels; .* has 1"):
        load_checkpoint(tmp_path / "edm2.pt", "edm2", space=GREY, config={"class_label": 1}, **PIXELS)


# --- with deepinv ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models():
    pytest.importorskip("deepinv")
    import deepinv.models.utils as parts
    from deepinv import models

    def exact(self, x):  # the published embedding in the precision of its argument; deepinv rounds it to float32
        k = torch.arange(self.num_channels // 2, dtype=x.dtype)
        angle = x[:, None] * (1 / 10000) ** (k / (self.num_channels // 2 - (1 if self.endpoint else 0)))
        return torch.cat([angle.cos(), angle.sin()], dim=1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts.PositionalEmbedding, "forward", exact)
        yield models


def narrow(network):
    """The norms of EDM: at least four channels a group.  deepinv has 32 groups, which is the same from 128 channels on."""
    for module in network.modules():
        if isinstance(module, nn.GroupNorm):
            module.num_groups = min(32, module.num_channels // 4)
    return network


def with_weights(network, seed=0):
    network.load_state_dict(randomise(network.state_dict(), seed))
    return network.eval()


def adm_unet(models, **more):
    made = {
        "img_resolution": 8, "in_channels": 3, "out_channels": 3, "model_channels": 64, "channel_mult": (1, 2), "num_blocks": 1,
        "attn_resolutions": (8,), "dropout": 0.0, "pretrained": None,
    }  # fmt: skip
    return with_weights(models.ADMUNet(**{**made, **more}))


def ncsnpp(models, kind, **more):
    made = {
        "model_type": kind, "img_resolution": 8, "model_channels": 32, "channel_mult": (1, 2), "num_blocks": 1,
        "attn_resolutions": (8,), "dropout": 0.0, "pretrained": None,
    }  # fmt: skip
    return with_weights(models.NCSNpp(**{**made, **more}))


def karras(unet, z, level, sigma_data):
    """Karras et al. 2022, eq. 7, around the network of deepinv."""
    s = level[:, None, None, None]
    total = s**2 + sigma_data**2
    return sigma_data**2 / total * z + s * sigma_data / total**0.5 * unet(z / total**0.5, level.log() / 4)


@pytest.mark.parametrize("classes", [0, 4])
def test_edm_dhariwal_unet(tmp_path, models, classes):
    network = narrow(adm_unet(models, label_dim=classes, augment_dim=9))
    save_file({f"model.{n}": v.contiguous() for n, v in network.state_dict().items()}, tmp_path / "edm.safetensors")
    config = {"class_label": 3} if classes else {}
    prior = load_checkpoint(tmp_path / "edm.safetensors", space=RGB, config=config, **PIXELS).double()
    assert prior.card.facts["architecture"]["network"] == "DhariwalUNet"
    network.double()
    labels = torch.eye(4, dtype=torch.float64)[3:].expand(2, -1) if classes else None
    for sigma in (0.002, 0.4, 60.0):
        z, level = noisy(RGB, sigma), torch.tensor([sigma, 1.1 * sigma], dtype=torch.float64)
        with torch.no_grad():
            expected = karras(lambda x, c: network.forward_unet(x, c, class_labels=labels), z, level, 0.5)
        same(prior.denoise(z, level), expected)
    if classes:
        with pytest.raises(InputError, match="4 classes"):
            load_checkpoint(tmp_path / "edm.safetensors", space=RGB, **PIXELS)


@pytest.mark.parametrize(("kind", "label"), [("ncsn", None), ("ncsn", 2), ("ddpm", None), ("ddpm", "zero")])
def test_edm_song_unet(tmp_path, models, kind, label):
    network = narrow(ncsnpp(models, kind, label_dim=0 if label is None else 4))
    torch.save(network.state_dict(), tmp_path / "edm.pt")
    config = {} if label is None else {"zero_label": True} if label == "zero" else {"class_label": label}
    prior = load_checkpoint(tmp_path / "edm.pt", "edm", space=RGB, config=config, **PIXELS).double()
    assert prior.card.facts["architecture"]["network"] == "SongUNet"
    network.double()
    labels = None
    if label is not None:  # zeros are not the same as none: the map has a bias
        labels = torch.zeros(2, 4, dtype=torch.float64)
        labels[:, [] if label == "zero" else [label]] = 1
    for sigma in (0.002, 0.4, 60.0):
        z, level = noisy(RGB, sigma), torch.tensor([sigma, 1.1 * sigma], dtype=torch.float64)
        with torch.no_grad():
            expected = karras(lambda x, c: network.forward_unet(x, c, class_labels=labels), z, level, 0.5)
        same(prior.denoise(z, level), expected)


def test_edm_baseline_answers(tmp_path, models):
    """Learned variances (iddpm) are dropped, and the table stored beside the network is no part of it."""
    network = narrow(adm_unet(models, out_channels=6))
    torch.save(
        {"u": torch.zeros(3), **{f"model.{n}": v for n, v in network.state_dict().items()}}, tmp_path / "iddpm.pt"
    )
    prior = load_checkpoint(
        tmp_path / "iddpm.pt", "edm", space=RGB, config={"precondition": "iddpm"}, **PIXELS
    ).double()
    z, level = noisy(RGB, 0.5), torch.tensor([0.5, 0.5], dtype=torch.float64)
    a = 1 / math.sqrt(1.25)
    label = prior.clock(level)
    assert 0 < float(label[0]) % 1 < 1
    expected = z - 0.5 * network.double().forward_unet(a * z, label)[:, :3]
    same(prior.denoise(z, level), expected.detach())


def test_edm_skip_networks_are_those_of_score_sde(tmp_path):
    """SongUNet with encoder and decoder "skip" is NCSN++ with input_skip and output_skip, block by block."""
    config = score_config("ffhq_256_ncsnpp_continuous")
    state = score_state(config)
    song, kernel = {}, torch.outer(torch.tensor([1.0, 3, 3, 1]), torch.tensor([1.0, 3, 3, 1]))[None, None] / 64

    def put(name, i, inner):
        for part in ("weight", "bias"):
            song[f"{name}.{part}"] = state[f"all_modules.{i}.{inner}{part}"]

    def block(name, i, skip="", attention=None, resample=False):
        for ours, theirs in {
            "norm0": "GroupNorm_0.",
            "conv0": "Conv_0.",
            "affine": "Dense_0.",
            "norm1": "GroupNorm_1.",
        }.items():
            put(f"{name}.{ours}", i, theirs)
        put(f"{name}.conv1", i, "Conv_1.")
        if skip:
            put(f"{name}.skip", i, "Conv_2.")
        if resample:
            song[f"{name}.conv0.resample_filter"] = song[f"{name}.skip.resample_filter"] = kernel
        if attention is not None:
            put(f"{name}.norm2", attention, "GroupNorm_0.")
            maps = [state[f"all_modules.{attention}.NIN_{j}.W"].T for j in range(4)]
            biases = [state[f"all_modules.{attention}.NIN_{j}.b"] for j in range(4)]
            song[f"{name}.qkv.weight"] = torch.stack(maps[:3], 1).flatten(0, 1)[:, :, None, None]
            song[f"{name}.qkv.bias"] = torch.stack(biases[:3], 1).flatten()
            song[f"{name}.proj.weight"], song[f"{name}.proj.bias"] = maps[3][:, :, None, None], biases[3]

    song["map_noise.freqs"] = state["all_modules.0.W"]
    put("map_layer0", 1, "")
    put("map_layer1", 2, "")
    put("enc.8x8_conv", 3, "")
    block("enc.8x8_block0", 4)
    block("enc.4x4_down", 5, "skip", resample=True)
    song["enc.4x4_aux_down.resample_filter"] = kernel
    put("enc.4x4_aux_skip", 7, "Conv_0.")
    block("enc.4x4_block0", 8, "skip", attention=9)
    block("dec.4x4_in0", 10, attention=11)
    block("dec.4x4_in1", 12)
    block("dec.4x4_block0", 13, "skip")
    block("dec.4x4_block1", 14, "skip", attention=15)
    put("dec.4x4_aux_norm", 16, "")
    put("dec.4x4_aux_conv", 17, "")
    block("dec.8x8_up", 18, "skip", resample=True)
    block("dec.8x8_block0", 19, "skip")
    block("dec.8x8_block1", 20, "skip")
    song["dec.8x8_aux_up.resample_filter"] = kernel
    put("dec.8x8_aux_norm", 22, "")
    put("dec.8x8_aux_conv", 23, "")
    save_file({n: v.contiguous().clone() for n, v in song.items()}, tmp_path / "song.safetensors")
    prior = load_checkpoint(
        tmp_path / "song.safetensors", "edm", space=RGB, config={"precondition": "ve"}, **PIXELS
    ).double()
    z, level = noisy(RGB, 0.3), torch.tensor([0.3, 0.4], dtype=torch.float64)
    reference = NcsnppReference(state, {**config["model"], **config["data"], "centered": True})
    # VE in EDM's code labels with log(sigma / 2); the features of score_sde take the logarithm themselves
    same(prior.denoise(z, level), z + level[:, None, None, None] * reference(z, level / 2))


@pytest.mark.parametrize("kind", ["ADMUNet", "NCSNpp ncsn", "NCSNpp ddpm"])
def test_deepinv_karras_networks(tmp_path, models, kind):
    """The library's own denoiser, of [0, 1] pixels with pixel_std 0.3."""
    name, _, flavour = kind.partition(" ")
    made = {"pixel_std": 0.3}
    network = ncsnpp(models, flavour, **made) if flavour else adm_unet(models, **made)
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    config = {"network": name, "pixel_std": 0.3}
    prior = load_checkpoint(tmp_path / "weights.pt", "deepinv", space=RGB, config=config, **PIXELS)
    with torch.no_grad():
        for sigma in (0.01, 0.4, 5.0):
            z, level = noisy(RGB, sigma, dtype=torch.float32), torch.tensor([sigma, 1.1 * sigma])
            # float32 on both sides: some thousand roundings of 6e-8, through norms that divide by small numbers
            same(prior.denoise(z, level), network(z, level), 1e-4)
    other = "NCSNpp" if name == "ADMUNet" else "ADMUNet"
    with pytest.raises(InputError, match=f"does not hold the weights of {other}"):
        load_checkpoint(tmp_path / "weights.pt", "deepinv", space=RGB, config={**config, "network": other}, **PIXELS)
    with pytest.raises(InputError, match="pixel_std"):
        load_checkpoint(tmp_path / "weights.pt", "deepinv", space=RGB, config={"network": name}, **PIXELS)


@pytest.mark.parametrize(("fields", "blocks", "side"), [(1, 1, (32, 40)), (3, 2, (20, 28))])
def test_deepinv_drunet(tmp_path, models, fields, blocks, side):
    space = Space(("field", "y", "x"), (fields, *side)) if fields > 1 else Space(("y", "x"), side)
    network = with_weights(models.DRUNet(fields, fields, nc=(4, 6, 8, 10), nb=blocks, pretrained=None))
    torch.save(network.state_dict(), tmp_path / "drunet.pth")
    config = {"network": "DRUNet", "sigma_min": 0.01, "sigma_max": 0.3}
    prior = load_checkpoint(tmp_path / "drunet.pth", space=space, config=config, shift=0.5, scale=2.0)
    with torch.no_grad():
        for sigma in (0.01, 0.07, 0.3):
            z, level = noisy(space, sigma, dtype=torch.float32), torch.tensor([sigma, 1.1 * sigma])
            image = z.reshape(2, fields, *side)
            same(prior.denoise(z, level), network(image, level).reshape(z.shape), 1e-6)
    assert (prior.schedule.sigma_min, prior.schedule.sigma_max) == (0.01, 0.3)
    with pytest.raises(InputError, match="sigma_max: Field required"):
        load_checkpoint(tmp_path / "drunet.pth", space=space, config={"network": "DRUNet", "sigma_min": 0.1}, **PIXELS)


# --- guided-diffusion --------------------------------------------------------------------------------------------------


class GuidedDiffusion:
    """A small U-Net of guided-diffusion, put together from deepinv's copies of its blocks; DiffUNet itself has fixed widths."""

    def __init__(self, parts, *, film=True, updown=True, new_order=False, classes=0, learn=True, channels=3):
        self.parts, width = parts, 128
        kw = {"use_scale_shift_norm": film}
        heads = {"num_heads": 4, "num_head_channels": -1, "use_new_attention_order": new_order}
        block = lambda a, b, **more: parts.ResBlock(a, width, 0.0, out_channels=b, **kw, **more)  # noqa: E731
        seq, attn = parts.TimestepEmbedSequential, lambda c: parts.AttentionBlock(c, **heads)
        down = block(32, 32, down=True) if updown else parts.Downsample(32, True)
        up = block(64, 64, up=True) if updown else parts.Upsample(64, True)
        net = self.net = parts.DiffUNet.__new__(parts.DiffUNet)
        nn.Module.__init__(net)
        net.num_classes, net.model_channels, net.dtype = classes or None, 32, torch.float64
        net.time_embed = nn.Sequential(nn.Linear(32, width), nn.SiLU(), nn.Linear(width, width))
        if classes:
            net.label_emb = nn.Embedding(classes, width)
        net.input_blocks = nn.ModuleList(
            [seq(nn.Conv2d(channels, 32, 3, padding=1)), seq(block(32, 32)), seq(down), seq(block(32, 64), attn(64))]
        )
        net.middle_block = seq(block(64, 64), attn(64), block(64, 64))
        net.output_blocks = nn.ModuleList(
            [seq(block(128, 64), attn(64)), seq(block(96, 64), attn(64), up), seq(block(96, 32)), seq(block(64, 32))]
        )
        out = 2 * channels if learn else channels
        net.out = nn.Sequential(parts.normalization(32), nn.SiLU(), nn.Conv2d(32, out, 3, padding=1))
        with_weights(net)

    def __call__(self, x, t, label=None):
        y = None if label is None else torch.full((len(x),), label)
        with torch.no_grad():
            return self.net.forward_diffusion(x, t, y=y)


@pytest.fixture
def guided(models, monkeypatch):
    import deepinv.models.diffunet as parts

    def exact(t, dim, max_period=10000):  # the published embedding in double; deepinv rounds it to float32
        freqs = torch.tensor([max_period ** (-k / (dim // 2)) for k in range(dim // 2)], dtype=torch.float64)
        return torch.cat([torch.cos(t[:, None] * freqs), torch.sin(t[:, None] * freqs)], dim=-1)

    monkeypatch.setattr(parts, "timestep_embedding", exact)
    monkeypatch.setattr(parts.GroupNorm32, "forward", nn.GroupNorm.forward)
    return parts


FLAGS = {"num_heads": 4, "noise_schedule": "linear", "image_size": 8, "num_channels": 32, "num_res_blocks": 1}
FLAVOURS = {
    "resblock_updown": ({}, {"resblock_updown": True, "learn_sigma": True, "channel_mult": "1,2"}),
    "plain": (
        {"updown": False, "film": False, "learn": False},
        {"resblock_updown": False, "use_scale_shift_norm": False},
    ),
    "new order, cosine": ({"new_order": True}, {"use_new_attention_order": True, "noise_schedule": "cosine"}),
    "classes": ({"classes": 5}, {"class_cond": True, "class_label": 2}),
    "x0": ({}, {"predict_xstart": True, "attention_resolutions": "4", "timestep_respacing": "250"}),
    "few steps": ({}, {"diffusion_steps": 250, "rescale_timesteps": True}),
}


def diffusion_levels(flags):
    """sigma of every step: guided-diffusion's tables."""
    steps = flags.get("diffusion_steps", 1000)
    if flags.get("noise_schedule") == "cosine":
        f = [math.cos((t / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(steps + 1)]
        beta = torch.tensor([min(1 - f[t + 1] / f[t], 0.999) for t in range(steps)], dtype=torch.float64)
    else:
        beta = torch.linspace(1e-4 * 1000 / steps, 0.02 * 1000 / steps, steps, dtype=torch.float64)
    abar = torch.cumprod(1 - beta, 0)
    return (1 / abar - 1).sqrt()


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_guided_diffusion(tmp_path, guided, flavour):
    made, told = FLAVOURS[flavour]
    network = GuidedDiffusion(guided, **made)
    torch.save(network.net.state_dict(), tmp_path / "model.pt")
    flags = {**FLAGS, **told}
    prior = load_checkpoint(tmp_path / "model.pt", space=RGB, config=flags, **PIXELS).double()
    network.net.double()
    levels = diffusion_levels(flags)
    steps = len(levels)
    for t in (3, 20.5, steps // 2, steps - 20.5):
        sigma = levels[int(t)] if t == int(t) else (levels[int(t)] * levels[int(t) + 1]).sqrt()
        z = noisy(RGB, float(sigma))
        x = z / (1 + sigma**2).sqrt()
        label = torch.full((2,), t * 1000 / steps if flags.get("rescale_timesteps") else t, dtype=torch.float64)
        answer = network(x, label, flags.get("class_label"))[:, :3]
        expected = answer if flags.get("predict_xstart") else z - sigma * answer
        # 1 - abar loses up to 4 digits at t = 3 in this test's table
        same(prior.denoise(z, sigma), expected, 1e-9)
    assert prior.schedule.sigma_max == pytest.approx(float(levels[-1]), rel=1e-9)


def test_guided_diffusion_in_float32(tmp_path, models):
    """Unpatched: angles of up to 1000 rounded to float32 (6e-5) pass through the embedding."""
    import deepinv.models.diffunet as parts

    network = GuidedDiffusion(parts)
    network.net.dtype = torch.float32
    torch.save(network.net.state_dict(), tmp_path / "model.pt")
    prior = load_checkpoint(tmp_path / "model.pt", space=RGB, config=FLAGS, **PIXELS)
    sigma = float(diffusion_levels(FLAGS)[700])
    z = noisy(RGB, sigma, dtype=torch.float32)
    answer = network(z / math.sqrt(1 + sigma**2), torch.tensor([700.0, 700.0]))[:, :3]
    same(prior.denoise(z, sigma), z - sigma * answer, 2e-3)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"num_heads": None}, "config needs num_heads or num_head_channels"),
        ({"noise_schedule": None}, "noise_schedule"),
        ({"num_heads": 7}, "64 channels, which 7 heads cannot share"),
        (
            {"num_channels": 64, "num_res_blocks": 2},
            "num_channels is 64 in the config, 32 in the weights; num_res_blocks is 2",
        ),
        ({"learn_sigma": False}, "learn_sigma is False in the config, True in the weights"),
        ({"channel_mult": "1,4"}, "channel_mult is 1,4 in the config, 1,2"),
        ({"attention_resolutions": "8"}, "attention_resolutions is 8 in the config, 4 in"),
        ({"image_size": 64}, "trained on 64 x 64; got 8 x 8"),
        ({"class_label": 1}, "knows no classes"),
        ({"nheads": 4}, "nheads: Extra inputs"),
    ],
)
def test_guided_diffusion_refuses_what_does_not_fit(tmp_path, guided, change, text):
    torch.save(GuidedDiffusion(guided).net.state_dict(), tmp_path / "model.pt")
    with pytest.raises(InputError, match=text):
        load_checkpoint(tmp_path / "model.pt", "adm", space=RGB, config={**FLAGS, **change}, **PIXELS)


def test_spaces_that_do_not_fit(tmp_path, guided):
    torch.save(GuidedDiffusion(guided).net.state_dict(), tmp_path / "model.pt")
    other = {**FLAGS, "any_size": True}
    for space, text in (
        (GREY, "for 3 channels; .* has 1"),
        (Space(("field", "y", "x"), (3, 9, 8)), "divisible by 2; got 9 x 8"),
        (Space.vector(8), r"images \(y, x\) or \(field, y, x\); got"),
    ):
        with pytest.raises(InputError, match=text):
            load_checkpoint(tmp_path / "model.pt", "adm", space=space, config=other, **PIXELS)
    wide = Space(("field", "y", "x"), (3, 6, 10))
    assert load_checkpoint(tmp_path / "model.pt", "adm", space=wide, config=other, **PIXELS).denoise(
        noisy(wide, 1.0, dtype=torch.float32), 1.0
    ).shape == (2, 3, 6, 10)


@pytest.mark.parametrize("size", ["small", "large"])
def test_names_of_full_size_guided_diffusion(models, size):
    """The networks of the FFHQ (ILVR) and ImageNet 256 files, without their numbers: every name and shape."""
    with torch.device("meta"):
        tensors = models.DiffUNet(large_model=size == "large", pretrained=None).state_dict()
        tensors = {name: value for name, value in tensors.items() if not name.endswith("alphas_cumprod")}
        network = AdmUNet(tensors, AdmConfig(num_head_channels=64, noise_schedule="linear"))
    assert {n: v.shape for n, v in network.state_dict().items()} == {n: v.shape for n, v in tensors.items()}
    heads = {module.heads for module in network.modules() if hasattr(module, "heads_first")}
    assert heads == ({8} if size == "small" else {8, 16})
    if size == "large":
        assert sum(v.numel() for v in tensors.values()) == 552_814_086
        assert network.plan.attention(tensors) == [8, 16, 32]


@pytest.mark.parametrize("name", ["ADMUNet", "NCSNpp", "DDPMpp"])
def test_names_of_full_size_edm(models, name):
    """The networks of ImageNet 64 and FFHQ 64, without their numbers: every name and shape, and the order of the blocks."""
    with torch.device("meta"):
        if name == "ADMUNet":
            theirs = models.ADMUNet(label_dim=1000, pretrained=None)
        else:
            theirs = models.NCSNpp("ncsn" if name == "NCSNpp" else "ddpm", channel_mult=(1, 2, 2, 2), pretrained=None)
        tensors = dict(sorted(theirs.state_dict().items()))  # as safetensors leaves them
        ours = EdmUNet(tensors)
    assert {n: v.shape for n, v in ours.state_dict().items()} == {n: v.shape for n, v in tensors.items()}
    assert (list(ours.enc), list(ours.dec)) == (list(theirs.enc), list(theirs.dec))


def test_diffunet_files_are_guided_diffusion_files(tmp_path, guided):
    """deepinv's DiffUNet: heads of 64 channels, linear table; a file of the whole module also holds its tables."""
    network = GuidedDiffusion(guided, classes=0)
    for module in network.net.modules():
        if isinstance(module, guided.AttentionBlock):
            module.attention.n_heads = 1
    tables = {"sqrt_1m_alphas_cumprod": torch.zeros(1000), "sqrt_alphas_cumprod": torch.zeros(1000)}
    torch.save({**network.net.state_dict(), **tables}, tmp_path / "diffusion.pt")
    prior = load_checkpoint(tmp_path / "diffusion.pt", "deepinv", space=RGB, config={"network": "DiffUNet"}, **PIXELS)
    sigma = diffusion_levels({})[300]
    z = noisy(RGB, float(sigma))
    network.net.double()
    answer = network(z / (1 + sigma**2).sqrt(), torch.tensor([300.0, 300.0], dtype=torch.float64))[:, :3]
    same(prior.double().denoise(z, sigma), z - sigma * answer, 1e-9)
    assert prior.card.facts["format"] == "deepinv"


# --- what every prior promises -----------------------------------------------------------------------------------------


def test_a_loaded_prior_keeps_the_contract(tmp_path):
    """Units, gradients, copies and company; types in and out."""
    from recon.checks import check_batch, check_pickle

    config = score_config("cifar10_ncsnpp_continuous")
    torch.save(score_state(config), tmp_path / "score.pth")
    shift, scale = pixel_range(-0.2, 0.8, (0.0, 1.0))
    assert (shift, scale) == pytest.approx((-0.2, 1.0))
    assert pixel_range(10.0, 30.0) == (20.0, 10.0)
    prior = load_checkpoint(
        tmp_path / "score.pth", "score_sde", space=RGB, config=config, shift=shift, scale=[1.0, 2.0, 3.0]
    )
    assert prior.card.facts["normalisation"] == {
        "shift": pytest.approx(-0.2), "scale": [1.0, 2.0, 3.0], "rule": "x = shift + scale * z"
    }  # fmt: skip
    assert prior.latent.unit == "1" and prior.space is RGB
    z = noisy(RGB, 0.3, 3, torch.float32)
    assert prior.decode(z)[0, 2, 0, 0].item() == pytest.approx(-0.2 + 3 * z[0, 2, 0, 0].item(), rel=1e-5)
    assert prior.denoise(z.double(), 0.3).dtype == torch.float64 and prior.dtype == torch.float32
    assert not any(p.requires_grad for p in prior.parameters()) and not prior.network.training
    check_batch(lambda one: prior.denoise(one, 0.3), z)
    check_pickle(prior, z, lambda one, at: one.denoise(at, 0.3))
    exact = prior.double()
    point = z.double().requires_grad_()
    u, v = torch.randn(2, *z.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad(exact.denoise(point, 0.3), point, v)
    step = 1e-5
    slope = (exact.denoise(z.double() + step * u, 0.3) - exact.denoise(z.double() - step * u, 0.3)) / (2 * step)
    # a central difference of step h has an error of h^2 times a third derivative, and 1e-16 / h of rounding
    assert (gradient * u).sum().item() == pytest.approx((slope * v).sum().item(), rel=1e-7)
    before = torch.get_rng_state()
    load_checkpoint(tmp_path / "score.pth", "score_sde", space=RGB, config=config, **PIXELS)
    assert torch.equal(before, torch.get_rng_state())
