"""Seconds until the posterior mean is as good as it gets: recon's samplers against deepinv's, with one prior, in one run.

    RECON_DATA=DIR python tests/benchmarks/bench_time_to_quality.py [--problem ct | mri] [--slices 2] [--first 0] [--seconds 60]
        [--only NAME ...] [--record FILE]

ct: sparse-view CT of held-out slices, the problem of bench_sparse_view.py.  mri: brain slices from a quarter of k-space with 8
coils, the column "MRI 4x" of bench_table.py.  Every contestant makes draws one by one on one thread (those called "pairs" two
by two, with opposite noise); after each, the mean of those so far is compared with the truth.  The goal of a slice is the best
PSNR that any contestant's mean reaches, less 0.1 dB; a contestant's time is the sum of its draws' times until its mean is
there, or none within ``--seconds``.  Times are those of the processor, so that what else a busy machine does is not counted.
Reported: the times, and the ratio of the medians over slices of the fastest of deepinv and the fastest of recon; and the same
for the goal that both sides reach, the best mean of the weaker one, less 0.1 dB.  Also the fair CRPS (mean over pixels) of the
draws of each side's fastest.

record: a file to which every contestant is added as a line of JSON when it is done with a slice.  What is in the file is not
run again, so that a call that was stopped can be repeated, and slices split over several.

Both sides use the same denoiser and projector (``recon.operators.deepinv_bridge``) and the same noise.  deepinv expects images
in [0, 1] and an operator of norm 1: x = high u, y and its noise are divided by high |A|, and noise levels outside the prior's
range are asked at its nearest end.  Each method has several settings (steps, weights, renewal); the best one counts.  deepinv's
PosteriorDiffusion walks down the very levels that recon's samplers do, from the prior's mean and 20, or from 2.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import torch
from bench_sparse_view import cases
from bench_table import COLUMNS
from torch import Tensor, nn

import recon
from recon.comm import serial
from recon.diagnostics.images import psnr
from recon.diagnostics.scores import fair_crps
from recon.draws import Pairs
from recon.likelihoods import GaussianLikelihood
from recon.operators import CG
from recon.operators.deepinv_bridge import as_deepinv
from recon.priors import Prior, load_prior
from recon.samplers import METHODS, MMPS, DiffPIR, PiGDM, Renoise, Sampler
from recon.schedules import Karras, Schedule

TOP, BOTTOM = 20.0, 0.01  # noise levels walked, units of the latent
SHORT = (0.005, 2.0)  # the same, where the data leave little open
NEAR = 0.1  # dB
SIDES = ("recon", "deepinv")
Draw = Callable[[int], Tensor]  # the number of a call -> (n, *space.shape)

RECON: dict[str, Sampler] = {
    f"{name} {steps}": METHODS[name](steps=steps, sigma_max=TOP, sigma_min=BOTTOM)  # type: ignore[call-arg]
    for name, steps in (("mmps", 16), ("mmps", 30), ("diffpir", 24), ("diffpir", 64), ("pigdm", 32), ("dds", 24))
}
for _steps in (12, 16, 32, 64):
    RECON[f"diffpir {_steps} renewed"] = DiffPIR(steps=_steps, sigma_max=3.0, sigma_min=0.003, transition=Renoise(1.0))
for _steps in (16, 24, 32):
    RECON[f"pigdm {_steps}, zeta 0.8"] = PiGDM(steps=_steps, sigma_max=3.0, sigma_min=BOTTOM, transition=Renoise(0.8))
for _steps, _iterations, (_bottom, _top), _name in (
    (12, 3, (BOTTOM, 3.0), "12, zeta 0.8"),
    (16, 3, (BOTTOM, 3.0), "16, zeta 0.8"),
    (18, 4, SHORT, "18 by 4"),
    (20, 3, SHORT, "20 by 3"),
):
    _limits = CG(iterations=_iterations, tolerance=1e-4)
    RECON[f"mmps {_name}"] = MMPS(steps=_steps, sigma_max=_top, sigma_min=_bottom, cg=_limits, transition=Renoise(0.8))


@dataclass(frozen=True)
class Slice:
    """One case.  high: what deepinv's 1 stands for; above all of the truths."""

    posterior: recon.Posterior
    truth: Tensor
    high: float

    def psnr(self, image: Tensor) -> float:
        """Of ``image``, with the range of the truth as peak."""
        return float(psnr(image, self.truth))


