r"""What closed-form priors know of themselves, seen through what wraps them: their law, their variance, their covariance.

Three questions about a prior's latent, each answered by ``None`` where the prior is not a closed form:

    closed_form(prior)        its law as one ``GaussianPrior`` or ``GaussianMixturePrior``, dense: for small spaces
    variance(prior)           the mean over entries of its variance
    shrinkage(prior, sigma)   u -> (C^-1 + sigma^-2)^-1 u with its covariance C, as cheap as its denoiser

Volumes of independent slices (``SlicesPrior``) have the block-diagonal covariance of a slice; their law is a product, so a
mixture of k components becomes one of k^n for n slices.  Other priors join by ``register``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import singledispatch

import torch
from torch import Tensor

from recon.errors import InputError
from recon.priors.base import Prior
from recon.priors.gaussian import GaussianPrior
from recon.priors.lifting import SlicesPrior
from recon.priors.mixture import GaussianMixturePrior
from recon.priors.stationary import InLatentOf, StationaryPrior
from recon.priors.superposition import Mixture
from recon.priors.wrapped import Renormalised

ClosedForm = GaussianPrior | GaussianMixturePrior
Component = tuple[Tensor, Tensor, Tensor]
Map = Callable[[Tensor], Tensor]

LARGEST, MOST = 8192, 4096
"""Of what is made dense: values of an array, components of a mixture."""


# --- The law ---------------------------------------------------------------------------------------------------------------


@singledispatch
def closed_form(prior: Prior) -> ClosedForm | None:
    """The law of the prior's latent, over ``prior.latent``; None where it is not a closed form.

    Raises InputError where it is one with too many values or components to be written out.
    """
    return None


@closed_form.register
def _(prior: GaussianPrior) -> ClosedForm | None:
    return prior


@closed_form.register
def _(prior: GaussianMixturePrior) -> ClosedForm | None:
    return prior


@closed_form.register
def _(prior: StationaryPrior) -> ClosedForm | None:
    d = _small(prior)
    eye = torch.eye(d, dtype=prior.dtype, device=prior.device).reshape(d, *prior.space.shape)
    covariance = prior.spread(eye).reshape(d, d)
    return GaussianPrior(prior.mean, 0.5 * (covariance + covariance.T), prior.space, prior.schedule)


@closed_form.register
def _(prior: InLatentOf) -> ClosedForm | None:
    return _moved(closed_form(prior.inner), prior, 1.0, torch.zeros(()))


@closed_form.register
def _(prior: Renormalised) -> ClosedForm | None:
    offset = (prior.shift - prior.inner.shift) / prior.inner.scale
    return _moved(closed_form(prior.inner), prior, 1 / prior.ratio, -offset / prior.ratio)


@closed_form.register
def _(prior: SlicesPrior) -> ClosedForm | None:
    one = closed_form(prior.prior)
    if one is None:
        return None
    _small(prior)
    parts, n = components(one), prior.slices
    if len(parts) ** n > MOST:
        raise InputError(
            f"{n} independent slices of {len(parts)} components each are a mixture of {len(parts)}^{n}, more than the {MOST} "
            "that are written out"
        )
    # Where slice k has its values in an array of the volume: row k.
    places = torch.arange(prior.latent.size).reshape(prior.latent.shape).movedim(prior.axis, 0).flatten(1)
    chosen = [_independent(places, some) for some in itertools.product(parts, repeat=n)]
    return composed(chosen, prior, isinstance(one, GaussianMixturePrior))


@closed_form.register
def _(prior: Mixture) -> ClosedForm | None:
    if prior.gate is not None:
        return None
    parts: list[Component] = []
    for part, share in zip(prior.parts, prior.numbers, strict=True):
        law = closed_form(part)
        if law is None:
            return None
        parts += [(share.log() + log_weight, mean, covariance) for log_weight, mean, covariance in components(law)]
    return composed(parts, prior, True)


def components(law: ClosedForm) -> list[Component]:
    """Log weight (), mean (d,) and covariance (d, d) of each Gaussian that ``law`` is made of."""
    if isinstance(law, GaussianPrior):
        return [(law.mean.new_zeros(()), law.mean, law.covariance())]
    return [(w, m, law.covariance(k)) for k, (w, m) in enumerate(zip(law.log_weights, law.means, strict=True))]


def composed(parts: Sequence[Component], prior: Prior, mixture: bool) -> ClosedForm:
    """The inverse of ``components``, over the latent of ``prior`` and with its levels; weights need not sum to one."""
    if not mixture:
        ((_, mean, covariance),) = parts
        return GaussianPrior(mean, covariance, prior.latent, prior.schedule)
    logs, means, covariances = (torch.stack(values) for values in zip(*parts, strict=True))
    weights = torch.softmax(logs.to(means.dtype), 0)
    return GaussianMixturePrior(means, covariances, weights, prior.latent, prior.schedule)


def _independent(places: Tensor, slices: Sequence[Component]) -> Component:
    """The Gaussian of independent slices, whose values stand at ``places`` (slice, value)."""
    size = places.numel()
    mean, covariance = slices[0][1].new_zeros(size), slices[0][2].new_zeros(size, size)
    for place, (_, centre, block) in zip(places, slices, strict=True):
        mean[place] = centre
        covariance[place[:, None], place] = block
    return torch.stack([log_weight for log_weight, _, _ in slices]).sum(), mean, covariance


def _moved(law: ClosedForm | None, prior: Prior, factor: float, offset: Tensor) -> ClosedForm | None:
    """The law of ``factor z + offset`` in the latent of ``prior``."""
    if law is None:
        return None
    shift = offset.to(law.dtype).expand(prior.latent.shape).reshape(-1)
    parts = [(w, factor * mean + shift, factor**2 * covariance) for w, mean, covariance in components(law)]
    return composed(parts, prior, isinstance(law, GaussianMixturePrior))


def _small(prior: Prior) -> int:
    if prior.latent.size > LARGEST:
        raise InputError(
            f"the covariance of {prior.card.name!r} over {prior.latent.describe()} has {prior.latent.size}^2 numbers; it is "
            f"written out up to {LARGEST} values"
        )
    return prior.latent.size


# --- Its second moments ----------------------------------------------------------------------------------------------------


@singledispatch
def variance(prior: Prior) -> float | None:
    """The variance of the prior's latent values in the mean over entries; None where it is not a closed form."""
    return None


