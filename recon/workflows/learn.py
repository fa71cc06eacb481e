r"""A prior learnt from measurements alone: posterior samples by moment matching (MMPS), a denoiser trained on them, and again.

The samples of a lap follow the probability-flow ODE of the posterior from ``z = sigma_0 n``, in the second-order multistep
form of DPM-Solver++ (Lu et al. 2022) in variance-exploding coordinates.  With ``h = log(s / s')`` and ``D`` the guided
denoised state::

    z' = (s'/s) z + (1 - s'/s) (D + h / (2 h_before) (D - D_before))

An ancestral step loses about one step of ``log sigma`` of the variance; lap after lap that would shrink the prior.  The grid is
even in ``log sigma``, where 32 steps lose about 1 %.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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

    guide: of the denoiser; its grid and steps are walked by the second-order solver.  comm: its threads draw blocks side by
    side, one thread each.
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
        self.guide.check(posterior)
        sigmas = self.guide.sigmas(posterior).tolist()
        z, before, last = self.guide.init(posterior, draws).z, None, 0.0
        for sigma, sigma_next in itertools.pairwise(sigmas):
            denoised = self.guide.guide(posterior, z, sigma, sigma_next)
            if sigma_next == 0:
                z = denoised
                break
            h, ratio = math.log(sigma / sigma_next), sigma_next / sigma
            ahead = denoised if before is None else denoised + (h / (2 * last)) * (denoised - before)
            z, before, last = ratio * z + (1 - ratio) * ahead, denoised, h
        return prior.decode(z)
