"""Filtered back-projection in physical units, least squares and total variation against other solvers."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from recon.baselines import TVSolver, cgls, fbp, total_variation, tune_tv, tv
from recon.baselines.backprojection import view_weights
from recon.checks import check_batch
from recon.errors import InputError
from recon.operators import FanBeam, FanGeometry, MatrixOperator, ParallelBeam
from recon.space import Space
from tests import zoo

PIXEL, MU = 1e-3, 20.0
CENTRE, RADIUS = (0.006, -0.009), 0.02


def chords(A: ParallelBeam) -> torch.Tensor:
    """The sinogram of a disc on paper, so that the image comes back from data no projector of ours made."""
    theta, s = np.array(A.geometry.angles)[:, None], A.geometry.positions[None, :]
    s = s - CENTRE[0] * np.cos(theta) - CENTRE[1] * np.sin(theta)
    return torch.from_numpy(2 * MU * np.sqrt(np.clip(RADIUS**2 - s**2, 0, None)))


def inside_and_outside(A: ParallelBeam, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values well inside the disc, and in the air around it."""
    yy, xx = np.meshgrid(A.domain.coords["y"], A.domain.coords["x"], indexing="ij")
    distance = torch.from_numpy(np.hypot(xx - CENTRE[0], yy - CENTRE[1]))
    return x[distance < 0.8 * RADIUS], x[(distance > 1.3 * RADIUS) & (distance < 1.6 * RADIUS)]


EVEN = np.arange(120) * math.pi / 120
UNEVEN = np.sort(zoo.normal(160).numpy() * 3 % math.pi)
SCANS = {
    "half a turn": {"angles": EVEN},
    "a full turn": {"angles": np.arange(240) * math.pi / 120},
    "a full turn, ends included": {"angles": np.linspace(0, 2 * math.pi, 181)},
    "no order": {"angles": EVEN[::-1][np.argsort(zoo.normal(120).numpy())] - 2.0},
    "narrow detectors": {"angles": EVEN, "spacing": 0.6 * PIXEL},
    "shifted detector": {"angles": EVEN, "offset": 2.4 * PIXEL},
    "line": {"angles": EVEN, "projector": "line"},
    "linear": {"angles": EVEN, "projector": "linear"},
    "uneven": {"angles": UNEVEN, "tolerance": 0.02},
}


@pytest.mark.parametrize("scan", list(SCANS))
@pytest.mark.parametrize("filter", ["ramp", "hann"])
def test_a_disc_comes_back_with_its_attenuation(scan, filter):
    given = {"projector": "strip", "tolerance": 0.005} | SCANS[scan]
    tolerance = given.pop("tolerance")
    A = ParallelBeam(Space.grid((72, 72), PIXEL, "1/m"), **given).double()
    inside, outside = inside_and_outside(A, fbp(A, chords(A), filter))
    assert float(inside.mean()) == pytest.approx(MU, rel=tolerance)
    assert abs(float(outside.mean())) < tolerance * MU


@pytest.mark.parametrize("filter", ["ramp", "shepp-logan", "cosine", "hamming", "hann"])
def test_every_filter_keeps_the_mean(filter):
    A = ParallelBeam.half_turn((72, 72), PIXEL, 60, projector="strip")
    inside, _ = inside_and_outside(A, fbp(A, chords(A).float(), filter))
    assert inside.dtype == torch.float32
    assert float(inside.mean()) == pytest.approx(MU, rel=0.01)


def test_windows_lower_the_noise_in_their_order():
    A = ParallelBeam.half_turn((48, 48), PIXEL, 60, projector="strip").double()
    noise = zoo.normal(*A.range.shape)
    spread = [float(fbp(A, noise, name).std()) for name in ("ramp", "shepp-logan", "cosine", "hamming", "hann")]
    assert spread == sorted(spread, reverse=True)


def test_views_stand_for_half_a_turn():
    for angles in (EVEN, UNEVEN, np.linspace(0, 2 * math.pi, 7), [0.3], [0.1, 0.1 + math.pi]):
        assert view_weights(angles).sum() == pytest.approx(math.pi)
    assert np.allclose(view_weights(EVEN), math.pi / 120)


