"""What the functions of ``recon.plot`` take: an Ensemble, or the same thing in xarray, as recon's files hold it.

A file read back (``xarray.open_datatree("ensemble.nc")``, its group ``posterior``, or its variable ``value``) is as good as
the ensemble itself.  Lengths in mm and angles in degrees, as the files say, become metres and radians again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from recon.ensemble import Ensemble, labelled, plain
from recon.errors import InputError
from recon.space import Coordinate, Space

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes

_SI = {"m": 1.0, "rad": 1.0, "radian": 1.0}


def ensemble_of(given: Any) -> Ensemble:  # noqa: ANN401  (an Ensemble, DataTree, Dataset or DataArray)
    """The ensemble that ``given`` is or holds.

    xarray: a DataArray with a dim ``draw`` (and ``chain``, whose draws are put in a row); a Dataset with such a variable named
    ``value`` and, where draws are weighted, ``log_weight``; a DataTree with such a Dataset as ``posterior`` or at its root.
    Raises InputError for anything else.
    """
    import xarray as xr

    if isinstance(given, Ensemble):
        return given
    if isinstance(given, xr.DataTree):
        given = (given["posterior"] if "posterior" in given.children else given).to_dataset()
    weights = None
    info: dict[str, Any] = {}
    if isinstance(given, xr.Dataset):
        if "value" not in given:
            raise InputError(
                f"a Dataset of draws has a variable 'value'; this one has {', '.join(map(str, given)) or 'none'}"
            )
        weights = given["log_weight"] if "log_weight" in given else None
        given = given["value"]
    if not isinstance(given, xr.DataArray) or "draw" not in given.dims:
        raise InputError(f"expected an Ensemble or an xarray object with a dim 'draw'; got {type(given).__name__}")
    given = _in_a_row(given)
    space = space_of(given.isel(draw=0))
    x = torch.from_numpy(np.array(given.transpose("draw", *space.dims).values))
    log_w = None if weights is None else torch.from_numpy(np.array(_in_a_row(weights).values, dtype=np.float64))
    return Ensemble(x, space, log_w, info)


def _in_a_row(values: xr.DataArray) -> xr.DataArray:
    if "chain" not in values.dims:
        return values
    rest = [d for d in values.dims if d not in ("chain", "draw")]
    both = values.transpose("chain", "draw", *rest)
    flat = both.values.reshape(-1, *both.shape[2:])
    kept: dict[Any, Any] = {str(d): both[d].values for d in rest if d in both.coords}
    out = type(values)(flat, dims=("draw", *rest), coords=kept, attrs=values.attrs)
    for dim in kept:
        out[dim].attrs = dict(both[dim].attrs)
    return out


def space_of(values: xr.DataArray) -> Space:
    """The space of one array: its dims, coordinates (metres, radians; names as they are) and unit (``units``, default "1")."""
    dims = tuple(str(d) for d in values.dims)
    coords: dict[str, Coordinate] = {}
    for dim in dims:
        if dim not in values.coords:
            continue
        found = values[dim]
        if found.dtype.kind == "M":
            coords[dim] = tuple(np.datetime_as_string(found.values, unit="auto").tolist())
        elif found.attrs.get("units") in _SI:
            coords[dim] = np.asarray(found.values, dtype=np.float64)
        else:
            coords[dim] = plain(dim, found.values)
    return Space(dims, values.shape, coords, str(values.attrs.get("units", "1")))


def values_of(given: Any, space: Space) -> Tensor:  # noqa: ANN401  (a tensor, array or DataArray)
    """``given`` as a tensor on ``space``; a DataArray may have its dims in any order.

    Raises InputError where it does not fit.
    """
    import xarray as xr

    if isinstance(given, xr.DataArray):
        if set(given.dims) != set(space.dims):
            raise InputError(f"expected an array over {space.describe()}; got dims {given.dims}")
        given = np.array(given.transpose(*space.dims).values)
    found = torch.as_tensor(given).detach().cpu()
    if tuple(found.shape) != space.shape:
        raise InputError(f"expected an array over {space.describe()}; got shape {tuple(found.shape)}")
    return found


def labelled_array(values: Tensor | np.ndarray, space: Space, name: str = "value") -> xr.DataArray:
    """``values`` (*space.shape) with dims, coordinates (mm, degrees) and unit: what a file or a plot of xarray wants."""
    import xarray as xr

    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    coords = {dim: (dim, *labelled(dim, place)) for dim, place in space.coords.items()}
    return xr.DataArray(array, dims=space.dims, coords=coords, attrs={"units": space.unit}, name=name)


def every(axes: Axes | Sequence[Axes] | np.ndarray) -> list[Axes]:
    """``axes``, one or many in any arrangement, as a list."""
    return list(np.ravel(np.asarray(axes, dtype=object)))


def figure_of(axes: Axes) -> Any:  # noqa: ANN401  (matplotlib's Figure)
    """The figure that ``axes`` are on, also those of a subfigure."""
    return axes.get_figure(root=True)


def places(axes: Axes | Sequence[Axes] | np.ndarray, count: int, what: str) -> list[Axes]:
    """``axes`` as a list of at least ``count``.  Raises InputError for fewer, naming ``what``."""
    found = every(axes)
    if len(found) < count:
        raise InputError(f"{what} takes {count} axes; got {len(found)}")
    return found[:count]
