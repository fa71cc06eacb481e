"""Warm starts end with the bias that the closed form gives them, and sequences follow their frames."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

import recon
from recon.checks import check_resume
from recon.draws import Draws
from recon.errors import InputError
from recon.likelihoods import GaussianLikelihood
from recon.operators import CG, MatrixOperator
from recon.priors import GaussianPrior
from recon.priors.base import Card, Prior
from recon.samplers import (
    DDIM,
    METHODS,
    MMPS,
    LevelSampler,
    PiGDM,
    SASolver,
    WarmStart,
    sample_sequence,
    warm_start,
)
from recon.samplers.warm import why_not
from recon.schedules import LogLinear, Schedule
from recon.space import Space
from tests.bounds import normal_bound
from tests.samplers.affine import law


def problem(y: Tensor | None = None, sigma: float = 0.5) -> recon.Posterior:
    variances = torch.tensor([1.0, 0.3, 2.0]).double()
    prior = GaussianPrior(torch.tensor([0.5, 0.0, -1.0]).double(), variances, schedule=Schedule(1e-3, 200.0))
    y = torch.tensor([1.0, 2.0, -3.0]).double() if y is None else y
    return recon.Posterior(prior, GaussianLikelihood(MatrixOperator(torch.eye(3).double()), y, sigma))


GUIDE = MMPS(steps=150, grid=LogLinear(), transition=SASolver(), cg=CG(6, 1e-13))
HAT = torch.tensor([3.0, -1.0, 0.0]).double()


@pytest.mark.parametrize("sigma", [0.2, 1.0, 5.0])
def test_the_bias_of_a_warm_start_is_the_closed_form(sigma: float) -> None:
    posterior = problem()
    exact = posterior.exact()
    assert isinstance(exact, GaussianPrior)
    v = exact.covariance().diagonal()
    mean, covariance = law(warm_start(GUIDE, HAT, sigma), posterior)
    torch.testing.assert_close(mean, exact.mean + v / (v + sigma**2) * (HAT - exact.mean), rtol=1e-4, atol=1e-4)
    expected = v * (1 - v**2 / (v + sigma**2) ** 2)
    torch.testing.assert_close(covariance, torch.diag(expected), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("sigma", [0.2, 1.0])
def test_the_bias_of_a_warm_flow_is_the_closed_form(sigma: float) -> None:
    """First-order steps: 1,500 of them leave half a step of log sigma, 0.3 %, in the variance."""
    sampler = PiGDM(steps=1500, grid=LogLinear(), jacobian=False, transition=DDIM())
    white = GaussianPrior(torch.zeros(3).double(), torch.ones(3).double(), schedule=Schedule(1e-3, 200.0))
    posterior = recon.Posterior(white, problem().likelihood)
    v, centre = torch.full((3,), 0.2).double(), 0.8 * posterior.likelihood.gaussian().y
    mean, covariance = law(warm_start(sampler, HAT, sigma), posterior)
    torch.testing.assert_close(mean, centre + (v / (v + sigma**2)).sqrt() * (HAT - centre), rtol=5e-3, atol=5e-3)
    torch.testing.assert_close(covariance.diagonal(), v * sigma**2 / (v + sigma**2), rtol=1e-2, atol=0.0)


class Units(Prior):
    """Standard normal in a latent of other units."""

    def predict(self, z: Tensor, sigma: Tensor) -> Tensor:
        return z / (1 + sigma[:, None].square())

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64


def test_the_start_is_in_physical_units_and_one_per_draw() -> None:
    space = Space.vector(3, "K")
    prior = Units(space, Schedule(1e-3, 50.0), Card("units"), shift=270.0, scale=10.0)
    like = GaussianLikelihood(MatrixOperator(torch.eye(3).double(), space), torch.full((3,), 275.0).double(), 1e3)
    posterior = recon.Posterior(prior, like)
    starts = 270 + 10 * torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sampler = warm_start(MMPS(), starts, 1e-2, steps=3)
    assert sampler.steps == sampler.of.steps == 3
    x = recon.sample(posterior, sampler, draws=5, block=2).x
    assert float((x - starts).abs().max()) < 10 * 1e-2 * normal_bound(30)
    with pytest.raises(InputError, match="holds 5 draws; draw 5 has none"):
        recon.sample(posterior, sampler, draws=6)
    info = recon.sample(posterior, sampler, draws=5).info["sampler"]
    assert info["method"] == "warmstart" and info["fields"]["of"]["method"] == "mmps"
    assert info["fields"]["x"]["shape"] == [5, 3] and len(info["fields"]["x"]["sha256"]) == 64


def test_it_resumes_to_the_same_bits() -> None:
    assert check_resume(warm_start(dataclasses.replace(GUIDE, steps=8), HAT, 0.7), problem()) == 4


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: warm_start(GUIDE, HAT, -1.0), "sigma > 0"),
        (lambda: warm_start(dataclasses.replace(GUIDE, sigma_min=0.5), HAT, 0.3), "below the sampler's sigma_min"),
        (lambda: warm_start(GUIDE, HAT, 500.0), "good for noise levels"),
        (lambda: warm_start(GUIDE, HAT[:2], 0.5), "start of a warm start"),
        (lambda: warm_start(GUIDE, HAT / 0, 0.5), "finite values"),
        (lambda: WarmStart(of=recon.samplers.Sampler()), "Sampler cannot start in the middle: it does not walk"),  # type: ignore[arg-type]
    ],
)
def test_refusals(build, text: str) -> None:
    with pytest.raises(InputError, match=text):
        recon.sample(problem(), build(), draws=1)


@pytest.mark.parametrize("method", METHODS)
def test_who_can_start_in_the_middle_starts_from_noise_alone(method: str) -> None:
    """Where the first state is the noise of the first level and draws never meet, an image can be put under it; else not."""
    cls = METHODS[method]
    sampler: Any = cls(steps=4)
    if why_not(cls) is None:
        posterior = problem()
        found = sampler.init(posterior, Draws(0, range(3))).z
        torch.testing.assert_close(found, LevelSampler.init(sampler, posterior, Draws(0, range(3))).z, rtol=0, atol=0)
        assert not cls.couples
        return
    with pytest.raises(InputError, match=f"{cls.__name__} cannot start in the middle"):
        warm_start(sampler, HAT, 0.5)


def test_the_methods_that_cannot_are_these() -> None:
    refused = {name for name, cls in METHODS.items() if why_not(cls) is not None}
    assert {"ddrm", "reddiff", "twistedsmc", "mcgdiff", "afdps", "fksteering"} <= refused
    assert not refused & {"mmps", "dps", "latentdps", "resample", "diffpir", "daps", "pnpdm"}


def frames(truths: Tensor, sigma: float = 0.5) -> list[recon.Posterior]:
    return [problem(y, sigma) for y in truths]


def test_a_sequence_follows_its_frames() -> None:
    """AR(1) truths: with sigma of three innovations the draws' mean stays within their bias of each frame's posterior."""
    generator = torch.Generator().manual_seed(3)
    truths = [torch.zeros(3).double()]
    for _ in range(5):
        truths.append(0.9 * truths[-1] + 0.3 * torch.randn(3, generator=generator, dtype=torch.float64))
    sigma, draws = 1.0, 256
    sampler = dataclasses.replace(GUIDE, steps=24, cg=CG(3, 1e-12))
    ensembles = list(sample_sequence(frames(torch.stack(truths)), sampler, sampler, sigma, draws=draws, seed=5))
    assert len(ensembles) == 6
    mean: Tensor | None = None
    for posterior, ensemble in zip(frames(torch.stack(truths)), ensembles, strict=True):
        exact = posterior.exact()
        assert isinstance(exact, GaussianPrior)
        v = exact.covariance().diagonal()
        carried = v / (v + sigma**2)
        mean = exact.mean if mean is None else exact.mean + carried * (mean - exact.mean)  # closed form, frame by frame
        error = (ensemble.mean() - mean) / (v / draws).sqrt()
        assert float(error.abs().max()) < normal_bound(18) + 1  # one more for 24 steps
    noises = [e.x - e.mean() for e in ensembles]
    ratio = float((noises[-1] * noises[-2]).mean() / (noises[-1].square().mean() * noises[-2].square().mean()).sqrt())
    v = torch.tensor([0.2, 3 / 22, 2 / 9]).double()
    assert ratio < float((v / (v + sigma**2)).max()) + normal_bound() / (3 * draws) ** 0.5  # fresh noise in every frame


def test_a_static_scene_does_not_drift() -> None:
    """Forty frames of one measurement: error of the mean against the posterior stays as Monte Carlo has it."""
    posteriors = frames(torch.zeros(1, 3).double().expand(40, 3))
    sampler = dataclasses.replace(GUIDE, steps=8, cg=CG(3, 1e-12))
    exact = posteriors[0].exact()
    assert isinstance(exact, GaussianPrior)
    deviation = exact.covariance().diagonal().sqrt()
    errors = [
        float(((e.mean() - exact.mean) / deviation).abs().max())
        for e in sample_sequence(posteriors, dataclasses.replace(sampler, steps=24), sampler, 0.5, draws=64)
    ]
    # Consecutive frames are correlated by v/(v + sigma^2) <= 0.47: at any frame no more than Monte Carlo, and 8 steps.
    assert max(errors) < normal_bound(120) / 8 + 0.05


def test_sequences_are_refused_before_work() -> None:
    with pytest.raises(InputError, match="at least one frame"):
        sample_sequence([], GUIDE, GUIDE, 0.5)
    with pytest.raises(InputError, match="sigma > 0"):
        sample_sequence([problem()], GUIDE, GUIDE, -0.5)
    other = GaussianPrior(torch.zeros(2).double(), torch.ones(2).double())
    small = recon.Posterior(
        other, GaussianLikelihood(MatrixOperator(torch.eye(2).double()), torch.zeros(2).double(), 1.0)
    )
    with pytest.raises(InputError, match="frame 1 is of another space"):
        sample_sequence([problem(), small], GUIDE, GUIDE, 0.5)
