"""The matrix behind the projectors of slices: its blocks, its products, its memory, and its files."""

from __future__ import annotations

import fcntl
import json
import math
import multiprocessing
import os
import pickle
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

from recon.checks import check_adjoint
from recon.errors import InputError
from recon.operators import FanBeam, FanGeometry, ParallelBeam, matrix_cache
from recon.operators.csr import SparsePair
from recon.operators.scan_blocks import NAMES, SIDE
from recon.space import Space
from tests import zoo

PIXEL = 1e-3


def parallel(projector="line", shape=(70, 135), views=30, limit=4e9) -> ParallelBeam:
    """Two by three tiles, neither side a whole number of them; groups of unlike length."""
    angles = 0.1 + np.arange(views) * math.pi / views
    return ParallelBeam(Space.grid(shape, PIXEL, "1/m"), angles, 150, 1.2e-3, 2e-3, projector, limit)


def fan(limit=4e9) -> FanBeam:
    geometry = FanGeometry(np.linspace(0, 6, 40), 130, 1.9e-3, 0.2, 0.15, 3e-3, 0.1, "curved", "strip")
    return FanBeam(Space.grid((70, 135), PIXEL, "1/m"), geometry, limit)


def sparse(A) -> csr_matrix:
    """The matrix of a fresh operator in double precision, for scipy's products."""
    return A.matrix.blocks.csr({name: getattr(A.matrix, name).numpy() for name in NAMES}).astype(np.float64)


def close(a, b, digits):
    return float((a - b).norm() / b.norm()) < digits


# --- Products -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [parallel, lambda: parallel("strip"), lambda: parallel("linear"), fan])
def test_blocks_are_one_matrix(make):
    """Both products against scipy's, over several tiles and groups, in both precisions and in packs of all widths."""
    A = make()
    assert A.matrix.blocks.grid.tiles == 6
    assert A.matrix.blocks.groups > 1
    assert A.matrix.blocks.scan.views % A.matrix.blocks.views_per_group
    M = sparse(A)
    for dtype, digits in ((torch.float32, 1e-6), (torch.float64, 1e-14)):
        A = A.to(dtype)
        for n in (1, 3, 17):
            x, y = zoo.normal(n, M.shape[1], dtype=dtype), zoo.normal(n, M.shape[0], dtype=dtype)
            assert close(A.matrix(x).double(), torch.from_numpy((M @ x.double().numpy().T).T), digits)
            assert close(A.matrix.transpose(y).double(), torch.from_numpy((M.T @ y.double().numpy().T).T), digits)


def test_a_draw_gets_the_same_bits_in_any_company():
    """1, 16 and 32 draws share a pack in single precision, 1, 8 and 16 in double."""
    for dtype in (torch.float32, torch.float64):
        A = parallel(views=20).to(dtype)
        x, y = zoo.normal(35, *A.domain.shape, dtype=dtype), zoo.normal(35, *A.range.shape, dtype=dtype)
        whole = A(x), A.A_adjoint(y)
        for part in (slice(0, 1), slice(3, 5), slice(0, 16), slice(34, None), slice(1, 34), [30, 2, 9]):
            assert torch.equal(A(x[part]), whole[0][part])
            assert torch.equal(A.A_adjoint(y[part]), whole[1][part])


@pytest.mark.parametrize("limit", [4e9, 0])
def test_threads_do_not_change_a_bit(limit):
    A = parallel(limit=limit, views=30)
    x, y = zoo.normal(3, *A.domain.shape, dtype=torch.float32), zoo.normal(3, *A.range.shape, dtype=torch.float32)
    before, answers = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            answers.append((A(x), A.A_adjoint(y), A(x[:1]), A.A_adjoint(y[:1])))
    finally:
        torch.set_num_threads(before)
    for other in answers[1:]:
        assert all(torch.equal(a, b) for a, b in zip(answers[0], other, strict=True))


@pytest.mark.parametrize("make", [parallel, fan])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_on_the_fly_is_the_same_to_the_last_bit(make, dtype):
    kept, fly = make().to(dtype), make(limit=0).to(dtype)
    assert (kept.stored, fly.stored) == (True, False)
    assert fly.bytes < 10
    x, y = zoo.normal(2, *kept.domain.shape, dtype=dtype), zoo.normal(2, *kept.range.shape, dtype=dtype)
    assert torch.equal(fly(x), kept(x))
    assert torch.equal(fly.A_adjoint(y), kept.A_adjoint(y))


