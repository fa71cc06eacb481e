"""A cone-beam scan cut over ranks: the rows that a slab falls on, the same bits on any number of ranks, no row sent in vain."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

import recon
from recon.comm import SerialAxis, serial
from recon.errors import InputError
from recon.likelihoods import GaussianLikelihood
from recon.operators import ConeBeam, ConeBeamSlab, ConeGeometry, Slab, VectorGeometry, cone_kernels
from recon.operators.cone_slabs import rows_by_slice, rows_dealt
from recon.priors import GaussianPrior
from recon.priors.lifting import SlicesPrior
from recon.samplers import DDS, Coupling, DiffusionMBIR
from recon.space import Space
from tests import zoo
from tests.test_slabs import MPIEXEC, played

SPACE = Space.grid((7, 5, 4), (3e-3, 5e-3, 6e-3), "1/m")
TURN = tuple(np.arange(5) * (2 * math.pi / 5))
CIRCLE = ConeGeometry(TURN, 14, 6, 6e-3, 0.1, 0.06, 3e-3)
TILTED = ConeGeometry(TURN, 14, 6, 6e-3, 0.1, 0.06, 3e-3, 1e-3, 2e-3, 0.1, 5e-3)
DOWN = VectorGeometry(tuple((*v[:9], *(-c for c in v[9:])) for v in CIRCLE.measured.vectors), 14, 6)
SCANS = {"circle": CIRCLE, "helix": TILTED, "rows down": DOWN}


# --- Which rows -------------------------------------------------------------------------------------------------------------


def test_the_rows_of_a_slice_are_those_of_its_extreme_rays():
    """On paper, looking along +y: heights of ``z +- dz`` seen over depths from the nearest y to the farthest."""
    geometry = ConeGeometry((0.0,), 40, 6, 6e-3, 0.1, 0.06, 1e-3)
    found = rows_by_slice(ConeBeam(SPACE, geometry).rays)
    reach = 0.1 + np.array([-3, 3]) * 5e-3  # five planes of y and one pixel on, for rays that run along x
    for k, (first, last) in enumerate(found):
        ends = np.outer(SPACE.coords["z"][k] + np.array([-3e-3, 3e-3]), 0.16 / reach) / 1e-3 + 19.5
        assert first == max(0, math.ceil(ends.min())) and last == min(40, math.floor(ends.max()) + 1)
    assert sum(last - first for first, last in found) < 0.7 * 7 * 40


# Rays along z, and a detector across the diagonal.
STEEP = VectorGeometry(((2e-3, 1e-3, 2e-2, 0, 0, 0, 1e-3, -1e-3, 0, 1e-3, 1e-3, 0),), 30, 30, "parallel")


@pytest.mark.parametrize("name", [*SCANS, "parallel", "steep"])
def test_no_ray_of_another_row_meets_a_slice(name):
    """And the rows are not too many: all but the outermost are met, where the detector is fine enough to meet the corners."""
    if name == "parallel":
        rays = ConeBeam(SPACE, zoo.parallel_rays().geometry).rays
    elif name == "steep":
        rays = ConeBeam(SPACE, STEEP).rays
    else:
        fine = VectorGeometry(
            tuple((*v[:6], *(c / 8 for c in v[6:9]), *v[9:]) for v in SCANS[name].measured.vectors), 14, 60
        )
        rays = ConeBeam(SPACE, fine).rays
    ones, met = torch.ones(1, 1, *SPACE.shape[1:]).double(), []
    for k, (first, last) in enumerate(rows_by_slice(rays)):
        seen = cone_kernels.project(rays, ones, (k, k + 1))[0].sum((0, 2)) > 0
        assert not bool(seen[:first].any()) and not bool(seen[last:].any())
        met += [bool(seen[first + 1 : last - 1].all())]
    assert name in ("parallel", "steep") or all(met)


def test_every_row_has_one_owner():
    for geometry in (CIRCLE, TILTED, DOWN):
        rays = ConeBeam(SPACE, geometry).rays
        for size in (1, 2, 3, 7):
            dealt = rows_dealt(rays, [rank * 7 // size for rank in range(size + 1)])
            assert sorted(i for pair in dealt for i in range(*pair)) == list(range(14))
            assert all(last > first for first, last in dealt)
    assert rows_dealt(ConeBeam(SPACE, DOWN).rays, [0, 3, 7])[0][0] > 0  # the lowest slab, the last rows
    # The middle of the volume, between slices 2 and 3 of 7, lies 1.5 mm below the axis and is seen 1.6 times as large.
    assert rows_dealt(ConeBeam(SPACE, CIRCLE).rays, [0, 3, 7])[0] == (0, math.ceil(6.5 - 1.5e-3 * 1.6 / 3e-3))
    far = ConeGeometry(TURN, 14, 6, 6e-3, 0.1, 0.06, 3e-3, row_offset=0.03)
    assert rows_dealt(ConeBeam(SPACE, far).rays, [0, 2, 4, 7])[0] == (0, 1)  # below the detector, and still a row


# --- The pair over ranks ----------------------------------------------------------------------------------------------------


BITS = SCANS | {"along z": VectorGeometry(STEEP.vectors * 5, 14, 6, "parallel")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", list(BITS))
def test_the_bits_are_the_same_on_any_number_of_ranks(name, dtype):
    """Those of one rank; of ``ConeBeam`` to rounding.  What travels is what the rows say, in both directions."""
    geometry = BITS[name]
    whole = ConeBeam(SPACE, geometry).to(dtype)
    x, y = zoo.normal(2, *SPACE.shape, dtype=dtype), zoo.normal(2, *whole.range.shape, step=1, dtype=dtype)

    def run(slab):
        A = ConeBeamSlab(slab, geometry).to(dtype)
        found = [A(slab.cut(x))]
        counted = [dict(slab.traffic)]
        found.append(A.A_adjoint(A.cut(y)))
        return A, found, [*counted, dict(slab.traffic)]

    alone = played(1, run, SPACE)[1][0][1]
    scale = whole(x.abs())  # of the sums without cancellation; each has fewer than 4 x 12 terms
    assert bool(((alone[0] - whole(x)).abs() <= 48 * torch.finfo(dtype).eps * scale).all())
    assert torch.equal(alone[1], whole.A_adjoint(y))
    item = x.element_size() * 2 * 5 * 6  # of a row: two draws, five views, six columns
    for size in (2, 3, 7):
        slabs, parts = played(size, run, SPACE)
        rows = torch.zeros_like(alone[0])
        for A, (forward, _), _ in parts:
            rows[:, :, slice(*A.rows)] = forward
        assert torch.equal(rows, alone[0])
        assert torch.equal(torch.cat([found[1] for _, found, _ in parts], 1), alone[1])
        for slab, (A, _, (first, both)) in zip(slabs, parts, strict=True):
            bands, mine = A.bands, set(range(*A.rows))
            partial = sum(len(mine & set(range(*bands[k]))) for k in range(7) if not slab.first <= k < slab.last)
            fallen = {i for k in range(slab.first, slab.last) for i in range(*bands[k])} - mine
            assert A.received() == (partial, len(fallen))
            assert (first.get("rows", 0), first.get("row_bytes", 0)) == (2 * partial, item * partial)
            assert both.get("rows", 0) - first.get("rows", 0) == 2 * len(fallen)
            assert both.get("row_bytes", 0) == item * (partial + len(fallen))
            if name == "circle":
                assert 0 < partial + len(fallen) < 7 * 14 / 2


def test_the_adjoint_is_the_transpose_across_ranks():
    """``<A x, y>`` summed over the ranks' rows against ``<x, A^T y>`` summed over their slices."""
    for size in (2, 3):
        slabs = played(size, lambda slab: ConeBeamSlab(slab, TILTED).double(), SPACE)[1]
        x, y = zoo.normal(*SPACE.shape), zoo.normal(*slabs[0].beam.range.shape, step=1)

        def products(slab, x=x, y=y):
            A = ConeBeamSlab(slab, TILTED).double()
            one, two = A(slab.cut(x)) * A.cut(y), slab.cut(x) * A.A_adjoint(A.cut(y))
            return float(one.sum()), float(two.sum()), float(one.abs().sum())

        left, right, size_of = np.sum(played(size, products, SPACE)[1], axis=0)
        # Sums of 700 products of sums of 48 terms, in double precision.
        assert abs(left - right) < 750 * np.finfo(float).eps * size_of
        assert abs(left) > 1e-3 * size_of


