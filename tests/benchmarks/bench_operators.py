"""Projectors of slices: recon against ASTRA's own calls, deepinv's Tomography and scikit-image, side by side in one run.

Parallel beams, float32, CPU, one image and batches of 8 and 32; forward projection and its adjoint (scikit-image: radon, and
iradon without a filter).  ASTRA and scikit-image are called image by image, as their users do; the other two take the batch.
Rounds are interleaved, so a busy machine slows all alike; a slow contestant runs on fewer images, and its time is per image.
Times are the least of all rounds, ratios the median over rounds of the ratio within a round.  A bar that falls short is
reported, never an error: speed depends on the machine.

    python tests/benchmarks/bench_operators.py [--rounds 7] [--threads 1] [--pixels 256] [--quick]
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from recon.checks import check_adjoint
from recon.operators import ParallelBeam

SIZES = ((256, 180), (512, 360))  # pixels along a side, views
QUICK = ((64, 45),)
BATCHES = (1, 8, 32)
BARS = {"ASTRA": 8.0, "deepinv": 25.0}  # at the largest batch of the first size
SLOW = {"ASTRA": 8, "deepinv": 2, "scikit-image": 1}  # images that are enough to know a time per image
Call = Callable[[], object]


@dataclass(frozen=True)
class Timed:
    """Milliseconds per image, round by round: forward and adjoint."""

    forward: list[float]
    adjoint: list[float]


def megabytes() -> float:
    """Peak resident memory of this process so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def recon_calls(operator: ParallelBeam, x: torch.Tensor, y: torch.Tensor) -> tuple[Call, Call]:
    return lambda: operator.A(x), lambda: operator.A_adjoint(y)


def astra_calls(operator: ParallelBeam, x: torch.Tensor, y: torch.Tensor) -> tuple[Call, Call]:
    """One forward or back projection per image through ASTRA's algorithms and data objects."""
    import astra

    size, angles = operator.domain.shape[0], np.array(operator.geometry.angles)
    geometry = astra.create_proj_geom("parallel", 1.0, operator.geometry.detectors, angles)
    projector = astra.create_projector("line", geometry, astra.create_vol_geom(size, size))
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


def deepinv_calls(operator: ParallelBeam, x: torch.Tensor, y: torch.Tensor) -> tuple[Call, Call]:
    """The batch through Tomography; its adjoint is the exact one (the default, by backpropagation)."""
    import deepinv

    views, size = operator.range.shape[0], operator.domain.shape[0]
    physics = deepinv.physics.Tomography(angles=views, img_width=size, circle=False, normalize=False)
    images = x[:, None]
    with torch.no_grad():
        sinograms = torch.rand_like(physics.A(images))
    return lambda: physics.A(images), lambda: physics.A_adjoint(sinograms)


def skimage_calls(operator: ParallelBeam, x: torch.Tensor, y: torch.Tensor) -> tuple[Call, Call]:
    """radon and iradon without a filter, image by image."""
    from skimage.transform import iradon, radon

    degrees, images = np.rad2deg(operator.geometry.angles), x.numpy()
    sinograms = [radon(image, degrees, circle=False) for image in images]
    return (
        lambda: [radon(image, degrees, circle=False) for image in images],
        lambda: [iradon(one, degrees, images.shape[-1], filter_name=None, circle=False) for one in sinograms],
    )


CONTESTANTS = {"recon": recon_calls, "ASTRA": astra_calls, "deepinv": deepinv_calls, "scikit-image": skimage_calls}


def race(calls: dict[str, tuple[Call, Call, int]], rounds: int) -> dict[str, Timed]:
    """Times of every contestant, round by round; the first round warms up."""
    times = {name: Timed([], []) for name in calls}
    for number in range(rounds + 1):
        for name, (forward, adjoint, images) in calls.items():
            for call, kept in ((forward, times[name].forward), (adjoint, times[name].adjoint)):
                start = time.perf_counter()
                with torch.no_grad():
                    call()
                if number:
                    kept.append((time.perf_counter() - start) * 1e3 / images)
    return times


def ratios(theirs: list[float], ours: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(theirs, ours, strict=True))


