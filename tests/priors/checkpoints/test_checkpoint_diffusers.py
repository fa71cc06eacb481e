"""Folders as diffusers saves them, against diffusers' own networks, schedulers and autoencoders."""

import json
import math
import os
import shutil
import socket

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from recon.checks import check_pickle
from recon.errors import InputError
from recon.files import sha256
from recon.priors.checkpoints import LatentCheckpointPrior, load_checkpoint
from recon.space import Space
from tests.priors.checkpoints.published import randomise

diffusers = pytest.importorskip("diffusers")

GREY = Space(("y", "x"), (8, 12), {}, "1/m")
RGB = Space(("field", "y", "x"), (3, 16, 16), {}, "1/m")
PIXELS = {"shift": 0.0, "scale": 1.0}
STEM = "diffusion_pytorch_model.safetensors"


def with_weights(network, seed=0):
    network.load_state_dict(randomise(network.state_dict(), seed))
    return network.eval().requires_grad_(False)


def unet(**more):
    made = {
        "sample_size": (8, 12), "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 16), "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 4, "attention_head_dim": 8,
    }  # fmt: skip
    return with_weights(diffusers.UNet2DModel(**{**made, **more}))


def pipeline(folder, network, scheduler, **parts):
    """A folder as ``save_pretrained`` leaves it."""
    for name, part in {"unet": network, "scheduler": scheduler, **parts}.items():
        part.save_pretrained(folder / name)
    index = {name: ["diffusers", type(part).__name__] for name, part in {"unet": network, **parts}.items()}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "DDPMPipeline", **index}))
    return folder


def noisy(space, sigma, n=2):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(n, *space.shape, dtype=torch.float64, generator=generator) * math.sqrt(0.25 + sigma**2)


def same(got, expected, tolerance=1e-11):
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


def abar(schedule):
    if schedule == "squaredcos_cap_v2":
        f = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(1001)]
        return np.cumprod([1 - min(1 - f[t + 1] / f[t], 0.999) for t in range(1000)])
    if schedule == "linear":
        return np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    return np.cumprod(1 - np.linspace(1e-2, 0.02**0.5, 1000) ** 2)


@pytest.mark.parametrize(
    ("schedule", "prediction"),
    [("linear", "epsilon"), ("scaled_linear", "v_prediction"), ("squaredcos_cap_v2", "sample")],
)
def test_ddpm_folders(tmp_path, schedule, prediction):
    network = unet()
    scheduler = diffusers.DDPMScheduler(beta_schedule=schedule, prediction_type=prediction, clip_sample=False)
    pipeline(tmp_path, network, scheduler)
    prior = load_checkpoint(tmp_path, space=GREY, **PIXELS)
    table = abar(schedule)
    levels = np.sqrt(1 / table - 1)
    z = noisy(GREY, 1.0).float()
    sigma = float(levels[500])
    x = (z / math.sqrt(1 + sigma**2))[:, None]
    own = scheduler.step(network(x, 500).sample, 500, x).pred_original_sample[:, 0]
    # float32 in scheduler and network; the table of the scheduler, a float32 product of 500 factors, is 500 roundings off
    same(prior.denoise(z, sigma), own, 2e-4)
    prior, network = prior.double(), network.double()
    for t in (5, 700.5, 990):
        low = int(t)
        s = float(levels[low] if t == low else math.sqrt(levels[low] * levels[low + 1]))
        a, z = 1 / math.sqrt(1 + s**2), noisy(GREY, s)
        answer = network((a * z)[:, None], torch.tensor([t, t])).sample[:, 0]
        expected = {"epsilon": z - s * answer, "v_prediction": a * (a * z) - a * s * answer, "sample": answer}[
            prediction
        ]
        # the label of table entry 5 is known to the digits that 1 - abar keeps in this test, times its slope
        same(prior.denoise(z, s), expected, 1e-6)
    assert prior.card.facts["noise_labels"].startswith("fractional")
    assert prior.schedule.sigma_max == pytest.approx(levels[-1], rel=1e-9)


