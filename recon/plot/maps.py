"""Maps of an ensemble: mean and std, draws side by side, intervals.

Every function takes an Ensemble (or xarray, see ``recon.plot.inputs``) and the axes to draw on, and returns the artists it
made: images in 2-D (of more dims the central slice), lines and bands in 1-D.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from recon.diagnostics.intervals import Intervals, draws_needed, intervals_at
from recon.ensemble import Ensemble
from recon.errors import InputError
from recon.plot.canvas import (
    BLUE,
    FEW,
    INKED,
    Look,
    axis,
    colours,
    curve,
    draw,
    image,
    labels,
    legend,
    limits,
    scale,
    shown,
    tidy,
    unit_label,
)
from recon.plot.inputs import ensemble_of, every, figure_of, places, space_of, values_of
from recon.space import Space

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    AxesLike = Axes | Sequence[Axes] | np.ndarray

Artists = list[Any]
LEVELS = (0.5, 0.9, 0.95)  # what a report asks for, made from one sort
_MADE: WeakKeyDictionary[Ensemble, dict[float, Intervals]] = WeakKeyDictionary()


def refusal(ensemble: Ensemble, level: float = 0.9) -> str:
    """Why ``ensemble`` has no interval maps of probability ``level``; empty where it has them."""
    if not bool(torch.isfinite(ensemble.x).all()):
        return "draws hold values that are NaN or infinite"
    if len(ensemble) > 1 and bool((ensemble.x == ensemble.x[:1]).all()):
        return "the ensemble has collapsed: all draws are the same"
    few = ensemble.ancestors is not None or ensemble.ess < draws_needed(level) - 1e-6
    return checked_intervals(ensemble, level).reason if few else ""


def checked_intervals(ensemble: Ensemble, level: float = 0.9) -> Intervals:
    """``recon.diagnostics.intervals`` of an ensemble with its weights and ancestors: copies of one particle count once."""
    made = _MADE.setdefault(ensemble, {})
    if level not in made:
        levels = dict.fromkeys([level, *LEVELS])
        found = intervals_at(ensemble.x, tuple(levels), ensemble.log_weights, ensemble.ancestors)
        made |= dict(zip(levels, found, strict=True))
    need = draws_needed(level)
    if made[level].low is not None and ensemble.ess < need - 1e-6:
        why = f"{level:.0%} intervals need {need} effective draws; there are {ensemble.ess:.3g}"
        return Intervals(level, None, None, ensemble.ess, why)
    return made[level]


def field(values: Any, axes: Axes, space: Space | None = None, look: Look | None = None, title: str = "") -> Artists:  # noqa: ANN401
    """One array on its axes: an image with a colour bar, or a line.

    values: a DataArray, or an array over ``space``.  look: colours; default grey over the range of the values.
    Raises InputError for values that do not fit.
    """
    import xarray as xr

    if space is None:
        if not isinstance(values, xr.DataArray):
            raise InputError("an array without names needs its space; or give a DataArray")
        space = space_of(values)
    tensor = values_of(values, space)
    look = look or Look(colours(space), *limits(tensor, share=0.1), unit_label(title or "value", space.unit))
    made = draw(axes, space, tensor, look, title)
    if made is None:
        tidy(axes)
        return list(axes.lines)
    scale(figure_of(axes), made, axes, look, shown(space, tensor))
    return [made]


def mean_std(ensemble: Any, axes: AxesLike) -> Artists:  # noqa: ANN401
    """Posterior mean (grey) and standard deviation (viridis from zero, in data units) on two axes."""
    found = ensemble_of(ensemble)
    left, right = places(axes, 2, "mean_std")
    mean, std, unit = found.mean(), found.std(), found.space.unit
    top = max(limits(shown(found.space, std))[1], 1e-300)
    return [
        *field(mean, left, found.space, title="posterior mean"),
        *field(std, right, found.space, Look("viridis", 0.0, top, unit_label("std", unit)), "posterior std"),
    ]


def draws(ensemble: Any, axes: AxesLike, first: int = 0) -> Artists:  # noqa: ANN401
    """As many draws as there are axes, from number ``first`` on, at one grey scale."""
    found = ensemble_of(ensemble)
    spots = every(axes)
    picked = found.x[first : first + len(spots)]
    if not len(picked):
        raise InputError(f"there are {len(found)} draws, numbered from 0; the first asked for is {first}")
    flat = [shown(found.space, x) for x in picked]
    look = Look(colours(found.space), *limits(*flat, share=0.1), unit_label("value", found.space.unit))
    made = [
        draw(a, found.space, x, look, f"draw {first + i}") for i, (a, x) in enumerate(zip(spots, picked, strict=False))
    ]
    if made[0] is None:
        return [line for a in spots for line in a.lines]
    scale(figure_of(spots[0]), made[0], spots[: len(made)], look, *flat)
    return made


def intervals(ensemble: Any, axes: AxesLike, level: float = 0.9, look: Look | None = None) -> Artists:  # noqa: ANN401
    """Central intervals of probability ``level``: in 2-D lower end, upper end and width on three axes; in 1-D a band on one.

    look: colours of the two ends (default: grey over their range).  The rule is that of ``recon.diagnostics.intervals``: order
    statistics at k/(M+1).  Raises InputError, with the reason, where the draws are too few or have collapsed.
    """
    found = ensemble_of(ensemble)
    result = checked_intervals(found, level)
    if result.low is None or result.high is None:
        raise InputError(f"no interval maps: {result.reason}")
    if len(found.space.dims) == 1:
        (only,) = places(axes, 1, "intervals of one-dimensional draws")
        return [band(only, found.space, result.low, result.high, f"{100 * level:.0f} % interval", 0.25)]
    left, middle, right = places(axes, 3, "intervals")
    tail = 50 * (1 - level)
    ends = [shown(found.space, v) for v in (result.low, result.high)]
    unit = found.space.unit
    look = look or Look(colours(found.space), *limits(*ends, share=0.1), unit_label("value", unit))
    made = [image(a, found.space, end, look) for a, end in zip((left, middle), ends, strict=True)]
    left.set_title(f"lower end ({tail:g} %)", fontsize=9.5)
    middle.set_title(f"upper end ({100 - tail:g} %)", fontsize=9.5)
    scale(figure_of(left), made[0], [left, middle], look, *ends)
    width = ends[1] - ends[0]
    wide = Look("viridis", 0.0, max(limits(width)[1], 1e-300), unit_label("width", unit))
    made.append(image(right, found.space, width, wide))
    right.set_title(f"width of the {100 * level:.0f} % interval", fontsize=9.5)
    scale(figure_of(right), made[2], right, wide, width)
    return made


def band(axes: Axes, space: Space, low: Tensor, high: Tensor, label: str, alpha: float) -> Any:  # noqa: ANN401
    """A shaded band along the only dim of ``space``, or bars where there are few values."""
    x, _ = axis(space, space.dims[0])
    low_, high_ = (v.detach().cpu().double().numpy() for v in (low, high))
    if len(x) <= FEW:
        step = float(np.abs(np.diff(x)).min()) if len(x) > 1 else 0.1
        return axes.bar(x, high_ - low_, 0.7 * step, low_, color=BLUE, alpha=alpha, label=label)
    return axes.fill_between(x, low_, high_, color=BLUE, alpha=alpha, linewidth=0, label=label)


def profile(ensemble: Any, axes: Axes, truth: Any = None, levels: Sequence[float] = (0.9, 0.5)) -> Artists:  # noqa: ANN401
    """One-dimensional draws: the mean with its bands (those the draws allow) and the truth.

    Raises InputError for draws of more dims, or a truth that does not fit.
    """
    found = ensemble_of(ensemble)
    space = found.space
    if len(space.dims) != 1:
        raise InputError(f"a profile is of one-dimensional draws; these are {space.describe()}")
    made: Artists = []
    held = [level for level in levels if not refusal(found, level)]
    for level, alpha in zip(held, (0.2, 0.35)[2 - len(held) :], strict=False):
        maps = checked_intervals(found, level)
        assert maps.low is not None  # refusal was empty
        assert maps.high is not None
        made.append(band(axes, space, maps.low, maps.high, f"{100 * level:.0f} % interval", alpha))
    few = space.shape[0] <= FEW
    line = "none" if few else "-"
    made += curve(axes, space, found.mean(), color=BLUE, linewidth=1.8, linestyle=line, label="posterior mean")
    if truth is not None:
        mark = {"marker": "x", "markersize": 6} if few else {}
        style = {"gid": INKED, "linewidth": 1.0, "linestyle": line, "label": "truth", "color": "0.2", **mark}
        made += curve(axes, space, values_of(truth, space), **style)
    labels(axes, axes.get_xlabel(), unit_label("value", space.unit))
    legend(axes)
    tidy(axes)
    return made
