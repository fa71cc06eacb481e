"""What a prior believes, measured and written on its card: draws, their likeness to held-out images, another yardstick.

The prior's folder keeps its ``train.yaml``, which says where the images come from.  ``card.yaml`` is completed and
``draws.png`` written beside it; the weights are not touched.
"""

from __future__ import annotations

import base64
import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from recon.diagnostics.samples import Distances, distances, floor
from recon.errors import InputError
from recon.files import written_aside
from recon.priors.base import Prior
from recon.priors.cards import Drawn, Error, Likeness, PriorCard
from recon.priors.denoising import denoising_error, non_local_means
from recon.priors.store import read_card, read_prior, write_card
from recon.report.sheet import sheet
from recon.samplers.unconditional import unconditional
from recon.workflows.train import read_train_file
from recon.workflows.training_data import Images, TrainingData

log = logging.getLogger("recon.inspect")

SHOWN = 16  # draws in the picture
_SUBSETS = 8  # of training images, for the floor
_POOL = 4  # times as many training images as are compared


def inspect(
    folder: Path,
    draws: int = 64,
    steps: int = 32,
    seed: int = 0,
    workspace: Path | None = None,
    say: Callable[[str], None] = log.info,
) -> PriorCard:
    """Draw from the prior in ``folder``, compare, and complete its card, which is returned.

    draws: as many as there are held-out images are compared, at most this many.
    Raises InputError when the folder is no prior, has no ``train.yaml``, or the data sets that it names are missing.
    """
    if draws < SHOWN:
        raise InputError(f"inspect shows {SHOWN} draws and compares the rest; got draws={draws}")
    prior, card = read_prior(folder), read_card(folder)
    data = read_train_file(folder / "train.yaml").data(workspace)
    say(f"{draws} draws in {steps} steps")
    ensemble = unconditional(prior, draws, steps, seed)
    rows = []
    for name, images in data.held_out().items():
        rows.append(_likeness(prior, data, name, images, ensemble.x))
        say(f"{name}: {rows[-1]}")
    picture = sheet(ensemble.x[:SHOWN], prior.space)
    errors = tuple(_completed(prior, data.held_out()[row.data], row) for row in card.denoising)
    seen = Drawn(count=draws, steps=steps, seed=seed, likeness=tuple(rows))
    card = card.model_copy(update={"draws": seen, "denoising": errors})
    with written_aside(folder / "draws.png") as aside:
        aside.write_bytes(base64.b64decode(picture.light.split(",", 1)[1]))
        aside.chmod(0o644)
    write_card(folder, card)
    return card


def _likeness(prior: Prior, data: TrainingData, name: str, held_out: Images, x: Tensor) -> Likeness:
    """In normalised pixels, where fields of different units are comparable; only where every image is known."""
    count = min(len(x), len(held_out[0]))
    step = len(held_out[0]) / count
    rows = torch.tensor([int(i * step) for i in range(count)])
    training, known = data.batch(0, _POOL * count)
    everywhere = known.bool().all(0) & (True if held_out[1] is None else held_out[1].bool().all(0))
    if not bool(everywhere.any()):  # clipped values differ from image to image: compare them as they are
        everywhere = torch.ones_like(everywhere)
    real, drawn, pool = (
        torch.where(everywhere, Prior.encode(prior, v), 0.0) for v in (held_out[0][rows], x[:count], training)
    )
    ours = distances(drawn, real)
    training_row = _mean(floor(pool, real, _SUBSETS))
    return Likeness(
        data=name,
        images=count,
        **{key: _short(value) for key, value in vars(ours).items()},
        **{f"{key}_training": _short(value) for key, value in vars(training_row).items()},
    )


def _mean(rows: list[Distances]) -> Distances:
    return Distances(*(sum(getattr(r, key) for r in rows) / len(rows) for key in ("spectrum", "histogram", "sliced")))


def _completed(prior: Prior, held_out: Images, row: Error) -> Error:
    """The row with the error of non-local means on the same noisy images; latents of a network are none."""
    if not prior.affine:
        return row
    images, known = prior.encode(held_out[0]).float(), held_out[1]
    return row.model_copy(update={"non_local_means": _short(denoising_error(non_local_means, images, row.sigma, known=known))})


def _short(value: float) -> float:
    return float(f"{value:.4g}")