def test_many_draws_on_the_fly(monkeypatch):
    """More of them than share one making of the matrix."""
    monkeypatch.setattr("recon.operators.system_matrix._DRAWS", 4)
    kept, fly = parallel(views=3), parallel(views=3, limit=0)
    x = zoo.normal(9, *kept.domain.shape, dtype=torch.float32)
    assert torch.equal(fly(x), kept(x))


@pytest.mark.parametrize("make", [parallel, lambda: parallel(limit=0), lambda: fan(limit=0)])
def test_other_machines_multiply_the_same_matrix(make, monkeypatch):
    """What CUDA tensors take, run on the CPU: torch's sparse products, whole or group by group."""
    A = make().double()
    x, y = zoo.normal(3, *A.domain.shape), zoo.normal(3, *A.range.shape)
    expected = A(x), A.A_adjoint(y)
    pairs = list(A.matrix._pairs())
    assert len(pairs) == (1 if A.stored else A.matrix.blocks.groups)
    assert all(isinstance(pair, SparsePair) for _, pair in pairs)
    flat, back = torch.cat([pair(x.flatten(1)) for _, pair in pairs], 1), torch.zeros(3, A.domain.size).double()
    for first, pair in pairs:
        back += pair.transpose(y.flatten(1)[:, first : first + pair.shape[0]])
    assert close(flat.reshape(expected[0].shape), expected[0], 1e-13)
    assert close(back.reshape(expected[1].shape), expected[1], 1e-13)


def test_a_pair_is_made_once_and_again_after_a_move():
    A = zoo.beam()
    (_, first), (_, again) = next(A.matrix._pairs()), next(A.matrix._pairs())
    assert first is again
    ((_, moved),) = A.double().matrix._pairs()
    assert moved.values.dtype == torch.float64


@pytest.mark.gpu
def test_cuda_agrees():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    for limit in (4e9, 0):
        A = parallel(limit=limit)
        x, y = zoo.normal(3, *A.domain.shape, dtype=torch.float32), zoo.normal(3, *A.range.shape, dtype=torch.float32)
        expected = A(x), A.A_adjoint(y)
        A = A.to("cuda")
        assert close(A(x.cuda()).cpu(), expected[0], 1e-5)
        assert close(A.A_adjoint(y.cuda()).cpu(), expected[1], 1e-5)
        check_adjoint(A)


# --- Memory -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: parallel(shape=(256, 256)), lambda: parallel("strip"), fan])
def test_the_matrix_takes_little_more_than_its_numbers(make):
    """At most 1.2 times a float32 and a 32-bit index per entry, for both directions together."""
    A = make()
    assert A.bytes == sum(buffer.numel() * buffer.element_size() for buffer in A.buffers())
    assert A.bytes <= 1.2 * 8 * A.matrix.values.numel()
    assert A.bytes >= 6 * A.matrix.values.numel()


@pytest.mark.parametrize("make", [zoo.shifted_beam, zoo.off_centre_beam, zoo.measured_beam, zoo.fan, parallel, fan])
def test_memory_is_predicted(make):
    A = make()
    assert 0.97 * A.bytes <= A.matrix.blocks.predicted() <= 1.35 * A.bytes


def test_large_matrices_are_not_made():
    """n^2 pixels meet 4/pi rays of each view, 6 bytes each: 12 GB; a few views say so."""
    A = ParallelBeam.half_turn((1024, 1024), 1e-4, 1440)
    assert not A.stored
    assert A.matrix.blocks.predicted() == pytest.approx(6 * 1024**2 * 1440 * 4 / math.pi, rel=0.06)


def test_copies_hold_the_matrix_once():
    A = parallel()
    list(A.matrix._pairs())
    assert len(pickle.dumps(A)) < 1.05 * A.bytes
    assert A.state_dict() == {}


def test_types_and_places_do_not_mix():
    with pytest.raises(
        InputError,
        match=r"holds torch\.float32 numbers and computes in float32 or float64; got torch\.float64 \(convert",
    ):
        zoo.beam()(zoo.normal(9, 8))
    with pytest.raises(InputError, match=r"holds torch\.float16 numbers and computes in float32 or float64"):
        zoo.beam().half()(torch.zeros(9, 8, dtype=torch.float16))
    with pytest.raises(InputError, match="this operator is on cpu; got a tensor on meta"):
        zoo.beam()(torch.zeros(9, 8, device="meta"))


def test_without_numba(monkeypatch):
    from recon.operators.scan_blocks import kernels

    kernels.cache_clear()
    monkeypatch.setitem(sys.modules, "numba", None)
    with pytest.raises(InputError, match=r"needs the Python package 'numba'.*pip install 'recon\[ct\]'"):
        zoo.beam()


