r"""What guides by moment matching share: one formula, in which the covariance varies.

With ``p(z0 | z)`` taken for a Gaussian of mean ``D`` and covariance ``C``, the data whitened, and ``B = S^-1/2 A s`` (the
prior's affine decoder ``x = b + s z`` folded in; of an operator that is not linear, ``A`` is its Jacobian at ``x(D)``,
which makes the step one of Gauss and Newton)::

    D_y = D + sigma^2 J^T B^T (I + B C B^T)^-1 S^-1/2 (y - A(x(D)))                                   (G)

``J = dD/dz`` is the denoiser's Jacobian.  A method says what ``C`` is; where it differentiates no network it also puts
``C / sigma^2``, which is ``J`` for an exact denoiser, for ``J^T``.

Where ``C`` is not ``sigma^2 J`` the two need not fit, and the pull may overshoot.  For a Gaussian prior, a direction of prior
variance ``c`` seen with gain ``a`` (of ``B``) and whose variance in ``C`` is ``r^2``, with ``g = c / (c + sigma^2)`` and
``v = sigma^2 g``, an ancestral step multiplies an error by

    1 - tau (1 - g + g k),      k = v a^2 / (1 + r^2 a^2),      tau = 1 - (sigma' / sigma)^2

and lets it grow where ``tau (1 + g (k - 1)) > 2``: never while ``r^2 >= v``, for then k < 1; with ``r^2 = s^2 sigma^2 / (s^2 +
sigma^2)``, ``s^2 < c`` and precise data, near ``sigma^2 = c`` as soon as ``tau > 8 s^2 / c``.  A prior whose values move
together has such a ``c`` for every mean over many of them.  ``guarded`` keeps a pull from this.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from recon.errors import InputError
from recon.operators.algebra import Diagonal
from recon.operators.base import LinearOperator, Operator
from recon.operators.cg import CG, dot
from recon.operators.cg import spread as over
from recon.posterior import Posterior
from recon.samplers.base import GuidedSampler
from recon.samplers.requirements import require_affine, require_gaussian


class Tangent:
    """The Jacobian ``J`` of an operator that is not linear, at ``x`` (n, *domain.shape): ``J u`` and ``J^T v``.

    One evaluation with its graph; ``J u`` is the derivative of ``v -> J^T v`` (which is linear), so both are backward passes.
    """

    def __init__(self, operator: Operator, x: Tensor) -> None:
        with torch.enable_grad():
            self._point = x.detach().requires_grad_()
            self._value = operator.A(self._point)
            self._probe = torch.zeros_like(self._value, requires_grad=True)
            back = torch.autograd.grad(self._value, self._point, self._probe, create_graph=True)
            self._back: Tensor = back[0]

    @property
    def value(self) -> Tensor:
        """``A(x)``: (n, *range.shape)."""
        return self._value.detach()

    def forward(self, u: Tensor) -> Tensor:
        """``J u``: (n, *domain.shape) -> (n, *range.shape)."""
        return torch.autograd.grad(self._back, self._probe, u, retain_graph=True)[0]

    def adjoint(self, v: Tensor) -> Tensor:
        """``J^T v``: (n, *range.shape) -> (n, *domain.shape)."""
        return torch.autograd.grad(self._value, self._point, v, retain_graph=True)[0]


@dataclass(frozen=True)
class Local:
    """What formula (G) sees at one state: unknowns in the prior's latent, data whitened.

    forward, back: ``B`` and its transpose.  pull: ``u -> J^T u`` (None where the network was not differentiated).
    """

    posterior: Posterior
    sigma: float
    denoised: Tensor
    residual: Tensor
    forward: Callable[[Tensor], Tensor]
    back: Callable[[Tensor], Tensor]
    pull: Callable[[Tensor], Tensor] | None


def local(posterior: Posterior, z: Tensor, sigma: float, jacobian: bool = True) -> Local:
    """Evaluate denoiser and operator at ``z``; jacobian: keep the network's graph, so that ``pull`` is there."""
    prior, likelihood = posterior.prior, posterior.likelihood.gaussian()
    operator, noise = likelihood.operator, likelihood.sigma
    denoised, pull = posterior.linearize(z, sigma) if jacobian else (posterior.denoise(z, sigma), None)
    x = prior.decode(denoised)
    onward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor], Tensor]
    if isinstance(operator, LinearOperator):
        value, onward, backward = operator.A(x), operator.A, operator.A_adjoint
    else:
        tangent = Tangent(operator, x)
        value, onward, backward = tangent.value, tangent.forward, tangent.adjoint
    posterior.count("forward", len(z))

    def forward(u: Tensor) -> Tensor:
        posterior.count("forward", len(u))
        return onward(prior.decode_linear(u)) / noise

    def back(v: Tensor) -> Tensor:
        posterior.count("adjoint", len(v))
        return prior.decode_linear(backward(v / noise))

    return Local(posterior, sigma, denoised, (likelihood.y - value) / noise, forward, back, pull)


