"""The checks of samplers pass what is right and catch what is wrong."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch

import recon
from recon.checks import check_resume, check_sampler
from recon.errors import CheckFailed, InputError
from recon.operators import CG, MatrixOperator, ParallelBeam
from recon.samplers import DPS, METHODS, MMPS, State
from recon.schedules import LogLinear

EXACT = MMPS(steps=200, grid=LogLinear(), cg=CG(10, 1e-8))


def test_mmps_keeps_its_claim_on_a_matrix_and_on_a_scan() -> None:
    for operator in (None, ParallelBeam.half_turn((6, 6), 1e-3, 4)):
        figures = check_sampler(EXACT, operator, draws=1000)
        assert figures.bias < figures.bias_limit < 0.2


def test_a_heuristic_is_measured_not_judged() -> None:
    figures = check_sampler(DPS(steps=300, grid=LogLinear()), draws=1000)
    assert figures.bias > figures.bias_limit


@dataclass(frozen=True)
class Overconfident(MMPS):
    """Trusts the data twice as much as it may."""

    def guide(self, posterior: recon.Posterior, z: torch.Tensor, sigma: float, sigma_next: float) -> torch.Tensor:
        like = posterior.likelihood.gaussian()
        doubled = recon.Posterior(posterior.prior, type(like)(like.operator, like.y, like.sigma / 2**0.5))
        return super().guide(doubled, z, sigma, sigma_next)


@dataclass(frozen=True)
class Shifted(MMPS):
    """Adds a fifth of a unit to every draw."""

    def finish(self, posterior: recon.Posterior, state: State) -> recon.Ensemble:
        return super().finish(posterior, dataclasses.replace(state, z=state.z + 0.2))


@pytest.mark.parametrize(("wrong", "text"), [(Overconfident, "claims to be exact"), (Shifted, "mean off by 0")])
def test_a_false_claim_is_caught(wrong: type[MMPS], text: str) -> None:
    with pytest.raises(CheckFailed, match=text):
        check_sampler(wrong(steps=200, grid=LogLinear(), cg=CG(10, 1e-8)), draws=2000)


def test_a_large_operator_is_refused() -> None:
    with pytest.raises(InputError, match="<= 1024 values"):
        check_sampler(EXACT, MatrixOperator(torch.ones(1, 2000, dtype=torch.float64)))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_resumes_to_the_same_bits(method: str) -> None:
    assert check_resume(METHODS[method](steps=8)) == 4


@dataclass(frozen=True)
class Forgetful(MMPS):
    """Keeps its previous state on itself instead of in ``State.aux``."""

    memory: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict)

    def step(self, posterior: recon.Posterior, state: State, k: int, draws: recon.Draws) -> State:
        after = super().step(posterior, state, k, draws)
        before = self.memory.get(draws.members[0], after.z)
        self.memory[draws.members[0]] = after.z
        return dataclasses.replace(after, z=0.9 * after.z + 0.1 * before)


def test_hidden_state_is_caught() -> None:
    with pytest.raises(CheckFailed, match="not in its State"):
        check_resume(Forgetful(steps=8))
