r"""A Gaussian for ``z0`` given ``z``, exact in the directions that the data see, and all it implies in closed form.

Tweedie: ``E[z0 | z] = D`` and ``Cov[z0 | z] = C = sigma^2 J``.  With ``B`` (r, d) the rows that the data see (whitened, rotated
so that ``B B^T = diag(b)``, and ``y - B z0`` standard normal noise), one vjp per row gives ``G = C B^T``, and with
``M = B G``, ``P = B^T (B B^T)^-1 B``

    C' = G M^-1 G^T + c (I - P),       c = (tr C - tr G M^-1 G^T) / (d - r)

has ``C' B^T = G`` and the trace of C (a probe vector estimates what G leaves).  Under ``z0 ~ N(D, C')``:

    psi(z)            = N(y; B D, I + M)                                                 the twist
    z0 | y            = z0' + G (I + M)^-1 (y - B z0' - n),   z0' ~ N(D, C'),  n ~ N(0, I)
    y | z, z_next     ~ N(B D + W^T (u - D), I + rho^2 B W),  W = (C' + rho^2)^-1 G

with ``u = (z_next - (1 - tau) z) / tau`` and ``rho^2 = sigma_next^2 / tau``, because ``u = z0 + rho n`` for the bridge
``z_next ~ N((1 - tau) z + tau z0, sigma_next^2 tau)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from recon.draws import Draws
from recon.errors import InputError
from recon.likelihoods import GaussianLikelihood
from recon.posterior import Posterior
from recon.samplers.requirements import require_affine


@dataclass(frozen=True)
class Seen:
    """What data say about the latent: ``value = B z0 + n``, n standard normal.

    rows: B (r, d), orthogonal.  squares: (r,), their squared lengths.  value: (r,).  constant: what ``log p(y | x)`` has beyond
    ``log N(value; B z0, I)``.
    """

    rows: Tensor
    squares: Tensor
    value: Tensor
    constant: float

    @classmethod
    def of(cls, posterior: Posterior, user: str, largest: int) -> Seen:
        """From a linear operator with at most ``largest`` real data.  Raises InputError with the way out otherwise."""
        likelihood = posterior.likelihood.gaussian()
        operator = likelihood.linear(user)
        require_affine(posterior, user)
        parts = 2 if operator.range.complex else 1
        if parts * operator.range.size > largest:
            raise InputError(
                f"{user} works with one row per datum and takes at most {largest}; {operator.describe()} has "
                f"{parts * operator.range.size}. Use TwistedSMC with the twist Guided, whose cost does not grow with the data, "
                "or raise 'largest'."
            )
        return _known(posterior)

    @classmethod
    def reduced(cls, posterior: Posterior, likelihood: GaussianLikelihood) -> Seen:
        """The same, whatever the number of data."""
        prior, operator = posterior.prior, likelihood.linear("Seen")
        shape, size = operator.range.shape, operator.range.size
        unit = torch.eye(size, dtype=prior.dtype, device=prior.device).reshape(-1, *shape)
        unit = torch.cat([unit.to(prior.dtype.to_complex()), 1j * unit]) if operator.range.complex else unit
        back = posterior.adjoint(operator, unit / likelihood.sigma)
        matrix = prior.decode_linear(back).flatten(1)
        origin = torch.zeros(1, *prior.latent.shape, dtype=prior.dtype, device=prior.device)
        offset = prior.decode(origin)
        gap = likelihood.residual(offset) / likelihood.sigma
        y = torch.cat([gap.real.flatten(), gap.imag.flatten()]) if gap.is_complex() else gap.flatten()
        squares, vectors = torch.linalg.eigh(matrix @ matrix.T)
        kept = squares > 1e-12 * squares.max().clamp(min=torch.finfo(squares.dtype).tiny)
        value = vectors[:, kept].T @ y
        whole = float(likelihood.log_prob(offset)[0])
        constant = whole + 0.5 * float(value.square().sum()) + 0.5 * len(value) * math.log(2 * math.pi)
        return cls(vectors[:, kept].T @ matrix, squares[kept], value, constant)

    def log_prob(self, z: Tensor) -> Tensor:
        """``log p(y | x(z))``: (n, ...) -> (n,)."""
        return log_normal(self.value - z.flatten(1) @ self.rows.T, None) + self.constant


_SEEN: WeakKeyDictionary[Posterior, Seen] = WeakKeyDictionary()


def _known(posterior: Posterior) -> Seen:
    """``Seen`` of a posterior, worked out once."""
    if posterior not in _SEEN:
        with torch.no_grad():
            _SEEN[posterior] = Seen.reduced(posterior, posterior.likelihood.gaussian())
    return _SEEN[posterior]


@dataclass(frozen=True)
class Moments:
    """The Gaussian of the module for n particles: mean (n, d), G (n, d, r), M (n, r, r), c (n,)."""

    mean: Tensor
    G: Tensor
    M: Tensor
    c: Tensor

    @classmethod
    def of(cls, posterior: Posterior, seen: Seen, z: Tensor, sigma: float, probes: Tensor) -> Moments:
        """At states z (n, *latent.shape).  probes: (n, p, d) of independent signs.

        Costs one evaluation of the denoiser and r + p vjps.
        """
        denoised, pull = posterior.linearize(z, sigma)

        def spread(u: Tensor) -> Tensor:
            return sigma**2 * pull(u.reshape(z.shape)).flatten(1)

        n, (r, d) = len(z), seen.rows.shape
        mean = denoised.flatten(1)
        G = torch.stack([spread(row.expand(n, d)) for row in seen.rows], 2) if r else mean.new_zeros(n, d, 0)
        sound = torch.isfinite(mean).all(1) & torch.isfinite(G.flatten(1)).all(1)
        G = G.where(sound[:, None, None], 0.0)
        M = (seen.rows @ G).double()
        M = 0.5 * (M + M.mT)
        # A learnt Jacobian need not be positive; a Gaussian's covariance is.
        values, vectors = torch.linalg.eigh(M)
        floor = torch.finfo(z.dtype).eps * sigma**2 * (float(seen.squares.min()) if r else 1.0)
        least = (torch.finfo(z.dtype).eps * values.amax(1).clamp(min=0.0) if r else values.sum(1)).clamp(min=floor)
        M = (vectors * values.clamp(min=least[:, None])[:, None]) @ vectors.mT
        return cls(mean, G, M, _rest(seen, G, M, spread, probes))

    def twist(self, seen: Seen) -> Tensor:
        """``log psi``: (n,)."""
        gap = seen.value - self.mean @ seen.rows.T
        return log_normal(gap, _plus_one(self.M)) + seen.constant

    def guided(self, seen: Seen) -> Tensor:
        """``E[z0 | z, y]``: (n, d)."""
        gap = (seen.value - self.mean @ seen.rows.T).double()
        return self.mean + self._along(torch.linalg.solve(_plus_one(self.M), gap[:, :, None]))

    def draw(self, seen: Seen, noise: Tensor, few: Tensor, rho2: float = 0.0) -> Tensor:
        """``z0 + rho n`` with ``z0 | z, y``, from standard normal numbers noise (n, d) and few (n, 2 r): (n, d).

        One number per direction serves both, for what data see of z0 is drawn from ``few``.
        """
        r, few = len(seen.rows), few.double()
        inside = noise @ seen.rows.T / seen.squares @ seen.rows if r else 0.0
        root = torch.linalg.cholesky_ex(self.M)[0]
        along = torch.linalg.solve_triangular(root.mT, few[:, :r, None], upper=True)
        gap = (seen.value - self.mean @ seen.rows.T).double() - (self.M @ along)[:, :, 0] - few[:, r:]
        along = along + torch.linalg.solve(_plus_one(self.M), gap[:, :, None])
        free = (self.c + rho2).sqrt()[:, None] * (noise - inside)
        return self.mean + free + math.sqrt(rho2) * inside + self._along(along)

    def _along(self, weights: Tensor) -> Tensor:
        """``G w`` of (n, r, 1) float64 weights: (n, d)."""
        return (self.G @ weights.to(self.G.dtype))[:, :, 0]

    def predicted(self, seen: Seen, u: Tensor, rho2: float) -> Tensor:
        """``log p(y | z, z_next)``, ``u`` (n, d) and ``rho2`` as in the module: (n,)."""
        gram, squares = (self.G.mT @ self.G).double(), seen.squares.double()
        weighted, c = self.M / squares[:, None], self.c.double()[:, None, None]
        left = (c + rho2) * self.M + gram + c / rho2 * (self.M @ weighted)
        X = torch.linalg.solve(left, self.M)
        Y = c / rho2 * (weighted @ X)
        away = (u - self.mean)[:, :, None]
        # W^T (u - D) and B W with W = G X + B^T Y
        shift = X.mT @ (self.G.mT @ away).double() + Y.mT @ (seen.rows @ away).double()
        spread = rho2 * (self.M @ X + squares[:, None] * Y)
        gap = (seen.value - self.mean @ seen.rows.T).double() - shift[:, :, 0]
        return log_normal(gap, _plus_one(0.5 * (spread + spread.mT))) + seen.constant


def signs(draws: Draws, k: int, count: int, size: int, dtype: torch.dtype) -> Tensor:
    """Independent signs for probing a trace: (n, count, size)."""
    return torch.where(draws.uniform(k, (count, size), "probe") < 0.5, -1.0, 1.0).to(dtype)


def log_normal(gap: Tensor, covariance: Tensor | None) -> Tensor:
    """``log N(gap; 0, covariance)`` per row, in float64: (n, r), (n, r, r) or None for the identity -> (n,)."""
    gap = gap.double()
    volume = gap.new_zeros(len(gap))
    if covariance is not None:
        root, failed = torch.linalg.cholesky_ex(covariance.double())
        gap = torch.linalg.solve_triangular(root, gap[:, :, None], upper=False)[:, :, 0]
        volume = root.diagonal(dim1=1, dim2=2).log().sum(1).where(failed == 0, torch.nan)
    return -0.5 * gap.square().sum(1) - volume - 0.5 * gap.shape[1] * math.log(2 * math.pi)


def _plus_one(M: Tensor) -> Tensor:
    return M + torch.eye(M.shape[1], dtype=M.dtype, device=M.device)


def _rest(seen: Seen, G: Tensor, M: Tensor, spread: Callable[[Tensor], Tensor], probes: Tensor) -> Tensor:
    """c: the mean variance in the directions that the data do not see, (n,)."""
    (n, d, r), count = G.shape, probes.shape[1]
    if r >= d:
        return G.new_zeros(n)
    total = G.new_zeros(n)
    for i in range(count):
        probe = probes[:, i]
        unseen = probe - (probe @ seen.rows.T / seen.squares @ seen.rows if r else 0.0)
        through = (G.mT @ unseen[:, :, None]).double() if r else None
        known = (through * torch.linalg.solve(M, through)).sum((1, 2)) if through is not None else 0.0
        total += ((unseen * spread(unseen)).sum(1) - known).to(total.dtype)
    return (total / (count * (d - r))).nan_to_num(0.0).clamp(min=0.0)
