"""Classifier-free guidance of a joint Gaussian is linear: everything about it has a closed form."""

from __future__ import annotations

import pytest
import torch

from recon.errors import InputError
from recon.priors import Card, GaussianPrior, NetworkPrior
from recon.priors.conditional import ConditionalGaussianPrior
from recon.priors.guidance import Conditional, Guided, guided
from recon.schedules import LogLinear, Schedule
from recon.space import Space

SPACE, TOLD = Space.vector(3), Space.vector(2, dim="told")
LEVELS = Schedule(1e-3, 50.0)


def joint(seed=0):
    factor = torch.randn(5, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    covariance = factor @ factor.T / 5 + 0.2 * torch.eye(5, dtype=torch.float64)
    return torch.linspace(-1, 1, 5, dtype=torch.float64), covariance


class JointGaussian:
    """The conditional of a joint Gaussian by its precision matrix, told one value for all draws."""

    conditions = {"told": TOLD}

    def __init__(self):
        self.mean, self.covariance = joint()

    def given(self, told):
        precision = torch.linalg.inv(self.covariance)
        covariance = torch.linalg.inv(precision[:3, :3])
        mean = self.mean[:3] - covariance @ precision[:3, 3:] @ (told - self.mean[3:])
        return GaussianPrior(mean, covariance, SPACE, LEVELS)

    def unconditional(self):
        return GaussianPrior(self.mean[:3], self.covariance[:3, :3], SPACE, LEVELS)


VALUE = torch.tensor([0.7, -1.1], dtype=torch.float64)


def states():
    return 2 * torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("weight", [-0.5, 0.0, 0.4, 1.0, 3.0])
@pytest.mark.parametrize("sigma", [0.05, 0.8, 20.0])
def test_guidance_of_a_joint_gaussian_in_closed_form(weight, sigma):
    """From the blurred joint density itself: the score of ``q(z)^(1-w) q(z | c)^w``, by autograd."""
    mean, covariance = joint()
    white = sigma**2 * torch.eye(3, dtype=torch.float64)
    z = states().requires_grad_()
    blurred = covariance.clone()
    blurred[:3, :3] += white
    free = torch.distributions.MultivariateNormal(mean[:3], blurred[:3, :3])
    both = torch.distributions.MultivariateNormal(mean, blurred)
    told = torch.cat([z, VALUE.expand(4, 2)], 1)
    log_q = (1 - weight) * free.log_prob(z) + weight * both.log_prob(told)
    (score,) = torch.autograd.grad(log_q.sum(), z)
    expected = (z + sigma**2 * score).detach()
    for conditional in (JointGaussian(), ConditionalGaussianPrior(mean, covariance, {"told": TOLD}, SPACE, LEVELS)):
        got = guided(conditional, {"told": VALUE}, weight).denoise(z.detach(), sigma)
        # Tweedie's formula loses sigma^2 / v of the digits of a score.
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12 * (1 + sigma**2))


class Counting(GaussianPrior):
    """Counts the draws it was asked for."""

    asked = 0

    def predict(self, z, sigma):
        self.asked += len(z)
        return super().predict(z, sigma)


def pair():
    one = Counting(torch.ones(3).double(), 0.5 * torch.ones(3).double(), SPACE, LEVELS)
    other = Counting(torch.zeros(3).double(), 2.0 * torch.ones(3).double(), SPACE, LEVELS)
    return one, other


@pytest.mark.parametrize(("weight", "calls"), [(1.0, (4, 0)), (0.0, (0, 4)), (2.0, (4, 4))])
def test_no_and_full_guidance_are_the_two_priors_bit_for_bit(weight, calls):
    (given, free), z = pair(), states()
    prior = Guided(given, free, weight)
    out = prior.denoise(z, 0.3)
    assert (given.asked, free.asked) == calls
    if weight in (0.0, 1.0):
        assert torch.equal(out, (given if weight else free).denoise(z, 0.3))
        assert "claim" not in prior.card.facts
    else:
        assert prior.card.facts["claim"].startswith("heuristic")


