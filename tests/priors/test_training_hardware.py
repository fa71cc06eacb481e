"""Where a network is trained: which GPU, which floating type; without a GPU by what torch is made to say."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from recon.comm import SerialAxis
from recon.errors import InputError
from recon.priors import hardware
from recon.priors.feed import Feed
from recon.priors.hardware import pick_device, pick_precision, repeatable
from recon.priors.network import Architecture, Context, build_network
from recon.priors.objective import Batch, HeldOut, Task
from recon.priors.training import Training, TrainingConfig
from recon.schedules import Schedule


class Others(SerialAxis):
    """Rank 1 of 3: the values of the others are made up."""

    def __init__(self, *answers):
        object.__setattr__(self, "rank", 1)
        object.__setattr__(self, "size", 3)
        object.__setattr__(self, "answers", list(answers))

    def allgather(self, value):
        first, last = self.answers.pop(0)
        return [first, value, last]


@pytest.fixture
def gpus(monkeypatch):
    """A node "here" whose torch sees two GPUs."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"gpu-{device.index}"))
    monkeypatch.setattr(hardware.socket, "gethostname", lambda: "here")
    return chosen


def test_a_process_takes_the_gpu_of_its_turn_on_its_node(gpus):
    assert pick_device("auto", SerialAxis()) == torch.device("cuda", 0)
    second = Others((("here", True), ("there", True)), ("gpu-0", "gpu-9"))
    assert pick_device("cuda", second) == torch.device("cuda", 1)
    alone = Others((("there", True), ("there", True)), ("gpu-8", "gpu-9"))
    assert pick_device("auto", alone) == torch.device("cuda", 0)
    assert [device.index for device in gpus] == [0, 1, 0]


def test_two_processes_on_one_gpu_are_refused(gpus):
    crowd = Others((("here", True), ("here", True)), ("gpu-0", "gpu-1"))
    with pytest.raises(InputError, match=r"3 processes have 2 GPUs \(ranks \[1, 2\] share one\)"):
        pick_device("auto", crowd)


def test_processes_with_and_without_a_gpu_are_refused(gpus):
    with pytest.raises(InputError, match="those on there see none"):
        pick_device("auto", Others((("here", True), ("there", False))))


def test_the_cpu_is_taken_when_asked_for_or_alone(gpus, monkeypatch):
    assert pick_device("cpu", SerialAxis()) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto", SerialAxis()) == torch.device("cpu")
    with pytest.raises(InputError, match="device: cuda, but torch .* finds no CUDA device on here"):
        pick_device("cuda", SerialAxis())


def test_precision_is_as_asked_or_as_the_device_has_it(monkeypatch):
    cuda, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert pick_precision("float32", cuda, SerialAxis()) is torch.float32
    assert pick_precision("bfloat16", cpu, SerialAxis()) is torch.bfloat16
    for has in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=has: has)
        assert pick_precision("auto", cuda, SerialAxis()) is (torch.bfloat16 if has else torch.float32)
    monkeypatch.setattr(hardware, "faster_on_cpu", lambda: torch.bfloat16)
    assert pick_precision("auto", cpu, SerialAxis()) is torch.bfloat16
    slow = SimpleNamespace(bcast=lambda value: torch.float32)  # what rank 0 found
    assert pick_precision("auto", cpu, slow) is torch.float32


def test_the_measurement_compares_two_types():
    assert hardware.faster_on_cpu() in (torch.float32, torch.bfloat16)


def test_cudnn_is_made_repeatable_and_left_as_it_was():
    cudnn, before = torch.backends.cudnn, torch.get_num_threads()
    cudnn.benchmark = True
    try:
        with repeatable(torch.device("cuda", 0)):
            assert cudnn.deterministic and not cudnn.benchmark and torch.get_num_threads() == 1
        assert not cudnn.deterministic and cudnn.benchmark and torch.get_num_threads() == before
    finally:
        cudnn.benchmark = False


class AtOnce:
    """A pool of no threads, whose jobs are counted."""

    def __init__(self):
        self.jobs = []

    def submit(self, function, *given):
        self.jobs.append(given)
        return SimpleNamespace(result=lambda: function(*given))


def some(step, rows):
    values = torch.tensor([100.0 * step + row for row in rows])[:, None, None].expand(-1, 8, 8)
    condition = torch.zeros(len(rows), 2, 8, 8)
    return Batch(values, torch.ones(len(rows), 8, 8), Context(condition, torch.zeros(len(rows), 2)))


