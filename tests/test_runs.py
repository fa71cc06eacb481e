"""Checkpoints: two phases, refused when they belong elsewhere or are damaged, and the same bits after any stop."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

import recon
from recon.comm import Comm, serial
from recon.ensemble import Ensemble
from recon.errors import InputError, Stopped
from recon.likelihoods import GaussianLikelihood
from recon.operators import MatrixOperator
from recon.priors import GaussianPrior
from recon.runs import Checkpoints, RunFolder
from recon.samplers import METHODS, Sampler
from recon.samplers.base import State


def posterior() -> recon.Posterior:
    generator = torch.Generator().manual_seed(0)
    operator = MatrixOperator(torch.randn(3, 5, generator=generator))
    return recon.Posterior(
        GaussianPrior(torch.zeros(5), torch.ones(5)), GaussianLikelihood(operator, torch.ones(3), 0.3)
    )


def draw(sampler: Sampler, run: Checkpoints | None = None, workers: int = 1) -> Ensemble:
    return recon.sample(posterior(), sampler, draws=7, seed=3, block=2, comm=serial(workers), run=run)


class StopAt(Checkpoints):
    """Checkpoints that are asked to stop after some step."""

    def __init__(self, folder: Path, step: int, identity: str = "a") -> None:
        super().__init__(folder, serial(1), identity, every=1e9)
        self.at = step

    def after_step(self, done: int, steps: int, states: dict[int, State]) -> None:
        self.stop = done >= self.at
        super().after_step(done, steps, states)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("workers", [1, 3])
def test_stop_and_resume_gives_the_same_bits(tmp_path: Path, method: str, workers: int) -> None:
    sampler = METHODS[method](steps=6)
    whole = draw(sampler)
    for step in (2, 4):
        with pytest.raises(Stopped, match=f"stopped at step {step} of 6"):
            draw(sampler, StopAt(tmp_path / "checkpoints", step), workers)
    resumed = draw(sampler, Checkpoints(tmp_path / "checkpoints", serial(workers), "a"), workers)
    assert (resumed.x == whole.x).all()
    assert resumed.info["cost"]["steps"] == 2


def test_the_last_bits_do_depend_on_the_state(tmp_path: Path) -> None:
    """The test above can fail: a checkpoint with one number changed gives other draws."""
    sampler = METHODS["mmps"](steps=6)
    with pytest.raises(Stopped):
        draw(sampler, StopAt(tmp_path, 3))

    class Changed(Checkpoints):
        def restore(self, owned: range) -> tuple[int, dict[int, State]] | None:
            found = super().restore(owned)
            assert found is not None
            found[1][0].z[0, 0] += 1e-3
            return found

    assert not (draw(sampler, Changed(tmp_path, serial(1), "a")).x == draw(sampler).x).all()


def test_resuming_reads_only_the_owned_blocks(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        draw(METHODS["dps"](steps=6), StopAt(tmp_path, 3))
    step, states = Checkpoints(tmp_path, serial(1), "a").restore(range(1, 4, 2)) or (0, {})
    assert step == 3 and sorted(states) == [1, 3]


def test_another_identity_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        draw(METHODS["dps"](steps=6), StopAt(tmp_path, 3))
    with pytest.raises(InputError, match="belongs to another configuration, measurement or prior"):
        draw(METHODS["dps"](steps=6), Checkpoints(tmp_path, serial(1), "b"))


@pytest.mark.parametrize("damage", ["cut", "changed", "missing"])
def test_a_damaged_block_is_refused(tmp_path: Path, damage: str) -> None:
    with pytest.raises(Stopped):
        draw(METHODS["dps"](steps=6), StopAt(tmp_path, 3))
    block = next(tmp_path.glob("step-*/block-00001.safetensors"))
    content = bytearray(block.read_bytes())
    if damage == "missing":
        block.unlink()
    elif damage == "cut":
        block.write_bytes(content[:-10])
    else:
        content[-5] ^= 1
        block.write_bytes(content)
    with pytest.raises(InputError, match=r"block-00001.safetensors (is damaged|cannot be read)"):
        draw(METHODS["dps"](steps=6), Checkpoints(tmp_path, serial(1), "a"))


def test_a_kill_between_the_phases_leaves_the_older_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = METHODS["mmps"](steps=6)
    with pytest.raises(Stopped):
        draw(sampler, StopAt(tmp_path, 2))

    def killed(path: Path, value: object) -> None:
        raise SystemExit("killed before the manifest")

    with monkeypatch.context() as patch:
        patch.setattr("recon.runs.write_json", killed)
        with pytest.raises(SystemExit):
            draw(sampler, StopAt(tmp_path, 4))
    restored = Checkpoints(tmp_path, serial(1), "a").restore(range(4))
    assert restored is not None and restored[0] == 2
    assert (draw(sampler, Checkpoints(tmp_path, serial(1), "a")).x == draw(sampler).x).all()


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_signals_ask_for_a_stop(tmp_path: Path, number: int) -> None:
    checkpoints = Checkpoints(tmp_path, serial(1), "a")
    before = signal.getsignal(number)
    with checkpoints.stopping_on_signals():
        os.kill(os.getpid(), number)
        with pytest.raises(Stopped, match="stopped at step 1 of 6"):
            draw(METHODS["mmps"](steps=6), checkpoints)
    assert signal.getsignal(number) is before


class Told:
    """An axis whose other rank was asked to stop."""

    rank, size = 0, 1

    def barrier(self) -> None: ...

    def bcast(self, value: object) -> object:
        return value

    def allgather(self, value: object) -> list[object]:
        return [value, (True, False)] if isinstance(value, tuple) and len(value) == 2 and value[0] is False else [value]

    def any(self, flag: bool) -> bool:
        return flag


def test_a_stop_asked_of_one_rank_stops_all(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, Comm(draws=Told()), "a", every=1e9)
    with pytest.raises(Stopped):
        checkpoints.after_step(1, 5, {})


def test_a_run_folder_is_never_overwritten_unasked(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.create("a: 1", "a: 1", {})
    with pytest.raises(InputError, match="an unfinished run: go on with `recon resume`"):
        folder.create("a: 2", "a: 2", {})
    folder.finish({"draws": 1})
    with pytest.raises(InputError, match="a finished run; --overwrite replaces it"):
        folder.create("a: 2", "a: 2", {})
    folder.create("a: 2", "a: 2", {}, overwrite=True)
    assert folder.config.read_text() == "a: 2" and not folder.done.exists()


def test_overwrite_never_removes_what_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="not empty and not a run folder"):
        RunFolder(tmp_path).create("", "", {}, overwrite=True)
    assert (tmp_path / "thesis.tex").exists()
    with pytest.raises(InputError, match="is a file"):
        RunFolder(tmp_path / "thesis.tex").refuse_existing(True)
