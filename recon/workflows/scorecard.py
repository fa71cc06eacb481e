r"""The figures of one ensemble that make samplers comparable, and those of one sampler over several cases.

With a truth ``t`` and the mean ``m`` of the draws, where one unit serves the whole field::

    quality = PSNR of m = 20 log10( (max t - min t) / RMSE )                                    dB

A complex image (channels "real", "imag") is compared by its magnitude.  Where variables have units of their own ("variable"),
each is scaled by the truth's standard deviation, and the error is pooled over variables::

    rmse    = sqrt( mean_v  MSE_v / var_v(t) ),       quality = -20 log10 rmse                  dB

CRPS is the fair one, averaged over the field: in the unit of the field, or in standard deviations of the truth.  Coverage is
that of the central intervals between order statistics at k/(M+1); it exists from 19 draws for 90 %, and fewer draws are judged
by the widest interval they have, the one between the extremes (``level_of``).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from recon.diagnostics.images import SSIM_WINDOW, psnr, ssim
from recon.diagnostics.intervals import case_coverage
from recon.diagnostics.scores import fair_crps
from recon.ensemble import Ensemble
from recon.errors import InputError
from recon.space import Space

Status = Literal["measured", "refused", "diverged", "skipped"]
LEVEL = 0.9


def level_of(draws: int) -> float:
    """90 %, or what the widest interval of so few draws holds: ``(M - 1)/(M + 1)``."""
    return min(LEVEL, (draws - 1) / (draws + 1))


@dataclass(frozen=True)
class Score:
    """One ensemble against its truth; see the module.

    quality: dB, larger is better.  error: its standard error over draws (jackknife).  psnr: None where units differ, ssim:
    and where the field is no plane of 11 pixels.  rmse: pooled, scaled; by_variable: of each.  crps: in ``unit``.  coverage:
    None where the intervals do not exist.
    """

    quality: float
    error: float
    psnr: float | None
    ssim: float | None
    rmse: float | None
    by_variable: Mapping[str, float]
    crps: float
    unit: str
    coverage: float | None


@dataclass(frozen=True)
class Figures:
    """One sampler on one case.

    score: None where there is no truth.  chi2: per datum, mean over draws (1 is expected).  fit: verdict on it.  seconds: of a
    draw.  memory: peak, GiB.  calls: evaluations per draw.
    """

    score: Score | None
    chi2: float
    fit: str
    seconds: float
    memory: float
    calls: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One sampler with one number of steps.

    label: what the table calls it.  status, why: what happened when it was not measured.  figures: per case.  quality: per
    case, larger is better.  errors: their standard errors over draws.  again: coverage of re-inferred draws, for measured
    data.  front: whether no other row is clearly better or faster.
    """

    label: str
    method: str
    claim: str
    steps: int
    status: Status
    why: str = ""
    figures: tuple[Figures, ...] = ()
    quality: tuple[float, ...] = ()
    errors: tuple[float, ...] = ()
    again: tuple[float, ...] = ()
    front: bool = False

    @property
    def seconds(self) -> float:
        """Per draw, mean over cases."""
        return mean([f.seconds for f in self.figures])

    @property
    def chi2(self) -> float:
        """Per datum, mean over cases."""
        return mean([f.chi2 for f in self.figures])

    @property
    def coverage(self) -> float:
        """Mean over cases that have one, of the truth or of re-inferred draws; NaN where there is none."""
        found = [f.score.coverage for f in self.figures if f.score is not None and f.score.coverage is not None]
        return mean(found or list(self.again))

    def over_cases(self, name: str) -> list[float]:
        """The field ``name`` of every case's score; empty where a case has none."""
        found = [getattr(f.score, name) if f.score is not None else None for f in self.figures]
        known = [float(value) for value in found if value is not None]
        return known if len(known) == len(found) else []