def test_a_missing_wedge_is_not_filled_by_its_edges():
    quarter = np.arange(60) * math.pi / 120
    assert np.allclose(view_weights(quarter), math.pi / 120)
    A = ParallelBeam(Space.grid((72, 72), PIXEL, "1/m"), quarter, projector="strip").double()
    assert float(fbp(A, chords(A)).abs().max()) < 1.5 * MU


def test_fbp_takes_any_batch():
    A = zoo.beam("strip", 12).double()
    y = zoo.normal(2, 3, *A.range.shape)
    x = fbp(A, y)
    assert x.shape == (2, 3, *A.domain.shape)
    assert torch.allclose(x[1, 2], fbp(A, y[1, 2]), rtol=1e-10)
    check_batch(lambda one: fbp(A, one), y[0])


D, E = 0.12, 0.08
FAN = {"detectors": 101, "spacing": 1.6e-3, "source_distance": D, "detector_distance": E}
TURN = np.arange(240) * math.pi / 120
HALF_FAN = math.atan(50.5 * 1.6e-3 / (D + E))  # of a flat detector; an arc's is smaller


def short(extra: float = 0.0, views: int = 160) -> np.ndarray:
    """Half a turn and the fan, which is the least that sees every line; and more."""
    return 0.4 + np.arange(views) * (math.pi + 2 * HALF_FAN + extra) / views


FANS = {
    "a full turn": {"angles": TURN},
    "a full turn, ends included": {"angles": np.linspace(0, 2 * math.pi, 181)},
    "no order": {"angles": TURN[::-1][np.argsort(zoo.normal(240).numpy())] - 2.0},
    "shifted by a quarter": {"angles": TURN, "offset": 0.4e-3},
    "shifted": {"angles": TURN, "offset": 5e-3},
    "half of the object": {"angles": TURN, "detectors": 75, "offset": 32e-3, "tolerance": 0.005},
    "the other half": {"angles": TURN, "detectors": 75, "offset": -32e-3, "tolerance": 0.005},
    "a short scan": {"angles": short()},
    "a longer scan": {"angles": short(0.3)},
    "a long scan": {"angles": short(1.9, 220)},
    "a short scan, reversed and shifted": {"angles": short(0.2)[::-1] - 3.0, "offset": 3e-3},
    "a virtual detector": {"angles": short(), "detector_distance": 0.0, "spacing": 0.96e-3},
    "strips": {"angles": TURN, "projector": "strip"},
}


def fan_chords(g) -> torch.Tensor:
    """The sinogram of the disc on paper: ``2 mu sqrt(r^2 - d^2)`` with its centre's distance d from each ray."""
    x, y, dx, dy = np.moveaxis(g.rays(0, g.views), -1, 0)
    d = ((CENTRE[0] - x) * dy - (CENTRE[1] - y) * dx) / np.hypot(dx, dy)
    return torch.from_numpy(2 * MU * np.sqrt(np.clip(RADIUS**2 - d**2, 0, None)))


@pytest.mark.parametrize("scan", list(FANS))
@pytest.mark.parametrize("shape", ["flat", "curved"])
def test_a_disc_comes_back_from_a_fan(scan, shape):
    """The bound is that of parallel rays: both are second-order sums of the same band-limited projections.

    Inside, single pixels are right too: redundant lines that were weighed wrongly would leave a slope across the disc.
    """
    given = {"tolerance": 0.001, "shape": shape, **FAN} | FANS[scan]
    tolerance = given.pop("tolerance")
    A = FanBeam(Space.grid((72, 72), PIXEL, "1/m"), FanGeometry(**given)).double()
    inside, outside = inside_and_outside(A, fbp(A, fan_chords(A.geometry)))
    assert float(inside.mean()) == pytest.approx(MU, rel=tolerance)
    assert abs(float(outside.mean())) < tolerance * MU
    assert float((inside - MU).abs().max()) < 10 * tolerance * MU


