"""One door to every prior: names, cards that point to somebody else's file, bare checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

import recon
from recon.errors import InputError
from recon.files import sha256
from recon.likelihoods import GaussianLikelihood
from recon.operators import Masked
from recon.priors import load_prior
from recon.priors.checkpoints import load_checkpoint, pixel_range
from recon.priors.store import read_prior
from recon.samplers import DiffPIR
from recon.space import Space
from recon.store import shipped
from tests.priors.checkpoints.test_checkpoint_files import CONFIG, weights  # noqa: F401  (a fixture)

SPACE = Space(("y", "x"), (8, 8), {}, "1/m")
CARD = {
    "summary": "of another group",
    "grid": {"dims": ["y", "x"], "shape": [8, 8]},
    "unit": "1/m",
    "normalisation": {"low": 0.0, "high": 40.0},
    "checkpoint": {"file": "theirs.safetensors", "config": CONFIG},
    "unfit_for": "anything",
    "pixel_mm": [0.5, 2.0],
}


@pytest.fixture
def folder(tmp_path, weights):  # noqa: F811
    made = tmp_path / "priors" / "theirs"
    made.mkdir(parents=True)
    save_file(weights, made / "theirs.safetensors")
    return made


def write(folder, **changes):
    card = {**CARD, **changes}
    (folder / "card.yaml").write_text(yaml.safe_dump({k: v for k, v in card.items() if v is not None}))


def test_a_card_that_points_to_a_checkpoint_is_a_prior_with_a_name(folder, tmp_path):
    write(folder)
    prior = load_prior("theirs", tmp_path)
    shift, scale = pixel_range(0.0, 40.0)
    plain = load_checkpoint(folder / "theirs.safetensors", space=SPACE, shift=shift, scale=scale, config=CONFIG)
    z = torch.linspace(-1, 1, 64).reshape(1, 8, 8)
    assert torch.equal(prior.denoise(z, 0.7), plain.denoise(z, 0.7))
    assert torch.equal(prior.decode(z), plain.decode(z))
    assert (prior.card.name, prior.card.summary, prior.space.unit) == ("theirs", "of another group", "1/m")
    assert prior.card.facts["unfit_for"] == "anything"
    assert prior.card.facts["pixel_mm"] == [0.5, 2.0]
    assert prior.card.facts["format"] == "score_sde"
    like = GaussianLikelihood(Masked(prior.space, torch.arange(64).reshape(8, 8) % 3 == 0), torch.ones(22), 0.1)
    ensemble = recon.sample(recon.Posterior(prior, like), DiffPIR(steps=3), draws=2)
    assert bool(torch.isfinite(ensemble.x).all())


def test_shift_and_scale_say_the_same_as_the_range(folder, tmp_path):
    write(folder)
    first = load_prior("theirs", tmp_path)
    write(folder, normalisation={"shift": 20.0, "scale": 20.0})
    second = load_prior("theirs", tmp_path)
    z = torch.ones(1, 8, 8)
    assert torch.equal(first.decode(z), second.decode(z))


def test_a_bare_checkpoint(folder):
    path = folder / "theirs.safetensors"
    prior = load_prior(path, format="auto", space=SPACE, normalisation=(20.0, 20.0), config=CONFIG, sha256=sha256(path))
    named = load_prior(str(path), format="score_sde", space=SPACE, normalisation=(20.0, 20.0), config=CONFIG)
    z = torch.ones(1, 8, 8)
    assert torch.equal(prior.denoise(z, 1.0), named.denoise(z, 1.0))
    with pytest.raises(InputError, match="another file than expected"):
        load_prior(path, format="auto", space=SPACE, normalisation=(20.0, 20.0), config=CONFIG, sha256="0" * 64)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"normalisation": {"low": 0.0}}, r"card\.yaml is not the card of a checkpoint: normalisation: .*either shift and"),
        ({"normalisation": {"low": 0.0, "high": 1.0, "scale": 2.0}}, "normalisation: .*either shift and scale, or low"),
        ({"normalisation": {"low": 1.0, "high": 0.0}}, r"card\.yaml: ranges rise from low to high; got 1\.0, 0\.0"),
        ({"colour": "red", "unit": None}, "unit: Field required; colour: Extra inputs are not permitted"),
        ({"checkpoint": {"file": "absent.pt"}}, r"card\.yaml: there is no file or folder .*absent\.pt"),
        ({"checkpoint": {"file": "theirs.safetensors", "format": "adm", "config": CONFIG}}, r"card\.yaml: "),
        ({"checkpoint": {**CARD["checkpoint"], "sha256": "0" * 64}}, r"card\.yaml: .*sha256"),
        ({"grid": {"dims": ["y", "x"], "shape": [16, 8]}}, r"card\.yaml: .*16"),
    ],
)
def test_cards_that_do_not_fit(folder, tmp_path, changes, text):
    write(folder, **changes)
    with pytest.raises(InputError, match=text):
        load_prior("theirs", tmp_path)


def test_arguments_that_do_not_fit(folder, tmp_path):
    path = folder / "theirs.safetensors"
    with pytest.raises(InputError, match=r"does not say what its pixels mean: give space .* and normalisation"):
        load_prior(path, format="auto", space=SPACE)
    with pytest.raises(InputError, match=r"space and config are for bare checkpoints: give format too"):
        load_prior("ct_axial", space=SPACE, config={})
    with pytest.raises(InputError, match=r"has no card\.yaml; for a bare checkpoint give format"):
        load_prior(folder)
    (folder / "card.yaml").write_text("a: [")
    with pytest.raises(InputError, match=r"card\.yaml is not YAML"):
        load_prior(folder)
    write(folder)
    with pytest.raises(InputError, match="formats of checkpoints are adm"):
        load_prior(path, format="hdf5", space=SPACE, normalisation=(0.0, 1.0))


def test_there_is_one_door(folder, tmp_path, weights):  # noqa: F811
    """``read_prior`` is what stands behind it for recon's own folders: no name is looked up, no other card is read."""
    package = Path(recon.__file__).parent
    doors = [path for path in package.rglob("*.py") if "def load_prior(" in path.read_text(encoding="utf-8")]
    assert doors == [package / "priors" / "loading.py"]
    ours = shipped() / "priors" / "sst_tasmania"
    z = torch.linspace(-1, 1, 1024).reshape(1, 32, 32)
    one, other = read_prior(ours), load_prior("sst_tasmania")
    assert torch.equal(one.denoise(z, 0.5), other.denoise(z, 0.5))
    assert one.card == other.card
    write(folder)
    with pytest.raises(InputError, match=r"is not the card of a prior: .*checkpoint: Extra inputs"):
        read_prior(folder)
    with pytest.raises(InputError, match=r"nowhere is not a prior: it has no card.yaml"):
        read_prior(tmp_path / "nowhere")
