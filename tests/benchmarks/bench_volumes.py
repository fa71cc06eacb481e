"""A held-out real volume from few or one-sided views: baselines, slice-wise sampling, and the samplers that couple slices.

    RECON_DATA=DIR python tests/benchmarks/bench_volumes.py [--slices 16] [--first 80] [--views 8 4 2] [--arc 90]
        [--steps 40] [--levels 150] [--draws 8] [--tv 0.3 1 3 10] [--methods fbp sirt ...] [--record FILE] [--docs FILE]
    python tests/benchmarks/bench_volumes.py --table FILE [--docs FILE]
    python tests/benchmarks/bench_volumes.py --ranks 2 [--record FILE]

The abdomen of ``volumes_3d.h5`` (3 mm voxels in HU, not among what the prior was trained on), turned as the training slices
lie and set in air to 128 x 128; slices ``first .. first + slices - 1``, parallel beam slice by slice, noise of 1 % of the root
mean square of the line integrals.  Problems: so many views over 180 degrees, and 60 views over ``--arc`` degrees.

Per method: PSNR in dB as the mean over the slices across each axis, with the range of the volume as peak; roughness, the mean
|difference| of neighbouring slices over the truth's; the misfit chi2 per datum; and processor seconds of one thread, which a
busy machine does not change.  The coupling's weight is taken from the slices before those that are reconstructed, times the
factor of ``WEIGHTS``, which was found on other slices.  TV is at the best of its weights on this very volume.

steps: of DiffPIR and DDS.  levels: of DiffusionMBIR, the long run (published: 2000).  draws: that a mean is taken over.
perp: the same prior on slices across z and across y, for --slices 128 (the whole volume, set in air).
record: a file to which every row is added as a line of JSON; rows that it has are not run again.  docs: write the page that
shows them.  ranks: the time of a cut volume of 128 x 128 x 64 on one process and on so many.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import recon
from recon.baselines import TVSolver, fbp, tv
from recon.comm import from_environment, serial
from recon.datasets.slices import attenuation, locate
from recon.draws import Draws
from recon.likelihoods import GaussianLikelihood
from recon.operators import CG, ParallelBeam, Slab, SliceStack
from recon.priors import Prior, load_prior
from recon.priors.lifting import SlicesPrior, perpendicular
from recon.samplers import DDS, Coupling, DiffPIR, DiffusionMBIR, Sampler, typical_weight
from recon.space import Space

SIDE, VOXEL, NOISE = 128, 3e-3, 0.01
METHODS = ("fbp", "sirt", "tv", "diffpir", "diffpir mean", "mbir", "dds", "dds mean", "perp")
WALK: dict[str, Any] = {"sigma_max": 20.0, "sigma_min": 0.01}
WEIGHTS = {
    "mbir": {"8 views": 0.15, "4 views": 0.15, "2 views": 0.15, "arc 90 deg": 0.2},
    "dds": {"8 views": 0.18, "4 views": 0.15, "2 views": 0.15, "arc 90 deg": 0.3},
    "dds mean": {"8 views": 0.12, "4 views": 0.08, "2 views": 0.07, "arc 90 deg": 0.2},
}
"""Of the coupling, in typical weights: roughness nearest to one on slices 60 to 63, a draw's and that of a mean of draws."""


@dataclass(frozen=True)
class Problem:
    """What is true and what was measured.  beam: the operator as a stack of slices, for the baselines."""

    name: str
    truth: Tensor
    beam: ParallelBeam
    operator: SliceStack
    y: Tensor
    sigma: float


