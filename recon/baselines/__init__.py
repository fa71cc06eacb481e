r"""Reconstructions without a learnt prior, to compare with: filtered back-projection, least squares, total variation.

They take an operator and measurements (n, \*range.shape) and give images (n, \*domain.shape) in physical units, each
measurement on its own: neither the batch it travels in nor a neighbour's convergence changes an answer.
"""

from recon.baselines.backprojection import fbp
from recon.baselines.fdk import fdk
from recon.baselines.least_squares import cgls
from recon.baselines.sense import adjoint_recon, cg_sense, coil_images, rss
from recon.baselines.tuning import TunedTV, tune_tv
from recon.baselines.variation import TVResult, TVSolver, total_variation, tv

__all__ = [
    "TVResult",
    "TVSolver",
    "TunedTV",
    "adjoint_recon",
    "cg_sense",
    "cgls",
    "coil_images",
    "fbp",
    "fdk",
    "rss",
    "total_variation",
    "tune_tv",
    "tv",
]
