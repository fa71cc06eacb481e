"""Children and places: unbiased for every scheme, by integration over the random number; places that keep blocks together."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from recon.comm import SerialAxis, serial
from recon.errors import InputError, ReconError
from recon.samplers.smc.exchange import Plan, Table, carry_out
from recon.samplers.smc.resampling import SCHEMES, children, parents
from recon.samplers.smc.weights import effective, evidence_variance, log_mean, normalised, tempered


def some_weights(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    log_w = 1.5 * torch.randn(count, generator=generator, dtype=torch.float64)
    log_w[count // 3] = -torch.inf
    return normalised(log_w)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("count", "n"), [(7, 7), (5, 12), (9, 4)])
def test_every_scheme_is_unbiased(scheme: str, count: int, n: int) -> None:
    """The mean over u in (0, 1) is an exact sum over the intervals between the points where the children change.

    With all uniform numbers equal to u each child's own law is right, which is all that the expectation asks.
    """
    weights = some_weights(count, seed=count)
    edges = weights.cumsum(0)
    rest = n * weights - (n * weights).floor()
    breaks = torch.cat([edges, (n * edges) % 1.0, (rest.cumsum(0) / rest.sum()), torch.tensor([0.0, 1.0])])
    cuts = breaks.clamp(0, 1).sort().values
    mean = torch.zeros(count, dtype=torch.float64)
    for low, high in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True):
        if high - low > 1e-14:
            u = torch.full((n,), 0.5 * (low + high), dtype=torch.float64)
            counts = children(weights, n, u, scheme)
            assert int(counts.sum()) == n and int(counts[weights == 0].sum()) == 0
            mean += (high - low) * counts.double()
    torch.testing.assert_close(mean, n * weights, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_equal_weights_lose_nobody_but_by_multinomial(scheme: str) -> None:
    u = torch.rand(64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    counts = children(torch.full((64,), 1 / 64, dtype=torch.float64), 64, u, scheme)
    assert bool((counts == 1).all()) == (scheme != "multinomial")


def test_systematic_gives_floor_or_ceiling() -> None:
    weights = some_weights(50, seed=2)
    for u in (0.01, 0.4, 0.99):
        share = 50 * weights
        counts = children(weights, 50, torch.tensor([u], dtype=torch.float64))
        assert bool((counts >= share.floor()).all()) and bool((counts <= share.ceil()).all())


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(InputError, match=r"one of systematic, stratified, residual, multinomial; got 'best'"):
        children(some_weights(4, 0), 4, torch.rand(4), "best")


@pytest.mark.parametrize("block", [2, 8, 16])
def test_places_keep_survivors_and_blocks(block: int) -> None:
    for seed in range(20):
        counts = children(some_weights(64, seed), 64, torch.tensor([0.3], dtype=torch.float64))
        places = parents(counts)
        assert np.array_equal(np.bincount(places, minlength=64), counts.numpy())
        alive = counts.numpy() > 0
        assert np.array_equal(places[alive], np.flatnonzero(alive))
        strangers = int((places // block != np.arange(64) // block).sum())
        # No assignment sends fewer over the borders of blocks than those that do not fit into their own.
        least = int((counts.reshape(-1, block).sum(1) - block).clamp(min=0).sum())
        assert strangers == least


def test_a_plan_sends_each_particle_once_to_each_process() -> None:
    owner = np.array([0, 0, 1, 1, 2, 2])
    plan = Plan.of(np.array([0, 0, 0, 0, 0, 5]), owner)
    assert {pair: list(numbers) for pair, numbers in plan.moves.items()} == {(0, 1): [0], (0, 2): [0]}
    assert plan.particles == 2


class Two(SerialAxis):
    """One of two ranks that sees what the other sent."""

    def __init__(self, rank: int, box: dict) -> None:
        super().__init__(rank, 2)
        object.__setattr__(self, "box", box)

    def exchange(self, parcels: list[np.ndarray]) -> list[np.ndarray]:
        for target, parcel in enumerate(parcels):
            self.box[self.rank, target] = parcel
        return [self.box.get((source, self.rank), np.empty(0, np.uint8)) for source in range(2)]


@pytest.mark.parametrize(
    ("parents_of", "sent_by_first"), [([0, 0, 0, 2, 4, 0, 6, 4], 2), ([0, 0, 0, 3, 4, 5, 6, 7], 1)]
)
def test_rows_arrive_where_their_children_stand(parents_of: list[int], sent_by_first: int) -> None:
    from dataclasses import replace

    members, box = {0: (0, 1, 4, 5), 1: (2, 3, 6, 7)}, {}
    owner, places = np.array([0, 0, 1, 1, 0, 0, 1, 1]), np.array(parents_of)
    table = Table(owner, {})
    whole = {
        "z": torch.randn(8, 3, 2),
        "first": torch.arange(8),
        "none": torch.zeros(8, 0),
        "flag": torch.arange(8) > 3,
    }
    for _ in range(2):  # the second time every parcel is in the box
        for rank in (0, 1):
            rows = {name: values[list(members[rank])] for name, values in whole.items()}
            comm = replace(serial(1), draws=Two(rank, box))
            if _ == 0:
                try:
                    carry_out(rows, members[rank], places, table, comm)
                except ValueError:
                    continue
                continue
            got, planned, sent = carry_out(rows, members[rank], places, table, comm)
            assert planned == sent == (sent_by_first if rank == 0 else 0) * (3 * 2 * 4 + 8 + 1)
            for name, values in whole.items():
                assert torch.equal(got[name], values[places[list(members[rank])]])


def test_weights_say_what_they_mean() -> None:
    log_w = torch.tensor([0.0, math.log(3.0), -torch.inf], dtype=torch.float64)
    torch.testing.assert_close(normalised(log_w), torch.tensor([0.25, 0.75, 0.0], dtype=torch.float64))
    assert effective(normalised(log_w)) == pytest.approx(1.6) and log_mean(log_w) == pytest.approx(math.log(4 / 3))
    assert effective(normalised(torch.full((5,), -1e6, dtype=torch.float64))) == pytest.approx(5)


@pytest.mark.parametrize(
    ("log_w", "text"),
    [
        ([-torch.inf, -torch.inf], "none of 2 particles has a weight above zero"),
        ([0.0, torch.nan], "1 of 2 log-weights are NaN"),
        ([0.0, torch.inf], "1 of 2 log-weights are NaN or"),
        ([], "none of 0 particles"),
    ],
)
def test_weights_that_say_nothing_are_named(log_w: list[float], text: str) -> None:
    with pytest.raises(ReconError, match=text):
        normalised(torch.tensor(log_w, dtype=torch.float64))


def test_the_ladder_keeps_what_it_was_told() -> None:
    generator = torch.Generator().manual_seed(0)
    base = 0.1 * torch.randn(200, generator=generator, dtype=torch.float64)
    potential = 30 * torch.randn(200, generator=generator, dtype=torch.float64)
    t = tempered(base, potential, 100.0)
    assert 0 < t < 1
    assert effective(normalised(base + t * potential)) == pytest.approx(100, rel=1e-6)
    assert tempered(base, 0.01 * potential, 100.0) == 1.0
    assert tempered(1000 * base, potential, 100.0) == 0.0


def test_evidence_variance_of_weights_alone() -> None:
    """Without resampling it is the unbiased estimate of Var(mean w) / mean^2."""
    w = torch.rand(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = evidence_variance(w / w.sum(), torch.arange(40))
    assert found == pytest.approx(float(w.var() / 40 / w.mean() ** 2))
    assert evidence_variance(w / w.sum(), torch.zeros(40)) == 1.0
