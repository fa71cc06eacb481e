"""Two more figures of one quantity: averages over regions, and what the data determined."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from recon.diagnostics.spread import GROUP
from recon.plot.canvas import Look, draw, legend, limits, scale, shown, slice_note
from recon.plot.checks import region_means, spread_skill
from recon.plot.checks import regions as draw_regions
from recon.plot.inputs import labelled_array
from recon.plot.maps import checked_intervals, refusal
from recon.report.figures import kept
from recon.report.panels import Picture, finish, new_figure
from recon.report.quantities import Quantity
from recon.report.verdict import bare, number

if TYPE_CHECKING:
    import xarray as xr


def regions(quantity: Quantity, given: dict[str, Any] | None = None) -> Picture | None:
    """Mean over each region with its intervals, and the truth's; None for a phase, or where there is only the whole."""
    ensemble = quantity.ensemble
    if quantity.kind == "phase" or not bool(torch.isfinite(ensemble.x).all()):
        return None
    masks = quantity.regions(given)
    if len(masks) < 2 or len(ensemble) < 2:
        return None
    figure, grid = new_figure(0.9 + 0.24 * len(masks), 1, 1)
    draw_regions(ensemble, masks, grid[0, 0], quantity.truth, centred=True)
    legend(grid[0, 0], ncols=4, loc="lower left", bbox_to_anchor=(0, 1))
    means = region_means(ensemble, masks)
    std = means.std()
    worst, unit = int(std.argmax()), bare(quantity.unit)
    caption = (
        f"{quantity.title}Averages over regions, relative to their posterior mean. They come from the same draws and show "
        f"wrong correlations between pixels, which maps of single pixels cannot. Least certain: {list(masks)[worst]}, "
        f"± {number(float(std[worst]), 2)} {unit} (1 sd)."
    )
    data = {"mean": labelled_array(means.mean(), means.space, "mean"), "std": labelled_array(std, means.space, "std")}
    if quantity.truth is not None and not refusal(means, 0.9):
        maps = checked_intervals(means, 0.9)
        known = torch.tensor([float(quantity.truth[mask].double().mean()) for mask in masks.values()])
        assert maps.low is not None  # refusal was empty
        assert maps.high is not None
        out = int(((known < maps.low) | (known > maps.high)).sum())
        caption += f" The truth is outside the 90 % interval in {out} of {len(masks)}."
    return finish(figure, f"{quantity.title}mean of each region with its intervals.", caption, data)


def determined(quantity: Quantity) -> Picture | None:
    """What is left of the prior's spread, and whether error follows spread; None without either."""
    space, share = quantity.space, quantity.determined
    ensemble, truth = quantity.flat()
    enough = len(ensemble) >= 4 and ensemble.ess > 3 and ensemble.space.size >= 2 * GROUP and quantity.kind != "phase"
    compared = (
        truth is not None and enough and bool(torch.isfinite(ensemble.x).all()) and bool(torch.isfinite(truth).all())
    )
    if share is None and not compared:
        return None
    figure, grid = new_figure(3.3, 1, 2)
    places = iter(grid[0])
    alts, captions = [], []
    data: dict[str, xr.DataArray] = {}
    if share is not None:
        left = 100 * (1 - share).clamp(min=0).sqrt()
        look = Look("cividis", 0.0, max(limits(shown(space, left))[1], 1e-9), "std left of the prior's (%)")
        axes = next(places)
        made = draw(axes, space, left, look, "posterior std / prior std")
        if made is not None:
            scale(figure, made, axes, look, shown(space, left))
        data |= kept(space, {"posterior std over prior std": left / 100})
        alts.append("posterior standard deviation as a share of the prior's")
        captions.append(
            f"The data removed {number(100 * float(share.mean()))} % of the prior's variance (mean over pixels); a pixel at "
            f"100 % of the prior's std was decided by the prior alone.{slice_note(space)}"
        )
    if truth is not None and compared:
        axes = next(places)
        spread_skill(ensemble, truth, axes)
        alts.append("rms error against rms std, in groups of pixels")
        captions.append(
            "Above the dotted line, errors are larger than the spread says (over-confident); below, over-cautious."
        )
        points = axes.lines[1].get_xydata()
        data["spread and error"] = _table(np.asarray(points), ("spread", "error"), space.unit)
    for axes in places:
        axes.set_axis_off()
    return finish(figure, quantity.title + "; ".join(alts) + ".", quantity.title + " ".join(captions), data)


def _table(values: np.ndarray, columns: tuple[str, ...], unit: str) -> xr.DataArray:
    import xarray as xr

    return xr.DataArray(values, dims=("group", "column"), coords={"column": list(columns)}, attrs={"units": unit})
