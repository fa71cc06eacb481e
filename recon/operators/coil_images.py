r"""An image as every receive coil sees it, ``z_c = S_c x``, and back, ``x = sum_c conj(S_c) z_c``.

Complex products of a library round differently in the vectorised middle and at the scalar ends of a row, and threads move
those ends.  So the products are written with real numbers, side by side as complex arrays hold them:

    S x = (Re S, Re S) * (Re x, Im x) + (-Im S, Im S) * (Im x, Re x)

two passes over memory in either direction and the same bits in any batch on any number of threads.  Coils are summed in order.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from recon.errors import InputError

# Bytes of one working array per thread: small enough to stay in the last-level cache from one pass to the next.
_PIECE = 8 * 2**20
_PIECE_GPU = 2**30


class CoilImages(nn.Module):
    """``S`` of an operator.  channels: whether images are complex (two channels) or real.

    weights: complex (coil, *grid), all that multiplies the image: maps, known phase, signs.  roll: whether images and
    ``weights`` are held with index N // 2 first, as an uncentred transform wants them.
    """

    plain: Tensor
    crossed: Tensor | None

    def __init__(self, weights: np.ndarray, channels: bool, roll: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.grid, self.coils, self.channels = weights.shape[1:], len(weights), channels
        self.shifts = tuple(-(n // 2) for n in self.grid) if roll else (0,) * len(self.grid)
        self.axes = tuple(range(-len(self.grid), 0))
        w = np.roll(weights, self.shifts, self.axes)
        plain = np.stack([w.real, w.real if channels else w.imag], axis=-1)
        needed = channels and bool(w.imag.any())
        crossed = torch.from_numpy(np.stack([-w.imag, w.imag], axis=-1)).to(dtype) if needed else None
        self.register_buffer("plain", torch.from_numpy(plain).to(dtype), persistent=False)
        self.register_buffer("crossed", crossed, persistent=False)

    @property
    def power(self) -> Tensor:
        """``sum_c |S_c|^2``: (*grid)."""
        total = torch.zeros_like(self.plain[0, ..., 0])
        for coil, pair in enumerate(self.plain):
            total = total + pair[..., 0].square()
            if not self.channels:
                total = total + pair[..., 1].square()
            elif self.crossed is not None:
                total = total + self.crossed[coil, ..., 1].square()
        return self._centred(total)

    def weights(self) -> np.ndarray:
        """The complex (coil, *grid) this was made of, in double precision."""
        parts = self.plain.detach().cpu().double().numpy()
        imaginary = parts[..., 1]
        if self.channels:
            imaginary = np.zeros(()) if self.crossed is None else self.crossed.detach().cpu().double().numpy()[..., 1]
        return np.roll(parts[..., 0] + 1j * imaginary, [-s for s in self.shifts], self.axes)

    def pieces(self, draws: int, grid: tuple[int, ...] | None = None) -> Iterator[tuple[slice, slice]]:
        """Draws and coils to take at a time: all coils of some draws, or some coils of one; none above the working size.

        grid: of the arrays that the pieces are made for, this one's where left out.
        """
        limit = _PIECE * torch.get_num_threads() if self.plain.device.type == "cpu" else _PIECE_GPU
        size = 2 * self.plain.element_size() * int(np.prod(grid or self.grid))
        fits = max(1, limit // size)
        together, coils = max(1, fits // self.coils), min(fits, self.coils)
        for first in range(0, draws, together):
            for coil in range(0, self.coils, coils):
                yield slice(first, min(first + together, draws)), slice(coil, min(coil + coils, self.coils))

    def forms(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images (n, *domain.shape) as pairs (n, 1, *grid, 2): the numbers and, crosswise, the same."""
        x = x.roll(self.shifts, self.axes) if any(self.shifts) else x
        one, other = (x[:, 0], x[:, 1]) if self.channels else (x, x)
        one, other = one.contiguous(), other.contiguous()
        straight = torch.view_as_real(torch.complex(one, other))[:, None]
        return straight, None if self.crossed is None else torch.view_as_real(torch.complex(other, one))[:, None]

    def spread(self, forms: tuple[Tensor, Tensor | None], coils: slice, out: Tensor) -> Tensor:
        """``S x`` of some coils into ``out`` (n, coils, *grid, 2), which is returned."""
        straight, crosswise = forms
        torch.mul(straight, self.plain[coils], out=out)
        if crosswise is not None and self.crossed is not None:
            out.addcmul_(crosswise, self.crossed[coils])
        return out

    def sums(self, x: Tensor, draws: int) -> tuple[Tensor, Tensor | None]:
        """Empty sums for ``gather``, of the kind of ``x``."""
        straight = x.new_zeros(draws, *self.grid, 2)
        return straight, None if self.crossed is None else torch.zeros_like(straight)

    def gather(self, sums: tuple[Tensor, Tensor | None], z: Tensor, coils: slice) -> None:
        """Add ``conj(S) z`` of some coils to ``sums``; z: (n, coils, *grid, 2)."""
        straight, crosswise = sums
        for place, coil in enumerate(range(coils.start, coils.stop)):
            straight.addcmul_(z[:, place], self.plain[coil])
            if crosswise is not None and self.crossed is not None:
                crosswise.addcmul_(z[:, place], self.crossed[coil])

    def image(self, sums: tuple[Tensor, Tensor | None]) -> Tensor:
        """The finished sums as images (n, *domain.shape)."""
        straight, crosswise = sums
        if not self.channels:
            return self._centred(straight[..., 0] + straight[..., 1])
        real, imaginary = straight[..., 0], straight[..., 1]
        if crosswise is not None:
            real, imaginary = real + crosswise[..., 1], imaginary + crosswise[..., 0]
        return self._centred(torch.stack([real, imaginary], dim=1))

    def _centred(self, x: Tensor) -> Tensor:
        return x.roll(tuple(-s for s in self.shifts), self.axes) if any(self.shifts) else x


