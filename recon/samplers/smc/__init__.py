"""Particle methods: weighted draws that meet, whose error falls like one over the root of their number."""

from recon.samplers.smc.afdps import AFDPS
from recon.samplers.smc.ddsmc import DDSMC
from recon.samplers.smc.fksteering import FKSteering
from recon.samplers.smc.fps import FPS
from recon.samplers.smc.localised import LocalisedSMC
from recon.samplers.smc.mcgdiff import MCGDiff
from recon.samplers.smc.moves import Moves
from recon.samplers.smc.particles import ParticleSampler
from recon.samplers.smc.twisted import TwistedSMC
from recon.samplers.smc.twists import Guided, Matched, Plain, Twist

__all__ = [
    "AFDPS", "DDSMC", "FKSteering", "FPS", "Guided", "LocalisedSMC", "MCGDiff", "Matched", "Moves", "ParticleSampler",
    "Plain", "TwistedSMC", "Twist",
]  # fmt: skip
