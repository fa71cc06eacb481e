"""The first half of training a latent prior: its autoencoder, and images seen through it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from recon.comm import Comm
from recon.priors.autoencoder import Autoencoder, AutoencoderArchitecture, Autoencoding, build_autoencoder
from recon.priors.objective import Batch, HeldOut, Task
from recon.priors.training import Training, TrainingConfig
from recon.schedules import Schedule

_FIT_IMAGES = 512  # training images from which the latent's channels learn their mean and standard deviation


class AutoencoderSection(BaseModel):
    """The section ``autoencoder`` of a ``train.yaml``; noise and fidelity: see ``recon.priors.autoencoder``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    architecture: AutoencoderArchitecture
    noise: float = Field(gt=0)
    fidelity: float = Field(gt=0)
    training: TrainingConfig


Images = Callable[[int, Sequence[int]], Batch]
"""(step, numbers within the batch) -> normalised training images."""


@dataclass(frozen=True)
class Shown:
    """What an autoencoder is shown: training images, held-out ones for its curve, and a name for the two."""

    images: Images
    held_out: Tensor
    identity: str


def fitted(
    section: AutoencoderSection,
    data: Shown,
    folder: Path | None,
    comm: Comm,
    say: Callable[[str], None],
    stop: Callable[[], bool] = lambda: False,
) -> Autoencoder:
    """The autoencoder of a section, trained on ``data`` to the end; a checkpoint in ``folder`` is resumed.

    What is returned has the weights that float16 keeps, so the latents a denoiser
    is trained on are those of the file.
    """
    network = build_autoencoder(section.architecture, section.training.seed).train()
    task = Task(
        network,
        data.images,
        Schedule(1e-3, 1.0),  # levels belong to denoisers; none is used
        sigma_data=1.0,
        held_out=HeldOut(data.held_out) if len(data.held_out) else None,
        identity=data.identity,
        objective=Autoencoding(section.noise, section.fidelity),
    )
    training = Training(section.training, task, folder, comm)
    if training.share() < 1:
        say(
            f"autoencoder: {sum(p.numel() for p in training.parameters):,} weights, from image {training.progress.images:,}"
        )
    training.run(say, stop=stop)
    coder = build_autoencoder(section.architecture)
    with torch.no_grad():
        for name, value in training.averaged().items():
            coder.get_parameter(name).copy_(value.to(torch.float16))
    coder.eval().requires_grad_(False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the last bits of the means depend on it, and everything after on them
    batch = section.training.batch
    steps = range(-(-_FIT_IMAGES // batch))
    coder.standardise(torch.cat([data.images(step, range(batch)).images for step in steps]))
    torch.set_num_threads(threads)
    return coder


def seen_through(coder: Autoencoder | None, images: Images) -> Images:
    """Batches of latents in place of images; without a coder the images."""
    if coder is None:
        return images

    def batches(step: int, rows: Sequence[int]) -> Batch:
        batch = images(step, rows)
        return Batch(coded(coder, batch.images), coder.known(batch.known), batch.context)

    return batches


def coded(coder: Autoencoder | None, images: Tensor, batch: int = 16) -> Tensor:
    """The latents of normalised images; without a coder the images."""
    if coder is None or not len(images):
        return images
    with torch.no_grad():
        return torch.cat([coder.encode(part) for part in images.split(batch)])


def loss_of_coding(coder: Autoencoder, images: Tensor, known: Tensor | None, batch: int = 16) -> float:
    """RMSE of normalised images (n, [fields,] ny, nx) that were coded and decoded, over the known pixels."""
    total, pixels = 0.0, 0.0
    masks = torch.ones_like(images) if known is None else known.to(images.dtype)
    with torch.no_grad():
        for part, mask in zip(images.split(batch), masks.split(batch), strict=True):
            wrong = (coder.decode(coder.encode(part)).reshape(part.shape) - part).double().square()
            total += float((mask * wrong).sum())
            pixels += float(mask.sum())
    return float((total / pixels) ** 0.5)
