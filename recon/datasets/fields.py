"""Gridded fields from NetCDF or HDF5 files: several variables on one grid, many of them, split into parts by time or by group.

A file is read through its own packing (scale, offset, fill value), each variable is multiplied by the factor on the card, and
what is missing in the file (land, clouds) is unknown: filled for computing, and left out of every sum by a mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from recon.datasets.slices import Part, area_mean, locate
from recon.errors import InputError
from recon.space import Coordinate, Space

if TYPE_CHECKING:
    import xarray as xr


class Split(BaseModel):
    """What is trained on, what a run may look at, and what it never sees.

    Without ``by``: in file order, the first ``train`` of the fields, then ``validation``, then the rest (neighbours in time
    are alike, so parts are blocks).  With ``by``, the key of one label per field (a patient, a year): the labels listed under
    ``validation_labels`` and ``test_labels``; all others are for training.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    train: float = Field(default=0.7, gt=0, le=1)
    validation: float = Field(default=0.1, ge=0, lt=1)
    by: str | None = None
    validation_labels: tuple[int, ...] = ()
    test_labels: tuple[int, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Split:
        if self.train + self.validation > 1 + 1e-9:
            raise ValueError("train and validation are shares of one whole; together they exceed 1")
        if self.by is None and (self.validation_labels or self.test_labels):
            raise ValueError("labels need 'by', the key of the label of each field")
        if set(self.validation_labels) & set(self.test_labels):
            raise ValueError("a label is either for validation or for testing")
        return self

    def rows(self, part: Part, count: int, labels: np.ndarray | None) -> np.ndarray:
        """The numbers of the fields of one part."""
        if labels is None:
            first, second = round(self.train * count), round((self.train + self.validation) * count)
            return np.arange(count)[
                {"train": slice(first), "validation": slice(first, second), "test": slice(second, None)}[part]
            ]
        chosen = {"validation": np.isin(labels, self.validation_labels), "test": np.isin(labels, self.test_labels)}
        chosen["train"] = ~(chosen["validation"] | chosen["test"])
        return np.flatnonzero(chosen[part])


class FieldCard(BaseModel):
    """A file ``datasets/NAME.yaml`` about fields on a grid in one NetCDF or HDF5 file.

    file: absolute, or relative to the folder RECON_DATA.  group: inside the file.  variables: arrays (n, y, x) by name, each
    with its ``units`` and ``factors`` (stored values are multiplied by it).  dims: names of the two axes in recon ("y", "x" or
    "lat", "lon"); axes of the file that have coordinates keep them (``pixel_mm`` makes them where there are none).  time: the
    variable with one date per field; without it the coordinate of the fields' own axis, if that holds dates.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    summary: str
    reader: Literal["fields"]
    file: str
    group: str | None = None
    variables: tuple[str, ...] = Field(min_length=1)
    units: tuple[str, ...]
    factors: tuple[float, ...] | None = None
    dims: tuple[str, str] = ("lat", "lon")
    pixel_mm: float | None = Field(default=None, gt=0)
    time: str | None = None
    split: Split = Split()
    licence: str
    source: str
    sha256: str = Field(pattern="^[0-9a-f]{64}$")

    @model_validator(mode="after")
    def _one_each(self) -> FieldCard:
        for name in ("units", "factors"):
            given = getattr(self, name)
            if given is not None and len(given) != len(self.variables):
                raise ValueError(f"{name} needs one entry per variable {self.variables}; got {given}")
        return self


@dataclass(frozen=True)
class Fields:
    """Fields of one source.

    values: float32 (n, variable, y, x), finite.  known: bool, the same shape, False where the file had no value; None when it
    had them all.  space: of one field, dims ("variable", y, x); unit "mixed" where units differ.  days: float64 (n,), since
    1 January 0:00 of each field's year; None where the file has no dates.
    """

    name: str
    values: np.ndarray
    known: np.ndarray | None
    space: Space
    days: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.values)

    def rows(self, chosen: slice) -> Fields:
        """Some of the fields."""
        known, days = (None if part is None else part[chosen] for part in (self.known, self.days))
        return Fields(self.name, self.values[chosen], known, self.space, days)

    def coarsened(self, factor: int) -> Fields:
        """Area means over ``factor`` x ``factor`` pixels; a mean is known only where all its pixels are."""
        if factor == 1:
            return self
        known = None if self.known is None else area_mean(self.known.astype(np.float32), factor) > 1 - 1e-6
        values = area_mean(self.values, factor)
        coords = {
            dim: place if isinstance(place, tuple) else place.reshape(-1, factor).mean(1)
            for dim, place in self.space.coords.items()
        }
        shape = (len(self.space.coords["variable"]), *values.shape[-2:])
        return Fields(self.name, values, known, Space(self.space.dims, shape, coords, self.space.unit), self.days)


def load_fields(card: FieldCard, part: Part) -> Fields:
    """One part of a data set, checked against its card.

    Raises InputError when the file is missing, its sha256 is not the card's, a variable is missing, of another shape or
    nowhere known, or the part is empty.
    """
    import xarray as xr

    path = locate(card.name, card.file, card.sha256, card.source)
    try:
        with xr.open_dataset(path, engine="h5netcdf", group=card.group, phony_dims="access") as opened:
            arrays = [_array(opened, name, str(path)) for name in card.variables]
            labels = None if card.split.by is None else np.asarray(opened[card.split.by].values)
            axes = _axes(card, opened[card.variables[0]])
            days = _days(card, opened)
    except (OSError, KeyError) as error:
        raise InputError(f"{path}: cannot be read as the fields of {card.name}: {error}") from error
    if any(a.shape != arrays[0].shape for a in arrays):
        raise InputError(f"{path}: the variables of {card.name} differ in shape: {[a.shape for a in arrays]}")
    rows = card.split.rows(part, len(arrays[0]), labels)
    if not len(rows):
        raise InputError(f"{card.name} has no fields for {part!r}; see 'split' on its card")
    values = np.stack([a[rows] for a in arrays], axis=1).astype(np.float32)
    values *= np.array(card.factors or (1.0,) * len(arrays), np.float32)[:, None, None]
    known = np.isfinite(values)
    unknown = [
        name for name, values_known in zip(card.variables, known.swapaxes(0, 1), strict=True) if not values_known.any()
    ]
    if unknown:
        raise InputError(f"{path}: {', '.join(unknown)} of {card.name} has no value in any field for {part!r}")
    unit = card.units[0] if len(set(card.units)) == 1 else "mixed"
    coords: dict[str, Coordinate] = {"variable": card.variables, **axes}
    space = Space(("variable", *card.dims), values.shape[1:], coords, unit)
    values, days = _filled(values, known), None if days is None else days[rows]
    return Fields(card.name, values, None if known.all() else known, space, days)


def _array(data: xr.Dataset, name: str, path: str) -> np.ndarray:
    if name not in data:
        raise InputError(f"{path} has no variable {name!r}; it has {sorted(map(str, data.data_vars))}")
    values = np.asarray(data[name].values)
    if values.ndim != 3:
        raise InputError(f"{path}: variable {name!r} must be (field, y, x); got {values.shape}")
    return values


def _axes(card: FieldCard, array: xr.DataArray) -> dict[str, Any]:
    """Coordinates of the two grid axes: those of the file, or centred ones from the pixel."""
    coords: dict[str, Any] = {}
    for dim, stored in zip(card.dims, array.dims[1:], strict=True):
        if stored in array.coords:
            coords[dim] = np.asarray(array.coords[stored].values, dtype=np.float64)
    if not coords and card.pixel_mm is not None:
        grid = Space.grid(array.shape[1:], card.pixel_mm * 1e-3, "1")
        coords = {dim: grid.coords[place] for dim, place in zip(card.dims, ("y", "x"), strict=True)}
    return coords


def _days(card: FieldCard, data: xr.Dataset) -> np.ndarray | None:
    """Days since 1 January 0:00 of each field's year, in the calendar of the file."""
    name = card.time or str(data[card.variables[0]].dims[0])
    times = data.variables.get(name)
    dated = times is not None and (
        times.dtype.kind == "M" or hasattr(times.values.ravel()[:1].tolist()[0], "timetuple")
    )
    if not dated:
        if card.time is not None:
            raise InputError(f"{card.name}: variable {card.time!r} must hold one date per field")
        return None
    part = data[name].dt
    days = part.dayofyear - 1 + (part.hour + (part.minute + part.second / 60) / 60) / 24
    return np.asarray(days.values, dtype=np.float64)


def _filled(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Unknown values replaced by the mean of the known ones of their variable."""
    if known.all():
        return values
    count = known.sum(axis=(0, 2, 3), keepdims=True)
    mean = np.where(known, values, 0.0).sum(axis=(0, 2, 3), keepdims=True) / np.maximum(count, 1)
    return np.where(known, values, mean).astype(np.float32)
