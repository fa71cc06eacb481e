"""Volumes that stay on disk: the bits of those in memory, nothing left behind, and what a full disk does."""

from __future__ import annotations

import gc
import resource
import signal
from pathlib import Path

import pytest
import torch

import recon
from recon.comm import serial
from recon.draws import Draws
from recon.errors import InputError, ReconError, Stopped
from recon.likelihoods import GaussianLikelihood, TransmissionLikelihood
from recon.operators import CG, AxisDifference, Blur, SliceStack
from recon.operators.streamed import DEEPEST, Stream, Streamed, slices_of
from recon.priors import GaussianPrior
from recon.priors.lifting import SlicesPrior
from recon.runs import Checkpoints
from recon.samplers import DDS, MMPS, Coupling, DiffusionMBIR
from recon.space import Space
from tests import zoo

WHOLE = Space.grid((6, 8, 8), (2e-3, 1e-3, 1e-3), "1/m")
IMAGE = Space.grid((8, 8), 1e-3, "1/m")
TIED = Coupling(1e-4)


@pytest.fixture(scope="module")
def problem():
    """A blurred volume of 8 x 8 x 6 under independent Gaussian slices, in memory: prior, operator of a slice, y, sigma."""
    blur = Blur(IMAGE, zoo.normal(3, 3, step=3), "zero").double()
    full = SliceStack(blur, WHOLE)
    sigma = 1e-3 * (1 + zoo.normal(*full.range.shape, step=4).abs())
    y = full.A(10 * zoo.normal(*WHOLE.shape, step=1)[None])[0] + sigma * zoo.normal(*full.range.shape, step=2)
    own = GaussianPrior(torch.full((64,), 8.0).double(), torch.linspace(20, 60, 64).double(), IMAGE)
    return SlicesPrior(own, WHOLE), blur, y, sigma


def in_memory(problem):
    prior, blur, y, sigma = problem
    return recon.Posterior(prior, GaussianLikelihood(SliceStack(blur, WHOLE), y, sigma))


def on_disk(problem, folder, depth):
    prior, blur, y, sigma = problem
    stream = Stream(WHOLE, "z", depth, folder)
    kept = [stream.kept(lambda a, b, v=v: v[a:b], -3) for v in (y, sigma)]
    return recon.Posterior(prior, GaussianLikelihood(SliceStack(blur, WHOLE, slab=stream), *kept)), stream


SAMPLERS = {
    "dds": DDS(steps=3, coupling=TIED, cg=CG(2, 0.0)),
    "round": DDS(steps=2, coupling=Coupling(1e-4, periodic=True, iterations=2), noise="guided", cg=CG(3, 0.0)),
    "mbir": DiffusionMBIR(steps=3, coupling=TIED),
    "slices alone": DDS(steps=2, coupling=Coupling(0.0)),
}


@pytest.mark.parametrize(("name", "depth"), [("dds", 1), ("dds", 6), ("round", 4), ("mbir", 4), ("slices alone", 4)])
def test_the_bits_are_those_of_a_volume_in_memory(problem, tmp_path, name, depth):
    plain = recon.sample(in_memory(problem), SAMPLERS[name], draws=2, block=2, seed=1)
    posterior, stream = on_disk(problem, tmp_path, depth)
    found = recon.sample(posterior, SAMPLERS[name], draws=2, block=2, seed=1)
    assert isinstance(found.x, Streamed)
    assert torch.equal(found.x.read(0, 6), plain.x)
    assert torch.equal(torch.cat(list(slices_of(found.x)), 1), plain.x)
    assert found.info["cost"]["denoiser"] == plain.info["cost"]["denoiser"]
    if name != "slices alone":  # there each part stops by itself
        assert found.info["cost"]["forward"] == plain.info["cost"]["forward"]
    assert stream.written > 0
    del found, posterior
    gc.collect()
    assert list(tmp_path.iterdir()) == [], "files go when nobody needs them"