def score(ensemble: Ensemble, truth: Tensor, level: float = LEVEL, known: Tensor | None = None) -> Score:
    """The figures of ``ensemble`` against ``truth`` (*space.shape).

    known: bool, *space.shape, where the truth means something (SSIM is left out, for it needs whole planes).  Raises InputError
    for draws that are not finite or shapes that do not fit.  CRPS and error are NaN where one draw has all the weight.
    """
    space, x, weights = ensemble.space, ensemble.x.double(), ensemble.weights
    truth = truth.double().cpu()
    keep = torch.ones_like(truth, dtype=torch.bool) if known is None else known
    center = torch.einsum("d,d...->...", weights, x)
    several = float(1 - weights.square().sum()) > 1e-9  # of a single draw nothing can be said but where it is
    crps = error = math.nan
    if several:
        each = fair_crps(x, truth, ensemble.log_weights)
        crps = float((each / _scales(truth, space, keep)).expand(truth.shape)[keep].mean())
        left = center + (center - x) * _rows(weights / (1 - weights), x)  # the mean without each draw
        qualities = [_quality(image, truth, space, keep) for image in left]
        n, middle = len(x), statistics.fmean(qualities)
        error = math.sqrt((n - 1) / n * sum((q - middle) ** 2 for q in qualities))
    mixed, hits = "variable" in space.dims, None
    if ensemble.ess >= 2 / (1 - level) - 1 - 1e-6:
        hits = case_coverage(x[:, keep], truth[keep], level, log_weights=ensemble.log_weights)
    image, other = (_shown(v, space) for v in (center, truth))
    parts = _variables(center, truth, space, keep) if mixed else {}
    flat = not mixed and known is None and image.ndim >= 2 and min(image.shape[-2:]) >= SSIM_WINDOW
    quality = _quality(center, truth, space, keep)
    return Score(
        quality=quality,
        error=error,
        psnr=None if mixed else quality,
        ssim=float(ssim(image, other)) if flat else None,
        rmse=10 ** (-quality / 20) if mixed else None,
        by_variable=parts,
        crps=crps,
        unit="sd" if mixed else space.unit,
        coverage=None if hits is None else hits["all"].inside,
    )


def mean(values: list[float]) -> float:
    """Their mean; NaN of none."""
    return statistics.fmean(values) if values else math.nan


def standard_error(values: list[float]) -> float:
    """Of their mean; NaN of fewer than two."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def _rows(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like).reshape(-1, *[1] * (like.ndim - 1))


def _shown(image: Tensor, space: Space) -> Tensor:
    """A complex image as its magnitude."""
    pair = space.dims[:1] == ("channel",) and tuple(space.coords.get("channel", ())) == ("real", "imag")
    return image.square().sum(0).sqrt() if pair else image


def _quality(image: Tensor, truth: Tensor, space: Space, keep: Tensor) -> float:
    if "variable" in space.dims:
        parts = _variables(image, truth, space, keep)
        return -10 * math.log10(max(statistics.fmean(v**2 for v in parts.values()), 1e-300))
    if not bool(keep.all()):
        return float(psnr(image[keep], truth[keep]))
    return float(psnr(_shown(image, space), _shown(truth, space)))


def _variables(image: Tensor, truth: Tensor, space: Space, keep: Tensor) -> dict[str, float]:
    """Error of each variable over the truth's standard deviation."""
    scale = _scales(truth, space, keep)
    error = ((image - truth) / scale).square()
    axis = space.dims.index("variable")
    parts = zip(error.unbind(axis), keep.unbind(axis), strict=True)
    names = space.coords.get("variable", range(space.shape[axis]))
    return {str(name): float(e[k].mean().sqrt()) for name, (e, k) in zip(names, parts, strict=True)}


def _scales(truth: Tensor, space: Space, keep: Tensor) -> Tensor:
    """What errors are divided by, as it broadcasts over the field: 1, or the truth's standard deviation of each variable."""
    if "variable" not in space.dims:
        return torch.ones(())
    axis = space.dims.index("variable")
    pairs = zip(truth.unbind(axis), keep.unbind(axis), strict=True)
    stds = torch.stack([t[k].std(correction=0) for t, k in pairs])
    if not bool((stds > 0).all()):
        raise InputError(
            "errors of fields in units of their own are scaled by the truth's spread; a variable of it is constant"
        )
    return stds.reshape([-1 if i == axis else 1 for i in range(truth.ndim)])
