"""Parallel-beam projection: recon against ASTRA's own call and deepinv's Tomography, side by side in one run.

256 x 256 pixels, 180 views, 32 images, float32, CPU.  ASTRA is called image by image, as its users do; the other two take the
batch.  Rounds are interleaved, so a busy machine slows all three alike; ratios are medians over rounds of the ratio within a
round.  A bar that falls short is reported, never an error: speed depends on the machine.

    python tests/benchmarks/bench_operators.py [--rounds 7] [--threads 1]
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch

from recon.checks import check_adjoint
from recon.operators import ParallelBeam

SIZE, VIEWS, IMAGES = 256, 180, 32
BARS = {"ASTRA": 6.0, "deepinv": 20.0}
Call = Callable[[], object]


def megabytes() -> float:
    """Peak resident memory of this process so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def recon_calls(x: torch.Tensor, y: torch.Tensor, operator: ParallelBeam) -> tuple[Call, Call]:
    return lambda: operator.A(x), lambda: operator.A_adjoint(y)


def astra_calls(x: torch.Tensor, y: torch.Tensor, operator: ParallelBeam) -> tuple[Call, Call]:
    """One forward or back projection per image through ASTRA's algorithms and data objects."""
    import astra

    geometry = astra.create_proj_geom("parallel", 1.0, operator.geometry.detectors, np.array(operator.geometry.angles))
    projector = astra.create_projector("line", geometry, astra.create_vol_geom(SIZE, SIZE))
    images, sinograms = x.numpy(), y.numpy()

    def forward() -> None:
        for image in images:
            key, _ = astra.create_sino(image, projector)
            astra.data2d.delete(key)

    def adjoint() -> None:
        for sinogram in sinograms:
            key, _ = astra.create_backprojection(sinogram, projector)
            astra.data2d.delete(key)

    return forward, adjoint


def deepinv_calls(x: torch.Tensor) -> tuple[Call, Call]:
    """The batch through Tomography; its adjoint is the exact one (the default, by backpropagation)."""
    import deepinv

    physics = deepinv.physics.Tomography(angles=VIEWS, img_width=SIZE, circle=False, normalize=False)
    images = x[:, None]
    with torch.no_grad():
        sinograms = torch.rand_like(physics.A(images))
    return lambda: physics.A(images), lambda: physics.A_adjoint(sinograms)


def timed(call: Call) -> float:
    """Milliseconds per image."""
    start = time.perf_counter()
    with torch.no_grad():
        call()
    return (time.perf_counter() - start) * 1e3 / IMAGES


def race(calls: dict[str, tuple[Call, Call]], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Forward and adjoint times of every contestant, round by round; the first round warms up."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, (forward, adjoint) in calls.items():
            pair = timed(forward), timed(adjoint)
            if number:
                times[name].append(pair)
    return times


def report(times: dict[str, list[tuple[float, float]]]) -> None:
    print(f"{'':10}{'forward':>12}{'adjoint':>12}   ms per image, median of {len(times['recon'])} rounds")
    for name, pairs in times.items():
        print(f"{name:10}{statistics.median(p[0] for p in pairs):12.2f}{statistics.median(p[1] for p in pairs):12.2f}")
    print()
    for name, bar in BARS.items():
        for which, label in ((0, "forward"), (1, "adjoint")):
            ratios = [theirs[which] / ours[which] for theirs, ours in zip(times[name], times["recon"], strict=True)]
            ratio = statistics.median(ratios)
            span = f"{min(ratios):.1f} to {max(ratios):.1f}"
            verdict(f"{label} {ratio:6.1f} times faster than {name} ({span}); bar {bar:.0f}", ratio >= bar)


def verdict(text: str, met: bool) -> None:
    print(f"{text:70} bar {'met' if met else 'not met'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")

    before, start = megabytes(), time.perf_counter()
    operator = ParallelBeam.half_turn((SIZE, SIZE), 1.0, VIEWS)
    print(
        f"{SIZE} x {SIZE} pixels, {VIEWS} views, {operator.geometry.detectors} detectors, {IMAGES} images, float32, CPU"
    )
    print(f"{options.threads} thread(s) of {os.cpu_count()}, load {os.getloadavg()[0]:.1f}")
    print(
        f"built in {time.perf_counter() - start:.1f} s; matrix and transpose {operator.bytes / 1e6:.0f} MB predicted, ",
        end="",
    )
    print(f"{sum(b.numel() * b.element_size() for b in operator.buffers()) / 1e6:.0f} MB held")
    x, y = torch.rand(IMAGES, *operator.domain.shape), torch.rand(IMAGES, *operator.range.shape)
    built = megabytes()
    operator.A(x), operator.A_adjoint(y)
    used = megabytes()
    calls = {"recon": recon_calls(x, y, operator), "ASTRA": astra_calls(x, y, operator), "deepinv": deepinv_calls(x)}
    report(race(calls, options.rounds))
    print(
        f"\npeak memory: {before:.0f} MB of libraries, {built:.0f} MB after building, {used:.0f} MB after recon's products, "
    )
    print(f"{megabytes():.0f} MB with deepinv's rotation grids\n")
    single = check_adjoint(operator, tolerance=1.0)
    verdict(f"dot test in float32: {single:.1e}; bar 1e-05", single < 1e-5)
    double = check_adjoint(operator.double(), tolerance=1.0)
    verdict(f"dot test in float64: {double:.1e}; bar 1e-10", double < 1e-10)


if __name__ == "__main__":
    main()
