"""Training images cut at random from slices: whole fields of view and zoomed crops, flipped, turned, scaled and shifted.

Image ``i`` of batch ``step`` is a pure function of (seed, step, i): a training run that was stopped and resumed sees the same
images.  A cut is sampled at twice the wanted resolution and averaged over 2 x 2 pixels, so that it is an area mean like the
slices of a coarser scan; half of the cuts stay on the pixel grid, so that the texture of the noise is that of the data.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn import functional

from recon.datasets.slices import Slices
from recon.errors import InputError


class Cut(BaseModel):
    """One kind of training image: a share of the batch, cut from one data set.

    dataset: name or path of the card.  share: relative weight.  side: smallest and largest side of the cut, in pixels of the
    stored slice; the same number twice for whole slices.  The rest are the ranges of the augmentation: turn (degrees) and
    zoom (relative) apply to the half of the cuts that leave the pixel grid; shift is a share of the side; gain is the
    standard deviation of a factor on the attenuation.  whole: the side in pixels that a cut is brought to when training
    images are windows of it; without it a cut becomes a training image whole.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    dataset: str
    share: float = Field(gt=0)
    side: tuple[int, int]
    turn: float = Field(default=8.0, ge=0)
    zoom: float = Field(default=0.15, ge=0, lt=1)
    shift: float = Field(default=0.04, ge=0, le=0.5)
    upside_down: float = Field(default=0.1, ge=0, le=1)
    gain: float = Field(default=0.01, ge=0)
    whole: int | None = Field(default=None, ge=8)


@dataclass(frozen=True)
class Cutter:
    """Cuts batches of ``size`` x ``size`` images out of slices.

    cuts: pairs of what to cut and from which slices.  Raises InputError when there are none, or a side exceeds its slices.
    """

    cuts: Sequence[tuple[Cut, Slices]]
    size: int
    seed: int

    def __post_init__(self) -> None:
        if not self.cuts:
            raise InputError("training images need at least one cut")
        for cut, slices in self.cuts:
            if not 8 <= cut.side[0] <= cut.side[1] <= min(slices.mu.shape[1:]):
                raise InputError(f"cuts of side {cut.side} do not fit slices {slices.mu.shape[1:]} of {slices.name}")

    def batch(self, step: int, count: int) -> tuple[Tensor, Tensor]:
        """Batch number ``step``: attenuation (count, size, size) in 1/m, and where it is known (1.0 or 0.0)."""
        return self.images(step, range(count))

    def images(self, step: int, rows: Iterable[int]) -> tuple[Tensor, Tensor]:
        """Some images of batch number ``step``."""
        images, known = [], []
        for index in rows:
            key = np.array([self.seed, (step << 20) + index], dtype=np.uint64)
            random = np.random.Generator(np.random.Philox(key=key))
            image, mask = self._cut(random)
            images.append(image)
            known.append(mask)
        return torch.stack(images), torch.stack(known)

    def _cut(self, random: np.random.Generator) -> tuple[Tensor, Tensor]:
        shares = np.array([cut.share for cut, _ in self.cuts])
        cut, slices = self.cuts[random.choice(len(shares), p=shares / shares.sum())]
        row = int(random.integers(len(slices)))
        gain = float(np.exp(cut.gain * random.standard_normal()))
        theta = torch.from_numpy(_map(cut, slices.mu.shape[1:], random)).to(torch.float32)[None]
        grid = functional.affine_grid(theta, [1, 1, 2 * self.size, 2 * self.size], align_corners=False)
        layers = [torch.from_numpy(slices.mu[row])]
        if slices.valid is not None:
            layers.append(torch.from_numpy(~slices.valid[row]).to(torch.float32))
        fine = functional.grid_sample(torch.stack(layers)[None], grid, align_corners=False, padding_mode="zeros")
        image, *unknown = functional.avg_pool2d(fine, 2)[0]
        return gain * image, (unknown[0] < 1e-3).float() if unknown else torch.ones_like(image)


def _map(cut: Cut, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    """The affine map (2, 3) from the unit square of the image to that of the slice, both [-1, 1] x [-1, 1]."""
    low, high = np.log(cut.side[0]), np.log(cut.side[1])
    side = float(np.exp(random.uniform(low, high)))
    flips = np.where(random.random(2) < (0.5, cut.upside_down), -1.0, 1.0)
    angle, zoom = np.deg2rad(cut.turn) * random.uniform(-1, 1), 1 + cut.zoom * random.uniform(-1, 1)
    whole = cut.side[0] == min(shape)
    reach = 2 * cut.shift if whole else 0.8 * (1 - side / min(shape))
    shift = reach * random.uniform(-1, 1, 2)
    if random.random() < 0.5:
        side, angle, zoom = float(round(side)), 0.0, 1.0
        shift = np.round(shift * shape[0] / 2) * 2 / shape[0]
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return np.concatenate([turn * flips * zoom * side / shape[0], shift[:, None]], axis=1)
