"""A network from somebody else's checkpoint as a prior: what was asked for, what was found, and the denoiser.

Nothing is guessed in silence: normalisation is an argument, what a file does not tell is asked for by name, and the card
carries everything that was used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from recon.errors import InputError
from recon.priors.base import Card, Prior
from recon.priors.checkpoints.safe import read_weights
from recon.priors.checkpoints.tables import Noise
from recon.space import Space

Numbers = float | Sequence[float]


class Options(BaseModel):
    """Keys of ``config`` that every format knows.

    entry: which set of tensors to take from a file that holds several ("ema").  class_label: the class to condition on.
    any_size: use a network on a grid of other sides than it was trained on; only its divisibility is checked then.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    entry: str | None = None
    class_label: int | None = Field(default=None, ge=0)
    any_size: bool = False


Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class Request:
    """What ``load_checkpoint`` was asked for, its ``config`` read and its path known to exist."""

    path: Path
    space: Space
    shift: Numbers
    scale: Numbers
    config: Mapping[str, Any]
    sha256: str | Mapping[str, str] | None = None
    loaded: tuple[Any, str] | None = None

    def read(self) -> tuple[Any, str]:
        """Content and sha256 of the single file, read once.  Raises InputError."""
        return self.loaded or read_weights(self.path, self.file_digest)

    @property
    def channels(self) -> int:
        """Values per pixel: 1 for (y, x), the first length for (field, y, x)."""
        return self.space.shape[0] if len(self.space.shape) == 3 else 1

    @property
    def file_digest(self) -> str | None:
        """The sha256 that was given for a single file."""
        if self.sha256 is not None and not isinstance(self.sha256, str):
            raise InputError(f"{self.path} is one file: give sha256 as text, not as names and digests")
        return self.sha256

    def options(self, model: type[Model]) -> Model:
        """``config`` as the keys of a format.  Raises InputError naming every key that is wrong."""
        return parsed(model, self.config, f"the config for {self.path}")


def parsed(model: type[Model], content: Mapping[str, Any], what: str) -> Model:
    """``content`` validated.  Raises InputError naming ``what`` and every key that is wrong."""
    try:
        return model.model_validate(dict(content))
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_url=False))
        raise InputError(f"{what} does not fit: {wrong}") from error


def check_channels(request: Request, inputs: int, outputs: int) -> None:
    """The network takes one image of the space's fields, and answers with one or with an image and its variances.

    Raises InputError with the expected and the received numbers.
    """
    if inputs != request.channels:
        hint = "; networks conditioned on a second image have no prior" if inputs == 2 * request.channels else ""
        raise InputError(
            f"{request.path} holds a network for {inputs} channels; {request.space.describe()} has {request.channels}{hint}"
        )
    if outputs not in (inputs, 2 * inputs):
        raise InputError(f"{request.path}: the network answers {outputs} channels; expected {inputs} or {2 * inputs}")


def check_sides(path: Path, sides: tuple[int, int], step: int, trained: tuple[int, int] | None, any_size: bool) -> None:
    """Both sides can be halved as often as the network does, and are those of the training unless ``any_size``.

    step: 2^(levels - 1).  trained: None where the checkpoint does not tell.  Raises InputError.
    """
    if any(side % step for side in sides):
        raise InputError(f"{path}: the network needs sides divisible by {step}; got {sides[0]} x {sides[1]}")
    if trained is not None and sides != trained and not any_size:
        raise InputError(
            f"{path} was trained on {trained[0]} x {trained[1]}; got {sides[0]} x {sides[1]}. Cut the grid to that size, or "
            "set any_size in config to use the network where it was not trained"
        )


def check_told(path: Path, told: Mapping[str, object], found: Mapping[str, object]) -> None:
    """What the config says of the architecture is what the weights have.  Raises InputError naming every difference."""
    wrong = [
        f"{k} is {told[k]} in the config, {found[k]} in the weights" for k in found if told.get(k, found[k]) != found[k]
    ]
    if wrong:
        raise InputError(f"{path} is another network than its config says: {'; '.join(wrong)}")


