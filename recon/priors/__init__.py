"""Priors: closed forms and pretrained networks, each a denoiser in physical units."""

from recon.priors.base import Card, Prior
from recon.priors.compute import Accelerated, Compute, accelerate
from recon.priors.conditional import ConditionalGaussianPrior, ConditionalNetworkPrior, ConditionalPrior
from recon.priors.gaussian import GaussianPrior
from recon.priors.guidance import Guided, guided
from recon.priors.latent import LatentPrior
from recon.priors.lifting import SlicesPrior, perpendicular
from recon.priors.loading import load_prior
from recon.priors.mixture import GaussianMixturePrior
from recon.priors.network import NetworkPrior
from recon.priors.store import save_prior
from recon.priors.superposition import Mixture, ScoreSum
from recon.priors.tiling import Tiling
from recon.priors.windows import Windowed

__all__ = [
    "Accelerated",
    "Card",
    "Compute",
    "ConditionalGaussianPrior",
    "ConditionalNetworkPrior",
    "ConditionalPrior",
    "GaussianMixturePrior",
    "GaussianPrior",
    "Guided",
    "LatentPrior",
    "Mixture",
    "NetworkPrior",
    "Prior",
    "ScoreSum",
    "SlicesPrior",
    "Tiling",
    "Windowed",
    "accelerate",
    "guided",
    "load_prior",
    "perpendicular",
    "save_prior",
]
