"""One HTML file that opens offline, mails well and prints: no script, no external address, figures inside.

``report.html`` explains, ``report.json`` holds every number (its schema: ``recon.report.schema``), ``figures.nc`` the numbers
behind every figure, one group each, ``figures/*.csv`` those of curves and tables once more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

from recon.files import write_json, write_text, written_aside
from recon.report import band_figures, data_figures, figures, region_figures, volume_figures
from recon.report.evidence import Evidence
from recon.report.glossary import GLOSSARY
from recon.report.numbers import numbers, plain_json
from recon.report.panels import Picture
from recon.report.quantities import Quantity, quantities
from recon.report.tables import write_tables
from recon.report.upstream import by_variable
from recon.report.verdict import bare, calibration_rows, fixed, headline, number, verdict

HTML, JSON, DATA = "report.html", "report.json", "figures.nc"
Pictures = dict[str, Picture]
MOST = 6  # quantities whose figures are drawn; the tables hold all


def write_report(evidence: Evidence, folder: str | Path) -> Path:
    """Write ``report.html``, ``report.json``, ``figures.nc`` and ``figures/*.csv`` into ``folder``, each whole or not at all.

    Returns the page's path.  The page stands alone; figures are drawn in light and dark.
    Raises InputError for ``facts["regions"]`` that do not fit.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    values = numbers(evidence)
    statements = verdict(values)
    values["headline"] = headline(statements)
    values["verdict"] = [asdict(s) for s in statements]
    whole, each = drawn(evidence, values)
    write_json(folder / JSON, values)
    named = _named(whole, each)
    _write_data(folder / DATA, named)
    write_tables(named, folder)
    write_text(folder / HTML, render(evidence, values, (whole, each), folder.name))
    return folder / HTML


def drawn(evidence: Evidence, values: Mapping[str, Any]) -> tuple[Pictures, list[Pictures]]:
    """The figures of the run, and those of each quantity, by name; a figure that does not exist is left out."""
    made = {f.__name__: f(evidence) for f in (data_figures.measurement, data_figures.fit, data_figures.groups)}
    made |= {f.__name__: f(evidence) for f in (data_figures.split, data_figures.particles, band_figures.bands)}
    pairs = list(zip(quantities(evidence), values["quantities"], strict=True))[:MOST]
    each = [_of_quantity(q, figured, evidence.facts) for q, figured in pairs]
    return {name: picture for name, picture in made.items() if picture}, each


def _of_quantity(quantity: Quantity, figured: Mapping[str, Any], facts: Mapping[str, Any]) -> Pictures:
    table = facts.get("stations")
    if isinstance(table, dict) and "variable" in table:
        mine = [v == quantity.name for v in table["variable"]]
        table = {n: [v for v, m in zip(c, mine, strict=True) if m] for n, c in table.items()}
    volume = volume_figures.is_shown(quantity)
    made = {
        "images": volume_figures.cuts(quantity) if volume else figures.images(quantity),
        "strip": volume_figures.strip(quantity),
        "largest": volume_figures.largest(quantity),
        "uncertainty": figures.uncertainty(quantity, table),
        "intervals": figures.intervals(quantity),
        "by_slice": volume_figures.by_slice(quantity, figured["slices"]),
        "regions": region_figures.regions(quantity, facts.get("regions")),
        "determined": region_figures.determined(quantity),
    }
    return {name: picture for name, picture in made.items() if picture}


def _named(whole: Pictures, each: list[Pictures]) -> Pictures:
    """All figures by name, those of a quantity below its number where there are several."""
    named = dict(whole)
    for k, pictures in enumerate(each):
        named |= {f"quantity_{k}/{name}" if len(each) > 1 else name: picture for name, picture in pictures.items()}
    return named


def _write_data(path: Path, named: Pictures) -> None:
    """One group per figure."""
    import xarray as xr

    groups = {
        "/": xr.Dataset(attrs={"title": "the numbers behind the figures of report.html", "Conventions": "CF-1.11"})
    }
    for name, picture in named.items():
        parts = {key.replace("/", " over "): value.rename(None) for key, value in picture.data.items()}
        attrs = {"caption": picture.caption, "alt": picture.alt}
        groups[f"/{name}"] = xr.Dataset(parts, attrs=attrs) if parts else xr.Dataset(attrs=attrs)
    with written_aside(path) as aside:
        xr.DataTree.from_dict(groups).to_netcdf(aside, engine="h5netcdf")


def render(evidence: Evidence, values: Mapping[str, Any], pictures: tuple[Pictures, list[Pictures]], name: str) -> str:
    """The page as text; ``values`` are those of ``numbers`` with the verdict, ``name`` is the run folder's."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(number=number, cell=cell, bare=bare, fixed=fixed)
    template = environment.from_string(files("recon.report").joinpath("page.html.j2").read_text(encoding="utf-8"))
    facts, whole = values["facts"], pictures[0]
    sampler = dict(facts.get("sampler") or {})
    fields = sampler.pop("fields", None) or {}  # shown beside the name, not one level down
    prior = facts.get("prior")
    short = {k: prior[k] for k in _PRIOR if k in prior} if isinstance(prior, Mapping) else prior
    setting = {**facts, "sampler": {**sampler, **fields}, "prior": short or prior}
    told = rows({k: setting[k] for k in ("data", "operator", "noise", "sampler", "prior") if setting.get(k)})
    full = rows(prior) if isinstance(prior, Mapping) else []
    table = facts.get("stations")
    named = isinstance(table, Mapping) and "variable" in table and len(table["variable"]) == len(evidence.fit.per_view)
    return template.render(
        v=values,
        name=name,
        shapes=", ".join(f"{d} = {n}" for d, n in zip(values["space"]["dims"], values["space"]["shape"], strict=True)),
        pictures={n: whole.get(n) for n in ("measurement", "fit", "groups", "split", "particles", "bands")},
        quantities=_paired(values["quantities"], pictures[1]),
        left_out=[q["name"] for q in values["quantities"][MOST:]],
        by_variable=by_variable(evidence.fit, table["variable"]) if named and table else {},
        calibration=calibration_rows(facts),
        setting=told,
        card=full if len(full) > len([r for r in told if r[0].startswith("prior")]) else [],
        cost=rows(_cost(facts.get("cost") or {}, values["draws"]["count"])),
        provenance=rows(facts.get("provenance") or {}),
        glossary=GLOSSARY,
    )


_OF_QUANTITY = ("images", "strip", "largest", "uncertainty", "intervals", "by_slice", "regions", "determined")


def _paired(quantities: list[Any], each: list[Pictures]) -> list[tuple[Any, dict[str, Picture | None]]]:
    """Each quantity's numbers with its pictures, None for those that do not exist."""
    drawn = [*each, *[{}] * (len(quantities) - len(each))]
    return [(q, {n: p.get(n) for n in _OF_QUANTITY}) for q, p in zip(quantities, drawn, strict=True)]


_PRIOR = ("name", "summary", "source", "unfit_for", "held_out", "weights_licence", "sha256")


def _cost(cost: Mapping[str, Any], draws: int) -> dict[str, Any]:
    """The counts of the run, and what one draw took."""
    out = {_COST.get(name, name): value for name, value in cost.items()}
    if isinstance(cost.get("seconds"), int | float):
        out["seconds per draw"] = float(cost["seconds"]) / max(1, draws)
    return out


_COST = {
    "denoiser": "network evaluations",
    "vjp": "derivatives of the network",
    "forward": "uses of the operator",
    "adjoint": "uses of its transpose",
    "ranks": "processes",
    "workers": "threads each",
}


def rows(values: Mapping[str, Any], above: str = "") -> list[tuple[str, str]]:
    """A nested mapping as (name, text) rows; the names of nested keys are joined by a middle dot.

    A name first, then by the alphabet: a page that is written again from its files, whose keys are sorted, is the same.
    """
    out: list[tuple[str, str]] = []
    for key, value in sorted(values.items(), key=lambda item: (item[0] != "name", str(item[0]))):
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
    if isinstance(value, dict):
        return "; ".join(f"{name} {text}" for name, text in rows(value))
    return str(value).replace("https://", "").replace("http://", "")
