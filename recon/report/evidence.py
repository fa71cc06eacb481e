"""Everything a report needs, as tensors and JSON; kept in a run folder so that the page can be rebuilt from files alone.

``ensemble.nc`` holds the draws, ``evidence.nc`` the arrays around them and ``facts.json`` the rest.  ``evidence.nc`` has two
groups, because an image and a measurement may use the same names for different axes:

* ``image``: truth, prior_std, baseline(method, ...), and where variance was split into what data and prior gave, its maps
* ``measurement``: value, residual (whitened, averaged over draws), per_view and per_view_sd, chi2(draw); its attributes carry
  the scalars of the fit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from recon.diagnostics.fit import DataFit
from recon.diagnostics.split import DataPriorSplit
from recon.ensemble import Ensemble, labelled, plain
from recon.errors import InputError
from recon.files import write_json, written_aside
from recon.space import Space

if TYPE_CHECKING:
    import xarray as xr

ENSEMBLE, EVIDENCE, FACTS = "ensemble.nc", "evidence.nc", "facts.json"
_MAPS = ("data", "prior", "cross", "null_mean")


@dataclass(frozen=True, eq=False)
class Evidence:
    """An ensemble and what is known about it.

    measurement: *range.shape, in the unit of ``range``.  fit: from ``data_fit``.  truth: *space.shape, physical units, or None.
    baselines: name -> *space.shape.  prior_std: standard deviation of the prior in data units, a number or *space.shape.
    split: from ``data_prior_split``, where it was affordable.
    facts: JSON values, each optional: title, operator, noise, data (text or mapping); sampler {name, claim, fields}; prior
    (mapping); calibration {status: verified, recalibrated or unverified, text, date, cases, scope, quantities {name: {status,
    text, factor}}}; residuals {groups, whiteness} and stations (see ``recon.report.examined``); units {variable: unit}; regions
    {name: {dim: [first, last]}} (see ``recon.report.regions``); split (why there is none); bands (see
    ``recon.report.affordable_bands``, or why there are none); cost (mapping of numbers);
    provenance (mapping); warnings (list of str).

    Raises InputError for shapes that do not fit.
    """

    ensemble: Ensemble
    measurement: Tensor
    range: Space
    fit: DataFit
    truth: Tensor | None = None
    baselines: Mapping[str, Tensor] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    prior_std: Tensor | None = None
    split: DataPriorSplit | None = None

    def __post_init__(self) -> None:
        _same(self.measurement, self.range, "the measurement")
        _same(self.fit.residual, self.range, "the residual of the fit")
        if len(self.fit.chi2) != len(self.ensemble):
            raise InputError(f"the fit is of {len(self.fit.chi2)} draws and the ensemble has {len(self.ensemble)}")
        if self.truth is not None:
            _same(self.truth, self.ensemble.space, "the truth")
        for name, image in self.baselines.items():
            _same(image, self.ensemble.space, f"baseline {name!r}")
        if self.prior_std is not None:
            object.__setattr__(self, "prior_std", torch.as_tensor(self.prior_std))
            if self.prior_std.ndim:
                _same(self.prior_std, self.ensemble.space, "the prior's standard deviation")
        if self.split is not None:
            _same(self.split.null_mean, self.ensemble.space, "the split's null part")

    def save(self, folder: str | Path) -> None:
        """Write ``evidence.nc`` and ``facts.json``, and ``ensemble.nc`` where the folder has none; each whole or not at all."""
        import xarray as xr

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / ENSEMBLE).exists():
            self.ensemble.save(folder / ENSEMBLE, self.facts.get("provenance"))
        title = xr.Dataset(attrs={"Conventions": "CF-1.11", "title": "evidence around a posterior ensemble"})
        groups = {"/": title, "/image": self._image(), "/measurement": self._measured()}
        packing = {"zlib": True, "complevel": 1, "shuffle": True, "fletcher32": True}
        encoding = {
            name: {v: packing for v in data.data_vars if data[v].ndim}  # HDF5 cannot pack a single number
            for name, data in groups.items()
        }
        with written_aside(folder / EVIDENCE) as aside:
            xr.DataTree.from_dict(groups).to_netcdf(aside, engine="h5netcdf", encoding=encoding)
        write_json(folder / FACTS, dict(self.facts))

    def _image(self) -> xr.Dataset:
        import xarray as xr

        space, data = self.ensemble.space, {}
        unit = {"units": space.unit}
        if self.truth is not None:
            data["truth"] = (space.dims, _array(self.truth), {**unit, "long_name": "truth"})
        if self.prior_std is not None:
            dims = space.dims if self.prior_std.ndim else ()
            data["prior_std"] = (dims, _array(self.prior_std), {**unit, "long_name": "standard deviation of the prior"})
        coords = _coords(space)
        attrs = {}
        if self.split is not None:
            for name in _MAPS:
                values = getattr(self.split, name)
                if values is not None:
                    data[f"split_{name}"] = (
                        space.dims,
                        _array(values),
                        {"long_name": f"split of data and prior: {name}"},
                    )
            rest = ("filter", "null_share", "reason")
            attrs["recon_split"] = json.dumps({name: getattr(self.split, name) for name in rest})
        if self.baselines:
            stack = np.stack([_array(v) for v in self.baselines.values()])
            data["baseline"] = (("method", *space.dims), stack, {**unit, "long_name": "other reconstructions"})
            coords["method"] = ("method", list(self.baselines))
        return xr.Dataset(data, coords, attrs)

    def _measured(self) -> xr.Dataset:
        import xarray as xr

        dims, view, fit = self.range.dims, self.range.dims[0], self.fit
        data = {
            "value": (dims, _array(self.measurement), {"units": self.range.unit, "long_name": "measurement"}),
            "residual": (dims, _array(fit.residual), {"units": "1", "long_name": "whitened residual, mean over draws"}),
            "per_view": (view, _array(fit.per_view), {"units": "1", "long_name": f"{fit.statistic} per datum"}),
            "per_view_sd": (view, _array(fit.per_view_sd), {"units": "1", "long_name": "its sd for one exact draw"}),
            "chi2": ("draw", _array(fit.chi2), {"units": "1", "long_name": fit.statistic}),
        }
        attrs = {"recon_fit": json.dumps(_scalars(fit)), "recon_unit": self.range.unit}
        return xr.Dataset(data, _coords(self.range), attrs)

    @classmethod
    def load(cls, folder: str | Path) -> Evidence:
        """Read what ``save`` wrote.  Raises InputError when a file is missing, damaged, or of another ensemble."""
        import xarray as xr

        folder = Path(folder)
        ensemble = Ensemble.load(folder / ENSEMBLE)
        try:
            with xr.open_datatree(folder / EVIDENCE, engine="h5netcdf") as tree:
                image, measured = tree["image"].to_dataset().load(), tree["measurement"].to_dataset().load()
            facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
            parts: dict[str, Any] = json.loads(measured.attrs["recon_fit"])
            fit = DataFit(**parts | {name: _tensor(measured[name]) for name in _tensors(DataFit)})
        except (OSError, KeyError, ValueError, TypeError) as error:
            raise InputError(f"{folder} holds no readable {EVIDENCE} and {FACTS} written by recon: {error}") from error
        value = measured["value"]
        dims = tuple(str(d) for d in value.dims)
        coords = {d: plain(d, value[d].values) for d in dims if d in value.coords}
        stack = image.get("baseline")
        names = [] if stack is None else [str(name) for name in stack["method"].values]
        return cls(
            ensemble,
            _tensor(value),
            Space(dims, value.shape, coords, measured.attrs["recon_unit"]),
            fit,
            _tensor(image["truth"]) if "truth" in image else None,
            {name: _tensor(image["baseline"].isel(method=i)) for i, name in enumerate(names)},
            facts,
            _tensor(image["prior_std"]) if "prior_std" in image else None,
            _split(image),
        )


def _same(values: Tensor, space: Space, what: str) -> None:
    if tuple(values.shape) != space.shape:
        raise InputError(f"{what} must be {space.describe()}; got shape {tuple(values.shape)}")


def _split(image: xr.Dataset) -> DataPriorSplit | None:
    if "recon_split" not in image.attrs:
        return None
    maps = {name: _tensor(image[f"split_{name}"]) if f"split_{name}" in image else None for name in _MAPS}
    return DataPriorSplit(**maps, **json.loads(image.attrs["recon_split"]))  # type: ignore[arg-type]  # null_mean is there


def _tensors(kind: type[DataFit]) -> list[str]:
    return [f.name for f in fields(kind) if f.type == "Tensor"]


def _scalars(fit: DataFit) -> dict[str, Any]:
    held = set(_tensors(DataFit))
    values = {f.name: getattr(fit, f.name) for f in fields(fit) if f.name not in held}
    return {name: dict(v) if isinstance(v, Mapping) else v for name, v in values.items()}


def _coords(space: Space) -> dict[str, Any]:
    return {name: (name, *labelled(name, values)) for name, values in space.coords.items()}


def _array(values: Tensor) -> np.ndarray:
    return values.detach().cpu().numpy()


def _tensor(values: xr.DataArray) -> Tensor:
    return torch.from_numpy(np.array(values.values))
