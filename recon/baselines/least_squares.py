"""Least squares by conjugate gradients, each measurement on its own."""

from __future__ import annotations

import torch
from torch import Tensor

from recon.errors import InputError
from recon.operators.base import LinearOperator
from recon.operators.cg import dot, spread


def cgls(operator: LinearOperator, y: Tensor, iterations: int = 20) -> Tensor:
    """Conjugate gradients on ``min |A x - y|^2`` from zero; stopping early is the regularisation.

    y: (n, *range.shape).  Returns (n, *domain.shape) after ``iterations`` iterations; a system solved to rounding stands still.
    Raises InputError for fewer than one iteration.  Source: Hestenes and Stiefel 1952; Bjorck 1996, section 7.4.
    """
    if iterations < 1:
        raise InputError(f"cgls needs at least one iteration; got {iterations}")
    r, s = y, operator.A_adjoint(y)
    x, p, gamma = torch.zeros_like(s), s, dot(s, s)
    floor = gamma * torch.finfo(y.dtype).eps ** 2
    for _ in range(iterations):
        q = operator.A(p)
        active = (gamma > floor) & (dot(q, q) > 0)
        alpha = torch.where(active, gamma / torch.where(active, dot(q, q), 1.0), 0.0)
        x, r = x + spread(alpha, p) * p, r - spread(alpha, q) * q
        s = operator.A_adjoint(r)
        new = dot(s, s)
        p = s + spread(torch.where(active, new / torch.where(gamma > 0, gamma, 1.0), 0.0), p) * p
        gamma = torch.where(active, new, 0.0)
    return x
