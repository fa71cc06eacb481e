"""Files that are hostile, damaged, or something else; none of them is executed, all are refused by name."""

import contextlib
import json
import os
import pickle
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from recon.errors import InputError
from recon.files import sha256
from recon.priors.checkpoints import FORMATS, load_checkpoint, pixel_range
from recon.priors.checkpoints.ncsnpp import NcsnPP
from recon.priors.checkpoints.safe import read_mapping, read_weights, state_dict
from recon.priors.checkpoints.score_sde import ScoreSdeConfig
from recon.space import Space
from tests.priors.checkpoints.published import randomise

SPACE = Space(("y", "x"), (8, 8))
PIXELS = {"shift": 0.0, "scale": 1.0}
CONFIG = {
    "training": {"sde": "vpsde", "continuous": True},
    "data": {"image_size": 8, "num_channels": 1, "centered": True},
    "model": {
        "name": "ddpm", "nf": 32, "ch_mult": [1], "num_res_blocks": 1, "attn_resolutions": [], "resamp_with_conv": True,
        "conditional": True, "scale_by_sigma": False, "nonlinearity": "swish", "num_scales": 100, "sigma_min": 0.01,
        "sigma_max": 50.0, "beta_min": 0.1, "beta_max": 20.0,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def weights():
    parsed = ScoreSdeConfig.model_validate(CONFIG)
    return randomise(NcsnPP(parsed.model, parsed.data).state_dict())


def load(path, **more):
    return load_checkpoint(path, **{"format": "score_sde", "space": SPACE, "config": CONFIG, **PIXELS, **more})


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def hostile_zip(path, payload):
    torch.save({"w": torch.ones(2), "x": payload}, path)


def hostile_bare(path, payload):
    path.write_bytes(pickle.dumps({"w": payload}))


def hostile_legacy(path, payload):
    torch.save({"w": torch.ones(2), "x": payload}, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("write", [hostile_zip, hostile_bare, hostile_legacy])
@pytest.mark.parametrize("ending", [".pt", ".pth", ".ckpt", ".bin"])
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path, write, ending):
    trap, file = tmp_path / "trap", tmp_path / f"weights{ending}"
    write(file, Payload(trap))
    with pytest.raises(InputError, match=r"refused.*state_dict\(\)"):
        load(file)
    with pytest.raises(InputError, match="refused"):
        load(file, format=None)
    assert not trap.exists()
    with contextlib.suppress(RuntimeError):  # a bare pickle is not what torch.load wants, but it has run by then
        torch.load(file, weights_only=False)
    assert trap.exists(), "the trap is none: without the guard it must go off"


@pytest.mark.parametrize("ending", [".pkl", ".pickle"])
def test_pickles_of_edm_are_not_opened_and_told_how_to_convert(tmp_path, ending):
    trap, file = tmp_path / "trap", tmp_path / f"edm-ffhq{ending}"
    hostile_bare(file, Payload(trap))
    with pytest.raises(InputError, match=r"not opened.*network = pickle\['ema'\]"):
        load(file, format="edm")
    assert not trap.exists()


def test_whole_modules_are_refused(tmp_path):
    torch.save({"ema": torch.nn.Linear(2, 2)}, tmp_path / "module.pt")
    with pytest.raises(InputError, match="refused.*it asks for torch.nn.modules.linear.Linear"):
        load(tmp_path / "module.pt")


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.999])
def test_truncated_files(tmp_path, weights, ending, keep):
    file = tmp_path / f"weights{ending}"
    (save_file if ending == ".safetensors" else torch.save)(weights, file)
    whole = file.read_bytes()
    file.write_bytes(whole[: keep if isinstance(keep, int) else int(keep * len(whole))])
    with pytest.raises(InputError, match=f"{file.name} (is|was)"):
        load(file)


def test_flipped_bytes_are_an_error_or_a_changed_digest(tmp_path, weights):
    """Whatever byte is changed, the file is refused, or read with other contents: nothing else is raised."""
    file = tmp_path / "weights.pt"
    torch.save(weights, file)
    whole, digest = file.read_bytes(), sha256(file)
    for place in range(0, len(whole), max(1, len(whole) // 12)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        with pytest.raises(InputError, match="sha256"):
            load(file, sha256=digest)
        try:
            load(file)
        except InputError:
            continue


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([1, 2], "no tensors by name"),
        ({"step": 3}, "no tensors by name"),
        (
            {"a": {"w": torch.ones(2)}, "b": {"w": torch.ones(2)}},
            "several sets of tensors: 'a', 'b'. Choose one with config entry",
        ),
        ({"w": torch.ones(2)}, "does not hold the network it should: .* is missing.*w is unknown"),
    ],
)
def test_files_without_the_tensors(tmp_path, content, text):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(InputError, match=text):
        load(tmp_path / "other.pt")


def test_sets_of_tensors_are_found_by_their_entry(tmp_path, weights):
    content = {
        "epoch": 4,
        "net": {"state_dict": {f"module.{n}": v for n, v in weights.items()}},
        "ema": {"w": torch.ones(1)},
    }
    tensors, entry = state_dict(content, tmp_path, "net.state_dict")
    assert entry == "net.state_dict" and tensors.keys() == weights.keys()
    with pytest.raises(InputError, match=r"under 'model'; it has 'net.state_dict', 'ema'"):
        state_dict(content, tmp_path, "model")
    torch.save(content, tmp_path / "net.pt")
    prior = load(tmp_path / "net.pt", config={**CONFIG, "recon": {"entry": "net.state_dict"}})
    assert prior.card.facts["entry"] == "net.state_dict"


