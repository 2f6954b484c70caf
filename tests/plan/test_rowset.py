"""A RowSet is a Python set of row numbers, whatever is done with it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_qwen_hidden.plan.rowset import RowSet, union

RANGE = st.tuples(st.integers(0, 60), st.integers(0, 12))
RANGES = st.lists(RANGE, max_size=9)


def rows_of(ranges: list[tuple[int, int]]) -> set[int]:
    return {row for first, length in ranges for row in range(first, first + length)}


def as_ranges(rows: set[int]) -> list[tuple[int, int]]:
    """The maximal ranges, the slow way."""
    starts = sorted(row for row in rows if row - 1 not in rows)
    stops = sorted(row + 1 for row in rows if row + 1 not in rows)
    return [(start, stop - start) for start, stop in zip(starts, stops, strict=True)]


@given(RANGES)
def test_ranges_are_joined_and_in_order(ranges: list[tuple[int, int]]) -> None:
    rows = rows_of(ranges)
    found = RowSet(ranges)
    assert found.ranges == as_ranges(rows)
    assert len(found) == len(rows)
    assert found == RowSet(reversed(ranges)) == RowSet((row, 1) for row in rows)
    assert repr(found) == f"RowSet({len(rows)} rows in {len(as_ranges(rows))} ranges)"


@given(RANGES, RANGES)
def test_operators_are_those_of_sets(left: list[tuple[int, int]], right: list[tuple[int, int]]) -> None:
    mine, other = RowSet(left), RowSet(right)
    assert (mine | other).ranges == as_ranges(rows_of(left) | rows_of(right))
    assert (mine & other).ranges == as_ranges(rows_of(left) & rows_of(right))
    assert (mine - other).ranges == as_ranges(rows_of(left) - rows_of(right))
    assert (mine == other) == (rows_of(left) == rows_of(right))
    assert mine.ranges == as_ranges(rows_of(left)) and other.ranges == as_ranges(rows_of(right))  # immutable


@given(RANGES, st.integers(0, 80), st.integers(0, 80))
def test_complement(ranges: list[tuple[int, int]], start: int, stop: int) -> None:
    assert RowSet(ranges).complement(start, stop).ranges == as_ranges(set(range(start, stop)) - rows_of(ranges))


@given(RANGES, RANGE)
def test_what_lies_within_consecutive_rows(ranges: list[tuple[int, int]], asked: tuple[int, int]) -> None:
    first, length = asked
    inside = rows_of(ranges) & set(range(first, first + length))
    assert list(RowSet(ranges).within(first, length)) == as_ranges(inside)
    assert RowSet(ranges).meets(first, length) == bool(inside)


@given(st.lists(RANGES, max_size=4))
def test_union_of_many(sets: list[list[tuple[int, int]]]) -> None:
    assert union(map(RowSet, sets)).ranges == as_ranges({row for ranges in sets for row in rows_of(ranges)})


def test_numbers_beyond_32_bits() -> None:
    far = 2**40
    assert (RowSet([(far, far)]) - RowSet([(far + 5, 1)])).ranges == [(far, 5), (far + 6, far - 6)]
    assert len(RowSet([(0, far), (far, 3)])) == far + 3


def test_nothing() -> None:
    assert len(RowSet()) == 0 and RowSet().ranges == [] and union([]) == RowSet() == RowSet([(4, 0)])
    assert RowSet() != [] and not RowSet().meets(0, 10)


def test_a_set_that_is_compared_by_value_has_no_hash() -> None:
    with pytest.raises(TypeError, match="unhashable"):
        hash(RowSet())
