"""Training images drawn from fields: mirrored, shifted, scaled, cut into windows; magnitudes given a smooth phase.

Image ``i`` of batch ``step`` is a pure function of (seed, step, i): a training run that was stopped and resumed sees the same
images.  Windows and the dropout of conditions have a stream of random numbers of their own, so that asking for them changes
nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from recon.datasets.fields import Fields
from recon.errors import InputError
from recon.priors.conditional import Conditions, LowResolution
from recon.space import Space


class FieldSampling(BaseModel):
    """How training images are made of a data set of fields.

    dataset: name or path of the card.  coarsen: side of the blocks of pixels that are averaged first.  crop: sides (y, x) of
    windows cut at random from the fields; without it an image is a field whole.  mirror: chances of a mirror image along
    (y, x), where the physics has no preferred side.  shift: largest shift of the grid in pixels, filled with the border's
    values.  gain: standard deviation of the logarithm of a factor (arbitrary scanner scales).  phase: make complex images
    (real and imaginary part) of magnitudes, with a constant phase anywhere on the circle and a smooth one of this standard
    deviation in radians; null leaves real fields real.  conditions: what the network is told of each image; block means are
    those of the whole field, after mirror, shift, gain and phase.  fill: the value of unknown cells, which a prior then learns
    like any other; for what is never known, such as land, where it would else believe anything.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    dataset: str
    coarsen: int = Field(default=1, ge=1)
    crop: tuple[int, int] | None = None
    mirror: tuple[float, float] = (0.0, 0.0)
    shift: int = Field(default=0, ge=0)
    gain: float = Field(default=0.0, ge=0)
    phase: float | None = Field(default=None, ge=0)
    conditions: Conditions | None = None
    fill: float | None = None


class Sample(NamedTuple):
    """Images of a batch in physical units.

    values: (n, *space.shape).  known: 1.0 or 0.0 in the same shape; None where all is known.  told: one tensor (n, channel, y,
    x) per condition, block means in physical units.  there: (n,), 0.0 where an image comes without its conditions; None where
    none does.  corner: (n, 2), first pixel of each window in its whole field; None for whole images.
    """

    values: Tensor
    known: Tensor | None
    told: tuple[Tensor, ...] = ()
    there: Tensor | None = None
    corner: Tensor | None = None