def test_missing_unknown_and_misshapen_tensors(tmp_path, weights):
    file, name = tmp_path / "weights.safetensors", "all_modules.0.weight"
    for change, text in (
        ({n: v for n, v in weights.items() if n != name}, f"{name} is missing"),
        ({**weights, "head.weight": torch.ones(2)}, "head.weight is unknown"),
        ({**weights, name: torch.ones(2, 2)}, r"weight is \(2, 2\), expected \(128, 32\)"),
        ({**weights, name: torch.full_like(weights[name], float("nan"))}, f"not finite: {name}"),
        ({**weights, name: torch.full_like(weights[name], float("inf")).half()}, f"not finite: {name}"),
    ):
        save_file(change, file)
        with pytest.raises(InputError, match=f"weights.safetensors .*{text}"):
            load(file)


def test_half_precision_is_computed_in_float32(tmp_path, weights):
    save_file({n: v.to(torch.bfloat16) for n, v in weights.items()}, tmp_path / "half.safetensors")
    prior = load(tmp_path / "half.safetensors")
    assert {p.dtype for p in prior.network.parameters()} == {torch.float32}
    assert prior.denoise(torch.zeros(1, 8, 8), 0.5).dtype == torch.float32


def test_the_sha256_is_checked_before_the_file_is_read(tmp_path, weights):
    file = tmp_path / "weights.pt"
    torch.save(weights, file)
    digest = sha256(file)
    assert load(file, sha256=digest.upper()).card.facts["sha256"] == digest
    with pytest.raises(InputError, match=f"weights.pt .*sha256 {digest}, expected {'0' * 64}"):
        load(file, sha256="0" * 64)
    with pytest.raises(InputError, match="one file: give sha256 as text"):
        load(file, sha256={"weights.pt": digest})
    trap = tmp_path / "trap"
    hostile_zip(file, Payload(trap))
    with pytest.raises(InputError, match="sha256"):
        load(file, sha256=digest)


def test_the_format_is_read_from_the_names(tmp_path, weights):
    torch.save(weights, tmp_path / "weights.pt")
    assert load(tmp_path / "weights.pt", format=None).card.facts["format"] == "score_sde"
    torch.save({"conv1.weight": torch.ones(2)}, tmp_path / "other.pt")
    with pytest.raises(
        InputError, match=r"\(conv1.weight, ...\) are those of no known format; give format as one of adm"
    ):
        load(tmp_path / "other.pt", format=None)
    torch.save({"input_blocks.0.w": torch.ones(2), "m_head.weight": torch.ones(2)}, tmp_path / "both.pt")
    with pytest.raises(InputError, match="those of adm and deepinv"):
        load(tmp_path / "both.pt", format=None)


@pytest.mark.parametrize("format", [f for f in FORMATS if f != "diffusers"])
def test_every_format_refuses_a_file_of_another(tmp_path, weights, format):
    configs = {
        "adm": {"num_heads": 1, "noise_schedule": "linear"},
        "deepinv": {"network": "DiffUNet"},
        "score_sde": CONFIG,
    }
    file = tmp_path / "weights.pt"
    torch.save({"input_blocks.0.0.weight": torch.ones(2, 2), "enc.8x8_conv.weight": torch.ones(2, 2, 3, 3)}, file)
    with pytest.raises(InputError, match="weights.pt"):
        load(file, format=format, config=configs.get(format, {}))


def test_paths_and_arguments_that_do_not_fit(tmp_path, weights):
    torch.save(weights, tmp_path / "weights.pt")
    torch.save(weights, tmp_path / "weights.model")
    for path, more, text in (
        ("nothing.pt", {}, "no file or folder .*nothing.pt"),
        ("weights.model", {}, r"ending in .safetensors, .pt.*got '.model'"),
        ("weights.pt", {"format": "jax"}, "formats of checkpoints are adm, .*got 'jax'"),
        (".", {}, "score_sde is one file; .* is a folder"),
        ("weights.pt", {"format": "diffusers"}, "a diffusers checkpoint is a folder"),
        ("weights.pt", {"scale": 0.0}, "scale must be positive"),
        ("weights.pt", {"config": str(tmp_path / "none.json")}, "no file .*none.json"),
    ):
        with pytest.raises(InputError, match=text):
            load(tmp_path / path, **more)
    with pytest.raises(TypeError, match="shift"):  # normalisation is never guessed
        load_checkpoint(tmp_path / "weights.pt", "score_sde", space=SPACE, config=CONFIG)
    with pytest.raises(InputError, match="rise from low to high"):
        pixel_range(1.0, 1.0)


def test_configs_are_data(tmp_path, weights):
    torch.save(weights, tmp_path / "weights.pt")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert load(tmp_path / "weights.pt", config=tmp_path / "config.json").card.name == "weights"
    trap = tmp_path / "trap"
    (tmp_path / "config.yaml").write_text(f"!!python/object/apply:os.mkdir ['{trap}']")
    (tmp_path / "list.yaml").write_text("[1, 2]")
    (tmp_path / "broken.json").write_text("{")
    for name, text in (("config.yaml", "is not YAML"), ("list.yaml", "holds a list"), ("broken.json", "is not JSON")):
        with pytest.raises(InputError, match=text):
            read_mapping(tmp_path / name)
    assert not trap.exists()


def test_archives_of_code_are_refused(tmp_path):
    """TorchScript files hold programs; other zip files hold anything."""
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(InputError, match=r"other.pt is damaged, or no file of torch.save"):
        read_weights(tmp_path / "other.pt")
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        archive.writestr("script/constants.pkl", b"")
        archive.writestr("script/data.pkl", b"")
        archive.writestr("script/version", b"3")
    with pytest.raises(InputError, match=r"script.pt (is|was)"):
        read_weights(tmp_path / "script.pt")
