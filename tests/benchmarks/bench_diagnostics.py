"""How often verdicts are right, and what the fair CRPS costs.

    python tests/benchmarks/bench_diagnostics.py [--trials 200] [--sizes 8 16 32 64 128]

Synthetic ensembles of correlated pixels, calibrated, biased by 0.7 standard deviations, over-dispersed and under-dispersed by
a factor 1.7, as in ``tests/diagnostics/test_verdicts.py``: the share of trials in which ranks and coverage over cases earn
the right word (100 cases; 200 with fewer than 32 draws and for coverage, which needs 19).  Then ``fair_crps`` on 65,536 pixels
and 64 draws: seconds of one core, and the memory it takes beside its input.
"""

from __future__ import annotations

import argparse
import sys
import time
import tracemalloc

import numpy as np
import torch

from recon.diagnostics import fair_crps, judge_coverage, judge_ranks
from tests.diagnostics.test_verdicts import KINDS, pit, pixels

PIXELS, DRAWS = 65536, 64


def shares(draws: int, trials: int) -> list[str]:
    """A line per kind of ensemble."""
    lines = []
    for kind in KINDS:
        rng, right = np.random.default_rng(draws), {"ranks": 0, "coverage": 0}
        for _ in range(trials):
            truth, x = pixels(rng, kind, 200 if draws < 32 else 100, draws)
            right["ranks"] += judge_ranks(pit(rng, truth.mean(1), x.mean(2)), draws).finding == kind
            if draws >= 19:
                truth, x = pixels(rng, kind, 200, draws)
                low, high = np.quantile(x, [0.05, 0.95], axis=1, method="weibull")
                inside, below = ((truth >= low) & (truth <= high)).mean(1), (truth < low).mean(1)
                right["coverage"] += judge_coverage(inside, 0.9, below).finding == kind
        covered = f"{100 * right['coverage'] / trials:9.1f} %" if draws >= 19 else "          -"
        lines.append(f"{draws:5d}  {kind:16s}{100 * right['ranks'] / trials:9.1f} %{covered}")
    return lines


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--sizes", type=int, nargs="+", default=[8, 16, 32, 64, 128])
    given = parser.parse_args()
    sys.stdout.write(f"right words in {given.trials} trials\ndraws  ensemble            ranks   coverage\n")
    for draws in given.sizes:
        sys.stdout.write("\n".join(shares(draws, given.trials)) + "\n")
        sys.stdout.flush()
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    x, truth = torch.tensor(rng.normal(size=(DRAWS, PIXELS))).float(), torch.tensor(rng.normal(size=PIXELS)).float()
    fair_crps(x, truth)
    times = []
    for _ in range(5):
        start = time.process_time()
        fair_crps(x, truth)
        times.append(time.process_time() - start)
    tracemalloc.start()
    fair_crps(x, truth)
    peak = tracemalloc.get_traced_memory()[1] / 1e6
    sys.stdout.write(
        f"fair CRPS, {PIXELS} pixels x {DRAWS} draws: {min(times):.3f} s of one core at best ({max(times):.3f} s at worst), "
        f"{peak:.1f} MB\n"
    )


if __name__ == "__main__":
    main()
