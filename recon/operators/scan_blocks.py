r"""From a scan to the entries of its matrix, in blocks.

The image is cut into tiles of 64 x 64 pixels, the views into groups; a block holds what the rays of one group meet in one tile.
Arrays of blocks: ``values`` (m) and ``places`` (row * 65 + column in the tile, unsigned 16 bits) of the entries; runs of
entries of one ray in one tile, with the ``rows`` (the ray's number in its group) and the ``starts``; ``pointers``, the
first run of each block, group after group.  An entry takes 6 bytes, a run 12.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from scipy.sparse import coo_matrix, csr_matrix

from recon import __version__
from recon.errors import need

SIDE = 64  # of a tile, pixels; ray_kernels.SIDE, which only numba may import
_RAYS = 4096  # of a group: with 32 draws they and a tile fit a second-level cache
_TOGETHER = 16  # groups that are made before they are put in their place
_SAMPLES = 16  # views that are traced to predict the memory
_FORMAT = 1  # other numbers in the same arrays need another one

Arrays = Mapping[str, np.ndarray]
Entries = tuple[np.ndarray, np.ndarray, np.ndarray]  # rays, places, weights: see ray_kernels
NAMES = ("values", "places", "rows", "starts", "pointers")


@functools.cache
def kernels(name: str) -> Any:  # noqa: ANN401  (a module of compiled functions)
    """A module that needs numba.  Raises InputError without it."""
    need("numba", "ct")
    return importlib.import_module(f"recon.operators.{name}")


class Scan(Protocol):
    """Where rays run, in metres: x grows to the right, y up."""

    @property
    def projector(self) -> str:
        """Which of ``ray_kernels``: "line", "strip" or "linear"."""

    @property
    def fan(self) -> bool:
        """Whether the rays of a view start at one point."""

    @property
    def views(self) -> int:
        """How many."""

    @property
    def detectors(self) -> int:
        """Per view."""

    def rays(self, first: int, last: int, edges: bool = False) -> np.ndarray:
        """Points and directions of the views [first, last): float64 (views, detectors, 4), x, y, dx, dy.

        edges: of the borders between detectors instead, (views, detectors + 1, 4).
        """


@dataclass(frozen=True)
class Grid:
    """Square pixels: rows, columns, side (m), left and top border (m)."""

    ny: int
    nx: int
    pixel: float
    left: float
    top: float

    @property
    def down(self) -> int:
        """Tiles one below the other."""
        return -(-self.ny // SIDE)

    @property
    def across(self) -> int:
        """Tiles side by side."""
        return -(-self.nx // SIDE)

    @property
    def tiles(self) -> int:
        """How many."""
        return self.down * self.across


@dataclass(frozen=True, eq=False)
class ScanBlocks:
    """A scan of a grid as blocks, whole or group by group."""

    scan: Scan
    grid: Grid

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrix: rays, pixels."""
        return self.scan.views * self.scan.detectors, self.grid.ny * self.grid.nx

    @property
    def views_per_group(self) -> int:
        """At least one."""
        return min(self.scan.views, max(1, _RAYS // self.scan.detectors))

    @property
    def rays_per_group(self) -> int:
        """Of every group but the last, which may hold fewer."""
        return self.views_per_group * self.scan.detectors

    @property
    def groups(self) -> int:
        """How many."""
        return -(-self.scan.views // self.views_per_group)

    def traced(self, first: int, last: int) -> np.ndarray:
        """Rays, or for "strip" edges, of views in the coordinates of ``ray_kernels``, (views, ..., 4)."""
        rays = self.scan.rays(first, last, self.scan.projector == "strip")
        grid, out = self.grid, np.empty_like(rays)
        length = np.hypot(rays[..., 2], rays[..., 3])
        out[..., 0], out[..., 1] = (rays[..., 0] - grid.left) / grid.pixel, (grid.top - rays[..., 1]) / grid.pixel
        out[..., 2], out[..., 3] = rays[..., 2] / length, -rays[..., 3] / length
        return out

    def entries(self, first: int, last: int, room: Entries | None = None) -> tuple[Entries, int]:
        """The entries of views, and their number: see ``ray_kernels``.  room: arrays to use if they are long enough."""
        trace, shape = kernels("ray_kernels"), (self.grid.ny, self.grid.nx)
        traced = self.traced(first, last)
        size = (last - first) * 3 * self.grid.ny * self.grid.nx // 2 + 3 * max(shape)
        while True:
            entries = room or (np.empty(size, np.int32), np.empty(size, np.int64), np.empty(size))
            if self.scan.projector == "strip":
                count = trace.strips(traced, shape, self.scan.fan, entries)
            else:
                kind = (self.scan.projector == "linear", self.scan.fan)
                count = trace.lines(traced.reshape(-1, 4), shape, kind, entries)
            if count >= 0:
                return entries, count
            room, size = None, 2 * max(size, len(entries[0]))

    def block(self, group: int, room: Entries | None = None) -> tuple[Arrays, Entries]:
        """The arrays of one group, and the room that its entries took."""
        first, last = group * self.views_per_group, min((group + 1) * self.views_per_group, self.scan.views)
        entries, count = self.entries(first, last, room)
        rays = (last - first) * self.scan.detectors
        runs = min(count, rays * self.grid.tiles)
        values, places = np.empty(count, np.float32), np.empty(count, np.uint16)
        rows, starts = np.empty(runs, np.int32), np.empty(runs + 1, np.int64)
        pointers = np.empty(self.grid.tiles + 1, np.int64)
        used = kernels("ray_kernels").into_blocks(
            entries,
            count,
            self.grid.pixel,
            (rays, self.grid.across, self.grid.tiles),
            (values, places, rows, starts, pointers),
        )
        parts = (values, places.view(np.int16), rows[:used].copy(), starts[: used + 1].copy(), pointers)
        return dict(zip(NAMES, parts, strict=True)), entries

    def some(self, first: int, last: int) -> list[Arrays]:
        """The arrays of the groups [first, last), made by torch's threads side by side."""
        parts: list[Arrays] = [{}] * (last - first)

        def run(start: int, end: int) -> None:
            room: Entries | None = None  # asked for once: fresh memory costs as much as the rays
            for number in range(start, end):
                parts[number], room = self.block(first + number, room)

        kernels("packs").side_by_side(run, last - first)
        return parts

    def build(self) -> Arrays:
        """The arrays of all groups, one after the other, in little more memory than they take."""
        size = int(1.05 * self.predicted() / 6)
        values, places = np.empty(size, np.float32), np.empty(size, np.int16)  # what is not filled takes no memory
        rest: dict[str, list[np.ndarray]] = {"rows": [], "starts": [], "pointers": []}
        entries = runs = 0
        step = max(_TOGETHER, torch.get_num_threads())
        for first in range(0, self.groups, step):
            for part in self.some(first, min(first + step, self.groups)):
                end = entries + len(part["values"])
                if end > len(values):
                    for array in (values, places):
                        array.resize(int(1.2 * end), refcheck=False)
                values[entries:end], places[entries:end] = part["values"], part["places"]
                # Where one group's list ends, the next one's begins: that number is kept once.
                rest["rows"].append(part["rows"])
                rest["starts"].append(part["starts"][:-1] + entries)
                rest["pointers"].append(part["pointers"][:-1] + runs)
                entries, runs = end, runs + len(part["rows"])
        for array in (values, places):
            array.resize(entries, refcheck=False)
        rest["starts"].append(np.array([entries]))
        rest["pointers"].append(np.array([runs]))
        return {"values": values, "places": places, **{name: np.concatenate(parts) for name, parts in rest.items()}}

    def predicted(self) -> int:
        """Bytes of what ``build`` gives, from a sample of views traced in full."""
        # Of equal parts the middle ones: first and last views tend to look along the pixels, which is the exception.
        views = np.unique(((np.arange(_SAMPLES) + 0.5) * self.scan.views / _SAMPLES).astype(int))
        entries, runs = 0, 0
        for view in views:
            (rays, _, _), count = self.entries(view, view + 1)
            entries += count
            # A ray meets a tile, and another one at each border of tiles, which are that many times rarer than those of pixels.
            runs += len(np.unique(rays[:count])) + (count // SIDE if self.grid.tiles > 1 else 0)
        return int((6 * entries + 12 * runs) * self.scan.views / len(views) + 8 * self.groups * self.grid.tiles)

    def key(self) -> str:
        """A name for the numbers: equal for equal rays and grids, another one for another version of this code."""
        digest = hashlib.sha256(f"{_FORMAT} {__version__} {self.scan.projector} {self.scan.fan}".encode())
        digest.update(f"{self.grid} {self.scan.detectors} {self.views_per_group} {SIDE}".encode())
        for first in range(0, self.scan.views, self.views_per_group):
            digest.update(self.traced(first, min(first + self.views_per_group, self.scan.views)).tobytes())
        return digest.hexdigest()[:40]

    def csr(self, arrays: Arrays, group: int = 0) -> csr_matrix:
        """The matrix of groups that follow each other, the first of them number ``group``: (their rays, pixels)."""
        grid, runs = self.grid, np.diff(arrays["starts"])
        blocks = np.repeat(np.arange(len(arrays["pointers"]) - 1), np.diff(arrays["pointers"]))
        rows = np.repeat(arrays["rows"] + blocks // grid.tiles * self.rays_per_group, runs)
        tile = np.repeat(blocks % grid.tiles, runs)
        v, u = np.divmod(arrays["places"].view(np.uint16).astype(np.int64), SIDE + 1)
        columns = (tile // grid.across * SIDE + v) * grid.nx + tile % grid.across * SIDE + u
        groups = (len(arrays["pointers"]) - 1) // grid.tiles
        height = min(groups * self.rays_per_group, self.shape[0] - group * self.rays_per_group)
        return coo_matrix((arrays["values"], (rows, columns)), shape=(height, self.shape[1])).tocsr()
