"""From the definition of an operator (millimetres, degrees, counts) and an image grid to the operator.

One builder per type of definition; adding a type is a section in ``definitions`` and a function here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recon.draws import Draws
from recon.errors import InputError
from recon.operators.base import LinearOperator
from recon.operators.cartesian_mri import CartesianMRI
from recon.operators.coarse_grain import CoarseGrain
from recon.operators.fan_beam import FanBeam, FanGeometry, covering_fan
from recon.operators.fourier import image_grid
from recon.operators.masked import Masked
from recon.operators.non_cartesian_mri import NonCartesianMRI
from recon.operators.parallel_beam import ParallelBeam, ParallelGeometry, covering
from recon.operators.point_sensors import PointSensors
from recon.operators.scans import column_mask, ring_of_coils
from recon.operators.stations import Stations
from recon.operators.trajectories import radial
from recon.space import Space


def build(definition: Any, image: Space, known: Tensor | None = None) -> LinearOperator:  # noqa: ANN401  (a model of the group)
    """The operator of ``definition`` on ``image``.  known: bool, *image.shape; the other cells (land) are never observed.

    Raises InputError where they do not fit, or the operator cannot leave cells out.
    """
    if known is None or bool(known.all()):
        return BUILDERS[definition.type](definition, image)
    if definition.type not in _AROUND_GAPS:
        raise InputError(
            f"the field has {int((~known).sum())} unknown values (land, gaps), which {definition.type} cannot leave out; "
            f"{', '.join(_AROUND_GAPS)} can"
        )
    return _AROUND_GAPS[definition.type](definition, image, known)


def parallel_geometry(definition: Any, image: Space) -> ParallelGeometry:  # noqa: ANN401
    """The scan of a parallel-beam definition for an image grid."""
    pixel = float(image.spacing("x") or 0.0)
    spacing = pixel if definition.spacing_mm is None else definition.spacing_mm * 1e-3
    offset = definition.offset_mm * 1e-3
    detectors = definition.detectors or covering(image, spacing, offset)
    return ParallelGeometry(_angles(definition), detectors, spacing, offset, definition.projector)


def fan_geometry(definition: Any, image: Space) -> FanGeometry:  # noqa: ANN401
    """The scan of a fan-beam definition for an image grid."""
    source, detector = definition.source_distance_mm * 1e-3, definition.detector_distance_mm * 1e-3
    pixel = float(image.spacing("x") or 0.0)
    spacing = pixel * (source + detector) / source if definition.spacing_mm is None else definition.spacing_mm * 1e-3
    offset = definition.offset_mm * 1e-3
    detectors = definition.detectors
    if detectors is None:
        # A detector that is moved has to reach as much further on both sides.
        detectors = covering_fan(image, source, detector, spacing, definition.shape) + 2 * math.ceil(
            abs(offset) / spacing
        )
    return FanGeometry(
        _angles(definition),
        detectors,
        spacing,
        source,
        detector,
        offset,
        math.radians(definition.tilt_degrees),
        definition.shape,
        definition.projector,
    )


def _angles(definition: Any) -> tuple[float, ...]:  # noqa: ANN401
    first, arc = math.radians(definition.first_degree), math.radians(definition.arc_degrees)
    return tuple((first + np.arange(definition.views) * (arc / definition.views)).tolist())


def _maps(definition: Any, image: Space) -> Tensor | None:  # noqa: ANN401
    grid, _ = image_grid(image, definition.type)
    return None if definition.coils == 1 else ring_of_coils(definition.coils, grid)


def _cartesian(definition: Any, image: Space) -> CartesianMRI:  # noqa: ANN401
    grid, _ = image_grid(image, "cartesian_mri")
    mask = column_mask(
        grid[-1], definition.acceleration, definition.centre, definition.pattern == "even", definition.seed
    )
    return CartesianMRI(image, _maps(definition, image), mask)


def _radial(definition: Any, image: Space) -> NonCartesianMRI:  # noqa: ANN401
    grid, _ = image_grid(image, "radial_mri")
    pixels = max(grid)
    trajectory = radial(definition.spokes, definition.samples or 2 * pixels, pixels, definition.golden)
    # Circles in pixels: a grid that is not square is sampled to the same physical resolution along both axes.
    return NonCartesianMRI(image, trajectory * (np.array(grid) / pixels), _maps(definition, image))


def _stations(definition: Any, image: Space, known: Tensor | None = None) -> PointSensors:  # noqa: ANN401
    places = [dim for dim in image.dims if dim != "variable"]
    if any(dim not in image.coords for dim in places) or len(places) != 2:
        raise InputError(
            f"stations need two axes with coordinates (lat and lon, or y and x) and, if any, 'variable'; got {image.describe()}"
        )
    if definition.positions is not None:
        rows = [np.array(part, dtype=np.float64) for part in zip(*definition.positions, strict=True)]
    else:
        shape = tuple(image.shape[image.dims.index(dim)] for dim in places)
        free = np.arange(math.prod(shape)) if known is None else np.flatnonzero(_everywhere(known).flatten().numpy())
        if definition.count > len(free):
            raise InputError(f"{definition.count} stations do not fit {len(free)} grid points; take fewer")
        chosen = free[_some(len(free), definition.count, definition.seed)]
        indices = np.unravel_index(chosen, shape)
        rows = [np.asarray(image.coords[dim], dtype=np.float64)[i] for dim, i in zip(places, indices, strict=True)]
    if "variable" not in image.dims:
        return PointSensors(image, _table(dict(zip(places, rows, strict=True)), None))
    names = tuple(str(name) for name in image.coords["variable"])
    every = {dim: np.tile(row, len(names)) for dim, row in zip(places, rows, strict=True)}
    return PointSensors(image, _table(every, tuple(np.repeat(names, len(rows[0])))))


def _table(places: Mapping[str, np.ndarray], variable: tuple[str, ...] | None) -> Stations:
    lat, lon, y, x = (places.get(dim) for dim in ("lat", "lon", "y", "x"))
    return Stations(lat=lat, lon=lon, y=y, x=x, variable=variable)


def _dry(operator: PointSensors, known: Tensor) -> PointSensors:
    """``operator``, which must not touch unknown cells.  Raises InputError naming the stations that do."""
    touched = operator.A((~known).to(torch.float32)[None])[0].abs() > 0
    if bool(touched.any()):
        wrong = touched.reshape(-1).numpy()
        raise InputError(
            f"{int(wrong.sum())} of {wrong.size} stations read cells that are unknown (land): "
            f"{operator.stations.listing(wrong)}; move them"
        )
    return operator


def _everywhere(known: Tensor) -> Tensor:
    """Cells (y, x) in which all variables are known."""
    return known.reshape(-1, *known.shape[-2:]).all(0)


def _masked(definition: Any, image: Space, known: Tensor | None = None) -> Masked:  # noqa: ANN401
    ny, nx = image.shape[-2:]
    count = max(1, round(definition.share * ny * nx))
    mask = np.zeros(ny * nx, dtype=bool)
    mask[_some(ny * nx, count, definition.seed)] = True
    if known is None:
        return Masked(image, mask.reshape(ny, nx))
    seen = torch.from_numpy(mask.reshape(ny, nx)) & known
    everywhere = seen.reshape(-1, ny, nx)
    return Masked(image, everywhere[0] if bool((everywhere == everywhere[0]).all()) else seen)


def _coarse(definition: Any, image: Space, known: Tensor) -> CoarseGrain:  # noqa: ANN401
    """Means over the known cells of each coarse one; half of it must be known for it to count."""
    return CoarseGrain.covered(image, definition.factor, _everywhere(known), 0.5)[0]


def _some(total: int, count: int, seed: int) -> np.ndarray:
    """``count`` of ``total`` numbers without repetition, in order: a pure function of the seed, nested as count grows."""
    order = torch.argsort(Draws(seed, [0]).uniform(1, (total,), "user")[0], stable=True)
    return np.sort(order[:count].numpy())


BUILDERS: Mapping[str, Callable[[Any, Space], LinearOperator]] = {
    "parallel_beam": lambda d, image: ParallelBeam.from_geometry(image, parallel_geometry(d, image)),
    "fan_beam": lambda d, image: FanBeam(image, fan_geometry(d, image)),
    "cartesian_mri": _cartesian,
    "radial_mri": _radial,
    "stations": _stations,
    "coarse_grain": lambda d, image: CoarseGrain(image, d.factor),
    "masked": _masked,
}
_AROUND_GAPS: Mapping[str, Callable[[Any, Space, Tensor], LinearOperator]] = {
    "stations": lambda d, image, known: _dry(_stations(d, image, known), known),
    "coarse_grain": _coarse,
    "masked": _masked,
}
"""Those that can leave cells out."""
