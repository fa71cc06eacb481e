r"""Particles for large arrays: weights and resampling tile by tile (local particle filters: Farchi and Bocquet 2018).

The weight of a whole image is a product over its values and data, and for 10^4 of them one particle takes all of it.  Here the
log-weight is split over tiles of the latent (``smc.tiles``: windows ``h_b``, shares ``s_bj`` of the data), and each tile is
resampled by the part that lies near it::

    z' = z - tau (z - D_y) + sigma' sqrt(tau) xi                                          # any guided denoiser
    l_b  += sum_p h_b(p) [log p(z'_p | z) - log q(z'_p | z, y)]
    psi_b = exp(-1/2 sum_j s_bj r_j(D) r_j(D_y)),   r(x) = (y - A x) / sigma_y            # at level zero r_j(z)^2
    w_b   = exp(sum_c kappa_bc (l_c + log psi_c)),  kappa a taper of the distance of tiles, 1 at 0, 0 from radius on
    where the mean over tiles of 1 / sum W_b^2 < threshold K:
        ancestors a_b(i) by W_b, from one random number for all tiles;   l_b = - log psi_b
        z_i = sum_a H_a D_y,a + sum_a sqrt(H_a) (z_a - D_y,a),   H_a = sum of h_b over the tiles with a_b(i) = a

With the moment-matched ``D_y``, ``r(D_y) = (I + B C B^T)^-1 r(D)``, so that the product of all psi_b is the twist
``N(y; A D, S + A C A^T)`` but for its determinant.  Stitching joins what particles say of the image linearly and their noise by
roots, which keeps its variance; a particle whose tiles have one ancestor is that ancestor.

Bias.  ``radius = inf`` is plain SMC: all tiles have the same weights and, from the same random number, the same ancestors.
Where tiles have nothing to do with each other, ``radius = 0`` and ``overlap = 0`` are as exact, and need particles for one tile
instead of all.  In between, what lies further than the radius is left out of a tile's weight, and what data or prior say about
several tiles *together* is lost at a resampling and comes back only through the guided steps after it: a bias that no number of
particles removes.  Four values of two modes each, tiles of one, 2,000 particles, 60 steps; largest error of the probabilities
of a mode (0.03 is chance and the grid):

                                        MMPS alone   radius 0     2      4      8    inf
    a datum on each value                     0.06       0.03  0.04   0.04   0.03   0.03
    data on sums of two neighbours            0.09       0.21  0.16   0.07   0.05   0.04
    one datum on the sum of all               0.06       0.19  0.17   0.14   0.06   0.03

So a radius must hold the tiles that a datum joins; where it cannot, unweighted draws of the guide are nearer the posterior.
``down_to``: below this level nothing is resampled any more, so that guided steps mend the fit to data that see several tiles;
the draws end with equal weights then.  ``keep``: where positive, the weights of a tile are taken to the largest power (at most
one, see the record "temper") at which this share of the particles stays effective, and what is left of them is forgotten: the
less power, the nearer to the guide's own draws.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from recon.comm import Comm
from recon.draws import Draws
from recon.ensemble import Ensemble
from recon.errors import InputError
from recon.posterior import Posterior
from recon.samplers.base import Claim, GuidedSampler, LevelSampler, State
from recon.samplers.matching import MatchingSampler, local
from recon.samplers.mmps import MMPS
from recon.samplers.requirements import require_affine, require_gaussian
from recon.samplers.smc.exchange import Pool, Table, gathered
from recon.samplers.smc.particles import COMMON, require_law
from recon.samplers.smc.resampling import SCHEMES, Scheme, children, parents
from recon.samplers.smc.tiles import Tiles, shares
from recon.samplers.smc.weights import effective, normalised, tempered
from recon.schedules import Grid, LogLinear

RECORDS = ("ess", "smallest_ess", "temper", "distinct", "resampled", "stitched")
"""Per step: effective size before resampling, mean and least over tiles; power to which weights were taken, mean over tiles;
particles of the start with a descendant, mean over tiles; whether it resampled; particles made of several."""

_ROW = "record."


@dataclass(frozen=True)
class LocalisedSMC(LevelSampler):
    """Local particles; tile: sides along the last axes of the latent (an axis not named stays whole).

    overlap: values over which neighbouring tiles blend.  radius: distance, in values of the latent, from which on tiles do not
    enter each other's weights.  guide: proposes, and says what a state makes of the data.
    """

    claim: ClassVar[Claim] = "heuristic"
    exact_for: ClassVar[str] = "tiles that neither prior nor data couple: many particles, up to the error of the grid"
    needs: ClassVar[str] = "linear operator, Gaussian noise, and what the guide needs"
    cost: ClassVar[str] = "the guide and 2 A per step, again for particles made of several"
    couples: ClassVar[bool] = True

    grid: Grid = field(default_factory=LogLinear)
    tile: tuple[int, ...] = (16, 16)
    overlap: int = 4
    radius: float = 32.0
    guide: GuidedSampler = field(default_factory=MMPS)
    threshold: float = 0.5
    scheme: Scheme = "systematic"
    down_to: float = 0.0
    keep: float = 0.0

    def check(self, posterior: Posterior) -> None:
        super().check(posterior)
        require_gaussian(posterior, "LocalisedSMC").linear("LocalisedSMC")
        require_affine(posterior, "LocalisedSMC")
        self.guide.check(posterior)
        if self.scheme not in SCHEMES:
            raise InputError(f"LocalisedSMC resamples by one of {', '.join(SCHEMES)}; got {self.scheme!r}")
        if not 0 <= self.threshold <= 1 or not 0 <= self.keep < 1 or not self.down_to >= 0 or not self.radius >= 0:
            raise InputError(
                "LocalisedSMC needs threshold in [0, 1], keep in [0, 1), radius >= 0 and down_to >= 0; got "
                f"{self.threshold}, {self.keep}, {self.radius} and {self.down_to}"
            )
        self.tiles(posterior)
        require_law(posterior, "LocalisedSMC")

    def tiles(self, posterior: Posterior) -> Tiles:
        """The boxes of the prior's latent."""
        return Tiles.of(posterior.prior.latent.shape, self.tile, self.overlap, posterior.prior.dtype)

    def init(self, posterior: Posterior, draws: Draws) -> State:
        prior, levels = posterior.prior, self.levels(posterior)
        noise = draws.normal(0, prior.latent.shape, "init", dtype=prior.dtype).to(prior.device)
        z = posterior.denoise(torch.zeros_like(noise[:1]), levels[0]) + levels[0] * noise
        look = self.look(posterior, z, 0)
        n, count = look["psi"].shape
        first = torch.tensor(draws.members, dtype=torch.int64).reshape(n, 1).repeat(1, count)
        record = {_ROW + name: torch.full((self.steps,), torch.nan, dtype=torch.float64) for name in RECORDS}
        kept = {"base": torch.zeros(n, count, dtype=torch.float64), "first": first, "stale": torch.zeros(n) > 0}
        return State(z, torch.zeros(n, dtype=torch.float64), {**look, **kept, **record})

    def look(self, posterior: Posterior, z: Tensor, k: int) -> dict[str, Tensor]:
        """``D``, ``D_y`` and ``log psi_b`` (n, tiles) of states at level ``k``."""
        levels = self.levels(posterior)
        if isinstance(self.guide, MatchingSampler):  # one evaluation for both
            at = local(posterior, z, levels[k], self.guide.differentiates)
            denoised = at.denoised
            guided = denoised + self.guide.correction(at)
        else:
            denoised = posterior.denoise(z, levels[k])
            guided = self.guide.guide(posterior, z, levels[k], levels[k + 1])
        return {"denoised": denoised, "guided": guided, "psi": self._psi(posterior, denoised, guided)}

    def _psi(self, posterior: Posterior, denoised: Tensor, guided: Tensor) -> Tensor:
        prior, likelihood = posterior.prior, posterior.likelihood.gaussian()
        posterior.count("forward", 2 * len(denoised))
        with torch.no_grad():
            one, other = (likelihood.residual(prior.decode(z)) / likelihood.sigma for z in (denoised, guided))
        product = (one * other.conj()).real if one.is_complex() else one * other
        # Sides along the axes name the tiles; overlap changes what they see.
        part = shares(posterior, self.tiles(posterior), (self.tile, (self.overlap,)))
        return -0.5 * product.flatten(1).double().cpu() @ part.T

    def step(self, posterior: Posterior, state: State, k: int, draws: Draws) -> State:
        levels = self.levels(posterior)
        sigma, after = levels[k], levels[k + 1]
        z, aux = state.z, self._refreshed(posterior, state, k)
        base = aux["base"]
        denoised, guided = aux["denoised"], aux["guided"]
        if after == 0:
            return State(denoised, state.log_w, {**aux, "base": base, "psi": self._psi(posterior, denoised, denoised)})
        tau = 1 - (after / sigma) ** 2
        width = after * math.sqrt(tau)
        noise = draws.normal(k, posterior.prior.latent.shape, "step", dtype=z.dtype).to(z.device)
        shift = tau * (guided - denoised)
        z = z - tau * (z - guided) + width * noise
        ratio = -shift.double() * (width * noise.double() + 0.5 * shift.double()) / width**2
        base = base + self.tiles(posterior).sums(ratio).cpu()
        return State(z, state.log_w, {**aux, **self.look(posterior, z, k + 1), "base": base})

    def _refreshed(self, posterior: Posterior, state: State, k: int) -> dict[str, Tensor]:
        """The rows of a state, looked at again where particles were made of several."""
        aux, stale = dict(state.aux), state.aux["stale"]
        if not bool(stale.any()):
            return aux
        new = self.look(posterior, state.z[stale.to(state.z.device)], k)
        before = aux["psi"]
        for name, rows in new.items():
            aux[name] = aux[name].clone()
            aux[name][stale.to(aux[name].device)] = rows
        # What was made of several particles starts from weight one, as they would have.
        aux["base"] = aux["base"] + before - aux["psi"]
        return aux

    def couple(self, posterior: Posterior, state: State, k: int, draws: Draws, comm: Comm) -> State:
        aux, members, final = dict(state.aux), tuple(draws.members), k == self.steps - 1
        count = aux["base"].shape[1]
        columns = {f"part{b}": values for b, values in enumerate((aux["base"] + aux["psi"]).T)}
        columns |= {f"first{b}": values.double() for b, values in enumerate(aux["first"].T)}
        table = Table.gather(members, columns, comm)
        parts = torch.stack([table.columns[f"part{b}"] for b in range(count)], 1)
        taper = tapered(self.tiles(posterior).distances(), self.radius)
        whole = list((parts @ taper.T).T)
        sizes = np.array([effective(normalised(log_w)) for log_w in whole])
        powers = [
            tempered(torch.zeros_like(log_w), log_w, self.keep * len(table)) if self.keep else 1.0 for log_w in whole
        ]
        weights = [normalised(power * log_w) for power, log_w in zip(powers, whole, strict=True)]
        again = final or bool(sizes.mean() < self.threshold * len(table))
        again = again and self.levels(posterior)[k + 1] >= self.down_to
        places = np.tile(np.arange(len(table))[:, None], (1, count))
        if again:
            shared = dataclasses.replace(draws, members=(COMMON,))
            uniforms = shared.uniform(k, (len(table),), "resample")[0]
            places = np.stack([parents(children(w, len(table), uniforms, self.scheme)) for w in weights], 1)
        rows = {name: value for name, value in aux.items() if not name.startswith(_ROW)}
        record = {name: value.clone() for name, value in aux.items() if name.startswith(_ROW)}
        alive = [len(table.columns[f"first{b}"][places[:, b]].unique()) for b in range(count)]
        several = float((places != places[:, :1]).any(1).sum())
        now = (sizes.mean(), sizes.min(), np.mean(powers), np.mean(alive), again, several)
        for name, value in zip(RECORDS, now, strict=True):
            record[_ROW + name][k] = float(value)
        if not again:
            rows["stale"] = torch.zeros_like(aux["stale"])
            return State(state.z, state.log_w, {**rows, **record})
        pool = gathered({**rows, "z": state.z}, members, places, table, comm)
        posterior.count("resampled_bytes_planned", pool.planned)
        posterior.count("resampled_bytes", pool.sent)
        moved = self._stitched(posterior, pool, places[list(members)], final)
        return State(moved.pop("z"), state.log_w, {**moved, **record})

    def _stitched(self, posterior: Posterior, pool: Pool, places: np.ndarray, final: bool) -> dict[str, Tensor]:
        """New rows of the particles whose tiles descend from ``places`` (n, tiles)."""
        at = torch.tensor([[pool.at[int(p)] for p in row] for row in places], dtype=torch.int64).reshape(places.shape)
        tile = torch.arange(places.shape[1])
        rows = {name: pool.rows[name][at, tile] for name in ("psi", "first")}
        rows |= {"base": -rows["psi"], "stale": (at != at[:, :1]).any(1)}
        moved = {name: pool.rows[name][at[:, 0]] for name in ("z", "denoised", "guided")}
        for i in torch.nonzero(rows["stale"]).flatten().tolist():
            z = torch.zeros_like(moved["z"][i])
            for row, window in self._windows(posterior, at[i]).items():
                one, part = pool.rows["z"][row], window.to(z)
                centre = one if final else pool.rows["guided"][row]
                z = z + part * centre + part.sqrt() * (one - centre)
            moved["z"][i] = z
        return {**rows, **moved}

    def _windows(self, posterior: Posterior, rows: Tensor) -> dict[int, Tensor]:
        """``H_a`` of the ancestors of one particle, in the order of their tiles."""
        found: dict[int, Tensor] = {}
        for row, window in zip(rows.tolist(), self.tiles(posterior), strict=True):
            found[row] = found[row] + window if row in found else window
        return found

    def finish(self, posterior: Posterior, state: State) -> Ensemble:
        steps = {name: state.aux[_ROW + name].tolist() for name in RECORDS}
        whole: dict[str, Any] = {
            "tiles": state.aux["base"].shape[1],
            "resamplings": int(sum(steps["resampled"])),
            "stitched": int(sum(steps["stitched"])),
            "smallest_ess": min(steps["smallest_ess"]),
            "ancestors": int(steps["distinct"][-1]),
            "steps": steps,
        }
        return Ensemble(posterior.prior.decode(state.z), posterior.space, state.log_w, {"particles": whole})


def tapered(distances: Tensor, radius: float) -> Tensor:
    """Gaspari and Cohn's (1999, eq. 4.10) positive definite taper, zero from ``radius`` on; all one for an infinite radius."""
    if math.isinf(radius):
        return torch.ones_like(distances)
    z = 2 * distances / max(radius, 1e-300)
    near = 1 - 5 / 3 * z**2 + 5 / 8 * z**3 + 0.5 * z**4 - 0.25 * z**5
    far = 4 - 5 * z + 5 / 3 * z**2 + 5 / 8 * z**3 - 0.5 * z**4 + z**5 / 12 - 2 / (3 * z.clamp(min=1.0))
    return torch.where(z < 1, near, torch.where(z < 2, far, 0.0))
