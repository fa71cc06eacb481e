"""Checks of samplers against posteriors that are known exactly, on any linear operator.

With a white Gaussian prior and Gaussian noise the posterior is Gaussian whatever the operator, so a sampler that claims to be
exact can be caught: its mean within Monte-Carlo error, its variance within Monte-Carlo error and the one step of ``log sigma``
that a first-order transition loses.  A heuristic sampler is measured, not judged.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from recon.draws import Draws
from recon.ensemble import Ensemble
from recon.errors import CheckFailed, InputError, Stopped
from recon.likelihoods import GaussianLikelihood
from recon.operators.base import LinearOperator
from recon.operators.matrix import MatrixOperator
from recon.posterior import Posterior, dense
from recon.priors.gaussian import GaussianPrior
from recon.priors.mixture import GaussianMixturePrior
from recon.samplers.base import Claim, GuidedSampler, Sampler, State
from recon.samplers.loop import sample

_LARGEST = 1024  # values of the domain for which the exact posterior is worth a dense matrix
_FALSE_ALARM = 1e-5


@dataclass(frozen=True)
class SamplerFigures:
    """How far draws are from the exact posterior.

    bias: largest error of the mean over components, in posterior standard deviations; bias_limit: what Monte Carlo explains.
    variance_ratio: mean over components of the draws' variance over the exact one, and the interval expected of it.
    coverage: exact posterior probability of the draws' central 50 and 90 % intervals, mean over components.
    cost: of all draws together: evaluations of "denoiser", "vjp", "forward", "adjoint", and "seconds".
    claim: the sampler's.
    """

    bias: float
    bias_limit: float
    variance_ratio: float
    variance_limits: tuple[float, float]
    draws: int
    coverage: tuple[float, float] = (math.nan, math.nan)
    cost: Mapping[str, float] = field(default_factory=dict)
    claim: Claim = "heuristic"

    @property
    def verdict(self) -> str:
        """Of the claim: "exact" or "consistent" (as claimed, within the limits), "biased-as-documented", or "wrong".

        Wrong is who claims to be exact and is outside; a heuristic is never better than biased-as-documented, nor is a
        consistent method that would need more steps.
        """
        low, high = self.variance_limits
        within = self.bias <= self.bias_limit and low <= self.variance_ratio <= high
        return judged(self.claim, within)


def judged(claim: Claim, within: bool) -> str:
    """The word for a claim and whether the figures lie within the limits of exact draws; see ``SamplerFigures.verdict``."""
    if claim == "exact":
        return "exact" if within else "wrong"
    return "consistent" if within and claim == "consistent" else "biased-as-documented"


def largest_step(sampler: Sampler, posterior: Posterior) -> float:
    """The longest step of ``log sigma``: about what a first-order walk loses of the variance; 0 for other samplers."""
    if not isinstance(sampler, GuidedSampler):
        return 0.0
    levels = sampler.sigmas(posterior)[:-1].log()
    return float((levels[:-1] - levels[1:]).max())


def check_sampler(
    sampler: Sampler, operator: LinearOperator | None = None, draws: int = 2000, snr: float = 10.0, seed: int = 0
) -> SamplerFigures:
    """Run ``sampler`` where the posterior is known, and raise CheckFailed when it claims to be exact and is not.

    operator: any with at most 1024 unknowns (default: a random 3 x 8 matrix); prior N(0, I), noise so that
    ``|A|^2 / sigma^2 = snr``, data simulated from a draw of the prior.  False alarm of each of the two limits: 1e-5.
    Raises InputError when the operator is too large or the sampler cannot handle the problem.
    """
    posterior = gaussian_problem(operator, snr, seed)
    exact = posterior.exact()
    assert isinstance(exact, GaussianPrior)
    ensemble = sample(posterior, sampler, draws=draws, seed=seed)
    mean, covariance = exact.mean, exact.covariance()
    variance = covariance.diagonal()
    x = ensemble.x.double().flatten(1)
    bias = float(((x.mean(0) - mean) / variance.sqrt()).abs().max())
    ratio = float((x.var(0) / variance).mean())
    figures = SamplerFigures(
        bias,
        _bias_limit(len(mean), draws),
        ratio,
        _limits(sampler, posterior, covariance, draws),
        draws,
        (_coverage(ensemble, exact, 0.5), _coverage(ensemble, exact, 0.9)),
        ensemble.info["cost"],
        sampler.claim,
    )
    name = f"{type(sampler).__name__} on {posterior.likelihood.operator.describe()}"
    if not bool(torch.isfinite(x).all()):
        raise CheckFailed(f"{name}: draws are not finite")
    if sampler.claim == "exact":
        if bias > figures.bias_limit:
            raise CheckFailed(
                f"{name} claims to be exact: mean off by {bias:.3f} posterior sd, limit {figures.bias_limit:.3f}"
            )
        low, high = figures.variance_limits
        if not low <= ratio <= high:
            raise CheckFailed(
                f"{name} claims to be exact: variance {ratio:.3f} of the exact one, limits {low:.3f}, {high:.3f}"
            )
    return figures


def gaussian_problem(operator: LinearOperator | None = None, snr: float = 10.0, seed: int = 0) -> Posterior:
    """A posterior with a white Gaussian prior in float64; see ``check_sampler``.  Raises InputError for a large domain."""
    keyed = Draws(seed, [0])
    if operator is None:
        operator = MatrixOperator(keyed.normal(0, (3, 8), "probe", dtype=torch.float64)[0])
    space = operator.domain
    if space.size > _LARGEST:
        raise InputError(
            f"the exact posterior of {space.describe()} needs a dense matrix; give an operator of <= {_LARGEST} values"
        )
    ones = torch.ones(space.size, dtype=torch.float64)
    prior = GaussianPrior(0 * ones, ones, space)
    # Complex data become two real rows each: the same posterior.
    matrix = MatrixOperator(dense(operator).double(), space, None if operator.range.complex else operator.range)
    sigma = float(torch.linalg.matrix_norm(matrix.matrix, 2)) / math.sqrt(snr)
    truth = keyed.normal(1, space.shape, "probe", dtype=torch.float64)
    y = matrix.A(truth) + sigma * keyed.normal(2, matrix.range.shape, "probe", dtype=torch.float64)
    return Posterior(prior, GaussianLikelihood(matrix, y[0], sigma))


@dataclass(frozen=True)
class MixtureFigures:
    """distance: sliced Wasserstein-1 from the draws to exact ones; floor: from those to as many others, what is unavoidable."""

    distance: float
    floor: float
    draws: int


def check_mixture(
    sampler: Sampler, unknowns: int = 8, data: int = 2, draws: int = 1000, seed: int = 0, directions: int = 10_000
) -> MixtureFigures:
    """Run ``sampler`` on ``mixture_problem``, whose posterior has several modes, and measure; nothing is judged."""
    posterior = mixture_problem(unknowns, data, seed)
    exact = posterior.exact()
    assert isinstance(exact, GaussianMixturePrior)
    found = sample(posterior, sampler, draws=draws, seed=seed)
    weighted = found if found.ess > 0.999 * draws else found.resample(draws, seed)
    true, other = (mixture_draws(exact, draws, seed, case).double() for case in (1, 2))
    x = weighted.x.double().flatten(1)
    return MixtureFigures(sliced_wasserstein(x, true, directions), sliced_wasserstein(other, true, directions), draws)


def mixture_problem(unknowns: int = 8, data: int = 2, seed: int = 0) -> Posterior:
    """The mixture problem of Cardoso et al. (2023): 25 modes at (8 i, 8 j, 8 i, 8 j, ...), i, j in -2..2, unit covariances.

    Weights: chi-squared (1), normalised.  ``A = U S V^T`` with random orthogonal factors and singular values uniform in
    [0, 1]; noise uniform in [0, 1] times the largest; data simulated.  Raises InputError for more data than unknowns.
    """
    if not 1 <= data <= unknowns:
        raise InputError(f"the mixture problem has 1 to {unknowns} data; got {data}")
    keyed = Draws(seed, [0])

    def normal(step: int, *shape: int) -> torch.Tensor:
        return keyed.normal(step, shape, "probe", dtype=torch.float64)[0]

    grid = torch.arange(-2, 3, dtype=torch.float64) * 8
    pairs = torch.cartesian_prod(grid, grid)
    means = pairs.repeat(1, (unknowns + 1) // 2)[:, :unknowns]
    weights = normal(10, len(means)).square()
    prior = GaussianMixturePrior(means, torch.ones(unknowns, dtype=torch.float64), weights / weights.sum())
    left, right = torch.linalg.qr(normal(11, data, data))[0], torch.linalg.qr(normal(12, unknowns, data))[0]
    values = keyed.uniform(13, (data,), "probe")[0]
    sigma = float(keyed.uniform(14, (1,), "probe")) * float(values.max())
    operator = MatrixOperator(left @ torch.diag(values) @ right.T)
    truth = mixture_draws(prior, 1, seed, 3)
    return Posterior(prior, GaussianLikelihood(operator, operator.A(truth)[0] + sigma * normal(15, data), sigma))


def mixture_draws(mixture: GaussianMixturePrior, draws: int, seed: int = 0, case: int = 0) -> torch.Tensor:
    """Exact draws of a mixture of Gaussians: (draws, d)."""
    keyed = Draws(seed, range(draws), case)
    ends = mixture.log_weights.exp().cumsum(0)
    pick = torch.searchsorted(ends / ends[-1], keyed.uniform(0, (1,), "probe")[:, 0]).clamp(max=len(ends) - 1)
    kick = keyed.normal(1, mixture.means.shape[1:], "probe", dtype=mixture.means.dtype)
    kick = kick * mixture.variances[pick].sqrt()
    if mixture.vectors is not None:
        kick = (mixture.vectors[pick] @ kick[:, :, None])[:, :, 0]
    return mixture.means[pick] + kick


def sliced_wasserstein(a: torch.Tensor, b: torch.Tensor, directions: int = 10_000, seed: int = 0) -> float:
    """Mean over random directions of the Wasserstein-1 distance between the projections of two sets (n, d) of one size.

    Raises InputError for sets of different shapes.
    """
    if a.shape != b.shape or a.ndim != 2:
        raise InputError(f"two sets of as many points (n, d) are compared; got {tuple(a.shape)} and {tuple(b.shape)}")
    total = 0.0
    for first in range(0, directions, 500):
        towards = Draws(seed, range(first, min(first + 500, directions))).normal(0, a.shape[1:], "probe", dtype=a.dtype)
        towards = towards / towards.norm(dim=1, keepdim=True)
        apart = (a @ towards.T).sort(0).values - (b @ towards.T).sort(0).values
        total += float(apart.abs().mean(0).sum())
    return total / directions


def check_resume(sampler: Sampler, posterior: Posterior | None = None, draws: int = 5) -> int:
    """Stop half-way, keep only the tensors of the state, go on with a fresh copy of the sampler: the same bits.

    Returns the step of the stop.  Raises CheckFailed with the largest difference.
    """
    posterior = posterior or gaussian_problem()
    stop = max(1, sampler.steps // 2)
    fresh = copy.deepcopy(sampler)  # before it has run: what an instance remembers does not survive a stop
    whole = sample(posterior, copy.deepcopy(sampler), draws=draws, block=2).x
    kept = _Kept(stop)
    try:
        sample(posterior, sampler, draws=draws, block=2, run=kept)
    except Stopped:
        resumed = sample(posterior, fresh, draws=draws, block=2, run=kept).x
        if not torch.equal(resumed, whole):
            worst = float((resumed - whole).abs().max())
            raise CheckFailed(
                f"{type(sampler).__name__} stopped at step {stop} and resumed differs by {worst:.3g}: part of what it knows is "
                "not in its State"
            ) from None
    return stop


class _Kept:
    """A run that stops once and remembers the tensors, as a checkpoint file would."""

    def __init__(self, stop: int) -> None:
        self.stop = stop
        self.tensors: dict[int, dict[str, torch.Tensor]] = {}

    def restore(self, owned: range) -> tuple[int, dict[int, State]] | None:
        if not self.tensors:
            return None
        return self.stop, {b: State.from_tensors(self.tensors[b]) for b in owned}

    def after_step(self, done: int, steps: int, states: dict[int, State]) -> None:
        if done == self.stop and not self.tensors:
            self.tensors = {b: {k: v.clone() for k, v in s.tensors().items()} for b, s in states.items()}
            raise Stopped(f"stopped at step {done}")


def _bias_limit(components: int, draws: int) -> float:
    from scipy.stats import norm

    return float(norm.isf(_FALSE_ALARM / (2 * components))) / math.sqrt(draws) + 0.01


def _coverage(ensemble: Ensemble, exact: GaussianPrior, level: float) -> float:
    """Exact probability of the draws' central intervals of ``level``, mean over components."""
    low, high = ensemble.quantile([(1 - level) / 2, (1 + level) / 2]).double().flatten(1)
    scale = exact.covariance().diagonal().sqrt()
    inside = torch.special.ndtr((high - exact.mean) / scale) - torch.special.ndtr((low - exact.mean) / scale)
    return float(inside.mean())


def _limits(sampler: Sampler, posterior: Posterior, covariance: torch.Tensor, draws: int) -> tuple[float, float]:
    """Monte Carlo on the mean of correlated variance ratios, widened below by one step of ``log sigma``."""
    from scipy.stats import norm

    scale = covariance.diagonal().sqrt()
    correlation = covariance / scale[:, None] / scale[None, :]
    spread = math.sqrt(2 * float(correlation.square().mean()) / (draws - 1)) * float(norm.isf(_FALSE_ALARM / 2))
    return 1 - spread - largest_step(sampler, posterior), 1 + spread