@pytest.mark.parametrize("filter", ["shepp-logan", "cosine", "hamming", "hann"])
def test_every_filter_keeps_the_mean_of_a_fan(filter):
    A = FanBeam(Space.grid((72, 72), PIXEL, "1/m"), FanGeometry(TURN, **FAN))
    inside, _ = inside_and_outside(A, fbp(A, fan_chords(A.geometry).float(), filter))
    assert inside.dtype == torch.float32
    assert float(inside.mean()) == pytest.approx(MU, rel=0.001)


def test_a_tilted_detector_needs_no_resampling():
    g = FanGeometry(TURN, **FAN, offset=4e-3, tilt=0.2)
    A = FanBeam(Space.grid((72, 72), PIXEL, "1/m"), g).double()
    inside, _ = inside_and_outside(A, fbp(A, fan_chords(g)))
    assert float((inside - MU).abs().max()) < 0.01 * MU
    with pytest.raises(InputError, match="fbp needs an arc about the source; this one is tilted"):
        fbp(FanBeam(A.domain, replace(g, shape="curved")), torch.zeros(A.range.shape))


def test_measured_views_come_back():
    """The rows of a shifted, tilted fan whose detector runs the other way, and of parallel rays that meet theirs at a slant."""
    rows = np.asarray(FanGeometry(short(0.2), **FAN, offset=4e-3, tilt=-0.1).measured.vectors)
    rows[:, 4:] *= -1
    A = FanBeam.from_vectors(Space.grid((72, 72), PIXEL, "1/m"), rows, 101).double()
    inside, _ = inside_and_outside(A, fbp(A, fan_chords(A.geometry)))
    assert float((inside - MU).abs().max()) < 0.01 * MU
    cos, sin, slant = np.cos(EVEN), np.sin(EVEN), EVEN + 0.4
    rows = np.stack([-sin, cos, 0 * cos, 0 * sin, PIXEL * np.cos(slant), PIXEL * np.sin(slant)], 1)
    P = ParallelBeam.from_vectors(A.domain, rows, 121, "strip").double()
    inside, _ = inside_and_outside(P, fbp(P, fan_chords(P.geometry)))
    assert float(inside.mean()) == pytest.approx(MU, rel=0.005)


@pytest.mark.parametrize("offset", [22e-3, -22e-3])
def test_parallel_rays_over_half_of_the_object(offset):
    """A whole turn of a detector that covers the axis and one side."""
    A = ParallelBeam(Space.grid((72, 72), PIXEL, "1/m"), TURN, 65, PIXEL, offset, "strip").double()
    inside, _ = inside_and_outside(A, fbp(A, chords(A)))
    assert float((inside - MU).abs().max()) < 0.01 * MU


def test_a_missing_wedge_of_a_fan_is_not_filled_by_its_edges():
    A = FanBeam(Space.grid((72, 72), PIXEL, "1/m"), FanGeometry(np.arange(90) * 2.0 / 90, **FAN)).double()
    assert float(fbp(A, fan_chords(A.geometry)).abs().max()) < 1.5 * MU


def test_fbp_of_a_stack_is_that_of_its_slices():
    for one, stack in (
        (
            zoo.beam("strip", 4),
            ParallelBeam.from_geometry(Space.grid((3, 9, 8), (1.0, 2e-3, 2e-3), "1/m"), zoo.beam("strip", 4).geometry),
        ),
        (zoo.fan(), FanBeam(Space.grid((3, 6, 11), (1.0, 1.5e-3, 1.5e-3), "1/m"), zoo.fan().geometry)),
    ):
        y = zoo.normal(2, *stack.range.shape, dtype=torch.float32)
        x = fbp(stack, y)
        assert x.shape == (2, *stack.domain.shape)
        assert torch.allclose(x, fbp(one, y), rtol=1e-5, atol=1e-5 * float(x.abs().max()))
    check_batch(lambda rows: fbp(zoo.fan(), rows), zoo.normal(4, *zoo.fan().range.shape, dtype=torch.float32))


