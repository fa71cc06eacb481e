from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from pydantic import ValidationError
from pydicom import dcmread
from pydicom.data import get_testdata_file

from recon.datasets.augment import Cut, Cutter
from recon.datasets.slices import (
    MU_WATER,
    SliceCard,
    Slices,
    area_mean,
    attenuation,
    hounsfield,
    load_slices,
    read_dicom,
)
from recon.errors import InputError
from recon.files import sha256
from recon.store import available
from recon.workflows.definitions import read_definition

GRAY = np.arange(0, 256, 2, dtype=np.uint8)


@pytest.fixture
def card(tmp_path, monkeypatch):
    """Ten slices of 4 x 4 gray levels with two labels, slice i filled with GRAY[12 * i]."""
    monkeypatch.setenv("RECON_DATA", str(tmp_path))
    with h5py.File(tmp_path / "slices.h5", "w") as file:
        file["slices"] = np.broadcast_to(GRAY[::12][:10, None, None], (10, 4, 4))
        file["label"] = [0, 1, 0, 1, 0, 1, 0, 1, 0, 0]
        file["size"] = np.linspace(0.5, 0.95, 10)
    return SliceCard(
        name="made",
        summary="made up",
        reader="hdf5_slices",
        file="slices.h5",
        key="slices",
        unit="gray",
        slope=6.1,
        intercept=-1245.0,
        saturated_from=200,
        pixel_mm="size",
        pixel_factor=2.0,
        group_key="label",
        validation=0.25,
        licence="CC0",
        source="drawn by hand",
        sha256=sha256(tmp_path / "slices.h5"),
    )


def test_hounsfield_units_become_attenuation():
    assert attenuation(np.array([-1024, -1000, 0, 1000])).tolist() == pytest.approx([0, 0, 19.3, 38.6])
    assert hounsfield(attenuation(np.array([-500.0, 300.0]))).tolist() == pytest.approx([-500, 300], abs=1e-3)


def test_gray_levels_follow_the_card_and_saturation_is_marked(card):
    slices = load_slices(card, "train")
    gray = np.array([GRAY[12 * i] for i in (0, 1, 2, 3, 4, 5, 6)], np.float32)
    expected = np.maximum(0, MU_WATER * (1 + (6.1 * gray - 1245) / 1000))
    assert np.allclose(slices.mu[:, 0, 0], expected, atol=1e-4)
    assert slices.mu.dtype == np.float32
    assert slices.valid[:, 0, 0].tolist() == (gray < 200).tolist()
    assert np.allclose(slices.pixel, np.linspace(0.5, 0.8, 7) * 2e-3)


def test_the_last_of_each_label_are_held_out(card):
    """Labels 0 (slices 0 2 4 6 8 9) and 1 (1 3 5 7): a quarter, rounded up, of each is 8 9 and 7."""
    held_out = load_slices(card, "validation")
    assert np.allclose(held_out.pixel * 1e3 / 2, [0.85, 0.9, 0.95])
    assert len(load_slices(card, "train")) + len(held_out) == 10


def test_test_files_have_one_part(card):
    test = card.model_copy(update={"use": "test"})
    assert len(load_slices(test, "test")) == 10
    for wrong, part in ((test, "train"), (test, "validation"), (card, "test")):
        with pytest.raises(InputError, match=f"made is for {wrong.use}; it has no part '{part}'"):
            load_slices(wrong, part)


def test_files_are_checked(card, monkeypatch, tmp_path):
    with pytest.raises(InputError, match=rf"sha256 {card.sha256}, the card says {'0' * 64}"):
        load_slices(card.model_copy(update={"sha256": "0" * 64}), "train")
    with pytest.raises(InputError, match=r"no array 'volume'; it has \['label', 'size', 'slices'\]"):
        load_slices(card.model_copy(update={"key": "volume"}), "train")
    with pytest.raises(InputError, match="there is no file .*absent.h5; its card says .* drawn by hand"):
        load_slices(card.model_copy(update={"file": "absent.h5"}), "train")
    monkeypatch.delenv("RECON_DATA")
    with pytest.raises(InputError, match="set RECON_DATA to that folder"):
        load_slices(card, "train")
    assert len(load_slices(card.model_copy(update={"file": str(tmp_path / "slices.h5")}), "train")) == 7


def test_unknown_keys_of_a_card_are_refused(card):
    with pytest.raises(ValidationError, match="window"):
        SliceCard(**card.model_dump(), window=40)


def test_shipped_cards_are_whole_and_name_no_place():
    cards = [read_definition("datasets", path) for path in available("datasets").values()]
    cards = [card for card in cards if isinstance(card, SliceCard)]
    assert {card.name for card in cards} >= {"iqoth_chest", "lidc_0314_chest", "tcga_heldout"}
    assert all(not card.file.startswith("/") and card.licence.startswith(("CC-BY", "Apache-2.0")) for card in cards)
    assert {card.name: card.use for card in cards}["tcga_heldout"] == "test"


