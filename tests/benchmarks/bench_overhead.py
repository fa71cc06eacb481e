"""Wall time of a sampling run against the sum of what it must compute.

    python tests/benchmarks/bench_overhead.py [--prior ct_axial]

One block of 4 draws on one thread: the denoiser, its vjp, the operator and its transpose are timed by themselves at the same
batch size, before and after the run; the run may take 5 % more than their counted sum, in the median of some runs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch

import recon
from recon.comm import serial
from recon.likelihoods import GaussianLikelihood
from recon.operators import CG, ParallelBeam
from recon.priors import load_prior
from recon.samplers import MMPS, DiffPIR, Sampler

DRAWS, RUNS, BAR = 4, 5, 1.05


def seconds(function: Callable[[], object], repeats: int = 7) -> list[float]:
    """Wall times of calls after a first one."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return times


def own_costs(posterior: recon.Posterior) -> dict[str, list[float]]:
    """Seconds per call at the batch of a block: denoiser alone, with its graph, vjp, A, A^T."""
    operator = posterior.likelihood.gaussian().linear("bench")
    z, x = torch.randn(DRAWS, 128, 128), torch.rand(DRAWS, 128, 128)
    y = operator.A(x)
    _, pull = posterior.linearize(z, 0.3)
    return {
        "denoiser": seconds(lambda: posterior.denoise(z, 0.3)),
        "with graph": seconds(lambda: posterior.linearize(z, 0.3)),
        "vjp": seconds(lambda: pull(z)),
        "forward": seconds(lambda: operator.A(x)),
        "adjoint": seconds(lambda: operator.A_adjoint(y)),
    }


def main() -> None:
    """Print costs, counts and the ratio for a sampler with and one without vjps."""
    options = argparse.ArgumentParser()
    options.add_argument("--prior", default="ct_axial")
    torch.set_num_threads(1)
    operator = ParallelBeam.half_turn((128, 128), 2.8e-3, 60)
    y = operator.A(torch.rand(128, 128))
    prior = load_prior(options.parse_args().prior)
    samplers: tuple[Sampler, ...] = (MMPS(steps=10), DiffPIR(steps=20, cg=CG(10, 0.0)))
    for sampler in samplers:
        posterior = recon.Posterior(prior, GaussianLikelihood(operator, y, 0.02))
        ratios = []
        for _ in range(RUNS):
            before = own_costs(posterior)
            ensemble = recon.sample(posterior, sampler, draws=DRAWS, block=DRAWS, comm=serial(1))
            after = own_costs(posterior)
            cost = {name: statistics.median([*before[name], *after[name]]) for name in before}
            spent = dict(ensemble.info["cost"])
            if spent["vjp"]:
                cost["denoiser"] = cost["with graph"]
            needed = sum(spent[name] / DRAWS * cost[name] for name in ("denoiser", "vjp", "forward", "adjoint"))
            ratios.append(spent["seconds"] / needed)
        each = ", ".join(f"{name} {1e3 * value:.2f} ms" for name, value in cost.items())
        ratio = statistics.median(ratios)
        sys.stdout.write(f"{type(sampler).__name__}: {each}\n  wall {spent['seconds']:.2f} s, counted {needed:.2f} s; ")
        sys.stdout.write(f"ratio {ratio:.3f} ({min(ratios):.3f} to {max(ratios):.3f} in {RUNS} runs), bar {BAR}: ")
        sys.stdout.write(f"{'met' if ratio <= BAR else 'not met'}\n")


if __name__ == "__main__":
    main()
