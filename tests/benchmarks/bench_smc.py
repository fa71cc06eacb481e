"""Particles against exact samples of a mixture's posterior: sliced Wasserstein distance over its floor.

    python tests/benchmarks/bench_smc.py [--dims 8 80 800] [--data 1 2 4] [--seeds 20] [--first 0]
        [--methods twisted mcgdiff mmps dps] [--steps 200] [--record FILE]
    python tests/benchmarks/bench_smc.py --table FILE

The mixtures of Cardoso et al. (2023): 25 unit Gaussians at (8 i, 8 j, 8 i, 8 j, ...), i, j in -2 .. 2, weights chi-squared(1)
and normalised; ``A = U S V^T`` with random orthogonal factors and singular values uniform in [0, 1], noise uniform in [0, 1]
times the largest, data simulated.  Distance: mean over directions of the Wasserstein-1 distance of projections, between 1,024
draws (with their weights) and 1,024 exact ones, averaged over 4 sets of those; the floor is that between two sets of exact ones
(6 pairs).  Also the largest over directions in place of their mean (max-sliced), which published tables report.
Also the log evidence against the exact one, in reported standard errors, and seconds per run on one core.

record: a file to which every run is added as a line of JSON, so that seeds can be split over several calls.  table: print the
table of such a file.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import recon
from recon.comm import serial
from recon.likelihoods import GaussianLikelihood
from recon.operators import CG, MatrixOperator
from recon.priors import GaussianMixturePrior
from recon.samplers import DPS, MMPS, MCGDiff, Sampler, TwistedSMC
from recon.schedules import LogLinear, Schedule

DRAWS, REPEATS = 1024, 4


class UnitMixture(GaussianMixturePrior):
    """The same law with unit covariances: distances as matrix products, 30 times faster in 800 dimensions."""

    def predict(self, z: Tensor, sigma: Tensor) -> Tensor:
        flat, total = z.flatten(1), 1 + sigma[:, None] ** 2
        share = torch.softmax(self.log_weights + (flat @ self.means.T - 0.5 * self.means.square().sum(1)) / total, 1)
        return ((share @ self.means) * (total - 1) / total + flat / total).reshape(z.shape)


@dataclass(frozen=True)
class Problem:
    """A posterior, its exact law, its evidence, and sets of exact draws."""

    posterior: recon.Posterior
    exact: GaussianMixturePrior
    log_evidence: float
    sets: list[Tensor]
    directions: Tensor


def problem(d: int, m: int, seed: int, directions: int) -> Problem:
    """The mixture and data of one seed."""
    generator = torch.Generator().manual_seed(1_000_000 * d + 1000 * m + seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform(count: int) -> Tensor:
        return torch.rand(count, generator=generator, dtype=torch.float64)

    corner = 8.0 * torch.cartesian_prod(torch.arange(-2, 3), torch.arange(-2, 3)).double()
    means, weights = corner.repeat(1, d // 2), normal(25).square()
    weights = weights / weights.sum()
    left, right = torch.linalg.qr(normal(m, m))[0], torch.linalg.qr(normal(d, m))[0]
    gains = uniform(m)
    A, sigma = left * gains @ right.T, float(uniform(1) * gains.max())
    truth = means[int(torch.multinomial(weights, 1, generator=generator))] + normal(d)
    y = A @ truth + sigma * normal(m)
    radius = float(means.norm(dim=1).max())
    prior = UnitMixture(means, torch.ones(d).double(), weights, schedule=Schedule(0.01, 5 * radius))
    posterior = recon.Posterior(prior, GaussianLikelihood(MatrixOperator(A), y, sigma))
    exact = posterior.exact()
    assert isinstance(exact, GaussianMixturePrior)
    noise = A @ A.T + sigma**2 * torch.eye(m, dtype=torch.float64)
    parts = [torch.distributions.MultivariateNormal(A @ mean, noise).log_prob(y) for mean in means]
    evidence = float(torch.logsumexp(prior.log_weights + torch.stack(parts), 0))
    axes = normal(directions, d)
    sets = [exact_draws(exact, DRAWS, generator) for _ in range(REPEATS)]
    return Problem(posterior, exact, evidence, sets, axes / axes.norm(dim=1, keepdim=True))


def exact_draws(law: GaussianMixturePrior, count: int, generator: torch.Generator) -> Tensor:
    """Independent draws of a mixture: (count, d)."""
    which = torch.multinomial(law.log_weights.exp(), count, replacement=True, generator=generator)
    out = torch.randn(count, law.means.shape[1], generator=generator, dtype=torch.float64)
    for k in which.unique().tolist():
        here = which == k
        turned = out[here] * law.variances[k].sqrt()
        out[here] = law.means[k] + (turned if law.vectors is None else turned @ law.vectors[k].T)
    return out


def sliced(x: Tensor, weights: Tensor, sets: list[Tensor], directions: Tensor) -> np.ndarray:
    """Wasserstein-1 distance of projections between weighted ``x`` and each of ``sets`` (equal weights).

    Mean and largest over directions, of each the mean over sets.
    """
    total, largest = 0.0, np.zeros(len(sets))
    for axes in directions.split(250):
        px, order = (x @ axes.T).sort(0)
        cx = weights[order].cumsum(0)
        cx = cx / cx[-1]
        for number, other in enumerate(sets):
            py = (other @ axes.T).sort(0).values
            cy = (torch.arange(1, len(py) + 1, dtype=torch.float64) / len(py))[:, None].expand_as(py)
            edges = torch.cat([cx, cy]).sort(0).values
            width = edges.diff(dim=0, prepend=torch.zeros_like(edges[:1]))
            middle = (edges - width / 2).T.contiguous()
            ix = torch.searchsorted(cx.T.contiguous(), middle).clamp(max=len(px) - 1).T
            iy = (middle.T * len(py)).floor().long().clamp(max=len(py) - 1)
            each = (width * (px.gather(0, ix) - py.gather(0, iy)).abs()).sum(0)
            total += float(each.sum())
            largest[number] = max(largest[number], float(each.max()))
    return np.array([total / len(directions) / len(sets), largest.mean()])


def methods(steps: int = 200) -> dict[str, Sampler]:
    """What is compared, at the same number of steps."""
    return {
        "twisted": TwistedSMC(steps=steps),
        "mcgdiff": MCGDiff(steps=steps),
        "mmps": MMPS(steps=steps, grid=LogLinear(), cg=CG(8, 1e-8)),
        "dps": DPS(steps=steps, grid=LogLinear()),
    }


def floor_of(case: Problem) -> np.ndarray:
    """The distances between two sets of exact draws, over all pairs."""
    equal = torch.full((DRAWS,), 1 / DRAWS, dtype=torch.float64)
    values = [sliced(case.sets[i], equal, case.sets[i + 1 :], case.directions) for i in range(REPEATS - 1)]
    return np.asarray(np.average(values, axis=0, weights=[REPEATS - 1 - i for i in range(REPEATS - 1)]))


def runs(d: int, m: int, chosen: dict[str, Sampler], seeds: range, directions: int) -> Iterator[dict[str, float | str]]:
    """One run after the other, as soon as it is known."""
    for seed in seeds:
        case = problem(d, m, seed, directions)
        floor, largest_floor = floor_of(case).tolist()
        for name, sampler in chosen.items():
            start = time.perf_counter()
            one: dict[str, float | str] = {"d": d, "m": m, "seed": seed, "method": name, "directions": directions}
            one |= {"steps": sampler.steps, "floor": floor, "largest_floor": largest_floor}
            try:
                run = recon.sample(case.posterior, sampler, draws=DRAWS, seed=seed, comm=serial(1))
            except recon.errors.ReconError:
                yield {**one, "distance": np.inf, "largest": np.inf, "seconds": time.perf_counter() - start}
                continue
            one["seconds"] = time.perf_counter() - start
            said = run.info.get("particles", {})
            if said:
                one["score"] = (said["log_evidence"] - case.log_evidence) / said["log_evidence_error"]
                one["ess"], one["ancestors"] = said["smallest_ess"], said["ancestors"]
            distance, largest = sliced(run.x, run.weights, case.sets, case.directions).tolist()
            yield {**one, "distance": distance, "largest": largest}


def table(records: list[dict[str, float]]) -> str:
    """A line per problem and method.

    ratio: of the mean distance to the mean floor; then mean and standard error of the ratios of the seeds, and the largest.
    max-sliced: that distance, and its floor.
    """
    lines = [
        "  d  m method   seeds   floor  ratio  of ratios       largest  max-sliced (floor)  seconds  evidence beyond 3 errors"
    ]
    for key in sorted({(r["d"], r["m"], r["method"]) for r in records}):
        # A seed that was run twice counts once, as it was run last.
        mine = list({r["seed"]: r for r in records if (r["d"], r["m"], r["method"]) == key}.values())
        distance, floor = np.array([r["distance"] for r in mine]), np.array([r["floor"] for r in mine])
        ratios = distance / floor
        error = ratios.std(ddof=1) / np.sqrt(len(mine)) if len(mine) > 1 else np.nan
        most, least = (np.mean([r.get(name, np.nan) for r in mine]) for name in ("largest", "largest_floor"))
        scores = np.array([r["score"] for r in mine if "score" in r])
        lines.append(
            f"{key[0]:4d} {key[1]:2d} {key[2]:8s} {len(mine):4d}  {floor.mean():6.3f}  {distance.mean() / floor.mean():5.2f}  "
            f"{ratios.mean():5.2f} +- {error:.2f}  {ratios.max():8.2f}  {most:10.2f} ({least:5.2f})  "
            f"{np.mean([r['seconds'] for r in mine]):7.1f}  "
            + (f"{int((np.abs(scores) > 3).sum())} of {len(scores)}" if len(scores) else "-")
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run and print, or print what was recorded."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dims", type=int, nargs="+", default=[8, 80, 800])
    parser.add_argument("--data", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--directions", type=int, default=10_000)
    parser.add_argument("--methods", nargs="+", choices=list(methods()), default=list(methods()))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--record", type=Path)
    parser.add_argument("--table", type=Path)
    given = parser.parse_args()
    if given.table:
        sys.stdout.write(table([json.loads(line) for line in given.table.read_text().splitlines()]))
        return
    torch.set_num_threads(1)
    seeds = range(given.first, given.first + given.seeds)
    sys.stdout.write(f"{DRAWS} draws, {given.steps} steps, {given.seeds} seeds, {given.directions} directions\n")
    found, chosen = [], {name: methods(given.steps)[name] for name in given.methods}
    for d in given.dims:
        for m in given.data:
            for one in runs(d, m, chosen, seeds, given.directions):
                found.append(one)
                sys.stderr.write(
                    f"d {d} m {m} seed {one['seed']}: {one['method']} {one['distance'] / one['floor']:.2f} of "
                    f"{one['floor']:.3f}, {one['seconds']:.0f} s\n"
                )
                if given.record:
                    with given.record.open("a") as file:
                        file.write(json.dumps(one) + "\n")
    sys.stdout.write(table(found))


if __name__ == "__main__":
    main()