def problem(slab, geometry=CIRCLE):
    """Slices of one Gaussian under noisy projections of a volume of them.

    Its pixels are independent: on some processors a product of matrices rounds by how many rows it has.
    """
    image = Space(SPACE.dims[1:], SPACE.shape[1:], {}, "1/m")
    variances = 9 + zoo.normal(image.size, step=5).square() * image.size
    prior = GaussianPrior(torch.full((image.size,), 20.0).double(), variances, image)
    A = ConeBeamSlab(slab, geometry).double()
    y = A.beam(20 + 5 * zoo.normal(*SPACE.shape, step=6)) + 1e-2 * zoo.normal(*A.beam.range.shape, step=7)
    return recon.Posterior(SlicesPrior(prior, slab.space), GaussianLikelihood(A, A.cut(y), 1e-2))


TIED = Coupling(1e-3)
SAMPLERS = [
    DDS(steps=4, coupling=TIED, spread=5.0),
    DDS(steps=4, coupling=Coupling(0.0), spread=5.0),
    DiffusionMBIR(steps=3, coupling=TIED),
]


def test_samplers_of_volumes_take_it_and_draw_the_same_bits():
    """With coupled slices and without; on one rank, where the operator is whole, as on three."""

    def run(slab):
        return [recon.sample(problem(slab), s, draws=2, comm=serial(1)).x for s in SAMPLERS]

    alone = played(1, run, SPACE)[1][0]
    for size in (2, 3):
        parts = played(size, run, SPACE)[1]
        for i, one in enumerate(alone):
            assert torch.equal(torch.cat([part[i] for part in parts], 1), one)
    posterior = problem(Slab(SPACE))
    misfit = posterior.likelihood.gaussian().residual(alone[0]) / 1e-2
    assert float(misfit.square().mean()) < 2e-2 * float((posterior.likelihood.y / 1e-2).square().mean())


