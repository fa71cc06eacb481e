"""Physics: forward models with matched transposes, batched over draws."""

from recon.operators.algebra import Diagonal, Joined, Stack
from recon.operators.base import LinearOperator, Operator
from recon.operators.beam_hardening import BeamHardening
from recon.operators.blur import Blur
from recon.operators.cartesian_mri import CartesianMRI
from recon.operators.cg import CG
from recon.operators.coarse_grain import CoarseGrain
from recon.operators.cone_beam import ConeBeam, ConeGeometry, VectorGeometry
from recon.operators.cone_slabs import ConeBeamSlab
from recon.operators.deepinv_bridge import from_deepinv
from recon.operators.downsampling import Downsampling
from recon.operators.fan_beam import FanBeam, FanGeometry
from recon.operators.fourier import complex_grid
from recon.operators.masked import Masked
from recon.operators.matrix import MatrixOperator
from recon.operators.non_cartesian_mri import NonCartesianMRI, WeightedGram
from recon.operators.parallel_beam import ParallelBeam, ParallelGeometry
from recon.operators.parametric import Family, GainOffset, ParametricOperator
from recon.operators.pde_residual import PDEResidual
from recon.operators.phase_encoded import PhaseEncodedMRI
from recon.operators.phase_retrieval import CodedDiffraction, PhaseRetrieval
from recon.operators.planar import PlanarVectors
from recon.operators.point_sensors import PointSensors
from recon.operators.scipy_bridge import from_scipy
from recon.operators.sequence import Sequence
from recon.operators.slabs import AxisDifference, Slab
from recon.operators.slices import SliceStack
from recon.operators.stations import Stations
from recon.operators.whitening import Whitened, Whitening

__all__ = [
    "AxisDifference",
    "BeamHardening",
    "Blur",
    "CG",
    "CartesianMRI",
    "CoarseGrain",
    "CodedDiffraction",
    "ConeBeam",
    "ConeBeamSlab",
    "ConeGeometry",
    "Diagonal",
    "Downsampling",
    "FanBeam",
    "Family",
    "FanGeometry",
    "GainOffset",
    "Joined",
    "LinearOperator",
    "Masked",
    "MatrixOperator",
    "NonCartesianMRI",
    "Operator",
    "ParallelBeam",
    "ParallelGeometry",
    "ParametricOperator",
    "PDEResidual",
    "PhaseEncodedMRI",
    "PhaseRetrieval",
    "PlanarVectors",
    "PointSensors",
    "Sequence",
    "Slab",
    "SliceStack",
    "Stack",
    "Stations",
    "VectorGeometry",
    "WeightedGram",
    "Whitened",
    "Whitening",
    "complex_grid",
    "from_deepinv",
    "from_scipy",
]
