"""In a browser: the page fits narrow, middle and wide windows, prints, and asks for nothing from outside."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from recon.ensemble import Ensemble
from recon.report import write_report
from tests.report.test_quantities import FIELD, PARTICLES, UNITS, evidence_on

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")]

TELL = (
    "<script>const wide=[...document.querySelectorAll('body *')].filter(e=>!e.closest('.wide,pre,.skip')"
    "&&e.getBoundingClientRect().right>document.documentElement.clientWidth+1).map(e=>e.tagName);"
    "parent.postMessage(document.documentElement.scrollWidth+' of '+document.documentElement.clientWidth+' '+wide,'*')</script>"
)


def browser(profile: Path, *options: str) -> str:
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """The page with the widest tables: several variables, particles, a calibration, long names."""
    folder = tmp_path_factory.mktemp("page")
    facts = {
        "units": UNITS,
        "prior": {"name": "x" * 80, "sha256": "0" * 64, "held_out": ["a " * 90]},
        "provenance": {"command": "recon run " + "y" * 200},
        "calibration": {"status": "unverified", "text": "no", "quantities": {"q" * 60: {"status": "unverified"}}},
    }
    made = evidence_on(FIELD, **facts)
    weights = torch.linspace(0, 1, 40, dtype=torch.float64)
    coupled = Ensemble(made.ensemble.x, FIELD, weights, {"particles": PARTICLES})
    return write_report(type(made)(coupled, made.measurement, made.range, made.fit, made.truth, {}, facts), folder)


@pytest.mark.parametrize("width", [360, 900, 1400])
def test_nothing_reaches_beyond_the_window(page, width, tmp_path):
    (tmp_path / "inner.html").write_text(
        page.read_text(encoding="utf-8").replace("</body>", TELL + "</body>"), encoding="utf-8"
    )
    frame = f"<iframe src='inner.html' style='width:{width}px;height:900px;border:0'></iframe>"
    (tmp_path / "frame.html").write_text(
        f"{frame}<script>onmessage=e=>document.title=e.data</script>", encoding="utf-8"
    )
    options = ("--window-size=1600,1000", "--virtual-time-budget=5000", "--dump-dom")
    seen = browser(tmp_path / "profile", *options, (tmp_path / "frame.html").as_uri())
    found = re.search(r"<title>(\d+) of (\d+) (.*)</title>", seen)
    assert found, "the page said nothing"
    assert int(found[1]) <= int(found[2]) and found[3] == ""
    assert width - 20 <= int(found[2]) <= width


def test_it_prints(page, tmp_path):
    browser(tmp_path / "profile", f"--print-to-pdf={tmp_path / 'page.pdf'}", "--no-pdf-header-footer", page.as_uri())
    made = (tmp_path / "page.pdf").read_bytes()
    assert made.startswith(b"%PDF") and len(made) > 50_000
