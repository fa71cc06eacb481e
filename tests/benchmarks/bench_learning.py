"""A prior learnt from undersampled measurements alone, beside the one trained on clean images and the Gaussian start.

Brain slices (FLAIR, T1, T2; area means of 32 x 32 pixels) as real images.  Every slice is measured once, in a single coil's
k-space, at random places denser in the middle, a mask for every ALIKE slices: simulated k-space of magnitude images, with
white noise.  R is one over the share of k-space that is measured; k-space of a real image says everything twice, so a quarter
of it at random holds some 44 % of the independent numbers (--strict measures no conjugate pair twice and half as many places:
one real number for every four pixels).  Learning sees the measurements of five patients; all figures are of slices of two
other patients, in dB:

(a) denoising: error of each prior's denoiser against that of the Gaussian's, at the noise levels SIGMAS (latent units, images
    have standard deviation 0.5), and the share of the way from the Gaussian to the clean-data prior that learning covers;
(b) reconstruction: PSNR (peak 1) of the mean of DRAWS posterior draws under new measurements of the same kind; the draws of
    the Gaussian are exact.

The clean-data prior has the same network and sees as many training images, in one run.  A bar that falls short is reported,
never an error.  Some 15 minutes of one core; what is finished is kept in the folder and a second call goes on from there.

    RECON_DATA=... python tests/benchmarks/bench_learning.py FOLDER [--laps N] [--slices N] [--strict]
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch

from recon.datasets.fields import load_fields
from recon.draws import Draws
from recon.likelihoods import GaussianLikelihood
from recon.operators import CartesianMRI, MatrixOperator
from recon.operators.cg import CG
from recon.priors.base import Prior
from recon.priors.denoising import denoising_error
from recon.priors.learning import Laps, LearningConfig, Learnt, Moments, posterior_draws, posterior_means
from recon.priors.learning.laps import scale_of
from recon.priors.learning.samples import Scale, misfits
from recon.priors.network import Architecture
from recon.priors.training import TrainingConfig
from recon.samplers import MMPS
from recon.schedules import LogLinear
from recon.space import Space
from recon.workflows.learn import PosteriorDraws
from recon.workflows.training_data import field_card

SIDE, R, NOISE, ALIKE = 32, 4, 0.02, 16
SIGMAS = (0.05, 0.1, 0.2, 0.5, 1.0)
SLICES, TESTED, DRAWS = 1022, 24, 8
ARCHITECTURE = Architecture(family="drunet", size=SIDE, channels=(16, 32, 48, 64), blocks=1, position=True)
CONFIG = LearningConfig(
    seed=0,
    rank=20,
    moment_iterations=16,
    laps=4,
    steps=20,
    cg_iterations=3,
    sigma_min=0.01,
    sigma_max=20.0,
    mirror=(0.0, 0.5),
    training=TrainingConfig(
        images=12000, batch=16, chunk=16, learning_rate=2e-3, warmup=1000, ema=1000, precision="float32", device="cpu"
    ),
)
BAR = 0.5


class DirectView(MatrixOperator):
    """Every pixel seen by itself."""

    def __init__(self, space: Space) -> None:
        super().__init__(torch.eye(space.size), space, space)


STARTED = time.monotonic()


def say(line: str) -> None:
    """Print a line with the minutes gone."""
    if "drew block" not in line:
        print(f"{(time.monotonic() - STARTED) / 60:5.1f} min  {line}", flush=True)


def slices(part: str) -> torch.Tensor:
    """Slices of one part of the data set, (n, 32, 32), 1 at the 99.8th percentile of their volume."""
    fields = load_fields(field_card("openms_brain", None), part)
    return torch.from_numpy(fields.coarsened(fields.values.shape[-1] // SIDE).values[:, 0])


def places(seed: int, number: int, strict: bool) -> np.ndarray:
    """A mask of k-space: the centre and random places, denser in the middle; strictly, never both of a conjugate pair."""
    random = np.random.default_rng([seed, number])
    f = np.arange(SIDE) - SIDE // 2
    radius = np.hypot(f[:, None], f[None, :]).ravel()
    density = np.where(radius <= 3, 1e6, 1 / (1 + (radius / 6) ** 2))
    keys = random.exponential(size=SIDE * SIDE) / density
    wanted = SIDE * SIDE // R
    if strict:
        mirrored = (SIDE - np.arange(SIDE)) % SIDE
        partner = np.arange(SIDE * SIDE).reshape(SIDE, SIDE)[np.ix_(mirrored, mirrored)].ravel()
        keys[(keys > keys[partner])] = np.inf
        wanted //= 2
    mask = np.zeros(SIDE * SIDE, dtype=bool)
    mask[np.argsort(keys)[:wanted]] = True
    return mask.reshape(SIDE, SIDE)


def measured(images: torch.Tensor, space: Space, seed: int, strict: bool) -> list[GaussianLikelihood]:
    """Noisy k-space of each image at random places, the same for ALIKE images in turn."""
    random = np.random.default_rng([seed, 1 << 20])
    out = []
    for number, image in enumerate(images):
        if number % ALIKE == 0:
            operator = CartesianMRI(space, None, places(seed, number, strict), packed=True)
        clean = operator.A(image[None])[0]
        noise = random.standard_normal((*clean.shape, 2)).astype(np.float32)
        noisy = clean + NOISE * torch.view_as_complex(torch.from_numpy(noise))
        out.append(GaussianLikelihood(operator, noisy, NOISE))
    return out


def clean_prior(images: torch.Tensor, laps: Laps, folder: Path) -> Learnt:
    """The same network around the Gaussian of the clean slices, trained on them with as many images as all laps together."""
    config = laps.config
    total = sum(config.lap_training(lap).images for lap in range(1, config.laps + 1))
    longer = config.training.model_copy(update={"images": total})
    here = folder / f"clean-{len(images)}-{total}"
    everything = DirectView(laps.space)
    known = [GaussianLikelihood(everything, image, 1e-3) for image in images]
    changes = {"first": 1.0, "laps": 1, "training": longer}
    twin = Laps(known, ARCHITECTURE, config.model_copy(update=changes), here, laps.sampling, say)
    # Samples of lap 1 are the images themselves, to a standard deviation of 0.001.
    return twin.run()


def denoiser(prior: Prior, scale: Scale):
    """Of any prior, in the latent coordinates of the learnt ones."""

    def denoise(z: torch.Tensor, sigma: float) -> torch.Tensor:
        own = prior.encode((z * scale.scale + scale.shift).to(prior.dtype))
        return scale.latent(prior.decode(prior.denoise(own, sigma * scale.scale / float(prior.scale))))

    return denoise


def errors(denoise, images: torch.Tensor) -> np.ndarray:
    """Held-out denoising errors in dB (20 log10 of the RMSE in latent units), one per level."""
    return np.array([20 * math.log10(denoising_error(denoise, images, sigma, batch=64)) for sigma in SIGMAS])


def psnr(means: torch.Tensor, truth: torch.Tensor) -> float:
    """Mean over images of the peak signal-to-noise ratio, peak 1, in dB."""
    return float((-10 * torch.log10((means - truth).square().flatten(1).mean(1))).mean())


def reconstructions(prior: Prior, observations: list[GaussianLikelihood], draws: PosteriorDraws) -> torch.Tensor:
    """Means of DRAWS draws of every posterior, without those that diverged (misfit per datum above CONFIG.chi2_limit)."""
    total, kept = torch.zeros(len(observations), SIDE, SIDE), torch.zeros(len(observations), 1, 1)
    with torch.no_grad():
        for k in range(DRAWS):
            members = range(k * len(observations), (k + 1) * len(observations))
            x = draws.draw(prior, observations, Draws(1, members))
            good = (misfits(observations, x) <= CONFIG.chi2_limit)[:, None, None]
            total, kept = total + torch.where(good, x, 0.0), kept + good
    lost = DRAWS * len(observations) - int(kept.sum())
    print(f"  {prior.card.name}: {lost} of {DRAWS * len(observations)} draws diverged and are left out")
    return total / kept


def report(laps: Laps, moments: Moments, held_out: torch.Tensor, clean: Learnt, strict: bool) -> dict[str, object]:
    """All figures; printed as they come."""
    scale, found = scale_of(moments), {}
    latent = scale.latent(held_out)
    base = errors(denoiser(moments.prior(laps.space), scale), latent)
    top = base - errors(denoiser(clean.prior, scale), latent)
    print("(a) denoising, dB better than the Gaussian start, at latent sigma " + ", ".join(map(str, SIGMAS)))
    straight = base - errors(denoiser(clean.moments.prior(laps.space), scale), latent)
    print(f"  {'clean Gauss':12}" + "".join(f"{v:8.2f}" for v in straight) + f"   mean {straight.mean():.2f}")
    print(f"  {'clean data':12}" + "".join(f"{v:8.2f}" for v in top) + f"   mean {top.mean():.2f}", flush=True)
    for lap in range(1, laps.config.laps + 1):
        prior = laps.prior(lap)
        gain = base - errors(denoiser(prior, scale), latent)
        share = gain.mean() / top.mean()
        found[f"lap {lap}"] = {"gain": gain.tolist(), "share": share}
        print(
            f"  {f'EM lap {lap}':12}" + "".join(f"{v:8.2f}" for v in gain) + f"   mean {gain.mean():.2f}, {share:.0%}"
        )
    met = "met" if share >= BAR else "not met"
    print(f"  EM reaches {share:.0%} of the way from the Gaussian to clean data; bar {BAR:.0%} {met}", flush=True)
    lit = held_out[held_out.flatten(1).mean(1) > 0.05]
    truth = lit[:: max(1, len(lit) // TESTED)][:TESTED]
    observations = measured(truth, laps.space, 1, strict)
    walk = PosteriorDraws(MMPS(steps=CONFIG.steps, cg=CG(CONFIG.cg_iterations, 1e-4), grid=LogLinear()))
    exact = psnr(posterior_means(moments, observations).reshape(truth.shape).float(), truth)
    members = [Draws(1, range(k * len(truth), (k + 1) * len(truth))) for k in range(DRAWS)]
    drawn = [posterior_draws(moments, observations, some).reshape(truth.shape).float() for some in members]
    means = {"Gaussian": torch.stack(drawn).mean(0)}
    means |= {"EM": reconstructions(laps.prior(laps.config.laps), observations, walk)}
    means |= {"clean": reconstructions(clean.prior, observations, walk)}
    values = {name: psnr(mean, truth) for name, mean in means.items()}
    share = (values["EM"] - values["Gaussian"]) / (values["clean"] - values["Gaussian"])
    print(f"(b) PSNR of posterior means of {len(truth)} held-out slices at R = {R}{', strictly' if strict else ''}")
    print("  " + ", ".join(f"{name} {value:.2f} dB" for name, value in values.items()) + f"; {share:.0%} of the way")
    print(f"  exact mean of the Gaussian's posterior: {exact:.2f} dB", flush=True)
    return {"clean": top.tolist(), "clean Gaussian": straight.tolist(), **found, "psnr": values, "psnr share": share}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--laps", type=int, default=CONFIG.laps)
    parser.add_argument("--slices", type=int, default=SLICES)
    parser.add_argument("--strict", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    space, train = Space.grid((SIDE, SIDE), 7.2e-3, "1"), slices("train")
    train = train[torch.from_numpy(np.random.default_rng(0).permutation(len(train))[: options.slices])]
    held_out = torch.cat([slices("validation"), slices("test")])
    config = CONFIG.model_copy(update={"laps": options.laps})
    walk = PosteriorDraws(MMPS(steps=config.steps, cg=CG(config.cg_iterations, 1e-4), grid=LogLinear()))

    observations = measured(train, space, 0, options.strict)
    print(f"{len(observations)} observations of {2 * observations[0].y.numel()} real numbers each", flush=True)
    laps = Laps(observations, ARCHITECTURE, config, options.folder / "em", walk, say)
    learnt = laps.run()
    clean = clean_prior(train, laps, options.folder)
    found = report(laps, learnt.moments, held_out, clean, options.strict)
    (options.folder / "report.json").write_text(json.dumps(found, indent=2))
    print(f"{(time.monotonic() - STARTED) / 60:.1f} min in all")


if __name__ == "__main__":
    main()