def test_guidance_within_an_interval_and_the_conditional_prior_outside():
    given, free = pair()
    z, levels = states(), torch.tensor([0.05, 0.1, 1.0, 3.0], dtype=torch.float64)
    out = Guided(given, free, 2.5, (0.1, 1.0)).denoise(z, levels)
    everywhere, plain = Guided(given, free, 2.5).denoise(z, levels), given.denoise(z, levels)
    assert torch.equal(out[1:3], everywhere[1:3])
    assert torch.equal(out[[0, 3]], plain[[0, 3]])
    free.asked = 0
    assert torch.equal(Guided(given, free, 2.5, (0.1, 1.0)).denoise(z, 2.0), given.denoise(z, 2.0))
    assert free.asked == 0


def flow(prior, steps):
    """Factor by which Heun's probability flow from the top of the schedule to zero multiplies a state of one number."""
    z = torch.ones(1, 1, dtype=torch.float64)
    sigmas = LogLinear().sigmas(prior.schedule, steps).tolist()
    for sigma, lower in zip(sigmas, sigmas[1:], strict=False):
        slope = (z - prior.denoise(z, sigma)) / sigma
        guess = z + (lower - sigma) * slope
        if lower > 0:
            slope = (slope + (guess - prior.denoise(guess, lower)) / lower) / 2
        z = z + (lower - sigma) * slope
    return float(z)


@pytest.mark.parametrize("weight", [0.0, 1.0, 3.0])
def test_what_guidance_draws_is_no_posterior(weight):
    """Variance ``v_u^(1-w) v_c^w``; the density ``p_u^(1-w) p_c^w`` would have the precision ``(1-w)/v_u + w/v_c``.

    The error of Heun's method is that of halving its steps, up to a factor of 4 / 3 and higher orders.
    """
    v_c, v_u = 0.5, 2.0
    zero, one = torch.zeros(1).double(), torch.ones(1).double()
    given, free = (GaussianPrior(zero, v * one, None, Schedule(1e-3, 200.0)) for v in (v_c, v_u))
    prior = Guided(given, free, weight)
    coarse, fine = (200.0**2 * flow(prior, n) ** 2 for n in (200, 400))
    expected = v_u ** (1 - weight) * v_c**weight
    # And the start: N(0, 200^2) in place of N(0, 200^2 + v) is wrong by v / 200^2, a share of 1e-4.
    assert fine == pytest.approx(expected, abs=abs(fine - coarse), rel=2e-4)
    product = 1 / ((1 - weight) / v_u + weight / v_c)
    assert (abs(fine - product) > 0.1 * product) == (weight not in (0.0, 1.0))


def test_the_protocol_is_that_of_conditional_priors():
    mean, covariance = joint()
    assert isinstance(ConditionalGaussianPrior(mean, covariance, {"told": TOLD}), Conditional)
    assert isinstance(JointGaussian(), Conditional)
    assert not isinstance(JointGaussian().unconditional(), Conditional)


def normalised(scale):
    network = torch.nn.Identity()
    return NetworkPrior(Space(("y", "x"), (4, 4)), LEVELS, Card("one"), network, sigma_data=0.5, scale=scale)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: guided(pair()[0], {"told": VALUE}, 2.0), "needs a conditional prior .* got Counting"),
        (lambda: guided(JointGaussian(), {}, 2.0), "values for some of told; got none"),
        (lambda: guided(JointGaussian(), {"heard": VALUE}, 2.0), "values for some of told; got heard"),
        (lambda: Guided(*pair(), float("nan")), "finite number; got nan"),
        (lambda: Guided(*pair(), 2.0, (1.0, 0.5)), r"low < high; got \(1.0, 0.5\)"),
        (lambda: Guided(pair()[0], GaussianPrior(torch.zeros(4), torch.ones(4)), 2.0), "component=3.*component=4"),
        (lambda: Guided(normalised(1.0), normalised(2.0), 2.0), "two denoisers of one latent; their scale differs"),
    ],
)
def test_refusals(make, text):
    with pytest.raises(InputError, match=text):
        make()
