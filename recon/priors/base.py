"""The contract of a prior: a denoiser in latent coordinates, and the way to physical units.

``denoise(z, sigma) = E[z0 | z0 + sigma n = z]`` with ``n ~ N(0, I)`` (variance exploding everywhere).  By Tweedie's formula
``score = (denoise(z) - z) / sigma^2`` and ``Cov[z0 | z] = sigma^2 d denoise / dz``.  Only ``decode`` and ``encode`` know the
network's scale; whatever stands above a prior speaks physical units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from recon.errors import InputError
from recon.schedules import Schedule
from recon.space import Space


@dataclass(frozen=True)
class Card:
    """What a prior was made from and what it may be used for: the content of ``card.yaml``."""

    name: str
    summary: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


class Prior(nn.Module):
    """A distribution over one ``space``, known through its denoiser.

    space: of physical arrays.  latent: of the denoiser's arrays.  schedule: noise levels the denoiser is good for, in units
    of the latent.  A subclass writes ``predict``.  Pixel priors decode as ``x = shift + scale * z``, with one number each or
    one per entry of the first axis (variables in units of their own); a prior with another decoder overrides ``encode`` and
    ``decode`` and sets ``affine = False``.

    Raises InputError for a scale that is not positive, or numbers that do not fit the first axis.
    """

    affine: bool = True
    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        space: Space,
        schedule: Schedule,
        card: Card,
        *,
        shift: float | Sequence[float] = 0.0,
        scale: float | Sequence[float] = 1.0,
    ) -> None:
        super().__init__()
        if not all(value > 0 for value in np.atleast_1d(scale)):
            raise InputError(f"a prior's scale must be positive; got {scale}")
        self.space = space
        self.latent = Space(space.dims, space.shape, space.coords, "1") if (shift, scale) != (0.0, 1.0) else space
        self.schedule = schedule
        self.card = card
        self.register_buffer("shift", _per_field(shift, space, "shift"))
        self.register_buffer("scale", _per_field(scale, space, "scale"))

    @property
    def dtype(self) -> torch.dtype:
        """Floating type in which states of this prior are kept."""
        return torch.float32

    @property
    def device(self) -> torch.device:
        """Where the denoiser computes."""
        return self.shift.device

    def predict(self, z: Tensor, sigma: Tensor) -> Tensor:
        """The denoiser proper; ``z`` is (n, *latent.shape), ``sigma`` (n,)."""
        raise TypeError(f"{type(self).__name__} must define predict(z, sigma)")

    def denoise(self, z: Tensor, sigma: Tensor | float) -> Tensor:
        """``E[z0 | z]`` for ``z`` (n, *latent.shape) at noise level ``sigma`` (a number, or one per draw).

        Raises InputError when the shape is not that of the latent, or a noise level is not positive.
        """
        batch = self.latent.require(tuple(z.shape), f"{type(self).__name__}.denoise")
        if len(batch) != 1:
            raise InputError(f"{type(self).__name__}.denoise takes (n, {self.latent.describe()}); got {tuple(z.shape)}")
        levels = torch.as_tensor(sigma, dtype=z.dtype, device=z.device).expand(batch)
        if not bool((levels > 0).all()):
            raise InputError(f"denoise needs sigma > 0; got {sigma}")
        return self.predict(z, levels)

    def decode(self, z: Tensor) -> Tensor:
        """From latent to physical units: ``x = shift + scale * z``."""
        return z * self.scale.to(z.dtype) + self.shift.to(z.dtype)

    def decode_linear(self, dz: Tensor) -> Tensor:
        """The linear part of an affine ``decode``: ``dx = scale * dz``."""
        return dz * self.scale.to(dz.dtype)

    def encode(self, x: Tensor) -> Tensor:
        """From physical units to the latent: ``z = (x - shift) / scale``."""
        return (x - self.shift.to(x.dtype)) / self.scale.to(x.dtype)


def _per_field(values: float | Sequence[float], space: Space, name: str) -> Tensor:
    """One number (), or one per entry of the first axis as it broadcasts over arrays of ``space``."""
    tensor = torch.tensor(values, dtype=torch.float64)
    if tensor.ndim == 0:
        return tensor
    if len(space.shape) < 2 or tuple(tensor.shape) != space.shape[:1]:
        raise InputError(
            f"{name} must be one number or one per {space.dims[0]} of {space.describe()}; got {tuple(tensor.shape)}"
        )
    return tensor.reshape(-1, *[1] * (len(space.shape) - 1))
