r"""Measurements of many different objects, each with its own operator: what a prior is learnt from when no object is known.

An observation is a ``GaussianLikelihood`` with a linear operator: ``y_i = A_i x_i + n_i``.  For samplers, a block of draws with
one observation each is one likelihood whose operator is block-diagonal over the draws (``side_by_side``); for closed forms an
observation is its whitened matrix (``whitened``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from recon.errors import InputError
from recon.likelihoods import GaussianLikelihood
from recon.operators.base import LinearOperator
from recon.operators.cg import dot
from recon.space import Space


def require_observations(observations: Sequence[GaussianLikelihood]) -> Space:
    """The space of the objects that were measured.

    Raises InputError for no observation, one that is not Gaussian and linear, or objects of different spaces.
    """
    if not len(observations):
        raise InputError("a prior is learnt from observations; got none")
    space = observations[0].operator.domain
    for i, one in enumerate(observations):
        if not isinstance(one, GaussianLikelihood):
            raise InputError(
                f"observations are GaussianLikelihoods (use likelihood.gaussian()); observation {i} is a {type(one).__name__}"
            )
        difference = space.mismatch(one.linear("learning").domain)
        if difference:
            raise InputError(f"observations 0 and {i} are of different objects: {difference}")
    if space.complex:
        raise InputError("a prior describes real arrays; give complex images two channels (complex_grid)")
    return space


def data_count(observation: GaussianLikelihood) -> int:
    """Real numbers that were measured; exact zeros are none (places of a full grid where nothing was measured)."""
    return int((observation.measured != 0).sum())


def side_by_side(observations: Sequence[GaussianLikelihood]) -> GaussianLikelihood:
    """One likelihood for ``len(observations)`` draws of which draw ``i`` has data, noise and operator of observation ``i``.

    Data are laid out as real numbers (n, datum), padded with zeros that no draw reaches.  It takes batches of exactly n draws.
    Draws that share an operator go through it together; otherwise the cost is one call of an operator per draw.

    Raises InputError as ``require_observations``.
    """
    require_observations(observations)
    return _Company(observations)


def fingerprint(observations: Sequence[GaussianLikelihood]) -> str:
    """SHA-256 over data, noise and operators: names what was learnt from."""
    digest = hashlib.sha256()
    for one in observations:
        digest.update(one.operator.describe().encode())
        for name, value in one.named_buffers():  # those of the operator too, kept in files or not
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Scan:
    """An operator, whitened, and the data of all observations that share it and its noise.

    rows: numbers of the observations.  matrix: ``S^-1/2 A`` (m, d) in the operator's floating type, ``m <= d``.  data:
    ``S^-1/2 y`` (n, m), float64.  lost: (n,), squared length of the part of the data that no object reaches.  constant:
    ``sum log sigma + m/2 log 2 pi`` of one observation.
    """

    rows: Tensor
    matrix: Tensor
    data: Tensor
    lost: Tensor
    constant: float


def whitened(observations: Sequence[GaussianLikelihood]) -> list[Scan]:
    """Observations as matrices, in the order of the first of each operator.

    Data of more numbers than the object has are reduced to as many by a QR decomposition, which loses nothing.
    Memory: ``min(m, d) d`` numbers per operator.
    """
    shared: dict[tuple[int, bytes], list[int]] = {}
    for i, one in enumerate(observations):
        noise = one.sigma.detach().cpu().numpy().tobytes()
        shared.setdefault((id(one.operator), noise), []).append(i)
    return [_scan([observations[i] for i in rows], torch.tensor(rows)) for rows in shared.values()]


def _scan(observations: list[GaussianLikelihood], rows: Tensor) -> Scan:
    first = observations[0]
    operator, parts = first.linear("learning"), 2 if first.operator.range.complex else 1
    sigma = first.sigma.expand(operator.range.shape).reshape(-1).repeat_interleave(parts)
    eye = torch.eye(operator.domain.size, dtype=operator.dtype, device=operator.device)
    matrix = _numbers(operator.A(eye.reshape(-1, *operator.domain.shape))).T / sigma[:, None]
    data = torch.stack([one.measured.reshape(-1) for one in observations]).double() / sigma.double()
    # Places of a full grid where nothing was measured tell nothing of the object.
    seen = matrix.abs().amax(1) > 0
    lost = data[:, ~seen].square().sum(1)
    matrix, data = matrix[seen], data[:, seen]
    if matrix.shape[0] > matrix.shape[1]:
        basis, upper = torch.linalg.qr(matrix.double())
        reached = data @ basis
        lost = lost + (data.square().sum(1) - reached.square().sum(1)).clamp(min=0)
        matrix, data = upper, reached
    half_log_two_pi = 0.9189385332046727
    constant = float(sigma.double().log().sum()) + half_log_two_pi * len(sigma) + float(first.log_volume)
    return Scan(rows, matrix.contiguous(), data, lost, constant)


def _numbers(values: Tensor) -> Tensor:
    """(n, ...) real or complex as (n, m) real numbers, parts of a complex number side by side."""
    return (torch.view_as_real(values.resolve_conj()) if values.is_complex() else values).flatten(1)


class _PerDraw(LinearOperator):
    """Block-diagonal over draws: draw ``i`` of a batch goes through operator ``i``; not a map of single objects."""

    def __init__(self, operators: Sequence[LinearOperator]) -> None:
        self.sizes = [one.range.size * (2 if one.range.complex else 1) for one in operators]
        super().__init__(operators[0].domain, Space(("datum",), (max(self.sizes),), {}, "1"))
        shared: dict[int, list[int]] = {}
        for i, one in enumerate(operators):
            shared.setdefault(id(one), []).append(i)
        self.groups = list(shared.values())
        self.parts = nn.ModuleList(operators[rows[0]] for rows in self.groups)
        self.draws = len(operators)

    def apply(self, x: Tensor) -> Tensor:  # type: ignore[override]  # the physics, as in every operator
        self._require(len(x))
        out = x.new_zeros(len(x), self.range.size)
        for rows, part in self._each():
            out[rows, : self.sizes[rows[0]]] = _numbers(part.apply(x[rows]))
        return out

    def apply_adjoint(self, y: Tensor) -> Tensor:
        self._require(len(y))
        out = y.new_zeros(len(y), *self.domain.shape)
        for rows, part in self._each():
            values = y[rows, : self.sizes[rows[0]]]
            if part.range.complex:
                values = torch.view_as_complex(values.reshape(len(rows), -1, 2).contiguous())
            out[rows] = part.apply_adjoint(values.reshape(len(rows), *part.range.shape))
        return out

    def _each(self) -> list[tuple[list[int], LinearOperator]]:
        parts = [part for part in self.parts if isinstance(part, LinearOperator)]
        return list(zip(self.groups, parts, strict=True))

    def _require(self, n: int) -> None:
        if n != self.draws:
            raise InputError(f"these observations are of {self.draws} objects, one draw each; got {n} draws")


class _Company(GaussianLikelihood):
    """What ``side_by_side`` makes: ``y`` and ``sigma`` per draw, (n, datum)."""

    def __init__(self, observations: Sequence[GaussianLikelihood]) -> None:
        nn.Module.__init__(self)
        operator = _PerDraw([one.linear("learning") for one in observations])
        kind = observations[0].measured.dtype
        y = torch.zeros(len(observations), operator.range.size, dtype=kind)
        sigma = torch.ones_like(y)
        for i, one in enumerate(observations):
            parts = 2 if one.operator.range.complex else 1
            y[i, : operator.sizes[i]] = one.measured.reshape(-1)
            noise = one.sigma.expand(one.operator.range.shape).reshape(-1)
            sigma[i, : operator.sizes[i]] = noise.repeat_interleave(parts)
        self.operator = operator
        self.register_buffer("measured", y)
        self.register_buffer("sigma", sigma)
        self.register_buffer("log_volume", y.new_zeros(()))

    def log_prob(self, x: Tensor) -> Tensor:
        """Up to a constant per draw: ``-1/2 |(y - A x) / sigma|^2``."""
        misfit = self.residual(x) / self.sigma
        return -0.5 * dot(misfit, misfit)
