"""Parts of figures: an array on its axes, colour scales, and a finished figure as two data URIs (light and dark).

Only matplotlib's object-oriented interface is used: no pyplot state, no rcParams.  Grey for images, viridis for spreads and
errors, cividis for fractions, and PuOr, centred at zero, for signed figures: all safe for colour-blind readers.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
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
    from PIL import Image

DPI = 120
WIDTH = 10.4  # inches: the text column of the page
INK = {"light": "#1d2125", "dark": "#e4e6e8"}
PAPER = {"light": "#ffffff", "dark": "#14171a"}  # as in the page's style sheet
BLUE, ORANGE, GREEN = "#2f86c9", "#d98a1f", "#2a9d78"  # readable on white and on near-black
# Steps of the maps: too fine to see, and few enough for two maps and their text to share a palette of 256 colours.
LEVELS = {"gray": 128, "viridis": 96, "cividis": 96, "PuOr": 96}
BAD = "#c98b8b"  # values that are not numbers
INKED = "ink"  # artists with this gid take the colour of the text


@dataclass(frozen=True)
class Picture:
    """A figure for the page: data URIs for light and dark pages, a text for those who cannot see it, and a caption."""

    light: str
    dark: str
    alt: str
    caption: str


@dataclass(frozen=True)
class Look:
    """How values become colours: map, limits, and whether values lie beyond them."""

    cmap: str
    low: float
    high: float
    label: str

    def norm(self) -> Normalize:
        """The limits as matplotlib wants them."""
        from matplotlib.colors import Normalize

        return Normalize(self.low, self.high)


def new_figure(
    height: float, rows: int, cols: int, width_ratios: Sequence[float] | None = None
) -> tuple[Figure, np.ndarray]:
    """An empty figure of the page's width and its (rows, cols) axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    return figure, figure.subplots(rows, cols, squeeze=False, width_ratios=width_ratios)


def finish(figure: Figure, alt: str, caption: str) -> Picture:
    """Draw ``figure`` once for light and once for dark pages."""
    for axes in figure.axes:
        axes.tick_params(labelsize=8)
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
        engine.execute(figure)  # one pass does not settle axes of fixed proportions
    figure.set_layout_engine("none")
    return Picture(_encoded(figure, "light"), _encoded(figure, "dark"), alt, caption)


def _encoded(figure: Figure, theme: str) -> str:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.lines import Line2D
    from matplotlib.text import Text

    ink = INK[theme]
    for axes in figure.axes:
        axes.set_facecolor(PAPER[theme])
        axes.tick_params(colors=ink, which="both")
        for spine in axes.spines.values():
            spine.set_edgecolor(ink)
        axes.xaxis.get_offset_text().set_color(ink)
        axes.yaxis.get_offset_text().set_color(ink)
    for text in figure.findobj(Text):
        text.set_color(ink)
    for line in figure.findobj(Line2D):
        if line.get_gid() == INKED:
            line.set_color(ink)
    buffer = io.BytesIO()
    figure.set_facecolor(PAPER[theme])
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    _smallest(np.asarray(canvas.buffer_rgba())[..., :3]).save(buffer, "png", compress_level=7)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _smallest(pixels: np.ndarray) -> Image.Image:
    """The same picture with a palette of 256 colours (half the bytes).

    Kept are the 192 most frequent colours, which cover the maps, then whichever differs most from all kept so far, so that no
    rare mark vanishes; what remains (smoothed edges of letters) takes the nearest.
    """
    from PIL import Image

    packed = pixels.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], dtype=np.uint32)
    found, index, counts = np.unique(packed, return_inverse=True, return_counts=True)
    colours = np.stack([found >> 16, found >> 8, found], axis=1).astype(np.uint8)
    kept = list(np.argsort(-counts, kind="stable")[:192])
    wide = colours.astype(np.int64)
    distance = ((wide[:, None] - wide[kept]) ** 2).sum(2)
    nearest, gap = distance.argmin(1), distance.min(1)
    while len(kept) < min(256, len(colours)):
        kept.append(int(gap.argmax()))
        other = ((wide - wide[kept[-1]]) ** 2).sum(1)
        nearest, gap = np.where(other < gap, len(kept) - 1, nearest), np.minimum(gap, other)
    picture = Image.fromarray(nearest.astype(np.uint8)[index].reshape(packed.shape), mode="L")
    picture.putpalette(colours[kept].tobytes())
    return picture


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


