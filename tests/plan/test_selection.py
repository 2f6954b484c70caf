"""What is kept of a document, against its definition written out position by position."""

import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_qwen_hidden.config import TokenSettings
from nemo_qwen_hidden.plan.rowset import RowSet
from nemo_qwen_hidden.plan.selection import (
    RowSample,
    filters_nothing,
    keeps_everything,
    kept_of,
    pooled_last,
    random_key,
    random_keys,
    ranges_of,
    samples_all,
)

BOUND = st.one_of(st.just(""), st.integers(-12, 12).map(str))
SPANS = st.lists(st.tuples(BOUND, BOUND).map(":".join), min_size=1, max_size=3).map(tuple)
KEYS = st.integers(0, 2**64 - 1)


@st.composite
def choices(draw: st.DrawFn, **fixed: Any) -> TokenSettings:
    keep = draw(st.sampled_from(["all", "last", "spans", "mask", "assistant"]))
    values = {
        "keep": keep,
        "spans": draw(SPANS) if keep == "spans" else (),
        "mask_field": "m" if keep == "mask" else None,
        "every": draw(st.integers(1, 5)),
        "special": draw(st.booleans()),
        "first": draw(st.booleans()),
        "sample": draw(st.none() | st.integers(1, 6)),
        "seed": draw(KEYS),
        "pool": draw(st.sampled_from(["none", "last", "mean"])),
    }
    return TokenSettings(**{**values, **fixed})


@st.composite
def documents(draw: st.DrawFn) -> tuple[int, np.ndarray, np.ndarray]:
    length = draw(st.integers(0, 20))
    masks = st.lists(st.booleans(), min_size=length, max_size=length).map(lambda flags: np.array(flags, np.bool_))
    return length, draw(masks), draw(masks)


def plain_slices(tokens: TokenSettings) -> list[slice]:
    """The spans as Python would slice, also those that settings refuse because they are always empty."""
    pairs = [span.split(":") for span in tokens.spans]
    return [slice(*(int(bound) if bound else None for bound in pair)) for pair in pairs]


def plain_filter(tokens: TokenSettings, length: int, mask: np.ndarray, special: np.ndarray) -> list[int]:
    positions = list(range(length))
    inside = {position for span in plain_slices(tokens) for position in positions[span]}
    by_choice = {
        "all": lambda position: True,
        "last": lambda position: position == length - 1,
        "spans": lambda position: position in inside,
        "mask": lambda position: mask[position],
        "assistant": lambda position: mask[position],
    }[tokens.keep]
    return [
        position
        for position in positions
        if by_choice(position)
        and position % tokens.every == 0
        and (tokens.special or not special[position])
        and (tokens.first or position != 0)
    ]


def splitmix64(state: int, count: int) -> list[int]:
    """The first outputs, as in the generator's C source."""
    outputs, mask = [], 2**64 - 1
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        outputs.append(z ^ (z >> 31))
    return outputs


def usable(tokens: TokenSettings) -> bool:
    try:
        return tokens.slices is not None
    except ValueError:
        return False


@given(choices().filter(usable), documents(), KEYS)
def test_what_is_kept_is_its_definition(
    tokens: TokenSettings, document: tuple[int, np.ndarray, np.ndarray], key: int
) -> None:
    length, mask, special = document
    expected = plain_filter(tokens, length, mask, special)
    if tokens.sample is not None:
        order = splitmix64(splitmix64(tokens.seed + key * 0x9E3779B97F4A7C15, 1)[0], length)
        expected = sorted(sorted(expected, key=lambda position: order[position])[: tokens.sample])
    if tokens.pool == "last":
        expected = expected[-1:]
    found = kept_of(tokens, length, document=key, mask=mask, special=special)
    assert found.tolist() == expected
    assert found.dtype == np.int64
    if filters_nothing(tokens):
        assert plain_filter(tokens, length, mask, special) == list(range(length))


@given(choices(sample_of="all", sample=3, pool="last").filter(usable), documents(), KEYS)
def test_what_the_whole_is_drawn_from_is_what_the_filters_leave(
    tokens: TokenSettings, document: tuple[int, np.ndarray, np.ndarray], key: int
) -> None:
    length, mask, special = document
    found = kept_of(tokens, length, document=key, mask=mask, special=special)
    assert found.tolist() == plain_filter(tokens, length, mask, special)
    assert samples_all(tokens) and not keeps_everything(tokens)


