"""From the ``prior:`` of a workflow (``prior_section``) to the prior: found, opened, told, computed, laid over the field."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recon.errors import InputError
from recon.priors import Card, Compute, Prior, ScoreSum, SlicesPrior, Tiling, Windowed, accelerate, load_prior
from recon.priors.cards import Grid
from recon.priors.guidance import Conditional
from recon.priors.network import NetworkPrior
from recon.space import Space
from recon.workflows.prior_section import DATE, TRUTH, Asked, PriorSection
from recon.workflows.source import KeyPath

Found = Callable[[KeyPath, str], str]
"""(key path, what stands there) -> an absolute path."""


@dataclass(frozen=True)
class Target:
    """What a truth is made for: the arrays that a prior will describe, and its card."""

    space: Space
    card: Card


def located(asked: Asked, prior: Found, file: Found) -> Asked:
    """``asked`` with absolute paths: ``prior`` finds names and folders, ``file`` files."""
    if isinstance(asked, str):
        return prior(("prior",), asked)
    changes: dict[str, Any] = {}
    if asked.name is not None:
        changes["name"] = (prior if asked.format is None else file)(("prior", "name"), asked.name)
    if asked.sum is not None:
        changes["sum"] = tuple(prior(("prior", "sum", i), name) for i, name in enumerate(asked.sum))
    if asked.given is not None:
        files = {k: v for k, v in asked.given.items() if isinstance(v, str) and v.endswith((".npy", ".nc"))}
        changes["given"] = {**asked.given, **{k: file(("prior", "given", k), v) for k, v in files.items()}}
    return asked.model_copy(update=changes)


def opened(asked: Asked) -> Prior:
    """The prior by itself, on its own grid and before it is told anything.  Raises InputError as ``load_prior``."""
    if isinstance(asked, str):
        return load_prior(asked)
    if asked.sum is not None:
        return ScoreSum([load_prior(name) for name in asked.sum], asked.weights)
    assert asked.name is not None  # the section has one of the two
    if asked.format is None:
        return load_prior(asked.name)
    assert asked.grid is not None  # seen to by the section
    assert asked.unit is not None
    assert asked.normalisation is not None
    space, numbers = asked.grid.space(asked.unit), asked.normalisation.numbers()
    return load_prior(
        asked.name, format=asked.format, space=space, normalisation=numbers, config=asked.config, sha256=asked.sha256
    )


def target(asked: Asked, prior: Prior) -> Target:
    """What a truth for ``prior`` has to be, once it is in windows or slices.  Raises InputError where that is not stated."""
    own = prior.space
    if isinstance(asked, str) or (asked.tile is None and asked.slices is None):
        return Target(own, prior.card)
    if asked.slices is not None:
        if asked.tile is not None:
            own = target(asked.model_copy(update={"slices": None}), prior).space
        if asked.slices.count is None:
            raise InputError(
                "prior.slices.count: how many slices the volume has must be said when a truth is simulated from"
            )
        place = 1 if own.dims[0] in ("channel", "variable") else 0
        dims = (*own.dims[:place], asked.slices.axis, *own.dims[place:])
        shape = (*own.shape[:place], asked.slices.count, *own.shape[place:])
        return Target(Space(dims, shape, own.coords, own.unit), prior.card)
    assert asked.tile is not None
    whole, sides = prior.card.facts.get("whole"), asked.tile.shape
    if whole is not None and sides in (None, tuple(whole["shape"][-2:])):
        return Target(Grid.model_validate(whole).space(own.unit), prior.card)
    if sides is None or whole is not None:
        known = "its card does not know the whole field" if whole is None else f"it knows windows of {whole['shape']}"
        raise InputError(f"prior.tile.shape: the sides of the field must be said for {prior.card.name!r}; {known}")
    coords = {dim: values for dim, values in own.coords.items() if dim not in own.dims[-2:]}
    return Target(Space(own.dims, (*own.shape[:-2], *sides), coords, own.unit), prior.card)


def finished(asked: Asked, prior: Prior, image: Space, truth: Callable[[str], Tensor]) -> Prior:
    """``prior``, as ``opened`` made it, told its conditions, computed as asked, over ``image``.

    truth: name of a condition -> its value for the truth that is simulated from.  Where precision or a compiler could cost
    accuracy the network is evaluated here, on draws of the prior itself.

    Raises InputError for conditions that are missing or that nobody takes, and as ``accelerate``, ``Windowed``,
    ``SlicesPrior`` do.
    """
    section = PriorSection(name=asked) if isinstance(asked, str) else asked
    prior = _bound(section.given, prior, truth)
    placed = getattr(prior, "whole", None) is not None
    if placed and section.tile is None:
        raise InputError(
            f"{prior.card.name!r} is over windows of a larger field: write prior: {{name: ..., tile: {{overlap: ...}}}}"
        )
    compute = Compute() if section.compute is None else section.compute.build()
    if compute != Compute() and not placed:
        prior = accelerate(prior, compute)
    if section.slices is not None:
        axis, chunk = section.slices.axis, compute.chunk or 1
        if section.tile is not None:
            prior = _windowed(section.tile.build(), prior, without(image, axis), compute, placed)
        return SlicesPrior(prior, image, axis, chunk=chunk, any_plane=section.slices.any_plane)
    return prior if section.tile is None else _windowed(section.tile.build(), prior, image, compute, placed)


def without(space: Space, axis: str) -> Space:
    """The slices of ``space`` across ``axis``."""
    kept = [i for i, dim in enumerate(space.dims) if dim != axis]
    dims, shape = tuple(space.dims[i] for i in kept), tuple(space.shape[i] for i in kept)
    return Space(dims, shape, {d: v for d, v in space.coords.items() if d != axis}, space.unit, space.complex)


def _windowed(tiling: Tiling, prior: Prior, image: Space, compute: Compute, placed: bool) -> Prior:
    """``prior`` in windows over ``image``."""
    if not placed:
        return Windowed(prior, image, tiling)
    # Windows that are told their place are computed one after the other; chunks are of them, the rest of the whole.
    again = compute.recompute == "chunks"
    field = Windowed(prior, image, tiling, chunk=compute.chunk, recompute=again)
    rest = replace(compute, chunk=None, recompute="nothing" if again else compute.recompute)
    return field if rest == Compute() else accelerate(field, rest)


def _bound(given: Mapping[str, Any] | None, prior: Prior, truth: Callable[[str], Tensor]) -> Prior:
    if not isinstance(prior, Conditional):
        if given is not None:
            raise InputError(f"prior.given: {prior.card.name!r} takes no conditions; leave it out")
        return prior
    names = ", ".join(prior.conditions)
    if given is None:
        raise InputError(
            f"{prior.card.name!r} depends on {names}: say them under prior.given, or given: {{}} for the prior without them"
        )
    if not given:
        return prior.unconditional()
    try:
        return prior.given(**{name: _value(name, value, truth) for name, value in given.items()})
    except InputError as error:
        raise InputError(f"prior.given: {error}") from error


def _value(name: str, value: Any, truth: Callable[[str], Tensor]) -> Tensor:  # noqa: ANN401
    if value == TRUTH:
        return truth(name)
    if not isinstance(value, str):
        return torch.tensor(value, dtype=torch.float64)
    if DATE.match(value):
        try:
            when = datetime.fromisoformat(value)
        except ValueError as error:
            raise InputError(f"{name}: {value} is no date: {error}") from error
        return torch.tensor((when - datetime(when.year, 1, 1)).total_seconds() / 86400, dtype=torch.float64)
    return _read(name, Path(value))


def _read(name: str, path: Path) -> Tensor:
    """The array in a .npy file, or the variable of that name (or the only one) in a NetCDF file."""
    try:
        if path.suffix == ".npy":
            values = np.load(path, allow_pickle=False)
        else:
            import xarray as xr

            with xr.open_dataset(path, engine="h5netcdf", decode_times=False) as data:
                found = [str(v) for v in data.data_vars]
                wanted = name if name in found else found[0] if len(found) == 1 else None
                if wanted is None:
                    raise InputError(f"{name}: {path} has no variable {name!r}; it has {', '.join(found) or 'none'}")
                values = data[wanted].load().values
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{name}: {path} cannot be read: {error}") from error
    if values.dtype.kind not in "fiu":
        raise InputError(f"{name}: {path} must hold real numbers; got {values.dtype}")
    return torch.from_numpy(values.astype(np.float64))


def fingerprint(prior: Prior) -> str | None:
    """The checksum of a prior's weights, where it is one network by itself; else one of everything its answers depend on.

    Weights of all parts, conditions that were given, how they are combined and computed; None for closed forms.
    """
    weights: set[str] = set()
    told: list[Any] = []
    for part in (module for module in prior.modules() if isinstance(module, Prior)):
        facts = part.card.facts
        stated = [
            facts.get("sha256"),
            *(facts[key].get("sha256") for key in ("weights", "checkpoint") if _maps(facts, key)),
        ]
        weights |= {json.dumps(one, sort_keys=True) if isinstance(one, dict) else one for one in stated if one}
        told += [(key, facts[key]) for key in ("compute", "windows", "guidance", "of") if key in facts]
        told += [facts["weights"]] if isinstance(facts.get("weights"), list | tuple) else []
        if isinstance(part, NetworkPrior) and part.condition is not None:
            told.append(hashlib.sha256(part.condition.detach().cpu().contiguous().numpy().tobytes()).hexdigest())
    if not told:
        return (
            min(weights)
            if len(weights) == 1
            else hashlib.sha256("".join(sorted(weights)).encode()).hexdigest()
            if weights
            else None
        )
    text = json.dumps([sorted(weights), told], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _maps(facts: Mapping[str, Any], key: str) -> bool:
    return isinstance(facts.get(key), Mapping)
