"""The verdict on data fit, against problems whose posterior is known exactly.

FALSE_ALARM is the probability that one of the statistical tests fails on correct code.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from recon.diagnostics import data_fit, fit
from recon.ensemble import Ensemble
from recon.errors import InputError
from recon.likelihoods import GaussianLikelihood, PoissonLikelihood, StackedLikelihood, TransmissionLikelihood
from recon.operators import MatrixOperator
from recon.space import Space

FALSE_ALARM = 1e-5
VIEWS, DETECTOR, D, SIGMA = 12, 10, 25, 0.3
M_DATA = VIEWS * DETECTOR
RANGE = Space(("angle", "detector"), (VIEWS, DETECTOR))


class Problem:
    """x ~ N(0, I), y = A x + sigma n, and its exact posterior."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.matrix = self.rng.normal(size=(M_DATA, D)) / math.sqrt(D)
        self.truth = self.rng.normal(size=D)
        self.y = self.matrix @ self.truth + SIGMA * self.rng.normal(size=M_DATA)
        self.covariance = np.linalg.inv(np.eye(D) + self.matrix.T @ self.matrix / SIGMA**2)
        self.mean = self.covariance @ self.matrix.T @ self.y / SIGMA**2
        self.freedom = np.trace(self.matrix @ self.covariance @ self.matrix.T) / SIGMA**2

    def draws(self, n: int) -> np.ndarray:
        return self.rng.multivariate_normal(self.mean, self.covariance, size=n)

    def likelihood(self, sigma: float = SIGMA) -> GaussianLikelihood:
        operator = MatrixOperator(torch.tensor(self.matrix), range=RANGE)
        return GaussianLikelihood(operator, torch.tensor(self.y).reshape(RANGE.shape), sigma)

    def fit(self, draws: np.ndarray, sigma: float = SIGMA, log_weights: torch.Tensor | None = None) -> fit.DataFit:
        ensemble = Ensemble(torch.tensor(draws), Space.vector(D), log_weights)
        return data_fit(self.likelihood(sigma), ensemble)


@pytest.fixture(scope="module")
def exact():
    """The fits of 200 problems with their freedoms, 8 exact draws each."""
    problems = [Problem(seed) for seed in range(200)]
    return [(p.fit(p.draws(8)), p.freedom) for p in problems]


def test_chi2_of_an_exact_draw_has_the_law_of_the_noise(exact):
    one_each = sum(float(f.chi2[0]) for f, _ in exact)
    law = stats.chi2(len(exact) * M_DATA)
    assert law.ppf(FALSE_ALARM / 2) < one_each < law.isf(FALSE_ALARM / 2)
    ratios = np.array([f.ratio for f, _ in exact])
    assert abs(ratios.mean() - 1) < stats.norm.isf(FALSE_ALARM / 2) * math.sqrt(2 / M_DATA / len(exact))
    assert exact[0][0].ratio_sd == pytest.approx(math.sqrt(2 / M_DATA))


def test_the_verdict_blames_exact_samplers_no_more_often_than_stated(exact):
    blamed = sum(f.verdict != "fits" for f, _ in exact)
    assert blamed <= stats.binom.isf(FALSE_ALARM, len(exact), 1e-3)
    coloured = sum(bool(f.coloured) for f, _ in exact)
    assert coloured <= stats.binom.isf(FALSE_ALARM, len(exact), 1e-3)


def test_the_mean_lies_below_one_by_the_degrees_of_freedom(exact):
    shortfall = np.array([M_DATA - f.mean_chi2 for f, _ in exact])
    freedom = np.array([d for _, d in exact])
    found = np.array([f.signal_freedom for f, _ in exact])
    bound = stats.norm.isf(FALSE_ALARM / 4)
    # chi2 of the mean of M draws: m - d_eff (1 - 1/M), with the noise's own scatter
    off = shortfall - freedom * (1 - 1 / 8)
    assert abs(off.mean()) < bound * off.std() / math.sqrt(len(off))
    assert abs((found - freedom).mean()) < bound * (found - freedom).std() / math.sqrt(len(off))
    assert freedom.mean() > 15  # or the test would compare with nothing


