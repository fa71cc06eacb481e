"""One body per promise of a likelihood, run over the whole zoo."""

from __future__ import annotations

import copy
import gc
import itertools
import math

import pytest
import torch

from recon.checks import check_batch, check_pickle
from recon.draws import Draws
from recon.errors import InputError
from recon.likelihoods import GaussianLikelihood, Likelihood, StackedLikelihood
from tests import zoo
from tests.bounds import normal_bound

SMALL = [name for name, case in zoo.LIKELIHOODS.items() if case.grids]


@pytest.fixture(scope="module", params=list(zoo.LIKELIHOODS))
def like(request) -> Likelihood:
    return zoo.LIKELIHOODS[request.param]()


def real(values: torch.Tensor) -> torch.Tensor:
    """One row of real numbers per draw."""
    return (torch.view_as_real(values) if values.is_complex() else values).flatten(1)


def noise(like: Likelihood, n: int) -> torch.Tensor:
    kind = torch.complex128 if like.operator.range.complex else torch.float64
    return Draws(5, range(n)).normal(0, like.operator.range.shape, "data", dtype=kind)


def law(like: Likelihood, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean, variance and excess kurtosis of each real number measured of ``x`` (1, ...)."""
    if isinstance(like, StackedLikelihood):
        parts = [law(part, x) for part in like.sources]
        return tuple(torch.cat(rows) for rows in zip(*parts, strict=True))  # type: ignore[return-value]
    if isinstance(like, GaussianLikelihood):
        mean = real(like.operator.A(x))[0]
        sigma = like.sigma.expand(like.operator.range.shape).flatten()
        variance = sigma.square().repeat_interleave(len(mean) // len(sigma))
        return mean, variance, torch.zeros_like(mean)
    rate = like.expected(x).flatten()
    return rate, rate, 1 / rate


def test_one_finite_number_per_draw(like):
    for n in (0, 1, 3):
        values = like.log_prob(zoo.object_of(like, n))
        assert values.shape == (n,)
        assert values.dtype == torch.float64
        assert bool(torch.isfinite(values).all())


def test_the_gradient_is_that_of_the_values(like):
    """Central differences along one direction, at the best of several steps (a wrong gradient is wrong at all of them)."""
    x = zoo.object_of(like, 3).requires_grad_()
    d = zoo.normal(*x.shape, step=2)
    (gradient,) = torch.autograd.grad(like.log_prob(x).sum(), x)
    along = (gradient * d).flatten(1).sum(1)
    size = gradient.flatten(1).norm(dim=1) * d.flatten(1).norm(dim=1)
    gaps = []
    for h in (1e-3, 1e-4, 1e-5, 1e-6):
        difference = (like.log_prob(x.detach() + h * d) - like.log_prob(x.detach() - h * d)) / (2 * h)
        gaps.append(((difference - along).abs() / size).max())
    assert float(min(gaps)) < 1e-8


def test_draws_do_not_meet(like):
    x = zoo.object_of(like, 5)
    check_batch(like.log_prob, x)
    check_batch(like.simulate, [x, noise(like, 5)])


def test_the_gradient_of_one_draw_is_its_own(like):
    x = zoo.object_of(like, 3).requires_grad_()
    (gradient,) = torch.autograd.grad(like.log_prob(x)[1], x)
    assert float(gradient[1].abs().max()) > 0
    assert float(gradient[[0, 2]].abs().max()) == 0


def test_copies_compute_the_same(like):
    check_pickle(like, zoo.object_of(like, 3), lambda one, x: one.log_prob(x))
    twin = copy.deepcopy(like)
    assert type(twin) is type(like)
    for value in twin.buffers():
        value.mul_(2)
    assert not torch.equal(twin.log_prob(zoo.object_of(like)), like.log_prob(zoo.object_of(like)))


def test_precision_changes_rounding_only(like):
    x = zoo.object_of(like, 3)
    expected, single = like.log_prob(x), copy.deepcopy(like).float()
    got = single.log_prob(x.float())
    assert got.dtype == torch.float32
    # Of the order of ten terms of a few units each.
    torch.testing.assert_close(got.double(), expected, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(single.double().log_prob(x), expected, rtol=2e-5, atol=2e-5)
    assert single.simulate(x, noise(like, 3)).real.dtype == torch.float64


@pytest.mark.parametrize("name", list(zoo.LIKELIHOODS))
def test_data_that_are_not_numbers_are_refused(name):
    case = zoo.LIKELIHOODS[name]
    for bad in (math.nan, math.inf):
        y = case.y.clone()
        y.view(-1)[-1] = bad
        with pytest.raises(InputError, match="1 of . values that are NaN or infinite"):
            case.make(y)


def test_simulated_data_have_the_mean_and_variance_of_the_law(like):
    x, n = zoo.object_of(like), 4000
    data = real(like.simulate(x.expand(n, *x.shape[1:]), noise(like, n)))
    mean, variance, kurtosis = law(like, x)
    assert data.shape == (n, len(mean))
    bound = normal_bound(2 * len(mean))
    assert float(((data.mean(0) - mean) / (variance / n).sqrt()).abs().max()) < bound
    assert float(((data.var(0) / variance - 1) / ((2 + kurtosis) / n).sqrt()).abs().max()) < bound


@pytest.mark.parametrize("name", SMALL)
def test_probabilities_of_all_measurements_add_up_to_one(name):
    """The constant is right: sums over counts, trapezoids over numbers (exact to rounding for these steps and widths)."""
    case = zoo.LIKELIHOODS[name]
    x = zoo.object_of(case())
    total, steps = 0.0, math.prod(float(grid[1] - grid[0]) for grid in case.grids)
    for values in itertools.product(*case.grids):
        y = torch.stack(values)
        y = torch.view_as_complex(y.reshape(-1, 2)) if case.y.is_complex() else y
        total += math.exp(float(case.make(y).log_prob(x)))
    assert total * steps == pytest.approx(1, abs=1e-6)


def test_normalisation_is_checked_for_every_class():
    tested = {type(part) for name in SMALL for part in zoo.LIKELIHOODS[name]().modules()}
    assert zoo.public_likelihoods() <= tested


def test_the_zoo_is_complete():
    missing = {found.__name__ for found in zoo.public_likelihoods() - zoo.likelihood_classes()}
    assert not missing, f"add a tiny instance of {sorted(missing)} to LIKELIHOODS in tests/zoo.py"


def test_a_forgotten_likelihood_is_found():
    forgotten = type("Forgotten", (Likelihood,), {"__module__": "recon.likelihoods.forgotten"})
    try:
        assert forgotten in zoo.public_likelihoods() - zoo.likelihood_classes()
    finally:
        del forgotten
        gc.collect()  # classes live in cycles, and __subclasses__ lists the living
