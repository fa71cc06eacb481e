import json
import math

import pytest
import torch
from pydantic import ValidationError

from recon.comm import Comm
from recon.errors import InputError, ReconError, Stopped
from recon.priors.denoising import Wiener, denoising_error, fixed_noise, network_denoiser
from recon.priors.network import Architecture, build_network
from recon.priors.training import (
    Batch,
    EarlyStop,
    HeldOut,
    Task,
    Training,
    TrainingConfig,
    denoising_loss,
    levels_and_noise,
)
from recon.schedules import Schedule

TINY = Architecture(family="adm", size=16, channels=(32, 64), blocks=1)
SCHEDULE = Schedule(0.01, 10.0)
CONFIG = TrainingConfig(images=32, batch=4, chunk=2, warmup=8, ema=20, precision="float32")


def stripes(step, rows):
    """Images of vertical stripes with a random phase, every fourth pixel unknown in the first image."""
    torch.manual_seed(1000 + step)
    phase = 2 * math.pi * torch.rand(16, 1, 1)
    known = torch.ones(16, 16, 16)
    known[0, ::2, ::2] = 0
    images = (0.7 * torch.cos(math.pi * torch.arange(16) / 4 + phase)).expand(-1, 16, -1).contiguous()
    return images[list(rows)], known[list(rows)]


def training(folder=None, config=CONFIG, held_out=None, batches=stripes, **where):
    network = build_network(TINY, config.seed).train()
    task = Task(network, batches, SCHEDULE, 0.5, None if held_out is None else HeldOut(held_out))
    return Training(config, task, folder, **where)


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


def test_the_result_does_not_depend_on_the_number_of_threads():
    results = []
    for workers in (1, 3):
        run = training(comm=Comm(workers=workers))
        run.run(stop_after=3)
        results.append(run.averaged())
    assert same(*results)


def test_steps_are_those_of_plain_adam_on_the_whole_batch():
    run = training(config=CONFIG.model_copy(update={"clip": 1e9, "images": 10**6, "warmup": 0}))
    twin = build_network(TINY, CONFIG.seed).to(memory_format=torch.contiguous_format)
    optimiser = torch.optim.Adam(twin.parameters(), lr=CONFIG.learning_rate, betas=(0.9, 0.99), eps=1e-8, fused=False)
    for step in range(4):
        images, known = stripes(step, range(CONFIG.batch))
        sigma, noise = levels_and_noise(CONFIG, SCHEDULE, step, tuple(images.shape))
        optimiser.zero_grad()
        (denoising_loss(twin, Batch(images, known), sigma, noise, 0.5) / known.sum()).backward()
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
    images, _ = stripes(10**6, range(8))
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
    network, (images, known) = build_network(TINY), stripes(0, range(2))
    sigma, noise = torch.tensor([0.3, 0.3]), torch.randn(2, 16, 16)
    spoiled = torch.where(known > 0, images, 0.0)
    noise = torch.where(known > 0, noise, (images - spoiled) / 0.3)
    noise_spoiled = torch.where(known > 0, noise, (images + 0.3 * noise - spoiled) / 0.3)
    loss = denoising_loss(network, Batch(images, known), sigma, noise, 0.5)
    assert denoising_loss(network, Batch(spoiled, known), sigma, noise_spoiled, 0.5).item() == pytest.approx(
        loss.item()
    )
    everything = torch.ones_like(known)
    assert denoising_loss(network, Batch(images, everything), sigma, noise, 0.5).item() != pytest.approx(loss.item())


def test_the_loss_of_a_silent_network_is_known():
    """With F = 0 the loss is lambda times the mean square of c_skip sigma n - (1 - c_skip) z0."""
    network, (images, known) = build_network(TINY), stripes(0, range(4))
    sigma, noise = torch.full((4,), 0.8), torch.randn(4, 16, 16)
    skip = 0.25 / (0.64 + 0.25)
    square = (skip * 0.8 * noise - (1 - skip) * images).square()
    expected = ((0.64 + 0.25) / (0.8 * 0.5) ** 2 * square * known).sum()
    assert denoising_loss(network, Batch(images, known), sigma, noise, 0.5).item() == pytest.approx(
        expected.item(), rel=1e-5
    )


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
        Training(CONFIG, Task(other, stripes, SCHEDULE, 0.5), tmp_path)
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(InputError, match="is damaged .* remove it to train from the start"):
        training(tmp_path)


