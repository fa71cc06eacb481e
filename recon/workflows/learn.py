r"""A prior learnt from measurements alone: posterior samples by moment matching (MMPS), a denoiser trained on them, and again.

The samples of a lap follow the probability-flow ODE of the posterior from ``z = sigma_0 n``, by the second-order multistep
method DPM-Solver++(2M) (``samplers.transitions.DPMSolver2M``).  An ancestral step loses about one step of ``log sigma`` of the
variance; lap after lap that would shrink the prior.  The grid is even in ``log sigma``, where 32 steps lose about 1 %.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from recon.comm import Comm, serial
from recon.draws import Draws
from recon.likelihoods import GaussianLikelihood
from recon.operators.cg import CG
from recon.posterior import Posterior
from recon.priors.base import Prior
from recon.priors.learning import Laps, LearningConfig, Learnt, side_by_side
from recon.priors.learning.laps import Job
from recon.priors.network import Architecture, NetworkPrior
from recon.samplers.base import GuidedSampler
from recon.samplers.loop import block_threads
from recon.samplers.mmps import MMPS
from recon.samplers.transitions import DPMSolver2M
from recon.schedules import LogLinear

log = logging.getLogger("recon.learn")


def learn_prior(
    observations: Sequence[GaussianLikelihood],
    architecture: Architecture,
    config: LearningConfig,
    folder: Path,
    say: Callable[[str], None] = log.info,
) -> Learnt:
    """A prior over the objects of ``observations``, of which none is known, learnt in ``folder``.

    observations: ``y_i = A_i x_i + n_i`` of different objects, each with an operator of its own; shared operators are cheaper.
    Cost of a lap and sample: ``steps`` times one evaluation of the network, ``cg_iterations + 1`` vjps and as many uses of A
    and A^T, and then the training.  A folder in which a run was stopped is continued, with the same bits.

    Raises InputError as ``Laps``; ReconError when sampling or training diverges.
    """
    guide = MMPS(steps=config.steps, cg=CG(config.cg_iterations, 1e-4), grid=LogLinear())
    return Laps(observations, architecture, config, folder, PosteriorDraws(guide), say).run()


@dataclass(frozen=True)
class PosteriorDraws:
    """The E-step: draws of every observation's own posterior.

    guide: of the denoiser; its grid and steps are walked by the second-order solver, whatever its own transition.  comm: its
    threads draw blocks side by side, one thread each.
    """

    guide: GuidedSampler
    comm: Comm | None = None

    def __call__(self, prior: NetworkPrior, jobs: Sequence[Job]) -> Iterator[tuple[int, Tensor]]:
        """(number, samples in physical units) of each job."""
        workers = (self.comm or serial()).workers
        with block_threads(workers) as each:
            for first in range(0, len(jobs), workers):
                wave = {job.number: job for job in jobs[first : first + workers]}
                yield from each(lambda _, job: self.draw(prior, job.observations, job.draws), wave).items()

    def draw(self, prior: Prior, observations: Sequence[GaussianLikelihood], draws: Draws) -> Tensor:
        """One sample of each posterior: (n, *space.shape) in physical units.  draws: one member per observation."""
        posterior = Posterior(prior, side_by_side(observations))
        sampler = replace(self.guide, transition=DPMSolver2M())
        sampler.check(posterior)
        state = sampler.init(posterior, draws)
        for k in range(sampler.steps):
            state = sampler.step(posterior, state, k, draws)
        return prior.decode(state.z)
