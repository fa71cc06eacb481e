r"""How a field is cut into overlapping windows, and the weights that join them again.

Along each axis the weight of a window is 0 within ``margin`` of an edge that lies inside the field, rises as the square of a
sine over the rest of the overlap and is 1 between; weights are divided by their sum over windows, so that they add to one
everywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from recon.errors import InputError


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
            raise InputError(
                f"a margin on both sides of an overlap of {self.overlap} is at most half of it; got {self.margin}"
            )

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
        raw = np.empty((len(self.starts), self.width))
        for row, start in zip(raw, self.starts, strict=True):
            left = self.periodic or start > 0
            right = self.periodic or start + self.width < self.n
            row[:] = (rise if left else 1.0) * (rise[::-1] if right else 1.0)
        total = np.zeros(self.n)
        where = (np.array(self.starts)[:, None] + np.arange(self.width)) % self.n
        np.add.at(total, where, raw)
        return raw / total[where]
