"""``recon calibrate``: is this sampler, with this prior, operator and noise, right about its own uncertainty?

A folder holds the campaign: ``campaign.json`` says what it is of, ``cases/`` has one file per case.  ``calibration.json``, the
findings, ``calibration.html``, which shows them, and ``cases.csv``, a row per case, are made again from the cases whenever the
command is given; nothing in them depends on the number of ranks or on how often the campaign was killed.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from recon import __version__
from recon import comm as ranks
from recon.comm import Comm
from recon.errors import InputError
from recon.files import write_json, write_text
from recon.report.campaign_page import write_campaign
from recon.workflows.calibration import FILE, SCHEMA, changes, findings, identity_of, read_calibration
from recon.workflows.campaign import conduct, load_case
from recon.workflows.cases import Campaign, Population
from recon.workflows.citation import cited, homes
from recon.workflows.outliers import as_csv
from recon.workflows.problem import Job, prepare
from recon.workflows.provenance import environment
from recon.workflows.schema import Workflow, load_workflow, resolved
from recon.workflows.truths import from_data, from_prior

log = logging.getLogger("recon.calibrate")

Truths = Literal["prior", "data", "both"]
MARK, CASES, TABLE = "campaign.json", "cases", "cases.csv"
ENOUGH = 128  # the fewest that can earn "calibrated" with 24 draws and all test functions are 125
WORDS = {
    "calibrated": "the spread of the draws can be taken at its word",
    "biased": "the draws lie to one side of the truth",
    "over-dispersed": "the draws spread too much: intervals are wider than they need be",
    "under-dispersed": "the draws spread too little: intervals hold the truth less often than they say",
    "misshapen": "place and width of the draws are right, their shape is not",
    "cannot say": "too little was seen for a verdict",
}
"""What each finding means for somebody who reads a report."""


@dataclass(frozen=True)
class Wanted:
    """What is asked of a campaign.

    cases: of each population.  truths: prior, data, or both; None is both where the workflow has a data set with other
    members, else prior.  day: noted with the cases; today in UTC by default.  fresh: further cases of each population, from
    which nothing is learnt: they check the coverage that the others state.
    """

    cases: int = ENOUGH
    truths: Truths | None = None
    day: date | None = None
    fresh: int = 0

    def __post_init__(self) -> None:
        if self.cases < 1 or self.truths not in (None, "prior", "data", "both"):
            raise InputError(
                f"a campaign takes at least 1 case with truths prior, data or both; got {self.cases}, {self.truths}"
            )
        if self.fresh < 0:
            raise InputError(f"the number of fresh cases is 0 or more; got {self.fresh}")


def calibrate(
    path: str | Path,
    wanted: Wanted | None = None,
    out: str | Path | None = None,
    overrides: Iterable[str] = (),
    workspace: str | Path | None = None,
) -> Path:
    """Hold the campaign of a workflow file, or go on with it; returns its folder, with ``calibration.json`` in it.

    out: the folder (default: one of its own per configuration, in ``calibrations`` of the workspace, where reports look).
    Raises InputError for what does not fit, or a folder that holds something else; Stopped between cases.
    """
    comm = ranks.from_environment()
    wanted = wanted or Wanted()
    workflow = load_workflow(path, overrides, workspace)
    if workflow.antithetic:
        raise InputError(
            "ranks and coverage are known of independent draws only, and these come in pairs; set antithetic: false"
        )
    job = prepare(workflow)
    campaign = campaign_of(workflow, job, wanted)
    identity = identity_of(workflow, job)
    folder = Path(out) if out is not None else default_folder(Path(path).stem, identity, workspace)
    _open(folder, {**identity, "seed": workflow.seed, "block": workflow.block}, workflow, comm)
    conduct(campaign, folder / CASES, comm, wanted.day)
    if comm.root:
        found = calibration_of(campaign, folder / CASES, identity)
        write_json(folder / FILE, found)
        write_text(folder / TABLE, as_csv(found["populations"]))
        write_campaign(found, cited(found), WORDS, folder)
    comm.draws.barrier()
    return folder


def campaign_of(workflow: Workflow, job: Job, wanted: Wanted) -> Campaign:
    """The campaign of a prepared workflow.  Raises InputError when data are asked for and there are none."""
    populations: list[Population] = []
    if wanted.truths != "data":
        populations.append(from_prior(workflow, job, wanted.cases, wanted.fresh))
    if wanted.truths != "prior":
        try:
            populations.append(from_data(workflow, job, wanted.cases, wanted.fresh))
        except InputError as error:
            if wanted.truths is not None:
                raise
            log.info("truths from the prior only: %s", error)
    return Campaign(tuple(populations), job.sampler, workflow.draws, workflow.seed, workflow.block)


def calibration_of(campaign: Campaign, folder: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    """The content of ``calibration.json``, from the files of all cases in ``folder``; a pure function of them."""
    found = {}
    for population in campaign.populations:
        contents = [load_case(folder, population.name, case) for case in range(population.total)]
        found[population.name] = findings(campaign, population, contents, identity)
    return {
        "schema": SCHEMA,
        "recon": __version__,
        "date": max(p["date"] for p in found.values()),
        "identity": dict(identity),
        "seed": campaign.seed,
        "populations": found,
    }


def default_folder(name: str, identity: Mapping[str, Any], workspace: str | Path | None = None) -> Path:
    """``calibrations/NAME-DIGEST`` in the workspace: one folder per configuration."""
    digest = sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    return homes(workspace)[0] / f"{name}-{digest}"


def _open(folder: Path, mark: Mapping[str, Any], workflow: Workflow, comm: Comm) -> None:
    """Make the folder, or see that it holds this very campaign; collective.  Raises InputError on every rank alike."""
    ours = json.loads(json.dumps({"recon": __version__, **mark}))
    path = folder / MARK
    theirs = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    if theirs is None and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is not empty and holds no campaign; choose another with --out DIR")
    if theirs is not None and theirs != ours:
        different = changes(theirs, ours)
        raise InputError(f"{folder} holds another campaign ({'; '.join(different)}); choose another with --out DIR")
    facts = environment(comm)
    comm.draws.barrier()  # nobody looks at the folder any more
    if comm.root and theirs is None:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "workflow.yaml", resolved(workflow))
        write_json(folder / "environment.json", facts)
        write_json(path, ours)
    comm.draws.barrier()


def failures(folder: Path) -> int:
    """How many cases of the campaign in ``folder`` gave no numbers."""
    return sum(p["failed"] for p in read_calibration(folder / FILE)["populations"].values())


def table(folder: Path) -> str:
    """The findings in ``folder`` as text: per population a verdict in plain words and a row per quantity; what reports say."""
    calibration = read_calibration(folder / FILE)
    lines: list[str] = []
    for found in calibration["populations"].values():
        draws = calibration["identity"]["draws"]
        failed = f", {found['failed']} failed" if found["failed"] else ""
        lines += [f"{found['about']} ({found['cases']} cases of {draws} draws{failed})"]
        lines += [f"  {found['finding']}: {WORDS[found['finding']]}; {found['reason']}"]
        rows = [("quantity", "finding", "figure", "stretch (std)")]
        rows += [_row(name, quantity) for name, quantity in found["quantities"].items()]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines += ["  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines += _told(found.get("fresh"))
        assessment = found["assessment"]
        if assessment:
            lines += ["  " + _figure("CRPS", assessment["crps"], assessment["crps_error"]), ""]
    said = cited(calibration)
    return "\n".join([*lines, f"reports of this configuration will say: {said['status']}", str(folder)])


def _told(fresh: Mapping[str, Any] | None) -> list[str]:
    """What fresh cases show of the coverage that is stated, a line per interval and kind."""
    if fresh is None:
        return []
    lines = [f"  fresh cases, which chose nothing: {fresh['cases']}, {fresh['failed']} failed"]
    for name, kinds in fresh["intervals"].items():
        for kind, one in kinds.items():
            stated, shown = (_percent(one[part]) for part in ("stated", "shown"))
            within = f"within {100 * one['tolerance']:g} points: "
            answer = {"within": "yes", "beyond": "no"}.get(one["decision"], "cannot say")
            if one["decision"] == "cannot say" and one["cases_needed"]:
                answer += f" (about {one['cases_needed']} cases on either side would)"
            lines.append(f"    {name}, {kind}: states {stated}, fresh cases show {shown}; {within}{answer}")
    return lines


def _percent(part: Mapping[str, Any]) -> str:
    if part["mean"] is None:
        return "nothing"
    return f"{100 * part['mean']:.1f}" + ("" if part["error"] is None else f" +- {100 * part['error']:.1f}") + " %"


def _row(name: str, quantity: Mapping[str, Any]) -> tuple[str, str, str, str]:
    figures, factor = quantity["figures"], quantity["factor"]
    text = "-"
    if figures.get("coverage") is not None:
        text = f"covers {100 * figures['coverage']:.1f} %"
        text += "" if figures["error"] is None else f" +- {100 * figures['error']:.1f}"
    elif figures.get("bias") is not None:
        text = f"bias {figures['bias']:+.2f}, spread {figures['spread']:.2f}"
    elif "ratio" in figures:
        text = _figure("spread/error", figures["ratio"], figures["error"])
    return name, quantity["finding"], text, "" if factor is None else f"{factor:+.3f}"


def _figure(name: str, value: float | None, error: float | None) -> str:
    if value is None:
        return f"{name} unknown"
    return f"{name} {value:.4g}" + ("" if error is None else f" +- {error:.2g}")
