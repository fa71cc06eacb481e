"""A figure of the page: empty axes of its width, and, when drawn, two data URIs (light and dark) with the numbers behind it."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure
    from PIL import Image

from recon.plot.canvas import INKED

DPI = 120
WIDTH = 10.4  # inches: the text column of the page
INK = {"light": "#1d2125", "dark": "#e4e6e8"}
PAPER = {"light": "#ffffff", "dark": "#14171a"}  # as in the page's style sheet


@dataclass(frozen=True)
class Picture:
    """A figure for the page: data URIs for light and dark pages, a text for those who cannot see it, and a caption.

    data: the numbers that are drawn, by name; they are kept beside the page.
    """

    light: str
    dark: str
    alt: str
    caption: str
    data: Mapping[str, xr.DataArray] = field(default_factory=dict)


def new_figure(
    height: float, rows: int, cols: int, width_ratios: Sequence[float] | None = None
) -> tuple[Figure, np.ndarray]:
    """An empty figure of the page's width and its (rows, cols) axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    return figure, figure.subplots(rows, cols, squeeze=False, width_ratios=width_ratios)


def finish(figure: Figure, alt: str, caption: str, data: Mapping[str, xr.DataArray] | None = None) -> Picture:
    """Draw ``figure`` once for light and once for dark pages."""
    for axes in figure.axes:
        axes.tick_params(labelsize=8)
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
        if any(axes.get_aspect() != "auto" for axes in figure.axes):
            engine.execute(figure)  # one pass does not settle axes of fixed proportions
    figure.set_layout_engine("none")
    return Picture(_encoded(figure, "light"), _encoded(figure, "dark"), alt, caption, dict(data or {}))


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
