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

KEPT = 1024  # excesses that are kept of a case: shares of pixels are known to 0.1 %
WHOLE, MEAN = "all", "mean of "


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
    problem; a pure function.
    """

    name: str
    about: str
    cases: int
    pose: Callable[[int, int, int], Posed]


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
    """Sample a case with noise keyed by ``seed``, and what is kept of it: about, record, needs, spacing; JSON values.

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
    if not record.failed:
        record = _worth(_where_known(record, (x, truth, known), ask, drawn), drawn)
    domain = posterior.likelihood.operator.domain
    needs = {} if record.failed else _needs(x, truth, {WHOLE: known, **regions}, campaign.level, drawn)
    return {
        "about": posed.about,
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


def _needs(
    x: Tensor, truth: Tensor, masks: Mapping[str, Tensor], level: float, drawn: Ensemble
) -> dict[str, np.ndarray | str]:
    """Per interval that a report shows: sorted excesses of its values, or why there are none."""
    found: dict[str, np.ndarray | str] = {}
    if drawn.ess < draws_needed(level) - 1e-6:
        why = f"{100 * level:g} % intervals need {draws_needed(level)} effective draws; there are {drawn.ess:.3g}"
        return {name: why for mask in masks for name in (mask, MEAN + mask)}
    for name, mask in masks.items():
        rows, t = x[:, mask], truth[mask]
        for key, values, own in ((name, rows, t), (MEAN + name, rows.double().mean(1, True), t.double().mean(0, True))):
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