def shown(space: Space, values: Tensor) -> np.ndarray:
    """The part of ``values`` (*space.shape) that a flat page can show: all of it, or the central slice of the last two dims."""
    index = tuple(n // 2 for n in space.shape[:-2])
    return np.asarray(values.detach().cpu()[index], dtype=np.float64)


def slice_note(space: Space) -> str:
    """Which slice ``shown`` takes, in words; empty when it takes all."""
    words = []
    for dim, n in list(zip(space.dims, space.shape, strict=True))[:-2]:
        place = n // 2
        where = f"number {place + 1} of {n}"
        if dim in space.coords:
            values, attrs = labelled(dim, space.coords[dim])
            text = (
                values[place]
                if isinstance(values[place], str)
                else f"{float(values[place]):.4g} {_short(attrs)}".strip()
            )
            where = f"{text} ({where})"
        words.append(f"{dim} {where}")
    return f" Shown: {', '.join(words)}." if words else ""


def axis(space: Space, dim: str) -> tuple[np.ndarray, str]:
    """Positions along ``dim`` for a plot, and the axis label with its unit; the index where there are no even positions."""
    n = space.shape[space.dims.index(dim)]
    if space.spacing(dim) is None:
        return np.arange(n, dtype=np.float64), f"{dim} (index)"
    values, attrs = labelled(dim, space.coords[dim])
    unit = _short(attrs)
    return np.asarray(values), f"{dim} ({unit})" if unit else dim


def _short(attrs: dict[str, str]) -> str:
    unit = attrs.get("units", "")
    return {"degree": "°", "degrees_north": "° N", "degrees_east": "° E", "1": ""}.get(unit, unit)


def draw(axes: Axes, space: Space, values: Tensor, look: Look, title: str) -> Any:  # noqa: ANN401  (mappable or None)
    """Show ``values`` (*space.shape): an image, or a line for one dim.  Returns what a colour bar needs, None for a line."""
    axes.set_title(title, fontsize=9.5)
    if len(space.dims) == 1:
        curve(axes, space, values, color=BLUE)
        axes.set_ylabel(look.label, fontsize=8.5)
        return None
    return image(axes, space, shown(space, values), look)


def image(axes: Axes, space: Space, values: np.ndarray, look: Look) -> Any:  # noqa: ANN401  (the AxesImage)
    """Show a 2-D array on the last two dims of ``space``, in mm or degrees."""
    from matplotlib import colormaps

    (y, y_label), (x, x_label) = (axis(space, dim) for dim in space.dims[-2:])
    cmap = colormaps[look.cmap].resampled(LEVELS[look.cmap]).with_extremes(bad=BAD)
    extent = (*_edges(x), *_edges(y)[::-1])
    wide, tall = abs(extent[1] - extent[0]), abs(extent[3] - extent[2])
    # One unit on both axes: true proportions, unless the picture would become a thread.
    same = x_label.removeprefix(space.dims[-1]) == y_label.removeprefix(space.dims[-2]) and 0.2 < wide / tall < 5
    aspect: Literal["equal", "auto"] = "equal" if same else "auto"
    made = axes.imshow(
        values, cmap=cmap, norm=look.norm(), extent=extent, origin="upper", aspect=aspect, interpolation_stage="data"
    )
    if space.dims[-2] == "lat" and y[0] < y[-1]:
        axes.invert_yaxis()
    axes.set_xlabel(x_label, fontsize=8.5)
    axes.set_ylabel(y_label, fontsize=8.5)
    axes.locator_params(nbins=5)
    return made


def curve(axes: Axes, space: Space, values: Tensor, **style: Any) -> None:  # noqa: ANN401  (line properties)
    """Plot a 1-D array along the only dim of ``space``, with markers where there are few values."""
    x, label = axis(space, space.dims[0])
    mark = {"marker": "o", "markersize": 3.5} if len(x) <= 40 else {}
    axes.plot(x, np.asarray(values.detach().cpu(), dtype=np.float64), **{"linewidth": 1.2, **mark, **style})
    axes.set_xlabel(label, fontsize=8.5)


def scale(figure: Figure, made: Any, axes: Any, look: Look, *arrays: Tensor | np.ndarray) -> None:  # noqa: ANN401
    """A colour bar with its unit; pointed where values lie beyond the limits."""
    low, high = limits(*arrays, share=0.0) if arrays else (look.low, look.high)
    slack = 1e-6 * (look.high - look.low)
    under, over = low < look.low - slack, high > look.high + slack
    extend = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}[under, over]
    bar = figure.colorbar(made, ax=axes, extend=extend, shrink=0.9, aspect=28, pad=0.015)
    bar.set_label(look.label, fontsize=8.5)


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


def _edges(positions: np.ndarray) -> tuple[float, float]:
    step = (positions[-1] - positions[0]) / (len(positions) - 1) if len(positions) > 1 else 1.0
    return float(positions[0] - step / 2), float(positions[-1] + step / 2)
