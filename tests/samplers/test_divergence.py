"""Draws that stop being numbers: said at that step, with the place and a way out, and the others kept."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import pytest
import torch

import recon
from recon.comm import Comm
from recon.draws import Draws
from recon.errors import Diverged
from recon.samplers import DPS, MMPS, State
from recon.selftest import gaussian_problem


@dataclass(frozen=True)
class Breaking(MMPS):
    """Puts a NaN into one draw at one step."""

    draw: int = 3
    at: int = 4
    weight: bool = False

    def step(self, posterior: recon.Posterior, state: State, k: int, draws: Draws) -> State:
        after = super().step(posterior, state, k, draws)
        if k != self.at or self.draw not in draws.members:
            return after
        row = draws.members.index(self.draw)
        z, log_w = after.z.clone(), after.log_w.clone()
        if self.weight:
            log_w[row] = torch.nan
        else:
            z[row, 0] = torch.nan
        return State(z, log_w, after.aux)


@dataclass(frozen=True)
class Meeting(Breaking):
    """Lets draws meet."""

    couples = True


@pytest.mark.parametrize("weight", [False, True])
def test_the_block_is_named_and_the_others_come_with_the_error(weight: bool, caplog: pytest.LogCaptureFixture) -> None:
    posterior = gaussian_problem()
    with caplog.at_level(logging.WARNING, "recon.samplers"), pytest.raises(Diverged) as caught:
        recon.sample(posterior, Breaking(steps=9, weight=weight), draws=7, block=2)
    text = str(caught.value)
    level = MMPS(steps=9).sigmas(posterior)[4]
    assert f"Breaking: draws 2 to 3 are not finite after step 5 of 9 (sigma {level:.4g})" in text
    assert "5 draws are fine" in text and MMPS.advice in text
    kept, whole = caught.value.ensemble, recon.sample(posterior, MMPS(steps=9), draws=7, block=2)
    assert torch.equal(kept.x, whole.x[[0, 1, 4, 5, 6]])
    assert len(caplog.records) == 1
    # The lost block was stopped at that step: two draws, five of nine steps.
    assert kept.info["cost"]["denoiser"] == whole.info["cost"]["denoiser"] - 2 * 4


def test_nothing_is_left_to_compute() -> None:
    posterior = gaussian_problem(snr=1e8)
    with pytest.raises(
        Diverged, match=r"draws 0 to 4 are not finite after step \d+ of 200 \(sigma .*form 'bayes' without guard is stable"
    ) as caught:
        recon.sample(posterior, DPS(steps=200, guard=False), draws=5)
    assert caught.value.ensemble is None
    assert posterior.evaluations["denoiser"] < 5 * 200


def test_draws_that_meet_stop_at_once() -> None:
    posterior = gaussian_problem()
    with pytest.raises(Diverged, match="after step 5 of 9") as caught:
        recon.sample(posterior, Meeting(steps=9), draws=7, block=2)
    assert caught.value.ensemble is None
    assert posterior.evaluations["denoiser"] == 7 * 5


class Kept:
    """Remembers what a checkpoint would hold, and starts from it when told to."""

    def __init__(self, start: tuple[int, dict[int, State]] | None = None) -> None:
        self.start, self.seen = start, {}

    def restore(self, owned: range) -> tuple[int, dict[int, State]] | None:
        return self.start

    def after_step(self, done: int, steps: int, states: dict[int, State]) -> None:
        self.seen[done] = dict(states)


def test_a_checkpoint_after_the_loss_is_whole_and_resumes_to_the_same() -> None:
    posterior, sampler, run = gaussian_problem(), Breaking(steps=9), Kept()
    with pytest.raises(Diverged) as first:
        recon.sample(posterior, sampler, draws=7, block=2, run=run)
    assert set(run.seen[7]) == {0, 1, 2, 3}
    with pytest.raises(Diverged, match="draws 2 to 3 are not finite") as second:
        recon.sample(posterior, sampler, draws=7, block=2, run=Kept((7, run.seen[7])))
    assert torch.equal(first.value.ensemble.x, second.value.ensemble.x)
    assert second.value.ensemble.info["cost"]["denoiser"] == 5 * 2  # nothing was spent on the lost block


@dataclass(frozen=True)
class OneOfTwo:
    """An axis of two ranks of which this is the second; what the first would send is given."""

    theirs: tuple
    rank: int = 1
    size: int = 2

    def barrier(self) -> None:
        return None

    def bcast(self, value):
        return value

    def allgather(self, value):
        return [(*self.theirs, *value[3:]), value]

    def any(self, flag: bool) -> bool:
        return flag


def test_ranks_fail_together() -> None:
    """A rank whose own draws are all fine raises too when another rank lost some."""
    posterior, sampler = gaussian_problem(), MMPS(steps=5)
    first = recon.sample(posterior, sampler, draws=4, block=2)
    theirs = (
        {0: (first.x[:2], first.log_weights[:2])},
        {"seconds": 1.0, "steps": 5},
        ["MMPS: draws 4 to 5 are not finite"],
    )
    comm = Comm(draws=OneOfTwo(theirs), workers=1)  # type: ignore[arg-type]
    with pytest.raises(Diverged, match="draws 4 to 5") as caught:
        recon.sample(posterior, sampler, draws=4, block=2, comm=comm)
    assert torch.equal(caught.value.ensemble.x, first.x)
