"""What a report needs that only the run itself can compute, since it takes likelihood or prior: residual checks, split, bands.

All of it is JSON for ``facts.json`` except the split's maps.  Costs are bounded, as the functions say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from recon.diagnostics.fit import DataFit
from recon.diagnostics.residuals import GroupFit, group_fit, whiteness
from recon.diagnostics.residuals import Look as Closeness
from recon.diagnostics.split import DataPriorSplit, data_prior_split, determined_by_band
from recon.ensemble import Ensemble, labelled
from recon.errors import InputError, ReconError
from recon.likelihoods import Likelihood
from recon.operators.base import LinearOperator
from recon.operators.cg import CG
from recon.plot.canvas import short_unit
from recon.priors.base import Prior
from recon.samplers import unconditional
from recon.space import Space

MOST_GROUPS = 4096  # places along a dim whose chi2 is listed
MOST_DATA = 1 << 18  # data whose whiteness is simulated
SHARE = 0.25  # of the operator's uses while sampling, that the split may cost
SOLVED = 0.01  # relative residual above which the split was not solved
PRIOR_DRAWS, PRIOR_STEPS = 16, 16  # draws of the prior for a spectrum, and their Heun steps
PRIOR_SEED = 0x62616E64  # another one than runs take, so that no noise is shared
FEWEST_DRAWS = 6
MOST_VALUES = 1 << 20  # of one draw
FEWEST = 20  # iterations below which a solution of the split is not worth its name


def examined(
    likelihood: Likelihood, ensemble: Ensemble, fit: DataFit, units: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Facts for a report: chi2 of the data in groups, whiteness of the residual, units of variables, places of stations.

    fit: of the same draws.  units: unit of each variable of the field.  Costs one use of the operator per draw and dim of the
    measurement, and for up to 262,144 data the FFTs of 199 simulated residuals.
    """
    facts: dict[str, Any] = {"residuals": _residuals(likelihood, ensemble, fit)}
    if units:
        facts["units"] = dict(units)
    stations = getattr(likelihood.operator, "stations", None)
    if stations is not None:
        facts["stations"] = _stations(stations, ensemble.space, units or {})
    return facts


def _residuals(likelihood: Likelihood, ensemble: Ensemble, fit: DataFit) -> dict[str, Any]:
    space = likelihood.operator.range
    if not bool(torch.isfinite(ensemble.x).all()):
        return {"groups": [], "whiteness": None}
    dims = [dim for dim, n in zip(space.dims, space.shape, strict=True) if 1 < n <= MOST_GROUPS]
    if len(space.dims) == 1:
        found = [_each_datum(fit, space)] if dims else []
    else:
        found = [group_fit(likelihood, ensemble, dim) for dim in dims]
    groups = [{**group.summary(), **_places(space, group.dim)} for group in found]
    white = None
    if space.size <= MOST_DATA and space.size > 1:
        white = whiteness(likelihood, ensemble, look=Closeness(simulations=199)).summary()
    return {"groups": groups, "whiteness": white}


def _places(space: Space, dim: str) -> dict[str, Any]:
    """Labels of the places along ``dim`` as the figures give them (mm, degrees), and their unit."""
    values = space.coords.get(dim)
    if values is None or isinstance(values, tuple):
        return {"unit": ""}
    shown, attrs = labelled(dim, values)
    return {"unit": short_unit(attrs), "labels": [f"{v:.6g}" for v in shown]}


def _each_datum(fit: DataFit, space: Space, false_alarm: float = 1e-3) -> GroupFit:
    """The groups of one line of data: its places, whose chi2 the fit already holds."""
    names = space.coords.get(space.dims[0], tuple(str(i) for i in range(space.shape[0])))
    labels = tuple(v if isinstance(v, str) else f"{v:.6g}" for v in names)
    ends = []
    for sd in fit.per_view_sd.tolist():
        one = replace(fit, expected=1.0, variance=sd**2, false_alarm=false_alarm / len(labels))
        ends.append(one.limits if sd > 0 else (math.nan, math.nan))
    low, high = torch.tensor(ends, dtype=torch.float64).T
    outside = tuple(torch.nonzero((fit.per_view < low) | (fit.per_view > high))[:, 0].tolist())
    return GroupFit(space.dims[0], labels, fit.per_view, fit.per_view_sd, low, high, outside, false_alarm)


def _stations(stations: Any, space: Space, units: Mapping[str, str]) -> dict[str, Any]:  # noqa: ANN401  (a table of stations)
    """Where each datum was observed, by coordinate, and of which variable and unit."""
    found: dict[str, Any] = {
        dim: [float(v) for v in getattr(stations, dim)]
        for dim in space.dims
        if dim != "variable" and getattr(stations, dim, None) is not None
    }
    variable = getattr(stations, "variable", None)
    if isinstance(variable, tuple):
        unit = {
            name: units.get(name, "unit not recorded" if space.unit == "mixed" else space.unit) for name in variable
        }
        found |= {"variable": list(variable), "unit": [unit[name] for name in variable]}
    return found


