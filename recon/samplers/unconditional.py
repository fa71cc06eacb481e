r"""Draws from a prior alone: what it believes before any data are seen.

Heun's method on the probability-flow ODE (``transitions.Heun``; Karras et al. 2022, algorithm 1), second order in the step.

It starts at ``z = sigma_0 n``, so the mean of the prior's noised law is taken for zero there; with sigma_0 = 80 standard
deviations that is below its rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recon.comm import serial
from recon.draws import Draws, blocks
from recon.ensemble import Ensemble
from recon.errors import InputError
from recon.priors.base import Prior
from recon.samplers.loop import block_of, block_threads
from recon.samplers.transitions import Heun, Leg
from recon.schedules import Grid, Karras


def unconditional(
    prior: Prior, draws: int = 16, steps: int = 32, seed: int = 0, grid: Grid | None = None, block: int | None = None
) -> Ensemble:
    """``draws`` samples of ``prior`` in physical units: 2 steps - 1 denoiser evaluations each.

    seed: of the keyed noise.  grid: of the noise levels (Karras).  block: draws that are computed together; on as many cores
    as the process may use, with the same bits for any number of them.

    Raises InputError for fewer than one draw or two steps.
    """
    if draws < 1 or steps < 2:
        raise InputError(f"unconditional needs at least 1 draw and 2 steps; got {draws} and {steps}")
    sigmas = (grid or Karras()).sigmas(prior.schedule, steps).tolist()
    solver = Heun()
    pieces = dict(enumerate(blocks(draws, block or block_of(prior.latent.size))))

    def work(number: int, members: range) -> Tensor:
        noise = Draws(seed, members).normal(0, prior.latent.shape, "init", dtype=prior.dtype).to(prior.device)
        z = sigmas[0] * noise
        for k in range(steps):
            z = solver.advance(z, {}, Leg(sigmas, k, lambda z, sigma, _: prior.denoise(z, sigma), None))[0]
        return prior.decode(z)

    with block_threads(serial().workers) as each:
        parts = each(work, pieces)
    info = {"sampler": {"method": "unconditional", "steps": steps}, "draws": draws, "seed": seed}
    return Ensemble(torch.cat([parts[b].cpu() for b in sorted(parts)]), prior.space, None, info)
