"""Pictures of checks: regions, ranks, coverage, spread against error, groups of data, particles.

They show what ``recon.diagnostics`` found; whoever made the numbers judges them there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from recon.diagnostics.intervals import Coverage
from recon.diagnostics.ranks import RankHistogram
from recon.diagnostics.ranks import rank_histogram as count_ranks
from recon.diagnostics.residuals import GroupFit
from recon.diagnostics.spread import reliability
from recon.ensemble import Ensemble
from recon.errors import InputError
from recon.plot.canvas import BLUE, FEW, GREEN, INKED, ORANGE, RED, labels, legend, limits, tidy, unit_label
from recon.plot.inputs import ensemble_of, places, values_of
from recon.plot.maps import checked_intervals, refusal
from recon.space import Space

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Artists = list[Any]


def region_means(ensemble: Ensemble, masks: Mapping[str, Tensor]) -> Ensemble:
    """The average of every draw over each region: an ensemble on the dim ``region``, with the same weights and past.

    masks: name -> bool *space.  Raises InputError for masks that do not fit or are empty, or none.
    """
    space = ensemble.space
    if not masks:
        raise InputError("there is no region to average over")
    columns = []
    for name, mask in masks.items():
        mask = torch.as_tensor(mask).cpu()
        if mask.dtype != torch.bool or tuple(mask.shape) != space.shape or not bool(mask.any()):
            raise InputError(f"region {name!r} must be a mask (bool) of {space.describe()} with at least one pixel")
        columns.append(ensemble.x[:, mask].double().mean(1))
    line = Space(("region",), (len(masks),), {"region": tuple(masks)}, space.unit)
    return Ensemble(torch.stack(columns, 1), line, ensemble.log_weights, ensemble.info)


def regions(
    ensemble: Any,  # noqa: ANN401
    masks: Mapping[str, Any],
    axes: Axes,
    truth: Any = None,  # noqa: ANN401
    centred: bool = False,
) -> Artists:
    """Mean of each region with its 90 and 50 % intervals, where the draws allow them, and the truth's.

    masks: name -> bool *space, tensors or DataArrays.  centred: show the difference to the posterior mean of each region, so
    that narrow intervals of far apart regions can be seen.  Raises InputError for masks or a truth that do not fit.
    """
    found = ensemble_of(ensemble)
    bools = {name: values_of(mask, found.space) for name, mask in masks.items()}
    means = region_means(found, bools)
    centre = means.mean().numpy()
    base = centre if centred else np.zeros_like(centre)
    rows = np.arange(len(bools))
    made: Artists = []
    for level, width, alpha in ((0.9, 3.0, 0.45), (0.5, 7.0, 0.55)):
        if refusal(means, level):
            continue
        maps = checked_intervals(means, level)
        assert maps.low is not None  # refusal was empty
        assert maps.high is not None
        low, high = maps.low.numpy() - base, maps.high.numpy() - base
        style: dict[str, Any] = {
            "color": BLUE,
            "linewidth": width,
            "alpha": alpha,
            "label": f"{100 * level:.0f} % interval",
        }
        made.append(axes.hlines(rows, low, high, **style))
    made += axes.plot(centre - base, rows, "o", color=BLUE, markersize=4, label="posterior mean")
    if truth is not None:
        known = values_of(truth, found.space).double()
        values = np.array([float(known[mask].mean()) for mask in bools.values()]) - base
        made += axes.plot(values, rows, "|", gid=INKED, color="0.2", markersize=13, markeredgewidth=1.8, label="truth")
    axes.set_yticks(rows, list(bools))
    axes.set_ylim(len(rows) - 0.5, -0.5)
    what = "mean over the region, less its posterior mean" if centred else "mean over the region"
    labels(axes, unit_label(what, found.space.unit), "")
    tidy(axes)
    return made


def rank_histogram(
    ranks: RankHistogram | Sequence[float] | np.ndarray, axes: Axes, draws: int | None = None
) -> Artists:
    """Counts of randomised ranks with the band in which all bins lie together; bins outside are orange.

    ranks: a ``RankHistogram``, or ranks in (0, 1), one per case, of the truth among ``draws``.
    Raises InputError for ranks without ``draws``, or that are none.
    """
    if not isinstance(ranks, RankHistogram):
        if draws is None:
            raise InputError("ranks need the number of draws they are among: rank_histogram(ranks, axes, draws=M)")
        ranks = count_ranks(ranks, draws)
    n = len(ranks.counts)
    centre = (np.arange(n) + 0.5) / n
    colour = [ORANGE if i in ranks.outside else BLUE for i in range(n)]
    made: Artists = [axes.bar(centre, ranks.counts, 0.92 / n, color=colour)]
    made.append(axes.axhspan(ranks.low, ranks.high, color=GREEN, alpha=0.2, linewidth=0))
    made.append(axes.axhline(ranks.expected, color=GREEN, linewidth=1))
    axes.set_xlim(0, 1)
    labels(axes, "rank of the truth among the draws", "cases")
    tidy(axes)
    return made


def coverage(found: Mapping[float, float | Coverage | None], axes: Axes) -> Artists:
    """Coverage against its level: on the dotted line is right, below it over-confident.

    found: level -> fraction, or ``Coverage`` over cases, which brings its bounds; None (too few draws) is left out.
    Raises InputError where nothing is left.
    """
    levels = [level for level, value in found.items() if value is not None]
    if not levels:
        raise InputError("there is no coverage to show: the draws are too few for every level")
    made: Artists = axes.plot([0, 1], [0, 1], ":", gid=INKED, color="0.2", linewidth=0.8, label="right")
    for level in levels:
        value = found[level]
        if isinstance(value, Coverage):
            made.append(axes.vlines(level, value.low, value.high, color=BLUE, linewidth=1.5))
    chosen = [found[level] for level in levels]
    inside = [v.inside if isinstance(v, Coverage) else float(v or 0.0) for v in chosen]
    made += axes.plot(levels, inside, "o-", color=BLUE, markersize=5, linewidth=1, label="found")
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    labels(axes, "probability of the interval", "truth inside")
    tidy(axes)
    return made


def spread_skill(ensemble: Any, truth: Any, axes: Axes) -> Artists:  # noqa: ANN401
    """rms error of the mean against rms std, in groups of pixels by std; above the dotted line over-confident.

    Raises InputError for fewer than 4 draws or a truth that does not fit.
    """
    found = ensemble_of(ensemble)
    spread, error = reliability(found, values_of(truth, found.space))
    top = max(limits(np.array([*spread, *error]), share=0)[1], 1e-300) * 1.08
    made: Artists = axes.plot(
        [0, top], [0, top], gid=INKED, color="0.2", linewidth=0.8, linestyle=":", label="error = spread"
    )
    made += axes.plot(spread, error, "o", color=BLUE, markersize=5, label="groups of pixels by std")
    axes.set(xlim=(0, top), ylim=(0, top))
    unit = found.space.unit
    labels(axes, unit_label("spread: rms std", unit), unit_label("rms error of the mean", unit), "error against spread")
    legend(axes)
    tidy(axes)
    return made


def group_fit(fit: GroupFit | Mapping[str, Any], axes: Axes) -> Artists:
    """χ²/m of each group of data (view, coil, station, variable) with its limits; groups beyond them are orange.

    fit: a ``GroupFit`` or its ``summary()``, which may hold the ``unit`` of its labels.
    """
    found = fit.summary() if isinstance(fit, GroupFit) else fit
    ratio, low, high = (
        np.array([np.nan if v is None else v for v in found[name]], dtype=np.float64)
        for name in ("ratio", "low", "high")
    )
    words = list(found["labels"])
    numeric = _numbers(words)
    x = np.arange(len(words), dtype=np.float64) if numeric is None else numeric
    made: Artists = []
    few = len(x) <= FEW
    if few:
        step = float(np.abs(np.diff(x)).min()) if len(x) > 1 else 1.0
        made.append(
            axes.bar(x, high - low, 0.8 * step, low, color=GREEN, alpha=0.2, label="limits of an exact sampler")
        )
    else:
        made.append(
            axes.fill_between(x, low, high, color=GREEN, alpha=0.2, linewidth=0, label="limits of an exact sampler")
        )
    made += axes.plot(x, ratio, "o" if few else "-", color=BLUE, markersize=4, linewidth=1, label="draws, on average")
    outside = list(found["outside"])
    if outside:
        made += axes.plot(x[outside], ratio[outside], "o", color=RED, markersize=5, label="outside")
    if numeric is None and few:
        axes.set_xticks(x, words, rotation=90 if max(map(len, words)) > 3 and len(words) > 8 else 0)
    finite = ratio[np.isfinite(ratio)]
    if finite.size and finite.max() > 0:  # limits of single data are wide: they must not press the figure flat
        top = min(float(np.nanmax(high, initial=0.0)), 2.5 * float(finite.max()))
        axes.set_ylim(0, 1.1 * max(top, float(finite.max()), 1.0))
    labels(axes, unit_label(str(found["dim"]), str(found.get("unit", ""))), "χ²/m")
    tidy(axes)
    return made


def _numbers(words: Sequence[str]) -> np.ndarray | None:
    try:
        return np.array([float(word) for word in words])
    except ValueError:
        return None


def particles(given: Any, axes: Any) -> Artists:  # noqa: ANN401  (an Ensemble or its info["particles"]; axes)
    """What coupled particles noted at every step, on three axes: sizes (effective, ancestors), largest weight, log evidence.

    given: an Ensemble of a particle sampler, or the mapping ``info["particles"]``; resamplings are thin lines.
    Raises InputError for draws that never met.
    """
    kept = given if isinstance(given, Mapping) else ensemble_of(given).info.get("particles", {})
    steps = kept.get("steps")
    if not steps:
        raise InputError("these draws never met: only particle samplers note weights at every step")
    left, middle, right = places(axes, 3, "particles")
    k = np.arange(1, len(steps["ess"]) + 1)
    again = k[np.nan_to_num(np.asarray(steps["resampled"], dtype=np.float64)) > 0]
    made: Artists = left.plot(k, steps["ess"], color=BLUE, linewidth=1.4, label="ESS before resampling")
    made += left.plot(k, steps["distinct"], color=ORANGE, linewidth=1.4, label="distinct ancestors")
    made += middle.plot(k, steps["largest"], color=BLUE, linewidth=1.4)
    made += right.plot(k, steps["log_evidence"], color=BLUE, linewidth=1.4)
    left.set_ylim(bottom=0)
    middle.set_ylim(0, 1.02)
    for spot, name in ((left, "particles"), (middle, "largest weight"), (right, "log evidence so far")):
        made += [spot.axvline(at, color="#8888884d", linewidth=0.8) for at in again]
        labels(spot, "step", name)
        tidy(spot)
    legend(left)
    return made
