r"""CT slices made into linear attenuation.

A CT file stores Hounsfield units, ``HU = 1000 (mu / mu_water - 1)``.  recon works in the attenuation itself,

.. math::  \mu = \max\bigl(0,\ \mu_{water} (1 + HU / 1000)\bigr), \qquad \mu_{water} = 19.3\ \mathrm{m}^{-1},

the value of water for photons of about 70 keV, the effective energy of a 120 kV scan.  Values below air are noise of the
scanner's reconstruction and are clipped at 0.  A file in windowed gray levels is first mapped to HU by the line on its card;
where the window saturates the true value is unknown, and ``valid`` is False.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from recon.errors import InputError, need
from recon.files import sha256

MU_WATER = 19.3
"""Linear attenuation of water in 1/m at about 70 keV."""

Part = Literal["train", "validation", "test"]


class SliceCard(BaseModel):
    """A file ``datasets/NAME.yaml`` about CT slices in one HDF5 file.

    file: absolute, or relative to the folder RECON_DATA.  key: the array (slice, y, x).  unit: of the stored values; HU =
    slope * value + intercept.  saturated_from: stored values from here on stand for "at least this".  pixel_mm: side of a
    stored pixel, a number or the key of one number per slice times ``pixel_factor``.  slice_mm: distance of neighbours, where
    the slices are one volume from the first to the last; left out where they are not.  bottom_up: rows are stored from the
    lower end of the image.  group_key: labels within which slices are ordered.  validation: share at the end of each group that
    is held out.  use: "test" files are never trained on.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    summary: str
    reader: Literal["hdf5_slices"]
    file: str
    key: str
    unit: Literal["HU", "gray"]
    slope: float = 1.0
    intercept: float = 0.0
    saturated_from: float | None = None
    pixel_mm: float | str
    pixel_factor: float = 1.0
    pixel_note: str = ""
    slice_mm: float | None = Field(default=None, gt=0.0)
    bottom_up: bool = False
    group_key: str | None = None
    validation: float = Field(default=0.0, ge=0.0, lt=1.0)
    use: Literal["train", "test"] = "train"
    licence: str
    source: str
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


@dataclass(frozen=True)
class Slices:
    """Slices of one source.

    mu: float32 (n, ny, nx) in 1/m.  valid: bool (n, ny, nx), False where the value is unknown; None when all are known.
    pixel: float64 (n,), side of a pixel in metres.
    """

    name: str
    mu: np.ndarray
    valid: np.ndarray | None
    pixel: np.ndarray

    def __len__(self) -> int:
        return len(self.mu)

    def coarsened(self, factor: int) -> Slices:
        """Area means over ``factor`` x ``factor`` pixels; a mean is known only where all its pixels are.

        Raises InputError when the sides are not multiples of ``factor``.
        """
        valid = None if self.valid is None else area_mean(self.valid.astype(np.float32), factor) > 1 - 1e-6
        return Slices(self.name, area_mean(self.mu, factor), valid, self.pixel * factor)


def attenuation(hu: np.ndarray) -> np.ndarray:
    """Linear attenuation in 1/m of values in HU: float32, clipped below at 0."""
    return np.maximum(np.float32(MU_WATER) * (1 + np.asarray(hu, np.float32) / 1000), np.float32(0))


def hounsfield(mu: np.ndarray) -> np.ndarray:
    """HU of linear attenuations in 1/m: ``1000 (mu / MU_WATER - 1)``, float32."""
    return 1000 * (np.asarray(mu, np.float32) / np.float32(MU_WATER) - 1)