@pytest.mark.parametrize(
    ("change", "sigma", "expected"),
    [
        (0.0, SIGMA, "fits"),
        (0.6, SIGMA, "data not fitted"),
        (0.0, SIGMA / 2, "data not fitted"),
        (0.0, 2 * SIGMA, "noise fitted"),
    ],
    ids=["exact", "biased", "sigma too small", "sigma too large"],
)
def test_verdicts(change, sigma, expected):
    problem = Problem(0)
    assert problem.fit(problem.draws(16) + change, sigma).verdict == expected


def test_following_the_noise_is_noticed():
    rng = np.random.default_rng(1)
    matrix = torch.tensor(rng.normal(size=(M_DATA, M_DATA - 10)))
    y = torch.tensor(rng.normal(size=M_DATA))
    follower = torch.linalg.lstsq(matrix, y[:, None]).solution[:, 0]
    likelihood = GaussianLikelihood(MatrixOperator(matrix, range=RANGE), y.reshape(RANGE.shape), 1.0)
    result = data_fit(likelihood, Ensemble(follower.expand(4, -1).clone(), Space.vector(M_DATA - 10)))
    assert result.verdict == "noise fitted"


def test_limits_hold_for_the_mean_of_dependent_draws():
    low, high = Problem(0).fit(Problem(0).draws(2)).limits
    assert stats.chi2.cdf(low * M_DATA, M_DATA) == pytest.approx(1e-3 / (2 * math.e), rel=1e-6)
    assert stats.chi2.sf(high * M_DATA, M_DATA) == pytest.approx(1e-3 / (2 * math.e), rel=1e-6)


def test_weights_count():
    problem = Problem(3)
    draws = problem.draws(2)
    draws[1] += 5.0
    heavy = problem.fit(draws, log_weights=torch.tensor([0.0, -40.0]))
    assert heavy.ratio == pytest.approx(float(heavy.chi2[0]) / M_DATA, rel=1e-9)
    assert heavy.verdict == "fits"
    assert problem.fit(draws).verdict == "data not fitted"


def test_a_bad_view_stands_out_and_the_others_do_not():
    problem = Problem(4)
    problem.y.reshape(RANGE.shape)[7] += 4 * SIGMA
    result = problem.fit(problem.draws(8))
    assert result.view_dim == "angle"
    assert int(result.per_view.argmax()) == 7
    assert float(result.per_view[7]) > 1 + 10 * float(result.per_view_sd[7])
    assert float(result.per_view_sd[7]) == pytest.approx(math.sqrt(2 / DETECTOR))
    per_view = float((result.per_view * DETECTOR).sum())
    assert per_view == pytest.approx(float(result.chi2.mean()), rel=1e-9)


def test_structure_along_one_dim_is_named():
    problem = Problem(5)
    wave = SIGMA * np.cos(np.pi * np.arange(VIEWS) / VIEWS)[:, None] * (-1.0) ** np.arange(DETECTOR)
    problem.y += 2 * wave.ravel()
    result = problem.fit(np.tile(problem.truth, (3, 1)))
    assert result.autocorrelation["angle"] > 0.5
    assert result.autocorrelation["detector"] < -0.5
    assert result.coloured == ("angle", "detector")
    assert result.autocorrelation_sd["angle"] == pytest.approx(1 / math.sqrt((VIEWS - 1) * DETECTOR))


def test_residual_is_whitened_and_averaged():
    problem = Problem(6)
    draws = problem.draws(11)
    expected = ((problem.y - problem.matrix @ draws.T.mean(1)) / SIGMA).reshape(RANGE.shape)
    assert torch.allclose(problem.fit(draws).residual, torch.tensor(expected))


def test_data_outside_a_mask_are_not_counted():
    problem = Problem(7)
    problem.matrix[::2], problem.y[::2] = 0.0, 0.0
    result = problem.fit(np.tile(problem.truth, (2, 1)))
    assert result.data == M_DATA // 2
    assert result.expected == M_DATA / 2
    assert result.verdict == "fits"
    assert float(result.per_view_sd[0]) == pytest.approx(math.sqrt(2 / (DETECTOR / 2)))


def test_the_size_of_blocks_does_not_matter(monkeypatch):
    problem = Problem(8)
    draws = problem.draws(7)
    one = problem.fit(draws)
    monkeypatch.setattr(fit, "BLOCK", 2)
    other = problem.fit(draws)
    assert torch.allclose(one.chi2, other.chi2, rtol=1e-12)
    assert torch.allclose(one.residual, other.residual, rtol=1e-12)


