"""A card completed by looking at the prior's draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from recon.errors import InputError
from recon.priors import load_prior
from recon.priors.denoising import denoising_error, non_local_means
from recon.priors.store import read_card
from recon.workflows.inspection import inspect
from recon.workflows.train import train
from tests.workflows.test_train import lab, weather, write, write_fields  # noqa: F401  (a fixture)


def test_slices(lab):  # noqa: F811
    folder = train(write(lab))
    before = (folder / "weights.safetensors").read_bytes()
    card = inspect(folder, draws=16, steps=4)
    assert read_card(folder) == card
    assert (folder / "weights.safetensors").read_bytes() == before
    assert (folder / "draws.png").read_bytes().startswith(b"\x89PNG")
    seen = card.draws
    assert seen is not None
    assert (seen.count, seen.steps) == (16, 4)
    assert [(row.data, row.images) for row in seen.likeness] == [("discs", 3), ("others", 6)]
    for row in seen.likeness:
        # Eight images of training leave noise where held-out slices are discs.
        assert row.spectrum > row.spectrum_training > 0
        assert row.sliced > 0 and row.histogram > 0
    assert all(row.non_local_means is not None and row.non_local_means < 1.5 * row.identity for row in card.denoising)
    assert load_prior("toy").card.facts["draws"]["count"] == 16
    assert inspect(folder, draws=16, steps=4) == card


def test_fields(lab):  # noqa: F811
    weather(lab)
    folder = train(write_fields(lab))
    card = inspect(folder, draws=16, steps=4)
    assert card.draws is not None
    assert [row.data for row in card.draws.likeness] == ["weather"]


def test_too_few_draws(lab):  # noqa: F811
    with pytest.raises(InputError, match=r"inspect shows 16 draws .* got draws=3"):
        inspect(lab, draws=3)


def test_non_local_means_removes_noise_from_flat_parts():
    """In a flat plane a mean over all 13 x 13 patches remains: the error falls below half of the noise."""
    flat = torch.zeros(2, 32, 32)
    assert denoising_error(non_local_means, flat, 0.1) < 0.05
    planes = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 3, 16, 16)))
    one = non_local_means(planes, 0.5)
    assert torch.equal(one[1, 2], non_local_means(planes[1:, 2:], 0.5)[0, 0])
    assert one.dtype == planes.dtype
