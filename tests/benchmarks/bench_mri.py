"""Magnetic resonance operators against the bare transforms, sigpy and deepinv, side by side in one run.

Cartesian: 8 coils, a quarter of the samples, 8 draws, float32; the bare transforms are ``torch.fft.fftn`` of as many complex
arrays of the same shape and layout.  Non-Cartesian: 8 coils, 256 x 256, 64 spokes of 512 samples, one draw.  Rounds are
interleaved, so a busy machine slows all alike; ratios are medians over rounds of the ratio within a round, with the ratio of
the fastest rounds beside them.  A bar that falls short is reported, never an error: speed depends on the machine.

    python tests/benchmarks/bench_mri.py [--rounds 9] [--threads 1]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch

from recon.checks import check_adjoint, check_normal
from recon.operators import CartesianMRI, NonCartesianMRI, complex_grid
from recon.operators.trajectories import radial

COILS, DRAWS = 8, 8
SIZES = ((256, 256), (320, 320), (230, 180))
FINER = {
    "oversamp": 2,
    "width": 6,
}  # the accuracy of recon's single precision; the default is some hundred times coarser
BARE, SIGPY, TOEPLITZ = 1.15, 5.0, 1.7
Call = Callable[[], object]


def maps(grid: tuple[int, int]) -> torch.Tensor:
    """Smooth complex sensitivities around the image."""
    y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in grid), indexing="ij")
    angle = 2 * np.pi * np.arange(COILS)[:, None, None] / COILS
    wave = np.exp(-((y - np.sin(angle)) ** 2) - (x - np.cos(angle)) ** 2 + 1j * (angle + y * np.cos(angle)))
    return torch.from_numpy((wave / np.sqrt((np.abs(wave) ** 2).sum(0))).astype(np.complex64))


def race(calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every contestant, round by round; the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            with torch.no_grad():
                call()
            if number:
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def ratio(above: list[float], below: list[float]) -> tuple[float, float]:
    """Median over rounds of the ratio within a round, and the ratio of the fastest rounds."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True)), min(above) / min(below)


def verdict(text: str, met: bool) -> None:
    print(f"{text:78} bar {'met' if met else 'not met'}")


def show(times: dict[str, list[float]], per: int, unit: str) -> None:
    for name, values in times.items():
        print(
            f"  {name:22}{statistics.median(values) / per:9.3f} ms median, {min(values) / per:9.3f} fastest   per {unit}"
        )


def cartesian(grid: tuple[int, int], rounds: int) -> None:
    import deepinv
    import sigpy.mri

    torch.manual_seed(0)
    sensitivities, mask = maps(grid), torch.rand(grid) < 0.25
    operator = CartesianMRI(complex_grid(grid), sensitivities, mask)
    x, y = torch.randn(DRAWS, 2, *grid), torch.randn(DRAWS, COILS, *grid, dtype=torch.complex64)
    theirs = deepinv.physics.MultiCoilMRI(
        mask=mask[None, None].float(), coil_maps=sensitivities[None], img_size=(2, *grid)
    )
    images = torch.complex(x[:, 0], x[:, 1]).numpy()
    sense = sigpy.mri.linop.Sense(sensitivities.numpy(), weights=mask.numpy().astype(np.float32))
    times = race(
        {
            "bare transforms": lambda: torch.fft.fftn(y, dim=(-2, -1), norm="ortho"),
            "bare there and back": lambda: torch.fft.ifftn(
                torch.fft.fftn(y, dim=(-2, -1), norm="ortho"), dim=(-2, -1), norm="ortho"
            ),
            "recon forward": lambda: operator.A(x),
            "recon adjoint": lambda: operator.A_adjoint(y),
            "recon normal": lambda: operator.normal(x),
            "deepinv forward": lambda: theirs.A(x),
            "sigpy forward": lambda: [sense(image) for image in images],
        },
        rounds,
    )
    print(f"Cartesian {grid[0]} x {grid[1]}, {COILS} coils, {DRAWS} draws")
    show(times, COILS * DRAWS, "coil image")
    for name, bare in (
        ("forward", "bare transforms"),
        ("adjoint", "bare transforms"),
        ("normal", "bare there and back"),
    ):
        middle, fastest = ratio(times[f"recon {name}"], times[bare])
        verdict(f"  {name}: {middle:.2f} times the {bare} ({fastest:.2f} fastest); bar {BARE}", middle <= BARE)
    for name in ("deepinv", "sigpy"):
        middle, fastest = ratio(times[f"{name} forward"], times["recon forward"])
        print(f"  forward {middle:.1f} times faster than {name} ({fastest:.1f} fastest)")
    print()