def test_bare_networks_with_rectified_flow(tmp_path):
    network = unet()
    network.save_pretrained(tmp_path / "net")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.save_pretrained(tmp_path)
    file = tmp_path / "scheduler_config.json"
    prior = load_checkpoint(tmp_path / "net", space=GREY, config={"scheduler": str(file)}, **PIXELS).double()
    network = network.double()
    for t in (float(scheduler.timesteps[-1]), 250.0, float(scheduler.timesteps[1])):
        s = t / 1000 / (1 - t / 1000)
        z = noisy(GREY, s)
        x = (1 - t / 1000) * z  # (1 - t) z0 + t n
        velocity = network(x[:, None], torch.tensor([t, t])).sample[:, 0]
        same(prior.denoise(z, s), x - t / 1000 * velocity, 1e-6)  # labels are rounded to float32 in the network
    assert prior.schedule.sigma_max == pytest.approx(float(scheduler.sigmas[1] / (1 - scheduler.sigmas[1])), rel=1e-3)
    with pytest.raises(InputError, match="bare network: config needs scheduler"):
        load_checkpoint(tmp_path / "net", space=GREY, **PIXELS)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_edm_schedulers(tmp_path, prediction):
    network = unet()
    scheduler = diffusers.EDMEulerScheduler(sigma_data=0.3, prediction_type=prediction)
    prior = load_checkpoint(pipeline(tmp_path, network, scheduler), space=GREY, **PIXELS)
    for s in (0.002, 0.4, 70.0):
        level, z = torch.tensor(s), noisy(GREY, s).float()
        label = scheduler.precondition_noise(level)
        answer = network(scheduler.precondition_inputs(z[:, None], level), label.expand(2)).sample
        own = scheduler.precondition_outputs(z[:, None], answer, level)[:, 0]
        same(prior.denoise(z, s), own, 1e-5)  # float32
    assert (prior.schedule.sigma_min, prior.schedule.sigma_max) == (0.002, 80.0)


def test_ve_networks_with_fourier_features(tmp_path):
    kinds = {
        "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
    }
    network = unet(
        in_channels=3, out_channels=3, sample_size=16, time_embedding_type="fourier", norm_num_groups=None,
        block_out_channels=(32, 64), **kinds,
    )  # fmt: skip
    pipeline(tmp_path, network, diffusers.ScoreSdeVeScheduler(sigma_min=0.01, sigma_max=50.0))
    prior = load_checkpoint(tmp_path, space=RGB, **PIXELS)
    for s in (0.02, 0.7, 30.0):
        z = noisy(RGB, s).float()
        score = network(z, torch.full((2,), s)).sample
        same(prior.denoise(z, s), z + s**2 * score, 1e-5)
    diffusers.DDPMScheduler().save_pretrained(tmp_path / "scheduler")
    with pytest.raises(InputError, match="fourier embedding of its labels was not trained with a DDPMScheduler"):
        load_checkpoint(tmp_path, space=RGB, **PIXELS)


def test_learned_labels_are_whole(tmp_path):
    network = unet(time_embedding_type="learned", num_train_timesteps=1000)
    prior = load_checkpoint(pipeline(tmp_path, network, diffusers.DDIMScheduler()), space=GREY, **PIXELS)
    levels = np.sqrt(1 / abar("linear") - 1)
    for t, part in ((40, 0.3), (41, -0.3), (900, 0.0)):
        other = levels[t + 1] if part >= 0 else levels[t - 1]
        s = float(levels[t] * (other / levels[t]) ** abs(part))
        z = noisy(GREY, s).float()
        answer = network((z / math.sqrt(1 + s**2))[:, None], torch.tensor([t, t])).sample[:, 0]
        same(prior.denoise(z, s), z - s * answer, 1e-5)
    assert prior.card.facts["noise_labels"].startswith("nearest")


def test_classes(tmp_path):
    network = unet(num_class_embeds=4)
    pipeline(tmp_path, network, diffusers.DDPMScheduler())
    prior = load_checkpoint(tmp_path, space=GREY, config={"class_label": 3}, **PIXELS)
    s = float(np.sqrt(1 / abar("linear")[300] - 1))
    z = noisy(GREY, s).float()
    answer = network((z / math.sqrt(1 + s**2))[:, None], 300, class_labels=torch.tensor([3, 3])).sample[:, 0]
    same(prior.denoise(z, s), z - s * answer, 1e-4)  # the label 300 is found to 1e-3 of a step in float32
    with pytest.raises(InputError, match="class_label from 0 to 3"):
        load_checkpoint(tmp_path, space=GREY, **PIXELS)


