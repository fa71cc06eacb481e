"""Every number of a report, as JSON values: the page shows them, ``report.json`` keeps them (its schema: ``schema``)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from recon.diagnostics.images import nrmse, psnr, rmse, ssim
from recon.diagnostics.intervals import ANCESTORS
from recon.diagnostics.montecarlo import monte_carlo_errors
from recon.diagnostics.spread import LEVELS, draws_needed, ensemble_spread, mean_error
from recon.diagnostics.weights import weight_health
from recon.ensemble import Ensemble
from recon.errors import InputError
from recon.plot.canvas import axis
from recon.plot.checks import region_means
from recon.plot.maps import checked_intervals, refusal
from recon.plot.volumes import is_volume, rms_by_slice
from recon.report.evidence import Evidence
from recon.report.quantities import Quantity, quantities

SCHEMA = "recon.report/2"
MEAN, DRAW = "posterior mean", "one draw"
SHOWN = (*LEVELS, 0.95)


def numbers(evidence: Evidence) -> dict[str, Any]:
    """All figures of ``evidence``: JSON values only, null where a figure does not exist or is not finite.

    ``quantities`` holds one entry per variable (one in all where there is a single one), each in its own unit; ``spread``,
    ``images`` and ``gains`` at the top are those of the only quantity, null where there are several: nothing mixes units.
    """
    ensemble = evidence.ensemble
    found = [quantity_numbers(q, evidence.facts.get("regions")) for q in quantities(evidence)]
    only = found[0] if len(found) == 1 else None
    value = {
        "schema": SCHEMA,
        "title": str(evidence.facts.get("title", "Reconstruction")),
        "space": {"dims": list(ensemble.space.dims), "shape": list(ensemble.space.shape), "unit": ensemble.space.unit},
        "measurement": {
            "dims": list(evidence.range.dims),
            "shape": list(evidence.range.shape),
            "unit": evidence.range.unit,
        },
        "draws": _draws(ensemble),
        "fit": {**evidence.fit.summary(), "chi2": evidence.fit.chi2.tolist()},
        "residuals": evidence.facts.get("residuals"),
        "split": None if evidence.split is None else evidence.split.summary(),
        "quantities": found,
        "spread": None if only is None else only["spread"],
        "images": None if only is None else only["images"],
        "gains": None if only is None else only["gains"],
        "facts": evidence.facts,
    }
    return dict(plain_json(value))


def plain_json(value: Any) -> Any:  # noqa: ANN401  (any value in, JSON out)
    """``value`` as JSON values; numbers that are not finite become None, anything unknown its text."""
    if isinstance(value, Mapping):
        return {str(k): plain_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain_json(v) for v in value]
    if isinstance(value, bool | str | int) or value is None:
        return value
    if hasattr(value, "tolist"):
        return plain_json(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return json.loads(json.dumps(value, default=str))


def quantity_numbers(quantity: Quantity, regions: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The figures of one quantity, in its unit: similarity, spread, Monte-Carlo errors, intervals, regions, slices."""
    ensemble, truth = quantity.flat()
    images = _images(quantity)
    refused = refusal(quantity.ensemble, LEVELS[0])
    return {
        "name": quantity.name,
        "kind": quantity.kind,
        "unit": quantity.unit,
        "pixels": ensemble.space.size,
        "images": images,
        "gains": _gains(images),
        "spread": _spread(quantity, ensemble, truth, refused),
        "monte_carlo": _monte_carlo(ensemble),
        "intervals": _intervals(ensemble),
        "regions": _regions(quantity, regions),
        "slices": _slices(quantity),
    }


def _spread(quantity: Quantity, ensemble: Ensemble, truth: Tensor | None, refused: str) -> dict[str, Any]:
    figures = asdict(ensemble_spread(ensemble, truth))
    found = quantity.determined
    figures["determined"] = None if found is None else float(found.mean())
    figures["coverage"] = {f"{p:g}": None if refused else inside for p, inside in figures["coverage"].items()}
    return figures


def _draws(ensemble: Ensemble) -> dict[str, Any]:
    bad = (~torch.isfinite(ensemble.x)).flatten(1)
    info = ensemble.info
    kept = info.get("particles")
    assert ensemble.log_weights is not None  # an Ensemble sets it
    return {
        "count": len(ensemble),
        "ess": ensemble.ess,
        "antithetic": ensemble.antithetic,
        "distinct": info.get("distinct", info.get("distinct_ancestors")),
        "not_finite": int(bad.sum()),
        "draws_not_finite": int(bad.any(1).sum()),
        "intervals": {f"{level:g}": not _lacking(ensemble, level) for level in SHOWN},
        "needed": {f"{level:g}": draws_needed(level) for level in SHOWN},
        "weights": weight_health(ensemble.log_weights, ensemble.ancestors).summary(),
        "particles": None if kept is None else {name: value for name, value in kept.items() if name != "steps"},
    }


def _lacking(ensemble: Ensemble, level: float) -> bool:
    """Whether there are too few independent draws for intervals, whatever their values."""
    collapsed = ensemble.ancestors is not None and ensemble.ancestors < ANCESTORS
    return collapsed or ensemble.ess < draws_needed(level) - 1e-6


