"""data/pack.py: no sample lost, none split, few rows."""

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tundish.data.pack import pack

SEEDS = range(8)


def _lengths(seed: int, capacity: int = 512, samples: int = 400) -> list[int]:
    source = random.Random(seed)
    return [min(capacity, max(1, round(source.lognormvariate(4, 1)))) for _ in range(samples)]


def test_the_example_of_the_docstring() -> None:
    """The promise in the docstring would be false."""
    assert pack([5, 4, 3], 8) == [[0, 2], [1]]


def test_nothing_makes_no_rows() -> None:
    """An empty row would be trained."""
    assert pack([], 8) == []


@pytest.mark.parametrize("seed", SEEDS)
def test_every_sample_is_in_exactly_one_row_that_holds_it(seed: int) -> None:
    """Samples would be lost, trained twice, or cut."""
    lengths = _lengths(seed)
    rows = pack(lengths, 512)
    assert sorted(sample for row in rows for sample in row) == list(range(400))
    assert all(row and sum(lengths[sample] for sample in row) <= 512 for row in rows)


@pytest.mark.parametrize("seed", SEEDS)
def test_rows_are_full(seed: int) -> None:
    """Most of a batch would be padding: best fit needs at most 11/9 of the fewest rows possible, plus one."""
    lengths = _lengths(seed)
    fewest = math.ceil(sum(lengths) / 512)
    assert len(pack(lengths, 512)) <= fewest * 11 / 9 + 1
    short = [min(length, 128) for length in lengths]
    assert sum(short) / (len(pack(short, 512)) * 512) > 0.97


@pytest.mark.parametrize("seed", SEEDS)
def test_rows_are_in_the_order_of_their_first_sample(seed: int) -> None:
    """The order of rows would depend on something else than the data."""
    rows = pack(_lengths(seed), 512)
    assert rows == sorted(sorted(row) for row in rows)
    assert rows == pack(_lengths(seed), 512)


@pytest.mark.parametrize(
    ("lengths", "rows"),
    [
        ([8, 8, 8], [[0], [1], [2]]),
        ([4] * 4, [[0, 1], [2, 3]]),
        ([1] * 9, [list(range(8)), [8]]),
        ([5, 4, 3], [[0, 2], [1]]),
    ],
)
def test_edges(lengths: list[int], rows: list[list[int]]) -> None:
    """A sample as long as a row, or one that just fits, would open a row too many or overfill one."""
    assert pack(lengths, 8) == rows


def test_the_tightest_row_is_taken() -> None:
    """First fit instead of best fit: the 2 would go to the row with 3 left, and the 3 need a row of its own."""
    assert pack([7, 6, 2, 3], 9) == [[0, 2], [1, 3]]
    assert pack([6, 7, 3, 2], 9) == [[0, 2], [1, 3]]


def _checked(lengths: "np.ndarray", capacity: int) -> list[list[int]]:
    """The rows, in which every sample is once, and which hold what they have."""
    rows = pack(lengths, capacity)
    samples = np.concatenate(rows)
    assert np.array_equal(np.sort(samples), np.arange(len(lengths)))
    starts = np.cumsum([0, *map(len, rows[:-1])])
    assert np.add.reduceat(lengths[samples], starts, dtype=np.int64).max() <= capacity
    return rows


def test_rows_of_a_hundred_thousand_samples_are_full() -> None:
    """A twentieth of every batch would be padding: sizes of real samples leave next to no room."""
    lengths = np.clip(np.random.default_rng(0).lognormal(5.5, 1.2, 100_000), 1, 8192).astype(np.int32)
    rows = _checked(lengths, 8192)
    assert lengths.sum() / (len(rows) * 8192) >= 0.995


def test_a_million_samples_are_planned() -> None:
    """Large data would not be prepared at all: the plan must not grow with the square of the samples."""
    lengths = np.clip(np.random.default_rng(1).lognormal(5.5, 1.2, 1_000_000), 1, 8192).astype(np.int32)
    rows = _checked(lengths, 8192)
    assert lengths.sum() / (len(rows) * 8192) >= 0.995


def test_many_samples_of_one_length_are_planned() -> None:
    """Many rows with the same space left must not be searched one by one."""
    for length, in_a_row in ((1, 8192), (3000, 2), (8192, 1)):
        rows = _checked(np.full(300_000, length, np.int32), 8192)
        assert len(rows) == -(-300_000 // in_a_row)


@given(st.lists(st.integers(1, 24), max_size=40), st.integers(24, 40))
def test_rows_are_those_of_best_fit_decreasing(lengths: list[int], capacity: int) -> None:
    """As the method is written down: longest first, each into the fullest row that takes it, else into a new one."""
    spaces: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row, space in enumerate(spaces) if space >= length]
        if not fitting:
            spaces.append(capacity)
            fitting = [len(spaces) - 1]
        spaces[min(fitting, key=lambda row: spaces[row])] -= length
    rows = pack(lengths, capacity)
    assert sorted(capacity - sum(lengths[sample] for sample in row) for row in rows) == sorted(spaces)
    assert sorted(sample for row in rows for sample in row) == list(range(len(lengths)))
    assert rows == sorted(sorted(row) for row in rows)
