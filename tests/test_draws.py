"""Keyed random numbers: the right generator, the right distribution, and nothing but their key decides them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import kstwobign

from recon import philox
from recon.draws import Draws, blocks
from recon.errors import InputError
from tests.bounds import FALSE_ALARM, chi2_bounds, normal_bound

LARGE = 1000  # more than 64 blocks of words: numpy's generator instead of the vectorised one


def one(key, counter):
    arrays = [np.array([value], dtype=np.uint64) for value in (*key, *counter)]
    return philox.words((arrays[0], arrays[1]), tuple(arrays[2:]))[0].tolist()


# --- The generator ------------------------------------------------------------------------------------------------------

FULL = 2**64 - 1


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    # Known answers of Random123 (kat_vectors, philox4x64-10): counters, keys and results least significant first.
    [
        ((0, 0), (0, 0, 0, 0), "16554d9eca36314c db20fe9d672d0fdc d7e772cee186176b 7e68b68aec7ba23b"),
        ((FULL, FULL), (FULL,) * 4, "87b092c3013fe90b 438c3c67be8d0224 9cc7d7c69cd777b6 a09caebf594f0ba0"),
        (
            (0x452821E638D01377, 0xBE5466CF34E90C6C),
            (0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89),
            "a528f45403e61d95 38c72dbd566e9788 a5a1610e72fd18b5 57bd43b5e52b7fe6",
        ),
    ],
)
def test_known_answers(key, counter, expected):
    assert one(key, counter) == [int(word, 16) for word in expected.split()]


def test_the_same_words_as_numpy():
    """numpy steps its counter before it is used."""
    key, counter = (7, 2**32 * 3 + 5), (11, 0, 4, 2)
    generator = np.random.Philox(key=np.array(key, dtype=np.uint64), counter=np.array(counter, dtype=np.uint64))
    expected = generator.random_raw(12).tolist()
    got = [word for block in range(3) for word in one(key, (counter[0] + 1 + block, *counter[1:]))]
    assert got == expected


def test_uniform_numbers_are_those_words():
    """The documented layout, spelled out: key (seed, case 2^32 + draw), counter (block, 0, step, stream), two halves a word."""
    seed, case, member, step = 2**63 + 17, 6, 41, 9
    generator = np.random.Philox(
        key=np.array([seed, case * 2**32 + member], dtype=np.uint64),
        counter=np.array([0, 0, step, 2], dtype=np.uint64),  # 2: the stream "step"
    )
    halves = generator.random_raw(LARGE // 2).astype("<u8").view("<u4")
    for count in (5, 20, LARGE):
        got = Draws(seed, [member], case).uniform(step, (count,))[0].numpy()
        assert np.array_equal(got, (halves[:count] + 0.5) * 2.0**-32)


def test_normal_numbers_are_box_muller_of_uniform_pairs():
    draws = Draws(3, [4])
    u, z = draws.uniform(0, (10,))[0], draws.normal(0, (10,), dtype=torch.float64)[0]
    radius, angle = torch.sqrt(-2 * torch.log(u[0::2])), 2 * math.pi * u[1::2]
    assert torch.allclose(z[0::2], radius * torch.cos(angle), rtol=1e-12)
    assert torch.allclose(z[1::2], radius * torch.sin(angle), rtol=1e-12)


def test_few_and_many_numbers_agree():
    """Short streams and long ones are made by different code."""
    draws = Draws(3, [0, 9])
    assert torch.equal(draws.normal(1, (LARGE,))[:, :40], draws.normal(1, (40,)))
    assert torch.equal(draws.uniform(1, (LARGE,))[:, :37], draws.uniform(1, (37,)))


def test_these_numbers_stay_what_they_are():
    """Another release must not change anybody's draws."""
    got = Draws(2026, [3], case=1).normal(5, (4,), "step", dtype=torch.float64)[0].tolist()
    assert got == pytest.approx(
        [-1.4702181144434203, 1.1368304131375193, -0.9631390197695889, 1.3461086445418413], rel=1e-12
    )