def test_no_more_than_a_part_is_ever_read(problem, tmp_path, monkeypatch):
    """What keeps the memory: every reading of a file, of noise or of a network is of at most one part and its halo."""
    widest = []
    held = Stream.lazy

    def lazy(self, shape, dtype, at, read, depth=1):
        def seen(first, last):
            widest.append(last - first)
            return read(first, last)

        return held(self, shape, dtype, at, seen, depth)

    monkeypatch.setattr(Stream, "lazy", lazy)
    posterior, _ = on_disk(problem, tmp_path, 2)
    recon.sample(posterior, SAMPLERS["mbir"], draws=1)
    assert max(widest) == 2
    assert len(widest) > 50


def test_what_is_put_off_is_what_is_done(tmp_path):
    """Sums, products, shifts and differences of streamed tensors against those of whole ones; deep chains are written."""
    stream = Stream(WHOLE, "z", 4, tmp_path)
    x, y = zoo.normal(2, *WHOLE.shape), zoo.normal(*WHOLE.shape, step=1)
    a, b = stream.cut(x), stream.cut(y)
    cases = {
        "sum": lambda u, v: 2.0 * u - v / 3,
        "clamp": lambda u, v: (u - u.clamp(-0.5, 0.5)) * v,
        "where": lambda u, v: torch.where(u > v, u, 0.0).abs().sqrt(),
        "rows": lambda u, v: u[1] + v[None],
        "mean": lambda u, v: u.mean(0) - v,
        "view": lambda u, v: (u + v).reshape(2, 1, *WHOLE.shape).sum(1),
        "along": lambda u, v: u * torch.arange(6.0).double().reshape(6, 1, 1) + v,
        "cat": lambda u, v: torch.cat([u, v[None]]),
    }
    for name, case in cases.items():
        found, wanted = case(a, b), case(x, y)
        assert isinstance(found, Streamed), name
        assert torch.equal(found.read(0, 6), wanted), name
        assert torch.equal(found.read(1, 3), wanted.narrow(wanted.ndim - 3, 1, 2)), name
    for periodic in (False, True):
        far, near = AxisDifference(stream, "z", periodic), AxisDifference(WHOLE, "z", periodic)
        for which in ("A", "A_adjoint", "normal"):
            assert torch.equal(getattr(far, which)(a).read(0, 6), getattr(near, which)(x)), which
    deep, files = a, len(list(tmp_path.iterdir()))
    for _ in range(3 * DEEPEST):
        deep = deep * 1.1 + b
        assert deep.depth <= DEEPEST
    assert len(list(tmp_path.iterdir())) > files
    assert torch.equal(stream.draws(Draws(3, [0, 5])).normal(2, WHOLE.shape).read(1, 5), _noise()[:, 1:5])
    one, two = stream.dots([(a, a), (a, a + a)])
    whole = Stream(WHOLE, "z", 6, tmp_path).whole
    assert torch.equal(one, recon.operators.Slab(whole, "z").dots([(x, x)])[0])
    assert torch.equal(two, recon.operators.Slab(whole, "z").dots([(x, x + x)])[0])


def _noise():
    return Draws(3, [0, 5]).normal(2, WHOLE.shape)


def test_counts_become_line_integrals_on_disk(problem, tmp_path):
    _, blur, _, _ = problem
    counts = 50 + 20 * zoo.normal(*WHOLE.shape, step=8).abs().round()
    stream = Stream(WHOLE, "z", 4, tmp_path)
    streamed = TransmissionLikelihood(SliceStack(blur, WHOLE, slab=stream), stream.cut(counts), 1e3).gaussian()
    plain = TransmissionLikelihood(SliceStack(blur, WHOLE), counts, 1e3).gaussian()
    assert torch.equal(streamed.y.read(0, 6), plain.y)
    assert torch.equal(streamed.sigma.read(0, 6), plain.sigma)
    with pytest.raises(InputError, match="must not be negative"):
        TransmissionLikelihood(SliceStack(blur, WHOLE, slab=stream), stream.cut(-counts), 1e3)


