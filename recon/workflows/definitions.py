"""Definitions of operators and data sets: what the files in the folders ``operators`` and ``datasets`` may say.

Lengths are millimetres and angles degrees here, as scanners state them; recon's classes take metres and radians.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, model_validator

from recon.datasets.fields import FieldCard
from recon.datasets.slices import SliceCard
from recon.workflows.fields import Items, Positive, Section, Whole, one_of
from recon.workflows.problems import validated
from recon.workflows.source import read_source


class ParallelBeamDefinition(Section):
    """A parallel-beam scan: views evenly over an arc, one row of detectors.

    views: how many.  arc_degrees, first_degree: view k looks from first + k * arc / views.  detectors: per view; null covers
    the image's diagonal.  spacing_mm: of the detectors; null is the image's pixel.  offset_mm: of the detector's centre from
    the axis of rotation.  projector: "line" (ray lengths), "strip" (mean over the detector's width) or "linear" (Joseph).
    """

    type: Literal["parallel_beam"]
    name: str = ""
    summary: str = ""
    views: Whole = Field(gt=0)
    arc_degrees: float = Field(default=180.0, gt=0, le=360)
    first_degree: float = Field(default=0.0, ge=-360, le=360)
    detectors: Whole | None = Field(default=None, gt=0)
    spacing_mm: Positive | None = None
    offset_mm: float = 0.0
    projector: Literal["line", "strip", "linear"] = "line"


class FanBeamDefinition(Section):
    """A fan-beam scan on a circle; view k looks from first + k * arc / views.

    source_distance_mm, detector_distance_mm: from the axis of rotation.  detectors: per view; null covers the image.
    spacing_mm: of the detectors, at the detector; null puts neighbouring rays one pixel apart on the axis.  offset_mm: of the
    detector's centre along the detector.  tilt_degrees: of the detector in the plane.  shape: "flat" or "curved".
    """

    type: Literal["fan_beam"]
    name: str = ""
    summary: str = ""
    views: Whole = Field(gt=0)
    source_distance_mm: Positive
    detector_distance_mm: float = Field(ge=0)
    arc_degrees: float = Field(default=360.0, gt=0, le=360)
    first_degree: float = Field(default=0.0, ge=-360, le=360)
    detectors: Whole | None = Field(default=None, gt=0)
    spacing_mm: Positive | None = None
    offset_mm: float = 0.0
    tilt_degrees: float = Field(default=0.0, gt=-90, lt=90)
    shape: Literal["flat", "curved"] = "flat"
    projector: Literal["line", "strip", "linear"] = "line"


class CartesianMRIDefinition(Section):
    """A simulated multi-coil scan on the Cartesian grid.

    coils: on a ring around the slice; 1 sees all pixels alike.  acceleration: columns of k-space over those measured.  centre:
    middle columns that are always measured.  pattern: of the others.  seed: of a random pattern.
    """

    type: Literal["cartesian_mri"]
    name: str = ""
    summary: str = ""
    coils: Whole = Field(default=8, ge=1)
    acceleration: float = Field(default=4.0, ge=1)
    centre: Whole = Field(default=8, ge=0)
    pattern: Literal["random", "even"] = "random"
    seed: Whole = Field(default=0, ge=0)


class RadialMRIDefinition(Section):
    """A simulated multi-coil scan along spokes through the centre of k-space.

    spokes: how many.  samples: per spoke; null is twice the pixels.  golden: golden-angle order in place of even angles.
    """

    type: Literal["radial_mri"]
    name: str = ""
    summary: str = ""
    coils: Whole = Field(default=8, ge=1)
    spokes: Whole = Field(gt=0)
    samples: Whole | None = Field(default=None, gt=0)
    golden: bool = False


class StationsDefinition(Section):
    """Sensors that read all variables of a gridded field at points.

    count: how many, at random places of the grid (seed), or positions: a list of [latitude, longitude] in degrees, or of [y, x]
    in metres on grids that have those.
    """

    type: Literal["stations"]
    name: str = ""
    summary: str = ""
    count: Whole | None = Field(default=None, gt=0)
    positions: Annotated[tuple[Annotated[tuple[float, float], Items], ...], Items] | None = None
    seed: Whole = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.count is None) == (self.positions is None):
            raise ValueError("expected either count (random places) or positions (a list)")
        return self


class CoarseGrainDefinition(Section):
    """Area-weighted means over blocks of cells: what a coarse model or a large footprint says about a fine field.

    factor: fine cells per coarse one along each axis.
    """

    type: Literal["coarse_grain"]
    name: str = ""
    summary: str = ""
    factor: float = Field(gt=1)


class MaskedDefinition(Section):
    """Pixels or cells of which a random share is measured, the same for all variables: gaps, inpainting."""

    type: Literal["masked"]
    name: str = ""
    summary: str = ""
    share: float = Field(gt=0, le=1)
    seed: Whole = Field(default=0, ge=0)


class DicomDefinition(Section):
    """One CT slice in a DICOM file.

    file: absolute, relative to the folder RECON_DATA, or ``pydicom:NAME`` for a file that the pydicom package carries.
    sha256: of the file, checked when given.
    """

    reader: Literal["dicom"]
    name: str = ""
    summary: str = ""
    file: str = Field(min_length=1)
    licence: str = ""
    source: str = ""
    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")


OPERATORS: Mapping[str, type[BaseModel]] = {
    "parallel_beam": ParallelBeamDefinition,
    "fan_beam": FanBeamDefinition,
    "cartesian_mri": CartesianMRIDefinition,
    "radial_mri": RadialMRIDefinition,
    "stations": StationsDefinition,
    "coarse_grain": CoarseGrainDefinition,
    "masked": MaskedDefinition,
}
DATASETS: Mapping[str, type[BaseModel]] = {
    "dicom": DicomDefinition,
    "fields": FieldCard,
    "hdf5_slices": SliceCard,
}

OperatorDefinition = one_of("type", OPERATORS)
DatasetDefinition = one_of("reader", DATASETS)


def read_definition(group: Literal["operators", "datasets"], path: Path) -> Any:  # noqa: ANN401  (a model of the group)
    """The definition in a file of ``group``; its name is that of the file unless it says otherwise.

    Raises InputError with every key and value that does not fit.
    """
    source = read_source(path)
    named = replace(source, data={"name": Path(path).stem, **source.data})
    return validated(OperatorDefinition if group == "operators" else DatasetDefinition, named)
