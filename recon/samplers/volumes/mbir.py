r"""DiffusionMBIR (Chung, Ryu, McCann, Klasky and Ye 2023): a predictor and a corrector by slices, then one step of ADMM.

Per level, with Z and U carried from level to level (algorithm 1)::

    z <- predictor(z; sigma -> sigma')                        # by slices; the reverse diffusion, noise of the whole step
    z <- z + d score(z; sigma') + sqrt(2 d) xi                # corrector, d = 2 (snr |xi| / |score|)^2 of each volume
    z <- ADMM for  1/2 |y - A x|^2_{S^-1} + w sum |dx/dz|      # on the noisy volume itself, one CG iteration from z (``ztv``)

What is done otherwise than in the published code: nothing flows through the ends of the volume (``coupling.periodic`` puts it
back); norms are of one volume and not of a batch of slices; directions of conjugate gradients are right beyond the first;
data are weighed by their noise, which moves no iterate where it is even but says when they are met; the walk ends at the
denoised volume after its ADMM step, without a last correction that takes the data for noiseless.

The noisy volume is moved towards data of a clean one, so no law is claimed.  Cost: two evaluations a level (one without
corrector), and it takes many levels: the published runs have 2000.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from recon.draws import Draws
from recon.errors import InputError
from recon.operators.cg import CG, dot, spread
from recon.posterior import Posterior
from recon.samplers.base import Claim, GuidedSampler, State
from recon.samplers.decoupled import noise
from recon.samplers.transitions import EulerMaruyama, Transition
from recon.samplers.volumes.base import VolumeSampler, own
from recon.samplers.volumes.ztv import Volume


@dataclass(frozen=True)
class DiffusionMBIR(VolumeSampler, GuidedSampler):
    """Predictor, corrector and one ADMM iteration on the noisy volume, at many levels.

    transition: the predictor.  snr: of the corrector; 0 leaves it out.
    """

    claim: ClassVar[Claim] = "heuristic"
    exact_for: ClassVar[str] = "nothing; noiseless data are met in the end"
    needs: ClassVar[str] = "linear operator, Gaussian likelihood; coupling.weight for volumes"
    cost: ClassVar[str] = "2 denoisers per slice + (K + 1) (A, A^T) per step"
    advice: ClassVar[str] = "take more steps, or snr: 0"

    steps: int = 1000
    cg: CG = field(default_factory=lambda: CG(iterations=1, tolerance=0.0))
    transition: Transition = field(default_factory=EulerMaruyama)
    snr: float = 0.16

    def check(self, posterior: Posterior) -> None:
        super().check(posterior)
        if not self.snr >= 0:
            raise InputError(f"DiffusionMBIR needs snr >= 0; got {self.snr}")

    def guide(self, posterior: Posterior, z: Tensor, sigma: float, sigma_next: float) -> Tensor:
        return posterior.denoise(z, sigma)

    def step(self, posterior: Posterior, state: State, k: int, draws: Draws) -> State:
        volume, after = self.problem(posterior), self.levels(posterior)[k + 1]
        draws = own(volume, draws)
        duals = {name: state.aux[name] for name in ("Z", "U") if name in state.aux}
        rest = {name: value for name, value in state.aux.items() if name not in duals}
        moved = GuidedSampler.step(self, posterior, State(state.z, state.log_w, rest), k, draws)
        z = moved.z
        if after > 0 and self.snr > 0:
            # Keys of the predictor's noise are 0 .. steps - 1.
            z = self._corrected(posterior, z, after, noise(posterior, draws, self.steps + k), volume)
        z, memory = self.fitted(posterior, z, 0.0, State(z, state.log_w, duals))
        return State(z, state.log_w, {**moved.aux, **memory})

    def _corrected(self, posterior: Posterior, z: Tensor, sigma: float, xi: Tensor, volume: Volume) -> Tensor:
        score = (posterior.denoise(z, sigma) - z) / sigma**2
        pairs = [(xi, xi), (score, score)]
        over, under = [dot(a, b) for a, b in pairs] if volume.slab is None else volume.slab.dots(pairs)
        size = 2 * self.snr**2 * torch.where(under > 0, over / torch.where(under > 0, under, 1.0), 0.0)
        rate = spread(size, z)
        return z + rate * score + (2 * rate).sqrt() * xi
