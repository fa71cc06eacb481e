"""Folders of Hugging Face diffusers: a U-Net with its scheduler, in pixels or in the latent space of an autoencoder.

The folder of a pipeline (``model_index.json``, ``unet/``, ``scheduler/``, perhaps ``vae/`` or ``vqvae/``), or of a bare U-Net
with the scheduler in ``config``.  Configurations are read as JSON and weights as tensors; networks are built from their
configurations without the hub, so nothing is looked up on a network.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recon.errors import InputError, need
from recon.priors.checkpoints.base import (
    CheckpointPrior,
    Options,
    Request,
    check_label,
    check_sides,
    image_space,
    make_card,
)
from recon.priors.checkpoints.latent import Codec, LatentCheckpointPrior
from recon.priors.checkpoints.safe import fill, read_mapping, read_weights
from recon.priors.checkpoints.schedulers import scheduler_noise

DENOISERS = ("UNet2DModel", "UNet2DConditionModel")
AUTOENCODERS = ("AutoencoderKL", "VQModel")

_STEM = "diffusion_pytorch_model"
_RENAMED = ((".query.", ".to_q."), (".key.", ".to_k."), (".value.", ".to_v."), (".proj_attn.", ".to_out.0."))
_CONDITIONS = ("addition_embed_type", "encoder_hid_dim_type", "class_embed_type", "time_cond_proj_dim")


class DiffusersConfig(Options):
    """scheduler: of a bare U-Net, a file or its content.  variant: of the weights ("fp16").

    embedding: a safetensors file with one tensor (length, width), the text embedding on which a UNet2DConditionModel is
    conditioned (for an unconditional prior that of the empty text).
    """

    scheduler: str | dict[str, Any] | None = None
    variant: str | None = None
    embedding: str | None = None


@dataclass
class Folder:
    """A folder, what its files' sha256 should be, and what they were found to be."""

    root: Path
    expected: dict[str, str]
    variant: str | None
    found: dict[str, str] = field(default_factory=dict)

    def component(self, part: str, classes: tuple[str, ...]) -> tuple[Any, dict[str, Any]]:
        """The network in the sub-folder ``part`` ("" for the folder itself) and its configuration.  Raises InputError."""
        place = self.root / part
        config = read_mapping(place / "config.json")
        name = config.get("_class_name")
        if name not in classes:
            raise InputError(f"{place} holds a {name}; expected one of {', '.join(classes)}")
        network_class = getattr(need("diffusers", "checkpoints"), name)
        tensors, file = self._tensors(place)
        network = _built(network_class, config, place, "meta")
        fill(network, _modern(tensors, network.state_dict().keys()), file)
        if any(value.is_meta for value in itertools.chain(network.parameters(), network.buffers())):
            network = _built(network_class, config, place, None)  # buffers that are not in the file
            fill(network, _modern(tensors, network.state_dict().keys()), file)
        return network, config

    def _tensors(self, place: Path) -> tuple[dict[str, Tensor], Path]:
        """All tensors of a component, from one file or several, and the file to name in errors."""
        stem = f"{_STEM}.{self.variant}" if self.variant else _STEM
        for file in (place / f"{stem}.safetensors", place / f"{stem}.bin"):
            if file.is_file():
                return self._read(file), file
        for ending in ("safetensors", "bin"):
            index = place / f"{_STEM}.{ending}.index{f'.{self.variant}' if self.variant else ''}.json"
            if index.is_file():
                return self._shards(index), index
        others = sorted(file.name for file in place.glob(f"{_STEM}*"))
        there = f"; there are {', '.join(others)} (set variant in config)" if others else ""
        raise InputError(f"{place} has no weights: expected {stem}.safetensors or {stem}.bin{there}")

    def _shards(self, index: Path) -> dict[str, Tensor]:
        shards = read_mapping(index).get("weight_map")
        names = set(shards.values()) if isinstance(shards, dict) else set()
        if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
            raise InputError(f"{index} does not say which files beside it hold the weights")
        tensors: dict[str, Tensor] = {}
        for name in sorted(names):
            tensors |= self._read(index.parent / name)
        return tensors

    def _read(self, file: Path) -> dict[str, Tensor]:
        name = file.relative_to(self.root).as_posix()
        content, self.found[name] = read_weights(file, self.expected.get(name))
        if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
            raise InputError(f"{file} holds something else than named tensors")
        return dict(content)

    def all_checked(self) -> None:
        """Every sha256 that was given belongs to a file that was read.  Raises InputError."""
        if left := sorted(self.expected.keys() - self.found.keys()):
            raise InputError(
                f"sha256 was given for {', '.join(left)}, which {self.root} did not use; the weights are "
                f"{', '.join(sorted(self.found))}"
            )


