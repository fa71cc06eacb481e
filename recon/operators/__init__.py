"""Physics: forward models with matched transposes, batched over draws."""

from recon.operators.algebra import Stack
from recon.operators.base import LinearOperator, Operator
from recon.operators.cg import CG
from recon.operators.matrix import MatrixOperator
from recon.operators.parallel_beam import ParallelBeam, ParallelGeometry

__all__ = ["CG", "LinearOperator", "MatrixOperator", "Operator", "ParallelBeam", "ParallelGeometry", "Stack"]
