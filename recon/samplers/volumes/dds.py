r"""DDS, decomposed diffusion sampling of volumes (Chung, Lee and Ye 2024).

Per step, with the prior of slices applied to each slice, ``x = b + s v``, and Z, U carried from step to step::

    D  = D(z; sigma)                                                   # slices, one evaluation each
    D' = a few CG iterations from D, inside ADMM (``ztv``), on
           1/2 |y - A x|^2_{S^-1} + pull/2 |v - D|^2 + w sum |dx/dz|    # algorithm 2, which has pull = 0
    z' = D' + sigma' ( sqrt(1 - eta^2) e + eta xi )                    # eq. 18 in variance-exploding form

``e = (z - D)/sigma`` is the prior's noise, as published; ``noise="guided"`` takes ``(z - D')/sigma``, that of the state given
the data.  The last step ends at ``D'``.  No network is differentiated.

``pull = strength / r^2`` with ``1/r^2 = 1/spread^2 + 1/sigma^2``.  With w = 0, strength = 1 and CG converged, ``D'`` is
``E[v | z, y]`` for a white Gaussian prior of that spread, exactly; and with ``noise="guided"`` and eta = 0 the walk is then the
probability flow of the posterior, so its draws are exact as steps grow.  (The published weight for noisy data is a constant
in place of ``1/r^2``.)  strength = 0 is the published Krylov form: nothing but the number of iterations holds D' near D, which
suits precise data and few iterations.
With w > 0 the answer is that of the problem above to the accuracy of one warm-started ADMM iteration a step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from recon.draws import Draws
from recon.errors import InputError
from recon.operators.cg import CG
from recon.posterior import Posterior
from recon.samplers.base import Claim, State
from recon.samplers.decoupled import noise as fresh
from recon.samplers.volumes.base import VolumeSampler, one_slice, own
from recon.samplers.widths import prior_spread


@dataclass(frozen=True)
class DDS(VolumeSampler):
    """Denoise slices, a few conjugate-gradient iterations on the volume, renew noise.

    eta: share of the noise that is renewed, in standard deviation (published: 0.15, 0.5, 0.8 for 19, 49, 99 steps).
    strength, spread: of the pull towards the denoised slices, and the standard deviation of the prior's latent (as it is
    known).  noise: what is carried on; see the module.
    """

    claim: ClassVar[Claim] = "heuristic"
    exact_for: ClassVar[str] = "white Gaussian priors with noise: guided, eta: 0 and no coupling, as steps and CG grow"
    needs: ClassVar[str] = "linear operator, Gaussian likelihood; coupling.weight for volumes"
    cost: ClassVar[str] = "1 denoiser per slice + (K + 1) (A, A^T) per step"
    advice: ClassVar[str] = "fewer cg iterations, or strength: 1"

    steps: int = 50
    cg: CG = field(default_factory=lambda: CG(iterations=5, tolerance=1e-4))
    eta: float = 0.5
    strength: float = 1.0
    spread: float | None = None
    noise: Literal["prior", "guided"] = "prior"

    def check(self, posterior: Posterior) -> None:
        super().check(posterior)
        if not 0 <= self.eta <= 1 or not self.strength >= 0 or self.noise not in ("prior", "guided"):
            raise InputError(f"DDS needs 0 <= eta <= 1, strength >= 0 and noise 'prior' or 'guided'; got {self}")
        if self.strength > 0:
            prior_spread(one_slice(posterior.prior), self.spread, "DDS")

    def pull(self, posterior: Posterior, sigma: float) -> float:
        """``strength / r^2``, in the latent."""
        if self.strength == 0:
            return 0.0
        spread = prior_spread(one_slice(posterior.prior), self.spread, "DDS")
        return self.strength * (1 / spread**2 + 1 / sigma**2)

    def step(self, posterior: Posterior, state: State, k: int, draws: Draws) -> State:
        levels = self.levels(posterior)
        sigma, after = levels[k], levels[k + 1]
        denoised = posterior.denoise(state.z, sigma)
        z, memory = self.fitted(posterior, denoised, self.pull(posterior, sigma), state)
        if after > 0:
            kept = (state.z - (denoised if self.noise == "prior" else z)) / sigma
            z = z + after * math.sqrt(1 - self.eta**2) * kept
            if self.eta > 0:
                z = z + after * self.eta * fresh(posterior, own(self.problem(posterior), draws), k)
        return State(z, state.log_w, memory)
