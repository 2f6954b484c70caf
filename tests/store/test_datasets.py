"""Stores as data sets of torch: everything once, whoever loads, and on from where a run stopped."""

import json
import pickle
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import nemo_qwen_hidden
from nemo_qwen_hidden.errors import StoreError
from nemo_qwen_hidden.store.read.datasets import Batch, BatchLoader, DocumentBatches, RowBatches
from nemo_qwen_hidden.store.read.reader import UnknownHookPointError, open_store
from tests.store.crafted import PARTS, POINTS, Crafted, craft

POINT = POINTS[2]


@pytest.fixture(scope="module")
def crafted(tmp_path_factory: pytest.TempPathFactory) -> Crafted:
    return craft(tmp_path_factory.mktemp("fixed") / "store", parts=PARTS, dtype="bf16")


def rows_of(batches: Any) -> list[list[int]]:
    return [batch["row"].tolist() for batch in batches]


def same(one: list[Batch], other: list[Batch]) -> bool:
    return len(one) == len(other) and all(
        list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a) for a, b in zip(one, other, strict=True)
    )


def test_rows_with_what_they_are(crafted: Crafted) -> None:
    data = RowBatches(open_store(crafted.path), batch_rows=8)
    batches = list(data)
    assert len(batches) == len(data) == 5
    for batch in batches:
        assert list(batch) == [*map(str, POINTS), "row", "token_id", "document", "position"]
        rows = batch["row"]
        assert all(torch.equal(batch[str(point)], crafted.states[point][rows]) for point in POINTS)
        for name in ("token_id", "document", "position"):
            assert batch[name].dtype == torch.int64 and batch[name].tolist() == getattr(crafted, name)[rows].tolist()
    assert sorted(chain(*rows_of(batches))) == list(range(34))
    assert rows_of(batches) != rows_of(RowBatches(open_store(crafted.path), batch_rows=8, seed=1))


def test_what_a_batch_holds_is_chosen(crafted: Crafted) -> None:
    store = open_store(crafted.path)
    views = [store[POINT].standardized(), "embed"]
    (batch,) = RowBatches(store, batch_rows=40, hook_points=views, seed=None, columns=["position"])
    assert list(batch) == ["resid_post@3", "embed", "position"]
    assert torch.equal(batch["resid_post@3"], store[POINT].standardized()[:])
    for options, said in (({"columns": ["rows"]}, "`columns` must be some of row,"), ({"batch_rows": 0}, "batch size")):
        with pytest.raises(StoreError, match=said):
            RowBatches(store, **({"batch_rows": 8} | options))
    with pytest.raises(UnknownHookPointError):
        RowBatches(store, batch_rows=8, hook_points=["resid_post@1"])


def test_epochs_differ_and_hold_the_same(crafted: Crafted) -> None:
    data = RowBatches(open_store(crafted.path), batch_rows=8, hook_points=[])
    epochs = [rows_of(data[index] for index in range(start, start + 5)) for start in (0, 5)]
    assert epochs[0] != epochs[1] and sorted(chain(*epochs[1])) == list(range(34))


def test_documents_are_padded(crafted: Crafted) -> None:
    store = open_store(crafted.path)
    data = DocumentBatches(store, batch_documents=4, pad_id=-1)
    assert len(data) == 3
    seen = []
    for batch in data:
        documents, lengths = batch["document"].tolist(), batch["length"].tolist()
        seen += documents
        assert lengths == [crafted.lengths[document] for document in documents]
        shape = (len(documents), max(lengths))
        assert batch["token_id"].shape == batch["attention_mask"].shape == shape
        assert batch["attention_mask"].dtype == torch.bool and batch["attention_mask"].sum(dim=1).tolist() == lengths
        for index, (document, length) in enumerate(zip(documents, lengths, strict=True)):
            rows = store.tokens.document_rows(document)
            assert batch["token_id"][index, :length].tolist() == crafted.token_id[rows.start : rows.stop].tolist()
            assert (batch["token_id"][index, length:] == -1).all()
            for point in POINTS:
                assert batch[str(point)].shape == (*shape, 6) and batch[str(point)].dtype == torch.bfloat16
                truth = crafted.states[point][rows.start : rows.stop]
                assert torch.equal(batch[str(point)][index, :length], truth)
                assert not batch[str(point)][index, length:].any()
    assert sorted(seen) == list(range(9))
    ordered = DocumentBatches(store, batch_documents=4, seed=None, hook_points=["embed"])
    assert [batch["document"].tolist() for batch in ordered] == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]


