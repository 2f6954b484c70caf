"""Several stores as one: the same values under new numbers, refused where they are not alike or not disjoint."""

import errno
import hashlib
import os
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemo_qwen_hidden.errors import StoreError, StoreNotFoundError, UserError
from nemo_qwen_hidden.hookpoint import HookPoint
from nemo_qwen_hidden.store.read.reader import open_store
from nemo_qwen_hidden.store.upkeep import merge as merge_module
from nemo_qwen_hidden.store.upkeep.merge import merge
from nemo_qwen_hidden.store.upkeep.verify import verify
from nemo_qwen_hidden.store.write import place, session
from tests.store.crafted import POINTS, Crafted, craft, rewrite
from tests.store.helpers import tree

MODEL = {"weights_sha256": "1" * 64, "architecture": {"num_layers": 4, "hidden_size": 6, "vocab_size": 1000}}
PARTS = ((((3, 0, 7), 5),), (((2, 4), 4), ((), 3), ((6, 1), 2)), (((9,), 100),))


def own_ids(store: Path, prefix: str, first_weight: Path | None = None) -> None:
    """Gives a crafted store document ids of its own, and the final norm of another."""
    texts = {path.name: path.read_text().replace('"doc-', f'"{prefix}-') for path in store.glob("tokens/*.jsonl")}
    for name, text in texts.items():
        (store / "tokens" / name).write_text(text)
    if first_weight is not None:
        (store / "final_norm.safetensors").write_bytes(first_weight.read_bytes())

    def relist(fields: dict[str, Any]) -> None:
        entries = [part["documents_file"] for part in fields["parts"]] + [fields["final_norm"]]
        for entry in entries:
            contents = (store / entry["file"]).read_bytes()
            entry |= {"bytes": len(contents), "sha256": hashlib.sha256(contents).hexdigest()}
        fields["producers"] = [{"work": "new store", "for": prefix}]
        for number, part in enumerate(fields["parts"]):
            part["data"] = {"path": f"{prefix}{number}", "max_tokens": 8}

    rewrite(store, relist)


def make(folder: Path, dtype: str = "fp32") -> list[Crafted]:
    made = []
    for number, parts in enumerate(PARTS):
        store = craft(folder / f"store-{number}", parts=parts, dtype=dtype, seed=number, model=MODEL)
        own_ids(store.path, f"s{number}", folder / "store-0/final_norm.safetensors")
        made.append(store)
    return made


@pytest.fixture
def stores(tmp_path: Path) -> list[Crafted]:
    return make(tmp_path)


def paths(stores: Sequence[Crafted]) -> list[Path]:
    return [store.path for store in stores]


@pytest.mark.parametrize("copy", [False, True], ids=["linked", "copied"])
@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_everything_is_there_in_order(tmp_path: Path, dtype: str, copy: bool) -> None:
    stores = make(tmp_path, dtype)
    before = [tree(store.path) for store in stores]
    done: list[tuple[int, int]] = []
    into = tmp_path / "deep" / "merged"
    merged = merge(paths(stores), into, copy=copy, producer={"by": "me"}, report=lambda *bytes: done.append(bytes))
    assert verify(into, full=True).findings == ()
    assert [tree(store.path) for store in stores] == before
    opened = open_store(into)
    for point in POINTS:
        assert opened[point][:].equal(torch.cat([store.states[point] for store in stores]))
    assert opened.tokens.token_id[:].tolist() == np.concatenate([store.token_id for store in stores]).tolist()
    ids = [f"s{number}-{k}" for number, store in enumerate(stores) for k in range(len(store.lengths))]
    assert [opened.document(index).id for index in range(opened.documents)] == ids
    bounds = np.cumsum([0, *(length for store in stores for length in store.lengths)]).tolist()
    assert [opened.document(index).rows for index in range(opened.documents)] == [
        range(*pair) for pair in pairwise(bounds)
    ]
    assert opened.final_norm[0].equal(stores[0].weight)
    assert len(opened.manifest.parts) == 5
    files = [path for path in into.rglob("*.*") if path.is_file() and path.name != "manifest.json"]
    assert {path.stat().st_nlink > 1 for path in files} == {not copy}
    assert (merged.linked, merged.copied) == ((0, len(files)) if copy else (len(files), 0))
    assert merged.manifest == opened.manifest
    assert opened.manifest.producers[:3] == tuple({"work": "new store", "for": f"s{k}"} for k in range(3))
    assert opened.manifest.producers[3] == {"work": "merged", "stores": list(map(str, paths(stores))), "by": "me"}
    assert done[-1] == (sum(path.stat().st_size for path in files),) * 2


