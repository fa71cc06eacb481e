"""What a network is told beside the image: channels of a condition, and where a window lies in its field."""

from __future__ import annotations

import copy

import pytest
import torch
from pydantic import ValidationError

from recon.errors import InputError
from recon.priors.base import Card
from recon.priors.network import Architecture, Context, NetworkPrior, build_network, precondition
from recon.schedules import Schedule
from recon.space import Space

TINY = Architecture(family="adm", size=16, channels=(32, 64), blocks=1)


def seen_by(network):
    """The list to which the input of the U-Net's first layer is added."""
    seen = []
    first = next(
        module for module in network.unet.modules() if isinstance(module, torch.nn.Conv2d) or hasattr(module, "up")
    )
    first.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    return seen


def trained_like(architecture, seed=1):
    network = build_network(architecture, seed)
    torch.manual_seed(2)
    for value in network.parameters():
        value.data += 0.02 * torch.randn_like(value)
    return network


def prior(architecture):
    side = architecture.sides
    return NetworkPrior(
        Space(("y", "x"), side, {}, "K"), Schedule(0.01, 10.0), Card("windows"), trained_like(architecture),
        sigma_data=0.5, shift=3.0, scale=2.0,
    )  # fmt: skip


def test_a_condition_is_unshuffled_beside_the_image():
    network = build_network(TINY.model_copy(update={"condition": 3}))
    seen = seen_by(network)
    z, condition = torch.randn(2, 1, 16, 16), torch.randn(2, 3, 16, 16)
    network(z, torch.zeros(2), Context(condition))
    assert seen[0].shape == (2, 16, 8, 8)
    assert torch.equal(seen[0][:, 0], z[:, 0, ::2, ::2])
    assert torch.equal(seen[0][:, 4], condition[:, 0, ::2, ::2])
    assert torch.equal(seen[0][:, 15], condition[:, 2, 1::2, 1::2])


def test_a_condition_is_continued_like_the_image_where_sides_cannot_be_halved():
    network = build_network(TINY.model_copy(update={"size": (15, 13), "condition": 1}))
    seen = seen_by(network)
    condition = torch.randn(1, 1, 15, 13)
    out = network(torch.randn(1, 1, 15, 13), torch.zeros(1), Context(condition))
    assert out.shape == (1, 1, 15, 13) and seen[0].shape == (1, 8, 8, 8)
    assert torch.equal(seen[0][0, 7, -1, -1], condition[0, 0, -1, -1])


@pytest.mark.parametrize(
    ("condition", "got"),
    [
        (None, "None"),
        (torch.zeros(2, 2, 16, 16), r"\(2, 2, 16, 16\)"),
        (torch.zeros(1, 3, 16, 16), r"\(1, 3, 16, 16\)"),
    ],
)
def test_another_condition_is_refused(condition, got):
    network = build_network(TINY.model_copy(update={"condition": 3}))
    with pytest.raises(InputError, match=rf"takes a condition of shape \(2, 3, 16, 16\); got {got}"):
        network(torch.zeros(2, 1, 16, 16), torch.zeros(2), Context(condition))
    with pytest.raises(InputError, match="takes a condition of shape None; got"):
        build_network(TINY)(torch.zeros(2, 1, 16, 16), torch.zeros(2), Context(torch.zeros(2, 3, 16, 16)))


def test_windows_are_told_where_their_shuffled_pixels_lie():
    """Centre of the 2 x 2 pixels (i, j) of a window at (r, c) of a field of 41 x 61: -1 and 1 are the outermost pixels."""
    network = build_network(TINY.model_copy(update={"position": True, "whole": (41, 61)}))
    seen = seen_by(network)
    network(torch.zeros(2, 1, 16, 16), torch.zeros(2), Context(corner=torch.tensor([[0.0, 0.0], [25.0, 45.0]])))
    rows, columns = 2 * (2 * torch.arange(8) + 0.5) / 40 - 1, 2 * (2 * torch.arange(8) + 0.5) / 60 - 1
    assert torch.allclose(seen[0][0, 4], rows[:, None].expand(8, 8), atol=1e-6)
    assert torch.allclose(seen[0][0, 5], columns.expand(8, 8), atol=1e-6)
    assert torch.allclose(seen[0][1, 4], (rows + 2 * 25 / 40)[:, None].expand(8, 8), atol=1e-6)
    assert seen[0][1, 4, -1, 0] == pytest.approx(1 - 2 * 0.5 / 40)  # the last centre is half a pixel inside
    assert seen[0][1, 5, 0, -1] == pytest.approx(1 - 2 * 0.5 / 60)
    with pytest.raises(InputError, match=r"windows of a field \(41, 61\) and takes their corners \(2, 2\); got None"):
        network(torch.zeros(2, 1, 16, 16), torch.zeros(2))


def test_a_prior_of_windows_is_told_its_place():
    windows = prior(TINY.model_copy(update={"position": True, "whole": (41, 61)}))
    z = torch.randn(3, 16, 16)
    with pytest.raises(InputError, match=r"windows is over windows of a field \(41, 61\): say which by at"):
        windows.denoise(z, 0.3)
    here, there = windows.at(0, 0), windows.at(25, 45)
    assert here.network is windows.network and here.whole == (41, 61)
    told = Context(corner=torch.tensor([[25.0, 45.0]]).expand(3, -1))
    assert torch.equal(there.denoise(z, 0.3), precondition(windows.network, z, torch.full((3,), 0.3), 0.5, told))
    assert not torch.allclose(here.denoise(z, 0.3), there.denoise(z, 0.3), atol=1e-4)
    assert torch.equal(there.at(0, 0).denoise(z, 0.3), here.denoise(z, 0.3))
    assert torch.equal(here.encode(z), windows.encode(z)) and here.latent.mismatch(windows.latent) is None
    twin = copy.deepcopy(there)
    assert twin.network is not there.network and torch.equal(twin.denoise(z, 0.3), there.denoise(z, 0.3))
    with pytest.raises(InputError, match=r"start at rows 0 to 25 and columns 0 to 45; got \(26, 0\)"):
        windows.at(26, 0)
    with pytest.raises(InputError, match="the images of windows are whole"):
        prior(TINY).at(0, 0)


def test_windows_without_a_sense_of_position_need_no_place():
    windows = prior(TINY.model_copy(update={"whole": (41, 61)}))
    z = torch.randn(1, 16, 16)
    assert torch.equal(windows.denoise(z, 0.3), windows.at(3, 4).denoise(z, 0.3))


def test_images_larger_than_their_whole_are_refused():
    with pytest.raises(
        ValidationError, match=r"images of \(16, 16\) pixels cannot be windows of a field of \(12, 40\)"
    ):
        Architecture(**{**TINY.model_dump(), "whole": (12, 40)})
