"""Tiny instances of everything that has a contract, by name, so that one test body per contract covers them all."""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Callable, Iterator

import numpy as np
import torch

import recon
from recon.draws import Draws
from recon.operators import LinearOperator, MatrixOperator, Operator, ParallelBeam, Stack
from recon.space import Space

BASES = {"Operator", "LinearOperator"}


def normal(*shape: int, step: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Fixed standard normal numbers, another set for every ``step``."""
    return Draws(1, [0]).normal(step, shape, "user", dtype=dtype)[0]


def matrix(rows: int = 5, columns: int = 7, step: int = 0) -> MatrixOperator:
    return MatrixOperator(normal(rows, columns, step=step, dtype=torch.float32))


def image_matrix() -> MatrixOperator:
    """A matrix between spaces with axes and units."""
    domain, range_ = Space.grid((4, 3), 0.5, "1/m"), Space(("level", "station"), (2, 4), {}, "K")
    return MatrixOperator(normal(8, 12, step=3, dtype=torch.float32), domain, range_)


def complex_matrix() -> MatrixOperator:
    return MatrixOperator(torch.complex(normal(5, 7, dtype=torch.float32), normal(5, 7, step=1, dtype=torch.float32)))


def beam(projector: str = "line", views: int = 5) -> ParallelBeam:
    return ParallelBeam.half_turn((9, 8), 2e-3, views, projector=projector)  # type: ignore[arg-type]


def shifted_beam(projector: str = "linear") -> ParallelBeam:
    """Not square, detectors unlike pixels, shifted, few, over more than a turn, in no order."""
    angles = [0.3, -2.0, 7.0, 1.2]
    return ParallelBeam(Space.grid((6, 11), 1.5e-3, "1/m"), angles, 9, 1.1e-3, 0.7e-3, projector)  # type: ignore[arg-type]


def off_centre_beam() -> ParallelBeam:
    """The image does not sit on the axis of rotation."""
    y, x = 5e-3 - 1e-3 * np.arange(7), 2e-3 + 1e-3 * np.arange(6)
    domain = Space(("y", "x"), (7, 6), {"y": y, "x": x}, "1/m")
    return ParallelBeam(domain, np.arange(4) * math.pi / 4)


def composed() -> LinearOperator:
    inner = matrix()
    return MatrixOperator(normal(4, 5, step=2, dtype=torch.float32), inner.range) @ inner


OPERATORS: dict[str, Callable[[], Operator]] = {
    "matrix": matrix,
    "matrix_of_images": image_matrix,
    "matrix_complex": complex_matrix,
    "matrix_complex_transposed": lambda: complex_matrix().H,
    "parallel_beam_line": beam,
    "parallel_beam_strip": lambda: beam("strip"),
    "parallel_beam_linear": lambda: beam("linear"),
    "parallel_beam_shifted": shifted_beam,
    "parallel_beam_shifted_strip": lambda: shifted_beam("strip"),
    "parallel_beam_off_centre": off_centre_beam,
    "stack": lambda: Stack([matrix(), matrix(3, step=1)]),
    "stack_of_beams": lambda: Stack([beam(), beam("strip", 3)]),
    "composed": composed,
    "summed": lambda: matrix() + matrix(step=1),
    "scaled": lambda: -2.5 * beam(),
    "transposed": lambda: beam().H,
}


def classes() -> set[type[Operator]]:
    """Every operator class that some instance of the zoo is or contains."""
    return {type(part) for make in OPERATORS.values() for part in make().modules() if isinstance(part, Operator)}


def public_operators() -> set[type[Operator]]:
    """Every public operator class of the package, found by importing all of it."""
    for info in pkgutil.walk_packages(recon.__path__, "recon."):
        if not info.name.endswith("__main__"):
            importlib.import_module(info.name)
    return {
        found
        for found in _subclasses(Operator)
        if found.__module__.startswith("recon.") and not found.__name__.startswith("_") and found.__name__ not in BASES
    }


def _subclasses(base: type[Operator]) -> Iterator[type[Operator]]:
    for found in base.__subclasses__():
        yield found
        yield from _subclasses(found)


def dense(operator: LinearOperator) -> torch.Tensor:
    """The matrix of a small linear operator: (range.size, domain.size), complex numbers as pairs of real ones.

    Parts of the domain's numbers come one after the other (all real, all imaginary), those of the range's side by side.
    """
    n = operator.domain.size
    unit = torch.eye(n, dtype=operator.dtype).reshape(n, *operator.domain.shape)
    if operator.domain.complex:
        unit = torch.cat([unit, 1j * unit])
    columns = operator.A(unit)
    return (torch.view_as_real(columns) if columns.is_complex() else columns).flatten(1).T