def volume(slices: int | None = None) -> Tensor:
    """The whole volume in 1/m: (z, 128, 128); set in air along z too where more slices are asked for."""
    import h5py

    with h5py.File(locate("volumes_3d", "ct/volumes_3d.h5", None, "")) as file:
        mu = attenuation(file["totalsegmentator_example"][:])[:, ::-1]
    shape = (max(len(mu), slices or 0), SIDE, SIDE)
    whole = np.zeros(shape, np.float32)
    low = [(n - m) // 2 for n, m in zip(shape, mu.shape, strict=True)]
    whole[tuple(slice(a, a + m) for a, m in zip(low, mu.shape, strict=True))] = mu
    return torch.from_numpy(whole)


def problem(name: str, truth: Tensor, angles: np.ndarray) -> Problem:
    """Simulated data of ``truth`` (z, y, x)."""
    space = Space.grid(tuple(truth.shape), VOXEL, "1/m")
    image = Space.grid((SIDE, SIDE), VOXEL, "1/m")
    operator = SliceStack(ParallelBeam(image, angles), space)
    clean = operator.A(truth)
    sigma = NOISE * float(clean.square().mean().sqrt())
    noise = Draws(0, [0]).normal(0, operator.range.shape, "data")[0]
    return Problem(name, truth, ParallelBeam(space, angles), operator, clean + sigma * noise, sigma)


def sirt(p: Problem, iterations: int = 100) -> Tensor:
    """``x += C A^T R (y - A x)``, not below zero; R and C are inverse sums of rows and columns (Gilbert 1972)."""
    A = p.operator
    rows, columns = A.A(torch.ones(A.domain.shape)), A.A_adjoint(torch.ones(A.range.shape))
    R, C = (torch.where(s > 1e-6 * s.max(), 1 / s.clamp(min=1e-12), 0.0) for s in (rows, columns))
    x = torch.zeros(A.domain.shape)
    for _ in range(iterations):
        x = (x + C * A.A_adjoint(R * (p.y - A.A(x)))).clamp(min=0)
    return x


def best_tv(p: Problem, weights: Sequence[float]) -> Tensor:
    """Total variation of slices, at the weight with the best error."""
    solver = TVSolver(iterations=100, tolerance=3e-2)
    images = [tv(p.operator.slice(0), p.y, p.sigma, weight, solver).x for weight in weights]
    return min(images, key=lambda x: float((x - p.truth).square().mean()))


def drawn(sampler: Sampler, draws: int = 1, both: bool = False) -> Callable[[Problem], Tensor]:
    """The mean of draws; ``both`` averages the prior across z and across y."""

    def run(p: Problem) -> Tensor:
        one, space = load_prior("ct_axial"), p.operator.domain
        prior: Prior = SlicesPrior(one, space, chunk=8)
        if both:
            prior = perpendicular([SlicesPrior(one, space, axis, chunk=8, any_plane=True) for axis in ("z", "y")])
        posterior = recon.Posterior(prior, GaussianLikelihood(p.operator, p.y, p.sigma))
        return recon.sample(posterior, sampler, draws=draws, comm=serial(1)).mean()

    return run


def methods(given: argparse.Namespace, unit: float) -> dict[str, Callable[[Problem], Tensor]]:
    """What is compared; ``unit`` is the coupling's typical weight."""

    def tied(name: str) -> Callable[[Problem], Tensor]:
        def run(p: Problem) -> Tensor:
            kind = "dds" if name == "perp" else name
            coupling = Coupling(unit * WEIGHTS[kind].get(p.name, 0.2))
            if name == "mbir":
                # More iterations than the published one for fewer levels than the published 2000.
                return drawn(DiffusionMBIR(steps=given.levels, coupling=coupling, cg=CG(5, 0.0), **WALK))(p)
            walk = DDS(steps=given.steps, coupling=coupling, cg=CG(30, 1e-4), **WALK)
            return drawn(walk, given.draws if name == "dds mean" else 1, name == "perp")(p)

        return run

    return {
        "fbp": lambda p: fbp(p.beam, p.y, "hann"),
        "sirt": sirt,
        "tv": lambda p: best_tv(p, given.tv),
        "diffpir": drawn(DiffPIR(steps=given.steps, **WALK)),
        "diffpir mean": drawn(DiffPIR(steps=given.steps, **WALK), given.draws),
        **{name: tied(name) for name in ("mbir", "dds", "dds mean", "perp")},
    }


def row(p: Problem, name: str, x: Tensor, seconds: float) -> dict[str, Any]:
    """What is said of one reconstruction."""
    peak, error = float(p.truth.max() - p.truth.min()), (x - p.truth).square()
    inside = p.truth.abs() > 0
    values = []
    for axis in range(3):
        others = [a for a in range(3) if a != axis]
        kept = inside.any(others[1]).any(others[0])  # planes that hold something
        values.append(float((10 * torch.log10(peak**2 / error.mean(others)[kept])).mean()))
    rough = float((x[1:] - x[:-1]).abs().mean() / (p.truth[1:] - p.truth[:-1]).abs().mean())
    chi2 = float(((p.y - p.operator.A(x)) / p.sigma).square().mean())
    return {
        "problem": p.name, "method": name, "psnr": values, "roughness": rough, "chi2": chi2, "seconds": seconds,
    }  # fmt: skip


HEAD = f"{'problem':12s} {'method':12s} {'axial':>8s} {'coronal':>8s} {'sagittal':>8s} roughness   chi2/m   seconds\n"


def line(r: dict[str, Any]) -> str:
    """One row of the table."""
    cells = " ".join(f"{v:8.2f}" for v in r["psnr"])
    return f"{r['problem']:12s} {r['method']:12s} {cells} {r['roughness']:10.2f} {r['chi2']:9.2f} {r['seconds']:9.1f}\n"


def known(file: Path | None) -> dict[tuple[str, str, str], dict[str, Any]]:
    """The rows that a file has, by problem, method and settings; of several alike the last."""
    if file is None or not file.exists():
        return {}
    rows = [json.loads(text) for text in file.read_text().splitlines()]
    return {(r["problem"], r["method"], r["settings"]): r for r in rows if "psnr" in r}


def main() -> None:
    """Print the table, row by row as it comes; or that of a file, or the times of ranks."""
    given = options()
    torch.set_num_threads(1)
    if given.worker:
        worker(given)
        return
    if given.ranks:
        sys.stdout.write(ranks(given))
        return
    if not given.table:
        measure(given)
    rows = known(given.table or given.record)
    if given.table:
        sys.stdout.write(HEAD + "".join(line(r) for r in rows.values()))
    if given.docs:
        given.docs.write_text(page(rows, given.table or given.record))


def options() -> argparse.Namespace:
    """What the module's text says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slices", type=int, default=16)
    parser.add_argument("--first", type=int, default=80)
    parser.add_argument("--views", type=int, nargs="*", default=(8, 4, 2))
    parser.add_argument("--arc", type=float, nargs="*", default=(90.0,))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--levels", type=int, default=150)
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--tv", type=float, nargs="+", default=(0.3, 1.0, 3.0, 10.0), help="weights of TV, m")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=METHODS)
    for name in ("record", "table", "docs"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--ranks", type=int)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(given: argparse.Namespace) -> None:
    """Run what the record has not, a row at a time."""
    whole = volume(given.slices)
    first = 0 if given.slices >= len(whole) else given.first
    part = slice(first, first + given.slices)
    before = whole[: part.start] if first else whole
    unit = typical_weight(before[None], Space.grid(tuple(before.shape), VOXEL, "1/m"))
    sys.stdout.write(
        f"slices {part.start} to {part.stop - 1} of {len(whole)}, typical weight {unit:.3g} m^2; {given.steps} steps, "
        f"{given.levels} levels, means of {given.draws} draws\n{HEAD}"
    )
    scans = [(f"{v} views", np.arange(v) * math.pi / v) for v in given.views]
    scans += [(f"arc {a:g} deg", np.arange(60) * math.radians(a) / 60) for a in given.arc]
    runs = methods(given, unit)
    for name, angles in scans:
        p = problem(name, whole[part], angles)
        for method in given.methods:
            settings = said(given, name, method)
            have = known(given.record).get((name, method, settings))
            if have is None:
                start = time.process_time()
                try:
                    have = row(p, method, runs[method](p), time.process_time() - start)
                except recon.errors.InputError as error:
                    sys.stdout.write(f"{name:12s} {method:12s} refused: {error}\n")
                    continue
                if given.record:
                    with given.record.open("a") as file:
                        file.write(json.dumps({**have, "settings": settings}) + "\n")
            sys.stdout.write(line(have))
            sys.stdout.flush()


def said(given: argparse.Namespace, problem: str, method: str) -> str:
    """All that a row depends on, in words."""
    sizes = f"slices {given.first} to {given.first + given.slices - 1}"
    kind = {"diffpir mean": "diffpir", "perp": "dds"}.get(method, method)
    weight = WEIGHTS.get(kind, {}).get(problem)
    more = {
        "fbp": "", "sirt": "100 iterations", "tv": f"best of {list(given.tv)} m", "mbir": f"{given.levels} levels",
    }.get(method, f"{given.steps} steps")  # fmt: skip
    mean = f", mean of {given.draws} draws" if method.endswith("mean") else ""
    tie = "" if weight is None else f", coupling {weight:g} typical weights"
    return f"{sizes}: {more}{mean}{tie}"


# --- The page --------------------------------------------------------------------------------------------------------------

NAMES = {
    "fbp": "filtered back-projection", "sirt": "SIRT", "tv": "total variation, tuned on the truth",
    "diffpir": "DiffPIR by slices, a draw", "diffpir mean": "DiffPIR by slices, mean of draws",
    "mbir": "DiffusionMBIR, the long run", "dds": "DDS, a draw", "dds mean": "DDS, mean of draws",
    "perp": "DDS, prior across z and y", "ranks": "",
}  # fmt: skip

TEXT = """# Volumes from a prior of slices

Written by this command, which goes on where its record ends:

```sh
RECON_DATA=DIR python tests/benchmarks/bench_volumes.py --record FILE --docs docs/volumes.md
```

A held-out abdomen (TotalSegmentator's example, 3 mm voxels) that no prior has seen, under the prior `ct_axial` of axial
slices; parallel beam with 1 % noise.  PSNR in dB, the mean over the slices across each axis (peak: the range of the volume).
Roughness: mean |difference| of neighbouring slices over the truth's; 1 is right.  Misfit: chi2 per datum; below 1 where the
noise is fitted.  Seconds: of one processor.  {scene}

A draw of an exact posterior has twice the squared error of the posterior's mean, so draws and means of draws (which are the
estimate to compare with a regularised one) are kept apart.  Total variation is at the weight that is best for this very volume;
the weights of the couplings come from runs on other slices, chosen by roughness alone, but that of DDS with 8 views: it was
lowered from 0.2 to 0.18 when these slices had shown a roughness of 0.89.  Rows that are not there were not run.

{tables}
## Beside the published numbers

| views | DiffusionMBIR, published (axial / coronal / sagittal) | DDS, published (axial) |
|---|---|---|
| 8 | 33.49 / 35.18 / 32.18 | 33.86 (49 evaluations), 33.43 (99, variance exploding) |
| 4 | 30.52 / 30.09 / 27.89 | |
| 2 | 24.11 / 23.15 / 21.72 | |

Those are of 256 x 256 slices without noise, with a network of that data set and 2000 levels; only the order can be compared.
There, DDS in 49 evaluations is level with DiffusionMBIR in 4000.
{order}
"""


def title(problem: str) -> str:
    """A problem as a heading."""
    if problem.startswith("arc"):
        return f"Limited angle: 60 views over {problem.split()[1]} degrees"
    return f"{problem} over 180 degrees"


def page(rows: dict[tuple[str, str, str], dict[str, Any]], record: Path) -> str:
    """The Markdown of docs/volumes.md."""
    problems = list(dict.fromkeys(problem for problem, _, _ in rows))
    tables, order = [], []
    for problem in problems:
        mine = [(m, r) for m in METHODS for (where, method, _), r in rows.items() if (where, method) == (problem, m)]
        tables.append(
            f"## {title(problem)}\n\n| | axial | coronal | sagittal | roughness | misfit | seconds |\n{'|---' * 7}|\n"
        )
        for name, r in mine:
            cells = " | ".join(f"{v:.2f}" for v in r["psnr"])
            about = r["settings"].split(": ", 1)[1]
            label = f"{NAMES[name]} ({about})" if about else NAMES[name]
            tables.append(f"| {label} | {cells} | {r['roughness']:.2f} | {r['chi2']:.2f} | {r['seconds']:.0f} |\n")
        tables.append("\n")
        for dds, mbir in ((a, b) for one, a in mine for other, b in mine if (one, other) == ("dds", "mbir")):
            gain, ratio = np.mean(dds["psnr"]) - np.mean(mbir["psnr"]), mbir["seconds"] / dds["seconds"]
            order.append(
                f"Here, with {problem}, DDS in {dds['settings'].split(': ', 1)[1]}, is {gain:+.2f} dB from "
                f"DiffusionMBIR in 1/{ratio:.1f} of its time."
            )
    timed = [json.loads(text) for text in record.read_text().splitlines()]
    order += [r["said"] for r in timed if "said" in r][-1:]
    scene = next(iter(rows.values()))["settings"].split(":")[0].capitalize() + "."
    return TEXT.format(scene=scene, tables="".join(tables), order="\n" + "\n".join(order))


# --- Ranks -----------------------------------------------------------------------------------------------------------------


def worker(given: argparse.Namespace) -> None:
    """One of several processes that share a volume of 64 slices: one line of JSON from the first."""
    world = from_environment()
    comm = world.cut(world.draws.size)
    whole = Space.grid((64, SIDE, SIDE), VOXEL, "1/m")
    slab, image = Slab(whole, "z", comm.slab), Space.grid((SIDE, SIDE), VOXEL, "1/m")
    operator = SliceStack(ParallelBeam(image, np.arange(8) * math.pi / 8), slab.space, slab=slab)
    truth = slab.cut(volume()[24:88])
    y = operator.A(truth)
    prior = SlicesPrior(load_prior("ct_axial"), slab.space, chunk=8)
    posterior = recon.Posterior(prior, GaussianLikelihood(operator, y, 0.05))
    sampler = DDS(steps=3, coupling=Coupling(0.01), cg=CG(5, 0.0), **WALK)
    comm.slab.barrier()
    clock, own = time.perf_counter(), time.process_time()
    x = recon.sample(posterior, sampler, draws=1, comm=comm).x
    own = time.process_time() - own
    clock = time.perf_counter() - clock
    busy, bits = max(comm.slab.allgather(own)), hashlib.sha256(slab.gather(x).numpy().tobytes()).hexdigest()
    if comm.root:
        sys.stdout.write(json.dumps({"wall": clock, "busy": busy, "sha256": bits}) + "\n")


def ranks(given: argparse.Namespace) -> str:
    """One process against several, in words."""
    mpiexec, found = Path(sys.executable).parent / "mpiexec", []
    for count in (1, given.ranks):
        command = [str(mpiexec), "-n", str(count), sys.executable, __file__, "--worker"]
        environ = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environ)
        found.append(json.loads(done.stdout))
    one, more = found
    text = (
        f"A volume of 128 x 128 x 64 cut over {given.ranks} processes of one thread (3 steps of DDS, 8 views): "
        f"{one['wall']:.1f} s on one, {more['wall']:.1f} s on {given.ranks}, {one['wall'] / more['wall']:.2f} times as fast; "
        f"processor time of the busiest {one['busy']:.1f} and {more['busy']:.1f} s, {one['busy'] / more['busy']:.2f} times "
        "less; "
        f"load of the machine {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; "
        f"{'the same bits' if one['sha256'] == more['sha256'] else 'OTHER BITS'}.\n"
    )
    if given.record:
        with given.record.open("a") as file:
            file.write(json.dumps({"said": text.strip()}) + "\n")
    return text


if __name__ == "__main__":
    main()