def test_draws_that_are_not_numbers_get_no_verdict():
    problem = Problem(9)
    draws = problem.draws(3)
    draws[1] = np.nan
    assert problem.fit(draws).verdict == "undefined"


def counting(seed: int, blank: float) -> fit.DataFit:
    rng = np.random.default_rng(seed)
    matrix = torch.tensor(np.abs(rng.normal(size=(M_DATA, D))) / D)
    truth = torch.tensor(rng.uniform(0, 2, size=D))
    counts = torch.tensor(rng.poisson(blank * torch.exp(-matrix @ truth) + 0.1)).double()
    operator = MatrixOperator(matrix, range=RANGE)
    likelihood = TransmissionLikelihood(operator, counts.reshape(RANGE.shape), blank, 0.1)
    return data_fit(likelihood, Ensemble(truth[None], Space.vector(D)))


@pytest.mark.parametrize("blank", [0.5, 2.0, 10.0, 1e5])
def test_deviance_of_counts_has_the_expected_mean_and_sd_at_any_rate(blank):
    fits = [counting(seed, blank) for seed in range(100)]
    ratios = np.array([f.ratio for f in fits])
    sd = np.mean([f.ratio_sd for f in fits])
    assert fits[0].statistic == "Poisson deviance"
    assert abs(ratios.mean() - 1) < stats.norm.isf(FALSE_ALARM / 16) * sd / math.sqrt(len(fits))
    assert ratios.std(ddof=1) / sd == pytest.approx(1, abs=stats.norm.isf(FALSE_ALARM / 16) / math.sqrt(2 * 99) * 1.5)
    assert sum(f.verdict != "fits" for f in fits) <= stats.binom.isf(FALSE_ALARM / 8, len(fits), 1e-3)


def test_dividing_the_deviance_by_the_number_of_data_would_be_wrong():
    naive = np.mean([float(counting(seed, 0.5).chi2[0]) / M_DATA for seed in range(50)])
    assert naive < 0.9


def test_other_likelihoods_are_judged_in_their_gaussian_form():
    class Wrapped(GaussianLikelihood):
        def gaussian(self):
            return GaussianLikelihood(self.operator, self.y, 2 * self.sigma)

    problem = Problem(10)
    wrapped = Wrapped(problem.likelihood().operator, problem.likelihood().y, SIGMA)
    ensemble = Ensemble(torch.tensor(problem.draws(2)), Space.vector(D))
    assert torch.allclose(data_fit(wrapped, ensemble).chi2 * 4, data_fit(problem.likelihood(), ensemble).chi2)


def test_wrong_spaces_and_rates_are_refused():
    problem = Problem(0)
    with pytest.raises(InputError, match="not on the operator's domain"):
        data_fit(problem.likelihood(), Ensemble(torch.zeros(2, D + 1).double(), Space.vector(D + 1)))
    with pytest.raises(InputError, match="false_alarm is a probability"):
        data_fit(problem.likelihood(), Ensemble(torch.zeros(2, D).double(), Space.vector(D)), 1.0)


def emitting(seed: int, gain: float) -> fit.DataFit:
    rng = np.random.default_rng(seed)
    matrix = torch.tensor(np.abs(rng.normal(size=(M_DATA, D))) / D)
    truth = torch.tensor(rng.uniform(0, 2, size=D))
    counts = torch.tensor(rng.poisson(gain * (matrix @ truth) + 0.1)).double().reshape(RANGE.shape)
    likelihood = PoissonLikelihood(MatrixOperator(matrix, range=RANGE), counts, gain, 0.1)
    return data_fit(likelihood, Ensemble(truth[None], Space.vector(D)))


@pytest.mark.parametrize("gain", [0.5, 20.0])
def test_deviance_of_emitted_counts_has_the_expected_mean_and_sd(gain):
    fits = [emitting(seed, gain) for seed in range(60)]
    ratios, sd = np.array([f.ratio for f in fits]), np.mean([f.ratio_sd for f in fits])
    bound = stats.norm.isf(FALSE_ALARM / 8)
    assert fits[0].statistic == "Poisson deviance"
    assert abs(ratios.mean() - 1) < bound * sd / math.sqrt(60)
    assert ratios.std(ddof=1) / sd == pytest.approx(1, abs=bound / math.sqrt(2 * 59) * 1.5)


