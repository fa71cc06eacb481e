r"""Products of a projection matrix in blocks with packs of draws, compiled for the CPU.

The image is cut into square tiles, the views into groups; a block holds the entries that rays of one group have in one tile,
ray after ray.  While a block is at work, its tile and its rays stay in the cache, whatever the size of the image, and a place
inside a tile fits 16 bits.  Rows of a tile are one place longer than they hold pixels: a vertical ray would otherwise meet the
same set of the first-level cache over and over.

Blocks are arrays (see ``system_matrix``): ``values`` and ``places`` of the entries; runs of entries that belong to one ray,
their ``rows`` (counted in the group) and ``starts``; ``pointers``, the first run of each block, group after group.
A ray is summed by one thread, tile after tile; a pixel by one thread, group after group.  Nothing is reordered, so a draw gets
the same bits alone, in company and for any number of threads.
"""

from __future__ import annotations

import numpy as np

from recon.operators.packs import compiled, fma, load, store, zero
from recon.operators.ray_kernels import SIDE

PLACES = SIDE * (SIDE + 1)  # of a tile


@compiled
def forward(
    values: np.ndarray,
    places: np.ndarray,
    runs: tuple[np.ndarray, np.ndarray, np.ndarray],
    groups: tuple[int, int, int],
    layout: tuple[int, int],
    image: np.ndarray,
    rays: np.ndarray,
) -> None:
    """Add the rays of ``groups`` = (first, last, number of the first block's group) to ``rays``.

    runs: (rows, starts, pointers).  layout: tiles, rays per group.
    image: packs (tiles * PLACES).  rays: packs.
    """
    rows, starts, pointers = runs
    tiles, per_group = layout
    one = values.dtype.type(1.0)
    for group in range(groups[0], groups[1]):
        base = (group + groups[2]) * per_group
        for tile in range(tiles):
            corner = tile * PLACES
            for run in range(pointers[group * tiles + tile], pointers[group * tiles + tile + 1]):
                # Four sums: none waits for the one before it.
                a, b, c, d = load(rays, base + rows[run]), zero(rays), zero(rays), zero(rays)
                e, end = starts[run], starts[run + 1]
                while e + 4 <= end:
                    a = fma(values[e], load(image, corner + np.int64(places[e])), a)
                    b = fma(values[e + 1], load(image, corner + np.int64(places[e + 1])), b)
                    c = fma(values[e + 2], load(image, corner + np.int64(places[e + 2])), c)
                    d = fma(values[e + 3], load(image, corner + np.int64(places[e + 3])), d)
                    e += 4
                while e < end:
                    a = fma(values[e], load(image, corner + np.int64(places[e])), a)
                    e += 1
                store(rays, base + rows[run], fma(one, fma(one, a, b), fma(one, c, d)))


@compiled
def adjoint(
    values: np.ndarray,
    places: np.ndarray,
    runs: tuple[np.ndarray, np.ndarray, np.ndarray],
    groups: tuple[int, int, int],
    tiles: tuple[int, int, int, int],
    image: np.ndarray,
    rays: np.ndarray,
) -> None:
    """Add what the rays of all ``groups`` give to some tiles of ``image``; the transpose of ``forward``.

    tiles: the first, the one after the last, how many there are in all, and the rays of a group.
    """
    rows, starts, pointers = runs
    count, per_group = tiles[2], tiles[3]
    for tile in range(tiles[0], tiles[1]):
        corner = tile * PLACES
        for group in range(groups[0], groups[1]):
            base = (group + groups[2]) * per_group
            for run in range(pointers[group * count + tile], pointers[group * count + tile + 1]):
                value = load(rays, base + rows[run])
                for e in range(starts[run], starts[run + 1]):
                    place = corner + np.int64(places[e])
                    store(image, place, fma(values[e], value, load(image, place)))


@compiled
def gather_image(batch: np.ndarray, image: np.ndarray, shape: tuple[int, int], tiles: tuple[int, int]) -> None:
    """Images (n, y * x), n at most ``lanes``, into the ``tiles`` = [first, last) of (tiles * places, lanes)."""
    ny, nx = shape
    across = (nx + SIDE - 1) // SIDE
    for tile in range(tiles[0], tiles[1]):
        top, left = tile // across * SIDE, tile % across * SIDE
        for v in range(top, min(top + SIDE, ny)):
            corner = (tile * SIDE + v - top) * (SIDE + 1)
            for draw in range(len(batch)):
                for u in range(min(SIDE, nx - left)):
                    image[corner + u, draw] = batch[draw, v * nx + left + u]


@compiled
def scatter_image(image: np.ndarray, batch: np.ndarray, shape: tuple[int, int], tiles: tuple[int, int]) -> None:
    """The ``tiles`` back into images (n, y * x)."""
    ny, nx = shape
    across = (nx + SIDE - 1) // SIDE
    for tile in range(tiles[0], tiles[1]):
        top, left = tile // across * SIDE, tile % across * SIDE
        for v in range(top, min(top + SIDE, ny)):
            corner = (tile * SIDE + v - top) * (SIDE + 1)
            for draw in range(len(batch)):
                for u in range(min(SIDE, nx - left)):
                    batch[draw, v * nx + left + u] = image[corner + u, draw]


@compiled
def gather_rays(batch: np.ndarray, rays: np.ndarray, part: tuple[int, int]) -> None:
    """Sinograms (n, rays) into the ``part`` = [first, last) of (rays, lanes)."""
    for first in range(part[0], part[1], SIDE):
        for draw in range(len(batch)):
            for ray in range(first, min(first + SIDE, part[1])):
                rays[ray, draw] = batch[draw, ray]


@compiled
def scatter_rays(rays: np.ndarray, batch: np.ndarray, part: tuple[int, int]) -> None:
    """And back: (rays, lanes) into (n, rays)."""
    for first in range(part[0], part[1], SIDE):
        for draw in range(len(batch)):
            for ray in range(first, min(first + SIDE, part[1])):
                batch[draw, ray] = rays[ray, draw]
