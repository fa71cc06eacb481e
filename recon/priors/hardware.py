"""Where and in which floating type a network is trained."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn

from recon.comm import Axis
from recon.errors import InputError


def pick_device(wanted: Literal["auto", "cpu", "cuda"], axis: Axis) -> torch.device:
    """The device of this process: a GPU of its own on a node with GPUs, else the CPU.

    Processes of one node take its GPUs in the order of their ranks.

    Raises InputError when "cuda" is asked for and absent, some processes see a GPU and others none, or two share one.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise InputError(
            f"device: cuda, but torch {torch.__version__} finds no CUDA device on {socket.gethostname()}; "
            f"see `recon doctor`, or train with device: cpu"
        )
    use = wanted != "cpu" and torch.cuda.is_available()
    places = axis.allgather((socket.gethostname(), use))
    if len({gpu for _, gpu in places}) > 1:
        seen = ", ".join(sorted({host for host, gpu in places if not gpu}))
        raise InputError(
            f"some processes see a GPU and those on {seen} see none; start them alike, or train on device: cpu"
        )
    if not use:
        return torch.device("cpu")
    before = [host for host, _ in places[: axis.rank]].count(socket.gethostname())
    device = torch.device("cuda", before % torch.cuda.device_count())
    torch.cuda.set_device(device)
    serials = axis.allgather(str(torch.cuda.get_device_properties(device).uuid))
    if len(set(serials)) < len(serials):
        shared = [rank for rank, serial in enumerate(serials) if serial == serials[axis.rank]]
        raise InputError(
            f"{len(serials)} processes have {len(set(serials))} GPUs (ranks {shared} share one): start one process per GPU"
        )
    return device


def pick_precision(wanted: Literal["auto", "float32", "bfloat16"], device: torch.device, axis: Axis) -> torch.dtype:
    """The floating type of the network's arithmetic, the same on all processes; "auto" asks the device of rank 0."""
    if wanted != "auto":
        found: torch.dtype = getattr(torch, wanted)
        return found
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        picked = torch.bfloat16 if fast else torch.float32
    else:
        picked = faster_on_cpu()
    agreed: torch.dtype = axis.bcast(picked)
    return agreed


def faster_on_cpu() -> torch.dtype:
    """The faster of float32 and bfloat16 for a 3 x 3 convolution on this processor, by a measurement of some 50 ms."""
    times: dict[torch.dtype, float] = {}
    for dtype in (torch.float32, torch.bfloat16):
        layer = nn.Conv2d(64, 64, 3, padding=1, dtype=dtype).to(memory_format=torch.channels_last)
        image = torch.zeros(4, 64, 32, 32, dtype=dtype).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            layer(image)
            start = time.perf_counter()
            for _ in range(3):
                layer(image)
            times[dtype] = time.perf_counter() - start
    return torch.bfloat16 if times[torch.bfloat16] < 0.7 * times[torch.float32] else torch.float32


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """Arithmetic whose bits do not depend on threads or on what was timed before.

    One thread per operation in this thread (threads of one operation that wait for each other stall on a machine shared with
    other work); on CUDA the deterministic algorithms of cuDNN, chosen without timing.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    cudnn = torch.backends.cudnn
    kept = cudnn.deterministic, cudnn.benchmark
    if device.type == "cuda":
        cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        cudnn.deterministic, cudnn.benchmark = kept
