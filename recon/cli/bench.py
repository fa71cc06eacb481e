"""``recon bench``: samplers side by side on a workflow's own problem."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any


def add(commands: Any) -> argparse.ArgumentParser:  # noqa: ANN401  (a private class of argparse)
    """The command and its options, but for those that all commands on files share."""
    bench: argparse.ArgumentParser = commands.add_parser(
        "bench", help="compare samplers on a workflow's problem: quality, calibration, fit, time, memory"
    )
    bench.add_argument("file", metavar="FILE", help="a workflow file, or the name of a shipped one")
    bench.add_argument(
        "--method", dest="methods", action="append", default=[], metavar="NAME", help="which; repeatable (all)"
    )
    bench.add_argument("--steps", type=int, nargs="+", default=[], metavar="N", help="numbers of steps to try of each")
    bench.add_argument("--draws", type=int, metavar="N", help="draws per case (20)")
    bench.add_argument("--cases", type=int, metavar="N", help="images, or draws that are inferred again (3)")
    bench.add_argument("--seconds", type=float, metavar="S", help="budget; what cannot finish is left out, and said")
    bench.add_argument("--json", type=Path, metavar="FILE", help="write all figures here too")
    return bench


def bench_command(arguments: argparse.Namespace) -> None:
    """Compare, print the table, write the JSON."""
    from recon.comm import serial
    from recon.files import write_json
    from recon.workflows.bench import CASES, DRAWS, Ask, bench
    from recon.workflows.bench_text import as_json, table
    from recon.workflows.provenance import environment

    ask = Ask(
        tuple(arguments.methods),
        tuple(arguments.steps),
        DRAWS if arguments.draws is None else arguments.draws,
        CASES if arguments.cases is None else arguments.cases,
        arguments.seconds,
    )
    found = bench(arguments.file, ask, arguments.overrides, arguments.workspace)
    if arguments.json is not None:
        write_json(
            arguments.json, {**as_json(found), "file": str(arguments.file), "environment": environment(serial())}
        )
    sys.stdout.write(table(found) + "\n")
    sys.stdout.flush()
