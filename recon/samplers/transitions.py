r"""Solvers: one step from noise level ``sigma`` to ``sigma_next``, given the (guided) denoiser ``D``.

With ``tau = 1 - sigma_next^2 / sigma^2``, ``e = (z - D) / sigma``, ``h = log(sigma / sigma_next)``; ``xi`` is fresh standard
normal noise.  A solver never sees the data: whatever guides has already moved ``D``.  All of them solve one family of
equations in the clock ``l = -log sigma`` (q = 1: probability flow; q = 2: the reverse diffusion)::

    dz = q (D - z) dl + sqrt(2 (q - 1)) sigma dw

order: of the error in the law of the end state, for a smooth ``D``, as steps grow on a fixed family of grids.  Orders above
one assume that the guided denoiser is smooth: where precise data make it jump (``sigma`` near ``sigma_y / |A|``), they gain
nothing over the first.  The last step, to ``sigma_next = 0``, is ``D`` in all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from recon.errors import InputError


@dataclass(frozen=True)
class Leg:
    """One step of a walk down the noise levels, as a solver sees it.

    levels: of the whole walk, the last one zero.  k: number of the step.  denoise: ``(z, sigma, level after it) -> D``.
    noise: the step's standard normal numbers; None on the last step and when the solver is not random.
    """

    levels: Sequence[float]
    k: int
    denoise: Callable[[Tensor, float, float], Tensor]
    noise: Tensor | None

    @property
    def sigma(self) -> float:
        """Where the step starts."""
        return self.levels[self.k]

    @property
    def after(self) -> float:
        """Where it ends."""
        return self.levels[self.k + 1]


@dataclass(frozen=True)
class Transition:
    """The contract of a solver: ``advance``, or ``step`` where one evaluation of the denoiser is all it takes.

    order: see the module.  evaluations: of the denoiser per step.
    """

    order: ClassVar[int] = 1
    evaluations: ClassVar[int] = 1

    @property
    def random(self) -> bool:
        """Whether the step needs noise."""
        return True

    def step(self, z: Tensor, denoised: Tensor, sigma: float, sigma_next: float, noise: Tensor | None) -> Tensor:
        """The state at ``sigma_next`` of a solver without memory and further evaluations: (n, ...)."""
        raise TypeError(f"{type(self).__name__} is more than one evaluation per step or has a memory; call advance")

    def advance(self, z: Tensor, memory: Mapping[str, Tensor], leg: Leg) -> tuple[Tensor, dict[str, Tensor]]:
        """The state after ``leg`` and what the solver must remember, from those before; memory is empty at the start."""
        return self.step(z, leg.denoise(z, leg.sigma, leg.after), leg.sigma, leg.after, leg.noise), {}


@dataclass(frozen=True)
class Ancestral(Transition):
    """``z - tau (z - D) + sigma_next sqrt(tau) xi`` (Ho et al. 2020, variance-exploding form).  First order, random.

    The reverse kernel if ``p(z0 | z)`` had no width; output variance is low by about one step of ``log sigma``.
    """

    def step(self, z: Tensor, denoised: Tensor, sigma: float, sigma_next: float, noise: Tensor | None) -> Tensor:
        tau = 1 - (sigma_next / sigma) ** 2
        moved = z - tau * (z - denoised)
        return moved if noise is None else moved + sigma_next * math.sqrt(tau) * noise


@dataclass(frozen=True)
class DDIM(Transition):
    """``D + sqrt(sigma_next^2 - s^2) e + s xi`` with ``s = eta sigma_next sqrt(tau)`` (Song et al. 2021, eq. 12).

    eta = 0 is the Euler step of the probability-flow ODE, eta = 1 is ``Ancestral``.  First order.
    """

    eta: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise InputError(f"DDIM needs 0 <= eta <= 1; got {self.eta}")

    @property
    def random(self) -> bool:
        return self.eta > 0

    def step(self, z: Tensor, denoised: Tensor, sigma: float, sigma_next: float, noise: Tensor | None) -> Tensor:
        up = self.eta * sigma_next * math.sqrt(1 - (sigma_next / sigma) ** 2)
        moved = denoised + math.sqrt(sigma_next**2 - up**2) / sigma * (z - denoised)
        return moved if noise is None else moved + up * noise


@dataclass(frozen=True)
class Renoise(Transition):
    """``D + sigma_next (sqrt(1 - zeta) e + sqrt(zeta) xi)`` (Zhu et al. 2023, algorithm 1).

    A fixed share of noise is renewed per step, so it does not converge to the reverse SDE as steps grow: it has no order.
    """

    order: ClassVar[int] = 0
    zeta: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.zeta <= 1:
            raise InputError(f"Renoise needs 0 <= zeta <= 1; got {self.zeta}")

    @property
    def random(self) -> bool:
        return self.zeta > 0

    def step(self, z: Tensor, denoised: Tensor, sigma: float, sigma_next: float, noise: Tensor | None) -> Tensor:
        moved = denoised + sigma_next * math.sqrt(1 - self.zeta) / sigma * (z - denoised)
        return moved if noise is None else moved + sigma_next * math.sqrt(self.zeta) * noise


@dataclass(frozen=True)
class EulerMaruyama(Transition):
    """``z + (sigma^2 - sigma_next^2) (D - z) / sigma^2 + sqrt(sigma^2 - sigma_next^2) xi``.  First order, random.

    The reverse diffusion in the clock ``sigma^2`` (Song et al. 2021b, eq. 6).  It adds the noise of the whole step, where
    ``Ancestral`` adds what is left of it at ``sigma_next``; so its output variance is too high, by more than that is too low.
    """

    def step(self, z: Tensor, denoised: Tensor, sigma: float, sigma_next: float, noise: Tensor | None) -> Tensor:
        tau = 1 - (sigma_next / sigma) ** 2
        moved = z - tau * (z - denoised)
        return moved if noise is None else moved + sigma * math.sqrt(tau) * noise


@dataclass(frozen=True)
class Heun(Transition):
    """Second-order steps of the probability-flow ODE, two evaluations each (Karras et al. 2022, algorithms 1 and 2).

        e  = (z  - D(z ; sigma     )) / sigma            z'  = z + (sigma_next - sigma) e
        e' = (z' - D(z'; sigma_next)) / sigma_next       z'' = z + (sigma_next - sigma) (e + e') / 2

    churn: per step the noise is first raised by the share ``min(churn / steps, sqrt 2 - 1)`` where ``low <= sigma <= high``,
    but not above the first level, and by fresh noise ``inflation`` times too strong.  With churn it is first order.
    """

    order: ClassVar[int] = 2
    evaluations: ClassVar[int] = 2
    churn: float = 0.0
    low: float = 0.0
    high: float = math.inf
    inflation: float = 1.0

    def __post_init__(self) -> None:
        if not (self.churn >= 0 and 0 <= self.low <= self.high and self.inflation > 0):
            raise InputError(f"Heun needs churn >= 0, 0 <= low <= high and inflation > 0; got {self}")

    @property
    def random(self) -> bool:
        return self.churn > 0

    def advance(self, z: Tensor, memory: Mapping[str, Tensor], leg: Leg) -> tuple[Tensor, dict[str, Tensor]]:
        sigma, after = leg.sigma, leg.after
        if leg.noise is not None and self.low <= sigma <= self.high:
            raised = min(sigma * (1 + min(self.churn / (len(leg.levels) - 1), math.sqrt(2) - 1)), leg.levels[0])
            z = z + math.sqrt(raised**2 - sigma**2) * self.inflation * leg.noise
            sigma = raised
        slope = (z - leg.denoise(z, sigma, after)) / sigma
        moved = z + (after - sigma) * slope
        if after > 0:
            ahead = (moved - leg.denoise(moved, after, leg.levels[leg.k + 2])) / after
            moved = z + (after - sigma) * 0.5 * (slope + ahead)
        return moved, {}


@dataclass(frozen=True)
class DPMSolver2M(Transition):
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): second order for one evaluation per step, by memory of the last ``D``.

    z' = (sigma_next/sigma) z + (1 - sigma_next/sigma) (D + h / (2 h_before) (D - D_before))
    """

    order: ClassVar[int] = 2

    @property
    def random(self) -> bool:
        return False

    def advance(self, z: Tensor, memory: Mapping[str, Tensor], leg: Leg) -> tuple[Tensor, dict[str, Tensor]]:
        denoised = leg.denoise(z, leg.sigma, leg.after)
        if leg.after == 0:
            return denoised, {}
        h, ratio, ahead = math.log(leg.sigma / leg.after), leg.after / leg.sigma, denoised
        if "before" in memory:
            last = math.log(leg.levels[leg.k - 1] / leg.sigma)
            ahead = denoised + (h / (2 * last)) * (denoised - memory["before"])
        return ratio * z + (1 - ratio) * ahead, {"before": denoised}


