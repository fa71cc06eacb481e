r"""The data one coefficient at a time, where the operator has such a form.

With the data whitened and the prior's affine decoder folded in, ``B = S^-1/2 A s = U diag(gain) V^T``: coefficient ``i`` of
``V^T z`` is measured as ``data_i`` with noise of standard deviation ``1 / gain_i``, or not at all where ``gain_i = 0``.

    masks, diagonals               V = I
    periodic blurs, one sigma      V^T = a Fourier transform (half spectrum; the gains are even, so real arrays stay real)
    up to 1024 unknowns            a singular value decomposition of the dense matrix
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from recon.errors import InputError
from recon.likelihoods import GaussianLikelihood
from recon.operators.algebra import Diagonal
from recon.operators.base import LinearOperator
from recon.operators.blur import Blur, constant
from recon.operators.masked import Masked
from recon.operators.row_fft import irfft, rfft
from recon.posterior import Posterior, dense
from recon.samplers.requirements import require_affine, require_gaussian

_LARGEST = 1024  # unknowns for which a dense decomposition is made


@dataclass(frozen=True)
class Spectral:
    """gain, data: per coefficient, data zero where gain is.  analyse, synthesise: ``V^T`` and ``V`` on (n, *latent.shape)."""

    gain: Tensor
    data: Tensor
    analyse: Callable[[Tensor], Tensor]
    synthesise: Callable[[Tensor], Tensor]


_known: WeakKeyDictionary[Posterior, Spectral] = WeakKeyDictionary()
_norms: WeakKeyDictionary[Posterior, float] = WeakKeyDictionary()
_lock = threading.Lock()


def spectral_form(posterior: Posterior, user: str) -> Spectral:
    """The spectral form of a posterior's data, made once.

    Raises InputError naming ``user`` and the way out for an operator without one, a likelihood that is not Gaussian, or a
    decoder that is not affine.
    """
    with _lock:
        if posterior not in _known:
            require_affine(posterior, user)
            likelihood = require_gaussian(posterior, user)
            _known[posterior] = _made(posterior, likelihood, likelihood.linear(user), user)
        return _known[posterior]


def data_norm(posterior: Posterior, user: str) -> float:
    """The largest singular value of ``S^-1/2 A s``, by power iteration, made once."""
    with _lock:
        if posterior not in _norms:
            likelihood, prior = posterior.likelihood.gaussian(), posterior.prior
            operator, weight = likelihood.linear(user), 1 / likelihood.sigma**2
            generator = torch.linspace(-1, 1, prior.latent.size, dtype=prior.dtype, device=prior.device)
            z, size = (1 + 0.1 * generator).reshape(1, *prior.latent.shape), 1.0
            for _ in range(30):
                z = prior.decode_linear(operator.A_adjoint(weight * operator.A(prior.decode_linear(z / z.norm()))))
                size = float(z.norm())
            _norms[posterior] = size**0.5
        return _norms[posterior]


def _made(posterior: Posterior, likelihood: GaussianLikelihood, operator: LinearOperator, user: str) -> Spectral:
    prior, sigma = posterior.prior, likelihood.sigma
    zero = torch.zeros(1, *prior.latent.shape, dtype=prior.dtype, device=prior.device)
    offset = (likelihood.y - operator.A(prior.decode(zero)))[0]  # y - A b
    scale = prior.scale.to(prior.dtype)
    if isinstance(operator, Masked | Diagonal):
        sharp = (1 / sigma).expand(operator.range.shape).to(zero)
        values = scale.expand(operator.domain.shape)
        if isinstance(operator, Masked):
            sharp, offset = operator.A_adjoint(sharp[None])[0], operator.A_adjoint(offset[None])[0]
        else:
            values = values * operator.values
        gain = (values * sharp).abs()
        return Spectral(gain, torch.where(gain > 0, offset / values, 0.0), lambda z: z, lambda c: c)
    if isinstance(operator, Blur) and operator.boundary == "periodic" and (one := constant(sigma)) is not None:
        grid = operator.grid
        if prior.scale.ndim == 0 or all(n == 1 for n in prior.scale.shape[-len(grid) :]):
            response = scale * torch.view_as_complex(operator.transfer.to(zero))
            gain = (response.abs() / one).expand(rfft(zero, len(grid)).shape[1:])
            gain = _cleared(gain)
            data = torch.where(gain > 0, rfft(offset, len(grid)) / response, 0.0)
            return Spectral(gain, data, lambda z: rfft(z, len(grid)), lambda c: irfft(c, grid))
    if operator.domain.size <= _LARGEST:
        return _decomposed(posterior, likelihood, operator)
    raise InputError(
        f"{user} needs an operator with a spectral form (a mask, a diagonal, a periodic blur with one sigma, or at most "
        f"{_LARGEST} unknowns); got {operator.describe()}. DDNM(form='plain'), PiGDM and DiffPIR take any linear operator."
    )


def _decomposed(posterior: Posterior, likelihood: GaussianLikelihood, operator: LinearOperator) -> Spectral:
    prior, range_ = posterior.prior, operator.range
    zero = torch.zeros(1, *prior.latent.shape, dtype=prior.dtype, device=prior.device)
    offset = likelihood.y - operator.A(prior.decode(zero))
    sigma = likelihood.sigma.expand(range_.shape)
    if range_.complex:
        offset, sigma = torch.view_as_real(offset), torch.stack([sigma, sigma], -1)
    scales = prior.decode_linear(torch.ones_like(zero)).flatten()
    matrix = dense(operator).to(prior.dtype) * scales / sigma.reshape(-1, 1)
    u, values, vt = torch.linalg.svd(matrix.double())
    gain = matrix.new_zeros(prior.latent.size, dtype=torch.float64)
    gain[: len(values)] = values
    gain = _cleared(gain)
    kept = int((gain > 0).sum())
    data = torch.zeros_like(gain)
    data[:kept] = (u.T @ (offset.flatten() / sigma.flatten()).double())[:kept] / gain[:kept]
    vt = vt.to(prior.dtype)

    def analyse(z: Tensor) -> Tensor:
        return z.flatten(1) @ vt.T

    def synthesise(c: Tensor) -> Tensor:
        return (c @ vt).reshape(-1, *prior.latent.shape)

    return Spectral(gain.to(prior.dtype), data.to(prior.dtype), analyse, synthesise)


def _cleared(gain: Tensor) -> Tensor:
    """``gain`` with what is zero but for rounding set to zero."""
    floor = float(gain.max()) * gain.numel() * torch.finfo(gain.dtype).eps
    return torch.where(gain > floor, gain, 0.0)
