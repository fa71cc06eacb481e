"""What ``report.json`` holds: the one source of its JSON schema, which lies beside this file as ``report.schema.json``.

A number is null where it does not exist or is not finite.  ``facts`` are the run's own words and numbers and stay open; what
the page reads of them is described with ``Evidence``.  Write the schema again with ``python -m recon.report.schema``.
"""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from recon.report.numbers import SCHEMA

FILE = "report.schema.json"
Number = float | None


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Array(_Part):
    """Names, lengths and unit of an array."""

    dims: list[str]
    shape: list[int]
    unit: str


class Weights(_Part):
    """Health of the weights; ``pareto_k`` is null for equal weights and fewer than 25 draws."""

    draws: int
    ess: float
    entropy_ess: float
    largest: float
    ancestors: int | None
    pareto_k: Number
    warnings: list[str]


class DrawsTold(_Part):
    """How many draws there are and what they are worth."""

    count: int
    ess: float
    antithetic: bool = Field(default=False, description="whether draws come in pairs with opposite noise")
    distinct: int | None
    not_finite: int
    draws_not_finite: int
    intervals: dict[str, bool] = Field(description="level -> whether central intervals of that probability exist")
    needed: dict[str, int] = Field(description="level -> effective draws from which they exist")
    weights: Weights
    particles: dict[str, Any] | None = Field(
        description="whole-run figures of coupled particles; null for independent draws"
    )


class Fit(_Part):
    """The draws against the data; see ``recon.diagnostics.data_fit``."""

    statistic: str
    data: int
    expected: Number
    variance: Number
    ratio: Number
    ratio_sd: Number
    mean_chi2: Number
    verdict: Literal["fits", "data not fitted", "noise fitted", "undefined"]
    view_dim: str
    signal_freedom: Number
    false_alarm: float
    limits: list[Number]
    autocorrelation: dict[str, Number]
    autocorrelation_sd: dict[str, Number]
    coloured: list[str]
    chi2: list[Number]


class Group(_Part):
    """chi2/m of groups of data along one dim; labels are places in ``unit`` (empty for names and numbers)."""

    dim: str
    unit: str
    labels: list[str]
    ratio: list[Number]
    sd: list[Number]
    low: list[Number]
    high: list[Number]
    outside: list[int]
    false_alarm: float


class White(_Part):
    """Residual whiteness ratio against simulated white noise."""

    ratio: Number
    expected: Number
    p: Number
    white: bool | None
    draws: int
    false_alarm: float
    reason: str


class Residuals(_Part):
    """What is left of the data."""

    groups: list[Group] = []
    whiteness: White | None = None


class Split(_Part):
    """Variance taken apart by the filtered projector, data units squared; see ``recon.diagnostics.data_prior_split``."""

    data: Number
    prior: Number
    cross: Number
    data_share: Number
    prior_share: Number
    cross_share: Number
    filter: Number
    null_share: Number
    reason: str


class Similarity(_Part):
    """Of one image to the truth: dB, 0 to 1, the quantity's unit, relative."""

    psnr: Number
    ssim: Number
    rmse: Number
    nrmse: Number


class SpreadTold(_Part):
    """Spread of the draws and, with a truth, what it is worth; in the quantity's unit.  See ``recon.diagnostics.Spread``."""

    std: Number
    mean_error: Number
    std_error: Number
    coverage: dict[str, Number]
    skill: Number
    crps: Number
    outside: Number
    outside_expected: Number
    determined: Number


class MonteCarlo(_Part):
    """rms standard errors of the maps because draws are few; ``rms_std`` is the std map's own rms."""

    mean: Number
    std: Number
    quantiles: dict[str, Number]
    ess: float
    reasons: list[str]
    rms_std: Number


class Interval(_Part):
    """Central intervals of one probability: mean width, or the reason why there are none."""

    level: float
    ess: float
    mean_width: Number
    reason: str


class Region(_Part):
    """Mean over a region, its 90 % interval and std over draws, the truth's mean, and the mean of what the data determined."""

    name: str
    pixels: int
    mean: Number
    low: Number
    high: Number
    std: Number
    truth: Number
    inside: bool | None
    determined: Number


class Slices(_Part):
    """Figures per slice of a volume along z."""

    z: list[float]
    label: str
    std: list[Number] | None
    rmse: list[Number] | None
    psnr: list[Number] | None
    ssim: list[Number] | None


class QuantityTold(_Part):
    """All figures of one variable, in its unit."""

    name: str
    kind: Literal["value", "magnitude", "phase"]
    unit: str
    pixels: int
    images: dict[str, Similarity]
    gains: dict[str, Number]
    spread: SpreadTold
    monte_carlo: MonteCarlo | None
    intervals: dict[str, Interval]
    regions: list[Region]
    slices: Slices | None


class StatementTold(_Part):
    """One line of the verdict."""

    level: Literal["good", "look", "bad", "open"]
    about: str
    text: str


class Report(_Part):
    """``report.json``, version 2."""

    schema_: Literal["recon.report/2"] = Field(alias="schema", description=SCHEMA)
    title: str
    headline: str
    verdict: list[StatementTold]
    space: Array
    measurement: Array
    draws: DrawsTold
    fit: Fit
    residuals: Residuals | None
    split: Split | None
    quantities: list[QuantityTold]
    spread: SpreadTold | None = Field(description="of the only quantity; null where there are several")
    images: dict[str, Similarity] | None
    gains: dict[str, Number] | None
    facts: dict[str, Any]


def json_schema() -> dict[str, Any]:
    """The JSON schema of ``report.json`` (draft 2020-12), made from ``Report``."""
    made = Report.model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": SCHEMA, **made}


def shipped_schema() -> dict[str, Any]:
    """The schema as the package carries it."""
    return json.loads(files("recon.report").joinpath(FILE).read_text(encoding="utf-8"))


if __name__ == "__main__":
    text = json.dumps(json_schema(), indent=2, sort_keys=True) + "\n"
    Path(__file__).with_name(FILE).write_text(text, encoding="utf-8")