def build(size: int, views: int) -> ParallelBeam:
    """The operator, and what its matrix costs: made, then found in the cache by a second one."""
    times = []
    for _ in range(2):
        start = time.perf_counter()
        operator = ParallelBeam.half_turn((size, size), 1.0, views)
        times.append(time.perf_counter() - start)
    entries = operator.matrix.values.numel()
    print(
        f"\n{size} x {size} pixels, {views} views, {operator.geometry.detectors} detectors; {entries / 1e6:.1f} million entries"
    )
    print(
        f"matrix made in {times[0]:.2f} s, found in the cache in {times[1]:.2f} s; {operator.bytes / 1e6:.0f} MB for both "
        f"directions, {operator.bytes / entries:.2f} bytes an entry; peak memory {megabytes():.0f} MB"
    )
    verdict(
        f"{operator.bytes / (8 * entries):.2f} of a float32 and a 32-bit index per entry; bar 1.2",
        operator.bytes <= 9.6 * entries,
    )
    x, y = torch.rand(BATCHES[-1], *operator.domain.shape), torch.rand(BATCHES[-1], *operator.range.shape)
    operator.A(x), operator.A_adjoint(y)
    print(f"peak memory after both products of {BATCHES[-1]} images {megabytes():.0f} MB")
    return operator


def table(operator: ParallelBeam, rounds: int, batches: tuple[int, ...]) -> Iterator[tuple[int, dict[str, Timed]]]:
    """A line per batch and contestant, printed as it comes."""
    print(
        f"{'batch':>5}  {'':13}{'forward':>10}{'adjoint':>10}   ms per image, least of {rounds} rounds;  ratios to recon"
    )
    for batch in batches:
        x, y = torch.rand(batch, *operator.domain.shape), torch.rand(batch, *operator.range.shape)
        calls = {}
        for name, make in CONTESTANTS.items():
            images = min(batch, SLOW.get(name, batch))
            calls[name] = (*make(operator, x[:images], y[:images]), images)
        times = race(calls, rounds)
        ours = times["recon"]
        for name, timed in times.items():
            against = f"{ratios(timed.forward, ours.forward):10.1f}{ratios(timed.adjoint, ours.adjoint):8.1f}"
            print(
                f"{batch:5}  {name:13}{min(timed.forward):10.2f}{min(timed.adjoint):10.2f}{'' if name == 'recon' else against}",
                flush=True,
            )
        yield batch, times


def verdict(text: str, met: bool) -> None:
    print(f"{text:70} bar {'met' if met else 'not met'}")


def bars(batch: int, times: dict[str, Timed], last: int) -> None:
    """Say which bars are met: speed at the largest batch, and no loss to ASTRA for one image."""
    wanted = BARS if batch == last else {"ASTRA": 1.0} if batch == 1 else {}
    for name, bar in wanted.items():
        for way in ("forward", "adjoint"):
            ratio = ratios(getattr(times[name], way), getattr(times["recon"], way))
            verdict(f"batch {batch}: {way} {ratio:.1f} times faster than {name}; bar {bar:.0f}", ratio >= bar)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--pixels", type=int, choices=[size for size, _ in SIZES], help="only this size")
    parser.add_argument("--quick", action="store_true", help="one small size, two rounds")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    rounds = 2 if options.quick else options.rounds
    print(f"float32, CPU, {options.threads} thread(s) of {os.cpu_count()}, load {os.getloadavg()[0]:.1f}")
    print(f"peak memory of the libraries {megabytes():.0f} MB")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["RECON_CACHE"] = folder
        sizes = [one for one in (QUICK if options.quick else SIZES) if options.pixels in (None, one[0])]
        for number, (size, views) in enumerate(sizes):
            operator = build(size, views)
            for batch, times in table(operator, rounds if number == 0 else min(rounds, 3), BATCHES):
                if number == 0:
                    bars(batch, times, BATCHES[-1])
            print(f"peak memory {megabytes():.0f} MB, deepinv's rotation grids included")
            if number == 0:
                single = check_adjoint(operator, tolerance=1.0)
                verdict(f"dot test in float32: {single:.1e}; bar 1e-05", single < 1e-5)
                double = check_adjoint(operator.double(), tolerance=1.0)
                verdict(f"dot test in float64: {double:.1e}; bar 1e-10", double < 1e-10)


if __name__ == "__main__":
    main()
