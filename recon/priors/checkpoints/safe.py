"""Reading other people's files as data: tensors, JSON and YAML, nothing that runs.

A ``.pt`` file is a pickle, and a pickle is a program.  ``torch.load(weights_only=True)`` runs a reduced one that can build
tensors, numbers, strings and containers only; whatever asks for more is refused here, with the way out.  Nothing in this
module, or in those that use it, opens a connection.
"""

from __future__ import annotations

import json
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from recon.errors import InputError
from recon.files import sha256

PICKLES = (".pt", ".pth", ".bin", ".ckpt")
"""Endings of files that ``torch.save`` writes."""

_WRAPPERS = ("module.", "_orig_mod.")  # what DataParallel and torch.compile put before every name
_SHOWN = 4


def read_weights(path: Path, expected: str | None = None) -> tuple[Any, str]:
    """The content of a weights file, tensors on the CPU, and its sha256.

    expected: the sha256 it must have.  Raises InputError for a file that is absent, has another digest or an unknown
    ending, is damaged, or holds a pickle that asks for more than tensors and containers.
    """
    check_ending(path)
    digest = sha256(path)
    if expected is not None and digest != expected.lower():
        raise InputError(
            f"{path} is another file than expected, or was cut short: sha256 {digest}, expected {expected}"
        )
    if path.suffix == ".safetensors":
        try:
            return load_file(path), digest
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise InputError(f"{path} is not a whole safetensors file: {error}") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about how the file was pickled
            return torch.load(path, map_location="cpu", weights_only=True), digest
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} was refused: it is damaged, or a pickle that would run code or build objects beyond tensors, numbers "
            f"and containers ({_reason(error)}). If you trust it, save its weights alone with the code it belongs to, "
            "torch.save(network.state_dict(), FILE), and load that file"
        ) from error
    except Exception as error:  # a damaged file can fail anywhere in the reader
        raise InputError(
            f"{path} is damaged, or no file of torch.save ({type(error).__name__}: {str(error)[:200]})"
        ) from error


def check_ending(path: Path) -> None:
    """``path`` is a file with the ending of one that can be read as data.  Raises InputError with the way out."""
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    if path.suffix in (".pkl", ".pickle"):
        raise InputError(
            f"{path} is a pickle of whole objects, which runs code when it is opened; it was not opened. Convert it where you "
            "trust it: open it with the code it was published with, torch.save(network.state_dict(), 'weights.pt') (for the "
            "files of EDM: network = pickle['ema']), and load weights.pt"
        )
    if path.suffix not in (".safetensors", *PICKLES):
        known = ", ".join((".safetensors", *PICKLES))
        raise InputError(f"{path}: expected a file ending in {known}; got {path.suffix or 'no ending'!r}")


def _reason(error: Exception) -> str:
    """What a refused pickle asked for, or the first line of the error."""
    asked = re.search(r"(?:GLOBAL|class|function) ([\w.]+\.[\w.]+)", str(error))
    return f"it asks for {asked[1].rstrip('.')}" if asked else str(error).strip().splitlines()[0][:200]


def state_dict(content: object, path: Path, entry: str | None = None) -> tuple[dict[str, Tensor], str]:
    """The named tensors in what ``read_weights`` returned, and the entry they were found under ("" for the top).

    entry: dotted name of the part to take ("ema", "state_dict"), needed where a file holds several sets.  Names that all
    begin with ``module.`` lose that.  Raises InputError where there is no set of tensors, several, or not that entry.
    """
    found = dict(_sets(content, ""))
    if entry is not None:
        if entry not in found:
            raise InputError(f"{path} has no set of tensors under {entry!r}; it has {_names(found)}")
        return _unwrapped(found[entry]), entry
    if len(found) != 1:
        what = (
            f"several sets of tensors: {_names(found)}. Choose one with config entry" if found else "no tensors by name"
        )
        raise InputError(f"{path} holds {what}")
    ((where, tensors),) = found.items()
    return _unwrapped(tensors), where


def _sets(content: object, where: str, depth: int = 0) -> list[tuple[str, dict[str, Tensor]]]:
    """Every mapping of names to tensors, down to three levels; optimizer states (numbered, not named) are none."""
    if not isinstance(content, Mapping) or depth > 2 or not all(isinstance(name, str) for name in content):
        return []
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    if tensors and not any(isinstance(value, Mapping) for value in content.values()):
        return [(where, tensors)]
    inner: list[tuple[str, dict[str, Tensor]]] = []
    for name, value in content.items():
        inner += _sets(value, f"{where}.{name}" if where else name, depth + 1)
    return inner


def _unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in _WRAPPERS:
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


def _names(found: Mapping[str, object]) -> str:
    return ", ".join(repr(name) if name else "the top" for name in found) or "none"


def read_mapping(path: Path) -> dict[str, Any]:
    """A JSON or YAML file whose content is a mapping.  Raises InputError where there is none."""
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path} is not {'JSON' if path.suffix == '.json' else 'YAML'}: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}; expected names and values")
    return content


def fill(network: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Give ``network`` its weights in float32, set it to evaluation and let no parameter ask for a gradient.

    Raises InputError naming the first tensors that are missing, unknown, of another shape, or not finite.
    """
    expected = network.state_dict()
    kinds = (
        [f"{name} is missing" for name in expected if name not in tensors],
        [f"{name} is unknown" for name in tensors if name not in expected],
        [
            f"{name} is {tuple(tensors[name].shape)}, expected {tuple(value.shape)}"
            for name, value in expected.items()
            if name in tensors and tensors[name].shape != value.shape
        ],
    )
    if any(kinds):
        shown = [one for kind in kinds for one in kind[: _SHOWN // 2]]
        more = sum(map(len, kinds)) - len(shown)
        raise InputError(
            f"{path} does not hold the network it should: {'; '.join(shown)}{f'; and {more} more' if more else ''}"
        )
    broken = [name for name, value in tensors.items() if not bool(value.isfinite().all())]
    if broken:
        raise InputError(f"{path} holds numbers that are not finite: {', '.join(broken[:_SHOWN])}")
    floats = {n: v.to(torch.float32) if v.is_floating_point() else v for n, v in tensors.items()}
    network.load_state_dict(floats, strict=True, assign=True)
    network.eval().requires_grad_(False)