def test_what_would_need_the_whole_is_refused(problem, tmp_path):
    posterior, stream = on_disk(problem, tmp_path, 2)
    x = stream.cut(zoo.normal(1, *WHOLE.shape))
    for wrong in (lambda: x.sum(), lambda: x.fft(), lambda: x.flatten(1), lambda: x.add_(1.0), lambda: x[:, 1:3]):
        with pytest.raises((InputError, AttributeError), match=r"stay on disk|fft"):
            wrong()
    with pytest.raises(InputError, match="at least one slice"):
        Stream(WHOLE, "z", 0, tmp_path)
    blurs = [problem[1], Blur(IMAGE, zoo.normal(3, 3, step=7), "zero").double()] * 3
    with pytest.raises(InputError, match="take one operator for all slices"):
        SliceStack(blurs, WHOLE, slab=stream).A(x)
    with pytest.raises((InputError, RuntimeError, TypeError)):
        recon.sample(posterior, MMPS(steps=2), draws=1)


class Halted(Checkpoints):
    """Writes a checkpoint after every step and stops after one of them."""

    at = 2

    def after_step(self, done, steps, states):
        self.stop = done == self.at
        super().after_step(done, steps, states)


@pytest.mark.parametrize("name", ["dds", "mbir"])
def test_a_checkpoint_is_the_files_and_resumes_to_the_same_bits(problem, tmp_path, name):
    sampler, folder = SAMPLERS[name], tmp_path / "checkpoints"
    wanted = recon.sample(in_memory(problem), sampler, draws=2, block=1, seed=4).x
    posterior, stream = on_disk(problem, tmp_path / "a", 4)
    with pytest.raises(Stopped):
        recon.sample(posterior, sampler, 2, 4, 1, serial(1), Halted(folder, serial(1), "same", 1e-9, stream))
    steps = [p.name for p in folder.glob("step-*")]
    assert steps == ["step-0000002"], "the generation before is gone, the last one is whole"
    assert len(list((folder / steps[0]).glob("*.z.bin"))) == 2
    # As after a kill: what was on disk is still there, and another process takes it up, with parts of another size.
    posterior, stream = on_disk(problem, tmp_path / "b", 1)
    again = recon.sample(posterior, sampler, 2, 4, 1, serial(1), Checkpoints(folder, serial(1), "same", 1e9, stream))
    assert torch.equal(again.x.read(0, 6), wanted)
    assert again.info["cost"]["steps"] == sampler.steps - 2
    field = next((folder / steps[0]).glob("*.z.bin"))
    with pytest.raises(InputError, match=r"of volumes that stay on disk; give run.memory_gb"):
        Checkpoints(folder, serial(1), "same").restore(range(2))
    field.write_bytes(field.read_bytes()[:-8])
    with pytest.raises(InputError, match="is damaged"):
        Checkpoints(folder, serial(1), "same", 1e9, stream).restore(range(2))


def test_a_full_disk_is_said_and_costs_nothing_that_was_finished(problem, tmp_path):
    """A quota of fewer bytes than a field: the message, no half-written file, and the checkpoint before still resumes."""
    folder, sampler = tmp_path / "checkpoints", SAMPLERS["dds"]
    posterior, stream = on_disk(problem, tmp_path / "a", 4)
    full = Halted(folder, serial(1), "same", 1e-9, stream)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def quota(self, done, steps, states):
        Checkpoints.after_step(self, done, steps, states)
        if done == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))

    full.after_step = quota.__get__(full)
    try:
        with pytest.raises(ReconError, match=r"no room left on the disk of .*recon resume"):
            recon.sample(posterior, sampler, 1, 4, 1, serial(1), full)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert all(p.stat().st_size in (0, 6 * 64 * 8) or p.suffix != ".bin" for p in Path(tmp_path / "a").iterdir())
    again = recon.sample(posterior, sampler, 1, 4, 1, serial(1), Checkpoints(folder, serial(1), "same", 1e9, stream))
    assert torch.equal(again.x.read(0, 6), recon.sample(in_memory(problem), sampler, 1, 4, 1).x)
    assert again.info["cost"]["steps"] == sampler.steps - 2
