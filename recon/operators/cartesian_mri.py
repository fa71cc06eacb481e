r"""Multi-coil Cartesian magnetic resonance imaging: ``y_c = M F S_c x``.

``F`` is the centred orthonormal Fourier transform (origins at index N // 2 in both spaces), ``S_c`` the complex sensitivity
of coil c and ``M`` keeps the samples that were measured.

Range, full grid (the default): ("coil", [kz,] ky, kx) with exact zeros wherever nothing was measured, the layout of fastMRI and
most files.  Those zeros are no data: give a likelihood ``sampled(kspace)``, which has them too.  They then change no gradient
and no difference of log-probabilities (its constant counts them), and ``diagnostics.data_fit`` leaves them out; a chi2 of your
own must divide by ``data``, not by the size.  packed=True holds the measured samples alone, ("coil", "sample").
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recon.errors import InputError
from recon.operators.base import LinearOperator, _Matched
from recon.operators.blur import constant
from recon.operators.cg import CG
from recon.operators.coil_images import CoilImages, coil_weights
from recon.operators.fourier import centred_rows, complex_twin, frequencies, image_grid, signs
from recon.space import Space


class CartesianMRI(LinearOperator):
    """``y_c = M F S_c x`` of a complex image, or of a real one with a known phase.

    domain: ("channel", [z,] y, x) from ``complex_grid``; or a real ([z,] y, x), then ``phase`` (unit modulus, the same shape)
    makes it complex: ``y_c = M F S_c (phase x)``, without one x itself is transformed.
    maps: complex (coil, [z,] y, x), as ``espirit`` makes them; None for one coil of ones.
    mask: true where measured, ([kz,] ky, kx) in the centred order of the data, or anything numpy broadcasts to it: (kx,) or
    (1, kx) keeps columns, (ky, 1) rows; None for all.  Which axis was phase-encoded is for the mask to say.
    packed: see the module's text.
    Maps real (*batch, *domain.shape) to complex (*batch, *range.shape) in the same unit; k-space coordinates are cycles per
    metre.  Maps of complex128 make an operator in double precision.  The maps are kept twice over, as pairs of real numbers.

    Raises InputError for another domain, maps of another shape or not finite, an empty mask or one of another shape.
    """

    pairs: Tensor | None
    kept: Tensor | None

    def __init__(
        self,
        domain: Space,
        maps: Tensor | np.ndarray | None = None,
        mask: Tensor | np.ndarray | None = None,
        packed: bool = False,
        phase: Tensor | np.ndarray | None = None,
    ) -> None:
        grid, channels = image_grid(domain, "CartesianMRI")
        weights, dtype = coil_weights(grid, channels, maps, phase)
        here = np.ones(grid, dtype=bool) if mask is None else _mask(mask, grid)
        super().__init__(domain, _range(domain, len(weights), here, packed))
        self.images = CoilImages(weights * signs(grid), channels, roll=True, dtype=dtype)
        self.packed, self.full, self.data = packed, bool(here.all()), int(here.sum()) * len(weights)
        # What a transform diagonalises: one coil that sees all of a complex image alike.
        self.alone = maps is None and channels
        flags = torch.from_numpy(here)
        doubled = None if self.full else flags[..., None].expand(*grid, 2).to(dtype)
        self.register_buffer("pairs", None if doubled is None else doubled.contiguous(), persistent=False)
        self.register_buffer("kept", flags.flatten().nonzero()[:, 0] if packed else None, persistent=False)

    @property
    def mask(self) -> Tensor:
        """Which samples are measured: bool ([kz,] ky, kx)."""
        if self.pairs is None:
            return torch.ones(self.images.grid, dtype=torch.bool, device=self.device)
        return self.pairs[..., 0] > 0

    def single(self) -> CartesianMRI:
        """The same samples of complex images seen by one coil of ones, in the same precision."""
        return CartesianMRI(complex_twin(self.domain), None, self.mask, self.packed).to(self.images.plain)

    def sampled(self, kspace: Tensor) -> Tensor:
        """What the likelihood wants of full k-space (*batch, coil, [kz,] ky, kx): zeros where not measured, or packed."""
        grid = self.images.grid
        if tuple(kspace.shape[-len(grid) - 1 :]) != (self.images.coils, *grid):
            raise InputError(
                f"sampled takes k-space (*batch, {self.images.coils}, {', '.join(map(str, grid))}); "
                f"got {tuple(kspace.shape)}"
            )
        if self.kept is not None:
            return kspace.flatten(-len(grid)).index_select(-1, self.kept.to(kspace.device))
        return torch.where(self.mask.to(kspace.device), kspace, 0.0)

    def apply(self, x: Tensor) -> Tensor:
        require_precision(self, x)
        out = x.new_empty(len(x), *self.range.shape, dtype=x.dtype.to_complex())
        pairs = torch.view_as_real(out)
        for draws, coils, kspace in self._spectra(x):
            if self.kept is not None:
                out[draws, coils] = torch.view_as_complex(kspace).flatten(2).index_select(-1, self.kept)
            elif self.pairs is not None:
                torch.mul(kspace, self.pairs, out=pairs[draws, coils])
            else:
                pairs[draws, coils] = kspace
        return out

    def apply_adjoint(self, y: Tensor) -> Tensor:
        require_precision(self, y)
        images, grid = self.images, self.images.grid
        out = [y.new_empty(0, *self.domain.shape, dtype=y.dtype.to_real())]
        sums = images.sums(images.plain, 0)
        for draws, coils in images.pieces(len(y)):
            if coils.start == 0:
                sums = images.sums(images.plain, draws.stop - draws.start)
            piece = y[draws, coils]
            if self.kept is not None:
                flat = piece.new_zeros(*piece.shape[:2], int(np.prod(grid)))
                piece = flat.index_copy_(-1, self.kept, piece).reshape(*piece.shape[:2], *grid)
            elif self.pairs is not None:
                piece = torch.view_as_complex(torch.view_as_real(piece.resolve_conj()) * self.pairs)
            images.gather(sums, _transformed(piece, inverse=True), coils)
            if coils.stop == images.coils:
                out.append(images.image(sums))
        return torch.cat(out[1:] or out)

    def _spectra(self, x: Tensor) -> Any:  # noqa: ANN401  (a generator of slices and tensors)
        """Piece by piece the fully sampled k-space of ``x`` as pairs (draws, coils, *grid, 2), free to be changed."""
        forms: tuple[Tensor, Tensor | None] = (x, None)
        for draws, coils in self.images.pieces(len(x)):
            if coils.start == 0:
                forms = self.images.forms(x[draws])
            seen = x.new_empty(draws.stop - draws.start, coils.stop - coils.start, *self.images.grid, 2)
            yield draws, coils, _transformed(torch.view_as_complex(self.images.spread(forms, coils, seen)))

    def _filtered(self, x: Tensor, response: Tensor) -> Tensor:
        """``S^H F^H diag(response) F S x``; response: pairs (*grid, 2), or (1, coil, *grid, 2)."""
        images = self.images
        out = [x.new_empty(0, *self.domain.shape)]
        sums = images.sums(x, 0)
        for draws, coils, kspace in self._spectra(x):
            if coils.start == 0:
                sums = images.sums(x, draws.stop - draws.start)
            kspace.mul_(response)
            images.gather(sums, _transformed(torch.view_as_complex(kspace), inverse=True), coils)
            if coils.stop == images.coils:
                out.append(images.image(sums))
        return torch.cat(out[1:] or out)

    def normal(self, x: Tensor) -> Tensor:
        """``A^T A x``: the mask once, in between; ``sum_c |S_c|^2 x`` where everything was measured."""
        return self._checked(
            lambda x: _Matched.apply(x, self._normal, self._normal), x, self.domain, self.domain, "normal"
        )

    def _normal(self, x: Tensor) -> Tensor:
        require_precision(self, x)
        return self.images.power * x if self.pairs is None else self._filtered(x, self.pairs)

    def solve(
        self,
        b: Tensor,
        c: float,
        weight: Tensor | None = None,
        x0: Tensor | None = None,
        cg: CG | None = None,
        watch: Callable[[int], None] | None = None,
    ) -> Tensor:
        """``(A^T W A + c I)^{-1} b``.

        Exact, in k-space, for one coil without maps and any weight; exact, in the image, for any maps where everything was
        measured and one weight; by conjugate gradients otherwise.
        """
        one = constant(weight)
        if c > 0 and self.full and one is not None:
            return b / (one * self.images.power + c)
        if c > 0 and self.alone:
            response = 1 / (self._diagonal(b, weight) + c)
            return self._filtered(b, response[..., None].expand(*response.shape, 2).contiguous())
        if c > 0 and one:
            return super().solve(b / one, c / one, None, x0, cg, watch)
        return super().solve(b, c, weight, x0, cg, watch)

    def _diagonal(self, like: Tensor, weight: Tensor | None) -> Tensor:
        """The weights of all samples, zero where not measured: ([kz,] ky, kx)."""
        grid = self.images.grid
        if weight is None or self.kept is None:
            values = self.mask.to(like.dtype)
            return values if weight is None else values * weight.to(like).reshape(-1, *grid)[0]
        flat = like.new_zeros(int(np.prod(grid)))
        return flat.index_copy_(0, self.kept, weight.to(like).flatten()).reshape(grid)

    def norm(self, iterations: int = 30) -> float:
        """Largest singular value: exact for one coil without maps and for full sampling, by power iteration otherwise."""
        if self.alone:
            return 1.0
        return float(self.images.power.max().sqrt()) if self.full else super().norm(iterations)


def require_precision(operator: LinearOperator, values: Tensor) -> None:
    """Refuse numbers of another precision than the operator's: half of the products would silently be converted."""
    if values.dtype.to_real() != operator.dtype:
        raise InputError(
            f"this operator holds {operator.dtype} numbers; got {values.dtype} "
            "(convert one: operator.to(dtype) or x.to(dtype))"
        )


