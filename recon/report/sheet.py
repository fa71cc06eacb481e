"""A sheet of draws: what a prior believes, at a glance."""

from __future__ import annotations

import math

from torch import Tensor

from recon.plot.canvas import Look, image, limits, scale, unit_label
from recon.report.panels import Picture, finish, new_figure
from recon.space import Space

_COLUMNS = 4


def sheet(x: Tensor, space: Space) -> Picture:
    """``x`` (n, [field,] y, x) side by side at one scale: complex images as magnitudes, of several variables one in turn.

    With several variables each row of the sheet shows one of them, draw after draw.
    """
    fields = space.shape[0] if len(space.shape) == 3 else 1
    names = space.coords.get(space.dims[0], ()) if fields > 1 else ()
    if tuple(names) == ("real", "imag"):
        x, fields = x.square().sum(1).sqrt(), 1
    plane = Space(
        space.dims[-2:], space.shape[-2:], {d: space.coords[d] for d in space.dims[-2:] if d in space.coords}, "1"
    )
    rows = fields if fields > 1 else math.ceil(len(x) / _COLUMNS)
    height = 2.4 * rows * max(0.6, space.shape[-2] / space.shape[-1])
    figure, axes = new_figure(height, rows, _COLUMNS)
    for row in range(rows):
        shown = x[:_COLUMNS, row] if fields > 1 else x[_COLUMNS * row : _COLUMNS * (row + 1)]
        # One scale for all draws of a variable.
        whole = x[:, row] if fields > 1 else x
        variable = str(names[row]) if fields > 1 and len(names) == fields else ""
        unit = space.unit if fields == 1 else "1"
        look = Look(
            "gray" if fields == 1 else "viridis", *limits(whole, share=0.1), unit_label(variable or "value", unit)
        )
        made = None
        for place in range(_COLUMNS):
            here = axes[row, place]
            if place >= len(shown):
                here.set_axis_off()
                continue
            made = image(here, plane, shown[place].double().numpy(), look)
            here.set_xticks([])
            here.set_yticks([])
            here.set_xlabel("")
            here.set_ylabel("")
        if made is not None and (fields > 1 or row == 0):
            scale(figure, made, axes[row] if fields > 1 else axes, look, whole)
    count = min(len(x), _COLUMNS) if fields > 1 else len(x)
    return finish(figure, f"{count} draws from the prior", f"{count} draws from the prior, one grey scale for all.")