def test_draws_with_rates_that_no_object_has_are_judged_at_the_floor():
    counts = torch.tensor([[0.0, 2.0]]).double()
    operator = MatrixOperator(torch.eye(2).double(), range=Space(("view", "detector"), (1, 2)))
    likelihood = PoissonLikelihood(operator, counts, floor=0.05)
    draws = torch.tensor([[-3.0, -1.0], [0.05, 0.05]]).double()
    result = data_fit(likelihood, Ensemble(draws, Space.vector(2)))
    assert float(result.chi2[0]) == pytest.approx(float(result.chi2[1]))
    assert float(result.residual[0, 1]) == pytest.approx((2 - 0.05) / math.sqrt(0.05))


class Sources:
    """Three sources of one truth: numbers, complex numbers and counts."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.truth = torch.tensor(rng.uniform(0.5, 1.5, size=D))

        def matrix(rows: int) -> torch.Tensor:
            return torch.tensor(rng.uniform(size=(rows, D)) / D)

        real = MatrixOperator(matrix(40))
        wave = MatrixOperator(torch.complex(matrix(30), matrix(30)), None, Space(("coil", "k"), (5, 6), {}, "1", True))
        photons = MatrixOperator(matrix(50))
        noise = torch.complex(*torch.tensor(rng.normal(size=(2, 5, 6))))
        self.parts = [
            GaussianLikelihood(real, real.A(self.truth) + 0.1 * torch.tensor(rng.normal(size=40)), 0.1),
            GaussianLikelihood(wave, wave.A(self.truth) + 0.2 * noise, 0.2),
            PoissonLikelihood(photons, torch.tensor(rng.poisson(30 * photons.A(self.truth).numpy())).double(), 30.0),
        ]

    def ensemble(self) -> Ensemble:
        return Ensemble(torch.stack([self.truth, self.truth]), Space.vector(D))


def test_a_stack_is_judged_as_a_whole_and_by_source():
    whole = [data_fit(StackedLikelihood(Sources(seed).parts), Sources(seed).ensemble()) for seed in range(60)]
    ratios, sd = np.array([f.ratio for f in whole]), np.mean([f.ratio_sd for f in whole])
    assert abs(ratios.mean() - 1) < stats.norm.isf(FALSE_ALARM / 2) * sd / math.sqrt(60)
    problem, ensemble = Sources(0), Sources(0).ensemble()
    like = StackedLikelihood(problem.parts)
    one, each = whole[0], fit.source_fits(like, ensemble)
    assert one.statistic == "chi2 + Poisson deviance"
    assert [f.statistic for f in each] == ["chi2", "chi2", "Poisson deviance"]
    assert one.data == sum(f.data for f in each) == 40 + 60 + 50
    assert torch.allclose(one.chi2, sum(f.chi2 for f in each))
    assert one.expected == pytest.approx(sum(f.expected for f in each))
    assert one.variance == pytest.approx(sum(f.variance for f in each))
    assert torch.allclose(one.residual, like.operator.join([f.residual for f in each]))
    assert one.signal_freedom is None
    assert {f.false_alarm for f in each} == {1e-3 / 3}
    assert one.verdict == "fits"


def test_a_bad_source_is_named_by_its_own_fit():
    problem = Sources(1)
    problem.parts[1] = GaussianLikelihood(problem.parts[1].operator, problem.parts[1].y + 0.4, 0.2)
    verdicts = [f.verdict for f in fit.source_fits(StackedLikelihood(problem.parts), problem.ensemble())]
    assert verdicts == ["fits", "data not fitted", "fits"]


def test_a_stack_of_gaussians_is_one_gaussian():
    problem, draws = Problem(11), Problem(11).draws(6)
    like, ensemble = problem.likelihood(), Ensemble(torch.tensor(draws), Space.vector(D))
    rows = like.operator.matrix.split(40)
    values = like.y.flatten().split(40)
    parts = [GaussianLikelihood(MatrixOperator(row), y, SIGMA) for row, y in zip(rows, values, strict=True)]
    one, stacked = data_fit(like, ensemble), data_fit(StackedLikelihood(parts), ensemble)
    assert torch.allclose(one.chi2, stacked.chi2)
    assert stacked.signal_freedom == pytest.approx(one.signal_freedom)
