"""A held-out real volume from few or one-sided views: baselines, slice-wise sampling, and the samplers that couple slices.

    RECON_DATA=DIR python tests/benchmarks/bench_volumes.py [--slices 16] [--first 80] [--views 8 4 2] [--arc 90]
        [--steps 30] [--levels 100] [--draws 1] [--weight 0.3] [--tv 0.3 1 3]
        [--methods fbp sirt tv diffpir mbir dds]

The abdomen of ``volumes_3d.h5`` (3 mm voxels in HU, not among what the prior was trained on), turned as the training slices
lie and set in air to 128 x 128; slices ``first .. first + slices - 1``, parallel beam slice by slice, noise of 1 % of the root
mean square of the line integrals.  Problems: so many views over 180 degrees, and 60 views over ``--arc`` degrees.

Per method: PSNR in dB as the mean over the slices across each axis, with the range of the volume as peak; roughness, the mean
|difference| of neighbouring slices over the truth's; the misfit chi2 per datum; and seconds.  The coupling's weight is taken
from the slices before those that are reconstructed.  TV is at the best of its weights on this very volume.
steps: of DiffPIR and DDS.  levels: of DiffusionMBIR, the long run (published: 2000).
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import recon
from recon.baselines import TVSolver, fbp, tv
from recon.comm import serial
from recon.datasets.slices import attenuation, locate
from recon.draws import Draws
from recon.likelihoods import GaussianLikelihood
from recon.operators import CG, ParallelBeam, SliceStack
from recon.priors import load_prior
from recon.priors.lifting import SlicesPrior
from recon.samplers import DDS, Coupling, DiffPIR, DiffusionMBIR, Sampler, typical_weight
from recon.space import Space

SIDE, VOXEL, NOISE = 128, 3e-3, 0.01
METHODS = ("fbp", "sirt", "tv", "diffpir", "mbir", "dds")


@dataclass(frozen=True)
class Problem:
    """What is true and what was measured.  beam: the operator as a stack of slices, for the baselines."""

    name: str
    truth: Tensor
    beam: ParallelBeam
    operator: SliceStack
    y: Tensor
    sigma: float


def volume() -> Tensor:
    """The whole volume in 1/m: (z, 128, 128)."""
    import h5py

    with h5py.File(locate("volumes_3d", "ct/volumes_3d.h5", None, "")) as file:
        mu = attenuation(file["totalsegmentator_example"][:])[:, ::-1]
    whole = np.zeros((len(mu), SIDE, SIDE), np.float32)
    top, left = (SIDE - mu.shape[1]) // 2, (SIDE - mu.shape[2]) // 2
    whole[:, top : top + mu.shape[1], left : left + mu.shape[2]] = mu
    return torch.from_numpy(whole)


def problem(name: str, truth: Tensor, angles: np.ndarray) -> Problem:
    """Simulated data of ``truth`` (z, y, x)."""
    space = Space.grid(tuple(truth.shape), VOXEL, "1/m")
    image = Space.grid((SIDE, SIDE), VOXEL, "1/m")
    operator = SliceStack(ParallelBeam(image, angles), space)
    clean = operator.A(truth)
    sigma = NOISE * float(clean.square().mean().sqrt())
    noise = Draws(0, [0]).normal(0, operator.range.shape, "data")[0]
    return Problem(name, truth, ParallelBeam(space, angles), operator, clean + sigma * noise, sigma)


def sirt(p: Problem, iterations: int = 100) -> Tensor:
    """``x += C A^T R (y - A x)``, not below zero; R and C are inverse sums of rows and columns (Gilbert 1972)."""
    A = p.operator
    rows, columns = A.A(torch.ones(A.domain.shape)), A.A_adjoint(torch.ones(A.range.shape))
    R, C = (torch.where(s > 1e-6 * s.max(), 1 / s.clamp(min=1e-12), 0.0) for s in (rows, columns))
    x = torch.zeros(A.domain.shape)
    for _ in range(iterations):
        x = (x + C * A.A_adjoint(R * (p.y - A.A(x)))).clamp(min=0)
    return x


def best_tv(p: Problem, weights: Sequence[float]) -> Tensor:
    """Total variation of slices, at the weight with the best error."""
    solver = TVSolver(iterations=100, tolerance=3e-2)
    images = [tv(p.operator.slice(0), p.y, p.sigma, weight, solver).x for weight in weights]
    return min(images, key=lambda x: float((x - p.truth).square().mean()))


def drawn(sampler: Sampler, draws: int) -> Callable[[Problem], Tensor]:
    """The mean of draws."""

    def run(p: Problem) -> Tensor:
        prior = SlicesPrior(load_prior("ct_axial"), p.operator.domain, chunk=8)
        posterior = recon.Posterior(prior, GaussianLikelihood(p.operator, p.y, p.sigma))
        return recon.sample(posterior, sampler, draws=draws, comm=serial()).mean()

    return run


def line(p: Problem, name: str, x: Tensor, seconds: float) -> str:
    """One row of the table."""
    peak, error = float(p.truth.max() - p.truth.min()), (x - p.truth).square()
    inside = p.truth.abs() > 0
    values = []
    for axis in range(3):
        others = [a for a in range(3) if a != axis]
        kept = inside.any(others[1]).any(others[0])  # planes that hold something
        values.append(float((10 * torch.log10(peak**2 / error.mean(others)[kept])).mean()))
    rough = float((x[1:] - x[:-1]).abs().mean() / (p.truth[1:] - p.truth[:-1]).abs().mean())
    chi2 = float(((p.y - p.operator.A(x)) / p.sigma).square().mean())
    cells = " ".join(f"{v:8.2f}" for v in values)
    return f"{p.name:12s} {name:8s} {cells} {rough:10.2f} {chi2:9.2f} {seconds:9.1f}\n"


def main() -> None:
    """Print the table, row by row as it comes."""
    options = argparse.ArgumentParser()
    options.add_argument("--slices", type=int, default=16)
    options.add_argument("--first", type=int, default=80)
    options.add_argument("--views", type=int, nargs="*", default=(8, 4, 2))
    options.add_argument("--arc", type=float, nargs="*", default=(90.0,))
    options.add_argument("--steps", type=int, default=30)
    options.add_argument("--levels", type=int, default=100)
    options.add_argument("--draws", type=int, default=1)
    options.add_argument("--weight", type=float, default=0.3, help="of the coupling, in typical weights")
    options.add_argument("--tv", type=float, nargs="+", default=(0.3, 1.0, 3.0), help="weights of TV, m")
    options.add_argument("--methods", nargs="*", choices=METHODS, default=METHODS)
    given = options.parse_args()
    whole = volume()
    part = slice(given.first, given.first + given.slices)
    others = Space.grid(tuple(whole[: part.start].shape), VOXEL, "1/m")
    weight = given.weight * typical_weight(whole[None, : part.start], others)
    scene = (
        f"slices {part.start} to {part.stop - 1} of {len(whole)}, weight {weight:.3g} m^2 (from the slices before them)"
    )
    sys.stdout.write(f"{scene}; {given.steps} steps, {given.levels} levels, {given.draws} draws\n")
    coupling, walk = Coupling(weight), {"sigma_max": 20.0, "sigma_min": 0.01}
    long: dict[str, Any] = {"steps": given.levels, **walk}
    runs: dict[str, Callable[[Problem], Tensor]] = {
        "fbp": lambda p: fbp(p.beam, p.y, "hann"),
        "sirt": sirt,
        "tv": lambda p: best_tv(p, given.tv),
        "diffpir": drawn(DiffPIR(steps=given.steps, **walk), given.draws),
        "mbir": drawn(DiffusionMBIR(coupling=coupling, **long), given.draws),
        "dds": drawn(DDS(steps=given.steps, coupling=coupling, cg=CG(5, 1e-4), **walk), given.draws),
    }
    scans = [(f"{v} views", np.arange(v) * math.pi / v) for v in given.views]
    scans += [(f"arc {a:g} deg", np.arange(60) * math.radians(a) / 60) for a in given.arc]
    sys.stdout.write(
        f"{'problem':12s} {'method':8s} {'axial':>8s} {'coronal':>8s} {'sagittal':>8s} roughness   chi2/m   seconds\n"
    )
    for name, angles in scans:
        p = problem(name, whole[part], angles)
        for method in given.methods:
            start = time.perf_counter()
            x = runs[method](p)
            sys.stdout.write(line(p, method, x, time.perf_counter() - start))
            sys.stdout.flush()


if __name__ == "__main__":
    main()
