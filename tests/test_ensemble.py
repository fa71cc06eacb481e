"""Ensembles: weights respected everywhere, files whole, labels right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

from recon import order
from recon.ensemble import Ensemble
from recon.errors import InputError
from recon.space import Space

SPACE = Space.grid((5, 4), 0.002, "1/m")


def ensemble(draws: int = 9, weighted: bool = False) -> Ensemble:
    generator = torch.Generator().manual_seed(draws)
    log_w = torch.randn(draws, generator=generator, dtype=torch.float64) if weighted else None
    return Ensemble(torch.randn(draws, 5, 4, generator=generator), SPACE, log_w, {"method": "test"})


def test_equal_weights_give_the_plain_statistics() -> None:
    e = ensemble()
    torch.testing.assert_close(e.mean(), e.x.mean(0))
    torch.testing.assert_close(e.std(), e.x.std(0))
    expected = np.quantile(e.x.double().numpy(), [0.1, 0.33, 0.9], axis=0, method="weibull")
    np.testing.assert_allclose(e.quantile([0.1, 0.33, 0.9]).numpy(), expected, rtol=1e-5)
    assert e.ess == pytest.approx(9)


@pytest.mark.parametrize("draws", [1, 2, 9, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_weights_have_a_faster_way_to_the_same_bits(draws: int, dtype: torch.dtype) -> None:
    x = torch.randn(draws, 37, generator=torch.Generator().manual_seed(draws), dtype=dtype)
    levels = [0.0, 0.05, 0.31, 0.5, 0.9, 1.0]
    e = Ensemble(x, Space.vector(37))
    slow = order._weighted(x, levels, e.weights)
    assert torch.equal(e.quantile(levels), slow)
    assert torch.equal(order.quantiles(x, levels, e.weights), slow) and order.quantiles(x, [], e.weights).shape == (0, 37)


def test_whole_number_weights_are_repetitions_in_the_mean() -> None:
    repeat = torch.tensor([1, 3, 2, 5])
    e = Ensemble(torch.randn(4, 5, 4), SPACE, repeat.double().log())
    torch.testing.assert_close(e.mean(), torch.repeat_interleave(e.x, repeat, 0).mean(0))
    w = repeat / repeat.sum()
    spread = (w[:, None, None] * (e.x - e.mean()) ** 2).sum(0) / (1 - w.square().sum())
    torch.testing.assert_close(e.std(), spread.sqrt())


def test_a_draw_of_weight_zero_changes_nothing() -> None:
    e = ensemble()
    more = Ensemble(torch.cat([e.x, 100 + e.x[:1]]), SPACE, torch.cat([e.log_weights, torch.tensor([-torch.inf])]))
    torch.testing.assert_close(more.mean(), e.mean())
    torch.testing.assert_close(more.std(), e.std())
    torch.testing.assert_close(more.quantile([0.2, 0.5]), e.quantile([0.2, 0.5]))
    assert more.ess == pytest.approx(9)


def test_quantiles_are_symmetric_and_shift_with_the_data() -> None:
    e = ensemble(weighted=True)
    mirrored = Ensemble(-e.x, SPACE, e.log_weights)
    torch.testing.assert_close(mirrored.quantile(0.2), -e.quantile(0.8))
    torch.testing.assert_close(Ensemble(e.x + 3, SPACE, e.log_weights).quantile(0.3), e.quantile(0.3) + 3)


def test_resampling_keeps_the_mean_and_repeats_itself() -> None:
    e = ensemble(weighted=True)
    many = e.resample(20_000, seed=3)
    assert (
        float((many.mean() - e.mean()).abs().max()) < 2 * float(e.x.abs().max()) * 9 / 20_000
    )  # systematic: < 1 copy each
    assert (many.x == e.resample(20_000, seed=3).x).all() and many.info["resampled_from"] == 9


@pytest.mark.parametrize("weighted", [False, True])
def test_file_round_trip(tmp_path: Path, weighted: bool) -> None:
    e = ensemble(weighted=weighted)
    e.save(tmp_path / "e.nc", {"seed": 1})
    back = Ensemble.load(tmp_path / "e.nc")
    assert (back.x == e.x).all() and (back.log_weights == e.log_weights).all()
    assert back.space.mismatch(SPACE) is None and back.space.unit == "1/m" and back.info == e.info
    root = xr.open_dataset(tmp_path / "e.nc")
    np.testing.assert_array_equal(root["mean"].values, e.mean().numpy())
    assert root["x"].attrs["units"] == "mm" and float(root["x"][1] - root["x"][0]) == pytest.approx(2.0)
    assert root["std"].attrs["units"] == "1/m" and '"seed": 1' in root.attrs["provenance"]
    assert [p.name for p in tmp_path.iterdir()] == ["e.nc"]


def test_a_changed_byte_is_noticed(tmp_path: Path) -> None:
    e = Ensemble(torch.randn(64, 5, 4), SPACE)
    e.save(tmp_path / "e.nc")
    content = bytearray((tmp_path / "e.nc").read_bytes())
    stored = max(range(0, len(content) - 512, 512), key=lambda i: len(set(content[i : i + 512])))  # compressed draws
    content[stored + 100] ^= 0xFF
    (tmp_path / "bad.nc").write_bytes(content)
    with pytest.raises(InputError, match=r"bad\.nc is not a readable ensemble file"):
        Ensemble.load(tmp_path / "bad.nc")


@pytest.mark.parametrize("content", [b"", b"CDF\x01 no", None])
def test_unreadable_files(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "e.nc").write_bytes(content)
    with pytest.raises(InputError, match=r"e\.nc is not a readable ensemble file"):
        Ensemble.load(tmp_path / "e.nc")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "e.nc"
    ensemble().save(path)
    before = path.read_bytes()
    broken = Ensemble(torch.randn(2, 5, 4), SPACE, None, {"not JSON": object()})
    with pytest.raises(TypeError, match="JSON"):
        broken.save(path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["e.nc"]


@pytest.mark.parametrize(
    ("x", "log_w", "text"),
    [
        (torch.zeros(3, 4, 4), None, r"Ensemble takes"),
        (torch.zeros(5, 4), None, r"takes \(draw"),
        (torch.zeros(3, 5, 4), torch.zeros(2), "one log-weight per draw"),
        (torch.zeros(3, 5, 4), torch.full((3,), -torch.inf), "at least one must be finite"),
        (torch.zeros(3, 5, 4), torch.tensor([0, torch.nan, 0]), "below infinity"),
    ],
)
def test_refusals(x: torch.Tensor, log_w: torch.Tensor | None, text: str) -> None:
    with pytest.raises(InputError, match=text):
        Ensemble(x, SPACE, log_w)


def test_one_draw_has_no_spread() -> None:
    with pytest.raises(InputError, match="at least 2 draws"):
        Ensemble(torch.zeros(1, 5, 4), SPACE).std()
