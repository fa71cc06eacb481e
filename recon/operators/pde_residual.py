r"""How far fields are from obeying a differential equation, as a measurement that should read zero.

The unknown holds a coefficient and a solution together; ``GaussianLikelihood(PDEResidual(...), zeros, sigma)`` beside sparse
observations of either turns the equation into a likelihood.

Steady diffusion (Darcy flow, heat conduction) on a regular grid of points, with the finite volumes around the inner ones:

    r_ij = (F^x_{i,j+1/2} - F^x_{i,j-1/2}) / dx + (F^y_{i+1/2,j} - F^y_{i-1/2,j}) / dy - f_ij
    F^x_{i,j+1/2} = -a_{i,j+1/2} (u_{i,j+1} - u_ij) / dx

that is ``-div(a grad u) - f``.  What leaves one volume enters the next, so the sum of ``(r + f) dx dy`` is the flux through the
outer faces.  For fixed ``a`` the matrix of the inner values of ``u`` is symmetric and positive definite.  The outermost points
are the boundary.  Smooth fields that solve the equation leave a residual of second order in the spacing, at every point.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from recon.errors import InputError
from recon.operators.base import Operator
from recon.space import Space

FaceMean = Literal["arithmetic", "harmonic"]
Values = float | Tensor | np.ndarray


class PDEResidual(Operator):
    """``r = R(fields)``: any residual written with torch.

    residual: maps (n, *domain.shape) to (n, *range.shape) with differentiable torch operations, every draw on its own; an
    ``nn.Module`` whose numbers are buffers follows ``.double()`` and ``.to(device)`` (a lambda cannot be pickled).
    Its gradient is autograd's, exact for the discrete equation.
    Raises InputError when the residual of two fields of ones has another shape than (2, *range.shape).
    """

    def __init__(self, domain: Space, range: Space, residual: Callable[[Tensor], Tensor]) -> None:
        super().__init__(domain, range)
        self.residual = residual
        numbers = residual.buffers() if isinstance(residual, nn.Module) else ()
        like = next((b for b in numbers if b.is_floating_point()), torch.zeros(()))
        with torch.no_grad():
            shape = tuple(residual(like.new_ones(2, *domain.shape)).shape)
        if shape != (2, *range.shape):
            raise InputError(
                f"the residual of two fields {domain.describe()} has shape {shape}; got range {range.describe()}"
            )

    @classmethod
    def darcy(
        cls,
        domain: Space,
        source: Values = 0.0,
        boundary: Values | None = None,
        mean: FaceMean = "arithmetic",
        log: bool = False,
        unit: str = "1",
    ) -> PDEResidual:
        """``r = -div(a grad u) - f`` at the inner points of a grid; see the module's text and ``Darcy``.

        domain: ("channel", "y", "x") with channels ("coefficient", "solution") and evenly spaced y and x, at least 3 by 3.
        source: ``f``, one number or (y, x).  boundary: values of ``u`` on the outermost points, one number or (y, x), put in
        place of the solution's own there; None keeps its own.  mean: of ``a`` at a face.  log: the first channel is log a.
        unit: of the residual and the source, that is of a u / m^2.
        Maps (*batch, channel, y, x) to (*batch, y, x), less the outermost points.
        """
        steps = _steps(domain)
        inner = {dim: np.asarray(domain.coords[dim])[1:-1] for dim in ("y", "x")}
        ny, nx = domain.shape[1:]
        if mean not in get_args(FaceMean):
            raise InputError(f"mean must be one of {', '.join(get_args(FaceMean))}; got {mean!r}")
        given = (
            _values("source", source, (ny, nx)),
            None if boundary is None else _values("boundary", boundary, (ny, nx)),
        )
        return cls(domain, Space(("y", "x"), (ny - 2, nx - 2), inner, unit), Darcy(steps, *given, mean, log))

    def apply(self, x: Tensor) -> Tensor:
        return self.residual(x)


class Darcy(nn.Module):
    """``-div(a grad u) - f`` by conservative finite volumes, for ``PDEResidual``.

    steps: spacing along y and x, m.  source, boundary: tensors, one number or (y, x).
    mean "arithmetic": ``(a + b) / 2``, bilinear in (a, u).  "harmonic": ``2 a b / (a + b)``, right for layers with jumps, and
    0 (its limit, a closed face) where either is not positive.  log: the coefficient channel holds log a.
    """

    source: Tensor
    boundary: Tensor | None

    def __init__(
        self,
        steps: tuple[float, float],
        source: Tensor,
        boundary: Tensor | None = None,
        mean: FaceMean = "arithmetic",
        log: bool = False,
    ) -> None:
        super().__init__()
        self.steps, self.mean, self.log = steps, mean, log
        self.register_buffer("source", source[1:-1, 1:-1] if source.ndim else source)
        self.register_buffer("boundary", boundary)

    def fluxes(self, fields: Tensor) -> tuple[Tensor, Tensor]:
        """``F^y`` (n, y - 1, x - 2) and ``F^x`` (n, y - 2, x - 1) through the faces around the inner points.

        fields: (n, 2, y, x).  Positive along growing index, per metre of face.
        """
        a, u = fields[:, 0], fields[:, 1]
        a = a.exp() if self.log else a
        if self.boundary is not None:
            inside = torch.nn.functional.pad(u.new_ones(u.shape[1] - 2, u.shape[2] - 2, dtype=torch.bool), (1, 1, 1, 1))
            u = torch.where(inside, u, self.boundary.to(u.dtype))
        down, along = self.steps
        fy = -self._face(a[:, :-1, 1:-1], a[:, 1:, 1:-1]) * (u[:, 1:, 1:-1] - u[:, :-1, 1:-1]) / down
        fx = -self._face(a[:, 1:-1, :-1], a[:, 1:-1, 1:]) * (u[:, 1:-1, 1:] - u[:, 1:-1, :-1]) / along
        return fy, fx

    def forward(self, fields: Tensor) -> Tensor:
        """The residual: (n, 2, y, x) -> (n, y - 2, x - 2)."""
        fy, fx = self.fluxes(fields)
        down, along = self.steps
        return fy.diff(dim=1) / down + fx.diff(dim=2) / along - self.source.to(fields.dtype)

    def _face(self, a: Tensor, b: Tensor) -> Tensor:
        if self.mean == "arithmetic":
            return (a + b) / 2
        open_ = (a > 0) & (b > 0)
        return torch.where(open_, 2 * a * b / torch.where(open_, a + b, 1.0), 0.0)


def _steps(domain: Space) -> tuple[float, float]:
    if domain.dims != ("channel", "y", "x") or domain.coords.get("channel") != ("coefficient", "solution"):
        raise InputError(
            f'darcy takes fields ("channel", "y", "x") with the channels ("coefficient", "solution"); got {domain.describe()} '
            f"with channels {domain.coords.get('channel')}"
        )
    steps = domain.spacing("y"), domain.spacing("x")
    if min(domain.shape[1:]) < 3 or steps[0] is None or steps[1] is None:
        raise InputError(f"darcy needs at least 3 by 3 points, evenly spaced along y and x; got {domain.describe()}")
    return steps[0], steps[1]


def _values(name: str, values: Values, shape: tuple[int, int]) -> Tensor:
    # A tensor keeps its type and an array is held in float32; a lone number stays exact and follows the fields.
    tensor = values if isinstance(values, Tensor) else torch.as_tensor(np.asarray(values, dtype=np.float64))
    tensor = (
        tensor if (isinstance(values, Tensor) and tensor.is_floating_point()) or not tensor.ndim else tensor.float()
    )
    if (tensor.ndim and tuple(tensor.shape) != shape) or not bool(torch.isfinite(tensor).all()):
        raise InputError(
            f"{name} must be one finite number, or one for each of the points {shape}; got {tuple(tensor.shape)}"
        )
    return tensor
