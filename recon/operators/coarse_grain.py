r"""Conservative block means: what a coarse model, a satellite footprint or a forecast grid says about a fine field.

The value of a coarse cell ``C`` is the mean of the fine cells ``c`` over their common area,

    y_C = sum_c |C n c| v_c x_c / sum_c |C n c| v_c,

with ``v_c`` 1 for valid fine cells and 0 for the others (land, sea, missing).  Cells are boxes, so overlaps are products of
one-dimensional ones; on the sphere these are differences of ``sin(lat)`` times differences of longitude, the exact areas.
The first-order conservative remapping of Jones 1999 (Mon. Weather Rev. 127) for boxes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import coo_matrix, csr_matrix
from torch import Tensor

from recon.errors import InputError
from recon.operators.base import LinearOperator
from recon.operators.cg import CG
from recon.operators.gather import GatherPair, Numbers
from recon.operators.grids import CIRCLE, SPATIAL, TOLERANCE, Axis, axes, measure
from recon.operators.masked import Masked
from recon.space import Space

Goal = float | Sequence[float] | np.ndarray
_NAMED_IN_ERRORS = 5


class CoarseGrain(LinearOperator):
    """Area-weighted means of the fine cells in each coarse cell; constants and the area mean are kept.

    domain: a field on axes "lat", "lon" (degrees), "z", "y", "x" (metres); others may lead or be named in ``target``.
    target: how many fine cells make a coarse one along each axis of space (2.5 is allowed where it divides the axis), or a
    mapping from axes to such ratios or to the coordinates of the coarse cells, whose bounds lie half way between them.
    Bounds within 1e-3 of a fine cell from a fine bound are that bound.
    valid: fine cells that count, bool (*last axes of domain); the others are never read and may be NaN.
    coverage: least share of a coarse cell's area that valid fine cells must cover.  None: the whole of it has to lie on the
    fine grid, and some of it on valid cells.  What is covered stands for the cell.
    kept: which coarse cells to list, bool; None for the whole coarse grid.  See ``covered``.

    Maps (*batch, *domain.shape) to the coarse grid, or to (*leading axes, "datum") where ``kept`` is given; same unit.
    ``solve`` is in closed form where no fine cell is shared (whole ratios), conjugate gradients elsewhere.
    float32; ``.double()`` gives weights in full double precision.
    Raises InputError for targets that do not divide or cover the grid, naming the cells that lack coverage.
    """

    valid: Tensor | None

    def __init__(
        self,
        domain: Space,
        target: Goal | Mapping[str, Goal],
        valid: np.ndarray | Tensor | None = None,
        coverage: float | None = None,
        kept: np.ndarray | Tensor | None = None,
    ) -> None:
        plan = _Plan(domain, target, valid)
        chosen = np.ones(plan.share.shape, dtype=bool) if kept is None else _flags(kept)
        if chosen.shape != plan.share.shape:
            raise InputError(f"kept is a bool per coarse cell {plan.share.shape}; got shape {chosen.shape}")
        plan.refuse(plan.lacking(coverage) & chosen)
        super().__init__(domain, plan.coarse)
        self.select = None if kept is None else Masked(plan.coarse, chosen)
        self.range = plan.coarse if self.select is None else self.select.range
        self._coarse_shape = plan.coarse.shape
        self._dims = tuple(domain.dims.index(dim) + 1 for dim in plan.parts)
        self.parts = torch.nn.ModuleList(part.pair() for part in plan.parts.values())
        self.register_buffer("valid", None if plan.valid is None else torch.from_numpy(plan.valid), persistent=False)
        self.inverse = None if plan.valid is None else Numbers(plan.inverse)
        diagonal = plan.diagonal()
        self.diagonal = None if diagonal is None else Numbers(diagonal)

    @classmethod
    def covered(
        cls,
        domain: Space,
        target: Goal | Mapping[str, Goal],
        valid: np.ndarray | Tensor | None = None,
        coverage: float | None = None,
    ) -> tuple[CoarseGrain, Tensor]:
        """The operator of the coarse cells with enough coverage, as a list, and which they are.

        The mask is bool over the coarse grid (its last axes, as many as ``valid`` has); ``y[..., kept]`` fits the operator.
        Raises InputError when no cell has enough.
        """
        plan = _Plan(domain, target, valid)
        kept = ~plan.lacking(coverage)
        if not kept.any():
            plan.refuse(~kept)
        return cls(domain, target, valid, coverage, kept), torch.from_numpy(kept)

    def apply(self, x: Tensor) -> Tensor:
        if self.valid is not None:
            x = torch.where(self.valid, x, 0.0)
        for dim, part in zip(self._dims, self._pairs(), strict=True):
            x = part.along(x, dim)
        if self.inverse is not None:
            x = x * self.inverse.value
        return x if self.select is None else self.select.apply(x)

    def apply_adjoint(self, y: Tensor) -> Tensor:
        y = y if self.select is None else self.select.apply_adjoint(y)
        if self.inverse is not None:
            y = y * self.inverse.value
        for dim, part in reversed(list(zip(self._dims, self._pairs(), strict=True))):
            y = part.along(y, dim, transpose=True)
        return y if self.valid is None else torch.where(self.valid, y, 0.0)

    def _pairs(self) -> list[GatherPair]:
        return [part for part in self.parts if isinstance(part, GatherPair)]

    def solve(
        self,
        b: Tensor,
        c: float,
        weight: Tensor | None = None,
        x0: Tensor | None = None,
        cg: CG | None = None,
        watch: Callable[[int], None] | None = None,
    ) -> Tensor:
        """``(A^T W A + c I)^{-1} b``: ``(b - A^T w / (c + w d) A b) / c`` where ``A A^T`` is a diagonal ``d`` (Woodbury).

        That is where no fine cell is shared; x0 and cg serve the other case.
        """
        if self.diagonal is None or not c > 0:
            return super().solve(b, c, weight, x0, cg, watch)
        if watch is not None:
            watch(len(b))
        d = self.diagonal.value.expand(self._coarse_shape)
        d = d if self.select is None else self.select.A(d)
        gain = 1 / (c + d) if weight is None else weight / (c + weight * d)
        return (b - self.A_adjoint(gain * self.A(b))) / c


@dataclass(frozen=True, eq=False)
class _Part:
    """One axis: overlaps (coarse, fine), in the order of the arrays, and the full sizes of the coarse cells."""

    overlap: csr_matrix
    sizes: np.ndarray

    @property
    def mean(self) -> csr_matrix:
        """Overlaps over their sums: each row is a mean (a row without overlap is zero)."""
        total = np.asarray(self.overlap.sum(axis=1)).ravel()
        return csr_matrix(self.overlap.multiply(np.where(total > 0, 1 / np.where(total > 0, total, 1), 0)[:, None]))

    @property
    def share(self) -> np.ndarray:
        """How much of each coarse cell lies on the fine grid."""
        return np.asarray(self.overlap.sum(axis=1)).ravel() / self.sizes

    def pair(self) -> GatherPair:
        """The means as gathers."""
        entries = self.mean.tocoo()
        return GatherPair(entries.row, entries.col, entries.data, entries.shape)


class _Plan:
    """What overlaps what, and how much of each coarse cell is covered."""

    def __init__(self, domain: Space, target: Goal | Mapping[str, Goal], valid: np.ndarray | Tensor | None) -> None:
        goals = _goals(domain, target)
        fine = axes(domain, list(goals))
        bounds, coords, order = {}, {}, {}
        for dim, goal in goals.items():
            if not isinstance(goal, np.ndarray):
                bounds[dim], coords[dim], order[dim] = _divided(fine[dim], goal, domain)
        given = {dim: goal for dim, goal in goals.items() if isinstance(goal, np.ndarray)}
        self.coarse = _replaced(domain, {**coords, **given})
        for dim, axis in axes(self.coarse, list(given)).items():
            shift = np.mod(axis.origin - fine[dim].origin, CIRCLE) if dim == "lon" else 0.0
            bounds[dim], order[dim] = axis.bounds() + shift, axis.order
        self.parts = {dim: _part(fine[dim], bounds[dim], order[dim]) for dim in goals}
        first = min(domain.dims.index(dim) for dim in goals)
        self.valid = None if valid is None else _fitting(domain, _flags(valid), len(domain.dims) - first)
        self.tail = len(domain.dims) - first if self.valid is None else self.valid.ndim
        dims = self.coarse.dims[len(domain.dims) - self.tail :]
        self.on_grid = np.ones(())
        for dim, n in zip(dims, self.coarse.shape[len(domain.dims) - self.tail :], strict=True):
            self.on_grid = self.on_grid[..., None] * (self.parts[dim].share if dim in goals else np.ones(n))
        self.fine_shape = domain.shape[len(domain.dims) - self.tail :]
        self.inside = np.ones_like(self.on_grid) if self.valid is None else self._means(self.valid.astype(float))
        self.share = self.on_grid * self.inside

    def _means(self, values: np.ndarray, square: bool = False) -> np.ndarray:
        """The means (or sums with squared weights) of ``values`` (*last axes) along every axis that is coarsened."""
        for dim, part in self.parts.items():
            axis = self.coarse.dims.index(dim) - len(self.coarse.dims) + values.ndim
            matrix = part.mean.power(2) if square else part.mean
            moved = np.moveaxis(values, axis, 0)
            flat = matrix @ moved.reshape(len(moved), -1)
            values = np.moveaxis(flat.reshape(-1, *moved.shape[1:]), 0, axis)
        return values

    @property
    def inverse(self) -> np.ndarray:
        """``1 / (share of the covered part that is valid)``, 0 where that is nothing."""
        return np.where(self.inside > 0, 1 / np.where(self.inside > 0, self.inside, 1), 0)

    def diagonal(self) -> np.ndarray | None:
        """``A A^T`` (*last axes of the coarse grid) where no two coarse cells share a fine one, else None."""
        if any((part.overlap.getnnz(axis=0) > 1).any() for part in self.parts.values()):
            return None
        fine = np.ones(self.fine_shape) if self.valid is None else self.valid.astype(float)
        return self._means(fine, square=True) * self.inverse**2

    def lacking(self, coverage: float | None) -> np.ndarray:
        """Coarse cells with too little coverage: bool (*last axes of the coarse grid)."""
        if coverage is None:
            return (self.on_grid < 1 - TOLERANCE) | (self.inside <= 0)
        if not 0 <= coverage <= 1:
            raise InputError(f"coverage is a share of the area, 0 to 1; got {coverage!r}")
        return (self.share < coverage - 1e-9) | (self.share <= 0)

    def refuse(self, lacking: np.ndarray) -> None:
        """Raise InputError naming the cells where ``lacking`` is true, if any is."""
        if not lacking.any():
            return
        words = []
        dims = self.coarse.dims[len(self.coarse.dims) - self.tail :]
        for cell in np.argwhere(lacking)[:_NAMED_IN_ERRORS]:
            place = [f"{d}={self.coarse.coords[d][i]:g}" for d, i in zip(dims, cell, strict=True) if d in self.parts]
            words.append(f"({', '.join(place)}) with {100 * self.share[tuple(cell)]:.3g} %")
        more = f" and {int(lacking.sum()) - len(words)} more" if lacking.sum() > len(words) else ""
        raise InputError(
            f"{int(lacking.sum())} of {lacking.size} coarse cells are not covered by enough valid fine cells: "
            f"{', '.join(words)}{more}; leave them out of the coordinates, allow less with coverage=, or use "
            "CoarseGrain.covered(...), which gives the operator of the others and the mask of those it kept"
        )


def _goals(domain: Space, target: Goal | Mapping[str, Goal]) -> dict[str, float | np.ndarray]:
    """What is asked along each axis that changes, in the order of the axes."""
    if not isinstance(target, Mapping):
        if np.ndim(target) != 0:
            raise InputError(f'coarse coordinates need their axes, like {{"lat": ..., "lon": ...}}; got {target!r}')
        target = {dim: target for dim in domain.dims if dim in SPATIAL}
    unknown = sorted(set(target) - set(domain.dims))
    if unknown or not target:
        raise InputError(
            f"CoarseGrain averages along axes of space ({', '.join(SPATIAL)}) or those named in its target; the field is "
            f"{domain.describe()}{', without ' + ', '.join(unknown) if unknown else ''}"
        )
    goals: dict[str, float | np.ndarray] = {}
    for dim in domain.dims:
        if dim in target:
            goal = np.asarray(target[dim], dtype=np.float64)
            if goal.ndim > 1 or not np.isfinite(goal).all() or (goal.ndim == 0 and goal < 1):
                raise InputError(
                    f"the target along {dim!r} is a ratio >= 1 or a list of coordinates; got {target[dim]!r}"
                )
            if goal.ndim or goal != 1:
                goals[dim] = goal if goal.ndim else float(goal)
    if not goals:
        raise InputError("a ratio of 1 along every axis leaves nothing to average")
    return goals


def _divided(fine: Axis, ratio: float, domain: Space) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Coarse bounds ``ratio`` fine cells apart, coordinates in their middle (in array order), and that order."""
    n = len(fine.values)
    count = round(n / ratio)
    if count < 1 or abs(count * ratio - n) > 1e-9 * n:
        near = sorted({max(1, int(n // ratio)), int(n // ratio) + 1})
        ratios = " or ".join(f"{n / m:g} ({m} cells)" for m in near)
        raise InputError(f"a ratio of {ratio:g} does not divide the {n} cells along {fine.dim!r}; {ratios} would")
    bounds = np.interp(np.arange(count + 1) * (n / count), np.arange(n + 1), fine.bounds())
    # The user's convention of longitudes, from the westernmost point on.
    start = float(np.asarray(domain.coords[fine.dim])[fine.order[0]]) - fine.values[0]
    falling = n > 1 and fine.order[0] > fine.order[-1]
    order = np.arange(count)[::-1] if falling else np.arange(count)
    return bounds, ((bounds[:-1] + bounds[1:]) / 2 + start)[order], order


def _replaced(domain: Space, coords: Mapping[str, np.ndarray]) -> Space:
    shape = [len(coords[dim]) if dim in coords else n for dim, n in zip(domain.dims, domain.shape, strict=True)]
    return Space(domain.dims, tuple(shape), {**domain.coords, **coords}, domain.unit)


def _part(fine: Axis, bounds: np.ndarray, order: np.ndarray) -> _Part:
    """Common lengths of coarse cells (ends ``bounds``, growing, at the array positions ``order``) and fine ones."""
    edges, cells = fine.bounds(), fine.order
    if fine.dim == "lon":
        # Three turns of the circle in a row, so that coarse cells find theirs; a region leaves gaps (-1) in between.
        gap = np.full(0 if fine.cyclic else 1, -1)
        once, last = (edges[:-1], edges[-1:]) if fine.cyclic else (edges, edges[:0])
        edges = np.concatenate([once - CIRCLE, once, once + CIRCLE, last + CIRCLE])
        cells = np.concatenate([cells, gap, cells, gap, cells])
    slack = TOLERANCE * float(np.diff(fine.bounds()).min())
    bounds = _snapped(bounds, edges, slack)
    if (np.diff(bounds) <= 0).any():
        raise InputError(f"coarse cells along {fine.dim!r} are smaller than {TOLERANCE:g} of a fine one")
    # Between neighbouring ends of either kind there is one coarse and one fine cell.
    ends = np.unique(np.concatenate([bounds, edges]))
    ends = ends[(ends >= max(bounds[0], edges[0])) & (ends <= min(bounds[-1], edges[-1]))]
    middle = (ends[1:] + ends[:-1]) / 2
    columns = cells[np.searchsorted(edges, middle) - 1]
    rows, lengths = order[np.searchsorted(bounds, middle) - 1], np.diff(measure(fine.dim, ends))
    there = columns >= 0
    entries = lengths[there], (rows[there], columns[there])
    sizes = np.empty(len(order))
    sizes[order] = np.diff(measure(fine.dim, bounds))
    return _Part(coo_matrix(entries, shape=(len(order), len(fine.values))).tocsr(), sizes)


def _snapped(bounds: np.ndarray, onto: np.ndarray, slack: float) -> np.ndarray:
    """``bounds`` moved to the nearest value of ``onto`` (growing) where that is within ``slack``."""
    above = np.clip(np.searchsorted(onto, bounds), 1, len(onto) - 1)
    nearest = np.where(bounds - onto[above - 1] < onto[above] - bounds, onto[above - 1], onto[above])
    return np.where(np.abs(nearest - bounds) <= slack, nearest, bounds)


def _flags(given: np.ndarray | Tensor) -> np.ndarray:
    flags = np.asarray(given.detach().cpu() if isinstance(given, Tensor) else given)
    if not np.isin(flags, (0, 1)).all():
        raise InputError("valid and kept hold true and false, or 1 and 0, and nothing else")
    return flags.astype(bool)


def _fitting(domain: Space, valid: np.ndarray, least: int) -> np.ndarray:
    if valid.ndim < least or valid.shape != domain.shape[len(domain.shape) - valid.ndim :]:
        raise InputError(
            f"valid has the shape of {domain.describe()} or of its last axes, all that are averaged; got {valid.shape}"
        )
    return valid
