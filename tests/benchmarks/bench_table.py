"""Every sampler on every operator, on held-out real data: the table in docs/methods.md.

    RECON_DATA=DIR python tests/benchmarks/bench_table.py [--column NAME ...] [--method NAME ...] [--base 16] [--draws 19]
        [--truths 2] [--seconds 240] [--cell-seconds 120] [--again] [--write-only]

One call measures cells that are missing for ``--seconds`` and writes the table of what there is; call it again to go on.  What
was measured is kept in docs/methods.json, cell by cell.  ``--again`` measures anew what was measured with other sizes.

base: steps of MMPS; every other method takes as many more or fewer as in ``recon bench``.  draws: 19 is the least for 90 %
intervals; fewer are judged by the widest interval they have.  truths: held-out images.  cell-seconds: a cell that needs more is
noted as such, and tried again only when it may take longer.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from recon.datasets.fields import FieldCard, Fields, load_fields
from recon.datasets.sampling import FieldSampler, FieldSampling, image_space
from recon.datasets.slices import load_slices, locate
from recon.draws import Draws
from recon.errors import Diverged, InputError, Stopped
from recon.files import write_json, write_text
from recon.likelihoods import GaussianLikelihood
from recon.operators import Blur, CartesianMRI, CoarseGrain, CodedDiffraction, Operator, ParallelBeam, PhaseRetrieval
from recon.posterior import Posterior
from recon.priors import Prior, load_prior
from recon.priors.stationary import spectrum_of
from recon.samplers import METHODS
from recon.space import Space
from recon.store import find
from recon.workflows.bench import LOST, Case, default_steps, measure
from recon.workflows.definitions import read_definition
from recon.workflows.operators import build
from recon.workflows.scorecard import level_of

ROOT = Path(__file__).resolve().parents[2]
CELLS, PAGE = ROOT / "docs" / "methods.json", ROOT / "docs" / "methods.md"
REFERENCE = 32  # steps of MMPS in ``recon bench``
TRAINING = 64  # images that the stationary prior of the MR column is fitted to


@dataclass(frozen=True)
class Column:
    """A problem: its prior, and what makes its cases.  unit: of the CRPS."""

    about: str
    prior: Callable[[], Prior]
    case: Callable[[Prior, int], Case]
    unit: str


def noisy(
    prior: Prior, operator: Operator, truth: Tensor, sigma: Callable[[Tensor], Tensor | float], number: int
) -> Case:
    """A case with keyed Gaussian noise; sigma: of the noiseless data."""
    with torch.no_grad():
        clean = operator.A(truth[None])[0]
    level = torch.as_tensor(sigma(clean), dtype=torch.float32)
    kind = torch.complex64 if clean.is_complex() else torch.float32
    y = clean + level * Draws(number, [0]).normal(0, operator.range.shape, "data", dtype=kind)[0]
    sampled = getattr(operator, "sampled", None)
    y = y if sampled is None else sampled(y[None])[0]
    return Case(Posterior(prior, GaussianLikelihood(operator, y, level)), truth, number)


def share(part: float) -> Callable[[Tensor], float]:
    """Noise as a share of the root mean square of what was measured."""

    def sigma(clean: Tensor) -> float:
        seen = clean[clean != 0]
        return part * float(seen.abs().square().mean().sqrt())

    return sigma


@functools.cache
def slices() -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Held-out slices of 128 x 128, their pixels in metres, and their order: another patient each, while there are."""
    card = read_definition("datasets", find("datasets", "tcga_heldout"))
    found = load_slices(card, "test").coarsened(2)
    with h5py.File(locate(card.name, card.file, card.sha256, card.source)) as file:
        patients = np.asarray(file["patient"])
    _, first = np.unique(patients, return_index=True)
    return found.mu, found.pixel, [*sorted(first), *sorted(set(range(len(found))) - set(first))]


@functools.cache
def fields(name: str, part: str) -> Fields:
    card: FieldCard = read_definition("datasets", find("datasets", name))
    return load_fields(card, part)  # type: ignore[arg-type]


def spread_out(held_out: Fields, number: int) -> int:
    """Case ``number`` of fields in the order of time: far from the ones before it (the golden section of the whole)."""
    return int(((number * 0.618034) % 1.0) * len(held_out))


def ct(views: int, arc: float) -> Callable[[Prior, int], Case]:
    def case(prior: Prior, number: int) -> Case:
        mu, pixel, order = slices()
        space = Space.grid((128, 128), float(pixel[order[number]]), "1/m")
        definition = read_definition("operators", find("operators", "sparse_view_ct"))
        operator = build(definition.model_copy(update={"views": views, "arc_degrees": arc}), space)
        assert isinstance(operator, ParallelBeam)
        return noisy(prior, operator, torch.from_numpy(mu[order[number]].copy()), share(0.01), number)

    return case


