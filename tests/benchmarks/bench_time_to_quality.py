"""Seconds until the posterior mean is as good as it gets: recon's samplers against deepinv's, with one prior, in one run.

    RECON_DATA=DIR python tests/benchmarks/bench_time_to_quality.py [--slices 2] [--seconds 60] [--only NAME ...]

Sparse-view CT of held-out slices, the problem of bench_sparse_view.py.  Every contestant makes draws one by one on one thread;
after each, the mean of those so far is compared with the truth.  The goal of a slice is the best PSNR that any contestant's
mean reaches, less 0.1 dB; a contestant's time is the sum of its draws' times until its mean is there, or none within
``--seconds``.  Times are those of the processor, so that what else a busy machine does is not counted; contestants take turns,
draw by draw.  Reported: the times, and the ratio of the medians over slices of the fastest of deepinv and the fastest of recon;
and the same for the goal that both sides reach, the best mean of the weaker one, less 0.1 dB.

Both sides use the same denoiser and projector (``recon.operators.deepinv_bridge``) and the same noise.  deepinv expects images
in [0, 1] and an operator of norm 1: x = HIGH u, y and its noise are divided by HIGH |A|, and noise levels outside the prior's
range are asked at its nearest end.  Each method has several settings (steps, weights); the best one counts.  deepinv's
PosteriorDiffusion walks down the very levels that recon's samplers do.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from bench_sparse_view import Case, cases
from torch import Tensor, nn

import recon
from recon.comm import serial
from recon.likelihoods import GaussianLikelihood
from recon.operators.deepinv_bridge import as_deepinv
from recon.priors import Prior, load_prior
from recon.samplers import METHODS, Sampler
from recon.schedules import Karras, Schedule

HIGH = 60.0  # 1/m: what deepinv's 1 stands for; above all of the truths
TOP, BOTTOM = 20.0, 0.01  # noise levels walked, units of the latent
NEAR = 0.1  # dB
SIDES = ("recon", "deepinv")
Draw = Callable[[int], Tensor]

RECON: dict[str, Sampler] = {
    f"{name} {steps}": METHODS[name](steps=steps, sigma_max=TOP, sigma_min=BOTTOM)  # type: ignore[call-arg]
    for name, steps in (("mmps", 16), ("mmps", 30), ("diffpir", 24), ("diffpir", 64), ("pigdm", 32), ("dds", 24))
}


class Denoiser(nn.Module):
    """A prior as deepinv asks a denoiser: images (n, 1, y, x) with 1 for ``HIGH``, sigma in their unit."""

    def __init__(self, prior: Prior) -> None:
        super().__init__()
        self.prior = prior
        self.shift, self.scale = float(prior.shift) / HIGH, float(prior.scale) / HIGH

    def forward(self, x: Tensor, sigma: Tensor | float, *_: object, **__: object) -> Tensor:
        levels = self.prior.schedule
        z = (x[:, 0] - self.shift) / self.scale
        asked = torch.as_tensor(sigma, dtype=z.dtype).reshape(-1)[:1] / self.scale
        given = asked.clamp(levels.sigma_min, levels.sigma_max)
        # Above the range the state is shrunk to the largest level, where next to nothing is left of it.
        z = z * (given / asked).clamp(max=1.0)
        return (self.prior.denoise(z, given) * self.scale + self.shift)[:, None]


@dataclass
class Contestant:
    """One method at one setting on one slice: its draws so far, their mean's PSNR, and the time after each."""

    side: str
    name: str
    draw: Draw
    total: Tensor | None = None
    psnr: list[float] = field(default_factory=list)
    spent: list[float] = field(default_factory=list)
    failed: str = ""

    def turn(self, case: Case) -> None:
        """One more draw."""
        start = time.process_time()
        try:
            x = self.draw(len(self.spent))
        except (recon.errors.ReconError, RuntimeError, ValueError) as error:
            self.failed = f"{type(error).__name__}: {error}".splitlines()[0][:100]
            return
        self.spent.append((self.spent[-1] if self.spent else 0.0) + time.process_time() - start)
        self.total = x if self.total is None else self.total + x
        self.psnr.append(case.psnr(self.total / len(self.spent)))
        sys.stderr.write(
            f"{self.side} {self.name}: draw {len(self.spent)}, {self.spent[-1]:.1f} s, {self.psnr[-1]:.2f} dB\n"
        )

    def reached(self, goal: float) -> float | None:
        """Seconds until the mean is as good as ``goal``; None when it never was."""
        return next((t for t, p in zip(self.spent, self.psnr, strict=True) if p >= goal), None)


def ours(prior: Prior, case: Case) -> list[Contestant]:
    """Recon's samplers, a draw at a time."""
    posterior = recon.Posterior(prior, GaussianLikelihood(case.operator, case.y, case.sigma))

    def drawing(sampler: Sampler) -> Draw:
        return lambda k: recon.sample(posterior, sampler, draws=1, seed=k, comm=serial(1)).x[0]

    return [Contestant("recon", name, drawing(sampler)) for name, sampler in RECON.items()]


