"""Truths made of slices: one image, or neighbouring slices as a volume, on the grid of a prior and read as they are needed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from recon.datasets.slices import SliceCard, Slices, area_mean, count_slices, load_slices, locate, read_dicom
from recon.errors import InputError, need
from recon.space import Space
from recon.workflows.priors import Target

Fit = Literal["refuse", "pad", "resample"]
"""What is done with slices that are not the prior's grid, nor a whole multiple of it."""


@dataclass(frozen=True)
class Stack:
    """The slices of a truth.

    space: of an image (y, x), or of a volume with the axis of slices among its dims.  where: they come from, in words.
    read: (first, last) -> slices ``first .. last - 1`` in 1/m, (last - first, y, x).
    """

    space: Space
    where: str
    read: Callable[[int, int], Tensor]

    def whole(self) -> Tensor:
        """All of it: *space.shape."""
        count = math.prod(self.space.shape[:-2])
        return self.read(0, count).reshape(self.space.shape)


def slice_stack(definition: Any, index: int, prior: Target, fit: Fit) -> Stack:  # noqa: ANN401  (a model of the group)
    """The slices from ``index`` on that ``prior`` describes.

    Slices of another number of pixels are averaged down where theirs is a whole multiple of the prior's.  Otherwise ``fit``
    says what is done: "pad" sets smaller ones in air, pixel for pixel; "resample" interpolates the slice, set in air to the
    prior's proportions, onto the prior's grid.

    Raises InputError where there are not so many slices, they do not fit, or their pixels differ.
    """
    where, total, read = _file(definition, index)
    *stack, ny, nx = prior.space.shape
    count = math.prod(stack)
    if index + count > total:
        name = definition.name or definition.file
        more = f", {count} of them are asked for" if count > 1 else ""
        way = f"; ask for {total - index} (prior.slices.count) at most" if count > 1 and index < total else ""
        raise InputError(f"problem.index is {index}; {name} has {total} slices, numbered from 0{more}{way}")
    if count > 1:
        where += f" and the {count - 1} after it"
    first = _laid(read(index, index + 1), (ny, nx), fit, prior)
    where += first.note
    plane = Space.grid((ny, nx), first.pixel, "1/m")
    coords = {**_along(definition, prior.space, count), **plane.coords}
    space = Space((*prior.space.dims[:-2], *plane.dims), prior.space.shape, coords, plane.unit)

    def rows(low: int, high: int) -> Tensor:
        found = _laid(read(index + low, index + high), (ny, nx), fit, prior)
        if abs(found.pixel - first.pixel) > 1e-6 * first.pixel:
            raise InputError(f"{where} have pixels of different sizes; a volume has one")
        return found.mu

    return Stack(space, where, rows)


def _along(definition: Any, space: Space, count: int) -> dict[str, np.ndarray]:  # noqa: ANN401
    """Positions across the slices, where the data set says how far apart they are."""
    apart = getattr(definition, "slice_mm", None)
    extra = [dim for dim in space.dims[:-2] if dim not in ("channel", "variable")]
    if apart is None or len(extra) != 1:
        return {}
    return {extra[0]: (np.arange(count) - (count - 1) / 2) * apart * 1e-3}


def _file(definition: Any, index: int) -> tuple[str, int, Callable[[int, int], Slices]]:  # noqa: ANN401
    """What a definition is in words, how many slices it has, and how to read them."""
    if isinstance(definition, SliceCard):
        card, path = definition, locate(definition.name, definition.file, definition.sha256, definition.source)
        part: Literal["test", "validation"] = "test" if card.use == "test" else "validation"
        where = f"slice {index} of {card.name} ({card.licence})"
        return where, count_slices(card, path), lambda a, b: load_slices(card, part, slice(a, b), path)
    one = read_dicom(_dicom_path(definition))
    name = definition.name or definition.file
    where = f"{name} ({definition.licence})" if definition.licence else definition.file
    return where, 1, lambda a, b: one


@dataclass(frozen=True)
class _Laid:
    """Slices on a grid, the side of their pixels in m, and what was done to them."""

    mu: Tensor
    pixel: float
    note: str


def _laid(slices: Slices, wanted: tuple[int, int], fit: Fit, prior: Target) -> _Laid:
    """``slices`` on a grid of ``wanted`` pixels."""
    rows, columns = slices.mu.shape[1:]
    pixel, factor = float(slices.pixel[0]), max(1, rows // wanted[0])
    if np.ptp(slices.pixel) > 1e-6 * pixel:
        raise InputError(f"{slices.name} has pixels of different sizes; a volume has one")
    if (rows, columns) == (wanted[0] * factor, wanted[1] * factor):
        note = f", averaged {factor} x {factor}" if factor > 1 else ""
        return _Laid(torch.from_numpy(area_mean(slices.mu, factor).copy()), pixel * factor, note)
    if fit == "refuse":
        raise InputError(
            f"{slices.name} has slices of {rows} x {columns} pixels; prior {prior.card.name!r} has {wanted[0]} x {wanted[1]}, "
            "and only whole multiples are averaged down. Set problem.fit: pad (smaller slices are set in air) or resample"
        )
    if fit == "pad":
        if rows > wanted[0] or columns > wanted[1]:
            raise InputError(
                f"problem.fit: slices of {rows} x {columns} pixels cannot be padded to {wanted[0]} x {wanted[1]}; resample them"
            )
        return _Laid(_in_air(slices.mu, wanted), pixel, f", set in air to {wanted[0]} x {wanted[1]}")
    # Pixels are square, so the frame has the proportions of the grid.
    side = max(rows / wanted[0], columns / wanted[1])
    frame = (math.ceil(side * wanted[0] - 1e-9), math.ceil(side * wanted[1] - 1e-9))
    framed = _in_air(slices.mu, frame)[:, None]
    values = functional.interpolate(framed, wanted, mode="bilinear", antialias=True)[:, 0]
    return _Laid(values, pixel * frame[0] / wanted[0], f", resampled to {wanted[0]} x {wanted[1]}")


def _in_air(mu: np.ndarray, wanted: tuple[int, int]) -> Tensor:
    whole = np.zeros((len(mu), *wanted), np.float32)
    top, left = (wanted[0] - mu.shape[1]) // 2, (wanted[1] - mu.shape[2]) // 2
    whole[:, top : top + mu.shape[1], left : left + mu.shape[2]] = mu
    return torch.from_numpy(whole)


def _dicom_path(definition: Any) -> Path:  # noqa: ANN401
    """The file of a DICOM definition: its own, or one that the pydicom package carries."""
    file = definition.file
    if not file.startswith("pydicom:"):
        return locate(definition.name or file, file, definition.sha256, definition.source)
    need("pydicom", "dicom")
    from pydicom.data import get_testdata_file

    found = get_testdata_file(file.removeprefix("pydicom:"), download=False)
    if found is None:
        raise InputError(f"the installed pydicom package carries no file {file.removeprefix('pydicom:')!r}")
    return locate(definition.name, str(found), definition.sha256, definition.source)
