"""From a workflow file to a report."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

__all__ = ["run"]


def run(
    path: str | Path,
    out: str | Path | None = None,
    overrides: Iterable[str] = (),
    overwrite: bool = False,
    workspace: str | Path | None = None,
) -> Path:
    """Carry out the workflow in a file, as ``recon run`` does, and return the run's folder.

    out: the folder, made if it is not there.  overrides: ``a.b=value``.  overwrite: whether a finished run may be replaced.

    Raises InputError when the file or anything it names does not fit, Stopped when it stopped at a checkpoint.
    """
    from recon.workflows import pipeline  # loads torch, which reading a file does not need

    return pipeline.run(path, out=out, overrides=overrides, overwrite=overwrite, workspace=workspace)