def theirs(prior: Prior, case: Case) -> list[Contestant]:
    """deepinv's DPS, DiffPIR and PosteriorDiffusion."""
    import deepinv
    from deepinv import sampling

    gain = HIGH * case.operator.norm()
    physics = as_deepinv((HIGH / gain) * case.operator)
    physics.noise_model = deepinv.physics.GaussianNoise(case.sigma / gain)
    y, shape = (case.y / gain)[None, None], (1, 1, *case.truth.shape)
    denoiser = Denoiser(prior)
    made: dict[str, Draw] = {}

    def add(name: str, call: Callable[[int], Tensor]) -> None:
        def draw(k: int) -> Tensor:
            with torch.no_grad():
                return call(k + 1)[0, 0].float() * HIGH  # seed 0 is taken for none by some

        made[name] = draw

    for steps in (24, 100):
        for weight in (1.0, 7.0):  # 7 is the default
            plan = sampling.DiffPIR(
                denoiser, deepinv.optim.L2(), sigma=case.sigma / gain, max_iter=steps, lambda_=weight
            )
            add(f"DiffPIR {steps}, lambda {weight:g}", lambda k, plan=plan: plan(y, physics, seed=k))  # type: ignore[misc]
    for guidance, weight in (("norm", 1.0), ("norm", 100.0), ("annealed", 1.0)):
        dps = sampling.DPS(denoiser, num_steps=100, weight=weight, guidance=guidance, rng=torch.Generator())
        add(
            f"DPS 100, {guidance} {weight:g}",
            lambda k, dps=dps: dps(y, physics, x_init=shape, seed=k),  # type: ignore[misc]
        )
    for steps in (16, 30):
        low, high = (2 * denoiser.scale * level for level in (BOTTOM, TOP))  # deepinv walks in [-1, 1]
        sde = sampling.VarianceExplodingDiffusion(sigma_min=low, sigma_max=high, alpha=1.0)
        levels = Karras().sigmas(Schedule(BOTTOM, TOP), steps)[:-1] / BOTTOM
        times = levels.log() / torch.tensor(TOP / BOTTOM, dtype=torch.float64).log()
        kinds = {"moments": sampling.MomentMatchingDataFidelity, "PiGDM": sampling.PiGDMDataFidelity}
        for name, kind in kinds.items():
            walk = sampling.PosteriorDiffusion(
                kind(), denoiser, sde, sampling.AncestralSolver(timesteps=times, rng=torch.Generator())
            )
            add(
                f"PosteriorDiffusion {name} {steps}",
                lambda k, walk=walk: walk(y, physics, x_init=shape, seed=k),  # type: ignore[misc]
            )
    return [Contestant("deepinv", name, draw) for name, draw in made.items()]


def race(contestants: list[Contestant], case: Case, seconds: float) -> float:
    """Let all draw in turn until each has spent its time; returns the goal."""
    while ready := [c for c in contestants if not c.failed and (not c.spent or c.spent[-1] < seconds)]:
        for one in ready:
            one.turn(case)
    return max(p for c in contestants for p in c.psnr) - NEAR


def report(number: int, contestants: list[Contestant], goal: float) -> tuple[dict[str, float], dict[str, float]]:
    """Print one slice; returns the times of the fastest of each side to the goal, and to the one that both reach."""
    sys.stdout.write(f"slice {number}: goal {goal:.2f} dB\n")
    for one in contestants:
        if one.failed or not one.spent:
            sys.stdout.write(f"  {one.side:8} {one.name:32} failed: {one.failed}\n")
            continue
        when = one.reached(goal)
        told = f"there after {when:7.1f} s" if when is not None else f"not there in {one.spent[-1]:.0f} s"
        each = one.spent[-1] / len(one.spent)
        sys.stdout.write(
            f"  {one.side:8} {one.name:32} {each:7.2f} s a draw, best mean {max(one.psnr):6.2f} dB "
            f"({len(one.spent)} draws), {told}\n"
        )
    sys.stdout.flush()
    return fastest(contestants, goal), fastest(contestants, common(contestants))


def fastest(contestants: list[Contestant], goal: float) -> dict[str, float]:
    """Seconds of the fastest of each side to ``goal``, infinite where none reached it."""
    reached = {(c.side, c.reached(goal)) for c in contestants}
    return {
        side: min((when for which, when in reached if which == side and when is not None), default=math.inf)
        for side in SIDES
    }


def common(contestants: list[Contestant]) -> float:
    """The PSNR that the best means of both sides reach, less what nobody sees."""
    best = {side: [p for c in contestants if c.side == side for p in c.psnr] for side in SIDES}
    return min(max(values, default=-math.inf) for values in best.values()) - NEAR


def main() -> None:
    """Print every slice and the ratio of medians."""
    options = argparse.ArgumentParser()
    options.add_argument("--slices", type=int, default=2)
    options.add_argument("--seconds", type=float, default=60.0)
    options.add_argument("--only", nargs="+", default=[], help="beginnings of the names of contestants")
    options.add_argument("--prior", default="ct_axial")
    chosen = options.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    prior = load_prior(chosen.prior)
    prior.denoise(torch.zeros(1, *prior.latent.shape), 1.0)  # what is built on first use is not timed
    found: list[tuple[dict[str, float], dict[str, float]]] = []
    for number, case in enumerate(cases(chosen.slices, "rms")):
        contestants = [
            c
            for c in [*ours(prior, case), *theirs(prior, case)]
            if not chosen.only or c.name.startswith(tuple(chosen.only))
        ]
        found.append(report(number, contestants, race(contestants, case, chosen.seconds)))
    goals = (f"the best mean of all less {NEAR} dB", f"the best mean of the weaker side less {NEAR} dB")
    for goal, times in zip(goals, zip(*found, strict=True), strict=True):
        middle = {side: statistics.median(one[side] for one in times) for side in SIDES}
        ratio = middle["deepinv"] / middle["recon"]
        never = "; infinite: not within the time that each had" if math.isinf(middle["deepinv"]) else ""
        told = ", ".join(f"{side} {value:.1f} s" for side, value in middle.items())
        sys.stdout.write(f"{goal}: median over {len(found)} slice(s) {told}, ratio {ratio:.2f}{never}\n")


if __name__ == "__main__":
    main()
