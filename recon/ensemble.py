"""Weighted draws with names, units and how they were obtained.

Summaries use the weights ``w ~ exp(log_weights)``; the variance is unbiased for equal weights
(``sum w (x - m)^2 / (1 - sum w^2)``); quantiles interpolate order statistics placed at
``p_k = (n (C_k - w_k/2) + 1/2) / (n + 1)`` with ``C`` the cumulated sorted weights and ``n = 1/sum w^2``.  For equal
weights that is ``k / (M + 1)``, the rule whose intervals cover a further draw with the stated probability for any finite ``M``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from recon.draws import Draws
from recon.errors import InputError
from recon.files import written_aside
from recon.order import quantiles
from recon.space import Space

if TYPE_CHECKING:
    import xarray as xr

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True, eq=False)
class Ensemble:
    """Draws from a posterior.

    x: (draw, *space.shape), physical units.  log_weights: (draw,) float64, zeros for equal weights.  info: how the draws were
    obtained (sampler, claim, counts of evaluations, ...), JSON values only.

    Raises InputError when shapes do not fit or no weight is finite.
    """

    x: Tensor
    space: Space
    log_weights: Tensor | None = None
    info: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        batch = self.space.require(tuple(self.x.shape), "Ensemble")
        if len(batch) != 1 or batch[0] < 1:
            raise InputError(f"Ensemble takes (draw, {self.space.describe()}); got {tuple(self.x.shape)}")
        log_w = torch.zeros(batch, dtype=torch.float64) if self.log_weights is None else self.log_weights.double()
        if tuple(log_w.shape) != batch:
            raise InputError(f"one log-weight per draw: {batch[0]} draws, log_weights {tuple(log_w.shape)}")
        if not bool(torch.isfinite(log_w).any()) or bool(torch.isnan(log_w).any()) or bool((log_w == torch.inf).any()):
            raise InputError("log-weights must be numbers below infinity and at least one must be finite")
        object.__setattr__(self, "log_weights", log_w)

    def __len__(self) -> int:
        return len(self.x)

    @property
    def weights(self) -> Tensor:
        """Normalised weights (draw,), float64."""
        assert self.log_weights is not None  # set in __post_init__
        return torch.softmax(self.log_weights, 0)

    @property
    def ess(self) -> float:
        """Effective sample size: ``1 / sum w^2`` (Kish), and of draws that were resampled no more than their ``ancestors``.

        Copies of one particle are one draw however equal their weights: what refuses interval maps to few draws refuses them to
        a collapsed ensemble too.  Antithetic pairs count as one draw each: that holds for spread and quantiles; their mean is
        worth more (see ``mean_error``).
        """
        w = self._pair_weights() if self.antithetic else self.weights
        kish = float(1 / w.square().sum())
        return kish if self.ancestors is None else min(kish, float(self.ancestors))

    @property
    def antithetic(self) -> bool:
        """Whether draws ``2 k`` and ``2 k + 1`` were made with opposite noise (see ``recon.draws``)."""
        return bool(self.info.get("antithetic"))

    def independent(self) -> Ensemble:
        """Draws that are independent of each other: all of them, or the first of every antithetic pair."""
        if not self.antithetic:
            return self
        assert self.log_weights is not None  # set in __post_init__
        info = {name: value for name, value in self.info.items() if name != "antithetic"}
        return Ensemble(self.x[::2], self.space, self.log_weights[::2], info)

    @property
    def ancestors(self) -> int | None:
        """Distinct particles of the start from which the draws descend; None when draws never met."""
        found = self.info.get("particles", {}).get("ancestors")
        return None if found is None else int(found)

    def _weight(self) -> Tensor:
        return self.weights.to(self.x.dtype).reshape(-1, *([1] * len(self.space.shape)))

    def mean(self) -> Tensor:
        """Weighted mean, *space.shape."""
        return (self._weight() * self.x).sum(0)

    def _pair_weights(self) -> Tensor:
        """Of antithetic pairs: (draw / 2,)."""
        return self.weights.reshape(-1, 2).sum(1)

    def mean_variance(self) -> Tensor:
        """Estimated variance of ``mean()`` from draw to draw, or from pair to pair: *space.shape.

        ``sum w^2 (x - m)^2 / (1 - sum w^2)``, with pairs and their means in place of draws where those are antithetic.
        Raises InputError with fewer than 2 draws or pairs.
        """
        w, x = self.weights, self.x
        if self.antithetic:
            w = self._pair_weights()
            own = self._weight() * self.x
            x = (own[::2] + own[1::2]) / w.to(self.x.dtype).reshape(-1, *([1] * len(self.space.shape)))
        if len(x) < 2:
            raise InputError(f"the error of a mean needs at least 2 {'pairs' if self.antithetic else 'draws'}")
        share = (w.square() / (1 - w.square().sum())).to(x.dtype)
        return (share.reshape(-1, *([1] * len(self.space.shape))) * (x - self.mean()) ** 2).sum(0)

    def std(self) -> Tensor:
        """Weighted standard deviation, *space.shape.

        The square is unbiased: ``sum w (x - m)^2`` lacks the variance of ``m``, which is ``sum w^2`` of what is sought, or,
        where draws are antithetic, less than that and estimated from pairs.
        Raises InputError with fewer than 2 draws (antithetic: 2 pairs).
        """
        if len(self) < 2:
            raise InputError("a standard deviation needs at least 2 draws")
        squares = (self._weight() * (self.x - self.mean()) ** 2).sum(0)
        if self.antithetic:
            return (squares + self.mean_variance()).sqrt()
        return (squares / float(1 - self.weights.square().sum())).sqrt()

    def quantile(self, q: float | Sequence[float]) -> Tensor:
        """Weighted quantiles: *space.shape for one ``q``, (len(q), *space.shape) for several; clipped to the draws' range."""
        levels = [q] if isinstance(q, int | float) else list(q)
        if not all(0 <= level <= 1 for level in levels):
            raise InputError(f"quantiles lie in [0, 1]; got {levels}")
        out = quantiles(self.x, levels, self.weights)
        return out[0] if isinstance(q, int | float) else out

    def resample(self, n: int, seed: int) -> Ensemble:
        """``n`` equally weighted draws by systematic resampling with the keyed number of ``seed``."""
        u = float(Draws(seed, [0]).uniform(0, (1,), "resample"))
        places = (torch.arange(n, dtype=torch.float64) + u) / n
        picks = torch.searchsorted(self.weights.cumsum(0), places).clamp(max=len(self) - 1)
        info = {**self.info, "resampled_from": len(self), "distinct": len(picks.unique())}
        info.pop("antithetic", None)
        return Ensemble(self.x[picks], self.space, None, info)

    def to_xarray(self) -> xr.Dataset:
        """Draws and summaries as one labelled dataset; lengths in mm, angles in degrees."""
        import xarray as xr

        dims, unit = self.space.dims, {"units": self.space.unit}
        assert self.log_weights is not None  # set in __post_init__
        std = self.std() if len(self.independent()) > 1 else torch.full(self.space.shape, torch.nan)
        data = {
            "value": (("draw", *dims), self.x.numpy(), {**unit, "long_name": "posterior draws"}),
            "log_weight": (("draw",), self.log_weights.numpy(), {"units": "1", "long_name": "log of the weight"}),
            "mean": (dims, self.mean().numpy(), {**unit, "cell_methods": "draw: mean", "long_name": "posterior mean"}),
            "std": (
                dims,
                std.numpy(),
                {**unit, "cell_methods": "draw: standard_deviation", "long_name": "posterior standard deviation"},
            ),
            "quantiles": (
                ("quantile", *dims),
                self.quantile(QUANTILES).numpy(),
                {**unit, "long_name": "posterior quantiles (order statistics at k/(M+1))"},
            ),
        }
        coords = {name: (name, *labelled(name, values)) for name, values in self.space.coords.items()}
        coords["quantile"] = ("quantile", np.array(QUANTILES), {"units": "1"})
        coords["draw"] = ("draw", np.arange(len(self)), {"long_name": "number of the draw"})
        attrs = {"Conventions": "CF-1.11", "title": "posterior ensemble", "recon_info": json.dumps(self._plain_info())}
        return xr.Dataset(data, coords, attrs)

    def _plain_info(self) -> dict[str, Any]:
        """``info`` without the tables of ``_per_step``: an attribute of a file holds 64 kB at most."""
        info = dict(self.info)
        if "steps" in info.get("particles", {}):
            info["particles"] = {name: value for name, value in info["particles"].items() if name != "steps"}
        return info

    def _per_step(self) -> xr.Dataset | None:
        """What coupled draws noted at every step: one variable each over ``step``."""
        import xarray as xr

        steps = self.info.get("particles", {}).get("steps")
        if steps is None:
            return None
        return xr.Dataset({name: ("step", np.array(values, dtype=np.float64)) for name, values in steps.items()})

    def save(self, path: str | Path, provenance: Mapping[str, Any] | None = None) -> None:
        """Write a NetCDF-4 file, whole or not at all.

        Root: mean, std, quantiles (what a plain viewer shows).  Group ``posterior``: value(chain, draw, ...), log_weight, as
        ArviZ expects them.  Group ``particles``, where draws met: what was noted at every step.  Every variable carries a
        checksum; ``provenance`` is kept as JSON.
        """
        import xarray as xr

        groups = self.groups(provenance)
        tree = xr.DataTree.from_dict(groups)
        packing = {"zlib": True, "complevel": 1, "shuffle": True, "fletcher32": True}
        encoding = {place: {name: packing for name in group.data_vars} for place, group in groups.items()}
        with written_aside(Path(path)) as aside:
            tree.to_netcdf(aside, engine="h5netcdf", encoding=encoding)

    def groups(self, provenance: Mapping[str, Any] | None = None) -> dict[str, xr.Dataset]:
        """What ``save`` writes: a dataset for each group of the file, "/" the root."""
        flat = self.to_xarray()
        root = flat.drop_vars(["value", "log_weight", "draw"])
        root.attrs["provenance"] = json.dumps(dict(provenance or {}), default=str, sort_keys=True)
        root.attrs["space_unit"] = self.space.unit
        draws = flat[["value", "log_weight"]].expand_dims(chain=[0])
        draws = draws.drop_vars("quantile", errors="ignore")
        groups = {"/": root, "/posterior": draws}
        steps = self._per_step()
        if steps is not None:
            groups["/particles"] = steps
        return groups

    @classmethod
    def load(cls, path: str | Path) -> Ensemble:
        """Read what ``save`` wrote.  Raises InputError when the file is missing, damaged, or not an ensemble."""
        import xarray as xr

        try:
            with xr.open_datatree(path, engine="h5netcdf") as tree:
                draws, root = tree["posterior"].to_dataset().load(), tree.to_dataset()
                attrs = dict(root.attrs)
                steps = tree["particles"].to_dataset().load() if "particles" in tree.children else None
        except (OSError, KeyError, ValueError) as error:
            raise InputError(f"{path} is not a readable ensemble file written by recon: {error}") from error
        value = draws["value"].isel(chain=0)
        dims = tuple(str(d) for d in value.dims[1:])
        coords = {d: plain(d, value[d].values) for d in dims if d in value.coords}
        space = Space(dims, value.shape[1:], coords, attrs["space_unit"])
        log_w = torch.from_numpy(draws["log_weight"].isel(chain=0).values.copy())
        info = json.loads(attrs["recon_info"])
        if steps is not None:
            info["particles"]["steps"] = {str(name): steps[name].values.tolist() for name in steps.data_vars}
        return cls(torch.from_numpy(value.values.copy()), space, log_w, info)


_FACTORS = {
    "x": (1e3, "mm"),
    "y": (1e3, "mm"),
    "z": (1e3, "mm"),
    "detector": (1e3, "mm"),
    "angle": (180 / np.pi, "degree"),
}
_NAMED = {"lat": "degrees_north", "lon": "degrees_east"}


def labelled(dim: str, values: np.ndarray | tuple[str, ...]) -> tuple[Any, dict[str, str]]:
    """Coordinate values and attributes for a file: metres become mm, radians degrees."""
    if isinstance(values, tuple):
        return list(values), {}
    factor, unit = _FACTORS.get(dim, (1.0, _NAMED.get(dim, "1")))
    attrs = {"units": unit}
    if dim in "xyz":
        attrs["axis"] = dim.upper()
    return values * factor, attrs


def plain(dim: str, values: np.ndarray) -> np.ndarray | tuple[str, ...]:
    """The inverse of ``labelled``."""
    if values.dtype.kind in "OUST":
        return tuple(str(v) for v in values)
    return values / _FACTORS.get(dim, (1.0, ""))[0]
