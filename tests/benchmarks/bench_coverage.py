"""Do 90 % intervals of the recommended sampler hold 90 % of held-out truth, and does the stated coverage hold on fresh cases?

    RECON_DATA=DIR python tests/benchmarks/bench_coverage.py [ct] [mr] [--cases 20] [--fresh 20] [--set KEY=VALUE] [--out DIR]

ct: slices of patients whom the prior ``ct_axial`` never saw (``tcga_heldout``: 45 slices of 27 patients), 60 views,
1e5 photons.  mr: slices of the held-out patient of ``brain_mr`` (three contrasts of one patient), a quarter of k-space in
8 coils, noise 5 %.  Both by ``recon calibrate`` on the shipped workflows' problem, MMPS and 19 draws, the fewest that have
90 % intervals; a stopped campaign goes on with the same command.  ``--set`` is that of ``recon``;
``sampler.covariance=closed`` takes a tenth of the time.

Printed per kind of interval, over cases: coverage as drawn; stretched by the promise for the next case; stretched by the
best guess; each as the calibration cases state it (every case by the stretch of the others) and as fresh cases show it,
whether the two agree within 2 points, and from how many cases on either side that could be decided.  A case is one slice;
"each tile": means of up to 64 tiles of 16 x 16 pixels of it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from recon.workflows.calibrate import Wanted, calibrate
from recon.workflows.calibration import FILE, read_calibration

PROBLEMS = {
    "ct": ("sparse_view_ct", ["problem.dataset=tcga_heldout", "baselines=[]", "sampler.steps=16", "draws=19"]),
    "mr": ("cartesian_mri", ["sampler.steps=16", "draws=19"]),
}
KINDS = {"raw": "as drawn", "stretched": "stretched, promise", "estimated": "stretched, best guess"}


def told(folder: Path) -> str:
    """The findings in ``folder`` as a table."""
    found = read_calibration(folder / FILE)["populations"]["data"]
    lines = [f"{found['about']}", f"{'interval':42s}{'how':24s}{'stated':>14s}{'fresh':>14s}  within 2 points"]
    checks = (found["fresh"] or {"intervals": {}})["intervals"]
    for name, quantity in found["quantities"].items():
        for kind, words in KINDS.items():
            one = checks.get(name, {}).get(kind)
            if one is not None:
                answer = one["decision"] + (f" (needs {one['cases_needed']})" if one["cases_needed"] else "")
                lines.append(f"{name:42s}{words:24s}{_share(one['stated']):>14s}{_share(one['shown']):>14s}  {answer}")
        if name not in checks and quantity["interval"]:
            lines.append(f"{name:42s}{quantity['finding']}: {quantity['reason']}")
    fresh = found["fresh"] or {"cases": 0, "failed": 0}
    return "\n".join(
        [*lines, f"{found['cases']} cases and {fresh['cases']} fresh ones, {fresh['failed']} of these failed"]
    )


def _share(part: dict) -> str:
    if part["mean"] is None:
        return "-"
    return f"{100 * part['mean']:.1f}" + ("" if part["error"] is None else f" +- {100 * part['error']:.1f}")


def main() -> None:
    """Hold the campaigns that are asked for, or go on with them, and print what they found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problems", nargs="*", default=list(PROBLEMS), help="ct, mr")
    parser.add_argument("--cases", type=int, default=20)
    parser.add_argument("--fresh", type=int, default=20)
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--out", type=Path, help="the folder of the campaigns (default: in the workspace)")
    given = parser.parse_args()
    for name in given.problems:
        workflow, changes = PROBLEMS[name]
        out = None if given.out is None else given.out / name
        wanted = Wanted(given.cases, "data", fresh=given.fresh)
        folder = calibrate(workflow, wanted, out, [*changes, *given.overrides])
        sys.stdout.write(f"{name}: {told(folder)}\n{folder}\n\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
