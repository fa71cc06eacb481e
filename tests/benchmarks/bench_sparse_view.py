"""Sparse-view CT on held-out real slices: posterior mean against filtered back-projection and tuned total variation.

    RECON_DATA=DIR python tests/benchmarks/bench_sparse_view.py [--slices 20] [--draws 16] [--method mmps] [--steps 30]
        [--levels 20 0.01] [--renewal 0.5]

levels: first and last noise level.  renewal: share of the noise that DiffPIR renews in a step (its zeta).

The first slices of the held-out set, one per patient while patients last, averaged 2 x 2 to 128 x 128; 60 views over 180
degrees; Gaussian noise of 1 %, of what authors count differently (``--noise``): the root mean square of the line integrals
(the norm of the noise is 1 % of that of the data), their mean, or the largest one.  PSNR relative to each slice's own range.
The baselines are at their strongest: the better of two filters, and the TV weight with the best mean PSNR on these very
slices.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import recon
from recon.baselines import TVSolver, fbp, tv
from recon.datasets.slices import SliceCard, load_slices
from recon.diagnostics.images import psnr, ssim
from recon.draws import Draws
from recon.likelihoods import GaussianLikelihood
from recon.operators import ParallelBeam
from recon.priors import load_prior
from recon.samplers import METHODS, Renoise, Sampler
from recon.store import find
from recon.workflows.definitions import read_definition

VIEWS, NOISE = 60, 0.01
LEVELS = {
    "mean": lambda y: float(y.mean()),
    "rms": lambda y: float(y.square().mean().sqrt()),
    "max": lambda y: float(y.max()),
}
WEIGHTS = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2)  # m
SOLVER = TVSolver(iterations=500, tolerance=3e-2)


@dataclass(frozen=True)
class Case:
    """One slice: what is true, what was measured."""

    truth: Tensor
    operator: ParallelBeam
    y: Tensor
    sigma: float

    def psnr(self, image: Tensor) -> float:
        """Of ``image``, with the range of the truth as peak."""
        return float(psnr(image, self.truth))


def cases(count: int, noise: str) -> list[Case]:
    """The first ``count`` held-out slices, different patients first; noise: a key of LEVELS."""
    import h5py

    card: SliceCard = read_definition("datasets", find("datasets", "tcga_heldout"))
    slices = load_slices(card, "test").coarsened(2)
    from recon.datasets.slices import locate

    with h5py.File(locate(card.name, card.file, card.sha256, card.source)) as file:
        patients = np.asarray(file["patient"])
    _, first = np.unique(patients, return_index=True)
    order = [*sorted(first), *sorted(set(range(len(slices))) - set(first))][:count]
    made = []
    for number, i in enumerate(order):
        truth = torch.from_numpy(slices.mu[i].copy())
        operator = ParallelBeam.half_turn((128, 128), float(slices.pixel[i]), VIEWS)
        clean = operator.A(truth)
        sigma = NOISE * LEVELS[noise](clean)
        normal = Draws(0, [0], case=number).normal(0, operator.range.shape, "data")[0]
        made.append(Case(truth, operator, clean + sigma * normal, sigma))
    return made


def best_tv(problems: list[Case]) -> tuple[float, list[Tensor]]:
    """The weight with the best mean PSNR, and its images."""
    images = {w: [tv(c.operator, c.y[None], c.sigma, w, SOLVER).x[0] for c in problems] for w in WEIGHTS}
    score = {w: np.mean([c.psnr(x) for c, x in zip(problems, images[w], strict=True)]) for w in WEIGHTS}
    best = max(score, key=lambda w: score[w])
    if best in (WEIGHTS[0], WEIGHTS[-1]):
        sys.stdout.write(f"the best TV weight {best} is at the end of the range tried: widen it\n")
    return best, images[best]


def main() -> None:
    """Print the table, one line per slice as it comes, and the bars."""
    options = argparse.ArgumentParser()
    options.add_argument("--slices", type=int, default=20)
    options.add_argument("--draws", type=int, default=16)
    options.add_argument("--method", choices=METHODS, default="mmps")
    options.add_argument("--steps", type=int, default=30)
    options.add_argument("--levels", type=float, nargs=2, default=(20.0, 0.01))
    options.add_argument("--renewal", type=float)
    options.add_argument("--prior", default="ct_axial")
    options.add_argument("--noise", choices=LEVELS, default="rms")
    chosen = options.parse_args()
    prior = load_prior(chosen.prior)
    settings = {"steps": chosen.steps, "sigma_max": chosen.levels[0], "sigma_min": chosen.levels[1]}
    if chosen.renewal is not None:
        settings["transition"] = Renoise(chosen.renewal)
    sampler: Sampler = METHODS[chosen.method](**settings)
    problems = cases(chosen.slices, chosen.noise)
    weight, smooth = best_tv(problems)
    scene = f"{len(problems)} slices, {VIEWS} views, noise {NOISE:.0%} of the {chosen.noise}"
    sys.stdout.write(f"{scene}, TV weight {weight}, {sampler}\n")
    sys.stdout.write("slice   FBP  (Hann)    TV   mean   one draw   SSIM FBP/TV/mean    chi2/m  90 % inside  seconds\n")
    rows = []
    for i, (case, tv_image) in enumerate(zip(problems, smooth, strict=True)):
        start = time.perf_counter()
        like = GaussianLikelihood(case.operator, case.y, case.sigma)
        ensemble = recon.sample(recon.Posterior(prior, like), sampler, draws=chosen.draws, seed=i)
        seconds = time.perf_counter() - start
        ramp, hann = fbp(case.operator, case.y, "ramp"), fbp(case.operator, case.y, "hann")
        images = (ramp, hann, tv_image, ensemble.mean(), ensemble.x[0])
        chi2 = float(((case.y - case.operator.A(ensemble.x)) / case.sigma).square().mean())
        low, high = ensemble.quantile([0.05, 0.95])
        inside = float(((case.truth >= low) & (case.truth <= high)).float().mean())
        structure = [float(ssim(image, case.truth)) for image in (ramp, tv_image, ensemble.mean())]
        rows.append([*(case.psnr(image) for image in images), *structure, chi2, inside, seconds])
        f, h, t, m, one, s0, s1, s2 = rows[-1][:8]
        line = f"{i:4d}  {f:6.2f} {h:6.2f} {t:6.2f} {m:6.2f} {one:8.2f}      {s0:.3f} {s1:.3f} {s2:.3f}"
        sys.stdout.write(f"{line}  {chi2:8.3f} {inside:9.3f} {seconds:9.1f}\n")
        sys.stdout.flush()
    f, h, t, m, one, s0, s1, s2, chi2, inside, seconds = np.mean(rows, axis=0)
    line = f"mean  {f:6.2f} {h:6.2f} {t:6.2f} {m:6.2f} {one:8.2f}      {s0:.3f} {s1:.3f} {s2:.3f}"
    sys.stdout.write(f"{line}  {chi2:8.3f} {inside:9.3f} {seconds:9.1f}\n")
    for name, gain, bar in (("FBP", m - max(f, h), 5.0), ("tuned TV", m - t, 3.0)):
        verdict = "met" if gain >= bar else "not met"
        sys.stdout.write(f"posterior mean over {name}: {gain:+.2f} dB, bar {bar:+.1f} dB: {verdict}\n")


if __name__ == "__main__":
    main()
