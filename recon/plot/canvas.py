"""Parts of pictures: an array on its axes in mm or degrees, colour limits, curves, legends.

Only matplotlib's object-oriented interface is used: no pyplot state, no rcParams.  Grey for images, cividis for
fields on the globe and for fractions, viridis for spreads and errors, PuOr, centred at zero, for signed figures: all safe for
colour-blind readers.  Twilight, which is cyclic, for phases.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch import Tensor

from recon.ensemble import labelled
from recon.space import Space

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, RED = "#2f86c9", "#d98a1f", "#2a9d78", "#c2504a"  # readable on white and on near-black
SERIES = (BLUE, ORANGE, GREEN, "#b07aa1", "#9c755f")
# Steps of the maps: too fine to see, and few enough for two maps and their text to share a palette of 256 colours.
LEVELS = {"gray": 128, "viridis": 96, "cividis": 96, "PuOr": 96, "twilight": 96}
BAD = "#c98b8b"  # values that are not numbers
INKED = "ink"  # artists with this gid take the colour of the text
SMALL = 8.5  # points, of labels
FEW = 40  # values along a line that are marked one by one


@dataclass(frozen=True)
class Look:
    """How values become colours: name of the map, limits, and the label of its bar."""

    cmap: str
    low: float
    high: float
    label: str

    def norm(self) -> Normalize:
        """The limits as matplotlib wants them."""
        from matplotlib.colors import Normalize

        return Normalize(self.low, self.high)


def colours(space: Space) -> str:
    """The map of values on ``space``: cividis for fields on latitudes and longitudes, grey for images."""
    return "cividis" if space.dims[-2:] == ("lat", "lon") else "gray"


_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def printed(unit: str) -> str:
    """A unit as people write it: ``m2/s2`` and ``m**2 s**-2`` with raised exponents."""
    return re.sub(r"(?<=[A-Za-z])(?:\*\*|\^)?(-?\d+)", lambda found: found[1].translate(_RAISED), unit)


def unit_label(what: str, unit: str) -> str:
    """``what (unit)``, or ``what`` alone for dimensionless data."""
    return what if unit in ("1", "") else f"{what} ({printed(unit)})"


def limits(*arrays: Tensor | np.ndarray | None, share: float = 0.5) -> tuple[float, float]:
    """Common colour limits: ``share`` and ``100 - share`` percentiles of all finite values, never equal."""
    values = [np.asarray(a, dtype=np.float64).ravel() for a in arrays if a is not None]
    finite = np.concatenate([v[np.isfinite(v)] for v in values]) if values else np.empty(0)
    if not finite.size:
        return 0.0, 1.0
    low, high = (float(v) for v in np.percentile(finite, [share, 100 - share]))
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-300):
        pad = 0.5 * abs(low) or 0.5
        return low - pad, high + pad
    return low, high


def shown(space: Space, values: Tensor | np.ndarray) -> np.ndarray:
    """What a flat page can show of ``values`` (*space.shape): all of it, or the central slice of the last two dims."""
    index = tuple(n // 2 for n in space.shape[:-2])
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else values
    return np.asarray(array[index], dtype=np.float64)


def slice_note(space: Space) -> str:
    """Which slice ``shown`` takes, in words; empty when it takes all."""
    words = [
        f"{dim} {place_of(space, dim, n // 2)}"
        for dim, n in list(zip(space.dims, space.shape, strict=True))[:-2]
        if n > 1
    ]
    return f" Shown: {', '.join(words)}." if words else ""


def place_of(space: Space, dim: str, place: int) -> str:
    """``4 mm (number 3 of 4)``: where index ``place`` along ``dim`` is."""
    where = f"number {place + 1} of {space.shape[space.dims.index(dim)]}"
    if dim not in space.coords:
        return where
    values, attrs = labelled(dim, space.coords[dim])
    one = values[place]
    text = one if isinstance(one, str) else f"{float(one):.4g} {short_unit(attrs)}".strip()
    return f"{text} ({where})"


def axis(space: Space, dim: str) -> tuple[np.ndarray, str]:
    """Positions along ``dim`` for a plot, and the axis label with its unit; the index where there are no even positions."""
    n = space.shape[space.dims.index(dim)]
    if space.spacing(dim) is None:
        return np.arange(n, dtype=np.float64), f"{dim} (index)"
    values, attrs = labelled(dim, space.coords[dim])
    unit = short_unit(attrs)
    return np.asarray(values), f"{dim} ({unit})" if unit else dim


def short_unit(attrs: dict[str, str]) -> str:
    """A coordinate's unit as it is printed: mm, °, ° N; nothing for plain numbers."""
    unit = attrs.get("units", "")
    return {"degree": "°", "degrees_north": "° N", "degrees_east": "° E", "1": ""}.get(unit, unit)


