"""What every test runs in."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session", autouse=True)
def _matrices_are_kept_in_a_temporary_folder(tmp_path_factory):
    """No test writes to the home folder; processes that a test starts inherit the variable."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECON_CACHE", str(tmp_path_factory.mktemp("matrices")))
        yield
