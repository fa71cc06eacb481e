"""A volume cut over ranks: the same bits on one, two and three, and no slice travels that the formulas do not name."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from recon.comm import Comm, SerialAxis, serial
from recon.draws import Draws
from recon.errors import InputError, ReconError
from recon.operators import CG, AxisDifference, Blur, Slab, SliceStack
from recon.samplers import Coupling, ztv
from recon.samplers.volumes.ztv import slab_of
from recon.space import Space
from tests import zoo

SPACE = Space(("channel", "z", "y"), (2, 7, 3), {"z": np.array([0.0, 1.0, 1.5, 3.0, 4.0, 6.0, 6.5])}, "K")


class Thread(SerialAxis):
    """One of several ranks that are threads of this process; they meet at a barrier."""

    def __init__(self, rank: int, size: int, board: list, meet: threading.Barrier) -> None:
        super().__init__(rank, size)
        object.__setattr__(self, "board", board)
        object.__setattr__(self, "meet", meet)

    def allgather(self, value):
        self.board[self.rank] = value
        self.meet.wait()
        found = list(self.board)
        self.meet.wait()
        return found

    def exchange(self, parcels: list[np.ndarray]) -> list[np.ndarray]:
        return [parcels[self.rank] for parcels in self.allgather(parcels)]


def played(size, run, space=SPACE):
    """``run(slab)`` on every rank: the slabs and the answers."""
    board, meet = [None] * size, threading.Barrier(size, timeout=60)
    slabs = [Slab(space, "z", Thread(rank, size, board, meet)) for rank in range(size)]
    with ThreadPoolExecutor(size) as pool:
        return slabs, list(pool.map(run, slabs))


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_every_slice_has_one_owner(size):
    slabs = [Slab(SPACE, "z", SerialAxis(rank, size)) for rank in range(size)]
    assert [k for s in slabs for k in range(s.first, s.last)] == list(range(7))
    assert {s.last - s.first for s in slabs} <= {7 // size, 7 // size + 1}
    x = zoo.normal(2, *SPACE.shape)
    torch.testing.assert_close(torch.cat([s.cut(x) for s in slabs], 2), x, rtol=0, atol=0)
    assert [float(v) for s in slabs for v in s.space.coords["z"]] == SPACE.coords["z"].tolist()


@pytest.mark.parametrize("size", [2, 3])
def test_noise_is_that_of_the_global_position(size):
    draws = Draws(5, [0, 3])
    whole = draws.normal(4, SPACE.shape, dtype=torch.float64)
    for rank in range(size):
        slab = Slab(SPACE, "z", SerialAxis(rank, size))
        own = slab.draws(draws)
        assert torch.equal(own.of_case(3).normal(0, slab.space.shape), slab.draws(draws.of_case(3)).normal(0, slab.space.shape))
        assert len(own) == 2
        assert torch.equal(own.normal(4, slab.space.shape, dtype=torch.float64), slab.cut(whole))


@pytest.mark.parametrize("periodic", [False, True])
@pytest.mark.parametrize("size", [2, 3])
def test_differences_over_ranks_are_those_of_the_whole(size, periodic):
    """D takes one slice of a neighbour, its transpose one, both together two; the ends of a volume that ends take fewer."""
    x, whole = zoo.normal(2, *SPACE.shape), AxisDifference(SPACE, "z", periodic)
    for name, halo in (("A", 1), ("A_adjoint", 1), ("normal", 2)):
        slabs, parts = played(size, lambda s, name=name: getattr(AxisDifference(s, "z", periodic), name)(s.cut(x)))
        assert torch.equal(torch.cat(parts, 2), getattr(whole, name)(x))
        for rank, slab in enumerate(slabs):
            ends = (rank == 0 and name != "A") + (rank == size - 1 and name != "A_adjoint")
            slices = 2 * (halo if periodic else halo - ends)  # two draws
            assert (slab.traffic["slices"], slab.traffic["bytes"]) == (slices, slices * 2 * 3 * 8)


K, OUTER = 5, 3
CUBE = Space.grid((7, 6, 5), (2e-3, 1e-3, 1e-3), "1/m")


def expected(rank, size, periodic):
    """Slices that a rank receives in an outer iteration of ADMM with K of conjugate gradients."""
    ends = (rank == 0) + (rank == size - 1)
    return 4 + 2 * K if periodic and size > 1 else 0 if size == 1 else 4 + 2 * K if ends == 0 else 2 + K


@pytest.mark.parametrize("periodic", [False, True])
def test_distributed_admm_is_the_serial_one_and_sends_what_the_formula_says(periodic):
    blur = Blur(Space.grid((6, 5), 1e-3, "1/m"), zoo.normal(3, 3, step=3), "zero").double()
    full = SliceStack(blur, CUBE)
    y = full.A(10 * zoo.normal(2, *CUBE.shape, step=1)) + 1e-3 * zoo.normal(2, *full.range.shape, step=2)
    coupling = Coupling(1e-4, periodic=periodic, iterations=OUTER)

    def solved(slab):
        here = y[:, slab.first : slab.last]
        return ztv(SliceStack(blur, slab.space, slab=slab), here, 1e-3, coupling, CG(K, 0.0))

    whole = ztv(full, y, 1e-3, coupling, CG(K, 0.0))
    for size in (1, 2, 3):
        slabs, parts = played(size, solved, CUBE)
        assert torch.equal(torch.cat(parts, 1), whole)
        for rank, slab in enumerate(slabs):
            slices = 2 * expected(rank, size, periodic) * OUTER  # two draws
            assert slab.traffic["slices"] == slices
            assert slab.traffic["bytes"] == slices * 6 * 5 * 8
            assert slab.traffic["reductions"] == (1 + 2 * K) * OUTER


def test_sums_are_taken_slice_by_slice():
    a, b = zoo.normal(2, *SPACE.shape), zoo.normal(2, *SPACE.shape, step=1)
    slab = Slab(SPACE, "z")
    torch.testing.assert_close(slab.parts(a, b), (a * b).sum((1, 3)), rtol=1e-12, atol=0)
    one, two = slab.dots([(a, b), (a, a)])
    torch.testing.assert_close(one, (a * b).flatten(1).sum(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(two, a.square().flatten(1).sum(1), rtol=1e-12, atol=0)
    assert slab.traffic == {"reductions": 1}
    halves = [Slab(SPACE, "z", SerialAxis(rank, 2)) for rank in range(2)]
    assert torch.equal(torch.cat([s.parts(s.cut(a), s.cut(b)) for s in halves], 1), slab.parts(a, b))


def test_a_solver_finds_the_slab_inside_an_operator():
    slab = Slab(zoo.slices().domain, "z")
    inside = 2.0 * SliceStack(zoo.slices().slice(0), slab.space, slab=slab)
    assert slab_of(inside, Coupling(1.0), slab.space) is slab
    with pytest.raises(InputError, match="volumes are cut across 'z'; set coupling.axis to that"):
        slab_of(inside, Coupling(1.0, axis="y"), slab.space)


def test_what_cannot_be_cut_is_refused():
    with pytest.raises(InputError, match="has 7 slices across 'z', fewer than the 8 ranks"):
        Slab(SPACE, "z", SerialAxis(0, 8))
    with pytest.raises(InputError, match="has no axis 'x' to be cut along"):
        Slab(SPACE, "x")
    with pytest.raises(InputError, match="the slab of this rank does not fit the slices across 'z'"):
        SliceStack(zoo.slices().slice(0), zoo.slices().domain, slab=Slab(SPACE, "z"))
    for comm, slabs in ((Comm(draws=SerialAxis(0, 4)), 3), (serial(), 2), (serial(), 0)):
        with pytest.raises(InputError, match="processes cannot be cut into volumes of"):
            comm.cut(slabs)
    assert serial(4).cut(1).workers == 1
    slab = Slab(SPACE, "z", SerialAxis(0, 2))
    slab._thread = -1
    with pytest.raises(ReconError, match="worked on by one thread"):
        slab.neighbours(slab.cut(zoo.normal(1, *SPACE.shape)))


# --- Processes ---------------------------------------------------------------------------------------------------------------

MPIEXEC = Path(sys.executable).parent / "mpiexec"
PROGRAM = """
import hashlib, json
import torch
import recon
from recon.comm import from_environment
from recon.likelihoods import GaussianLikelihood
from recon.draws import Draws
from recon.operators import CG, Blur, Slab, SliceStack
from recon.priors import GaussianPrior
from recon.priors.lifting import SlicesPrior
from recon.samplers import DDS, Coupling, DiffusionMBIR, ztv
from recon.space import Space


