"""Plots for scripts and notebooks: an Ensemble or xarray and matplotlib axes in, artists out.

    import matplotlib.pyplot as plt
    import xarray as xr
    from recon import plot

    tree = xr.open_datatree("runs/demo/ensemble.nc", engine="h5netcdf")
    figure, axes = plt.subplots(1, 2, layout="constrained")
    plot.mean_std(tree, axes)

The report of a run is made of the same functions.  Nothing here changes a matplotlib setting, and a plot that the draws do not
allow (intervals of too few, or of collapsed particles) is refused with its reason.
"""

from __future__ import annotations

from recon.plot.canvas import Look
from recon.plot.checks import coverage, group_fit, particles, rank_histogram, region_means, regions, spread_skill
from recon.plot.inputs import ensemble_of, labelled_array
from recon.plot.maps import draws, field, intervals, mean_std, profile, refusal
from recon.plot.volumes import projection, slices, z_profile, zcuts

__all__ = [
    "Look",
    "coverage",
    "draws",
    "ensemble_of",
    "field",
    "group_fit",
    "intervals",
    "labelled_array",
    "mean_std",
    "particles",
    "profile",
    "projection",
    "rank_histogram",
    "refusal",
    "region_means",
    "regions",
    "slices",
    "spread_skill",
    "z_profile",
    "zcuts",
]
