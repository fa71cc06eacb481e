"""The command line.

Only what a command needs is imported, so that help, lists and errors in a file come at once.  Exit codes: 0 done, 2 bad input,
3 some cases failed, 75 stopped at a checkpoint (resume it), 1 anything else.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recon import __version__
from recon.cli import bench, calibrate
from recon.cli.processes import carried_out, root, start_logging
from recon.store import GROUPS

_EPILOG = "exit codes: 0 done, 2 bad input, 3 some cases failed, 75 stopped at a checkpoint (recon resume DIR), 1 other failure"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in ``argv`` (default: the process's own) and return its exit code."""
    arguments = parser().parse_args(argv)
    start_logging(arguments.quiet)
    return carried_out(lambda: arguments.command(arguments), debug=arguments.debug)


def parser() -> argparse.ArgumentParser:
    """Every command with its options."""
    top = argparse.ArgumentParser(
        prog="recon", description="Posterior sampling for indirect measurements with diffusion priors.", epilog=_EPILOG
    )
    top.add_argument("--version", action="version", version=f"recon {__version__}")
    top.add_argument("--quiet", action="store_true", help="say nothing but warnings, errors and the result")
    top.add_argument("--debug", action="store_true", help="show a traceback for bad input too")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)

    demo = commands.add_parser("demo", help="reconstruct an example and write its report")
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="the run's folder (runs/demo)")
    _run_options(demo, demo_command)

    run = commands.add_parser("run", help="carry out a workflow file")
    run.add_argument("file", metavar="FILE", help="a workflow file, or the name of a shipped one")
    run.add_argument("--out", type=Path, metavar="DIR", help="the run's folder (a new one under runs/)")
    _run_options(run, run_command)

    check = commands.add_parser("check", help="say what a workflow file would do, without doing it")
    check.add_argument("file", metavar="FILE")
    _file_options(check, check_command)

    resume = commands.add_parser("resume", help="go on with a run that stopped")
    resume.add_argument("folder", type=Path, metavar="DIR")
    resume.set_defaults(command=resume_command)

    report = commands.add_parser("report", help="write the report of a run again")
    report.add_argument("folder", type=Path, metavar="DIR")
    report.set_defaults(command=report_command)

    listing = commands.add_parser("list", help="list the definitions there are")
    listing.add_argument("group", nargs="?", choices=GROUPS, metavar="GROUP", help=", ".join(GROUPS))
    listing.add_argument("--workspace", type=Path, metavar="DIR", help="a folder with definitions of your own")
    listing.set_defaults(command=list_command)

    _prior_commands(commands)
    _selftest_command(commands)
    _file_options(bench.add(commands), bench.bench_command)
    _file_options(calibrate.add(commands), calibrate.calibrate_command)
    commands.add_parser("schema", help="print the JSON schema of workflow files").set_defaults(command=schema_command)
    commands.add_parser("doctor", help="say what was found here and what is wrong").set_defaults(command=doctor_command)
    return top


def _prior_commands(commands: Any) -> None:  # noqa: ANN401  (a private class of argparse)
    train = commands.add_parser("train", help="train a prior as a train.yaml says")
    train.add_argument("file", type=Path, metavar="FILE")
    train.add_argument("--out", type=Path, metavar="DIR", help="the prior's folder (that of the file)")
    train.add_argument(
        "--fresh", dest="resume", action="store_false", help="start again instead of from the checkpoint"
    )
    _file_options(train, train_command)

    learn = commands.add_parser("learn", help="learn a prior from measurements alone, as a learn.yaml says")
    learn.add_argument("file", type=Path, metavar="FILE")
    learn.add_argument("--out", type=Path, metavar="DIR", help="the prior's folder (that of the file)")
    learn.add_argument("--fresh", dest="resume", action="store_false", help="start again instead of going on")
    _file_options(learn, learn_command)

    inspect = commands.add_parser("inspect", help="draw from a prior, compare with held-out images, complete its card")
    inspect.add_argument("folder", type=Path, metavar="DIR", help="the prior's folder, with its train.yaml")
    inspect.add_argument("--draws", type=int, default=64, metavar="N", help="draws to compare (64)")
    inspect.add_argument("--steps", type=int, default=32, metavar="N", help="steps per draw (32)")
    inspect.set_defaults(command=inspect_command)


def _selftest_command(commands: Any) -> None:  # noqa: ANN401
    selftest = commands.add_parser("selftest", help="measure samplers where the exact posterior is known")
    selftest.add_argument(
        "file",
        nargs="?",
        metavar="FILE",
        help="a workflow: its operator and noise with a Gaussian prior of its spectrum",
    )
    selftest.add_argument(
        "--method", dest="methods", action="append", default=[], metavar="NAME", help="which; repeatable"
    )
    selftest.add_argument("--draws", type=int, metavar="N", help="draws of each (500, or the workflow's)")
    _file_options(selftest, selftest_command)


