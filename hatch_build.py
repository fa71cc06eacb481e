"""Puts the four folders of named definitions into the wheel, as recon/_share.

An editable install gets none: there the folders beside the package are the definitions.
"""

from __future__ import annotations

from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

GROUPS = ("operators", "priors", "datasets", "workflows")


class ShareDefinitions(BuildHookInterface):
    def initialize(self, version, build_data):
        if version == "editable":
            return
        for group in GROUPS:
            if (Path(self.root) / group).is_dir():
                build_data["force_include"][group] = f"recon/_share/{group}"