def test_rooms_start_with_a_cache_line_and_hold_no_junk():
    """Neither changes an answer; both cost time where they are missing."""
    from recon.operators import block_products, packs

    for keep in (None, "image", "image"):
        given, sums = packs.room(7, 16, np.dtype(np.float32), keep), packs.room(7, 8, np.dtype(np.float64))
        assert given.ctypes.data % 64 == sums.ctypes.data % 64 == 0
        given[:], sums[:] = math.nan, math.nan
        block_products._clear(given, sums, 15)
        assert not given.any()
        assert not sums.any()


def test_tiles_agree():
    from recon.operators import ray_kernels

    assert ray_kernels.SIDE == SIDE


# --- Files --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("RECON_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(matrix_cache, "SMALLEST", 0)
    return tmp_path / "cache"


@pytest.fixture
def builds(monkeypatch) -> list[str]:
    """One entry for each time that a matrix is made."""
    from recon.operators.scan_blocks import ScanBlocks

    made, build = [], ScanBlocks.build
    monkeypatch.setattr(ScanBlocks, "build", lambda self: made.append(self.scan.projector) or build(self))
    return made


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def test_a_matrix_is_made_once(folder, builds):
    first, second = parallel(views=5), parallel(views=5)
    assert builds == ["line"]
    assert len(files(folder)) == 1
    assert sorted(path.suffix for path in folder.iterdir()) == [".lock", ".safetensors"]
    x = zoo.normal(*first.domain.shape, dtype=torch.float32)
    assert torch.equal(first(x), second(x))
    parallel("strip", views=5), parallel(views=6), parallel(shape=(70, 134), views=5)
    assert builds == ["line", "strip", "line", "line"]


def test_equal_rays_share_a_file(folder, builds):
    A = zoo.shifted_beam("line")
    ParallelBeam(Space.grid((5, 6, 11), (1.0, 1.5e-3, 1.5e-3), "1/m"), A.geometry)
    assert builds == ["line"]
    ParallelBeam(Space.grid((6, 11), 1.5e-3 * (1 + 1e-9), "1/m"), A.geometry)
    assert len(builds) == 2


def test_files_are_mapped_and_cannot_be_changed(folder):
    parallel(views=5)
    A = parallel(views=5)
    maps, name = Path("/proc/self/maps"), str(files(folder)[0])
    if maps.exists():  # Linux tells
        assert any(name in line for line in maps.read_text().splitlines())
    before = files(folder)[0].read_bytes()
    A.matrix.values.mul_(2.0)
    assert files(folder)[0].read_bytes() == before
    fresh = parallel(views=5)
    assert torch.equal(2 * fresh.matrix.values, A.matrix.values)


def test_files_are_safetensors(folder):
    from safetensors.torch import load_file

    A = zoo.fan("strip")
    stored = load_file(files(folder)[0])
    assert set(stored) == set(NAMES)
    assert all(torch.equal(stored[name], getattr(A.matrix, name)) for name in NAMES)


