r"""Reconstructions of magnetic resonance data without a prior: gridding, coil combination, conjugate-gradient SENSE."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from recon.errors import InputError
from recon.operators.cartesian_mri import CartesianMRI
from recon.operators.cg import CG
from recon.operators.coils import MRI
from recon.operators.fourier import to_complex
from recon.operators.non_cartesian_mri import NonCartesianMRI
from recon.operators.trajectories import density


def cg_sense(
    operator: MRI,
    y: Tensor,
    iterations: int = 30,
    regularisation: float = 0.0,
    weights: Tensor | np.ndarray | None = None,
) -> Tensor:
    """``min_x |W^(1/2) (A x - y)|^2 + regularisation |x|^2`` by conjugate gradients from zero.

    y: (*batch, *range.shape).  weights: one per sample for a non-Cartesian operator, (sample,) or (readout, sample), such as
    ``density``: fewer iterations at the price of noise; None for 1.  Returns (*batch, *domain.shape); without regularisation,
    stopping early is what keeps the noise down.  Source: Pruessmann et al. 2001, Magnetic Resonance in Medicine 46, 638.
    Raises InputError for another operator, fewer than one iteration or a negative regularisation.
    """
    _require(operator, "cg_sense")
    if iterations < 1 or not regularisation >= 0:
        raise InputError(f"cg_sense needs iterations >= 1 and regularisation >= 0; got {iterations}, {regularisation}")
    if weights is None:
        normal, back = operator.normal, operator.A_adjoint(y)
    elif isinstance(operator, NonCartesianMRI):
        normal, back = operator.gram(weights).to(operator.images.plain).A, operator.A_adjoint(_weighted(y, weights))
    else:
        raise InputError(
            "weights are for non-Cartesian trajectories; the samples of a Cartesian grid all weigh the same"
        )
    flat = back.reshape(-1, *operator.domain.shape)
    x = CG(iterations, 0.0).solve(lambda p: normal(p) + regularisation * p, flat)
    return x.reshape(back.shape)


def adjoint_recon(operator: MRI, y: Tensor, weights: Tensor | np.ndarray | None = None) -> Tensor:
    """``A^T W y / sum_c |S_c|^2``: zero-filled, or gridded with density compensation; coils combined by their maps.

    y: (*batch, *range.shape).  weights: of a non-Cartesian trajectory; None for ``density`` of it.  Returns
    (*batch, *domain.shape), 0 where no coil is sensitive.  Raises InputError for another operator.
    """
    _require(operator, "adjoint_recon")
    if isinstance(operator, NonCartesianMRI):
        y = _weighted(y, _density(operator) if weights is None else weights)
    elif weights is not None:
        raise InputError(
            "weights are for non-Cartesian trajectories; the samples of a Cartesian grid all weigh the same"
        )
    power = operator.images.power
    seen = power > 1e-6 * power.max()
    return torch.where(seen, operator.A_adjoint(y) / torch.where(seen, power, 1.0), 0.0)


def coil_images(operator: MRI, y: Tensor, weights: Tensor | np.ndarray | None = None) -> Tensor:
    """The image of every coil by itself, zero-filled or gridded: complex (*batch, coil, [z,] y, x).

    y: (*batch, *range.shape).  weights: as for ``adjoint_recon``.  Maps are not used, so this comes before they are known.
    """
    _require(operator, "coil_images")
    batch = operator.range.require(tuple(y.shape), "coil_images")
    if isinstance(operator, NonCartesianMRI):
        y = _weighted(y, _density(operator) if weights is None else weights)
    coils, grid = operator.images.coils, operator.images.grid
    each = operator.single().A_adjoint(y.reshape(-1, 1, *operator.range.shape[1:]))
    return to_complex(each, len(grid)).reshape(*batch, coils, *grid)


def rss(images: Tensor, dim: int = -3) -> Tensor:
    """Root of the sum of squares over the coils: complex (*batch, coil, y, x) -> real (*batch, y, x); dim -4 for volumes."""
    parts = torch.view_as_real(images.resolve_conj()) if images.is_complex() else images[..., None]
    return parts.square().sum(-1).sum(dim).sqrt()


def _require(operator: MRI, user: str) -> None:
    if not isinstance(operator, CartesianMRI | NonCartesianMRI):
        raise InputError(f"{user} takes CartesianMRI or NonCartesianMRI; cgls and tv take any linear operator")


def _density(operator: NonCartesianMRI) -> np.ndarray:
    return density(operator.trajectory, operator.images.grid)


def _weighted(y: Tensor, weights: Tensor | np.ndarray) -> Tensor:
    return y * torch.as_tensor(weights).to(y.real)