def test_what_cannot_be_cut_is_refused():
    with pytest.raises(InputError, match="a cone-beam scan is cut across 'z'; this volume is cut across 'y'"):
        ConeBeamSlab(Slab(SPACE, "y"), CIRCLE)
    flat = ConeGeometry(TURN, 2, 6, 6e-3, 0.1, 0.06, 3e-3)
    with pytest.raises(InputError, match="2 detector rows cannot be dealt to 3 ranks; use at most 2"):
        ConeBeamSlab(Slab(SPACE, "z", SerialAxis(0, 3)), flat)
    A = ConeBeamSlab(Slab(SPACE), CIRCLE)
    with pytest.raises(InputError, match=r"ConeBeamSlab\.cut"):
        A.cut(torch.zeros(3, 3))


# --- Processes --------------------------------------------------------------------------------------------------------------

PROGRAM = """
import hashlib, json
import torch
from recon.comm import from_environment
from recon.operators import Slab
from tests.operators.test_cone_slabs import CIRCLE, SAMPLERS, SPACE, ConeBeamSlab, problem
from tests import zoo
import recon

ranks = from_environment()
comm = ranks.cut(ranks.draws.size)
slab = Slab(SPACE, "z", comm.slab)
A = ConeBeamSlab(slab, CIRCLE)
found = [A(slab.cut(zoo.normal(3, *SPACE.shape, dtype=torch.float32)))]
traffic, expected = dict(slab.traffic), A.received()[0]
assert traffic.get("rows", 0) == 3 * expected, (traffic, expected)
rows = torch.cat([torch.from_numpy(p) for p in comm.slab.allgather(found[0].numpy())], 2)
volumes = [slab.gather(recon.sample(problem(slab), s, draws=2, comm=comm).x) for s in SAMPLERS]
if comm.root:
    print(json.dumps([hashlib.sha256(v.numpy().tobytes()).hexdigest() for v in [rows, *volumes]]))
"""


@pytest.mark.slow
@pytest.mark.mpi
@pytest.mark.skipif(not MPIEXEC.exists(), reason="needs the mpiexec of the mpich wheel beside this python")
def test_one_two_and_three_processes_give_the_same_bits():
    found = []
    for count in (1, 2, 3):
        line = [str(MPIEXEC), "-n", str(count), sys.executable, "-c", PROGRAM]
        done = subprocess.run(line, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
    assert found[0] == found[1] == found[2]
