"""The figures of a report, in the order of its sections: each makes a ``Picture`` of the evidence (None without data)."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from recon.diagnostics.spread import GROUP, determined, draws_needed, reliability
from recon.report.evidence import Evidence
from recon.report.panels import (
    BLUE,
    GREEN,
    INKED,
    ORANGE,
    WIDTH,
    Look,
    Picture,
    curve,
    draw,
    finish,
    legend,
    limits,
    new_figure,
    scale,
    shown,
    slice_note,
    tidy,
)
from recon.report.panels import axis as positions
from recon.report.verdict import bare, number

COLUMNS = 4
MOST = 8  # panels of one figure


def unit_label(what: str, unit: str) -> str:
    """``what (unit)``, or ``what`` alone for dimensionless data."""
    return what if unit in ("1", "") else f"{what} ({unit})"


def images(evidence: Evidence) -> Picture:
    """Mean, two draws, truth and baselines at one grey scale; intervals along the axis for one-dimensional data."""
    ensemble, space = evidence.ensemble, evidence.ensemble.space
    if len(space.dims) == 1:
        return _intervals(evidence)
    shows: dict[str, Tensor] = {} if evidence.truth is None else {"truth": evidence.truth}
    shows["posterior mean"] = ensemble.mean()
    shows |= {f"draw {d}": ensemble.x[d] for d in range(min(2, len(ensemble)))}
    shows |= {name: value for name, value in evidence.baselines.items() if name not in shows}
    left_out = list(shows)[MOST:]
    shows = dict(list(shows.items())[:MOST])
    flat = {name: shown(space, value) for name, value in shows.items()}
    guide = flat.get("truth", flat["posterior mean"])
    look = Look("gray", *limits(guide, share=0.1), unit_label("value", space.unit))
    columns = 3 if len(shows) in (5, 6, 9) else min(COLUMNS, len(shows))
    rows = math.ceil(len(shows) / columns)
    tall = min(1.5, max(0.4, space.shape[-2] / space.shape[-1]))
    figure, grid = new_figure(0.5 + rows * (0.4 + tall * (WIDTH - 1.4) / max(columns, 3)), rows, columns)
    for k, (axes, (name, value)) in enumerate(zip(grid.flat, shows.items(), strict=False)):
        made = draw(axes, space, value, look, name)
        if k % columns:
            axes.set_ylabel("")
            axes.tick_params(labelleft=False)
        if k + columns < len(shows):
            axes.set_xlabel("")
            axes.tick_params(labelbottom=False)
    for axes in grid.flat[len(shows) :]:
        axes.set_axis_off()
    scale(figure, made, grid, look, *flat.values())
    alt = f"Images side by side at one grey scale: {', '.join(shows)}."
    omitted = f" Not shown: {', '.join(left_out)}." if left_out else ""
    reference = "truth" if "truth" in shows else "posterior mean"
    caption = (
        f"All panels share one grey scale, {number(look.low)} to {number(look.high)} {bare(space.unit)} (the range of the "
        f"{reference}); pointed ends of the bar mean that values lie beyond it.{slice_note(space)}{omitted}"
    )
    return finish(figure, alt, caption)


def _intervals(evidence: Evidence) -> Picture:
    ensemble, space = evidence.ensemble, evidence.ensemble.space
    figure, grid = new_figure(3.6, 1, 1)
    axes = grid[0, 0]
    x, _ = positions(space, space.dims[0])
    bands = [level for level in (0.9, 0.5) if ensemble.ess >= draws_needed(level) - 1e-6]
    for level, alpha in zip(bands, (0.2, 0.35)[2 - len(bands) :], strict=True):
        low, high = (v.numpy() for v in ensemble.quantile([(1 - level) / 2, (1 + level) / 2]))
        half = 0.5 if len(x) > 1 else 0.05
        label = f"{100 * level:.0f} % interval"
        if len(x) <= 40:
            axes.bar(x, high - low, 0.7 * half, low, color=BLUE, alpha=alpha, label=label)
        else:
            axes.fill_between(x, low, high, color=BLUE, alpha=alpha, linewidth=0, label=label)
    few = len(x) <= 40
    line = "none" if few else "-"
    for d in range(min(2, len(ensemble))):
        faint = {"color": BLUE, "alpha": 0.5, "linewidth": 0.7, "markersize": 2.5}
        curve(axes, space, ensemble.x[d], linestyle=line, label=f"draw {d}", **faint)
    for color, (name, value) in zip((ORANGE, GREEN, "#b07aa1", "#9c755f"), evidence.baselines.items(), strict=False):
        curve(axes, space, value, color=color, linestyle=line if few else "--", label=name)
    curve(axes, space, ensemble.mean(), color=BLUE, linewidth=1.8, linestyle=line, label="posterior mean")
    if evidence.truth is not None:
        mark = {"marker": "x", "markersize": 6} if few else {}
        curve(axes, space, evidence.truth, gid=INKED, linewidth=1.0, linestyle=line, label="truth", **mark)
    axes.set_ylabel(unit_label("value", space.unit), fontsize=8.5)
    legend(axes, ncols=4, loc="lower left", bbox_to_anchor=(0, 1))
    tidy(axes)
    held = " and ".join(f"{100 * level:.0f} %" for level in reversed(bands))
    alt = (
        f"Posterior mean along {space.dims[0]}"
        + (f" with intervals of {held}" if held else "")
        + ", draws and references."
    )
    caption = f"Shaded: intervals of {held} from the draws." if held else "Too few draws for intervals."
    return finish(figure, alt, caption)


def uncertainty(evidence: Evidence) -> Picture | None:
    """Standard deviation in data units; with a truth also the error at the same scale, and their ratio.  None for one draw."""
    ensemble, space = evidence.ensemble, evidence.ensemble.space
    if len(ensemble) < 2:
        return None
    std, unit = ensemble.std(), bare(space.unit)
    error = None if evidence.truth is None else ensemble.mean() - evidence.truth
    parts = [shown(space, std)] + ([] if error is None else [np.abs(shown(space, error))])
    look = Look("viridis", 0.0, max(limits(*parts)[1], 1e-300), unit_label("std", space.unit))
    figure, grid = new_figure(3.1 if error is not None else 3.4, 1, 3 if error is not None else 2)
    made = draw(grid[0, 0], space, std, look, "posterior std")
    if error is None:
        _histogram(grid[0, 1], parts[0], look)
        if made is not None:
            scale(figure, made, grid[0, :1], look, *parts)
        note = f"Median std {number(float(np.nanmedian(parts[0])) if np.isfinite(parts[0]).any() else None)} {unit}."
        alt = "Map of the posterior standard deviation and its histogram over pixels."
        return finish(figure, alt, f"Where and by how much the draws differ. {note}{slice_note(space)}")
    look_error = replace(look, label=unit_label("|error|", space.unit))
    draw(grid[0, 1], space, error.abs(), look_error, "|mean − truth|")
    ratio = torch.where(std > 0, error / std, torch.nan)
    signed = Look("PuOr", -4.0, 4.0, "error / std")
    made_ratio = draw(grid[0, 2], space, ratio, signed, "(mean − truth) / std")
    if made is not None:
        both = replace(look, label=unit_label("std and |error|", space.unit))
        scale(figure, made, grid[0, :2], both, *parts)
        scale(figure, made_ratio, grid[0, 2:], signed, shown(space, ratio))
        for axes in grid[0, 1:]:
            axes.set_ylabel("")
    else:
        top = 1.05 * max(limits(*parts, share=0.0)[1], 1e-300)
        grid[0, 0].set_ylim(0, top)
        grid[0, 1].set_ylim(0, top)
        for axes in grid[0]:
            tidy(axes)
    beyond = shown(space, ratio)
    beyond = beyond[np.isfinite(beyond)]
    share = f"{100 * float((np.abs(beyond) > 2).mean()):.1f} %" if beyond.size else "–"
    caption = (
        f"Spread and error at one scale; right: error in units of the spread. |error| exceeds 2 std in {share} of the pixels "
        f"shown (about 5 % where the spread is right and errors are Gaussian).{slice_note(space)}"
    )
    return finish(
        figure, "Posterior standard deviation, absolute error of the mean, and error divided by std.", caption
    )


def _histogram(axes: object, values: np.ndarray, look: Look) -> None:
    finite = values[np.isfinite(values)]
    axes.hist(np.clip(finite, look.low, look.high), bins=40, range=(look.low, look.high), color=BLUE)  # type: ignore[attr-defined]
    axes.set_xlabel(look.label, fontsize=8.5)  # type: ignore[attr-defined]
    axes.set_ylabel("pixels", fontsize=8.5)  # type: ignore[attr-defined]
    axes.set_title("histogram of the std", fontsize=9.5)  # type: ignore[attr-defined]
    tidy(axes)  # type: ignore[arg-type]


def measurement(evidence: Evidence) -> Picture:
    """What was measured, and what the draws leave unexplained in units of the noise."""
    space, residual = evidence.range, evidence.fit.residual
    figure, grid = new_figure(3.3, 1, 2)
    flat = shown(space, evidence.measurement), shown(space, residual)
    look = Look("gray", *limits(flat[0], share=0.1), unit_label("measured", space.unit))
    widest = max(4.0, min(8.0, float(np.ceil(max(abs(v) for v in limits(flat[1], share=0.01))))))
    signed = Look("PuOr", -widest, widest, "residual / noise std")
    for axes, values, one, title, part in zip(
        grid[0],
        (evidence.measurement, residual),
        (look, signed),
        ("measurement", "whitened residual"),
        flat,
        strict=True,
    ):
        made = draw(axes, space, values, one, title)
        if made is None:
            tidy(axes)
        else:
            scale(figure, made, axes, one, part)
    finite = flat[1][np.isfinite(flat[1])]
    rms = number(float(np.sqrt(np.mean(finite**2))) if finite.size else None)
    caption = (
        f"Right: (measurement − prediction) / noise std, averaged over the draws (rms {rms}; the average lies somewhat below 1 "
        f"when all is well). Streaks, edges or rings there are model error that χ² averages away.{slice_note(space)}"
    )
    return finish(figure, "The measurement, and the whitened residual averaged over draws.", caption)


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
    left.set(xlabel="draw", ylabel=symbol)
    left.margins(x=0.05, y=0.15)
    x, label = positions(evidence.range, result.view_dim)
    view, sd = result.per_view.numpy(), result.per_view_sd.numpy()
    if len(x) > 1:
        right.fill_between(x, 1 - 2 * sd, 1 + 2 * sd, color=GREEN, alpha=0.2, linewidth=0)
    right.plot(x, view, color=BLUE, linewidth=1, marker="o" if len(x) <= 40 else None, markersize=3)
    right.set(xlabel=label, ylabel=f"{symbol} along {result.view_dim}")
    for axes in (left, right):
        axes.xaxis.label.set_size(8.5)
        axes.yaxis.label.set_size(8.5)
        tidy(axes)
    figure.legend(*left.get_legend_handles_labels(), fontsize=8, frameon=False, ncols=3, loc="outside upper left")
    caption = (
        f"Mean over draws {number(result.ratio, 4)}, expected 1 ± {number(result.ratio_sd, 2)} (sd of one exact draw). "
        f"The draws share one measurement, so they move together. The posterior mean ({number(below, 4)}) must not be "
        "judged against 1: it is expected to lie below, because it follows part of the noise."
    )
    return finish(
        figure, f"{symbol} of each draw and along {result.view_dim}, with the expected band around 1.", caption
    )


def split(evidence: Evidence) -> Picture | None:
    """What the data determined (against the prior's spread) and whether error follows spread; None without either."""
    ensemble, space, truth = evidence.ensemble, evidence.ensemble.space, evidence.truth
    prior = evidence.prior_std
    usable = prior is not None and bool((prior > 0).all())
    fraction = determined(ensemble, prior.double() ** 2) if prior is not None and usable else None
    compared = truth is not None and len(ensemble) >= 4 and ensemble.ess > 3 and space.size >= 2 * GROUP
    if fraction is None and not compared:
        return None
    figure, grid = new_figure(3.3, 1, 2)
    places = iter(grid[0])
    alts, captions = [], []
    if fraction is not None:
        look = Look("cividis", 0.0, 1.0, "1 − Var(posterior) / Var(prior)")
        axes = next(places)
        made = draw(axes, space, fraction, look, "determined by the data")
        if made is not None:
            scale(figure, made, axes, look, shown(space, fraction))
        alts.append("Fraction of the prior's variance that the data removed")
        captions.append(
            f"1: the data decided; 0: the prior did (mean {number(float(fraction.mean()))}).{slice_note(space)}"
        )
    if truth is not None and compared:
        axes = next(places)
        spread, error = reliability(ensemble, truth)
        top = max(limits(np.array([*spread, *error]), share=0)[1], 1e-300) * 1.08
        axes.plot([0, top], [0, top], gid=INKED, linewidth=0.8, linestyle=":", label="error = spread")
        axes.plot(spread, error, "o", color=BLUE, markersize=5, label="groups of pixels by std")
        axes.set(xlim=(0, top), ylim=(0, top))
        axes.set_xlabel(unit_label("spread: rms std", space.unit), fontsize=8.5)
        axes.set_ylabel(unit_label("rms error of the mean", space.unit), fontsize=8.5)
        axes.set_title("error against spread", fontsize=9.5)
        legend(axes)
        tidy(axes)
        alts.append("rms error against rms std, in groups of pixels")
        captions.append(
            "Above the dotted line, errors are larger than the spread says (over-confident); below, over-cautious."
        )
    for axes in places:
        axes.set_axis_off()
    return finish(figure, "; ".join(alts) + ".", " ".join(captions))
