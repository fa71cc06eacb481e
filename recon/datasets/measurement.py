"""What was measured, as a file: values, geometry, noise, and the grid to reconstruct on.

A measurement file is NetCDF-4 with one of

* ``sinogram(angle, detector)``, line integrals (no unit), and ``sigma``, their standard deviation, a number or per datum;
* ``counts(angle, detector)``, photons, with ``blank`` (counts without the object) and, if there is any, ``background``;

coordinates ``angle`` (units degree or radian) and ``detector`` (mm, cm or m); attributes ``image_rows``, ``image_columns``,
``pixel_mm`` of the image, and ``projector`` ("line" when left out).  ``truth(y, x)`` in 1/m is read when it is there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from recon.ensemble import labelled
from recon.errors import InputError
from recon.files import written_aside
from recon.operators.parallel_beam import ParallelBeam, ParallelGeometry
from recon.space import Space

if TYPE_CHECKING:
    import xarray as xr

_LENGTHS = {"m": 1.0, "cm": 1e-2, "mm": 1e-3}
_ANGLES = {"degree": math.pi / 180, "degrees": math.pi / 180, "radian": 1.0, "radians": 1.0, "rad": 1.0}


@dataclass(frozen=True, eq=False)
class Measurement:
    """A scan: line integrals with their sigma, or counts with their blank; its geometry; the image grid; the truth if known.

    values: float32 (angle, detector).  sigma, blank, background: numbers () or per datum; sigma is None for counts, the other
    two None for line integrals.  truth: float32 (y, x), 1/m.
    """

    geometry: ParallelGeometry
    image: Space
    values: Tensor
    sigma: Tensor | None = None
    blank: Tensor | None = None
    background: Tensor | None = None
    truth: Tensor | None = None

    @property
    def counts(self) -> bool:
        """Whether the values are photon counts."""
        return self.blank is not None

    def operator(self) -> ParallelBeam:
        """The forward model of the geometry on the image grid."""
        return ParallelBeam.from_geometry(self.image, self.geometry)

    def save(self, path: Path) -> None:
        """Write the file described above, whole or not at all."""
        import xarray as xr

        space = self.geometry.range
        coords = {name: (name, *labelled(name, values)) for name, values in space.coords.items()}
        name = "counts" if self.counts else "sinogram"
        data: dict[str, Any] = {name: (space.dims, self.values.numpy(), {"units": "1"})}
        for key in ("sigma", "blank", "background"):
            value = getattr(self, key)
            if value is not None:
                data[key] = (space.dims if value.ndim else (), value.numpy(), {"units": "1"})
        if self.truth is not None:
            data["truth"] = (self.image.dims, self.truth.numpy(), {"units": self.image.unit})
            coords |= {d: (d, *labelled(d, self.image.coords[d])) for d in self.image.dims}
        rows, columns = self.image.shape
        attrs = {
            "Conventions": "CF-1.11",
            "title": "parallel-beam measurement",
            "image_rows": rows,
            "image_columns": columns,
            "pixel_mm": 1e3 * float(self.image.spacing("x") or 0.0),
            "projector": self.geometry.projector,
        }
        packed = {n: {"zlib": True, "complevel": 1, "fletcher32": True} for n, v in data.items() if len(v[0])}
        with written_aside(path) as aside:
            xr.Dataset(data, coords, attrs).to_netcdf(aside, engine="h5netcdf", encoding=packed)


def read_measurement(path: Path) -> Measurement:
    """Read a measurement file.

    Raises InputError naming the file and the variable, coordinate or attribute that is missing, damaged, of the wrong shape or
    unit, or not finite.
    """
    import xarray as xr

    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: there is no such measurement file")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: the measurement file is empty")
    try:
        with xr.open_dataset(path, engine="h5netcdf", decode_times=False) as opened:
            data = opened.load()
    except Exception as error:  # damaged HDF5 shows itself as almost anything
        raise InputError(f"{path}: not a readable NetCDF-4 file (damaged or of another kind): {error}") from error
    kinds = [name for name in ("sinogram", "counts") if name in data]
    if len(kinds) != 1:
        raise InputError(f"{path}: expected one variable, sinogram or counts; got {sorted(map(str, data.data_vars))}")
    geometry = _geometry(path, data)
    image = _image(path, data)
    values = _numbers(path, data, kinds[0], geometry.range.shape)
    noise = {
        name: _numbers(path, data, name, geometry.range.shape)
        for name in ("sigma", "blank", "background")
        if name in data
    }
    wanted = "sigma" if kinds[0] == "sinogram" else "blank"
    if wanted not in noise:
        raise InputError(f"{path}: {kinds[0]} needs the variable {wanted!r} beside it; a likelihood has a noise level")
    if kinds[0] == "counts":
        noise.setdefault("background", torch.zeros(()))
        noise.pop("sigma", None)
    else:
        noise = {"sigma": noise["sigma"]}
    truth = _numbers(path, data, "truth", image.shape) if "truth" in data else None
    return Measurement(geometry, image, values, truth=truth, **noise)


def _geometry(path: Path, data: xr.Dataset) -> ParallelGeometry:
    angle = _coordinate(path, data, "angle", _ANGLES)
    detector = _coordinate(path, data, "detector", _LENGTHS)
    steps = np.diff(detector)
    if len(detector) < 2 or not np.allclose(steps, steps.mean(), rtol=1e-4, atol=0) or steps.mean() <= 0:
        raise InputError(
            f"{path}: detector positions must grow in equal steps; got {detector[:3]} ... ({len(detector)})"
        )
    projector = str(data.attrs.get("projector", "line"))
    try:
        return ParallelGeometry(
            tuple(angle),
            len(detector),
            float(steps.mean()),
            float(detector.mean()),
            projector,  # type: ignore[arg-type]
        )
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _image(path: Path, data: xr.Dataset) -> Space:
    found: dict[str, float] = {}
    for name in ("image_rows", "image_columns", "pixel_mm"):
        value = data.attrs.get(name)
        if not isinstance(value, int | float | np.number) or not 0 < float(value) < math.inf:
            raise InputError(
                f"{path}: attribute {name!r} must be a positive number, the grid to reconstruct on; got {value!r}"
            )
        found[name] = float(value)
    return Space.grid((int(found["image_rows"]), int(found["image_columns"])), found["pixel_mm"] * 1e-3, "1/m")


def _coordinate(path: Path, data: xr.Dataset, name: str, units: dict[str, float]) -> np.ndarray:
    if name not in data.coords:
        raise InputError(f"{path}: there is no coordinate {name!r}; it holds {sorted(map(str, data.coords))}")
    unit = str(data[name].attrs.get("units", ""))
    if unit not in units:
        raise InputError(f"{path}: coordinate {name!r} needs units, one of {', '.join(units)}; got {unit!r}")
    values = np.asarray(data[name].values, dtype=np.float64)
    if values.ndim != 1 or not np.isfinite(values).all():
        raise InputError(f"{path}: coordinate {name!r} must be a list of finite numbers")
    return values * units[unit]


def _numbers(path: Path, data: xr.Dataset, name: str, shape: tuple[int, ...]) -> Tensor:
    values = np.asarray(data[name].values)
    if values.dtype.kind not in "fiu":
        raise InputError(f"{path}: variable {name!r} must hold numbers; got {values.dtype}")
    per_datum = name in ("sinogram", "counts", "truth")
    if values.shape != shape and (per_datum or values.ndim):
        raise InputError(f"{path}: variable {name!r} must have shape {shape}; got {values.shape}")
    bad = int((~np.isfinite(values)).sum())
    if bad:
        raise InputError(f"{path}: variable {name!r} holds {bad} of {values.size} values that are NaN or infinite")
    return torch.from_numpy(np.array(values, dtype=np.float32))
