"""Where training images and held-out ones come from: cuts of CT slices, or fields on a grid, whole or as windows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from recon.datasets.augment import Cut, Cutter
from recon.datasets.fields import FieldCard, Fields, load_fields
from recon.datasets.sampling import (
    FieldSampler,
    FieldSampling,
    Sample,
    aside,
    image_space,
    require_window,
    window_corner,
)
from recon.datasets.slices import Part, SliceCard, load_slices
from recon.errors import InputError
from recon.space import Space
from recon.store import find
from recon.workflows.definitions import read_definition

Images = Sample
"""Images in physical units (n, *space.shape), where they are known (None: everywhere), and what is told of them."""


class TrainingData(Protocol):
    """Images of one space, for training and held out.  whole_space: of the fields they are windows of, if they are."""

    space: Space
    whole_space: Space | None

    def batch(self, step: int, count: int) -> tuple[Tensor, Tensor]:
        """Training images of a step, and where they are known."""
        sample = self.sample(step, range(count))
        assert sample.known is not None
        return sample.values, sample.known

    def sample(self, step: int, rows: Sequence[int]) -> Sample:
        """Some of the training images of a step, with what is told of them."""

    def whole(self, count: int) -> Tensor:
        """Training images that are not zoomed, to fit a mean and a spectrum to."""

    def curve(self) -> Sample:
        """A few images for the validation curve, kept out of training and of the card's test figures."""

    def held_out(self) -> dict[str, Sample]:
        """Name -> images for the card."""

    def sources(self) -> list[dict[str, Any]]:
        """What the card says of the training images."""

    def says(self) -> list[str]:
        """What the card says of the held-out images."""


class SliceData(TrainingData):
    """Cuts of CT slices, brought to one size; windows of sides ``sides`` where the cuts are brought to a larger one.

    Raises InputError for data sets that are missing or not slices, cuts that are brought to different sizes, images that are
    not square and no windows, or windows that do not fit.
    """

    def __init__(
        self,
        cuts: tuple[Cut, ...],
        held_out: tuple[str, ...],
        sides: tuple[int, int],
        seed: int,
        workspace: Path | None,
    ) -> None:
        wholes = {cut.whole for cut in cuts}
        if len(wholes) > 1:
            raise InputError(f"all cuts are brought to one size; 'whole' is {', '.join(map(str, wholes))}")
        whole = wholes.pop()
        if whole is None and sides[0] != sides[1]:
            raise InputError(f"cuts of CT slices are square; architecture.size is {sides}")
        self.side, self.crop = whole or sides[0], None if whole is None else sides
        require_window(self.crop, (self.side, self.side), "cuts")
        self.cards = {
            name: slice_card(name, workspace) for name in dict.fromkeys([*(c.dataset for c in cuts), *held_out])
        }
        self.names, self.cuts = held_out, cuts
        sources = {name: load_slices(self.cards[name], "train") for name in dict.fromkeys(cut.dataset for cut in cuts)}
        self.cutter = Cutter([(cut, sources[cut.dataset]) for cut in cuts], self.side, seed)
        self.space = Space(("y", "x"), sides, {}, "1/m")
        self.whole_space = None if whole is None else Space(("y", "x"), (whole, whole), {}, "1/m")

    def sample(self, step: int, rows: Sequence[int]) -> Sample:
        return self._windows(Sample(*self.cutter.images(step, rows)), self.cutter.seed, step, rows)

    def whole(self, count: int) -> Tensor:
        kept = [(cut, slices) for cut, slices in self.cutter.cuts if cut.side[0] == slices.mu.shape[1]]
        cutter = Cutter(kept or list(self.cutter.cuts), self.side, self.cutter.seed)
        return self._windows(Sample(*cutter.batch(0, count)), self.cutter.seed, 0, range(count)).values

    def curve(self) -> Sample:
        parts = [_thinned(self._held_out(name)) for name in self.names if self.cards[name].use == "train"]
        if not parts:
            return Sample(torch.empty(0, *self.space.shape), None)
        corners = [part.corner for part in parts if part.corner is not None]
        masks = [torch.ones_like(part.values) if part.known is None else part.known for part in parts]
        joined = torch.cat([part.values for part in parts]), torch.cat(masks)
        return Sample(*joined, corner=torch.cat(corners) if corners else None)

    def held_out(self) -> dict[str, Sample]:
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

    def _held_out(self, name: str) -> Sample:
        """Area means of the size of the cuts, or one window of each, the same every time."""
        card = self.cards[name]
        slices = load_slices(card, "test" if card.use == "test" else "validation")
        factor, rest = divmod(slices.mu.shape[1], self.side)
        if rest or factor < 1:
            raise InputError(f"slices of {name} have {slices.mu.shape[1]} rows, not a multiple of {self.side}")
        coarse = slices.coarsened(factor)
        known = None if coarse.valid is None else torch.from_numpy(coarse.valid)
        return self._windows(Sample(torch.from_numpy(coarse.mu), known), self.cutter.seed + 1, 0, range(len(coarse)))

    def _windows(self, sample: Sample, seed: int, step: int, rows: Sequence[int]) -> Sample:
        """A window of each image, its place by (seed, step, row); the images themselves where they are whole."""
        if self.crop is None:
            return sample
        ny, nx = self.crop
        corners = [window_corner(aside(seed, step, row), self.crop, (self.side, self.side)) for row in rows]

        def cut(images: Tensor) -> Tensor:
            pairs = zip(images, corners, strict=True)
            return torch.stack([image[row : row + ny, column : column + nx] for image, (row, column) in pairs])

        known = None if sample.known is None else cut(sample.known)
        return Sample(cut(sample.values), known, corner=torch.tensor(corners, dtype=torch.float32))


