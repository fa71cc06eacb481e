r"""Priors that can be told something: ``p(x | c)`` for the value ``c`` of one or more conditions.

``given(**values)`` binds the values and returns an ordinary prior, so that samplers, guidance and checks need not know of
conditions; ``unconditional()`` is the prior without them, which a network knows when it was trained with a condition dropout
(Ho and Salimans 2022): with some probability a training image came without its conditions.

Two conditions that come with any series of fields:

* ``low_resolution``: the field as means over blocks of ``factor`` x ``factor`` pixels, interpolated back to the grid between
  the blocks' centres, linearly and constant beyond the outermost centres;
* ``time_of_year``: :math:`\cos 2\pi t/T, \sin 2\pi t/T` with ``t`` days since 1 January 0:00 and ``T`` = 365.2425 days.

A joint Gaussian over field and conditions has all of this in closed form (``ConditionalGaussianPrior``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator
from torch import Tensor, nn
from torch.nn import functional

from recon.errors import InputError
from recon.priors.base import Card, Prior
from recon.priors.gaussian import GaussianPrior, covering_schedule, eigen
from recon.priors.network import NetworkPrior, ShuffledUNet
from recon.schedules import Schedule
from recon.space import Space

YEAR = 365.2425
"""Days of a year of the Gregorian calendar."""

Name = Annotated[str, Field(pattern="^[a-z][a-z0-9_]*$")]


class LowResolution(BaseModel):
    """The field itself at low resolution: means over ``factor`` x ``factor`` pixels, in the field's own unit."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["low_resolution"]
    name: Name = "low"
    factor: int = Field(ge=2)

    def space(self, field: Space) -> Space:
        """What is given: the space of a field's block means.  Raises InputError when sides are no multiples of the factor."""
        *outer, ny, nx = field.shape
        if ny % self.factor or nx % self.factor:
            raise InputError(
                f"a field of {ny} x {nx} pixels has no means over blocks of {self.factor} x {self.factor} (condition "
                f"{self.name!r}); take a factor of both sides"
            )
        coords = {
            dim: v.reshape(-1, self.factor).mean(1) if dim in field.dims[-2:] and isinstance(v, np.ndarray) else v
            for dim, v in field.coords.items()
        }
        return Space(field.dims, (*outer, ny // self.factor, nx // self.factor), coords, field.unit)

    def channels(self, fields: int) -> int:
        """How many channels it takes."""
        return fields

    def spread(self, means: Tensor) -> Tensor:
        """Block means (n, field, ny / factor, nx / factor) on the grid of the field (n, field, ny, nx)."""
        return functional.interpolate(means, scale_factor=float(self.factor), mode="bilinear", align_corners=False)

    def of(self, values: Tensor, known: Tensor) -> Tensor:
        """What ``spread`` makes of fields (n, field, ny, nx)."""
        return self.spread(self.means(values, known))

    def means(self, values: Tensor, known: Tensor) -> Tensor:
        """Block means of fields (n, field, ny, nx): over the known pixels of a block, if it has any."""
        mean = functional.avg_pool2d
        count = mean(known, self.factor)
        some = mean(values * known, self.factor) / count.clamp_min(1e-6)
        return torch.where(count > 0, some, mean(values, self.factor))


class TimeOfYear(BaseModel):
    """The time of the year in days since 1 January 0:00."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["time_of_year"]
    name: Name = "day"

    def space(self, field: Space) -> Space:
        """What is given: one number of days."""
        return Space.vector(1, "day", dim="time")

    def channels(self, fields: int) -> int:
        """How many channels it takes."""
        return 2

    def spread(self, days: Tensor, sides: tuple[int, int]) -> Tensor:
        """Cosine and sine of the time of year (n,) as channels (n, 2, ny, nx).

        Raises InputError for days outside 0 to 366.
        """
        if not bool(((days >= 0) & (days <= 366)).all()):
            raise InputError(f"{self.name} is days since 1 January 0:00, from 0 to 366; got {days.tolist()}")
        angle = 2 * math.pi / YEAR * days.double()
        waves = torch.stack([angle.cos(), angle.sin()], dim=1).float()
        return waves[:, :, None, None].expand(-1, -1, *sides)


def _kind(value: Any) -> str:  # noqa: ANN401
    said = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    return f"<{said if isinstance(said, str) else ''}>"


_kind.__name__ = "kind"  # errors in files are written from this name and the tags

Condition = Annotated[
    Annotated[LowResolution, Tag("<low_resolution>")] | Annotated[TimeOfYear, Tag("<time_of_year>")],
    Discriminator(_kind),
]


class Conditions(BaseModel):
    """What a network is told about the image: the section of a card.

    inputs: in the order of their channels.  dropout: probability with which a training image came without them; where it is
    positive one more channel says whether they are there (1) or not (0, and all others are 0).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    inputs: tuple[Condition, ...] = Field(min_length=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        names = [condition.name for condition in self.inputs]
        if len(set(names)) < len(names):
            raise ValueError(f"each condition needs a name of its own; got {', '.join(names)}")
        return self

    def channels(self, fields: int) -> int:
        """How many channels a network of so many fields takes for all of them."""
        return sum(condition.channels(fields) for condition in self.inputs) + (self.dropout > 0)

    def joined(self, parts: Sequence[Tensor], there: Tensor | None = None) -> Tensor:
        """The condition of a batch (n, channel, ny, nx) from those of its inputs; ``there`` (n,) is 1.0 where it is told."""
        condition = torch.cat(list(parts), dim=1)
        if self.dropout == 0:
            return condition
        there = torch.ones(len(condition)) if there is None else there
        flag = there.to(condition)[:, None, None, None]
        return torch.cat([condition * flag, flag.expand(-1, 1, *condition.shape[2:])], dim=1)


class ConditionalPrior(Prior):
    """The contract of ``p(x | c)``: one prior for each value of its ``conditions``.

    Itself it denoises nothing: ``given`` and ``unconditional`` return priors that do, over the same space and latent.
    """

    @property
    def conditions(self) -> Mapping[str, Space]:
        """Name -> space of the value that can be given."""
        raise TypeError(f"{type(self).__name__} must define conditions")

    def given(self, **values: Any) -> Prior:  # noqa: ANN401  (numbers, arrays and tensors)
        """``p(x | values)``, one value per condition: a tensor, an array or, where it is one number, a number.

        Raises InputError for names that are missing or unknown, another shape, or numbers that are not finite.
        """
        missing, unknown = self.conditions.keys() - values.keys(), values.keys() - self.conditions.keys()
        if missing or unknown:
            raise InputError(
                f"{self.card.name} is given {', '.join(self.conditions)}, all at once; "
                f"missing: {', '.join(sorted(missing)) or 'none'}, unknown: {', '.join(sorted(unknown)) or 'none'}"
            )
        return self._bound({name: _value(name, values[name], space) for name, space in self.conditions.items()})

    def unconditional(self) -> Prior:
        """``p(x)``.  Raises InputError when the prior does not know it."""
        raise InputError(f"{self.card.name} was not trained with a condition dropout: it knows no p(x)")

    def predict(self, z: Tensor, sigma: Tensor) -> Tensor:
        raise InputError(
            f"{self.card.name} depends on {', '.join(self.conditions)}: bind them with given("
            f"{', '.join(f'{name}=...' for name in self.conditions)}), or take unconditional()"
        )

    def _bound(self, values: Mapping[str, Tensor]) -> Prior:
        raise TypeError(f"{type(self).__name__} must define _bound(values)")


class ConditionalNetworkPrior(ConditionalPrior, NetworkPrior):
    """A trained network that is told its conditions as channels beside the image.

    Made from a NetworkPrior whose architecture takes as many channels as ``inputs`` have.  Block means are given in the
    physical unit of the field, and for windows those of the whole field; ``whole_space`` is its space.

    Raises InputError when the network takes another number of channels.
    """

    def __init__(self, prior: NetworkPrior, inputs: Conditions, whole_space: Space | None = None) -> None:
        nn.Module.__init__(self)
        NetworkPrior.__init__(self, prior.space, prior.schedule, prior.card, prior.network, sigma_data=prior.sigma_data)
        self.latent, self.shift, self.scale = prior.latent, prior.shift, prior.scale
        self.inputs = inputs
        self.field = whole_space or self._whole_space()
        fields = 1 if len(prior.space.shape) == 2 else prior.space.shape[0]
        takes = prior.network.architecture.condition if isinstance(prior.network, ShuffledUNet) else None
        if takes != inputs.channels(fields):
            raise InputError(
                f"the conditions of {prior.card.name} make {inputs.channels(fields)} channels; its network takes {takes}"
            )
        self._conditions = {condition.name: condition.space(self.field) for condition in inputs.inputs}

    @property
    def conditions(self) -> Mapping[str, Space]:
        return self._conditions

    def unconditional(self) -> NetworkPrior:
        if self.inputs.dropout == 0:
            super().unconditional()
        channels = self.inputs.channels(1 if len(self.space.shape) == 2 else self.space.shape[0])
        nothing = torch.zeros(1, channels, *self.field.shape[-2:], dtype=self.dtype, device=self.device)
        return self._named(self.told(nothing, self.place), "unconditional")

    def at(self, row: int, column: int) -> NetworkPrior:
        raise InputError(f"{self.card.name} is told its conditions first: given(...).at({row}, {column})")

    def _bound(self, values: Mapping[str, Tensor]) -> NetworkPrior:
        sides = (self.field.shape[-2], self.field.shape[-1])
        parts = []
        for condition in self.inputs.inputs:
            value = values[condition.name].to(self.device)
            if isinstance(condition, LowResolution):
                latent = (value - self.shift.to(value)) / self.scale.to(value)
                parts.append(condition.spread(latent.reshape(1, -1, *value.shape[-2:]).to(self.dtype)))
            else:
                parts.append(condition.spread(value.cpu(), sides).to(self.device))
        return self._named(self.told(self.inputs.joined(parts), self.place), "given " + ", ".join(values))

    def _named(self, prior: NetworkPrior, how: str) -> NetworkPrior:
        prior.card = Card(f"{self.card.name} {how}", self.card.summary, self.card.facts)
        return prior

    def _whole_space(self) -> Space:
        if self.whole is None:
            return self.space
        outer = self.space.dims[:-2]
        coords = {dim: v for dim, v in self.space.coords.items() if dim in outer}
        return Space(self.space.dims, (*self.space.shape[:-2], *self.whole), coords, self.space.unit)


class ConditionalGaussianPrior(ConditionalPrior):
    r"""A joint Gaussian over a field and its conditions, in closed form.

    .. math::
        x \mid c \sim N\bigl(m_x + C_{xc} C_{cc}^{-1} (c - m_c),\ C_{xx} - C_{xc} C_{cc}^{-1} C_{cx}\bigr)

    mean (d_x + d_c,) and covariance (d_x + d_c, d_x + d_c): of the field and then of the conditions, flattened, in the order
    of ``conditions``.  Computed in double precision; the priors it returns have the mean's type.

    Raises InputError for shapes that do not fit or a covariance that is not symmetric and positive definite.
    """

    mean: Tensor
    covariance: Tensor

    def __init__(
        self,
        mean: Tensor,
        covariance: Tensor,
        conditions: Mapping[str, Space],
        space: Space | None = None,
        schedule: Schedule | None = None,
    ) -> None:
        mean, covariance = torch.as_tensor(mean).reshape(-1), torch.as_tensor(covariance)
        told = sum(c.size for c in conditions.values())
        space = space or Space.vector(max(1, mean.numel() - told))
        if not conditions or space.size + told != mean.numel():
            raise InputError(
                f"the joint mean has {mean.numel()} values; {space.describe()} and the conditions "
                f"{', '.join(conditions) or 'none'} have {space.size} and {told}"
            )
        if tuple(covariance.shape) != (mean.numel(), mean.numel()):
            raise InputError(
                f"a joint covariance has shape ({mean.numel()}, {mean.numel()}); got {tuple(covariance.shape)}"
            )
        values, _ = eigen(covariance.double(), mean.numel())
        schedule = schedule or covering_schedule(float(values.min().sqrt()), float(values.max().sqrt()))
        super().__init__(
            space, schedule, Card("conditional_gaussian", "closed-form Gaussian over field and conditions")
        )
        self._conditions = dict(conditions)
        self.register_buffer("mean", mean)
        self.register_buffer("covariance", covariance.to(mean.dtype))

    @property
    def dtype(self) -> torch.dtype:
        return self.mean.dtype

    @property
    def conditions(self) -> Mapping[str, Space]:
        return self._conditions

    def unconditional(self) -> GaussianPrior:
        """``N(m_x, C_xx)``."""
        d = self.space.size
        return GaussianPrior(self.mean[:d], self.covariance[:d, :d], self.space, self.schedule)

    def _bound(self, values: Mapping[str, Tensor]) -> GaussianPrior:
        d, mean, joint = self.space.size, self.mean.double(), self.covariance.double()
        told = torch.cat([value.reshape(-1) for value in values.values()]).to(mean)
        gain = torch.linalg.solve(joint[d:, d:], joint[d:, :d]).T
        covariance = joint[:d, :d] - gain @ joint[d:, :d]
        covariance = (covariance + covariance.T) / 2
        centre = mean[:d] + gain @ (told - mean[d:])
        return GaussianPrior(centre.to(self.dtype), covariance.to(self.dtype), self.space, self.schedule)


def _value(name: str, value: Any, space: Space) -> Tensor:  # noqa: ANN401
    """A given value as a float64 tensor of ``space``."""
    try:
        tensor = torch.as_tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} must be numbers of {space.describe()}; got {value!r}") from error
    if tensor.ndim == 0 and space.size == 1:
        tensor = tensor.reshape(space.shape)
    if tuple(tensor.shape) != space.shape:
        raise InputError(f"{name} must have the shape of {space.describe()}; got {tuple(tensor.shape)}")
    if not bool(tensor.isfinite().all()):
        raise InputError(f"{name} holds numbers that are not finite")
    return tensor
