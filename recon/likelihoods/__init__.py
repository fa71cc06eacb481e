r"""log p(y | x) per draw: an operator, a measurement and its noise.

One convention everywhere: the constant is included, so that ``exp(log_prob)`` sums or integrates to 1 over the measurements,
and there is one number per draw, never a sum or norm over draws.
"""

from recon.likelihoods.base import Likelihood
from recon.likelihoods.counts import PoissonLikelihood, TransmissionLikelihood
from recon.likelihoods.gaussian import GaussianLikelihood
from recon.likelihoods.stacked import StackedLikelihood

__all__ = [
    "GaussianLikelihood",
    "Likelihood",
    "PoissonLikelihood",
    "StackedLikelihood",
    "TransmissionLikelihood",
]