@dataclass(frozen=True)
class Problem:
    """prior: the default one.  slices: made of the prior and the numbers of the held-out slices."""

    prior: str
    slices: Callable[[Prior, range], list[Slice]]


def ct(prior: Prior, numbers: range) -> list[Slice]:
    """Attenuation in 1/m."""
    found = cases(numbers.stop, "rms")[numbers.start :]
    return [Slice(recon.Posterior(prior, GaussianLikelihood(c.operator, c.y, c.sigma)), c.truth, 60.0) for c in found]


def mri(prior: Prior, numbers: range) -> list[Slice]:
    """Complex images of magnitude up to one, as two channels."""
    made = [COLUMNS["MRI 4x"].case(prior, number) for number in numbers]
    return [Slice(case.posterior, case.truth, 1.0) for case in made if case.truth is not None]


PROBLEMS = {"ct": Problem("ct_axial", ct), "mri": Problem("brain_mr", mri)}


class Denoiser(nn.Module):
    """A prior as deepinv asks a denoiser: images (n, 1 or 2, y, x) with 1 for ``high``, sigma in their unit."""

    def __init__(self, prior: Prior, high: float) -> None:
        super().__init__()
        self.prior = prior
        self.shift, self.scale = float(prior.shift) / high, float(prior.scale) / high

    def forward(self, x: Tensor, sigma: Tensor | float, *_: object, **__: object) -> Tensor:
        levels = self.prior.schedule
        z = (x.reshape(len(x), *self.prior.latent.shape) - self.shift) / self.scale
        asked = torch.as_tensor(sigma, dtype=z.dtype).reshape(-1)[:1] / self.scale
        given = asked.clamp(levels.sigma_min, levels.sigma_max)
        # Above the range the state is shrunk to the largest level, where next to nothing is left of it.
        z = z * (given / asked).clamp(max=1.0)
        return (self.prior.denoise(z, given) * self.scale + self.shift).reshape(x.shape)


@dataclass
class Contestant:
    """One method at one setting on one slice: its draws so far, their mean's PSNR and the time after each call.

    paired: a call makes a pair with opposite noise.  crps: of all draws, NaN for too few.
    """

    side: str
    name: str
    draw: Draw
    paired: bool = False
    draws: list[Tensor] = field(default_factory=list)
    psnr: list[float] = field(default_factory=list)
    spent: list[float] = field(default_factory=list)
    crps: float = math.nan
    failed: str = ""

    def turn(self, case: Slice) -> None:
        """One more draw."""
        start = time.process_time()
        try:
            x = self.draw(len(self.spent))
        except (recon.errors.ReconError, RuntimeError, ValueError) as error:
            self.failed = f"{type(error).__name__}: {error}".splitlines()[0][:100]
            return
        self.spent.append((self.spent[-1] if self.spent else 0.0) + time.process_time() - start)
        self.draws.extend(x)
        made = torch.stack(self.draws)
        self.psnr.append(case.psnr(made.mean(0)))
        if len(made) >= (4 if self.paired else 2):
            self.crps = float(fair_crps(made, case.truth, antithetic=self.paired).mean())
        sys.stderr.write(
            f"{self.side} {self.name}: {len(made)} draws, {self.spent[-1]:.1f} s, {self.psnr[-1]:.2f} dB, {self.crps:.4g}\n"
        )

    def reached(self, goal: float) -> float | None:
        """Seconds until the mean is as good as ``goal``; None when it never was."""
        return next((t for t, p in zip(self.spent, self.psnr, strict=True) if p >= goal), None)


@dataclass
class Record:
    """What was run before, and where it is written.  about: the problem, the prior and the slice."""

    path: Path | None
    about: dict[str, str | int]

    def key(self, one: Contestant) -> dict[str, str | int]:
        """What a line has to say to be this contestant's."""
        return {**self.about, "side": one.side, "name": one.name}

    def fill(self, one: Contestant, seconds: float) -> bool:
        """Whether it had as many seconds before; its figures are then put in."""
        lines = self.path.read_text().splitlines() if self.path is not None and self.path.is_file() else []
        for said in map(json.loads, lines):
            if self.key(one).items() <= said.items() and said["seconds"] >= seconds:
                one.psnr, one.spent = said["psnr"], said["spent"]
                one.crps, one.failed = said["crps"], said["failed"]
                return True
        return False

    def add(self, one: Contestant, seconds: float) -> None:
        """Write a line."""
        if self.path is not None:
            kept = {name: value for name, value in vars(one).items() if name in ("psnr", "spent", "crps", "failed")}
            with self.path.open("a") as file:
                file.write(json.dumps({**self.key(one), "seconds": seconds, **kept}) + "\n")


