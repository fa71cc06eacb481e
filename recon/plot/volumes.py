"""Volumes (z, y, x): three orthogonal cuts, a strip of slices, the largest value along an axis, and figures per slice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from recon.errors import InputError
from recon.plot.canvas import BLUE, ORANGE, Look, axis, image, labels, legend, limits, place_of, scale, tidy, unit_label
from recon.plot.inputs import ensemble_of, every, figure_of, places, space_of, values_of
from recon.space import Space

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    AxesLike = Axes | Sequence[Axes] | np.ndarray

Artists = list[Any]
AXES = ("z", "y", "x")


def is_volume(space: Space) -> bool:
    """Whether arrays of ``space`` are volumes (z, y, x) of several slices."""
    return space.dims == AXES and space.shape[0] > 1


def plane(space: Space, without: str) -> Space:
    """``space`` (z, y, x) without one dim."""
    kept = [d for d in space.dims if d != without]
    shape = [space.shape[space.dims.index(d)] for d in kept]
    return Space(tuple(kept), tuple(shape), {d: space.coords[d] for d in kept if d in space.coords}, space.unit)


def volume_of(given: Any, space: Space | None) -> tuple[Tensor, Space]:  # noqa: ANN401
    """Values and space of a volume: a DataArray, an array over ``space``, or an ensemble's mean.

    Raises InputError for anything else.
    """
    import xarray as xr

    if isinstance(given, xr.DataArray) and "draw" not in given.dims:
        space = space_of(given.transpose(*AXES)) if set(given.dims) == set(AXES) else space_of(given)
        values = values_of(given, space)
    elif space is not None:
        values = values_of(given, space)
    else:
        found = ensemble_of(given)
        values, space = found.mean(), found.space
    if not is_volume(space):
        raise InputError(f"expected a volume (z, y, x) of several slices; got {space.describe()}")
    return values, space


def zcuts(
    volume: Any,  # noqa: ANN401
    axes: AxesLike,
    space: Space | None = None,
    at: Sequence[int] | None = None,
    look: Look | None = None,
) -> Artists:
    """Three orthogonal cuts (axial, coronal, sagittal) at one scale.

    volume: a DataArray, an array over ``space``, or an ensemble, of which the mean is cut.  at: indices (z, y, x) of the cuts
    (default: the middle).  Raises InputError for what is no volume, or cuts outside it.
    """
    values, space = volume_of(volume, space)
    spots = places(axes, 3, "zcuts")
    at = tuple(n // 2 for n in space.shape) if at is None else tuple(at)
    if len(at) != 3 or not all(0 <= i < n for i, n in zip(at, space.shape, strict=True)):
        raise InputError(f"cuts are three indices inside {space.describe()}; got {at}")
    cuts = [values.select(d, i).double().numpy() for d, i in enumerate(at)]
    look = look or Look("gray", *limits(*cuts, share=0.1), unit_label("value", space.unit))
    made = []
    for spot, dim, i, cut, name in zip(spots, AXES, at, cuts, ("axial", "coronal", "sagittal"), strict=True):
        made.append(image(spot, plane(space, dim), cut, look))
        spot.set_title(f"{name}: {dim} {place_of(space, dim, i)}", fontsize=9)
    scale(figure_of(spots[0]), made[0], spots, look, *cuts)
    return made


def slices(volume: Any, axes: AxesLike, space: Space | None = None, look: Look | None = None) -> Artists:  # noqa: ANN401
    """A strip of slices along z, evenly spaced, one per axes, at one scale.  Raises InputError for what is no volume."""
    values, space = volume_of(volume, space)
    spots = every(axes)
    picks = np.unique(np.linspace(0, space.shape[0] - 1, len(spots)).round().astype(int))
    cuts = [values[int(i)].double().numpy() for i in picks]
    look = look or Look("gray", *limits(*cuts, share=0.1), unit_label("value", space.unit))
    made = []
    for spot, i, cut in zip(spots, picks, cuts, strict=False):
        made.append(image(spot, plane(space, "z"), cut, look))
        spot.set_title(f"z {place_of(space, 'z', int(i)).split(' (')[0]}", fontsize=8.5)
        spot.set(xticks=[], yticks=[], xlabel="", ylabel="")
    for spot in spots[len(picks) :]:
        spot.set_axis_off()
    scale(figure_of(spots[0]), made[0], spots, look, *cuts)
    return made


def projection(volume: Any, axes: AxesLike, space: Space | None = None, look: Look | None = None) -> Artists:  # noqa: ANN401
    """The largest value along z, y and x on three axes.  Raises InputError for what is no volume."""
    values, space = volume_of(volume, space)
    spots = places(axes, 3, "projection")
    views = [values.amax(d).double().numpy() for d in range(3)]
    look = look or Look("gray", *limits(*views, share=0.1), unit_label("largest value", space.unit))
    made = []
    for spot, dim, view in zip(spots, AXES, views, strict=True):
        made.append(image(spot, plane(space, dim), view, look))
        spot.set_title(f"largest value along {dim}", fontsize=9)
    scale(figure_of(spots[0]), made[0], spots, look, *views)
    return made


def z_profile(ensemble: Any, axes: Axes, truth: Any = None) -> Artists:  # noqa: ANN401
    """rms std of every slice along z, with a truth also the rms error of the mean.

    Raises InputError for what is no volume, or a truth that does not fit.
    """
    found = ensemble_of(ensemble)
    space = found.space
    if not is_volume(space):
        raise InputError(f"expected a volume (z, y, x) of several slices; got {space.describe()}")
    z, label = axis(space, "z")
    made = axes.plot(z, rms_by_slice(found.std()), "o-", color=BLUE, markersize=3, linewidth=1.2, label="rms std")
    if truth is not None:
        error = rms_by_slice(found.mean().double() - values_of(truth, space).double())
        made += axes.plot(z, error, "o-", color=ORANGE, markersize=3, linewidth=1.2, label="rms error of the mean")
    axes.set_ylim(bottom=0)
    labels(axes, label, unit_label("per slice", space.unit))
    legend(axes)
    tidy(axes)
    return list(made)


def rms_by_slice(values: Tensor) -> np.ndarray:
    """Root mean square of each slice along the first dim: (z,)."""
    return torch.as_tensor(values).double().square().flatten(1).mean(1).sqrt().numpy()
