"""Closed forms seen through what wraps them: the same denoiser, the dense covariance, the exact posterior of a tiny volume."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import recon
from recon.errors import InputError
from recon.likelihoods import GaussianLikelihood
from recon.operators import CG, MatrixOperator
from recon.priors import Card, GaussianMixturePrior, GaussianPrior
from recon.priors.base import Prior
from recon.priors.closed import closed_form, components, shrinkage, variance
from recon.priors.lifting import SlicesPrior
from recon.priors.stationary import InLatentOf, StationaryPrior
from recon.priors.superposition import Mixture, log_density
from recon.priors.wrapped import Renormalised
from recon.samplers import DDS, MMPS, Coupling
from recon.samplers.widths import closed_covariance, prior_spread
from recon.schedules import Schedule
from recon.space import Space
from tests import zoo

LEVELS = Schedule(1e-3, 200.0)
IMAGE = Space(("y", "x"), (2, 2))
VOLUME = Space(("y", "z", "x"), (2, 3, 2), {"z": np.arange(3) * 2e-3})


def spread(d, step):
    factor = zoo.normal(d, d, step=step)
    return factor @ factor.T / d + 0.2 * torch.eye(d, dtype=torch.float64)


def gaussian(step=0):
    return GaussianPrior(zoo.normal(4, step=step), spread(4, step + 1), IMAGE, LEVELS)


def mixture():
    covariances = torch.stack([spread(4, 12), spread(4, 13)])
    return GaussianMixturePrior(
        3 * zoo.normal(2, 4, step=11), covariances, torch.tensor([0.3, 0.7]).double(), IMAGE, LEVELS
    )


def stationary():
    power = torch.fft.fft2(zoo.normal(2, 2, step=20)).abs().square() + 0.3
    return StationaryPrior(zoo.normal(2, 2, step=21), power, IMAGE, LEVELS)


class Elsewhere(Prior):
    """Images in another normalisation, known through nothing."""

    @property
    def dtype(self):
        return torch.float64


def elsewhere(space=IMAGE):
    return Elsewhere(space, LEVELS, Card("elsewhere"), shift=1.5, scale=2.5)


PRIORS = {
    "gaussian": gaussian,
    "mixture": mixture,
    "stationary": stationary,
    "renormalised": lambda: Renormalised(mixture(), elsewhere()),
    "renormalised_gaussian": lambda: Renormalised(gaussian(), elsewhere()),
    "in_latent": lambda: InLatentOf(stationary(), elsewhere()),
    "mixed": lambda: Mixture([gaussian(), mixture()], [0.4, 0.6]),
    "slices": lambda: SlicesPrior(gaussian(), VOLUME),
    "slices_of_mixture": lambda: SlicesPrior(mixture(), VOLUME),
    "slices_of_stationary": lambda: SlicesPrior(stationary(), VOLUME),
    "slices_of_renormalised": lambda: SlicesPrior(Renormalised(mixture(), elsewhere()), VOLUME),
}


@pytest.mark.parametrize("name", list(PRIORS))
def test_the_law_has_the_denoiser_of_the_prior(name):
    """At every level, so it is the same law; and its own components put together again."""
    prior = PRIORS[name]()
    law = closed_form(prior)
    assert law.latent.mismatch(prior.latent) is None and law.schedule == prior.schedule
    z = 2 * zoo.normal(5, *prior.latent.shape, step=30)
    for sigma in (0.05, 0.8, 20.0):
        torch.testing.assert_close(law.denoise(z, sigma), prior.denoise(z, sigma), rtol=0, atol=1e-10)
    assert abs(sum(float(w.exp()) for w, _, _ in components(law)) - 1) < 1e-12


@pytest.mark.parametrize("name", [name for name in PRIORS if name != "mixed"])
def test_second_moments_are_those_of_the_law(name):
    """Without writing the law out: mean variance, and ``(C^-1 + sigma^-2)^-1`` on draws of volumes."""
    prior = PRIORS[name]()
    parts = [(float(w.exp()), m, c) for w, m, c in components(closed_form(prior))]
    centre = sum(w * m for w, m, _ in parts)
    whole = sum(w * (c + torch.outer(m - centre, m - centre)) for w, m, c in parts)
    assert variance(prior) == pytest.approx(float(whole.diagonal().mean()), rel=1e-10)
    if not isinstance(prior, InLatentOf):  # which states the spread of its data
        assert prior_spread(prior, None, "t") ** 2 == pytest.approx(variance(prior), rel=1e-12)
    u, sigma = zoo.normal(3, *prior.latent.shape, step=31), 0.7
    expected = torch.linalg.inv(torch.linalg.inv(whole) + torch.eye(len(whole)).double() / sigma**2)
    torch.testing.assert_close(shrinkage(prior, sigma)(u).flatten(1), u.flatten(1) @ expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(closed_covariance(prior, sigma, None, "t")(u), shrinkage(prior, sigma)(u))


def measured(prior, rows=5, sigma=0.4):
    operator = MatrixOperator(zoo.normal(rows, prior.space.size, step=40), prior.space)
    return recon.Posterior(prior, GaussianLikelihood(operator, zoo.normal(rows, step=41), sigma))


def test_the_exact_posterior_of_slices_is_that_of_the_dense_volume():
    """Data that tie the slices, against normal equations with the block-diagonal covariance written by hand."""
    prior = SlicesPrior(gaussian(), VOLUME)
    posterior = measured(prior)
    found = posterior.exact()
    one, C, m = gaussian(), torch.zeros(12, 12).double(), torch.zeros(12).double()
    for k in range(3):
        here = [(y * 3 + k) * 2 + x for y in range(2) for x in range(2)]
        C[np.ix_(here, here)] = one.covariance()
        m[here] = one.mean
    A, like = posterior.likelihood.operator.matrix, posterior.likelihood
    precision = torch.linalg.inv(C) + A.T @ A / 0.16
    mean = torch.linalg.solve(precision, torch.linalg.solve(C, m) + A.T @ like.y / 0.16)
    torch.testing.assert_close(found.mean, mean, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.covariance(), torch.linalg.inv(precision), rtol=0, atol=1e-10)
    assert found.space is posterior.space


@pytest.mark.parametrize("name", ["slices_of_mixture", "slices_of_renormalised", "renormalised", "mixed"])
def test_posterior_density_is_prior_times_likelihood(name):
    """In physical units: ``log p(x) + log p(y | x) - log p(x | y)`` is one number, the evidence, whatever x."""
    prior = PRIORS[name]()
    posterior = measured(prior, 3)
    exact = posterior.exact()
    assert isinstance(exact, GaussianMixturePrior)
    x = 2 * zoo.normal(40, *prior.space.shape, step=42)
    own = log_density(prior, prior.encode(x), torch.zeros(40).double())
    evidence = own + posterior.likelihood.log_prob(x) - exact.log_prob(x)
    torch.testing.assert_close(evidence, evidence.mean().expand(40), rtol=0, atol=1e-8)


def test_samplers_use_what_the_slices_know():
    """MMPS with the closed covariance of correlated slices takes the steps of the denoiser's own; DDS needs no spread."""
    posterior = measured(SlicesPrior(gaussian(), VOLUME))
    walks = [MMPS(steps=6, covariance=kind, cg=CG(30, 1e-13)) for kind in ("closed", "jacobian")]
    one, other = (recon.sample(posterior, walk, draws=2).x for walk in walks)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-9)
    white = recon.sample(posterior, dataclasses.replace(walks[0], spread=1.0), draws=2).x
    assert float((white - one).abs().max()) > 0.1
    assert recon.sample(posterior, DDS(steps=3, coupling=Coupling(1.0)), draws=1).x.shape == (1, 2, 3, 2)


def test_what_is_no_closed_form_or_too_large_is_refused():
    bare = SlicesPrior(elsewhere(), VOLUME)
    assert closed_form(bare) is None and variance(bare) is None and shrinkage(bare, 1.0) is None
    with pytest.raises(InputError, match="has no closed-form posterior; only Gaussians, their mixtures and volumes"):
        measured(bare).exact()
    with pytest.raises(InputError, match="t needs the standard deviation of the latent values"):
        prior_spread(bare, None, "t")
    tall = Space(("y", "z", "x"), (2, 13, 2))
    with pytest.raises(
        InputError, match=r"13 independent slices of 2 components each are a mixture of 2\^13, more than the 4096"
    ):
        closed_form(SlicesPrior(mixture(), tall))
    wide = Space(("y", "x"), (92, 92))
    ones = torch.ones(92, 92)
    large = StationaryPrior(ones, ones, wide, LEVELS)
    with pytest.raises(InputError, match=r"has 8464\^2 numbers; it is written out up to 8192 values"):
        closed_form(large)
    assert variance(large) == 1.0
