"""The exact law of a step that is affine in state and in noise of any shape, as on Gaussian problems: no Monte Carlo.

Unlike ``affine`` it takes noise of several shapes (an image's, the data's) and leaves alone what a state keeps besides ``z``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import recon
from recon.draws import Draws
from recon.samplers import Sampler, State


class Probes:
    """Stands in for ``Draws``: first notes what noise a step asks for, then gives every unit vector of it to one draw."""

    def __init__(self, members: int, first: int, sizes: dict[tuple[int, str], int] | None = None) -> None:
        self.members, self.first, self.known = range(members), first, sizes is not None
        self.sizes: dict[tuple[int, str], int] = {} if sizes is None else sizes

    def __len__(self) -> int:
        return len(self.members)

    def normal(
        self, step: int, shape: Sequence[int], stream: str = "step", *, dtype: torch.dtype = torch.float64
    ) -> Tensor:
        size = math.prod(shape)
        values = torch.zeros(len(self), size, dtype=dtype)
        if not self.known:
            assert (step, stream) not in self.sizes, f"noise {step} of stream {stream} is used twice"
            self.sizes[step, stream] = size
        at = self.first
        for key, width in self.sizes.items():
            if self.known and key == (step, stream):
                values[at : at + width] = torch.eye(width, dtype=dtype)
            at += width
        return values.reshape(len(self), *shape)


Step = Callable[[Tensor, Probes], Tensor]


def affine(step: Step, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """``step(z, draws) = c + M z + N xi``: (d,), (d, d), (d, noise)."""
    asked = Probes(1, 1)
    step(torch.zeros(1, d, dtype=torch.float64), asked)
    n = 1 + d + sum(asked.sizes.values())
    z = torch.zeros(n, d, dtype=torch.float64)
    z[1 : 1 + d] = torch.eye(d, dtype=torch.float64)
    out = step(z, Probes(n, 1 + d, asked.sizes))
    c = out[0]
    return c, (out[1 : 1 + d] - c).T, (out[1 + d :] - c).T


def steps_of(posterior: recon.Posterior, sampler: Sampler) -> Callable[[int], Step]:
    """Step ``k`` as a map of flat ``z``; the rest of the state is that of ``init``."""
    aux = sampler.init(posterior, Draws(0, [0])).aux

    def at(k: int) -> Step:
        def step(z: Tensor, draws: Probes) -> Tensor:
            kept = {name: value.expand(len(z), *value.shape[1:]) for name, value in aux.items()}
            state = State(z.reshape(-1, *posterior.prior.latent.shape), torch.zeros(len(z)), kept)
            return sampler.step(posterior, state, k, draws).z.flatten(1)  # type: ignore[arg-type]

        return step

    return at


def end_law(posterior: recon.Posterior, sampler: Sampler) -> tuple[Tensor, Tensor]:
    """Mean (d,) and covariance (d, d) of ``z`` after all steps."""
    d = posterior.prior.latent.size
    mean, _, noise = affine(lambda _, draws: sampler.init(posterior, draws).z.flatten(1), d)  # type: ignore[arg-type]
    covariance, at = noise @ noise.T, steps_of(posterior, sampler)
    for k in range(sampler.steps):
        c, matrix, noise = affine(at(k), d)
        mean, covariance = c + matrix @ mean, matrix @ covariance @ matrix.T + noise @ noise.T
    return mean, covariance


def stationary_law(posterior: recon.Posterior, sampler: Sampler, k: int) -> tuple[Tensor, Tensor]:
    """Mean and covariance that step ``k`` leaves as they are."""
    d = posterior.prior.latent.size
    c, matrix, noise = affine(steps_of(posterior, sampler)(k), d)
    eye = torch.eye(d, dtype=torch.float64)
    mean = torch.linalg.solve(eye - matrix, c)
    lyapunov = torch.eye(d * d, dtype=torch.float64) - torch.kron(matrix, matrix)
    return mean, torch.linalg.solve(lyapunov, (noise @ noise.T).reshape(-1)).reshape(d, d)
