r"""How wide a prior is, in its latent: the numbers that guides without a vjp put for ``Cov[z0 | z]``.

For a prior with covariance ``C`` the Gaussian answer is ``(C^-1 + sigma^-2 I)^-1``; a white one of standard deviation ``s``
gives ``r^2 = s^2 sigma^2 / (s^2 + sigma^2)``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from recon.errors import InputError
from recon.priors.base import Prior
from recon.priors.gaussian import GaussianPrior
from recon.priors.mixture import GaussianMixturePrior


def prior_spread(prior: Prior, given: float | None, user: str) -> float:
    """The standard deviation of the prior's latent values: ``given``, or what the prior itself knows.

    A Gaussian or a mixture: the root of its mean variance.  A trained network: ``sigma_data``, the standard deviation of the
    latent data it was trained on (of a prior made of networks, that of the first).
    Raises InputError naming ``user`` when neither is there, or ``given`` is not positive.
    """
    if given is not None:
        if not given > 0:
            raise InputError(f"{user} needs spread > 0; got {given}")
        return given
    if isinstance(prior, GaussianPrior):
        return float(prior.variances.mean().sqrt())
    if isinstance(prior, GaussianMixturePrior):
        return float(_total(prior).diagonal().mean().sqrt())
    for part in prior.modules():
        known = getattr(part, "sigma_data", None)
        if isinstance(known, float):
            return known
    raise InputError(
        f"{user} needs the standard deviation of the latent values, which prior {prior.card.name!r} does not state; "
        "give it as spread"
    )


def closed_covariance(prior: Prior, sigma: float, spread: float | None, user: str) -> Callable[[Tensor], Tensor]:
    """``u -> (C^-1 + sigma^-2 I)^-1 u`` on (n, *latent.shape).

    ``C``: of a Gaussian its covariance, of a mixture that of the whole, else ``s^2 I`` with ``s`` as in ``prior_spread``.
    """
    vectors: Tensor | None
    if isinstance(prior, GaussianPrior) and spread is None:
        values, vectors = prior.variances, prior.vectors
    elif isinstance(prior, GaussianMixturePrior) and spread is None:
        values, vectors = torch.linalg.eigh(_total(prior))
    else:
        s2 = prior_spread(prior, spread, user) ** 2
        return lambda u: s2 * sigma**2 / (s2 + sigma**2) * u
    gain = values * sigma**2 / (values + sigma**2)

    def shrink(u: Tensor) -> Tensor:
        flat = u.flatten(1)
        return (gain * flat if vectors is None else ((flat @ vectors) * gain) @ vectors.T).reshape(u.shape)

    return shrink


def _total(prior: GaussianMixturePrior) -> Tensor:
    """Covariance of a mixture as a whole: the mean of those of its parts and the one of their means."""
    weights = prior.log_weights.exp()
    centred = prior.means - weights @ prior.means
    within = sum(w * prior.covariance(k) for k, w in enumerate(weights))
    return within + (weights[:, None] * centred).T @ centred
