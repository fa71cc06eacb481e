"""From a ``learn.yaml`` to a prior folder: a prior learnt from measurements alone, without a single image.

Posterior samples by moment matching (MMPS), a denoiser trained on them, and again.  The samples of a lap follow the
probability-flow ODE of the posterior from ``z = sigma_0 n``, by the second-order multistep method DPM-Solver++(2M)
(``samplers.transitions.DPMSolver2M``).  An ancestral step loses about one step of ``log sigma`` of the variance; lap after lap
that would shrink the prior.  The grid is even in ``log sigma``, where 32 steps lose about 1 %.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from recon import comm as ranks
from recon.comm import Comm, serial
from recon.draws import Draws
from recon.errors import InputError
from recon.likelihoods import GaussianLikelihood
from recon.operators.cg import CG
from recon.posterior import Posterior
from recon.priors.base import Card, Prior
from recon.priors.learning import Laps, LearningConfig, Learnt, side_by_side
from recon.priors.learning.laps import Job
from recon.priors.network import Architecture, NetworkPrior
from recon.priors.store import save_prior
from recon.samplers.base import GuidedSampler
from recon.samplers.loop import block_threads
from recon.samplers.mmps import MMPS
from recon.samplers.transitions import DPMSolver2M
from recon.schedules import LogLinear
from recon.workflows.learn_data import Observed, observed
from recon.workflows.learn_file import LearnFile, read_learn_file
from recon.workflows.train import asked_to_stop

log = logging.getLogger("recon.learn")

_TOLD = ("chi2", "spread", "lost")  # of a lap's samples, on the card


def learn(
    path: Path,
    out: Path | None = None,
    resume: bool = True,
    workspace: Path | None = None,
    say: Callable[[str], None] = log.info,
    overrides: Iterable[str] = (),
) -> Path:
    """Learn the prior that a file describes and write it to ``out`` (the file's own folder by default), which is returned.

    What is finished is kept in ``out/learning`` and, with ``resume``, gone on from with the same bits.  ``say`` receives the
    lines of progress.  overrides: ``a.b=value`` for keys of the file.

    Raises InputError for a wrong file, measurements that cannot be read or do not fit together, a folder of other
    measurements or settings, or more than one process; Stopped, with all that is finished kept, on SIGTERM, SIGINT or
    SIGUSR1; ReconError when sampling or training diverges.
    """
    comm = ranks.from_environment()
    if comm.draws.size > 1:
        raise InputError(f"recon learn is the work of one process and its threads; it was started as {comm.draws.size}")
    file = read_learn_file(path, overrides, workspace)
    out = Path(path).parent if out is None else out
    if not resume:
        shutil.rmtree(out / "learning", ignore_errors=True)
    seen = observed(file)
    say(f"{file.name}: {len(seen.likelihoods)} observations, {seen.says}")
    walk = PosteriorDraws(walked(file.learning), comm)
    with asked_to_stop() as asked:
        laps = Laps(seen.likelihoods, file.architecture, file.learning, out / "learning", walk, say, asked)
        export(file, seen, laps.run(), out)
    return out


def export(file: LearnFile, seen: Observed, learnt: Learnt, out: Path) -> None:
    """Write the prior of the last lap to ``out`` with a card that says what it was learnt from and how the laps went."""
    laps = [{key: float(f"{record['samples'][key]:.4g}") for key in _TOLD} for record in learnt.records]
    facts: dict[str, Any] = {
        "data": seen.sources,
        "held_out": (),
        "denoising": (),  # of images; there are none
        "learnt": {"observations": len(seen.likelihoods), "measured": seen.says, "laps": laps},
        "budget": {
            "images": sum(record["images"] for record in learnt.records),
            "seconds": round(sum(record["seconds"] for record in learnt.records)),
            "precision": file.learning.training.precision,
        },
        "unfit_for": file.unfit_for,
        "weights_licence": file.weights_licence,
        "notes": file.notes,
    }
    if seen.pixel_mm is not None:
        facts["pixel_mm"] = seen.pixel_mm
    learnt.prior.card = Card(file.name, file.summary, facts)
    save_prior(out, learnt.prior)


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
    return Laps(observations, architecture, config, folder, PosteriorDraws(walked(config)), say).run()


def walked(config: LearningConfig) -> MMPS:
    """The posterior sampler of the settings, before ``PosteriorDraws`` changes its transition."""
    return MMPS(steps=config.steps, cg=CG(config.cg_iterations, 1e-4), grid=LogLinear())


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
