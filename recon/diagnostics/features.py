r"""Is this spot supported by the data?  Remove it, simulate again, and see whether the misfit notices.

With an image ``x``, the same image without the feature ``x'``, ``a = A(x) - A(x')`` the trace of the feature in the
data, and ``r' = y - A(x')`` what the image without it leaves over,

    z = a^T S^-1 r' / d,     d^2 = a^T S^-1 a,     S = sigma^2 I + tau^2 A P A^T.

``d`` is how visible the feature is: the mean of z if it is there as drawn, in standard deviations of z, which is N(0,
1) if it is not. ``amplitude = z/d`` is how much of it the data show, ``+- 1/d``.  P selects the pixels outside the
feature, and ``tau`` is by how much the rest of the image may change to explain the data instead: with 0 it stays as it
is, and ``2 d z - d^2`` is the change of chi2.

The law of z holds for a feature and a background chosen without these data (an atlas, another scan, half of the views).  A
feature picked because this image shows it has been favoured by the noise once already, and z is too large on average by
up to the size of that noise; the visibility ``d`` does not depend on the data and stays true.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from recon.diagnostics.given import Array
from recon.diagnostics.split import SOLVER
from recon.errors import InputError
from recon.likelihoods import GaussianLikelihood, Likelihood
from recon.operators.base import LinearOperator
from recon.operators.cg import CG, dot

FALSE_ALARM = 0.01
Support = Literal["supported", "contradicted", "partly supported", "not visible"]


@dataclass(frozen=True)
class FeatureTest:
    """What the data say about one feature; see the module.

    support: by two tests, of "absent" and of "as drawn", each at ``false_alarm``.  "supported": absent is refuted, as
    drawn is not.  "contradicted": the other way round.  "partly supported": both are, there is something of another
    strength. "not visible": neither is, these data cannot tell.  z, visibility, amplitude,
    amplitude_error; misfit_change: chi2 without it less chi2 with it (background fixed).  draws_with: share of the
    draws in which the feature has at least half its contrast, where draws were given.
    """

    support: Support
    z: float
    visibility: float
    amplitude: float
    amplitude_error: float
    misfit_change: float
    background: float
    false_alarm: float
    draws_with: float | None = None

    def summary(self) -> dict[str, Any]:
        """JSON values; figures that are not finite become None."""
        values = dict(self.__dict__)
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def filled(x: Array, mask: Array, iterations: int = 2000) -> Tensor:
    """``x`` (*space) with the masked pixels replaced by the smoothest continuation of their surroundings (harmonic).

    mask: bool *space.  Raises InputError for a mask that does not fit, is empty, or leaves no surroundings.
    """
    x, mask = torch.as_tensor(x).detach().cpu(), torch.as_tensor(mask).cpu()
    if mask.dtype != torch.bool or mask.shape != x.shape or not bool(mask.any()) or bool(mask.all()):
        raise InputError(
            f"a feature is a mask (bool) of {tuple(x.shape)} with some pixels inside and some outside; got {mask.dtype} "
            f"{tuple(mask.shape)} with {int((mask != 0).sum())} inside"
        )
    outside = torch.where(mask, 0.0, x.double())
    inside = mask.double()

    def laplacian(v: Tensor) -> Tensor:
        total = torch.zeros_like(v)
        for axis in range(1, v.ndim):
            step = v.diff(dim=axis)
            edge = torch.zeros_like(v.narrow(axis, 0, 1))
            total += torch.cat([edge, step], axis) - torch.cat([step, edge], axis)
        return total

    # Solve for the inside with the outside as boundary values; no flow across the edge of the array.
    right = -inside * laplacian(outside[None])
    solution = CG(iterations, 1e-10).solve(lambda v: inside * laplacian(inside * v), right)
    return (outside + inside * solution[0]).to(x.dtype)


def feature_test(
    likelihood: Likelihood,
    image: Array,
    without: Array,
    background: float = 0.0,
    draws: Array | None = None,
    false_alarm: float = FALSE_ALARM,
    cg: CG = SOLVER,
) -> FeatureTest:
    """Whether the data support what ``image`` has and ``without`` has not.

    image, without: *domain.shape (``filled(image, mask)`` makes the second).  background: tau, by how much (data units, one
    standard deviation per pixel) the rest of the image may differ.  draws: (draw, *domain.shape), equally weighted, to
    count those that have the feature.
    Raises InputError for images that are the same or do not fit, tau < 0, a likelihood without a Gaussian form, or tau > 0
    with an operator that is not linear.
    """
    gaussian = likelihood.gaussian()
    space = gaussian.operator.domain
    image, without = (torch.as_tensor(v).detach().to(gaussian.measured) for v in (image, without))
    for value in (image, without):
        if tuple(value.shape) != space.shape or not bool(torch.isfinite(value).all()):
            raise InputError(f"images are finite and of {space.describe()}; got {tuple(value.shape)}")
    if torch.equal(image, without):
        raise InputError("the two images are the same: there is no feature to test")
    if not (0 < false_alarm < 1) or background < 0:
        raise InputError(f"false_alarm lies in (0, 1) and background is >= 0; got {false_alarm}, {background}")
    with torch.no_grad():
        residual = gaussian.residual(torch.stack([image, without])) / gaussian.sigma
    left, trace = residual[1:], residual[1:] - residual[:1]
    whitened = trace
    if background > 0:
        operator = gaussian.linear("a feature test with a free background")
        whitened = _compensated(gaussian, operator, trace, image == without, background, cg)
    strength = float(dot(trace, whitened))
    visibility = math.sqrt(max(strength, 0.0))
    z = float(dot(left, whitened)) / visibility if visibility > 0 else 0.0
    change = float(dot(left, left) - dot(residual[:1], residual[:1]))
    share = None if draws is None else _with(torch.as_tensor(draws).to(image), image - without, without)
    amplitude, error = (z / visibility, 1 / visibility) if visibility > 0 else (math.nan, math.inf)
    support = _support(z, visibility, false_alarm)
    return FeatureTest(support, z, visibility, amplitude, error, change, background, false_alarm, share)


def _compensated(
    likelihood: GaussianLikelihood,
    operator: LinearOperator,
    trace: Tensor,
    outside: Tensor,
    tau: float,
    cg: CG,
) -> Tensor:
    """``S^-1 a = a - B P (P B^T B P + 1/tau^2)^-1 P B^T a`` for whitened data, ``S = I + tau^2 B P B^T``, ``B = A/sigma``."""
    sigma, keep = likelihood.sigma, outside.to(trace.real)

    def matvec(v: Tensor) -> Tensor:
        return keep * operator.A_adjoint(operator.A(keep * v) / sigma**2) + v / tau**2

    with torch.no_grad():
        rest = cg.solve(matvec, keep * operator.A_adjoint(trace / sigma))
        return trace - operator.A(keep * rest) / sigma


def _support(z: float, visibility: float, false_alarm: float) -> Support:
    from scipy.special import ndtri

    limit = -float(ndtri(false_alarm / 2))
    present, as_drawn = z > limit, abs(z - visibility) <= limit
    if present:
        return "supported" if as_drawn else "partly supported"
    return "not visible" if as_drawn else "contradicted"


def _with(draws: Tensor, feature: Tensor, without: Tensor) -> float:
    """Share of draws (draw, *space) whose component along the feature is more than half of it."""
    flat = feature.reshape(-1)
    along = (draws - without).reshape(len(draws), -1) @ flat / (flat @ flat)
    return float((along > 0.5).double().mean())
