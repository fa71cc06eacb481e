r"""ReSample (Song et al. 2024): walk down the latent's levels, now and then meet the data hard, and put the noise back.

Step from level ``sigma`` to ``s``, ``tau = 1 - s^2 / sigma^2``; all in variance-exploding coordinates (algorithm 1)::

    D  = D(z; sigma);   z' = D + (s / sigma) (z - D)                         # DDIM, no noise
    z' = z' - guidance / (1 + sigma^2) scales grad_z |y - A decode(D)|       # as DPS, form norm
    every so often:
        z^ = D after lookahead evaluations on plain DDIM steps from z'
        z^ = encode(hard(decode(z^)))     while less than ``split`` of the steps are done
             or hard(z^)                  afterwards, through the decoder
        z' = (kappa^2 z^ + s^2 z') / (kappa^2 + s^2) + (1 / kappa^2 + 1 / s^2)^(-1/2) xi,   kappa^2 = gamma s^2 tau
    last of all: z = hard(z)

``hard`` fits the data and stops where their noise begins (``consistency``), so that every draw ends with a residual of one
standard deviation per datum (less where the prior alone gave less; more where Adam's steps run out first).

The norm is that of the residual whitened, times the r.m.s. noise; its step is that of 500 steps, rescaled by ``500 / steps``;
``scales = sqrt((1 + sigma^2)(1 + s^2))``.  It is cut short, per draw, where by its slope the residual would come down to the
noise, however long units and few steps would make it.

The mean above (the paper's stochastic resampling) is that of ``z0 = z^`` known within kappa and seen as ``z'``.  gamma to
infinity is new noise on ``z^``, gamma to 0 leaves ``z'``.  Where ``z'`` is ``z^`` with noise of level s, the result has less
noise than the level says, by the share ``c (1 - c)`` of its variance, ``c = kappa^2 / (kappa^2 + s^2)``: at most a quarter.

Unlike in the authors' code, the fit stops at the noise (theirs at a residual below it), nothing pulls unmeasured pixels to
zero (their optimiser decays weights), levels and denoised latents are those of the step, and what is counted in steps is a
share of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from recon.draws import Draws
from recon.errors import InputError
from recon.operators.base import LinearOperator
from recon.operators.cg import CG, dot, spread
from recon.posterior import Posterior
from recon.priors.base import Prior
from recon.samplers.base import Claim, LevelSampler, State
from recon.samplers.consistency import Fit, descended, measured, solved
from recon.samplers.requirements import require_gaussian
from recon.schedules import Grid, VPUniform


@dataclass(frozen=True)
class ReSample(LevelSampler):
    """Hard data consistency in the latent of an autoencoder; a prior without one is its own latent.

    guidance: of the step between.  gamma: trust in the fitted point.  first, split, every: shares of the steps: done before
    data are first met, done when images give way to latents, and between two meetings.  lookahead: evaluations for the point
    that is fitted.  discrepancy: chi2 per datum at which a fit stops; 0 goes on to the end.  solver: "auto" fits by conjugate
    gradients (``cg``) where image and data are linear in what is fitted, else by Adam (``pixel`` in images of the prior's
    scale, ``latent``); "adam" never solves.
    """

    claim: ClassVar[Claim] = "heuristic"
    exact_for: ClassVar[str] = (
        "nothing; its draws meet the data within their noise, their spread is not the posterior's"
    )
    needs: ClassVar[str] = "Gaussian likelihood, differentiable operator, decoder and denoiser; an encoder"
    cost: ClassVar[str] = (
        "1 denoiser and decoder + their vjp + 1 (A, A^T) per step; (1 - first)/every fits, each of 5 denoisers and up to 50 "
        "(A, A^T) or hundreds of decoders with their vjp"
    )
    advice: ClassVar[str] = "smaller guidance, or a smaller rate in pixel and latent"

    steps: int = 500
    grid: Grid = field(default_factory=VPUniform)
    guidance: float = 0.5
    gamma: float = 40.0
    first: float = 1 / 3
    split: float = 2 / 3
    every: float = 0.02
    lookahead: int = 5
    discrepancy: float = 1.0
    solver: Literal["auto", "adam"] = "auto"
    cg: CG = field(default_factory=lambda: CG(iterations=50, tolerance=1e-4))
    pixel: Fit = field(default_factory=lambda: Fit(iterations=2000, rate=0.01))
    latent: Fit = field(default_factory=Fit)

    def check(self, posterior: Posterior) -> None:
        super().check(posterior)
        shares = 0 <= self.first <= 1 and 0 <= self.split <= 1 and 0 < self.every <= 1
        if not shares or self.lookahead < 1 or self.solver not in ("auto", "adam"):
            raise InputError(
                "ReSample takes first and split in [0, 1], every in (0, 1], lookahead >= 1 and solver 'auto' or 'adam'; got "
                f"{self.first}, {self.split}, {self.every}, {self.lookahead} and {self.solver!r}"
            )
        if not (0 <= self.guidance < math.inf and self.gamma > 0 and 0 <= self.discrepancy < math.inf):
            raise InputError(
                f"ReSample needs guidance >= 0, gamma > 0 and discrepancy >= 0; got {self.guidance}, {self.gamma} and "
                f"{self.discrepancy}"
            )
        require_gaussian(posterior, "ReSample")

    def step(self, posterior: Posterior, state: State, k: int, draws: Draws) -> State:
        prior, (sigma, after) = posterior.prior, self.levels(posterior)[k : k + 2]
        z = self._walked(posterior, state.z, sigma, after)
        if after == 0:
            return State(self.hard(posterior, z), state.log_w)
        stage = self.stage(k)
        if stage is None:
            return State(z, state.log_w)
        found = self._ahead(posterior, z, k + 1)
        if stage == "pixel":
            found = prior.encode(self.hard_image(posterior, prior.decode(found)))
        else:
            found = self.hard(posterior, found)
        noise = draws.normal(k, prior.latent.shape, "step", dtype=z.dtype).to(z.device)
        return State(resampled(z, found, sigma, after, self.gamma, noise), state.log_w)

    def stage(self, k: int) -> Literal["pixel", "latent"] | None:
        """What is fitted at the end of step ``k``, but for the last step; None where nothing is."""
        left, done = self.steps - 1 - k, (k + 1) / self.steps
        if left == 0 or left % max(1, round(self.every * self.steps)) or done < self.first:
            return None
        return "pixel" if done <= self.split else "latent"

    def hard_image(self, posterior: Posterior, x: Tensor) -> Tensor:
        """Images (n, *space.shape) that meet the data, from ``x``."""
        prior = posterior.prior
        if self.solver == "auto" and _linear(posterior):
            return x + Prior.decode_linear(prior, solved(posterior, x, self.discrepancy, self.cg))
        u = Prior.encode(prior, x)
        u = descended(posterior, u, lambda v: Prior.decode(prior, v), self.discrepancy, self.pixel)
        return Prior.decode(prior, u)

    def hard(self, posterior: Posterior, z: Tensor) -> Tensor:
        """Latents (n, *latent.shape) whose images meet the data, from ``z``."""
        prior = posterior.prior
        if self.solver == "auto" and prior.affine and _linear(posterior):
            return prior.encode(self.hard_image(posterior, prior.decode(z)))
        return descended(posterior, z, prior.decode, self.discrepancy, self.latent)

    def _walked(self, posterior: Posterior, z: Tensor, sigma: float, after: float) -> Tensor:
        """The guided DDIM step: (n, *latent.shape)."""
        prior, like = posterior.prior, posterior.likelihood.gaussian()
        if self.guidance == 0:
            denoised = posterior.denoise(z, sigma)
            return denoised + after / sigma * (z - denoised)
        posterior.count("denoiser", len(z))
        posterior.count("vjp", len(z))
        posterior.count_normal(len(z))
        with torch.enable_grad():
            point = z.detach().requires_grad_()
            denoised = prior.denoise(point, sigma)
            r = like.residual(prior.decode(denoised)) / like.sigma
            size = like.sigma.square().mean().sqrt() * torch.linalg.vector_norm(r.flatten(1), dim=1)
            (gradient,) = torch.autograd.grad(size.sum(), point)
        denoised, size, steepness = denoised.detach(), size.detach(), dot(gradient, gradient)
        noise = like.sigma.square().mean().sqrt() * (self.discrepancy * measured(r.detach())).sqrt()
        strength = self.guidance * 500 / self.steps * math.sqrt((1 + after**2) / (1 + sigma**2))
        most = (size - noise).clamp(min=0) / torch.where(steepness > 0, steepness, 1.0)
        pace = spread(most.clamp(max=strength), z)
        return denoised + after / sigma * (z - denoised) - pace * gradient

    def _ahead(self, posterior: Posterior, z: Tensor, k: int) -> Tensor:
        """The denoised latent at the end of ``lookahead`` evaluations on plain DDIM steps from level ``k``."""
        levels = self.levels(posterior)
        last = min(k + self.lookahead, self.steps) - 1
        for j in range(k, last):
            denoised = posterior.denoise(z, levels[j])
            z = denoised + levels[j + 1] / levels[j] * (z - denoised)
        return posterior.denoise(z, levels[last])


def resampled(z: Tensor, found: Tensor, sigma: float, after: float, gamma: float, noise: Tensor) -> Tensor:
    """``z`` at level ``after`` with ``found`` for its clean point: mean and variance of the module's text.

    sigma: the level before.  noise: standard normal, like ``z``.  gamma may be infinite: ``found + after noise``.
    """
    ratio = gamma * (1 - (after / sigma) ** 2)  # kappa^2 / after^2
    share = ratio / (1 + ratio) if ratio < math.inf else 1.0
    return share * found + (1 - share) * z + after * math.sqrt(share) * noise


def _linear(posterior: Posterior) -> bool:
    operator = posterior.likelihood.operator
    return isinstance(operator, LinearOperator) and operator.matched
