"""Where training images and held-out ones come from: cuts of CT slices, or fields on a grid."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from recon.datasets.augment import Cut, Cutter
from recon.datasets.fields import FieldCard, Fields, load_fields
from recon.datasets.sampling import FieldSampler, FieldSampling, image_space
from recon.datasets.slices import Part, SliceCard, load_slices
from recon.errors import InputError
from recon.space import Space
from recon.store import find
from recon.workflows.definitions import read_definition

Images = tuple[Tensor, Tensor | None]
"""Images in physical units (n, *space.shape), and where they are known (None: everywhere)."""


class TrainingData(Protocol):
    """Images of one space, for training and held out."""

    space: Space

    def batch(self, step: int, count: int) -> tuple[Tensor, Tensor]:
        """Training images of a step, and where they are known."""

    def whole(self, count: int) -> Tensor:
        """Training images without cropping, to fit a mean and a spectrum to."""

    def curve(self) -> Tensor:
        """A few images for the validation curve, kept out of training and of the card's test figures."""

    def held_out(self) -> dict[str, Images]:
        """Name -> images for the card."""

    def sources(self) -> list[dict[str, Any]]:
        """What the card says of the training images."""

    def says(self) -> list[str]:
        """What the card says of the held-out images."""


class SliceData(TrainingData):
    """Cuts of CT slices, brought to one size.  Raises InputError for data sets that are missing or not slices."""

    def __init__(
        self, cuts: tuple[Cut, ...], held_out: tuple[str, ...], side: int, seed: int, workspace: Path | None
    ) -> None:
        self.cards = {
            name: slice_card(name, workspace) for name in dict.fromkeys([*(c.dataset for c in cuts), *held_out])
        }
        self.names, self.side, self.cuts = held_out, side, cuts
        sources = {name: load_slices(self.cards[name], "train") for name in dict.fromkeys(cut.dataset for cut in cuts)}
        self.cutter = Cutter([(cut, sources[cut.dataset]) for cut in cuts], side, seed)
        self.space = Space(("y", "x"), (side, side), {}, "1/m")

    def batch(self, step: int, count: int) -> tuple[Tensor, Tensor]:
        return self.cutter.batch(step, count)

    def whole(self, count: int) -> Tensor:
        kept = [(cut, slices) for cut, slices in self.cutter.cuts if cut.side[0] == slices.mu.shape[1]]
        return Cutter(kept or list(self.cutter.cuts), self.side, self.cutter.seed).batch(0, count)[0]

    def curve(self) -> Tensor:
        parts = [_thinned(self._held_out(name)[0]) for name in self.names if self.cards[name].use == "train"]
        return torch.cat(parts) if parts else torch.empty(0, *self.space.shape)

    def held_out(self) -> dict[str, Images]:
        return {name: self._held_out(name) for name in self.names}

    def sources(self) -> list[dict[str, Any]]:
        total = sum(cut.share for cut in self.cuts)
        rows = []
        for name in dict.fromkeys(cut.dataset for cut in self.cuts):
            count = next(len(slices) for cut, slices in self.cutter.cuts if cut.dataset == name)
            share = sum(cut.share for cut in self.cuts if cut.dataset == name) / total
            rows.append(_source(self.cards[name], count, share))
        return rows

    def says(self) -> list[str]:
        return [
            f"{name}: all of it"
            if self.cards[name].use == "test"
            else f"{name}: the last {self.cards[name].validation:.0%} of each group in file order"
            for name in self.names
        ]

    def _held_out(self, name: str) -> Images:
        """Area means of the prior's size."""
        card = self.cards[name]
        slices = load_slices(card, "test" if card.use == "test" else "validation")
        factor, rest = divmod(slices.mu.shape[1], self.side)
        if rest or factor < 1:
            raise InputError(f"slices of {name} have {slices.mu.shape[1]} rows, not a multiple of {self.side}")
        coarse = slices.coarsened(factor)
        return torch.from_numpy(coarse.mu), None if coarse.valid is None else torch.from_numpy(coarse.valid)


class FieldData(TrainingData):
    """Fields of one data set; its validation part is the curve, its test part the card's figures.

    Raises InputError for a data set that is missing or holds no fields.
    """

    def __init__(self, sampling: FieldSampling, seed: int, workspace: Path | None) -> None:
        self.card = field_card(sampling.dataset, workspace)
        self.sampling, self.seed = sampling, seed
        self.sampler = FieldSampler(sampling, self._part("train"), seed)
        self.space = image_space(self.sampler.fields, sampling.phase is not None)

    def batch(self, step: int, count: int) -> tuple[Tensor, Tensor]:
        values, known = self.sampler.batch(step, count)
        return values.reshape(count, *self.space.shape), known.reshape(count, *self.space.shape)

    def whole(self, count: int) -> Tensor:
        return self.batch(0, count)[0]

    def curve(self) -> Tensor:
        return _thinned(self._images("validation")[0], 48)

    def held_out(self) -> dict[str, Images]:
        return {self.card.name: self._images("test")}

    def sources(self) -> list[dict[str, Any]]:
        return [_source(self.card, len(self.sampler.fields), 1.0)]

    def says(self) -> list[str]:
        split = self.card.split
        if split.by is not None:
            return [f"{self.card.name}: {split.by} {', '.join(map(str, split.test_labels))}"]
        return [f"{self.card.name}: the last {1 - split.train - split.validation:.0%} in file order"]

    def _part(self, part: Part) -> Fields:
        return load_fields(self.card, part).coarsened(self.sampling.coarsen)

    def _images(self, part: Part) -> Images:
        """The fields of a part as they are; magnitudes get a phase of their own, the same every time."""
        plain = self.sampling.model_copy(update={"mirror": (0.0, 0.0), "shift": 0, "gain": 0.0})
        fields = self._part(part)
        shown = fields if len(fields) <= 512 else Fields(fields.name, *_every(fields, 512), fields.space)
        values, known = [], []
        for row in range(len(shown)):
            one = Fields(shown.name, shown.values[row : row + 1], _row(shown.known, row), shown.space)
            image, mask = FieldSampler(plain, one, self.seed + 1).batch(row, 1)
            values.append(image.reshape(self.space.shape))
            known.append(mask.reshape(self.space.shape))
        return torch.stack(values), None if fields.known is None else torch.stack(known)


def slice_card(name: str, workspace: Path | None) -> SliceCard:
    """The card of CT slices called ``name``."""
    card = read_definition("datasets", find("datasets", name, workspace))
    if not isinstance(card, SliceCard):
        raise InputError(f"the data set {name} holds no CT slices in HDF5; cuts are made of those, fields: of others")
    return card


def field_card(name: str, workspace: Path | None) -> FieldCard:
    """The card of gridded fields called ``name``."""
    card = read_definition("datasets", find("datasets", name, workspace))
    if not isinstance(card, FieldCard):
        raise InputError(f"the data set {name} holds no gridded fields (reader: fields)")
    return card


def _source(card: SliceCard | FieldCard, count: int, share: float) -> dict[str, Any]:
    facts = {"licence": card.licence, "source": card.source}
    return {"name": card.name, "slices": count, "share": round(share, 3), **facts}


def _row(known: Any, row: int) -> Any:  # noqa: ANN401  (an array or None)
    return None if known is None else known[row : row + 1]


def _every(fields: Fields, most: int) -> tuple[Any, Any]:
    step = -(-len(fields) // most)
    return fields.values[::step], None if fields.known is None else fields.known[::step]


def _thinned(images: Tensor, most: int = 12) -> Tensor:
    return images[:: max(1, len(images) // most)][:most]
