"""A store that keeps the states of some rows is the full store cut afterwards with numpy, however it is read."""

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_qwen_hidden.errors import StoreError
from nemo_qwen_hidden.hookpoint import HookPoint
from nemo_qwen_hidden.store.read.datasets import BatchLoader, DocumentBatches, RowBatches
from nemo_qwen_hidden.store.read.describe import as_dict
from nemo_qwen_hidden.store.read.reader import open_store
from nemo_qwen_hidden.store.read.tokens import RowNotKeptError
from tests.store.crafted import KEPT, PARTS, POINTS, SHAPES, Crafted, craft, craft_version_2

POINT = POINTS[2]
ROWS = sum(sum(lengths) for lengths, _ in PARTS)
Parts = list[tuple[list[int], int]]


@pytest.fixture(scope="module", params=["fp32", "bf16", "int8"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Crafted, Crafted]:
    """A store of kept rows, and the full one of the same states."""
    folder, dtype = tmp_path_factory.mktemp("both"), request.param
    full = craft_version_2(folder / "full", dtype=dtype, kept=None, selection=None, pooling=None)
    return craft_version_2(folder / "kept", dtype=dtype, pooling=None), full


def test_what_a_store_is(both: tuple[Crafted, Crafted]) -> None:
    kept, full = (open_store(made.path) for made in both)
    assert (kept.rows, kept.states, kept.documents) == (ROWS, len(KEPT), full.documents)
    assert (full.rows, full.states, full.tokens.full, kept.tokens.full) == (ROWS, ROWS, True, False)
    assert kept[POINT].shape == (len(KEPT), 6) and len(kept[POINT]) == len(KEPT)
    for point, shape in SHAPES.items():
        assert (kept[point].shape, kept[point].state_shape) == ((len(KEPT), int(np.prod(shape))), shape)
    assert kept["attn_weights@1"].heads == (2, 0) and kept["q@1"].heads is None
    assert "several sizes" in repr(kept) and f"{len(KEPT)} of {ROWS} rows" in repr(kept)
    assert repr(kept["q@1"]).startswith(f"HookPointView(q@1: {len(KEPT)} states x 3 x 4,")
    assert np.array_equal(np.asarray(kept.tokens.token_id), both[1].token_id)
    said = as_dict(kept)
    assert (said["states"], said["parts"][0]["selection"]) == (len(KEPT), {"every": 3, "spans": [[1, 2]]})
    assert [part["states"] for part in said["parts"]] == [7, 0, 2, 4]
    assert said["hook_points"][1]["shape"] == (3, 4) and said["hook_points"][2]["heads"] == (2, 0)


@pytest.mark.parametrize(
    "index",
    [
        0,
        -1,
        12,
        slice(None),
        slice(2, 9),
        slice(None, None, -2),
        [5, 5, 0],
        range(3, 1, -1),
        [True, False] * 6 + [True],
    ],
)
def test_views_take_every_index(both: tuple[Crafted, Crafted], index: Any) -> None:
    kept, full = both
    place = np.arange(len(KEPT))[index]
    for view in (open_store(kept.path)[point] for point in kept.states):
        assert torch.equal(view[index], full.states[view.hook_point][kept.kept[place]])
    assert np.array_equal(open_store(kept.path).row_of_states(index), np.array(KEPT)[place])


def test_what_is_done_to_states(both: tuple[Crafted, Crafted]) -> None:
    kept, full = (open_store(made.path) for made in both)
    assert torch.equal(kept[POINT].normed()[:], full[POINT].normed()[list(KEPT)])
    values = full["q@1"].float()[list(KEPT)].double()
    known = kept.statistics("q@1")
    np.testing.assert_allclose(known.mean, values.mean(dim=0), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(known.variance, values.var(dim=0, correction=0), rtol=1e-9, atol=1e-12)
    assert known.max_abs_state == int(values.abs().amax(dim=1).argmax()) and known.rows == len(KEPT)
    standardized = kept["q@1"].standardized()[:].double()
    torch.testing.assert_close(standardized.mean(dim=0), torch.zeros(12).double(), rtol=0, atol=1e-5)
    for name in ("q@1", "mlp_act@1", "attn_weights@1"):
        with pytest.raises(StoreError, match=r"normed\(\)` must be asked of the residual stream"):
            kept[name].normed()


def test_numbers_of_rows_and_states(both: tuple[Crafted, Crafted]) -> None:
    store = open_store(both[0].path)
    for first in range(ROWS + 1):
        for stop in range(first, ROWS + 1):
            inside = [row for row in KEPT if first <= row < stop]
            states = store.tokens.states_of(first, stop - first)
            assert states == range(sum(row < first for row in KEPT), sum(row < stop for row in KEPT))
            assert store.tokens.kept_rows(first, stop - first).tolist() == inside
    assert store.state_of_rows(list(KEPT)).tolist() == list(range(len(KEPT)))
    assert (store.state_of_rows(22), store.row_of_states(6), store.row_of_states(-1)) == (6, 22, 33)
    assert store.state_of_rows([33, 1, 23]).tolist() == [12, 0, 7]
    with pytest.raises(IndexError, match="rows 30 to 34 do not lie within 34"):
        store.tokens.states_of(30, 5)
    with pytest.raises(IndexError, match="state 13 is not one of 13"):
        store.row_of_states(13)
    with pytest.raises(IndexError, match="state 13 is not one of 13"):
        store[POINT][13]


@pytest.mark.parametrize("rows", [0, 34 - 2 - 1, [1, 2, 3], [23, 24], slice(9, 13)])
def test_a_row_that_was_not_kept(both: tuple[Crafted, Crafted], rows: Any) -> None:
    store = open_store(both[0].path)
    with pytest.raises(
        RowNotKeptError, match=r"`row` must be one whose state the store keeps \(13 of 34 rows\), but is"
    ):
        store.state_of_rows(rows)
    assert issubclass(RowNotKeptError, IndexError)
    assert open_store(both[1].path).state_of_rows(rows) is not None


def test_full_stores_number_states_as_rows(both: tuple[Crafted, Crafted]) -> None:
    store = open_store(both[1].path)
    assert store.tokens.states_of(3, 20) == range(3, 23) and store.tokens.kept_rows(3, 2).tolist() == [3, 4]
    assert store.row_of_states([5, -1]).tolist() == store.state_of_rows([5, -1]).tolist() == [5, 33]
    with pytest.raises(IndexError, match="row 34 is not one of 34"):
        store[POINT][34]


def test_documents(both: tuple[Crafted, Crafted]) -> None:
    made = both[0]
    store = open_store(made.path)
    for number in range(store.documents):
        document, rows = store.document(number), np.flatnonzero(made.document == number)
        kept = np.intersect1d(rows, KEPT)
        assert len(document) == len(rows) and document.token_id.tolist() == made.token_id[rows].tolist()
        assert document.position.tolist() == made.position[kept].tolist()
        assert len(document.states) == len(kept)
        for point in made.states:
            assert torch.equal(document[point], both[1].states[point][kept])
    assert repr(store.document(2)) == "StoredDocument(2: 'doc-2', rows 3 to 9 (2 kept), from 'file 2.txt')"


def test_row_batches(both: tuple[Crafted, Crafted]) -> None:
    made, full = both
    data = RowBatches(open_store(made.path), batch_rows=4, seed=3)
    rows = np.concatenate([batch["row"] for batch in data])
    assert sorted(rows.tolist()) == list(KEPT) and rows.tolist() != list(KEPT)
    for batch in BatchLoader(data, num_workers=1):
        rows = batch["row"].numpy()
        for column in ("token_id", "document", "position"):
            assert batch[column].tolist() == getattr(made, column)[rows].tolist()
        for point in made.states:
            assert torch.equal(batch[str(point)], full.states[point][rows])
    assert data.deal == RowBatches(open_store(made.path), batch_rows=4, seed=3).deal
    shuffled = [int(row) for batch in data for row in batch["row"]]
    places = [int(state) for index in range(len(data)) for state in data.deal.members(index)]
    assert shuffled == [KEPT[place] for place in places]
    again = pickle.loads(pickle.dumps(data))
    assert torch.equal(again[1]["row"], data[1]["row"])


def test_document_batches(both: tuple[Crafted, Crafted]) -> None:
    made, full = both
    for batch in DocumentBatches(open_store(made.path), batch_documents=4, pad_id=7):
        for index, number in enumerate(batch["document"].tolist()):
            kept = np.intersect1d(np.flatnonzero(made.document == number), KEPT)
            length = int(batch["length"][index])
            assert length == len(kept) == int(batch["attention_mask"][index].sum())
            padding = {"row": -1, "position": -1, "token_id": 7}
            truth = {"row": kept, "position": made.position[kept], "token_id": made.token_id[kept]}
            for name, pad in padding.items():
                assert batch[name][index, :length].tolist() == truth[name].tolist()
                assert (batch[name][index, length:] == pad).all()
            for point in made.states:
                assert torch.equal(batch[str(point)][index, :length], full.states[point][kept])
                assert not batch[str(point)][index, length:].any()


@st.composite
def selections(draw: st.DrawFn) -> tuple[Parts, list[int]]:
    parts = draw(
        st.lists(st.tuples(st.lists(st.integers(0, 6), max_size=4), st.integers(1, 5)), min_size=1, max_size=3)
    )
    rows = sum(sum(lengths) for lengths, _ in parts)
    return parts, sorted(draw(st.sets(st.integers(0, rows - 1)))) if rows else []


@given(selections(), st.integers(0, 99), st.sampled_from(["fp32", "int8"]))
@settings(max_examples=25, deadline=None)
def test_any_selection(
    tmp_path_factory: pytest.TempPathFactory, chosen: tuple[Parts, list[int]], seed: int, dtype: str
) -> None:
    parts, rows = chosen
    folder = tmp_path_factory.mktemp("any")
    points: Sequence[HookPoint] = (POINTS[0], HookPoint("q", 1))
    options: dict[str, Any] = {"parts": parts, "points": points, "shapes": SHAPES, "seed": seed, "dtype": dtype}
    full, kept = craft(folder / "full", **options), craft(folder / "kept", kept=rows, **options)
    store = open_store(kept.path)
    assert store.row_of_states(slice(None)).tolist() == rows
    everything = open_store(full.path)
    for point in points:
        assert torch.equal(store[point][:], everything[point][:][rows])
    for number in range(store.documents):
        document = everything.tokens.document_rows(number)
        mine = [row for row in rows if row in document]
        assert store.row_of_states(store.document(number).states).tolist() == mine
        assert torch.equal(store.document(number)[points[1]], everything[points[1]][mine])
    seen = [row for batch in RowBatches(store, batch_rows=3, seed=seed) for row in batch["row"].tolist()]
    assert sorted(seen) == rows


def test_pooled_by_a_mean(tmp_path: Path) -> None:
    made = craft_version_2(tmp_path / "s", pooling="mean")
    store = open_store(made.path)
    assert store.manifest.pooling == "mean" and torch.equal(store[POINT][:], made.states[POINT])
    with pytest.raises(StoreError, match=r"must be asked of states of single tokens, .* but is 'pooling mean'"):
        store[POINT].normed()
    assert open_store(craft_version_2(tmp_path / "t").path)[POINT].normed()[0].shape == (6,)
