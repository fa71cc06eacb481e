r"""``A^H W A`` of a non-uniform Fourier sum, without the sum: a convolution with its point spread function.

    (A^H W A x)[r] = sum_r' T[r - r'] x[r'],      T[d] = sum_j w_j exp(+i d . x_j),   |d_a| < N_a

done exactly by transforms of twice the length (Fessler et al. 2005, IEEE Transactions on Signal Processing 53, 3393).  The
weights are real, so the transfer function is real: one multiplication in between.
"""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recon.operators.coil_images import CoilImages
from recon.operators.fourier import transform
from recon.operators.nufft import Nufft


class Toeplitz:
    """The transfer function for one set of weights, made when first used and kept per precision and device.

    sums: whose points.  weights: float64 (m,).  Copies and pickles hold these alone.
    """

    def __init__(self, sums: Nufft, weights: np.ndarray) -> None:
        self.sums, self.weights, self.grid = sums, weights, sums.grid
        self.padded = tuple(_length(n) for n in self.grid)
        self._lock = threading.Lock()
        self._kept: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"sums": self.sums, "weights": self.weights}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["sums"], state["weights"])  # type: ignore[misc]

    @property
    def bytes(self) -> int:
        """Memory that making the transfer function takes at its peak: the library's fine grid, the sums, the transform."""
        return 16 * (2 ** len(self.grid) + 4) * math.prod(self.padded)

    def response(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The transfer function as pairs of equal numbers: (*padded, 2) of the real type ``dtype``."""
        with self._lock:
            key = (dtype, device)
            if key not in self._kept:
                self._kept[key] = self._made(dtype, device).to(device)
            return self._kept[key]

    def _made(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        spread = tuple(2 * n - 1 for n in self.grid)
        weights = torch.view_as_real(torch.from_numpy(self.weights.astype(np.complex128)))[None]
        function = torch.view_as_complex(Nufft(spread, self.sums.seen(dtype, device)).adjoint(weights))[0]
        cyclic = function.new_zeros(self.padded)
        places = np.ix_(*(np.arange(-(n - 1), n) % m for n, m in zip(self.grid, self.padded, strict=True)))
        cyclic[tuple(torch.from_numpy(p) for p in places)] = function
        transfer = transform(cyclic[None])[0].real * math.sqrt(math.prod(self.padded))
        return transfer[..., None].expand(*self.padded, 2).to(dtype).contiguous()

    def apply(self, images: CoilImages, x: Tensor) -> Tensor:
        """``S^H T S x``: (n, *domain.shape) of the coils' images to the same."""
        response = self.response(x.dtype, x.device)
        corner = tuple(slice(0, n) for n in self.grid)
        out = [torch.zeros_like(x[:0])]
        forms: tuple[Tensor, Tensor | None] = (x, None)
        sums = forms
        for draws, coils in images.pieces(len(x), self.padded):
            count = draws.stop - draws.start, coils.stop - coils.start
            if coils.start == 0:
                forms, sums = images.forms(x[draws]), images.sums(x, count[0])
            seen = x.new_zeros(*count, *self.padded, 2)
            images.spread(forms, coils, seen[(slice(None), slice(None), *corner)])
            values = self._transformed(seen, inverse=False).mul_(response)
            values = self._transformed(values, inverse=True)[(slice(None), slice(None), *corner)]
            images.gather(sums, values, coils)
            if coils.stop == images.coils:
                out.append(images.image(sums))
        return torch.cat(out)

    def _transformed(self, pairs: Tensor, inverse: bool) -> Tensor:
        stack = torch.view_as_complex(pairs).reshape(-1, *self.padded)
        return torch.view_as_real(transform(stack, inverse)).reshape(pairs.shape)


def _length(n: int) -> int:
    """A length with small factors, even and at least ``2 n - 1``."""
    from scipy.fft import next_fast_len

    return 2 * int(next_fast_len(n)) if n > 1 else 1