@variance.register
def _(prior: GaussianPrior) -> float | None:
    return float(prior.variances.mean())


@variance.register
def _(prior: GaussianMixturePrior) -> float | None:
    return float(total(prior).diagonal().mean())


@variance.register
def _(prior: StationaryPrior) -> float | None:
    return float(prior.spectrum.mean())


@variance.register
def _(prior: InLatentOf) -> float | None:
    return variance(prior.inner)


@variance.register
def _(prior: Renormalised) -> float | None:
    own = variance(prior.inner)
    return None if own is None else own / prior.ratio**2


@variance.register
def _(prior: SlicesPrior) -> float | None:
    return variance(prior.prior)


@singledispatch
def shrinkage(prior: Prior, sigma: float) -> Map | None:
    """``u -> (C^-1 + sigma^-2)^-1 u`` on (n, *latent.shape), C the covariance of the latent; None where it is not known."""
    return None


@shrinkage.register
def _(prior: GaussianPrior, sigma: float) -> Map | None:
    return _filtered(prior.variances, prior.vectors, sigma)


@shrinkage.register
def _(prior: GaussianMixturePrior, sigma: float) -> Map | None:
    values, vectors = torch.linalg.eigh(total(prior))
    return _filtered(values, vectors, sigma)


@shrinkage.register
def _(prior: StationaryPrior, sigma: float) -> Map | None:
    gain = _gain(prior.spectrum, sigma)
    return lambda u: prior.filtered(u, gain)


@shrinkage.register
def _(prior: InLatentOf, sigma: float) -> Map | None:
    return shrinkage(prior.inner, sigma)


@shrinkage.register
def _(prior: Renormalised, sigma: float) -> Map | None:
    inner, ratio = shrinkage(prior.inner, sigma * prior.ratio), prior.ratio
    return None if inner is None else lambda u: inner(u) / ratio**2


@shrinkage.register
def _(prior: SlicesPrior, sigma: float) -> Map | None:
    inner = shrinkage(prior.prior, sigma)
    if inner is None:
        return None

    def by_slices(u: Tensor) -> Tensor:
        slices = u.movedim(1 + prior.axis, 1)
        return inner(slices.flatten(0, 1)).reshape(slices.shape).movedim(1, 1 + prior.axis)

    return by_slices


def total(prior: GaussianMixturePrior) -> Tensor:
    """Covariance of a mixture as a whole: the mean of those of its parts and the one of their means."""
    weights = prior.log_weights.exp()
    centred = prior.means - weights @ prior.means
    within = sum(w * prior.covariance(k) for k, w in enumerate(weights))
    return within + (weights[:, None] * centred).T @ centred


def _gain(variances: Tensor, sigma: float) -> Tensor:
    return variances * sigma**2 / (variances + sigma**2)


def _filtered(values: Tensor, vectors: Tensor | None, sigma: float) -> Map:
    gain = _gain(values, sigma)

    def shrink(u: Tensor) -> Tensor:
        flat = u.flatten(1)
        return (gain * flat if vectors is None else ((flat @ vectors) * gain) @ vectors.T).reshape(u.shape)

    return shrink
