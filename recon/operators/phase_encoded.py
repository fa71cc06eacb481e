r"""Three-dimensional multi-coil MRI whose readout is complete: undersampled along the two phase directions, kz and ky.

Every readout line is measured whole, so an inverse transform of the data along kx, orthonormal and therefore leaving white
noise white, takes them apart into planes across x that know nothing of each other (Pruessmann et al. 1999):

.. math::  y_{c}(k_z, k_y, x) = M\, F_{zy}\, S_c(z, y, x)\, x(z, y, x).

Each plane is a ``CartesianMRI`` of its own, with solves of its own.  The same measurement as ``CartesianMRI`` of the volume
with the mask (kz, ky, 1), whose data are k-space along x too.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from recon.errors import InputError
from recon.operators.base import LinearOperator
from recon.operators.cartesian_mri import CartesianMRI
from recon.operators.cg import CG
from recon.operators.fourier import image_grid
from recon.operators.slices import SliceStack
from recon.space import Space


class PhaseEncodedMRI(SliceStack):
    """Multi-coil MRI of a volume with a complete readout, plane by plane across x.

    domain: ("channel", z, y, x) from ``complex_grid``.  maps: complex (coil, z, y, x); None for one coil of ones.  mask: true
    where measured, (kz, ky) in centred order.
    Maps real (*batch, channel, z, y, x) to complex (*batch, x, coil, kz, ky); ``hybrid`` brings measured k-space there.

    Raises InputError for another domain, and what ``CartesianMRI`` refuses of maps and masks.
    """

    def __init__(
        self, domain: Space, maps: Tensor | np.ndarray | None = None, mask: Tensor | np.ndarray | None = None
    ) -> None:
        grid, channels = image_grid(domain, "PhaseEncodedMRI")
        if not channels or len(grid) != 3:
            raise InputError(
                f"PhaseEncodedMRI takes complex volumes (channel, z, y, x) from complex_grid; got {domain.describe()}"
            )
        if maps is not None and tuple(maps.shape[1:]) != grid:
            raise InputError(f"coil maps of the volume have shape (coil, {grid}); got {tuple(maps.shape)}")
        planes: list[LinearOperator]
        if maps is None:
            planes = [_Plane(domain, None, mask)] * grid[2]
        else:
            planes = [_Plane(domain, maps[..., k], mask) for k in range(grid[2])]
        super().__init__(planes, domain, "x")
        self.readout, self.coils = grid[2], 1 if maps is None else len(maps)

    def hybrid(self, kspace: Tensor) -> Tensor:
        """Full k-space (*batch, coil, kz, ky, kx), centred, as this operator's data: zeros where not measured.

        Noise of standard deviation sigma per sample stays that.
        """
        grid = (self.coils, *self.range.shape[2:], self.readout)
        if not kspace.is_complex() or tuple(kspace.shape[-4:]) != grid:
            raise InputError(f"hybrid takes complex k-space (*batch, {grid}); got {kspace.dtype} {tuple(kspace.shape)}")
        lines = torch.fft.ifft(torch.fft.ifftshift(kspace, -1), dim=-1, norm="ortho")
        planes = torch.fft.fftshift(lines, -1).movedim(-1, -4)
        one = self.slice(0)
        assert isinstance(one, _Plane)
        return torch.where(one.image.mask.to(planes.device), planes, 0.0)


class _Plane(LinearOperator):
    """A ``CartesianMRI`` of a plane (z, y), which that takes for an image (y, x)."""

    def __init__(self, volume: Space, maps: Tensor | np.ndarray | None, mask: Tensor | np.ndarray | None) -> None:
        shape = volume.shape[:3]
        names = {"channel": "channel", "z": "y", "y": "x"}
        coords = {names[d]: v for d, v in volume.coords.items() if d in names}
        image = CartesianMRI(Space(tuple(names.values()), shape, coords, volume.unit), maps, mask)
        own = {d: v for d, v in volume.coords.items() if d in names}
        theirs = image.range
        back = {"coil": "coil", "ky": "kz", "kx": "ky"}
        super().__init__(
            Space(tuple(names), shape, own, volume.unit),
            Space(
                tuple(back.values()), theirs.shape, {back[d]: v for d, v in theirs.coords.items()}, theirs.unit, True
            ),
        )
        self.image = image

    def apply(self, x: Tensor) -> Tensor:
        return self.image.apply(x)

    def apply_adjoint(self, y: Tensor) -> Tensor:
        return self.image.apply_adjoint(y)

    def normal(self, x: Tensor) -> Tensor:
        return self.image.normal(x)

    def solve(
        self,
        b: Tensor,
        c: float,
        weight: Tensor | None = None,
        x0: Tensor | None = None,
        cg: CG | None = None,
        watch: Callable[[int], None] | None = None,
    ) -> Tensor:
        """As the image's, in closed form where that has one."""
        return self.image.solve(b, c, weight, x0, cg, watch)

    def norm(self, iterations: int = 30) -> float:
        return self.image.norm(iterations)
