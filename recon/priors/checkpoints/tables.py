r"""Noise: which input, which label and which answer a network was trained with at every level ``sigma``.

A network ``F`` sees ``c_in z`` and a label of the level; the denoiser is ``D(z, sigma) = c_skip z + c_out F(c_in z, label)``
with ``z = z0 + sigma n``.  Every published parametrisation is a row of this table (exact, not approximations):

==============  ====================================  =======================  ===========================
form            c_in                                  c_skip                   c_out
==============  ====================================  =======================  ===========================
epsilon         path                                  1                        -sigma
sample          path                                  0                        1
v (VP)          1 / sqrt(1 + sigma^2)                 1 / (1 + sigma^2)        -sigma / sqrt(1 + sigma^2)
flow            1 / (1 + sigma)                       1 / (1 + sigma)          -sigma / (1 + sigma)
score           path                                  1                        sigma^2
scaled_score    path                                  1                        sigma
edm             1 / sqrt(sigma^2 + s^2)               s^2 / (sigma^2 + s^2)    sigma s / sqrt(sigma^2 + s^2)
edm_v           as edm                                as edm                   minus that of edm
==============  ====================================  =======================  ===========================

path: ``alpha_t`` of ``x_t = alpha_t (z0 + sigma n)``: vp ``1 / sqrt(1 + sigma^2)`` (``sigma = sqrt((1 - abar) / abar)``), subvp
``(sqrt(sigma^2 + 4) - sigma) / 2`` (``sigma = (1 - m^2) / m``, Song et al. 2021, eq. 29), flow ``1 / (1 + sigma)``, ve 1.
``v = alpha n - sigma_t z0`` (Salimans & Ho 2022), flow velocity ``n - z0`` (Liu et al. 2023), edm as in Karras et al. 2022,
eq. 7, with ``s`` its sigma_data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from recon.errors import InputError
from recon.schedules import Schedule

Kind = Literal["epsilon", "sample", "v", "flow", "score", "scaled_score", "edm", "edm_v"]
Path = Literal["vp", "subvp", "ve", "flow"]


@dataclass(frozen=True)
class Form:
    """A row of the table above.  path: for the kinds that do not fix it.  sigma_data: ``s``, for edm and edm_v."""

    kind: Kind
    path: Path = "vp"
    sigma_data: float = 1.0

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``c_in``, ``c_skip``, ``c_out`` for float64 levels (n,)."""
        one, zero = torch.ones_like(sigma), torch.zeros_like(sigma)
        if self.kind in ("edm", "edm_v"):
            total = sigma.square() + self.sigma_data**2
            out = sigma * self.sigma_data * total.rsqrt()
            return total.rsqrt(), self.sigma_data**2 / total, out if self.kind == "edm" else -out
        if self.kind == "v":
            scale = (1 + sigma.square()).rsqrt()
            return scale, scale.square(), -sigma * scale
        if self.kind == "flow":
            scale = 1 / (1 + sigma)
            return scale, scale, -sigma * scale
        outs = {"epsilon": -sigma, "sample": one, "score": sigma.square(), "scaled_score": sigma}
        return self._signal(sigma), zero if self.kind == "sample" else one, outs[self.kind]

    def _signal(self, sigma: Tensor) -> Tensor:
        if self.path == "vp":
            return (1 + sigma.square()).rsqrt()
        if self.path == "subvp":
            return 2 / (sigma + (sigma.square() + 4).sqrt())  # no difference of nearly equal numbers
        return 1 / (1 + sigma) if self.path == "flow" else torch.ones_like(sigma)


class Clock(nn.Module):
    """From noise levels to the labels a network was trained with.  A subclass writes ``forward``: float64 (n,) to (n,)."""

    lookup: str = "exact"


class TableClock(Clock):
    """Labels of a training table, between its entries linear in ``log sigma``; outside its range the label of the end.

    sigmas: the table, strictly rising.  labels: what the network was given at each.  whole: the network takes whole labels
    only, so a level between two entries gets the label of the nearer one (in ``log sigma``).

    Raises InputError for a table that is not positive and strictly rising.
    """

    logs: Tensor
    labels: Tensor

    def __init__(self, sigmas: np.ndarray, labels: np.ndarray, whole: bool = False) -> None:
        super().__init__()
        if len(sigmas) < 2 or not (np.isfinite(sigmas).all() and (sigmas > 0).all() and (np.diff(sigmas) > 0).all()):
            raise InputError("a noise table needs at least two finite, positive, strictly rising levels")
        self.whole = whole
        self.lookup = "nearest entry of the table" if whole else "fractional: linear in log sigma between table entries"
        self.register_buffer("logs", torch.as_tensor(np.log(sigmas), dtype=torch.float64))
        self.register_buffer("labels", torch.as_tensor(np.asarray(labels, dtype=np.float64)))

    def forward(self, sigma: Tensor) -> Tensor:
        logs, labels = self.logs.double(), self.labels.double()
        level = sigma.log().clamp(logs[0], logs[-1])
        above = torch.searchsorted(logs, level).clamp(1, len(logs) - 1)
        part = (level - logs[above - 1]) / (logs[above] - logs[above - 1])
        if self.whole:
            part = (part > 0.5).to(part.dtype)
        return labels[above - 1] + part * (labels[above] - labels[above - 1])


