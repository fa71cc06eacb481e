r"""What another way of computing a denoiser costs in accuracy.

On noisy probe images at several levels the root mean square difference ``d`` of two denoisers is held against the error ``e``
of the first.  Rounding hardly knows of that error, so the squared errors add, and what is lost is

.. math::  10 \log_{10}(1 + d^2 / e^2)  \quad \text{decibel}.

0.05 dB is a difference of 0.11 times the error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from recon.draws import Draws
from recon.errors import InputError
from recon.priors.base import Prior
from recon.schedules import Karras


@dataclass(frozen=True)
class Accuracy:
    """One measurement: at level ``sigma`` the answers differ by ``difference`` (RMS) where the denoiser errs by ``error``."""

    sigma: float
    error: float
    difference: float

    @property
    def loss(self) -> float:
        """``10 log10(1 + (difference / error)^2)`` in decibel; infinite where the difference is not finite."""
        if self.difference == 0:
            return 0.0
        ratio = self.difference / self.error if self.error > 0 else math.inf
        return 10 * math.log10(1 + ratio**2) if math.isfinite(ratio) else math.inf


def measure(plain: Prior, other: Prior, images: Tensor) -> tuple[Accuracy, ...]:
    """The difference of two denoisers on noisy ``images`` (n, *latent.shape) at every level whose error is known.

    Raises InputError when the images are not of the latent, or ``other`` cannot be computed here.
    """
    plain.latent.require(tuple(images.shape), "the accuracy probe")
    known = _card_errors(plain)
    found = []
    for step, sigma in enumerate(known or _levels(plain)):
        noise = Draws(0, range(len(images))).normal(step, plain.latent.shape, "probe", dtype=plain.dtype)
        noisy = images + sigma * noise.to(images.device)
        with torch.no_grad():
            expected = plain.denoise(noisy, sigma)
            try:
                got = other.denoise(noisy, sigma)
            except Exception as failure:
                # A missing compiler, a device without bfloat16: each back end has its own class of errors.
                reason = " ".join(str(failure).split("\n")[:2]).strip()
                raise InputError(
                    f"prior {plain.card.name!r} cannot be computed this way here ({type(failure).__name__}: {reason}); "
                    "leave compiled out, or compute in float32"
                ) from failure
        error = known.get(sigma) or _rms(expected - images)
        found.append(Accuracy(sigma, error, _rms(got - expected)))
    return tuple(found)


def own_images(prior: Prior, count: int = 2, steps: int = 12) -> Tensor:
    """Draws of the prior itself, (count, *latent.shape): Euler steps of the probability flow down its whole schedule."""
    sigmas = Karras().sigmas(prior.schedule, steps).tolist()
    z = Draws(0, range(count)).normal(0, prior.latent.shape, "init", dtype=prior.dtype).to(prior.device) * sigmas[0]
    with torch.no_grad():
        for sigma, lower in zip(sigmas, sigmas[1:], strict=False):
            denoised = prior.denoise(z, sigma)
            z = denoised + lower / sigma * (z - denoised)
    return z


def _card_errors(prior: Prior) -> dict[float, float]:
    """Level -> smallest held-out RMSE of the card, within the schedule."""
    errors: dict[float, float] = {}
    for row in prior.card.facts.get("denoising", ()):
        if prior.schedule.sigma_min <= row["sigma"] <= prior.schedule.sigma_max:
            errors[row["sigma"]] = min(row["prior"], errors.get(row["sigma"], math.inf))
    return errors


def _levels(prior: Prior) -> list[float]:
    low, high = math.log(prior.schedule.sigma_min), math.log(prior.schedule.sigma_max)
    return [math.exp(low + (high - low) * i / 5) for i in range(6)]


def _rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())
