"""What a statistic is given, checked once: draws (draw, *space), a truth *space, log-weights (draw,).

Tensors or arrays.  NaN draws, a truth of another shape, or weights that are no weights end in an InputError that says
so; no statistic answers with a NaN that it hides.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from recon.errors import InputError

Array = Tensor | np.ndarray


def draws_of(x: Array, least: int = 1, what: str = "this statistic") -> Tensor:
    """Draws (draw, *space) as a finite real tensor on the processor, in their own floating type.

    least: draws without which ``what`` does not exist.  Raises InputError for fewer, for none, or for values that are
    no numbers.
    """
    x = torch.as_tensor(x).detach().cpu()
    if x.ndim < 1 or x.numel() == 0:
        raise InputError(f"draws are (draw, *space) with at least one draw and one pixel; got {tuple(x.shape)}")
    if not x.is_floating_point():
        if x.is_complex():
            raise InputError("draws are real; give the parts or the modulus of complex ones")
        x = x.double()
    if len(x) < least:
        raise InputError(f"{what} needs at least {least} draws; got {len(x)}")
    if not bool(torch.isfinite(x.sum())) and not bool(torch.isfinite(x).all()):
        rows = ~torch.isfinite(x.reshape(len(x), -1)).all(1)
        raise InputError(f"{int(rows.sum())} of {len(x)} draws hold values that are NaN or infinite")
    return x


def weights_of(log_weights: Array | None, draws: int) -> Tensor:
    """Normalised weights (draw,), float64, equal without ``log_weights``.  Raises InputError where they are none."""
    if log_weights is None:
        return torch.full((draws,), 1 / draws, dtype=torch.float64)
    log_w = torch.as_tensor(log_weights).detach().cpu().double()
    if tuple(log_w.shape) != (draws,):
        raise InputError(f"one log-weight per draw: {draws} draws, log_weights {tuple(log_w.shape)}")
    if not bool(torch.isfinite(log_w).any()) or bool(torch.isnan(log_w).any()) or bool((log_w == torch.inf).any()):
        raise InputError("log-weights must be numbers below infinity and at least one must be finite")
    return torch.softmax(log_w, 0)


def truth_of(truth: Array | None, x: Tensor) -> Tensor:
    """The truth as a finite tensor of one draw's shape.  Raises InputError where there is none or it does not fit."""
    if truth is None:
        raise InputError("this statistic compares with a truth; without one use the data fit and the feature test")
    truth = torch.as_tensor(truth).detach().cpu()
    if tuple(truth.shape) != tuple(x.shape[1:]):
        raise InputError(f"the truth must be {tuple(x.shape[1:])}, as one draw is; got {tuple(truth.shape)}")
    if not bool(torch.isfinite(truth).all()):
        raise InputError("the truth holds values that are NaN or infinite")
    return truth


def effective(w: Tensor) -> float:
    """Kish's effective number of draws ``1 / sum w^2``; the number itself for equal weights."""
    return float(1 / w.square().sum())


def several(w: Tensor, what: str) -> float:
    """``1 - sum w^2``, the share of pairs of different draws.  Raises InputError where one draw has all the weight."""
    distinct = float(1 - w.square().sum())
    if distinct < 1e-9:
        raise InputError(f"{what} needs at least 2 draws that count; one draw has all the weight")
    return distinct


def numbers_of(values: Any, what: str) -> np.ndarray:  # noqa: ANN401  (any sequence of numbers)
    """One finite number per case, float64 (case,).  Raises InputError naming ``what`` otherwise."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array):
        raise InputError(f"{what}: one number per case is expected, and at least one case; got shape {array.shape}")
    if not np.isfinite(array).all():
        raise InputError(f"{what}: {int((~np.isfinite(array)).sum())} of {len(array)} cases have no finite number")
    return array
