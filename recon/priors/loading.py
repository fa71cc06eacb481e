"""One door to every prior: recon's own by name, and anyone's checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from recon.errors import InputError
from recon.priors import store
from recon.priors.base import Prior
from recon.space import Space
from recon.store import find

Numbers = float | Sequence[float]


def load_prior(
    name_or_path: str | Path,
    workspace: str | Path | None = None,
    format: str | None = None,
    space: Space | None = None,
    normalisation: tuple[Numbers, Numbers] | None = None,
    config: Mapping[str, Any] | str | Path | None = None,
    sha256: str | Mapping[str, str] | None = None,
) -> Prior:
    """A prior by its name, its folder, or the file (for diffusers: the folder) of a checkpoint from anywhere.

    A name or a folder with a ``card.yaml`` needs nothing else; its weights are checked against its card.  A bare checkpoint
    is asked for with its ``format`` (one of ``checkpoints.FORMATS``, or "auto" to recognise it by the names of its tensors),
    the ``space`` of its images in physical units and its ``normalisation``: ``shift, scale`` of ``x = shift + scale * z``
    with ``z`` the network's pixel values (``checkpoints.pixel_range`` makes them of a range).  config and sha256: see
    ``load_checkpoint``.

    Nothing in a checkpoint is executed, nothing is downloaded.  Raises InputError for an unknown name; cards with missing,
    unknown or wrong keys; weights that are missing, changed, damaged, or of another network; a bare checkpoint without space
    or normalisation.
    """
    if format is not None:
        return _bare(Path(name_or_path), format, space, normalisation, (config, sha256))
    told = {"space": space, "normalisation": normalisation, "config": config, "sha256": sha256}
    given = [name for name, value in told.items() if value is not None]
    if given:
        raise InputError(
            f"{' and '.join(given)} are for bare checkpoints: give format too (\"auto\" recognises it); a prior with a card "
            "brings its own"
        )
    folder = find("priors", name_or_path, workspace)
    content = _card(folder)
    if isinstance(content, Mapping) and "checkpoint" in content:
        from recon.priors.foreign import load_foreign

        return load_foreign(folder, content)
    return store.read_prior(folder)


def _bare(
    path: Path, format: str, space: Space | None, normalisation: tuple[Numbers, Numbers] | None, rest: tuple[Any, Any]
) -> Prior:
    from recon.priors.checkpoints import load_checkpoint

    if space is None or normalisation is None:
        raise InputError(
            f"the checkpoint {path} does not say what its pixels mean: give space (the grid and unit of its images) and "
            "normalisation (shift, scale)"
        )
    shift, scale = normalisation
    chosen = None if format == "auto" else format
    return load_checkpoint(path, chosen, space=space, shift=shift, scale=scale, config=rest[0], sha256=rest[1])


def _card(folder: Path) -> object:
    path = folder / "card.yaml"
    if not path.is_file():
        raise InputError(
            f"{folder} is not a prior: it has no card.yaml; for a bare checkpoint give format, space and normalisation"
        )
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not YAML: {error}") from error
