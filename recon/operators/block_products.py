"""Products of a projection matrix in blocks with a batch of images or sinograms: packing, threads, unpacking.

This module needs numba: import it inside functions, after ``need("numba", "ct")``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from recon.operators.block_kernels import (
    PLACES,
    adjoint,
    forward,
    gather_image,
    gather_rays,
    scatter_image,
    scatter_rays,
)
from recon.operators.packs import LINE_BYTES, packed, pieces, room, side_by_side
from recon.operators.ray_kernels import SIDE

Arrays = Mapping[str, np.ndarray]
Runs = tuple[np.ndarray, np.ndarray, np.ndarray]  # rows, starts, pointers
Blocks = Iterable[tuple[int, Arrays]]  # the number of the first group, and the arrays of one group or of several


@dataclass(frozen=True)
class Layout:
    """pixels: rows and columns of the image.  tiles: how many.  rays: in all.  per_group: rays of a whole group."""

    pixels: tuple[int, int]
    tiles: int
    rays: int
    per_group: int


def together(itemsize: int) -> int:
    """Draws that one reading of the matrix serves."""
    return 2 * LINE_BYTES // itemsize


def project(blocks: Blocks, layout: Layout, x: np.ndarray, out: np.ndarray) -> None:
    """``M x`` of images (n, pixels) into sinograms (n, rays)."""
    rooms = _rooms(layout, x)
    for draws, image, rays in rooms:
        _clear(image, rays, len(x[draws]))
        side_by_side(lambda *p, b=x[draws], i=image: gather_image(b, i, layout.pixels, p), layout.tiles)
    for group, arrays in blocks:
        for _, image, rays in rooms:
            _project(group, arrays, layout, packed(image), packed(rays))
    for draws, _, rays in rooms:
        side_by_side(lambda *p, b=out[draws], r=rays: scatter_rays(r, b, p), layout.rays)


def backproject(blocks: Blocks, layout: Layout, y: np.ndarray, out: np.ndarray) -> None:
    """``M^T y`` of sinograms (n, rays) into images (n, pixels)."""
    rooms = _rooms(layout, y)
    for draws, image, rays in rooms:
        _clear(rays, image, len(y[draws]))
        side_by_side(lambda *p, b=y[draws], r=rays: gather_rays(b, r, p), layout.rays)
    for group, arrays in blocks:
        for _, image, rays in rooms:
            _backproject(group, arrays, layout, packed(image), packed(rays))
    for draws, image, _ in rooms:
        side_by_side(lambda *p, b=out[draws], i=image: scatter_image(i, b, layout.pixels, p), layout.tiles)


def _project(group: int, arrays: Arrays, layout: Layout, image: np.ndarray, rays: np.ndarray) -> None:
    values, places, runs, count = _parts(arrays, layout)

    def run(first: int, last: int) -> None:
        forward(values, places, runs, (first, last, group), (layout.tiles, layout.per_group), image, rays)

    side_by_side(run, count)


def _backproject(group: int, arrays: Arrays, layout: Layout, image: np.ndarray, rays: np.ndarray) -> None:
    values, places, runs, count = _parts(arrays, layout)

    def run(first: int, last: int) -> None:
        groups = (0, count, group)
        adjoint(values, places, runs, groups, (first, last, layout.tiles, layout.per_group), image, rays)

    side_by_side(run, layout.tiles)


def _parts(arrays: Arrays, layout: Layout) -> tuple[np.ndarray, np.ndarray, Runs, int]:
    """Values, places as the unsigned numbers they are, runs, and the number of groups."""
    runs = arrays["rows"], arrays["starts"], arrays["pointers"]
    return arrays["values"], arrays["places"].view(np.uint16), runs, (len(runs[2]) - 1) // layout.tiles


def _clear(given: np.ndarray, sums: np.ndarray, draws: int) -> None:
    """Zeros where sums start, and in lanes without a draw: what memory happened to hold can be 100 times slower."""
    sums.fill(0.0)
    if draws < given.shape[1]:
        given.fill(0.0)


def _rooms(layout: Layout, batch: np.ndarray) -> list[tuple[slice, np.ndarray, np.ndarray]]:
    """Which draws travel together, and an image and a sinogram of packs for each lot."""
    missing = -layout.pixels[0] % SIDE  # rows that the last tiles lack
    places, lots = layout.tiles * PLACES - missing * (SIDE + 1), list(pieces(len(batch), batch.itemsize))
    keep = ("image", "rays") if len(lots) == 1 else (None, None)
    return [
        (draws, room(places, lanes, batch.dtype, keep[0]), room(layout.rays, lanes, batch.dtype, keep[1]))
        for draws, lanes in lots
    ]
