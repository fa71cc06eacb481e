"""Volumes from a prior of slices: the convex problem against a solver of another kind, the exact cases, and the refusals."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from scipy.optimize import lsq_linear

import recon
from recon.checks import check_batch
from recon.draws import Draws
from recon.errors import InputError
from recon.likelihoods import GaussianLikelihood, PoissonLikelihood
from recon.operators import CG, AxisDifference, CartesianMRI, MatrixOperator, ParallelBeam, SliceStack, complex_grid
from recon.posterior import dense
from recon.priors import GaussianPrior
from recon.priors.base import Card, Prior
from recon.priors.lifting import SlicesPrior
from recon.samplers import DDS, MMPS, Ancestral, Coupling, DiffPIR, DiffusionMBIR, State, typical_weight, ztv
from recon.samplers.volumes.ztv import DataTerm, Volume, conjugate, slab_of
from recon.schedules import LogLinear, Schedule
from recon.selftest import check_resume
from recon.space import Space
from tests import zoo
from tests.samplers.affine import law

LEVELS = Schedule(1e-3, 200.0)
UNEVEN = np.array([0.0, 1.0, 1.5, 3.0, 4.0, 6.0, 6.5, 8.0])


def volumes(shape=(3, 2, 2), z=None, unit="1"):
    coords = {"z": np.arange(shape[0]) * 2.0 if z is None else z[: shape[0]]}
    return Space(("z", "y", "x"), shape, coords, unit)


def image_of(space):
    return Space(space.dims[1:], space.shape[1:], {}, space.unit)


def stack(space, rows, seed=0, same=False):
    """A matrix of its own (or the same) for every slice."""
    image = image_of(space)
    made = [MatrixOperator(zoo.normal(rows, image.size, step=50 * seed + i), image) for i in range(space.shape[0])]
    return SliceStack(made[0] if same else made, space)


class White(Prior):
    """Independent N(mean, spread^2) latents, decoded with a shift and a scale; known through the denoiser alone."""

    mean, spread = 0.4, 0.8

    def predict(self, z, sigma):
        level = sigma.reshape(-1, *[1] * (z.ndim - 1)).square()
        return self.mean + (z - self.mean) * self.spread**2 / (self.spread**2 + level)

    @property
    def dtype(self):
        return torch.float64


def white(space, shift=1.5, scale=2.5):
    return SlicesPrior(White(image_of(space), LEVELS, Card("white"), shift=shift, scale=scale), space)


def gaussian(space, seed=0):
    """Slices that are draws of one correlated Gaussian, lifted; and the same law over volumes, dense."""
    image = image_of(space)
    factor = zoo.normal(image.size, image.size, step=90 + seed)
    covariance = factor @ factor.T / image.size + 0.2 * torch.eye(image.size, dtype=torch.float64)
    mean = zoo.normal(image.size, step=91 + seed)
    n = space.shape[0]
    whole = GaussianPrior(mean.repeat(n), torch.block_diag(*[covariance] * n), space, LEVELS)
    return SlicesPrior(GaussianPrior(mean, covariance, image, LEVELS), space), whole


def problem(space=None, coupled=False, sigma=0.5):
    """White slices, each seen through its own matrix; float64."""
    space = space or volumes()
    operator = stack(space, 3)
    y = 2 * zoo.normal(*operator.range.shape, step=80)
    return recon.Posterior(white(space), GaussianLikelihood(operator, y, sigma))


# --- The convex problem ----------------------------------------------------------------------------------------------------


def convex(operator, y, sigma, weight, periodic=False):
    """``argmin 1/2 |(A x - y)/sigma|^2 + weight |D x|_1`` through its dual, a least squares problem with bounds."""
    A = dense(operator).double().numpy() / sigma
    D = dense(AxisDifference(operator.domain, periodic=periodic)).double().numpy()
    D = D[np.abs(D).sum(1) > 0]
    lower = np.linalg.cholesky(A.T @ A)
    right = np.linalg.solve(lower, A.T @ (y.flatten().numpy() / sigma))
    # min_u 1/2 |L^-1 (A^T y - D^T u)|^2 with |u| <= weight; x = (A^T A)^-1 (A^T y - D^T u).
    left = np.linalg.solve(lower, D.T)
    u = lsq_linear(left, right, (-weight, weight), method="bvls", tol=1e-14).x
    return torch.from_numpy(np.linalg.solve(lower.T, right - left @ u)).reshape(operator.domain.shape)


def lines(y, space, sigma, weight, periodic):
    """The same for ``A = 1``, line by line along z."""
    line = Space(("z", "y", "x"), (space.shape[0], 1, 1), {"z": space.coords["z"]})
    one = MatrixOperator(torch.eye(line.size).double(), line, line)
    flat = y.reshape(len(y), -1)
    found = [convex(one, values.reshape(line.shape), sigma, weight, periodic) for values in flat.T]
    return torch.stack(found, -1).reshape(space.shape)


def objective(operator, x, y, sigma, weight, periodic):
    misfit = (operator.A(x) - y) / sigma
    return float(
        0.5 * misfit.square().sum() + weight * AxisDifference(operator.domain, periodic=periodic).A(x).abs().sum()
    )


@pytest.mark.parametrize(("operator", "periodic"), [("denoising", False), ("slices", True), ("volume", False)])
def test_admm_finds_the_minimum_of_the_convex_problem(operator, periodic):
    """8 x 8 x 8 with uneven slices, at a weight that ties many neighbours and leaves others apart."""
    shape = (8, 8, 8) if operator == "denoising" else (5, 2, 2)
    space = volumes(shape, UNEVEN)
    if operator == "denoising":
        made = SliceStack(MatrixOperator(torch.eye(64).double(), image_of(space)), space)
    else:
        made = (
            stack(space, 8, same=True) if operator == "slices" else MatrixOperator(zoo.normal(30, 20, step=70), space)
        )
    sigma, weight = 0.5, 2.0
    y = made.A(zoo.normal(*shape, step=71)) + sigma * zoo.normal(*made.range.shape, step=72)
    denoising = operator == "denoising"
    best = lines(y, space, sigma, weight, periodic) if denoising else convex(made, y, sigma, weight, periodic)
    penalty = {"denoising": 0.5, "slices": 2.0, "volume": 1.0}[operator]
    coupling = Coupling(weight, periodic=periodic, penalty=penalty, iterations=80 if denoising else 60)
    x = ztv(made, y[None], sigma, coupling, CG(12, 1e-6))[0]
    found, value = (objective(made, one, y, sigma, weight, periodic) for one in (x, best))
    slopes = AxisDifference(space, periodic=periodic).A(best)
    tied = float((slopes.abs() < 1e-6).double().mean())
    print(
        f"{operator}: objective {found:.9f} against {value:.9f}, x off by {float((x - best).abs().max()):.1e}, tied {tied:.2f}"
    )
    assert 0.05 < tied < 0.98
    assert abs(found - value) < 1e-6 * value
    assert float((x - best).abs().max()) < 1e-4


def test_conjugate_directions_are_right_beyond_the_first():
    """After as many iterations as unknowns the answer is the dense one; one iteration is steepest descent."""
    K = zoo.normal(9, 6, step=60)
    K = K.T @ K + 0.3 * torch.eye(6, dtype=torch.float64)
    r = zoo.normal(3, 6, step=61)

    def inner(a, b):
        return (a * b).sum(1, keepdim=True)

    full = conjugate(lambda u: u @ K, r, CG(6, 0.0), inner)
    torch.testing.assert_close(full, torch.linalg.solve(K, r.T).T, rtol=0, atol=1e-9)
    one = conjugate(lambda u: u @ K, r, CG(1, 0.0), inner)
    torch.testing.assert_close(one, inner(r, r) / inner(r, r @ K) * r, rtol=1e-12, atol=0)


def test_complex_data_of_several_coils_make_a_symmetric_system():
    """Multi-coil k-space slice by slice against the dense normal equations of the problem without coupling."""
    domain = complex_grid((2, 4, 3), 1e-3)
    masks = zoo.normal(2, 4, 3, step=30) > 0
    image = complex_grid((4, 3), 1e-3)
    maps = zoo.coil_maps(2, 2, 4, 3, dtype=torch.float64)
    scans = [CartesianMRI(image, maps[:, k], masks[k]) for k in range(2)]
    operator = SliceStack(scans, domain)
    y = operator.A(zoo.normal(1, *domain.shape, step=31))
    data = DataTerm(operator, y[0], torch.tensor(4.0).double(), lambda v: v, lambda u: u, lambda n: None)
    coupling = Coupling(0.0)
    volume = Volume(data, coupling, 0.0, slab_of(operator, coupling, domain))
    anchor = zoo.normal(1, *domain.shape, step=32)
    found, _ = volume.solve(
        anchor, 0.7, {}, CG(100, 1e-13)
    )  # without a scale: by the iterations of this package's volumes
    A = zoo.dense(operator)
    flat = torch.view_as_real(y).flatten()
    K = 4.0 * A.T @ A + 0.7 * torch.eye(A.shape[1], dtype=torch.float64)
    exact = torch.linalg.solve(K, 4.0 * A.T @ flat + 0.7 * anchor.flatten())
    torch.testing.assert_close(found.flatten(), exact, rtol=0, atol=1e-9)
    closed, _ = volume.solve(anchor, 0.7, {}, CG(60, 1e-12), scale=1.0)  # by the operators' own solve
    torch.testing.assert_close(closed, found, rtol=0, atol=1e-9)


@pytest.mark.parametrize("pull", [0.0, 0.6])
@pytest.mark.parametrize("kind", ["stack", "beam"])
def test_slices_without_coupling_know_nothing_of_each_other(kind, pull):
    """Bit for bit and before CG has converged: data of one slice change no other, and each is what it is alone."""
    space = Space.grid((3, 6, 5), 1e-3, "1/m") if kind == "beam" else volumes((3, 2, 3))
    operator = ParallelBeam.half_turn((3, 6, 5), 1e-3, 4).double() if kind == "beam" else stack(space, 4, same=True)
    coupling = Coupling(0.0)

    def fitted(A, domain, y, v):
        term = DataTerm(A, y, torch.tensor(9.0).double(), lambda v: v, lambda u: u, lambda n: None)
        return Volume(term, coupling, 0.0, slab_of(A, coupling, domain)).solve(v, pull, {}, CG(2, 0.0), 1.0)[0]

    y, v = zoo.normal(*operator.range.shape, step=33), zoo.normal(2, *space.shape, step=34)
    whole = fitted(operator, space, y, v)
    other = y.clone()
    other[0] *= 1e3
    assert torch.equal(fitted(operator, space, other, v)[:, 1:], whole[:, 1:])
    part = Space(space.dims, (1, *space.shape[1:]), {**space.coords, "z": space.coords["z"][1:2]}, space.unit)
    alone = ParallelBeam(part, operator.geometry).double() if kind == "beam" else SliceStack(operator.slice(1), part)
    # A library's matrix product may round otherwise in a smaller batch; the projector does not.
    rounding = 0.0 if kind == "beam" else 1e-12
    torch.testing.assert_close(fitted(alone, part, y[1:2], v[:, 1:2])[:, 0], whole[:, 1], rtol=0, atol=rounding)


def test_as_the_weight_goes_to_zero_the_slices_part():
    space = volumes((3, 1, 2), UNEVEN)
    operator = stack(space, 3, same=True)
    y = zoo.normal(1, *operator.range.shape, step=35)
    apart = ztv(operator, y, 0.5, Coupling(0.0), CG(20, 1e-13))
    plain = torch.linalg.lstsq(dense(operator), y.flatten()).solution
    torch.testing.assert_close(apart.flatten(), plain, rtol=0, atol=1e-9)
    gaps = []
    for weight in (1e-2, 1e-4):
        coupling = Coupling(weight, penalty=0.1 / weight**2, iterations=20)
        gaps.append(float((ztv(operator, y, 0.5, coupling, CG(7, 1e-12)) - apart).norm()))
    assert 0.009 < gaps[1] / gaps[0] < 0.011  # of first order in the weight


def test_a_finer_sampling_of_one_slope_has_the_same_weight_per_pair():
    """Differences are divided by distances in metres: a ramp of slope 3 per metre costs the same per pair at any spacing."""
    for step in (0.5e-3, 2e-3):
        space = volumes((4, 1, 1), step * np.arange(4))
        ramp = (3.0 * torch.from_numpy(space.coords["z"])).reshape(1, 4, 1, 1)
        assert abs(typical_weight(ramp, space) - 1 / 3) < 1e-12
        torch.testing.assert_close(AxisDifference(space).A(ramp).flatten(), torch.tensor([3.0, 3.0, 3.0, 0.0]).double())


@pytest.mark.parametrize("step", [1e-3, 2e-3])
def test_one_weight_says_the_same_of_one_field_at_any_spacing(step):
    """Two plateaus, 0 and h, each 4 mm thick, seen slice by slice: they move towards each other by ``w sigma^2 / 4 mm``.

    Pairs cost ``w |dx| / dz`` and there are ``1 / dz`` data per metre, so thinner slices change neither.
    """
    thick, h, sigma, weight = 4e-3, 3.0, 0.2, 0.02
    n = round(thick / step)
    space = volumes((2 * n, 1, 2), step * np.arange(2 * n))
    one = SliceStack(MatrixOperator(torch.eye(2).double(), image_of(space)), space)
    y = torch.cat([torch.zeros(n), h * torch.ones(n)]).double()[None, :, None].expand(1, 2 * n, 2)
    found = ztv(one, y, sigma, Coupling(weight, iterations=40), CG(8, 1e-6))[0, :, 0]
    moved = weight * sigma**2 / thick
    assert 0.05 * h < moved < 0.2 * h
    expected = moved + (h - 2 * moved) * (y[0] > 0).double()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * moved)


# --- What is exact -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.05, 1.0, 30.0])
def test_the_data_step_with_matched_weights_is_the_posterior_mean(sigma):
    """``D' = E[v | z, y]`` for white slices, one matrix a slice: z is one more measurement of v, with noise sigma."""
    posterior = problem()
    prior, like, d = posterior.prior, posterior.likelihood.gaussian(), posterior.space.size
    sampler = DDS(spread=White.spread, coupling=Coupling(0.0), cg=CG(60, 1e-14))
    z = sigma * zoo.normal(2, *posterior.space.shape, step=36)
    state = State(z, torch.zeros(2).double(), {})
    found, _ = sampler.fitted(posterior, prior.denoise(z, sigma), sampler.pull(posterior, sigma), state)
    A, s, b = dense(like.operator), float(prior.scale), float(prior.shift)
    ones = torch.ones(d, dtype=torch.float64)
    K = s**2 * A.T @ A / like.sigma**2 + (1 / White.spread**2 + 1 / sigma**2) * torch.eye(d, dtype=torch.float64)
    right = s * A.T @ (like.y.flatten() - A @ (b * ones)) / like.sigma**2 + White.mean / White.spread**2
    exact = torch.linalg.solve(K, (right + z.flatten(1) / sigma**2).T).T
    torch.testing.assert_close(found.flatten(1), exact, rtol=0, atol=1e-10)