@dataclass(frozen=True)
class DPMSolver2S(Transition):
    """DPM-Solver++(2S) (Lu et al. 2022, algorithm 1, r = 1/2): second order without memory, two evaluations per step.

    u = (m/sigma) z + (1 - m/sigma) D(z; sigma),  m = sqrt(sigma sigma_next)
    z' = (sigma_next/sigma) z + (1 - sigma_next/sigma) D(u; m)
    """

    order: ClassVar[int] = 2
    evaluations: ClassVar[int] = 2

    @property
    def random(self) -> bool:
        return False

    def advance(self, z: Tensor, memory: Mapping[str, Tensor], leg: Leg) -> tuple[Tensor, dict[str, Tensor]]:
        middle = math.sqrt(leg.sigma * leg.after)
        denoised = leg.denoise(z, leg.sigma, middle)
        if leg.after == 0:
            return denoised, {}
        half, whole = middle / leg.sigma, leg.after / leg.sigma
        point = half * z + (1 - half) * denoised
        return whole * z + (1 - whole) * leg.denoise(point, middle, leg.after), {}


@dataclass(frozen=True)
class Exponential(Transition):
    """Adams-Bashforth exponential integrator of the probability flow; one evaluation per step.

    The linear part is solved exactly, ``D`` is the polynomial in ``log sigma`` through its last ``terms`` values::

        z' = exp(-h) z + int_0^h exp(-(h - u)) D(u) du

    terms = 1 is ``DDIM``.  terms = 2 is not ``DPMSolver2M``: that one puts ``h (1 - exp(-h)) / 2`` for the exact
    ``h - 1 + exp(-h)``, which differs in the third order of a step, so both are of second order.  The order of the end
    point is ``terms``, as far as the first steps (with fewer values) and the last (to zero) let it.
    """

    order: ClassVar[int] = 3
    terms: int = 3

    def __post_init__(self) -> None:
        if not 1 <= self.terms <= 4:
            raise InputError(f"{type(self).__name__} takes 1 to 4 terms; got {self.terms}")

    @property
    def random(self) -> bool:
        return False

    def advance(self, z: Tensor, memory: Mapping[str, Tensor], leg: Leg) -> tuple[Tensor, dict[str, Tensor]]:
        denoised = leg.denoise(z, leg.sigma, leg.after)
        if leg.after == 0:
            return denoised, {}
        values, clock = _last(denoised, memory, self.terms - 1, leg)
        moved = leg.after / leg.sigma * z + combined(values, clock, clock[0], -math.log(leg.after), 1.0)
        return moved, {f"before{i + 1}": value for i, value in enumerate(values[: self.terms - 1])}


