"""What a run may say about its uncertainty because of campaigns that were held before.

A run cites a campaign of exactly its own identity; one that differs anywhere leaves it *unverified*, and says where.  Per
quantity:

* *verified*: every population of the campaign found it calibrated;
* *recalibrated*: it was not, but cases like the campaign's are covered when its intervals are stretched by ``factor`` standard
  deviations of the draws on either side (conformal; below 0 they shrink);
* *unverified*: neither.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from recon import __version__
from recon.errors import InputError
from recon.workflows.calibration import FILE, changes, identity_of, read_calibration, scope_text
from recon.workflows.problem import Job
from recon.workflows.schema import Workflow

log = logging.getLogger("recon.calibrate")

FOLDER = "calibrations"


def homes(workspace: str | Path | None = None) -> list[Path]:
    """Where campaigns are kept and looked for: ``calibrations`` of the workspace, of RECON_WORKSPACE, of this folder."""
    given = (workspace, os.environ.get("RECON_WORKSPACE"), Path.cwd())
    return [Path(root) / FOLDER for root in given if root]


def places(run: Path, workspace: str | Path | None = None) -> list[Path]:
    """Where a run in the folder ``run`` looks for campaigns: ``homes``, and beside itself."""
    beside = Path(run).resolve().parent
    return [*homes(workspace), beside / FOLDER, beside]


def calibration_for(workflow: Workflow, job: Job, folders: Iterable[Path], draws: int | None = None) -> dict[str, Any]:
    """What campaigns in ``folders`` (each a campaign's folder, or one that holds such) say about a run of ``workflow``.

    Returns ``facts["calibration"]``: status, text, date, cases, scope (name -> text), quantities (name -> {status, text,
    and factor where there is one}).  draws: that the run has, where it lost some.  Of several campaigns the last counts.
    Files that cannot be read are left out with a warning.
    """
    ours = {**identity_of(workflow, job), "draws": draws or workflow.draws}
    known = []
    for path in _files(folders):
        try:
            one = read_calibration(path)
            cited(one)  # a run must not end on somebody's damaged file
        except (InputError, KeyError, TypeError, AttributeError) as error:
            log.warning("%s is left out: %s", path, error)
        else:
            known.append(one)
    bare = {"status": "unverified", "date": None, "cases": 0, "scope": scope_text(ours), "quantities": {}}
    if not known:
        return {**bare, "text": "there is no calibration campaign of this configuration (recon calibrate)"}
    differences = [changes(one["identity"], ours) + elsewhere(one, job) for one in known]
    fewest = min(len(d) for d in differences)
    nearest = [(one, d) for one, d in zip(known, differences, strict=True) if len(d) == fewest]
    chosen, different = max(nearest, key=lambda pair: (pair[0]["date"], cases_of(pair[0])))
    if not different:
        return cited(chosen)
    text = f"the campaign of {chosen['date']} does not hold here: {'; '.join(different)}"
    quantities = {name: {"status": "unverified", "text": text} for name in cited(chosen)["quantities"]}
    return {**bare, "text": text, "quantities": quantities}


def _files(folders: Iterable[Path]) -> list[Path]:
    found = {}
    for folder in folders:
        for path in (folder / FILE, *sorted(folder.glob(f"*/{FILE}"))):
            if path.is_file():
                found[path.resolve()] = path
    return list(found.values())


def elsewhere(one: Mapping[str, Any], job: Job) -> list[str]:
    """Where the grid is finer or coarser than that of every case."""
    domain = job.operator.domain
    here = domain.spacing(domain.dims[-1])
    ranges = [p["spacing"] for p in one["populations"].values() if p["spacing"]]
    if here is None or not ranges:
        return []
    low, high = min(r[0] for r in ranges), max(r[1] for r in ranges)
    if low * (1 - 1e-3) <= here <= high * (1 + 1e-3):
        return []
    return [f"spacing along {domain.dims[-1]} is {here:.4g}, in the campaign {low:.4g} to {high:.4g}"]


def cases_of(calibration: Mapping[str, Any]) -> int:
    """Cases that were judged, of all populations."""
    return sum(p["cases"] for p in calibration["populations"].values())


def cited(calibration: Mapping[str, Any]) -> dict[str, Any]:
    """``facts["calibration"]`` of a run with the identity of ``calibration``."""
    populations = calibration["populations"]
    names = dict.fromkeys(name for p in populations.values() for name in p["quantities"])
    quantities = {name: _status(name, populations) for name in names}
    intervals = [
        name for name in names if any(p["quantities"].get(name, {}).get("interval") for p in populations.values())
    ]
    if all(p["finding"] == "calibrated" for p in populations.values()):
        status = "verified"
    elif intervals and all(quantities[name]["status"] != "unverified" for name in intervals):
        status = "recalibrated"
    else:
        status = "unverified"
    parts = [f"{p['cases']} cases ({p['about']}): {p['finding']}, {p['reason']}" for p in populations.values()]
    version = "" if calibration["recon"] == __version__ else f" (by recon {calibration['recon']})"
    text = f"campaign of {calibration['date']}{version}, same operator, noise, prior, sampler and draws; {'; '.join(parts)}"
    if status == "recalibrated":
        text += "; intervals are right after the stretch given with each"
    about = "; ".join(p["about"] for p in populations.values())
    scope = {**scope_text(calibration["identity"]), "truths": about}
    return {
        "status": status,
        "text": text,
        "date": calibration["date"],
        "cases": cases_of(calibration),
        "scope": scope,
        "quantities": quantities,
    }


def _status(name: str, populations: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Of one quantity; the data's factor counts before the prior's, since it is what a user meets."""
    seen = {key: p["quantities"][name] for key, p in populations.items() if name in p["quantities"]}
    text = "; ".join(f"{key} truths: {q['finding']}, {q['reason']}" for key, q in seen.items())
    if len(seen) == len(populations) and all(q["finding"] == "calibrated" for q in seen.values()):
        return {"status": "verified", "text": text}
    told = next((seen[key] for key in ("data", *seen) if key in seen), None)
    if told is not None and told["factor"] is not None:
        factor, after = told["factor"], told.get("stretched") or {}
        words = "stretched" if factor >= 0 else "shrunk"
        more = f"covers when {words} by {abs(factor):.3g} std of the draws on either side"
        if after.get("mean") is not None:
            error = "" if after["error"] is None else f" ± {100 * after['error']:.1f}"
            more += f": then {100 * after['mean']:.1f}{error} % of the truth, each case by the stretch of the others"
        return {"status": "recalibrated", "text": f"{text}; {more}", "factor": factor}
    return {"status": "unverified", "text": text}
