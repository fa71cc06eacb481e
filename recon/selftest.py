"""Checks of samplers against posteriors that are known exactly, on any linear operator.

With a white Gaussian prior and Gaussian noise the posterior is Gaussian whatever the operator, so a sampler that claims to be
exact can be caught: its mean within Monte-Carlo error, its variance within Monte-Carlo error and the one step of ``log sigma``
that a first-order transition loses.  A heuristic sampler is measured, not judged.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch

from recon.draws import Draws
from recon.errors import CheckFailed, InputError, Stopped
from recon.likelihoods import GaussianLikelihood
from recon.operators.base import LinearOperator
from recon.operators.matrix import MatrixOperator
from recon.posterior import Posterior, dense
from recon.priors.gaussian import GaussianPrior
from recon.samplers.base import GuidedSampler, Sampler, State
from recon.samplers.loop import sample

_LARGEST = 1024  # values of the domain for which the exact posterior is worth a dense matrix
_FALSE_ALARM = 1e-5


@dataclass(frozen=True)
class SamplerFigures:
    """How far draws are from the exact posterior.

    bias: largest error of the mean over components, in posterior standard deviations; bias_limit: what Monte Carlo explains.
    variance_ratio: mean over components of the draws' variance over the exact one, and the interval expected of it.
    """

    bias: float
    bias_limit: float
    variance_ratio: float
    variance_limits: tuple[float, float]
    draws: int


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
        bias, _bias_limit(len(mean), draws), ratio, _limits(sampler, posterior, covariance, draws), draws
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


def _limits(sampler: Sampler, posterior: Posterior, covariance: torch.Tensor, draws: int) -> tuple[float, float]:
    """Monte Carlo on the mean of correlated variance ratios, widened below by one step of ``log sigma``."""
    from scipy.stats import norm

    scale = covariance.diagonal().sqrt()
    correlation = covariance / scale[:, None] / scale[None, :]
    spread = math.sqrt(2 * float(correlation.square().mean()) / (draws - 1)) * float(norm.isf(_FALSE_ALARM / 2))
    step = 0.0
    if isinstance(sampler, GuidedSampler):
        levels = sampler.sigmas(posterior)[:-1].log()
        step = float((levels[:-1] - levels[1:]).max())
    return 1 - spread - step, 1 + spread
