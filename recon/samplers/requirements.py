"""What methods ask of a posterior, refused in one place with the way out."""

from __future__ import annotations

from recon.errors import InputError
from recon.likelihoods import GaussianLikelihood
from recon.posterior import Posterior


def require_gaussian(posterior: Posterior, user: str) -> GaussianLikelihood:
    """The likelihood, known to be Gaussian; InputError naming ``user`` and the way out otherwise."""
    likelihood = posterior.likelihood
    if not isinstance(likelihood, GaussianLikelihood):
        raise InputError(
            f"{user} needs a GaussianLikelihood; got {type(likelihood).__name__}. Use likelihood.gaussian() "
            "(post-log data weighted by counts), or DPS, which takes any likelihood."
        )
    return likelihood


def require_affine(posterior: Posterior, user: str) -> None:
    """InputError naming ``user`` when the prior's decoder is not affine."""
    if not posterior.prior.affine:
        raise InputError(
            f"{user} solves in physical units and needs a prior with an affine decoder; "
            f"{posterior.prior.card.name!r} decodes through a network. Use a latent sampler."
        )
