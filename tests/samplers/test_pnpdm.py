"""PnP-DM: the law of its Gibbs chain at a fixed coupling in closed form, and the posterior as the coupling shrinks."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import recon
from recon.draws import Draws
from recon.errors import InputError
from recon.likelihoods import GaussianLikelihood
from recon.operators import CG, MatrixOperator
from recon.priors import GaussianMixturePrior, GaussianPrior
from recon.samplers import DDIM, Ancestral, PnPDM, Renoise, SASolver, State
from recon.samplers.inner import Inner
from recon.samplers.transitions import Transition
from recon.schedules import Karras
from recon.selftest import check_resume
from tests.bounds import normal_bound
from tests.samplers.probing import Probes, affine, end_law, stationary_law
from tests.samplers.problems import RATIOS, random_problem, scalars, truth

TIGHT = CG(iterations=40, tolerance=1e-14)


@dataclasses.dataclass(frozen=True)
class Exact(PnPDM):
    """The prior's step in closed form: N(x; (z / rho^2) / q, 1 / q), q = 1 + 1 / rho^2, for the prior N(0, 1)."""

    def prior_step(self, posterior, state, found, k, draws):
        q = 1 + self.rho(posterior, state, k) ** -2
        xi = draws.normal(k * self.keys(), posterior.prior.latent.shape, dtype=torch.float64)
        return State((q - 1) / q * found + q**-0.5 * xi, state.log_w, state.aux)


@pytest.mark.parametrize("rho", [0.1, 0.5, 2.0])
def test_the_bias_of_a_finite_coupling_is_that_of_wider_noise(rho: float) -> None:
    """x: the posterior of noise variance sigma_y^2 + rho^2; exactly, with an exact prior step."""
    posterior = scalars(bottom=1e-3)
    mean, covariance = stationary_law(posterior, Exact(rho_max=rho, rho_min=rho, cg=TIGHT), 0)
    r = 1 / (1 / RATIOS + rho**2)
    torch.testing.assert_close(mean, 3 * r / (1 + r), rtol=1e-9, atol=0)
    torch.testing.assert_close(covariance, torch.diag(1 / (1 + r)), rtol=1e-9, atol=1e-12)


def test_the_bias_of_a_matrix_is_that_of_wider_noise_too() -> None:
    """rho^2 A A^T is added to the noise covariance; the data's side has a prior widened by rho^2."""
    posterior, rho = random_problem(), 0.4
    prior, like = posterior.prior, posterior.likelihood.gaussian()
    assert isinstance(prior, GaussianPrior)
    sampler = PnPDM(rho_max=rho, rho_min=rho, prior_steps=150, solver=SASolver(), cg=TIGHT)
    mean, covariance = stationary_law(posterior, sampler, 0)
    matrix = like.operator.matrix
    noise = 0.09 * torch.eye(2).double() + rho**2 * matrix @ matrix.T
    wider = recon.Posterior(prior, GaussianLikelihood.correlated(MatrixOperator(matrix), like.y, noise))
    expected = truth(wider)
    # The solver's error: second order, 150 steps of 6 % (0.06^2 = 0.4 %).
    assert float(torch.linalg.norm(covariance - expected[1]) / torch.linalg.norm(expected[1])) < 0.004
    assert float(((mean - expected[0]) / expected[1].diagonal().sqrt()).abs().max()) < 0.004

    def data_side(_, draws):
        root = torch.linalg.cholesky(covariance)
        x = mean + draws.normal(99, (3,)) @ root.T
        state = State(x, torch.zeros(len(x)), {"rho_min": torch.full((len(x),), rho).double()})
        return sampler.data_step(posterior, state, 0, draws)

    c, _, kick = affine(data_side, 3)
    broad = GaussianPrior(prior.mean, prior.covariance() + rho**2 * torch.eye(3).double())
    expected = truth(recon.Posterior(broad, like))
    assert float(torch.linalg.norm(kick @ kick.T - expected[1]) / torch.linalg.norm(expected[1])) < 0.004
    assert float(((c - expected[0]) / expected[1].diagonal().sqrt()).abs().max()) < 0.004


@pytest.mark.parametrize(("solver", "order"), [(Ancestral(), 1), (SASolver(), 2)])
def test_the_prior_step_converges_at_the_order_of_its_solver(solver: Transition, order: int) -> None:
    """To N(z / (1 + rho^2), rho^2 / (1 + rho^2)), the law of x given u, from exactly rho."""
    posterior, rho, found = scalars(bottom=1e-3), 0.8, torch.full((4,), 1.5).double()
    errors = []
    for n in (25, 50, 100):
        sampler = PnPDM(rho_max=rho, rho_min=rho, prior_steps=n, solver=solver)

        def step(_, draws, sampler=sampler):
            state = sampler.init(posterior, Draws(0, range(len(draws))))
            return sampler.prior_step(posterior, state, found.expand(len(draws), 4), 0, draws).z

        mean, _, kick = affine(step, 4)
        variance = float((kick @ kick.T)[0, 0])
        errors.append((abs(variance / (rho**2 / (1 + rho**2)) - 1), abs(float(mean[0]) * (1 + rho**2) / 1.5 - 1)))
    rates = [torch.log2(torch.tensor(a[0] / b[0])) for a, b in zip(errors[:-1], errors[1:], strict=True)]
    print(f"{solver}: errors of variance and mean {errors}")
    assert float(rates[-1]) > order - 0.3
    assert errors[-1][0] < (0.06 if order == 1 else 0.003)
    assert errors[-1][1] < 1e-3


