"""The words of the page, in one line each."""

from __future__ import annotations

GLOSSARY = (
    ("Draw", "one image that the prior and the data together allow; all draws together are the ensemble."),
    ("Posterior mean", "average of the draws: the smallest expected squared error, but smoother than any draw."),
    ("Posterior std", "how much the draws differ in a pixel, in the unit of the data."),
    (
        "90 % interval",
        "between order statistics at k/(M+1): holds a further draw with 90 % for any number M of draws from 19 on.",
    ),
    ("χ²/m", "squared residual over squared noise, per datum. 1 means: as far from the data as the noise is large."),
    ("Whitened residual", "measurement minus prediction, divided by the standard deviation of the noise."),
    (
        "Whiteness ratio",
        "energy of the residual's autocorrelation away from lag 0, relative to lag 0; about 1 for white noise.",
    ),
    ("False-alarm rate", "how often the verdict would blame an exact sampler."),
    ("Calibrated", "intervals of 90 % hold the truth in 90 % of many independent problems; one image cannot show it."),
    ("Spread/error", "rms std over rms error of the mean; 1 is right, below 1 is over-confident."),
    (
        "Fair CRPS",
        "distance of the whole distribution of draws from the truth, in data units; less is better, for any M.",
    ),
    (
        "Monte-Carlo error",
        "how far a map may be off only because the draws are few; it falls with the root of their number.",
    ),
    ("ESS", "effective sample size: how many equally weighted independent draws the ensemble is worth."),
    ("Ancestors", "particles of the start from which the draws descend; copies of one particle are one draw."),
    (
        "Pareto k",
        "shape of the tail of the weights; above 0.7 averages cannot be trusted however many draws there are.",
    ),
    ("Log evidence", "estimate of log p(y): compares models of the same data; its error is over repeated runs."),
    (
        "Determined by the data",
        "1 − posterior variance over prior variance: 1 where the data decided, 0 where the prior did.",
    ),
    ("Signal degrees of freedom", "how many independent numbers the data fixed, out of m."),
    ("PSNR, SSIM, RMSE", "image similarity to the truth: dB (more is better), 0 to 1 (more), data units (less)."),
    ("Exact / consistent / heuristic", "what the sampler promises: the posterior's law; its law in a limit; neither."),
)
