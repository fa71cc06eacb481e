"""Files of volumes that stay on disk, written a few slices at a time; each chunk of a file is one slice, written once.

The ensemble file is the one that ``Ensemble.save`` writes, but for how its arrays are cut into chunks, and ``Ensemble.load``
reads it where the memory allows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recon.datasets.observation import Observation
from recon.ensemble import Ensemble, labelled
from recon.files import written_aside
from recon.operators.slabs import portion
from recon.operators.streamed import Stream, Streamed
from recon.space import Space

if TYPE_CHECKING:
    import xarray as xr

Groups = Callable[[int, int], "Mapping[str, xr.Dataset]"]
"""(first, last) -> what those slices are in each group of a file; "/" is the root."""


def write_by_parts(path: Path, stream: Stream, groups: Groups, many: int) -> None:
    """A NetCDF-4 file of all slices, ``many`` at a time, whole or not at all.

    What does not vary along the axis of slices is taken from the first ones.
    """
    import h5netcdf

    with written_aside(path) as aside, h5netcdf.File(aside, "w") as file:
        for first in range(0, stream.slices, many):
            last = min(first + many, stream.slices)
            for name, data in groups(first, last).items():
                place = file if name == "/" else file.groups.get(name.strip("/")) or file.create_group(name.strip("/"))
                if first == 0:
                    _laid_out(file, place, data, stream)
                for variable, values in data.variables.items():
                    if stream.axis in values.dims:
                        rows = tuple(slice(first, last) if d == stream.axis else slice(None) for d in values.dims)
                        place.variables[variable][rows] = values.values


def _laid_out(file: Any, place: Any, data: xr.Dataset, stream: Stream) -> None:  # noqa: ANN401  (h5netcdf is not typed)
    """Dimensions, variables and attributes of a group; what all slices share is written."""
    sizes = {str(d): stream.slices if d == stream.axis else n for d, n in data.sizes.items()}
    for dim, n in sizes.items():
        if dim not in place.dimensions:
            place.dimensions[dim] = n
    for name, values in data.variables.items():
        cut, array = stream.axis in values.dims, np.asarray(values.values)
        if name in place.variables or (place is not file and name in file.variables and not cut):
            continue
        packing: dict[str, Any] = {}
        if values.ndim > 1 and cut:
            chunks = tuple(1 if d in (stream.axis, "draw", "chain") else sizes[str(d)] for d in values.dims)
            packing = {
                "chunks": chunks,
                "compression": "gzip",
                "compression_opts": 1,
                "shuffle": True,
                "fletcher32": True,
            }
        made = place.create_variable(str(name), tuple(str(d) for d in values.dims), array.dtype, **packing)
        made.attrs.update(values.attrs)
        if not cut:
            made[...] = array
    place.attrs.update(data.attrs)


def save_ensemble(ensemble: Ensemble, stream: Stream, path: Path, provenance: Mapping[str, Any]) -> None:
    """Draws and summaries of volumes that stay on disk; as ``Ensemble.save``."""
    x = ensemble.x
    assert isinstance(x, Streamed)

    def groups(first: int, last: int) -> dict[str, xr.Dataset]:
        space = portion(ensemble.space, stream.at, slice(first, last))
        return Ensemble(x.read(first, last), space, ensemble.log_weights, ensemble.info).groups(provenance)

    # Quantiles sort draws in double precision, with their order and weights beside them.
    write_by_parts(path, stream, groups, thin(stream, 2 + len(ensemble)))


def save_observation(scan: Observation, stream: Stream, path: Path) -> None:
    """A measurement that stays on disk; as ``Observation.save``."""
    import xarray as xr

    def groups(first: int, last: int) -> dict[str, xr.Dataset]:
        coords: dict[str, Any] = {}
        data: dict[str, Any] = {}
        for name in ("values", "sigma", "blank", "background", "truth"):
            value = getattr(scan, name)
            if value is None:
                continue
            space = scan.image if name == "truth" else scan.data
            here = value.read(first, last) if isinstance(value, Streamed) else value
            if isinstance(value, Streamed):
                coords |= _coords(portion(space, space.dims.index(stream.axis), slice(first, last)))
            dims = space.dims if here.ndim else ()
            data["value" if name == "values" else name] = (dims, here.numpy(), {"units": space.unit})
        return {"/": xr.Dataset(data, coords, {"Conventions": "CF-1.11", "title": "observation"})}

    write_by_parts(path, stream, groups, stream.depth)


def thin(stream: Stream, wide: int) -> int:
    """Slices for which there is room where each takes ``wide`` times what it does in a step; one at least."""
    return max(1, stream.depth // wide)


def _coords(space: Space) -> dict[str, Any]:
    return {name: (name, *labelled(name, values)) for name, values in space.coords.items()}