def test_checkpoints_of_other_data_are_refused(tmp_path):
    def begun(identity):
        return Training(CONFIG, Task(build_network(TINY), stripes, SCHEDULE, 0.5, identity=identity), tmp_path)

    begun("this").run(stop_after=1)
    assert begun("this").progress.images == begun("").progress.images == 4
    with pytest.raises(InputError, match="belongs to other data or another normalisation"):
        begun("that")


def test_settings_that_change_no_number_may_change_on_resume(tmp_path):
    training(tmp_path).run(stop_after=1)
    changes = {"device": "cpu", "compile": True, "progress_seconds": 1.0, "checkpoint_seconds": 7.0}
    assert training(tmp_path, CONFIG.model_copy(update=changes)).progress.images == 4


def test_checkpoints_from_before_a_setting_existed_are_continued(tmp_path):
    young = {"device", "compile", "early_stop", "tail"}
    old = {key: value for key, value in CONFIG.model_dump(mode="json").items() if key not in young}
    assert CONFIG.same_run(old)
    assert not CONFIG.model_copy(update={"clip": 2.0}).same_run(old)
    assert not CONFIG.model_copy(update={"tail": 0.2}).same_run(old)
    assert not CONFIG.same_run({**old, "momentum": 0.9})
    stopping = CONFIG.model_copy(update={"early_stop": EarlyStop(patience=1)})
    assert not stopping.same_run(old)


def test_few_gradients_are_kept_however_many_chunks_there_are(monkeypatch):
    """Memory is bounded: never more chunks in hand than threads and the one that is being added."""
    config = CONFIG.model_copy(update={"batch": 16, "chunk": 1})
    for on_gpu, workers, most in ((False, 2, 3), (True, 2, 1)):
        run = training(config=config, comm=Comm(workers=workers))
        run.on_gpu, begun, added, held = on_gpu, [], [], []
        gradient, add = run._gradient, run.sum.add

        def counted(*given, gradient=gradient, begun=begun, added=added, held=held):
            begun.append(1)
            held.append(len(begun) - len(added))
            return gradient(*given)

        def adding(*given, add=add, added=added):
            add(*given)
            added.append(1)

        monkeypatch.setattr(run, "_gradient", counted)
        monkeypatch.setattr(run.sum, "add", adding)
        run.run(stop_after=2)
        assert len(begun) == len(added) == 32
        assert max(held) <= most


def test_the_way_of_a_gpu_gives_the_same_bits_here(tmp_path):
    """Chunk after chunk, losses looked at late, batches made far ahead: on one device the numbers are the same."""
    plain, late = training(), training(tmp_path)
    late.on_gpu, late.ahead = True, 3
    plain.run(stop_after=5)
    late.run(stop_after=5)
    assert same(plain.averaged(), late.averaged())
    assert not late._unread  # looked at before the checkpoint


def test_looking_at_held_out_images_changes_nothing():
    plain, watched = (
        training(),
        training(
            config=CONFIG.model_copy(update={"validate_images": 4, "validation_sigmas": (0.5,)}),
            held_out=stripes(99, range(2))[0],
        ),
    )
    plain.run(stop_after=3)
    watched.run(stop_after=3)
    assert same(plain.averaged(), watched.averaged())
    assert same(plain.network.state_dict(), watched.network.state_dict())
    assert len({record["rmse@0.5"] for record in watched.progress.history}) == 3


def test_bfloat16_trains_float32_weights():
    images = stripes(10**6, range(8))[0]
    config = CONFIG.model_copy(update={"images": 80, "precision": "bfloat16", "learning_rate": 3e-3})
    run = training(config=config)
    before = denoising_error(network_denoiser(run.network, 0.5), images, 0.5)
    run.run()
    assert run.precision is torch.bfloat16
    assert all(p.dtype is torch.float32 for p in run.parameters)
    twin = training(config=config.model_copy(update={"precision": "float32"}))
    twin.run()
    assert not same(run.averaged(), twin.averaged())
    errors = [denoising_error(network_denoiser(r.network, 0.5), images, 0.5) for r in (run, twin)]
    assert errors[0] < 0.9 * before
    assert errors[0] == pytest.approx(errors[1], rel=0.1)


def broken(step, rows, at=3):
    images, known = stripes(step, rows)
    if step == at:
        images[-1, 5, 5] = float("nan")
    return images, known