def diffraction(prior: Prior, number: int) -> Case:
    mu, pixel, order = slices()
    space = Space.grid((128, 128), float(pixel[order[number]]), "1/m")
    turns = torch.floor(4 * Draws(0, range(4)).uniform(0, (128, 128), "user")).float()
    wave = CodedDiffraction(space, torch.exp(0.5j * math.pi * turns))
    truth = torch.from_numpy(mu[order[number]].copy())
    size = float(wave.A(truth[None]).abs().square().mean().sqrt())
    return noisy(prior, PhaseRetrieval(wave, "amplitude", smoothing=1e-4 * size), truth, lambda _: 0.02 * size, number)


def brain() -> Prior:
    """The trained prior where its weights are; else a stationary Gaussian fitted to training images."""
    if (ROOT / "priors" / "brain_mr" / "weights.safetensors").is_file():
        return load_prior("brain_mr")
    train = fields("openms_brain", "train").coarsened(2)
    images, _ = FieldSampler(FieldSampling(dataset="openms_brain", phase=0.5), train, 0).batch(0, TRAINING)
    space = image_space(train, True)
    prior = spectrum_of(images.reshape(-1, *space.shape), space)
    prior.sigma_data = float(prior.spectrum.mean().sqrt())  # what PiGDM and DDS ask a prior for
    return prior


def mri(prior: Prior, number: int) -> Case:
    whole = fields("openms_brain", "test").coarsened(2)
    row = spread_out(whole, number)
    one = whole.rows(slice(row, row + 1))
    values, _ = FieldSampler(FieldSampling(dataset="openms_brain", phase=0.5), one, number).batch(0, 1)
    operator = build(read_definition("operators", find("operators", "mri_4x")), prior.space)
    assert isinstance(operator, CartesianMRI)
    return noisy(prior, operator, values.reshape(prior.space.shape), share(0.02), number)


def weather(prior: Prior, number: int) -> Tensor:
    held_out = fields("era_interim_iberia", "test")
    return torch.from_numpy(held_out.values[spread_out(held_out, number)].copy()).reshape(prior.space.shape)


def stations(prior: Prior, number: int) -> Case:
    operator = build(read_definition("operators", find("operators", "stations")), prior.space)
    size = prior.scale.float().expand(prior.space.shape).contiguous()
    return noisy(prior, operator, weather(prior, number), lambda _: 0.1 * operator.A(size[None])[0], number)


def downscaling(prior: Prior, number: int) -> Case:
    operator = CoarseGrain(prior.space, {"lat": 11 / 4, "lon": 13 / 5})
    size = prior.scale.float().expand(prior.space.shape).contiguous()
    return noisy(prior, operator, weather(prior, number), lambda _: 0.02 * operator.A(size[None])[0], number)


def blur(prior: Prior, number: int) -> Case:
    """Sea surface temperature; on land the field is a number without meaning, which is left out of every score."""
    held_out = fields("oisst_tasmania", "test")
    row = spread_out(held_out, number)
    known = torch.from_numpy(held_out.known[row, 0].copy()) if held_out.known is not None else None
    truth = torch.from_numpy(held_out.values[row, 0].copy())
    if known is not None:
        truth = torch.where(known, truth, float(prior.shift))
    steps = torch.arange(-4.0, 5.0)
    row_kernel = torch.exp(-(steps**2) / (2 * 1.5**2))
    kernel = row_kernel[:, None] * row_kernel
    operator = Blur(prior.space, kernel / kernel.sum(), boundary="reflect")
    case = noisy(prior, operator, truth, lambda _: 0.05 * float(prior.scale), number)
    return Case(case.posterior, truth, number, known)


COLUMNS = {
    "stations": Column("20 stations read three variables of weather over Iberia, noise 10 % of the prior's spread",
                       lambda: load_prior("weather_iberia"), stations, "sd"),
    "downscaling": Column("means over 4 x 5 coarse cells of 11 x 13 fine ones of the same, noise 2 %",
                          lambda: load_prior("weather_iberia"), downscaling, "sd"),
    "blur": Column("sea surface temperature, 32 x 32, Gaussian blur of 1.5 cells, noise 0.13 K; scored at sea",
                   lambda: load_prior("sst_tasmania"), blur, "K"),
    "MRI 4x": Column("8 coils, a quarter of the columns of k-space, brain slices of 128 x 128, noise 2 %", brain, mri, "1"),
    "sparse-view CT": Column("60 views over 180 degrees, 128 x 128, noise 1 %", lambda: load_prior("ct_axial"),
                             ct(60, 180.0), "1/m"),
    "limited-angle CT": Column("120 views over 120 degrees, 128 x 128, noise 1 %", lambda: load_prior("ct_axial"),
                               ct(120, 120.0), "1/m"),
    "phase retrieval": Column("amplitudes behind 4 masks of phases, CT slices of 128 x 128, noise 2 %",
                              lambda: load_prior("ct_axial"), diffraction, "1/m"),
}  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """How much is measured; see the module."""

    base: int
    draws: int
    truths: int
    limit: float

    def steps(self, method: str) -> int:
        """Of a method."""
        return max(2, round(default_steps(method) * self.base / REFERENCE))


