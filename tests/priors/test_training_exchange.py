"""Training on several processes: the same bits as on one, also when a process is killed and others go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from recon.comm import Comm
from recon.errors import InputError
from recon.priors.exchange import GradientSum
from tests.priors import ranks

MPIEXEC = Path(sys.executable).parent / "mpiexec"
needs_mpi = pytest.mark.skipif(not MPIEXEC.exists(), reason="needs the mpiexec of the mpich wheel beside this python")
ROOT = Path(__file__).resolve().parents[2]


def command(*arguments, size):
    launcher = [str(MPIEXEC), "-n", str(size)] if size > 1 else []
    return [*launcher, sys.executable, "-m", "tests.priors.ranks", *map(str, arguments)]


def called(*arguments, size):
    done = subprocess.run(
        command(*arguments, size=size), cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr


def result(folder):
    """Everything the checkpoint holds, and the log without its clock."""
    log = [
        {k: v for k, v in record.items() if k != "seconds"} for record in json.loads((folder / "log.json").read_text())
    ]
    return load_file(folder / "checkpoint.safetensors"), [record for record in log if "score" in record]


def same(one, two):
    return one[1] == two[1] and all(torch.equal(one[0][name], two[0][name]) for name in one[0] | two[0])


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run on one process."""
    folder = tmp_path_factory.mktemp("alone")
    ranks.training(folder).run()
    return result(folder)


def test_gradients_are_added_in_the_order_of_the_chunks():
    """Numbers whose sum depends on the order: 1 is lost beside 1e8 in float32, unless the 1e8 have cancelled before."""
    parameters = [torch.zeros(2, 3, 2, 2).to(memory_format=torch.channels_last), torch.zeros(4)]
    chunks = [[torch.full(p.shape, v) for p in parameters] for v in (1e8, 1.0, -1e8, 0.5)]
    total = GradientSum(parameters)
    for order, expected in (((0, 1, 2, 3), 0.25), ((0, 2, 1, 3), 0.75)):
        total.start(4, 2.0)
        for chunk in order:
            total.add(torch.tensor(float(chunk)), chunks[chunk])
        assert float(total.finish()) == 3.0
        assert all((g == expected).all() for g in total.gradients)
    assert [g.stride() for g in total.gradients] == [p.stride() for p in parameters]
    values = [torch.arange(float(p.numel())).reshape(p.shape) for p in parameters]
    total.start(1, 1.0)
    total.add(torch.zeros(()), values)
    assert all(torch.equal(g, v) for g, v in zip(total.gradients, values, strict=True))


def test_more_processes_than_chunks_are_refused():
    task = ranks.training(None).task
    crowd = Comm(draws=type("Crowd", (), {"size": 6, "rank": 0})())
    with pytest.raises(InputError, match="a batch of 10 in chunks of 2 is work for 5 processes; got 6"):
        ranks.Training(ranks.CONFIG, task, None, crowd)


@pytest.mark.slow  # the fast suite has two processes write the prior of one: tests/workflows/test_train.py
@needs_mpi
@pytest.mark.mpi
@pytest.mark.parametrize("size", [2, 3])
def test_processes_change_no_bit(alone, tmp_path, size):
    """Of a sum of gradients, for every number of chunks, and of a whole run."""
    called(tmp_path, 1e9, size=size)
    assert same(alone, result(tmp_path))


@needs_mpi
@pytest.mark.slow
@pytest.mark.mpi
def test_a_killed_process_then_others_in_another_number(alone, tmp_path):
    job = subprocess.Popen(
        command(tmp_path, 1e-3, 0.05, size=2), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    checkpoint, until = tmp_path / "checkpoint.safetensors", time.monotonic() + 60
    while not checkpoint.exists():
        assert time.monotonic() < until and job.poll() is None, "the run never got to its first checkpoint"
        time.sleep(0.02)
    os.kill(a_rank_of(job.pid), signal.SIGKILL)
    assert job.wait(timeout=60) != 0
    assert ranks.training(tmp_path).progress.images < 120
    called(tmp_path, 1e9, size=3)
    assert same(alone, result(tmp_path))


def a_rank_of(launcher):
    """A process below ``launcher`` that trains (Linux)."""
    below, found = {launcher}, []
    for _ in range(3):
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                pid, parent = int(stat.parent.name), int(stat.read_text().rpartition(")")[2].split()[1])
                line = Path(f"/proc/{pid}/cmdline").read_text()
            except (OSError, ValueError):
                continue
            if parent in below:
                below.add(pid)
                if "tests.priors.ranks" in line and "mpiexec" not in line and "hydra" not in line:
                    found.append(pid)
    return max(found)