def ours(case: Slice) -> list[Contestant]:
    """Recon's samplers, a draw or a pair at a time."""

    def drawing(sampler: Sampler, asked: int | Pairs) -> Draw:
        return lambda k: recon.sample(case.posterior, sampler, asked, seed=k, comm=serial(1)).x

    return [
        Contestant("recon", name + (", pairs" if paired else ""), drawing(sampler, Pairs(1) if paired else 1), paired)
        for name, sampler in RECON.items()
        for paired in (False, True)
    ]


def theirs(case: Slice) -> list[Contestant]:
    """deepinv's DPS, DiffPIR and PosteriorDiffusion."""
    import deepinv
    from deepinv import sampling

    likelihood = case.posterior.likelihood.gaussian()
    operator, sigma = likelihood.linear("deepinv"), float(likelihood.sigma)
    gain = case.high * operator.norm()
    physics = as_deepinv((case.high / gain) * operator)
    physics.noise_model = deepinv.physics.GaussianNoise(sigma / gain)
    pixels = tuple(case.truth.shape)
    shape = (1, *pixels) if len(pixels) == 3 else (1, 1, *pixels)
    y = (likelihood.y / gain)[None, None]
    denoiser = Denoiser(case.posterior.prior, case.high)
    made: dict[str, Draw] = {}

    def add(name: str, call: Callable[[int], Tensor]) -> None:
        def draw(k: int) -> Tensor:
            with torch.no_grad():
                return call(k + 1).reshape(1, *pixels).float() * case.high  # seed 0 is taken for none by some

        made[name] = draw

    for steps, weight, zeta in product((16, 24, 100), (1.0, 7.0), (0.1, 1.0)):  # lambda 7, zeta 0.1 are the defaults
        data = deepinv.optim.L2()
        plan = sampling.DiffPIR(denoiser, data, sigma=sigma / gain, max_iter=steps, zeta=zeta, lambda_=weight)
        add(
            f"DiffPIR {steps}, lambda {weight:g}, zeta {zeta:g}",
            lambda k, plan=plan: plan(y, physics, seed=k),  # type: ignore[misc]
        )
    for guidance, weight in (("norm", 1.0), ("norm", 100.0), ("annealed", 1.0)):
        dps = sampling.DPS(denoiser, num_steps=100, weight=weight, guidance=guidance, rng=torch.Generator())
        add(
            f"DPS 100, {guidance} {weight:g}",
            lambda k, dps=dps: dps(y, physics, x_init=shape, seed=k),  # type: ignore[misc]
        )
    kinds = {"moments": sampling.MomentMatchingDataFidelity, "PiGDM": sampling.PiGDMDataFidelity}
    for steps, (bottom, top) in product((16, 30), ((BOTTOM, TOP), SHORT)):
        low, high = (2 * denoiser.scale * level for level in (bottom, top))  # deepinv walks in [-1, 1]
        sde = sampling.VarianceExplodingDiffusion(sigma_min=low, sigma_max=high, alpha=1.0)
        levels = Karras().sigmas(Schedule(bottom, top), steps)[:-1] / bottom
        times = levels.log() / torch.tensor(top / bottom, dtype=torch.float64).log()

        def at(k: int, level: float = high) -> Tensor:
            """The start: around the prior's mean, where deepinv's own is around the middle of its range."""
            noise = torch.randn(shape, generator=torch.Generator().manual_seed(k))
            return 2 * denoiser.shift - 1 + level * noise

        for name, kind in kinds.items():
            walk = sampling.PosteriorDiffusion(
                kind(), denoiser, sde, sampling.AncestralSolver(timesteps=times, rng=torch.Generator())
            )
            add(
                f"PosteriorDiffusion {name} {steps}, from {top:g}",
                lambda k, walk=walk, at=at: walk(y, physics, x_init=at(k), seed=k),  # type: ignore[misc]
            )
    return [Contestant("deepinv", name, draw) for name, draw in made.items()]