def by_variable(fit: DataFit, variables: list[str]) -> dict[str, tuple[float, float, int]]:
    """chi2/m of the data of each variable, averaged over draws, its sd for one exact draw, and m.

    fit: of one line of data, so that ``per_view`` is datum by datum.  variables: name per datum.
    """
    found = {}
    ratio, sd = fit.per_view, fit.per_view_sd
    for name in dict.fromkeys(variables):
        mine = torch.tensor([v == name for v in variables]) & torch.isfinite(ratio)
        count = int(mine.sum())
        if count:
            found[name] = (float(ratio[mine].mean()), float(sd[mine].square().sum().sqrt()) / count, count)
    return found


def affordable_bands(prior: Prior, ensemble: Ensemble) -> tuple[list[dict[str, Any]] | None, str]:
    """What the data determined by spatial frequency, against draws of the prior itself; None and why where they cost too much.

    One entry per variable (one in all where there are none): name, cycles, determined, errors (see ``determined_by_band``) and
    draws, of the prior.  These are made with at most a quarter of the evaluations of the network while sampling (a derivative
    counts twice), in ``ensemble.info["cost"]``.
    """
    cost, space, ensemble = ensemble.info.get("cost", {}), ensemble.space, ensemble.independent()
    spent = cost.get("denoiser", 0) + 2 * cost.get("vjp", 0)
    count = min(PRIOR_DRAWS, int(SHARE * spent / (2 * PRIOR_STEPS - 1)))
    if count < FEWEST_DRAWS or space.size > MOST_VALUES:
        return None, "draws of the prior to compare with would cost more than a quarter of the run"
    try:
        before = unconditional(prior, count, PRIOR_STEPS, PRIOR_SEED).x.cpu()
        axis = space.dims.index("variable") if "variable" in space.dims and len(space.dims) > 1 else None
        names = [""] if axis is None else [str(name) for name in space.coords.get("variable", range(space.shape[axis]))]
        found = []
        for i, name in enumerate(names):
            x, y = (v if axis is None else v.select(axis + 1, i) for v in (ensemble.x.cpu(), before))
            made = determined_by_band(x, y, ensemble.log_weights).summary()
            found.append({"name": name, **made, "draws": count})
    except ReconError as error:
        return None, str(error)
    return found, ""


def affordable_split(likelihood: Likelihood, prior: Prior, ensemble: Ensemble) -> tuple[DataPriorSplit | None, str]:
    """The data-prior split where it takes at most a quarter of the operator's uses while sampling; else None and why.

    prior: with one standard deviation for all values (``scale * sigma_data``).  The uses are counted in
    ``ensemble.info["cost"]``.  A system that conjugate gradients did not solve within them gives no split.
    """
    operator, sigma = likelihood.operator, getattr(prior, "sigma_data", None)
    if sigma is None or not prior.affine:
        return None, "the prior states no standard deviation of its images"
    std = torch.as_tensor(prior.scale * sigma)
    if std.numel() != 1:
        return None, "the variables have different units, and one filter cannot serve them"
    if not isinstance(operator, LinearOperator) or likelihood.operator.domain.complex:
        return None, "it needs a linear operator"
    ensemble = ensemble.independent()
    if not bool(torch.isfinite(ensemble.x).all()) or len(ensemble) < 2:
        return None, "it needs two draws that are numbers"
    spent = ensemble.info.get("cost", {})
    uses = SHARE * (spent.get("forward", 0) + spent.get("adjoint", 0))
    iterations = min(500, int(uses / (2 * (len(ensemble) + 1))))
    closed = type(operator).solve is not LinearOperator.solve
    if iterations < FEWEST and not closed:
        return None, "it would cost too much beside the sampling"
    middle = torch.as_tensor(prior.shift).cpu().expand(ensemble.space.shape)
    cg = CG(iterations=max(iterations, FEWEST), tolerance=1e-4)
    try:
        found = data_prior_split(likelihood, ensemble.x, float(std), middle, ensemble.log_weights, cg)
    except InputError as error:
        return None, str(error)
    left = _unsolved(likelihood, found, ensemble.mean() - middle)
    if left > SOLVED:
        return None, f"{iterations} iterations leave a residual of {left:.2g}, and more would cost too much"
    return found, ""


def _unsolved(likelihood: Likelihood, split: DataPriorSplit, shift: Tensor) -> float:
    """``|(A^T W A + l I) n - l s| / |l s|`` of the null part ``n`` of ``s``: how far the split is from solved."""
    gaussian = likelihood.gaussian()
    operator = gaussian.linear("the data-prior split")
    weight = gaussian.sigma.expand(operator.range.shape) ** -2.0
    null = split.null_mean.to(gaussian.measured)[None]
    wanted = split.filter * shift.to(null)[None]
    with torch.no_grad():
        left = operator.A_adjoint(weight * operator.A(null)) + split.filter * null - wanted
    return float(left.norm() / wanted.norm()) if float(wanted.norm()) > 0 else 0.0
