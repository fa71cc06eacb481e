"""What every test runs in."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session", autouse=True)
def _matrices_are_kept_in_a_temporary_folder(tmp_path_factory):
    """No test writes to the home folder; processes that a test starts inherit the variable."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECON_CACHE", str(tmp_path_factory.mktemp("matrices")))
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start processes come first: of two workers, none should wait for the other's longest file at the end."""
    items.sort(key=lambda item: "workflows" not in item.path.parts)