def feed(device, chunks, **config):
    settings = TrainingConfig(images=8, batch=6, chunk=2, **config)
    return Feed(settings, Task(torch.nn.Identity(), some, Schedule(0.1, 1.0), 0.5), chunks, device, AtOnce())


def test_a_process_makes_the_images_of_its_chunks_with_the_noise_of_the_whole_batch():
    cpu, all_chunks = torch.device("cpu"), [slice(0, 2), slice(2, 4), slice(4, 6)]
    whole, part = feed(cpu, all_chunks).take(5), feed(cpu, [all_chunks[0], all_chunks[2]]).take(5)
    rows = [0, 1, 4, 5]
    assert torch.equal(part.batch.images, whole.batch.images[rows])
    assert torch.equal(part.noise, whole.noise[rows]) and torch.equal(part.sigma, whole.sigma[rows])
    assert part.pieces == (slice(0, 2), slice(2, 4)) and part.known == (128.0, 128.0)
    (images, known, context), sigma, noise = part.piece(part.pieces[1])
    assert images[:, 0, 0].tolist() == [504.0, 505.0] and torch.equal(noise, whole.noise[4:])
    assert len(known) == len(sigma) == len(context.condition) == len(context.corner) == 2


def test_steps_are_made_ahead_once_each():
    made = feed(torch.device("cpu"), [slice(0, 2)])
    for step in range(3):
        made.take(step, ahead=2)
    assert made.pool.jobs == [(0,), (1,), (2,), (3,), (4,)]


def test_what_a_gpu_gets_is_pinned_and_copied_without_waiting(monkeypatch):
    """The device is one without numbers: shapes, types and the calls are looked at."""
    pinned, copied = [], []
    to = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor.shape) or tensor)

    def moved(tensor, *given, **how):
        if given and isinstance(given[0], SimpleNamespace):
            assert how == {"non_blocking": True}
            copied.append(tensor.shape)
            return to(tensor, "meta")
        return to(tensor, *given, **how)

    monkeypatch.setattr(torch.Tensor, "to", moved)
    portion = feed(SimpleNamespace(type="cuda"), [slice(0, 2)]).take(0)
    assert len(pinned) == len(copied) == 6
    tensors = [*portion.batch[:2], *portion.batch.context, portion.sigma, portion.noise]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert {tensor.dtype for tensor in tensors} == {torch.float32}


def test_compiling_is_for_a_gpu(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda network: compiled.append(network) or network)
    tiny = build_network(Architecture(family="adm", size=16, channels=(32, 64), blocks=1))
    Training(TrainingConfig(images=4, compile=True, precision="float32"), Task(tiny, some, Schedule(0.1, 1.0), 0.5))
    assert not compiled


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
def test_on_a_gpu_a_resumed_run_is_the_whole_one_and_the_cpu_agrees(tmp_path, compiled):
    tiny = Architecture(family="adm", size=16, channels=(32, 64), blocks=1)

    def images(step, rows):
        torch.manual_seed(step)
        return torch.randn(4, 16, 16)[list(rows)], torch.ones(len(rows), 16, 16)

    def run(folder, device, steps, precision="bfloat16"):
        config = TrainingConfig(
            images=32,
            batch=4,
            chunk=2,
            warmup=8,
            device=device,
            precision=precision,
            compile=compiled,
            validate_images=8,
        )
        held_out = HeldOut(images(99, range(4))[0])
        made = Training(config, Task(build_network(tiny).train(), images, Schedule(0.01, 10.0), 0.5, held_out), folder)
        made.run(stop_after=steps)
        return made

    whole = run(tmp_path / "whole", "cuda", None)
    assert whole.device.type == "cuda" and whole.parameters[0].device.type == "cuda"
    run(tmp_path / "cut", "cuda", 3)
    rest = run(tmp_path / "cut", "cuda", None)
    assert all(torch.equal(whole.averaged()[name], value) for name, value in rest.averaged().items())
    errors = [
        r["rmse@0.5"] for d in ("cuda", "cpu") for r in run(None, d, 4, "float32").progress.history if "rmse@0.5" in r
    ]
    assert errors[0] == pytest.approx(errors[2], rel=1e-2)
