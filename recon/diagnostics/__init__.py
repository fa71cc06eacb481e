"""Figures that say how good an image, a fit to the data, or a spread of draws is, and what cannot be said."""

from __future__ import annotations

from recon.diagnostics.cases import Ask, Assessment, CaseRecord, assess, case_record, record_from
from recon.diagnostics.conformal import (
    Recalibration,
    Scope,
    case_need,
    recalibrate,
    recalibration_from,
    scope_of,
    stretched,
)
from recon.diagnostics.consistency import Again, SelfConsistency, self_consistency
from recon.diagnostics.features import FeatureTest, feature_test, filled
from recon.diagnostics.fit import DataFit, data_fit, source_fits
from recon.diagnostics.images import nrmse, psnr, rmse, ssim
from recon.diagnostics.intervals import Coverage, Hit, Intervals, case_coverage, coverage_over_cases, intervals
from recon.diagnostics.montecarlo import MonteCarloErrors, exceedance, monte_carlo_errors
from recon.diagnostics.ranks import (
    RankHistogram,
    case_ranks,
    probes,
    rank,
    rank_histogram,
    tarp_fraction,
    tarp_rank,
)
from recon.diagnostics.reliability import Events, Reliability, case_events, reliability_over_cases
from recon.diagnostics.residuals import GroupFit, Look, Whiteness, group_fit, whiteness
from recon.diagnostics.samples import Distances, distances, floor, spectrum
from recon.diagnostics.scores import (
    energy_score,
    fair_crps,
    spread_and_error,
    spread_skill_over_cases,
    variogram_score,
)
from recon.diagnostics.split import Bands, DataPriorSplit, data_prior_split, determined_by_band, signal_freedom
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
from recon.diagnostics.stated import Check, Share, check, covered, left_out, share
from recon.diagnostics.verdicts import Verdict, judge_all, judge_coverage, judge_ranks, judge_scores
from recon.diagnostics.weights import WeightHealth, pareto_k, weight_health

__all__ = [
    # one image, one ensemble
    "DataFit",
    "Distances",
    "FeatureTest",
    "GroupFit",
    "Intervals",
    "Look",
    "MonteCarloErrors",
    "Spread",
    "WeightHealth",
    "Whiteness",
    "coverage",
    "crps",
    "data_fit",
    "determined",
    "distances",
    "energy_score",
    "ensemble_spread",
    "exceedance",
    "fair_crps",
    "feature_test",
    "filled",
    "floor",
    "group_fit",
    "intervals",
    "mean_error",
    "monte_carlo_errors",
    "nrmse",
    "pareto_k",
    "psnr",
    "rmse",
    "source_fits",
    "spectrum",
    "spread_and_error",
    "spread_skill",
    "ssim",
    "std_error",
    "variogram_score",
    "weight_health",
    "whiteness",
    # the data against the prior
    "Bands",
    "DataPriorSplit",
    "data_prior_split",
    "determined_by_band",
    "signal_freedom",
    # many cases
    "Again",
    "Ask",
    "Assessment",
    "CaseRecord",
    "Check",
    "Coverage",
    "Events",
    "Hit",
    "RankHistogram",
    "Recalibration",
    "Reliability",
    "Scope",
    "SelfConsistency",
    "Share",
    "Verdict",
    "assess",
    "case_coverage",
    "case_events",
    "case_need",
    "case_ranks",
    "case_record",
    "check",
    "coverage_over_cases",
    "covered",
    "judge_all",
    "judge_coverage",
    "judge_ranks",
    "judge_scores",
    "left_out",
    "probes",
    "rank",
    "rank_histogram",
    "recalibrate",
    "recalibration_from",
    "record_from",
    "reliability_over_cases",
    "scope_of",
    "self_consistency",
    "share",
    "spread_skill_over_cases",
    "stretched",
    "tarp_fraction",
    "tarp_rank",
]
