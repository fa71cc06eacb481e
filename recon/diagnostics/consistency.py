r"""Does the sampler agree with itself, without any truth?  Calibration at the measurement one has.

Take a draw x' of the ensemble, simulate y' from it, infer again, and rank x' among the new draws.  The inference must use
**both** y and y': given y, x' and y' are jointly from ``p(x | y) p(y' | x)``, so x' and a draw of ``p(x | y, y')`` are
exchangeable and the rank is uniform (posterior simulation-based calibration; Säilynoja et al. 2025).  Inferring from y'
alone is not uniform even for an exact sampler: x' comes from the posterior, not the prior.

It sees whether the posteriors at y and at (y, y') fit together, through this sampler.  It cannot see a wrong prior or a
wrong operator, since both sides share them, nor draws that are wrong in the same way twice.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recon.diagnostics.ranks import Probe, case_ranks, probes
from recon.diagnostics.verdicts import FALSE_ALARM, Verdict, judge_all
from recon.draws import Draws
from recon.ensemble import Ensemble
from recon.errors import InputError
from recon.likelihoods import GaussianLikelihood, Likelihood, StackedLikelihood
from recon.posterior import Posterior
from recon.samplers.base import Sampler
from recon.samplers.loop import sample


@dataclass(frozen=True)
class SelfConsistency:
    """Ranks of re-inferred draws, by test function, and the verdicts on them.

    ranks: name -> one number per case.  verdicts: name -> Verdict, and "overall".
    """

    ranks: Mapping[str, tuple[float, ...]]
    verdicts: Mapping[str, Verdict]

    def summary(self) -> dict[str, Any]:
        """JSON values."""
        verdicts = {name: verdict.summary() for name, verdict in self.verdicts.items()}
        return {"ranks": {name: list(r) for name, r in self.ranks.items()}, "verdicts": verdicts}


@dataclass(frozen=True)
class Again:
    """How to repeat an inference.

    sampler: the one that made the ensemble.  draws: per case.  cases: how many draws are re-inferred; their verdict
    "cannot say" names the power that so many give.  seed: of noise, ties and sampling.
    """

    sampler: Sampler
    draws: int = 19
    cases: int = 100
    seed: int = 0


def self_consistency(
    posterior: Posterior,
    ensemble: Ensemble,
    again: Again,
    functions: Mapping[str, Probe] | None = None,
    false_alarm: float = FALSE_ALARM,
) -> SelfConsistency:
    """Re-infer draws of ``ensemble`` from the measurement and a simulated second one, and judge their ranks.

    Costs ``cases`` inferences of ``draws`` draws.  Needs as many independent draws in the ensemble as cases.
    Raises InputError for fewer draws than cases (a weighted ensemble counts its effective ones), or a sampler that cannot
    handle the stacked measurements (a Gaussian one stays a Gaussian one on the same operator).
    """
    ensemble = ensemble.independent()
    if ensemble.ess < again.cases - 1e-6:
        raise InputError(
            f"{again.cases} cases take as many independent draws; the ensemble is worth {ensemble.ess:.3g}: "
            "draw more, or ask for fewer cases"
        )
    equal = ensemble.weights.max() - ensemble.weights.min() < 1e-12
    starts = ensemble.x if equal else ensemble.resample(again.cases, again.seed).x
    functions = functions or probes(tuple(ensemble.x.shape[1:]), posterior.likelihood)
    found: dict[str, list[float]] = {name: [] for name in functions}
    worth = math.inf
    for case in range(again.cases):
        start = starts[case]
        second = measured_again(posterior.likelihood, start, again.seed, case)
        both = Posterior(posterior.prior, second)
        # Each case its own seed: inferences that share noise would share their errors.
        new = sample(both, again.sampler, draws=again.draws, seed=(again.seed + 1) * 2**20 + case)
        worth = min(worth, new.ess)
        ranks = case_ranks(new.x, start, functions, new.log_weights, again.seed, case)
        for name, value in ranks.items():
            found[name].append(value)
    fixed = {name: tuple(values) for name, values in found.items()}
    return SelfConsistency(fixed, judge_all(fixed, worth, false_alarm))


def measured_again(likelihood: Likelihood, x: Tensor, seed: int, case: int) -> Likelihood:
    """The likelihood of ``y`` and of a second measurement ``y'`` simulated from ``x`` (*domain.shape).

    Gaussian: one measurement ``(y + y')/2`` with ``sigma/sqrt 2`` (the same posterior, on the same operator).  Others: a
    ``StackedLikelihood``.
    """
    space = likelihood.operator.range
    like = next((b for b in likelihood.buffers() if b.is_floating_point()), x)
    kind = like.dtype.to_complex() if space.complex else like.dtype
    noise = Draws(seed, [0], case).normal(0, space.shape, "data", dtype=kind).to(like.device)
    with torch.no_grad():
        y = likelihood.simulate(x[None].to(like), noise)[0]
    if isinstance(likelihood, GaussianLikelihood):
        return GaussianLikelihood(likelihood.operator, (likelihood.y + y) / 2, likelihood.sigma / math.sqrt(2))
    return StackedLikelihood([likelihood, with_data(likelihood, y)])


def with_data(likelihood: Likelihood, y: Tensor) -> Likelihood:
    """``likelihood`` with another measurement ``y`` (*range.shape): operator and noise shared, nothing copied.

    Raises InputError for a likelihood that keeps its data where this does not look.
    """
    if isinstance(likelihood, GaussianLikelihood):
        made = GaussianLikelihood(likelihood.operator, y, likelihood.sigma)
        made.log_volume.copy_(likelihood.log_volume)
        return made
    if isinstance(likelihood, StackedLikelihood):
        pieces = zip(likelihood.sources, likelihood.operator.split(y), strict=True)
        return StackedLikelihood([with_data(source, piece) for source, piece in pieces])
    if "counts" not in dict(likelihood.named_buffers(recurse=False)):
        raise InputError(f"{type(likelihood).__name__} has no buffer 'counts' to put a simulated measurement in")
    made_again = copy.copy(likelihood)
    # A shallow copy of a module shares its table of buffers.
    made_again._buffers = {**likelihood._buffers, "counts": y.to(likelihood.counts)}  # type: ignore[arg-type]
    return made_again
