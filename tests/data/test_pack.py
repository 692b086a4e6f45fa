"""data/pack.py: no sample lost, none split, few rows."""

import math
import random

import pytest

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
