"""Where named definitions live: the groups operators, priors, datasets and workflows.

A name is looked up as an explicit path, then in the workspace (an argument, the variable RECON_WORKSPACE, the current
folder), then in what the package ships: the folder ``_share`` of an installed package, or the root of a checkout.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from recon.errors import InputError

Group = Literal["operators", "priors", "datasets", "workflows"]
GROUPS: tuple[Group, ...] = ("operators", "priors", "datasets", "workflows")


def find(group: Group, name: str | Path, workspace: str | Path | None = None) -> Path:
    """The file (for priors: the folder) of a definition.

    name: of a definition, or a path; something that looks like a path (a separator or an ending) is never a name.

    Raises InputError for an unknown name, with the names there are and the nearest one.
    """
    _check(group)
    given = Path(name)
    if given.exists() and (_is_definition(group, given) or _looks_like_path(name)):
        return given
    if _looks_like_path(name):
        raise InputError(f"there is no file or folder {name} (wanted from the group {group})")
    names = available(group, workspace)
    if str(name) in names:
        return names[str(name)]
    near = difflib.get_close_matches(str(name), names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise InputError(f"there is no {name!r} among the {group}: {', '.join(names) or 'none found'}{hint}")


def available(group: Group, workspace: str | Path | None = None) -> dict[str, Path]:
    """Every definition of a group by name, in alphabetical order; those of the workspace hide shipped ones."""
    _check(group)
    found: dict[str, Path] = {}
    for root in _roots(workspace):
        folder = root / group
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if _is_definition(group, path):
                found.setdefault(path.name if path.is_dir() else path.stem, path)
    return dict(sorted(found.items()))


def shipped() -> Path:
    """The folder that holds the four groups the package came with."""
    package = Path(__file__).resolve().parent
    share = package / "_share"
    return share if share.is_dir() else package.parent


def _roots(workspace: str | Path | None) -> Iterator[Path]:
    if workspace is not None:
        if not Path(workspace).is_dir():
            raise InputError(f"the workspace {workspace} is not a folder")
        yield Path(workspace)
    if os.environ.get("RECON_WORKSPACE"):
        yield Path(os.environ["RECON_WORKSPACE"])
    yield Path.cwd()
    yield shipped()


def _check(group: str) -> None:
    if group not in GROUPS:
        raise InputError(f"the groups of definitions are {', '.join(GROUPS)}; got {group!r}")


def _looks_like_path(name: str | Path) -> bool:
    return isinstance(name, Path) or os.sep in name or "/" in name or name.endswith((".yaml", ".yml"))


def _is_definition(group: Group, path: Path) -> bool:
    if group == "priors":
        return (path / "card.yaml").is_file()
    return path.is_file() and path.suffix in (".yaml", ".yml")
