"""What an import costs: nothing heavy before it is needed, and every module on its own."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "recon"
MODULES = sorted(
    ".".join(("recon", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if path.name != "__main__.py"
)
HEAVY = ("torch", "numpy", "scipy", "xarray", "deepinv", "sigpy", "astra", "matplotlib", "mpi4py", "h5py", "pandas")
LONGEST = 0.3  # seconds for `recon --help`, of which the interpreter takes a few hundredths


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


LOADED = f"import sys; print([m for m in {HEAVY!r} if m in sys.modules])"


@pytest.mark.parametrize(
    "code",
    [
        "import recon",
        "import recon.cli; recon.cli.parser()",
        "import recon.cli; recon.cli.main(['list'])",
        "import recon.workflows",
    ],
)
def test_nothing_heavy_is_loaded(code: str) -> None:
    assert python(f"{code}; {LOADED}").splitlines()[-1] == "[]"


def test_the_check_above_sees_torch() -> None:
    assert "torch" in python(f"import recon.samplers; {LOADED}")


def test_help_is_quick() -> None:
    def once() -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "recon", "--help"], capture_output=True, check=True)
        return time.perf_counter() - start

    assert min(once() for _ in range(5)) < LONGEST


ALONE = """
import os, sys, traceback
import matplotlib, numpy, pydantic, scipy, torch, xarray  # what takes the time, once; none of them is recon's

first = {}  # package -> what is loaded once it is
for module in sys.argv[1:]:
    package = module.rpartition(".")[0]
    while package and package not in first:
        package = package.rpartition(".")[0]
    if module in first.get(package, ()):
        continue  # to import it is to import its package first, and that has shown that it can be imported
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            __import__(module)
            os.write(theirs, " ".join(name for name in sys.modules if name.startswith("recon")).encode())
        except BaseException:
            print(module, traceback.format_exc(), flush=True)
        os._exit(0)
    os.close(theirs)
    with open(ours) as said:
        first[module] = set(said.read().split())
    if os.waitpid(child, 0)[1]:
        print(module, "ended its process", flush=True)
"""


def alone(*modules: str) -> str:
    """What went wrong when each module was the first of recon to be imported; packages come before what is in them."""
    done = subprocess.run([sys.executable, "-c", ALONE, *modules], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow  # a process for each of some 280 modules
def test_each_module_imports_on_its_own() -> None:
    assert len(MODULES) > 20
    assert sorted(MODULES) == MODULES  # a package's name is shorter than those inside
    assert alone(*MODULES) == ""


def test_a_module_that_does_not_import_is_seen() -> None:
    assert "recon.absent" in alone("recon", "recon.operators", "recon.space", "recon.absent")


def test_a_circle_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two modules that need each other: importing either first fails."""
    package = tmp_path / "reconnoitre"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "one.py").write_text("from reconnoitre.two import b\na = 1\n")
    (package / "two.py").write_text("from reconnoitre.one import a\nb = 2\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert "reconnoitre.one" in alone("reconnoitre", "reconnoitre.one")