def solved(at: Local, c: float, cg: CG) -> Tensor:
    """``B^T (I + c B B^T)^-1 r``: by the operator's own ``solve`` as ``(B^T B + I/c)^-1 B^T r / c``, else by CG on the data."""
    prior, likelihood = at.posterior.prior, at.posterior.likelihood.gaussian()
    operator = likelihood.operator
    if not isinstance(operator, LinearOperator):
        return at.back(cg.solve(lambda u: u + c * at.forward(at.back(u)), at.residual))
    weight = (1 / likelihood.sigma**2).expand(operator.range.shape)
    right, watch = at.back(at.residual), at.posterior.count_normal
    if prior.scale.ndim == 0:
        s2 = float(prior.scale) ** 2
        return operator.solve(right, 1 / (c * s2), weight, cg=cg, watch=watch) / (c * s2)
    scaled = operator @ Diagonal(prior.scale.to(right.dtype).expand(operator.domain.shape), operator.domain)
    return scaled.solve(right, 1 / c, weight, cg=cg, watch=watch) / c


def guarded(at: Local, v: Tensor, pulled: Tensor) -> Tensor:
    r"""The pull ``u = sigma^2 J^T B^T v`` of a draw, shortened to where it would be best along itself, if it is longer.

        t = <v, r> / (<v, v> + <v, B u>),       min(1, t) u

    ``t`` minimises ``1/2 v^T (I + sigma^2 B J B^T) v - v^T r``, whose minimum is the pull of the matched covariance (MMPS); so
    the shortened one is never further from it, in that norm, than no pull is.  It is one where ``C`` fits, and one more
    application of ``B``.  A Jacobian that says there is nothing to shorten (no positive ``t``) is not followed.

    v: (n, *range.shape), (I + B C B^T)^-1 r of a method.  pulled: u, (n, *latent.shape).
    """
    shares = dot(v, at.residual) / (dot(v, v) + dot(v, at.forward(pulled)))
    return over(torch.where((shares > 0) & (shares < 1), shares, torch.ones_like(shares)), pulled) * pulled


@dataclass(frozen=True)
class MatchingSampler(GuidedSampler):
    """Formula (G): a method gives ``correction``, and says through ``differentiates`` whether it needs the network's vjp."""

    @property
    def differentiates(self) -> bool:
        """Whether the denoiser's graph is kept."""
        return True

    def check(self, posterior: Posterior) -> None:
        super().check(posterior)
        require_local(posterior, type(self).__name__)

    def correction(self, at: Local) -> Tensor:
        """``D_y - D``: (n, *latent.shape)."""
        raise TypeError(f"{type(self).__name__} must define correction")

    def guide(self, posterior: Posterior, z: Tensor, sigma: float, sigma_next: float) -> Tensor:
        at = local(posterior, z, sigma, self.differentiates)
        return at.denoised + self.correction(at)


def require_local(posterior: Posterior, user: str) -> None:
    """InputError naming ``user`` unless (G) can be written down.

    That takes a Gaussian likelihood, an affine decoder, and an operator that is linear with a matched transpose or can be
    differentiated twice (tried once, at the prior's centre).
    """
    likelihood, prior = require_gaussian(posterior, user), posterior.prior
    require_affine(posterior, user)
    if isinstance(likelihood.operator, LinearOperator):
        likelihood.linear(user)
        return
    zero = torch.zeros(1, *prior.latent.shape, dtype=prior.dtype, device=prior.device)
    try:
        tangent = Tangent(likelihood.operator, prior.decode(zero))
        tangent.forward(prior.decode_linear(zero))
    except RuntimeError as error:
        raise InputError(
            f"{user} linearises the operator and needs one that can be differentiated twice; "
            f"{likelihood.operator.describe()} cannot ({error}). DPS needs one derivative."
        ) from error
