"""Priors of windows and of conditions on disk, and cards from before there were any."""

from __future__ import annotations

import pytest
import torch
import yaml

from recon.errors import InputError
from recon.priors import Card, ConditionalNetworkPrior, NetworkPrior, load_prior, save_prior
from recon.priors.conditional import Conditions, LowResolution, TimeOfYear
from recon.priors.network import Architecture, build_network
from recon.schedules import Schedule
from recon.space import Space

FACTS = {
    "data": (), "held_out": (), "budget": {"images": 1, "seconds": 1.0, "precision": "float32"}, "denoising": (),
    "unfit_for": "everything", "weights_licence": "CC0",
}  # fmt: skip
CONDITIONS = Conditions(
    inputs=(LowResolution(kind="low_resolution", factor=4), TimeOfYear(kind="time_of_year")), dropout=0.2
)


def made(whole=None, told=True):
    condition = CONDITIONS.channels(1) if told else 0
    architecture = Architecture(
        family="adm", size=16, channels=(32, 64), blocks=1, condition=condition, whole=whole, position=True
    )
    network = build_network(architecture, seed=5)
    torch.manual_seed(0)
    torch.nn.init.normal_(network.unet.out_conv.weight)
    facts = dict(FACTS)
    if whole is not None:
        lat = tuple(float(v) for v in range(whole[0]))
        facts["whole"] = {"dims": ("lat", "lon"), "shape": whole, "coords": {"lat": lat}}
    space = Space(("lat", "lon"), (16, 16), {}, "K")
    prior = NetworkPrior(
        space, Schedule(0.01, 20.0), Card("told", "", facts), network, sigma_data=0.5, shift=8.0, scale=2.0
    )
    return ConditionalNetworkPrior(prior, CONDITIONS) if told else prior


def halved(prior):
    with torch.no_grad():
        for value in prior.network.parameters():
            value.copy_(value.half())
    return prior


def test_a_conditional_prior_comes_back_with_its_conditions(tmp_path):
    save_prior(tmp_path / "told", made())
    ours, theirs = halved(made()), load_prior(tmp_path / "told")
    assert isinstance(theirs, ConditionalNetworkPrior) and theirs.inputs == CONDITIONS
    z, low = torch.randn(1, 16, 16), torch.randn(4, 4)
    assert torch.equal(ours.given(low=low, day=3).denoise(z, 0.3), theirs.given(low=low, day=3).denoise(z, 0.3))
    assert torch.equal(ours.unconditional().denoise(z, 0.3), theirs.unconditional().denoise(z, 0.3))
    card = yaml.safe_load((tmp_path / "told" / "card.yaml").read_text())
    assert card["conditions"]["dropout"] == 0.2 and card["architecture"]["condition"] == 4
    assert [condition["name"] for condition in card["conditions"]["inputs"]] == ["low", "day"]


def test_a_prior_of_windows_comes_back_with_the_grid_of_the_whole(tmp_path):
    save_prior(tmp_path / "told", made((24, 32)))
    ours, theirs = halved(made((24, 32))), load_prior(tmp_path / "told")
    assert theirs.whole == (24, 32) and theirs.conditions["low"].shape == (6, 8)
    assert theirs.conditions["low"].coords["lat"].tolist() == [1.5, 5.5, 9.5, 13.5, 17.5, 21.5]
    z, low = torch.randn(1, 16, 16), torch.randn(6, 8)
    both = [prior.given(low=low, day=3).at(5, 7).denoise(z, 0.3) for prior in (ours, theirs)]
    assert torch.equal(*both)
    save_prior(tmp_path / "plain", made((24, 32), told=False))
    plain = load_prior(tmp_path / "plain")
    assert type(plain) is NetworkPrior and plain.at(8, 16).denoise(z, 0.3).shape == (1, 16, 16)


def test_cards_whose_conditions_do_not_fit_the_network_are_refused(tmp_path):
    save_prior(tmp_path / "told", made())
    path = tmp_path / "told" / "card.yaml"
    card = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**card, "conditions": None}))
    with pytest.raises(InputError, match="conditions make 0 channels; architecture.condition is 4"):
        load_prior(tmp_path / "told")


def test_cards_without_the_younger_keys_are_read(tmp_path):
    save_prior(tmp_path / "told", made(told=False))
    path = tmp_path / "told" / "card.yaml"
    card = yaml.safe_load(path.read_text())
    for key in ("conditions", "whole"):
        del card[key]
    for key in ("condition", "whole"):
        del card["architecture"][key]
    path.write_text(yaml.safe_dump(card))
    assert load_prior(tmp_path / "told").denoise(torch.zeros(1, 16, 16), 1.0).shape == (1, 16, 16)
