"""What the data determined, coarse structures to fine ones: a curve over spatial frequency."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from recon.plot.canvas import INKED, SERIES, labels, legend, tidy
from recon.report.evidence import Evidence
from recon.report.panels import Picture, finish, new_figure
from recon.report.verdict import number
from recon.space import Space

HALF = 0.5


def bands(evidence: Evidence) -> Picture | None:
    """Share of the prior's variance that the data removed, by band of spatial frequency; None where it was not computed."""
    import xarray as xr

    found = evidence.facts.get("bands")
    if not isinstance(found, list) or not found:
        return None
    figure, grid = new_figure(2.8, 1, 1)
    axes = grid[0, 0]
    axes.axhline(0, gid=INKED, color="0.2", linewidth=0.8)
    data: dict[str, Any] = {}
    for colour, one in zip(SERIES, found, strict=False):
        cycles = np.array(one["cycles"], dtype=np.float64)
        share, error = (100 * np.array(one[name], dtype=np.float64) for name in ("determined", "errors"))
        low, high = np.clip(share - 2 * error, -60, 130), np.clip(share + 2 * error, -60, 130)
        axes.fill_between(cycles, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.plot(cycles, share, "o-", color=colour, markersize=3, linewidth=1.2, label=one["name"] or "draws")
        of = f" of {one['name']}" if one["name"] else ""
        for name, values in ((f"determined{of}", share / 100), (f"standard error{of}", error / 100)):
            place = {"cycles": ("cycles", cycles, {"units": "per field of view"})}
            data[name] = xr.DataArray(values, place, ("cycles",), attrs={"units": "1"})
    bottom = min(float(100 * min(one["determined"])) for one in found)
    axes.set_ylim(min(-5.0, max(-60.0, 1.1 * bottom)), 105)
    labels(axes, "cycles across the field of view (coarse to fine)", "determined by the data (%)")
    if len(found) > 1:
        legend(axes, ncols=5, loc="lower left", bbox_to_anchor=(0, 1))
    tidy(axes)
    words = [in_words(one, evidence.ensemble.space) for one in found]
    caption = (
        f"{' '.join(words)} At 100 % the data alone decided, at 0 % the prior did; below 0 the draws spread more than "
        f"the prior's. Shaded: 2 standard errors. Against {found[0]['draws']} draws of the prior."
    )
    return finish(figure, f"Share that the data determined, from coarse to fine structures. {words[0]}", caption, data)


def in_words(one: Mapping[str, Any], space: Space) -> str:
    """Where the data stop deciding, in words, with the size in mm where the axes are lengths."""
    share, cycles = np.array(one["determined"], dtype=np.float64), list(one["cycles"])
    name = f"{one['name']}: of" if one["name"] else "Of"
    coarse = float(share[cycles.index(1)]) if 1 in cycles else float(share[0])
    start = (
        f"{name} the coarsest structures (one cycle across the field) the data determined {number(100 * coarse, 2)} %"
    )
    below = [c for c, s in zip(cycles, share, strict=True) if s < HALF and c > 0]
    if not below:
        return f"{start}, and more than half at every size."
    size = _millimetres(space, below[0])
    if below[0] == 1:
        return f"{start}: the prior decided more than half at every size that matters."
    return f"{start}; from {below[0]} cycles on{size} the prior supplied more than half."


def _millimetres(space: Space, cycles: int) -> str:
    """Size of one cycle where the shorter of the last two axes is a length."""
    dims = [d for d in space.dims[-2:] if d in ("z", "y", "x")]
    if not dims:
        return ""
    dim = min(dims, key=lambda d: space.shape[space.dims.index(d)])
    step = space.spacing(dim)
    if step is None:
        return ""
    extent = 1e3 * abs(float(step)) * space.shape[space.dims.index(dim)]
    return f" (structures of {number(extent / cycles, 2)} mm per cycle and finer)"
