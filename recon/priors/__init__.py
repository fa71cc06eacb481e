"""Priors: closed forms and pretrained networks, each a denoiser in physical units."""

from recon.priors.base import Card, Prior
from recon.priors.gaussian import GaussianPrior
from recon.priors.mixture import GaussianMixturePrior
from recon.priors.network import NetworkPrior
from recon.priors.store import load_prior, save_prior

__all__ = ["Card", "GaussianMixturePrior", "GaussianPrior", "NetworkPrior", "Prior", "load_prior", "save_prior"]