def test_statistics_are_those_of_all_rows(stores: list[Crafted], tmp_path: Path) -> None:
    merge(paths(stores), tmp_path / "merged")
    opened = open_store(tmp_path / "merged")
    for point in POINTS:
        values = torch.cat([store.states[point] for store in stores]).double()
        found = opened.statistics(point)
        assert np.allclose(found.mean, values.mean(dim=0), atol=1e-9)
        assert np.allclose(found.variance, values.var(dim=0, correction=0), atol=1e-9)


def test_once_more_does_nothing(stores: list[Crafted], tmp_path: Path) -> None:
    merge(paths(stores), tmp_path / "merged")
    before = tree(tmp_path / "merged")
    again = merge(paths(stores), tmp_path / "merged", producer={"started": 2})
    assert (again.linked, again.copied) == (0, 0)
    assert tree(tmp_path / "merged") == before


def test_a_merged_store_can_be_merged(stores: list[Crafted], tmp_path: Path) -> None:
    merge(paths(stores)[:2], tmp_path / "two")
    merge([tmp_path / "two", stores[2].path], tmp_path / "three")
    merge(paths(stores), tmp_path / "at-once")
    one, other = (open_store(tmp_path / name).manifest for name in ("three", "at-once"))
    assert (one.parts, one.hook_points) == (other.parts, other.hook_points)


