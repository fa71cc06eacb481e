"""Other people's checkpoints as named priors: a folder whose ``card.yaml`` points to the file.

.. code-block:: yaml

    summary: chest CT of another group
    grid: {dims: [y, x], shape: [256, 256]}
    unit: 1/m
    normalisation: {low: 0.0, high: 40.0}          # what the network's -1 and 1 are; or {shift: ..., scale: ...}
    checkpoint:
      file: ema_0.9999.pt                          # beside the card, or an absolute path; a folder for diffusers
      format: adm                                  # null reads it from the names of the tensors
      sha256: 5d41...                              # of the file; for a folder names: digests
      config: {learn_sigma: true}                  # what the file does not tell, under its published names
    unfit_for: ...

Then ``prior: NAME`` in a workflow and ``load_prior(NAME)`` find it like a prior of recon's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from recon.errors import InputError
from recon.priors.base import Card, Prior
from recon.priors.cards import Grid
from recon.priors.checkpoints import load_checkpoint, pixel_range


class Strict(BaseModel):
    """A section whose keys are all known."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class PixelScale(Strict):
    """``x = shift + scale * z`` with ``z`` the network's pixel values; or the values that its -1 and 1 stand for."""

    shift: float | tuple[float, ...] | None = None
    scale: float | tuple[float, ...] | None = None
    low: float | None = None
    high: float | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        pairs = [None not in (self.shift, self.scale), None not in (self.low, self.high)]
        given = sum(value is not None for value in (self.shift, self.scale, self.low, self.high))
        if sum(pairs) != 1 or given != 2:
            raise ValueError("expected either shift and scale, or low and high (what -1 and 1 stand for)")
        return self

    def numbers(self) -> tuple[float | tuple[float, ...], float | tuple[float, ...]]:
        """Shift and scale."""
        if self.low is not None and self.high is not None:
            return pixel_range(self.low, self.high)
        assert self.shift is not None  # seen to above
        assert self.scale is not None
        return self.shift, self.scale


class Checkpoint(Strict):
    """Where the weights are and what they are; see ``load_checkpoint``."""

    file: str = Field(min_length=1)
    format: str | None = None
    sha256: str | dict[str, str] | None = None
    config: dict[str, Any] = Field(default_factory=dict)


class ForeignCard(Strict):
    """The ``card.yaml`` of a checkpoint that recon did not train."""

    name: str = ""
    summary: str = ""
    grid: Grid
    unit: str
    pixel_mm: tuple[float, float] | None = None
    normalisation: PixelScale
    checkpoint: Checkpoint
    unfit_for: str = ""
    notes: tuple[str, ...] = ()


def load_foreign(folder: Path, content: Mapping[str, Any]) -> Prior:
    """The prior of a folder whose card is ``content``.

    Raises InputError naming every key of the card that is wrong, and as ``load_checkpoint`` does.
    """
    try:
        card = ForeignCard.model_validate({"name": folder.name, **content})
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_url=False))
        raise InputError(f"{folder / 'card.yaml'} is not the card of a checkpoint: {wrong}") from error
    told = card.checkpoint
    try:
        shift, scale = card.normalisation.numbers()
        prior = load_checkpoint(
            folder / Path(told.file).expanduser(),
            told.format,
            space=card.grid.space(card.unit),
            shift=shift,
            scale=scale,
            config=told.config,
            sha256=told.sha256,
        )
    except InputError as error:
        raise InputError(f"{folder / 'card.yaml'}: {error}") from error
    stated = card.model_dump(mode="json", exclude={"name", "summary", "normalisation"}, exclude_none=True)
    summary = card.summary or prior.card.summary
    prior.card = Card(card.name, summary, {**prior.card.facts, **stated})
    return prior
