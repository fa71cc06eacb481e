"""A figure of the page: empty axes of its width, and, when drawn, two data URIs (light and dark) with the numbers behind it."""

from __future__ import annotations

import base64
import io
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure

from recon.plot.canvas import INKED
from recon.report.layout import arrange

DPI = 120
WIDTH = 10.4  # inches: the text column of the page
INK = {"light": "#1d2125", "dark": "#e4e6e8"}
FAINT = 0.16  # opacity of lines of a grid
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

    figure = Figure(figsize=(WIDTH, height), dpi=DPI)
    return figure, figure.subplots(rows, cols, squeeze=False, width_ratios=width_ratios)


def finish(figure: Figure, alt: str, caption: str, data: Mapping[str, xr.DataArray] | None = None) -> Picture:
    """Arrange and draw ``figure`` once; what is ink and what is paper changes its colour on dark pages."""
    for axes in figure.axes:
        axes.tick_params(labelsize=8)
    arrange(figure)
    light, dark = _encoded(figure)
    return Picture(light, dark, alt, caption, dict(data or {}))


def _encoded(figure: Figure) -> tuple[str, str]:
    """The figure on light and on dark paper: one drawing on no paper at all, with two palettes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.lines import Line2D
    from matplotlib.text import Text
    from PIL import Image

    for axes in figure.axes:
        axes.set_facecolor("none")
        axes.tick_params(colors=INK["light"], which="both")
        for spine in axes.spines.values():
            spine.set_edgecolor(INK["light"])
        axes.xaxis.get_offset_text().set_color(INK["light"])
        axes.yaxis.get_offset_text().set_color(INK["light"])
        for line in (*axes.get_xgridlines(), *axes.get_ygridlines()):
            line.set(color=INK["light"], alpha=FAINT)  # text across them is ink on ink
    for text in figure.findobj(Text):
        text.set_color(INK["light"])
    for line in figure.findobj(Line2D):
        if line.get_gid() == INKED:
            line.set_color(INK["light"])
    figure.set_facecolor("none")
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    index, light, dark = palettes(np.asarray(canvas.buffer_rgba()))
    picture, buffer = Image.fromarray(index, mode="L"), io.BytesIO()
    picture.putpalette(light.tobytes())
    picture.save(buffer, "png", compress_level=7)
    png = buffer.getvalue()
    return _uri(png), _uri(_repainted(png, dark.tobytes()))


def _uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _repainted(png: bytes, palette: bytes) -> bytes:
    """The same PNG with another palette: its chunk PLTE is replaced."""
    at = png.index(b"PLTE")
    size = int.from_bytes(png[at - 4 : at], "big")
    chunk = b"PLTE" + palette[:size]
    return png[:at] + chunk + zlib.crc32(chunk).to_bytes(4, "big") + png[at + 4 + size + 4 :]


def palettes(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A drawing without paper (row, column, RGBA) as places in a palette, and the 256 colours (RGB) on light and dark paper.

    Kept are the 192 most frequent colours, which cover the maps, then whichever differs most from all kept so far, so that no
    rare mark vanishes; what remains (smoothed edges of letters) takes the nearest.  Ink is what has the colour of the text.
    """
    packed = np.ascontiguousarray(pixels).view(np.uint32)[..., 0]
    found, index, counts = np.unique(packed, return_inverse=True, return_counts=True)
    rgba = found.view(np.uint8).reshape(-1, 4)
    alpha = rgba[:, 3:].astype(np.float32) / 255
    rgb = rgba[:, :3].astype(np.float32)
    ink = {theme: np.array(_hex(INK[theme]), dtype=np.float32) for theme in INK}
    # Colours of faint pixels are rounded coarsely: half a step of 1/alpha.
    written = (np.abs(rgb - ink["light"]) <= 1 + 0.5 / np.maximum(alpha, 1 / 255)).all(1, keepdims=True) & (alpha > 0)
    on = [
        np.rint(alpha * np.where(written, ink[theme], rgb) + (1 - alpha) * np.array(_hex(PAPER[theme]), np.float32))
        for theme in ("light", "dark")
    ]
    both = np.concatenate(on, axis=1).astype(np.float32)
    kept = list(np.argsort(-counts, kind="stable")[:192])
    distance = ((both[:, None] - both[kept]) ** 2).sum(2)
    nearest, gap = distance.argmin(1), distance.min(1)
    while len(kept) < min(256, len(both)):
        kept.append(int(gap.argmax()))
        other = ((both - both[kept[-1]]) ** 2).sum(1)
        nearest, gap = np.where(other < gap, len(kept) - 1, nearest), np.minimum(gap, other)
    light, dark = (colours[kept].astype(np.uint8) for colours in on)
    return nearest.astype(np.uint8)[index].reshape(packed.shape), light, dark


def _hex(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))
