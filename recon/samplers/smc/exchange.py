r"""Particles on several processes: one table of weights, one plan, and only the children that must travel do.

Every process learns all log-weights (one allgather of a number per particle), finds the same children and places from the same
keyed number, and so knows who needs which particle.  Between two processes a particle travels once however many of its children
go there; a child that stays in its parent's place, or on its parent's process, does not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from recon.comm import Comm
from recon.errors import ReconError


@dataclass(frozen=True)
class Table:
    """All particles of all processes, by number.  owner: (K,) whose it is.  columns: (K,) each, float64."""

    owner: np.ndarray
    columns: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(self.owner)

    @classmethod
    def gather(cls, members: tuple[int, ...], columns: Mapping[str, Tensor], comm: Comm) -> Table:
        """Put together the particles ``members`` of this process and those of the others; collective.

        Raises ReconError when the numbers are not 0 .. K - 1, once each.
        """
        mine = np.stack([np.array(members, dtype=np.float64), *(c.double().cpu().numpy() for c in columns.values())])
        everyone = comm.draws.allgather(mine)
        whole = np.concatenate(everyone, axis=1)
        owner = np.repeat(np.arange(len(everyone)), [part.shape[1] for part in everyone])
        order = np.argsort(whole[0], kind="stable")
        if not np.array_equal(whole[0, order], np.arange(whole.shape[1])):
            raise ReconError("particles must be numbered 0, 1, 2, ... without gap over all processes")
        rows = torch.from_numpy(whole[1:, order])
        return cls(owner[order], dict(zip(columns, rows, strict=True)))


@dataclass(frozen=True)
class Plan:
    """Who sends which particles to whom; ``moves[(source, target)]`` are particle numbers, rising, each once."""

    moves: Mapping[tuple[int, int], np.ndarray]

    @classmethod
    def of(cls, parents: np.ndarray, owner: np.ndarray) -> Plan:
        """The plan that brings particle ``parents[i]``, or each of them, to the owner of place ``i``: (K,) or (K, several)."""
        parents = parents.reshape(len(owner), -1)
        source, target = owner[parents], np.broadcast_to(owner[:, None], parents.shape)
        away = source != target
        triples = np.unique(np.stack([source[away], target[away], parents[away]], 1), axis=0)
        moves: dict[tuple[int, int], np.ndarray] = {}
        for a, b in np.unique(triples[:, :2], axis=0):
            moves[int(a), int(b)] = triples[(triples[:, 0] == a) & (triples[:, 1] == b), 2]
        return cls(moves)

    @property
    def particles(self) -> int:
        """Particles that travel."""
        return sum(len(numbers) for numbers in self.moves.values())


@dataclass(frozen=True)
class Pool:
    """Particles at hand: tensors of some rows each, and the row in which particle p stands, ``at[p]``.

    planned, sent: bytes this process was to send by the plan, and those it sent.
    """

    rows: Mapping[str, Tensor]
    at: Mapping[int, int]
    planned: int
    sent: int


def gathered(
    rows: Mapping[str, Tensor], members: tuple[int, ...], parents: np.ndarray, table: Table, comm: Comm
) -> Pool:
    """The particles of this process, then those of others that its places descend from; collective.

    rows: tensors (n, ...) of the particles ``members``.  parents: (K,), or (K, several) for places made of several particles.
    """
    axis, plan = comm.draws, Plan.of(parents, table.owner)
    here = {member: i for i, member in enumerate(members)}
    wide = {name: _bytes(values) for name, values in rows.items()}
    width = sum(part.shape[1] for part in wide.values())
    parcels = []
    for target in range(axis.size):
        at = [here[int(p)] for p in plan.moves.get((axis.rank, target), np.empty(0, dtype=int))]
        parcels.append(np.concatenate([part[at] for part in wide.values()], axis=1).reshape(-1))
    predicted = width * sum(len(p) for (a, _), p in plan.moves.items() if a == axis.rank)
    sent = sum(parcel.nbytes for parcel in parcels)
    received = axis.exchange(parcels)
    numbers = [plan.moves.get((source, axis.rank), np.empty(0, dtype=int)) for source in range(axis.size)]
    arrived = np.concatenate([parcel.reshape(-1, width) for parcel in received])
    index = here | {int(p): len(members) + i for i, p in enumerate(np.concatenate(numbers))}
    out, first = {}, 0
    for name, values in rows.items():
        span = wide[name].shape[1]
        more = _values(arrived[:, first : first + span], values)
        out[name] = torch.cat([values, more]) if len(more) else values
        first += span
    return Pool(out, index, predicted, sent)


def carry_out(
    rows: Mapping[str, Tensor], members: tuple[int, ...], parents: np.ndarray, table: Table, comm: Comm
) -> tuple[dict[str, Tensor], int, int]:
    """The rows of this process' places after resampling, the bytes it was to send by the plan, and those it sent.

    rows: tensors (n, ...) of the particles ``members``.  parents: (K,).  Collective.
    """
    pool = gathered(rows, members, parents, table, comm)
    picks = [pool.at[int(parents[member])] for member in members]
    return {name: values[picks] for name, values in pool.rows.items()}, pool.planned, pool.sent


def _bytes(values: Tensor) -> np.ndarray:
    """(n, ...) as (n, bytes of one row)."""
    width = math.prod(values.shape[1:]) * values.element_size()
    if values.numel() == 0:
        return np.empty((len(values), width), np.uint8)
    return values.detach().cpu().contiguous().reshape(len(values), -1).view(torch.uint8).numpy()


def _values(raw: np.ndarray, like: Tensor) -> Tensor:
    """The inverse of ``_bytes``."""
    shape = (len(raw), *like.shape[1:])
    if raw.size == 0:
        return like.new_empty(shape)
    # A copy: a slice of one row counts as contiguous and keeps the stride of the whole.
    return torch.from_numpy(raw.copy()).view(like.dtype).reshape(shape).to(like.device)
