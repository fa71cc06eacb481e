"""The figures of the measurement and of the run: residuals, fit, groups of data, the split of data and prior, particles."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recon.ensemble import labelled
from recon.plot.canvas import (
    BLUE,
    FEW,
    GREEN,
    ORANGE,
    Look,
    draw,
    labels,
    limits,
    scale,
    short_unit,
    shown,
    slice_note,
    tidy,
    unit_label,
)
from recon.plot.canvas import axis as positions
from recon.plot.checks import group_fit
from recon.plot.checks import particles as draw_particles
from recon.plot.inputs import labelled_array
from recon.report.evidence import Evidence
from recon.report.panels import Picture, finish, new_figure
from recon.report.quantities import unit_of, without
from recon.report.verdict import number, outside_places
from recon.space import Space

ROWS = 6  # variables of one figure


def measurement(evidence: Evidence) -> Picture:
    """What was measured, in its unit or units, and what the draws leave unexplained in units of the noise."""
    table = evidence.facts.get("stations")
    if isinstance(table, dict) and _mapped(evidence, table):
        return _stations(evidence, table)
    parts = _parts(evidence)
    figure, grid = new_figure(0.3 + 3.0 * len(parts), len(parts), 2)
    residual = evidence.fit.residual
    flat = np.concatenate([shown(space, r).ravel() for _, space, _, r in parts])
    widest = max(4.0, min(8.0, float(np.ceil(max(abs(v) for v in limits(flat, share=0.01))))))
    signed = Look("PuOr", -widest, widest, "residual / noise std")
    data: dict[str, Any] = {}
    for row, (name, space, values, left) in zip(grid, parts, strict=True):
        look = Look("gray", *limits(shown(space, values), share=0.1), unit_label("measured", space.unit))
        of = f" of {name}" if name else ""
        for axes, array, one, title in zip(
            row, (values, left), (look, signed), ("measurement", "whitened residual"), strict=True
        ):
            made = draw(axes, space, array, one, title + of)
            if made is None:
                tidy(axes)
            else:
                scale(figure, made, axes, one, shown(space, array))
        data |= {
            f"measured{of}": labelled_array(values, space),
            f"whitened residual{of}": labelled_array(left, _plain(space)),
        }
    caption = f"{_residual_words(residual)}{slice_note(parts[0][1])}{_more(len(parts), evidence)}"
    return finish(figure, "The measurement, and the whitened residual averaged over draws.", caption, data)


def _residual_words(residual: Tensor) -> str:
    finite = residual[torch.isfinite(residual)]
    rms = number(float(finite.square().mean().sqrt()) if finite.numel() else None)
    return (
        f"Residual: (measurement − prediction) / noise std, averaged over the draws (rms {rms}; the average lies somewhat "
        "below 1 when all is well). Streaks, edges or rings there are model error that χ² averages away."
    )


def _plain(space: Space) -> Space:
    return Space(space.dims, space.shape, space.coords, "1")


def _parts(evidence: Evidence) -> list[tuple[str, Space, Tensor, Tensor]]:
    """The measurement variable by variable: name, space, values, residual; whole where it has no axis of variables."""
    space, values, residual = evidence.range, evidence.measurement, evidence.fit.residual
    names = space.coords.get("variable")
    if not isinstance(names, tuple) or len(space.dims) < 2:
        return [("", space, values, residual)]
    axis, units = space.dims.index("variable"), evidence.facts.get("units") or {}
    parts = []
    for i, name in enumerate(names[:ROWS]):
        one = without(space, axis, unit_of(str(name), space, units))
        parts.append((str(name), one, values.select(axis, i), residual.select(axis, i)))
    return parts


def _more(rows: int, evidence: Evidence) -> str:
    names = evidence.range.coords.get("variable")
    return f" Not shown: {', '.join(map(str, names[rows:]))}." if names is not None and len(names) > rows > 1 else ""


def _mapped(evidence: Evidence, table: dict[str, Any]) -> bool:
    """Whether the data are numbers at places on a plane that the field has."""
    space, count = evidence.ensemble.space, evidence.range.size
    dims = [d for d in space.dims if d in table and d != "variable"]
    return len(evidence.range.dims) == 1 and len(dims) == 2 and all(len(table[d]) == count for d in dims)


def _stations(evidence: Evidence, table: dict[str, Any]) -> Picture:
    """Maps of what stations measured and of their residuals, one column per variable, each with its unit."""
    space, count = evidence.ensemble.space, evidence.range.size
    dims = [d for d in space.dims if d in table and d != "variable"]
    (y, y_unit), (x, x_unit) = (labelled(d, np.asarray(table[d], dtype=np.float64)) for d in dims)
    variables = table.get("variable") or [""] * count
    units = table.get("unit") or [evidence.range.unit] * count
    names = list(dict.fromkeys(variables))[:ROWS]
    figure, grid = new_figure(5.0, 2, len(names))
    values, residual = (np.asarray(v.cpu(), dtype=np.float64) for v in (evidence.measurement, evidence.fit.residual))
    widest = max(4.0, min(8.0, float(np.ceil(np.nanmax(np.abs(residual), initial=0.0)))))
    signed = Look("PuOr", -widest, widest, "residual / noise std")
    data: dict[str, Any] = {}
    for k, name in enumerate(names):
        mine = np.array([v == name for v in variables])
        unit = units[int(np.flatnonzero(mine)[0])]
        look = Look("viridis", *limits(values[mine], share=0), unit_label(name or "measured", unit))
        for axes, array, one in zip(grid[:, k], (values, residual), (look, signed), strict=True):
            style = {"cmap": one.cmap, "norm": one.norm(), "s": 46, "edgecolors": "#777777", "linewidths": 0.6}
            made = axes.scatter(x[mine], y[mine], c=array[mine], **style)
            scale(figure, made, axes, one)
            labels(axes, _axis_label(dims[1], x_unit), _axis_label(dims[0], y_unit) if k == 0 else "")
            axes.margins(0.12)
            tidy(axes)
        data |= _rows({"measured": values, "whitened residual": residual, dims[0]: y, dims[1]: x}, mine, name, unit)
    caption = (
        f"Stations: measured values (top) and whitened residuals (bottom). {_residual_words(evidence.fit.residual)}"
    )
    return finish(figure, "Maps of the stations with what they measured and with their residuals.", caption, data)


def _axis_label(dim: str, attrs: dict[str, str]) -> str:
    unit = short_unit(attrs)
    return f"{dim} ({unit})" if unit else dim


def _rows(columns: dict[str, np.ndarray], mine: np.ndarray, name: str, unit: str) -> dict[str, Any]:
    import xarray as xr

    of = f" of {name}" if name else ""
    attrs = {"measured": {"units": unit}}
    return {
        f"{column}{of}": xr.DataArray(values[mine], dims=(f"station{of}",), attrs=attrs.get(column, {}))
        for column, values in columns.items()
    }


def fit(evidence: Evidence) -> Picture:
    """chi2/m of each draw and along the first dim of the measurement, with what an exact sampler gives."""
    result = evidence.fit
    symbol = "χ²/m" if result.statistic == "chi2" else "deviance / expected"
    figure, grid = new_figure(2.9, 1, 2, width_ratios=(1, 1.4))
    left, right = grid[0]
    ratios = result.chi2.numpy() / result.expected if result.expected > 0 else np.full(len(result.chi2), np.nan)
    left.axhspan(
        1 - 2 * result.ratio_sd, 1 + 2 * result.ratio_sd, color=GREEN, alpha=0.2, linewidth=0, label="1 ± 2 sd"
    )
    left.plot(np.arange(len(ratios)), ratios, "o", color=BLUE, markersize=4, label="draws")
    below = result.mean_chi2 / result.expected if result.expected > 0 else math.nan
    left.axhline(below, color=ORANGE, linewidth=1.2, linestyle="--", label="posterior mean (below 1 by design)")
    left.margins(x=0.05, y=0.15)
    view, sd = result.per_view.numpy(), result.per_view_sd.numpy()
    labels(left, "draw", symbol)
    found = _groups_of(evidence).get(result.view_dim)
    if found:
        group_fit(found, right)
    else:
        x, label = positions(evidence.range, result.view_dim)
        if len(x) > 1:
            right.fill_between(x, np.maximum(0, 1 - 2 * sd), 1 + 2 * sd, color=GREEN, alpha=0.2, linewidth=0)
        right.plot(x, view, color=BLUE, linewidth=1, marker="o" if len(x) <= FEW else None, markersize=3)
        labels(right, label, symbol)
    right.set_title(f"along {result.view_dim}" + (": " + _outside(found) if found else ""), fontsize=9.5)
    for axes in (left, right):
        tidy(axes)
    figure.legend(*left.get_legend_handles_labels(), fontsize=8, frameon=False, ncols=3, loc="upper left")
    caption = (
        f"Mean over draws {number(result.ratio, 4)}, expected 1 ± {number(result.ratio_sd, 2)} (sd of one exact draw). "
        f"The draws share one measurement, so they move together. The posterior mean ({number(below, 4)}) must not be "
        "judged against 1: it is expected to lie below, because it follows part of the noise."
    )
    along = (result.view_dim, evidence.range)
    data = {"ratio of each draw": _line(ratios, "draw"), f"ratio along {result.view_dim}": _line(view, *along)}
    data["sd along it"] = _line(sd, *along)
    return finish(
        figure, f"{symbol} of each draw and along {result.view_dim}, with the expected band around 1.", caption, data
    )


def _line(values: np.ndarray, dim: str, space: Space | None = None) -> Any:  # noqa: ANN401  (a DataArray)
    """Dimensionless values along ``dim``, at its places in ``space``."""
    import xarray as xr

    place = None if space is None else space.coords.get(dim)
    coords = {} if place is None else {dim: (dim, *labelled(dim, place))}
    return xr.DataArray(np.asarray(values), coords, (dim,))


def _groups_of(evidence: Evidence) -> dict[str, Any]:
    """Groups of more than one place, by dim."""
    found = (evidence.facts.get("residuals") or {}).get("groups") or []
    return {g["dim"]: g for g in found if len(g["labels"]) > 1}


def _outside(group: dict[str, Any]) -> str:
    return f"{len(group['outside'])} of {len(group['labels'])} outside{outside_places(group)}"


def groups(evidence: Evidence) -> Picture | None:
    """chi2/m of groups of data with their limits, one panel per further dim of the measurement; None where there is none."""
    every = _groups_of(evidence)
    found = [g for dim, g in every.items() if dim != evidence.fit.view_dim][:3]
    if not found:
        return None
    figure, grid = new_figure(2.7, 1, len(found))
    data = {}
    for axes, group in zip(grid[0], found, strict=True):
        group_fit(group, axes)
        for name in ("ratio", "low", "high"):
            column = np.array([np.nan if v is None else v for v in group[name]])
            data[f"{name} by {group['dim']}"] = _line(column, group["dim"], evidence.range)
    words = "; ".join(f"{g['dim']}: {_outside(g)}" for g in found)
    caption = (
        f"χ²/m by place, averaged over draws. {words}. Green: where all groups of an exact sampler lie, but for a "
        f"false alarm at a rate of {number(found[0]['false_alarm'])} per panel. A group above has model error or too small a "
        "stated noise."
    )
    return finish(figure, "χ²/m of groups of data along the dimensions of the measurement, with limits.", caption, data)


def split(evidence: Evidence) -> Picture | None:
    """Variance of the draws in what the data see, in what they do not, and between the two; the prior's part of the mean."""
    found, space = evidence.split, evidence.ensemble.space
    if found is None or found.data is None or found.prior is None or found.cross is None or len(space.dims) < 2:
        return None
    summary = found.summary()
    figure, grid = new_figure(2.9, 1, 4)
    maps = {"seen by the data": found.data, "not seen": found.prior, "2 × covariance": found.cross}
    top = max(limits(*[shown(space, v.abs()) for v in maps.values()])[1], 1e-300)
    unit = "1" if space.unit in ("1", "") else f"({space.unit})²"
    variance = Look("PuOr", -top, top, unit_label("variance", unit))
    for axes, (name, values) in zip(grid[0], maps.items(), strict=False):
        made = draw(axes, space, values, variance, name)
    scale(figure, made, grid[0, :3], variance, *[shown(space, v) for v in maps.values()])
    flat = shown(space, found.null_mean)
    widest = max(abs(v) for v in limits(flat))
    look = Look("PuOr", -widest, widest, unit_label("value", space.unit))
    made = draw(grid[0, 3], space, found.null_mean, look, "prior's part of the mean")
    scale(figure, made, grid[0, 3], look, flat)
    for axes in grid[0, 1:]:
        axes.set_ylabel("")
    shares = [number(100 * (summary[f"{n}_share"] or 0.0)) for n in ("data", "prior", "cross")]
    caption = (
        f"Of the draws' variance {shares[0]} % lies where the data see, {shares[1]} % where they do not, {shares[2]} % between "
        f"the two. A direction counts as seen where a change of one prior std stands out of the noise (filter "
        f"{number(found.filter)}). Right: what the data could not have asked for in the mean: features there come from the "
        f"prior.{slice_note(space)}"
    )
    data = {name: labelled_array(v, space) for name, v in maps.items()} | {
        "null mean": labelled_array(found.null_mean, space)
    }
    return finish(
        figure, "Maps of the variance seen and not seen by the data, and of the mean's null part.", caption, data
    )


def particles(evidence: Evidence) -> Picture | None:
    """What coupled particles noted at every step; None for draws that never met."""
    kept = evidence.ensemble.info.get("particles") or {}
    steps = kept.get("steps")
    if not steps:
        return None
    figure, grid = new_figure(2.8, 1, 3)
    draw_particles(kept, grid[0])
    caption = (
        f"Effective number and distinct ancestors of {len(evidence.ensemble)} particles before each resampling (thin lines: "
        f"{kept['resamplings']} resamplings), the largest weight, and the evidence so far. At the end {kept['ancestors']} "
        f"particles of the start have descendants; log evidence {number(kept['log_evidence'], 5)} ± "
        f"{number(kept['log_evidence_error'], 2)}."
    )
    data = {name: _line(np.array(values, dtype=np.float64), "step") for name, values in steps.items()}
    return finish(figure, "Effective sample size, ancestors, largest weight and log evidence by step.", caption, data)