# --- Only the key decides -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 7, 8, 9, 600, LARGE])
def test_any_split_sees_the_same_numbers(count):
    draws = Draws(0, [5])
    whole = draws.normal(2, (2 * count + 3,))
    for first in {0, 1, 2, 3, count - 1, count, count + 3}:
        assert torch.equal(draws.normal(2, (count,), first=first)[0], whole[0, first : first + count])


def test_a_row_slab_of_an_image():
    draws = Draws(0, [5, 6])
    image = draws.normal(2, (12, 7))
    assert torch.equal(draws.normal(2, (4, 7), first=5 * 7), image[:, 5:9])


@pytest.mark.parametrize("shape", [(3,), (LARGE,)])
def test_company_does_not_matter(shape):
    together = Draws(4, [3, 17, 2**32 - 1], case=2).normal(6, shape)
    for row, member in enumerate((3, 17, 2**32 - 1)):
        assert torch.equal(Draws(4, [member], case=2).normal(6, shape)[0], together[row])
    assert torch.equal(Draws(4, [17, 3], case=2).normal(6, shape), together[[1, 0]])


def test_the_shape_does_not_matter():
    assert torch.equal(Draws(0, [1]).normal(0, (4, 6)).flatten(), Draws(0, [1]).normal(0, (24,)).flatten())


def test_single_precision_rounds_the_same_numbers():
    draws = Draws(0, range(3))
    assert torch.equal(draws.normal(0, (50,)), draws.normal(0, (50,), dtype=torch.float64).float())


def test_complex_numbers_are_pairs_of_the_real_ones():
    real = Draws(5, [3, 4]).normal(2, (10,), dtype=torch.float64)
    assert torch.equal(torch.view_as_real(Draws(5, [3, 4]).normal(2, (5,), dtype=torch.complex128)).flatten(1), real)
    part = Draws(5, [3]).normal(2, (2,), dtype=torch.complex128, first=3)
    assert torch.equal(torch.view_as_real(part).flatten(), real[0, 6:])


def test_every_part_of_the_key_matters():
    def numbers(seed=1, member=2, case=3, step=4, stream="step"):
        return tuple(Draws(seed, [member], case).normal(step, (4,), stream)[0].tolist())

    streams = ("init", "step", "resample", "data", "probe", "user")
    found = [numbers(), numbers(seed=0), numbers(member=0), numbers(case=0), numbers(step=0)]
    found += [numbers(stream=stream) for stream in streams if stream != "step"]
    found += [numbers(seed=2, member=1), numbers(case=2, member=3), numbers(seed=2**64 - 1), numbers(step=2**40)]
    values = [value for four in found for value in four]
    assert len(set(values)) == len(values)


def test_the_global_generators_are_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = Draws(0, [0]).normal(0, (LARGE,))
    torch.manual_seed(1)
    assert torch.equal(first, Draws(0, [0]).normal(0, (LARGE,)))
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


# --- The distribution ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: (range(1), (200_000,)), lambda: (range(20_000), (10,))], ids=["long", "many"])
def test_normal_numbers_are_normal(make):
    """Moments up to the fourth and the distribution function, each at the suite's false-alarm rate."""
    members, shape = make()
    z = Draws(11, members).normal(3, shape, dtype=torch.float64).flatten()
    n, bound = len(z), normal_bound()
    assert abs(float(z.mean())) * math.sqrt(n) < bound
    low, high = chi2_bounds(n)
    assert low < float(z.square().mean()) < high
    assert abs(float((z**3).mean())) * math.sqrt(n / 15) < bound
    assert abs(float((z**4).mean()) - 3) * math.sqrt(n / 96) < bound
    u = torch.special.ndtr(z.sort().values)
    steps = torch.arange(1, n + 1) / n
    distance = float(torch.maximum((steps - u).abs(), (u - steps + 1 / n).abs()).max())
    assert distance * math.sqrt(n) < kstwobign.isf(FALSE_ALARM)


