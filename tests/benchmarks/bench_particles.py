"""Particles on several processes, and on an image: weak scaling, bytes moved, and what local weights gain on sparse-view CT.

    python tests/benchmarks/bench_particles.py scaling [--draws 512] [--steps 40] [--repeats 3]
    RECON_DATA=DIR python tests/benchmarks/bench_particles.py ct [--draws 8] [--steps 16] [--radius 24] [--down-to 0.3 1e9]
        [--keep 0.5]

scaling: TwistedSMC, resampling below nine tenths, on the mixture of ``bench_smc`` in 80 dimensions, two data; one process of
one thread with ``draws`` particles, then two with twice as many.  Particle rate: particles times steps over seconds, the median
of the repeats; the ratio of the two is 2 where nothing is lost.  Bytes moved by resampling beside those of the plan.

ct: the first held-out slice of ``bench_sparse_view`` (128 x 128, 60 views, 1 % noise) and the prior ct_axial; independent draws
of MMPS with a covariance in closed form, and the same guide inside LocalisedSMC, at the same steps.  CRPS in 1/m against the
true slice (fair, mean over its values), coverage of the central 90 % intervals, PSNR of the mean, misfit per datum.  One slice:
its coverage and CRPS are those of one case, not a verdict on calibration.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import recon
from recon.comm import from_environment, serial
from recon.diagnostics.images import psnr
from recon.diagnostics.scores import fair_crps
from recon.likelihoods import GaussianLikelihood
from recon.priors import load_prior
from recon.samplers import MMPS, LocalisedSMC, Sampler, TwistedSMC
from recon.schedules import Karras

ROOT = Path(__file__).resolve().parents[2]


def worker(draws: int, steps: int, repeats: int) -> None:
    """One size, on however many processes there are; the root prints JSON."""
    from tests.benchmarks.bench_smc import problem

    torch.set_num_threads(1)
    comm = from_environment()
    posterior = problem(80, 2, 0, 10).posterior
    seconds, cost = [], {}
    for seed in range(repeats):
        comm.draws.barrier()
        start = time.perf_counter()
        run = recon.sample(posterior, TwistedSMC(steps=steps, threshold=0.9), draws=draws, block=128, seed=seed, comm=comm)
        seconds.append(time.perf_counter() - start)
        cost = run.info["cost"]
    said = {name: cost.get(name, 0) for name in ("resampled_bytes", "resampled_bytes_planned")}
    again = run.info["particles"]["resamplings"]
    if comm.root:
        sys.stdout.write(json.dumps({"seconds": seconds, "resamplings": again, **said}) + "\n")


def scaling(draws: int, steps: int, repeats: int) -> None:
    """Print the rates, their ratio and the bytes."""
    launcher, rates = Path(sys.executable).parent / "mpiexec", []
    for ranks in (1, 2):
        own = [sys.executable, __file__, "worker", "--draws", str(ranks * draws), "--steps", str(steps)]
        words = [str(launcher), "-n", str(ranks), "-genv", "OMP_NUM_THREADS", "1", *own, "--repeats", str(repeats)]
        done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT, env=_environment())
        found = json.loads(done.stdout.splitlines()[-1])
        rates.append(ranks * draws * steps / float(np.median(found["seconds"])))
        moved, planned = found["resampled_bytes"], found["resampled_bytes_planned"]
        sys.stdout.write(
            f"{ranks} process(es), {ranks * draws} particles: {rates[-1]:.0f} particle steps/s, "
            f"{found['resamplings']} resamplings of the last run moved {moved} bytes, planned {planned}: "
            f"{'equal' if moved == planned else 'NOT EQUAL'}\n"
        )
    sys.stdout.write(f"ratio of rates {rates[1] / rates[0]:.2f}, of 2 where nothing is lost\n")


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT)}


def ct(draws: int, steps: int, settings: dict[str, Any], ends: list[float]) -> None:
    """Print a line for independent draws and one for each ``down_to``."""
    from tests.benchmarks.bench_sparse_view import cases

    torch.set_num_threads(1)
    case, prior = cases(1, "rms")[0], load_prior("ct_axial")
    posterior = recon.Posterior(prior, GaussianLikelihood(case.operator, case.y, case.sigma))
    levels = {"steps": steps, "grid": Karras(), "sigma_max": 20.0, "sigma_min": 0.01}
    guide = MMPS(covariance="closed", **levels)
    samplers: dict[str, Sampler] = {"independent": guide}
    for end in ends:
        samplers[f"local, to {end:g}"] = LocalisedSMC(guide=guide, **settings, down_to=end, **levels)
    sys.stdout.write(f"{draws} draws, {steps} steps\nsampler          CRPS   90 % inside   PSNR  chi2/m  seconds\n")
    for name, sampler in samplers.items():
        start = time.perf_counter()
        run = recon.sample(posterior, sampler, draws=draws, comm=serial(1))
        seconds = time.perf_counter() - start
        low, high = run.quantile([0.05, 0.95])
        inside = float(((case.truth >= low) & (case.truth <= high)).float().mean())
        crps = float(fair_crps(run.x, case.truth).mean())
        misfit = float(((case.y - case.operator.A(run.x)) / case.sigma).square().mean())
        line = f"{name:14s} {crps:7.4f} {inside:9.3f} {float(psnr(run.mean(), case.truth)):10.2f} {misfit:7.3f} {seconds:8.1f}"
        said = run.info.get("particles")
        if said:
            line += f"  ess {np.mean(said['steps']['ess']):.1f} a tile, power {np.mean(said['steps']['temper']):.3f}, "
            line += f"resampled {said['resamplings']} times, "
            line += f"{said['ancestors']} ancestors a tile"
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("scaling", "ct", "worker"))
    parser.add_argument("--draws", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--radius", type=float, default=24.0)
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--tile", type=int, default=16)
    parser.add_argument("--down-to", type=float, nargs="+", default=[0.3])
    given = parser.parse_args()
    if given.what == "ct":
        settings = {"radius": given.radius, "keep": given.keep, "tile": (given.tile, given.tile)}
        ct(given.draws or 8, given.steps or 16, settings, given.down_to)
    else:
        (worker if given.what == "worker" else scaling)(given.draws or 512, given.steps or 40, given.repeats)


if __name__ == "__main__":
    main()
