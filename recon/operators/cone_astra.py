"""Cone-beam projections of CUDA tensors through ASTRA, without a copy to the host.

Geometry is handed over in voxel indices: voxels are unit cubes there, so sides that differ, a volume off the axis and rows
that run down the page need no feature of ASTRA's.  Lines stay lines under that map; only their lengths change, by a factor
per ray that is multiplied here.

ASTRA's 3D routines end the process where no GPU is usable, so nothing here calls one before ``require_gpu``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from recon.errors import InputError, need
from recon.operators.cone_beam import Rays


def require_gpu(who: str) -> Any:  # noqa: ANN401  (the astra module)
    """ASTRA, known to have a GPU to work on.  Raises InputError naming ``who`` otherwise."""
    astra: Any = need("astra", "ct")
    torch_sees = torch.cuda.is_available()
    if not (torch_sees and astra.use_cuda()):
        raise InputError(
            f"{who} on CUDA tensors needs a GPU that both torch and astra can use; torch "
            f"{'sees one, astra does not' if torch_sees else 'sees none'}; move the operator and its input to the CPU"
        )
    return astra


def project(rays: Rays, x: Tensor) -> Tensor:
    """Line integrals of volumes (n, z, y, x) on CUDA, float32: (n, angle, row, detector)."""
    astra = _ready(x)
    out = x.new_empty(len(x), rays.rows, len(rays.views), rays.columns)
    handle = _projector(astra, rays)
    try:
        for one, target in zip(x.detach().contiguous(), out, strict=True):
            astra.projector3d.direct_FP(handle, one, out=target)
        torch.cuda.synchronize(x.device)
    finally:
        astra.projector3d.delete(handle)
    return out.transpose(1, 2) * _lengths(rays, x)


def backproject(rays: Rays, y: Tensor) -> Tensor:
    """ASTRA's back-projection of (n, angle, row, detector) on CUDA, float32: (n, z, y, x); close to the transpose."""
    astra = _ready(y)
    nx, ny, nz = rays.shape
    out = y.new_empty(len(y), nz, ny, nx)
    weighted = (y.detach() * _lengths(rays, y)).transpose(1, 2).contiguous()
    torch.cuda.synchronize(y.device)
    handle = _projector(astra, rays)
    try:
        for one, target in zip(weighted, out, strict=True):
            astra.projector3d.direct_BP(handle, one, out=target)
        torch.cuda.synchronize(y.device)
    finally:
        astra.projector3d.delete(handle)
    return out


def _ready(given: Tensor) -> Any:  # noqa: ANN401  (the astra module)
    """ASTRA on the tensor's GPU, with everything that torch has queued there done."""
    astra = require_gpu("ConeBeam")
    if given.dtype != torch.float32:
        raise InputError(f"ConeBeam on CUDA computes in float32 (ASTRA's precision); got {given.dtype}")
    astra.set_gpu_index(given.device.index or 0)
    torch.cuda.synchronize(given.device)
    return astra


def geometries(astra: Any, rays: Rays) -> tuple[dict[str, Any], dict[str, Any]]:  # noqa: ANN401
    """The scan and the volume as ASTRA describes them: unit voxels about the origin."""
    nx, ny, nz = rays.shape
    middle = (np.array(rays.shape) - 1) / 2
    vectors = rays.views.reshape(-1, 4, 3).copy()
    vectors[:, 1] += (rays.columns - 1) / 2 * vectors[:, 2] + (rays.rows - 1) / 2 * vectors[:, 3] - middle
    if not rays.parallel:
        vectors[:, 0] -= middle
    kind = "parallel3d_vec" if rays.parallel else "cone_vec"
    scan = astra.create_proj_geom(kind, rays.rows, rays.columns, vectors.reshape(-1, 12))
    return scan, astra.create_vol_geom(ny, nx, nz)


def _projector(astra: Any, rays: Rays) -> int:  # noqa: ANN401
    return int(astra.create_projector("cuda3d", *geometries(astra, rays)))


def _lengths(rays: Rays, like: Tensor) -> Tensor:
    """Metres per voxel length along every ray: one number for cubes, else (angle, row, detector)."""
    sides = torch.tensor(rays.sides, dtype=torch.float64, device=like.device)
    if max(rays.sides) - min(rays.sides) <= 1e-12 * max(rays.sides):
        return sides[0].to(like)
    a, first, u, v = torch.from_numpy(rays.views).to(like.device).reshape(-1, 4, 3).unbind(1)
    i = torch.arange(rays.rows, device=like.device, dtype=torch.float64)[:, None, None]
    j = torch.arange(rays.columns, device=like.device, dtype=torch.float64)[:, None]
    along = first[:, None, None] + j * u[:, None, None] + i * v[:, None, None] - a[:, None, None]
    if rays.parallel:
        along = a[:, None, None].expand_as(along)
    return ((along * sides).norm(dim=-1) / along.norm(dim=-1)).to(like.dtype)
