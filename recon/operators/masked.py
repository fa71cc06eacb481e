"""Fields of which only some entries are measured: inpainting, gaps under clouds, ocean without land."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from recon.errors import InputError
from recon.operators.base import LinearOperator
from recon.operators.cg import CG
from recon.space import Space

Values = TypeVar("Values", np.ndarray, Tensor)


class Masked(LinearOperator):
    """``y = x`` where ``mask`` is true.

    mask: bool, or 0 and 1; of the shape of ``domain`` or of its last axes, then the same for all leading ones.
    zeros: False lists the kept entries, range (*leading axes, "datum") in the order of the array, with their positions in the
    flattened mask as coordinates; True keeps the shape of the field, with zeros elsewhere.  The list is what a likelihood
    wants: zeros that were never measured count as data.
    Hidden entries are never read: they may be NaN.  ``normal`` is a multiplication, ``solve`` a division, for any weight.
    Raises InputError for a mask of another shape, with other values, or without a single true entry.
    """

    mask: Tensor
    kept: Tensor

    def __init__(self, domain: Space, mask: np.ndarray | Tensor, zeros: bool = False) -> None:
        mask = torch.as_tensor(mask).detach().cpu()
        _require(domain, mask)
        leading = len(domain.shape) - mask.ndim
        kept = mask.flatten().nonzero()[:, 0]
        super().__init__(domain, domain if zeros else _listed(domain, leading, kept))
        self.zeros, self._tail = zeros, mask.ndim
        self.register_buffer("mask", (mask != 0).float(), persistent=False)
        self.register_buffer("kept", kept, persistent=False)

    @classmethod
    def present(cls, domain: Space, field: Values) -> tuple[Masked, Values]:
        """The operator that keeps the entries of ``field`` (*domain.shape) that are not NaN, and those entries (datum,).

        Raises InputError for another shape, infinite values, or when every entry is missing.
        """
        tensor = torch.as_tensor(field)
        if tuple(tensor.shape) != domain.shape:
            raise InputError(f"present takes one field {domain.describe()}; got shape {tuple(tensor.shape)}")
        if bool(tensor.isinf().any()):
            raise InputError(f"the field holds {int(tensor.isinf().sum())} infinite values (NaN means missing)")
        here = ~tensor.isnan()
        return cls(domain, here), field[here] if isinstance(field, Tensor) else field[here.numpy()]

    def apply(self, x: Tensor) -> Tensor:
        if self.zeros:
            return torch.where(self.mask > 0, x, 0.0)
        return x.flatten(-self._tail).index_select(-1, self.kept)

    def apply_adjoint(self, y: Tensor) -> Tensor:
        if self.zeros:
            return self.apply(y)
        flat = y.new_zeros(*y.shape[:-1], self.mask.numel())
        return flat.index_copy_(-1, self.kept, y).reshape(len(y), *self.domain.shape)

    def normal(self, x: Tensor) -> Tensor:
        """``A^T A x``: ``x`` where the mask is true, zero elsewhere."""
        return self._checked(lambda x: torch.where(self.mask > 0, x, 0.0), x, self.domain, self.domain, "normal")

    def solve(
        self,
        b: Tensor,
        c: float,
        weight: Tensor | None = None,
        x0: Tensor | None = None,
        cg: CG | None = None,
        watch: Callable[[int], None] | None = None,
    ) -> Tensor:
        """``(A^T W A + c I)^{-1} b = b / (c + mask * weight)``, exactly; x0 and cg are not needed."""
        if not c > 0:
            raise InputError(f"solve needs c > 0 so that A^T W A + c I is positive definite; got {c}")
        if watch is not None:
            watch(len(b))
        diagonal = self.mask.to(b.real.dtype) if weight is None else self.A_adjoint(weight.to(b))
        return b / (c + diagonal)


def _require(domain: Space, mask: Tensor) -> None:
    if mask.ndim == 0 or tuple(mask.shape) != domain.shape[-mask.ndim :]:
        raise InputError(f"a mask has the shape of {domain.describe()} or of its last axes; got {tuple(mask.shape)}")
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise InputError("a mask holds true and false, or 1 and 0, and nothing else")
    if not bool((mask != 0).any()):
        raise InputError("the mask is empty: no entry would be kept, so nothing would be measured")


def _listed(domain: Space, leading: int, kept: Tensor) -> Space:
    dims, shape = domain.dims[:leading], domain.shape[:leading]
    coords = {dim: domain.coords[dim] for dim in dims if dim in domain.coords}
    positions = kept.numpy().astype(np.float64)
    return Space(
        (*dims, "datum"), (*shape, len(kept)), {**coords, "datum": positions}, domain.unit, complex=domain.complex
    )
