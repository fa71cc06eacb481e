r"""Guesses of ``p(y | z)`` for ``TwistedSMC``, each with the proposal that belongs to it.

``Matched``: the moment-matched Gaussian, exact in the directions that the data see; one vjp per datum.
``Guided``: any guided denoiser proposes, the likelihood of the denoised state with a widened noise weighs.
``Plain``: the chain of the prior proposes, the likelihood of the denoised state weighs: no gradient of anything.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from recon.draws import Draws
from recon.errors import InputError
from recon.likelihoods import GaussianLikelihood
from recon.operators.base import LinearOperator
from recon.operators.cg import dot
from recon.posterior import Posterior
from recon.samplers.base import GuidedSampler
from recon.samplers.mmps import MMPS
from recon.samplers.smc.moments import Moments, Seen, signs
from recon.samplers.smc.particles import Level, Look
from recon.samplers.widths import prior_spread


@dataclass(frozen=True)
class Twist:
    """``look`` (psi and what the move needs), ``move`` (proposal and its ratio) and ``fields`` of ``ParticleSampler``."""

    def check(self, posterior: Posterior) -> None:
        """Refuse a posterior this twist cannot handle.  Raises InputError with the way out."""

    def look(self, posterior: Posterior, z: Tensor, level: Level) -> Look:
        """Psi at ``level.sigma`` and what ``move`` will ask for, a row per particle."""
        raise TypeError("Twist is a contract; use Matched(), Guided() or Plain()")

    def move(self, posterior: Posterior, z: Tensor, look: Look, level: Level) -> tuple[Tensor, Tensor]:
        """States at ``level.after`` and log prior kernel over proposal: the ancestral kernel, moved to "guided"."""
        denoised, guided = self.fields(posterior, look)
        if level.after == 0:
            return denoised, torch.zeros(len(z), dtype=torch.float64)
        tau = 1 - (level.after / level.sigma) ** 2
        width = level.after * math.sqrt(tau)
        noise = level.normal(z)
        shift = tau * (guided - denoised)
        moved = z - tau * (z - guided) + width * noise
        # log p/q of two Gaussians of one width, as an inner product: no difference of large squares.
        ratio = -dot(shift.double(), width * noise.double() + 0.5 * shift.double()) / width**2
        return moved, ratio

    def fields(self, posterior: Posterior, look: Look) -> tuple[Tensor, Tensor]:
        """``E[z0 | z]`` and the guess of ``E[z0 | z, y]``."""
        return look["denoised"], look["guided"]


@dataclass(frozen=True)
class Matched(Twist):
    """The Gaussian of ``smc.moments``: kernel, twist and proposal from the same moments, so a Gaussian prior leaves the weights
    nearly equal; linear Gaussian data of at most ``largest`` numbers.  probes: vjps spent on the variance the data do not see.
    """

    probes: int = 1
    largest: int = 32

    def check(self, posterior: Posterior) -> None:
        if self.probes < 1 or self.largest < 1:
            raise InputError(f"Matched needs probes >= 1 and largest >= 1; got {self.probes} and {self.largest}")
        self._seen(posterior)

    def _seen(self, posterior: Posterior) -> Seen:
        return Seen.of(posterior, "TwistedSMC(twist=Matched())", self.largest)

    def look(self, posterior: Posterior, z: Tensor, level: Level) -> Look:
        seen = self._seen(posterior)
        probes = signs(level.draws, level.k, self.probes, z[:1].numel(), z.dtype).to(z.device)
        moments = Moments.of(posterior, seen, z, level.sigma, probes)
        rows = {"denoised": moments.mean.reshape(z.shape), "gain": moments.G, "spread": moments.M, "rest": moments.c}
        return {**rows, "log_psi": moments.twist(seen)}

    def move(self, posterior: Posterior, z: Tensor, look: Look, level: Level) -> tuple[Tensor, Tensor]:
        seen, moments = self._seen(posterior), _moments(look)
        few = level.normal(z.new_zeros(len(z), 2 * len(seen.rows)), first=z[:1].numel())
        tau = 1 - (level.after / level.sigma) ** 2
        rho2 = level.after**2 / tau
        u = moments.draw(seen, level.normal(z).flatten(1), few, rho2)
        if level.after == 0:
            return u.reshape(z.shape), look["log_psi"] - seen.log_prob(u).cpu()
        return z + tau * (u.reshape(z.shape) - z), look["log_psi"] - moments.predicted(seen, u, rho2).cpu()

    def fields(self, posterior: Posterior, look: Look) -> tuple[Tensor, Tensor]:
        guided = _moments(look).guided(self._seen(posterior))
        return look["denoised"], guided.reshape(look["denoised"].shape)


def _moments(look: Look) -> Moments:
    return Moments(look["denoised"].flatten(1), look["gain"], look["spread"], look["rest"])


@dataclass(frozen=True)
class Plain(Twist):
    """Proposals of the prior's chain, ``psi = p(y | x(D))^t`` with ``t = 1 / (1 + (r g / s)^2)``: no gradient.

    ``r^2 = w^2 sigma^2 / (w^2 + sigma^2)`` is the variance of ``z0`` given ``z`` for a white prior of standard deviation ``w``
    (``width``; default: what the prior states), ``s`` the noise of the data, ``g`` the gain of the operator, all of it in
    ``stiffness = g / s`` (default: found from the operator for Gaussian noise; without one, 0: no tempering).
    """

    width: float | None = None
    stiffness: float | None = None

    def check(self, posterior: Posterior) -> None:
        prior_spread(posterior.prior, self.width, type(self).__name__)
        if self.stiffness is not None and not self.stiffness >= 0:
            raise InputError(f"stiffness, gain over noise, must not be negative; got {self.stiffness}")

    def look(self, posterior: Posterior, z: Tensor, level: Level) -> Look:
        denoised = posterior.denoise(z, level.sigma)
        return {"denoised": denoised, "log_psi": self.weigh(posterior, denoised, level.sigma)}

    def fields(self, posterior: Posterior, look: Look) -> tuple[Tensor, Tensor]:
        return look["denoised"], look["denoised"]

    def weigh(self, posterior: Posterior, denoised: Tensor, sigma: float) -> Tensor:
        """``log psi`` of denoised states: (n,)."""
        w = prior_spread(posterior.prior, self.width, type(self).__name__)
        r2 = (w * sigma) ** 2 / (w**2 + sigma**2)
        stiff2 = stiffness_of(posterior) ** 2 if self.stiffness is None else self.stiffness**2
        posterior.count("forward", len(denoised))
        with torch.no_grad():
            return posterior.likelihood.log_prob(posterior.prior.decode(denoised)).double() / (1 + r2 * stiff2)


@dataclass(frozen=True)
class Guided(Plain):
    """Proposals of any guided denoiser, for data of any number; psi as in ``Plain``."""

    guide: GuidedSampler = field(default_factory=MMPS)

    def check(self, posterior: Posterior) -> None:
        super().check(posterior)
        self.guide.check(posterior)

    def look(self, posterior: Posterior, z: Tensor, level: Level) -> Look:
        plain = super().look(posterior, z, level)
        return {**plain, "guided": self.guide.guide(posterior, z, level.sigma, level.after)}

    def fields(self, posterior: Posterior, look: Look) -> tuple[Tensor, Tensor]:
        return look["denoised"], look["guided"]


def stiffness_of(posterior: Posterior) -> float:
    """Root mean square over the data of (row norm of the operator in latent units) over (noise), by one probe.

    Zero where the likelihood has no Gaussian form or its operator is not linear.
    """
    likelihood, prior = posterior.likelihood, posterior.prior
    if not isinstance(likelihood, GaussianLikelihood) or not isinstance(likelihood.operator, LinearOperator):
        return 0.0
    probe = Draws(0, range(4)).normal(1, prior.latent.shape, "probe", dtype=prior.dtype).to(prior.device)
    with torch.no_grad():
        seen = likelihood.operator.A(prior.decode_linear(probe)) / likelihood.sigma
    return math.sqrt(float(seen.abs().square().double().mean()))
