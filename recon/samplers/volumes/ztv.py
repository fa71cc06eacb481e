r"""Neighbouring slices held together: total variation along one axis, by warm-started ADMM with conjugate gradients.

With the prior's affine decoder ``x = b + s v`` folded in, data ``y = A x + n`` of covariance ``S``, an anchor ``v_0`` and

.. math::  (D x)_k = (x_{k+1} - x_k) / |z_{k+1} - z_k|, \qquad \text{zero at the last slice,}

the problem of one step is

.. math::  \min_v\ \tfrac12 |y - A x|^2_{S^{-1}} + \tfrac{pull}{2} |v - v_0|^2 + w \sum |D x|_1 .

Per outer iteration (Boyd et al. 2011, section 6.4.1; rho = penalty w^2)::

    v <- a few iterations of CG, from v, on
           (s A^T S^-1 A s + pull + rho s D^T D s) v = s A^T S^-1 (y - A b) + pull v_0 + rho s D^T (Z - U)
    Z <- shrink(D x + U, w / rho)
    U <- U + D x - Z

Z and U are kept from one step of a sampler to the next, which is why one outer iteration a step is enough.  Each fulfils what
it should: inner products are over the whole volume where ``D`` couples the slices and over single slices where nothing does
(w = 0 and data slice by slice), never over draws; the direction of every iteration is made from the residual of that
iteration; complex data count as pairs of real ones, so the system is symmetric.

w is the weight of a negative log-probability: of ``Laplace`` differences with ``E |D x| = 1 / w``.  rho ``= penalty w^2`` has
its unit; the shrinkage ``w / rho`` is then ``1 / penalty`` times that mean slope, and as w goes to 0 both terms of the
coupling vanish.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from recon.errors import InputError
from recon.operators.base import LinearOperator
from recon.operators.cg import CG
from recon.operators.slabs import AxisDifference, Slab
from recon.operators.slices import SliceStack, separable
from recon.space import Space

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Coupling:
    """Total variation along an axis, and how hard ADMM tries.

    weight: w of the module's text, in the axis' unit per unit of the volume (m for a volume of pure numbers, m^2 for
    attenuation): one over the mean of |dx/dz| that is expected (``typical_weight`` takes it from example volumes).  0 leaves
    the slices on their own; None says nothing, which only posteriors without such an axis accept.
    slope_per_mm: the same said otherwise: the mean |dx/dz| that is expected, in the volume's unit per mm of the axis; the
    weight is then ``1 / (1000 slope_per_mm)``.
    periodic: the last slice is followed by the first, as in the published code; otherwise nothing flows through the ends.
    penalty: rho / w^2.  iterations: of ADMM in each step.  Where the data are few and w large, a small penalty keeps the
    coupling from outweighing them while Z and U are still far from settled; ``ztv`` ends at the same place for all.

    Raises InputError for numbers out of range.
    """

    weight: float | None = None
    axis: str = "z"
    periodic: bool = False
    penalty: float = 0.1
    iterations: int = 1
    slope_per_mm: float | None = None

    def __post_init__(self) -> None:
        if self.slope_per_mm is not None and (self.weight is not None or not self.slope_per_mm > 0):
            raise InputError(f"a coupling has a weight or a positive slope_per_mm, not both; got {self}")
        if (self.weight is not None and not self.weight >= 0) or not self.penalty > 0 or self.iterations < 1:
            raise InputError(f"a coupling needs weight >= 0, penalty > 0 and iterations >= 1; got {self}")

    def on(self, space: Space, user: str) -> float:
        """The weight for volumes of ``space``.  Raises InputError naming ``user`` where it does not fit them."""
        weight = self.weight if self.slope_per_mm is None else 1 / (1e3 * self.slope_per_mm)
        if self.axis not in space.dims:
            if weight:
                raise InputError(
                    f"{user} was asked to couple slices across {self.axis!r}, and {space.describe()} has no such axis; "
                    "set coupling.axis to one of them, or leave the weight out"
                )
            return 0.0
        if weight is None:
            raise InputError(
                f"{user} needs coupling.weight for {space.describe()}: one over the mean |dx/d{self.axis}| of such volumes, in "
                f"m per {space.unit!r} (or that mean itself per mm, coupling.slope_per_mm); 0 leaves slices on their own"
            )
        return weight


def typical_weight(volumes: Tensor, space: Space, axis: str = "z") -> float:
    """The weight under which differences like those of example volumes (n, *space.shape) are the most probable.

    Of Laplace differences that is ``1 / mean |D x|``.  Raises InputError for an axis without coordinates, or of equal slices.
    """
    difference = AxisDifference(space, axis)
    size = difference.A(volumes.double()).narrow(1 + space.dims.index(axis), 0, difference.slab.slices - 1).abs().mean()
    if not float(size) > 0:
        raise InputError(f"neighbouring slices across {axis!r} of the examples are equal; they tell no weight")
    return 1 / float(size)


def shrink(values: Tensor, threshold: float) -> Tensor:
    """Towards zero by ``threshold``, and not beyond: the proximal map of ``threshold |.|``."""
    return values - values.clamp(-threshold, threshold)


@dataclass(frozen=True)
class DataTerm:
    """``1/2 |y - A x|^2_{S^-1}`` of ``x = decode(v)``.

    precision: ``1 / sigma^2``, one number () or per datum.  decode, decode_linear: of the prior; the identity without one.
    watch: told the batch size at each use of ``A`` and ``A^T``.
    """

    operator: LinearOperator
    y: Tensor
    precision: Tensor
    decode: Map
    decode_linear: Map
    watch: Callable[[int], None]

    def descent(self, v: Tensor) -> Tensor:
        """Minus the gradient: ``s A^T S^-1 (y - A x)``."""
        self.watch(len(v))
        return self.decode_linear(self.operator.A_adjoint(self.precision * (self.y - self.operator.A(self.decode(v)))))

    def curvature(self, u: Tensor) -> Tensor:
        """``s A^T S^-1 A s u``."""
        self.watch(len(u))
        x = self.decode_linear(u)
        if self.precision.ndim == 0:
            return self.decode_linear(self.precision * self.operator.normal(x))
        return self.decode_linear(self.operator.A_adjoint(self.precision * self.operator.A(x)))


class Volume:
    """The problem of the module's text for one posterior: ``solve`` is a step's.

    weight: w; 0 for none.  slab: this rank's part of the volumes; None where there is no axis of slices.
    """

    def __init__(self, data: DataTerm, coupling: Coupling, weight: float, slab: Slab | None) -> None:
        self.data, self.coupling, self.weight, self.slab = data, coupling, weight, slab
        self.rho = coupling.penalty * weight**2
        self.difference = None
        if weight > 0:
            assert slab is not None
            self.difference = AxisDifference(slab, coupling.axis, coupling.periodic)

    def memory(self, like: Tensor) -> dict[str, Tensor]:
        """Z and U before the first step; nothing where slices are on their own."""
        return {} if self.difference is None else {name: torch.zeros_like(like) for name in ("Z", "U")}

    def solve(
        self, v: Tensor, pull: float, memory: Mapping[str, Tensor], cg: CG, scale: float | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """From the anchor ``v``, and the memory of the step before, to the next of both.

        scale: s where it is one number, for operators that solve their own systems in closed form.
        """
        if self.difference is None:
            return self._alone(v, pull, cg, scale), {}
        start, Z, U = v, memory["Z"], memory["U"]
        to, back, D = self.data.decode, self.data.decode_linear, self.difference

        def curvature(u: Tensor) -> Tensor:
            return self.data.curvature(u) + pull * u + self.rho * back(D.normal(back(u)))

        for _ in range(self.coupling.iterations):
            coupled = back(D.A_adjoint(Z - U) - D.normal(to(v)))
            r = self.data.descent(v) + pull * (start - v) + self.rho * coupled
            v = v + conjugate(curvature, r, cg, self._whole)
            slope = D.A(to(v))
            Z = shrink(slope + U, self.weight / self.rho)
            U = U + slope - Z
        return v, {"Z": Z, "U": U}

    def _alone(self, v: Tensor, pull: float, cg: CG, scale: float | None) -> Tensor:
        operator, r = self.data.operator, self.data.descent(v)
        apart = separable(operator, self.coupling.axis)
        if pull > 0 and scale is not None and (isinstance(operator, SliceStack) or not apart) and self._undivided:
            weight = None if self.data.precision.ndim == 0 else self.data.precision.expand(operator.range.shape)
            factor = float(self.data.precision) if weight is None else 1.0
            share = factor * scale**2
            return v + operator.solve(r / share, pull / share, weight, cg=cg, watch=self.data.watch)
        return v + conjugate(lambda u: self.data.curvature(u) + pull * u, r, cg, self._slices if apart else self._whole)

    @property
    def _undivided(self) -> bool:
        """Whether the operator's own inner products are over all there is to sum over, in an order that no cut changes."""
        cut = any(isinstance(getattr(part, "slab", None), Slab) for part in self.data.operator.modules())
        return self.slab is None or not cut or separable(self.data.operator, self.coupling.axis)

    def _whole(self, a: Tensor, b: Tensor) -> Tensor:
        """Over the whole volume: (n, 1, ..., 1)."""
        sums = (a * b).flatten(1).sum(1).double() if self.slab is None else self.slab.dots([(a, b)])[0]
        return sums.reshape(-1, *[1] * (a.ndim - 1))

    def _slices(self, a: Tensor, b: Tensor) -> Tensor:
        """Over each slice: (n, 1, .., slices, .., 1)."""
        assert self.slab is not None
        shape = [1] * (a.ndim - 1)
        shape[self.slab.at] = -1
        return self.slab.parts(a, b).reshape(len(a), *shape)