def area_mean(values: np.ndarray, factor: int) -> np.ndarray:
    """Means of (..., ny, nx) over blocks of ``factor`` x ``factor``: (..., ny / factor, nx / factor).

    Raises InputError when a side is not a multiple of ``factor``.
    """
    ny, nx = values.shape[-2:]
    if ny % factor or nx % factor:
        raise InputError(f"slices of {ny} x {nx} pixels cannot be averaged over blocks of {factor} x {factor}")
    blocks = values.reshape(*values.shape[:-2], ny // factor, factor, nx // factor, factor)
    return blocks.mean(axis=(-3, -1), dtype=np.float32)


def load_slices(card: SliceCard, part: Part, chosen: slice = slice(None), path: Path | None = None) -> Slices:
    """One part of a data set, checked against its card.

    part: "train" or "validation" of a training file by the card's rule, "test" for the whole of a test file.  chosen: some
    slices of it; no others are read.  path: of the file, from ``locate``, where it was checked before.

    Raises InputError when the file is missing, its sha256 is not the card's, or the part does not exist.
    """
    if (part == "test") != (card.use == "test"):
        raise InputError(f"{card.name} is for {card.use}; it has no part {part!r}")
    path = path or locate(card.name, card.file, card.sha256, card.source)
    import h5py

    with h5py.File(path, "r") as file:
        if card.key not in file:
            raise InputError(f"{path} has no array {card.key!r}; it has {sorted(file)}")
        count = len(file[card.key])
        groups = np.zeros(count, int) if card.group_key is None else np.asarray(file[card.group_key])
        rows = np.arange(count) if part == "test" else _part(groups, card.validation, part == "validation")
        rows = rows[chosen]
        low, high = (int(rows[0]), int(rows[-1]) + 1) if len(rows) else (0, 0)
        stored = file[card.key][low:high][rows - low]
        if isinstance(card.pixel_mm, str):
            pixel = np.asarray(file[card.pixel_mm], np.float64)[rows] * card.pixel_factor
        else:
            pixel = np.full(len(rows), card.pixel_mm * card.pixel_factor)
    valid = None if card.saturated_from is None else stored < card.saturated_from
    hu = card.slope * stored.astype(np.float32) + card.intercept
    if card.bottom_up:
        hu, valid = hu[:, ::-1], None if valid is None else valid[:, ::-1]
    return Slices(card.name, attenuation(hu), valid, pixel * 1e-3)


def count_slices(card: SliceCard, path: Path) -> int:
    """How many slices the held-out part of a data set (all of a test file) has.  path: of the file, from ``locate``."""
    import h5py

    with h5py.File(path, "r") as file:
        if card.key not in file:
            raise InputError(f"{path} has no array {card.key!r}; it has {sorted(file)}")
        count = len(file[card.key])
        groups = np.zeros(count, int) if card.group_key is None else np.asarray(file[card.group_key])
    return count if card.use == "test" else len(_part(groups, card.validation, True))


def read_dicom(path: Path) -> Slices:
    """The slice in a DICOM file: rescaled to HU by its own slope and intercept, then to attenuation.

    Raises InputError when the file is not one CT slice, or does not state its pixels' size and scale.
    """
    pydicom: Any = need("pydicom", "dicom")
    try:
        image = pydicom.dcmread(path)
    except (OSError, pydicom.errors.InvalidDicomError) as error:
        raise InputError(f"{path} could not be read as DICOM: {error}") from error
    if image.get("Modality") != "CT" or "PixelData" not in image:
        raise InputError(f"{path} is not a CT image; its modality is {image.get('Modality')!r}")
    lacking = [key for key in ("PixelSpacing", "RescaleSlope", "RescaleIntercept") if key not in image]
    if lacking or image.PixelSpacing[0] != image.PixelSpacing[1] or image.pixel_array.ndim != 2:
        raise InputError(
            f"{path} is not one slice in HU with square pixels; it lacks {', '.join(lacking) or 'that shape'}"
        )
    hu = image.pixel_array * float(image.RescaleSlope) + float(image.RescaleIntercept)
    return Slices(path.stem, attenuation(hu)[None], None, np.array([float(image.PixelSpacing[0]) * 1e-3]))


def _part(groups: np.ndarray, share: float, held_out: bool) -> np.ndarray:
    """Rows of the last ``share`` (rounded up) of each group, or the rows before them."""
    rows: list[np.ndarray] = []
    for label in np.unique(groups):
        members = np.flatnonzero(groups == label)
        cut = len(members) - int(np.ceil(share * len(members)))
        rows.append(members[cut:] if held_out else members[:cut])
    return np.sort(np.concatenate(rows))


def locate(name: str, file: str, digest: str | None, source: str) -> Path:
    """The path of a data set's file: absolute, or relative to the folder RECON_DATA; its sha256 is checked when known.

    Raises InputError when RECON_DATA is needed and not set, the file is missing, or its sha256 differs.
    """
    path = Path(file)
    if not path.is_absolute():
        root = os.environ.get("RECON_DATA")
        if not root:
            raise InputError(f"{name} is the file {file} below a data folder; set RECON_DATA to that folder")
        path = Path(root) / path
    if not path.is_file():
        raise InputError(f"{name}: there is no file {path}; its card says where it comes from: {source or 'nothing'}")
    found = sha256(path) if digest else digest
    if found != digest:
        raise InputError(f"{path} is not the file of {name}: sha256 {found}, the card says {digest}")
    return path