def test_images_that_are_not_finite_are_named(tmp_path):
    run = training(tmp_path, batches=broken)
    with pytest.raises(InputError, match=r"the image of training image 3 of step 3 holds numbers .*\(1 images like it"):
        run.run()
    assert run.progress.step == 3


def test_a_batch_without_a_known_pixel_is_named():
    run = training(batches=lambda step, rows: (stripes(step, rows)[0], torch.zeros(len(rows), 16, 16)))
    with pytest.raises(InputError, match="no pixel of the training images of step 0 is known"):
        run.run()


def test_masks_must_fit_the_images():
    run = training(batches=lambda step, rows: (stripes(step, rows)[0], torch.ones(len(rows), 16, 15)))
    with pytest.raises(
        InputError, match=r"step 0 needs 4 images with masks .* images \(4, 16, 16\) and masks \(4, 16, 15\)"
    ):
        run.run()


@pytest.mark.parametrize("on_gpu", [False, True])
def test_divergence_is_named_and_the_last_good_checkpoint_stays(tmp_path, on_gpu):
    """Images too large for the square of float32: the loss is infinite, and so is what would be learnt."""

    def large(step, rows):
        images, known = stripes(step, rows)
        return (1e30 * images if step == 2 else images), known

    run = training(tmp_path, batches=large)
    run.on_gpu = on_gpu
    run.run(stop_after=2)
    good = (tmp_path / "checkpoint.safetensors").read_bytes()
    with pytest.raises(ReconError, match=r"diverged at step 2: loss (inf|nan), .* learning rate 0.000\d+; .*--fresh"):
        run.run()
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == good
    assert training(tmp_path).progress.step == 2
    if not on_gpu:
        assert all(bool(p.isfinite().all()) for p in run.parameters)  # looked at before the weights were touched


def test_a_stop_leaves_a_checkpoint_to_go_on_from(tmp_path):
    whole = training()
    whole.run()
    run, asked = training(tmp_path), iter([False, False, True])
    with pytest.raises(Stopped, match="stopped at step 3 with a checkpoint"):
        run.run(stop=lambda: next(asked))
    rest = training(tmp_path)
    assert rest.progress.step == 3
    rest.run()
    assert same(whole.averaged(), rest.averaged())


def test_the_threads_of_the_caller_are_left_alone():
    before = torch.get_num_threads()
    training().run(stop_after=1)
    assert torch.get_num_threads() == before


def test_the_log_is_json(tmp_path):
    training(tmp_path, CONFIG.model_copy(update={"progress_seconds": 1e-9})).run(stop_after=2)
    log = json.loads((tmp_path / "log.json").read_text())
    assert [record["images"] for record in log] == [4, 8]
    assert log[0].keys() == {"images", "seconds", "loss", "lr"}


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"validation_sigmas": (0.0,)}, "positive"),
        ({"validation_sigmas": ()}, "at least 1 item"),
        ({"epochs": 3}, "epochs"),
        ({"batch": 4, "chunk": 8}, "a batch of 4 images has no chunk of 8"),
        ({"early_stop": {"patience": 3, "sigma": 0.3}}, "early_stop.sigma must be one of validation_sigmas"),
        ({"early_stop": {"patience": 0}}, "greater than or equal to 1"),
        ({"device": "tpu"}, "'auto', 'cpu' or 'cuda'"),
    ],
)
def test_wrong_settings_are_refused(wrong, text):
    with pytest.raises(ValidationError, match=text):
        TrainingConfig(images=10, **wrong)


def test_a_small_batch_needs_no_word_about_chunks():
    assert TrainingConfig(images=10, batch=2).chunks == [slice(0, 2)]
    assert TrainingConfig(images=10, batch=7, chunk=3).chunks == [slice(0, 3), slice(3, 6), slice(6, 7)]


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


def test_a_validation_counts_what_is_known_alone():
    """Unknown values, here far from anything, are land or gaps; they are no error of the network."""
    run = training()
    images, known = stripes(50, range(8))
    known[:, :, :5] = 0
    wild = torch.where(known.bool(), images, 1e4)
    everywhere, masked = (run.task.aim.error(run.network, HeldOut(wild, None, k), 0.3, run.device) for k in (None, known))
    expected = denoising_error(network_denoiser(run.network, 0.5), wild, 0.3, known=known)
    assert masked == pytest.approx(expected, rel=1e-6)
    assert everywhere > 2 * masked
