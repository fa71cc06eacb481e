"""What was found on this machine, and what is wrong with it.

Each finding is ``ok``, ``warn`` (recon can do without, or slower) or ``fail`` (broken: it would stop a run), and says the way
out.  Nothing is changed, and nothing that can kill the process is called in it: MPI is tried in processes of its own.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from recon import __version__
from recon.cli.doctor_mpi import Machine, mpi_findings
from recon.comm import cores
from recon.errors import InputError
from recon.files import sha256
from recon.store import available
from recon.workflows.source import read_source

_ROOMY = 5e9  # bytes; a run of a few hundred draws with its checkpoints


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    status: Literal["ok", "warn", "fail"]
    what: str
    text: str

    def __str__(self) -> str:
        return f"{self.status:<4}  {self.what:<10}  {self.text}"


def examine() -> list[Finding]:
    """Look at everything recon uses.  Never raises: what cannot be looked at is a finding too."""
    parts = (_python, _torch, _threads, _mpi, _libraries, _astra, _hdf5, _folder, _priors)
    found: list[Finding] = []
    for part in parts:
        name = part.__name__.strip("_")
        try:
            found += part()
        except Exception as error:  # a broken library may raise anything
            found.append(Finding("fail", name, f"looking at it failed: {type(error).__name__}: {error}"))
    return found


def _python() -> Iterator[Finding]:
    yield Finding("ok", "recon", f"{__version__} in {Path(__file__).resolve().parent.parent}")
    yield Finding("ok", "python", f"{sys.version.split()[0]} ({sys.executable})")


def _torch() -> Iterator[Finding]:
    import torch

    yield Finding("ok", "torch", f"{torch.__version__}, CPU capability {torch.backends.cpu.get_cpu_capability()}")
    flags = _cpu_flags()
    fast = [name for name in ("amx_bf16", "avx512_bf16") if name in flags]
    yield Finding(
        "ok", "bf16", f"in hardware: {', '.join(fast)}" if fast else "not in hardware here; float32 is as fast"
    )
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        yield Finding("ok", "GPU", f"{len(names)} usable: {', '.join(names)} (CUDA {torch.version.cuda})")
    elif shutil.which("nvidia-smi") is None:
        yield Finding("ok", "GPU", "none found; everything runs on the CPU")
    else:
        yield Finding(
            "warn", "GPU", f"nvidia-smi is here but torch (CUDA {torch.version.cuda}) sees no device; "
            "is the driver older than that CUDA, or CUDA_VISIBLE_DEVICES empty?"
        )  # fmt: skip


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return set()
    return set(next((line for line in lines if line.startswith("flags")), "").split())


def _threads() -> Iterator[Finding]:
    import torch

    allowed, present, used = cores(), os.cpu_count() or 1, torch.get_num_threads()
    said = {n: os.environ[n] for n in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "SLURM_CPUS_PER_TASK") if n in os.environ}
    text = f"{allowed} of {present} cores may be used; torch starts with {used}"
    text += f" ({', '.join(f'{k}={v}' for k, v in said.items())})" if said else ""
    if allowed < present and not said:
        yield Finding(
            "warn", "threads", text + "; this process is bound: ask the launcher for more cores or --bind-to none"
        )
    else:
        yield Finding("ok", "threads", text)


def _mpi() -> Iterator[Finding]:
    for status, text in mpi_findings(Machine.this()):
        yield Finding(status, "MPI", text)


def _libraries() -> Iterator[Finding]:
    for module, package, extra, use in (
        ("deepinv", "deepinv", "networks", "network priors"),
        ("pydicom", "pydicom", "dicom", "DICOM files"),
        ("skimage", "scikit-image", "metrics", "structural similarity"),
    ):
        if find_spec(module) is None:
            yield Finding("warn", module, f"not installed, so no {use}: pip install 'recon[{extra}]'")
        else:
            yield Finding("ok", module, f"{metadata.version(package)} ({use})")


def _astra() -> Iterator[Finding]:
    if find_spec("astra") is None:
        yield Finding("warn", "astra", "not installed, so no tomography: pip install 'recon[ct]'")
        return
    import astra

    where = "CPU and GPU" if astra.use_cuda() else "CPU only, which recon's two-dimensional operators need"
    yield Finding("ok", "astra", f"{astra.__version__}, {where}")


def _hdf5() -> Iterator[Finding]:
    import h5py

    try:
        with tempfile.TemporaryDirectory(dir=".") as folder, h5py.File(Path(folder) / "try.h5", "w") as file:
            file["x"] = [1.0]
    except OSError as error:
        yield Finding(
            "warn", "HDF5", f"{h5py.version.hdf5_version}, but no file can be written in {Path.cwd()} ({error}); go to another "
            "folder, or on a file system without locks set HDF5_USE_FILE_LOCKING=FALSE"
        )  # fmt: skip
        return
    yield Finding("ok", "HDF5", f"{h5py.version.hdf5_version} through h5py {h5py.__version__}")


def _folder() -> Iterator[Finding]:
    free = shutil.disk_usage(".").free
    text = f"{free / 1e9:.1f} GB free in {Path.cwd()}"
    yield (
        Finding("ok", "disk", text)
        if free > _ROOMY
        else Finding("warn", "disk", f"{text}; recon check says what is needed")
    )


def _priors() -> Iterator[Finding]:
    found = available("priors")
    if not found:
        yield Finding(
            "warn", "priors", "none found: set RECON_WORKSPACE to a folder with priors/, or train one (recon train)"
        )
    for name, folder in found.items():
        yield _prior(name, folder)


def _prior(name: str, folder: Path) -> Finding:
    weights, what = folder / "weights.safetensors", "prior"
    try:
        card = read_source(folder / "card.yaml").data
    except InputError as error:
        return Finding("fail", what, str(error))
    if isinstance(card.get("checkpoint"), dict):
        return _checkpoint(name, folder, card["checkpoint"])
    section = card.get("weights")
    stated = section.get("sha256") if isinstance(section, dict) else None
    if stated is None:
        return Finding("fail", what, f"{name}: {folder / 'card.yaml'} states no weights.sha256; copy the prior again")
    if not weights.is_file():
        return Finding(
            "fail", what, f"{name}: there is no file {weights}; copy it there, or recon train {folder}/train.yaml"
        )
    held = sha256(weights)
    if held != stated:
        return Finding(
            "fail", what, f"{name}: {weights} has sha256 {held}, not the one on its card ({stated}); copy it again"
        )
    return Finding("ok", what, f"{name} in {folder}, sha256 verified")


def _checkpoint(name: str, folder: Path, told: dict[str, object]) -> Finding:
    """A prior whose card points to somebody else's file."""
    place, stated = folder / Path(str(told.get("file", ""))).expanduser(), told.get("sha256")
    if not told.get("file") or not place.exists():
        return Finding("fail", "prior", f"{name}: there is no checkpoint {place}; set checkpoint.file in {folder}/card.yaml")
    if place.is_dir() or not isinstance(stated, str):
        return Finding("ok", "prior", f"{name}: checkpoint {place}, without a sha256 of one file to verify")
    held = sha256(place)
    if held != stated:
        return Finding("fail", "prior", f"{name}: {place} has sha256 {held}, not the one on its card ({stated})")
    return Finding("ok", "prior", f"{name}: checkpoint {place}, sha256 verified")
