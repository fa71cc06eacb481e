r"""Denoising diffusion restoration (Kawar et al. 2022): every coefficient of the operator's spectral form by itself.

With coefficients ``c`` of the state, ``d`` of ``D``, ``y`` of the data whose noise has standard deviation ``w = 1 / gain``, and
``s`` the next level (the paper's three cases in variance-exploding form)::

    not measured   c' = d + s ( sqrt(1 - eta^2) (c - d)/sigma + eta xi )
    s >= w         c' = (1 - eta_b) d + eta_b y + sqrt(s^2 - eta_b^2 w^2) xi
    s <  w         c' = d + sqrt(1 - eta^2) s (y - d)/w + eta s xi

and at the start ``c ~ N(y, sigma_0^2 - w^2)`` where measured with ``w <= sigma_0``, else ``N(0, sigma_0^2)``.  A bound is
minimised; the posterior is not sampled: for a unit Gaussian observed directly, on a grid even in ``log sigma``, the variance
is 0.2 to 0.35 of the true one with 20 steps and 0.01 to 0.04 with 1000, so more steps make it worse.  For precise data and at
most 100 steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from recon.draws import Draws
from recon.errors import InputError
from recon.posterior import Posterior
from recon.samplers.base import Claim, LevelSampler, State
from recon.samplers.spectral import spectral_form
from recon.schedules import Grid, VPUniform


@dataclass(frozen=True)
class DDRM(LevelSampler):
    """Spectral restoration without vjps.

    eta: share of fresh noise where the data say nothing (yet).  eta_b: trust in the data where they do.
    """

    claim: ClassVar[Claim] = "heuristic"
    exact_for: ClassVar[str] = "nothing; it fits precise data and plausibly fills what was not measured"
    needs: ClassVar[str] = "spectral form (mask, diagonal, periodic blur, <= 1024 unknowns), Gaussian likelihood"
    cost: ClassVar[str] = "1 denoiser per step"

    steps: int = 20
    grid: Grid = field(default_factory=VPUniform)
    eta: float = 0.85
    eta_b: float = 1.0

    def check(self, posterior: Posterior) -> None:
        super().check(posterior)
        if not (0 <= self.eta <= 1 and 0 <= self.eta_b <= 1):
            raise InputError(f"DDRM needs eta and eta_b in [0, 1]; got {self.eta} and {self.eta_b}")
        spectral_form(posterior, "DDRM")

    def init(self, posterior: Posterior, draws: Draws) -> State:
        form, start = spectral_form(posterior, "DDRM"), super().init(posterior, draws)
        top = self.levels(posterior)[0]
        heard = form.gain * top >= 1
        width = torch.where(heard, (1 - (form.gain * top).clamp(min=1) ** -2).sqrt(), 1.0)
        c = torch.where(heard, form.data, 0.0) + width * form.analyse(start.z)
        return State(form.synthesise(c), start.log_w)

    def step(self, posterior: Posterior, state: State, k: int, draws: Draws) -> State:
        form = spectral_form(posterior, "DDRM")
        sigma, after = self.levels(posterior)[k : k + 2]
        denoised = posterior.denoise(state.z, sigma)
        if after == 0:  # the third line for every measured coefficient, the first for the others
            return State(denoised, state.log_w)
        noise = draws.normal(k, posterior.prior.latent.shape, "step", dtype=state.z.dtype).to(state.z.device)
        c, d, xi = form.analyse(state.z), form.analyse(denoised), form.analyse(noise)
        return State(form.synthesise(self.mixed(form.gain, form.data, (c, d, xi), sigma, after)), state.log_w)

    def mixed(
        self, gain: Tensor, data: Tensor, of: tuple[Tensor, Tensor, Tensor], sigma: float, after: float
    ) -> Tensor:
        """``c'`` from the coefficients (c, d, xi)."""
        c, d, xi = of
        kept = math.sqrt(1 - self.eta**2)
        unseen = d + after * (kept / sigma * (c - d) + self.eta * xi)
        left = (after**2 - (self.eta_b / gain.clamp(min=1 / after)) ** 2).clamp(min=0).sqrt()
        clear = (1 - self.eta_b) * d + self.eta_b * data + left * xi
        faint = d + kept * after * gain * (data - d) + self.eta * after * xi
        return torch.where(gain == 0, unseen, torch.where(gain * after >= 1, clear, faint))