def test_the_distribution_test_can_fail():
    z = 1.02 * Draws(11, [0]).normal(3, (200_000,), dtype=torch.float64)
    low, high = chi2_bounds(200_000)
    assert not low < float(z.square().mean()) < high


def test_nothing_is_correlated():
    """Neighbours in position, draw, step, case, seed and stream: every pairing of a base with its neighbour."""
    n = 50_000
    base = Draws(5, [8], case=2).normal(3, (n + 2,), dtype=torch.float64)[0]
    others = [
        base[1:-1],
        base[2:],
        Draws(5, [9], case=2).normal(3, (n,), dtype=torch.float64)[0],
        Draws(5, [8], case=3).normal(3, (n,), dtype=torch.float64)[0],
        Draws(6, [8], case=2).normal(3, (n,), dtype=torch.float64)[0],
        Draws(5, [8], case=2).normal(4, (n,), dtype=torch.float64)[0],
        *(Draws(5, [8], case=2).normal(3, (n,), s, dtype=torch.float64)[0] for s in ("init", "resample", "data")),
    ]
    bound = normal_bound(2 * len(others))
    for other in others:
        assert abs(float((base[:n] * other).mean())) * math.sqrt(n) < bound
        assert abs(float(((base[:n] ** 2 - 1) * (other**2 - 1)).mean())) * math.sqrt(n) / 2 < bound


def test_uniform_numbers_fill_the_unit_interval():
    u = Draws(5, range(100)).uniform(0, (1000,)).flatten()
    assert 0 < float(u.min()) < 1e-3
    assert 1 - 1e-3 < float(u.max()) < 1
    counts = torch.histc(u, 100, 0, 1)
    low, high = chi2_bounds(99)
    assert low < float(((counts - 1000) ** 2 / 1000).sum() / 99) < high
    assert abs(float(u.mean()) - 0.5) * math.sqrt(12 * len(u)) < normal_bound()


# --- Edges --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"seed": -1, "members": [0]}, r"seed must lie in \[0, 2\^64\); got -1"),
        ({"seed": 2**64, "members": [0]}, r"seed must lie in"),
        ({"seed": 0, "members": [-1]}, r"draw and case numbers must lie in \[0, 2\^32\)"),
        ({"seed": 0, "members": [2**32]}, "draw and case numbers must lie in"),
        ({"seed": 0, "members": [0], "case": 2**32}, "draw and case numbers must lie in"),
    ],
)
def test_keys_out_of_range(given, text):
    with pytest.raises(InputError, match=text):
        Draws(**given)


def test_shapes():
    assert Draws(0, []).normal(0, (3, 2)).shape == (0, 3, 2)
    assert Draws(0, []).uniform(0, (LARGE,)).shape == (0, LARGE)
    assert Draws(0, []).normal(0, (LARGE,)).shape == (0, LARGE)
    assert Draws(0, [1, 2]).normal(0, (0, 4)).shape == (2, 0, 4)
    assert Draws(0, [1, 2]).normal(0, ()).shape == (2,)
    assert Draws(0, [1, 2]).uniform(0, (3, 4)).shape == (2, 3, 4)
    assert len(Draws(0, range(7))) == 7


def test_values_are_values():
    assert Draws(1, range(3)) == Draws(1, [0, 1, 2])
    assert Draws(1, [0]) != Draws(1, [0], case=1)


def test_blocks():
    assert blocks(7, 3) == [range(0, 3), range(3, 6), range(6, 7)]
    assert blocks(2, 5) == [range(0, 2)]
    with pytest.raises(InputError, match="draws and block must be at least 1; got 0 and 3"):
        blocks(0, 3)
    with pytest.raises(InputError, match="draws and block must be at least 1; got 4 and 0"):
        blocks(4, 0)
