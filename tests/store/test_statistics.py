"""Statistics are the same numbers however rows are cut into shards and blocks, and the numbers that exact arithmetic
gives."""

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from nemo_qwen_hidden.store.format import DTYPES
from nemo_qwen_hidden.store.statistics import (
    BINS,
    LIMIT,
    Accumulator,
    Statistics,
    StoredError,
    bin_bounds,
    bins_of,
    decode,
    merge,
)

HIDDEN = 5
SPECIAL = [
    0.0,
    -0.0,
    1.0,
    -1.5,
    3e-5,
    -7e-12,
    1e4,
    -65504.0,
    LIMIT * 0.999,
    LIMIT,
    -1e30,
    math.nan,
    math.inf,
    -math.inf,
]
VALUE = st.sampled_from(SPECIAL) | st.floats(width=32, allow_nan=False, allow_infinity=False)
ROWS = st.lists(st.lists(VALUE, min_size=HIDDEN, max_size=HIDDEN), max_size=40)


def merged(values: NDArray[np.float64], cuts: list[int], block: int = 1000) -> Statistics:
    """Of rows cut into shards at ``cuts``, each handed over in blocks."""
    shards = []
    for start, stop in pairwise(cuts):
        accumulator = Accumulator(values.shape[1])
        for row in range(start, stop, block):
            accumulator.add(values[row : min(row + block, stop)])
        shards.append((start, stop - start, *accumulator.result()))
    return merge(shards, values.shape[1])


def assert_equal(left: Statistics, right: Statistics) -> None:
    for name, value in vars(left).items():
        other = getattr(right, name)
        assert np.array_equal(value, other) if isinstance(value, np.ndarray) else value == other, name


@given(ROWS, st.data())
@settings(max_examples=200, deadline=None)
def test_any_sharding_gives_the_same_numbers(rows: list[list[float]], data: st.DataObject) -> None:
    values = np.array(rows, np.float32).astype(np.float64).reshape(-1, HIDDEN)
    cuts = sorted({0, len(rows), *data.draw(st.lists(st.integers(0, len(rows)), max_size=6))})
    whole = merged(values, [0, len(rows)])
    assert_equal(whole, merged(values, cuts, block=data.draw(st.integers(1, 9))))


@pytest.mark.parametrize("rows", [1, 127, 128, 129, 1000])
def test_blocks_change_nothing(rows: int) -> None:
    values = np.random.default_rng(rows).standard_normal((rows, 96)).astype(np.float32).astype(np.float64)
    cuts = sorted({0, rows // 3, rows // 2, rows})
    assert_equal(merged(values, [0, rows]), merged(values, cuts, block=50))


@given(ROWS)
@settings(max_examples=100, deadline=None)
def test_what_exact_arithmetic_gives(rows: list[list[float]]) -> None:
    values = np.array(rows, np.float32).astype(np.float64).reshape(-1, HIDDEN)
    found = merged(values, [0, len(rows)])
    counted = [row for row in values.tolist() if all(math.isfinite(value) and abs(value) < LIMIT for value in row)]
    assert found.rows == len(counted) and found.left_out == len(rows) - len(counted)
    assert found.nan == sum(math.isnan(value) for row in values.tolist() for value in row)
    assert found.inf == sum(math.isinf(value) for row in values.tolist() for value in row)
    assert int(found.norms.sum()) == len(counted)
    if not counted:
        assert (found.max_abs, found.min_norm, found.max_norm) == (0, 0, 0) and not found.mean.any()
        return
    largest = max(abs(value) for row in counted for value in row)
    assert found.max_abs == largest and np.abs(values[found.max_abs_state]).max() == largest
    norms = [math.sqrt(math.fsum(value * value for value in row)) for row in counted]
    assert found.min_norm == pytest.approx(min(norms), rel=1e-14) and found.max_norm == pytest.approx(max(norms))
    count = len(counted)
    for column in range(HIDDEN):
        exact = [Fraction(row[column]) for row in counted]
        mean = sum(exact) / count
        variance = sum(value * value for value in exact) / count - mean * mean
        assert abs(Fraction(float(found.mean[column])) - mean) <= Fraction(1, 2**40) + abs(mean) / 2**52
        slack = (Fraction(2) + 2 * abs(mean)) / 2**40 + abs(variance) / 2**50
        assert abs(Fraction(float(found.variance[column])) - variance) <= slack


@given(st.lists(st.floats(0, 2, width=32), max_size=30), st.data())
def test_errors_of_storing_add_up_in_any_order(relative: list[float], data: st.DataObject) -> None:
    values = np.array(relative, np.float64)
    cuts = sorted({0, len(values), *data.draw(st.lists(st.integers(0, len(values)), max_size=5))})
    parts = data.draw(st.permutations([StoredError.of(values[a:b]) for a, b in pairwise(cuts)]))
    total = sum(parts, StoredError(rows=0, units=0, max=0.0))
    assert total == StoredError.of(values)
    exact = math.sqrt(math.fsum(values**2) / len(values)) if len(values) else 0.0
    assert total.rms == pytest.approx(exact, rel=1e-6, abs=2**-24)


def test_a_norm_lies_in_its_bin() -> None:
    norms = np.concatenate([np.geomspace(2.0**-12, 2.0**29.99, 5000), [2.0**-12, 1.0, 1.5, 2.0**29]])
    for norm, number in zip(norms.tolist(), bins_of(norms).tolist(), strict=True):
        low, high = bin_bounds(number)
        assert low <= norm < high
    assert bins_of(np.array([0.0, 1e-300, 1e300])).tolist() == [0, 0, BINS - 1]


def test_quantiles_are_within_half_a_bin() -> None:
    values = np.random.default_rng(0).standard_normal((2000, 16)) * np.geomspace(0.1, 100, 2000)[:, None]
    found, norms = merged(values, [0, 700, 2000]), np.linalg.norm(values, axis=1)
    for q in (0.01, 0.1, 0.5, 0.9, 0.99):
        assert found.norm_quantile(q) == pytest.approx(np.quantile(norms, q, method="inverted_cdf"), rel=0.004)
    assert (found.norm_quantile(0), found.norm_quantile(1)) == (found.min_norm, found.max_norm)
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="no quantile"):
            found.norm_quantile(wrong)


def test_stored_values_are_decoded_as_the_format_says() -> None:
    values = np.array([[1.0, -2.5, 3.0e38], [0.0, -0.0, 1e-40]], np.float32)
    bf16 = (values.view(np.uint32) >> 16).astype(np.uint16).view("<i2")
    expected = (values.view(np.uint32) & 0xFFFF0000).view(np.float32).astype(np.float64)
    assert np.array_equal(decode(bf16, DTYPES["bf16"]), expected)
    int8, scale = np.array([[127, -127, 5]], np.int8), np.array([0.1], np.float32)
    assert np.array_equal(decode(int8, DTYPES["int8"], scale), int8.astype(np.float32) * np.float32(0.1))
