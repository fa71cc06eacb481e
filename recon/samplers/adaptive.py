r"""The probability flow with steps that each draw chooses for itself, from the difference of two solvers.

In the clock ``l = -log sigma`` a draw at level ``sigma`` tries the step ``h`` to ``s = sigma e^-h`` with Euler's rule (which is
DDIM) and with Heun's (Karras et al. 2022, algorithm 1), and goes on from the latter::

    z1 = (s / sigma) z + (1 - s / sigma) D(z; sigma)
    z2 = z + (s - sigma) / 2 ((z - D(z; sigma)) / sigma + (z1 - D(z1; s)) / s)
    e  = |z2 - z1|_rms / sqrt(spread^2 + s^2)            # of the first, as a share of the width that states have there
    taken where e <= tolerance / 2;   next h = h min(3, max(1/5, 0.9 sqrt(tolerance / (2 e))))

``e`` is the error of Euler's rule in one step, of order ``h^2``; that of Heun's is of order ``h^3``, and that of all its
``tolerance^-1/2`` steps together proportional to ``tolerance`` (Hairer, Norsett and Wanner 1993, II.4), in prior deviations,
since a share of the width at ``s`` is the same share of it at the end.

The level and the step of a draw are its own (``aux``): nothing depends on its company.  So draws are guided one by one, which
costs a graphics card its batches.  A draw that would need more than ``steps`` tries walks what is left of them in even steps
of ``l``, whatever their error; the log says so.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from recon.draws import Draws
from recon.ensemble import Ensemble
from recon.errors import InputError
from recon.posterior import Posterior
from recon.samplers.base import Claim, GuidedSampler, Sampler, State
from recon.samplers.mmps import MMPS
from recon.samplers.widths import prior_spread

log = logging.getLogger("recon.samplers")

_FIRST = 0.1  # of log sigma, the first try of every draw
_LONGEST = 0.5  # of log sigma, the step of those who have to hurry


@dataclass(frozen=True)
class Adaptive(Sampler):
    """``of``'s guide, walked by the probability flow to a tolerance; its grid, steps and transition have no part in it.

    steps: tries at most.  tolerance: of a step, and about that of a draw's end point, in the prior's deviations.
    spread: that deviation in the latent, for priors that do not state it.
    """

    claim: ClassVar[Claim] = "heuristic"
    exact_for: ClassVar[str] = "what its guide is exact for, as tolerance falls and sigma_max grows"
    needs: ClassVar[str] = "what its guide needs"
    cost: ClassVar[str] = "2 guides per try and draw"
    advice: ClassVar[str] = "a smaller tolerance, or a guide that solves for the data"

    steps: int = 300
    of: GuidedSampler = field(default_factory=MMPS)
    tolerance: float = 0.01
    spread: float | None = None

    def __post_init__(self) -> None:
        if self.of.claim == "exact":
            object.__setattr__(self, "claim", "consistent")

    def check(self, posterior: Posterior) -> None:
        super().check(posterior)
        if not 0 < self.tolerance < math.inf:
            raise InputError(f"Adaptive needs a tolerance > 0; got {self.tolerance}")
        if getattr(self.of, "form", None) == "norm":
            raise InputError(
                f"{type(self.of).__name__}(form='norm') is a displacement per step and no flow; use form='bayes'"
            )
        prior_spread(posterior.prior, self.spread, "Adaptive")
        self.of.check(posterior)

    def init(self, posterior: Posterior, draws: Draws) -> State:
        start = self.of.init(posterior, draws)
        top = torch.full_like(start.log_w, self.of.schedule(posterior).sigma_max)
        return State(start.z, start.log_w, {"sigma": top, "h": 0 * top + _FIRST, "forced": 0 * top})

    def step(self, posterior: Posterior, state: State, k: int, draws: Draws) -> State:
        own = [state.aux[name].tolist() for name in ("sigma", "h", "forced")]
        tried = [
            self._try(posterior, state.z[i : i + 1], numbers, k) for i, numbers in enumerate(zip(*own, strict=True))
        ]
        z, levels = torch.cat([z for z, _ in tried]), state.aux["sigma"].new_tensor([numbers for _, numbers in tried])
        return State(z, state.log_w, dict(zip(("sigma", "h", "forced"), levels.unbind(1), strict=True)))

    def finish(self, posterior: Posterior, state: State) -> Ensemble:
        forced = int((state.aux["forced"] > 0).sum())
        if forced:
            log.warning(
                "Adaptive: %d of %d draws took longer steps than their tolerance, to end within %d", forced, len(state.z),
                self.steps,
            )  # fmt: skip
        return super().finish(posterior, state)

    def _try(
        self, posterior: Posterior, z: Tensor, numbers: tuple[float, float, float], k: int
    ) -> tuple[Tensor, tuple[float, float, float]]:
        """One draw (1, *latent.shape) after one try, with its level, its next step, and whether it was ever forced."""
        (sigma, h, forced), schedule = numbers, self.of.schedule(posterior)
        if sigma == 0:
            return z, numbers
        bottom, left = schedule.sigma_min, self.steps - 1 - k  # tries after this one, of which the last leads to zero
        rest = math.log(sigma / bottom)
        if sigma <= bottom:
            return self.of.guide(posterior, z, sigma, 0.0), (0.0, h, forced)
        tight = left <= math.ceil(rest / _LONGEST)
        h = min(max(h, rest / left) if tight else h, rest)
        after = sigma * math.exp(-h) if h < rest else bottom
        denoised = self.of.guide(posterior, z, sigma, after)
        first = denoised + after / sigma * (z - denoised)
        ahead = self.of.guide(posterior, first, after, max(bottom, after * after / sigma))
        second = z + (after - sigma) / 2 * ((z - denoised) / sigma + (first - ahead) / after)
        spread = prior_spread(posterior.prior, self.spread, "Adaptive")
        error = float((second - first).double().square().mean().sqrt()) / math.hypot(spread, after)
        wrong = error > self.tolerance / 2
        following = h * min(3.0, max(0.2, 0.9 * math.sqrt(self.tolerance / (2 * error)) if error > 0 else 3.0))
        if wrong and not tight:
            return z, (sigma, following, forced)
        return second, (after, following, 1.0 if wrong else forced)
