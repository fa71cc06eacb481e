"""Every number of a report, as JSON values: the page shows them, ``report.json`` keeps them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from recon.diagnostics.images import nrmse, psnr, rmse, ssim
from recon.diagnostics.spread import LEVELS, draws_needed, ensemble_spread
from recon.ensemble import Ensemble
from recon.errors import InputError
from recon.report.evidence import Evidence

SCHEMA = "recon.report/1"
MEAN, DRAW = "posterior mean", "one draw"


def numbers(evidence: Evidence) -> dict[str, Any]:
    """All figures of ``evidence``: JSON values only, null where a figure does not exist or is not finite.

    Keys: schema, title, space, measurement, draws, fit, spread, images, gains, and the facts as they came.
    """
    ensemble = evidence.ensemble
    variance = None if evidence.prior_std is None else evidence.prior_std.double() ** 2
    usable = variance is not None and bool((variance > 0).all())
    figures = asdict(ensemble_spread(ensemble, evidence.truth, variance if usable else None))
    figures["coverage"] = {f"{level:g}": value for level, value in figures["coverage"].items()}
    images = _images(evidence)
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
        "spread": figures,
        "images": images,
        "gains": _gains(images),
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


def _draws(ensemble: Ensemble) -> dict[str, Any]:
    bad = (~torch.isfinite(ensemble.x)).flatten(1)
    info = ensemble.info
    return {
        "count": len(ensemble),
        "ess": ensemble.ess,
        "distinct": info.get("distinct", info.get("distinct_ancestors")),
        "not_finite": int(bad.sum()),
        "draws_not_finite": int(bad.any(1).sum()),
        "intervals": {f"{level:g}": ensemble.ess >= draws_needed(level) - 1e-6 for level in (*LEVELS, 0.95)},
    }


def _images(evidence: Evidence) -> dict[str, dict[str, Any]]:
    """PSNR, SSIM, RMSE, NRMSE of each image against the truth; empty without one."""
    truth = evidence.truth
    if truth is None:
        return {}
    shown = {MEAN: evidence.ensemble.mean(), DRAW: evidence.ensemble.x[0], **evidence.baselines}
    return {name: _against(image.cpu(), truth.cpu()) for name, image in shown.items()}


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