def test_documents_without_tokens(tmp_path: Path) -> None:
    store = open_store(craft(tmp_path / "s", parts=(((0, 0), 5),)).path)
    (batch,) = DocumentBatches(store, batch_documents=2)
    assert batch["embed"].shape == (2, 0, 6) and batch["length"].tolist() == [0, 0]
    assert batch["token_id"].shape == batch["attention_mask"].shape == (2, 0)
    assert list(RowBatches(store, batch_rows=3)) == [] and list(BatchLoader(RowBatches(store, batch_rows=3))) == []


@pytest.mark.parametrize("kind", [RowBatches, DocumentBatches])
def test_stop_and_go_on(crafted: Crafted, kind: type[Any]) -> None:
    def data() -> Any:
        size = {"batch_rows": 4} if kind is RowBatches else {"batch_documents": 2}
        return kind(open_store(crafted.path), hook_points=["embed"], world=2, rank=1, **size)

    whole = [data()[index] for index in range(3 * len(data()))]
    loader = BatchLoader(data())
    assert same([batch for _ in range(3) for batch in loader], whole)
    for stop in range(1, len(whole)):
        loader, taken = BatchLoader(data()), 0
        while taken < stop:
            for _ in loader:
                taken += 1
                if taken == stop:
                    state = json.loads(json.dumps(loader.state_dict()))
                    break
        resumed = BatchLoader(data())
        resumed.load_state_dict(state)
        assert resumed.epoch == stop // len(data())
        rest = [batch for _ in range(3 - resumed.epoch) for batch in resumed]
        assert same(rest, whole[stop:])
        assert same(list(loader), whole[stop : (stop // len(data()) + 1) * len(data())])


def test_workers_load_the_same(crafted: Crafted) -> None:
    """Forked and spawned ones, one number of them and another after going on in the middle."""
    data = RowBatches(open_store(crafted.path), batch_rows=4, hook_points=["embed", "resid_post@3"])
    data[0]
    whole = list(data)
    first = BatchLoader(data, num_workers=2, multiprocessing_context="fork")
    taken = []
    for batch in first:
        taken.append(batch)
        if len(taken) == 3:
            break
    second = BatchLoader(data, num_workers=1, multiprocessing_context="spawn", prefetch_factor=4)
    second.load_state_dict(first.state_dict())
    assert same(taken + list(second), whole)
    assert same(list(DataLoader(data, batch_size=None, sampler=range(2, len(data)))), whole[2:])


def test_a_state_of_other_batches_is_refused(crafted: Crafted) -> None:
    store = open_store(crafted.path)
    state = BatchLoader(RowBatches(store, batch_rows=4)).state_dict()
    BatchLoader(RowBatches(store, batch_rows=4)).load_state_dict(state)
    for other in (
        RowBatches(store, batch_rows=5),
        RowBatches(store, batch_rows=4, seed=1),
        RowBatches(store, batch_rows=4, world=2),
    ):
        with pytest.raises(StoreError, match="`state_dict` must be of a loader of the same batches"):
            BatchLoader(other).load_state_dict(state)
    ranks = [BatchLoader(RowBatches(store, batch_rows=4, world=2, rank=rank)) for rank in range(2)]
    ranks[1].load_state_dict(ranks[0].state_dict())


def test_data_sets_can_be_pickled(crafted: Crafted) -> None:
    store = open_store(crafted.path)
    for data in (
        RowBatches(store, batch_rows=4, hook_points=[store[POINT].normed()]),
        DocumentBatches(store, batch_documents=3),
    ):
        assert same(list(pickle.loads(pickle.dumps(data))), list(data))


def test_public_names() -> None:
    assert nemo_qwen_hidden.RowBatches is RowBatches and nemo_qwen_hidden.DocumentBatches is DocumentBatches
    assert nemo_qwen_hidden.BatchLoader is BatchLoader