def draw(axes: Axes, space: Space, values: Tensor, look: Look, title: str) -> Any:  # noqa: ANN401  (mappable or None)
    """Show ``values`` (*space.shape): an image, or a line for one dim.  Returns what a colour bar needs, None for a line."""
    axes.set_title(title, fontsize=9.5)
    if len(space.dims) == 1:
        curve(axes, space, values, color=BLUE)
        axes.set_ylabel(look.label, fontsize=SMALL)
        return None
    return image(axes, space, shown(space, values), look)


def image(axes: Axes, space: Space, values: np.ndarray, look: Look) -> Any:  # noqa: ANN401  (the AxesImage)
    """Show a 2-D array on the last two dims of ``space``, in mm or degrees."""
    from matplotlib import colormaps

    (y, y_label), (x, x_label) = (axis(space, dim) for dim in space.dims[-2:])
    cmap = colormaps[look.cmap].resampled(LEVELS.get(look.cmap, 96)).with_extremes(bad=BAD)
    extent = (*_edges(x), *_edges(y)[::-1])
    wide, tall = abs(extent[1] - extent[0]), abs(extent[3] - extent[2])
    # One unit on both axes: true proportions, unless the picture would become a thread.
    same = x_label.removeprefix(space.dims[-1]) == y_label.removeprefix(space.dims[-2]) and 0.2 < wide / tall < 5
    aspect: Literal["equal", "auto"] = "equal" if same else "auto"
    made = axes.imshow(
        values, cmap=cmap, norm=look.norm(), extent=extent, origin="upper", aspect=aspect, interpolation_stage="data"
    )
    upwards = (space.dims[-2] == "lat" and y[0] < y[-1]) or (space.dims[-2] == "z" and y[0] < y[-1])
    if upwards:
        axes.invert_yaxis()
    axes.set_xlabel(x_label, fontsize=SMALL)
    axes.set_ylabel(y_label, fontsize=SMALL)
    axes.locator_params(nbins=5)
    return made


def curve(axes: Axes, space: Space, values: Tensor, **style: Any) -> Any:  # noqa: ANN401  (line properties, lines)
    """Plot a 1-D array along the only dim of ``space``, with markers where there are few values."""
    x, label = axis(space, space.dims[0])
    mark = {"marker": "o", "markersize": 3.5} if len(x) <= FEW else {}
    made = axes.plot(x, np.asarray(values.detach().cpu(), dtype=np.float64), **{"linewidth": 1.2, **mark, **style})
    axes.set_xlabel(label, fontsize=SMALL)
    return made


def scale(figure: Figure, made: Any, axes: Any, look: Look, *arrays: Tensor | np.ndarray) -> Any:  # noqa: ANN401
    """A colour bar with its unit; pointed where values lie beyond the limits.  Returns the bar.

    Its axes know those it belongs to (``recon_parents``), so that who arranges the figure anew can put it beside them.
    """
    low, high = limits(*arrays, share=0.0) if arrays else (look.low, look.high)
    slack = 1e-6 * (look.high - look.low)
    under, over = low < look.low - slack, high > look.high + slack
    extend = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}[under, over]
    bar = figure.colorbar(made, ax=axes, extend=extend, shrink=0.9, aspect=28, pad=0.015, use_gridspec=False)
    bar.set_label(look.label, fontsize=SMALL)
    bar.ax.recon_parents = tuple(np.ravel(np.asarray(axes, dtype=object)))  # type: ignore[attr-defined]
    return bar


def legend(axes: Axes, **style: Any) -> None:  # noqa: ANN401  (properties of the legend)
    """A legend without a frame, in which inked lines stay inked."""
    from matplotlib.lines import Line2D

    handles, labels = axes.get_legend_handles_labels()
    made = axes.legend(handles, labels, fontsize=8, frameon=False, **style)
    for artist, handle in zip(handles, made.legend_handles, strict=True):
        if isinstance(artist, Line2D) and artist.get_gid() == INKED and handle is not None:
            handle.set_gid(INKED)


def tidy(axes: Axes) -> None:
    """A plain frame for curves: no top and right line, a faint grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#8888884d", linewidth=0.6)
    axes.set_axisbelow(True)


def labels(axes: Axes, x: str, y: str, title: str = "") -> None:
    """Small axis labels, and a title where one is given."""
    axes.set_xlabel(x, fontsize=SMALL)
    axes.set_ylabel(y, fontsize=SMALL)
    if title:
        axes.set_title(title, fontsize=9.5)


def _edges(positions: np.ndarray) -> tuple[float, float]:
    step = (positions[-1] - positions[0]) / (len(positions) - 1) if len(positions) > 1 else 1.0
    return float(positions[0] - step / 2), float(positions[-1] + step / 2)
