r"""A prior over a field larger than the grid it was trained on: overlapping windows, blended by smooth weights.

.. math::
    D(z, \sigma) = \sum_k w_k \odot R_k^T\, D_{win}(R_k z, \sigma), \qquad \sum_k R_k^T w_k = 1,

with ``R_k`` cutting window ``k`` out of the field and weights ``w_k`` that are products over its axes
(``recon.priors.tiling``).

Where it is exact: if no value of ``D_win`` depends on values further away than ``margin``, and the windows stand at multiples
of the network's stride (``align``), the blend is the denoiser of the whole field.  Elsewhere it is an approximation: a value
knows nothing of the field outside its window, so structures longer than a window come out right only as far as neighbours
agree, the less so at high noise levels, where the true denoiser looks furthest; the scores are those of no distribution.
Networks with global norms see each window as a whole image; so do those with a sense of position, unless they were trained on
windows of this very field and are told the place of each (``NetworkPrior.at``).
"""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor

from recon.errors import InputError
from recon.priors.base import Card, Prior
from recon.priors.compute import in_chunks, require_chunk
from recon.priors.tiling import Cut, Tiling
from recon.priors.wrapped import sigma_data_of
from recon.space import Space


class Windowed(Prior):
    """``prior`` over ``space``, larger than its own, in overlapping windows.

    space: as the prior's but for the lengths (and coordinates) of its axes.  chunk: windows that are given to the prior at
    once; recompute: keep nothing of a chunk for the vjp but its input (``in_chunks``).  The vjp is that of the blended
    denoiser.  A prior of windows that have a place is told the place of each, window after window; give it to ``accelerate``
    once it is in windows, not before.

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
        self.sigma_data = sigma_data_of(prior)
        self.prior, self.tiling, self.chunk, self.recompute = prior, tiling, chunk, recompute
        self.larger, self.placed = larger, _placed(prior, space, tiling.periodic)

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
        one = self.prior.latent.shape
        many = math.prod(len(cut.starts) for cut in cuts)
        if self.placed:
            each = windows.reshape(len(z), many, *one).unbind(1)
            priors = [self.prior.at(*place) for place in _places(cuts)]  # type: ignore[operator]
            told = zip(priors, each, strict=True)
            parts = [in_chunks(p.predict, w, sigma, self.chunk, self.recompute) for p, w in told]
            joined = torch.stack(parts, 1).reshape(windows.shape)
        else:
            batch, levels = windows.reshape(len(z) * many, *one), sigma.repeat_interleave(many)
            joined = in_chunks(self.prior.predict, batch, levels, self.chunk, self.recompute).reshape(windows.shape)
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
            share = octave * (0.6180339887, 0.7548776662, 0.8191725134)[order % 3] % 1
            moved = int(share * step) // plan.align * plan.align
        if periodic:
            count = math.ceil(n / step)
            starts = {(moved + i * n // (count * plan.align) * plan.align) % n for i in range(count)}
        elif plan.shifted:
            count = math.ceil((n - width) / step) + 2
            starts = {min(max(i * step - moved, 0), n - width) for i in range(count)}
        else:
            count = math.ceil((n - width) / step) + 1
            starts = {i * (n - width) // ((count - 1) * plan.align) * plan.align for i in range(count)}
        return Cut(axis - len(self.space.shape), n, width, tuple(sorted(starts)), periodic)


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
        raise InputError(
            f"periodic names {', '.join(stray)}, along which there are no windows; they lie along {larger}"
        )
    fixed = [d for d in own.dims if d not in larger]
    difference = _along(own, fixed).mismatch(_along(space, fixed))
    if difference:
        raise InputError(f"windows of {own.describe()} cannot cover {space.describe()}: {difference}")
    names = [d for d in larger if isinstance(own.coords.get(d), tuple)]
    if names:
        raise InputError(f"no windows can be laid along {names[0]!r}, whose values have names")
    return larger


def _placed(prior: Prior, space: Space, periodic: Collection[str]) -> bool:
    """Whether windows must be told their place, which then has to be one of this field."""
    whole = getattr(prior, "whole", None)
    if whole is None:
        return False
    if tuple(whole) != space.shape[-2:]:
        raise InputError(f"{prior.card.name!r} knows windows of a field of {tuple(whole)}; got {space.describe()}")
    if periodic:
        raise InputError(
            f"{prior.card.name!r} knows its windows by their place; none of them goes across the end of an axis"
        )
    return True


def _places(cuts: list[Cut]) -> list[tuple[int, int]]:
    """Row and column of every window, in the order in which ``split`` after ``split`` lays them."""
    places = [dict.fromkeys((-2, -1), 0)]
    for cut in reversed(cuts):
        places = [{**place, cut.axis: start} for place in places for start in cut.starts]
    return [(place[-2], place[-1]) for place in places]


def _along(space: Space, dims: list[str]) -> Space:
    """The part of ``space`` along ``dims``."""
    coords = {d: values for d, values in space.coords.items() if d in dims}
    return Space(tuple(dims), tuple(space.shape[space.dims.index(d)] for d in dims), coords, space.unit)


def _require_fit(dim: str, own: Space, space: Space, tiling: Tiling) -> None:
    """Windows fit along ``dim``: overlap, alignment and, where there are coordinates, grid step and the whole circle."""
    width, n = own.shape[own.dims.index(dim)], space.shape[space.dims.index(dim)]
    if 2 * tiling.overlap > width:
        raise InputError(f"an overlap of {tiling.overlap} is more than half a window of {width} along {dim!r}")
    if width - tiling.overlap < tiling.align:
        raise InputError(
            f"windows of {width} with an overlap of {tiling.overlap} cannot move by align = {tiling.align}"
        )
    ends = (n,) if dim in tiling.periodic else (n - width,)
    if any(end % tiling.align for end in ends):
        raise InputError(
            f"align = {tiling.align} must divide {ends[0]}, the way that windows of {width} go along {dim!r} = {n}"
        )
    ours, theirs = own.spacing(dim), space.spacing(dim)
    if ours and theirs and not math.isclose(ours, theirs, rel_tol=1e-3):
        raise InputError(
            f"the prior has a grid step of {ours:g} along {dim!r}, the field one of {theirs:g}; resample one"
        )
    if dim in tiling.periodic and dim in ("lon", "longitude") and theirs and abs(n * theirs - 360) > theirs / 2:
        raise InputError(f"{dim!r} goes {n * theirs:g} degrees, not once around; leave it out of periodic")
