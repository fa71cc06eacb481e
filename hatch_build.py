"""Puts the four folders of named definitions into the wheel, as recon/_share.

An editable install gets none: there the folders beside the package are the definitions.
"""

from __future__ import annotations

from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PATTERNS = (
    "operators/*.yaml",
    "datasets/*.yaml",
    "workflows/*.yaml",
    "workflows/*.sh",
    "priors/*/card.yaml",
    "priors/*/train.yaml",
    "priors/*/weights.safetensors",
)


class ShareDefinitions(BuildHookInterface):
    def initialize(self, version, build_data):
        if version == "editable":
            return
        root = Path(self.root)
        for path in (path for pattern in PATTERNS for path in sorted(root.glob(pattern))):
            relative = path.relative_to(root).as_posix()
            build_data["force_include"][relative] = f"recon/_share/{relative}"
