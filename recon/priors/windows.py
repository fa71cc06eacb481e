r"""A prior over a field larger than the grid it was trained on: overlapping windows, blended by smooth weights.

.. math::
    D(z, \sigma) = \sum_k w_k \odot R_k^T\, D_{win}(R_k z, \sigma), \qquad \sum_k R_k^T w_k = 1,

with ``R_k`` cutting window ``k`` out of the field.  Along each axis a weight is 0 within ``margin`` of an edge of its window
that lies inside the field, rises as the square of a sine over the rest of the overlap and is 1 between; products over axes
are divided by their sum.

Where it is exact: if no value of ``D_win`` depends on values further away than ``margin``, and the windows stand at multiples of
the network's stride (``align``), the blend is the denoiser of the whole field.  Elsewhere it is an approximation: a value knows
nothing of the field outside its window, so structures longer than a window come out right only as far as neighbours agree,
the more so at high noise levels, where the true denoiser looks furthest; the scores are those of no distribution.  Networks
with global norms or a sense of position see a window as a whole image.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from recon.errors import InputError
from recon.priors.base import Card, Prior
from recon.priors.compute import in_chunks, require_chunk
from recon.schedules import Schedule as Schedule
from recon.space import Space


@dataclass(frozen=True)
class Tiling:
    """How windows are laid.

    overlap: values that neighbours share at least, along every axis that is cut.  margin: values at an inner edge that
    count for nothing (a quarter of the overlap when left out).  align: windows stand at multiples of it.  periodic: dims
    whose end meets their beginning (a whole circle of longitude).  shifted: another place for the windows at each noise level,
    a pure function of the level, so that what seams there are do not add up over a sampler's steps; costs one more window
    along each cut axis that is not periodic.

    Raises InputError for an overlap below 1, a margin that leaves nothing of it to blend, or an align below 1.
    """

    overlap: int
    margin: int | None = None
    align: int = 1
    periodic: tuple[str, ...] = ()
    shifted: bool = False

    def __post_init__(self) -> None:
        if self.overlap < 1 or self.align < 1:
            raise InputError(f"overlap and align are at least 1; got {self.overlap} and {self.align}")
        if self.margin is not None and not 0 <= 2 * self.margin <= self.overlap:
            raise InputError(f"a margin on both sides of an overlap of {self.overlap} is at most half of it; got {self.margin}")

    @property
    def edge(self) -> int:
        """The margin in values."""
        return self.overlap // 4 if self.margin is None else self.margin


@dataclass(frozen=True)
class Cut:
    """The windows along one axis: counted from the end of the shape (-1), ``n`` values cut into windows of ``width``."""

    axis: int
    n: int
    width: int
    starts: tuple[int, ...]
    periodic: bool

    def split(self, z: Tensor) -> Tensor:
        """(n, ...) to (n, windows, ...)."""
        beyond = max(self.starts) + self.width - self.n
        if beyond > 0:
            z = torch.cat([z, z.narrow(self.axis, 0, beyond)], self.axis)
        return torch.stack([z.narrow(self.axis, start, self.width) for start in self.starts], 1)

    def join(self, windows: Tensor, weights: Tensor) -> Tensor:
        """The transpose of ``split`` after weighting: windows (n, windows, ...) and weights (windows, width) to (n, ...)."""
        shape = list(windows.shape)
        del shape[1]
        beyond = max(0, max(self.starts) + self.width - self.n)
        shape[self.axis] = self.n + beyond
        total = windows.new_zeros(shape)
        along = [self.width] + [1] * (-1 - self.axis)
        # One after the other, in place: the order of the sums, and so their bits, are the same on every device.
        for i, start in enumerate(self.starts):
            total.narrow(self.axis, start, self.width).add_(windows[:, i] * weights[i].reshape(along))
        if beyond == 0:
            return total
        kept = total.narrow(self.axis, 0, self.n).clone()
        kept.narrow(self.axis, 0, beyond).add_(total.narrow(self.axis, self.n, beyond))
        return kept

    def weights(self, tiling: Tiling) -> np.ndarray:
        """The partition of unity, float64 (windows, width)."""
        ramp = tiling.overlap - 2 * tiling.edge
        place = (np.arange(self.width) - tiling.edge + 0.5) / max(ramp, 1)
        rise = np.sin(0.5 * math.pi * np.clip(place, 0, 1)) ** 2
        rise = np.where(np.arange(self.width) < tiling.edge, 0.0, rise)
        raw = np.empty((len(self.starts), self.width))
        for row, start in zip(raw, self.starts, strict=True):
            left = self.periodic or start > 0
            right = self.periodic or start + self.width < self.n
            row[:] = (rise if left else 1.0) * (rise[::-1] if right else 1.0)
        total = np.zeros(self.n)
        where = (np.array(self.starts)[:, None] + np.arange(self.width)) % self.n
        np.add.at(total, where, raw)
        return raw / total[where]


class Windowed(Prior):
    """``prior`` over ``space``, larger than its own along the last axes, in overlapping windows.

    space: as the prior's but for the lengths (and coordinates) of its axes.  chunk: windows that are given to the prior at once;
    recompute: keep nothing of a chunk for the vjp but its input (``in_chunks``).  The vjp is that of the blended denoiser.

    Raises InputError when the spaces do not fit, nothing is larger, an overlap is more than half a window, or lengths, windows
    and ``align`` do not fit each other.
    """

    def __init__(
        self, prior: Prior, space: Space, tiling: Tiling, *, chunk: int | None = None, recompute: bool = False
    ) -> None:
        require_chunk(chunk)
        larger = _larger(prior, space, tiling.periodic)
        for dim in larger:
            _require_fit(dim, prior.space, space, tiling)
        facts = {**prior.card.facts, "windows": {**vars(tiling), "of": prior.space.shape}}
        facts["claim"] = "approximate: exact only where the denoiser sees no further than the margin of a window"
        card = Card(f"{prior.card.name} in windows", prior.card.summary, facts)
        super().__init__(space, prior.schedule, card)
        self.latent = Space(space.dims, space.shape, space.coords, prior.latent.unit)
        self.shift, self.scale = prior.shift, prior.scale
        self.prior, self.tiling, self.chunk, self.recompute = prior, tiling, chunk, recompute
        self.larger = larger

    @property
    def dtype(self) -> torch.dtype:
        return self.prior.dtype

    def cuts(self, sigma: float) -> list[Cut]:
        """The windows along each cut axis at level ``sigma``: the same at all levels unless the tiling is shifted."""
        return [self._cut(order, dim, sigma) for order, dim in enumerate(self.larger)]

    def predict(self, z: Tensor, sigma: Tensor) -> Tensor:
        if not self.tiling.shifted:
            return self._blend(z, sigma, self.cuts(1.0))
        out = torch.empty_like(z)
        for level in sigma.unique().tolist():
            rows = (sigma == level).nonzero()[:, 0]
            out = out.index_copy(0, rows, self._blend(z[rows], sigma[rows], self.cuts(level)))
        return out

    def _blend(self, z: Tensor, sigma: Tensor, cuts: list[Cut]) -> Tensor:
        windows = z
        for cut in cuts:
            windows = cut.split(windows)
        many = math.prod(len(cut.starts) for cut in cuts)
        batch = windows.reshape(len(z) * many, *self.prior.latent.shape)
        answer = in_chunks(self.prior.predict, batch, sigma.repeat_interleave(many), self.chunk, self.recompute)
        joined = answer.reshape(windows.shape)
        for cut in reversed(cuts):
            joined = cut.join(joined, torch.from_numpy(cut.weights(self.tiling)).to(z))
        return joined

    def _cut(self, order: int, dim: str, sigma: float) -> Cut:
        axis = self.space.dims.index(dim)
        n, width, plan = self.space.shape[axis], self.prior.space.shape[axis], self.tiling
        step = (width - plan.overlap) // plan.align * plan.align
        periodic = dim in plan.periodic
        moved = 0
        if plan.shifted:
            # A sequence of low discrepancy over steps of 1/16 octave, another one for each axis.
            octave = round(16 * math.log2(sigma))
            moved = int(math.modf(octave * (0.6180339887, 0.7548776662, 0.8191725134)[order % 3])[0] % 1 * step)
            moved = moved // plan.align * plan.align
        if periodic:
            count = math.ceil(n / step)
            starts = {(moved + _aligned(i * n / count, plan.align)) % n for i in range(count)}
        elif plan.shifted:
            count = math.ceil((n - width) / step) + 2
            starts = {min(max(i * step - moved, 0), n - width) for i in range(count)}
        else:
            count = math.ceil((n - width) / step) + 1
            starts = {_aligned(i * (n - width) / (count - 1), plan.align) for i in range(count)}
        return Cut(axis - len(self.space.shape), n, width, tuple(sorted(starts)), periodic)


def _aligned(place: float, align: int) -> int:
    return math.floor(place / align) * align


def _larger(prior: Prior, space: Space, periodic: Collection[str]) -> tuple[str, ...]:
    """The dims along which ``space`` is larger than the prior's, checked."""
    own = prior.space
    if not prior.affine:
        raise InputError(f"{prior.card.name!r} has a latent of its own; windows are cut out of physical grids")
    if (space.dims, space.unit, space.complex) != (own.dims, own.unit, own.complex):
        raise InputError(f"windows of {own.describe()} cannot cover {space.describe()}: dims or unit differ")
    if any(n < w for n, w in zip(space.shape, own.shape, strict=True)):
        raise InputError(f"{space.describe()} is smaller than a window, {own.describe()}")
    larger = tuple(d for d, n, w in zip(own.dims, space.shape, own.shape, strict=True) if n > w)
    if not larger:
        raise InputError(f"{space.describe()} is no larger than a window; use the prior {prior.card.name!r} itself")
    stray = sorted(set(periodic) - set(larger))
    if stray:
        raise InputError(f"periodic names {', '.join(stray)}, along which there are no windows; they lie along {larger}")
    names = [d for d in larger if isinstance(own.coords.get(d), tuple)]
    if names:
        raise InputError(f"no windows can be laid along {names[0]!r}, whose values have names")
    return larger


def _require_fit(dim: str, own: Space, space: Space, tiling: Tiling) -> None:
    """Windows fit along ``dim``: overlap, alignment and, where both have coordinates, the distance of grid points."""
    width, n = own.shape[own.dims.index(dim)], space.shape[space.dims.index(dim)]
    if 2 * tiling.overlap > width:
        raise InputError(f"an overlap of {tiling.overlap} is more than half a window of {width} along {dim!r}")
    if width - tiling.overlap < tiling.align:
        raise InputError(f"windows of {width} with an overlap of {tiling.overlap} cannot move by align = {tiling.align}")
    ends = (n,) if dim in tiling.periodic else (n - width,)
    if any(end % tiling.align for end in ends):
        raise InputError(f"align = {tiling.align} must divide {ends[0]}, the way that windows of {width} go along {dim!r} = {n}")
    ours, theirs = own.spacing(dim), space.spacing(dim)
    if ours and theirs and not math.isclose(ours, theirs, rel_tol=1e-3):
        raise InputError(f"the prior has a grid step of {ours:g} along {dim!r}, the field one of {theirs:g}; resample one")