def _file_options(command: argparse.ArgumentParser, function: object) -> None:
    command.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="a.b=value",
        help="set a key of the file; repeatable",
    )
    command.add_argument("--workspace", type=Path, metavar="DIR", help="a folder with definitions of your own")
    command.set_defaults(command=function)


def _run_options(command: argparse.ArgumentParser, function: object) -> None:
    command.add_argument("--overwrite", action="store_true", help="replace a run that is already in the folder")
    _file_options(command, function)


def demo_command(arguments: argparse.Namespace) -> int:
    """``recon demo``: the shipped workflow ``demo``."""
    from recon.store import shipped

    arguments.file = shipped() / "workflows" / "demo.yaml"
    return run_command(arguments)


def run_command(arguments: argparse.Namespace) -> int:
    """``recon run``."""
    from recon.workflows.pipeline import run

    folder = run(
        arguments.file,
        out=arguments.out,
        overrides=arguments.overrides,
        overwrite=arguments.overwrite,
        workspace=arguments.workspace,
    )
    return _ended(folder)


def check_command(arguments: argparse.Namespace) -> None:
    """``recon check``."""
    from recon.workflows.pipeline import check

    _say(check(arguments.file, arguments.overrides, arguments.workspace))


def resume_command(arguments: argparse.Namespace) -> int:
    """``recon resume``."""
    from recon.workflows.pipeline import resume

    return _ended(resume(arguments.folder))


def report_command(arguments: argparse.Namespace) -> None:
    """``recon report``."""
    from recon.workflows.pipeline import report

    _say(str(report(arguments.folder)))


def list_command(arguments: argparse.Namespace) -> None:
    """``recon list``."""
    from recon.cli.listing import listing

    groups = [arguments.group] if arguments.group else GROUPS
    _say("\n\n".join(listing(group, arguments.workspace, titled=len(groups) > 1) for group in groups))


def train_command(arguments: argparse.Namespace) -> None:
    """``recon train``."""
    from recon.workflows.train import train

    folder = train(
        arguments.file,
        arguments.out,
        resume=arguments.resume,
        workspace=arguments.workspace,
        overrides=arguments.overrides,
    )
    _say(str(folder))


def learn_command(arguments: argparse.Namespace) -> None:
    """``recon learn``."""
    from recon.workflows.learn import learn

    folder = learn(
        arguments.file,
        arguments.out,
        resume=arguments.resume,
        workspace=arguments.workspace,
        overrides=arguments.overrides,
    )
    _say(str(folder))


def inspect_command(arguments: argparse.Namespace) -> None:
    """``recon inspect``."""
    from recon.workflows.inspection import inspect

    inspect(arguments.folder, arguments.draws, arguments.steps)
    _say(str(arguments.folder / "card.yaml"))


def selftest_command(arguments: argparse.Namespace) -> None:
    """``recon selftest``."""
    from recon.errors import CheckFailed
    from recon.workflows.selftest import selftest, table

    lines = selftest(arguments.file, arguments.methods, arguments.draws, arguments.overrides, arguments.workspace)
    _say(table(lines))
    wrong = [line.method for line in lines if line.verdict in ("wrong", "diverged")]
    if wrong:
        raise CheckFailed(f"{', '.join(wrong)}: not what is claimed; the reasons stand above")


def schema_command(arguments: argparse.Namespace) -> None:
    """``recon schema``."""
    import json

    from recon.workflows.schema import json_schema

    _say(json.dumps(json_schema(), indent=2))


def doctor_command(arguments: argparse.Namespace) -> None:
    """``recon doctor``."""
    from recon.cli.doctor import examine
    from recon.errors import CheckFailed

    findings = examine()
    _say("\n".join(str(finding) for finding in findings))
    broken = sum(finding.status == "fail" for finding in findings)
    if broken:
        raise CheckFailed(
            f"{broken} thing{'s are' if broken > 1 else ' is'} broken here; the way out stands beside each"
        )


def _ended(folder: Path) -> int:
    """Name the run's folder; 3 when its DONE.json lists cases that failed."""
    import json

    _say(str(folder))
    done = folder / "DONE.json"
    return 3 if done.is_file() and json.loads(done.read_text(encoding="utf-8")).get("failed") else 0


def _say(text: str) -> None:
    """A command's result, once, whatever the number of processes."""
    if root():
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
