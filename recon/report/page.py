"""One HTML file that opens offline, mails well and prints: no script, no external address, figures inside.

``report.html`` explains, ``report.json`` holds every number under the schema ``recon.report/1``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

from recon.files import write_json, write_text
from recon.report import figures
from recon.report.evidence import Evidence
from recon.report.numbers import numbers, plain_json
from recon.report.verdict import bare, headline, number, verdict

HTML, JSON = "report.html", "report.json"
GLOSSARY = (
    ("Draw", "one image that the prior and the data together allow; all draws together are the ensemble."),
    ("Posterior mean", "average of the draws: the smallest expected squared error, but smoother than any draw."),
    ("Posterior std", "how much the draws differ in a pixel, in the unit of the data."),
    ("χ²/m", "squared residual over squared noise, per datum. 1 means: as far from the data as the noise is large."),
    ("Whitened residual", "measurement minus prediction, divided by the standard deviation of the noise."),
    ("False-alarm rate", "how often the verdict would blame an exact sampler."),
    ("Calibrated", "intervals of 90 % hold the truth in 90 % of many independent problems; one image cannot show it."),
    ("Spread/error", "rms std over rms error of the mean; 1 is right, below 1 is over-confident."),
    ("CRPS", "distance of the whole distribution of draws from the truth, in data units; less is better."),
    ("ESS", "effective sample size: how many equally weighted independent draws the ensemble is worth."),
    ("Signal degrees of freedom", "how many independent numbers the data fixed, out of m."),
    ("PSNR, SSIM, RMSE", "image similarity to the truth: dB (more is better), 0 to 1 (more), data units (less)."),
    ("Exact / consistent / heuristic", "what the sampler promises: the posterior's law; its law in a limit; neither."),
)


def write_report(evidence: Evidence, folder: str | Path) -> Path:
    """Write ``report.html`` and ``report.json`` into ``folder``, each whole or not at all; returns the path of the page.

    The page stands alone (below 3 MB); figures are drawn in light and dark.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    values = numbers(evidence)
    statements = verdict(values)
    values["headline"] = headline(statements)
    values["verdict"] = [asdict(s) for s in statements]
    write_json(folder / JSON, values)
    write_text(folder / HTML, render(evidence, values, folder.name))
    return folder / HTML


def render(evidence: Evidence, values: Mapping[str, Any], name: str) -> str:
    """The page as text; ``values`` are those of ``numbers`` with the verdict, ``name`` is the run folder's."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(number=number, cell=cell)
    template = environment.from_string(files("recon.report").joinpath("page.html.j2").read_text(encoding="utf-8"))
    facts = values["facts"]
    sampler = dict(facts.get("sampler") or {})
    fields = sampler.pop("fields", None) or {}  # shown beside the name, not one level down
    setting = {**facts, "sampler": {**sampler, **fields}}
    return template.render(
        v=values,
        name=name,
        unit=bare(values["space"]["unit"]),
        pictures={f.__name__: f(evidence) for f in _FIGURES},
        setting=rows({k: setting[k] for k in ("operator", "noise", "sampler", "prior") if k in setting}),
        cost=rows(facts.get("cost") or {}),
        provenance=rows(facts.get("provenance") or {}),
        glossary=GLOSSARY,
    )


_FIGURES = (figures.images, figures.uncertainty, figures.measurement, figures.fit, figures.split)


def rows(values: Mapping[str, Any], above: str = "") -> list[tuple[str, str]]:
    """A nested mapping as (name, text) rows; the names of nested keys are joined by a middle dot."""
    out: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{above} · {key}" if above else str(key)
        if isinstance(value, Mapping):
            out += rows(value, name)
        elif value is not None and value != "" and value != []:
            out.append((name.replace("_", " "), cell(value)))
    return out


def cell(value: Any) -> str:  # noqa: ANN401  (any JSON value)
    """A value for a table; web addresses lose their scheme, so that the page holds nothing that looks like a link."""
    value = plain_json(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return number(value, 5)
    if isinstance(value, int):
        return f"{value:,}".replace(",", "\u202f") if abs(value) >= 10000 else str(value)
    if isinstance(value, list):
        return ", ".join(cell(v) for v in value)
    return str(value).replace("https://", "").replace("http://", "")
