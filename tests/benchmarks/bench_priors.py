"""What a call of a network prior costs, what bounds it, and what the ways to compute it otherwise bring.

    python tests/benchmarks/bench_priors.py [--prior ct_axial] [--compile]

On one thread: memory of a vjp with and without recomputation; time of the denoiser and its vjp at several batch sizes beside
the largest rate of multiply-adds that this processor reaches in a convolution and a matrix product; where the time goes;
bfloat16 with the figures of its guard; windows over images of twice the side, against the truth and against the same weights
run on the whole image (both need the measured slices below RECON_DATA); and, with --compile, torch.compile (minutes).
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from recon.draws import Draws
from recon.errors import InputError
from recon.priors import NetworkPrior, load_prior
from recon.priors.accuracy import own_images
from recon.priors.compute import Compute, accelerate
from recon.priors.network import build_network
from recon.priors.tiling import Tiling
from recon.priors.windows import Windowed
from recon.space import Space

SIGMA = 0.3


def say(line: str) -> None:
    """One line of the report."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def seconds(function: Callable[[], object], repeats: int = 5) -> float:
    """Shortest wall time of calls after a first one: what the processor can do while others leave it alone."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def vjp(prior, z: Tensor) -> Tensor:
    """``D`` with its graph, and one pull."""
    point = z.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(prior.denoise(point, SIGMA), point, z)
    return gradient


def memory(prior: NetworkPrior, batch: int) -> None:
    """Largest resident memory of a vjp above that before it, each way in a process of its own."""
    z = torch.randn(batch, *prior.latent.shape)
    ways = {
        "as it is": Compute(),
        "recompute blocks": Compute(recompute="blocks"),
        "chunks of 2, kept": Compute(chunk=2),
        "chunks of 2, recomputed": Compute(chunk=2, recompute="chunks"),
    }

    def child(pipe, compute: Compute) -> None:
        torch.set_num_threads(1)
        lean = accelerate(prior, compute)
        vjp(lean, z[:1])
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
        before = resident("VmRSS")
        start = time.perf_counter()
        gradient = vjp(lean, z)
        pipe.send((resident("VmHWM") - before, time.perf_counter() - start, gradient.double().sum().item()))

    fork = multiprocessing.get_context("fork")
    say(f"memory and time of one vjp, batch {batch}")
    for name, compute in ways.items():
        ours, theirs = fork.Pipe(duplex=False)
        process = fork.Process(target=child, args=(theirs, compute))
        process.start()
        held, spent, total = ours.recv()
        process.join()
        say(f"  {name:24s} {held / 1024:7.0f} MiB  {spent:6.2f} s  (sum of the vjp {total:.9g})")


def resident(field: str) -> float:
    """KiB of a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(field)))


