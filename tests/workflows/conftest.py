"""A workspace in which a whole run takes a second: a 32 x 32 prior whose network is zero, so exactly N(shift, scale^2 s^2)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from recon.priors import Card, NetworkPrior
from recon.priors.network import Architecture, build_network
from recon.priors.store import save_prior
from recon.schedules import Schedule
from recon.space import Space

WORKFLOW = """\
problem:
  dataset: ct_small
  operator: {type: parallel_beam, views: 20}
  noise: {counts: 1.0e5}
prior: tiny
sampler: {method: mmps, steps: 12}
draws: 7
block: 2
seed: 5
baselines: [fbp]
checkpoint_every: 0.001
"""


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``priors/tiny`` and the workflow ``w.yaml``."""
    folder = tmp_path_factory.mktemp("workspace")
    network = build_network(Architecture(family="drunet", size=32, channels=(4, 4, 4, 4), blocks=1))
    for p in network.parameters():
        torch.nn.init.zeros_(p)
    facts = {
        "pixel_mm": (0.5, 3.0), "data": (), "held_out": (), "denoising": (), "unfit_for": "use", "weights_licence": "CC0",
        "budget": {"images": 0, "seconds": 0.0, "precision": "float32"}, "notes": (),
    }  # fmt: skip
    prior = NetworkPrior(
        Space(("y", "x"), (32, 32), {}, "1/m"),
        Schedule(0.002, 80.0),
        Card("tiny", "a zero network: a white Gaussian", facts),
        network,
        sigma_data=0.5,
        shift=18.0,
        scale=16.0,
    )
    save_prior(folder / "priors" / "tiny", prior)
    (folder / "w.yaml").write_text(WORKFLOW)
    return folder