def race(contestants: list[Contestant], case: Slice, seconds: float, record: Record) -> float:
    """Let each draw until it has spent its time, but those on record; returns the goal."""
    for one in contestants:
        if record.fill(one, seconds):
            continue
        while not one.failed and (not one.spent or one.spent[-1] < seconds):
            one.turn(case)
        record.add(one, seconds)
    return max((p for c in contestants for p in c.psnr), default=-math.inf) - NEAR


Times = dict[str, float]


def report(number: int, contestants: list[Contestant], goal: float) -> tuple[Times, Times, Times]:
    """Print one slice; of each side: time of its fastest to the goal, and to the one that both reach, and this one's CRPS."""
    sys.stdout.write(f"slice {number}: goal {goal:.2f} dB\n")
    for one in contestants:
        if one.failed or not one.spent:
            sys.stdout.write(f"  {one.side:8} {one.name:32} failed: {one.failed}\n")
            continue
        when = one.reached(goal)
        told = f"there after {when:7.1f} s" if when is not None else f"not there in {one.spent[-1]:.0f} s"
        made = len(one.spent) * (2 if one.paired else 1)
        sys.stdout.write(
            f"  {one.side:8} {one.name:32} {one.spent[-1] / made:7.2f} s a draw, best mean {max(one.psnr):6.2f} dB "
            f"({made} draws), CRPS {one.crps:.4g}, {told}\n"
        )
    sys.stdout.flush()
    both = common(contestants)
    scores = {side: first(contestants, side, both)[1] for side in SIDES}
    return *({side: first(contestants, side, g)[0] for side in SIDES} for g in (goal, both)), scores


def first(contestants: list[Contestant], side: str, goal: float) -> tuple[float, float]:
    """Seconds of the fastest of a side to ``goal``, infinite where none reached it, and its CRPS."""
    reached = [(c.reached(goal), c.crps) for c in contestants if c.side == side]
    return min(((when, crps) for when, crps in reached if when is not None), default=(math.inf, math.nan))


def common(contestants: list[Contestant]) -> float:
    """The PSNR that the best means of both sides reach, less what nobody sees."""
    best = {side: [p for c in contestants if c.side == side for p in c.psnr] for side in SIDES}
    return min(max(values, default=-math.inf) for values in best.values()) - NEAR


def main() -> None:
    """Print every slice and the ratio of medians."""
    options = argparse.ArgumentParser()
    options.add_argument("--problem", choices=PROBLEMS, default="ct")
    options.add_argument("--slices", type=int, default=2)
    options.add_argument("--first", type=int, default=0)
    options.add_argument("--seconds", type=float, default=60.0)
    options.add_argument("--only", nargs="+", default=[], help="beginnings of the names of contestants")
    options.add_argument("--prior")
    options.add_argument("--record", type=Path)
    chosen = options.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    problem = PROBLEMS[chosen.problem]
    prior = load_prior(chosen.prior or problem.prior)
    prior.denoise(torch.zeros(1, *prior.latent.shape), 1.0)  # what is built on first use is not timed
    found: list[tuple[Times, Times, Times]] = []
    numbers = range(chosen.first, chosen.first + chosen.slices)
    for number, case in zip(numbers, problem.slices(prior, numbers), strict=True):
        contestants = [
            c for c in [*ours(case), *theirs(case)] if not chosen.only or c.name.startswith(tuple(chosen.only))
        ]
        about: dict[str, str | int] = {"problem": chosen.problem, "prior": prior.card.name, "slice": number}
        goal = race(contestants, case, chosen.seconds, Record(chosen.record, about))
        found.append(report(number, contestants, goal))
    goals = (f"the best mean of all less {NEAR} dB", f"the best mean of the weaker side less {NEAR} dB")
    *raced, scores = zip(*found, strict=True)
    for goal, times in zip(goals, raced, strict=True):
        middle = {side: statistics.median(one[side] for one in times) for side in SIDES}
        ratio = middle["deepinv"] / middle["recon"]
        never = "; infinite: not within the time that each had" if math.isinf(middle["deepinv"]) else ""
        told = ", ".join(f"{side} {value:.1f} s" for side, value in middle.items())
        sys.stdout.write(f"{goal}: median over {len(found)} slice(s) {told}, ratio {ratio:.2f}{never}\n")
    told = ", ".join(f"{side} {statistics.mean(one[side] for one in scores):.4g}" for side in SIDES)
    sys.stdout.write(f"mean CRPS of the fastest to the second goal: {told}\n")


if __name__ == "__main__":
    main()