def peak_rates(dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """Multiply-adds per second of a 3 x 3 convolution and a matrix product that fit the caches well."""
    side, channels = 64, 128
    image = torch.randn(8, channels, side, side, dtype=dtype).contiguous(memory_format=torch.channels_last)
    layer = torch.nn.Conv2d(channels, channels, 3, padding=1, bias=False, dtype=dtype)
    layer = layer.to(memory_format=torch.channels_last)
    matrix = torch.randn(1024, 1024, dtype=dtype)
    with torch.no_grad():
        return {
            "convolution": 8 * side**2 * channels**2 * 9 / seconds(lambda: layer(image), 3),
            "matrix product": 1024**3 / seconds(lambda: matrix @ matrix, 3),
        }


def speed(prior: NetworkPrior) -> None:
    """Time per image against the multiply-adds it takes."""
    for batch in (1, 8, 16):
        best = peak_rates()
        top = max(best.values())
        say("peak rate: " + ", ".join(f"{name} {rate / 1e9:.1f} GMAC/s" for name, rate in best.items()))
        z = torch.randn(batch, *prior.latent.shape)
        with FlopCounterMode(display=False) as forward, torch.no_grad():
            prior.denoise(z, SIGMA)
        with FlopCounterMode(display=False) as both:
            vjp(prior, z)
        with torch.no_grad():
            plain = seconds(lambda z=z: prior.denoise(z, SIGMA))
        pulled = seconds(lambda z=z: vjp(prior, z), 3)
        for name, spent, count in (("D", plain, forward), ("D and vjp", pulled, both)):
            macs = count.get_total_flops() / 2
            rate = macs / spent
            say(
                f"  batch {batch:2d} {name:10s} {1e3 * spent:7.1f} ms, {1e3 * spent / batch:6.1f} ms an image, "
                f"{macs / batch / 1e9:.2f} GMAC an image, {rate / 1e9:.1f} GMAC/s = {100 * rate / top:.0f} % of the peak"
            )


class Timed(TorchDispatchMode):
    """Seconds spent in each kind of operation, and bytes that it reads and writes."""

    def __init__(self) -> None:
        super().__init__()
        self.spent: Counter[str] = Counter()
        self.moved: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        start = time.perf_counter()
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.spent[name] += time.perf_counter() - start
        if not func.is_view:
            flat = [*args, *(out if isinstance(out, tuple) else [out])]
            flat += [inner for part in args if isinstance(part, list) for inner in part]
            self.moved[name] += sum(part.nbytes for part in flat if isinstance(part, Tensor))
        return out


def where(prior: NetworkPrior, batch: int = 8) -> None:
    """Share of the time of D by kind of operation, and how fast the convolutions are by themselves."""
    z = torch.randn(batch, *prior.latent.shape)
    with torch.no_grad():
        prior.denoise(z, SIGMA)
        with Timed() as timed:
            for _ in range(3):
                prior.denoise(z, SIGMA)
        with FlopCounterMode(display=False) as count:
            prior.denoise(z, SIGMA)
    total = sum(timed.spent.values())
    parts = ", ".join(f"{name} {100 * spent / total:.0f} %" for name, spent in timed.spent.most_common(7))
    rate = 3 * count.get_flop_counts()["Global"][torch.ops.aten.convolution] / 2 / timed.spent["convolution"]
    rest = [name for name in timed.spent if name != "convolution"]
    moved = sum(timed.moved[name] for name in rest) / sum(timed.spent[name] for name in rest)
    block = torch.randn(8 << 20)
    copied = 2 * block.nbytes / seconds(lambda: block.clone())
    say(f"where D spends its time, batch {batch}: {parts}")
    say(
        f"  its convolutions run at {rate / 1e9:.1f} GMAC/s, beside {peak_rates()['convolution'] / 1e9:.1f} of one that fits"
    )
    say(f"  the other operations move {moved / 1e9:.1f} GB/s, a plain copy {copied / 1e9:.1f} GB/s")


def half(prior: NetworkPrior, truth: Tensor | None) -> None:
    """bfloat16: its guard, its time, and, on measured slices, the change of the error itself."""
    start = time.perf_counter()
    try:
        quick = accelerate(prior, Compute("bfloat16"))
    except InputError as error:
        say(f"bfloat16 is refused: {error}")
        return
    say(f"bfloat16 guard, {time.perf_counter() - start:.1f} s; loss in dB at each level of the card:")
    say("  " + ", ".join(f"{one.sigma:g}: {one.loss:.4f}" for one in quick.accuracy))
    z = torch.randn(8, *prior.latent.shape)
    with torch.no_grad():
        times = [seconds(lambda p=p: p.denoise(z, SIGMA), 3) for p in (prior, quick)]
    pulls = [vjp(p, z) for p in (prior, quick)]
    gap = float((pulls[1] - pulls[0]).square().mean().sqrt() / pulls[0].square().mean().sqrt())
    say(f"  D at batch 8: {times[1] / times[0]:.2f} times the time of float32; vjp differs by {100 * gap:.2f} % (RMS)")
    if truth is None:
        return
    changes = []
    for one in quick.accuracy:
        noisy = truth + one.sigma * noise(truth, 1)
        with torch.no_grad():
            errors = [float((p.denoise(noisy, one.sigma) - truth).square().mean()) for p in (prior, quick)]
        changes.append(f"{one.sigma:g}: {10 * math.log10(errors[1] / errors[0]):+.4f}")
    say("  change of the error on measured slices, dB: " + ", ".join(changes))


def noise(images: Tensor, step: int) -> Tensor:
    """Standard normal numbers like ``images``, always the same."""
    return Draws(0, range(len(images))).normal(step, tuple(images.shape[1:]), "probe")


def slices(prior: NetworkPrior, count: int) -> Tensor | None:
    """Measured slices of 256 x 256 pixels that the prior has not seen, in its latent; None without RECON_DATA."""
    from recon.datasets.slices import load_slices
    from recon.workflows.training_data import slice_card

    try:
        found = load_slices(slice_card("tcga_heldout", None), "test")
    except InputError as error:
        say(f"no measured slices: {error}")
        return None
    chosen = torch.from_numpy(found.mu[:: max(1, len(found) // count)][:count]).float()
    return prior.encode(chosen)


def windows(prior: NetworkPrior, truth: Tensor) -> None:
    """Windows of 128 over images of 256: errors, and what remains at the seams."""
    side = truth.shape[-1]
    space = Space(prior.space.dims, tuple(truth.shape[1:]), {}, prior.space.unit)
    whole = at_size(prior, side)
    plans = {
        "tiles": Tiling(1, margin=0),
        "overlap 32": Tiling(32, align=16),
        "overlap 64": Tiling(64, align=16),
        "overlap 64, shifted": Tiling(64, align=16, shifted=True),
    }
    say(f"windows of {prior.space.shape[0]} over {len(truth)} slices of {side}: RMSE to the truth")
    for sigma in (0.1, 0.5, 2.0):
        noisy = truth + sigma * noise(truth, 2)
        with torch.no_grad():
            full = whole.denoise(noisy, sigma) - truth
            parts = [f"whole image {rms(full):.4f}"]
            for name, plan in plans.items():
                made = Windowed(prior, space, plan, chunk=8)
                error = made.denoise(noisy, sigma) - truth
                parts.append(f"{name} {rms(error):.4f} (seam {seam(made, error, full, sigma):.3f})")
        say(f"  sigma {sigma:g}: " + ", ".join(parts))
    say(
        "  seam: error energy within 2 pixels of where a window's weight begins or ends, over that elsewhere, both over"
    )
    say("  the error energy of the whole image at the same pixels; 1 is no seam")


def at_size(prior: NetworkPrior, side: int) -> NetworkPrior:
    """The same weights on a larger grid, on which they were not trained."""
    architecture = prior.network.architecture
    network = build_network(architecture.model_copy(update={"size": side}))
    with torch.no_grad():
        for ours, theirs in zip(network.parameters(), prior.network.parameters(), strict=True):
            ours.copy_(theirs)
    space = Space(prior.space.dims, (side, side), {}, prior.space.unit)
    return NetworkPrior(space, prior.schedule, prior.card, network, sigma_data=prior.sigma_data)


def rms(error: Tensor) -> float:
    """Root mean square."""
    return float(error.double().square().mean().sqrt())


def seam(made: Windowed, error: Tensor, reference: Tensor, sigma: float) -> float:
    """Relative error energy near the ends of the weights over that elsewhere."""
    near = torch.zeros(error.shape[1:], dtype=torch.bool)
    for cut in made.cuts(sigma):
        for start, row in zip(cut.starts, cut.weights(made.tiling), strict=True):
            used = [start + int(i) for i in row.nonzero()[0][[0, -1]]]
            for place in (used[0], used[1] + 1):
                if 0 < place < cut.n:
                    near.movedim(cut.axis, 0)[max(0, place - 2) : place + 2] = True
    ratios = [float(error[:, at].square().mean() / reference[:, at].square().mean()) for at in (near, ~near)]
    return ratios[0] / ratios[1]


def compiled(prior: NetworkPrior) -> None:
    """torch.compile: time to compile, guard, time of D."""
    start = time.perf_counter()
    quick = accelerate(prior, Compute(compiled="inductor"))
    worst = max(one.loss for one in quick.accuracy)
    say(f"compiled in {time.perf_counter() - start:.0f} s; largest loss {worst:.2e} dB")
    z = torch.randn(2, *prior.latent.shape)  # the batch of the probe: another one is compiled anew
    with torch.no_grad():
        times = [seconds(lambda p=p: p.denoise(z, SIGMA), 3) for p in (prior, quick)]
    say(f"  D at batch 2: {times[1] / times[0]:.2f} times the time of the plain network")


def main() -> None:
    """Print all of it."""
    options = argparse.ArgumentParser()
    options.add_argument("--prior", default="ct_axial")
    options.add_argument("--compile", action="store_true")
    chosen = options.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    started = time.perf_counter()
    prior = load_prior(chosen.prior)
    memory(prior, 8)
    speed(prior)
    where(prior)
    truth = slices(prior, 4) if prior.space.shape == (128, 128) and prior.space.unit == "1/m" else None
    small = None if truth is None else torch.nn.functional.avg_pool2d(truth[:, None], 2)[:, 0]
    half(prior, small)
    if truth is not None:
        windows(prior, truth)
    if chosen.compile:
        compiled(prior)
    probe = seconds(lambda: own_images(prior), 1)
    say(f"the probe of the guard (2 draws of the prior, 12 steps): {probe:.2f} s")
    say(f"all of this: {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
