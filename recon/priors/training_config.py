"""What a training run is asked for, and where it stands: the section ``training`` of a ``train.yaml`` and its record."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class EarlyStop(BaseModel):
    """When to end before the images are used up: the validation curve has not improved ``patience`` times in a row.

    sigma: the one of validation_sigmas whose held-out error counts; without it the geometric mean over all of them, to which
    every level contributes its relative change.  The weights that are kept are those of the best validation.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    patience: int = Field(ge=1)
    sigma: float | None = Field(default=None, gt=0)

    def score(self, errors: Mapping[float, float]) -> float:
        """One number, smaller is better, of the held-out errors by noise level."""
        if self.sigma is not None:
            return errors[self.sigma]
        return math.exp(sum(math.log(max(error, 1e-300)) for error in errors.values()) / len(errors))


class TrainingConfig(BaseModel):
    """How a network is trained.

    The end comes at ``images`` or after ``seconds`` of training, whichever is first; the learning rate decays to zero along
    the one that is closer.  A batch is cut into chunks whose gradients are added in a fixed order, so the result does not
    depend on the number of threads or processes; on a CPU a chunk is the work of one thread, on a GPU chunks follow each
    other, and either way ``chunk`` bounds the memory.  learning_rate is reached after ``warmup`` images.  ema: half-life of
    the average in images, and never more than a twentieth of those seen.  clip: largest norm of the gradient.  device:
    "auto" is CUDA where there is one.  precision: "auto" times both types on a CPU and is bfloat16 on a GPU that has it.
    compile: let torch compile the network (CUDA only; on a CPU it changes nothing).  early_stop: None goes to the end.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: int = Field(default=0, ge=0)
    images: int = Field(ge=1)
    seconds: float | None = Field(default=None, gt=0)
    batch: int = Field(default=16, ge=1)
    chunk: int = Field(default=4, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    warmup: int = Field(default=1000, ge=0)
    p_mean: float = -1.2
    p_std: float = Field(default=1.2, gt=0)
    tail: float = Field(default=0.1, ge=0, le=1)
    ema: int = Field(default=1000, ge=1)
    clip: float = Field(default=1.0, gt=0)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: bool = False
    progress_seconds: float = Field(default=30, gt=0)
    checkpoint_seconds: float = Field(default=240, gt=0)
    validate_images: int = Field(default=5000, ge=1)
    validation_sigmas: tuple[float, ...] = Field(default=(0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 3.0, 10.0), min_length=1)
    early_stop: EarlyStop | None = None

    @model_validator(mode="after")
    def _fitting(self) -> Self:
        if not all(sigma > 0 for sigma in self.validation_sigmas):
            raise ValueError("validation_sigmas must be positive")
        if "chunk" in self.model_fields_set and self.chunk > self.batch:
            raise ValueError(f"a batch of {self.batch} images has no chunk of {self.chunk}; chunk is at most batch")
        stop = self.early_stop
        if stop is not None and stop.sigma is not None and stop.sigma not in self.validation_sigmas:
            raise ValueError(
                f"early_stop.sigma must be one of validation_sigmas {self.validation_sigmas}; got {stop.sigma}"
            )
        return self

    @property
    def chunks(self) -> list[slice]:
        """The images of each chunk of a batch, in order."""
        return [slice(first, min(first + self.chunk, self.batch)) for first in range(0, self.batch, self.chunk)]

    def same_run(self, stated: Mapping[str, object]) -> bool:
        """Whether a checkpoint's settings, as JSON has them, are of this run; what changes no number may differ.

        Keys that are younger than the checkpoint stand at their defaults.
        """
        ours = self.model_dump(mode="json")
        free = {"device", "compile", "progress_seconds", "checkpoint_seconds"}
        young = {k: v.default for k, v in type(self).model_fields.items() if k not in stated}
        theirs = {**young, **stated}
        return all(theirs.get(key) == ours.get(key) for key in (ours.keys() | theirs.keys()) - free)


@dataclass
class Progress:
    """Where a training run stands, and what its log says: one record per progress line or validation.

    validated: images seen at the last validation.  best: its score so far, after ``best_images``; waited: validations since.
    stopped: ended early.
    """

    step: int = 0
    images: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    validated: int = 0
    best: float | None = None
    best_images: int = 0
    waited: int = 0
    stopped: bool = False
