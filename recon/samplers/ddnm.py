r"""Denoising diffusion null-space models (Wang et al. 2023): keep the data's part from the data, the rest from the denoiser.

form="plus" (DDNM+), with the coefficients of the operator's spectral form, ``w = 1 / gain`` and next level ``s``::

    d' = d + l (y - d),   l = min(1, s / w)  (0 where not measured)
    c' = d' + sqrt(s^2 - (l w)^2) ( sqrt(1 - eta^2) (c - d)/sigma + eta xi )

so that the noise the data bring counts as noise of the next level.  form="plain" (DDNM) takes the data for exact, any
linear operator, and its pseudo-inverse by ``solve`` with a small ridge: ``x' = x + A^+ (y - A x)``, ``l = 1``, ``w = 0``; with
noisy data it reproduces the noise.

Time travel: every ``travel`` steps the state goes back as many levels, by fresh noise, and walks them again,
``repeats`` times in all.  It minimises no divergence from the posterior: a coefficient that is measured well is that of the
data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from recon.draws import Draws
from recon.errors import InputError
from recon.operators.cg import CG
from recon.posterior import Posterior
from recon.samplers.base import Claim, LevelSampler, State
from recon.samplers.matching import local, require_local, solved
from recon.samplers.spectral import data_norm, spectral_form
from recon.schedules import Grid, VPUniform


@dataclass(frozen=True)
class DDNM(LevelSampler):
    """Null-space restoration without vjps.  eta: share of fresh noise.  travel, repeats: see the module.

    ridge: of the pseudo-inverse of "plain", as a share of the largest singular value squared.  cg: of its solve, where that is
    no closed form.
    """

    claim: ClassVar[Claim] = "heuristic"
    exact_for: ClassVar[str] = "nothing; form: plain meets noiseless data exactly"
    needs: ClassVar[str] = "linear operator (form: plus also a spectral form), Gaussian likelihood"
    cost: ClassVar[str] = "1 denoiser per step and repeat (plain: and one solve with A^T A)"

    grid: Grid = field(default_factory=VPUniform)
    form: Literal["plus", "plain"] = "plus"
    eta: float = 0.85
    travel: int = 1
    repeats: int = 1
    ridge: float = 1e-6
    cg: CG = field(default_factory=lambda: CG(iterations=50, tolerance=1e-6))

    def check(self, posterior: Posterior) -> None:
        super().check(posterior)
        if self.form not in ("plus", "plain") or not 0 <= self.eta <= 1 or not self.ridge > 0:
            raise InputError(
                f"DDNM takes form 'plus' or 'plain', eta in [0, 1] and ridge > 0; got {self.form!r}, {self.eta}, {self.ridge}"
            )
        if self.travel < 1 or self.repeats < 1:
            raise InputError(f"DDNM needs travel >= 1 and repeats >= 1; got {self.travel} and {self.repeats}")
        if self.form == "plus":
            spectral_form(posterior, "DDNM(form='plus')")
        else:
            posterior.likelihood.gaussian().linear("DDNM")
            require_local(posterior, "DDNM")

    def step(self, posterior: Posterior, state: State, k: int, draws: Draws) -> State:
        z, levels = self._down(posterior, state.z, k, k, draws), self.levels(posterior)
        if (k + 1) % self.travel == 0 and levels[k + 1] > 0:
            first, here = k + 1 - self.travel, levels[k + 1]
            # Keys of noise that no plain step uses: one range of steps for every level walked again.
            for again in range(1, self.repeats):
                key = self.steps * (1 + (again - 1) * (self.travel + 1))
                back = math.sqrt(levels[first] ** 2 - here**2)
                z = z + back * self._noise(posterior, z, key + k, draws)
                for j in range(first, k + 1):
                    z = self._down(posterior, z, j, key + self.steps * (1 + j - first) + k, draws)
        return State(z, state.log_w)

    def _noise(self, posterior: Posterior, like: Tensor, key: int, draws: Draws) -> Tensor:
        return draws.normal(key, posterior.prior.latent.shape, "step", dtype=like.dtype).to(like.device)

    def _down(self, posterior: Posterior, z: Tensor, k: int, key: int, draws: Draws) -> Tensor:
        """From level ``k`` to the next with the noise numbered ``key``."""
        sigma, after = self.levels(posterior)[k : k + 2]
        kept = math.sqrt(1 - self.eta**2) / sigma
        noise = self._noise(posterior, z, key, draws) if after > 0 and self.eta > 0 else torch.zeros_like(z)
        if self.form == "plain":
            at = local(posterior, z, sigma, jacobian=False)
            ridge = self.ridge * data_norm(posterior, "DDNM") ** 2
            moved = at.denoised + solved(at, 1 / ridge, self.cg) / ridge
            return moved + after * (kept * (z - at.denoised) + self.eta * noise)
        form = spectral_form(posterior, "DDNM")
        denoised = posterior.denoise(z, sigma)
        c, d, xi = form.analyse(z), form.analyse(denoised), form.analyse(noise)
        share = (after * form.gain).clamp(max=1)
        left = (after**2 - (share / torch.where(form.gain > 0, form.gain, 1.0)) ** 2).clamp(min=0).sqrt()
        return form.synthesise(d + share * (form.data - d) + left * (kept * (c - d) + self.eta * xi))