def conjugate(curvature: Map, r: Tensor, cg: CG, inner: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Conjugate gradients from zero on ``curvature(d) = r``; stops where the residual is ``cg.tolerance`` of the first.

    inner: inner products, each of which belongs to a system of its own, as they broadcast over ``r``: (n, 1, ..).  One for the
    start and two for every iteration.  (The ``CG.solve`` of operators takes those over draws.)
    """
    d, p = torch.zeros_like(r), r
    rr = inner(r, r)
    goal = cg.tolerance**2 * rr
    active = rr > goal
    for _ in range(cg.iterations):
        if not bool(active.any()):
            break
        q = curvature(p)
        bend = inner(p, q)
        active = active & (bend > 0)
        alpha = torch.where(active, rr / torch.where(active, bend, 1.0), 0.0).to(r.dtype)
        d = d + alpha * p
        r = r - alpha * q
        new = inner(r, r)
        active = active & (new > goal)
        beta = torch.where(active, new / torch.where(rr > 0, rr, 1.0), 0.0).to(r.dtype)
        p, rr = r + beta * p, new
    return d


def ztv(operator: LinearOperator, y: Tensor, sigma: float | Tensor, coupling: Coupling, cg: CG | None = None) -> Tensor:
    r"""``argmin_x 1/2 |(A x - y)/sigma|^2 + weight sum |D x|_1`` by ``coupling.iterations`` of ADMM from zero.

    y: (n, \*range.shape).  sigma: one number or \*range.shape.  Returns (n, \*domain.shape): the reconstruction of the
    identity prior, which a sampler's data step is with ``pull = 0``.  Converges for every penalty when CG is let converge.
    Raises InputError for sigma that is not positive, no weight, or an axis without coordinates.
    """
    sigma = torch.as_tensor(sigma, dtype=y.dtype.to_real(), device=y.device)
    if not bool((sigma > 0).all()) or not bool(torch.isfinite(sigma).all()):
        raise InputError("sigma, the standard deviation of the noise, must be positive and finite everywhere")
    batch = operator.range.require(tuple(y.shape), "ztv")
    if len(batch) != 1:
        raise InputError(f"ztv takes measurements (n, {operator.range.describe()}); got shape {tuple(y.shape)}")
    data = DataTerm(operator, y, 1 / sigma**2, lambda v: v, lambda u: u, lambda n: None)
    weight = coupling.on(operator.domain, "ztv")
    problem = Volume(data, coupling, weight, slab_of(operator, coupling, operator.domain))
    start = torch.zeros(len(y), *operator.domain.shape, dtype=sigma.dtype, device=y.device)
    return problem.solve(start, 0.0, problem.memory(start), cg or CG(20, 1e-4))[0]


def slab_of(operator: LinearOperator, coupling: Coupling, space: Space) -> Slab | None:
    """This rank's slab of the volumes: that of the operator, else the whole of ``space``; None without the axis.

    Raises InputError when the operator's slab is cut along another axis.
    """
    # Of any part: a whitened or composed operator is cut as the one inside it is.
    slab = next((part.slab for part in operator.modules() if isinstance(getattr(part, "slab", None), Slab)), None)
    if isinstance(slab, Slab):
        if slab.axis != coupling.axis:
            raise InputError(
                f"volumes are cut across {slab.axis!r}; set coupling.axis to that (it is {coupling.axis!r})"
            )
        return slab
    return Slab(space, coupling.axis) if coupling.axis in space.dims else None
