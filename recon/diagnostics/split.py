r"""What the data decided and what the prior supplied.

**Range and null space, at the noise level.**  ``A^+`` is ill-posed, so the projector is filtered: with ``W`` the
inverse noise variances and ``tau`` the prior's standard deviation (data units),

    R = (A^T W A + lambda I)^-1 A^T W A,     Q = I - R = lambda (A^T W A + lambda I)^-1,     lambda = 1/tau^2,

which keeps a singular direction ``s`` (of ``W^1/2 A``) by ``s^2/(s^2 + lambda)``: 1 where a change of size tau stands
out of the noise, 0 where it drowns.  Then ``Var x = Var(R x) + Var(Q x) + 2 Cov(R x, Q x)`` in every pixel: the cross
term is not zero and belongs to the picture.  ``Q (mean - prior mean)`` is what the prior put into the mean that the
data cannot have asked for.

**Shrinkage.**  ``1 - Var_post / Var_prior`` per pixel (``determined``) and per frequency band (``determined_by_band``):
no filter to choose, and right for any prior whose draws one has.

**Degrees of freedom for signal.**  ``d = tr(A C A^T W)`` with the posterior covariance C; for a Gaussian prior of
covariance B it is ``tr(I - C B^-1)``, the trace of the averaging kernel (Rodgers 2000).  Estimated in data space, where
M draws suffice: ``sum_d w_d |W^1/2 A (x_d - m)|^2 / (1 - sum w^2)``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recon.diagnostics.given import Array, draws_of, effective, several, weights_of
from recon.errors import InputError
from recon.likelihoods import GaussianLikelihood, Likelihood
from recon.operators.base import LinearOperator
from recon.operators.cg import CG, dot

BLOCK = 8  # draws solved at a time
SOLVER = CG(iterations=500, tolerance=1e-8)


@dataclass(frozen=True, eq=False)
class DataPriorSplit:
    """Variance and mean taken apart by the filtered projector; made by ``data_prior_split``.

    data, prior, cross: maps *space of ``Var(R x)``, ``Var(Q x)``, ``2 Cov(R x, Q x)``, data units squared; their sum is the
    variance.  None for a single draw, and ``reason`` says so.  null_mean: map of ``Q (mean - prior mean)``, data units.
    filter: lambda.  null_share: ``|Q (m - m0)| / |m - m0|``; None where the mean is the prior's.
    """

    data: Tensor | None
    prior: Tensor | None
    cross: Tensor | None
    null_mean: Tensor
    filter: float
    null_share: float | None
    reason: str = ""

    def summary(self) -> dict[str, Any]:
        """JSON values: means of the variances, and their shares of the total."""
        parts = {"data": self.data, "prior": self.prior, "cross": self.cross}
        means = {name: None if v is None else float(v.mean()) for name, v in parts.items()}
        total = sum(v for v in means.values() if v is not None)
        shares = {f"{n}_share": v / total if v is not None and total > 0 else None for n, v in means.items()}
        return {**means, **shares, "filter": self.filter, "null_share": self.null_share, "reason": self.reason}


def data_prior_split(
    likelihood: Likelihood,
    x: Array,
    prior_std: float,
    prior_mean: float | Array = 0.0,
    log_weights: Array | None = None,
    cg: CG = SOLVER,
) -> DataPriorSplit:
    """Take draws (draw, *domain.shape) apart into what the data see and what they do not.

    prior_std: tau, one number in data units; the filter is ``1/tau^2``.  prior_mean: a number or *domain.shape.  cg:
    used where the operator has no closed form; two applications of the operator per iteration and draw.
    Raises InputError for a likelihood without a Gaussian form, an operator that is not linear with its transpose, a
    standard deviation <= 0, or shapes that do not fit.
    """
    gaussian = likelihood.gaussian()
    operator = gaussian.linear("the data-prior split")
    if not (prior_std > 0 and math.isfinite(prior_std)):
        raise InputError(f"prior_std, the prior's standard deviation in data units, must be positive; got {prior_std}")
    x = draws_of(x)
    operator.domain.require(tuple(x.shape), "data_prior_split")
    w = weights_of(log_weights, len(x))
    lam = 1 / prior_std**2
    rows = x.to(gaussian.measured)
    centre = torch.as_tensor(prior_mean).to(rows)
    if centre.ndim and tuple(centre.shape) != tuple(x.shape[1:]):
        raise InputError(f"prior_mean is a number or {operator.domain.describe()}; got {tuple(centre.shape)}")
    mean = torch.einsum("d,d...->...", w.to(rows), rows)
    shift = (mean - centre).expand(x.shape[1:])
    null_mean = _unseen(gaussian, operator, shift[None], lam, cg)[0].double().cpu()
    size = float(shift.double().norm())
    share = float(null_mean.norm()) / size if size > 0 else None
    if effective(w) < 1 + 1e-9:
        return DataPriorSplit(None, None, None, null_mean, lam, share, "one draw has no variance to take apart")
    distinct = several(w, "a variance")
    seen2, unseen2, cross = (torch.zeros(x.shape[1:], dtype=torch.float64) for _ in range(3))
    for part, weight in zip(rows.split(BLOCK), w.split(BLOCK), strict=True):
        anomaly = part - mean
        unseen = _unseen(gaussian, operator, anomaly, lam, cg)
        u, s = unseen.double().cpu(), (anomaly - unseen).double().cpu()
        for total, product in ((seen2, s * s), (unseen2, u * u), (cross, 2 * s * u)):
            total += torch.einsum("d,d...->...", weight, product)
    return DataPriorSplit(seen2 / distinct, unseen2 / distinct, cross / distinct, null_mean, lam, share)


def _unseen(likelihood: GaussianLikelihood, operator: LinearOperator, x: Tensor, lam: float, cg: CG) -> Tensor:
    """``Q x``, draw by draw."""
    weight = likelihood.sigma.expand(operator.range.shape) ** -2.0
    with torch.no_grad():
        return operator.solve(lam * x, lam, weight, cg=cg)


@dataclass(frozen=True)
class Bands:
    """``1 - S_post/S_prior`` per band of spatial frequency.

    cycles: of each band, per field of view of the shorter side.  determined: 1 the data decided, 0 the prior did, below
    0 the draws spread more than the prior's.  errors: Monte-Carlo standard errors from both ensembles.
    """

    cycles: tuple[int, ...]
    determined: tuple[float, ...]
    errors: tuple[float, ...]

    def summary(self) -> dict[str, Any]:
        """JSON values."""
        return {"cycles": list(self.cycles), "determined": list(self.determined), "errors": list(self.errors)}


def determined_by_band(
    x: Array, prior_draws: Array, log_weights: Array | None = None, axes: int | None = None
) -> Bands:
    """Share of the prior's variance that the data removed, in rings of one cycle per field of view, up to Nyquist.

    x: (draw, *space).  prior_draws: (draw, *space), of the prior that made ``x``.  axes: the last so many are spatial
    (default 2, or 1 for a vector); the others are averaged over.
    Raises InputError for fewer than 3 draws of either (no error), shapes that do not fit, or a prior without spread.
    """
    x, prior = draws_of(x, 3, "a spectrum of anomalies"), draws_of(prior_draws, 3, "a spectrum of the prior")
    if x.shape[1:] != prior.shape[1:] or x.ndim < 2:
        raise InputError(
            f"draws and prior draws are of one space; got {tuple(x.shape[1:])} and {tuple(prior.shape[1:])}"
        )
    axes = min(2, x.ndim - 1) if axes is None else axes
    if not 1 <= axes <= x.ndim - 1:
        raise InputError(f"the space has {x.ndim - 1} axes; {axes} of them cannot be spatial")
    post, post_error = _band_power(x.double(), weights_of(log_weights, len(x)), axes)
    before, before_error = _band_power(prior.double(), weights_of(None, len(prior)), axes)
    if not bool((before > 0).all()):
        raise InputError("the prior's draws do not spread in every band, so there is nothing to compare with")
    ratio = post / before
    # Relative errors of the two add in quadrature; where the posterior has no spread only its own error is left.
    error = ((post_error / before) ** 2 + (ratio * before_error / before) ** 2).sqrt()
    return Bands(tuple(range(len(post))), tuple((1 - ratio).tolist()), tuple(error.tolist()))


def _band_power(x: Tensor, w: Tensor, axes: int) -> tuple[Tensor, Tensor]:
    """Power of the anomalies per band, unbiased, and its Monte-Carlo standard error: two of (bands,)."""
    over = tuple(range(-axes, 0))
    shape = x.shape[-axes:]
    mean = torch.einsum("d,d...->...", w, x)
    power = torch.fft.fftn(x - mean, dim=over, norm="ortho").abs().square()
    power = power.reshape(len(x), -1, math.prod(shape)).mean(1)
    short = min(shape)
    grids = torch.meshgrid(*[torch.fft.fftfreq(n, dtype=torch.float64) * short for n in shape], indexing="ij")
    ring = torch.stack(grids).square().sum(0).sqrt().round().long().reshape(-1)
    keep = ring <= short // 2
    bands = torch.zeros(len(x), short // 2 + 1, dtype=torch.float64).index_add_(1, ring[keep], power[:, keep])
    bands = bands / torch.bincount(ring[keep], minlength=short // 2 + 1)
    distinct = several(w, "a spectrum of anomalies")
    average = w @ bands
    return average / distinct, (w.square() @ (bands - average) ** 2 / distinct).sqrt() / distinct


def signal_freedom(likelihood: Likelihood, x: Array, log_weights: Array | None = None) -> tuple[float, float]:
    """Degrees of freedom for signal ``tr(A C A^T W)`` and the Monte-Carlo standard error of that number.

    x: (draw, *domain.shape).  An operator that is not linear is taken as it is (its spread in data space).
    Raises InputError for fewer than 2 draws that count, or a likelihood without a Gaussian form.
    """
    gaussian = likelihood.gaussian()
    x = draws_of(x, 2, "degrees of freedom for signal")
    w = weights_of(log_weights, len(x))
    distinct = several(w, "degrees of freedom for signal")
    rows = x.to(gaussian.measured)
    with torch.no_grad():
        seen = torch.cat([gaussian.residual(part) for part in rows.split(BLOCK)]) / gaussian.sigma
    seen = seen - torch.einsum("d,d...->...", w.to(seen), seen)
    square = dot(seen, seen).double().cpu()
    value = float(w @ square)
    error = math.sqrt(float(w.square() @ (square - value) ** 2) / distinct) / distinct
    return value / distinct, error
