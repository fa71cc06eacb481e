r"""A problem's Gaussian twin: its operator and its noise, with a Gaussian prior of its prior's spectrum.

The twin's posterior is Gaussian whatever the size of the problem, and can be drawn from exactly by perturbing and solving
(Papandreou and Yuille 2010).  With ``x = b + s z``, ``B = S^-1/2 A s``, ``z ~ N(m, C)`` and whitened data ``r``::

    mean     = m + C B^T (I + B C B^T)^-1 (r - B m)
    draw     = u + C B^T (I + B C B^T)^-1 (r + n - B u),     u ~ N(m, C),  n ~ N(0, I)

So a sampler can be measured on the very operator that it is meant for.  What the twin cannot show is the error of a learnt
prior, and what a sampler makes of a prior that is not Gaussian.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from recon.draws import Draws
from recon.likelihoods import GaussianLikelihood
from recon.operators.cg import CG
from recon.posterior import Posterior
from recon.priors.stationary import InLatentOf, StationaryPrior
from recon.samplers.base import Claim, Sampler
from recon.samplers.loop import sample
from recon.selftest import judged, largest_step

_FALSE_ALARM = 1e-5
_SOLVER = CG(2000, 1e-5)
_DATA = 7  # key of the twin's own data


@dataclass(frozen=True)
class TwinFigures:
    """How far draws are from exact ones of the same posterior.

    bias: root mean square over pixels of the error of the mean, less what Monte Carlo makes of it, in posterior standard
    deviations; bias_data: the same after the operator, in standard deviations of what the posterior leaves open there.
    variance_ratio: trace of the draws' covariance over the exact one.  The limits are those of exact draws, at a false-alarm
    rate of 1e-5 each, the variance's widened below by one step of ``log sigma`` of a first-order walk.  coverage: of exact
    draws by the draws' central 50 and 90 % intervals, mean over pixels.  cost: as in an ensemble.  claim: the sampler's.
    """

    bias: float
    bias_limit: float
    bias_data: float
    bias_data_limit: float
    variance_ratio: float
    variance_limits: tuple[float, float]
    coverage: tuple[float, float]
    draws: int
    cost: Mapping[str, float] = field(default_factory=dict)
    claim: Claim = "heuristic"

    @property
    def verdict(self) -> str:
        """Of the claim, as in ``selftest.SamplerFigures``: exact, consistent, biased-as-documented, or wrong.

        An exact method with too few steps or iterations for the problem is wrong on it.
        """
        low, high = self.variance_limits
        within = self.bias <= self.bias_limit and self.bias_data <= self.bias_data_limit
        within = within and low <= self.variance_ratio <= high
        return judged(self.claim, within)


def gaussian_twin(posterior: Posterior, prior: StationaryPrior, seed: int = 0) -> Posterior:
    """The twin of ``posterior`` with ``prior`` over its latents, and data simulated from a draw of that.

    Raises InputError when the likelihood has no Gaussian form, or the prior's decoder is not affine.
    """
    likelihood = posterior.likelihood.gaussian()
    likelihood.linear("a Gaussian twin")
    twin = InLatentOf(prior, posterior.prior)
    keyed = Draws(seed, [0])
    truth = twin.decode(prior.exact(keyed, _DATA))
    operator, kind = likelihood.operator, likelihood.y.dtype
    noise = keyed.normal(_DATA, operator.range.shape, "data", dtype=kind).to(likelihood.y.device)
    y = operator.A(truth) + likelihood.sigma * noise
    sampled = getattr(operator, "sampled", None)  # data that were not measured stay zero
    return Posterior(twin, GaussianLikelihood(operator, (y if sampled is None else sampled(y))[0], likelihood.sigma))


def exact_mean(twin: Posterior, cg: CG = _SOLVER) -> Tensor:
    """The posterior mean, in physical units: (*space.shape)."""
    inner = _gaussian(twin)
    return twin.prior.decode(_moved(twin, inner.mean[None], 0.0, cg))[0]


def exact_draws(twin: Posterior, draws: int, seed: int = 1, cg: CG = _SOLVER) -> Tensor:
    """Independent draws of the posterior, in physical units: (draws, *space.shape)."""
    inner, keyed = _gaussian(twin), Draws(seed, range(draws))
    y = twin.likelihood.gaussian().y
    noise = keyed.normal(1, tuple(y.shape), "data", dtype=y.dtype).to(y.device)
    return twin.prior.decode(_moved(twin, inner.exact(keyed), noise, cg))


def check_twin(
    posterior: Posterior, prior: StationaryPrior, sampler: Sampler, draws: int = 32, seed: int = 0
) -> TwinFigures:
    """Measure ``sampler`` on the Gaussian twin of ``posterior``; nothing is judged beyond ``TwinFigures.verdict``.

    prior: over the latents (``spectrum_of`` draws of the problem's own prior).  draws: of the sampler, and as many exact ones.
    Raises InputError when the sampler cannot handle the twin, or draws are fewer than 8.
    """
    twin = gaussian_twin(posterior, prior, seed)
    found = sample(twin, sampler, draws, seed)
    x = found.x.double()
    with torch.no_grad():
        mean, exact = exact_mean(twin).double(), exact_draws(twin, max(64, draws), seed + 1).double()
        bias, limit = _bias(x, exact, mean)
        seen = [_seen(twin, value) for value in (x, exact, mean[None])]
        bias_data, limit_data = _bias(seen[0], seen[1], seen[2][0])
    ratio, error = _variance_ratio(x, exact)
    width = _normal(_FALSE_ALARM / 2) * error
    return TwinFigures(
        bias=bias,
        bias_limit=limit,
        bias_data=bias_data,
        bias_data_limit=limit_data,
        variance_ratio=ratio,
        variance_limits=(1 - width - largest_step(sampler, twin), 1 + width),
        coverage=(_coverage(x, exact, 0.5), _coverage(x, exact, 0.9)),
        draws=draws,
        cost=dict(found.info["cost"]),
        claim=sampler.claim,
    )


def _gaussian(twin: Posterior) -> StationaryPrior:
    assert isinstance(twin.prior, InLatentOf)
    return twin.prior.inner


def _moved(twin: Posterior, start: Tensor, noise: Tensor | float, cg: CG) -> Tensor:
    """``u + C B^T (I + B C B^T)^-1 (r + n - B u)`` for latents ``u`` (n, *latent.shape)."""
    prior, inner, likelihood = twin.prior, _gaussian(twin), twin.likelihood.gaussian()
    operator, sigma = likelihood.linear("a Gaussian twin"), likelihood.sigma

    def back(u: Tensor) -> Tensor:
        return inner.spread(prior.decode_linear(operator.A_adjoint(u / sigma)))

    def matvec(u: Tensor) -> Tensor:
        return u + operator.A(prior.decode_linear(back(u))) / sigma

    residual = (likelihood.y - operator.A(prior.decode(start))) / sigma + noise
    sampled = getattr(operator, "sampled", None)
    return start + back(cg.solve(matvec, residual if sampled is None else sampled(residual)))


def _seen(twin: Posterior, x: Tensor) -> Tensor:
    """Draws as whitened data, real: (n, data)."""
    likelihood, prior = twin.likelihood.gaussian(), twin.prior
    values = likelihood.operator.A(x.to(prior.dtype)) / likelihood.sigma
    return (torch.view_as_real(values) if values.is_complex() else values).double().flatten(1)


def _bias(x: Tensor, exact: Tensor, mean: Tensor) -> tuple[float, float]:
    """Error of the mean in posterior standard deviations (root mean square), and the largest that exact draws explain.

    ``|mean of n exact draws - mean|^2`` has the law of ``e / n``, ``e`` the squared distance of one, to which a gamma law is
    matched.
    """
    from scipy.stats import gamma

    each = (exact - mean).square().flatten(1).sum(1)
    whole, n = float(each.mean()), len(x)
    shape = whole**2 / max(float(each.var()), 1e-12 * whole**2)
    quantile = float(gamma.isf(_FALSE_ALARM, shape)) / shape
    square = float((x.mean(0) - mean).square().sum()) / whole
    return math.sqrt(max(0.0, square - 1 / n)), math.sqrt(max(0.0, quantile - 1) / n)


def _variance_ratio(x: Tensor, exact: Tensor) -> tuple[float, float]:
    """Ratio of the traces of two covariances, and its standard error for draws of the same law."""
    parts = [(v - v.mean(0)).square().flatten(1).sum(1) * len(v) / (len(v) - 1) for v in (x, exact)]
    ratio = float(parts[0].mean() / parts[1].mean())
    relative = float(parts[1].std() / parts[1].mean())
    return ratio, relative * math.sqrt(1 / len(x) + 1 / len(exact))


def _coverage(x: Tensor, exact: Tensor, level: float) -> float:
    """Share of exact draws inside the order statistics of ``x`` that hold ``level``, interpolated between ranks."""
    n = len(x)
    below = (1 - level) / 2 * (n + 1) - 1
    low, high = math.floor(below), math.ceil(below)
    if low < 0:
        return math.nan
    ordered, share = x.sort(0).values, below - low
    found = 0.0
    for rank, weight in ((low, 1 - share), (high, share)):
        if weight:
            inside = (exact >= ordered[rank]) & (exact <= ordered[n - 1 - rank])
            found += weight * float(inside.double().mean())
    return found


def _normal(tail: float) -> float:
    from scipy.stats import norm

    return float(norm.isf(tail))