def whole_posterior(posterior, whole):
    return recon.Posterior(whole, posterior.likelihood)


def distances(found, exact):
    """Of the mean, in posterior standard deviations, and of the covariance, relative."""
    (mean, covariance), truth = found, exact.covariance()
    off = (mean - exact.mean) / truth.diagonal().sqrt()
    return float(off.abs().max()), float(torch.linalg.norm(covariance - truth) / torch.linalg.norm(truth))


def test_dds_draws_from_the_posterior_of_white_slices_as_steps_grow():
    """With the guided noise and no renewal: the probability flow, whose error halves when steps double."""
    space = volumes((2, 1, 2))
    operator = stack(space, 2)
    prior = SlicesPrior(
        GaussianPrior(torch.tensor([0.3, -1.0]).double(), 0.64 * torch.ones(2).double(), image_of(space), LEVELS), space
    )
    posterior = recon.Posterior(prior, GaussianLikelihood(operator, 2 * zoo.normal(2, 2, step=81), 0.5))
    whole = GaussianPrior(torch.tensor([0.3, -1.0] * 2).double(), 0.64 * torch.ones(4).double(), space, LEVELS)
    exact = whole_posterior(posterior, whole).exact()
    sampler = DDS(grid=LogLinear(), eta=0.0, noise="guided", coupling=Coupling(0.0), cg=CG(20, 1e-14))
    errors = [distances(law(dataclasses.replace(sampler, steps=n), posterior), exact) for n in (40, 80)]
    published = distances(law(dataclasses.replace(sampler, steps=80, noise="prior"), posterior), exact)
    said = ", ".join(f"mean {mean:.4f} covariance {covariance:.4f}" for mean, covariance in (*errors, published))
    print(f"DDS in 40 and 80 steps, and with the noise as published: {said}")
    assert errors[1][0] < 0.01
    assert 0.4 < errors[1][1] / errors[0][1] < 0.6
    assert published[1] > 3 * errors[1][1]  # a heuristic, and measured to be one


