r"""Classifier-free guidance (Ho and Salimans 2022): a conditional prior made to insist on its condition.

.. math::  D_w(z, \sigma) = D_u(z, \sigma) + w\,(D_c(z, \sigma) - D_u(z, \sigma))

with the denoiser ``D_u`` of the prior and ``D_c`` of the prior given a condition ``c``.  ``w = 0`` is the prior and ``w = 1``
the conditional prior, both bit for bit.  For any other ``w`` the scores are those of
:math:`q_\sigma(z)\, q_\sigma(c \mid z)^w` at every level by itself; these are not the blurred versions of any one
distribution, so ``D_w`` is no denoiser and what a sampler makes of it is a draw of no posterior: for ``w > 1`` images more
typical of ``c`` and less various than ``p(x | c)``.  Where the prior is ``N(0, v_u)`` and the conditional one ``N(0, v_c)``,
probability flow draws variance :math:`v_u^{1-w} v_c^w`.  No uncertainty should be read off such an ensemble.

``interval`` keeps the guidance to middle levels (Kynkäänniemi et al. 2024); at all others the denoiser is ``D_c``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from recon.errors import InputError
from recon.priors.base import Card, Prior
from recon.priors.wrapped import Wrapped
from recon.space import Space


@runtime_checkable
class Conditional(Protocol):
    """A prior that can be told something: ``conditions`` says what, by name."""

    @property
    def conditions(self) -> Mapping[str, Space]:
        """Name -> space of a value that can be given."""

    def given(self, **values: Tensor) -> Prior:
        """``p(x | values)``."""

    def unconditional(self) -> Prior:
        """``p(x)``."""


class Guided(Wrapped):
    """``D_u + weight (D_c - D_u)`` of two priors over the same arrays.

    conditional: ``D_c``.  unconditional: ``D_u``.  weight: any finite number.  interval: levels (low, high), ends included, at
    which the weight holds; everywhere else it is 1.

    Raises InputError when the two have different arrays or latents, or the weight or interval makes no sense.
    """

    def __init__(
        self,
        conditional: Prior,
        unconditional: Prior,
        weight: float,
        interval: tuple[float, float] | None = None,
    ) -> None:
        _require_alike(conditional, unconditional)
        if not math.isfinite(weight):
            raise InputError(f"the weight of a guidance must be a finite number; got {weight}")
        if interval is not None and not 0 <= interval[0] < interval[1]:
            raise InputError(f"an interval of noise levels is (low, high) with 0 <= low < high; got {interval}")
        name = unconditional.card.name
        facts = {**conditional.card.facts, "guidance": {"weight": weight, "interval": interval}}
        if weight not in (0.0, 1.0):
            facts["claim"] = "heuristic: guided scores belong to no distribution and its draws to no posterior"
        super().__init__(conditional, Card(f"{name} guided by {weight:g}", conditional.card.summary, facts))
        self.other, self.weight, self.interval = unconditional, float(weight), interval

    def predict(self, z: Tensor, sigma: Tensor) -> Tensor:
        """``D_w``; a denoiser whose share is zero is not computed."""
        if self.weight == 1:
            return self.prior.predict(z, sigma)
        if self.interval is None:
            return self._guided(z, sigma)
        low, high = self.interval
        inside = (sigma >= low) & (sigma <= high)
        if bool(inside.all()):
            return self._guided(z, sigma)
        given = self.prior.predict(z, sigma)
        if not bool(inside.any()):
            return given
        return torch.where(inside.reshape(-1, *[1] * (z.ndim - 1)), self._guided(z, sigma, given), given)

    def _guided(self, z: Tensor, sigma: Tensor, given: Tensor | None = None) -> Tensor:
        free = self.other.predict(z, sigma)
        if self.weight == 0:
            return free
        given = self.prior.predict(z, sigma) if given is None else given
        return free + self.weight * (given - free)


def guided(
    conditional: Conditional,
    values: Mapping[str, Tensor],
    weight: float,
    interval: tuple[float, float] | None = None,
) -> Guided:
    """The prior ``conditional`` guided by ``weight`` towards ``values``: samples no posterior unless the weight is 0 or 1.

    Raises InputError for values that are not among its conditions, and as ``Guided`` does.
    """
    if not isinstance(conditional, Conditional):
        raise InputError(
            f"guided needs a conditional prior (conditions, given, unconditional); got {type(conditional).__name__}"
        )
    unknown = sorted(values.keys() - conditional.conditions.keys())
    if unknown or not values:
        raise InputError(
            f"guided needs values for some of {', '.join(sorted(conditional.conditions))}; got "
            f"{', '.join(unknown) or 'none'}"
        )
    return Guided(conditional.given(**values), conditional.unconditional(), weight, interval)


def _require_alike(conditional: Prior, unconditional: Prior) -> None:
    difference = conditional.space.mismatch(unconditional.space) or conditional.latent.mismatch(unconditional.latent)
    if difference:
        raise InputError(f"guidance needs two denoisers of the same arrays; they differ: {difference}")
    for name in ("shift", "scale"):
        one, other = getattr(conditional, name), getattr(unconditional, name)
        if not bool((one == other).all()):
            raise InputError(f"guidance needs two denoisers of one latent; their {name} differs: {one} and {other}")
