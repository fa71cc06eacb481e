r"""Several priors over the same arrays in one: their mixture, which is exact, and sums of their scores, which are not.

The mixture :math:`\sum_k w_k p_k` has the denoiser

.. math::
    D(z, \sigma) = \sum_k r_k(z, \sigma)\, D_k(z, \sigma), \qquad
    r_k(z, \sigma) \propto w_k\, q_k(z; \sigma), \quad q_k(\cdot\,; \sigma) = p_k * N(0, \sigma^2 I),

so it needs the blurred densities ``q_k`` up to a common factor.  Closed forms know them (``log_density``).  A network knows
only the slope of its own; the missing constants can be carried along the path of a sampler (Skreta et al. 2024), but a
``Prior`` is a function of the point ``(z, sigma)`` alone.  So networks are refused, unless a ``gate`` (a classifier of noisy
arrays, trained for it) tells the log density ratios: an exact one makes the mixture exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import singledispatch

import torch
from torch import Tensor, nn

from recon.errors import InputError
from recon.priors.base import Card, Prior
from recon.priors.gaussian import GaussianPrior
from recon.priors.mixture import GaussianMixturePrior
from recon.priors.wrapped import Renormalised, sigma_data_of, together

Gate = Callable[[Tensor, Tensor], Tensor]
"""(z (n, ...), sigma (n,)) -> (n, k): log q_k(z; sigma) up to a number common to all k."""


@singledispatch
def log_density(prior: Prior, z: Tensor, sigma: Tensor) -> Tensor:
    """``log q(z; sigma)``, the density of the prior's latent under noise of level ``sigma``: (n, ...) and (n,) to (n,).

    Other closed forms join by ``log_density.register``.  Raises InputError for a prior that has none.
    """
    raise InputError(
        f"prior {prior.card.name!r} ({type(prior).__name__}) has no log-density of its noisy arrays, which the shares of a "
        "mixture are made of; give a gate that tells the log density ratios, or mix closed-form priors"
    )


@log_density.register
def _(prior: GaussianPrior, z: Tensor, sigma: Tensor) -> Tensor:
    centred = z.flatten(1) - prior.mean
    rotated = centred if prior.vectors is None else centred @ prior.vectors
    total = prior.variances + sigma[:, None] ** 2
    return -0.5 * (rotated**2 / total + (2 * math.pi * total).log()).sum(1)


@log_density.register
def _(prior: GaussianMixturePrior, z: Tensor, sigma: Tensor) -> Tensor:
    rotated = prior._rotate(z.flatten(1)[:, None, :] - prior.means)
    return torch.logsumexp(prior._log_terms(rotated, sigma), dim=1)


@log_density.register
def _(prior: Renormalised, z: Tensor, sigma: Tensor) -> Tensor:
    return log_density(prior.inner, *prior.inwards(z, sigma)) + prior.latent.size * math.log(prior.ratio)


class _Several(Prior):
    """Priors in the latent of the first one, and a number for each."""

    numbers: Tensor
    priors: nn.ModuleList

    def __init__(self, priors: Sequence[Prior], numbers: Sequence[float], card: Card) -> None:
        what = type(self).__name__
        same, schedule = together(priors, what)
        if len(numbers) != len(same) or not all(math.isfinite(w) for w in numbers):
            raise InputError(f"{what} takes one finite weight per prior, {len(same)}; got {list(numbers)}")
        first = same[0]
        super().__init__(first.space, schedule, card)
        self.latent, self.affine = first.latent, first.affine
        self.shift, self.scale = first.shift, first.scale
        self.priors = nn.ModuleList(same)
        self.register_buffer("numbers", torch.tensor(numbers, dtype=torch.float64))
        spreads = [s for s in map(sigma_data_of, same) if s is not None]
        # What the parts call usual, where all know it.
        known = len(spreads) == len(same)
        self.sigma_data = math.sqrt(sum(s * s for s in spreads) / len(spreads)) if known else None

    @property
    def parts(self) -> list[Prior]:
        """The priors, all in one latent."""
        return [prior for prior in self.priors if isinstance(prior, Prior)]

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    def decode(self, z: Tensor) -> Tensor:
        return self.parts[0].decode(z)

    def decode_linear(self, dz: Tensor) -> Tensor:
        return self.parts[0].decode_linear(dz)

    def encode(self, x: Tensor) -> Tensor:
        return self.parts[0].encode(x)

    def _denoised(self, z: Tensor, sigma: Tensor) -> Tensor:
        """(k, n, *latent.shape)."""
        return torch.stack([prior.predict(z, sigma) for prior in self.parts])


def equal_shares(priors: Sequence[Prior]) -> list[float]:
    """One over their number for each."""
    return [1 / len(priors) for _ in priors]


class Mixture(_Several):
    """``p = sum_k w_k p_k``, exact.

    priors: over the same arrays; those in another normalisation are brought to that of the first.  weights: positive, summing
    to one (equal when left out).  gate: see ``Gate``; in place of the closed forms.

    Raises InputError for weights or priors that do not fit, and without a gate for priors without a log-density.
    """

    def __init__(
        self, priors: Sequence[Prior], weights: Sequence[float] | None = None, gate: Gate | None = None
    ) -> None:
        shares = equal_shares(priors) if weights is None else list(weights)
        if shares and not (all(w > 0 for w in shares) and abs(sum(shares) - 1) <= 1e-5):
            raise InputError(f"the weights of a mixture are positive and sum to 1; got {shares}")
        names = " and ".join(repr(prior.card.name) for prior in priors)
        facts = {"of": [prior.card.name for prior in priors], "weights": shares, "gate": gate is not None}
        super().__init__(priors, shares, Card("mixture", f"mixture of {names}", facts))
        self.gate = gate
        if gate is None:
            z = torch.zeros(1, *self.latent.shape, dtype=self.dtype, device=self.device)
            log_density(self, z, z.new_full((1,), self.schedule.sigma_max))

    def shares(self, z: Tensor, sigma: Tensor) -> Tensor:
        """``r_k(z, sigma)``: (n, k), positive, each row summing to one."""
        return torch.softmax(self.log_terms(z, sigma), dim=1)

    def log_terms(self, z: Tensor, sigma: Tensor) -> Tensor:
        """``log w_k + log q_k(z; sigma)``: (n, k), with a gate up to a number common to all k."""
        if self.gate is not None:
            told = self.gate(z, sigma)
            if tuple(told.shape) != (len(z), len(self.priors)):
                raise InputError(f"the gate must answer ({len(z)}, {len(self.priors)}); it gave {tuple(told.shape)}")
        else:
            told = torch.stack([log_density(prior, z, sigma) for prior in self.parts], dim=1)
        return self.numbers.log().to(told.dtype) + told

    def predict(self, z: Tensor, sigma: Tensor) -> Tensor:
        shares = self.shares(z, sigma).to(z.dtype).T.reshape(len(self.priors), -1, *[1] * (z.ndim - 1))
        return (shares * self._denoised(z, sigma)).sum(0)


@log_density.register
def _(prior: Mixture, z: Tensor, sigma: Tensor) -> Tensor:
    if prior.gate is not None:
        raise InputError("a mixture with a gate knows ratios of densities, not its own; mix its parts instead")
    return torch.logsumexp(prior.log_terms(z, sigma), dim=1)


class ScoreSum(_Several):
    r"""``D = z + sum_k w_k (D_k - z)``: the scores of several priors added with ``weights`` (one over their number by default).

    A heuristic.  The score of every level is that of :math:`\prod_k q_k(z; \sigma)^{w_k}`, and the blurred product of densities
    is not the product of blurred ones: two Gaussians ``N(0, c)`` multiply to ``N(0, c/2)``, whose score at level ``sigma`` is
    ``-z / (c/2 + sigma^2)``, while their scores add to ``-2 z / (c + sigma^2)``, up to twice as much.  So ``D`` is the denoiser
    of no distribution, unless all the priors are one and the weights sum to 1.  Probability flow under weights that sum to 1
    draws from centred Gaussians with covariances ``C_k`` that commute ``N(0, prod_k C_k^{w_k})``: the geometric mean of the
    covariances, where the product of densities has the harmonic one.

    Raises InputError for priors that do not fit each other, or numbers that are not one finite weight each.
    """

    def __init__(self, priors: Sequence[Prior], weights: Sequence[float] | None = None) -> None:
        given = equal_shares(priors) if weights is None else list(weights)
        names = " and ".join(repr(prior.card.name) for prior in priors)
        facts = {
            "of": [prior.card.name for prior in priors],
            "weights": given,
            "claim": "heuristic: the sum of blurred scores is the score of no blurred distribution",
        }
        super().__init__(priors, given, Card("score sum", f"weighted scores of {names}", facts))

    def predict(self, z: Tensor, sigma: Tensor) -> Tensor:
        weights = self.numbers.to(z.dtype).reshape(-1, *[1] * z.ndim)
        return (1 - weights.sum()) * z + (weights * self._denoised(z, sigma)).sum(0)
