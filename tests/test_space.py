"""What an array means, and how two meanings differ."""

from __future__ import annotations

import numpy as np
import pytest

from recon.errors import InputError
from recon.space import Space

ROWS = np.arange(3) * 0.5


def space(**change):
    return Space(**({"dims": ("y", "x"), "shape": (3, 4), "coords": {"y": ROWS}, "unit": "K"} | change))


def test_a_grid_is_centred_and_falls_in_y():
    grid = Space.grid((3, 4), 2e-3, "1/m")
    assert grid.coords["y"].tolist() == pytest.approx([2e-3, 0.0, -2e-3])
    assert grid.coords["x"].tolist() == pytest.approx([-3e-3, -1e-3, 1e-3, 3e-3])
    assert grid.spacing("y") == grid.spacing("x") == pytest.approx(2e-3)
    assert (grid.size, grid.describe()) == (12, "(y=3, x=4) [1/m]")


def test_a_vector():
    vector = Space.vector(5, "K", "station")
    assert (vector.dims, vector.shape, vector.unit, vector.size) == (("station",), (5,), "K", 5)


def test_lists_become_tuples_and_coordinates_float64():
    made = Space(["y"], [np.int64(2)], {"y": [1, 2]})
    assert made.dims == ("y",)
    assert made.shape == (2,)
    assert type(made.shape[0]) is int
    assert made.coords["y"].dtype == np.float64


def test_names_are_coordinates_too():
    made = Space(("variable",), (2,), {"variable": ("t2m", "u10")})
    assert made.coords["variable"] == ("t2m", "u10")
    assert made.spacing("variable") is None


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"dims": ("y",)}, r"one distinct name per axis; got dims \('y',\) for shape \(3, 4\)"),
        ({"dims": ("y", "y")}, "one distinct name per axis"),
        ({"shape": (3, 0)}, r"holds at least one value; got shape \(3, 0\)"),
        ({"shape": (3, -1)}, "holds at least one value"),
        ({"coords": {"z": ROWS}}, r"coordinates for 'z', which is not one of the dims \('y', 'x'\)"),
        ({"coords": {"x": ROWS}}, "coordinate 'x' has 3 values; the axis has 4"),
        ({"coords": {"x": ("a", "b")}}, "coordinate 'x' has 2 values; the axis has 4"),
    ],
)
def test_what_does_not_agree_is_refused(change, text):
    with pytest.raises(InputError, match=text):
        space(**change)


def test_spacing_needs_even_coordinates():
    assert space().spacing("y") == 0.5
    assert space(coords={"y": -ROWS}).spacing("y") == 0.5
    assert space(coords={"y": [0, 1, 3]}).spacing("y") is None
    assert space().spacing("x") is None
    assert Space(("y",), (1,), {"y": [2.0]}).spacing("y") is None


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"dims": ("x", "y"), "coords": {}}, r"\(y=3, x=4\) \[K\] against \(x=3, y=4\) \[K\]"),
        ({"shape": (3, 5)}, r"\(y=3, x=4\) \[K\] against \(y=3, x=5\) \[K\]"),
        ({"unit": "1/m"}, "unit 'K' against '1/m'"),
        ({"coords": {"y": ROWS + 0.1}}, "different coordinates along 'y'"),
        ({"coords": {"y": ROWS[::-1]}}, "different coordinates along 'y'"),
        ({"coords": {"y": ("a", "b", "c")}}, "different coordinates along 'y'"),
    ],
)
def test_differences_are_told_in_words(change, text):
    import re

    assert re.fullmatch(text, space().mismatch(space(**change)))
    assert space(**change).mismatch(space()) is not None


def test_the_same_is_no_mismatch():
    assert space().mismatch(space()) is None
    assert space().mismatch(space(coords={})) is None  # coordinates count where both have them
    assert space().mismatch(space(coords={"y": ROWS + 1e-5})) is None  # float32 files round coordinates
    names = {"y": ("a", "b", "c")}
    assert space(coords=names).mismatch(space(coords=names)) is None


def test_require_gives_the_batch():
    assert space().require((3, 4), "A") == ()
    assert space().require((2, 7, 3, 4), "A") == (2, 7)


@pytest.mark.parametrize("shape", [(4,), (4, 3), (3, 4, 1), (3, 5), ()])
def test_require_refuses_by_name(shape):
    with pytest.raises(InputError, match=r"A takes arrays \(\*batch, \(y=3, x=4\) \[K\]\); got shape \("):
        space().require(shape, "A")


def test_a_volume_has_its_own_voxels() -> None:
    space = Space.grid((2, 3, 4), (2e-3, 1e-3, 1e-3), "1/m")
    assert space.dims == ("z", "y", "x") and space.shape == (2, 3, 4)
    assert space.coords["z"].tolist() == [-1e-3, 1e-3] and space.coords["y"].tolist() == [1e-3, 0.0, -1e-3]
    with pytest.raises(InputError, match="one side or one per axis"):
        Space.grid((2, 3, 4), (1e-3, 1e-3), "1/m")
    with pytest.raises(InputError, match="a grid is"):
        Space.grid((4,), 1e-3, "1/m")


def test_complex_values_are_another_space() -> None:
    real, other = Space.vector(3), Space(("component",), (3,), {}, "1", complex=True)
    assert real.mismatch(other) == "real against complex values" and other.mismatch(other) is None
    assert other.describe() == "(component=3) [1, complex]"