def weights(prior: Prior) -> str:
    """First digits of the weights' checksum, or what stands in their place."""
    facts = prior.card.facts.get("weights")
    return facts["sha256"][:12] if isinstance(facts, dict) else f"fitted to {TRAINING} training images"


def cell(found: list[Case], method: str, sizes: Sizes) -> dict[str, Any]:
    """The figures of one method on the cases of one column, or why there are none."""
    steps = sizes.steps(method)
    told: dict[str, Any] = {"steps": steps, "draws": sizes.draws, "truths": sizes.truths, "base": sizes.base}
    start = time.monotonic()
    try:
        sampler = METHODS[method](steps=steps)
        parts = [measure(case, sampler, sizes.draws, None, start + sizes.limit)[0] for case in found]
    except InputError as error:
        return {**told, "status": "refused", "why": str(error)}
    except Diverged as error:
        return {**told, "status": "diverged", "why": str(error)}
    except Stopped:
        return {**told, "status": "too slow", "why": f"more than {sizes.limit:.0f} s", "limit": sizes.limit}
    scores = [part.score for part in parts if part.score is not None]
    lost = min(s.quality for s in scores)
    if lost < LOST:
        return {**told, "status": "diverged", "why": f"its draws are finite and far from anything: {lost:.0f} dB"}
    covered = [s.coverage for s in scores if s.coverage is not None]
    return {
        **told,
        "status": "measured",
        "quality": float(np.mean([s.quality for s in scores])),
        "crps": float(np.mean([s.crps for s in scores])),
        "coverage": float(np.mean(covered)) if covered else None,
        "chi2": float(np.mean([part.chi2 for part in parts])),
        "seconds": float(np.mean([part.seconds for part in parts])),
    }


def wanted(known: dict[str, Any] | None, sizes: Sizes, prior: str, again: bool) -> bool:
    """Whether a cell is to be measured: it is missing, was measured with another prior, or ran out of time."""
    if known is None or known["prior"] != prior:
        return True
    if known["status"] == "too slow" and known["limit"] < sizes.limit:
        return True
    return again and (known["base"], known["draws"], known["truths"]) != (sizes.base, sizes.draws, sizes.truths)


def fill(cells: dict[str, Any], chosen: argparse.Namespace) -> int:
    """Measure what is missing until the time is up; returns how many cells are left."""
    sizes = Sizes(chosen.base, chosen.draws, chosen.truths, chosen.cell_seconds)
    end, left = time.monotonic() + chosen.seconds, 0
    for name in chosen.column or COLUMNS:
        prior = COLUMNS[name].prior()
        label = f"{prior.card.name} ({weights(prior)})"
        missing = [m for m in chosen.method or METHODS if wanted(cells.get(f"{name}/{m}"), sizes, label, chosen.again)]
        if not missing or time.monotonic() > end:
            left += len(missing)
            continue
        found = [COLUMNS[name].case(prior, number) for number in range(sizes.truths)]
        for method in missing:
            if time.monotonic() > end:
                left += 1
                continue
            made = cell(found, method, sizes) | {"prior": label}
            cells[f"{name}/{method}"] = made | {"date": datetime.now(UTC).date().isoformat()}
            write_json(CELLS, cells)
            sys.stdout.write(f"{name:17} {method:14} {shown(made, [])}\n")
            sys.stdout.flush()
    return left


def shown(made: dict[str, Any] | None, reasons: list[str]) -> str:
    """A cell of the page; its reason is added to ``reasons`` where it has one."""
    if made is None:
        return "not measured yet"
    if made["status"] != "measured":
        if made["why"] not in reasons:
            reasons.append(made["why"])
        return f"{made['status']} [{reasons.index(made['why']) + 1}]"
    inside = "-" if made["coverage"] is None else f"{100 * made['coverage']:.0f} %"
    crps = "-" if not math.isfinite(made["crps"]) else f"{made['crps']:.3g}"
    return f"{made['quality']:.1f} / {crps} / {inside}"