def normal(*shape, step):
    return Draws(1, [0]).normal(step, shape, "user", dtype=torch.float64)[0]


ranks = from_environment()
comm = ranks.cut(ranks.draws.size)
whole = Space.grid((7, 6, 5), (2e-3, 1e-3, 1e-3), "1/m")
slab = Slab(whole, "z", comm.slab)
image = Space.grid((6, 5), 1e-3, "1/m")
beam = Blur(image, normal(3, 3, step=3), "zero").double()
operator = SliceStack(beam, slab.space, slab=slab)
full = SliceStack(beam, whole)
y = full.A(10 * normal(1, *whole.shape, step=1))[0] + 1e-3 * normal(*full.range.shape, step=2)
here = y[slab.first:slab.last]

def said(values):
    return hashlib.sha256(slab.gather(values).numpy().tobytes()).hexdigest()

out = {}
for periodic in (False, True):
    n_cg, outer = 5, 3
    slab.traffic.clear()
    coupling = Coupling(1e-4, periodic=periodic, iterations=outer)
    x = ztv(operator, here[None], 1e-3, coupling, CG(n_cg, 0.0))
    counts = [slab.traffic[name] / outer for name in ("slices", "bytes", "reductions")]
    out[f"ztv {periodic}"] = [said(x), comm.slab.allgather(counts)]
