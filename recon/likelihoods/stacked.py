r"""Several sources at once: ``log p(y_1, y_2, ... | x) = sum_i log p(y_i | x)`` for independent noise.

Each source keeps its operator, data and law; together they are one likelihood over one vector of data, laid out as
``Stack`` and ``Joined`` do (``operator.split`` takes it apart).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from recon.errors import InputError
from recon.likelihoods.base import Likelihood
from recon.likelihoods.gaussian import GaussianLikelihood
from recon.operators.algebra import Joined, Stack
from recon.operators.base import LinearOperator, Operator


class StackedLikelihood(Likelihood):
    """Independent sources of the same object: ``StackedLikelihood([scan, stations])``.

    parts: likelihoods with operators on one domain, in one floating type.  ``operator`` is a ``Stack`` of theirs where all are
    linear, else a ``Joined``.  When every part is a GaussianLikelihood the stack is one too, and every sampler takes it as it
    is; otherwise ``gaussian()`` gives the Gaussian form where the parts have one.  ``simulate`` answers (n, datum).

    Raises InputError for an empty list, anything but likelihoods, different domains or different floating types.
    """

    operator: Joined | Stack
    parts: nn.ModuleList

    # The kind of a stack follows from its parts, as the kind of a path does from the machine.
    def __new__(cls, parts: Sequence[Likelihood] = ()) -> StackedLikelihood:
        gaussian = len(parts) > 0 and all(isinstance(part, GaussianLikelihood) for part in parts)
        made: Any = super().__new__(StackedGaussianLikelihood if cls is StackedLikelihood and gaussian else cls)
        return made

    def __init__(self, parts: Sequence[Likelihood]) -> None:
        _require(parts)
        super().__init__()
        self.operator = joined([part.operator for part in parts])
        self.parts = nn.ModuleList(parts)

    @property
    def sources(self) -> list[Likelihood]:
        """The likelihoods, in the order they were given."""
        return [part for part in self.parts if isinstance(part, Likelihood)]

    def log_prob(self, x: Tensor) -> Tensor:
        return torch.stack([part.log_prob(x) for part in self.sources]).sum(0)

    def simulate(self, x: Tensor, normal: Tensor) -> Tensor:
        pieces = zip(self.sources, self.operator.split(normal), strict=True)
        return self.operator.join([part.simulate(x, piece) for part, piece in pieces])

    def gaussian(self) -> GaussianLikelihood:
        """The parts' Gaussian forms as one.  Raises InputError naming the first part that has none."""
        forms = []
        for i, part in enumerate(self.sources):
            try:
                forms.append(part.gaussian())
            except InputError as error:
                raise InputError(f"part {i} of the stack, of {part.operator.describe()}: {error}") from error
        form = StackedLikelihood(forms)
        assert isinstance(form, GaussianLikelihood)
        return form


class StackedGaussianLikelihood(StackedLikelihood, GaussianLikelihood):
    """What ``StackedLikelihood`` makes of Gaussian parts: their data one after the other, with a sigma per datum."""

    def __init__(self, parts: Sequence[GaussianLikelihood]) -> None:
        _require(parts)
        operator = joined([part.operator for part in parts])
        y = operator.join([part.y for part in parts])
        GaussianLikelihood.__init__(self, operator, y, operator.join([_sigma(part) for part in parts]).real)
        self.log_volume.copy_(torch.stack([part.log_volume for part in parts]).sum())
        self.parts = nn.ModuleList(parts)

    log_prob = GaussianLikelihood.log_prob
    simulate = GaussianLikelihood.simulate
    gaussian = GaussianLikelihood.gaussian


def joined(operators: Sequence[Operator]) -> Joined | Stack:
    """A ``Stack`` of linear operators, a ``Joined`` of others."""
    linear = [one for one in operators if isinstance(one, LinearOperator)]
    return Stack(linear) if len(linear) == len(operators) else Joined(operators)


def _sigma(part: GaussianLikelihood) -> Tensor:
    """``sigma`` per datum, as complex as the data: the same number in both parts."""
    sigma = part.sigma.expand(part.operator.range.shape)
    return torch.complex(sigma, sigma) if part.operator.range.complex else sigma


def _require(parts: Sequence[Likelihood]) -> None:
    if not len(parts):
        raise InputError("StackedLikelihood needs at least one likelihood")
    kinds = set()
    for i, part in enumerate(parts):
        if not isinstance(part, Likelihood):
            raise InputError(f"StackedLikelihood takes likelihoods; part {i} is a {type(part).__name__}")
        kinds |= {str(b.dtype) for b in part.buffers(recurse=False) if b.is_floating_point() and b.ndim}
    if len(kinds) > 1:
        raise InputError(
            f"the parts hold data of {' and '.join(sorted(kinds))}; convert them to one with part.float() or part.double()"
        )
