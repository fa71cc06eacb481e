r"""Particles with weights: what every particle method shares (Del Moral 2004; Naesseth, Lindsten and Schoen 2019).

A method has a positive function ``psi_sigma(z)`` for each noise level, its guess of ``p(y | z)``, with ``psi_0 = p(y | x)``,
and a proposal ``q``.  With ``p`` the reverse kernel of the prior's chain::

    z ~ N(D(0), sigma_0^2),   l = 0
    for each step, sigma -> sigma':
        z' ~ q(z' | z, y);   l += log p(z' | z) - log q(z' | z, y)        # step: each particle by itself
        w = exp(l + log psi_sigma'(z'))                                   # couple: the particles meet
        where 1 / sum W^2 < threshold K: resample by W;   l = - log psi_sigma'(z')

``l`` never holds psi, so what psi says on the way cancels whatever psi is, and the weights end at prior over proposal
times likelihood.  The evidence ``p(y)`` is estimated without bias by the product of the mean weights at the resamplings.  The
limit of many particles is the posterior under the *chain's* prior, whose error is that of the grid (``twisted`` says how
small).

``l``, psi and sums over them are float64.  What each step found (``RECORDS``) is kept in the state, hence in checkpoints, and
ends in the ensemble's ``info["particles"]``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from recon.comm import Comm
from recon.draws import Draws
from recon.ensemble import Ensemble
from recon.errors import InputError
from recon.operators.cg import spread as over
from recon.posterior import Posterior
from recon.samplers.base import LevelSampler, State
from recon.samplers.smc.exchange import Table, carry_out
from recon.samplers.smc.moves import Moves
from recon.samplers.smc.resampling import SCHEMES, Scheme, children, parents
from recon.samplers.smc.weights import effective, evidence_variance, log_mean, normalised, tempered

RECORDS = ("ess", "distinct", "largest", "log_evidence", "temper", "resampled", "quarantined")
"""Per step: effective size before resampling, particles of the start with a descendant, largest weight, running log evidence,
exponent of psi, whether it resampled, particles newly set aside because something about them was not a number."""

COMMON = 2**32 - 1
"""The draw number whose random numbers all particles share."""

_ROW = "record."
_KEPT = ("first", "memory", "out")  # rows of a particle's past; every other row of ``aux`` is its look


@dataclass(frozen=True)
class Level:
    """Where a step is: its number, noise level, the next one, and the keyed noise of its particles."""

    k: int
    sigma: float
    after: float
    draws: Draws

    def normal(self, like: Tensor, first: int = 0) -> Tensor:
        """Standard normal numbers shaped as ``like`` (n, ...), those at positions ``first ...`` of this step."""
        shape = tuple(like.shape[1:])
        return self.draws.normal(self.k, shape, "step", dtype=like.dtype, first=first).to(like.device)


Look = Mapping[str, Tensor]
"""What a method knows of particles at one level, a row each; "log_psi" (n,) is among it."""


@dataclass(frozen=True)
class ParticleSampler(LevelSampler):
    """Weighted particles; subclasses say ``look`` and ``move``.

    threshold: resample when the effective size falls below this share of the particles.  scheme: how.  keep: where positive,
    psi is taken to the largest power (at most one) at which this share stays effective (a ladder of temperatures that finds
    its own rungs).  moves: Langevin moves of every particle after a resampling.
    """

    couples: ClassVar[bool] = True
    advice: ClassVar[str] = "take more steps"

    threshold: float = 0.5
    scheme: Scheme = "systematic"
    keep: float = 0.0
    moves: Moves = dataclasses.field(default_factory=Moves)

    def check(self, posterior: Posterior) -> None:
        super().check(posterior)
        name = type(self).__name__
        if self.scheme not in SCHEMES:
            raise InputError(f"{name} resamples by one of {', '.join(SCHEMES)}; got {self.scheme!r}")
        if not 0 <= self.threshold <= 1 or not 0 <= self.keep < 1:
            raise InputError(f"{name} needs threshold in [0, 1] and keep in [0, 1); got {self.threshold}, {self.keep}")
        require_law(posterior, name)

    def look(self, posterior: Posterior, z: Tensor, level: Level) -> Look:
        """What is needed of particles at ``level.sigma``: psi, and all that ``move`` will ask for."""
        raise TypeError(f"{type(self).__name__} must define look")

    def move(self, posterior: Posterior, z: Tensor, look: Look, level: Level) -> tuple[Tensor, Tensor]:
        """New states and ``log p(z' | z) - log q(z' | z, y)``, (n,) float64."""
        raise TypeError(f"{type(self).__name__} must define move")

    def fields(self, posterior: Posterior, look: Look) -> tuple[Tensor, Tensor]:
        """``E[z0 | z]`` and the guess of ``E[z0 | z, y]``, for Langevin moves."""
        raise InputError(f"{type(self).__name__} has no moves; set moves.count to 0")

    def may_resample(self, k: int) -> bool:
        """Whether particles may be replaced after step ``k``."""
        return True

    def last(self, posterior: Posterior, z: Tensor, look: Look) -> Tensor:
        """``log psi_0``: ``log p(y | x(z))``, (n,)."""
        posterior.count("forward", len(z))
        return posterior.likelihood.log_prob(posterior.prior.decode(z)).double()

    def init(self, posterior: Posterior, draws: Draws) -> State:
        prior, levels = posterior.prior, self.levels(posterior)
        noise = draws.normal(0, prior.latent.shape, "init", dtype=prior.dtype).to(prior.device)
        centre = posterior.denoise(torch.zeros_like(noise[:1]), levels[0])
        z = centre + levels[0] * noise
        look = self._looked(posterior, z, Level(0, levels[0], levels[1], draws))
        first = torch.tensor(draws.members, dtype=torch.int64)
        record = {_ROW + name: torch.full((self.steps,), torch.nan, dtype=torch.float64) for name in RECORDS}
        record |= {_ROW + name: torch.zeros(1, dtype=torch.float64) for name in ("behind", "error")}
        past = {"first": first, "out": torch.zeros(len(z), dtype=torch.bool)}
        return State(z, torch.zeros(len(z), dtype=torch.float64), {**look, **past, **record})

    def step(self, posterior: Posterior, state: State, k: int, draws: Draws) -> State:
        levels = self.levels(posterior)
        level = Level(k, levels[k], levels[k + 1], draws)
        aux, log_w = dict(state.aux), state.log_w
        look = {name: value for name, value in aux.items() if name not in _KEPT and not name.startswith(_ROW)}
        kept = {name: value for name, value in aux.items() if name not in look}
        z = state.z
        if self.moves.count and k > 0 and bool(aux[_ROW + "resampled"][k - 1]):
            before = look["log_psi"]
            z, moved = self.moves.apply(self, posterior, z, look, level)
            look = dict(moved)
            log_w = log_w + before - look["log_psi"]
        z, ratio = self.move(posterior, z, look, level)
        log_w = log_w + ratio.double().cpu()
        sound = torch.isfinite(z.flatten(1)).all(1).cpu() & torch.isfinite(log_w)
        # A particle that is not a number stands at the origin with weight zero until another takes its place.
        z = torch.where(over(sound.to(z.device), z).bool(), z, 0.0)
        if level.after > 0:
            following = levels[k + 2]
            look = dict(self._looked(posterior, z, Level(k + 1, level.after, following, draws)))
        else:
            look = {**look, "log_psi": self.last(posterior, z, look).double()}
        look["log_psi"] = look["log_psi"].cpu().where(sound, torch.nan).where(~aux["out"], -torch.inf)
        return State(z, log_w.where(sound, 0.0), {**look, **kept})

    def _looked(self, posterior: Posterior, z: Tensor, level: Level) -> dict[str, Tensor]:
        look = dict(self.look(posterior, z, level))
        if look["log_psi"].shape != (len(z),):
            raise InputError(
                f"psi must be one number per particle, ({len(z)},); {type(self).__name__} found shape "
                f"{tuple(look['log_psi'].shape)}"
            )
        return {**look, "log_psi": look["log_psi"].double().cpu()}

    def couple(self, posterior: Posterior, state: State, k: int, draws: Draws, comm: Comm) -> State:
        aux = dict(state.aux)
        bad = torch.isnan(state.log_w + aux["log_psi"]) | (state.log_w + aux["log_psi"] == torch.inf)
        columns = {"base": state.log_w.where(~bad, 0.0), "psi": aux["log_psi"].where(~bad, -torch.inf)}
        aux["out"] = aux["out"] | bad
        members = tuple(draws.members)
        table = Table.gather(members, {**columns, "bad": bad.double(), "first": aux["first"].double()}, comm)
        base, psi = table.columns["base"], table.columns["psi"]
        final, size = k == self.steps - 1, len(table)
        temper = tempered(base, psi, self.keep * size) if self.keep and not final else 1.0
        log_w = (base + temper * psi).where(psi > -torch.inf, -torch.inf)
        weights = normalised(log_w)
        record = {name: value.clone() for name, value in aux.items() if name.startswith(_ROW)}
        again = not final and self.may_resample(k) and (effective(weights) < self.threshold * size or temper < 1)
        self._note(record, k, table, (weights, log_w, temper, again))
        mine = torch.tensor(members, dtype=torch.int64)
        rows = {name: value for name, value in aux.items() if name not in record} | {"log_psi": columns["psi"]}
        if final:
            return State(state.z, log_w[mine], {**rows, "log_psi": torch.zeros_like(columns["psi"]), **record})
        if not again:
            return State(state.z, columns["base"], {**rows, **record})
        shared = dataclasses.replace(draws, members=(COMMON,))
        uniforms = shared.uniform(k, (size,), "resample")[0]
        places = parents(children(weights, size, uniforms, self.scheme))
        moved, planned, sent = carry_out({**rows, "z": state.z}, members, places, table, comm)
        posterior.count("resampled_bytes_planned", planned)
        posterior.count("resampled_bytes", sent)
        z = moved.pop("z")
        return State(z, -temper * moved["log_psi"], {**moved, **record})

    def _note(self, record: dict[str, Tensor], k: int, table: Table, found: tuple[Tensor, Tensor, float, bool]) -> None:
        weights, log_w, temper, again = found
        first = table.columns["first"].long()
        behind = record[_ROW + "behind"]
        now = {
            "ess": effective(weights),
            "distinct": len(first[weights > 0].unique()),
            "largest": float(weights.max()),
            "log_evidence": float(behind) + log_mean(log_w),
            "temper": temper,
            "resampled": float(again),
            "quarantined": float(table.columns["bad"].sum()),
        }
        for name, value in now.items():
            record[_ROW + name][k] = value
        if again:
            behind += log_mean(log_w)
        if k == self.steps - 1:
            times = int(record[_ROW + "resampled"].nansum()) if self.scheme == "multinomial" else 0
            record[_ROW + "error"][0] = math.sqrt(evidence_variance(weights, first, times))

    def finish(self, posterior: Posterior, state: State) -> Ensemble:
        steps = {name: state.aux[_ROW + name].tolist() for name in RECORDS}
        whole: dict[str, Any] = {
            "log_evidence": steps["log_evidence"][-1],
            "log_evidence_error": float(state.aux[_ROW + "error"]),
            "ancestors": int(steps["distinct"][-1]),
            "smallest_ess": min(steps["ess"]),
            "resamplings": int(sum(steps["resampled"])),
            "quarantined": int(sum(steps["quarantined"])),
            "largest_weight": steps["largest"][-1],
            "steps": steps,
        }
        return Ensemble(posterior.prior.decode(state.z), posterior.space, state.log_w, {"particles": whole})


def require_law(posterior: Posterior, user: str) -> None:
    """Refuse a likelihood that gives no number of its own for each draw, before the first network call.

    Three different points: it must answer (3,), not the same number for all, and for a point alone what it says in company.
    """
    prior, likelihood = posterior.prior, posterior.likelihood
    noise = Draws(0, range(3)).normal(0, prior.latent.shape, "probe", dtype=prior.dtype).to(prior.device)
    x, name = prior.decode(noise), type(likelihood).__name__
    with torch.no_grad():
        together, alone = likelihood.log_prob(x), likelihood.log_prob(x[:1])
    if tuple(together.shape) != (3,) or tuple(alone.shape) != (1,):
        raise InputError(
            f"{user} weighs draws by log p(y | x), one number each: (3,) for 3 draws; {name}.log_prob gives "
            f"{tuple(together.shape)}. Sum over data, never over draws."
        )
    if bool((together == together[0]).all()) and bool(torch.isfinite(together[0])):
        raise InputError(
            f"{name}.log_prob gives {float(together[0]):g} for each of 3 different draws: it is a sum over the batch, or does "
            f"not depend on x; {user} cannot weigh draws by it."
        )
    limit = 1e-3 if together.dtype == torch.float32 else 1e-6
    if bool(torch.isfinite(alone).all()) and abs(float(alone[0] - together[0])) > limit * (1 + abs(float(alone[0]))):
        raise InputError(
            f"{name}.log_prob of a draw is {float(alone[0]):g} alone and {float(together[0]):g} in company; {user} needs a "
            "number that does not depend on the batch."
        )
