"""What learning from measurements is asked for."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from recon.priors.training_config import TrainingConfig


class LearningConfig(BaseModel):
    """How a prior is learnt from measurements alone.

    rank, moment_iterations: of the Gaussian of lap 0.  around: the network learns what that
    Gaussian leaves (``learning.around``); without it, it learns everything itself.  laps: how
    often samples are drawn and a network is trained on them.
    per_observation: samples of each observation and lap.  steps, cg_iterations: of the posterior sampler (a vjp per CG
    iteration and one more).  block: samples that are drawn together; None for about 65,000 values; part of what the result
    depends on, to rounding.  training: of one lap, the first ``first`` times as long; its seed is that of learning plus the
    lap.  mirror: chances of a mirror image along (y, x) in training, where the physics has no preferred side.  sigma_min,
    sigma_max: noise levels in units of the latent, whose standard deviation is 0.5.  chi2_limit, size_limit: a sample whose
    misfit per datum exceeds the one, or whose latent root mean square exceeds the other, has diverged and is left out.
    diverged_limit: share of such samples at which learning stops.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: int = Field(default=0, ge=0, lt=2**32)
    rank: int = Field(default=32, ge=1)
    moment_iterations: int = Field(default=16, ge=1)
    laps: int = Field(ge=1)
    around: bool = True
    per_observation: int = Field(default=1, ge=1)
    steps: int = Field(default=32, ge=2)
    cg_iterations: int = Field(default=3, ge=1)
    block: int | None = Field(default=None, ge=1)
    training: TrainingConfig
    first: float = Field(default=1.0, gt=0)
    mirror: tuple[float, float] = (0.0, 0.0)
    sigma_min: float = Field(default=0.005, gt=0)
    sigma_max: float = Field(default=40.0, gt=0)
    chi2_limit: float = Field(default=10.0, gt=1)
    size_limit: float = Field(default=5.0, gt=0)
    diverged_limit: float = Field(default=0.5, gt=0, le=1)

    def lap_training(self, lap: int) -> TrainingConfig:
        """The training of one lap, from 1 on."""
        length = self.first if lap == 1 else 1.0
        images = max(1, round(self.training.images * length))
        return self.training.model_copy(update={"seed": self.seed + lap, "images": images})
