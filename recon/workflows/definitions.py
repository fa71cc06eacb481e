"""Definitions of operators and data sets: what the files in the folders ``operators`` and ``datasets`` may say.

Lengths are millimetres and angles degrees here, as scanners state them; recon's classes take metres and radians.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field

from recon.datasets.fields import FieldCard
from recon.datasets.slices import SliceCard
from recon.workflows.fields import Positive, Section, Whole, one_of
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


OPERATORS: Mapping[str, type[BaseModel]] = {"parallel_beam": ParallelBeamDefinition}
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
