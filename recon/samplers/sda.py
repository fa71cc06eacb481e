r"""Score-based data assimilation (Rozet and Louppe 2023): formula (G) of ``matching`` with an inflated noise.

    S + A s C s A^T  :=  S + gamma (s sigma)^2 I
    D_y = D + sigma^2 J^T s A^T (S + gamma (s sigma)^2)^-1 (y - A x(D))

No system is solved.  ``gamma`` carries the gain of the operator: its unit is that of (data / field)^2, and for scalars with
``x ~ N(0, s^2)``, ``y = a x + n`` it would have to be ``a^2 s_l^2 / (s_l^2 + sigma^2)`` (``s_l = s`` in the latent's
units), so no number is right at every level.  For ``a = s = 1`` the mean at signal-to-noise 1/4, 1, 4, 100 is 1.09, 1.24,
1.22, 1.01 of the true one with gamma = 0.01 and 0.82, 0.79, 0.85, 0.98 with gamma = 1 (as published, ``guard=False``).

Far from such data the pull of so narrow a covariance overshoots (the condition is in ``matching``, with ``gamma (s sigma)^2``
for ``r^2 A A^T``); ``guard`` shortens it (``matching.guarded``), so that few steps and precise data do not diverge, and leaves
it as published elsewhere.

``jacobian=False`` drops ``J`` (the published ``detach``): it weighs the data ``(s^2 + sigma^2) / s^2`` times too much at
high levels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from recon.errors import InputError
from recon.posterior import Posterior
from recon.samplers.base import Claim
from recon.samplers.matching import Local, MatchingSampler, guarded


@dataclass(frozen=True)
class SDA(MatchingSampler):
    """Guidance with the noise inflated by ``gamma`` times the level squared; cheap, for sparse sensors and coarse fields.

    guard: shorten a pull that overshoots.
    """

    claim: ClassVar[Claim] = "heuristic"
    exact_for: ClassVar[str] = "noise far above the signal; elsewhere biased as its module states"
    needs: ClassVar[str] = "Gaussian likelihood, differentiable denoiser (but with jacobian: false)"
    cost: ClassVar[str] = "1 denoiser + 1 vjp + (2 A, A^T) per step"
    advice: ClassVar[str] = "guard: true, a larger gamma, or more steps"

    steps: int = 256
    gamma: float = 0.01
    jacobian: bool = True
    guard: bool = True

    @property
    def differentiates(self) -> bool:
        return self.jacobian

    def check(self, posterior: Posterior) -> None:
        super().check(posterior)
        if not self.gamma >= 0:
            raise InputError(f"SDA needs gamma >= 0; got {self.gamma}")

    def correction(self, at: Local) -> Tensor:
        prior, noise = at.posterior.prior, at.posterior.likelihood.gaussian().sigma
        scale2 = float(prior.scale.square().mean())  # fields in units of their own: their mean square
        v = at.residual / (1 + self.gamma * scale2 * at.sigma**2 / noise**2)
        gradient = at.back(v)
        pulled = at.sigma**2 * (gradient if at.pull is None else at.pull(gradient))
        return guarded(at, v, pulled) if self.guard else pulled
