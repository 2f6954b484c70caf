"""What went in comes out, by any index that numpy takes; what is not right is refused by name."""

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from nemo_qwen_hidden.errors import StoreError, StoreNotFoundError
from nemo_qwen_hidden.hookpoint import HookPoint
from nemo_qwen_hidden.store import session
from nemo_qwen_hidden.store.reader import UnknownHookPointError, open_store
from tests.store.helpers import POINT, ROWS, Made, make_store

SHARED = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def test_what_a_store_is(shared: Made) -> None:
    store = open_store(str(shared.path))
    assert store.hook_points == ("embed", "resid_post@0", "resid_post@3", "final_norm")
    assert (store.rows, store.documents, store.hidden_size, store.dtype) == (ROWS, 5, 6, torch.float32)
    assert store.path == shared.path and store.manifest == shared.manifest
    assert "resid_post@3" in store and POINT in store and "resid_post@1" not in store
    assert np.array_equal(store.tokens.token_id, shared.token_ids)
    view = store["resid_post@3"]
    assert (view.shape, view.dtype, len(view), view.norm) == ((ROWS, 6), torch.float32, ROWS, "before")
    assert store["final_norm"].norm == "after"


def test_reprs_are_one_line(shared: Made, tmp_path: Path) -> None:
    store = open_store(shared.path)
    assert repr(store) == f"Store('{shared.path}': 4 hook points x 23 rows x 6, fp32, 5 documents)"
    assert repr(store["final_norm"]) == "HookPointView(final_norm: 23 rows x 6, fp32, after the final norm)"
    assert repr(store.document(2)) == "StoredDocument(2: 'doc-2', rows 3 to 9, from 'file 2.txt')"
    assert repr(store.document(1)) == "StoredDocument(1: 'doc-1', no rows, from 'file 1.txt')"
    one = make_store(tmp_path / "s", hook_points=shared.manifest.hook_points[:1]).path
    assert repr(open_store(one)) == f"Store('{one}': embed x 23 rows x 6, fp32, 5 documents)"


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_every_hook_point_comes_back_in_its_dtype(tmp_path: Path, dtype: str) -> None:
    made = make_store(tmp_path / "store", stored_dtype=dtype, shard_rows=4)
    store = open_store(made.path)
    for point, values in made.states.items():
        assert store[point][:].dtype == values.dtype
        assert torch.equal(store[point][:], values)
        assert torch.equal(store[str(point)][torch.tensor([20, 0, 20])], values[[20, 0, 20]])


def test_iteration_ends(shared: Made) -> None:
    assert torch.equal(torch.stack(list(open_store(shared.path)[POINT])), shared.states[POINT])


def test_documents(shared: Made) -> None:
    store = open_store(shared.path)
    document = store.document(2)
    assert (document.index, document.id, document.source, document.rows) == (2, "doc-2", "file 2.txt", range(3, 10))
    assert len(document) == 7 and document.token_id.tolist() == shared.token_ids[3:10].tolist()
    assert torch.equal(document["resid_post@3"], shared.states[POINT][3:10])
    assert torch.equal(document[POINT], shared.states[POINT][3:10])
    assert store.document(1)[POINT].shape == (0, 6)
    with pytest.raises(IndexError, match="document 5 is not one of 5"):
        store.document(5)


def test_a_hook_point_that_is_not_there(shared: Made, tmp_path: Path) -> None:
    assert issubclass(UnknownHookPointError, KeyError) and issubclass(UnknownHookPointError, StoreError)
    with pytest.raises(UnknownHookPointError) as caught:
        open_store(shared.path)["resid_post@1"]
    assert str(caught.value) == (
        f"`hook point` must be one that {shared.path} holds (embed, resid_post@0, resid_post@3, final_norm), "
        "but is 'resid_post@1' instead."
    )
    entries = tuple(
        type(shared.manifest.hook_points[0]).of(HookPoint("resid_post", layer), num_layers=24) for layer in range(24)
    )
    store = open_store(make_store(tmp_path / "s", hook_points=entries).path)
    short = (
        r"\(resid_post@0, resid_post@1, resid_post@2, resid_post@3, ..., resid_post@21, resid_post@22, resid_post@23\)"
    )
    with pytest.raises(UnknownHookPointError, match=short):
        store.document(0)["embed"]


def test_an_empty_store_can_be_read(tmp_path: Path) -> None:
    store = open_store(make_store(tmp_path / "s", lengths=(0,)).path)
    assert store["embed"][:].shape == (0, 6) and store["embed"][[]].shape == (0, 6)
    assert list(store["embed"]) == [] and store.document(0)["embed"].shape == (0, 6)


