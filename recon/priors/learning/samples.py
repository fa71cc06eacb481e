"""Samples of the hidden objects as training images, and what they say about the lap that made them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from recon.likelihoods import GaussianLikelihood
from recon.priors.learning.config import LearningConfig
from recon.priors.objective import Batch
from recon.space import Space


@dataclass(frozen=True)
class Scale:
    """``x = shift + scale z`` with latents of standard deviation 0.5 (``SIGMA_DATA``)."""

    shift: float
    scale: float

    def latent(self, x: Tensor) -> Tensor:
        """``z`` of ``x``, float32."""
        return ((x - self.shift) / self.scale).float()


SIGMA_DATA = 0.5


@dataclass(frozen=True)
class Quality:
    """What the samples of a lap say: how many were drawn, left out as not finite, left out as diverged.

    chi2: mean misfit ``|y - A x|^2 / sigma^2`` per datum of those kept, 1 for draws of the right posterior; low and high: its
    5th and 95th percentile over samples.  spread: mean standard deviation of the values, over samples.
    """

    drawn: int
    not_finite: int
    diverged: int
    chi2: float
    low: float
    high: float
    spread: float

    @property
    def lost(self) -> float:
        """Share of the samples that was left out."""
        return (self.not_finite + self.diverged) / self.drawn

    def record(self) -> dict[str, float]:
        """As JSON."""
        return {**asdict(self), "lost": self.lost}

    def line(self) -> str:
        """One line of a log."""
        return (
            f"{self.drawn} samples, left out {self.not_finite} not finite and {self.diverged} diverged; "
            f"chi2 per datum {self.chi2:.3f} (5 % to 95 %: {self.low:.3f} to {self.high:.3f}), spread {self.spread:.4g}"
        )


def misfits(observations: Sequence[GaussianLikelihood], x: Tensor) -> Tensor:
    """``|y_i - A_i x_ij|^2 / sigma^2`` per datum: (n * k,) for samples (n * k, *space.shape), k of each observation in turn."""
    each = len(x) // len(observations)
    out = []
    for i, one in enumerate(observations):
        residual = one.residual(x[i * each : (i + 1) * each].to(one.measured.dtype)) / one.sigma
        parts = torch.view_as_real(residual) if residual.is_complex() else residual
        count = max(1, int((one.measured != 0).sum()))  # exact zeros are places where nothing was measured
        out.append(parts.double().square().flatten(1).sum(1) / count)
    return torch.cat(out)


def judged(
    observations: Sequence[GaussianLikelihood], x: Tensor, scale: Scale, config: LearningConfig
) -> tuple[Tensor, Quality]:
    """The latent images to train on, (kept, *space.shape), and the quality of all."""
    z = scale.latent(x)
    finite = z.flatten(1).isfinite().all(1)
    chi2 = misfits(observations, torch.where(finite.reshape(-1, *[1] * (x.ndim - 1)), x, 0.0))
    size = z.flatten(1).square().mean(1).sqrt()
    good = finite & (chi2 <= config.chi2_limit) & (size <= config.size_limit)
    kept, fits = z[good], chi2[good]
    low, high = (
        torch.quantile(fits, torch.tensor([0.05, 0.95], dtype=fits.dtype)).tolist() if len(fits) else (math.nan,) * 2
    )
    quality = Quality(
        drawn=len(x),
        not_finite=int((~finite).sum()),
        diverged=int((finite & ~good).sum()),
        chi2=float(fits.mean()),
        low=low,
        high=high,
        spread=float(kept.double().std(0).mean()) * scale.scale if len(kept) > 1 else math.nan,
    )
    return kept, quality


@dataclass(frozen=True)
class Shuffled:
    """``images`` (n, *space.shape) as batches: every epoch all of them in another order, mirrored by chance along (y, x).

    A pure function of (seed, step, number within the batch).
    """

    images: Tensor
    batch: int
    seed: int
    mirror: tuple[float, float] = (0.0, 0.0)

    def __call__(self, step: int, rows: Sequence[int]) -> Batch:
        """The images of some places of a batch, all values known."""
        n = len(self.images)
        chosen = []
        for row in rows:
            epoch, place = divmod(step * self.batch + row, n)
            image = self.images[int(_order(self.seed, epoch, n)[place])]
            key = np.array([self.seed, (1 << 62) + step * self.batch + row], dtype=np.uint64)
            chance = np.random.Generator(np.random.Philox(key=key)).random(2)
            axes = [axis - 2 for axis in range(2) if chance[axis] < self.mirror[axis]]
            chosen.append(image.flip(axes) if axes else image)
        values = torch.stack(chosen)
        return Batch(values, torch.ones_like(values))


@lru_cache(maxsize=8)
def _order(seed: int, epoch: int, n: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64))).permutation(n)


def fields(space: Space) -> int:
    """Values of a pixel: 1 for images (y, x), the length of the first axis of (field, y, x)."""
    return 1 if len(space.shape) == 2 else space.shape[0]
