"""Samplers: one file per method, and the loop that runs any of them."""

from recon.samplers.base import GuidedSampler, Sampler, State
from recon.samplers.diffpir import DiffPIR
from recon.samplers.dps import DPS
from recon.samplers.loop import sample
from recon.samplers.mmps import MMPS
from recon.samplers.transitions import DDIM, Ancestral, Renoise
from recon.samplers.unconditional import unconditional

METHODS: dict[str, type[Sampler]] = {cls.__name__.lower(): cls for cls in (MMPS, DPS, DiffPIR)}

__all__ = [
    "DDIM", "DPS", "METHODS", "MMPS", "Ancestral", "DiffPIR", "GuidedSampler", "Renoise", "Sampler", "State", "sample",
    "unconditional",
]  # fmt: skip
