"""Priors on disk: a folder with ``card.yaml`` and ``weights.safetensors``.

The card says what the weights were made from and how to rebuild the network; it carries their sha256, so weights cannot be
swapped or cut short without notice.  Weights are kept in float16 and computed with in float32.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from recon.errors import InputError
from recon.files import sha256, write_text, written_aside
from recon.priors.autoencoder import build_autoencoder
from recon.priors.base import Card
from recon.priors.cards import FACTS, PriorCard
from recon.priors.conditional import ConditionalNetworkPrior
from recon.priors.latent import LatentPrior
from recon.priors.network import NetworkPrior, ShuffledUNet, build_network
from recon.schedules import Schedule

if TYPE_CHECKING:
    from recon.priors.learning.moments import Moments

WEIGHTS = "weights.safetensors"
_CODER = "coder."  # the weights of an autoencoder beside those of the denoiser
_AROUND = "around."  # the Gaussian beside the network that was built around it


def save_prior(folder: Path, prior: NetworkPrior) -> PriorCard:
    """Write a prior's card and float16 weights to ``folder`` and return the card.

    A Gaussian that the network was built around is kept in float64.  Raises InputError when the prior has no network of
    ``build_network``, a fact is missing from its card, or a weight does not fit float16.
    """
    network, moments = _without_gaussian(prior.network)
    if not isinstance(network, ShuffledUNet):
        raise InputError(f"only priors over networks of build_network can be saved; got {type(network).__name__}")
    named = _kept(network)
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
        "around": None if moments is None else {"rank": moments.factors.shape[1]},
        "conditions": prior.inputs if isinstance(prior, ConditionalNetworkPrior) else None,
        "weights": {"sha256": "0" * 64, "dtype": "float16", "parameters": sum(v.numel() for v in halves.values())},
        **{key: prior.card.facts[key] for key in FACTS if key in prior.card.facts},
    }
    card = _validated(known, f"the card of {prior.card.name}")
    folder.mkdir(parents=True, exist_ok=True)
    with written_aside(folder / WEIGHTS) as aside:
        gaussian = {} if moments is None else moments.tensors()
        save_file(halves | {f"{_AROUND}{name}": value.contiguous() for name, value in gaussian.items()}, aside)
        aside.chmod(0o644)  # safetensors makes files for their owner alone; a prior is for others too
    weights = card.weights.model_copy(update={"sha256": sha256(folder / WEIGHTS)})
    card = card.model_copy(update={"weights": weights})
    write_card(folder, card)
    return card


def write_card(folder: Path, card: PriorCard) -> None:
    """Write ``card.yaml``, whole or not at all."""
    text = yaml.safe_dump(card.model_dump(mode="json"), sort_keys=False, width=120, allow_unicode=True)
    write_text(folder / "card.yaml", text)


def read_prior(folder: Path) -> NetworkPrior:
    """The prior that ``save_prior`` wrote to ``folder``; its weights are checked against its card.

    A prior whose card has conditions is a ConditionalNetworkPrior, one with an autoencoder a LatentPrior.  ``load_prior`` also
    looks names up and reads other people's checkpoints.

    Raises InputError for a card with missing, unknown or wrong keys, and weights that are missing, changed, cut short, of
    another network, or not finite.
    """
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
    whole: torch.nn.Module = network if card.around is None else _with_gaussian(network, weights, card, folder)
    _fill(network, weights, folder)  # after the Gaussian, around which a network starts from zero
    prior = NetworkPrior(space, schedule, facts, whole, **numbers)
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


def _without_gaussian(network: torch.nn.Module) -> tuple[torch.nn.Module, Moments | None]:
    """The network proper, and what the Gaussian around it is made of, if there is one."""
    from recon.priors.learning.around import AroundGaussian  # its package stands on this module

    if not isinstance(network, AroundGaussian):
        return network, None
    if network.moments is None:
        raise InputError("a Gaussian that was given as a covariance matrix is too large to be saved; use AroundGaussian.of")
    return network.network, network.moments


def _with_gaussian(
    network: ShuffledUNet, weights: dict[str, Tensor], card: PriorCard, folder: Path
) -> torch.nn.Module:
    """``network`` around the Gaussian that stands among ``weights``, from which it is taken out."""
    from recon.priors.learning.around import AroundGaussian
    from recon.priors.learning.moments import Moments

    size = math.prod(card.grid.shape)
    assert card.around is not None
    found = {name: weights.pop(name) for name in sorted(weights) if name.startswith(_AROUND)}
    gaussian = {name.removeprefix(_AROUND): value for name, value in found.items()}
    wanted = {"mean": (size,), "factors": (size, card.around.rank), "diagonal": (size,)}
    if {name: tuple(value.shape) for name, value in gaussian.items()} != wanted:
        raise InputError(f"{folder / WEIGHTS} has not the Gaussian of its card: {', '.join(found) or 'nothing of it'}")
    if not isinstance(card.normalisation.shift, float) or not isinstance(card.normalisation.scale, float):
        raise InputError(f"{folder / 'card.yaml'}: a network around a Gaussian has one shift and one scale")
    numbers = card.normalisation.shift, card.normalisation.scale
    return AroundGaussian.of(network, Moments(**gaussian), numbers, card.normalisation.sigma_data)


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


def _kept(network: torch.nn.Module) -> dict[str, Tensor]:
    """What the file of the weights holds: the parameters, and the filter that the network starts from."""
    skip = getattr(network, "skip", None)
    fitted = {} if skip is None else {f"skip.{name}": value for name, value in skip.named_buffers()}
    return {**dict(network.named_parameters()), **fitted}


def _fill(network: torch.nn.Module, weights: dict[str, Tensor], folder: Path) -> None:
    parameters = _kept(network)
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
