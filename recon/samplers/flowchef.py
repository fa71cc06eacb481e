r"""FlowChef (Patel et al. 2024): steer the denoised point by the data's gradient and skip the network's.

The published step moves the state of a rectified flow, ``(1 - t) z`` with ``1 - t = 1 / (1 + sigma)``, by a fixed gradient
step on the denoised point and then follows the flow::

    D = D(z; sigma), no gradient
    g = rate / |S^-1/2 A s|^2  s A^T S^-1 (y - A x(D))
    z' = D + (sigma'/sigma) (z - D) + (1 + sigma') g          # no guidance on the last step

written here as the guided denoiser whose Euler step (``DDIM``) that is: ``D_y = D + (1 + sigma') / (1 - sigma'/sigma) g``.
``rate`` is a share of the gradient step that meets the best measured direction at once; the published scale eta of the mean
square of m data is ``rate = 2 eta |A s|^2 / m``.  The data's noise has no part in how far it goes: a heuristic for precise
data.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from recon.errors import InputError
from recon.posterior import Posterior
from recon.samplers.base import Claim, GuidedSampler
from recon.samplers.matching import local, require_local
from recon.samplers.spectral import data_norm
from recon.samplers.transitions import DDIM, Transition


@dataclass(frozen=True)
class FlowChef(GuidedSampler):
    """Gradient skipping: no vjp, no solve."""

    claim: ClassVar[Claim] = "heuristic"
    exact_for: ClassVar[str] = "nothing; it meets precise data where the flow is nearly straight"
    needs: ClassVar[str] = "linear operator, Gaussian likelihood"
    cost: ClassVar[str] = "1 denoiser + 1 (A, A^T) per step"
    advice: ClassVar[str] = "a smaller rate"

    transition: Transition = field(default_factory=DDIM)
    rate: float = 0.1

    def check(self, posterior: Posterior) -> None:
        super().check(posterior)
        if not 0 < self.rate < 2:
            raise InputError(
                f"FlowChef needs a rate between 0 and 2 (above, the data term oscillates); got {self.rate}"
            )
        if self.transition != DDIM():
            raise InputError(f"FlowChef is defined for the Euler step, transition DDIM(eta=0); got {self.transition}")
        require_local(posterior, "FlowChef")
        posterior.likelihood.gaussian().linear("FlowChef")

    def guide(self, posterior: Posterior, z: Tensor, sigma: float, sigma_next: float) -> Tensor:
        if sigma_next == 0:
            return posterior.denoise(z, sigma)
        at = local(posterior, z, sigma, jacobian=False)
        step = self.rate / data_norm(posterior, "FlowChef") ** 2
        return at.denoised + (1 + sigma_next) / (1 - sigma_next / sigma) * step * at.back(at.residual)