@pytest.mark.parametrize("coupled", [False, True])
def test_mmps_draws_volumes_from_the_exact_posterior(coupled):
    """Correlated Gaussian slices under data slice by slice, and under data of the whole volume (which tie the slices)."""
    space = volumes((3, 1, 2))
    prior, whole = gaussian(space)
    operator = MatrixOperator(zoo.normal(4, 6, step=82), space) if coupled else stack(space, 2)
    posterior = recon.Posterior(prior, GaussianLikelihood(operator, zoo.normal(*operator.range.shape, step=83), 0.4))
    exact = whole_posterior(posterior, whole).exact()
    ties = exact.covariance()[:2, 2:].abs().max()
    assert (float(ties) > 0.01) == coupled
    sampler = MMPS(steps=60, grid=LogLinear(), transition=Ancestral(), cg=CG(6, 1e-12))
    mean, covariance = distances(law(sampler, posterior), exact)
    step = float(np.log(LEVELS.sigma_max / LEVELS.sigma_min)) / 59
    print(f"MMPS on slices: mean {mean:.4f}, covariance {covariance:.4f}, one step of log sigma {step:.4f}")
    assert mean < 0.01
    assert covariance < 1.2 * step  # what an ancestral walk loses (``transitions``)


def test_diffpir_on_a_volume_is_diffpir_on_its_slices():
    """Data and prior by slices: the volume's law is that of independent slices, each as it is drawn alone."""
    space = volumes((2, 1, 2))
    prior, _ = gaussian(space)
    operator = stack(space, 2)
    y, sampler = zoo.normal(2, 2, step=84), DiffPIR(steps=12, grid=LogLinear(), cg=CG(30, 1e-13))
    mean, covariance = law(sampler, recon.Posterior(prior, GaussianLikelihood(operator, y, 0.4)))
    for k in range(2):
        part = slice(2 * k, 2 * k + 2)
        alone = recon.Posterior(prior.prior, GaussianLikelihood(operator.slice(k), y[k], 0.4))
        own = law(sampler, alone)
        torch.testing.assert_close(mean[part], own[0], rtol=0, atol=1e-9)
        torch.testing.assert_close(covariance[part, part], own[1], rtol=0, atol=1e-9)
    assert float(covariance[:2, 2:].abs().max()) < 1e-12


