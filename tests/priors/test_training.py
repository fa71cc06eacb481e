import json
import math
import os

import pytest
import torch
from pydantic import ValidationError

from recon.errors import InputError
from recon.priors.denoising import Wiener, denoising_error, fixed_noise, network_denoiser
from recon.priors.network import Architecture, build_network
from recon.priors.training import Training, TrainingConfig, denoising_loss, levels_and_noise
from recon.schedules import Schedule

TINY = Architecture(family="adm", size=16, channels=(32, 64), blocks=1)
SCHEDULE = Schedule(0.01, 10.0)
CONFIG = TrainingConfig(images=32, batch=4, chunk=2, warmup=8, ema=20, precision="float32")


def stripes(step, count):
    """Images of vertical stripes with a random phase, every fourth pixel unknown in the first image."""
    torch.manual_seed(1000 + step)
    phase = 2 * math.pi * torch.rand(count, 1, 1)
    known = torch.ones(count, 16, 16)
    known[0, ::2, ::2] = 0
    return (0.7 * torch.cos(math.pi * torch.arange(16) / 4 + phase)).expand(-1, 16, -1).contiguous(), known


def training(folder=None, config=CONFIG, held_out=None):
    network = build_network(TINY, config.seed).train()
    return Training(config, network, stripes, SCHEDULE, sigma_data=0.5, held_out=held_out, folder=folder)


def same(one, two):
    return all(torch.equal(one[name], two[name]) for name in one | two)


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path):
    whole = training(tmp_path / "whole")
    whole.run()
    training(tmp_path / "cut").run(stop_after=3)
    resumed = training(tmp_path / "cut")
    assert resumed.progress.images == 12
    resumed.run()
    assert resumed.progress.step == whole.progress.step == 8
    assert same(whole.averaged(), resumed.averaged())
    assert same(whole.network.state_dict(), resumed.network.state_dict())
    assert not same(whole.averaged(), dict(whole.network.named_parameters()))


def test_the_result_does_not_depend_on_the_number_of_threads(monkeypatch):
    results = []
    for cores in (1, 3):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        run = training()
        run.run(stop_after=3)
        results.append(run.averaged())
    assert same(*results)


def test_steps_are_those_of_plain_adam_on_the_whole_batch():
    run = training(config=CONFIG.model_copy(update={"clip": 1e9, "images": 10**6, "warmup": 0}))
    twin = build_network(TINY, CONFIG.seed).to(memory_format=torch.contiguous_format)
    optimiser = torch.optim.Adam(twin.parameters(), lr=CONFIG.learning_rate, betas=(0.9, 0.99), eps=1e-8, fused=False)
    for step in range(4):
        images, known = stripes(step, CONFIG.batch)
        sigma, noise = levels_and_noise(CONFIG, SCHEDULE, step, tuple(images.shape))
        optimiser.zero_grad()
        (denoising_loss(twin, images, known, sigma, noise, 0.5) / known.sum()).backward()
        optimiser.step()
        run.run(stop_after=1)
    start = dict(build_network(TINY, CONFIG.seed).named_parameters())
    for (name, ours), theirs in zip(run.network.named_parameters(), twin.parameters(), strict=True):
        if ours.ndim > 1:  # biases in front of a norm have no gradient but rounding
            assert (ours - theirs).norm() < 0.1 * (theirs - start[name]).norm(), name


def test_the_seed_changes_the_result():
    runs = [training(config=CONFIG.model_copy(update={"seed": seed})) for seed in (0, 1)]
    for run in runs:
        run.run(stop_after=1)
    assert not same(runs[0].averaged(), runs[1].averaged())


def test_training_learns_and_says_so():
    images, _ = stripes(10**6, 8)
    config = CONFIG.model_copy(
        update={"images": 320, "chunk": 4, "validate_images": 160, "learning_rate": 3e-3, "progress_seconds": 1e-9}
    )
    run, said = training(config=config, held_out=images), []
    before = denoising_error(network_denoiser(run.network, 0.5), images, 0.5)
    run.run(said.append)
    errors = [record["rmse@0.5"] for record in run.progress.history if "rmse@0.5" in record]
    assert errors[-1] < 0.75 * before
    assert any("100.0 %  320 images" in line for line in said)
    assert any(line.startswith("held-out RMSE") for line in said)


def test_unknown_pixels_leave_no_trace():
    network, (images, known) = build_network(TINY), stripes(0, 2)
    sigma, noise = torch.tensor([0.3, 0.3]), torch.randn(2, 16, 16)
    spoiled = torch.where(known > 0, images, 0.0)
    noise = torch.where(known > 0, noise, (images - spoiled) / 0.3)
    noise_spoiled = torch.where(known > 0, noise, (images + 0.3 * noise - spoiled) / 0.3)
    loss = denoising_loss(network, images, known, sigma, noise, 0.5)
    assert denoising_loss(network, spoiled, known, sigma, noise_spoiled, 0.5).item() == pytest.approx(loss.item())
    everything = torch.ones_like(known)
    assert denoising_loss(network, images, everything, sigma, noise, 0.5).item() != pytest.approx(loss.item())