own = GaussianPrior(torch.full((30,), 8.0).double(), torch.linspace(20, 60, 30).double(), image)
prior = SlicesPrior(own, slab.space)
posterior = recon.Posterior(prior, GaussianLikelihood(operator, here, 1e-3))
tied, apart = Coupling(1e-4), Coupling(0.0)
for sampler in (DDS(steps=4, coupling=tied), DiffusionMBIR(steps=3, coupling=tied), DDS(steps=3, coupling=apart)):
    run = recon.sample(posterior, sampler, draws=3, block=2, seed=1, comm=comm)
    out[f"{type(sampler).__name__} {sampler.coupling.weight}"] = [said(run.x), []]
if comm.root:
    print(json.dumps(out))
"""


@pytest.mark.slow
@pytest.mark.mpi
@pytest.mark.skipif(not MPIEXEC.exists(), reason="needs the mpiexec of the mpich wheel beside this python")
def test_one_two_and_three_processes_give_the_same_bits():
    """ADMM-CG and whole samplers; per outer iteration 4 + 2 K slices and 1 + 2 K sums, 2 + K slices at an end."""
    found = []
    for count in (1, 2, 3):
        done = subprocess.run(
            [str(MPIEXEC), "-n", str(count), sys.executable, "-c", PROGRAM],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
    assert [{name: row[0] for name, row in one.items()} for one in found] == [
        {name: row[0] for name, row in found[0].items()}
    ] * 3
    for count, one in zip((1, 2, 3), found, strict=True):
        for periodic in (False, True):
            for rank, (slices, sent, sums) in enumerate(one[f"ztv {periodic}"][1]):
                count_of = expected(rank, count, periodic)
                who = f"{count} processes, {'periodic' if periodic else 'with ends'}, rank {rank}"
                print(f"{who}: {slices:g} slices ({count_of}), {sent:g} bytes, {sums:g} sums ({1 + 2 * K})")
                assert (slices, sent, sums) == (count_of, count_of * 6 * 5 * 8, 1 + 2 * K)