def test_damaged_files_are_made_again(folder, builds):
    A = zoo.fan()
    (path,) = files(folder)
    good = path.read_bytes()
    length = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + length])
    del header["rows"]
    damaged = [
        b"",
        good[:5],
        good[: len(good) // 2],
        good[:-1],
        good[:-1] + bytes([good[-1] ^ 1]),
        good[: 8 + length] + bytes([good[8 + length] ^ 0x80]) + good[9 + length :],
        (2**62).to_bytes(8, "little") + good[8:],
        good[:8] + b"[" + good[9:],
        good[:8] + json.dumps(header).encode().ljust(length) + good[8 + length :],
    ]
    x = zoo.normal(*A.domain.shape, dtype=torch.float32)
    expected = A(x)
    del A  # nothing is mapped while the file is cut short
    for number, content in enumerate(damaged, 2):
        path.write_bytes(content)
        assert torch.equal(zoo.fan()(x), expected)
        assert len(builds) == number
        assert path.read_bytes() == good
    assert sorted(one.suffix for one in folder.iterdir()) == [".lock", ".safetensors"]


@pytest.mark.parametrize("value", ["", "0", " "])
def test_the_cache_can_be_switched_off(monkeypatch, tmp_path, builds, value):
    monkeypatch.setattr(matrix_cache, "SMALLEST", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("RECON_CACHE", value)
    zoo.fan(), zoo.fan()
    assert len(builds) == 2
    assert list(tmp_path.iterdir()) == []


def test_where_files_are(monkeypatch, tmp_path):
    monkeypatch.delenv("RECON_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert matrix_cache.folder() == tmp_path / "xdg" / "recon"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert matrix_cache.folder() == tmp_path / "home" / ".cache" / "recon"
    monkeypatch.setenv("RECON_CACHE", "~/here")
    assert matrix_cache.folder() == tmp_path / "home" / "here"


def test_small_matrices_are_not_kept(monkeypatch, folder):
    monkeypatch.setattr(matrix_cache, "SMALLEST", 1e6)
    zoo.fan()
    assert not folder.exists()
    parallel("strip")
    assert len(files(folder)) == 1


def test_a_folder_that_cannot_be_written_costs_nothing_but_time(monkeypatch, folder, builds):
    folder.write_text("this is a file")
    A = zoo.fan()
    assert builds == ["line"]
    monkeypatch.setattr(fcntl, "flock", no_locks)
    folder.unlink()
    x = zoo.normal(*A.domain.shape, dtype=torch.float32)
    assert torch.equal(zoo.fan()(x), A(x))


def no_locks(*_: object) -> None:
    raise OSError("this file system has no locks")


def test_the_least_recently_used_goes_first(folder, monkeypatch):
    made = [zoo.beam(views=views) for views in (5, 6, 7)]
    del made
    by_age = files(folder)
    for age, path in enumerate(by_age):
        os.utime(path, (1e9 - age, 1e9 - age))
    sizes = [path.stat().st_size for path in by_age]
    monkeypatch.setenv("RECON_CACHE_BYTES", str(sizes[0] + sizes[1]))
    matrix_cache.make_room(folder)
    assert files(folder) == sorted(by_age[:2])
    matrix_cache.make_room(folder, 0)
    assert files(folder) == []


def test_reading_is_using(folder):
    zoo.beam(), zoo.beam("strip")
    for path in files(folder):
        os.utime(path, (1e9, 1e9))
    zoo.beam("strip")
    matrix_cache.make_room(folder, max(path.stat().st_size for path in files(folder)))
    assert len(files(folder)) == 1
    assert files(folder)[0].stat().st_mtime > 1e9


def test_a_mapped_file_is_not_removed(folder):
    A = zoo.beam()
    matrix_cache.make_room(folder, 0)
    assert len(files(folder)) == 1
    del A
    matrix_cache.make_room(folder, 0)
    assert files(folder) == []


def test_what_dead_processes_left_is_removed(folder):
    folder.mkdir()
    for name, age in (("old.tmp", 2e5), ("new.tmp", 10), ("old.lock", 2e5), ("note.txt", 2e5)):
        (folder / name).write_text("")
        os.utime(folder / name, (time.time() - age,) * 2)
    matrix_cache.make_room(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["new.tmp", "note.txt"]


def test_a_matrix_larger_than_the_bound_is_not_written(folder, monkeypatch, builds):
    monkeypatch.setenv("RECON_CACHE_BYTES", "1e3")
    zoo.beam(), zoo.beam()
    assert len(builds) == 2
    monkeypatch.setenv("RECON_CACHE_BYTES", "8 GB")
    with pytest.raises(InputError, match="RECON_CACHE_BYTES must be a number of bytes, such as 8e9; got '8 GB'"):
        zoo.beam()


def _rank(barrier, results, log) -> None:
    from recon.operators.scan_blocks import ScanBlocks

    build = ScanBlocks.build

    def slow(self):
        with open(log, "a") as file:  # noqa: PTH123
            file.write("built\n")
        time.sleep(0.5)
        return build(self)

    ScanBlocks.build = slow  # type: ignore[method-assign]
    matrix_cache.SMALLEST = 0
    barrier.wait()
    A = zoo.fan()
    results.put(A(zoo.normal(*A.domain.shape, dtype=torch.float32)).numpy().tobytes())


def test_of_many_ranks_one_makes_the_matrix(folder, tmp_path):
    zoo.fan("linear")  # compiles, so that the processes below do not
    context = multiprocessing.get_context("fork")
    barrier, results, log = context.Barrier(3), context.Queue(), tmp_path / "log"
    ranks = [context.Process(target=_rank, args=(barrier, results, log)) for _ in range(3)]
    for rank in ranks:
        rank.start()
    answers = {results.get(timeout=60) for _ in ranks}
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [0, 0, 0]
    assert log.read_text() == "built\n"
    assert len(answers) == 1


def test_a_rank_that_waits_too_long_makes_its_own(folder, monkeypatch, builds):
    monkeypatch.setattr(matrix_cache, "PATIENCE", 0.1)
    folder.mkdir()
    lock = folder / f"{zoo.beam().matrix.blocks.key()}.lock"
    for path in files(folder):
        path.unlink()
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        zoo.beam()
    assert len(builds) == 2
