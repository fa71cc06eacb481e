"""A folder that remembers: what was asked, how far it got, what came out.

One class knows the file names.  A checkpoint has two phases: every rank writes the states of its blocks aside and renames them;
when all have, rank 0 writes the manifest, and only then are older checkpoints removed.  So a kill at any instant leaves the
last complete checkpoint readable.  A run is complete when its DONE.json is there, whatever a launcher returned.
"""

from __future__ import annotations

import json
import math
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from recon.comm import Comm
from recon.errors import InputError, Stopped
from recon.files import sha256, sync_folder, write_json, write_text, written_aside
from recon.operators.streamed import Stream, Streamed, linked
from recon.samplers.base import State

_MARK = "config.resolved.yaml"


@dataclass(frozen=True)
class RunFolder:
    """The files of one run, by name."""

    path: Path

    config: Path = field(init=False)
    asked: Path = field(init=False)
    environment: Path = field(init=False)
    measurement: Path = field(init=False)
    facts: Path = field(init=False)
    ensemble: Path = field(init=False)
    report: Path = field(init=False)
    checkpoints: Path = field(init=False)
    done: Path = field(init=False)

    def __post_init__(self) -> None:
        names = {
            "config": _MARK, "asked": "config.input.yaml", "environment": "environment.json",
            "measurement": "measurement.nc", "facts": "facts.json", "ensemble": "ensemble.nc", "report": "report.html",
            "checkpoints": "checkpoints", "done": "DONE.json",
        }  # fmt: skip
        object.__setattr__(self, "path", Path(self.path))
        for attribute, name in names.items():
            object.__setattr__(self, attribute, self.path / name)

    def refuse_existing(self, overwrite: bool) -> None:
        """Raise InputError when the folder holds something that may not be replaced."""
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise InputError(f"{self.path} is a file; a run needs a folder of its own (--out DIR)")
        if not any(self.path.iterdir()):
            return
        if not self.config.exists():
            raise InputError(f"{self.path} is not empty and not a run folder; choose another with --out DIR")
        if not overwrite:
            state = "a finished run" if self.done.exists() else "an unfinished run: go on with `recon resume`"
            raise InputError(f"{self.path} holds {state}; --overwrite replaces it, --out DIR goes elsewhere")

    def create(self, asked: str, resolved: str, environment: Mapping[str, Any], overwrite: bool = False) -> None:
        """Make the folder with what was asked in it; on rank 0 only.  Raises InputError as ``refuse_existing``."""
        self.refuse_existing(overwrite)
        if self.path.exists():
            self.done.unlink(missing_ok=True)  # first, so that a half-removed run never counts as complete
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True)
        write_text(self.asked, asked)
        write_json(self.environment, dict(environment))
        write_text(self.config, resolved)

    def require_run(self) -> None:
        """Raise InputError when this is not a run folder."""
        if not self.config.is_file():
            raise InputError(f"{self.path} is not a run folder: it has no {_MARK}")

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write DONE.json with the checksum of every output, and drop the checkpoints; on rank 0 only."""
        outputs = sorted(p for p in self.path.iterdir() if p.is_file() and p != self.done and p.suffix != ".tmp")
        write_json(self.done, {**summary, "files": {p.name: sha256(p) for p in outputs}})
        shutil.rmtree(self.checkpoints, ignore_errors=True)


class Checkpoints:
    """Checkpoints of one run, and the decision when to write one or to stop; what ``sample`` calls ``run``.

    identity: a hash of everything the states depend on; a checkpoint with another one is refused.  every: seconds.
    stream: of volumes that stay on disk, whose files are linked and not copied.
    """

    def __init__(
        self, folder: Path, comm: Comm, identity: str, every: float = 60.0, stream: Stream | None = None
    ) -> None:
        self.folder, self.comm, self.identity, self.every = Path(folder), comm, identity, every
        self.stream = stream
        self.stop = False
        self.progress = Progress() if comm.root else None
        self._last = time.monotonic()

    @property
    def manifest(self) -> Path:
        """The file that makes a checkpoint one."""
        return self.folder / "manifest.json"

    def restore(self, owned: range) -> tuple[int, dict[int, State]] | None:
        """The step to go on from and the states of the owned blocks; None when there is no checkpoint.

        Raises InputError when a checkpoint belongs to something else or a file of it is damaged.
        """
        if not self.manifest.is_file():
            return None
        manifest = json.loads(self.manifest.read_text(encoding="utf-8"))
        if manifest["identity"] != self.identity:
            raise InputError(
                f"{self.folder} belongs to another configuration, measurement or prior than the one in this run folder; "
                "start a new run"
            )
        states = {}
        for b in owned:
            path = self.folder / manifest["step_folder"] / self._name(b)
            try:
                if sha256(path) != manifest["blocks"][path.name]:
                    raise InputError(
                        f"checkpoint {path} is damaged (its sha256 is not the manifest's); start a new run"
                    )
                fields = manifest["fields"].get(path.name, {})
                streamed = {name: self._field(path, name, *kind) for name, kind in fields.items()}
                states[b] = State.from_tensors({**load_file(path), **streamed})
            except (OSError, KeyError, SafetensorError) as error:
                raise InputError(f"checkpoint {path} cannot be read: {error}; start a new run") from error
        return int(manifest["step"]), states

    def after_step(self, done: int, steps: int, states: dict[int, State]) -> None:
        """Show progress; write a checkpoint when one is due; raise Stopped (after one) when any rank was asked to stop."""
        due = self.comm.root and time.monotonic() - self._last >= self.every
        asked = self.comm.everyone((self.stop, due))
        stop = any(s for s, _ in asked)
        if self.progress:
            self.progress.show(done, steps)
        if stop or any(d for _, d in asked):
            self.save(done, states)
            self._last = time.monotonic()
        if stop:
            raise Stopped(
                f"stopped at step {done} of {steps} with a checkpoint; go on with: recon resume {self.folder.parent}"
            )

    def save(self, step: int, states: dict[int, State]) -> None:
        """Write all blocks, then the manifest, then remove older ones; collective."""
        name = f"step-{step:07d}"
        place = self.folder / name
        if self.comm.root:
            place.mkdir(parents=True, exist_ok=True)
        self.comm.barrier()
        sums, fields = {}, {}
        for b, state in states.items():
            path, tensors = place / self._name(b), state.tensors()
            streamed = {key: value for key, value in tensors.items() if isinstance(value, Streamed)}
            for key, value in streamed.items():
                linked(value, _beside(path, key))
            with written_aside(path) as aside:
                save_file({key: value.contiguous() for key, value in tensors.items() if key not in streamed}, aside)
            sums[path.name] = sha256(path)
            fields[path.name] = {k: [list(v.shape), str(v.dtype).removeprefix("torch.")] for k, v in streamed.items()}
        everyone = self.comm.everyone((sums, fields))
        if self.comm.root:
            blocks, kept = ({b: one for part in everyone for b, one in part[i].items()} for i in (0, 1))
            content = {"identity": self.identity, "step": step, "step_folder": name, "blocks": blocks, "fields": kept}
            sync_folder(self.folder)
            write_json(self.manifest, content)
            for old in self.folder.glob("step-*"):
                if old.name != name:
                    shutil.rmtree(old, ignore_errors=True)
        self.comm.barrier()

    def _name(self, block: int) -> str:
        """The file of a block, or of this rank's part of its volumes."""
        part = f".slab-{self.comm.slab.rank}" if self.comm.slab.size > 1 else ""
        return f"block-{block:05d}{part}.safetensors"

    def _field(self, path: Path, name: str, shape: list[int], dtype: str) -> Streamed:
        """A tensor that stays on disk.  Raises InputError when its file is not whole, or the run keeps none there."""
        file, kind = _beside(path, name), getattr(torch, dtype)
        if self.stream is None:
            raise InputError(f"{path} is of volumes that stay on disk; give run.memory_gb as it was, or start a new run")
        if not file.is_file() or file.stat().st_size != math.prod(shape) * kind.itemsize:
            raise InputError(f"checkpoint {file} is damaged (it is not {shape} of {dtype}); start a new run")
        return self.stream.taken(file, shape, kind)

    @contextmanager
    def stopping_on_signals(self) -> Iterator[None]:
        """SIGUSR1, SIGTERM and SIGINT ask for a stop at the next step's end; a second SIGINT stops at once."""

        def ask(number: int, frame: FrameType | None) -> None:
            if self.stop and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.stop = True

        before = {number: signal.signal(number, ask) for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class Progress:
    """A bar on a terminal, one plain line every ``every`` seconds elsewhere; written to stderr."""

    def __init__(self, every: float = 30.0) -> None:
        self.start = self.last = time.monotonic()
        self.every, self.first = every, -1

    def show(self, done: int, steps: int) -> None:
        """Say where the run is, if it is time to."""
        now = time.monotonic()
        self.first = done - 1 if self.first < 0 else self.first
        rate = (done - self.first) / max(now - self.start, 1e-9)
        left = (steps - done) / rate
        text = f"step {done}/{steps}  {rate:.2f} steps/s  {_clock(now - self.start)} gone, {_clock(left)} left"
        if sys.stderr.isatty():
            filled = round(30 * done / steps)
            end = "\n" if done == steps else ""
            sys.stderr.write(f"\r[{'#' * filled}{'.' * (30 - filled)}] {text} {end}")
            sys.stderr.flush()
        elif now - self.last >= self.every or done == steps:
            sys.stderr.write(text + "\n")
            sys.stderr.flush()
            self.last = now


def _beside(path: Path, name: str) -> Path:
    return path.with_name(f"{path.stem}.{name}.bin")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
