"""Places for the axes of a figure, from one measurement of what stands around them.

Margins of a column (a row) are the widest that its axes need; bars of colours stand right of their axes; what is left is shared
by the ratios of the grid.  Axes of fixed proportions fill their cell as far as those allow; where a figure holds nothing else
its height is what they need, so no blank is left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

EDGE, GAP, BAR = 6.0, 13.0, 8.0  # pixels: around the figure, between cells, before a bar
SHRINK = 0.9  # height of a bar, as a share of the axes beside it


@dataclass(frozen=True)
class Cell:
    """One axes of a grid.  left, right, below, above: pixels that its labels take.  tall: height over width, None if free."""

    axes: Axes
    row: int
    column: int
    left: float
    right: float
    below: float
    above: float
    tall: float | None


@dataclass(frozen=True)
class Bar:
    """A bar of colours.  parents: the axes it stands beside.  wide: pixels with its labels."""

    axes: Axes
    parents: tuple[Axes, ...]
    wide: float


def arrange(figure: Figure) -> None:
    """Place all axes that ``figure.subplots`` made, and the bars beside them; changes the height where it is too large."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas: Any = FigureCanvasAgg(figure)
    renderer = canvas.get_renderer()
    made = [axes for axes in figure.axes if axes.get_subplotspec() is not None]
    cells = [_cell(axes, renderer) for axes in made]
    bars = [_bar(axes, renderer) for axes in figure.axes if hasattr(axes, "recon_parents")]
    if not cells:
        return
    grid = cells[0].axes.get_subplotspec().get_gridspec()  # type: ignore[union-attr]
    top = sum(legend.get_window_extent(renderer).height + GAP for legend in figure.legends)
    columns, rows = _columns(figure, cells, bars, grid), _rows(figure, cells, grid, top)
    heights = _proportioned(cells, columns, rows)
    if all(cell.tall is not None for cell in cells if cell.axes.axison):
        spare = rows[:, 1].sum() - heights.sum()
        rows[:, 1] = heights
        figure.set_figheight(figure.get_figheight() - spare / figure.dpi)
        _narrowed(cells, columns, rows)
    _place(figure, cells, bars, (columns, rows, top))


def _cell(axes: Axes, renderer: Any) -> Cell:  # noqa: ANN401
    spec = axes.get_subplotspec()
    assert spec is not None  # the caller looked
    around = axes.get_tightbbox(renderer, for_layout_only=True)
    box = axes.get_window_extent(renderer) if around is None else axes.bbox
    tall = None if axes.get_aspect() == "auto" else float(box.height / box.width)
    if around is None:
        around = box
    left, right, below, above = (
        max(0.0, float(m)) for m in (box.x0 - around.x0, around.x1 - box.x1, box.y0 - around.y0, around.y1 - box.y1)
    )
    return Cell(axes, spec.rowspan.start, spec.colspan.start, left, right, below, above, tall)


def _bar(axes: Axes, renderer: Any) -> Bar:  # noqa: ANN401
    around = axes.get_tightbbox(renderer, for_layout_only=True)
    wide = axes.bbox.width if around is None else around.x1 - axes.bbox.x0
    return Bar(axes, axes.recon_parents, float(wide))  # type: ignore[attr-defined]


def _columns(figure: Figure, cells: list[Cell], bars: list[Bar], grid: Any) -> np.ndarray:  # noqa: ANN401
    """Per column: left margin, width, right margin with its bars, in pixels."""
    out = np.zeros((grid.ncols, 3))
    for cell in cells:
        out[cell.column, 0] = max(out[cell.column, 0], cell.left)
        out[cell.column, 2] = max(out[cell.column, 2], cell.right)
    plain = out[:, 2].copy()
    for bar in bars:
        last = max(cell.column for cell in cells if cell.axes in bar.parents)
        out[last, 2] = max(out[last, 2], plain[last] + BAR + bar.wide)
    ratios = np.array(grid.get_width_ratios(), dtype=np.float64)
    free = figure.bbox.width - 2 * EDGE - GAP * (grid.ncols - 1) - out.sum()
    out[:, 1] = max(free, 20.0 * grid.ncols) * ratios / ratios.sum()
    return out


def _rows(figure: Figure, cells: list[Cell], grid: Any, top: float) -> np.ndarray:  # noqa: ANN401
    """Per row: margin above, height, margin below, in pixels."""
    out = np.zeros((grid.nrows, 3))
    for cell in cells:
        out[cell.row, 0] = max(out[cell.row, 0], cell.above)
        out[cell.row, 2] = max(out[cell.row, 2], cell.below)
    ratios = np.array(grid.get_height_ratios(), dtype=np.float64)
    free = figure.bbox.height - top - 2 * EDGE - GAP * (grid.nrows - 1) - out.sum()
    out[:, 1] = max(free, 20.0 * grid.nrows) * ratios / ratios.sum()
    return out


def _proportioned(cells: list[Cell], columns: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The heights that images as wide as their columns need, no more than there is."""
    heights = np.zeros(len(rows))
    for cell in cells:
        if cell.tall is not None and cell.axes.axison:
            heights[cell.row] = max(heights[cell.row], cell.tall * columns[cell.column, 1])
    return np.minimum(np.where(heights > 0, heights, rows[:, 1]), rows[:, 1])


def _narrowed(cells: list[Cell], columns: np.ndarray, rows: np.ndarray) -> None:
    """Columns no wider than the images in them, so that bars stand beside these."""
    widths = np.zeros(len(columns))
    for cell in cells:
        if cell.tall is not None and cell.axes.axison:
            widths[cell.column] = max(widths[cell.column], rows[cell.row, 1] / cell.tall)
    columns[:, 1] = np.where(widths > 0, np.minimum(widths, columns[:, 1]), columns[:, 1])


def _place(figure: Figure, cells: list[Cell], bars: list[Bar], shares: tuple[np.ndarray, np.ndarray, float]) -> None:
    columns, rows, top = shares
    wide, tall = figure.bbox.width, figure.bbox.height
    start = max(EDGE, (wide - columns.sum() - GAP * (len(columns) - 1)) / 2)
    lefts = start + columns[:, 0] + np.concatenate([[0], (columns.sum(1) + GAP).cumsum()[:-1]])
    tops = tall - EDGE - top - rows[:, 0] - np.concatenate([[0], (rows.sum(1) + GAP).cumsum()[:-1]])
    placed: dict[Axes, tuple[float, float, float, float]] = {}
    for cell in cells:
        width, height = columns[cell.column, 1], rows[cell.row, 1]
        across, up = width, height
        if cell.tall is not None:
            across, up = min(width, height / cell.tall), min(height, width * cell.tall)
        x, y = lefts[cell.column] + (width - across) / 2, tops[cell.row] - height + (height - up) / 2
        placed[cell.axes] = (x, y, x + across, y + up)
        cell.axes.set_position((x / wide, y / tall, across / wide, up / tall))
    margin = {cell.axes: cell.right for cell in cells}
    for bar in bars:
        boxes = np.array([placed[axes] for axes in bar.parents])
        low, high = boxes[:, 1].min(), boxes[:, 3].max()
        height = SHRINK * (high - low)
        edge = max(placed[axes][2] + margin[axes] for axes in bar.parents)
        bar.axes.set_anchor((0.0, 0.5))
        bar.axes.set_position(((edge + BAR) / wide, ((low + high - height) / 2) / tall, bar.wide / wide, height / tall))
    for legend in figure.legends:
        legend.set_loc("upper left")
        legend.set_bbox_to_anchor((lefts[0] / wide, 1 - EDGE / 2 / tall))