def _transformed(values: Tensor, inverse: bool = False) -> Tensor:
    """Complex (n, coils, *grid) through the transform, as pairs (n, coils, *grid, 2)."""
    stack = values.reshape(-1, *values.shape[2:]).contiguous()
    return torch.view_as_real(centred_rows(stack, inverse)).reshape(*values.shape, 2)


def _mask(mask: Tensor | np.ndarray, grid: tuple[int, ...]) -> np.ndarray:
    values = np.asarray(mask.detach().cpu() if isinstance(mask, Tensor) else mask)
    if values.dtype.kind not in "biuf" or not np.isin(values, (0, 1)).all():
        raise InputError("a mask holds true and false, or 1 and 0, and nothing else")
    try:
        here = np.broadcast_to(values != 0, grid)
    except ValueError:
        raise InputError(
            f"the mask must have the shape of k-space {grid} or broadcast to it as numpy does "
            f"(columns: ({grid[-1]},); rows: ({grid[-2]}, 1)); got {values.shape}"
        ) from None
    if not here.any():
        raise InputError("the mask is empty: no sample would be kept, so nothing would be measured")
    return here.copy()


def _range(domain: Space, coils: int, here: np.ndarray, packed: bool) -> Space:
    if packed:
        kept = np.flatnonzero(here)
        return Space(("coil", "sample"), (coils, len(kept)), {"sample": kept}, domain.unit, complex=True)
    dims = tuple(f"k{dim}" for dim in domain.dims[-here.ndim :])
    return Space(("coil", *dims), (coils, *here.shape), frequencies(domain), domain.unit, complex=True)
