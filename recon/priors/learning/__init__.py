"""Priors learnt from measurements of many objects of which none is known; ``recon.workflows.learn`` puts it to use."""

from recon.priors.learning.config import LearningConfig
from recon.priors.learning.laps import Laps, Learnt, load_learnt
from recon.priors.learning.moments import MomentFit, Moments, fit_moments, posterior_draws, posterior_means
from recon.priors.learning.observations import side_by_side

__all__ = [
    "Laps",
    "Learnt",
    "LearningConfig",
    "MomentFit",
    "Moments",
    "fit_moments",
    "load_learnt",
    "posterior_draws",
    "posterior_means",
    "side_by_side",
]