def check_label(path: Path, classes: int, label: int | None) -> None:
    """A network with classes has a label below their number, one without has none.  Raises InputError."""
    if classes == 0 and label is not None:
        raise InputError(f"{path} knows no classes; leave class_label out of config (got {label})")
    if classes and (label is None or label >= classes):
        raise InputError(
            f"{path} is conditioned on {classes} classes: config needs class_label from 0 to {classes - 1}; got {label}"
        )


def class_vector(request: Request, classes: int, label: int | None, zero: bool) -> Tensor | None:
    """One-hot (1, classes) of ``label``, zeros with ``zero``, None for a network without classes.  Raises InputError."""
    if classes and zero:
        if label is not None:
            raise InputError(f"{request.path}: give class_label or zero_label in config, not both")
        return torch.zeros(1, classes)
    check_label(request.path, classes, label)
    return None if label is None else torch.eye(classes)[label : label + 1]


def image_space(space: Space) -> tuple[int, int]:
    """Rows and columns of (y, x) or (field, y, x).  Raises InputError for other numbers of axes."""
    if len(space.shape) not in (2, 3):
        raise InputError(f"checkpoints are priors over images (y, x) or (field, y, x); got {space.describe()}")
    return space.shape[-2], space.shape[-1]


class CheckpointPrior(Prior):
    """A foreign network as ``D(z, sigma) = c_skip z + c_out F(c_in z, label)``, differentiable with respect to ``z``.

    network: from (n, channels, rows, columns) and labels (n,), float64, to as many channels, or twice as many of which the
    second half (learned variances) is dropped.  noise: its form, labels and range.  Coefficients and labels are computed in
    float64; the network computes in the type of its parameters (float32 as loaded); the answer has the type of ``z``.
    Nothing is clipped.  Levels outside ``schedule`` get the label of its nearer end where labels come from a table.
    """

    def __init__(self, request: Request, network: nn.Module, noise: Noise, card: Card) -> None:
        image_space(request.space)
        super().__init__(request.space, noise.schedule, card, shift=request.shift, scale=request.scale)
        self.network = network.eval().requires_grad_(False)
        self.form = noise.form
        self.clock = noise.clock

    @property
    def dtype(self) -> torch.dtype:
        floats = (value.dtype for value in self.network.parameters() if value.is_floating_point())
        return next(floats, torch.float32)

    def predict(self, z: Tensor, sigma: Tensor) -> Tensor:
        level = sigma.to(torch.float64)
        shape = (-1, *[1] * (z.ndim - 1))
        c_in, c_skip, c_out = (c.to(z.dtype).reshape(shape) for c in self.form.coefficients(level))
        rows, columns = self.latent.shape[-2:]
        inputs = (c_in * z).to(self.dtype).reshape(len(z), -1, rows, columns)
        answer = self.network(inputs, self.clock(level))[:, : inputs.shape[1]]
        return c_skip * z + c_out * answer.to(z.dtype).reshape(z.shape)


def make_card(request: Request, noise: Noise, format: str, found: Mapping[str, Any]) -> Card:
    """The card of a loaded checkpoint: file, normalisation, parametrisation, look-up, and what was ``found``."""
    facts: dict[str, Any] = {
        "format": format,
        "path": str(request.path),
        "normalisation": {
            "shift": _plain(request.shift),
            "scale": _plain(request.scale),
            "rule": "x = shift + scale * z",
        },
        "parametrisation": noise.form.kind,
        "noise_labels": noise.clock.lookup,
        "sigma_range": [noise.schedule.sigma_min, noise.schedule.sigma_max],
        "clipped": False,
        **found,
    }
    return Card(request.path.stem, f"a {format} checkpoint over {request.space.describe()}", facts)


def _plain(values: Numbers) -> float | list[float]:
    return [float(v) for v in values] if isinstance(values, Sequence) else float(values)
