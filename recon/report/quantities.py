"""What the page speaks of, one thing at a time: each variable in its own unit, a complex image as magnitude and phase.

A field with an axis of named variables is taken apart along it; numbers of different units never meet in one figure.  A
complex image (an axis "real, imag") is shown as two quantities made of every draw: the magnitude ``|x|``, whose posterior mean
is the mean of magnitudes, and the phase, as the angle to the phase of the mean (so that it does not wrap), where the mean is
larger than a tenth of its largest magnitude.  Everything else is one quantity.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from recon.diagnostics.spread import determined as shrinkage
from recon.ensemble import Ensemble
from recon.report.evidence import Evidence
from recon.report.regions import regions_of
from recon.report.verdict import UNKNOWN
from recon.space import Space

Kind = Literal["value", "magnitude", "phase"]
PARTS = ("real", "imag")
FAINT = 0.1  # of the largest magnitude: below, a phase means nothing


@dataclass(frozen=True, eq=False)
class Quantity:
    """One thing with one unit.

    name: empty where there is only one.  ensemble: its draws, on its own space and in its own unit.  truth, baselines,
    determined (``1 - Var_post/Var_prior``), mask (where it means something; None: everywhere): *ensemble.space.shape.
    """

    name: str
    ensemble: Ensemble
    truth: Tensor | None
    baselines: Mapping[str, Tensor] = field(default_factory=dict)
    determined: Tensor | None = None
    mask: Tensor | None = None
    kind: Kind = "value"

    @property
    def space(self) -> Space:
        """Of the draws."""
        return self.ensemble.space

    @property
    def unit(self) -> str:
        """Of the values."""
        return self.ensemble.space.unit

    @property
    def title(self) -> str:
        """``t: ``, as a prefix of captions; empty where there is only one quantity."""
        return f"{self.name}: " if self.name else ""

    def flat(self) -> tuple[Ensemble, Tensor | None]:
        """Draws and truth where the quantity means something: as they are, or as a list of the pixels of the mask."""
        if self.mask is None:
            return self.ensemble, self.truth
        x = self.ensemble.x[:, self.mask]
        line = Space.vector(x.shape[1], self.unit)
        flat = Ensemble(x, line, self.ensemble.log_weights, self.ensemble.info)
        return flat, None if self.truth is None else self.truth[self.mask]

    def regions(self, given: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
        """Name of each region -> mask, where the quantity means something in it; see ``regions_of``."""
        found = regions_of(self.space, given, self.name)
        if self.mask is None:
            return found
        inside = {name: mask & self.mask for name, mask in found.items()}
        return {name: mask for name, mask in inside.items() if bool(mask.any())}

    def seen(self, values: Tensor) -> Tensor:
        """``values`` with NaN where the quantity means nothing, for maps."""
        return values if self.mask is None else torch.where(self.mask, values, torch.nan)


def quantities(evidence: Evidence) -> list[Quantity]:
    """What ``evidence`` is about, in the order of its axis."""
    space = evidence.ensemble.space
    for axis, dim in enumerate(space.dims):
        names = space.coords.get(dim)
        if isinstance(names, tuple) and names == PARTS:
            return _complex(evidence, axis)
        if isinstance(names, tuple) and dim == "variable":
            return [_variable(evidence, axis, i, str(name)) for i, name in enumerate(names)]
    truth = evidence.truth
    return [Quantity("", evidence.ensemble, truth, evidence.baselines, _determined(evidence), _known(truth))]


def _known(truth: Tensor | None) -> Tensor | None:
    """Where the truth is a number; NaN stands where there is nothing to know (land).  None where all are, or none is."""
    known = None if truth is None else ~truth.isnan()
    return None if known is None or bool(known.all()) or not bool(known.any()) else known


def unit_of(name: str, space: Space, units: Mapping[str, Any]) -> str:
    """The unit of variable ``name``: as recorded, else that of the whole where all share one."""
    known = units.get(name)
    return str(known) if known is not None else UNKNOWN if space.unit == "mixed" else space.unit


def without(space: Space, axis: int, unit: str) -> Space:
    """``space`` without one axis (a plain number becomes a list of one)."""
    dims = space.dims[:axis] + space.dims[axis + 1 :]
    shape = space.shape[:axis] + space.shape[axis + 1 :]
    if not dims:
        return Space.vector(1, unit)
    return Space(dims, shape, {d: space.coords[d] for d in dims if d in space.coords}, unit)


def _determined(evidence: Evidence) -> Tensor | None:
    prior = evidence.prior_std
    if prior is None or not bool((prior > 0).all()):
        return None
    return shrinkage(evidence.ensemble, prior.double() ** 2)


def _variable(evidence: Evidence, axis: int, i: int, name: str) -> Quantity:
    ensemble = evidence.ensemble
    unit = unit_of(name, ensemble.space, evidence.facts.get("units") or {})
    space = without(ensemble.space, axis, unit)

    def take(values: Tensor) -> Tensor:
        return values.select(axis, i).reshape(space.shape)

    x = ensemble.x.select(axis + 1, i).reshape(len(ensemble), *space.shape)
    share, truth = _determined(evidence), None if evidence.truth is None else take(evidence.truth)
    return Quantity(
        name,
        Ensemble(x, space, ensemble.log_weights, ensemble.info),
        truth,
        {name: take(values) for name, values in evidence.baselines.items()},
        None if share is None else take(share),
        _known(truth),
    )


def _complex(evidence: Evidence, axis: int) -> list[Quantity]:
    ensemble = evidence.ensemble
    unit = ensemble.space.unit
    space = without(ensemble.space, axis, unit)

    def joined(values: Tensor, at: int) -> Tensor:
        parts = values.double()
        return torch.complex(parts.select(at, 0), parts.select(at, 1)).reshape(
            *values.shape[:at], *values.shape[at + 1 :]
        )

    x, mean = joined(ensemble.x, axis + 1), joined(ensemble.mean(), axis)
    truth = None if evidence.truth is None else joined(evidence.truth, axis)
    others = {name: joined(values, axis) for name, values in evidence.baselines.items()}
    kind = ensemble.x.dtype
    share = None
    if evidence.prior_std is not None and len(ensemble) > 1 and bool((evidence.prior_std > 0).all()):
        prior = evidence.prior_std.double().square().expand(ensemble.space.shape).sum(axis)
        share = (1 - ensemble.std().double().square().sum(axis) / prior).reshape(space.shape)
    size = Quantity(
        "magnitude",
        Ensemble(x.abs().to(kind).reshape(-1, *space.shape), space, ensemble.log_weights, ensemble.info),
        None if truth is None else truth.abs().to(kind).reshape(space.shape),
        {name: v.abs().to(kind).reshape(space.shape) for name, v in others.items()},
        share,
        kind="magnitude",
    )
    centre = mean.angle()
    mask = (mean.abs() > FAINT * mean.abs().max()).reshape(space.shape)
    if not bool(mask.any()):
        return [size]
    radian = Space(space.dims, space.shape, space.coords, "rad")

    def phase(values: Tensor) -> Tensor:
        turned = centre + (values * torch.polar(torch.ones_like(centre), -centre)).angle()
        return turned.to(kind).reshape(*values.shape[: values.ndim - centre.ndim], *space.shape)

    angle = Quantity(
        "phase",
        Ensemble(phase(x), radian, ensemble.log_weights, ensemble.info),
        None if truth is None else phase(truth),
        {name: phase(v) for name, v in others.items()},
        mask=mask,
        kind="phase",
    )
    return [size, angle]


def wrapped(values: Tensor) -> Tensor:
    """Angles brought between -pi and pi, for a map."""
    return torch.remainder(values + math.pi, 2 * math.pi) - math.pi
