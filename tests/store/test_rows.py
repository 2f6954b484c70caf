"""Indexing a hook point: as numpy does it, or refused with what is accepted."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_qwen_hidden.store.read.reader import open_store
from tests.store.crafted import LENGTHS, POINTS, Crafted, craft

SHARED = settings(max_examples=150, deadline=None)
POINT, ROWS = POINTS[2], sum(LENGTHS)
INDEX = st.integers(-ROWS, ROWS - 1)
BOUND = st.none() | st.integers(-30, 30)
STEP = st.none() | st.integers(-5, 5).filter(bool)


@pytest.fixture(scope="module")
def fixed(tmp_path_factory: pytest.TempPathFactory) -> Crafted:
    """A store that no test changes."""
    return craft(tmp_path_factory.mktemp("fixed") / "store")


@given(st.data())
@SHARED
def test_indexing_is_that_of_numpy(fixed: Crafted, data: st.DataObject) -> None:
    expected = fixed.states[POINT].numpy()
    view = open_store(fixed.path)[POINT]
    kind = data.draw(st.sampled_from(["int", "slice", "list", "mask"]))
    if kind == "int":
        row = data.draw(INDEX)
        for index in (row, np.int64(row), np.int8(row), torch.tensor(row), np.array(row)):
            assert np.array_equal(view[index].numpy(), expected[row])  # type: ignore[index]
    elif kind == "slice":
        rows = slice(data.draw(BOUND), data.draw(BOUND), data.draw(STEP))
        assert np.array_equal(view[rows].numpy(), expected[rows])
    elif kind == "list":
        chosen = data.draw(st.lists(INDEX, max_size=40))
        truth = expected[np.array(chosen, np.int64)]
        for many in (chosen, np.array(chosen, np.int8), torch.tensor(chosen, dtype=torch.int32)):
            assert np.array_equal(view[many].numpy(), truth)
    else:
        mask = data.draw(st.lists(st.booleans(), min_size=ROWS, max_size=ROWS))
        for chooser in (mask, np.array(mask), torch.tensor(mask)):
            assert np.array_equal(view[chooser].numpy(), expected[np.array(mask)])


@pytest.mark.parametrize(
    "rows", [range(3, 19), range(20, 3, -4), range(5, 2), range(-3, 0), range(2, -3, -1), np.arange(4, dtype=np.uint64)]
)
def test_ranges_are_lists_of_rows(fixed: Crafted, rows: Any) -> None:
    got = open_store(fixed.path)[POINT][rows]
    assert torch.equal(got, fixed.states[POINT][torch.tensor(list(map(int, rows)), dtype=torch.long)])


def test_what_is_read_owns_its_memory(fixed: Crafted) -> None:
    view = open_store(fixed.path)[POINT]
    for rows in (4, slice(2, 9), slice(None, None, 2), [1, 7], range(3)):
        values = view[rows]
        values.fill_(7)
        assert torch.equal(view[:], fixed.states[POINT])


@pytest.mark.parametrize(
    ("rows", "wrong"),
    [
        (ROWS, ROWS),
        (-ROWS - 1, -ROWS - 1),
        ([0, 99], 99),
        ([-24, 0], -24),
        (torch.tensor([23]), 23),
        (np.array([2**64 - 1], np.uint64), 2**64 - 1),
        (range(20, 30), 29),
        (2**80, 2**80),
    ],
)
def test_rows_that_are_not_there(fixed: Crafted, rows: Any, wrong: int) -> None:
    with pytest.raises(IndexError, match=f"^row {wrong} is not one of 23$"):
        open_store(fixed.path)[POINT][rows]


@pytest.mark.parametrize("mask", [[True], np.zeros(24, bool), torch.ones(22, dtype=torch.bool)])
def test_a_mask_must_fit(fixed: Crafted, mask: Any) -> None:
    with pytest.raises(IndexError, match=f"a mask of {len(mask)} does not fit 23 rows"):
        open_store(fixed.path)[POINT][mask]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (1.0, "float"),
        ("3", "str"),
        (None, "NoneType"),
        (True, "bool"),
        (np.True_, "bool"),
        ((1, 2), "tuple"),
        ([1.5], r"float64 \[1\]"),
        ([[1]], r"int64 \[1, 1\]"),
        (np.array([1.0]), r"float64 \[1\]"),
        (torch.tensor([1.0]), r"torch.float32 \[1\]"),
        (torch.tensor(1.0), r"torch.float32 \[\]"),
        (torch.tensor([1.0]).bfloat16(), r"torch.bfloat16 \[1\]"),
        (torch.tensor(True), r"bool \[\]"),
        ([None], r"object \[1\]"),
    ],
)
def test_other_kinds_of_index(fixed: Crafted, rows: Any, said: str) -> None:
    with pytest.raises(TypeError, match=f"rows must be an int, a slice, .* torch tensor, but are {said} instead"):
        open_store(fixed.path)[POINT][rows]
