r"""How wide a prior is, in its latent: the numbers that guides without a vjp put for ``Cov[z0 | z]``.

For a prior with covariance ``C`` the Gaussian answer is ``(C^-1 + sigma^-2 I)^-1``; a white one of standard deviation ``s``
gives ``r^2 = s^2 sigma^2 / (s^2 + sigma^2)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from recon.errors import InputError
from recon.priors.base import Prior
from recon.priors.closed import shrinkage, variance


def prior_spread(prior: Prior, given: float | None, user: str) -> float:
    """The standard deviation of the prior's latent values: ``given``, or what the prior itself knows.

    A closed form (``priors.closed``), or volumes of slices of one: the root of its mean variance.  A trained network:
    ``sigma_data``, the standard deviation of the latent data it was trained on (of a prior made of networks, that of the
    first).
    Raises InputError naming ``user`` when neither is there, or ``given`` is not positive.
    """
    if given is not None:
        if not given > 0:
            raise InputError(f"{user} needs spread > 0; got {given}")
        return given
    own = variance(prior)
    if own is not None:
        return math.sqrt(own)
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

    ``C``: of a closed form its covariance, slice by slice where it is one of volumes, else ``s^2 I`` with ``s`` as in
    ``prior_spread``.
    """
    own = shrinkage(prior, sigma) if spread is None else None
    if own is not None:
        return own
    s2 = prior_spread(prior, spread, user) ** 2
    return lambda u: s2 * sigma**2 / (s2 + sigma**2) * u