def test_there_is_no_store(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(FileNotFoundError) as caught:
            open_store(path)
        assert isinstance(caught.value, StoreNotFoundError)
        assert (
            str(caught.value)
            == f"`store` must be the folder of a store, with a manifest.json, but is '{path}' instead."
        )


def test_an_unfinished_store_says_so(tmp_path: Path) -> None:
    session.begin(tmp_path / "s", {}, overwrite=False)
    said = rf"must be a finished store; .* left unfinished \(begun 2.* by process {os.getpid()} on .*\), but is '.*/s'"
    with pytest.raises(StoreNotFoundError, match=said):
        open_store(tmp_path / "s")


def test_shards_are_opened_when_asked_for(made: Made) -> None:
    for path in made.path.glob("*/00000[13].safetensors"):
        path.unlink()
    store = open_store(made.path)
    assert torch.equal(store[POINT][[0, 10, 22]], made.states[POINT][[0, 10, 22]])
    with pytest.raises(StoreError) as caught:
        store[POINT][5]
    missing = made.path / "resid_post@3/000001.safetensors"
    assert str(caught.value) == (
        f"`{missing}` must be a regular file, reached through no symbolic link, that can be read, "
        "but is 'No such file or directory' instead."
    )


def spoil_swap(folder: Path) -> None:
    first, second = folder / "resid_post@3/000000.safetensors", folder / "resid_post@3/000001.safetensors"
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)


def spoil_point(folder: Path) -> None:
    (folder / "resid_post@3/000000.safetensors").write_bytes((folder / "resid_post@0/000000.safetensors").read_bytes())


def spoil_size(folder: Path) -> None:
    os.truncate(folder / "resid_post@3/000000.safetensors", 200)


def spoil_norm(folder: Path) -> None:
    path = folder / "resid_post@3/000000.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"before"', b'"after" '))


def spoil_manifest(folder: Path) -> None:
    data = json.loads((folder / "manifest.json").read_text())
    data["dtypes"]["stored"] = "bf16"
    (folder / "manifest.json").write_text(json.dumps(data))


def spoil_hidden(folder: Path) -> None:
    data = json.loads((folder / "manifest.json").read_text())
    data["hidden_size"] = 3
    (folder / "manifest.json").write_text(json.dumps(data))


def spoil_bytes(folder: Path) -> None:
    data = json.loads((folder / "manifest.json").read_text())
    data["hook_points"][2]["shards"][0]["bytes"] += 1
    (folder / "manifest.json").write_text(json.dumps(data))


def spoil_pipe(folder: Path) -> None:
    (folder / "resid_post@3/000000.safetensors").unlink()
    os.mkfifo(folder / "resid_post@3/000000.safetensors")


def spoil_link(folder: Path) -> None:
    path = folder / "resid_post@3/000000.safetensors"
    path.rename(folder.parent / "outside.safetensors")
    path.symlink_to(folder.parent / "outside.safetensors")


def spoil_folder_link(folder: Path) -> None:
    (folder / "resid_post@3").rename(folder.parent / "outside")
    (folder / "resid_post@3").symlink_to(folder.parent / "outside")


def spoil_loop(folder: Path) -> None:
    path = folder / "resid_post@3/000000.safetensors"
    path.unlink()
    path.symlink_to(path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_swap, "must have first_row 0, as the manifest says, but is '5'"),
        (spoil_point, r"must have tensors \{'resid_post@3': .*but is \{'resid_post@0': "),
        (spoil_size, "must be .* bytes long, as its header says, but is 200"),
        (spoil_norm, "must have norm before, as the manifest says, but is 'after'"),
        (spoil_manifest, r"must have tensors .*BF16.* but is .*F32"),
        (spoil_hidden, r"must have tensors .*\(5, 3\).* but is .*\(5, 6\)"),
        (spoil_bytes, "must have bytes .*, as the manifest says, but is "),
        (spoil_pipe, "must be a regular file, .* but is 'prw"),
        (spoil_link, "reached through no symbolic link, that can be read, but is 'Too many levels of symbolic links'"),
        (spoil_folder_link, "reached through no symbolic link, that can be read, but is 'Too many levels of symbolic"),
        (spoil_loop, "reached through no symbolic link"),
    ],
)
def test_a_shard_that_is_not_what_the_manifest_says(made: Made, spoil: Any, message: str) -> None:
    spoil(made.path)
    store = open_store(made.path)
    with pytest.raises(StoreError, match=message) as caught:
        store[POINT][0]
    assert "resid_post@3/000000.safetensors" in str(caught.value)


def test_the_store_itself_may_be_a_link(made: Made) -> None:
    (made.path.parent / "link").symlink_to(made.path)
    assert torch.equal(open_store(made.path.parent / "link")[POINT][:], made.states[POINT])


@pytest.mark.parametrize("name", ["manifest.json", "tokens/000000.safetensors", "tokens/000000.documents.jsonl"])
def test_no_file_is_read_outside_the_store(made: Made, name: str) -> None:
    (made.path / name).rename(made.path.parent / "outside")
    (made.path / name).symlink_to(made.path.parent / "outside")
    with pytest.raises(StoreError, match=f"{name}` must be a regular file, reached through no symbolic link"):
        open_store(made.path).document(0)


def test_more_token_parts_than_this_release_reads(made: Made) -> None:
    data = json.loads((made.path / "manifest.json").read_text())
    data["tokens"].append(data["tokens"][0] | {"first_row": ROWS, "first_document": 5, "rows": 0, "documents": 0})
    (made.path / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(StoreError, match=r"manifest.json: tokens` must be one part, .* but is 2 instead"):
        open_store(made.path)


def test_unknown_version(made: Made) -> None:
    text = (made.path / "manifest.json").read_text()
    (made.path / "manifest.json").write_text(text.replace('"version": 1', '"version": 9'))
    with pytest.raises(
        StoreError, match=re.escape("that this release of nemo_qwen_hidden reads (1), but is 9 instead")
    ):
        open_store(made.path)