def test_fbp_refuses():
    A = zoo.beam()
    with pytest.raises(
        InputError, match=r"fbp inverts ParallelBeam and FanBeam; got MatrixOperator .* \(cgls and tv take"
    ):
        fbp(zoo.matrix(), torch.zeros(1, 5))
    with pytest.raises(InputError, match="filter must be one of ramp, .*; got 'butter'"):
        fbp(A, torch.zeros(A.range.shape), "butter")
    with pytest.raises(InputError, match=r"fbp takes arrays .*; got shape \(5, 3\)"):
        fbp(A, torch.zeros(5, 3))
    rows = np.array([[0, -0.1, 0, 0.1, 1e-3, 0], [0.12, 0, -0.1, 0, 0, 1e-3]])
    with pytest.raises(InputError, match=r"needs a source that turns on a circle .* from 0\.1 to 0\.12 m from it"):
        fbp(FanBeam.from_vectors(A.domain, rows, 5), torch.zeros(2, 5))


# --- Least squares ------------------------------------------------------------------------------------------------------


def test_cgls_solves_least_squares():
    A = MatrixOperator(zoo.normal(9, 6))
    y = zoo.normal(4, 9, step=1)
    exact = torch.linalg.lstsq(A.matrix, y.T).solution.T
    assert torch.allclose(cgls(A, y, 6), exact, atol=1e-9)
    assert torch.allclose(cgls(A, y, 60), exact, atol=1e-9)  # long after convergence: it stands still
    check_batch(lambda one: cgls(A, one, 4), y)


def test_cgls_gives_the_smallest_solution_of_few_data():
    A = MatrixOperator(zoo.normal(4, 9))
    y = zoo.normal(2, 4, step=1)
    assert torch.allclose(cgls(A, y, 4), y @ torch.linalg.pinv(A.matrix).T, atol=1e-9)


def test_cgls_of_nothing_is_nothing():
    y = torch.stack([torch.zeros(9), torch.ones(9)]).double()
    x = cgls(MatrixOperator(zoo.normal(9, 6)), y, 5)
    assert torch.equal(x[0], torch.zeros(6, dtype=torch.float64))
    assert bool(torch.isfinite(x).all())


def test_cgls_refuses_no_iterations():
    with pytest.raises(InputError, match="cgls needs at least one iteration; got 0"):
        cgls(zoo.matrix(), torch.zeros(1, 5), 0)


# --- Total variation ----------------------------------------------------------------------------------------------------


def identity(ny: int, nx: int) -> MatrixOperator:
    space = Space.grid((ny, nx), 1.0, "1")
    return MatrixOperator(torch.eye(ny * nx, dtype=torch.float64), space, space)


def objective(A, x, y, sigma, weight):
    return 0.5 * ((A.A(x) - y) / sigma).square().flatten(1).sum(1) + weight * total_variation(x)


def test_total_variation_by_hand():
    x = torch.tensor([[[0.0, 3.0], [4.0, 0.0]]])
    assert float(total_variation(x)) == pytest.approx(5.0 + 3.0 + 4.0)  # corner, right column, bottom row


def test_a_step_shrinks_by_the_formula():
    """One column, k low and k high values: each side moves by weight sigma^2 / k towards the other."""
    k, sigma, weight = 4, 0.5, 1.2
    y = torch.tensor([1.0] * k + [3.0] * k, dtype=torch.float64).reshape(1, 2 * k, 1)
    shift = weight * sigma**2 / k
    result = tv(identity(2 * k, 1), y, sigma, weight, TVSolver(tolerance=1e-7, iterations=20000))
    expected = y + torch.tensor([shift] * k + [-shift] * k, dtype=torch.float64).reshape(y.shape)
    assert torch.allclose(result.x, expected, atol=1e-5)
    assert bool(result.converged.all())


