import hashlib
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from recon.errors import InputError
from recon.priors import Card, NetworkPrior, load_prior, save_prior
from recon.priors.network import Architecture, build_network
from recon.schedules import Schedule
from recon.space import Space

FACTS = {
    "pixel_mm": (0.5, 3.0),
    "data": [{"name": "made", "slices": 3, "share": 1.0, "licence": "CC0", "source": "drawn by hand"}],
    "held_out": ["made: the last one"],
    "budget": {"images": 10, "seconds": 1.0, "precision": "float32"},
    "denoising": [],
    "unfit_for": "everything",
    "weights_licence": "CC0",
}


def made(**facts):
    network = build_network(Architecture(family="adm", size=16, channels=(32, 64), blocks=1), seed=5)
    torch.manual_seed(0)
    torch.nn.init.normal_(network.unet.out_conv.weight)
    return NetworkPrior(
        Space(("y", "x"), (16, 16), {}, "1/m"),
        Schedule(0.01, 20.0),
        Card("tiny", "a tiny prior", {**FACTS, **facts}),
        network,
        sigma_data=0.5,
        shift=8.0,
        scale=16.0,
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("priors") / "tiny"
    save_prior(folder, made())
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "tiny")


def edit(folder, **changes):
    card = yaml.safe_load((folder / "card.yaml").read_text())
    card = {k: v for k, v in {**card, **changes}.items() if v is not None}
    (folder / "card.yaml").write_text(yaml.safe_dump(card))


def restate_sum(folder):
    """Make the card believe the weights."""
    card = yaml.safe_load((folder / "card.yaml").read_text())
    card["weights"]["sha256"] = hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest()
    edit(folder, weights=card["weights"])


def test_a_prior_comes_back_from_disk(folder):
    ours, theirs = made(), load_prior(folder)
    assert theirs.space.mismatch(ours.space) is None
    assert (theirs.schedule, theirs.sigma_data) == (ours.schedule, ours.sigma_data)
    assert theirs.card.name == "tiny"
    assert theirs.card.facts["unfit_for"] == "everything"
    z = torch.randn(2, 16, 16)
    with torch.no_grad():
        for value in ours.network.parameters():
            value.copy_(value.half())
    assert torch.equal(ours.denoise(z, 0.3), theirs.denoise(z, 0.3))
    assert next(theirs.network.parameters()).dtype == torch.float32
    assert torch.equal(ours.encode(z), theirs.encode(z))
    assert (folder / "weights.safetensors").stat().st_mode & 0o044


def test_a_prior_is_found_by_name_in_the_workspace(folder):
    group = folder.parent / "priors"
    group.mkdir()
    folder.rename(group / "tiny")
    assert load_prior("tiny", workspace=group.parent).card.name == "tiny"
    with pytest.raises(InputError, match=r"there is no 'tinny' among the priors: .*did you mean 'tiny'\?"):
        load_prior("tinny", workspace=group.parent)


def test_other_weights_are_noticed_with_both_sums(folder):
    stated = yaml.safe_load((folder / "card.yaml").read_text())["weights"]["sha256"]
    path = folder / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(InputError, match=rf"(?s){found}.*{stated}"):
        load_prior(folder)


def test_damaged_weights_are_noticed_even_when_the_card_agrees(folder):
    path = folder / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    restate_sum(folder)
    with pytest.raises(InputError, match="weights.safetensors is damaged"):
        load_prior(folder)


def test_missing_weights_are_noticed(folder):
    (folder / "weights.safetensors").unlink()
    with pytest.raises(InputError, match="tiny has no weights: there is no file"):
        load_prior(folder)


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda w: {n: torch.full_like(v, float("nan")) for n, v in w.items()}, "not finite: unet"),
        (lambda w: dict(list(w.items())[1:]), "belongs to another architecture"),
        (lambda w: {n: v[:1] for n, v in w.items()}, "belongs to another architecture"),
        (lambda w: {**w, "extra": torch.zeros(1)}, "another architecture than its card: extra"),
    ],
)
def test_wrong_weights_are_refused(folder, spoil, text):
    path = folder / "weights.safetensors"
    save_file({n: v.contiguous() for n, v in spoil(load_file(path)).items()}, path)
    restate_sum(folder)
    with pytest.raises(InputError, match=text):
        load_prior(folder)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"unit": None}, "unit: Field required"),
        ({"colour": "red"}, "colour: Extra inputs are not permitted"),
        ({"schedule": {"sigma_min": -1.0, "sigma_max": 2.0}}, "schedule.sigma_min: Input should be greater than 0"),
    ],
)
def test_wrong_cards_are_refused(folder, change, text):
    edit(folder, **change)
    with pytest.raises(InputError, match=rf"card.yaml is not the card of a prior: {text}"):
        load_prior(folder)


def test_unreadable_cards_are_refused(folder):
    (folder / "card.yaml").write_text("name: [")
    with pytest.raises(InputError, match="card.yaml is not YAML"):
        load_prior(folder)
    (folder / "card.yaml").unlink()
    with pytest.raises(InputError, match="it has no card.yaml"):
        load_prior(folder)


def test_what_cannot_be_saved(tmp_path):
    with pytest.raises(InputError, match="the card of tiny is not the card of a prior: unfit_for"):
        save_prior(tmp_path, made(unfit_for=None))
    prior = made()
    prior.network.unet.out_conv.weight.data.fill_(1e6)
    with pytest.raises(InputError, match=r"cannot be saved: unet.out_conv.weight"):
        save_prior(tmp_path, prior)
    prior.network = torch.nn.Identity()
    with pytest.raises(InputError, match="over networks of build_network can be saved; got Identity"):
        save_prior(tmp_path, prior)


def test_the_shipped_ct_prior_denoises_what_it_says():
    prior = load_prior("ct_axial")
    y, x = torch.meshgrid(torch.linspace(-1, 1, 128), torch.linspace(-1, 1, 128), indexing="ij")
    body = ((x / 0.85).square() + (y / 0.6).square() < 1).float() * 19.3
    for side in (-0.4, 0.4):
        body[((x - side) / 0.25).square() + (y / 0.35).square() < 1] = 4.0
    z = prior.encode(body)[None]
    torch.manual_seed(0)
    error = (prior.denoise(z + 0.1 * torch.randn_like(z), 0.1) - z).square().mean().sqrt().item()
    assert error < 0.05
    rows = [r for r in prior.card.facts["denoising"] if 0.04 < r["sigma"] < 0.3]
    assert {r["data"] for r in rows} >= {"tcga_heldout"}
    assert all(r["prior"] < 0.85 * r["wiener"] for r in rows)
