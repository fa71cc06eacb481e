"""Figures that are tables or curves, as CSV beside the page: one data frame per figure, units in the header.

Maps stay in ``figures.nc``, which holds every figure.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recon.files import write_text
from recon.plot.canvas import unit_label

if TYPE_CHECKING:
    import xarray as xr

    from recon.report.panels import Picture

FOLDER = "figures"
Column = tuple[str, list[Any]]


def write_tables(pictures: Mapping[str, Picture], folder: str | Path) -> list[Path]:
    """Write ``figures/NAME.csv`` into ``folder`` for every figure with curves or tables, each whole or not at all."""
    made = []
    for name, picture in pictures.items():
        found = columns(picture.data)
        if found:
            path = Path(folder) / FOLDER / f"{name.replace('/', '_')}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, text(found))
            made.append(path)
    return made


def columns(data: Mapping[str, xr.DataArray]) -> list[Column]:
    """The columns (header, values) of what is one-dimensional, or a table of named columns, in ``data``.

    Arrays along one axis share its column of places, which comes first; a unit stands in brackets behind the name.
    """
    found: list[Column] = []
    seen: list[tuple[str, list[Any]]] = []
    for name, array in data.items():
        parts = _lines(name, array)
        for header, line in parts:
            place = _place(line)
            if place not in seen:
                seen.append(place)
                found.append(place)
            found.append((unit_label(header, str(line.attrs.get("units", ""))), line.values.tolist()))
    return found


def _lines(name: str, array: xr.DataArray) -> list[tuple[str, xr.DataArray]]:
    if array.ndim == 1:
        return [(name, array)]
    if array.ndim == 2 and "column" in array.dims:
        return [(str(column), array.sel(column=column).drop_vars("column")) for column in array["column"].values]
    return []


def _place(line: xr.DataArray) -> Column:
    """Where the values of a line are: its coordinate, or their number."""
    dim = str(line.dims[0])
    if dim not in line.coords:
        return f"{dim} (number)", list(range(line.sizes[dim]))
    at = line.coords[dim]
    return unit_label(dim, str(at.attrs.get("units", ""))), at.values.tolist()


def text(found: list[Column]) -> str:
    """CSV with one header line; columns that are shorter end in empty cells, and so is what is no number."""
    longest = max(len(values) for _, values in found)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([header for header, _ in found])
    for i in range(longest):
        writer.writerow([_cell(values[i]) if i < len(values) else "" for _, values in found])
    return out.getvalue()


def _cell(value: Any) -> Any:  # noqa: ANN401  (a number or a text)
    return "" if isinstance(value, float) and not np.isfinite(value) else value