def lbfgs(A, y, sigma, weight, nonnegative):
    """The same minimum by scipy's L-BFGS-B, with the corner of the absolute value rounded at 1e-5."""
    shape = A.domain.shape

    def value(flat):
        x = torch.from_numpy(flat).reshape(1, *shape).requires_grad_()
        dy = torch.nn.functional.pad(x[:, 1:] - x[:, :-1], (0, 0, 0, 1))
        dx = torch.nn.functional.pad(x[:, :, 1:] - x[:, :, :-1], (0, 1))
        f = 0.5 * ((A.A(x) - y) / sigma).square().sum() + weight * (dy**2 + dx**2 + 1e-10).sqrt().sum()
        f.backward()
        return float(f.detach()), x.grad.numpy().ravel()

    bounds = [(0.0 if nonnegative else None, None)] * A.domain.size
    options = {"maxiter": 20000, "maxfun": 40000, "ftol": 1e-15, "gtol": 1e-10, "maxcor": 50}
    found = minimize(value, np.full(A.domain.size, 0.5), jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    return torch.from_numpy(found.x).reshape(1, *shape)


@pytest.mark.parametrize("nonnegative", [True, False])
@pytest.mark.parametrize("weight", [0.5, 5.0])
def test_the_minimum_is_that_of_another_method(nonnegative, weight):
    domain = Space.grid((6, 5), 1.0, "1/m")
    A = MatrixOperator(zoo.normal(45, 30), domain, Space.vector(45, dim="datum"))
    truth = torch.full((1, 6, 5), -0.2, dtype=torch.float64)
    truth[:, 1:4, 2:] = 1.0
    sigma = 0.2 + zoo.normal(45, step=1).abs()
    y = A(truth) + sigma * zoo.normal(1, 45, step=2)
    result = tv(A, y, sigma, weight, TVSolver(20000, 1e-4, nonnegative))
    reference = objective(A, lbfgs(A, y, sigma, weight, nonnegative), y, sigma, weight)
    assert bool(result.converged.all())
    assert torch.allclose(result.objective, objective(A, result.x, y, sigma, weight), rtol=1e-10)
    assert float(result.objective) == pytest.approx(float(reference), rel=1e-4)
    assert (float(result.x.min()) >= 0) == nonnegative


@pytest.mark.parametrize("weight", [0.3, 3.0])
def test_the_stopping_rule_bounds_the_error(weight):
    A = ParallelBeam.half_turn((24, 24), 5e-3, 20).double()
    truth = torch.zeros(2, 24, 24, dtype=torch.float64)
    truth[0, 6:14, 8:20], truth[1, 4:20, 10:12] = 20.0, 5.0
    y = A(truth) + 0.05 * zoo.normal(2, *A.range.shape)
    best = tv(A, y, 0.05, weight, TVSolver(20000, 1e-4)).objective
    for tolerance in (1e-2, 1e-3):
        result = tv(A, y, 0.05, weight, TVSolver(20000, tolerance))
        assert bool((result.error <= tolerance).all())
        assert bool(((result.objective - best) / best <= result.error).all())


def test_denoising_agrees_with_scikit_image():
    from skimage.restoration import denoise_tv_chambolle

    image = torch.zeros(20, 24, dtype=torch.float64)
    image[5:15, 8:] = 1.0
    y = (image + 0.2 * zoo.normal(20, 24))[None]
    weight = 0.3
    theirs = torch.from_numpy(denoise_tv_chambolle(y[0].numpy(), weight=weight, eps=1e-9, max_num_iter=5000))[None]
    A = identity(20, 24)
    ours = tv(A, y, 1.0, weight, TVSolver(20000, 1e-5, nonnegative=False))
    assert float(ours.objective) <= float(objective(A, theirs, y, 1.0, weight)) * (1 + 1e-5)
    assert float((ours.x - theirs).abs().max()) < 0.02


def test_images_converge_each_on_its_own():
    A, y, _ = noisy_phantoms()
    y = y * torch.tensor([1.0, 10.0, 0.1], dtype=torch.float64).reshape(-1, 1, 1)
    result = tv(A, y, 0.2, 1.0)
    assert bool(result.converged.all())
    assert len(set(result.iterations.tolist())) > 1
    check_batch(lambda one: tv(A, one, 0.2, 1.0).x, y)
    alone = tv(A, y[1:2], 0.2, 1.0)
    assert int(alone.iterations) == int(result.iterations[1])


def test_nothing_measured_gives_nothing():
    A = zoo.beam().double()
    result = tv(A, torch.zeros(1, *A.range.shape, dtype=torch.float64), 1.0, 1.0)
    assert float(result.x.abs().max()) == 0.0
    assert bool(result.converged.all())


def test_an_unfinished_run_says_so():
    A = zoo.beam().double()
    result = tv(A, zoo.normal(2, *A.range.shape).abs(), 1e-3, 1.0, TVSolver(iterations=3))
    assert not bool(result.converged.any())
    assert result.iterations.tolist() == [3, 3]
    assert bool((result.error > 1e-2).all())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"sigma": 0.0}, "sigma, the standard deviation of the noise, must be positive and finite"),
        ({"sigma": torch.ones(3)}, r"sigma must be one number or one per datum .*; got \(3,\)"),
        ({"weight": 0.0}, "weight of the total variation must be positive; got 0.0"),
        ({"weight": math.nan}, "weight of the total variation must be positive; got nan"),
        ({"y": torch.zeros(5, 13)}, r"tv takes measurements \(n, .*\); got shape \(5, 13\)"),
        ({"y": torch.zeros(2, 3)}, r"tv takes arrays .*; got shape \(2, 3\)"),
        ({"operator": zoo.matrix(), "y": torch.zeros(1, 5)}, "total variation needs images with at least two axes"),
    ],
)
def test_tv_refuses(change, text):
    given = {"operator": zoo.beam(), "y": torch.zeros(1, 5, 13), "sigma": 1.0, "weight": 1.0} | change
    with pytest.raises(InputError, match=text):
        tv(**given)