def _built(network_class: Any, config: Mapping[str, Any], place: Path, device: str | None) -> Any:  # noqa: ANN401
    try:
        with torch.random.fork_rng(devices=[]), torch.device(device) if device else contextlib.nullcontext():
            return network_class.from_config(dict(config))
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise InputError(f"{place / 'config.json'} describes no {network_class.__name__}: {error}") from error


def _modern(tensors: dict[str, Tensor], names: Any) -> dict[str, Tensor]:  # noqa: ANN401  (names of a state dict)
    """Tensors under today's names of attention layers, where the file has those of before diffusers 0.12."""
    renamed = {}
    for name, value in tensors.items():
        new = name
        for old, now in _RENAMED:
            new = new.replace(old, now) if name not in names else new
        renamed[new if new in names else name] = value
    return renamed


class Unet(nn.Module):
    """A diffusers U-Net with its condition: from (n, c, ny, nx) and labels (n,) to (n, c or 2 c, ny, nx).

    whole: it embeds whole labels.  index: of the class.  embedding: of the text (1, length, width).
    """

    embedding: Tensor | None

    def __init__(self, unet: nn.Module, whole: bool, index: int | None, embedding: Tensor | None) -> None:
        super().__init__()
        self.unet, self.whole, self.index = unet, whole, index
        self.register_buffer("embedding", embedding, persistent=False)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        times = label.round().long() if self.whole else label.to(x.dtype)
        given: dict[str, Any] = {}
        if self.index is not None:
            given["class_labels"] = torch.full((len(x),), self.index, device=x.device)
        if self.embedding is not None:
            given["encoder_hidden_states"] = self.embedding.to(x).expand(len(x), -1, -1)
        return self.unet(x, times, return_dict=False, **given)[0]


def load_diffusers(request: Request) -> CheckpointPrior:
    """The prior of a diffusers folder.  Raises InputError for a folder, config or space that do not fit."""
    root, config = request.path, request.options(DiffusersConfig)
    pipeline = (root / "model_index.json").is_file()
    unet_part = "unet" if pipeline else ""
    folder = Folder(root, _expected(request, unet_part, config.variant), config.variant)
    unet, described = folder.component(unet_part, DENOISERS)
    schedule, what = _scheduler(root, config, pipeline)
    embedding_type = str(described.get("time_embedding_type", "positional"))
    noise = scheduler_noise(schedule, what, embedding_type)
    network = Unet(unet, embedding_type == "learned", _class(root, unet, config), _embedding(root, unet, config))
    part = _autoencoder(root) if pipeline else None
    autoencoder = folder.component(part, AUTOENCODERS)[0] if part else None
    folder.all_checked()
    codec = None if autoencoder is None else Codec(autoencoder)
    _check(request, unet, codec, config)
    facts: dict[str, Any] = {
        "sha256": folder.found,
        "scheduler": schedule,
        "architecture": {
            "network": type(unet).__name__,
            "autoencoder": None if autoencoder is None else type(autoencoder).__name__,
            "channels": list(unet.config.block_out_channels),
        },
        "config": config.model_dump(exclude_none=True),
    }
    card = make_card(request, noise, "diffusers", facts)
    if codec is None:
        return CheckpointPrior(request, network, noise, card)
    return LatentCheckpointPrior(request, network, noise, card, codec)


def _expected(request: Request, part: str, variant: str | None) -> dict[str, str]:
    if request.sha256 is None or not isinstance(request.sha256, str):
        return dict(request.sha256 or {})
    place = request.path / part
    stem = f"{_STEM}.{variant}" if variant else _STEM
    name = next((f"{stem}.{e}" for e in ("safetensors", "bin") if (place / f"{stem}.{e}").is_file()), None)
    if name is None:
        raise InputError(f"{place} has its weights in several files: give sha256 as names and digests")
    return {f"{part}/{name}" if part else name: request.sha256}


