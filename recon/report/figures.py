"""The figures of one quantity: its images, its uncertainty, its intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from recon.ensemble import labelled
from recon.plot.canvas import (
    BLUE,
    INKED,
    ORANGE,
    SERIES,
    Look,
    colours,
    curve,
    draw,
    image,
    labels,
    legend,
    limits,
    scale,
    shown,
    slice_note,
    tidy,
    unit_label,
)
from recon.plot.inputs import labelled_array
from recon.plot.maps import band, checked_intervals, refusal
from recon.plot.maps import intervals as draw_intervals
from recon.report.panels import WIDTH, Picture, finish, new_figure
from recon.report.quantities import Quantity, wrapped
from recon.report.verdict import bare, number
from recon.space import Space

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes

COLUMNS = 4
MOST = 8  # panels of one figure


def images(quantity: Quantity) -> Picture:
    """Mean, two draws, truth and baselines at one scale; bands along the axis for one-dimensional data."""
    ensemble, space = quantity.ensemble, quantity.space
    if len(space.dims) == 1:
        return _curves(quantity)
    shows: dict[str, Tensor] = {} if quantity.truth is None else {"truth": quantity.truth}
    shows["posterior mean"] = ensemble.mean()
    shows |= {f"draw {d}": ensemble.x[d] for d in range(min(2, len(ensemble)))}
    shows |= {name: value for name, value in quantity.baselines.items() if name not in shows}
    left_out = list(shows)[MOST:]
    shows = {name: _seen(quantity, value) for name, value in list(shows.items())[:MOST]}
    flat = {name: shown(space, value) for name, value in shows.items()}
    reference = "truth" if "truth" in shows else "posterior mean"
    look = Look(colours(space), *limits(flat[reference], share=0.1), unit_label("value", space.unit))
    if quantity.kind == "phase":
        look = Look("twilight", -math.pi, math.pi, "phase (rad)")
    row = 5 if quantity.name else COLUMNS  # several quantities: a row each, where it fits
    columns = 3 if len(shows) in (5, 6, 9) and len(shows) > row else min(row, len(shows))
    rows = math.ceil(len(shows) / columns)
    figure, grid = new_figure(0.5 + rows * (0.4 + _tall(space) * (WIDTH - 1.4) / max(columns, 3)), rows, columns)
    for k, (axes, (name, value)) in enumerate(zip(grid.flat, shows.items(), strict=False)):
        made = _drawn(axes, quantity, value, look, name)
        _inner(axes, left=k % columns == 0, bottom=k + columns >= len(shows))
    for axes in grid.flat[len(shows) :]:
        axes.set_axis_off()
    scale(figure, made, grid, look, *flat.values())
    alt = f"{quantity.title}images side by side at one scale: {', '.join(shows)}."
    omitted = f" Not shown: {', '.join(left_out)}." if left_out else ""
    return finish(
        figure, alt, f"{quantity.title}{_scale_words(quantity, look, reference)}{omitted}", kept(space, shows)
    )


def _scale_words(quantity: Quantity, look: Look, reference: str) -> str:
    note = slice_note(quantity.space)
    if quantity.kind == "phase":
        return (
            "phase in rad, cyclic colours; left out (plain) where the mean's magnitude is below a tenth of its "
            f"largest.{note}"
        )
    what = "Magnitudes |x|, the mean being that of the draws' magnitudes. " if quantity.kind == "magnitude" else ""
    return (
        f"{what}All panels share one scale, {number(look.low)} to {_with_unit(look.high, quantity)} (the range of "
        f"the {reference}); pointed ends of the bar mean that values lie beyond it.{note}"
    )


def _with_unit(value: float, quantity: Quantity) -> str:
    return f"{number(value)} {bare(quantity.unit)}".strip()


def _drawn(axes: Axes, quantity: Quantity, values: Tensor, look: Look, title: str) -> Any:  # noqa: ANN401  (mappable or None)
    """As ``draw``; where the quantity means nothing the paper shows through, which is no fault of the values."""
    made = draw(axes, quantity.space, values, look, title)
    if made is not None and quantity.mask is not None:
        made.set_cmap(made.get_cmap().with_extremes(bad="#80808030"))
    return made


def _tall(space: Space) -> float:
    return min(1.5, max(0.4, space.shape[-2] / space.shape[-1]))


def _seen(quantity: Quantity, values: Tensor) -> Tensor:
    return quantity.seen(wrapped(values) if quantity.kind == "phase" else values)


def _inner(axes: Axes, left: bool, bottom: bool) -> None:
    """Keep tick labels only at the outside of a grid of maps."""
    if not left:
        axes.set_ylabel("")
        axes.tick_params(labelleft=False)
    if not bottom:
        axes.set_xlabel("")
        axes.tick_params(labelbottom=False)


def kept(space: Space, values: Mapping[str, Tensor | np.ndarray]) -> dict[str, xr.DataArray]:
    """What a figure shows of arrays on ``space``, with names: the slice that is drawn."""
    flat = space if len(space.dims) == 1 else _plane(space)
    return {
        name: labelled_array(v if len(space.dims) == 1 or v.ndim == 2 else shown(space, v), flat, name)
        for name, v in values.items()
    }


def _plane(space: Space) -> Space:
    dims = space.dims[-2:]
    return Space(dims, space.shape[-2:], {d: space.coords[d] for d in dims if d in space.coords}, space.unit)


def _curves(quantity: Quantity) -> Picture:
    ensemble, space = quantity.ensemble, quantity.space
    figure, grid = new_figure(3.6, 1, 1)
    axes = grid[0, 0]
    data: dict[str, Tensor | np.ndarray] = {}
    held = [level for level in (0.9, 0.5) if not refusal(ensemble, level)]
    for level, alpha in zip(held, (0.2, 0.35)[2 - len(held) :], strict=True):
        maps = checked_intervals(ensemble, level)
        assert maps.low is not None  # refusal was empty
        assert maps.high is not None
        band(axes, space, maps.low, maps.high, f"{100 * level:.0f} % interval", alpha)
        data |= {f"low {level:g}": maps.low, f"high {level:g}": maps.high}
    few = space.shape[0] <= 40
    line = "none" if few else "-"
    for d in range(min(2, len(ensemble))):
        faint = {"color": BLUE, "alpha": 0.5, "linewidth": 0.7, "markersize": 2.5}
        curve(axes, space, ensemble.x[d], linestyle=line, label=f"draw {d}", **faint)
        data[f"draw {d}"] = ensemble.x[d]
    for color, (name, value) in zip(SERIES[1:], quantity.baselines.items(), strict=False):
        curve(axes, space, value, color=color, linestyle=line if few else "--", label=name)
        data[name] = value
    curve(axes, space, ensemble.mean(), color=BLUE, linewidth=1.8, linestyle=line, label="posterior mean")
    data["posterior mean"] = ensemble.mean()
    if quantity.truth is not None:
        mark = {"marker": "x", "markersize": 6} if few else {}
        curve(axes, space, quantity.truth, gid=INKED, linewidth=1.0, linestyle=line, label="truth", **mark)
        data["truth"] = quantity.truth
    axes.set_ylabel(unit_label("value", space.unit), fontsize=8.5)
    legend(axes, ncols=4, loc="lower left", bbox_to_anchor=(0, 1))
    tidy(axes)
    words = " and ".join(f"{100 * level:.0f} %" for level in reversed(held))
    alt = f"{quantity.title}posterior mean along {space.dims[0]}, draws and references" + (
        f", with intervals of {words}." if held else "."
    )
    caption = f"Shaded: intervals of {words} from the draws." if held else f"No intervals: {refusal(ensemble, 0.5)}."
    return finish(figure, alt, quantity.title + caption, kept(space, data))


def uncertainty(quantity: Quantity, stations: dict[str, Any] | None = None) -> Picture | None:
    """Standard deviation in data units; with a truth also the error at the same scale, and their ratio.  None for one draw."""
    ensemble, space = quantity.ensemble, quantity.space
    if len(ensemble) < 2:
        return None
    std, unit = quantity.seen(ensemble.std()), bare(space.unit)
    error = None if quantity.truth is None else quantity.seen(ensemble.mean() - quantity.truth)
    parts = [shown(space, std)] + ([] if error is None else [np.abs(shown(space, error))])
    look = Look("viridis", 0.0, max(limits(*parts)[1], 1e-300), unit_label("std", space.unit))
    figure, grid = new_figure(3.1 if error is not None else 3.4, 1, 3 if error is not None else 2)
    made = _drawn(grid[0, 0], quantity, std, look, "posterior std")
    dots = _dots(grid[0, 0], space, stations)
    finite = parts[0][np.isfinite(parts[0])]
    median = f"Median std {number(float(np.median(finite)) if finite.size else None)} {unit}".strip() + "."
    where = " Dots: stations." if dots else ""
    if error is None:
        _histogram(grid[0, 1], parts[0], look)
        if made is not None:
            scale(figure, made, grid[0, :1], look, *parts)
        alt = f"{quantity.title}map of the posterior standard deviation and its histogram over pixels."
        caption = f"{quantity.title}Where and by how much the draws differ. {median}{where}{slice_note(space)}"
        return finish(figure, alt, caption, kept(space, {"std": std}))
    ratio = torch.where(std > 0, error / std, torch.nan)
    _error_panels(quantity, (grid, made), (error, ratio), look, parts)
    beyond = shown(space, ratio)
    beyond = beyond[np.isfinite(beyond)]
    share = f"{100 * float((np.abs(beyond) > 2).mean()):.1f} %" if beyond.size else "–"
    caption = (
        f"{quantity.title}Spread and error at one scale; right: error in units of the spread. {median} |error| exceeds 2 std "
        f"in {share} of the pixels shown (about 5 % where the spread is right and errors are Gaussian).{where}"
        f"{slice_note(space)}"
    )
    alt = f"{quantity.title}posterior standard deviation, absolute error of the mean, and error divided by std."
    return finish(figure, alt, caption, kept(space, {"std": std, "error": error, "error over std": ratio}))


def _error_panels(
    quantity: Quantity,
    drawn: tuple[np.ndarray, Any],
    values: tuple[Tensor, Tensor],
    look: Look,
    parts: list[np.ndarray],
) -> None:
    """The absolute error beside the std, and their ratio."""
    (grid, made), (error, ratio), space = drawn, values, quantity.space
    _drawn(grid[0, 1], quantity, error.abs(), replace(look, label=unit_label("|error|", space.unit)), "|mean − truth|")
    signed = Look("PuOr", -4.0, 4.0, "error / std")
    made_ratio = _drawn(grid[0, 2], quantity, ratio, signed, "(mean − truth) / std")
    figure = grid[0, 0].get_figure()
    if made is not None:
        both = replace(look, label=unit_label("std and |error|", space.unit))
        scale(figure, made, grid[0, :2], both, *parts)
        scale(figure, made_ratio, grid[0, 2:], signed, shown(space, ratio))
        for axes in grid[0, 1:]:
            axes.set_ylabel("")
        return
    top = 1.05 * max(limits(*parts, share=0.0)[1], 1e-300)
    grid[0, 0].set_ylim(0, top)
    grid[0, 1].set_ylim(0, top)
    for axes in grid[0]:
        tidy(axes)


def _dots(axes: Axes, space: Space, stations: dict[str, Any] | None) -> bool:
    """Mark the stations on a map of the last two dims; whether there were any."""
    if not stations or len(space.dims) < 2 or any(d not in stations for d in space.dims[-2:]):
        return False
    y, x = (labelled(d, np.asarray(stations[d], dtype=np.float64))[0] for d in space.dims[-2:])
    if any(space.spacing(d) is None for d in space.dims[-2:]):
        return False
    axes.plot(
        x, y, "o", markersize=3, markerfacecolor="white", markeredgecolor="black", markeredgewidth=0.6, linestyle="none"
    )
    return True


def _histogram(axes: Axes, values: np.ndarray, look: Look) -> None:
    finite = values[np.isfinite(values)]
    axes.hist(np.clip(finite, look.low, look.high), bins=40, range=(look.low, look.high), color=BLUE)
    labels(axes, look.label, "pixels", "histogram of the std")
    tidy(axes)


def intervals(quantity: Quantity) -> Picture | None:
    """Lower and upper ends and width of the widest intervals that the draws allow; with a truth, where it falls outside."""
    ensemble, space = quantity.ensemble, quantity.space
    levels = [level for level in (0.9, 0.5) if not refusal(ensemble, level)]
    if not levels or len(space.dims) == 1:
        return None
    level = levels[0]
    maps = checked_intervals(ensemble, level)
    assert maps.low is not None  # refusal was empty
    assert maps.high is not None
    low, high = quantity.seen(maps.low), quantity.seen(maps.high)
    known = quantity.truth is not None
    figure, grid = new_figure(0.7 + _tall(space) * (WIDTH - 1.8) / (4 if known else 3), 1, 4 if known else 3)
    shows: dict[str, Tensor | np.ndarray] = {"low": low, "high": high}
    if quantity.kind == "phase":
        _phase_intervals(quantity, grid, (low, high), level)
    else:
        ends = Look(colours(space), *limits(low, high, share=0.1), unit_label("value", space.unit))
        draw_intervals(ensemble, grid[0, :3], level, ends)
    caption = (
        f"{quantity.title}{100 * level:.0f} % of further exchangeable draws lie between the two ends, for this finite number "
        f"of draws (order statistics at k/(M+1)). Mean width {number(float((high - low)[_where(quantity)].mean()))} "
        f"{bare(space.unit)}."
    )
    if quantity.truth is not None:
        hit = _hits(grid[0, 3], quantity, maps.low, maps.high)
        shows["truth against interval"] = hit
        seen = hit[np.isfinite(hit)]
        caption += (
            f" Right: where the truth lies below (orange) or above (blue) its interval, {100 * float((seen != 0).mean()):.1f} "
            f"% of the pixels shown; {100 * (1 - level):.0f} % are expected where the spread is right."
        )
    for axes in grid[0, 1:]:
        _inner(axes, left=False, bottom=True)
    alt = f"{quantity.title}maps of the lower end, upper end and width of the {100 * level:.0f} % intervals."
    return finish(figure, alt, caption + slice_note(space), kept(space, shows))


def _where(quantity: Quantity) -> Any:  # noqa: ANN401  (an index)
    return ... if quantity.mask is None else quantity.mask


def _phase_intervals(quantity: Quantity, grid: np.ndarray, ends: tuple[Tensor, Tensor], level: float) -> None:
    """Ends as cyclic colours, and the width, where the phase means something."""
    space = quantity.space
    cyclic = Look("twilight", -math.pi, math.pi, "phase (rad)")
    tail = 50 * (1 - level)
    figure = grid[0, 0].get_figure()
    for axes, end, name in zip(
        grid[0], ends, (f"lower end ({tail:g} %)", f"upper end ({100 - tail:g} %)"), strict=False
    ):
        made = _drawn(axes, quantity, wrapped(end), cyclic, name)
    scale(figure, made, grid[0, :2], cyclic)
    width = shown(space, ends[1] - ends[0])
    look = Look("viridis", 0.0, max(limits(width)[1], 1e-300), "width (rad)")
    wide = _drawn(grid[0, 2], quantity, ends[1] - ends[0], look, f"width of the {100 * level:.0f} % interval")
    scale(figure, wide, grid[0, 2], look, width)


def _hits(axes: Axes, quantity: Quantity, low: Tensor, high: Tensor) -> np.ndarray:
    """Where the truth falls outside: -1 below, 0 inside, 1 above."""
    from matplotlib.colors import ListedColormap

    truth = quantity.truth
    assert truth is not None  # the caller looked
    hit = quantity.seen((truth > high).double() - (truth < low).double())
    flat = shown(quantity.space, hit)
    look = Look("PuOr", -1.5, 1.5, "")
    made = image(axes, quantity.space, flat, look)
    made.set_cmap(ListedColormap([ORANGE, "#88888830", BLUE]).with_extremes(bad="none"))
    axes.set_title("truth outside", fontsize=9.5)
    return flat