def non_cartesian(rounds: int) -> None:
    import sigpy.mri

    grid = (256, 256)
    torch.manual_seed(0)
    trajectory, sensitivities = radial(64, 512, 256), maps(grid)
    operator = NonCartesianMRI(complex_grid(grid), trajectory, sensitivities)
    x, y = torch.randn(1, 2, *grid), torch.randn(1, COILS, 64, 512, dtype=torch.complex64)
    sense = sigpy.mri.linop.Sense(sensitivities.numpy(), coord=trajectory.astype(np.float32))
    image, kspace, back = torch.complex(x[0, 0], x[0, 1]).numpy(), y[0].numpy(), sense.H
    coord, weights = trajectory.astype(np.float32), sensitivities.numpy()

    def finer() -> np.ndarray:
        return sigpy.nufft(weights * image, coord, **FINER)

    def finer_back() -> np.ndarray:
        images = sigpy.nufft_adjoint(kspace, coord, (COILS, *grid), **FINER)
        return (weights.conj() * images).sum(0)

    operator.normal(x)
    times = race(
        {
            "recon forward": lambda: operator.A(x),
            "recon adjoint": lambda: operator.A_adjoint(y),
            "recon both factors": lambda: operator.A_adjoint(operator.A(x)),
            "recon normal": lambda: operator.normal(x),
            "sigpy forward": lambda: sense(image),
            "sigpy adjoint": lambda: back(kspace),
            "sigpy finer forward": finer,
            "sigpy finer adjoint": finer_back,
        },
        rounds,
    )
    print(f"Non-Cartesian 256 x 256, {COILS} coils, 64 spokes x 512 samples")
    show(times, 1, "draw")
    exact = NonCartesianMRI(complex_grid(grid), trajectory, sensitivities).double().A(x.double())[0].numpy()
    answers = {"recon": operator.A(x)[0].numpy(), "sigpy": sense(image), "sigpy finer": finer()}
    for name, answer in answers.items():
        print(f"  {name} is {np.linalg.norm(answer - exact) / np.linalg.norm(exact):.1e} from the exact sums")
    for other in ("sigpy", "sigpy finer"):
        for name in ("forward", "adjoint"):
            middle, fastest = ratio(times[f"{other} {name}"], times[f"recon {name}"])
            text = f"  {name} {middle:.1f} times faster than {other} ({fastest:.1f} fastest); bar {SIGPY:.0f}"
            verdict(text, middle >= SIGPY)
    middle, fastest = ratio(times["recon both factors"], times["recon normal"])
    verdict(
        f"  normal {middle:.1f} times faster than forward and adjoint ({fastest:.1f} fastest); bar {TOEPLITZ}",
        middle >= TOEPLITZ,
    )
    print()
    with torch.no_grad():
        accuracy(operator)


def accuracy(operator: NonCartesianMRI) -> None:
    """The dot test and the normal operator in both precisions."""
    for name, bar in (("float32", 1e-5), ("float64", 1e-10)):
        operator = operator.to(getattr(torch, name))
        for what, check in (("dot test", check_adjoint), ("normal against both factors", check_normal)):
            figure = check(operator, tolerance=1.0)
            verdict(f"  {what} in {name}: {figure:.1e}; bar {bar:.0e}", figure < bar)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    print(f"{options.threads} thread(s) of {os.cpu_count()}, load {os.getloadavg()[0]:.1f}, float32, CPU\n")
    for grid in SIZES:
        cartesian(grid, options.rounds)
    non_cartesian(options.rounds)


if __name__ == "__main__":
    main()