@given(st.lists(st.integers(0, 5000), unique=True), st.integers(1, 60), KEYS, st.data())
def test_a_draw_of_the_whole_is_the_same_in_any_blocks_and_any_order(
    rows: list[int], size: int, seed: int, data: st.DataObject
) -> None:
    shuffled = np.array(data.draw(st.permutations(rows)), np.int64)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(rows)), max_size=4)))
    sample = RowSample(size, seed, spare=0)
    for block in np.split(shuffled, cuts):
        sample.offer(block)
    keys = splitmix64(splitmix64(seed, 1)[0], 5001)
    expected = set(sorted(rows, key=lambda row: keys[row])[:size])
    assert {row for row, drawn in zip(rows, sample.drawn(np.array(rows, np.int64)), strict=True) if drawn} == expected
    assert len(expected) == min(size, len(rows))


def test_a_draw_of_the_whole_holds_no_more_than_it_needs() -> None:
    sample, largest = RowSample(100, 3, spare=10), 0
    rows = np.arange(50_000, dtype=np.int64)
    for block in np.split(rows, 500):
        sample.offer(block)
        largest = max(largest, sys.getsizeof(sample._keys))
    assert largest < 8 * (2 * 100 + 10 + 100) * 2
    drawn = np.flatnonzero(sample.drawn(rows))
    assert len(drawn) == 100
    whole = RowSample(100, 3)
    whole.offer(rows)
    assert np.flatnonzero(whole.drawn(rows)).tolist() == drawn.tolist()
    assert 15_000 < drawn.mean() < 35_000  # from all over


def test_keys_are_those_of_splitmix64() -> None:
    """Published outputs for the seed 1234567 (https://rosettacode.org/wiki/Pseudo-random_numbers/Splitmix64)."""
    published = [
        6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821,
    ]  # fmt: skip
    assert random_keys(1234567, np.arange(5)).tolist() == published
    assert [random_key(1234567, number) for number in range(5)] == published
    assert splitmix64(1234567, 5) == published
    far = np.array([2**62], np.int64)
    assert random_keys(2**64 - 1, far).tolist() == [random_key(2**64 - 1, 2**62)]


def test_a_draw_is_pinned() -> None:
    """A change here draws other tokens for the same seed than earlier releases."""
    tokens = TokenSettings(sample=4, seed=7)
    assert kept_of(tokens, 100, document=5).tolist() == [30, 39, 41, 42]


def test_every_token_is_drawn_equally_often() -> None:
    tokens = TokenSettings(sample=3, seed=1)
    counts = np.bincount(np.concatenate([kept_of(tokens, 10, document=key) for key in range(20_000)]), minlength=10)
    assert abs(counts / 20_000 - 0.3).max() < 0.015  # 4.6 standard deviations


def test_masks_that_are_needed_have_to_be_there() -> None:
    for tokens in (TokenSettings(keep="mask", mask_field="m"), TokenSettings(special=False)):
        for given_mask in (None, np.zeros(3, np.bool_), np.zeros(4, np.int64)):
            with pytest.raises(ValueError, match=r"must be bool \[4\]"):
                kept_of(tokens, 4, document=0, mask=given_mask, special=given_mask)


def test_the_mask_that_was_given_is_not_changed() -> None:
    mask = np.ones(4, np.bool_)
    kept_of(TokenSettings(keep="assistant", first=False, every=2), 4, document=0, mask=mask)
    assert mask.all()


@pytest.mark.parametrize(
    ("values", "everything", "unfiltered"),
    [
        ({}, True, True),
        ({"seed": 9}, True, True),
        ({"pool": "mean"}, False, True),
        ({"sample": 1}, False, True),
        ({"max_norm": 2.0}, False, True),
        ({"every": 2}, False, False),
        ({"special": False}, False, False),
        ({"first": False}, False, False),
        ({"keep": "last"}, False, False),
    ],
)
def test_whether_anything_is_left_out(values: dict[str, Any], everything: bool, unfiltered: bool) -> None:
    assert keeps_everything(TokenSettings(**values)) is everything
    assert filters_nothing(TokenSettings(**values)) is unfiltered


def test_last_alone() -> None:
    positions = np.array([1, 4, 9])
    assert pooled_last(TokenSettings(pool="last"), positions).tolist() == [9]
    assert pooled_last(TokenSettings(pool="last"), positions[:0]).tolist() == []
    assert pooled_last(TokenSettings(), positions).tolist() == [1, 4, 9]


@given(st.sets(st.integers(0, 60)))
def test_rows_as_ranges(rows: set[int]) -> None:
    found = list(ranges_of(np.array(sorted(rows), np.int64)))
    assert found == RowSet((row, 1) for row in rows).ranges