def test_the_solver_refuses():
    with pytest.raises(InputError, match="needs iterations >= 1 and tolerance > 0"):
        TVSolver(iterations=0)
    with pytest.raises(InputError, match="needs iterations >= 1 and tolerance > 0"):
        TVSolver(tolerance=0.0)


# --- Tuning -------------------------------------------------------------------------------------------------------------


def noisy_phantoms():
    A = ParallelBeam.half_turn((24, 24), 5e-3, 20).double()
    truth = torch.zeros(3, 24, 24, dtype=torch.float64)
    truth[0, 6:14, 8:20], truth[1, 4:20, 10:14], truth[2, 8:12, 3:9] = 20.0, 15.0, 10.0
    return A, A(truth) + 0.2 * zoo.normal(3, *A.range.shape), truth


def test_tuning_finds_the_best_weight():
    A, y, truth = noisy_phantoms()
    weights, solver = [0.003, 0.03, 0.3, 3.0, 30.0], TVSolver(iterations=200)
    tuned = tune_tv(A, y, truth, 0.2, weights, solver)
    assert list(tuned.psnr) == weights
    assert tuned.psnr[tuned.weight] == max(tuned.psnr.values())
    assert not tuned.at_edge
    by_hand = (20 * math.log10(20.0) - 10 * (tv(A, y, 0.2, 0.3, solver).x - truth).square().mean((1, 2)).log10()).mean()
    assert tuned.psnr[0.3] == pytest.approx(float(by_hand))
    assert tuned.psnr[tuned.weight] > 10 * math.log10(400 / float((fbp(A, y) - truth).square().mean())) + 3
    assert tune_tv(A, y, truth, 0.2, [0.003, 0.03], solver).at_edge


def test_tuning_refuses():
    A, y, truth = noisy_phantoms()
    with pytest.raises(InputError, match="tune_tv pairs each measurement with a truth"):
        tune_tv(A, y, truth[:2], 0.2, [1.0])
    with pytest.raises(InputError, match="at least one weight"):
        tune_tv(A, y, truth, 0.2, [])
    with pytest.raises(InputError, match="truths that are not constant"):
        tune_tv(A, y, torch.ones_like(truth), 0.2, [1.0])