# --- latent ------------------------------------------------------------------------------------------------------------


def kl(**more):
    made = {
        "in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": (8, 8), "norm_num_groups": 4,
        "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2, "sample_size": 16,
    }  # fmt: skip
    return with_weights(diffusers.AutoencoderKL(**{**made, **more}), 5)


def latent_unet(channels=4):
    return unet(in_channels=channels, out_channels=channels, sample_size=8)


@pytest.mark.parametrize("shifted", [False, True])
def test_latent_diffusion(tmp_path, shifted):
    vae = kl(scaling_factor=0.3, shift_factor=0.2 if shifted else None)
    network = latent_unet()
    pipeline(tmp_path, network, diffusers.DDPMScheduler(), vae=vae)
    prior = load_checkpoint(tmp_path, space=RGB, shift=5.0, scale=2.0)
    assert isinstance(prior, LatentCheckpointPrior) and not prior.affine
    assert (prior.latent.dims, prior.latent.shape) == (("channel", "y", "x"), (4, 8, 8))
    x = noisy(RGB, 1.0).float()
    move = 0.2 if shifted else 0.0
    z = (vae.encode((x - 5) / 2).latent_dist.mean - move) * 0.3
    same(prior.encode(x), z, 1e-5)
    same(prior.decode(z), 5 + 2 * vae.decode(z / 0.3 + move).sample, 1e-5)
    s = float(np.sqrt(1 / abar("linear")[300] - 1))
    noise = noisy(prior.latent, s).float()
    answer = network(noise / math.sqrt(1 + s**2), 300).sample
    same(prior.denoise(noise, s), noise - s * answer, 1e-4)
    point = z.double().requires_grad_()
    exact = prior.double()
    u = torch.randn(z.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad(exact.decode(point).sum(), point)
    slope = (exact.decode(z.double() + 1e-5 * u) - exact.decode(z.double() - 1e-5 * u)).sum() / 2e-5
    assert (gradient * u).sum().item() == pytest.approx(slope.item(), rel=1e-6)
    check_pickle(prior, z, lambda one, at: one.decode(one.denoise(at, 0.5)))
    with pytest.raises(InputError, match="no linear part; use a latent sampler"):
        prior.decode_linear(z)
    with pytest.raises(InputError, match="decode takes arrays"):
        prior.decode(x)


def test_latents_with_a_mean_and_deviation_of_their_own(tmp_path):
    vae = kl(latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 3.0, 4.0], scaling_factor=0.5)
    pipeline(tmp_path, latent_unet(), diffusers.DDPMScheduler(), vae=vae)
    prior = load_checkpoint(tmp_path, space=RGB, **PIXELS)
    mean, std = torch.tensor([0.1, 0.2, 0.3, 0.4])[:, None, None], torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None, None]
    x = noisy(RGB, 1.0).float()
    z = (vae.encode(x).latent_dist.mean - mean) * 0.5 / std
    same(prior.encode(x), z, 1e-5)
    same(prior.decode(z), vae.decode(z * std / 0.5 + mean).sample, 1e-5)


def test_quantised_latents(tmp_path):
    made = {
        "block_out_channels": (8, 8),
        "norm_num_groups": 4,
        "num_vq_embeddings": 16,
        "sample_size": 16,
        "scaling_factor": 0.7,
    }
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vqvae = with_weights(diffusers.VQModel(**made, **kinds), 5)
    pipeline(tmp_path, latent_unet(3), diffusers.DDIMScheduler(), vqvae=vqvae)
    prior = load_checkpoint(tmp_path, space=RGB, **PIXELS)
    x = noisy(RGB, 1.0).float()
    z = vqvae.encode(x).latents * 0.7
    same(prior.encode(x), z, 1e-5)
    same(prior.decode(z), vqvae.decode(z / 0.7).sample, 1e-5)


