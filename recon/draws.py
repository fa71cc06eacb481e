"""Random numbers as a pure function of (seed, case, draw, step, stream, position).

The generator is Philox4x64-10 (Salmon et al. 2011): key = (seed, case * 2^32 + draw), counter = (block, 0, step, stream).
Each 64-bit word gives two 32-bit uniforms, each pair of uniforms two normals (Box-Muller), so normal number ``p`` of a draw
depends on ``p`` alone: any split of an array over ranks, tiles or slabs sees the same values, and nothing has to be saved to
resume.  Normals are cut off at sqrt(64 ln 2) = 6.66 standard deviations (probability 3e-11).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from recon import philox
from recon.errors import InputError

Stream = Literal["init", "step", "resample", "data", "probe", "user"]
_STREAMS = {name: np.uint64(i + 1) for i, name in enumerate(("init", "step", "resample", "data", "probe", "user"))}
_LIMIT = 2**32
_WORDS_PER_BLOCK = 4  # 64-bit words that one Philox counter value gives
_MANY_BLOCKS = 64  # from here on numpy's own generator is faster than setting up all draws at once


@dataclass(frozen=True)
class Draws:
    """The random numbers of some draws of one case.

    seed: of the run.  members: the global indices of the draws.  case: which problem of a batch.  antithetic: the normal
    numbers of draw ``2 k + 1`` are those of draw ``2 k`` with the other sign (Hammersley & Morton 1956), so each draw by itself
    has the same law, and what is odd in the noise cancels in the mean of a pair.  Uniform numbers stay every draw's own.

    Raises InputError for numbers outside [0, 2^32) (seed: [0, 2^64)).
    """

    seed: int
    members: Sequence[int]
    case: int = 0
    antithetic: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "members", tuple(int(m) for m in self.members))
        if not 0 <= self.seed < 2**64:
            raise InputError(f"seed must lie in [0, 2^64); got {self.seed}")
        if not all(0 <= m < _LIMIT for m in (*self.members, self.case)):
            raise InputError(f"draw and case numbers must lie in [0, 2^32); got {self.members} of case {self.case}")

    def __len__(self) -> int:
        return len(self.members)

    def of_case(self, case: int) -> Draws:
        """The same draws of another case; of a slab or stream too."""
        other = copy.copy(self)
        object.__setattr__(other, "case", case)
        other.__post_init__()
        return other

    def _uniform32(self, step: int, stream: Stream, first: int, count: int) -> np.ndarray:
        """Uniform numbers ``first .. first + count`` of each draw, in (0, 1): (n, count), odd multiples of 2^-33."""
        start, skip = divmod(first, 2 * _WORDS_PER_BLOCK)
        need = math.ceil((skip + count) / (2 * _WORDS_PER_BLOCK))
        if need > _MANY_BLOCKS and self.members:
            words = np.stack([self._stream(m, start, step, stream, need) for m in self.members])
        else:
            # Thousands of short streams: all keys at once.
            members = np.array(self.members, dtype=np.uint64)[:, None] + np.uint64(self.case * _LIMIT)
            places = np.arange(start, start + need, dtype=np.uint64)[None, :] + np.zeros_like(members)
            same = np.zeros_like(places)
            keys = (same + np.uint64(self.seed), same + members)
            words = philox.words(keys, (places + np.uint64(1), same, same + np.uint64(step), same + _STREAMS[stream]))
        return (words.reshape(len(self), need * _WORDS_PER_BLOCK).view("<u4")[:, skip : skip + count] + 0.5) * 2.0**-32

    def _stream(self, member: int, start: int, step: int, stream: Stream, need: int) -> np.ndarray:
        """``need`` blocks of words of one draw, from numpy's generator (which steps its counter before it is used)."""
        bits = np.random.Philox(
            key=np.array([self.seed, self.case * _LIMIT + member], dtype=np.uint64),
            counter=np.array([start, 0, step, _STREAMS[stream]], dtype=np.uint64),
        )
        return bits.random_raw(need * _WORDS_PER_BLOCK).astype("<u8", copy=False)

    def uniform(self, step: int, shape: Sequence[int], stream: Stream = "step") -> Tensor:
        """Uniform numbers in (0, 1): float64 (len(members), *shape)."""
        numbers = self._uniform32(step, stream, 0, math.prod(shape))
        return torch.from_numpy(numbers).reshape(len(self), *shape)

    def normal(
        self,
        step: int,
        shape: Sequence[int],
        stream: Stream = "step",
        *,
        dtype: torch.dtype = torch.float32,
        first: int = 0,
    ) -> Tensor:
        """Standard normal numbers (len(members), *shape), the ones at flat positions ``first, first + 1, ...`` of a draw.

        ``first`` lets the owner of a slab or tile generate only its part.  A complex ``dtype`` gives numbers whose real and
        imaginary parts are standard normal each: complex number ``p`` is made of the real numbers ``2 p`` and ``2 p + 1``.
        """
        if dtype.is_complex:
            parts = self.normal(step, (*shape, 2), stream, dtype=dtype.to_real(), first=2 * first)
            return torch.view_as_complex(parts)
        if self.antithetic:
            halves = sorted({m // 2 for m in self.members})
            numbers = Draws(self.seed, [2 * half for half in halves], self.case)
            each = numbers.normal(step, shape, stream, dtype=dtype, first=first)[[halves.index(m // 2) for m in self.members]]
            sign = torch.tensor([1 - 2 * (m % 2) for m in self.members], dtype=dtype)
            return each * sign.reshape(-1, *([1] * len(shape)))
        count = math.prod(shape)
        start = first - first % 2
        pairs = math.ceil((first + count - start) / 2)
        u = self._uniform32(step, stream, start, 2 * pairs)
        radius, angle = np.sqrt(-2.0 * np.log(u[:, 0::2])), 2.0 * np.pi * u[:, 1::2]
        both = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=2).reshape(len(self), 2 * pairs)
        wanted = both[:, first - start : first - start + count]
        return torch.from_numpy(wanted).to(dtype).reshape(len(self), *shape)


@dataclass(frozen=True)
class Pairs:
    """So many pairs of draws with opposite noise, where a number of independent draws could stand; see ``Draws.antithetic``.

    Raises InputError for fewer than one.
    """

    count: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise InputError(f"at least 1 pair of draws; got {self.count}")


def blocks(draws: int, block: int) -> list[range]:
    """Cut ``draws`` draws into blocks of fixed composition: block ``b`` holds draws ``b * block ...``, whoever computes it."""
    if draws < 1 or block < 1:
        raise InputError(f"draws and block must be at least 1; got {draws} and {block}")
    return [range(first, min(first + block, draws)) for first in range(0, draws, block)]
