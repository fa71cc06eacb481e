r"""Polychromatic X-rays: what a tube and an energy-integrating detector make of line integrals.

Attenuation falls with the energy, so a thick object lets the hard part of the beam through and looks thinner than it is:

    y = -log sum_e w_e exp(-r_e p),    p = A x,    r_e = mu_e / mu_ref

with the line integrals ``p`` at the reference energy, the share ``w_e`` of the detected signal at each energy, and the
attenuation ``r_e`` of the object's material relative to the reference energy.  ``y`` is concave in ``p``, with slope
``sum w r`` for thin objects and ``min r`` for thick ones; a single energy with r = 1 gives ``y = A x``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recon.errors import InputError
from recon.operators.base import Operator
from recon.space import Space


class BeamHardening(Operator):
    """``y = -log sum_e w_e exp(-r_e (A x))``: post-log data of a polychromatic beam.

    projections: ``A``, to dimensionless line integrals at the reference energy (ParallelBeam, a Stack or Sequence of them).
    weights: (energy,), shares of the detected signal, not negative, summing to 1.  attenuation: (energy,),
    ``mu_e / mu_ref``, not negative.
    Maps the domain of ``A`` to its range (dimensionless).  Sums are taken relative to the largest term, so no line integral
    overflows; memory does not grow with the number of energies.
    Raises InputError for a range that is not dimensionless, or a spectrum that is none.
    """

    weights: Tensor
    attenuation: Tensor

    def __init__(
        self,
        projections: Operator,
        weights: Tensor | np.ndarray | Sequence[float],
        attenuation: Tensor | np.ndarray | Sequence[float],
    ) -> None:
        there = projections.range
        if there.unit != "1" or there.complex:
            raise InputError(f"BeamHardening needs dimensionless line integrals; got {projections.describe()}")
        w, r = (torch.as_tensor(one, dtype=torch.float64).flatten() for one in (weights, attenuation))
        if len(w) != len(r) or len(w) == 0 or not bool(((w >= 0) & (r >= 0) & torch.isfinite(r)).all()):
            raise InputError(
                "a spectrum is one weight and one relative attenuation per energy, finite and not negative; "
                f"got {len(w)} weights and {len(r)} attenuations"
            )
        if not abs(float(w.sum()) - 1) < 1e-5:
            raise InputError(f"the weights of a spectrum sum to 1; got {float(w.sum()):g}: divide them by their sum")
        super().__init__(projections.domain, Space(there.dims, there.shape, there.coords, "1"))
        self.projections = projections
        dtype = next((b.dtype for b in projections.buffers() if b.is_floating_point()), torch.float32)
        self.register_buffer("weights", (w / w.sum())[w > 0].to(dtype))
        self.register_buffer("attenuation", r[w > 0].to(dtype))

    def apply(self, x: Tensor) -> Tensor:
        return _Hardened.apply(self.projections.A(x), self.weights, self.attenuation)

    def vjp(self, x: Tensor, v: Tensor) -> Tensor:
        """``A^T (v sum_e r_e q_e)`` with the softmax ``q_e = w_e exp(-r_e p) / sum w exp(-r p)``."""
        p = self.projections.A(x.detach())
        return self.projections.vjp(x, v * slope(p, self.weights, self.attenuation))


def slope(p: Tensor, weights: Tensor, attenuation: Tensor) -> Tensor:
    """``dy/dp``, the mean relative attenuation of the beam behind ``p``; the shape of ``p``."""
    _, total, weighted = _sums(p, weights, attenuation)
    return weighted / total


def _sums(p: Tensor, weights: Tensor, attenuation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``r* p``, ``sum w exp(-(r - r*) p)`` and the same with ``w r``; r* is the energy whose term is the largest."""
    w, r = weights.to(p.dtype), attenuation.to(p.dtype)
    hardest = torch.where(p >= 0, r.min(), r.max())
    total, weighted = torch.zeros_like(p), torch.zeros_like(p)
    for share, relative in zip(w, r, strict=True):
        term = share * torch.exp((hardest - relative) * p)
        total, weighted = total + term, weighted + relative * term
    return hardest * p, total, weighted


class _Hardened(torch.autograd.Function):
    """The curve of the module's text, value by value; the backward pass recomputes instead of keeping every energy."""

    @staticmethod
    def forward(p: Tensor, weights: Tensor, attenuation: Tensor) -> Tensor:
        main, total, _ = _sums(p, weights, attenuation)
        return main - torch.log(total)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        return grads[0] * slope(*ctx.saved_tensors), None, None
