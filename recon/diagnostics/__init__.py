"""Figures that say how good an image, a fit to the data, or a spread of draws is."""

from __future__ import annotations

from recon.diagnostics.fit import DataFit, data_fit, source_fits
from recon.diagnostics.images import nrmse, psnr, rmse, ssim
from recon.diagnostics.samples import Distances, distances, floor, spectrum
from recon.diagnostics.spread import (
    Spread,
    coverage,
    crps,
    determined,
    ensemble_spread,
    mean_error,
    spread_skill,
    std_error,
)

__all__ = [
    "DataFit",
    "Distances",
    "Spread",
    "coverage",
    "crps",
    "data_fit",
    "source_fits",
    "determined",
    "distances",
    "ensemble_spread",
    "floor",
    "mean_error",
    "nrmse",
    "psnr",
    "rmse",
    "spectrum",
    "spread_skill",
    "ssim",
    "std_error",
]
