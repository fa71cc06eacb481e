"""What was observed of a field or a magnetic resonance image: values, their noise, and the truth if known, as a file.

The file holds ``value`` (``value_real`` and ``value_imag`` for complex data) and ``sigma`` on the axes of the data, and
``truth`` on those of the image; photon counts have ``blank`` and ``background`` in place of sigma.  Parallel-beam scans have a
format of their own, which is also read: see ``measurement``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recon.ensemble import labelled
from recon.errors import InputError
from recon.files import written_aside
from recon.space import Space


@dataclass(frozen=True, eq=False)
class Observation:
    """Data of any operator with Gaussian noise, or photon counts of one that gives line integrals.

    data, image: spaces of the data and of what is looked for.  values: (*data.shape), complex where ``data`` is.  sigma: ()
    or (*data.shape), of the real and the imaginary part each; None for counts.  blank: counts without the object, background:
    counts that are added; () or (*data.shape).  truth: (*image.shape), physical units, or None.
    Raises InputError for shapes that do not fit.
    """

    data: Space
    image: Space
    values: Tensor
    sigma: Tensor | None = None
    blank: Tensor | None = None
    background: Tensor | None = None
    truth: Tensor | None = None

    def __post_init__(self) -> None:
        for name, values, space in (("values", self.values, self.data), ("truth", self.truth, self.image)):
            if values is not None and tuple(values.shape) != space.shape:
                raise InputError(f"{name} of an observation must be {space.describe()}; got {tuple(values.shape)}")
        if (self.sigma is None) == (self.blank is None):
            raise InputError("an observation has either sigma or, for photon counts, blank")

    def save(self, path: Path) -> None:
        """Write the file described above, whole or not at all."""
        import xarray as xr

        unit, dims = {"units": self.data.unit}, self.data.dims
        data: dict[str, Any] = {}
        for name in ("sigma", "blank", "background"):
            value = getattr(self, name)
            if value is not None:
                data[name] = (dims if value.ndim else (), _array(value), unit)
        if self.data.complex:
            pairs = torch.view_as_real(self.values.resolve_conj())
            data |= {f"value_{name}": (dims, _array(pairs[..., i]), unit) for i, name in enumerate(("real", "imag"))}
        else:
            data["value"] = (dims, _array(self.values), unit)
        coords = _coords(self.data)
        if self.truth is not None:
            # An axis that data and image share by name but not by length (a coarse grid) is renamed on the image's side.
            names = {d: f"image_{d}" if d in dims else d for d in self.image.dims}
            data["truth"] = (tuple(names.values()), _array(self.truth), {"units": self.image.unit})
            coords |= {names[d]: (names[d], *rest[1:]) for d, rest in _coords(self.image).items()}
        packed = {n: {"zlib": True, "complevel": 1, "fletcher32": True} for n, v in data.items() if len(v[0])}
        attrs = {"Conventions": "CF-1.11", "title": "observation"}
        with written_aside(path) as aside:
            xr.Dataset(data, coords, attrs).to_netcdf(aside, engine="h5netcdf", encoding=packed)


def _coords(space: Space) -> dict[str, Any]:
    return {name: (name, *labelled(name, values)) for name, values in space.coords.items()}


def _array(values: Tensor) -> np.ndarray:
    return values.detach().cpu().numpy()