def test_it_goes_to_the_posterior_as_the_coupling_shrinks() -> None:
    """Annealed from the prior's largest noise: what is left is rho_min's widening and the solver's error."""
    posterior = random_problem()
    expected = truth(posterior)
    off, wide = [], []
    for rho, steps in ((0.4, 30), (0.15, 150)):
        mean, covariance = end_law(posterior, PnPDM(steps=steps, rho_min=rho, rho_max=3.0, prior_steps=12, cg=TIGHT))
        off.append(float(((mean - expected[0]) / expected[1].diagonal().sqrt()).abs().max()))
        wide.append(float(torch.linalg.norm(covariance - expected[1]) / torch.linalg.norm(expected[1])))
    print("PnPDM at rho 0.4 and 0.15: mean off by", off, "posterior sd, covariance by", wide)
    assert off[1] < off[0] / 2 and wide[1] < wide[0] / 2
    assert off[1] < 0.1 and wide[1] < 0.1


def test_rho_falls_to_the_scale_of_the_data() -> None:
    posterior, sampler = random_problem(), PnPDM(steps=40)
    state = sampler.init(posterior, Draws(0, range(3)))
    rhos = [sampler.rho(posterior, state, k) for k in range(40)]
    norm = torch.linalg.matrix_norm(posterior.likelihood.gaussian().operator.matrix, 2)
    assert rhos[0] == posterior.prior.schedule.sigma_max
    assert rhos[-1] == pytest.approx(0.3 / 3 / float(norm), rel=1e-6)
    assert rhos[29] > rhos[30] == rhos[39]
    assert PnPDM(steps=40, rho_max=4.0, rho_min=0.5, decay=0.5).rho(
        posterior, dataclasses.replace(state, aux={"rho_min": torch.full((3,), 0.5)}), 2
    ) == pytest.approx(1.0)


def test_it_finds_the_weights_of_two_modes() -> None:
    """Two modes that the data do not tell apart but by weight: half the noise level between them and a rho that passes it."""
    means = torch.tensor([[-1.5], [1.5]], dtype=torch.float64)
    prior = GaussianMixturePrior(means, torch.full((1,), 0.25).double(), torch.tensor([0.3, 0.7]).double())
    like = GaussianLikelihood(MatrixOperator(torch.ones(1, 1, dtype=torch.float64)), torch.tensor([-0.2]).double(), 1.0)
    posterior = recon.Posterior(prior, like)
    exact = posterior.exact()
    assert isinstance(exact, GaussianMixturePrior)
    x = torch.linspace(-8, 8, 8001, dtype=torch.float64)[:, None]
    density = exact.log_prob(x).exp()
    right = float(density[x[:, 0] > 0].sum() / density.sum())
    n = 1500
    draws = recon.sample(posterior, PnPDM(steps=50, rho_min=0.25, rho_max=3.0, prior_steps=12), draws=n)
    share = float((draws.x > 0).double().mean())
    # rho widens the data's variance by 6 %, which moves log-odds by less than 0.03 here: 0.01 of the share.
    assert abs(share - right) < normal_bound() * (right * (1 - right) / n) ** 0.5 + 0.01
    assert 0.2 < right < 0.8


@pytest.mark.parametrize("sampler", [PnPDM(steps=6), PnPDM(steps=6, inner="langevin", langevin=Inner(3, 0.2, True))])
def test_a_draw_alone_is_the_draw_in_company(sampler: PnPDM) -> None:
    posterior = scalars()
    together, alone = (recon.sample(posterior, sampler, draws=5, seed=2, block=b).x for b in (5, 1))
    assert torch.equal(together, alone)
    assert float((together[0] - together[1]).abs().min()) > 0


def test_a_stop_leaves_no_trace() -> None:
    assert check_resume(PnPDM(steps=6, inner="langevin", langevin=Inner(3))) == 3


def test_no_number_of_the_noise_is_used_twice() -> None:
    """Not within a step, and not by the next one."""
    posterior, sampler = random_problem(), PnPDM(steps=6)
    state, asked = sampler.init(posterior, Draws(0, [0])), Probes(1, 1)
    for k in range(3):
        sampler.step(posterior, state, k, asked)  # type: ignore[arg-type]


def test_it_refuses_what_it_cannot_do() -> None:
    posterior = scalars()
    with pytest.raises(InputError, match=r"rho_min must lie .* 0\.1 to 100; got 0\.01"):
        PnPDM(rho_min=0.01).check(posterior)
    for solver in (DDIM(), Renoise()):
        with pytest.raises(InputError, match="Use SASolver"):
            PnPDM(solver=solver).check(posterior)
    with pytest.raises(InputError, match="0 < decay < 1"):
        PnPDM(decay=1.0).check(posterior)
    ones = torch.ones(4, dtype=torch.float64)
    counts = recon.likelihoods.PoissonLikelihood(MatrixOperator(torch.eye(4, dtype=torch.float64)), ones, 5.0)
    with pytest.raises(InputError, match="give rho_min"):
        PnPDM().check(recon.Posterior(posterior.prior, counts))
    PnPDM(rho_min=0.2).check(recon.Posterior(posterior.prior, counts))
    assert Karras(3.0) == PnPDM().grid
