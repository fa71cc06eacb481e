r"""Multi-coil magnetic resonance imaging along any measured trajectory.

    y_cj = N^(-1/2) sum_r S_c(r) x(r) exp(-2 pi i sum_a k_ja r_a / N_a),     r_a counted from index N_a // 2

with N the number of pixels and ``k`` in cycles per field of view: whole numbers from -N_a/2 to N_a/2 are the samples of the
Cartesian grid, on which this operator equals ``CartesianMRI``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from recon.errors import InputError, need
from recon.operators.base import LinearOperator, _Matched
from recon.operators.blur import constant
from recon.operators.cartesian_mri import require_precision
from recon.operators.cg import CG
from recon.operators.coil_images import CoilImages, coil_weights
from recon.operators.fourier import complex_twin, image_grid
from recon.operators.nufft import Nufft
from recon.operators.toeplitz import Toeplitz
from recon.space import Space

_TOEPLITZ_LIMIT = 4e9  # bytes that making the transfer function of ``normal`` may take


class NonCartesianMRI(LinearOperator):
    """``y_cj = N^(-1/2) sum_r S_c(r) x(r) exp(-2 pi i k_j . r / N)`` at the points of a trajectory.

    domain: ("channel", [z,] y, x) from ``complex_grid``, or a real ([z,] y, x) with an optional unit-modulus ``phase``.
    trajectory: (sample, d) or (readout, sample, d) in cycles per field of view, its last axis in the order ([kz,] ky, kx).
    maps: complex (coil, [z,] y, x); None for one coil of ones.
    Maps real (*batch, *domain.shape) to complex (*batch, coil, [readout,] sample) in the same unit.  In single precision the
    points are rounded too, about 2e-5 of the result at 512 pixels; ``.double()`` goes back to the trajectory as given.

    ``normal`` convolves with the point spread function, which is made at its first use, where making it takes less than
    4 GB; else it is the two factors.  ``gram(weights)`` is the same with weights.
    Raises InputError for another domain, maps or trajectories that do not fit, or without finufft.
    """

    def __init__(
        self,
        domain: Space,
        trajectory: Tensor | np.ndarray,
        maps: Tensor | np.ndarray | None = None,
        phase: Tensor | np.ndarray | None = None,
    ) -> None:
        need("finufft", "mri")
        grid, channels = image_grid(domain, "NonCartesianMRI")
        k = require_trajectory(trajectory, grid)
        weights, dtype = coil_weights(grid, channels, maps, phase)
        dims = ("coil", "readout", "sample")[:: 1 if k.ndim == 3 else 2]
        super().__init__(domain, Space(dims, (len(weights), *k.shape[:-1]), {}, domain.unit, complex=True))
        self.trajectory = k
        self.images = CoilImages(weights, channels, roll=False, dtype=dtype)
        points = 2 * math.pi * (k.reshape(-1, len(grid)) / np.array(grid)).T
        self.scale = 1 / math.sqrt(math.prod(grid))
        self.sums = Nufft(grid, np.ascontiguousarray(points))
        self.spread = Toeplitz(self.sums, np.full(points.shape[1], self.scale**2))

    def single(self) -> NonCartesianMRI:
        """The same trajectory through complex images seen by one coil of ones, in the same precision."""
        return NonCartesianMRI(complex_twin(self.domain), self.trajectory).to(self.images.plain)

    def apply(self, x: Tensor) -> Tensor:
        require_precision(self, x)
        images, grid = self.images, self.images.grid
        out = x.new_empty(len(x), images.coils, self.sums.points.shape[1], dtype=x.dtype.to_complex())
        forms: tuple[Tensor, Tensor | None] = (x, None)
        for draws, coils in images.pieces(len(x), self.sums.fine(x.dtype, x.device)):
            if coils.start == 0:
                forms = images.forms(x[draws])
            seen = x.new_empty(draws.stop - draws.start, coils.stop - coils.start, *grid, 2)
            samples = self.sums.forward(images.spread(forms, coils, seen).flatten(0, 1)).mul_(self.scale)
            out[draws, coils] = torch.view_as_complex(samples).reshape(*seen.shape[:2], out.shape[-1])
        return out.reshape(len(x), *self.range.shape)

    def apply_adjoint(self, y: Tensor) -> Tensor:
        require_precision(self, y)
        images, grid = self.images, self.images.grid
        flat = y.flatten(2)
        out = [y.new_empty(0, *self.domain.shape, dtype=y.dtype.to_real())]
        sums = images.sums(images.plain, 0)
        for draws, coils in images.pieces(len(y), self.sums.fine(y.dtype, y.device)):
            if coils.start == 0:
                sums = images.sums(images.plain, draws.stop - draws.start)
            piece = flat[draws, coils]
            pairs = torch.view_as_real(piece.resolve_conj()) * self.scale
            back = self.sums.adjoint(pairs.flatten(0, 1))
            images.gather(sums, back.reshape(*pairs.shape[:2], *grid, 2), coils)
            if coils.stop == images.coils:
                out.append(images.image(sums))
        return torch.cat(out)

    def normal(self, x: Tensor) -> Tensor:
        """``A^T A x``, a convolution per coil where its transfer function is affordable."""
        if self.spread.bytes > _TOEPLITZ_LIMIT:
            return super().normal(x)
        return self._checked(
            lambda x: _Matched.apply(x, self._normal, self._normal), x, self.domain, self.domain, "normal"
        )

    def _normal(self, x: Tensor) -> Tensor:
        require_precision(self, x)
        return self.spread.apply(self.images, x)

    def gram(self, weights: Tensor | np.ndarray) -> WeightedGram:
        """``A^T W A`` with real weights, one per sample and the same for all coils: see ``WeightedGram``."""
        return WeightedGram(self, weights)

    def solve(
        self,
        b: Tensor,
        c: float,
        weight: Tensor | None = None,
        x0: Tensor | None = None,
        cg: CG | None = None,
        watch: Callable[[int], None] | None = None,
    ) -> Tensor:
        """``(A^T W A + c I)^{-1} b`` by conjugate gradients, with the convolution where there is one weight."""
        one = constant(weight)
        if one and c > 0:
            return super().solve(b / one, c / one, None, x0, cg, watch)
        return super().solve(b, c, weight, x0, cg, watch)


class WeightedGram(LinearOperator):
    """``A^T W A`` of a ``NonCartesianMRI``: from its domain to itself, symmetric, positive where the weights are.

    weights: real, finite and not negative, (sample,) or (readout, sample) as the trajectory; density compensation, say.
    Raises InputError for other weights, or a grid so large that the transfer function would take more than 4 GB to make.
    """

    def __init__(self, operator: NonCartesianMRI, weights: Tensor | np.ndarray) -> None:
        values = np.asarray(weights.detach().cpu() if isinstance(weights, Tensor) else weights, dtype=np.float64)
        shape = operator.range.shape[1:]
        if values.shape != shape or not np.isfinite(values).all() or (values < 0).any():
            raise InputError(f"weights must be {shape} finite numbers, none negative; got {values.shape}")
        super().__init__(operator.domain, operator.domain)
        self.images = operator.images
        self.spread = Toeplitz(operator.sums, values.ravel() * operator.scale**2)
        if self.spread.bytes > _TOEPLITZ_LIMIT:
            raise InputError(
                f"the transfer function on a grid of {operator.images.grid} would take about "
                f"{self.spread.bytes / 1e9:.3g} GB to make, above the limit of {_TOEPLITZ_LIMIT / 1e9:.3g} GB; "
                "use A_adjoint(weights * A(x))"
            )

    def apply(self, x: Tensor) -> Tensor:
        require_precision(self, x)
        return self.spread.apply(self.images, x)

    def apply_adjoint(self, y: Tensor) -> Tensor:
        return self.apply(y)


def require_trajectory(trajectory: Tensor | np.ndarray, grid: tuple[int, ...]) -> np.ndarray:
    """The trajectory in double precision, known to be one of ``grid``.

    Raises InputError for another shape, values that are not finite, or a unit that cannot be cycles per field of view.
    """
    k = np.asarray(trajectory.detach().cpu() if isinstance(trajectory, Tensor) else trajectory)
    axes = len(grid)
    if k.ndim not in (2, 3) or k.shape[-1] != axes or k.size == 0 or k.dtype.kind not in "fiu":
        raise InputError(
            f"a trajectory through {axes} dimensions is real (sample, {axes}) or (readout, sample, {axes}), its last axis "
            f"in the order {'(kz, ky, kx)' if axes == 3 else '(ky, kx)'}; got {k.dtype} {k.shape}"
        )
    if not np.isfinite(k).all():
        raise InputError(f"the trajectory holds {int((~np.isfinite(k)).sum())} values that are NaN or infinite")
    k = k.astype(np.float64)
    reach = np.abs(k).reshape(-1, axes).max(0)
    unit = "cycles per field of view, from -N/2 to N/2"
    if (reach > np.array(grid)).any():
        raise InputError(
            f"the trajectory is in {unit} = {tuple(n / 2 for n in grid)}; it reaches {tuple(reach.tolist())}"
        )
    if k.size > axes and max(grid) > 4 and 0 < reach.max() <= 0.5:
        raise InputError(
            f"the trajectory is in {unit}, and reaches only {reach.max():.3g}; if it is in cycles per pixel, multiply it "
            f"by the number of pixels {grid}"
        )
    return k
