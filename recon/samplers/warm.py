r"""Start a guided sampler from what is known already: a reconstruction, or the draws of the frame before.

``z = encode(x^) + sigma n`` at an intermediate level ``sigma``, and only the levels below are walked.  Nothing makes the law of
that state the posterior's at ``sigma``, so the draws remember ``x^``.  For a Gaussian posterior N(m, v) and an exact guide, a
random solver ends with (per eigenvector of v, latent units)::

    mean  m + v / (v + sigma^2) (x^ - m)            variance  v (1 - v^2 / (v + sigma^2)^2)

and the probability flow with mean ``m + sqrt(v / (v + sigma^2)) (x^ - m)`` and variance ``v sigma^2 / (v + sigma^2)``.  Started
from draws of a posterior N(m', v') of the frame before, variance and mean are those plus ``(v / (v + sigma^2))^2 v'`` and with
``m'`` for ``x^``: so ``sigma`` has to be some three times the larger of posterior width and error of ``x^``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from recon.comm import Comm
from recon.draws import Draws
from recon.ensemble import Ensemble
from recon.errors import InputError
from recon.posterior import Posterior
from recon.samplers.base import LevelSampler, Sampler, State
from recon.samplers.ddrm import DDRM
from recon.samplers.loop import sample
from recon.samplers.reddiff import REDDiff


@dataclass(frozen=True, eq=False)
class WarmStart(Sampler):
    """``of``, started at the level ``sigma`` from ``x``.

    of: a sampler that walks down levels; its ``sigma_max`` is replaced by ``sigma``, its steps all lie below.  x: physical
    units, *space.shape for every draw or (draws, *space.shape), one each.  frame: noise of another frame (or case) is other
    noise.  Its claim is that of a heuristic whatever ``of`` claims.
    """

    of: LevelSampler = field(default_factory=LevelSampler)
    sigma: float = 1.0
    x: Tensor = field(default_factory=lambda: torch.zeros(()), repr=False)
    frame: int = 0

    def __post_init__(self) -> None:
        reason = why_not(type(self.of))
        if reason:
            raise InputError(f"{type(self.of).__name__} cannot start in the middle: {reason}")
        if not self.sigma > 0:
            raise InputError(f"a warm start needs sigma > 0, in units of the prior's latent; got {self.sigma}")
        below = self.of.sigma_min
        if below is not None and below >= self.sigma:
            raise InputError(f"a warm start at sigma {self.sigma:g} lies below the sampler's sigma_min {below:g}")
        object.__setattr__(self, "of", replace(self.of, sigma_max=self.sigma))
        object.__setattr__(self, "steps", self.of.steps)

    def check(self, posterior: Posterior) -> None:
        space = posterior.space
        batch = space.require(tuple(self.x.shape), "the start of a warm start")
        if len(batch) > 1 or not bool(torch.isfinite(self.x).all()):
            raise InputError(
                f"a warm start takes finite values ({space.describe()}) or one such array per draw; got {tuple(self.x.shape)}"
            )
        self.of.check(posterior)

    def init(self, posterior: Posterior, draws: Draws) -> State:
        prior = posterior.prior
        x = self.x.to(prior.device, prior.dtype)
        if x.ndim > len(posterior.space.shape):
            if max(draws.members) >= len(x):
                raise InputError(f"the warm start holds {len(x)} draws; draw {max(draws.members)} has none")
            x = x[list(draws.members)]
        else:
            x = x[None]
        start = self.of.init(posterior, self._keyed(draws))
        return replace(start, z=prior.encode(x) + start.z)

    def step(self, posterior: Posterior, state: State, k: int, draws: Draws) -> State:
        return self.of.step(posterior, state, k, self._keyed(draws))

    def place(self, posterior: Posterior, k: int) -> str:
        return self.of.place(posterior, k)

    def finish(self, posterior: Posterior, state: State) -> Ensemble:
        return self.of.finish(posterior, state)

    def _keyed(self, draws: Draws) -> Draws:
        return draws.of_case(draws.case + self.frame) if self.frame else draws


def why_not(sampler: type) -> str | None:
    """Why a sampler of this class cannot start in the middle; None where it can."""
    if not issubclass(sampler, LevelSampler):
        return "it does not walk down noise levels"
    if sampler.couples:
        return "its draws are weighed against each other from pure noise on; use a sampler whose draws never meet"
    if issubclass(sampler, DDRM | REDDiff):
        return "its first state is made of data or denoised, not noise of the first level; use MMPS or DiffPIR"
    return None


def warm_start(sampler: LevelSampler, x: Tensor, sigma: float, steps: int | None = None) -> WarmStart:
    """``sampler`` started from ``x`` (physical units) at level ``sigma``, in ``steps`` steps (default: the sampler's own).

    Raises InputError for a level that is not positive or below the sampler's ``sigma_min``; ``check`` refuses one above the
    prior's range, and arrays that do not fit.
    """
    return WarmStart(of=replace(sampler, steps=steps or sampler.steps), sigma=sigma, x=x)


def sample_sequence(
    frames: Sequence[Posterior], first: LevelSampler, later: LevelSampler, sigma: float, draws: int = 16, seed: int = 0,
    comm: Comm | None = None,
) -> Iterator[Ensemble]:  # fmt: skip
    """Draws of every frame of a sequence (SeqDiff, Stevens et al. 2024): each starts at its own of the last.

    frames: the posteriors in order, of one space.  first: of frame 0, from pure noise.  later: of the others, all of its steps
    below ``sigma``, which should be some two to three times the standard deviation of the change between frames (latent
    units): too small and errors are carried on, too large and steps are wasted.  Noise differs from frame to frame.

    Raises InputError as ``sample`` and ``warm_start`` do, and for an empty sequence or frames of unlike spaces.
    """
    if not frames:
        raise InputError("sample_sequence needs at least one frame")
    for number, frame in enumerate(frames[1:], start=1):
        difference = frames[0].space.mismatch(frame.space)
        if difference:
            raise InputError(f"frame {number} is of another space than frame 0: {difference}")
    warm_start(later, torch.zeros(frames[0].space.shape), sigma)  # refused before the first frame is drawn
    return _frames(frames, (first, later), sigma, (draws, seed), comm)


def _frames(
    frames: Sequence[Posterior], samplers: tuple[LevelSampler, LevelSampler], sigma: float, keys: tuple[int, int],
    comm: Comm | None,
) -> Iterator[Ensemble]:  # fmt: skip
    draws, seed = keys
    last: Ensemble | None = None
    for number, posterior in enumerate(frames):
        sampler: Sampler = samplers[0]
        if last is not None:
            sampler = WarmStart(of=samplers[1], sigma=sigma, x=last.x, frame=number)
        last = sample(posterior, sampler, draws=draws, seed=seed, comm=comm)
        yield last