class FieldData(TrainingData):
    """Fields of one data set; its validation part is the curve, its test part the card's figures.

    Raises InputError for a data set that is missing or holds no fields.
    """

    def __init__(self, sampling: FieldSampling, seed: int, workspace: Path | None) -> None:
        self.card = field_card(sampling.dataset, workspace)
        self.sampling, self.seed = sampling, seed
        self.sampler = FieldSampler(sampling, self._part("train"), seed)
        whole = image_space(self.sampler.fields, sampling.phase is not None)
        self.space = whole if sampling.crop is None else _window_space(whole, sampling.crop)
        self.whole_space = None if sampling.crop is None else whole

    def sample(self, step: int, rows: Sequence[int]) -> Sample:
        return self._shaped(self.sampler.sample(step, rows))

    def whole(self, count: int) -> Tensor:
        return self.batch(0, count)[0]

    def curve(self) -> Sample:
        return _thinned(self._images("validation"), 48)

    def held_out(self) -> dict[str, Sample]:
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

    def _images(self, part: Part) -> Sample:
        """The fields of a part as they are; windows, and phases of magnitudes, are of their own, the same every time."""
        plain = self.sampling.model_copy(update={"mirror": (0.0, 0.0), "shift": 0, "gain": 0.0})
        fields = self._part(part)
        shown = fields if len(fields) <= 512 else fields.rows(slice(None, None, -(-len(fields) // 512)))
        samples = [
            FieldSampler(plain, shown.rows(slice(row, row + 1)), self.seed + 1).sample(row, [0])
            for row in range(len(shown))
        ]
        corners = [sample.corner for sample in samples if sample.corner is not None]
        return self._shaped(
            Sample(
                torch.cat([sample.values for sample in samples]),
                None if fields.known is None else torch.cat([s.known for s in samples if s.known is not None]),
                tuple(torch.cat(parts) for parts in zip(*(sample.told for sample in samples), strict=True)),
                corner=torch.cat(corners) if corners else None,
            )
        )

    def _shaped(self, sample: Sample) -> Sample:
        """Without the axis of a single variable, as the space has it."""
        values, known = (None if part is None else part.reshape(-1, *self.space.shape) for part in sample[:2])
        assert values is not None
        return Sample(values, known, *sample[2:])


def _window_space(whole: Space, crop: tuple[int, int]) -> Space:
    """The space of windows of sides ``crop``: they lie anywhere, so only what is not on the grid keeps its coordinates."""
    coords = {dim: values for dim, values in whole.coords.items() if dim in whole.dims[:-2]}
    return Space(whole.dims, (*whole.shape[:-2], *crop), coords, whole.unit)


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


def _thinned(sample: Sample, most: int = 12) -> Sample:
    """At most ``most`` of the images, evenly."""
    every = slice(None, None, max(1, len(sample.values) // most))
    values, known, told, _, corner = sample
    return Sample(
        values[every][:most],
        None if known is None else known[every][:most],
        tuple(part[every][:most] for part in told),
        corner=None if corner is None else corner[every][:most],
    )
