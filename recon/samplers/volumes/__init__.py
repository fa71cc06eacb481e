"""Volumes from a prior of slices: what couples the slices, and the two published samplers built on it."""

from recon.samplers.volumes.dds import DDS
from recon.samplers.volumes.mbir import DiffusionMBIR
from recon.samplers.volumes.ztv import Coupling, typical_weight, ztv

__all__ = ["DDS", "Coupling", "DiffusionMBIR", "typical_weight", "ztv"]