def _autoencoder(root: Path) -> str | None:
    """The sub-folder of the autoencoder that the pipeline lists; None for a pipeline in pixels.

    Raises InputError where it is listed but absent: its latents must not pass for pixels.
    """
    listed = read_mapping(root / "model_index.json")
    names = {k: v[-1] for k, v in listed.items() if isinstance(v, list) and isinstance(v[-1], str)}
    parts = [k for k, v in names.items() if k in ("vae", "vqvae", "movq") or v.startswith(("Autoencoder", "VQ"))]
    if len(parts) > 1:
        raise InputError(f"{root} lists several autoencoders: {', '.join(parts)}; a prior has one")
    if parts and not (root / parts[0]).is_dir():
        raise InputError(f"{root} lists the autoencoder {parts[0]}, but there is no folder {root / parts[0]}")
    return parts[0] if parts else None


def _scheduler(root: Path, config: DiffusersConfig, pipeline: bool) -> tuple[dict[str, Any], str]:
    """The scheduler's configuration and where it is from."""
    if pipeline:
        if config.scheduler is not None:
            raise InputError(f"{root} has a scheduler of its own; leave scheduler out of config")
        path = root / "scheduler" / "scheduler_config.json"
        return read_mapping(path), str(path)
    if config.scheduler is None:
        raise InputError(
            f"{root} is a bare network: config needs scheduler, the scheduler_config.json it was trained with (a file or its "
            "content)"
        )
    if isinstance(config.scheduler, str):
        return read_mapping(Path(config.scheduler)), config.scheduler
    return config.scheduler, "config scheduler"


def _class(root: Path, unet: Any, config: DiffusersConfig) -> int | None:  # noqa: ANN401
    """The class to condition on; refuses conditions that no config key can give."""
    asked = [name for name in _CONDITIONS if unet.config.get(name) is not None]
    if asked:
        raise InputError(f"{root} is conditioned through {', '.join(asked)}; priors take a class or a text embedding")
    check_label(root, unet.config.get("num_class_embeds") or 0, config.class_label)
    return config.class_label


def _embedding(root: Path, unet: Any, config: DiffusersConfig) -> Tensor | None:  # noqa: ANN401
    """The text embedding (1, length, width) of a UNet2DConditionModel."""
    wanted = type(unet).__name__ == "UNet2DConditionModel"
    if not wanted and config.embedding is not None:
        raise InputError(f"{root} is not conditioned on text; leave embedding out of config")
    if not wanted:
        return None
    width = unet.config.cross_attention_dim
    if config.embedding is None:
        raise InputError(
            f"{root} is conditioned on text: config needs embedding, a safetensors file with one tensor (length, {width})"
        )
    content, _ = read_weights(Path(config.embedding))
    values = list(content.values()) if isinstance(content, Mapping) else []
    if (
        len(values) != 1
        or not isinstance(values[0], Tensor)
        or values[0].shape[-1] != width
        or values[0].ndim not in (2, 3)
    ):
        shapes = [tuple(value.shape) for value in values if isinstance(value, Tensor)]
        raise InputError(f"{config.embedding} must hold one tensor (length, {width}); it holds {shapes}")
    tensor = values[0].to(torch.float32)
    if tensor.ndim == 3 and len(tensor) != 1:
        raise InputError(f"{config.embedding} must hold the embedding of one text; it holds {len(tensor)}")
    return tensor if tensor.ndim == 3 else tensor[None]


def _check(request: Request, unet: Any, codec: Codec | None, config: DiffusersConfig) -> None:  # noqa: ANN401
    """Channels and sides of the space, the autoencoder and the U-Net fit each other.  Raises InputError."""
    path, sides = request.path, image_space(request.space)
    inputs, outputs, channels = unet.config.in_channels, unet.config.out_channels, request.channels
    if codec is not None:
        if codec.channels != (channels, channels):
            raise InputError(
                f"{path} has an autoencoder from {codec.channels[0]} to {codec.channels[1]} channels; "
                f"{request.space.describe()} has {channels}"
            )
        if any(side % codec.factor for side in sides):
            raise InputError(
                f"{path}: its autoencoder needs sides divisible by {codec.factor}; got {sides[0]} x {sides[1]}"
            )
        channels, sides = codec.latents, (sides[0] // codec.factor, sides[1] // codec.factor)
    if inputs != channels or outputs not in (inputs, 2 * inputs):
        what = "its autoencoder" if codec is not None else request.space.describe()
        raise InputError(f"{path} holds a network from {inputs} to {outputs} channels; {what} has {channels}")
    size = unet.config.sample_size
    trained = (size, size) if isinstance(size, int) else tuple(size) if size is not None else None
    check_sides(path, sides, 2 ** (len(unet.config.block_out_channels) - 1), trained, config.any_size)