def page(cells: dict[str, Any]) -> str:
    """docs/methods.md."""
    reasons: list[str] = []
    rows = []
    for method in METHODS:
        rows.append(f"| `{method}` | {' | '.join(shown(cells.get(f'{c}/{method}'), reasons) for c in COLUMNS)} |")
    missing = sum(f"{c}/{m}" not in cells for c in COLUMNS for m in METHODS)
    setting = []
    for name, column in COLUMNS.items():
        mine = {m: cells[f"{name}/{m}"] for m in METHODS if f"{name}/{m}" in cells}
        sizes = sorted({(c["draws"], c["base"], c["truths"]) for c in mine.values()})
        told = "; ".join(
            f"{d} draws, base {b}, {t} truth{'s' * (t > 1)}, intervals {level_of(d):.0%}" for d, b, t in sizes
        )
        priors, dates = ({c[key] for c in mine.values()} for key in ("prior", "date"))
        cells_of = [
            told or "-",
            ", ".join(sorted(priors)) or "-",
            " to ".join(sorted({min(dates), max(dates)})) if dates else "-",
        ]
        setting.append(f"| {name} | {column.about} | {column.unit} | {' | '.join(cells_of)} |")
    bases = sorted({c["base"] for c in cells.values()})
    steps = [f"| `{m}` | {' | '.join(str(Sizes(b, 2, 1, 0).steps(m)) for b in bases)} |" for m in METHODS]
    processor = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    machine = f"{processor}, {os.cpu_count()} cores, torch {torch.__version__}"
    to_do = (
        f"{missing} of {len(COLUMNS) * len(METHODS)} cells are not measured yet; the command above goes on with them."
        if missing
        else "Every cell is measured or has its reason."
    )
    return PAGE_TEXT.format(
        columns=" | ".join(COLUMNS), rule="|".join(["---"] * (len(COLUMNS) + 1)), rows="\n".join(rows),
        settings="\n".join(setting), reasons="\n".join(f"{i}. {why}" for i, why in enumerate(reasons, 1)) or "none",
        steps="\n".join(steps), bases=" | ".join(f"base {b}" for b in bases), bars="|".join(["---"] * (len(bases) + 1)),
        to_do=to_do, machine=machine, date=datetime.now(UTC).date().isoformat(),
    )  # fmt: skip


PAGE_TEXT = """\
# Methods by operator

Generated on {date} by this command, which measures what is missing, a few minutes at a time:

```sh
RECON_DATA=DIR python tests/benchmarks/bench_table.py --seconds 240
```

{to_do}

Each method runs with its own defaults and the steps below, on real images that no prior has seen, with simulated noise.  A
cell says: quality of the posterior mean in dB / fair CRPS / share of the truth inside the central intervals.  Quality is the
PSNR (peak: the truth's range); for weather, whose variables have units of their own, `-20 log10` of the error in standard
deviations of the truth.  Smaller CRPS is better.  Coverage should be the nominal value of the interval (in the settings);
"-" where particles are worth too few draws for one.  Few draws and few truths: differences of some tenths of a dB, or of a few
per cent, mean nothing.  "Too slow" is what did not end within the time it was given; `--cell-seconds` gives it more.
`recon bench FILE` measures the same on your own problem, with error bars.

| | {columns} |
|{rule}|
{rows}

## Why cells have no figures

{reasons}

## Settings

| column | problem | CRPS in | sizes | prior (sha256 of its weights) | measured |
|---|---|---|---|---|---|
{settings}

Machine: {machine}.

| steps | {bases} |
|{bars}|
{steps}
"""


def main() -> None:
    """Measure for a while, then write the page."""
    options = argparse.ArgumentParser()
    options.add_argument("--column", action="append", choices=COLUMNS)
    options.add_argument("--method", action="append", choices=METHODS)
    options.add_argument("--base", type=int, default=16)
    options.add_argument("--draws", type=int, default=19)
    options.add_argument("--truths", type=int, default=2)
    options.add_argument("--seconds", type=float, default=240.0)
    options.add_argument("--cell-seconds", type=float, default=120.0)
    options.add_argument("--again", action="store_true")
    options.add_argument("--write-only", action="store_true")
    chosen = options.parse_args()
    cells = json.loads(CELLS.read_text()) if CELLS.is_file() else {}
    left = 0 if chosen.write_only else fill(cells, chosen)
    PAGE.parent.mkdir(exist_ok=True)
    write_text(PAGE, page(cells))
    sys.stdout.write(f"{PAGE}; {left} cells of what was asked are left\n")


if __name__ == "__main__":
    main()
