"""MRI of a volume with a complete readout: the planes of the three-dimensional measurement, and volumes drawn through it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import recon
from recon.checks import check_adjoint
from recon.errors import InputError
from recon.likelihoods import GaussianLikelihood
from recon.operators import CG, CartesianMRI, PhaseEncodedMRI, complex_grid
from recon.priors import GaussianPrior
from recon.priors.lifting import SlicesPrior
from recon.samplers import DDS, MMPS, Coupling
from recon.schedules import Schedule
from recon.space import Space
from tests import zoo

LEVELS = Schedule(1e-2, 60.0)


def scan(shape=(4, 3, 5), coils=3):
    domain = complex_grid(shape, (3e-3, 1e-3, 2e-3))
    mask = zoo.normal(*shape[:2], step=3) > -0.4
    assert 0.3 < float(mask.double().mean()) < 0.9
    return domain, zoo.coil_maps(coils, *shape, dtype=torch.float64), mask


@pytest.mark.parametrize("shape", [(4, 3, 5), (3, 4, 4)])
def test_it_is_the_three_dimensional_measurement_taken_apart(shape):
    """Against the transform of the whole volume; odd and even sizes; white noise stays white."""
    domain, maps, mask = scan(shape)
    whole, planes = CartesianMRI(domain, maps, mask[..., None]), PhaseEncodedMRI(domain, maps, mask)
    x = zoo.normal(2, *domain.shape)
    kspace = whole(x)
    torch.testing.assert_close(planes.hybrid(kspace), planes(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(planes.normal(x), whole.normal(x), rtol=0, atol=1e-12)
    assert planes.range.dims == ("x", "coil", "kz", "ky")
    for name in ("kz", "ky"):
        np.testing.assert_allclose(planes.range.coords[name], whole.range.coords[name])
    noise = torch.view_as_complex(zoo.normal(3, *shape, 2, step=5))
    power = planes.hybrid(noise).abs().square().sum()
    torch.testing.assert_close(power, (noise.abs().square() * mask[..., None]).sum(), rtol=1e-12, atol=0)
    y = planes(x)
    weight = torch.full(planes.range.shape, 4.0).double()
    one = planes.solve(planes.A_adjoint(y), 0.3, weight, cg=CG(100, 1e-13))
    other = whole.solve(whole.A_adjoint(kspace), 0.3, torch.full(whole.range.shape, 4.0).double(), cg=CG(100, 1e-13))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    assert check_adjoint(planes) < 1e-13


def test_planes_do_not_meet():
    domain, maps, mask = scan()
    A, x = PhaseEncodedMRI(domain, maps, mask), zoo.normal(1, *scan()[0].shape)
    other = x.clone()
    other[..., 2] *= 3
    changed = (A(other) - A(x)).abs().amax((0, 2, 3, 4)) > 0
    assert changed.tolist() == [False, False, True, False, False]


def problem(kind):
    """Correlated complex slices across z, undersampled along kz and ky."""
    domain, maps, mask = scan((3, 2, 2), 2)
    image = Space(("channel", "y", "x"), (2, 2, 2), {k: v for k, v in domain.coords.items() if k != "z"}, domain.unit)
    factor = zoo.normal(8, 8, step=7)
    prior = GaussianPrior(zoo.normal(8, step=8), factor @ factor.T / 8 + 0.3 * torch.eye(8).double(), image, LEVELS)
    A = PhaseEncodedMRI(domain, maps, mask) if kind == "planes" else CartesianMRI(domain, maps, mask[..., None])
    whole = CartesianMRI(domain, maps, mask[..., None])
    noise = 0.3 * torch.view_as_complex(zoo.normal(*whole.range.shape, 2, step=9))
    kspace = whole.sampled(whole(zoo.normal(*domain.shape, step=10)) + noise)
    y = A.hybrid(kspace) if kind == "planes" else kspace
    return recon.Posterior(SlicesPrior(prior, domain), GaussianLikelihood(A, y, 0.3))


def test_both_ways_to_say_it_have_one_posterior_and_mmps_guides_to_it():
    """The planes across x of the data cut the slices across z of the prior; ``D_y = E[z0 | z, y]`` to the end of CG."""
    posterior = problem("planes")
    exact, other = posterior.exact(), problem("volume").exact()
    torch.testing.assert_close(exact.mean, other.mean, rtol=0, atol=1e-10)
    torch.testing.assert_close(exact.covariance(), other.covariance(), rtol=0, atol=1e-10)
    sampler, z, sigma = MMPS(cg=CG(60, 1e-13)), 2 * zoo.normal(2, *posterior.space.shape, step=11), 0.8
    # The state is one more measurement, of everything, with noise sigma.
    precision = torch.linalg.inv(exact.covariance())
    whole = precision + torch.eye(len(precision)).double() / sigma**2
    told = torch.linalg.solve(whole, (precision @ exact.mean + z.flatten(1) / sigma**2).T).T
    found = sampler.guide(posterior, z, sigma, 0.5).flatten(1)
    torch.testing.assert_close(found, told, rtol=0, atol=1e-7)
    assert float((posterior.prior.denoise(z, sigma).flatten(1) - told).abs().max()) > 0.1


@pytest.mark.parametrize("weight", [0.0, 1e-3])
def test_dds_draws_the_same_volume_through_either(weight):
    """With coupled slices and without, once conjugate gradients converge."""
    sampler = DDS(steps=5, coupling=Coupling(weight), cg=CG(60, 1e-13))
    one, other = (recon.sample(problem(kind), sampler, draws=2).x for kind in ("planes", "volume"))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-8)
    chi2 = (problem("planes").likelihood.gaussian().residual(one) / 0.3).abs().square().mean()
    assert float(chi2) < 4


def test_refusals():
    domain, maps, mask = scan()
    with pytest.raises(InputError, match=r"PhaseEncodedMRI takes complex volumes \(channel, z, y, x\)"):
        PhaseEncodedMRI(complex_grid((4, 3)))
    with pytest.raises(
        InputError, match=r"coil maps of the volume have shape \(coil, \(4, 3, 5\)\); got \(3, 4, 3, 4\)"
    ):
        PhaseEncodedMRI(domain, maps[..., 1:], mask)
    with pytest.raises(InputError, match="hybrid takes complex k-space"):
        PhaseEncodedMRI(domain, maps, mask).hybrid(torch.zeros(3, 4, 3, 5))
    with pytest.raises(InputError, match="the mask must have the shape"):
        PhaseEncodedMRI(domain, maps, zoo.normal(7, 3) > 0)
