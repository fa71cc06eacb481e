"""The shipped scan of a brain: its path with a prior of zeros, and, once its own prior is there, what that is worth."""

from __future__ import annotations

import os
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import yaml

import recon
from recon.diagnostics.images import psnr
from recon.files import sha256
from recon.operators import CartesianMRI
from recon.priors import Card, NetworkPrior
from recon.priors.network import Architecture, build_network
from recon.priors.store import save_prior
from recon.samplers import MMPS
from recon.schedules import Schedule
from recon.space import Space
from recon.store import shipped
from recon.workflows.comparison import baselines, suited
from recon.workflows.problem import prepare
from recon.workflows.schema import load_workflow

GIVEN, FILE = os.environ.get("RECON_DATA", ""), "mri/openms_axial_256.h5"
FACTS = {
    "data": (), "held_out": (), "denoising": (), "unfit_for": "use", "weights_licence": "CC0",
    "budget": {"images": 0, "seconds": 0.0, "precision": "float32"}, "notes": (),
}  # fmt: skip


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Under the names of the shipped workflow: a white complex Gaussian of 32 x 32 pixels, and heads of 64 x 64."""
    folder = tmp_path_factory.mktemp("stand_in")
    network = build_network(Architecture(family="drunet", size=32, fields=2, channels=(4, 4, 4, 4), blocks=1))
    for p in network.parameters():
        torch.nn.init.zeros_(p)
    space = Space(("channel", "y", "x"), (2, 32, 32), {"channel": ("real", "imag")}, "1")
    prior = NetworkPrior(space, Schedule(0.002, 80.0), Card("brain_mr", "", FACTS), network, sigma_data=1.0, scale=0.5)
    save_prior(folder / "priors" / "brain_mr", prior)
    y, x = np.mgrid[-1:1:64j, -1:1:64j]
    with h5py.File(folder / "heads.h5", "w") as file:
        file["slices"] = np.stack([np.where(x**2 + 1.2 * y**2 < r, 0.8, 0.0) for r in np.linspace(0.4, 0.8, 65)])
    card = {
        "summary": "heads", "reader": "fields", "file": "heads.h5", "variables": ["slices"], "units": ["1"],
        "dims": ["y", "x"], "pixel_mm": 1.0, "licence": "CC0", "source": "drawn", "sha256": sha256(folder / "heads.h5"),
        "split": {"train": 0.02, "validation": 0.02},
    }  # fmt: skip
    (folder / "datasets").mkdir()
    (folder / "datasets" / "openms_brain.yaml").write_text(yaml.safe_dump(card))
    return folder


def test_the_path_with_a_prior_of_zeros(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECON_DATA", str(stand_in))
    workflow = load_workflow("cartesian_mri", workspace=stand_in)
    made = prepare(workflow)
    assert isinstance(made.operator, CartesianMRI)
    assert made.measurement.truth is not None and made.measurement.truth.shape == (2, 32, 32)
    assert suited(made.operator) == ("zero_filled", "sense")
    measured = made.operator.mask.expand_as(made.measurement.values.real)
    clean = made.operator.A(made.measurement.truth[None])[0]
    assert float(made.measurement.sigma) == pytest.approx(0.05 * float(clean[measured].abs().mean()), rel=1e-5)
    sampler = type(made.sampler)(**{**vars(made.sampler), "steps": 6})
    ensemble = recon.sample(made.posterior, sampler, draws=2)
    like = made.posterior.likelihood.gaussian()
    before = float(((like.y - like.operator.A(torch.zeros(1, 2, 32, 32))) / like.sigma).abs().square().sum())
    after = float((like.residual(ensemble.x) / like.sigma).abs().square().flatten(1).sum(1).mean())
    assert after < 0.2 * before


@pytest.mark.data
@pytest.mark.slow
def test_the_brain_is_better_than_zero_filling(monkeypatch: pytest.MonkeyPatch) -> None:
    if not (shipped() / "priors" / "brain_mr" / "weights.safetensors").is_file():
        pytest.skip("priors/brain_mr has no weights yet: recon train priors/brain_mr/train.yaml")
    if not GIVEN or not (Path(GIVEN) / FILE).is_file():
        pytest.skip(f"needs {FILE} below RECON_DATA")
    monkeypatch.setenv("RECON_DATA", GIVEN)
    workflow = load_workflow("cartesian_mri")
    made = prepare(workflow)
    truth = made.measurement.truth
    assert truth is not None
    mean = recon.sample(made.posterior, MMPS(steps=12), draws=2, seed=0).mean()
    sizes = {name: image.square().sum(0).sqrt() for name, image in baselines(workflow, made)[0].items()}
    size = truth.square().sum(0).sqrt()
    assert float(psnr(mean.square().sum(0).sqrt(), size)) > 3 + float(psnr(sizes["zero-filled"], size))