def test_the_loss_of_a_silent_network_is_known():
    """With F = 0 the loss is lambda times the mean square of c_skip sigma n - (1 - c_skip) z0."""
    network, (images, known) = build_network(TINY), stripes(0, 4)
    sigma, noise = torch.full((4,), 0.8), torch.randn(4, 16, 16)
    skip = 0.25 / (0.64 + 0.25)
    square = (skip * 0.8 * noise - (1 - skip) * images).square()
    expected = ((0.64 + 0.25) / (0.8 * 0.5) ** 2 * square * known).sum()
    assert denoising_loss(network, images, known, sigma, noise, 0.5).item() == pytest.approx(expected.item(), rel=1e-5)


def test_levels_and_noise_are_functions_of_seed_and_step():
    def given(step, seed=0, **changes):
        config = CONFIG.model_copy(update={"seed": seed, "p_mean": -1.0, "p_std": 0.5, **changes})
        return levels_and_noise(config, SCHEDULE, step, (4000, 2, 2))

    assert torch.equal(given(3)[0], given(3)[0])
    assert torch.equal(given(3)[1], given(3)[1])
    assert not torch.equal(given(3)[1], given(4)[1])
    assert not torch.equal(given(3)[1], given(3, seed=1)[1])
    without, only = given(0, tail=0.0)[0].log(), given(0, tail=1.0)[0].log()
    assert without.mean().item() == pytest.approx(-1.0, abs=0.05)
    assert without.std().item() == pytest.approx(0.5, abs=0.03)
    assert only.mean().item() == pytest.approx(math.log(0.01 * 10) / 2, abs=0.15)
    assert only.std().item() == pytest.approx(math.log(1000) / math.sqrt(12), abs=0.08)


def test_the_learning_rate_warms_up_and_falls_to_zero():
    run = training(config=CONFIG.model_copy(update={"images": 1000, "warmup": 100}))
    rates = []
    for images in (0, 46, 96, 500, 1000):
        run.progress.images = images
        rates.append(run.learning_rate() / CONFIG.learning_rate)
    half_cosine = [0.5 * (1 + math.cos(math.pi * share)) for share in (0.0, 0.046, 0.096, 0.5, 1.0)]
    assert rates == pytest.approx([0.04, 0.5 * half_cosine[1], *half_cosine[2:]], abs=1e-9)
    run.progress.images, run.progress.seconds = 500, 9.0
    run.config = run.config.model_copy(update={"seconds": 10.0})
    assert run.share() == 0.9


def test_checkpoints_of_other_runs_are_refused(tmp_path):
    training(tmp_path).run(stop_after=1)
    with pytest.raises(InputError, match="belongs to another training configuration"):
        training(tmp_path, CONFIG.model_copy(update={"learning_rate": 0.5}))
    other = build_network(TINY.model_copy(update={"blocks": 2}))
    with pytest.raises(InputError, match="belongs to another network"):
        Training(CONFIG, other, stripes, SCHEDULE, sigma_data=0.5, folder=tmp_path)
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(InputError, match="is damaged .* remove it to train from the start"):
        training(tmp_path)


def test_the_log_is_json(tmp_path):
    training(tmp_path, CONFIG.model_copy(update={"progress_seconds": 1e-9})).run(stop_after=2)
    log = json.loads((tmp_path / "log.json").read_text())
    assert [record["images"] for record in log] == [4, 8]
    assert log[0].keys() == {"images", "seconds", "loss", "lr"}


@pytest.mark.parametrize(("wrong", "text"), [({"validation_sigmas": (0.0,)}, "positive"), ({"epochs": 3}, "epochs")])
def test_wrong_settings_are_refused(wrong, text):
    with pytest.raises(ValidationError, match=text):
        TrainingConfig(images=10, **wrong)


def test_the_wiener_filter_is_optimal_for_stationary_images():
    def smooth(n, seed):
        torch.manual_seed(seed)
        spectrum = 1 / (0.05 + torch.fft.fftfreq(16)[:, None] ** 2 + torch.fft.fftfreq(16) ** 2)
        white = torch.fft.fft2(torch.randn(n, 16, 16), norm="ortho")
        return 1.5 + torch.fft.ifft2(spectrum.sqrt() * white, norm="ortho").real, spectrum

    images, spectrum = smooth(2000, 0)
    wiener, (fresh, _) = Wiener.fit(images), smooth(500, 1)
    assert torch.allclose(wiener.spectrum, spectrum, rtol=0.15)
    expected = math.sqrt((spectrum * 4.0 / (spectrum + 4.0)).mean())
    assert denoising_error(wiener, fresh, 2.0) == pytest.approx(expected, rel=0.01)
    assert denoising_error(lambda z, _: z, fresh, 2.0) == pytest.approx(2.0, rel=0.01)


def test_errors_count_known_pixels_only_and_noise_is_fixed():
    images, known = torch.zeros(3, 8, 8), torch.ones(3, 8, 8)
    known[:, :, :4] = 0
    right_half_wrong = torch.cat([torch.zeros(8, 4), torch.ones(8, 4)], dim=1)
    assert denoising_error(lambda z, _: right_half_wrong.expand_as(z), images, 0.1, known=known) == 1.0
    assert denoising_error(lambda z, _: right_half_wrong.expand_as(z), images, 0.1) == pytest.approx(math.sqrt(0.5))
    together = fixed_noise((3, 8, 8), 0, 0.1, 0)
    assert torch.equal(together[2:], fixed_noise((1, 8, 8), 0, 0.1, 2))
    assert not torch.equal(together, fixed_noise((3, 8, 8), 0, 0.2, 0))