def deeper(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(fields: dict[str, Any]) -> None:
        for key in path[:-1]:
            fields = fields[key]
        fields[path[-1]] = value

    return change


DIFFERENT = {
    "weights": (deeper("model", "weights_sha256", value="2" * 64), "store-1: model.weights_sha256` must be '1111"),
    "architecture": (deeper("model", "architecture", "num_heads", value=2), "store-1: model.architecture` must be {"),
    "compute": (deeper("dtypes", "compute", value="bf16"), "store-1: dtypes.compute` must be 'fp32', as in "),
    "windows": (deeper("parts", 0, "data", "max_tokens", value=3), "store-1: data.max_tokens` must be ['8'], as in "),
    "unknown-field": (deeper("later", value=3), "store-1: unknown fields` must be {}, as in "),
    "unknown-dtype": (deeper("dtypes", "later", value=3), "store-1: dtypes` must be {}, as in "),
}


@pytest.mark.parametrize(("change", "line"), DIFFERENT.values(), ids=DIFFERENT)
def test_stores_that_differ(stores: list[Crafted], tmp_path: Path, change: Callable[..., None], line: str) -> None:
    rewrite(stores[1].path, change)
    with pytest.raises(UserError) as caught:
        merge(paths(stores), tmp_path / "merged")
    assert line in str(caught.value)
    assert not (tmp_path / "merged").exists()


def test_all_differences_are_told_together(stores: list[Crafted], tmp_path: Path) -> None:
    model = {**MODEL, "architecture": {"num_layers": 4}}
    other = craft(tmp_path / "other", dtype="bf16", hidden_size=4, points=POINTS[:2], model=model)
    with pytest.raises(UserError) as caught:
        merge([stores[0].path, other.path], tmp_path / "merged")
    fields = [line.split("`")[1].rpartition(": ")[2] for line in str(caught.value).splitlines()]
    expected = [
        "hidden_size",
        "dtypes.stored",
        "model.architecture",
        "hook_points",
        "final_norm.sha256",
        "data.max_tokens",
    ]
    assert fields == expected


def test_what_is_not_always_known_need_not_be_the_same(stores: list[Crafted], tmp_path: Path) -> None:
    rewrite(stores[0].path, lambda fields: fields.pop("final_norm"))
    (stores[0].path / "final_norm.safetensors").unlink()
    rewrite(stores[1].path, lambda fields: fields.update(tokenizer={"sha256": "3" * 64}))
    merge(paths(stores), tmp_path / "merged")
    opened = open_store(tmp_path / "merged")
    assert opened.manifest.tokenizer == {"sha256": "3" * 64}
    assert opened.final_norm[0].equal(stores[0].weight)


def test_a_model_that_is_not_known(tmp_path: Path) -> None:
    stores = [craft(tmp_path / name, seed=seed).path for seed, name in enumerate("ab")]
    with pytest.raises(UserError, match=r"model.weights_sha256` must be known, to tell the model from others"):
        merge(stores, tmp_path / "merged")


def test_the_same_data_twice(stores: list[Crafted], tmp_path: Path) -> None:
    for store in stores[:2]:
        rewrite(store.path, deeper("parts", 0, "data", "sha256", value="4" * 64))
    with pytest.raises(UserError, match=r"store-1: data.sha256` must be of documents that are not in .*store-0 too"):
        merge(paths(stores)[:2], tmp_path / "merged")


def test_the_same_tokens_twice(tmp_path: Path) -> None:
    for name in "ab":
        craft(tmp_path / name, model=MODEL)
        own_ids(tmp_path / name, name)
    with pytest.raises(UserError, match=r"b: tokens.sha256` must be of documents that are not in .*a too"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "merged")


def test_one_document_twice(stores: list[Crafted], tmp_path: Path) -> None:
    other = craft(tmp_path / "other", seed=7, model=MODEL).path
    own_ids(other, "s0", stores[0].path / "final_norm.safetensors")
    with pytest.raises(UserError, match=r"other: document id` must not be in .*store-0 too, but is 's0-0' instead"):
        merge([*paths(stores), other], tmp_path / "merged")


def test_a_damaged_store(stores: list[Crafted], tmp_path: Path) -> None:
    os.truncate(stores[1].path / "embed/000002.safetensors", 1)
    with pytest.raises(StoreError, match=r"must be whole, which `verify` says it is not \(1 findings; embed/000002"):
        merge(paths(stores), tmp_path / "merged")


def test_a_copy_is_checked_on_its_way(stores: list[Crafted], tmp_path: Path) -> None:
    with open(stores[1].path / "embed/000002.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    with pytest.raises(StoreError, match="must have the SHA-256"):
        merge(paths(stores), tmp_path / "merged", copy=True)
    with pytest.raises(StoreNotFoundError):
        open_store(tmp_path / "merged")


def test_stores_that_cannot_be_merged(stores: list[Crafted], tmp_path: Path) -> None:
    with pytest.raises(StoreNotFoundError):
        merge([stores[0].path, tmp_path / "none"], tmp_path / "merged")
    for few in ([stores[0].path], [stores[0].path] * 2):
        with pytest.raises(StoreError, match="must be two stores or more, each once"):
            merge(few, tmp_path / "merged")
    with pytest.raises(StoreError, match="`--into` must lie outside of "):
        merge(paths(stores), stores[0].path / "merged")
    with place.locked(stores[1].path):
        session.start(stores[1].path, stores[1].manifest, {}, fresh=False)
    with pytest.raises(StoreError, match="must have no unfinished job"):
        merge(paths(stores), tmp_path / "merged")


def test_what_is_there_already(stores: list[Crafted], tmp_path: Path) -> None:
    other = craft(tmp_path / "other")
    before = tree(other.path)
    with pytest.raises(StoreError, match=r"`--into` must be a new or empty folder, .*; another store is there"):
        merge(paths(stores), other.path)
    assert tree(other.path) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").touch()
    with pytest.raises(StoreError, match=r"holds `thesis.txt`"):
        merge(paths(stores), tmp_path / "mine")


def test_where_links_are_not_to_be_had(stores: list[Crafted], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_link(*_: object, **__: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", no_link)
    merged = merge(paths(stores), tmp_path / "merged")
    assert (merged.linked, merged.copied > 0) == (0, True)
    assert verify(tmp_path / "merged", full=True).findings == ()


@pytest.mark.parametrize("last", [0, 1, 20, 10_000])
def test_a_crash_leaves_nothing_that_looks_finished(
    stores: list[Crafted], tmp_path: Path, last: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    into, link, left = tmp_path / "merged", os.link, last

    def crash(*arguments: Any, **options: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        link(*arguments, **options)

    def crash_at_the_end(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", crash)
        patch.setattr(merge_module.session, "finish", crash_at_the_end)
        with pytest.raises(KeyboardInterrupt):
            merge(paths(stores), into)
    with pytest.raises(StoreNotFoundError, match="still being made, or was left unfinished"):
        open_store(into)
    with place.locked(into), pytest.raises(StoreError, match="an unfinished merge is there"):
        session.find(into)
    merge(paths(stores), into, copy=True)
    assert verify(into, full=True).findings == ()
    assert verify(stores[0].path, full=True).findings == ()


def test_a_crash_between_manifest_and_marker(
    stores: list[Crafted], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    into, finish = tmp_path / "merged", session.finish

    def crash(*arguments: Any) -> None:
        marker = (into / "unfinished.json").read_bytes()
        finish(*arguments)
        (into / "unfinished.json").write_bytes(marker)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(merge_module.session, "finish", crash)
        with pytest.raises(KeyboardInterrupt):
            merge(paths(stores), into)
    merge(paths(stores), into)
    report = verify(into, full=True)
    assert (report.findings, report.unfinished) == ((), None)


def test_hook_points_in_another_order_are_others(stores: list[Crafted], tmp_path: Path) -> None:
    points = (HookPoint("embed"), HookPoint("resid_post", 0), HookPoint("resid_post", 2), HookPoint("final_norm"))
    other = craft(tmp_path / "other", points=points, model=MODEL, seed=9)
    own_ids(other.path, "other", stores[0].path / "final_norm.safetensors")
    with pytest.raises(UserError, match="other: hook_points` must be "):
        merge([stores[0].path, other.path], tmp_path / "merged")
