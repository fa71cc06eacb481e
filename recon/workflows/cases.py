"""One case of a campaign: a problem with its truth, sampled, and in numbers that go into a small file.

What is compared is what is known of the truth, in physical units, or, where fields have units of their own, in those of the
prior's latent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recon.comm import Comm
from recon.diagnostics import Ask, CaseRecord, case_coverage, case_need, case_record, probes
from recon.diagnostics.intervals import draws_needed
from recon.diagnostics.ranks import Probe
from recon.ensemble import Ensemble
from recon.errors import InputError
from recon.posterior import Posterior
from recon.priors import Prior
from recon.samplers import Sampler, sample
from recon.samplers.loop import Watcher
from recon.space import Space
from recon.workflows.outliers import case_figures

KEPT = 1024  # excesses that are kept of a case: shares of pixels are known to 0.1 %
WHOLE, MEAN, TILES = "all", "mean of ", "means of tiles"
ACROSS, SIDE = 8, 4  # tiles: at most so many across an image, of at least so many pixels a side
QUIET = 0.1  # tiles whose rms is less than this share of the largest one's are air, not object


@dataclass(frozen=True)
class Posed:
    """One problem with its truth.  truth: *space, physical units.  about: where it comes from."""

    truth: Tensor
    posterior: Posterior
    about: str = ""


@dataclass(frozen=True)
class Population:
    """Where truths come from.

    name: for files.  about: in words.  cases: how many are asked for.  pose: (case, seed of the truth, seed of the noise) -> a
    problem; a pure function.  fresh: how many further ones only check what the first ones state.
    """

    name: str
    about: str
    cases: int
    pose: Callable[[int, int, int], Posed]
    fresh: int = 0

    @property
    def total(self) -> int:
        """All that are computed: case numbers 0 to ``total - 1``."""
        return self.cases + self.fresh


@dataclass(frozen=True)
class Campaign:
    """What is sampled, and what is asked of every case; the same sampler, draws and blocks as the runs it speaks for."""

    populations: tuple[Population, ...]
    sampler: Sampler
    draws: int
    seed: int = 0
    block: int | None = None
    level: float = 0.9


def measured(campaign: Campaign, case: int, posed: Posed, seed: int, around: tuple[Comm, Watcher]) -> dict[str, Any]:
    """Sample a case with noise keyed by ``seed``, and what is kept of it: about, figures, record, needs, spacing; JSON values.

    needs: interval -> sorted excesses (``case_need``), or the text that says why there are none.  around: ranks and threads
    that sample, and who watches.  Raises what the sampler does.
    """
    posterior, sampler = posed.posterior, campaign.sampler
    drawn = sample(posterior, sampler, campaign.draws, seed, campaign.block, *around)
    view, known = View(posterior.prior), ~posed.truth.isnan()
    x, truth = (torch.where(known, view(values), 0.0) for values in (drawn.x, posed.truth))
    regions = {name: mask & known for name, mask in regions_of(posterior.space).items() if bool((mask & known).any())}
    ask = Ask(campaign.level, regions, _functions(posterior, view), campaign.seed)
    record = case_record(x, truth, ask, drawn.log_weights, case)
    tiles = tile_means(torch.cat([x, truth[None].to(x)]), known)
    if not record.failed:
        record = _where_known(record, (x, truth, known), ask, drawn)
        if tiles is not None and record.hits is not None:
            own = case_coverage(tiles[:-1], tiles[-1], ask.level, None, drawn.log_weights)
            record = replace(record, hits={**record.hits, **({} if own is None else {TILES: own[WHOLE]})})
        record = _worth(record, drawn)
    domain = posterior.likelihood.operator.domain
    needs = {} if record.failed else _needs(x, truth, {WHOLE: known, **regions}, campaign.level, drawn, tiles)
    return {
        "about": posed.about,
        "figures": {}
        if record.failed
        else case_figures(posterior.likelihood, drawn, None if view.scaled else posed.truth),
        "record": record.summary(),
        "needs": {name: need if isinstance(need, str) else need.tolist() for name, need in needs.items()},
        "spacing": domain.spacing(domain.dims[-1]) if domain.dims[-1] in domain.coords else None,
    }


def failed_record(case: int, level: float, why: str) -> CaseRecord:
    """The record of a case without numbers."""
    nan = math.nan
    return CaseRecord(case, 0.0, level, {}, None, nan, nan, nan, nan, why)


def _where_known(record: CaseRecord, given: tuple[Tensor, Tensor, Tensor], ask: Ask, drawn: Ensemble) -> CaseRecord:
    """Figures over values, where some of the truth are unknown (and zero on both sides): of those that are known."""
    x, truth, known = given
    if bool(known.all()):
        return record
    share = float(known.double().mean())
    regions = {name: mask[known] for name, mask in ask.regions.items()}
    hits = case_coverage(x[:, known], truth[known], ask.level, regions, drawn.log_weights)
    means = {name: getattr(record, name) / share for name in ("spread", "error", "crps")}
    return replace(record, hits=hits, **means)


def _worth(record: CaseRecord, drawn: Ensemble) -> CaseRecord:
    """Particles that were resampled count as their distinct ancestors."""
    ess = min(record.ess, drawn.ess)
    enough = ess >= draws_needed(record.level) - 1e-6
    return replace(record, ess=ess, hits=record.hits if enough else None)


@dataclass(frozen=True)
class View:
    """The numbers that are compared: physical ones, or, where fields have units of their own, those of the prior's latent.

    Ranks, coverage and stretches of single pixels are the same in both; means over several fields exist in the second only.
    """

    prior: Prior

    @property
    def scaled(self) -> bool:
        """Whether fields have scales of their own."""
        return self.prior.affine and self.prior.scale.ndim > 0

    def __call__(self, x: Tensor) -> Tensor:
        """From physical units."""
        x = x.detach().cpu()
        return self.prior.encode(x.to(self.prior.device).double()).cpu() if self.scaled else x

    def back(self, x: Tensor) -> Tensor:
        """To physical units, in the prior's floating type and where it computes."""
        x = x.to(self.prior.device)
        return (self.prior.decode(x) if self.scaled else x).to(self.prior.dtype)


