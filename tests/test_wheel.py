"""What a user installs: the wheel carries everything recon reads, and works from a folder that knows nothing of the source."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DEFINITIONS = ("*.yaml", "*.sh", "*/card.yaml", "*/train.yaml", "*/weights.safetensors")


def called(*command: object, cwd: Path | None = None) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RECON_", "PYTHONPATH"))}
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the source distribution as an installer would."""
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    out = tmp_path_factory.mktemp("dist")
    called(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``bin`` folder of an environment with the wheel, and with the libraries of this one but not its recon."""
    place = tmp_path_factory.mktemp("environment") / "venv"
    called(sys.executable, "-m", "venv", "--without-pip", place)
    called(sys.executable, "-m", "pip", "--python", place, "install", "--quiet", "--no-deps", "--no-index", wheel)
    (site,) = place.glob("lib/python*/site-packages")
    (site / "libraries.pth").write_text(
        sysconfig.get_paths()["purelib"] + "\n"
    )  # a path only: its .pth files are not read
    return place / "bin"


def test_the_wheel_carries_definitions_templates_and_types(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    wanted = {
        f"recon/_share/{path.relative_to(ROOT).as_posix()}"
        for group in ("operators", "priors", "datasets", "workflows")
        for pattern in DEFINITIONS
        for path in (ROOT / group).glob(pattern)
    }
    assert len(wanted) > 8
    assert wanted <= names
    data = [
        p for p in (ROOT / "recon").rglob("*") if p.is_file() and p.suffix != ".py" and "__pycache__" not in p.parts
    ]
    assert {p.suffix for p in data} >= {".typed", ".j2"}
    assert {p.relative_to(ROOT).as_posix() for p in data} <= names


def test_the_wheel_carries_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"recon"}
    strays = [n for n in names if n.endswith((".pyc", ".tmp", ".log")) or "/training/" in n.removeprefix("recon/")]
    assert strays == []


def test_what_the_wheel_asks_for(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith("METADATA")]
        metadata = Parser().parsestr(archive.read(name).decode())
    needed = [line.split(";")[0].lower() for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert any(line.startswith("torch") for line in needed)
    for optional in ("mpi", "astra", "deepinv", "pydicom"):
        assert not [line for line in needed if optional in line], f"{optional} must stay optional"
    assert {"ct", "dicom", "networks", "mpi", "mpi-wheel", "laptop", "cluster"} <= set(
        metadata.get_all("Provides-Extra", [])
    )
    assert metadata["Requires-Python"] == ">=3.11"


def test_the_installed_command_finds_its_definitions(installed: Path, tmp_path: Path) -> None:
    where = called(installed / "python", "-c", "import recon; print(recon.__file__)", cwd=tmp_path).strip()
    assert Path(where).is_relative_to(installed.parent)
    listed = called(installed / "recon", "list", cwd=tmp_path)
    for group, suffix in (
        ("operators", "*.yaml"),
        ("datasets", "*.yaml"),
        ("workflows", "*.yaml"),
        ("priors", "*/card.yaml"),
    ):
        for path in (ROOT / group).glob(suffix):
            assert (path.parent.name if group == "priors" else path.stem) in listed


@pytest.mark.slow
def test_the_installed_demo_runs_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    short = ("--set", "draws=2", "--set", "sampler.steps=3", "--set", "baselines=[fbp]")
    folder = called(installed / "recon", "demo", *short, cwd=tmp_path).strip()
    run = tmp_path / folder
    assert json.loads((run / "DONE.json").read_text())["draws"] == 2
    assert (run / "ensemble.nc").stat().st_size > 1000
    assert "<html" in (run / "report.html").read_text()[:2000]