def test_text_conditions_are_given_as_an_embedding(tmp_path):
    kinds = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    network = with_weights(
        diffusers.UNet2DConditionModel(
            sample_size=(8, 12), in_channels=1, out_channels=1, block_out_channels=(8, 16), layers_per_block=1,
            cross_attention_dim=6, norm_num_groups=4, attention_head_dim=4, **kinds,
        )
    )  # fmt: skip
    pipeline(tmp_path, network, diffusers.PNDMScheduler(beta_schedule="scaled_linear", beta_start=1e-4, beta_end=0.02))
    text = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    save_file({"empty": text}, tmp_path / "text.safetensors")
    prior = load_checkpoint(tmp_path, space=GREY, config={"embedding": str(tmp_path / "text.safetensors")}, **PIXELS)
    s = float(np.sqrt(1 / abar("scaled_linear")[300] - 1))
    z = noisy(GREY, s).float()
    answer = network((z / math.sqrt(1 + s**2))[:, None], 300, text.expand(2, -1, -1)).sample[:, 0]
    same(prior.denoise(z, s), z - s * answer, 1e-4)
    with pytest.raises(InputError, match=r"conditioned on text: config needs embedding.*\(length, 6\)"):
        load_checkpoint(tmp_path, space=GREY, **PIXELS)
    save_file({"empty": torch.ones(5, 7)}, tmp_path / "text.safetensors")
    with pytest.raises(InputError, match=r"one tensor \(length, 6\); it holds \[\(5, 7\)\]"):
        load_checkpoint(tmp_path, space=GREY, config={"embedding": str(tmp_path / "text.safetensors")}, **PIXELS)


# --- files -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    return pipeline(tmp_path / "pipe", unet(), diffusers.DDPMScheduler())


def denoised(path, **more):
    return load_checkpoint(path, "diffusers", space=GREY, **PIXELS, **more).denoise(noisy(GREY, 0.5).float(), 0.5)