def coil_weights(
    grid: tuple[int, ...],
    channels: bool,
    maps: Tensor | np.ndarray | None,
    phase: Tensor | np.ndarray | None,
) -> tuple[np.ndarray, torch.dtype]:
    """``S_c`` times the known phase, complex128 (coil, *grid), and the real floating type of the maps (of the phase without).

    maps: complex (coil, *grid); None for one coil of ones.  phase: unit-modulus (*grid), for real images only.
    Raises InputError for other shapes, values that are not finite, a coil or all coils without any sensitivity, or a phase
    whose modulus is not one.
    """
    given = np.ones((1, *grid), dtype=np.complex64) if maps is None else _array(maps)
    if given.shape[1:] != grid or given.ndim != len(grid) + 1 or len(given) == 0:
        raise InputError(f"coil maps must be (coil, {', '.join(map(str, grid))}) like the image; got {given.shape}")
    if not np.isfinite(given).all():
        raise InputError(f"coil maps hold {int((~np.isfinite(given)).sum())} values that are NaN or infinite")
    if not given.any():
        raise InputError("coil maps are zero everywhere: nothing would be measured")
    decides = given if maps is not None or phase is None else _array(phase)
    dtype = torch.float64 if decides.dtype in (np.complex128, np.float64) else torch.float32
    weights = given.astype(np.complex128)
    if phase is None:
        return weights, dtype
    factor = _array(phase)
    if channels:
        raise InputError("phase= turns real images into complex ones; this domain holds complex images already")
    if factor.shape != grid:
        raise InputError(f"the phase must have the shape of the image {grid}; got {factor.shape}")
    if not np.allclose(np.abs(factor), 1.0, rtol=0, atol=1e-3):
        raise InputError(
            "the phase must be complex numbers of modulus 1; of a reference image r take r / abs(r), and 1 where r is 0"
        )
    return weights * (factor / np.abs(factor)), dtype


def _array(values: Tensor | np.ndarray) -> np.ndarray:
    array = values.detach().cpu().resolve_conj().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if array.dtype.kind not in "fciu":
        raise InputError(f"coil maps and phases are arrays of numbers; got {array.dtype}")
    return array
