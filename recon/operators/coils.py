r"""Receive coils: their sensitivities from calibration data, and their noise.

Noise of k-space is complex and circular, correlated between coils: ``C = E[n n^H]``, (coil, coil), Hermitian.  One coil with
the standard deviation sigma in the real and in the imaginary part each has ``C = 2 sigma^2``; hence the factors sqrt(2) here.
"""

from __future__ import annotations

import copy
import math
import sys
import warnings
from types import ModuleType
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from recon.errors import InputError, need
from recon.operators.cartesian_mri import CartesianMRI
from recon.operators.coil_images import CoilImages
from recon.operators.non_cartesian_mri import NonCartesianMRI
from recon.space import Space

MRI = CartesianMRI | NonCartesianMRI


def espirit(
    kspace: Tensor | np.ndarray, calibration: int = 24, kernel: int = 6, threshold: float = 0.02, crop: float = 0.95
) -> Tensor:
    """Coil maps from the fully sampled centre of k-space: complex64 (coil, [z,] y, x).

    kspace: (coil, [kz,] ky, kx), centred; only its middle ``calibration`` samples along every axis are used.  kernel: width of
    the calibration kernel.  threshold: singular values kept, relative to the largest.  crop: eigenvalue below which a pixel
    counts as outside the object.  Maps have ``sum_c |S_c|^2 = 1`` inside, and are 0 outside; phases are relative to coil 0.
    Not Cartesian data: transform the gridded low-resolution coil images (``baselines.coil_images``, ``centred_fft``).

    Source: Uecker et al. 2014, Magnetic Resonance in Medicine 71, 990; computed by sigpy.
    Raises InputError for data that cannot be calibrated on, or without sigpy.
    """
    data = np.asarray(kspace.detach().cpu().resolve_conj() if isinstance(kspace, Tensor) else kspace)
    if data.ndim not in (3, 4) or data.dtype.kind != "c":
        raise InputError(f"espirit takes complex k-space (coil, [kz,] ky, kx); got {data.dtype} {data.shape}")
    if not 0 < kernel <= calibration <= min(data.shape[1:]):
        raise InputError(
            f"espirit needs kernel <= calibration <= every axis of k-space {data.shape[1:]}; got {kernel}, {calibration}"
        )
    middle = tuple(slice(n // 2 - calibration // 2, n // 2 - calibration // 2 + calibration) for n in data.shape[1:])
    centre = data[(slice(None), *middle)]
    if not np.isfinite(centre).all() or not centre.any():
        raise InputError("the calibration region of k-space is empty or holds values that are NaN or infinite")
    missing = int((~centre.any(axis=0)).sum())
    if missing:
        raise InputError(
            f"{missing} of the {centre[0].size} samples of the calibration region are exactly zero in all coils: "
            "it must be fully sampled; use a smaller calibration="
        )
    scaled = (data / np.abs(centre).max()).astype(np.complex64)
    app = cast(Any, _sigpy("sigpy.mri.app"))
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        maps = app.EspiritCalib(
            scaled, calib_width=calibration, kernel_width=kernel, thresh=threshold, crop=crop, show_pbar=False
        ).run()
    return torch.from_numpy(np.nan_to_num(np.ascontiguousarray(maps)))


def noise_covariance(samples: Tensor | np.ndarray) -> Tensor:
    """``C = E[n n^H]`` of noise samples (coil, ...) taken without signal: complex128 (coil, coil).

    Raises InputError for fewer samples than coils, or values that are not complex and finite.
    """
    n = torch.as_tensor(samples)
    if n.ndim < 2 or not n.is_complex() or not bool(torch.isfinite(n).all()):
        raise InputError(f"noise samples are finite complex numbers (coil, ...); got {n.dtype} {tuple(n.shape)}")
    n = n.flatten(1).to(torch.complex128)
    if n.shape[1] < len(n):
        raise InputError(f"a covariance of {len(n)} coils needs at least as many noise samples; got {n.shape[1]}")
    return n @ n.mH / n.shape[1]


def prewhiten(covariance: Tensor) -> Tensor:
    """The lower-triangular ``W = L^-1`` of ``C = L L^H``, so that ``W C W^H = I``: complex128 (coil, coil).

    Noise ``W n`` has ``E|n|^2 = 1`` per coil: 1/sqrt(2) in the real and in the imaginary part each.
    Raises InputError for a covariance that is not Hermitian and positive definite.
    """
    c = torch.as_tensor(covariance).to(torch.complex128)
    if c.ndim != 2 or c.shape[0] != c.shape[1] or not bool(torch.isfinite(torch.view_as_real(c)).all()):
        raise InputError(f"the covariance of coils is a finite (coil, coil) matrix; got {tuple(c.shape)}")
    asymmetry = float((c - c.mH).abs().max())
    if asymmetry > 1e-5 * float(c.abs().max()):
        raise InputError(f"the covariance must be Hermitian; it differs from its transpose by {asymmetry:.3g}")
    lower, failed = torch.linalg.cholesky_ex(0.5 * (c + c.mH))
    if bool(failed):
        raise InputError("the covariance must be positive definite: some coil, or combination of coils, has no noise")
    return torch.linalg.solve_triangular(lower, torch.eye(len(c), dtype=c.dtype), upper=False)


def prewhitened(operator: MRI, kspace: Tensor, covariance: Tensor) -> tuple[MRI, Tensor, float]:
    """Operator and data whose noise is white with standard deviation 1 in every real and imaginary part, and that 1.

    ``GaussianLikelihood(*prewhitened(operator, kspace, C))``.  Maps and data are multiplied by ``sqrt(2) prewhiten(C)``, which
    costs nothing per call; ``GaussianLikelihood.correlated(operator, kspace, C, "coil")`` gives the same posterior with
    ``log_prob`` in the units of the data as they came.  kspace: (*batch, *operator.range.shape).
    Raises InputError for shapes that do not fit.
    """
    coils = operator.images.coils
    operator.range.require(tuple(kspace.shape), "prewhitened")
    w = math.sqrt(2) * prewhiten(covariance)
    if len(w) != coils:
        raise InputError(f"the covariance is of {len(w)} coils; the operator has {coils}")
    axis = kspace.ndim - len(operator.range.shape)
    white = torch.tensordot(w.to(kspace), kspace, dims=([1], [axis])).movedim(0, axis).contiguous()
    mixed = mix_coils(operator, w.numpy())
    mixed.range = Space(operator.range.dims, operator.range.shape, operator.range.coords, "1", complex=True)
    return mixed, white, 1.0


def mix_coils(operator: MRI, weights: np.ndarray) -> MRI:
    """The operator whose coil k is ``sum_c W_kc`` times coil c of ``operator``.  weights: complex (coil, coil)."""
    images = operator.images
    w = np.asarray(weights, dtype=np.complex128)
    if w.shape != (images.coils, images.coils) or not np.isfinite(w).all():
        raise InputError(f"mixing {images.coils} coils takes a finite square matrix of them; got {w.shape}")
    twin = copy.copy(operator)
    twin._modules = dict(operator._modules)
    mixture = np.tensordot(w, images.weights(), axes=1)
    twin.images = CoilImages(mixture, images.channels, any(images.shifts), images.plain.dtype).to(images.plain.device)
    if isinstance(twin, CartesianMRI):
        twin.alone = False
    return twin


def _sigpy(module: str) -> ModuleType:
    """A module of sigpy, which cannot be imported where mpi4py finds no MPI library unless mpi4py is hidden meanwhile."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return cast(ModuleType, need(module, "mri"))
        except RuntimeError:
            for name in [name for name in sys.modules if name.split(".")[0] == "sigpy"]:
                del sys.modules[name]
        hidden = {name: part for name, part in sys.modules.items() if name.split(".")[0] == "mpi4py"}
        for name in hidden:
            del sys.modules[name]
        sys.modules["mpi4py"] = None  # type: ignore[assignment]
        try:
            return cast(ModuleType, need(module, "mri"))
        finally:
            del sys.modules["mpi4py"]
            sys.modules.update(hidden)
