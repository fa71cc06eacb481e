"""A latent prior from a training file: autoencoder first, denoiser on its latents, one folder."""

import hashlib
import json

import pytest
import torch

from recon.cli import main
from recon.errors import InputError
from recon.priors import LatentPrior, load_prior
from recon.workflows.train import prepare, read_train_file, train
from tests.workflows.test_train import lab, write

__all__ = ["lab"]

LATENT = {
    "architecture": {"family": "adm", "size": 8, "fields": 2, "shuffle": 1, "channels": [32, 64], "blocks": 1},
    "autoencoder": {
        "architecture": {"size": 32, "channels": [8, 16], "latents": 2},
        "noise": 0.1,
        "fidelity": 0.05,
        "training": {"images": 8, "batch": 4, "chunk": 4, "precision": "float32", "validation_sigmas": [0.1]},
    },
    "cuts": [{"dataset": "discs", "share": 1.0, "side": [32, 32]}],
}


def test_a_latent_prior_comes_out_of_a_training_file(lab):
    path = write(lab, **LATENT)
    train(path)
    prior = load_prior("toy")
    assert isinstance(prior, LatentPrior)
    assert prior.latent.shape == (2, 8, 8)
    rows = prior.card.facts["denoising"]
    assert [(row["data"], row["sigma"]) for row in rows] == [(n, s) for n in ("discs", "others") for s in (0.1, 1.0)]
    assert all(row["identity"] == pytest.approx(row["sigma"], rel=0.1) for row in rows)  # of latents, in their units
    lost = prior.card.facts["autoencoder"]["rmse"]
    x = read_train_file(path).data(None).held_out()["others"].values
    again = (prior.decode(prior.encode(x)) - x).square().mean().sqrt()
    assert lost["others"] == pytest.approx(float(again), rel=1e-3)  # 4 digits are kept
    weights = (path.parent / "weights.safetensors").read_bytes()
    train(path)
    assert (path.parent / "weights.safetensors").read_bytes() == weights
    said = []
    train(path, resume=False, say=said.append)
    assert any(line.startswith("autoencoder: ") and line.endswith("from image 0") for line in said)
    assert (path.parent / "weights.safetensors").read_bytes() == weights


def test_the_denoiser_is_trained_on_standardised_latents(lab):
    from recon.workflows.train import autoencoder

    file = read_train_file(write(lab, **LATENT))
    coder = autoencoder(file, None)
    assert all(torch.equal(p, p.half().float()) for p in coder.parameters())  # the weights that the file keeps
    training = prepare(file, None, coder=coder)
    z = torch.cat([training.task.batches(step, range(4)).images for step in range(30)])
    assert z.shape[1:] == (2, 8, 8)
    assert torch.allclose(z.transpose(0, 1).flatten(1).std(1), torch.ones(2), atol=0.15)
    with pytest.raises(InputError, match="the autoencoder of toy comes first"):
        prepare(file, None)


def test_what_does_not_fit_is_refused(lab, capsys):
    wide = {**LATENT["architecture"], "size": 16}
    assert main(["train", str(write(lab, **{**LATENT, "architecture": wide}))]) == 2
    assert (
        "the autoencoder's latents are (2, 8, 8); architecture has fields and size (2, 16, 16)"
        in capsys.readouterr().err
    )
    windows = [{"dataset": "discs", "share": 1.0, "side": [32, 32], "whole": 48}]
    assert main(["train", str(write(lab, **{**LATENT, "cuts": windows}))]) == 2
    assert "a latent prior is over whole images without conditions" in capsys.readouterr().err


def test_a_file_without_one_keeps_its_name(lab):
    """Checkpoints of before there were autoencoders and Wiener starts go on."""
    plain = read_train_file(write(lab))
    told = plain.model_dump(mode="json", include={"normalisation", "schedule", "architecture", "cuts", "fields"})
    assert not any(told["architecture"].pop(name) for name in ("wiener", "components"))
    assert plain.identity == hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    other = {**LATENT, "autoencoder": {**LATENT["autoencoder"], "fidelity": 0.5}}
    assert read_train_file(write(lab, **LATENT)).identity != read_train_file(write(lab, **other)).identity