def test_area_means_keep_the_mean_and_lose_what_is_partly_unknown():
    mu = np.arange(32, dtype=np.float32).reshape(1, 4, 8)
    valid = np.ones((1, 4, 8), bool)
    valid[0, 0, 3] = False
    coarse = Slices("s", mu, valid, np.array([1e-3])).coarsened(2)
    assert coarse.mu[0, 0].tolist() == [4.5, 6.5, 8.5, 10.5]
    assert coarse.valid.tolist() == [[[True, False, True, True], [True] * 4]]
    assert coarse.pixel.tolist() == [2e-3]
    with pytest.raises(InputError, match="4 x 8 pixels cannot be averaged over blocks of 3 x 3"):
        area_mean(mu, 3)


def test_a_dicom_slice_is_read_with_its_own_scale():
    slices = read_dicom(Path(get_testdata_file("CT_small.dcm", download=False)))
    assert slices.mu.shape == (1, 128, 128)
    assert slices.pixel[0] == pytest.approx(0.661468e-3)
    assert 0.7 * MU_WATER < np.median(slices.mu) < 1.2 * MU_WATER


def test_what_is_no_ct_slice_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"MR_small.dcm is not a CT image; its modality is 'MR'"):
        read_dicom(Path(get_testdata_file("MR_small.dcm", download=False)))
    image = dcmread(get_testdata_file("CT_small.dcm", download=False))
    del image.RescaleSlope
    image.save_as(tmp_path / "bare.dcm")
    with pytest.raises(InputError, match=r"bare.dcm is not one slice in HU .* it lacks RescaleSlope"):
        read_dicom(tmp_path / "bare.dcm")
    (tmp_path / "text.dcm").write_text("no image")
    with pytest.raises(InputError, match=r"text.dcm could not be read as DICOM"):
        read_dicom(tmp_path / "text.dcm")


def sample(n=3, side=32, valid=None):
    mu = np.random.default_rng(0).uniform(0, 20, (n, side, side)).astype(np.float32)
    return Slices("sample", mu, valid, np.full(n, 1e-3))


STILL = {"dataset": "sample", "share": 1.0, "turn": 0.0, "zoom": 0.0, "shift": 0.0, "gain": 0.0}


def test_a_still_whole_cut_is_the_area_mean_or_its_mirror_image():
    slices = sample(1)
    images, known = Cutter([(Cut(**STILL, side=(32, 32), upside_down=0.0), slices)], 16, 0).batch(0, 12)
    mean = torch.from_numpy(area_mean(slices.mu, 2))[0]
    plain = [torch.allclose(image, mean, atol=1e-3) for image in images]
    mirrored = [torch.allclose(image, mean.flip(1), atol=1e-3) for image in images]
    assert all(a != b for a, b in zip(plain, mirrored, strict=True))
    assert 0 < sum(plain) < 12
    assert bool((known == 1).all())


def test_batches_are_functions_of_seed_and_step():
    cuts = [(Cut(dataset="sample", share=1.0, side=(12, 32)), sample())]
    first = Cutter(cuts, 16, 0).batch(5, 4)[0]
    assert torch.equal(first, Cutter(cuts, 16, 0).batch(5, 4)[0])
    assert torch.equal(first[:2], Cutter(cuts, 16, 0).batch(5, 2)[0])
    assert not torch.equal(first, Cutter(cuts, 16, 0).batch(6, 4)[0])
    assert not torch.equal(first, Cutter(cuts, 16, 1).batch(5, 4)[0])


def test_zoomed_cuts_stay_inside_the_slice_and_keep_its_scale():
    slices = Slices("ramp", np.tile(np.arange(1, 65, dtype=np.float32), (1, 64, 1)), None, np.array([1e-3]))
    cut = Cut(**STILL, side=(16, 16), upside_down=0.0)
    images, _ = Cutter([(cut, slices)], 16, 0).batch(0, 20)
    assert images.min() >= 1
    steps = images.diff(dim=2).abs()
    assert torch.allclose(steps, torch.ones_like(steps), atol=1e-3)
    assert images.mean(dim=(1, 2)).std() > 3


def test_unknown_pixels_stay_unknown():
    valid = np.ones((1, 32, 32), bool)
    valid[0, 8:12, 8:12] = False
    cut = Cut(**STILL, side=(32, 32), upside_down=0.0)
    known = Cutter([(cut, sample(1, valid=valid))], 16, 0).batch(0, 6)[1]
    holes = 1 - known
    assert all(hole[4:6].sum() >= 4 for hole in holes)
    assert bool((holes.sum(dim=(1, 2)) <= 16).all())


def test_shares_are_kept():
    one, two = sample(), Slices("dark", np.zeros((1, 32, 32), np.float32), None, np.array([1e-3]))
    cuts = [(Cut(**STILL, side=(32, 32)), one), (Cut(**{**STILL, "share": 3.0}, side=(32, 32)), two)]
    images, _ = Cutter(cuts, 8, 0).batch(0, 200)
    assert (images.amax(dim=(1, 2)) == 0).float().mean().item() == pytest.approx(0.75, abs=0.12)


def test_cuts_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match=r"cuts of side \(16, 64\) do not fit slices \(32, 32\) of sample"):
        Cutter([(Cut(dataset="sample", share=1.0, side=(16, 64)), sample())], 16, 0)
    with pytest.raises(InputError, match="at least one cut"):
        Cutter([], 16, 0)