@dataclass(frozen=True)
class SASolver(Exponential):
    """Stochastic Adams method (Xue et al. 2023, algorithm 1): the same for ``q = 1 + tau^2``, with fresh noise every step.

        z' = exp(-q h) z + int_0^h q exp(-q (h - u)) D(u) du + sigma_next sqrt(1 - exp(-2 tau^2 h)) xi

    corrector: once ``D`` is known at the new point, the step before is done again with that value in the polynomial, at no
    further evaluation.  tau = 0 without corrector is ``Exponential``; tau = 1, one term, no corrector is ``Ancestral``.
    The law of the end state is of second order (first with one term and no corrector): noise within a step keeps it there
    however many terms there are.
    """

    order: ClassVar[int] = 2
    terms: int = 2
    tau: float = 1.0
    corrector: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.tau < math.inf:
            raise InputError(f"SASolver needs tau >= 0; got {self.tau}")

    @property
    def random(self) -> bool:
        return self.tau > 0

    def advance(self, z: Tensor, memory: Mapping[str, Tensor], leg: Leg) -> tuple[Tensor, dict[str, Tensor]]:
        denoised = leg.denoise(z, leg.sigma, leg.after)
        if leg.after == 0:
            return denoised, {}
        q = 1 + self.tau**2
        kept = max(self.terms - 1, 1 if self.corrector else 0)
        values, clock = _last(denoised, memory, kept, leg)
        if self.corrector and "base" in memory:
            z = memory["base"] + combined(values, clock, clock[1], clock[0], q)
        h = math.log(leg.sigma / leg.after)
        base = math.exp(-q * h) * z
        if leg.noise is not None:
            base = base + leg.after * math.sqrt(-math.expm1(-2 * self.tau**2 * h)) * leg.noise
        used = values[: self.terms]
        moved = base + combined(used, clock[: len(used)], clock[0], clock[0] + h, q)
        remembered = {f"before{i + 1}": value for i, value in enumerate(values[:kept])}
        return moved, {**remembered, "base": base} if self.corrector else remembered


def _last(denoised: Tensor, memory: Mapping[str, Tensor], count: int, leg: Leg) -> tuple[list[Tensor], list[float]]:
    """``D`` of now and of up to ``count`` steps before, and the times ``-log sigma`` they belong to."""
    values = [denoised, *(memory[f"before{i}"] for i in range(1, count + 1) if f"before{i}" in memory)]
    return values, [-math.log(leg.levels[leg.k - i]) for i in range(len(values))]


_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(20)


def combined(values: Sequence[Tensor], clock: Sequence[float], start: float, end: float, q: float) -> Tensor:
    """``int_start^end q exp(-q (end - l)) P(l) dl`` with ``P`` the polynomial through ``values`` at the times ``clock``."""
    places = start + (end - start) * (_NODES + 1) / 2
    kernel = (end - start) / 2 * _WEIGHTS * q * np.exp(-q * (end - places))
    total: Tensor | None = None
    for i, (value, own) in enumerate(zip(values, clock, strict=True)):
        others = [other for j, other in enumerate(clock) if j != i]
        basis = np.prod([(places - other) / (own - other) for other in others], axis=0) if others else 1.0
        weight = float((kernel * basis).sum())
        total = weight * value if total is None else total + weight * value
    assert total is not None  # there is always the value of now
    return total
