"""The figures of a volume (z, y, x): cuts, slices, the largest value along each axis, and figures per slice."""

from __future__ import annotations

from typing import Any

import numpy as np

from recon.plot.canvas import BLUE, ORANGE, Look, axis, labels, limits, tidy, unit_label
from recon.plot.inputs import labelled_array
from recon.plot.volumes import AXES, is_volume, plane, projection, slices, z_profile, zcuts
from recon.report.panels import Picture, finish, new_figure
from recon.report.quantities import Quantity
from recon.report.verdict import bare, number

SLICES = 8


def is_shown(quantity: Quantity) -> bool:
    """Whether the quantity is a volume with something to show."""
    return is_volume(quantity.space) and quantity.kind != "phase"


def cuts(quantity: Quantity) -> Picture | None:
    """Axial, coronal and sagittal cuts of the mean, of the std, and of the truth; None for what is no volume."""
    if not is_shown(quantity):
        return None
    space, ensemble = quantity.space, quantity.ensemble
    at = [n // 2 for n in space.shape]
    rows: list[tuple[str, Any, Look]] = []
    mean = ensemble.mean()
    base = mean if quantity.truth is None else quantity.truth
    grey = Look(
        "gray", *limits(*[base.select(d, i) for d, i in enumerate(at)], share=0.1), unit_label("value", space.unit)
    )
    if quantity.truth is not None:
        rows.append(("truth", quantity.truth, grey))
    rows.append(("posterior mean", mean, grey))
    if len(ensemble) > 1:
        std = ensemble.std()
        top = max(limits(*[std.select(d, i) for d, i in enumerate(at)])[1], 1e-300)
        rows.append(("posterior std", std, Look("viridis", 0.0, top, unit_label("std", space.unit))))
    figure, grid = new_figure(2.9 * len(rows), len(rows), 3)
    data = {}
    for line, (name, values, look) in zip(grid, rows, strict=True):
        zcuts(values, line, space, at, look)
        line[0].set_ylabel(f"{name}\n{line[0].get_ylabel()}", fontsize=9)
        for d, (dim, i) in enumerate(zip(AXES, at, strict=True)):
            data[f"{name}, {dim} {i}"] = labelled_array(values.select(d, i), plane(space, dim))
    caption = f"{quantity.title}Three orthogonal cuts through the middle, each row at one scale."
    return finish(figure, f"{quantity.title}orthogonal cuts: {', '.join(n for n, _, _ in rows)}.", caption, data)


def strip(quantity: Quantity) -> Picture | None:
    """Slices of the mean from the first to the last, and of the std below; None for what is no volume."""
    if not is_shown(quantity):
        return None
    space, ensemble = quantity.space, quantity.ensemble
    count = min(SLICES, space.shape[0])
    several = len(ensemble) > 1
    figure, grid = new_figure(1.75 * (2 if several else 1), 2 if several else 1, count)
    slices(ensemble.mean(), grid[0], space)
    if several:
        std = ensemble.std()
        slices(std, grid[1], space, Look("viridis", 0.0, max(limits(std)[1], 1e-300), unit_label("std", space.unit)))
    caption = (
        f"{quantity.title}{count} of {space.shape[0]} slices: posterior mean{', and std below' if several else ''}."
    )
    return finish(figure, f"{quantity.title}a strip of slices of the mean and the std.", caption)


def largest(quantity: Quantity) -> Picture | None:
    """Maximum-intensity views of the mean; None for what is no volume."""
    if not is_shown(quantity):
        return None
    figure, grid = new_figure(3.0, 1, 3)
    mean = quantity.ensemble.mean()
    projection(mean, grid[0], quantity.space)
    data = {f"along {dim}": labelled_array(mean.amax(d), plane(quantity.space, dim)) for d, dim in enumerate(AXES)}
    caption = f"{quantity.title}Largest value of the posterior mean along each axis (maximum-intensity view)."
    return finish(figure, f"{quantity.title}maximum-intensity views along z, y and x.", caption, data)


def by_slice(quantity: Quantity, figures: dict[str, Any] | None) -> Picture | None:
    """Uncertainty along z, with a truth also error, PSNR and SSIM of every slice; None for what is no volume or one draw.

    figures: the quantity's ``slices`` of ``report.json``.
    """
    if not is_shown(quantity) or figures is None or len(quantity.ensemble) < 2:
        return None
    scored = figures["psnr"] is not None
    figure, grid = new_figure(2.9, 1, 2 if scored else 1)
    z_profile(quantity.ensemble, grid[0, 0], quantity.truth)
    z, label = axis(quantity.space, "z")
    data = {name: _along(figures[name], z) for name in ("std", "rmse", "psnr", "ssim") if figures[name] is not None}
    std = np.asarray(figures["std"], dtype=np.float64)
    caption = (
        f"{quantity.title}Uncertainty by slice: rms std {number(float(std.min()))} to {number(float(std.max()))} "
        f"{bare(quantity.unit)}, largest at {label.split(' (')[0]} {number(float(z[int(std.argmax())]))}."
    )
    if scored:
        right = grid[0, 1]
        right.plot(z, _numbers(figures["psnr"]), "o-", color=BLUE, markersize=3, linewidth=1.2)
        labels(right, label, "PSNR of the mean (dB)")
        tidy(right)
        if figures["ssim"] is not None:
            other = right.twinx()
            other.plot(z, _numbers(figures["ssim"]), "s--", color=ORANGE, markersize=3, linewidth=1.0)
            other.set_ylabel("SSIM (orange)", fontsize=8.5)
        caption += f" PSNR of the slices {number(float(np.nanmin(_numbers(figures['psnr']))))} dB at least."
    return finish(figure, f"{quantity.title}std, error and similarity of every slice along z.", caption, data)


def _numbers(values: list[float | None]) -> np.ndarray:
    return np.array([np.nan if v is None else v for v in values], dtype=np.float64)


def _along(values: list[float | None], z: np.ndarray) -> Any:  # noqa: ANN401  (a DataArray)
    import xarray as xr

    return xr.DataArray(_numbers(values), dims=("z",), coords={"z": ("z", z)})
