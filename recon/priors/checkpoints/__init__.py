"""Priors from other people's checkpoints, each brought to ``denoise(z, sigma) = E[z0 | z0 + sigma n]``.

Formats: adm (guided-diffusion), edm, edm2, score_sde, diffusers (folders), deepinv.  Files are read as data: weights with
``weights_only``, configurations as JSON or YAML; nothing is executed, nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from recon.errors import InputError
from recon.priors.base import Prior
from recon.priors.checkpoints.adm import load_adm
from recon.priors.checkpoints.base import CheckpointPrior, Numbers, Request, image_space
from recon.priors.checkpoints.deepinv import load_deepinv
from recon.priors.checkpoints.diffusers import load_diffusers
from recon.priors.checkpoints.edm import load_edm
from recon.priors.checkpoints.edm2 import load_edm2
from recon.priors.checkpoints.latent import LatentCheckpointPrior
from recon.priors.checkpoints.safe import check_ending, read_mapping, read_weights, state_dict
from recon.priors.checkpoints.score_sde import load_score_sde
from recon.space import Space

__all__ = ["FORMATS", "CheckpointPrior", "LatentCheckpointPrior", "load_checkpoint", "pixel_range"]

_LOADERS: dict[str, Callable[[Request], Prior]] = {
    "adm": load_adm,
    "edm": load_edm,
    "edm2": load_edm2,
    "score_sde": load_score_sde,
    "diffusers": load_diffusers,
    "deepinv": load_deepinv,
}
FORMATS = tuple(_LOADERS)
"""Names of the formats."""

_SIGNS = {
    "input_blocks.": "adm",
    "all_modules.": "score_sde",
    "emb_fourier.": "edm2",
    "map_layer0.": "edm",
    "m_head.": "deepinv",
}


def load_checkpoint(
    path: str | Path,
    format: str | None = None,
    *,
    space: Space,
    shift: Numbers,
    scale: Numbers,
    config: Mapping[str, Any] | str | Path | None = None,
    sha256: str | Mapping[str, str] | None = None,
) -> Prior:
    """A prior over ``space`` from a checkpoint: a weights file (.safetensors, .pt, .pth, .ckpt, .bin) or a diffusers folder.

    format: one of ``FORMATS``; None reads it from the names of the tensors.  space: (y, x) for one channel, (field, y, x) for
    more, in physical units.  shift, scale: ``x = shift + scale * z`` with ``z`` the pixel values the network (or
    autoencoder) was trained on, one number each or one per field; see ``pixel_range``.  config: what the file does not tell,
    under its published names (a mapping, or a JSON or YAML file; the keys are those of the format's config class).  sha256:
    of the file, or of files in a folder by their names.

    Raises InputError, naming file, expected and received, for a file that is absent, damaged, of another digest, format or
    network, or that would run code; for a config with missing or unknown keys; for a space the network does not fit.
    """
    place = Path(path)
    if not place.exists():
        raise InputError(f"there is no file or folder {place}")
    if format is not None and format not in _LOADERS:
        raise InputError(f"the formats of checkpoints are {', '.join(FORMATS)}; got {format!r}")
    if format not in (None, "diffusers") and place.is_dir():
        raise InputError(f"a checkpoint of format {format} is one file; {place} is a folder")
    if format == "diffusers" and not place.is_dir():
        raise InputError(f"a diffusers checkpoint is a folder; {place} is a file")
    if not place.is_dir():
        check_ending(place)
    image_space(space)
    told = read_mapping(Path(config)) if isinstance(config, str | Path) else dict(config or {})
    request = Request(place, space, shift, scale, told, sha256)
    if format is None and place.is_dir():
        return load_diffusers(request)
    if format is None:
        format, loaded = _recognised(request)
        request = Request(place, space, shift, scale, told, sha256, loaded)
    return _LOADERS[format](request)


def pixel_range(low: float, high: float, network: tuple[float, float] = (-1.0, 1.0)) -> tuple[float, float]:
    """``shift, scale`` for which the physical values ``low, high`` are the network's ``network[0], network[1]``.

    Raises InputError for ranges that are not rising.
    """
    if not (low < high and network[0] < network[1]):
        raise InputError(f"ranges rise from low to high; got {low}, {high} and {network}")
    scale = (high - low) / (network[1] - network[0])
    return low - network[0] * scale, scale


def _recognised(request: Request) -> tuple[str, tuple[Any, str]]:
    """The format of a file from the names of its tensors, and its content."""
    content, digest = read_weights(request.path, request.file_digest)
    parts = request.config.get("recon")
    entry = (parts if isinstance(parts, Mapping) else request.config).get("entry")
    inner = content.get("model") if isinstance(content, Mapping) and "ema" in content and "step" in content else None
    names = list(inner) if isinstance(inner, Mapping) else list(state_dict(content, request.path, entry)[0])
    found = {form for sign, form in _SIGNS.items() if any(_starts(str(name), sign) for name in names)}
    if len(found) != 1:
        raise InputError(
            f"{request.path}: the names of its tensors ({', '.join(map(str, names[:3]))}, ...) are those of "
            f"{' and '.join(sorted(found)) or 'no known format'}; give format as one of {', '.join(FORMATS)}"
        )
    return found.pop(), (content, digest)


def _starts(name: str, sign: str) -> bool:
    for wrapper in ("module.", "model.", "unet."):
        name = name.removeprefix(wrapper)
    return name.startswith(sign)
