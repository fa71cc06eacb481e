"""A table of stations: where they are, what they observe, and how well."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from recon.errors import InputError

Column = float | Sequence[float] | np.ndarray
Values = TypeVar("Values", np.ndarray, Tensor)

POSITIONS = ("level", "lat", "lon", "z", "y", "x")
_NUMBERS = (*POSITIONS, "sigma", "representativeness")
_NAMED_IN_ERRORS = 5


@dataclass(frozen=True)
class Stations:
    """One row per observed number; a value: equal tables compare equal, and the repr builds the table again.

    lat, lon: degrees north and east (any convention).  z, y, x: metres.  level: in the unit of the field's level axis
    (pressure or height).  Only the columns that the field has axes for are given.
    variable: names from the field's "variable" axis.  names: of the stations; a sounding repeats its name at every level.
    sigma: standard deviation of the instrument.  representativeness: standard deviation of the difference between what a
    point sees and what the field's cells can hold; both in the unit of the observed variable.

    Every column is one value per row, or a single value for all rows.  Columns become tuples.
    Raises InputError for no position, columns of different lengths, positions that cannot be, sigma <= 0 or
    representativeness < 0.
    """

    lat: Column | None = None
    lon: Column | None = None
    z: Column | None = None
    y: Column | None = None
    x: Column | None = None
    level: Column | None = None
    variable: str | Sequence[str] | None = None
    names: Sequence[str] | None = None
    sigma: Column | None = None
    representativeness: Column = 0.0

    def __post_init__(self) -> None:
        given = {f.name: _listed(f.name, getattr(self, f.name)) for f in fields(self)}
        if all(given[dim] is None for dim in POSITIONS):
            raise InputError(f"Stations need a position: one or more of {', '.join(POSITIONS)}")
        lengths = {name: len(v) for name, v in given.items() if isinstance(v, tuple)}
        count = next(iter(lengths.values()), 1)
        if set(lengths.values()) - {count} or count == 0:
            raise InputError(f"every column of Stations has one value per row; got {lengths}")
        for name, column in given.items():
            if name == "names" and isinstance(column, str):
                raise InputError(f"names must be a list with one name per station; got {column!r}")
            whole = column if column is None or isinstance(column, tuple) else (column,) * count
            object.__setattr__(self, name, whole)
        self._check()

    def _check(self) -> None:
        for name in _NUMBERS:
            if getattr(self, name) is not None:
                self._refuse(~np.isfinite(self.column(name)), f"have a {name} that is NaN or infinite; leave them out")
        if self.lat is not None:
            self._refuse(np.abs(self.column("lat")) > 90, "have a latitude beyond a pole (degrees north, -90 to 90)")
        if self.lon is not None:
            lon = self.column("lon")
            self._refuse((lon < -360) | (lon > 720), "have no possible longitude (degrees east)")
        if self.sigma is not None:
            self._refuse(self.column("sigma") <= 0, "have a sigma that is not positive")
        self._refuse(self.column("representativeness") < 0, "have a negative representativeness error")

    def _refuse(self, wrong: np.ndarray, why: str) -> None:
        if wrong.any():
            raise InputError(f"{int(wrong.sum())} of {len(self)} stations {why}: {self.listing(wrong)}")

    def __len__(self) -> int:
        return next(len(v) for v in (getattr(self, dim) for dim in POSITIONS) if v is not None)

    def column(self, name: str) -> np.ndarray:
        """A column of numbers: float64 (station,).  Raises InputError where the table has none."""
        values = getattr(self, name)
        if values is None:
            raise InputError(f"these stations have no {name}; give Stations({name}=...)")
        return np.asarray(values, dtype=np.float64)

    def select(self, keep: np.ndarray | Tensor) -> Stations:
        """The rows where ``keep``, bool (station,), is true.  Raises InputError when none is."""
        keep = np.asarray(keep.detach().cpu() if isinstance(keep, Tensor) else keep)
        if keep.dtype != bool or keep.shape != (len(self),):
            raise InputError(f"select takes a bool per station ({len(self)}); got {keep.dtype} {keep.shape}")
        if not keep.any():
            raise InputError(f"no station is left of {len(self)}")
        kept: dict[str, Any] = {}
        for f in fields(self):
            whole = getattr(self, f.name)
            kept[f.name] = None if whole is None else tuple(v for v, k in zip(whole, keep, strict=True) if k)
        return replace(self, **kept)

    def present(self, y: Values) -> tuple[Stations, Values]:
        """The stations that reported, and their values: NaN in ``y`` (station,) means missing.

        Raises InputError for another shape, infinite values, or when nothing was reported.
        """
        values = np.asarray(y.detach().cpu() if isinstance(y, Tensor) else y, dtype=np.float64)
        if values.shape != (len(self),):
            raise InputError(f"present takes one value per station ({len(self)}); got shape {values.shape}")
        self._refuse(np.isinf(values), "report an infinite value (NaN means missing)")
        here = ~np.isnan(values)
        return self.select(here), y[torch.from_numpy(here).to(y.device)] if isinstance(y, Tensor) else y[here]

    def total_sigma(self) -> Tensor:
        """``sqrt(sigma^2 + representativeness^2)``: float64 (station,), the sigma of a ``GaussianLikelihood``.

        Raises InputError for stations without sigma.
        """
        return torch.from_numpy(np.hypot(self.column("sigma"), self.column("representativeness")))

    def listing(self, where: np.ndarray) -> str:
        """The rows where ``where`` is true, in words: name or number, and position; the first few of many."""
        rows = np.flatnonzero(where)
        words = []
        for i in rows[:_NAMED_IN_ERRORS]:
            name = f"number {i}" if self.names is None else f"{self.names[i]!r}"
            position = [f"{dim}={getattr(self, dim)[i]:g}" for dim in POSITIONS if getattr(self, dim) is not None]
            words.append(f"{name} ({', '.join(position)})")
        more = f" and {len(rows) - len(words)} more" if len(rows) > len(words) else ""
        return ", ".join(words) + more


def _listed(name: str, values: object) -> object:
    """A tuple of numbers or names, or the one value that stands for all rows."""
    if values is None:
        return None
    if name in _NUMBERS:
        try:
            numbers = np.asarray(values, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise InputError(f"the {name} of Stations must be numbers; got {values!r}") from error
        if numbers.ndim > 1:
            raise InputError(f"the {name} of Stations is a list, one number per row; got shape {numbers.shape}")
        return tuple(numbers.tolist()) if numbers.ndim else float(numbers)
    if isinstance(values, str):
        return values
    return tuple(str(value) for value in np.asarray(values).ravel())
