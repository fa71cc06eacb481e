"""Where a result comes from: versions, machine, command, and the hash of everything its numbers depend on."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import socket
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from recon import __version__
from recon.comm import Comm
from recon.operators.streamed import slices_of
from recon.samplers.warm import WarmStart
from recon.workflows.priors import fingerprint
from recon.workflows.problem import Job
from recon.workflows.schema import Workflow, resolved

_PACKAGES = (
    "numpy",
    "scipy",
    "torch",
    "deepinv",
    "astra-toolbox",
    "xarray",
    "h5netcdf",
    "h5py",
    "safetensors",
    "mpi4py",
)


def environment(comm: Comm) -> dict[str, Any]:
    """Versions, hosts, threads, command and start time; collective."""
    hosts = comm.everyone(socket.gethostname())
    versions: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "recon": __version__,
        "git": _git(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "packages": versions,
        "ranks": len(hosts),
        "hosts": hosts,
        "workers": comm.workers,
        "command": " ".join(sys.argv),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "user": os.environ.get("USER", ""),
    }


def identity(workflow: Workflow, job: Job) -> str:
    """A hash of what the draws depend on: workflow, measurement, a start that was read, prior's weights, recon's version.

    How often checkpoints are written and which baselines are computed are left out: they change no draw.
    """
    kept = workflow.model_copy(update={"checkpoint_every": 1.0, "baselines": (), "summary": "", "run": None})
    digest = hashlib.sha256(f"recon {__version__}\n{resolved(kept)}".encode())
    for name, value in sorted(job.posterior.likelihood.state_dict().items()):
        digest.update(name.encode())
        for part in slices_of(value):
            digest.update(part.detach().cpu().contiguous().numpy().tobytes())
    digest.update(str(weights_sha256(job)).encode())
    if isinstance(job.sampler, WarmStart) and workflow.start is not None and workflow.start.baseline is None:
        digest.update(str(job.sampler.frame).encode())
        digest.update(job.sampler.x.contiguous().numpy().tobytes())
    return digest.hexdigest()


def weights_sha256(job: Job) -> str | None:
    """The checksum of the prior's weights and of what it was told besides; None for closed forms: see ``fingerprint``."""
    return fingerprint(job.prior)


def _git() -> str | None:
    """Commit of the checkout recon runs from, with "+changes" when it is not clean; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        changes = subprocess.run(["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+changes" if changes.stdout.strip() else "")
