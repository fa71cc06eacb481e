"""The exact law of a sampler's output on a Gaussian prior, without Monte Carlo.

There every step of a sampler with a linear guide is affine in its state (memory included) and in its noise.  Probing the step
with zeros and with one unit vector per number gives the map, and mean and covariance are carried through all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

import recon
from recon.samplers import Sampler, State


class Injected:
    """Draws whose noise is chosen: zero but for number ``number`` of the step's calls, which is ``values`` (n, d)."""

    def __init__(self, rows: int, number: int = -1, values: Tensor | None = None) -> None:
        self.members, self.number, self.values, self.calls = range(rows), number, values, 0

    def __len__(self) -> int:
        return len(self.members)

    def normal(self, step: int, shape: Sequence[int], stream: str = "step", *, dtype: torch.dtype) -> Tensor:
        self.calls += 1
        if self.calls - 1 != self.number or self.values is None:
            return torch.zeros(len(self.members), *shape, dtype=dtype)
        return self.values.reshape(-1, *shape).to(dtype)


def law(sampler: Sampler, posterior: recon.Posterior) -> tuple[Tensor, Tensor]:
    """Mean (d,) and covariance (d, d) of the end state, float64, latent = space."""
    with torch.no_grad():
        shape = posterior.prior.latent.shape
        d = math.prod(shape)
        eye = torch.cat([torch.zeros(1, d), torch.eye(d)]).double()
        start = sampler.init(posterior, Injected(d + 1, 0, eye)).z.flatten(1)  # type: ignore[arg-type]
        mean, factor = start[0], (start[1:] - start[0]).T
        covariance, names = factor @ factor.T, ["z"]
        for k in range(sampler.steps):
            n = len(mean)
            zero = torch.zeros(n + 1, n, dtype=torch.float64)
            zero[1:] = torch.eye(n)
            free = Injected(n + 1)
            moved = sampler.step(posterior, _state(zero, names, shape), k, free)  # type: ignore[arg-type]
            rows = _rows(moved)
            constant, slope = rows[0], (rows[1:] - rows[0]).T
            kicks = [torch.zeros(len(constant), 0, dtype=torch.float64)]
            for call in range(free.calls):
                noise = Injected(d + 1, call, eye)
                there = _rows(sampler.step(posterior, _state(zero[:1].expand(d + 1, n), names, shape), k, noise))  # type: ignore[arg-type]
                kicks.append((there[1:] - there[0]).T)
            kick = torch.cat(kicks, 1)
            mean = constant + slope @ mean
            covariance = slope @ covariance @ slope.T + kick @ kick.T
            names = ["z", *moved.aux]
        return mean[:d], covariance[:d, :d]


def _rows(state: State) -> Tensor:
    return torch.cat([state.z.flatten(1), *(value.flatten(1) for value in state.aux.values())], 1)


def _state(rows: Tensor, names: Sequence[str], shape: Sequence[int]) -> State:
    parts = dict(zip(names, rows.reshape(len(rows), len(names), *shape).unbind(1), strict=True))
    z = parts.pop("z")
    return State(z, torch.zeros(len(z), dtype=torch.float64), parts)


def errors(sampler: Sampler, posterior: recon.Posterior) -> tuple[float, float]:
    """Of the mean, in posterior standard deviations, and of the covariance, relative (Frobenius)."""
    mean, covariance = law(sampler, posterior)
    exact = posterior.exact()
    assert isinstance(exact, recon.priors.GaussianPrior)
    truth = exact.covariance()
    off = (mean - exact.mean) / truth.diagonal().sqrt()
    return float(off.abs().max()), float(torch.linalg.norm(covariance - truth) / torch.linalg.norm(truth))
