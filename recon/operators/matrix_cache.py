"""Projection matrices on disk, made once and mapped by every process that needs them.

The folder is ``RECON_CACHE``, else ``$XDG_CACHE_HOME/recon``, else ``~/.cache/recon``; ``RECON_CACHE=0`` (or empty) switches it
off.  A file is named after its contents (``ScanBlocks.key``) and has the safetensors layout.  It is written aside and renamed,
carries the SHA-256 of its numbers, and is made again when they do not agree.  Pages are mapped copy-on-write: processes of one
machine share them, and none can change the file.

All files together take at most ``RECON_CACHE_BYTES`` (8e9 when unset): the least recently used go first, but never one that a
process has mapped.  Of several processes that want the same matrix, one makes it and the others wait.  Locks are the kernel's
(``flock``): they end with their process.  Where there are none, or the folder cannot be written, matrices are simply made.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import mmap
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from recon.errors import InputError
from recon.files import sync_folder
from recon.operators.scan_blocks import Arrays, ScanBlocks

SMALLEST = 8e6  # bytes: a smaller matrix is made in less time than its file takes to find, read and check
BOUND = 8e9  # bytes, all files together
PATIENCE = 600.0  # seconds to wait for another process that makes the same matrix
_STALE = 86400.0  # seconds after which a temporary file has no owner
_TYPES = {"int64": "I64", "float32": "F32", "int32": "I32", "int16": "I16"}


def folder() -> Path | None:
    """Where matrices are kept; None where they are not: switched off, no home, no ``flock``."""
    if importlib.util.find_spec("fcntl") is None:
        return None
    given = os.environ.get("RECON_CACHE")
    if given is not None:
        return Path(given).expanduser() if given.strip() not in ("", "0") else None
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "recon"
    except RuntimeError:  # no home
        return None


def kept(blocks: ScanBlocks, size: int) -> Arrays:
    """The arrays of ``blocks.build()``, from the folder where it pays.  size: about how many bytes they take."""
    root = folder()
    if root is None or not SMALLEST <= size <= _bound():
        return blocks.build()
    path = root / f"{blocks.key()}.safetensors"
    found = read(path)
    if found is not None:
        return found
    built = None
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _alone(path.with_suffix(".lock")):
            found = read(path)  # another process may have made it meanwhile
            if found is None:
                built = blocks.build()
                _write(path, built)
                make_room(root)
                found = read(path)
    except OSError:  # no space, no right to write, no locks: the cache only saves time
        pass
    return found if found is not None else built if built is not None else blocks.build()


def read(path: Path) -> Arrays | None:
    """The arrays of a file, mapped and locked against removal; None when it is absent, damaged or cannot be locked."""
    import fcntl

    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            # The mapping holds a copy of the descriptor, and with it the lock, for as long as any array lives.
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        numbers, stated = memoryview(data)[8 + length :], header.pop("__metadata__")["sha256"]
        if _digest(header, [numbers]) != stated:
            return None
        os.utime(path)
        types = {tag: np.dtype(name) for name, tag in _TYPES.items()}
        return {name: np.frombuffer(numbers, types[h["dtype"]], *_span(h, types)) for name, h in header.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _digest(header: Mapping[str, Mapping[str, object]], numbers: Iterable[memoryview]) -> str:
    """SHA-256 of what arrays there are and of all that they hold."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for part in numbers:
        digest.update(part)
    return digest.hexdigest()


def _span(header: Mapping[str, list[int]], types: Mapping[str, np.dtype]) -> tuple[int, int]:
    """Count and offset of an array."""
    first, last = header["data_offsets"]
    return (last - first) // types[str(header["dtype"])].itemsize, first


def _write(path: Path, arrays: Arrays) -> None:
    """The file, whole or not at all; the name aside is this process's alone, on any machine that sees the folder."""
    header: dict[str, dict[str, object]] = {}
    at = 0
    ordered = sorted(arrays.items(), key=lambda one: -one[1].itemsize)  # every array then starts where its type may
    for name, array in ordered:
        header[name] = {
            "dtype": _TYPES[str(array.dtype)], "shape": list(array.shape), "data_offsets": [at, at + array.nbytes],
        }  # fmt: skip
        at += array.nbytes
    text = json.dumps(
        {"__metadata__": {"sha256": _digest(header, (array.data for _, array in ordered))}, **header}
    ).encode()
    text += b" " * (-(len(text) + 8) % 64)
    handle, aside = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for _, array in ordered:
                array.tofile(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        sync_folder(path.parent)
    finally:
        Path(aside).unlink(missing_ok=True)


def make_room(root: Path, bound: float | None = None) -> None:
    """Remove the least recently used files that nobody has mapped until all together take at most ``bound`` bytes."""
    import fcntl

    bound = _bound() if bound is None else bound
    seen: list[tuple[float, int, Path]] = []
    for path in root.iterdir():
        with contextlib.suppress(OSError):  # another process may remove it first
            status = path.stat()
            if path.suffix == ".safetensors":
                seen.append((status.st_mtime, status.st_size, path))
            elif path.suffix in (".tmp", ".lock") and time.time() - status.st_mtime > _STALE:
                path.unlink()
    total = sum(size for _, size, _ in seen)
    for _, size, path in sorted(seen):
        if total <= bound:
            return
        with contextlib.suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
            total -= size


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """While no other process is inside; after ``PATIENCE`` in any case.  Raises OSError where files cannot be locked."""
    import fcntl

    with path.open("a") as file:
        end = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    break
                time.sleep(0.05)
        yield


def _bound() -> float:
    given = os.environ.get("RECON_CACHE_BYTES", "")
    try:
        return float(given) if given else BOUND
    except ValueError as error:
        raise InputError(f"RECON_CACHE_BYTES must be a number of bytes, such as 8e9; got {given!r}") from error
