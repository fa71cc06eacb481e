"""Training images drawn from fields: mirrored, shifted, scaled; magnitudes given a smooth phase.

Image ``i`` of batch ``step`` is a pure function of (seed, step, i): a training run that was stopped and resumed sees the same
images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from recon.datasets.fields import Fields
from recon.errors import InputError
from recon.space import Space


class FieldSampling(BaseModel):
    """How training images are made of a data set of fields.

    dataset: name or path of the card.  coarsen: side of the blocks of pixels that are averaged first.  mirror: chances of a
    mirror image along (y, x), where the physics has no preferred side.  shift: largest shift of the grid in pixels, filled
    with the border's values.  gain: standard deviation of the logarithm of a factor (arbitrary scanner scales).  phase: make
    complex images (real and imaginary part) of magnitudes, with a constant phase anywhere on the circle and a smooth one of
    this standard deviation in radians; null leaves real fields real.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    dataset: str
    coarsen: int = Field(default=1, ge=1)
    mirror: tuple[float, float] = (0.0, 0.0)
    shift: int = Field(default=0, ge=0)
    gain: float = Field(default=0.0, ge=0)
    phase: float | None = Field(default=None, ge=0)


@dataclass(frozen=True)
class FieldSampler:
    """Draws batches of images in physical units from ``fields``.

    Raises InputError when a phase is asked for and there is not exactly one variable.
    """

    sampling: FieldSampling
    fields: Fields
    seed: int

    def __post_init__(self) -> None:
        if self.sampling.phase is not None and self.fields.values.shape[1] != 1:
            raise InputError(
                f"a phase is given to one magnitude; {self.fields.name} has {self.fields.values.shape[1]} variables"
            )

    def batch(self, step: int, count: int) -> tuple[Tensor, Tensor]:
        """Batch number ``step``: values (count, *space.shape), and where they are known (1.0 or 0.0)."""
        pairs = [self._image(np.random.Generator(np.random.Philox(key=_key(self.seed, step, i)))) for i in range(count)]
        values, known = (np.stack(part) for part in zip(*pairs, strict=True))
        return torch.from_numpy(values), torch.from_numpy(known)

    def _image(self, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        plan = self.sampling
        row = int(random.integers(len(self.fields)))
        layers = [self.fields.values[row]]
        layers.append(
            np.ones_like(layers[0]) if self.fields.known is None else self.fields.known[row].astype(np.float32)
        )
        flips = tuple(axis for axis, chance in zip((-2, -1), plan.mirror, strict=True) if random.random() < chance)
        by = random.integers(-plan.shift, plan.shift + 1, size=2)
        gain = np.float32(math.exp(plan.gain * random.standard_normal()))
        values, known = (_moved(np.flip(layer, flips), by) for layer in layers)
        if plan.phase is not None:
            turn = smooth_phase(values.shape[-2:], plan.phase, random)
            values, known = with_phase(values[0], turn), np.repeat(known, 2, axis=0)
        return gain * values, known


def image_space(fields: Fields, complex_image: bool) -> Space:
    """The space of the images made of ``fields``: that of the fields, without the axis of a single variable.

    A complex image has the axis "channel" ("real", "imag") in its place.
    """
    space = fields.space
    grid = {dim: space.coords[dim] for dim in space.dims[1:] if dim in space.coords}
    if complex_image:
        coords = {"channel": ("real", "imag"), **grid}
        return Space(("channel", *space.dims[1:]), (2, *space.shape[1:]), coords, space.unit)
    if space.shape[0] == 1:
        return Space(space.dims[1:], space.shape[1:], grid, space.unit)
    return space


def with_phase(magnitude: np.ndarray, phase: np.ndarray) -> np.ndarray:
    """``(m cos phi, m sin phi)``: (y, x) and (y, x) to (2, y, x), float32."""
    return np.stack([magnitude * np.cos(phase), magnitude * np.sin(phase)]).astype(np.float32)


def smooth_phase(shape: tuple[int, int], spread: float, random: np.random.Generator) -> np.ndarray:
    """A phase (y, x): uniform constant plus a random combination of the cosines of up to one and a half periods.

    The varying part has standard deviation ``spread`` on average, with the longest waves strongest, as field inhomogeneity
    and eddy currents have.
    """
    total = np.full(shape, random.uniform(-math.pi, math.pi))
    waves = [(j, i) for j in range(4) for i in range(4) if 0 < i + j <= 3]
    weight = np.array([1.0 / (i * i + j * j) for j, i in waves])
    weight *= spread / math.sqrt(sum(w * w * _mean_square(wave) for w, wave in zip(weight, waves, strict=True)))
    y, x = ((np.arange(n) + 0.5) / n for n in shape)
    for (j, i), w in zip(waves, weight * random.standard_normal(len(waves)), strict=True):
        total = total + w * np.outer(np.cos(math.pi * j * y), np.cos(math.pi * i * x))
    return total


def _mean_square(wave: tuple[int, int]) -> float:
    return math.prod(0.5 if n else 1.0 for n in wave)


def _moved(layer: np.ndarray, by: np.ndarray) -> np.ndarray:
    """(c, y, x) shifted by whole pixels, continued by its border."""
    ny, nx = layer.shape[-2:]
    rows, columns = np.clip(np.arange(ny) - by[0], 0, ny - 1), np.clip(np.arange(nx) - by[1], 0, nx - 1)
    return np.ascontiguousarray(layer[:, rows[:, None], columns[None, :]])


def _key(seed: int, step: int, index: int) -> np.ndarray:
    return np.array([seed, (step << 20) + index], dtype=np.uint64)
