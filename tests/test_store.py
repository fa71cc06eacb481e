import pytest

from recon.errors import InputError
from recon.store import available, find, shipped


@pytest.fixture
def lab(tmp_path, monkeypatch):
    monkeypatch.delenv("RECON_WORKSPACE", raising=False)
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    return tmp_path


def define(root, group, name):
    path = root / group / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("summary: made up\n")
    return path


def test_the_nearest_workspace_wins(lab, monkeypatch):
    asked, variable, here = lab / "asked", lab / "variable", lab / "here"
    paths = [define(root, "operators", "scan.yaml") for root in (asked, variable, here)]
    assert find("operators", "scan").resolve() == paths[2]
    monkeypatch.setenv("RECON_WORKSPACE", str(variable))
    assert find("operators", "scan") == paths[1]
    assert find("operators", "scan", workspace=asked) == paths[0]
    assert find("operators", str(paths[2])) == paths[2]


def test_priors_are_folders_with_a_card(lab):
    card = define(lab / "here", "priors/brain", "card.yaml")
    (lab / "here/priors/empty").mkdir()
    assert find("priors", "brain").resolve() == card.parent
    assert "empty" not in available("priors")


def test_what_ships_is_listed(lab):
    names = available("datasets")
    assert {"iqoth_chest", "tcga_heldout"} <= names.keys()
    assert list(names) == sorted(names)
    assert names["iqoth_chest"].is_relative_to(shipped())


def test_unknown_names_get_a_list_and_a_suggestion(lab):
    with pytest.raises(InputError, match=r"no 'iqoth_chess' among the datasets: .*tcga_heldout.*mean 'iqoth_chest'\?"):
        find("datasets", "iqoth_chess")


@pytest.mark.parametrize("name", ["./scan.yaml", "scans/scan", "scan.yaml"])
def test_missing_paths_are_not_taken_for_names(lab, name):
    with pytest.raises(InputError, match=f"there is no file or folder {name}"):
        find("operators", name)


def test_unknown_groups_and_workspaces(lab):
    with pytest.raises(InputError, match="the groups of definitions are operators, priors"):
        find("samplers", "mmps")
    with pytest.raises(InputError, match="nowhere is not a folder"):
        available("operators", workspace="nowhere")
