r"""Decoupled annealing posterior sampling (Zhang et al. 2024): draw the clean image given data, then noise it afresh.

Per level ``k`` (algorithm 1)::

    x0 ~ p(z0 | z, y)             approximately, see surrogate
    z  = x0 + sigma_{k+1} xi      # full renewal of the noise; the last level keeps x0

With exact draws of ``p(z0 | z, y)`` every level's marginal is that of the posterior.  What stands for ``p(z0 | z)`` there:

surrogate="heuristic", the published one: ``N(x^, (width sigma)^2 I)``, ``x^`` the end of ``ode_steps`` Euler steps of the
probability-flow ODE from ``z``.  Biased even for Gaussians: for N(0, 1), ``y = a x + n``, r = a^2/sigma_y^2 and 200 levels from
100 to 0.1, mean and variance over the posterior's are, for r = 0.25, 1, 4, 100,
    exact ODE                   mean 1.78 1.36 1.11 1.005       variance 1.70 1.33 1.11 1.003
    ode_steps = 1 (x^ = D)      mean 1.07 1.03 1.01 1.000       variance 1.02 1.00 0.99 0.997
surrogate="matched": ``N(D, sigma^2 J)``, mean and covariance of ``p(z0 | z)`` itself (Tweedie); exact for Gaussian priors.

``inner`` draws with the data: "exact" perturbs and solves (linear operator, Gaussian noise), "langevin" runs ``langevin``
from ``x^`` on any differentiable likelihood, "auto" is exact where it can be.  One convention for the data term,
``1/2 |(y - A x) / sigma_y|^2``; the authors' code has no 1/2 there, which halves its variances at high signal-to-noise, and
takes a sigma_y other than the data's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from recon.draws import Draws
from recon.errors import InputError
from recon.likelihoods import GaussianLikelihood
from recon.operators.base import LinearOperator
from recon.operators.cg import CG, dot
from recon.posterior import Posterior
from recon.samplers.base import Claim, State
from recon.samplers.conditional import Noises, matched_draw, white_draw
from recon.samplers.decoupled import Decoupled, data_noise, noise
from recon.samplers.inner import Inner, data_curvature, data_gradient
from recon.samplers.requirements import require_affine, require_gaussian
from recon.schedules import Grid, Karras, Schedule

Kernel = Literal["auto", "exact", "langevin"]


@dataclass(frozen=True)
class DAPS(Decoupled):
    """Decoupled annealing; ``claim`` is "exact" with ``surrogate="matched"`` and "heuristic" with the published one.

    width: of the heuristic surrogate in units of sigma.  cg, roots: iterations of the data's system, and of the square root
    of the matched covariance.
    """

    claim: ClassVar[Claim] = "heuristic"
    exact_for: ClassVar[str] = (
        "surrogate='matched': Gaussian priors and linear Gaussian likelihoods; 'heuristic': data far above the noise"
    )
    needs: ClassVar[str] = (
        "heuristic: differentiable likelihood; matched: linear operator, Gaussian likelihood, differentiable denoiser"
    )
    cost: ClassVar[str] = (
        "heuristic: n denoisers + one solve or M (A, A^T) per step; matched: 1 denoiser + (R + K + 1) vjp"
    )

    steps: int = 200
    surrogate: Literal["heuristic", "matched"] = "heuristic"
    inner: Kernel = "auto"
    width: float = 1.0
    ode_steps: int = 5
    ode_grid: Grid = field(default_factory=Karras)
    langevin: Inner = field(default_factory=Inner)
    cg: CG = field(default_factory=lambda: CG(iterations=20, tolerance=1e-5))
    roots: int = 10

    def __post_init__(self) -> None:
        if self.surrogate not in ("heuristic", "matched"):
            raise InputError(f"DAPS knows the surrogates 'heuristic' and 'matched'; got {self.surrogate!r}")
        if not self.width > 0 or self.ode_steps < 1 or self.roots < 1:
            raise InputError(
                f"DAPS needs width > 0, ode_steps >= 1 and roots >= 1; got {self.width}, {self.ode_steps}, {self.roots}"
            )
        if self.surrogate == "matched":
            object.__setattr__(self, "claim", "exact")

    def check(self, posterior: Posterior) -> None:
        super().check(posterior)
        if self.surrogate == "matched":
            if self.inner == "langevin":
                raise InputError(
                    "DAPS(surrogate='matched') draws by solving, not by Langevin steps: the inverse of the matched covariance "
                    "is not at hand. Leave inner at 'auto', or use surrogate='heuristic'."
                )
            require_gaussian(posterior, "DAPS(surrogate='matched')").linear("DAPS(surrogate='matched')")
            require_affine(posterior, "DAPS(surrogate='matched')")
        require_kernel(posterior, self.inner, "DAPS")

    def keys(self) -> int:
        return self.langevin.keys + 3

    def data_step(self, posterior: Posterior, state: State, k: int, draws: Draws) -> Tensor:
        sigma, key = self.levels(posterior)[k], k * self.keys()
        if self.surrogate == "matched":
            noises = Noises(noise(posterior, draws, key + 1), data_noise(posterior, draws, key + 2))
            return matched_draw(posterior, state.z, sigma, noises, (self.cg, self.roots))
        centre = self.endpoint(posterior, state.z, sigma)
        width = self.width * sigma
        if draws_exactly(posterior, self.inner):
            noises = Noises(noise(posterior, draws, key + 1), data_noise(posterior, draws, key + 2))
            return white_draw(posterior, centre, width, noises, self.cg)
        return langevin_draw(posterior, centre, width, self.langevin, (draws, key + 3))

    def prior_step(self, posterior: Posterior, state: State, found: Tensor, k: int, draws: Draws) -> State:
        after = self.levels(posterior)[k + 1]
        z = found + after * noise(posterior, draws, k * self.keys()) if after > 0 else found
        return State(z, state.log_w, state.aux)

    def endpoint(self, posterior: Posterior, z: Tensor, sigma: float) -> Tensor:
        """Where ``ode_steps`` Euler steps of the probability-flow ODE from ``sigma`` lead: (n, *latent.shape)."""
        bottom = posterior.prior.schedule.sigma_min
        levels = [sigma, 0.0]
        if self.ode_steps > 1 and sigma > bottom * (1 + 1e-9):
            levels = self.ode_grid.sigmas(Schedule(bottom, sigma), self.ode_steps).tolist()
        for level, after in zip(levels[:-1], levels[1:], strict=True):
            denoised = posterior.denoise(z, level)
            z = denoised + after / level * (z - denoised)
        return z


def draws_exactly(posterior: Posterior, inner: Kernel) -> bool:
    """Whether ``inner`` draws by perturbing and solving on this posterior."""
    like = posterior.likelihood
    linear = isinstance(like.operator, LinearOperator) and like.operator.matched
    return inner == "exact" or (
        inner == "auto" and linear and isinstance(like, GaussianLikelihood) and posterior.prior.affine
    )


def require_kernel(posterior: Posterior, inner: Kernel, user: str) -> None:
    """InputError naming ``user`` when ``inner`` is no kernel or cannot draw on this posterior."""
    if inner not in ("auto", "exact", "langevin"):
        raise InputError(f"{user} draws with inner 'auto', 'exact' or 'langevin'; got {inner!r}")
    if inner == "exact":
        if not draws_exactly(posterior, "auto"):
            like = posterior.likelihood
            raise InputError(
                f"{user}(inner='exact') needs a linear operator with its exact transpose, Gaussian noise and a prior with an "
                f"affine decoder; got {type(like).__name__} of {like.operator.describe()} and prior "
                f"{posterior.prior.card.name!r}. inner='langevin' takes any differentiable likelihood."
            )


def langevin_draw(posterior: Posterior, centre: Tensor, width: float, inner: Inner, keyed: tuple[Draws, int]) -> Tensor:
    """``N(z; centre, width^2 I) p(y | z)`` by Langevin steps from ``centre``: (n, *latent.shape)."""

    def target(z: Tensor) -> tuple[Tensor, Tensor]:
        value, slope = data_gradient(posterior, z)
        away = z - centre
        return value - dot(away, away) / (2 * width**2), slope - away / width**2

    curvature = data_curvature(posterior, centre) + 1 / width**2
    return inner.run(target, centre, curvature, posterior, keyed)


def largest_step(posterior: Posterior) -> Tensor:
    """Largest singular value of ``S^-1/2 A`` after the prior's affine decoder, of a linear Gaussian likelihood: ()."""
    like = posterior.likelihood.gaussian()
    operator = like.linear("the norm of the data term")
    smallest, scale = float(like.sigma.min()), float(posterior.prior.scale.max())
    return torch.tensor(operator.norm() * scale / smallest, dtype=torch.float64)