def test_no_connection_is_opened(folder, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a connection was opened")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    denoised(folder)


def test_shards_pickles_variants_and_old_names_hold_the_same_network(folder):
    expected, place = denoised(folder), folder / "unet"
    tensors = load_file(place / STEM)
    names = sorted(tensors)
    (place / STEM).unlink()
    save_file({n: tensors[n] for n in names[:10]}, place / "a.safetensors")
    save_file({n: tensors[n] for n in names[10:]}, place / "b.safetensors")
    weight_map = {n: "a.safetensors" if n in names[:10] else "b.safetensors" for n in names}
    (place / f"{STEM}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert torch.equal(denoised(folder), expected)
    (place / f"{STEM}.index.json").write_text(json.dumps({"weight_map": {"w": "../../other.safetensors"}}))
    with pytest.raises(InputError, match="does not say which files beside it"):
        denoised(folder)
    (place / f"{STEM}.index.json").unlink()
    for part in ("to_q", "to_k", "to_v", "to_out.0"):  # as before diffusers 0.12
        old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}[part]
        tensors = {n.replace(f".{part}.", f".{old}."): v for n, v in tensors.items()}
    assert any(".proj_attn." in name for name in tensors)
    torch.save(tensors, place / "diffusion_pytorch_model.bin")
    assert torch.equal(denoised(folder), expected)
    (place / "diffusion_pytorch_model.bin").unlink()
    save_file(tensors, place / "diffusion_pytorch_model.fp16.safetensors")
    with pytest.raises(InputError, match=r"there are diffusion_pytorch_model.fp16.safetensors \(set variant"):
        denoised(folder)
    assert torch.equal(denoised(folder, config={"variant": "fp16"}), expected)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_hostile_weights_do_not_run(folder, tmp_path):
    (folder / "unet" / STEM).unlink()
    torch.save({"w": Payload(tmp_path / "trap")}, folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(InputError, match="refused"):
        denoised(folder)
    assert not (tmp_path / "trap").exists()


def test_digests_of_a_folder(folder):
    digest = sha256(folder / "unet" / STEM)
    prior = load_checkpoint(folder, space=GREY, sha256=digest, **PIXELS)
    assert prior.card.facts["sha256"] == {f"unet/{STEM}": digest}
    denoised(folder, sha256={f"unet/{STEM}": digest})
    for wrong in ("0" * 64, {f"unet/{STEM}": "0" * 64}):
        with pytest.raises(InputError, match=f"sha256 {digest}, expected 000"):
            denoised(folder, sha256=wrong)
    with pytest.raises(InputError, match=f"given for vae/{STEM}, which .* did not use"):
        denoised(folder, sha256={f"vae/{STEM}": digest})


def change(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize(
    ("part", "values", "text"),
    [
        (
            "unet/config.json",
            {"_class_name": "SD3Transformer2DModel"},
            "holds a SD3Transformer2DModel; expected one of UNet2DModel",
        ),
        ("unet/config.json", {"block_out_channels": [8, 20]}, "does not hold the network it should: .*expected"),
        ("unet/config.json", {"down_block_types": ["DownBlock2D"]}, "describes no UNet2DModel: Must provide"),
        ("unet/config.json", {"class_embed_type": "timestep"}, "does not hold|conditioned through class_embed_type"),
        (
            "scheduler/scheduler_config.json",
            {"_class_name": "RePaintScheduler"},
            "no rule for the scheduler RePaintScheduler",
        ),
        ("scheduler/scheduler_config.json", {"beta_schedule": "exp"}, "tables known by name"),
    ],
)
def test_folders_whose_parts_do_not_fit(folder, part, values, text):
    change(folder / part, **values)
    with pytest.raises(InputError, match=text):
        denoised(folder)


def test_spaces_and_folders_that_do_not_fit(folder, tmp_path):
    for space, config, text in (
        (Space(("field", "y", "x"), (3, 8, 12)), {}, "network from 1 to 1 channels; .* has 3"),
        (Space(("y", "x"), (12, 8)), {}, "trained on 8 x 12; got 12 x 8"),
        (Space(("y", "x"), (9, 12)), {"any_size": True}, "divisible by 2; got 9 x 12"),
        (GREY, {"scheduler": {}}, "scheduler of its own"),
        (GREY, {"class_label": 1}, "knows no classes"),
        (GREY, {"embedding": "x"}, "not conditioned on text"),
        (GREY, {"steps": 9}, "steps: Extra"),
    ):
        with pytest.raises(InputError, match=text):
            load_checkpoint(folder, space=space, config=config, **PIXELS)
    (folder / "unet" / STEM).unlink()
    with pytest.raises(InputError, match=f"unet has no weights: expected {STEM}"):
        denoised(folder)
    with pytest.raises(InputError, match="no file .*config.json"):
        load_checkpoint(tmp_path, space=GREY, **PIXELS)


def test_latent_grids_that_do_not_fit(tmp_path):
    pipeline(tmp_path, latent_unet(), diffusers.DDPMScheduler(), vae=kl())
    for shape, text in (
        ((3, 16, 17), "autoencoder needs sides divisible by 2; got 16 x 17"),
        ((3, 32, 32), "trained on 8 x 8; got 16 x 16"),
        ((1, 16, 16), "autoencoder from 3 to 3 channels; .* has 1"),
    ):
        with pytest.raises(InputError, match=text):
            load_checkpoint(tmp_path, space=Space(("field", "y", "x"), shape), **PIXELS)
    shutil.move(tmp_path / "vae", tmp_path / "elsewhere")
    with pytest.raises(InputError, match="lists the autoencoder vae, but there is no folder"):
        load_checkpoint(tmp_path, space=Space(("field", "y", "x"), (4, 8, 8)), **PIXELS)
    shutil.move(tmp_path / "elsewhere", tmp_path / "vae")
    change(tmp_path / "model_index.json", movq=["diffusers", "VQModel"])
    with pytest.raises(InputError, match="several autoencoders: vae, movq"):
        load_checkpoint(tmp_path, space=RGB, **PIXELS)
    change(tmp_path / "model_index.json", movq=[None, None])
    latent_unet(2).save_pretrained(tmp_path / "unet")
    with pytest.raises(InputError, match="network from 2 to 2 channels; its autoencoder has 4"):
        load_checkpoint(tmp_path, space=RGB, **PIXELS)
