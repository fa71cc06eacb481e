r"""An array cut into overlapping boxes, and what of the data each of them answers for.

Along an axis the box ``b`` between the cuts ``c_b`` and ``c_{b+1}`` has the window ``rise_b - rise_{b+1}``, where ``rise``
goes from 0 to 1 over ``overlap`` values around its cut (a step for no overlap).  The windows ``h_b`` of boxes are products of
those along the axes, and sum to one everywhere.  Of datum j, box b answers for the share

    s_bj = sum_p h_b(p) A_jp^2 / sum_p A_jp^2

of how the operator sees it; the shares of a datum sum to one, and a datum that sees one box alone is that box's own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from recon.draws import Draws
from recon.errors import InputError
from recon.posterior import Posterior

_PROBES = 4


@dataclass(frozen=True)
class Tiles:
    """Boxes of an array: one tensor (boxes along the axis, length of the axis) of windows per axis."""

    windows: tuple[Tensor, ...]

    @classmethod
    def of(cls, shape: Sequence[int], sides: Sequence[int], overlap: int, dtype: torch.dtype) -> Tiles:
        """Boxes of ``sides`` values along the last axes of ``shape`` (other axes stay whole; the last box takes the rest).

        Raises InputError for a side below 1, or an overlap that is negative or wider than a box.
        """
        if not sides or min(sides) < 1 or not 0 <= overlap <= min(sides):
            raise InputError(
                f"tiles need sides >= 1 and 0 <= overlap <= the shortest; got {tuple(sides)} and {overlap}"
            )
        used = list(sides)[-len(shape) :] if shape else []
        whole = [*shape[: len(shape) - len(used)], *used]
        return cls(tuple(_windows(n, min(side, n), overlap, dtype) for n, side in zip(shape, whole, strict=True)))

    def __len__(self) -> int:
        return math.prod(len(axis) for axis in self.windows)

    def __iter__(self) -> Iterator[Tensor]:
        """The window of each box, over the whole array."""
        for picks in itertools.product(*(range(len(axis)) for axis in self.windows)):
            yield self.window(picks)

    def window(self, picks: Sequence[int]) -> Tensor:
        """The window of the box with these numbers along the axes: (*shape,)."""
        out = self.windows[0][picks[0]]
        for axis, pick in zip(self.windows[1:], picks[1:], strict=True):
            out = out[..., None] * axis[pick]
        return out

    def distances(self) -> Tensor:
        """Between the middles of boxes, in values of the array: (boxes, boxes) float64."""
        centres = []
        for axis in self.windows:
            at = torch.arange(axis.shape[1], dtype=torch.float64)
            centres.append((axis.double() @ at) / axis.double().sum(1))
        middles = torch.cartesian_prod(*centres).reshape(len(self), -1)
        return (middles[:, None] - middles).square().sum(-1).sqrt()

    def sums(self, values: Tensor) -> Tensor:
        """``sum_p h_b(p) values(p)`` in float64: (n, *shape) -> (n, boxes)."""
        out = values.double()
        for axis in reversed(self.windows):
            # The last axis of the array goes, that of its boxes comes second: in the end boxes stand in their own order.
            out = torch.movedim(out @ axis.double().to(out.device).T, -1, 1)
        return out.reshape(len(values), -1)


def _windows(n: int, side: int, overlap: int, dtype: torch.dtype) -> Tensor:
    cuts = side * torch.arange(1, max(1, n // side), dtype=torch.float64)[:, None]
    middles = torch.arange(n, dtype=torch.float64) + 0.5
    step = (middles > cuts).double()
    rise = step if overlap == 0 else (0.5 + (middles - cuts) / overlap).clamp(0, 1)
    edges = torch.cat([torch.ones(1, n).double(), rise, torch.zeros(1, n).double()])
    return (edges[:-1] - edges[1:]).to(dtype)


_SHARES: WeakKeyDictionary[Posterior, dict[tuple[tuple[int, ...], ...], Tensor]] = WeakKeyDictionary()


def shares(posterior: Posterior, tiles: Tiles, key: tuple[tuple[int, ...], ...]) -> Tensor:
    """``s_bj``: (boxes, data) float64, worked out once for a posterior and ``key``.

    The sums over places by ``_PROBES`` arrays of random signs: exact where a datum sees one place, to some 50 % of each
    number where it sees many; zero is zero.
    """
    known = _SHARES.setdefault(posterior, {})
    if key not in known:
        prior, operator = posterior.prior, posterior.likelihood.gaussian().linear("LocalisedSMC")
        coin = Draws(0, range(_PROBES)).uniform(2, prior.latent.shape, "probe")
        signs = torch.where(coin < 0.5, -1.0, 1.0).to(prior.dtype).to(prior.device)
        with torch.no_grad():
            parts = [operator.A(prior.decode_linear(h.to(signs).sqrt() * signs)) for h in tiles]
        squares = torch.stack([part.abs().square().double().mean(0).flatten() for part in parts])
        total = squares.sum(0)
        even = torch.full_like(squares, 1 / len(squares))
        known[key] = torch.where(total > 0, squares / total.clamp(min=torch.finfo(torch.float64).tiny), even).cpu()
    return known[key]
