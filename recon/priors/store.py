"""Priors on disk: a folder with ``card.yaml`` and ``weights.safetensors``.

The card says what the weights were made from and how to rebuild the network; it carries their sha256, so weights cannot be
swapped or cut short without notice.  Weights are kept in float16 and computed with in float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from recon.errors import InputError
from recon.files import sha256, write_text, written_aside
from recon.priors.autoencoder import AutoencoderArchitecture, build_autoencoder
from recon.priors.base import Card
from recon.priors.conditional import ConditionalNetworkPrior, Conditions
from recon.priors.latent import LatentPrior
from recon.priors.network import Architecture, NetworkPrior, ShuffledUNet, build_network
from recon.schedules import Schedule
from recon.space import Space
from recon.store import find

WEIGHTS = "weights.safetensors"
_CODER = "coder."  # the weights of an autoencoder beside those of the denoiser


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Grid(_Section):
    """Axes and lengths of the images.  coords: of the axes that have some: numbers, or the names of variables."""

    dims: tuple[str, ...]
    shape: tuple[int, ...]
    coords: dict[str, tuple[float, ...] | tuple[str, ...]] = Field(default_factory=dict)

    def space(self, unit: str) -> Space:
        """The space of the prior."""
        coords = {k: v if isinstance(v[0], str) else np.array(v) for k, v in self.coords.items()}
        return Space(self.dims, self.shape, coords, unit)


Positive = Annotated[float, Field(gt=0)]


class Normalisation(_Section):
    """``z = (x - shift) / scale``, one number or one per field; sigma_data: standard deviation of ``z`` in training."""

    shift: float | tuple[float, ...]
    scale: Positive | tuple[Positive, ...]
    sigma_data: float = Field(gt=0)


class Sigmas(_Section):
    """The noise levels the denoiser is good for, in units of the latent."""

    sigma_min: float = Field(gt=0)
    sigma_max: float = Field(gt=0)


class Coder(_Section):
    """The autoencoder of a latent prior, and the mean and standard deviation of each channel of its latents.

    rmse: of held-out images that were coded and decoded, in the physical unit, by data set.
    """

    architecture: AutoencoderArchitecture
    mean: tuple[float, ...]
    std: tuple[Positive, ...]
    rmse: dict[str, float] = Field(default_factory=dict)


class Source(_Section):
    """A data set that was trained on.  share: of the training images."""

    name: str
    slices: int
    share: float
    licence: str
    source: str


class Weights(_Section):
    """The file of the weights: its sha256, the type they are stored in and how many they are."""

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    dtype: Literal["float16", "float32"]
    parameters: int


class Budget(_Section):
    """What the training cost."""

    images: int
    seconds: float
    precision: str


class Error(_Section):
    """Held-out error at one noise level: RMSE in units of the latent, and of the prior alone in the physical unit if one."""

    data: str
    sigma: float
    prior: float
    wiener: float
    identity: float
    non_local_means: float | None = None  # as scikit-image has them
    prior_physical: float | None = None


class Likeness(_Section):
    """How unlike held-out images the prior's draws are, beside training images: see ``diagnostics.samples``.

    images: how many on each side.  spectrum (dB), histogram and sliced (standard deviations): of draws against held-out images;
    with ``_training``: of training images against the same, the mean over several subsets.
    """

    data: str
    images: int
    spectrum: float
    spectrum_training: float
    histogram: float
    histogram_training: float
    sliced: float
    sliced_training: float


class Drawn(_Section):
    """The draws that were looked at: how many, in how many steps; ``draws.png`` shows the first ones."""

    count: int
    steps: int
    seed: int
    likeness: tuple[Likeness, ...]


class PriorCard(_Section):
    """The content of ``card.yaml``.

    conditions: what the network is told beside the image.  whole: the grid of the field of which the images are windows.
    autoencoder: of a prior whose denoiser works on latents; architecture, schedule and sigma_data are of those.
    """

    name: str
    summary: str
    grid: Grid
    unit: str
    pixel_mm: tuple[float, float] | None = None
    normalisation: Normalisation
    schedule: Sigmas
    architecture: Architecture
    autoencoder: Coder | None = None
    conditions: Conditions | None = None
    whole: Grid | None = None
    weights: Weights
    data: tuple[Source, ...]
    held_out: tuple[str, ...]
    budget: Budget
    denoising: tuple[Error, ...]
    draws: Drawn | None = None
    unfit_for: str
    weights_licence: str
    notes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _channels(self) -> Self:
        told = 0 if self.conditions is None else self.conditions.channels(self.architecture.fields)
        if told != self.architecture.condition:
            raise ValueError(
                f"conditions make {told} channels; architecture.condition is {self.architecture.condition}"
            )
        return self


FACTS = ("pixel_mm", "whole", "data", "held_out", "budget", "denoising", "draws", "unfit_for", "weights_licence", "notes")
"""Keys of the card that the prior itself does not know; ``prior.card.facts`` holds them."""


def save_prior(folder: Path, prior: NetworkPrior) -> PriorCard:
    """Write a prior's card and float16 weights to ``folder`` and return the card.

    Raises InputError when the prior has no network of ``build_network``, a fact is missing from its card, or a weight does
    not fit float16.
    """
    network = prior.network
    if not isinstance(network, ShuffledUNet):
        raise InputError(f"only priors over networks of build_network can be saved; got {type(network).__name__}")
    named = dict(network.named_parameters())
    if isinstance(prior, LatentPrior):
        named |= {f"{_CODER}{name}": value for name, value in prior.coder.named_parameters()}
    halves = {name: value.detach().to(torch.float16).contiguous() for name, value in named.items()}
    unfit = [name for name, value in halves.items() if not bool(value.isfinite().all())]
    if unfit:
        raise InputError(f"weights that are not finite numbers of float16 cannot be saved: {', '.join(unfit)}")
    known: dict[str, Any] = {
        "name": prior.card.name,
        "summary": prior.card.summary,
        "grid": {
            "dims": prior.space.dims,
            "shape": prior.space.shape,
            "coords": {
                k: tuple(v) if isinstance(v, tuple) else tuple(v.tolist()) for k, v in prior.space.coords.items()
            },
        },
        "unit": prior.space.unit,
        "normalisation": {
            "shift": _plain(prior.shift),
            "scale": _plain(prior.scale),
            "sigma_data": prior.sigma_data,
        },
        "schedule": {"sigma_min": prior.schedule.sigma_min, "sigma_max": prior.schedule.sigma_max},
        "architecture": network.architecture,
        "autoencoder": _coder(prior),
        "conditions": prior.inputs if isinstance(prior, ConditionalNetworkPrior) else None,
        "weights": {"sha256": "0" * 64, "dtype": "float16", "parameters": sum(v.numel() for v in halves.values())},
        **{key: prior.card.facts[key] for key in FACTS if key in prior.card.facts},
    }
    card = _validated(known, f"the card of {prior.card.name}")
    folder.mkdir(parents=True, exist_ok=True)
    with written_aside(folder / WEIGHTS) as aside:
        save_file(halves, aside)
        aside.chmod(0o644)  # safetensors makes files for their owner alone; a prior is for others too
    weights = card.weights.model_copy(update={"sha256": sha256(folder / WEIGHTS)})
    card = card.model_copy(update={"weights": weights})
    write_card(folder, card)
    return card


def write_card(folder: Path, card: PriorCard) -> None:
    """Write ``card.yaml``, whole or not at all."""
    text = yaml.safe_dump(card.model_dump(mode="json"), sort_keys=False, width=120, allow_unicode=True)
    write_text(folder / "card.yaml", text)


def load_prior(name_or_path: str | Path, workspace: str | Path | None = None) -> NetworkPrior:
    """The prior of a name or folder, looked up as in ``recon.store``; its weights are checked against its card.

    A prior whose card has conditions is a ConditionalNetworkPrior, one with an autoencoder a LatentPrior.

    Raises InputError for an unknown name, a card with missing, unknown or wrong keys, and weights that are missing, changed,
    cut short, of another network, or not finite.
    """
    folder = find("priors", name_or_path, workspace)
    card = read_card(folder)
    space, schedule = card.grid.space(card.unit), Schedule(card.schedule.sigma_min, card.schedule.sigma_max)
    facts = Card(card.name, card.summary, card.model_dump(mode="json", exclude={"name", "summary"}, exclude_none=True))
    network, weights = build_network(card.architecture), _weights(folder, card)
    numbers = card.normalisation.model_dump()
    if card.autoencoder is not None:
        coder = build_autoencoder(card.autoencoder.architecture)
        for name in ("mean", "std"):
            getattr(coder, name).copy_(torch.tensor(getattr(card.autoencoder, name)).reshape(-1, 1, 1))
        mine = {name for name in weights if name.startswith(_CODER)}
        _fill(coder, {name.removeprefix(_CODER): weights.pop(name) for name in mine}, folder)
        _fill(network, weights, folder)
        return LatentPrior(space, schedule, facts, (network, coder), **numbers)
    _fill(network, weights, folder)
    prior = NetworkPrior(space, schedule, facts, network, **numbers)
    if card.conditions is None:
        return prior
    return ConditionalNetworkPrior(prior, card.conditions, None if card.whole is None else card.whole.space(card.unit))


def read_card(folder: Path) -> PriorCard:
    """The card of a prior's folder, without its weights.  Raises InputError naming every key that is wrong."""
    path = folder / "card.yaml"
    if not path.is_file():
        raise InputError(f"{folder} is not a prior: it has no card.yaml")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not YAML: {error}") from error
    return _validated(content, str(path))


