"""Tiny instances of everything that has a contract, by name, so that one test body per contract covers them all."""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

import recon
from recon.draws import Draws
from recon.likelihoods import (
    GaussianLikelihood,
    Likelihood,
    PoissonLikelihood,
    StackedLikelihood,
    TransmissionLikelihood,
)
from recon.operators import (
    AxisDifference,
    BeamHardening,
    Blur,
    CartesianMRI,
    CoarseGrain,
    CodedDiffraction,
    ConeBeam,
    ConeBeamSlab,
    ConeGeometry,
    Diagonal,
    Downsampling,
    Family,
    FanBeam,
    FanGeometry,
    GainOffset,
    Joined,
    LinearOperator,
    Masked,
    MatrixOperator,
    NonCartesianMRI,
    Operator,
    ParallelBeam,
    PDEResidual,
    PhaseEncodedMRI,
    PhaseRetrieval,
    PointSensors,
    Sequence,
    Slab,
    SliceStack,
    Stack,
    Stations,
    Whitened,
    Whitening,
    complex_grid,
    from_deepinv,
    from_scipy,
)
from recon.space import Space

BASES = {"Operator", "LinearOperator", "ParametricOperator", "PlanarBeam", "Likelihood"}
Base = TypeVar("Base", Operator, Likelihood)


