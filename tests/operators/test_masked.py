"""Masks against indexing."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from recon.errors import InputError
from recon.operators.masked import Masked
from recon.space import Space
from tests import zoo

IMAGE = Space.grid((3, 4), 1.0, "K")
MASK = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0, 1]]).bool()
WEATHER = Space(("variable", "y", "x"), (2, 3, 4), {"variable": ("t", "q"), **IMAGE.coords}, "mixed")


def test_the_list_is_what_indexing_gives():
    A = Masked(IMAGE, MASK)
    x = zoo.normal(5, 3, 4)
    assert torch.equal(A(x), x[:, MASK])
    assert A.range.dims == ("datum",) and A.range.unit == "K"
    assert A.range.coords["datum"].tolist() == [0, 3, 5, 11]
    back = torch.zeros(5, 3, 4, dtype=torch.float64)
    back[:, MASK] = x[:, MASK]
    assert torch.equal(A.A_adjoint(A(x)), back)
    assert torch.equal(A.normal(x), back)


def test_zeros_keep_the_shape():
    A = Masked(IMAGE, MASK, zeros=True)
    x = zoo.normal(5, 3, 4)
    expected = torch.where(MASK, x, 0.0)
    assert A.range.mismatch(IMAGE) is None
    for got in (A(x), A.A_adjoint(x), A.normal(x)):
        assert torch.equal(got, expected)


def test_one_mask_for_all_leading_axes_or_one_for_each():
    x = zoo.normal(2, 2, 3, 4)
    shared = Masked(WEATHER, MASK)
    assert shared.range.dims == ("variable", "datum")
    assert shared.range.coords["variable"] == ("t", "q")
    assert torch.equal(shared(x), x[:, :, MASK])
    each = torch.stack([MASK, ~MASK])
    assert torch.equal(Masked(WEATHER, each)(x), x[:, each])
    assert torch.equal(Masked(WEATHER, MASK, zeros=True)(x), x * MASK)


@pytest.mark.parametrize("zeros", [False, True])
def test_hidden_entries_are_never_read(zeros):
    A = Masked(IMAGE, MASK, zeros)
    x = zoo.normal(3, 4)
    hidden = torch.where(MASK, x, torch.nan)
    assert torch.equal(A(hidden), A(x))
    assert torch.equal(A.normal(hidden), A.normal(x))


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("domain", [IMAGE, WEATHER])
def test_solve_divides(zeros, domain):
    A = Masked(domain, MASK, zeros).double()
    M = zoo.dense(A)
    b, seen = zoo.normal(3, *domain.shape), []
    weight = zoo.normal(*A.range.shape, step=1).abs()
    for w in (None, weight):
        W = torch.eye(len(M)).double() if w is None else torch.diag(w.flatten())
        K = M.T @ W @ M + 0.3 * torch.eye(domain.size).double()
        exact = torch.linalg.solve(K, b.flatten(1).T).T.reshape(b.shape)
        got = A.solve(b, 0.3, w, watch=seen.append)
        assert float((got - exact).abs().max()) <= 16 * np.finfo(float).eps * float(exact.abs().max())
    assert seen == [3, 3]


def test_k_space_may_be_masked():
    domain = Space(("ky", "kx"), (3, 4), {}, "1", complex=True)
    x = torch.complex(zoo.normal(2, 3, 4), zoo.normal(2, 3, 4, step=1))
    assert Masked(domain, MASK).range.complex
    assert torch.equal(Masked(domain, MASK)(x), x[:, MASK])
    A = Masked(domain, MASK, zeros=True)
    assert torch.equal(A(x), x * MASK)
    assert torch.allclose(A.solve(x, 0.5), x / (0.5 + MASK.double()), rtol=1e-15)


def test_masks_of_other_kinds():
    x = zoo.normal(3, 4)
    for mask in (MASK.numpy(), MASK.numpy().astype(np.uint8), MASK.double(), MASK.tolist()):
        assert torch.equal(Masked(IMAGE, mask)(x), x[MASK])
    assert torch.equal(Masked(IMAGE, torch.ones(3, 4))(x), x.flatten())


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        (torch.zeros(3, 4), "the mask is empty: no entry would be kept, so nothing would be measured"),
        (torch.ones(4, 3), r"a mask has the shape of \(y=3, x=4\) \[K\] or of its last axes; got \(4, 3\)"),
        (torch.ones(1, 3, 4), r"a mask has the shape of .* got \(1, 3, 4\)"),
        (torch.tensor(1.0), r"a mask has the shape of .* got \(\)"),
        (torch.full((3, 4), 0.5), "a mask holds true and false, or 1 and 0, and nothing else"),
        (torch.full((3, 4), torch.nan), "a mask holds true and false"),
    ],
)
def test_masks_that_cannot_be(mask, text):
    with pytest.raises(InputError, match=text):
        Masked(IMAGE, mask)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_the_entries_that_are_present(kind):
    field = torch.where(MASK, zoo.normal(3, 4), torch.nan)
    given = field.numpy() if kind == "numpy" else field
    A, values = Masked.present(IMAGE, given)
    assert type(values) is type(given)
    assert torch.equal(torch.as_tensor(values), field[MASK])
    assert torch.equal(A(field), field[MASK])
    with pytest.raises(InputError, match="the mask is empty"):
        Masked.present(IMAGE, np.full((3, 4), np.nan))
    with pytest.raises(InputError, match=r"present takes one field .* got shape \(4, 3\)"):
        Masked.present(IMAGE, given.T)
    with pytest.raises(InputError, match="the field holds 12 infinite values"):
        Masked.present(IMAGE, np.full((3, 4), np.inf))


@pytest.mark.data
def test_gaps_under_real_clouds():
    """Ten days of sea surface temperature over the Alboran Sea: what a day's operator lists is what the satellite saw."""
    netcdf = importlib.import_module("netCDF4")
    path = Path(os.environ.get("RECON_DATA", "")) / "flow" / "alboran_avhrr_sst_cloud_gaps.nc"
    if not os.environ.get("RECON_DATA") or not path.is_file():
        pytest.skip("needs flow/alboran_avhrr_sst_cloud_gaps.nc below RECON_DATA")
    with netcdf.Dataset(path) as file:
        name = next(n for n, v in file.variables.items() if v.ndim == 3)
        days = np.ma.filled(file[name][:], np.nan).astype(np.float64)
    domain = Space(("lat", "lon"), days.shape[1:], {}, "degC")
    for day in days:
        A, values = Masked.present(domain, day)
        assert len(values) == np.isfinite(day).sum() and np.isfinite(values).all()
        again = A.double().A_adjoint(torch.from_numpy(values)).numpy()
        assert np.array_equal(again, np.nan_to_num(day))