def _finite(ensemble: Ensemble) -> bool:
    return bool(torch.isfinite(ensemble.x).all())


def _monte_carlo(ensemble: Ensemble) -> dict[str, Any] | None:
    """rms of the standard errors of the maps, and of the std map itself to compare with; None where draws are no numbers."""
    if not _finite(ensemble):
        return None
    apart = ensemble.independent()
    found = monte_carlo_errors(apart.x, apart.log_weights).summary()
    std = (
        float(ensemble.std().double().square().mean().sqrt()) if len(ensemble) > 1 and ensemble.ess > 1 + 1e-9 else None
    )
    if ensemble.antithetic and std is not None:
        found["mean"] = float(mean_error(ensemble).double().square().mean().sqrt())
    return {**found, "rms_std": std}


def _intervals(ensemble: Ensemble) -> dict[str, Any]:
    """Level -> effective draws, mean width, and why there is no map where there is none."""
    found = {}
    for level in SHOWN:
        why = refusal(ensemble, level)
        none = {"level": level, "ess": ensemble.ess, "mean_width": None, "reason": why}
        found[f"{level:g}"] = none if why else checked_intervals(ensemble, level).summary()
    return found


def _regions(quantity: Quantity, given: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """One row per region: the mean over it with its interval, the truth's, and what the data determined of its pixels."""
    if not _finite(quantity.ensemble) or quantity.kind == "phase":
        return []
    masks = quantity.regions(given)
    means = region_means(quantity.ensemble, masks)
    maps = None if refusal(means, 0.9) else checked_intervals(means, 0.9)
    centre = means.mean()
    std = means.std() if len(means) > 1 else None
    rows = []
    for i, (name, mask) in enumerate(masks.items()):
        low = None if maps is None or maps.low is None else float(maps.low[i])
        high = None if maps is None or maps.high is None else float(maps.high[i])
        known = None if quantity.truth is None else float(quantity.truth[mask].double().mean())
        inside = None if known is None or low is None or high is None else low <= known <= high
        share = None if quantity.determined is None else float(quantity.determined[mask].mean())
        row = {"name": name, "pixels": int(mask.sum()), "mean": float(centre[i]), "low": low, "high": high}
        rows.append(
            {
                **row,
                "std": None if std is None else float(std[i]),
                "truth": known,
                "inside": inside,
                "determined": share,
            }
        )
    return rows


def _images(quantity: Quantity) -> dict[str, dict[str, Any]]:
    """PSNR, SSIM, RMSE, NRMSE of each image against the truth; empty without one.  A phase has its RMSE only."""
    ensemble, truth = quantity.flat()
    if truth is None:
        return {}
    baselines = {n: v if quantity.mask is None else v[quantity.mask] for n, v in quantity.baselines.items()}
    shown = {MEAN: ensemble.mean(), DRAW: ensemble.x[0], **baselines}
    if quantity.kind == "phase":
        none = {"psnr": None, "ssim": None, "nrmse": None}
        return {name: {**none, "rmse": float(rmse(image.cpu(), truth.cpu()))} for name, image in shown.items()}
    found = {name: _against(image.cpu(), truth.cpu()) for name, image in shown.items()}
    # A list of pixels has no neighbours to be similar in.
    return found if quantity.mask is None else {name: {**values, "ssim": None} for name, values in found.items()}


def _against(image: Tensor, truth: Tensor) -> dict[str, float | None]:
    values: dict[str, float | None] = {"rmse": float(rmse(image, truth)), "nrmse": float(nrmse(image, truth))}
    for name, figure in (("psnr", psnr), ("ssim", ssim)):
        try:
            values[name] = float(figure(image, truth))
        except InputError:  # a flat truth has no peak, a small image no SSIM window: the table shows a dash
            values[name] = None
    return values


def _gains(images: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """PSNR of the posterior mean minus that of each other image, dB."""
    ours = images.get(MEAN, {}).get("psnr")
    if ours is None:
        return {}
    return {n: ours - v["psnr"] for n, v in images.items() if n != MEAN and v["psnr"] is not None}


def _slices(quantity: Quantity) -> dict[str, Any] | None:
    """Of a volume, per slice along z: rms std, with a truth rms error, PSNR and SSIM of the mean (peak: the volume's range)."""
    space, ensemble = quantity.space, quantity.ensemble
    if not is_volume(space) or quantity.kind == "phase":
        return None
    z, label = axis(space, "z")
    out: dict[str, Any] = {"z": z.tolist(), "label": label}
    out["std"] = rms_by_slice(ensemble.std()).tolist() if len(ensemble) > 1 else None
    if quantity.truth is None:
        return {**out, "rmse": None, "psnr": None, "ssim": None}
    mean, truth = ensemble.mean(), quantity.truth
    out["rmse"] = rms_by_slice(mean.double() - truth.double()).tolist()
    peak = float(truth.max() - truth.min())
    for name, figure in (("psnr", psnr), ("ssim", ssim)):
        try:
            out[name] = [float(figure(a, b, peak)) for a, b in zip(mean, truth, strict=True)]
        except InputError:  # no peak, or slices too small for SSIM's window
            out[name] = None
    return out