def normal(*shape: int, step: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Fixed standard normal numbers, another set for every ``step``."""
    return Draws(1, [0]).normal(step, shape, "user", dtype=dtype)[0]


def matrix(rows: int = 5, columns: int = 7, step: int = 0) -> MatrixOperator:
    return MatrixOperator(normal(rows, columns, step=step, dtype=torch.float32))


def scaled(theta: torch.Tensor) -> PhaseRetrieval:
    """A member of a family of one parameter."""
    return PhaseRetrieval(float(theta[0]) * matrix())


def image_matrix() -> MatrixOperator:
    """A matrix between spaces with axes and units."""
    domain, range_ = Space.grid((4, 3), 0.5, "1/m"), Space(("level", "station"), (2, 4), {}, "K")
    return MatrixOperator(normal(8, 12, step=3, dtype=torch.float32), domain, range_)


def complex_matrix() -> MatrixOperator:
    return MatrixOperator(torch.complex(normal(5, 7, dtype=torch.float32), normal(5, 7, step=1, dtype=torch.float32)))


def beam(projector: str = "line", views: int = 5) -> ParallelBeam:
    return ParallelBeam.half_turn((9, 8), 2e-3, views, projector=projector)  # type: ignore[arg-type]


def shifted_beam(projector: str = "linear") -> ParallelBeam:
    """Not square, detectors unlike pixels, shifted, few, over more than a turn, in no order."""
    angles = [0.3, -2.0, 7.0, 1.2]
    return ParallelBeam(Space.grid((6, 11), 1.5e-3, "1/m"), angles, 9, 1.1e-3, 0.7e-3, projector)  # type: ignore[arg-type]


def off_centre_beam() -> ParallelBeam:
    """The image does not sit on the axis of rotation."""
    y, x = 5e-3 - 1e-3 * np.arange(7), 2e-3 + 1e-3 * np.arange(6)
    domain = Space(("y", "x"), (7, 6), {"y": y, "x": x}, "1/m")
    return ParallelBeam(domain, np.arange(4) * math.pi / 4)


def measured_beam(projector: str = "line", limit: float = 4e9) -> ParallelBeam:
    """A stack of slices, and views that have nothing in common."""
    vectors = np.concatenate([normal(3, 2, step=17), 1e-3 * normal(3, 4, step=18)], axis=1)
    return ParallelBeam.from_vectors(Space.grid((2, 6, 7), (3e-3, 1e-3, 1e-3), "1/m"), vectors, 8, projector, limit)  # type: ignore[arg-type]


def fan(projector: str = "line", shape: str = "flat", limit: float = 4e9) -> FanBeam:
    """Nothing centred, nothing square, everything tilted."""
    geometry = FanGeometry(
        (0.3, -2.0, 5.0, 1.2), 9, 2.1e-3, 19e-3, 12e-3, 1.7e-3, 0.15, shape=shape, projector=projector
    )  # type: ignore[arg-type]
    return FanBeam(Space.grid((6, 11), 1.5e-3, "1/m"), geometry, limit)


def measured_fan() -> FanBeam:
    """The rows of ``fan``, every detector another step wide, over a stack."""
    rows = np.asarray(fan().geometry.measured.vectors)
    rows[:, 4:] *= np.array([[1.0], [-0.8], [1.3], [0.9]])
    return FanBeam.from_vectors(Space.grid((3, 7, 6), (1e-3, 2e-3, 2e-3), "1/m"), rows, 8, "strip")


def cone_scan(views: int = 4, pitch: float = 3e-3) -> ConeGeometry:
    """Every parameter at work; angles in no order, over more than a turn."""
    angles = (0.3, -2.0, 7.0, 1.2)[:views]
    return ConeGeometry(angles, 3, 5, 2.3e-3, 0.03, 0.02, 1.9e-3, 0.7e-3, -0.4e-3, 0.2, pitch)


def cone_volume(nz: int = 4) -> Space:
    return Space.grid((nz, 5, 6), (1.3e-3, 1e-3, 1.2e-3), "1/m")


def parallel_rays() -> ConeBeam:
    """Measured vectors of parallel rays, the last nearly along z."""
    directions = np.array([[0.1, 1.0, 0.2], [-1.0, 0.3, -0.1], [0.2, -0.1, 1.0]])
    aside = np.array([[1.0, 0.0, 0.1], [0.2, 1.0, 0.0], [1.0, 0.1, 0.0]])
    up = np.array([[0.0, 0.1, 1.0], [0.0, -0.1, 1.0], [0.0, 1.0, 0.1]])
    vectors = np.concatenate([directions, 1e-3 * directions, 1.3e-3 * aside, 1.1e-3 * up], axis=1)
    return ConeBeam.from_vectors(cone_volume(), vectors, 4, 5, "parallel")


def composed() -> LinearOperator:
    inner = matrix()
    return MatrixOperator(normal(4, 5, step=2, dtype=torch.float32), inner.range) @ inner


def blurred(boundary: str = "periodic", kernel: tuple[int, ...] = (3, 4), leading: bool = False) -> Blur:
    """Not square, a kernel without symmetry, odd and even."""
    domain = Space.grid((7, 8), 0.5, "K")
    if leading:
        domain = Space(("level", *domain.dims), (2, *domain.shape), domain.coords, "K")
    return Blur(domain, normal(*kernel, step=11, dtype=torch.float32), boundary)  # type: ignore[arg-type]


def downsampled(
    shape: tuple[int, int] = (6, 9), factor: tuple[int, int] = (2, 3), boundary: str = "periodic"
) -> Downsampling:
    kernel = normal(4, 3, step=12, dtype=torch.float32)
    return Downsampling(Space.grid(shape, 0.5, "K"), factor, kernel, (1, 0), boundary)  # type: ignore[arg-type]


def coded_diffraction(channels: bool = False) -> CodedDiffraction:
    """Two complex masks with a support, a transform half as long again as the image."""
    domain = Space.grid((4, 5), 1e-6, "1")
    if channels:
        domain = Space(("channel", "y", "x"), (2, 4, 5), {**domain.coords, "channel": ("real", "imag")}, "1")
    masks = torch.complex(*normal(2, 2, 4, 5, step=13, dtype=torch.float32))
    masks[:, 0, :2] = 0
    return CodedDiffraction(domain, masks, oversampling=1.5)


def dynamic(same_range: bool = True) -> Sequence:
    """Three frames, two of them through one operator."""
    once, again = matrix(), matrix(5 if same_range else 3, step=1)
    return Sequence([once, again, once], times=[0.0, 1.0, 2.5])


def slices(kind: str = "one") -> SliceStack:
    """Three slices of four by three: through one matrix or three, with ranges that agree or do not, fields before the axis."""
    rows = {"one": (4, 4, 4), "each": (4, 4, 4), "unlike": (4, 5, 4), "fields": (4, 4, 4)}[kind]
    image = Space.grid((4, 3), 0.5, "K")
    if kind == "fields":
        image = Space(("channel", *image.dims), (2, 4, 3), image.coords, "K")
    made = [MatrixOperator(normal(r, image.size, step=i, dtype=torch.float32), image) for i, r in enumerate(rows)]
    at = len(image.dims) - 2  # of the axis: in front, or after the fields
    shape, dims = list(image.shape), list(image.dims)
    shape.insert(at, 3), dims.insert(at, "z")
    domain = Space(tuple(dims), tuple(shape), {**image.coords, "z": np.array([0.0, 1.0, 3.0])}, "K")
    return SliceStack(made[0] if kind in ("one", "fields") else made, domain)


def darcy(mean: str = "arithmetic", log: bool = False, boundary: float | None = None) -> PDEResidual:
    grid = Space.grid((5, 6), (0.5, 0.4), "1")
    coords = {**grid.coords, "channel": ("coefficient", "solution")}
    domain = Space(("channel", "y", "x"), (2, 5, 6), coords, "mixed")
    source = normal(5, 6, step=14, dtype=torch.float32)
    return PDEResidual.darcy(domain, source, boundary, mean, log)  # type: ignore[arg-type]


def sphere(first: float = 0.0) -> Space:
    """A globe without rows at the poles."""
    coords = {"lat": np.array([75.0, 40.0, 0.0, -40.0, -75.0]), "lon": first + 60.0 * np.arange(6)}
    return Space(("lat", "lon"), (5, 6), coords, "K")


def stations(method: str = "linear") -> PointSensors:
    """Winds and temperatures on two levels, around the circle and beyond the last rows; two stations share cells."""
    names = ("u", "t")
    coords = {**sphere().coords, "variable": names, "level": np.array([850.0, 300.0])}
    domain = Space(("variable", "level", "lat", "lon"), (2, 2, 5, 6), coords, "mixed")
    table = Stations(
        lat=[88.0, -90.0, 10.0, 40.0, 12.0],
        lon=[-20.0, 70.0, 359.0, 120.0, 330.0],
        level=[850.0, 400.0, 500.0, 300.0, 700.0],
        variable=("u", "t", "t", "u", "t"),
    )
    return PointSensors(domain, table, method, "log", {"u": "m/s", "t": "K"}, ("u",))  # type: ignore[arg-type]


def sounding() -> PointSensors:
    """Other axes come first; the line is uneven and falls."""
    domain = Space(("member", "z"), (2, 4), {"z": np.array([9e3, 5e3, 2e3, 0.0])}, "K")
    return PointSensors(domain, Stations(z=[100.0, 4e3, 9e3], names=["a", "b", "b"]))


def coarse(valid: bool = False) -> CoarseGrain:
    """Ratios that share fine cells across the dateline, or blocks of which some have no valid cells."""
    if not valid:
        return CoarseGrain(sphere(-180.0), {"lat": 2.5, "lon": [170.0, -100.0, 10.0]})
    flags = normal(6, 8, step=15) > 0.4
    flags[:2, :2] = False
    domain = Space(("level", "y", "x"), (2, 6, 8), Space.grid((6, 8), 0.5, "K").coords, "K")
    return CoarseGrain.covered(domain, 2, flags)[0]


def masked(zeros: bool = False) -> Masked:
    return Masked(Space(("level", "y", "x"), (2, 3, 4), {}, "K"), normal(3, 4, step=16) > 0, zeros)


def covariance(k: int, complex_: bool = False) -> torch.Tensor:
    """Hermitian, positive definite, nothing like diagonal, in float64."""
    factor = torch.complex(normal(k, k, step=17), normal(k, k, step=18)) if complex_ else normal(k, k, step=17)
    return factor @ factor.mH + 0.2 * torch.eye(k, dtype=factor.dtype)


def whitening(dim: str | None = None, complex_: bool = False) -> Whitening:
    space = Space(("coil", "time"), (3, 4), {}, "V", complex=complex_)
    k = space.size if dim is None else space.shape[space.dims.index(dim)]
    return Whitening(space, covariance(k, complex_), dim, torch.float32)


def scipy_matrix(complex_: bool = False, images: bool = False) -> LinearOperator:
    """A matrix that scipy multiplies with; complex data of real arrays, or of complex ones."""
    M = normal(5, 6, step=19).numpy() + (1j * normal(5, 6, step=20).numpy() if complex_ else 0)
    domain = Space(("y", "x"), (3, 2), {}, "K", complex=images)
    return from_scipy(M, domain, Space(("datum",), (5,), {}, "V", complex=complex_))


def deepinv_blur() -> LinearOperator:
    physics = importlib.import_module("deepinv").physics
    kernel = normal(1, 1, 3, 4, step=21, dtype=torch.float32)
    return from_deepinv(physics.Blur(filter=kernel, padding="circular"), Space.grid((5, 6), 0.5, "K"))  # type: ignore[return-value]


def deepinv_intensities() -> Operator:
    physics = importlib.import_module("deepinv").physics
    linear = physics.Blur(filter=normal(1, 1, 3, 3, step=21, dtype=torch.float32), padding="circular")
    return from_deepinv(physics.PhaseRetrieval(linear), Space.grid((3, 4), 0.5, "1"))


def coil_maps(coils: int, *grid: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Complex sensitivities without any structure."""
    return normal(coils, *grid, step=17, dtype=dtype.to_complex())


def scan(
    grid: tuple[int, ...] = (5, 6), coils: int | None = 3, real: bool = False, masked: bool = True, packed: bool = False
) -> CartesianMRI:
    """Odd and even axes, maps without structure, half of the samples."""
    domain = Space.grid(grid, 1e-3, "1") if real else complex_grid(grid, 1e-3)
    maps = None if coils is None else coil_maps(coils, *grid)
    phase = torch.polar(torch.ones(grid), normal(*grid, step=18, dtype=torch.float32)) if real else None
    return CartesianMRI(domain, maps, normal(*grid, step=19) > 0 if masked else None, packed, phase)


def spokes(grid: tuple[int, ...] = (5, 6), coils: int | None = 3, real: bool = False) -> NonCartesianMRI:
    """Points anywhere in k-space, in two readouts."""
    domain = Space.grid(grid, 1e-3, "1") if real else complex_grid(grid, 1e-3)
    places = Draws(1, [0]).uniform(20, (2, 9, len(grid)), "user")[0] - 0.5
    return NonCartesianMRI(domain, places * torch.tensor(grid), None if coils is None else coil_maps(coils, *grid))


LINEAR: dict[str, Callable[[], LinearOperator]] = {
    "matrix": matrix,
    "matrix_of_images": image_matrix,
    "diagonal": lambda: Diagonal(normal(3, 4, dtype=torch.float32), Space.grid((3, 4), 1.0, "K")),
    "matrix_complex": complex_matrix,
    "matrix_complex_transposed": lambda: complex_matrix().H,
    "parallel_beam_line": beam,
    "parallel_beam_strip": lambda: beam("strip"),
    "parallel_beam_linear": lambda: beam("linear"),
    "parallel_beam_shifted": shifted_beam,
    "parallel_beam_shifted_strip": lambda: shifted_beam("strip"),
    "parallel_beam_off_centre": off_centre_beam,
    "parallel_beam_stack": lambda: ParallelBeam.half_turn((3, 5, 4), 2e-3, 4),
    "parallel_beam_measured": measured_beam,
    "parallel_beam_on_the_fly": lambda: measured_beam("linear", limit=0),
    "fan_beam": fan,
    "fan_beam_strip": lambda: fan("strip"),
    "fan_beam_linear": lambda: fan("linear"),
    "fan_beam_curved": lambda: fan(shape="curved"),
    "fan_beam_curved_strip_on_the_fly": lambda: fan("strip", "curved", limit=0),
    "fan_beam_measured": measured_fan,
    "cone_beam": lambda: ConeBeam(cone_volume(), cone_scan()),
    "cone_beam_of_a_slice": lambda: ConeBeam(cone_volume(1), cone_scan(2, 0.0)),
    "cone_beam_parallel": parallel_rays,
    "cone_beam_slab": lambda: ConeBeamSlab(Slab(cone_volume()), cone_scan()),
    "mri_phase_encoded": lambda: PhaseEncodedMRI(
        complex_grid((3, 4, 2), 1e-3), coil_maps(2, 3, 4, 2), normal(3, 4, step=19) > 0
    ),
    "stack": lambda: Stack([matrix(), matrix(3, step=1)]),
    "stack_of_beams": lambda: Stack([beam(), beam("strip", 3)]),
    "stack_of_complex": lambda: Stack([complex_matrix(), complex_matrix()]),
    "stack_of_both_kinds": lambda: Stack([matrix(), complex_matrix(), matrix(3, step=1)]),
    "whitening": whitening,
    "whitening_along": lambda: whitening("coil"),
    "whitening_complex": lambda: whitening("time", complex_=True),
    "whitening_real_of_complex": lambda: Whitening(complex_matrix().range, covariance(5), None, torch.float32),
    "scipy": scipy_matrix,
    "scipy_complex": lambda: scipy_matrix(complex_=True),
    "scipy_complex_both": lambda: scipy_matrix(complex_=True, images=True),
    "deepinv": deepinv_blur,
    "composed": composed,
    "summed": lambda: matrix() + matrix(step=1),
    "scaled": lambda: -2.5 * beam(),
    "transposed": lambda: beam().H,
    "blur": blurred,
    "blur_zero": lambda: blurred("zero"),
    "blur_reflect": lambda: blurred("reflect", (4, 3)),
    "blur_valid": lambda: blurred("valid", leading=True),
    "blur_line": lambda: Blur(Space.vector(9), normal(4, step=11, dtype=torch.float32), "zero"),
    "blur_volume": lambda: Blur(Space.grid((3, 4, 5), 1.0, "1"), normal(2, 3, 3, step=11, dtype=torch.float32)),
    "blur_gaussian": lambda: Blur.gaussian(Space.grid((6, 7), 0.5, "K"), 0.6),
    "downsampling": downsampled,
    "downsampling_uneven": lambda: downsampled((7, 8)),
    "downsampling_zero": lambda: downsampled(boundary="zero"),
    "downsampling_mean": lambda: Downsampling(Space.grid((6, 8), 0.5, "K"), 2),
    "coded_diffraction": coded_diffraction,
    "coded_diffraction_channels": lambda: coded_diffraction(channels=True),
    "far_field": lambda: CodedDiffraction(Space.grid((4, 3), 1.0, "1")),
    "sequence": dynamic,
    "sequence_of_unlike_frames": lambda: dynamic(same_range=False),
    "sequence_of_blurs": lambda: Sequence([blurred()] * 2),
    "slice_stack": slices,
    "slice_stack_unlike": lambda: slices("unlike"),
    "slice_stack_of_fields": lambda: slices("fields"),
    "slice_stack_mri": lambda: SliceStack(
        [scan((4, 5), 2), scan((4, 5), 2, masked=False)], complex_grid((2, 4, 5), 1e-3)
    ),
    "axis_difference": lambda: AxisDifference(slices().domain),
    "axis_difference_periodic": lambda: AxisDifference(slices("fields").domain, periodic=True),
    "point_sensors": stations,
    "point_sensors_nearest": lambda: stations("nearest"),
    "point_sensors_line": sounding,
    "coarse_grain": lambda: CoarseGrain(Space.grid((6, 9), (0.5, 0.2), "K"), 3),
    "coarse_grain_shared": coarse,
    "coarse_grain_valid": lambda: coarse(valid=True),
    "masked": masked,
    "masked_zeros": lambda: masked(zeros=True),
    "cartesian_mri": scan,
    "cartesian_mri_full": lambda: scan((4, 3), masked=False),
    "cartesian_mri_packed": lambda: scan((6, 5), coils=2, packed=True),
    "cartesian_mri_one_coil": lambda: scan((4, 6), coils=None),
    "cartesian_mri_one_coil_packed": lambda: scan((3, 5), coils=None, packed=True),
    "cartesian_mri_real": lambda: scan((4, 5), coils=2, real=True),
    "cartesian_mri_volume": lambda: scan((3, 4, 2), coils=2),
    "non_cartesian_mri": spokes,
    "non_cartesian_mri_one_coil": lambda: spokes((4, 5), coils=None),
    "non_cartesian_mri_real": lambda: spokes((6, 4), coils=2, real=True),
    "non_cartesian_mri_volume": lambda: spokes((4, 3, 5), coils=2),
    "non_cartesian_mri_gram": lambda: spokes().gram(normal(2, 9, step=21).abs()),
}
NONLINEAR: dict[str, Callable[[], Operator]] = {
    "joined": lambda: Joined([matrix(), PhaseRetrieval(complex_matrix()), complex_matrix()]),
    "whitened": lambda: Whitened(Whitening(matrix().range, covariance(5)), PhaseRetrieval(matrix())),
    "deepinv_nonlinear": deepinv_intensities,
    "phase_retrieval": lambda: PhaseRetrieval(coded_diffraction()),
    "phase_retrieval_complex": lambda: PhaseRetrieval(coded_diffraction(channels=True), "amplitude", 0.1),
    "phase_retrieval_real": lambda: PhaseRetrieval(matrix()),
    "gain_offset": lambda: GainOffset(PhaseRetrieval(matrix()), (0.8, 0.1), (0.3, 0.2), "datum"),
    "family": lambda: Family(scaled, ["gain"], numbers(0.7), numbers(0.1)),
    "beam_hardening": lambda: BeamHardening(50.0 * beam(), [0.3, 0.5, 0.2], [1.6, 1.0, 0.7]),
    "darcy": darcy,
    "darcy_layered": lambda: darcy("harmonic", log=True, boundary=0.3),
}
OPERATORS: dict[str, Callable[[], Operator]] = {**LINEAR, **NONLINEAR}


@dataclass(frozen=True)
class Case:
    """A likelihood as a function of what was measured, and one measurement.

    grids: per real number measured, values that hold all but a negligible part of the law at ``zoo.object_of``; for few data.
    """

    make: Callable[[torch.Tensor], Likelihood]
    y: torch.Tensor
    grids: tuple[torch.Tensor, ...] = ()

    def __call__(self) -> Likelihood:
        return self.make(self.y)


def object_of(like: Likelihood, n: int = 1) -> torch.Tensor:
    """Positive arrays, so that every law of the zoo is defined: (n, *domain.shape)."""
    return 0.3 + 0.2 * normal(n, *like.operator.domain.shape, step=22).abs()


def positive(rows: int, dtype: torch.dtype = torch.float64) -> MatrixOperator:
    return MatrixOperator(0.1 + 0.2 * normal(rows, 4, step=23, dtype=dtype).abs())


def wave(rows: int) -> MatrixOperator:
    return MatrixOperator(0.4 * torch.complex(normal(rows, 4, step=24), normal(rows, 4, step=25)))


def coils() -> MatrixOperator:
    """Complex data along two dimensions."""
    space = Space(("coil", "time"), (3, 2), {}, "V", complex=True)
    return MatrixOperator(torch.complex(normal(6, 4, step=24), normal(6, 4, step=25)), None, space)


def numbers(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def both_kinds(y: torch.Tensor) -> Likelihood:
    """Real data, complex ones and counts."""
    complex_ = GaussianLikelihood(wave(2), torch.complex(y[1:5:2], y[2:5:2]), 0.4)
    return StackedLikelihood(
        [GaussianLikelihood(positive(1), y[:1], 0.3), complex_, PoissonLikelihood(positive(1), y[5:])]
    )


LINE, COUNTED = torch.arange(-4.5, 4.6, 0.5, dtype=torch.float64), torch.arange(25, dtype=torch.float64)
PAIR = numbers(0.5, 0.1, 0.1, 0.4).reshape(2, 2)

LIKELIHOODS: dict[str, Case] = {
    "gaussian": Case(lambda y: GaussianLikelihood(positive(2), y, 0.5), numbers(0.3, 0.9), (LINE, LINE)),
    "gaussian_per_datum": Case(
        lambda y: GaussianLikelihood(positive(2), y, numbers(0.5, 0.7)), numbers(0.3, 0.9), (LINE, LINE)
    ),
    "gaussian_complex": Case(lambda y: GaussianLikelihood(wave(1), y, 0.5), numbers(0.3) + 0.9j, (LINE, LINE)),
    "gaussian_nonlinear": Case(lambda y: GaussianLikelihood(PhaseRetrieval(wave(1)), y, 0.5), numbers(0.6), (LINE,)),
    "correlated": Case(lambda y: GaussianLikelihood.correlated(positive(2), y, PAIR), numbers(0.3, 0.9), (LINE, LINE)),
    "correlated_complex": Case(
        lambda y: GaussianLikelihood.correlated(wave(1), y, numbers(0.6).reshape(1, 1)),
        numbers(0.3) + 0.9j,
        (LINE, LINE),
    ),
    "correlated_coils": Case(
        lambda y: GaussianLikelihood.correlated(coils(), y, covariance(3, complex_=True), "coil"),
        torch.complex(normal(3, 2, step=26), normal(3, 2, step=27)),
    ),
    "correlated_nonlinear": Case(
        lambda y: GaussianLikelihood.correlated(PhaseRetrieval(wave(2)), y, PAIR), numbers(0.3, 0.9), (LINE, LINE)
    ),
    "poisson": Case(
        lambda y: PoissonLikelihood(positive(1), y, gain=numbers(7.0), background=0.5), numbers(4), (COUNTED,)
    ),
    "poisson_without_background": Case(lambda y: PoissonLikelihood(positive(3), y, 2.5), numbers(0, 1, 5)),
    "transmission": Case(lambda y: TransmissionLikelihood(positive(1), y, numbers(4.0), 0.5), numbers(6), (COUNTED,)),
    "transmission_dark": Case(lambda y: TransmissionLikelihood(positive(3), y, numbers(9, 4, 30)), numbers(0, 6, 0)),
    "stacked": Case(
        lambda y: StackedLikelihood(
            [
                GaussianLikelihood(positive(1), y[:1], 0.5),
                GaussianLikelihood.correlated(positive(1), y[1:], PAIR[:1, :1]),
            ]
        ),
        numbers(0.3, 0.9),
        (LINE, LINE),
    ),
    "stacked_complex": Case(
        lambda y: StackedLikelihood([GaussianLikelihood(wave(2), y[:2], 0.4), GaussianLikelihood(wave(1), y[2:], 0.3)]),
        torch.complex(normal(3, step=26), normal(3, step=27)),
    ),
    "stacked_laws": Case(
        lambda y: StackedLikelihood(
            [PoissonLikelihood(positive(1), y[:1], 5.0), GaussianLikelihood(positive(1), y[1:], 0.5)]
        ),
        numbers(2, 0.9),
        (COUNTED, LINE),
    ),
    "stacked_both_kinds": Case(both_kinds, numbers(0.3, 0.2, -0.4, 0.7, 0.1, 1)),
}


def classes() -> set[type[Operator]]:
    """Every operator class that some instance of the zoo is or contains."""
    return {type(part) for make in OPERATORS.values() for part in make().modules() if isinstance(part, Operator)}


def likelihood_classes() -> set[type[Likelihood]]:
    """Every likelihood class that some instance of the zoo is or contains."""
    return {type(part) for make in LIKELIHOODS.values() for part in make().modules() if isinstance(part, Likelihood)}


def public_operators() -> set[type[Operator]]:
    """Every public operator class of the package, found by importing all of it."""
    return _public(Operator)


def public_likelihoods() -> set[type[Likelihood]]:
    """Every public likelihood class of the package."""
    return _public(Likelihood)


def _public(base: type[Base]) -> set[type[Base]]:
    for info in pkgutil.walk_packages(recon.__path__, "recon."):
        if not info.name.endswith("__main__"):
            importlib.import_module(info.name)
    return {
        found
        for found in _subclasses(base)
        if found.__module__.startswith("recon.") and not found.__name__.startswith("_") and found.__name__ not in BASES
    }


def _subclasses(base: type[Base]) -> Iterator[type[Base]]:
    for found in base.__subclasses__():
        yield found
        yield from _subclasses(found)


def dense(operator: LinearOperator) -> torch.Tensor:
    """The matrix of a small linear operator: (range.size, domain.size), complex numbers as pairs of real ones.

    Parts of the domain's numbers come one after the other (all real, all imaginary), those of the range's side by side.
    """
    n = operator.domain.size
    unit = torch.eye(n, dtype=operator.dtype).reshape(n, *operator.domain.shape)
    if operator.domain.complex:
        unit = torch.cat([unit, 1j * unit])
    columns = operator.A(unit)
    return (torch.view_as_real(columns) if columns.is_complex() else columns).flatten(1).T
