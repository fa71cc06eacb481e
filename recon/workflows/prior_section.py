"""The ``prior:`` of a workflow that says more than a name: what it is told, how it is computed, on which grid.

.. code-block:: yaml

    prior:
      name: sst_tasmania                      # or a path; or  sum: [a, b], weights: [0.7, 0.3]  in its place
      given: {low: truth, day: 2009-07-14}    # conditions: a number, a list, a .npy or .nc file, a date, or "truth"
      compute: {precision: bfloat16, chunk: 8}
      tile: {shape: [256, 256], overlap: 32}
      slices: {axis: z, count: 12}            # a volume; with tile, of slices that are larger than the prior

A plain name stands for the section with that name alone.  The sections build what ``recon.priors`` has under the same names
(``accelerate``, ``Windowed``, ``SlicesPrior``, ``given``, ``ScoreSum``), so what those refuse is refused here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from recon.priors import Compute, Tiling
from recon.priors.cards import Grid
from recon.priors.foreign import PixelScale
from recon.workflows.fields import Items, Positive, Section, Whole

TRUTH = "truth"
DATE = re.compile(r"^\d{4}-\d{2}-\d{2}(T\d{2}:\d{2})?$")


def _said(words: Mapping[Any, str]) -> BeforeValidator:
    """Other words for the values of a key."""
    return BeforeValidator(lambda value: words.get(value, value) if isinstance(value, str | bool) else value)


class Computing(Section):
    """``recon.priors.Compute``: how the network is computed.

    precision: of convolutions and matrix products; "bf16" is short for bfloat16.  loss: largest loss of accuracy in decibel
    beside plain float32, measured before the run where precision or a compiler could cost some.  otherwise: refuse, or compute
    in float32, when it is larger.  compile: by torch's own compiler.  recompute: what a gradient forgets and computes again:
    nothing (false), the inside of blocks, or whole chunks (true).  chunk: images that are given to the network at once.
    """

    precision: Annotated[Literal["float32", "bfloat16"], _said({"bf16": "bfloat16", "fp32": "float32"})] = "float32"
    loss: Positive = 0.05
    otherwise: Literal["refuse", "float32"] = "refuse"
    compile: bool = False
    recompute: Annotated[Literal["nothing", "blocks", "chunks"], _said({False: "nothing", True: "chunks"})] = "nothing"
    chunk: Whole | None = Field(default=None, ge=1)
    channels_last: bool = False

    @model_validator(mode="after")
    def _accepted(self) -> Computing:
        self.build()
        return self

    def build(self) -> Compute:
        """As the library has it."""
        told = {
            name: getattr(self, name)
            for name in ("precision", "loss", "otherwise", "recompute", "chunk", "channels_last")
        }
        return Compute(**told, compiled="inductor" if self.compile else None)


class Tile(Section):
    """``recon.priors.Tiling``: a field larger than the prior's images, in overlapping windows.

    shape: sides of the field (the last two axes); left out where the prior's card knows the whole field, or the measurement
    its image.  The other keys are those of ``Tiling``.
    """

    shape: Annotated[tuple[Whole, Whole], Items] | None = None
    overlap: Whole
    margin: Whole | None = None
    align: Whole = 1
    periodic: Annotated[tuple[str, ...], Items] = ()
    shifted: bool = False

    @model_validator(mode="after")
    def _accepted(self) -> Tile:
        self.build()
        return self

    def build(self) -> Tiling:
        """As the library has it."""
        return Tiling(self.overlap, self.margin, self.align, self.periodic, self.shifted)


class Slices(Section):
    """``recon.priors.SlicesPrior``: a volume of independent slices across ``axis``.

    count: how many; left out where the measurement knows its image.  any_plane: also slices of another orientation than the
    prior's.  Slices are computed one by one, or ``compute.chunk`` at a time.
    """

    axis: str = Field(default="z", min_length=1)
    count: Whole | None = Field(default=None, ge=1)
    any_plane: bool = False


def _told(given: dict[str, Any]) -> dict[str, Any]:
    for name, value in given.items():
        if isinstance(value, str) and (value == TRUTH or DATE.match(value) or value.endswith((".npy", ".nc"))):
            continue
        array = None if isinstance(value, bool | str | dict) or value is None else _array(value)
        if array is None or not array.size or array.dtype.kind not in "fiu" or not np.isfinite(array).all():
            raise ValueError(
                f"{name}: expected a number, a list of numbers, a .npy or .nc file, a date (2009-07-14) or {TRUTH!r}; "
                f"got {value!r}"
            )
    return given


def _array(value: Any) -> np.ndarray | None:  # noqa: ANN401
    try:
        return np.array(value)
    except ValueError:  # rows of different lengths
        return None


class PriorSection(Section):
    """What ``prior:`` may hold in place of a name.

    name: or path of a prior; of a bare checkpoint its file, with format ("auto" recognises it), grid, unit, normalisation,
    config and sha256 as on the card of somebody's checkpoint (``recon.priors.foreign``).  sum, weights: several priors over the
    same arrays, their scores added (``ScoreSum``: a heuristic; one over their number each when weights are left out).
    given: conditions of a conditional prior by name: "truth" takes them from the truth that is simulated from; ``{}`` gives
    none, which needs a prior that was trained with a condition dropout.
    """

    name: Annotated[str, Field(min_length=1)] | None = None
    sum: Annotated[tuple[str, ...], Items, Field(min_length=2)] | None = None
    weights: Annotated[tuple[float, ...], Items] | None = None
    given: Annotated[dict[str, Any], AfterValidator(_told)] | None = None
    compute: Computing | None = None
    tile: Tile | None = None
    slices: Slices | None = None
    format: str | None = None
    grid: Grid | None = None
    unit: str | None = None
    normalisation: PixelScale | None = None
    config: dict[str, Any] | None = None
    sha256: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _no_mixture(cls, data: Any) -> Any:  # noqa: ANN401
        if isinstance(data, dict) and "mix" in data:
            raise ValueError(
                "mix: the shares of a mixture are made of the densities of noisy images, which networks do not know; "
                "sum: [...] adds their scores (a heuristic)"
            )
        return data

    @model_validator(mode="after")
    def _consistent(self) -> PriorSection:
        if (self.name is None) == (self.sum is None):
            raise ValueError(f"expected either name or sum; got {'neither' if self.name is None else 'both'}")
        if self.weights is not None and len(self.weights) != len(self.sum or ()):
            raise ValueError(f"weights are one for each of sum, {len(self.sum or ())}; got {len(self.weights)}")
        if self.sum is not None and self.given is not None:
            raise ValueError("given is for one conditional prior; a sum takes none")
        bare = {key: getattr(self, key) for key in ("grid", "unit", "normalisation")}
        told = [
            key for key, value in {**bare, "config": self.config, "sha256": self.sha256}.items() if value is not None
        ]
        if self.format is None and told:
            raise ValueError(f"{', '.join(told)} belong to bare checkpoints: give format too (auto recognises it)")
        missing = [key for key, value in bare.items() if value is None]
        if self.format is not None and (missing or self.name is None):
            raise ValueError(
                f"a bare checkpoint has a name (its file), grid, unit and normalisation; missing: {missing}"
            )
        return self


Asked = str | PriorSection
"""A name or path, or the section."""
