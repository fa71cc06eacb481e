r"""Priors made of other priors: what they have in common, and one prior in the normalisation of another.

A prior whose latent is :math:`z_k = (x - b_k) / s_k` speaks of the same arrays in the latent :math:`z = (x - b) / s` by

.. math::
    D(z, \sigma) = \frac{D_k(\rho z + o,\; \rho \sigma) - o}{\rho}, \qquad \rho = \frac{s}{s_k}, \quad o = \frac{b - b_k}{s_k},

exactly, because white noise of one latent is white noise of the other.  Two fields with different ratios :math:`\rho` have no
common noise level, so those are refused.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from recon.errors import InputError
from recon.priors.base import Card, Prior
from recon.schedules import Schedule


def sigma_data_of(prior: Prior) -> float | None:
    """Standard deviation of the prior's latent, where it knows one."""
    value = getattr(prior, "sigma_data", None)
    return None if value is None else float(value)


class Wrapped(Prior):
    """A prior over the arrays of another: its space, latent, schedule, normalisation and decoder; a subclass denoises.

    sigma_data: standard deviation of the latent, None where the prior knows none.

    prior: whose these are.  card and schedule: in place of its own.
    """

    def __init__(self, prior: Prior, card: Card | None = None, schedule: Schedule | None = None) -> None:
        super().__init__(prior.space, schedule or prior.schedule, card or prior.card)
        self.latent, self.affine = prior.latent, prior.affine
        self.shift, self.scale = prior.shift, prior.scale
        self.prior = prior
        self.sigma_data = sigma_data_of(prior)

    @property
    def dtype(self) -> torch.dtype:
        return self.prior.dtype

    def predict(self, z: Tensor, sigma: Tensor) -> Tensor:
        return self.prior.predict(z, sigma)

    def decode(self, z: Tensor) -> Tensor:
        return self.prior.decode(z)

    def decode_linear(self, dz: Tensor) -> Tensor:
        return self.prior.decode_linear(dz)

    def encode(self, x: Tensor) -> Tensor:
        return self.prior.encode(x)


class Renormalised(Wrapped):
    """``prior`` in the latent of ``like``: the same distribution of physical arrays, by the formula of the module.

    Raises InputError when the two do not speak of the same arrays, one of them decodes by more than a shift and a scale, or
    their scales have not one ratio.
    """

    def __init__(self, prior: Prior, like: Prior) -> None:
        _require_same_arrays(prior, like)
        if not (prior.affine and like.affine):
            raise InputError(
                f"{prior.card.name!r} and {like.card.name!r} have latents of their own, not a shift and a scale"
            )
        ratios = (like.scale / prior.scale).double().unique()
        self.ratio = float(ratios.mean())
        if float((ratios - self.ratio).abs().max()) > 8 * torch.finfo(like.scale.dtype).eps * self.ratio:
            raise InputError(
                f"the scales of {prior.card.name!r} and {like.card.name!r} differ by another factor in each field "
                f"({', '.join(f'{float(r):.6g}' for r in ratios)}); one noise level cannot serve both"
            )
        levels = Schedule(prior.schedule.sigma_min / self.ratio, prior.schedule.sigma_max / self.ratio)
        super().__init__(like, prior.card, levels)
        self.inner = prior
        spread = sigma_data_of(prior)
        self.sigma_data = None if spread is None else spread / self.ratio

    @property
    def dtype(self) -> torch.dtype:
        return self.inner.dtype

    def inwards(self, z: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """``(rho z + o, rho sigma)``: where the prior itself is asked."""
        return self.ratio * z + self._offset(z), self.ratio * sigma

    def predict(self, z: Tensor, sigma: Tensor) -> Tensor:
        return (self.inner.predict(*self.inwards(z, sigma)) - self._offset(z)) / self.ratio

    def _offset(self, z: Tensor) -> Tensor:
        return ((self.shift - self.inner.shift) / self.inner.scale).to(z.dtype)


def together(priors: Sequence[Prior], what: str) -> tuple[list[Prior], Schedule]:
    """``priors`` in the latent of the first one, and the noise levels that all of them are good for.

    Raises InputError naming ``what`` when there are none, their arrays, latents, floating types or devices do not fit, or no
    level suits all.
    """
    if not priors:
        raise InputError(f"{what} needs at least one prior")
    first = priors[0]
    same = [first]
    for prior in priors[1:]:
        _require_same_arrays(prior, first)
        if (prior.dtype, prior.device) != (first.dtype, first.device):
            raise InputError(
                f"{what}: {first.card.name!r} computes in {first.dtype} on {first.device}, {prior.card.name!r} in "
                f"{prior.dtype} on {prior.device}; move one of them"
            )
        same.append(prior if same_normalisation(prior, first) else Renormalised(prior, first))
    low, high = (max(p.schedule.sigma_min for p in same), min(p.schedule.sigma_max for p in same))
    if not low < high:
        raise InputError(f"{what}: no noise level suits {' and '.join(repr(p.card.name) for p in same)}")
    return same, Schedule(low, high)


def same_normalisation(one: Prior, other: Prior) -> bool:
    """Whether both latents are the physical arrays by the same shift and the same scale."""
    same = (one.shift == other.shift).all() & (one.scale == other.scale).all()
    return one.affine and other.affine and bool(same)


def _require_same_arrays(prior: Prior, like: Prior) -> None:
    difference = like.space.mismatch(prior.space)
    if difference:
        raise InputError(f"{like.card.name!r} and {prior.card.name!r} are priors of different arrays: {difference}")