def _coder(prior: NetworkPrior) -> dict[str, Any] | None:
    """The section ``autoencoder`` of a card."""
    if not isinstance(prior, LatentPrior):
        return None
    numbers = {name: tuple(getattr(prior.coder, name).flatten().tolist()) for name in ("mean", "std")}
    told = prior.card.facts.get("autoencoder", {})
    return {"architecture": prior.coder.architecture, **numbers, "rmse": told.get("rmse", {})}


def _plain(values: Tensor) -> float | tuple[float, ...]:
    return float(values) if values.ndim == 0 else tuple(values.flatten().tolist())


def _validated(content: object, what: str) -> PriorCard:
    try:
        return PriorCard.model_validate(content)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_url=False))
        raise InputError(f"{what} is not the card of a prior: {wrong}") from error


def _weights(folder: Path, card: PriorCard) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        raise InputError(f"the prior {card.name} has no weights: there is no file {path}")
    found = sha256(path)
    if found != card.weights.sha256:
        raise InputError(
            f"{path} holds other weights than its card says, or was cut short: sha256 {found}, the card has "
            f"{card.weights.sha256}; fetch or train {card.name} again"
        )
    try:
        return load_file(path)
    except SafetensorError as error:
        raise InputError(f"{path} is damaged: {error}") from error


def _fill(network: torch.nn.Module, weights: dict[str, Tensor], folder: Path) -> None:
    parameters = dict(network.named_parameters())
    wrong = sorted(parameters.keys() ^ weights.keys())
    wrong += [n for n in parameters.keys() & weights.keys() if parameters[n].shape != weights[n].shape]
    if wrong:
        raise InputError(
            f"{folder / WEIGHTS} belongs to another architecture than its card: {', '.join(wrong[:4])}, ..."
        )
    broken = [name for name, value in weights.items() if not bool(value.isfinite().all())]
    if broken:
        raise InputError(f"{folder / WEIGHTS} holds numbers that are not finite: {', '.join(broken[:4])}")
    with torch.no_grad():
        for name, value in parameters.items():
            value.copy_(weights[name])
