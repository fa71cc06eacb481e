"""``recon calibrate``: many cases with known truths through a workflow's own operator, noise, prior and sampler."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from recon.cli.processes import root


def add(commands: Any) -> argparse.ArgumentParser:  # noqa: ANN401  (a private class of argparse)
    """The command and its options, but for those that all commands on files share."""
    calibrate: argparse.ArgumentParser = commands.add_parser(
        "calibrate", help="find out, on many cases with known truths, whether a workflow is right about its uncertainty"
    )
    calibrate.add_argument("file", metavar="FILE", help="a workflow file, or the name of a shipped one")
    calibrate.add_argument("--cases", type=int, metavar="N", help="of each kind of truths (128)")
    calibrate.add_argument(
        "--fresh",
        type=int,
        default=0,
        metavar="N",
        help="and so many more, which only check the coverage that is stated (0)",
    )
    calibrate.add_argument(
        "--truths",
        choices=("prior", "data", "both"),
        help="draws of the prior (they test the sampler), held-out data (they test the prior too), or both (those there are)",
    )
    calibrate.add_argument(
        "--out", type=Path, metavar="DIR", help="the campaign's folder, new or begun (one under calibrations/)"
    )
    return calibrate


def calibrate_command(arguments: argparse.Namespace) -> int:
    """Hold the campaign, print what it found; 3 when cases failed."""
    from recon.workflows.calibrate import ENOUGH, Wanted, calibrate, failures, table

    wanted = Wanted(ENOUGH if arguments.cases is None else arguments.cases, arguments.truths, fresh=arguments.fresh)
    folder = calibrate(arguments.file, wanted, arguments.out, arguments.overrides, arguments.workspace)
    if root():
        sys.stdout.write(table(folder) + "\n")
        sys.stdout.flush()
    return 3 if failures(folder) else 0