@dataclass(frozen=True)
class FieldSampler:
    """Draws batches of images in physical units from ``fields``.

    Raises InputError when a phase is asked for and there is not exactly one variable, a window is larger than the fields,
    blocks do not divide the fields, or a time of year is asked for and the fields have no dates.
    """

    sampling: FieldSampling
    fields: Fields
    seed: int

    def __post_init__(self) -> None:
        plan, fields = self.sampling, self.fields
        if plan.phase is not None and fields.values.shape[1] != 1:
            raise InputError(f"a phase is given to one magnitude; {fields.name} has {fields.values.shape[1]} variables")
        require_window(plan.crop, fields.space.shape[-2:], fields.name)
        for condition in () if plan.conditions is None else plan.conditions.inputs:
            condition.space(image_space(fields, plan.phase is not None))
            undated = fields.days is None or not np.isfinite(fields.days).all()
            if not isinstance(condition, LowResolution) and undated:
                raise InputError(
                    f"the condition {condition.name!r} needs the date of every field; the file of {fields.name} has "
                    f"{'none' if fields.days is None else 'not all of them'} (key 'time' of its card)"
                )

    def batch(self, step: int, count: int) -> tuple[Tensor, Tensor]:
        """Batch number ``step``: values (count, variable, y, x), and where they are known (1.0 or 0.0)."""
        sample = self.sample(step, range(count))
        assert sample.known is not None
        return sample.values, sample.known

    def sample(self, step: int, rows: Iterable[int]) -> Sample:
        """Some images of batch number ``step`` with what is told of them."""
        values, known, told, there, corner = zip(*(self._image(step, row) for row in rows), strict=True)
        conditions = self.sampling.conditions
        return Sample(
            torch.from_numpy(np.stack(values)),
            torch.from_numpy(np.stack(known)),
            tuple(torch.cat(part) for part in zip(*told, strict=True)),
            torch.tensor(there) if conditions is not None and conditions.dropout > 0 else None,
            None if self.sampling.crop is None else torch.tensor(corner, dtype=torch.float32),
        )

    def _image(self, step: int, index: int) -> tuple[np.ndarray, np.ndarray, list[Tensor], float, tuple[int, int]]:
        plan, shape = self.sampling, self.fields.space.shape[-2:]
        random = np.random.Generator(np.random.Philox(key=_key(self.seed, step, index)))
        row = int(random.integers(len(self.fields)))
        layers = [self.fields.values[row]]
        layers.append(
            np.ones_like(layers[0]) if self.fields.known is None else self.fields.known[row].astype(np.float32)
        )
        if plan.fill is not None:
            layers[0] = np.where(layers[1] > 0, layers[0], np.float32(plan.fill))
        flips = tuple(axis for axis, chance in zip((-2, -1), plan.mirror, strict=True) if random.random() < chance)
        by = random.integers(-plan.shift, plan.shift + 1, size=2)
        gain = np.float32(math.exp(plan.gain * random.standard_normal()))
        beside = aside(self.seed, step, index)
        corner = window_corner(beside, plan.crop, shape)
        window = tuple(slice(first, first + side) for first, side in zip(corner, plan.crop or shape, strict=True))
        # Block means look beyond the window, so with conditions the whole field is made.
        seen = window if plan.conditions is None else (slice(None), slice(None))
        values, known = (_moved(np.flip(layer, flips), by, seen) for layer in layers)
        if plan.phase is not None:
            turn = smooth_phase((shape[0], shape[1]), plan.phase, random)[seen]
            values, known = with_phase(values[0], turn), np.repeat(known, 2, axis=0)
        values = gain * values
        if plan.conditions is None:
            return values, known, [], 1.0, corner
        there = float(beside.random() >= plan.conditions.dropout)
        told = self._told(row, torch.from_numpy(values)[None], torch.from_numpy(known)[None], window)
        cut = (slice(None), *window)
        return np.ascontiguousarray(values[cut]), np.ascontiguousarray(known[cut]), told, there, corner

    def _told(self, row: int, values: Tensor, known: Tensor, window: tuple[slice, ...]) -> list[Tensor]:
        assert self.sampling.conditions is not None
        parts = []
        for condition in self.sampling.conditions.inputs:
            if isinstance(condition, LowResolution):
                parts.append(condition.of(values, known)[..., window[0], window[1]])
            else:
                assert self.fields.days is not None
                ny, nx = (part.stop - part.start for part in window)
                parts.append(condition.spread(torch.tensor([self.fields.days[row]]), (ny, nx)))
        return parts


def require_window(crop: tuple[int, int] | None, shape: tuple[int, ...], name: str) -> None:
    """Raise InputError when windows of sides ``crop`` do not fit images of sides ``shape``."""
    if crop is not None and any(not 1 <= side <= whole for side, whole in zip(crop, shape, strict=True)):
        raise InputError(f"windows of {crop[0]} x {crop[1]} pixels do not fit the {shape[0]} x {shape[1]} of {name}")


def aside(seed: int, step: int, index: int) -> np.random.Generator:
    """Random numbers for windows and dropout of image ``index``: a stream apart from that of its augmentation."""
    key = np.array([seed, (1 << 62) + (step << 20) + index], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


def window_corner(random: np.random.Generator, crop: tuple[int, int] | None, shape: tuple[int, ...]) -> tuple[int, int]:
    """The first pixel of a window of sides ``crop``, anywhere it fits; (0, 0) without windows."""
    if crop is None:
        return 0, 0
    row, column = (int(random.integers(whole - side + 1)) for side, whole in zip(crop, shape, strict=True))
    return row, column


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


def _moved(layer: np.ndarray, by: np.ndarray, window: tuple[slice, ...]) -> np.ndarray:
    """A window of (c, y, x) shifted by whole pixels and continued by its border."""
    ny, nx = layer.shape[-2:]
    rows, columns = np.clip(np.arange(ny) - by[0], 0, ny - 1), np.clip(np.arange(nx) - by[1], 0, nx - 1)
    rows, columns = rows[window[0]], columns[window[1]]
    return np.ascontiguousarray(layer[:, rows[:, None], columns[None, :]])


def _key(seed: int, step: int, index: int) -> np.ndarray:
    return np.array([seed, (step << 20) + index], dtype=np.uint64)