# --- The contract of a sampler -----------------------------------------------------------------------------------------------

TIED = Coupling(0.8)
SAMPLERS = [
    DDS(steps=6, coupling=TIED, spread=0.8),
    DDS(steps=6, coupling=dataclasses.replace(TIED, iterations=2, periodic=True), strength=0.0),
    DiffusionMBIR(steps=6, coupling=TIED),
]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=["dds", "krylov", "mbir"])
def test_the_duals_are_in_the_state_and_draws_do_not_meet(sampler):
    posterior = problem()
    assert check_resume(sampler, posterior) == 3
    state = sampler.init(posterior, Draws(0, range(4)))
    for k in range(3):  # the duals are zero at first
        state = sampler.step(posterior, state, k, Draws(0, range(4)))
    assert set(state.aux) == {"Z", "U"} and float(state.aux["U"].abs().max()) > 0
    assert float(state.aux["Z"][:, -1].abs().max()) == 0 or sampler.coupling.periodic  # nothing through the ends
    moved = []
    for members in ([0, 1, 2, 3], [2]):
        part = State(state.z[members], state.log_w[members], {n: a[members] for n, a in state.aux.items()})
        moved.append(sampler.step(posterior, part, 3, Draws(0, members)))
    torch.testing.assert_close(moved[0].z[2], moved[1].z[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(moved[0].aux["U"][2], moved[1].aux["U"][0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("sampler", [SAMPLERS[0], SAMPLERS[2]], ids=["dds", "mbir"])
def test_a_step_goes_on_from_the_duals_of_the_last(sampler):
    posterior = problem()
    z, weights = zoo.normal(1, 3, 2, 2, step=40), torch.zeros(1).double()
    kept = {name: zoo.normal(1, 3, 2, 2, step=41 + i) for i, name in enumerate("ZU")}
    after = [
        sampler.step(posterior, State(z, weights, {n: scale * v for n, v in kept.items()}), 2, Draws(0, [0])).z
        for scale in (1.0, 0.0)
    ]
    assert float((after[0] - after[1]).abs().max()) > 1e-3


@pytest.mark.parametrize("noise", ["prior", "guided"])
def test_the_noise_of_a_step_of_dds(noise):
    """z' = D' + sigma' (sqrt(1 - eta^2) e + eta xi), with e of the denoised slices or of the state given the data."""
    posterior, draws = problem(), Draws(0, [0, 5])
    sampler = DDS(steps=6, coupling=Coupling(0.0), spread=0.8, eta=0.6, noise=noise)
    state = State(3 * zoo.normal(2, 3, 2, 2, step=43), torch.zeros(2).double(), {})
    sigma, after = sampler.levels(posterior)[2:4]
    denoised = posterior.prior.denoise(state.z, sigma)
    guided, _ = sampler.fitted(posterior, denoised, sampler.pull(posterior, sigma), state)
    e = (state.z - (denoised if noise == "prior" else guided)) / sigma
    xi = draws.normal(2, (3, 2, 2), "step", dtype=torch.float64)
    expected = guided + after * (0.8 * e + 0.6 * xi)
    torch.testing.assert_close(sampler.step(posterior, state, 2, draws).z, expected, rtol=1e-12, atol=1e-12)
    last = sampler.step(posterior, state, 5, draws).z  # ends at D'
    denoised = posterior.prior.denoise(state.z, sampler.levels(posterior)[5])
    fitted, _ = sampler.fitted(posterior, denoised, sampler.pull(posterior, sampler.levels(posterior)[5]), state)
    assert torch.equal(last, fitted)


def test_the_coupling_smooths_along_z_and_costs_what_it_says():
    space = volumes((6, 2, 2))
    posterior = problem(space)
    rough = {}
    for weight in (0.0, 30.0):
        sampler = DDS(steps=10, coupling=Coupling(weight, penalty=1.0), spread=0.8, cg=CG(5, 0.0), strength=0.0)
        run = recon.sample(posterior, sampler, draws=2)
        rough[weight] = float(AxisDifference(space).A(run.x).abs().mean())
        cost = {name: run.info["cost"][name] for name in ("denoiser", "vjp", "forward", "adjoint")}
        assert cost == {"denoiser": 20, "vjp": 0, "forward": 2 * 10 * 6, "adjoint": 2 * 10 * 6}
    assert rough[30.0] < 0.5 * rough[0.0]
    run = recon.sample(posterior, DiffusionMBIR(steps=10, coupling=TIED), draws=1)
    assert run.info["cost"]["denoiser"] == 19 and run.info["cost"]["forward"] == 20


def test_the_corrector_takes_a_step_of_each_volume():
    """d = 2 (snr |xi| / |score|)^2 with the norms of one draw; nothing else moves in a step without data and predictor."""
    posterior = problem()
    sampler, z = DiffusionMBIR(steps=5, snr=0.3, coupling=Coupling(0.0)), zoo.normal(2, 3, 2, 2, step=37)
    xi, sigma = zoo.normal(2, 3, 2, 2, step=38), 0.7
    moved = sampler._corrected(posterior, z, sigma, xi, sampler.problem(posterior))
    for i in range(2):
        score = (posterior.prior.denoise(z[i : i + 1], sigma)[0] - z[i]) / sigma**2
        d = 2 * (0.3 * xi[i].norm() / score.norm()) ** 2
        torch.testing.assert_close(moved[i], z[i] + d * score + (2 * d).sqrt() * xi[i], rtol=1e-10, atol=0)


# --- What is refused ---------------------------------------------------------------------------------------------------------


def refused(sampler, posterior, text):
    with pytest.raises(InputError, match=text):
        recon.sample(posterior, sampler, draws=1)
    assert posterior.evaluations["denoiser"] == 0


def test_what_cannot_be_is_refused_before_any_work():
    posterior, space = problem(), volumes()
    refused(DDS(spread=0.8), posterior, r"DDS needs coupling\.weight for .*one over the mean \|dx/dz\|")
    refused(DDS(coupling=Coupling(1.0, axis="time")), posterior, "couple slices across 'time', and .* has no such axis")
    refused(DDS(coupling=TIED), posterior, "DDS needs the standard deviation of the latent values")
    refused(DDS(coupling=TIED, eta=1.5, spread=1.0), posterior, "0 <= eta <= 1")
    refused(DiffusionMBIR(coupling=TIED, snr=-1.0), posterior, "snr >= 0")
    for wrong in ({"weight": -1.0}, {"penalty": 0.0}, {"iterations": 0}):
        with pytest.raises(InputError, match="a coupling needs weight >= 0"):
            Coupling(**wrong)
    placeless = Space(space.dims, space.shape, {}, "1")
    operator = stack(space, 3)
    bare = SliceStack([operator.slice(k) for k in range(3)], placeless)
    like = GaussianLikelihood(bare, torch.zeros(bare.range.shape).double(), 1.0)
    nowhere = recon.Posterior(white(placeless), like)
    refused(DDS(coupling=TIED, spread=1.0), nowhere, "has no coordinates there; give the space coords")
    counts = PoissonLikelihood(operator, torch.ones(operator.range.shape).double())
    refused(DDS(coupling=TIED, spread=1.0), recon.Posterior(white(space), counts), "needs a GaussianLikelihood")
    other = Space(space.dims, space.shape, space.coords, "K")
    with pytest.raises(InputError, match="does not describe slices across 'z'"):
        SlicesPrior(white(space).prior, other)
    with pytest.raises(InputError, match="two neighbouring slices .* lie at one place"):
        AxisDifference(volumes((3, 1, 1), np.array([0.0, 1.0, 1.0])))
    with pytest.raises(InputError, match="they tell no weight"):
        typical_weight(torch.ones(1, 3, 2, 2), space)
    with pytest.raises(InputError, match="sigma, the standard deviation"):
        ztv(operator, torch.zeros(1, *operator.range.shape).double(), 0.0, TIED)
    check_batch(lambda y: ztv(operator, y, 0.5, TIED, CG(4, 0.0)), zoo.normal(3, *operator.range.shape, step=39))
