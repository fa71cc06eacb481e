"""Priors: closed forms and pretrained networks, each a denoiser in physical units."""

from recon.priors.base import Card, Prior
from recon.priors.gaussian import GaussianPrior
from recon.priors.mixture import GaussianMixturePrior

__all__ = ["Card", "GaussianMixturePrior", "GaussianPrior", "Prior"]
