"""The checkpoint of a training run: weights, average, optimiser and progress in one file; no trace of how many computed it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from recon.errors import InputError
from recon.files import write_json, written_aside
from recon.priors.training_config import Progress

if TYPE_CHECKING:
    from recon.priors.training import Training

NAME = "checkpoint.safetensors"
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def save_training(run: Training) -> None:
    """Write checkpoint and log to the run's folder, each whole or not at all; on rank 0 only."""
    if run.folder is None or not run.comm.root:
        return
    run.folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for index, (name, p) in enumerate(zip(run.names, run.parameters, strict=True)):
        tensors |= {f"network.{name}": p.detach().contiguous(), f"average.{name}": run.average[index].contiguous()}
        if run.best is not None:
            tensors[f"best.{name}"] = run.best[index].contiguous()
        for key, value in run.optimiser.state.get(p, {}).items():
            tensors[f"adam.{key}.{name}"] = value.contiguous()
    state = {
        "config": run.config.model_dump_json(),
        "progress": json.dumps(vars(run.progress)),
        "identity": run.task.identity,
    }
    with written_aside(run.folder / NAME) as aside:
        save_file(tensors, aside, metadata=state)
    write_json(run.folder / "log.json", run.progress.history)


def load_training(run: Training) -> None:
    """Continue from the checkpoint in the run's folder, if there is one; rank 0 reads it for all.

    Raises InputError when it is damaged, or of other settings, data or network.
    """
    read = _read(run.folder / NAME) if run.comm.root and run.folder is not None else None
    found: tuple[dict[str, str], dict[str, Tensor]] | None = run.axis.bcast(read)
    if found is None:
        return
    stated, tensors = found
    path = None if run.folder is None else run.folder / NAME
    if not run.config.same_run(json.loads(stated["config"])):
        raise InputError(f"{path} belongs to another training configuration; remove it or choose another folder")
    if stated.get("identity") and run.task.identity and stated["identity"] != run.task.identity:
        raise InputError(f"{path} belongs to other data or another normalisation; remove it or choose another folder")
    ours = {name: p.shape for name, p in zip(run.names, run.parameters, strict=True)}
    prefix = "network."
    if {n.removeprefix(prefix): v.shape for n, v in tensors.items() if n.startswith(prefix)} != ours:
        raise InputError(f"{path} belongs to another network; remove it or choose another folder")
    _restore(run, tensors)
    run.progress = Progress(**json.loads(stated["progress"]))


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]] | None:
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            stated: Mapping[str, str] = file.metadata()
        return dict(stated), load_file(path)
    except SafetensorError as error:
        raise InputError(f"{path} is damaged ({error}); remove it to train from the start") from error


def _restore(run: Training, tensors: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for index, (name, p) in enumerate(zip(run.names, run.parameters, strict=True)):
            p.copy_(tensors[f"network.{name}"])
            run.average[index].copy_(tensors[f"average.{name}"])
            keys = [k for k in _MOMENTS if f"adam.{k}.{name}" in tensors]
            if keys:
                state = {k: torch.zeros_like(p) if k != "step" else torch.zeros((), device=p.device) for k in keys}
                run.optimiser.state[p] = {k: v.copy_(tensors[f"adam.{k}.{name}"]) for k, v in state.items()}
        if run.names and f"best.{run.names[0]}" in tensors:
            run.best = [
                torch.empty_like(p).copy_(tensors[f"best.{name}"])
                for name, p in zip(run.names, run.parameters, strict=True)
            ]