class LogClock(Clock):
    """``label = factor * log(sigma / unit)``: EDM has factor 1/4, the VE networks in EDM's code log(sigma / 2)."""

    def __init__(self, factor: float = 0.25, unit: float = 1.0) -> None:
        super().__init__()
        self.factor, self.unit = factor, unit

    def forward(self, sigma: Tensor) -> Tensor:
        return self.factor * (sigma / self.unit).log()


class SigmaClock(Clock):
    """``label = sigma``: networks that take the noise level itself."""

    def forward(self, sigma: Tensor) -> Tensor:
        return sigma


class FlowClock(Clock):
    """``label = steps * t`` with ``t = sigma / (1 + sigma)``: rectified flow."""

    def __init__(self, steps: float) -> None:
        super().__init__()
        self.steps = steps

    def forward(self, sigma: Tensor) -> Tensor:
        return self.steps * sigma / (1 + sigma)


class VPClock(Clock):
    r"""``label = factor * t`` of the continuous VP or sub-VP process with ``beta(t) = b0 + t (b1 - b0)``.

    ``alpha(t) = exp(-t^2 (b1 - b0) / 4 - t b0 / 2)`` solved for ``t``; VP has ``sigma^2 = 1 / alpha^2 - 1``, sub-VP
    ``sigma = (1 - alpha^2) / alpha`` (Song et al. 2021, eqs. 29, 33).
    """

    def __init__(self, beta_min: float, beta_max: float, factor: float, sub: bool = False) -> None:
        super().__init__()
        self.beta_min, self.slope, self.factor, self.sub = beta_min, beta_max - beta_min, factor, sub

    def forward(self, sigma: Tensor) -> Tensor:
        # log 1/alpha^2: log(1 + sigma^2); sub-VP has sigma = 2 sinh(log 1/alpha)
        wanted = 2 * torch.asinh(sigma / 2) if self.sub else torch.log1p(sigma.square())
        root = (self.beta_min**2 + 2 * self.slope * wanted).sqrt()
        return self.factor * 2 * wanted / (root + self.beta_min)  # (root - b0) / slope without cancellation

    def sigma(self, t: float) -> float:
        """The level at time ``t``."""
        exponent = t * t * self.slope / 2 + t * self.beta_min
        return 2 * math.sinh(exponent / 2) if self.sub else math.sqrt(math.expm1(exponent))


@dataclass(frozen=True)
class Noise:
    """How a network knows noise: form, labels, and the range of levels it was trained on."""

    form: Form
    clock: Clock
    schedule: Schedule


def betas(name: str, steps: int, start: float, end: float) -> np.ndarray:
    """Variances ``beta_t`` (steps,) of a discrete VP process.

    name: "linear", "scaled_linear" (linear in ``sqrt beta``), "squaredcos_cap_v2" or "cosine" (Nichol & Dhariwal 2021,
    eq. 17, capped at 0.999; start and end are not used), "sigmoid".

    Raises InputError for another name or values outside (0, 1).
    """
    if name == "linear":
        values = np.linspace(start, end, steps)
    elif name == "scaled_linear":
        values = np.linspace(start**0.5, end**0.5, steps) ** 2
    elif name in ("squaredcos_cap_v2", "cosine"):
        abar = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
        values = np.minimum(1 - abar[1:] / abar[:-1], 0.999)
    elif name == "sigmoid":
        values = (end - start) / (1 + np.exp(-np.linspace(-6, 6, steps))) + start
    else:
        known = "linear, scaled_linear, squaredcos_cap_v2, cosine, sigmoid"
        raise InputError(f"the noise tables known by name are {known}; got {name!r}")
    return checked(values)


def checked(values: np.ndarray) -> np.ndarray:
    """``values`` if they can be variances of a VP process.  Raises InputError."""
    if values.ndim != 1 or len(values) < 2 or not ((values > 0) & (values < 1)).all():
        raise InputError("the variances beta of a noise table are at least two numbers between 0 and 1")
    return values


def vp_sigmas(values: np.ndarray) -> np.ndarray:
    """``sqrt((1 - abar) / abar)`` (steps,), where ``abar`` is the running product of ``1 - beta``.

    ``1 - abar`` comes from ``-expm1(sum log1p(-beta))``, exact where ``abar`` is close to one.
    """
    logs = np.cumsum(np.log1p(-values))
    return np.sqrt(-np.expm1(logs)) * np.exp(-logs / 2)


def zero_terminal(values: np.ndarray) -> np.ndarray:
    """Levels (steps - 1,) of the table rescaled to end at ``abar = 0`` (Lin et al. 2024, algorithm 1), without that end.

    ``sqrt(abar)`` is shifted to end at 0 and scaled to begin where it did; the last level is infinite and left out.
    """
    root = np.sqrt(np.cumprod(1 - values))
    root = ((root - root[-1]) * root[0] / (root[0] - root[-1]))[:-1]
    return np.sqrt((1 - root) * (1 + root)) / root


def table_noise(kind: Kind, sigmas: np.ndarray, *, scale: float = 1.0, whole: bool = False) -> Noise:
    """Noise of a discrete VP table: entry ``i`` has the label ``scale * i``; the range is that of the table."""
    clock = TableClock(sigmas, scale * np.arange(len(sigmas)), whole)
    return Noise(Form(kind), clock, Schedule(float(sigmas[0]), float(sigmas[-1])))
