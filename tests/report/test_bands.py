"""What the data determined by frequency: the share that is there, in words that say it, or why it is not told."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from recon.ensemble import Ensemble
from recon.priors import GaussianPrior
from recon.report import Evidence, affordable_bands, write_report
from recon.report.band_figures import bands, in_words
from recon.space import Space
from tests.report.test_quantities import evidence_on

GRID = Space.grid((12, 16), 2e-3, "1/m")
COST = {"denoiser": 600, "vjp": 700}


def coarse(draws: int, fine: float, seed: int) -> torch.Tensor:
    """White fields of spread 3 whose structures of 1 to 3 cycles have a tenth of it, and finer ones ``fine`` of it."""
    rng = np.random.default_rng(seed)
    spectrum = np.fft.fftn(3.0 * rng.normal(size=(draws, *GRID.shape)), axes=(1, 2))
    rows, columns = (12 * np.abs(np.fft.fftfreq(n)) for n in GRID.shape)
    ring = np.rint(np.hypot(rows[:, None], columns))
    return torch.tensor(np.fft.ifftn(spectrum * np.where(ring <= 3, 0.1, fine), axes=(1, 2)).real).float()


@pytest.fixture(scope="module")
def found() -> list[dict]:
    prior = GaussianPrior(torch.zeros(GRID.size), torch.full((GRID.size,), 9.0), GRID)
    made, why = affordable_bands(prior, Ensemble(coarse(40, 0.9, 1), GRID, None, {"cost": COST}))
    assert why == ""
    return made


def test_bands_are_those_of_the_draws(found):
    (one,) = found
    share, error = np.array(one["determined"]), np.array(one["errors"])
    true = np.where(np.arange(7) <= 3, 1 - 0.1**2, 1 - 0.9**2)
    assert one["cycles"] == list(range(7)) and one["draws"] == 16 and one["name"] == ""
    # Its flow in 16 steps leaves a prior's variance right to some per cent.
    assert (np.abs(share - true) < 4.5 * error + 0.05).all()


def test_they_are_told_in_words_and_kept_as_numbers(found, tmp_path):
    assert in_words(found[0], GRID) == (
        "Of the coarsest structures (one cycle across the field) the data determined 99 %; from 4 cycles on (structures "
        "of 6 mm per cycle and finer) the prior supplied more than half."
    )
    made = evidence_on(GRID, bands=found)
    page = write_report(made, tmp_path).read_text(encoding="utf-8")
    assert "Share that the data determined, from coarse to fine structures. Of the coarsest structures" in page
    header, first = (tmp_path / "figures" / "bands.csv").read_text().splitlines()[:2]
    assert header == "cycles (per field of view),determined,standard error"
    assert float(first.split(",")[1]) == pytest.approx(found[0]["determined"][0])


def test_words_for_what_is_determined_everywhere_or_nowhere():
    one = {"name": "t", "cycles": [0, 1, 2], "determined": [0.99, 0.9, 0.8]}
    assert in_words(one, GRID) == (
        "t: of the coarsest structures (one cycle across the field) the data determined 90 %, and more than half at every size."
    )
    assert "the prior decided more than half at every size" in in_words({**one, "determined": [0.9, 0.3, 0.1]}, GRID)
    flat = Space(("lat", "lon"), (4, 4))
    assert "from 2 cycles on the prior supplied" in in_words({**one, "determined": [0.9, 0.8, 0.1]}, flat)


def test_where_they_cost_too_much_or_cannot_be_the_page_says_so(tmp_path):
    prior = GaussianPrior(torch.zeros(GRID.size), torch.ones(GRID.size), GRID)
    made, why = affordable_bands(prior, Ensemble(torch.ones(2, *GRID.shape), GRID, None, {"cost": {"denoiser": 40}}))
    assert made is None and "more than a quarter of the run" in why
    made, why = affordable_bands(prior, Ensemble(torch.ones(2, *GRID.shape), GRID, None, {"cost": COST}))
    assert made is None and "at least 3 draws" in why
    evidence = evidence_on(GRID, bands=why)
    assert isinstance(evidence, Evidence) and bands(evidence) is None
    assert bands(replace(evidence, facts={})) is None
    assert f"was not told by spatial frequency: {why}" in write_report(evidence, tmp_path).read_text(encoding="utf-8")


def test_each_variable_has_its_own():
    space = Space(("variable", "lat", "lon"), (2, 8, 8), {"variable": ("t", "q")}, "mixed")
    variance = torch.cat([torch.full((64,), 4.0), torch.full((64,), 1.0)])
    prior = GaussianPrior(torch.zeros(space.size), variance, space)
    sizes = torch.tensor([0.2, 1.0]).reshape(2, 1, 1)
    x = sizes * torch.randn(30, *space.shape, generator=torch.Generator().manual_seed(0))
    made, _ = affordable_bands(prior, Ensemble(x, space, None, {"cost": COST}))
    assert [one["name"] for one in made] == ["t", "q"]
    assert min(made[0]["determined"]) > 0.9 and abs(float(np.mean(made[1]["determined"]))) < 0.2
