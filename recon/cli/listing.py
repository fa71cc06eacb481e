"""Names of definitions with the line each says about itself."""

from __future__ import annotations

from pathlib import Path

from recon.errors import InputError
from recon.store import Group, available
from recon.workflows.source import read_source


def listing(group: Group, workspace: Path | None = None, titled: bool = False) -> str:
    """One line per definition of ``group``: its name and its summary."""
    found = available(group, workspace)
    width = max((len(name) for name in found), default=0)
    lines = [f"{name:<{width}}  {summary(path)}".rstrip() for name, path in found.items()]
    text = "\n".join(lines) or f"no {group} found; they live in folders named {group}, see recon list --help"
    return f"{group}\n{text}" if titled else text


def summary(path: Path) -> str:
    """What a definition says about itself, or what is wrong with it."""
    try:
        said = read_source(path / "card.yaml" if path.is_dir() else path).data.get("summary", "")
    except InputError as error:
        return f"(unreadable: {error})"
    return " ".join(str(said or "").split())
