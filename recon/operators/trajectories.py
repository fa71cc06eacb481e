r"""Paths through k-space in cycles per field of view, and the area that each of their samples stands for.

Last axis in the order ([kz,] ky, kx); angles are radians from the kx axis towards ky; the centre is exactly 0.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from recon.errors import InputError, need
from recon.operators.nufft import Nufft

GOLDEN = math.pi * (math.sqrt(5) - 1) / 2
"""The golden angle, 111.25 degrees: any number of consecutive spokes is spread evenly (Winkelmann et al. 2007)."""


def radial(spokes: int, samples: int, pixels: int, golden: bool = False) -> np.ndarray:
    """Full spokes through the centre: float64 (spokes, samples, 2).

    Sample i lies at ``(i - samples // 2) pixels / samples`` along its spoke, spoke s at the angle ``pi s / spokes``, or
    ``GOLDEN s``.  samples = 2 * pixels is the usual twofold oversampling.  Raises InputError for numbers below 1.
    """
    for name, value in (("spokes", spokes), ("samples", samples), ("pixels", pixels)):
        _whole(name, value)
    angle = np.arange(spokes) * (GOLDEN if golden else math.pi / spokes)
    radius = (np.arange(samples) - samples // 2) * (pixels / samples)
    return radius[None, :, None] * np.stack([np.sin(angle), np.cos(angle)], axis=1)[:, None, :]


def spiral(interleaves: int, samples: int, pixels: int, turns: float | None = None) -> np.ndarray:
    """Archimedean spirals from the centre to ``pixels / 2``, evenly rotated: float64 (interleaves, samples, 2).

    turns: of each interleaf; None for arms one cycle per field of view apart, ``pixels / (2 interleaves)``; fewer undersample.
    Samples follow each other at equal distances along the arm but for the first few (constant speed).
    Raises InputError for numbers that are not positive.
    """
    for name, value in (("interleaves", interleaves), ("samples", samples), ("pixels", pixels)):
        _whole(name, value)
    turns = pixels / (2 * interleaves) if turns is None else turns
    if not 0 < turns < math.inf:
        raise InputError(f"turns must be a positive number; got {turns!r}")
    way = np.sqrt(np.arange(samples) / samples)
    angle = 2 * math.pi * way * turns
    start = 2 * math.pi * np.arange(interleaves)[:, None] / interleaves
    path = np.stack([np.sin(angle[None] + start), np.cos(angle[None] + start)], axis=-1)
    return (pixels / 2 * way)[None, :, None] * path


def stack(trajectory: np.ndarray, partitions: int) -> np.ndarray:
    """A stack of stars or spirals: (readout, sample, 2) repeated at every kz from ``-(partitions // 2)`` on.

    Returns float64 (partitions * readout, sample, 3), partition by partition.  Raises InputError for another trajectory.
    """
    _whole("partitions", partitions)
    if trajectory.ndim != 3 or trajectory.shape[-1] != 2:
        raise InputError(f"stack repeats a trajectory (readout, sample, 2); got {trajectory.shape}")
    planes = [np.insert(trajectory, 0, p - partitions // 2, axis=-1) for p in range(partitions)]
    return np.concatenate(planes)


def radial_density(trajectory: np.ndarray) -> np.ndarray:
    """The area of k-space of the samples of full spokes, evenly spread over half a turn: ``pi |k| dk / spokes``.

    trajectory: (spokes, samples, 2) as ``radial`` makes it.  The disc of diameter dk at the centre is shared by all spokes.
    Where spokes are farther apart than 1, outer samples stand for more than they can know: sharper than ``density``, with
    streaks.  Returns float64 (spokes, samples).  Raises InputError for another shape.
    """
    if trajectory.ndim != 3 or trajectory.shape[-1] != 2 or trajectory.shape[1] < 2:
        raise InputError(f"radial_density takes spokes (spokes, samples, 2); got {trajectory.shape}")
    radius = np.linalg.norm(trajectory, axis=-1)
    step = np.linalg.norm(np.diff(trajectory, axis=1), axis=-1).mean()
    area = math.pi / len(trajectory) * np.maximum(radius * step, step**2 / 4)
    return np.asarray(area)


def density(trajectory: Tensor | np.ndarray, shape: tuple[int, ...], iterations: int = 10) -> np.ndarray:
    """The area of k-space that each sample stands for, in (cycles per field of view)^d: the weights of gridding.

    trajectory: (..., d).  shape: of the image.  Returns float64 (...), which makes ``A^T W y`` an image in the right units: 1
    on a full Cartesian grid, and no more than about 1 for a sample far from all others.  It is for such images and for
    preconditioning: noise weighs data in a likelihood.

    The fixed point ``w <- w / (P w)`` of Pipe and Menon (1999, Magnetic Resonance in Medicine 41, 179) with
    ``P_ij = prod_a |D(k_ia - k_ja)|^2``, D the transform of the field of view with D(0) = 1: positive, and its own transform
    reaches no further than twice the field of view (Johnson and Pipe 2009, ibid. 61, 439).

    Raises InputError for a trajectory that does not fit or fewer than one iteration.
    """
    from recon.operators.non_cartesian_mri import require_trajectory

    need("finufft", "mri")
    _whole("iterations", iterations)
    flat = np.asarray(trajectory).reshape(-1, np.asarray(trajectory).shape[-1])
    k = require_trajectory(flat, tuple(shape))
    points = np.ascontiguousarray(2 * math.pi * (k / np.array(shape)).T)
    window = torch.ones(())
    for n in shape:
        window = window[..., None] * torch.from_numpy(1 - np.abs(np.arange(1 - n, n)) / n).float()
    sums = Nufft(tuple(2 * n - 1 for n in shape), points)
    w = np.ones(len(k))
    for _ in range(iterations):
        pairs = torch.from_numpy(np.stack([w, np.zeros_like(w)], axis=-1)).float()
        blurred = sums.forward(sums.adjoint(pairs[None]) * window[..., None])[0, :, 0].double().numpy() / math.prod(
            shape
        )
        w = w / np.maximum(blurred, 1e-3 * np.abs(blurred).max() / len(k))
    return w.reshape(np.asarray(trajectory).shape[:-1])


def _whole(name: str, value: int) -> None:
    if not 0 < value < math.inf or value != int(value):
        raise InputError(f"{name} must be a positive whole number; got {value!r}")
