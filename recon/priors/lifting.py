r"""Volumes under a prior of images: every slice denoised by itself, along one axis or several.

``SlicesPrior`` is the distribution of volumes whose slices are independent draws of the prior,

.. math::  p(X) = \prod_k p_{2D}(X_k), \qquad D(Z, \sigma)_k = D_{2D}(Z_k, \sigma),

exactly.  What holds neighbouring slices together must come from the data, a regulariser along the axis, or a second prior
of perpendicular slices (``perpendicular``; Lee et al. 2023).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from recon.errors import InputError
from recon.operators.streamed import Streamed
from recon.priors.base import Card, Prior
from recon.priors.compute import in_chunks, require_chunk
from recon.priors.superposition import ScoreSum, equal_shares, log_density
from recon.priors.wrapped import sigma_data_of
from recon.space import Space


class SlicesPrior(Prior):
    """Independent slices of ``space`` across ``axis``, each a draw of ``prior``.

    prior: of images (y, x) or several fields on one grid (field, y, x).  space: the prior's with one axis more, anywhere among
    the others: (z, y, x), (field, z, y, x).  chunk: slices that are given to the prior at once; recompute: keep nothing of a
    chunk for the vjp but its input (``in_chunks``).  any_plane: allow slices whose axes have other names and coordinates than
    the prior's, as sagittal slices under a prior of axial ones; that the prior suits them is then the caller's word.

    Raises InputError when the slices are not what the prior describes, or the prior has a latent of its own.
    """

    def __init__(
        self,
        prior: Prior,
        space: Space,
        axis: str = "z",
        *,
        chunk: int | None = None,
        recompute: bool = False,
        any_plane: bool = False,
    ) -> None:
        require_chunk(chunk)
        if axis not in space.dims:
            raise InputError(f"slices across {axis!r} of {space.describe()}: it has no such axis")
        if not prior.affine:
            raise InputError(f"{prior.card.name!r} has a latent of its own; slices are taken of physical volumes")
        _require_slices(prior, space, axis, any_plane)
        summary = f"independent slices across {axis} under {prior.card.name}"
        super().__init__(space, prior.schedule, Card(f"{prior.card.name} by slices", summary, prior.card.facts))
        self.latent = Space(space.dims, space.shape, space.coords, prior.latent.unit)
        self.axis = space.dims.index(axis)
        # Numbers per field lie along the first axis of a slice; the volume has one axis more to spread them over.
        self.shift, self.scale = (_spread(value, self.axis) for value in (prior.shift, prior.scale))
        self.prior, self.chunk, self.recompute = prior, chunk, recompute
        self.sigma_data = sigma_data_of(prior)

    @property
    def dtype(self) -> torch.dtype:
        return self.prior.dtype

    @property
    def slices(self) -> int:
        """How many there are in a volume."""
        return self.space.shape[self.axis]

    def predict(self, z: Tensor, sigma: Tensor) -> Tensor:
        """All slices of all draws in one batch, or in chunks of it; differentiable as the prior is.

        Volumes that stay on disk are denoised part by part.
        """
        if isinstance(z, Streamed):
            return z.each(lambda part: self.predict(part, sigma))
        images, levels = self.folded(z, sigma)
        answer = in_chunks(self.prior.predict, images, levels, self.chunk, self.recompute)
        return answer.reshape(len(z), -1, *self.prior.latent.shape).movedim(1, 1 + self.axis)

    def folded(self, z: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """The slices as a batch (n slices, *prior.latent.shape), those of a draw side by side, and their levels."""
        return z.movedim(1 + self.axis, 1).flatten(0, 1), sigma.repeat_interleave(z.shape[1 + self.axis])


@log_density.register
def _(prior: SlicesPrior, z: Tensor, sigma: Tensor) -> Tensor:
    return log_density(prior.prior, *prior.folded(z, sigma)).reshape(len(z), -1).sum(1)


def perpendicular(priors: Sequence[SlicesPrior], weights: Sequence[float] | None = None) -> ScoreSum:
    """The weighted mean of the scores of one volume's slices across several axes: a heuristic product of experts.

    weights: positive, summing to one (equal when left out).  Each expert takes its slices to be independent, so along its own
    axis it says that neighbours have nothing in common, and the mean gives that half the say.  Of Gaussian volumes with unit
    variance and covariance ``C_z x C_x`` (Kronecker), whose slices the two priors know exactly, probability flow draws ones
    with covariance ``(C_z x C_x)^{1/2}``: of smaller variance, correlated over shorter ways along both axes.  It is exact
    where neighbours have nothing in common.

    Raises InputError for fewer than two different axes, weights that are not shares, or priors of different volumes.
    """
    axes = [prior.space.dims[prior.axis] for prior in priors]
    if len(set(axes)) < 2 or len(set(axes)) < len(axes):
        raise InputError(f"perpendicular needs slices across two or more different axes; got {axes}")
    shares = equal_shares(priors) if weights is None else list(weights)
    if not (all(w > 0 for w in shares) and abs(sum(shares) - 1) <= 1e-6):
        raise InputError(f"the weights of perpendicular slices are positive and sum to 1; got {shares}")
    return ScoreSum(priors, shares)


def _spread(value: Tensor, axis: int) -> Tensor:
    if value.ndim == 0:
        return value
    # (field, 1, 1) to (field, 1, 1, 1); an axis in front of the fields moves them one place back.
    return value.unsqueeze(axis)


def _require_slices(prior: Prior, space: Space, axis: str, any_plane: bool) -> None:
    kept = tuple(d for d in space.dims if d != axis)
    shape = tuple(n for d, n in zip(space.dims, space.shape, strict=True) if d != axis)
    coords = {d: values for d, values in space.coords.items() if d != axis}
    one = Space(kept, shape, coords, space.unit)
    if any_plane and len(one.dims) == len(prior.space.dims):
        one = Space(prior.space.dims, one.shape, {}, one.unit)
    difference = prior.space.mismatch(one)
    if difference:
        hint = "" if any_plane else ", or set any_plane to use it on slices of another orientation"
        raise InputError(
            f"prior {prior.card.name!r} does not describe slices across {axis!r} of {space.describe()}: {difference}. "
            f"Choose a prior for these slices{hint}"
        )
