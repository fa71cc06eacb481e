"""Samplers: one file per method, and the loop that runs any of them."""

from recon.samplers.adaptive import Adaptive
from recon.samplers.base import GuidedSampler, LevelSampler, Sampler, State
from recon.samplers.blind import Blind, parameters
from recon.samplers.daps import DAPS
from recon.samplers.ddnm import DDNM
from recon.samplers.ddrm import DDRM
from recon.samplers.diffpir import DiffPIR
from recon.samplers.dps import DPS
from recon.samplers.events import Conditioned, Event, Events, probability
from recon.samplers.flowchef import FlowChef
from recon.samplers.grids import Optimised, Pilot, optimised_grid
from recon.samplers.langevin import Langevin
from recon.samplers.latent_dps import LatentDPS
from recon.samplers.loop import sample
from recon.samplers.mmps import MMPS
from recon.samplers.pigdm import PiGDM
from recon.samplers.pnpdm import PnPDM
from recon.samplers.reddiff import REDDiff
from recon.samplers.resample import ReSample
from recon.samplers.sda import SDA
from recon.samplers.smc import AFDPS, DDSMC, FPS, FKSteering, LocalisedSMC, MCGDiff, TwistedSMC
from recon.samplers.tmpd import TMPD
from recon.samplers.transitions import (
    DDIM,
    Ancestral,
    DPMSolver2M,
    DPMSolver2S,
    EulerMaruyama,
    Exponential,
    Heun,
    Renoise,
    SASolver,
)
from recon.samplers.unconditional import unconditional
from recon.samplers.volumes import DDS, Coupling, DiffusionMBIR, typical_weight, ztv
from recon.samplers.warm import WarmStart, sample_sequence, warm_start

_ALL: tuple[type[Sampler], ...] = (
    MMPS, PiGDM, TMPD, SDA, DPS, DiffPIR, DDNM, DDRM, FlowChef, DAPS, PnPDM, REDDiff, Langevin,
    LatentDPS, ReSample, DiffusionMBIR, DDS,
    TwistedSMC, MCGDiff, AFDPS, FPS, DDSMC, FKSteering, LocalisedSMC,
)  # fmt: skip

METHODS: dict[str, type[Sampler]] = {cls.__name__.lower(): cls for cls in _ALL}

__all__ = [
    "Adaptive", "DDS", "Coupling", "DiffusionMBIR", "typical_weight", "ztv",
    "AFDPS", "DDSMC", "FKSteering", "FPS", "LocalisedSMC", "MCGDiff", "TwistedSMC",
    "Blind", "Conditioned", "Event", "Events", "parameters", "probability",
    "DAPS", "DDIM", "DDNM", "DDRM", "DPS", "METHODS", "MMPS", "SDA", "TMPD", "Ancestral",
    "DPMSolver2M", "DPMSolver2S", "DiffPIR", "EulerMaruyama", "Exponential", "FlowChef", "GuidedSampler", "Heun",
    "LatentDPS", "Langevin", "LevelSampler", "Optimised", "PiGDM", "Pilot", "PnPDM", "REDDiff", "ReSample", "Renoise",
    "SASolver", "Sampler", "State", "WarmStart", "optimised_grid", "sample", "sample_sequence", "unconditional", "warm_start",
]  # fmt: skip