def _functions(posterior: Posterior, view: View) -> dict[str, Probe]:
    like = posterior.likelihood
    return probes(posterior.space.shape) | {"misfit": lambda x: -like.log_prob(view.back(x)).cpu()}


def regions_of(space: Space) -> dict[str, Tensor]:
    """Parts of an array that are judged by themselves: each named field, or the middle and the border of an image."""
    shape, first = space.shape, space.coords.get(space.dims[0])
    masks: dict[str, Tensor] = {}
    if len(shape) > 1 and isinstance(first, tuple):
        for i, name in enumerate(first):
            masks[str(name)] = torch.zeros(shape, dtype=torch.bool)
            masks[str(name)][i] = True
        return masks if len(masks) > 1 else {}
    if len(shape) < 2 or min(shape[-2:]) < 4:
        return {}
    middle = torch.zeros(shape, dtype=torch.bool)
    rows, columns = (slice(n // 4, n - n // 4) for n in shape[-2:])
    middle[..., rows, columns] = True
    return {"middle": middle, "border": ~middle}


def tile_means(x: Tensor, known: Tensor) -> Tensor | None:
    """Means over the tiles of an image, (row, tile) of ``x`` (row, *space); None where it is too small for two of them.

    Tiles are near-equal parts of the last two axes, at most 8 x 8 with at least 4 pixels a side, of every image of the
    leading axes.  known: *space; means are over known values, tiles without any are left out, and so are those of air: rms
    over all rows below a tenth of the largest.  The rows, draws and truth, count alike in that, so leaving out favours none.
    """
    ny, nx = x.shape[-2:] if x.ndim > 2 else (1, 1)
    parts = [min(ACROSS, n // SIDE) for n in (ny, nx)]
    if min(parts) < 1 or max(parts) < 2:
        return None
    down, along = (
        torch.nn.functional.one_hot(torch.arange(n) * k // n, k).double() for n, k in zip((ny, nx), parts, strict=True)
    )
    here = torch.where(known, x.double(), 0.0)
    count, total, square = (
        (down.T @ values @ along).flatten(-known.ndim) for values in (known.double(), here, here.square())
    )
    present = count > 0
    energy = square.mean(0)[present] / count[present]
    loud = energy >= QUIET**2 * energy.max()
    return (total[:, present] / count[present])[:, loud]


def _needs(
    x: Tensor, truth: Tensor, masks: Mapping[str, Tensor], level: float, drawn: Ensemble, tiles: Tensor | None = None
) -> dict[str, np.ndarray | str]:
    """Per interval that a report shows: sorted excesses of its values, or why there are none."""
    found: dict[str, np.ndarray | str] = {}
    if drawn.ess < draws_needed(level) - 1e-6:
        why = f"{100 * level:g} % intervals need {draws_needed(level)} effective draws; there are {drawn.ess:.3g}"
        names = [name for mask in masks for name in (mask, MEAN + mask)]
        return dict.fromkeys(names if tiles is None else [*names, TILES], why)
    asked = []
    for name, mask in masks.items():
        rows, t = x[:, mask], truth[mask]
        asked += [(name, rows, t), (MEAN + name, rows.double().mean(1, True), t.double().mean(0, True))]
    if tiles is not None:
        asked.append((TILES, tiles[:-1], tiles[-1]))
    for key, values, own in asked:
        try:
            found[key] = thinned(case_need(values, own, level, drawn.log_weights).excess)
        except InputError as error:
            found[key] = str(error)
    return found


def thinned(excess: np.ndarray, kept: int = KEPT) -> np.ndarray:
    """At most ``kept`` of sorted numbers: of each group of neighbours the largest, so no stretch comes out too small."""
    n = len(excess)
    if n <= kept:
        return excess
    ends = np.ceil((np.arange(kept) + 1) * n / kept).astype(int) - 1
    return excess[ends]
